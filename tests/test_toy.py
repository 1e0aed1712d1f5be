"""The toy world: no two sprites alike, captions, and subjects: the shipped ones and your own."""

import io
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import png
from PIL import Image

from data import toy

SUBJECTS = Path(toy.__file__).parent / "subjects"


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_the_world_has_9072_creatures_and_no_two_sprites_are_alike():
    rgb, mask, parts = toy.sprites()
    assert len(rgb) - toy.PLAIN == 9072
    assert len(parts[toy.PLAIN :].unique(dim=0)) == 9072
    visible = torch.where(mask[..., None], rgb, 9)  # 9 is no color
    assert len(visible.flatten(1).unique(dim=0)) == len(rgb)


def test_no_two_backgrounds_are_alike():
    assert len(toy.backgrounds().flatten(1).unique(dim=0)) == 21


def test_class_images_never_bear_a_rare_word(generator):
    rare = torch.tensor([toy.WORD[word] for word in toy.RARE])
    _, words = toy.sample_scenes(2000, generator, rare=0)
    assert not torch.isin(words, rare).any()
    _, words = toy.sample_scenes(2000, generator)
    assert torch.isin(words, rare).any()


@pytest.mark.parametrize(
    "text, words",
    [
        ("sks creature on green stripes", ["sks", "creature", "", "", "", "green", "stripes"]),
        ("a red circle left on plain blue", ["red", "circle", "", "", "left", "blue", "plain"]),
        (
            "Red circle and zwx creature, on checks",
            ["red", "circle", "zwx", "creature", "", "", "checks"],
        ),
        ("", [""] * 7),
    ],
)
def test_caption(text, words):
    assert [toy.VOCAB[word] for word in toy.caption(text)] == words


@pytest.mark.parametrize(
    "text, match",
    [
        ("a red dog", "unknown word 'dog'.*circle"),
        ("red blue circle", "'blue'"),
        ("red circle on green circle", "'circle'"),
        ("plain circle", "'plain'"),
    ],
)
def test_impossible_captions_are_refused(text, match):
    with pytest.raises(ValueError, match=match):
        toy.caption(text)


def test_subjects_are_drawn_bit_for_bit(tmp_path):
    toy.write_subjects(tmp_path)
    files = sorted(file.relative_to(SUBJECTS) for file in SUBJECTS.rglob("*.*"))
    assert len(files) == 8 * 11
    assert files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    for file in files:
        if file.suffix == ".png":  # the pixels: the bytes of a file depend on zlib's version
            shipped = np.array(Image.open(SUBJECTS / file))
            drawn = np.array(Image.open(tmp_path / file))
            assert (shipped == drawn).all()
        else:
            assert (SUBJECTS / file).read_text() == (tmp_path / file).read_text()


def test_any_image_is_resized_and_flattened(tmp_path):
    Image.new("RGBA", (64, 48), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "b.JPG")
    (tmp_path / "b.txt").write_text("on green stripes")
    images, words = toy.load_subject(tmp_path)
    assert words[0].tolist() == toy.caption("sks creature")
    assert words[1].tolist() == toy.caption("sks creature on green stripes")
    assert images.shape == (2, 3, 16, 16)
    assert (images[0] == -1).all()  # transparent red becomes black
    assert (images[1] > 0.99).all()


def test_a_folder_without_parts_has_no_parts(tmp_path):
    assert toy.read_parts(tmp_path) is None


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_folders_without_images_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="PNG or JPEG"):
        toy.load_subject(tmp_path / folder)


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(ValueError, match="a.png"):
        toy.load_subject(tmp_path)


def test_an_incomplete_parts_file_is_refused(tmp_path):
    (tmp_path / "parts.txt").write_text("body box\n")
    with pytest.raises(ValueError, match="ears"):
        toy.read_parts(tmp_path)


# --------------------------------------------------------------------------------------------------
# Images and captions of your own
# --------------------------------------------------------------------------------------------------


def picture(suffix, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "red").save(file, suffix, **options)
    return file.getvalue()


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "webp", "ppm", "eps"])
def test_other_formats_are_refused_whatever_their_name(kind, tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    def ghostscript(*args, **kwargs):
        pytest.fail("an EPS file reached Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    (tmp_path / "0.png").write_bytes(picture(kind))
    with pytest.raises(ValueError, match="0.png can't be read"):
        toy.load_subject(tmp_path)


def test_png_jpeg_and_photos_from_phones_are_read_whatever_their_name(tmp_path):
    preview = Image.new("RGB", (8, 8), "blue")
    (tmp_path / "0.png").write_bytes(picture("jpeg"))
    (tmp_path / "1.jpg").write_bytes(picture("png"))
    (tmp_path / "2.jpg").write_bytes(picture("mpo", save_all=True, append_images=[preview]))
    images, _ = toy.load_subject(tmp_path)
    red = torch.tensor([1.0, -1, -1]).view(3, 1, 1)
    assert (images - red).abs().max() < 0.05


def test_hidden_files_are_not_images(tmp_path):
    """macOS writes ._0.png beside 0.png on other systems' disks."""
    (tmp_path / "0.png").write_bytes(picture("png"))
    (tmp_path / "._0.png").write_bytes(b"Mac OS X        ")
    images, _ = toy.load_subject(tmp_path)
    assert len(images) == 1


def test_a_byte_order_mark_and_zero_width_spaces_are_harmless(tmp_path):
    shutil.copytree(SUBJECTS / "mo", tmp_path / "marked")
    for file in (tmp_path / "marked").glob("*.txt"):
        text = file.read_text()
        file.write_text("\ufeff\u200b" + text.replace(" ", " \u200b"), encoding="utf-8")
    _, captions = toy.load_subject(SUBJECTS / "mo")
    _, marked = toy.load_subject(tmp_path / "marked")
    assert torch.equal(marked, captions)
    assert torch.equal(toy.read_parts(tmp_path / "marked"), toy.read_parts(SUBJECTS / "mo"))
    assert toy.caption("red\u200b \u2060circle") == toy.caption("red circle")


def test_a_broken_exif_block_does_not_reject_an_intact_image(tmp_path):
    (tmp_path / "0.png").write_bytes(picture("png", exif=b"junk"))
    (tmp_path / "1.png").write_bytes(picture("png", exif=b"II*\0"))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    exif[0x010F] = "maker"
    left = Image.new("RGB", (16, 16), "red")
    left.paste("blue", (0, 0, 8, 16))
    file = io.BytesIO()
    left.save(file, "jpeg", exif=exif, quality=100, subsampling=0)
    good = file.getvalue()
    broken = good.replace(b"\x01\x0f\x00\x02", b"\x01\x03\x00\x02")  # a number that is a text
    assert broken != good
    (tmp_path / "2.jpg").write_bytes(good)
    (tmp_path / "3.jpg").write_bytes(broken)
    images, _ = toy.load_subject(tmp_path)
    assert torch.equal(images[2], images[3])


@pytest.mark.parametrize("side", [8001, 11_000])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(side, tmp_path, recwarn):
    (tmp_path / "0.png").write_bytes(png(side, side, 1, 0, b""))
    with pytest.raises(ValueError, match="0.png can't be read .it has more than 64,000,000 pixels"):
        toy.load_subject(tmp_path)
    assert not recwarn.list


def test_images_of_unusual_kinds_are_read_right(tmp_path):
    """Palette, 16 bits of color, transparency and CMYK are ordinary images."""
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    row = b"\0" + struct.pack(">HHH", 65535, 0, 0) * 16
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    (tmp_path / "sixteen.png").write_bytes(png(16, 16, 16, 2, row * 16))
    red.putalpha(255)
    red.save(tmp_path / "alpha.png")

    images, _ = toy.load_subject(tmp_path)
    assert images.shape == (4, 3, 16, 16)
    expected = torch.tensor([1.0, -1, -1]).view(3, 1, 1)
    assert (images - expected).abs().max() < 0.05

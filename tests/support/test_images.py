"""Folders and files of other people's images."""

import io

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from support.images import images_in, read_rgb

RED = Image.new("RGB", (16, 16), "red")


def encoded(image, kind, **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def near(image, other):
    """Two images are alike, but for what JPEG loses."""
    assert image.mode == "RGB"
    assert image.size == other.size
    difference = np.array(image).astype(int) - np.array(other.convert("RGB"))
    return abs(difference).max() < 8


PREVIEW = Image.new("RGB", (8, 8), "blue")
KINDS = {  # of images that are read, whatever the name of their file
    "palette": encoded(RED.convert("P"), "png"),
    "gray": encoded(Image.new("L", (16, 16), 255), "png"),
    "alpha": encoded(RED.convert("RGBA"), "png"),
    "jpeg": encoded(RED, "jpeg", quality=100),
    "cmyk": encoded(RED.convert("CMYK"), "jpeg", quality=100),
    "phone": encoded(RED, "mpo", quality=100, save_all=True, append_images=[PREVIEW]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_png_and_jpeg_of_every_kind_are_read_whatever_their_name(kind, tmp_path):
    path = tmp_path / "0.png"
    path.write_bytes(KINDS[kind])
    expected = Image.new("RGB", (16, 16), "white") if kind == "gray" else RED
    assert near(read_rgb(path), expected)


def test_what_is_transparent_becomes_black(tmp_path):
    Image.new("RGBA", (16, 16), (255, 0, 0, 0)).save(tmp_path / "0.png")
    assert near(read_rgb(tmp_path / "0.png"), Image.new("RGB", (16, 16)))


def test_a_photo_is_turned_as_its_camera_says(tmp_path):
    photo = Image.new("RGB", (16, 8), "red")
    photo.paste("blue", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # held on its side
    photo.save(tmp_path / "0.jpg", exif=exif, quality=100, subsampling=0)
    assert near(read_rgb(tmp_path / "0.jpg"), photo.rotate(-90, expand=True))


def animation():
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    return encoded(frames[0], "png", save_all=True, append_images=frames[1:])


def flipped_bit():
    good = bytearray(encoded(RED, "png"))
    good[len(good) // 2] ^= 1
    return bytes(good)


WRONG_IMAGES = {
    "no bytes": b"",
    "text": b"no image",
    "cut": encoded(RED, "png")[:50],
    "flipped bit": flipped_bit(),
    "animation": animation(),
    "16 bits": encoded(Image.new("I;16", (16, 16)), "png"),
}
for kind in ("gif", "bmp", "tiff", "webp", "ppm", "eps"):
    WRONG_IMAGES[kind] = encoded(RED, kind)


@pytest.mark.parametrize("kind", WRONG_IMAGES)
def test_what_is_no_whole_png_or_jpeg_is_refused_by_name(kind, tmp_path, monkeypatch):
    def ghostscript(*args, **kwargs):
        pytest.fail("an EPS file reached Ghostscript")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", ghostscript)
    (tmp_path / "0.png").write_bytes(WRONG_IMAGES[kind])
    with pytest.raises(ValueError, match=r"0.png can't be read .*; mend or remove it"):
        read_rgb(tmp_path / "0.png")


def test_an_image_that_would_fill_the_memory_is_refused_by_name(tmp_path, monkeypatch):
    RED.save(tmp_path / "0.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="0.png can't be read .*exceeds limit"):
        read_rgb(tmp_path / "0.png")


def test_the_images_of_a_folder_come_in_the_order_of_their_names_and_no_hidden_ones(
    tmp_path, capsys
):
    """macOS writes ._a.png beside a.png on other systems' disks."""
    for name in ("b.JPG", "a.png", "c.jpeg", "a.txt", "._a.png"):
        (tmp_path / name).touch()
    assert [file.name for file in images_in(tmp_path)] == ["a.png", "b.JPG", "c.jpeg"]
    assert capsys.readouterr().err == ""


def test_files_that_are_not_used_are_said_in_one_line(tmp_path, capsys):
    for name in ("a.png", "b.webp", "c.heic"):
        (tmp_path / name).touch()
    assert len(images_in(tmp_path)) == 1
    err = capsys.readouterr().err
    assert "of 3 files 2 aren't used, such as b.webp" in err
    assert err.count("\n") == 1


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    for folder in (tmp_path, tmp_path / "missing", tmp_path / "notes.txt"):
        with pytest.raises(ValueError, match="not a folder with PNG or JPEG files"):
            images_in(folder)

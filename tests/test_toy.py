"""The toy world: no two sprites alike, captions, and subjects, the shipped ones and your own."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
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


def test_an_image_of_any_size_gets_the_worlds_and_its_text_file_adds_to_its_caption(tmp_path):
    Image.new("RGB", (64, 48), (255, 0, 0)).save(tmp_path / "a.png")
    Image.new("RGB", (16, 16), "white").save(tmp_path / "b.JPG")
    (tmp_path / "b.txt").write_text("on green stripes")
    images, words = toy.load_subject(tmp_path, "zwx")
    assert words[0].tolist() == toy.caption("zwx creature")
    assert words[1].tolist() == toy.caption("zwx creature on green stripes")
    red = torch.tensor([1.0, -1, -1]).view(3, 1, 1).expand(3, 16, 16)
    assert torch.equal(images[0], red)
    assert (images[1] > 0.99).all()


def test_the_mark_that_windows_puts_first_is_not_a_word(tmp_path):
    shutil.copytree(SUBJECTS / "mo", tmp_path / "marked")
    for file in (tmp_path / "marked").glob("*.txt"):
        file.write_text("\ufeff" + file.read_text(), encoding="utf-8")
    _, captions = toy.load_subject(SUBJECTS / "mo")
    _, marked = toy.load_subject(tmp_path / "marked")
    assert torch.equal(marked, captions)
    assert torch.equal(toy.read_parts(tmp_path / "marked"), toy.read_parts(SUBJECTS / "mo"))


def test_a_folder_without_parts_has_no_parts(tmp_path):
    assert toy.read_parts(tmp_path) is None


WINGS = "".join(f"{key} wings\n" for key in toy.KEYS).encode()
WRONG_FILES = {  # the bytes of each, wrong in one way after the other
    "0.txt": [b"on tartan", b"red " * 9999, b"sks", b"\xff\xfe\x00"],
    "parts.txt": [b"body box\n", WINGS, b"", b"\xff\xfe"],
}


@pytest.mark.parametrize("name", WRONG_FILES)
def test_a_caption_and_parts_that_say_nothing_known_are_refused_in_one_line(name, tmp_path):
    shutil.copytree(SUBJECTS / "mo", tmp_path / "mo")
    for content in WRONG_FILES[name]:
        (tmp_path / "mo" / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as caught:
            toy.load_subject(tmp_path / "mo")
            toy.read_parts(tmp_path / "mo")
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 700


def test_a_page_has_a_border_around_each_image_and_white_where_the_last_row_ends():
    page = toy.tile(torch.full((3, 3, 16, 16), -1.0), columns=2, zoom=2)
    assert page.size == (2 * 18 * 2, 2 * 18 * 2)
    pixels = np.array(page)
    assert (pixels[2:34, 2:34] == 0).all()  # an image, black
    assert (pixels[:2] == 255).all()  # the border
    assert (pixels[36:, 36:] == 255).all()  # the image that the last row lacks

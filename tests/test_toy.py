"""The toy world: no two sprites alike, captions, files, and subjects drawn bit for bit."""

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

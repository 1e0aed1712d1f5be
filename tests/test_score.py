"""The exact scores: one on rendered images, chance on others, lower if captions are wrong."""

from pathlib import Path

import pytest
import torch

from data import toy
from data.score import matches, read_background, read_object, score

SUBJECTS = Path(toy.__file__).parent / "subjects"
GREEN_STRIPES = torch.tensor([4])  # color 1 of 7, pattern 1 of 3


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def scenes(n, generator, monkeypatch):
    """Images (n, 3, 16, 16) of n scenes, and captions (n, SLOTS) that say all there is to say."""
    monkeypatch.setattr(toy, "DROP", torch.zeros(toy.SLOTS))
    images, words = toy.sample_scenes(2 * n, generator)
    whole = words[:, 5] > 0  # a tenth of the captions is still emptied
    return images[whole][:n], words[whole][:n]


def test_rendered_images_score_one(generator, monkeypatch):
    images, words = scenes(200, generator, monkeypatch)
    assert (words[:, 3] > 0).any()  # some scenes have two objects
    assert (score(images, words)["prompt"] == 1).all()


def test_read_object_finds_what_drawing_every_sprite_at_every_spot_finds(generator):
    n = 4
    noise = torch.randn((n, 3, 16, 16), generator=generator)
    images = toy.render(GREEN_STRIPES, []) + 0.5 * noise
    assert (read_background(images) == GREEN_STRIPES).all()

    sprites = torch.arange(len(toy.sprites().rgb))
    distances = []
    for y, x in toy.SPOTS:
        ys = torch.full_like(sprites, y)
        xs = torch.full_like(sprites, x)
        drawn = toy.render(GREEN_STRIPES.expand(len(sprites)), [(sprites, ys, xs)])
        distances.append(torch.cdist(images.flatten(1).double(), drawn.flatten(1).double()))
    nearest = torch.cat(distances, dim=1).argmin(1)  # spot number * number of sprites + sprite

    sprite, spot = read_object(images)
    assert (sprite == nearest % len(sprites)).all()
    assert (spot == nearest // len(sprites)).all()


def test_scores_withstand_noise(generator, monkeypatch):
    images, words = scenes(100, generator, monkeypatch)
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    assert score(noisy, words)["prompt"].mean() > 0.99


@pytest.mark.parametrize(
    "slot, kind",
    [
        (0, tuple(toy.COLORS)),
        (1, (*toy.SHAPES, "creature")),
        (2, tuple(toy.COLORS)),  # those of the second object
        (3, (*toy.SHAPES, "creature")),
        (4, tuple(toy.PLACES)),
        (5, tuple(toy.COLORS)),
        (6, toy.PATTERNS),
    ],
)
def test_one_wrong_word_lowers_the_score(slot, kind, generator, monkeypatch):
    images, words = scenes(100, generator, monkeypatch)
    rare = torch.tensor([toy.WORD[word] for word in toy.RARE])
    said = (words[:, slot] > 0) & ~torch.isin(words[:, slot], rare)
    assert said.any()

    first = toy.WORD[kind[0]]
    wrong = words.clone()
    wrong[said, slot] = first + (words[said, slot] - first + 1) % len(kind)  # the next of its kind
    assert (score(images, wrong)["prompt"][said] < 1).all()


def test_subject_scores_are_one_on_the_subject_and_chance_on_others(generator):
    n = 200
    table = toy.sprites()[2]
    subject = toy.PLAIN + 1234
    words = torch.tensor([toy.caption("sks creature on green stripes")]).expand(n, -1)

    def mean_scores(sprite):
        spots = torch.tensor(toy.SPOTS)[torch.randint(len(toy.SPOTS), (n,), generator=generator)]
        images = toy.render(GREEN_STRIPES.expand(n), [(sprite, spots[:, 0], spots[:, 1])])
        scores = score(images, words, table[subject], toy.WORD["sks"])
        return {key: value.mean() for key, value in scores.items()}

    mine = mean_scores(torch.full((n,), subject))
    assert mine["parts"] == 1
    assert mine["identity"] == 1
    assert mine["prompt"] == 1

    creatures = len(table) - toy.PLAIN
    others = mean_scores(toy.PLAIN + torch.randint(creatures, (n,), generator=generator))
    chance = (1 / 3 + 1 / 4 + 1 / 3 + 1 / 2 + 1 / 3 + 1 / 7 + 1 / 7) / 7
    assert abs(others["parts"] - chance) < 0.03
    assert others["identity"] < 0.01


@pytest.mark.parametrize(
    "prompt, subject",
    [
        ("red creature and sks creature", toy.PLAIN + 5),
        ("sks creature and red creature", toy.PLAIN + 4000),
    ],
)
def test_of_two_objects_the_one_with_the_name_is_scored(prompt, subject):
    y = torch.tensor([3])
    on_the_left = (torch.tensor([toy.PLAIN + 4000]), y, torch.tensor([1]))
    on_the_right = (torch.tensor([toy.PLAIN + 5]), y, torch.tensor([9]))
    image = toy.render(torch.tensor([0]), [on_the_left, on_the_right])
    words = torch.tensor([toy.caption(prompt)])
    scores = score(image, words, toy.sprites()[2][subject], toy.WORD["sks"])
    assert scores["identity"] == 1


def test_matches_tells_whole_objects_from_damaged_ones(generator, monkeypatch):
    images, words = scenes(200, generator, monkeypatch)
    images = images[words[:, 3] == 0]  # those with one object
    assert matches(images + 0.05 * torch.randn(images.shape, generator=generator)).all()
    images[:, :, 7, 7] = -images[:, :, 7, 7].sign()  # damage one pixel
    assert matches(images).float().mean() < 0.1


@pytest.mark.parametrize("name", toy.TUNING + toy.TABLE)
def test_each_subject_is_the_creature_that_its_parts_file_names(name):
    images, words = toy.load_subject(SUBJECTS / name)
    parts = toy.read_parts(SUBJECTS / name)
    assert score(images, words, parts, toy.WORD["sks"])["identity"].all()
    assert matches(images).all()


@pytest.mark.parametrize("name", toy.TUNING + toy.TABLE)
def test_each_subject_is_as_its_captions_say_on_two_backgrounds(name):
    images, words = toy.load_subject(SUBJECTS / name)
    assert (words[:, 4:] > 0).all()  # a place, a background color and a pattern
    assert (score(images, words)["prompt"] == 1).all()
    assert len(read_background(images).unique()) == 2

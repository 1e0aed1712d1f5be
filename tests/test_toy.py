"""The toy world: exact scores on rendered pictures, chance on others, and a world that is drawn the same each time."""
import pytest
import torch
from PIL import Image

from data import toy


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def scenes(n, generator, monkeypatch):
    """n scenes with their whole captions."""
    monkeypatch.setattr(toy, "DROP", torch.zeros(toy.SLOTS))
    images, words = toy.sample_scenes(2 * n, generator)
    whole = words[:, 5] > 0  # a tenth of the captions is empty all the same
    return images[whole][:n], words[whole][:n]


def test_the_world_has_9072_creatures_and_no_two_sprites_alike():
    rgb, mask, parts = toy.sprites()
    assert len(rgb) - toy.PLAIN == 9072 == len(parts[toy.PLAIN:].unique(dim=0))
    assert len(torch.where(mask[..., None], rgb, 9).flatten(1).unique(dim=0)) == len(rgb)
    assert len(toy.backgrounds().flatten(1).unique(dim=0)) == 21


def test_rendered_pictures_score_one(generator, monkeypatch):
    images, words = scenes(300, generator, monkeypatch)
    assert (words[:, 3] > 0).any() and (toy.score(images, words)["prompt"] == 1).all()


def test_scores_stand_noise_and_fall_with_wrong_captions(generator, monkeypatch):
    images, words = scenes(100, generator, monkeypatch)
    noisy = images + 0.1 * torch.randn(images.shape, generator=generator)
    assert toy.score(noisy, words)["prompt"].mean() > 0.99
    for slot in (0, 1, 4, 5, 6):  # one word of each caption turned into another of its kind
        wrong, said = words.clone(), words[:, slot] > 0
        kinds = {0: toy.COLORS, 1: (*toy.SHAPES, "creature"), 4: toy.PLACES, 5: toy.COLORS, 6: toy.PATTERNS}[slot]
        first, n = toy.WORD[next(iter(kinds))], len(kinds)
        said &= ~((wrong[:, slot] >= toy.WORD["sks"]) & (wrong[:, slot] <= toy.WORD["qvk"]))
        wrong[said, slot] = first + (wrong[said, slot] - first + 1) % n
        assert said.any() and (toy.score(images, wrong)["prompt"][said] < 1).all()


def test_subject_scores_are_one_on_the_subject_and_chance_on_others(generator):
    table, n = toy.sprites()[2], 400
    subject = table[toy.PLAIN + 1234]
    words = torch.tensor([toy.caption("sks creature on green stripes")]).expand(n, -1)
    green = torch.full((n,), toy.read_background(toy.render(torch.tensor([4]), []))[0])

    def draw(sprite):
        spots = torch.tensor(toy.SPOTS)[torch.randint(len(toy.SPOTS), (n,), generator=generator)]
        images = toy.render(green, [(sprite, spots[:, 0], spots[:, 1])])
        return {key: value.mean() for key, value in toy.score(images, words, subject, toy.WORD["sks"]).items()}

    mine = draw(torch.full((n,), toy.PLAIN + 1234))
    assert mine["parts"] == mine["identity"] == mine["prompt"] == 1
    others = draw(toy.PLAIN + torch.randint(len(table) - toy.PLAIN, (n,), generator=generator))
    chance = (1 / 3 + 1 / 4 + 1 / 3 + 1 / 2 + 1 / 3 + 1 / 7 + 1 / 7) / 7
    assert abs(others["parts"] - chance) < 0.03 and others["identity"] < 0.01


def test_subject_beside_another_object_is_the_one_that_is_scored():
    table, side = toy.sprites()[2], torch.tensor([3])
    mine, other = torch.tensor([toy.PLAIN + 5]), torch.tensor([toy.PLAIN + 4000])
    image = toy.render(torch.tensor([0]), [(other, side, torch.tensor([1])), (mine, side, torch.tensor([9]))])
    for prompt, parts in (("red creature and sks creature", mine), ("sks creature and red creature", other)):
        scores = toy.score(image, torch.tensor([toy.caption(prompt)]), table[parts[0]], toy.WORD["sks"])
        assert scores["identity"] == 1


def test_matches_knows_whole_pictures(generator, monkeypatch):
    images, words = scenes(200, generator, monkeypatch)
    images = images[words[:, 3] == 0]
    assert toy.matches(images + 0.05 * torch.randn(images.shape, generator=generator)).all()
    images[:, :, 7, 7] = -images[:, :, 7, 7].sign()  # one pixel
    assert toy.matches(images).float().mean() < 0.1


def test_class_pictures_never_bear_a_rare_word(generator):
    words = toy.sample_scenes(2000, generator, rare=0)[1]
    assert not torch.isin(words, torch.tensor([toy.WORD[word] for word in toy.RARE])).any()
    words = toy.sample_scenes(2000, generator)[1]
    assert torch.isin(words, torch.tensor([toy.WORD[word] for word in toy.RARE])).any()


@pytest.mark.parametrize("text, words", [
    ("sks creature on green stripes", ["sks", "creature", "", "", "", "green", "stripes"]),
    ("a red circle left on plain blue", ["red", "circle", "", "", "left", "blue", "plain"]),
    ("Red circle and zwx creature, on checks", ["red", "circle", "zwx", "creature", "", "", "checks"]),
    ("", [""] * 7),
])
def test_caption(text, words):
    assert [toy.VOCAB[word] for word in toy.caption(text)] == words


@pytest.mark.parametrize("text, match", [("a red dog", "unknown word 'dog'.*circle"), ("red blue circle", "'blue'"),
                                         ("red circle on green circle", "'circle'"), ("plain circle", "'plain'")])
def test_captions_that_cannot_be(text, match):
    with pytest.raises(ValueError, match=match):
        toy.caption(text)


def test_subjects_are_drawn_bit_for_bit(tmp_path):
    toy.write_subjects(tmp_path)
    shipped = toy.Path(toy.__file__).parent / "subjects"
    files = sorted(file.relative_to(shipped) for file in shipped.rglob("*.*"))
    assert len(files) == 8 * 11 and files == sorted(file.relative_to(tmp_path) for file in tmp_path.rglob("*.*"))
    for file in files:
        if file.suffix == ".png":
            assert (toy.np.array(Image.open(shipped / file)) == toy.np.array(Image.open(tmp_path / file))).all()
        else:
            assert (shipped / file).read_text() == (tmp_path / file).read_text()


@pytest.mark.parametrize("name", toy.TUNING + toy.TABLE)
def test_each_subject_is_the_creature_that_its_parts_file_names(name):
    folder = toy.Path(toy.__file__).parent / "subjects" / name
    (images, words), parts = toy.load_subject(folder), toy.read_parts(folder)
    assert toy.score(images, words, parts, toy.WORD["sks"])["identity"].all() and toy.matches(images).all()
    assert (words[:, 4:] > 0).all() and (toy.score(images, words)["prompt"] == 1).all()
    assert len(toy.read_background(images).unique()) == 2


def test_any_picture_is_resized_and_flattened(tmp_path):
    Image.new("RGBA", (64, 48), (255, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (16, 16), 255).save(tmp_path / "b.JPG")
    (tmp_path / "b.txt").write_text("on green stripes")
    images, words = toy.load_subject(tmp_path)
    assert words.tolist() == [toy.caption("sks creature"), toy.caption("sks creature on green stripes")]
    assert images.shape == (2, 3, 16, 16) and (images[0] == -1).all() and (images[1] > 0.99).all()
    assert toy.read_parts(tmp_path) is None


def test_bad_folders(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ValueError, match="PNG or JPEG"):
            toy.load_subject(folder)
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ValueError, match="a.png"):
        toy.load_subject(tmp_path)
    (tmp_path / "parts.txt").write_text("body box\n")
    with pytest.raises(ValueError, match="ears"):
        toy.read_parts(tmp_path)

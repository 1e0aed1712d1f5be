"""The scripts as a user runs them, end to end, and what a step of training does."""

import contextlib
import copy
import io
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents_of, error_of, run, spread
from PIL import Image

import pretrain
import sample
import train
from data import toy
from model import Diffusion, UNet
from quant import QuantLayer, adapter, deltas, load_adapter, merge, quantize
from sample import BASE, load_model
from support.files import load, save
from support.runs import Run

MO = ROOT / "data" / "subjects" / "mo"
QUICK = ("--sample-steps", 1, "--batch", 2, "--calibration", "minmax", "--device", "cpu")


@pytest.fixture(scope="module", autouse=True)
def one_image_per_prompt():
    """train.py draws and scores 8 images before and after it trains, and not 40."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "IMAGES_PER_PROMPT", 1)
        yield


# --------------------------------------------------------------------------------------------------
# A run from end to end
# --------------------------------------------------------------------------------------------------

FLAGS = (*QUICK, "--buckets", 2, "--steps", 3)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a finished run, and what the run printed."""
    folder = tmp_path_factory.mktemp("a run") / "mo"
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert run(train, *FLAGS, "--out", folder) == 0
    return folder, out.getvalue()


def test_a_run_writes_a_model_an_adapter_and_images_and_prints_a_row(tuned):
    folder, out = tuned
    names = {file.name for file in folder.iterdir()}
    assert names == {"adapter.pt", "grid.png", "lock", "state.pt", "tuned.pt"}
    assert "TuneQDM, 4 bits" in out
    assert out.count(" -> ") == 3  # each score before and after
    assert f"--ckpt {folder / 'tuned.pt'}" in out
    assert Image.open(folder / "grid.png").width == len(train.PROMPTS) * 18 * 8
    trained = sum(delta.numel() for delta in deltas(load_model(folder / "tuned.pt")).values())
    assert 2 * trained < (folder / "adapter.pt").stat().st_size < 2 * trained + 3_000  # in float16
    assert (folder / "tuned.pt").stat().st_size < 2.2e6


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tuned, tmp_path):
    adapters = []
    for seed in (0, 1):
        out = tmp_path / str(seed)
        assert run(train, *FLAGS, "--seed", seed, "--out", out) == 0
        adapters.append((out / "adapter.pt").read_bytes())
    assert (tuned[0] / "adapter.pt").read_bytes() == adapters[0] != adapters[1]
    assert (tuned[0] / "tuned.pt").read_bytes() == (tmp_path / "0" / "tuned.pt").read_bytes()
    assert load(tuned[0] / "adapter.pt", "adapter")["deltas"].any()


def test_sample_draws_a_page_from_tuned_pt(tuned, tmp_path):
    png = tmp_path / "deep" / "a.png"
    flags = ("--prompt", "sks creature on green stripes", "--n", 9, "--steps", 1)
    assert run(sample, "--ckpt", tuned[0] / "tuned.pt", *flags, "--out", png) == 0
    assert Image.open(png).size == (8 * 18 * 8, 2 * 18 * 8)  # rows of eight


def test_an_adapter_on_its_base_draws_what_tuned_pt_draws(tuned, tmp_path):
    folder, _ = tuned
    base = quantize(load_model(BASE), 4, 2, calibration="minmax")
    save(contents_of(base), tmp_path / "base.pt")
    adapter = ("--adapter", folder / "adapter.pt")
    drawn = []
    for flags in (
        ("--ckpt", folder / "tuned.pt"),
        ("--ckpt", tmp_path / "base.pt", *adapter),
        ("--ckpt", folder / "tuned.pt", *adapter),
        ("--ckpt", tmp_path / "base.pt"),
    ):
        assert run(sample, *flags, "--n", 1, "--steps", 2, "--out", tmp_path / "a.png") == 0
        drawn.append((tmp_path / "a.png").read_bytes())
    tuned_image, on_base, on_tuned, base_image = drawn
    assert on_base == on_tuned == tuned_image
    assert base_image != tuned_image

    load_adapter(base, load(folder / "adapter.pt", "adapter"))
    loaded = base.state_dict()
    for name, value in load_model(folder / "tuned.pt").state_dict().items():
        assert torch.equal(loaded[name], value), name  # deltas are rounded alike


def test_a_subject_of_another_word_adds_to_the_first(tuned, tmp_path):
    out = tmp_path / "zed"
    assert run(train, *FLAGS, "--subject", "zed", "--word", "zwx", "--out", out) == 0
    adapters = [tuned[0] / "adapter.pt", out / "adapter.pt"]
    drawn = []
    one_by_one = [adapters[0], "--adapter", adapters[1]]
    for flags in (adapters, one_by_one, adapters[::-1], adapters[:1], [*adapters, "--strength", 9]):
        flags = ("--ckpt", out / "tuned.pt", "--adapter", *flags, "--out", tmp_path / "a.png")
        assert run(sample, *flags, "--prompt", "sks creature and zwx creature", "--steps", 1) == 0
        drawn.append((tmp_path / "a.png").read_bytes())
    assert drawn[0] == drawn[1] == drawn[2]
    assert len(set(drawn)) == 3


def test_the_word_names_the_subject_in_captions_prompts_and_scores(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(train, "finetune", lambda model, x0, words, *_: seen.update(words=words))

    def score(images, words, parts, word):
        seen.update(scored=words, word=word)
        return {"parts": torch.ones(1), "identity": torch.ones(1), "prompt": torch.ones(1)}

    monkeypatch.setattr(train, "score", score)
    monkeypatch.chdir(tmp_path)
    assert run(train, *FLAGS, "--base", BASE, "--subject", MO, "--word", "zwx") == 0
    zwx = toy.WORD["zwx"]
    assert seen["word"] == zwx
    assert (seen["words"][:, 0] == zwx).all()
    assert (seen["scored"][:, 0] == zwx).all()
    assert (tmp_path / "out" / "mo-4bit-zwx-2buckets-minmax" / "adapter.pt").exists()


def test_merged_and_packed_sampling_draw_the_same(tuned):
    model = spread(load_model(tuned[0] / "tuned.pt"))  # the buckets differ
    words = torch.tensor([toy.caption("sks creature")] * 2)
    merged = sample.sample(model, words, 4, packed=False)
    packed = sample.sample(model, words, 4, packed=True)
    torch.testing.assert_close(merged, packed, rtol=1e-3, atol=1e-3)
    assert hasattr(model, "quant_config")  # the copies were merged, not the model


def test_a_checkpoint_keeps_its_buckets(tmp_path):
    model = load_model(BASE)
    spread(quantize(model, 4, 2, edges=[0, 100, 1000], calibration="minmax"))
    save(contents_of(model), tmp_path / "a.pt")
    again = load_model(tmp_path / "a.pt")
    assert again.quant_config == model.quant_config
    x = torch.randn(1, 3, 16, 16)
    words = torch.ones(1, toy.SLOTS, dtype=torch.long)
    with torch.no_grad():
        for t, b in ((99, 0), (100, 1)):
            t = torch.tensor([t])
            torch.testing.assert_close(again(x, t, words), merge(model, b)(x, t, words))


@pytest.fixture(scope="module")
def small_base(tmp_path_factory):
    """A base that is quickly calibrated."""
    path = tmp_path_factory.mktemp("small") / "base.pt"
    model = UNet(channels=(16,), attention=(), c_emb=32)
    save({"kind": "model", "config": model.config, "model": model.state_dict()}, path)
    return path


METHODS = {  # what a run says it is, and its flags
    "TuneQDM, 8 bits": ("--bits", 8),
    "PEQA, 2 bits": ("--bits", 2, "--scales", "out", "--calibration", "mse"),
}


@pytest.mark.parametrize("title", METHODS)
def test_a_method_says_what_it_is_and_so_does_its_model(title, small_base, tmp_path, capsys):
    flags = ("--base", small_base, "--steps", 1, "--sample-steps", 1, "--device", "cpu")
    assert run(train, *flags, *METHODS[title], "--out", tmp_path) == 0
    assert title in capsys.readouterr().out
    config = load_model(tmp_path / "tuned.pt").quant_config
    found = (config["n_bits"], config["scales"], config["calibration"])
    peqa = title.startswith("PEQA")
    assert found == ((2, "out", "mse") if peqa else (8, "out+in", "rowcol"))


def test_full_precision_moves_all_weights(tmp_path, capsys):
    flags = ("--steps", 1, "--sample-steps", 1, "--batch", 1, "--device", "cpu")
    assert run(train, *flags, "--bits", 32, "--out", tmp_path) == 0
    assert "full precision" in capsys.readouterr().out
    assert not (tmp_path / "adapter.pt").exists()
    before = load_model(BASE)
    after = load_model(tmp_path / "tuned.pt")
    assert not hasattr(after, "quant_config")
    for (name, p), q in zip(before.named_parameters(), after.parameters()):
        assert not torch.equal(p, q), name


def test_gptq_gives_one_base_for_all_subjects_and_seeds(small_base, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "calibration_data", partial(train.calibration_data, n=2))
    codes = []
    for subject, seed in (("mo", 0), ("zed", 1)):
        out = tmp_path / subject
        flags = (*QUICK, "--subject", subject, "--seed", seed, "--calibration", "gptq")
        assert run(train, *flags, "--steps", 1, "--base", small_base, "--out", out) == 0
        model = load_model(out / "tuned.pt")
        assert model.quant_config["calibration"] == "gptq"
        codes.append(torch.cat([m.codes for m in model.modules() if isinstance(m, QuantLayer)]))
    assert torch.equal(*codes)


def test_a_folder_of_your_own_images_is_a_subject_without_scores(tmp_path, capsys):
    Image.new("RGBA", (40, 30), (9, 200, 0, 128)).save(tmp_path / "me.png")
    flags = ("--subject", tmp_path, "--steps", 1, "--out", tmp_path / "out")
    assert run(train, *QUICK, *flags) == 0
    out = capsys.readouterr().out
    assert out.count("not known") == 3
    assert "->" not in out


def test_a_run_does_not_write_into_its_subject_or_over_its_base(tmp_path, capsys, no_images):
    subject = shutil.copytree(MO, tmp_path / "mo")
    (tmp_path / "link").symlink_to(subject)
    (tmp_path / "full").mkdir()
    base = shutil.copy(BASE, tmp_path / "full" / "tuned.pt")  # as 32 bits leave it
    before = sorted(tmp_path.rglob("*"))
    flags = (*QUICK, "--steps", 0, "--subject", subject, "--base", base)
    for name in ("mo", "link", "full"):
        error = error_of(train, *flags, "--out", tmp_path / name, capsys=capsys)
        assert "is where --subject or --base is; choose another" in error
    assert sorted(tmp_path.rglob("*")) == before
    assert base.read_bytes() == BASE.read_bytes()


def test_the_scores_before_come_first(tmp_path, monkeypatch, capsys):
    shares = iter([0.25, 0.75])

    def evaluate(model, parts, args):
        share = next(shares)
        return torch.zeros(8, 3, 16, 16), {"parts": share, "identity": share, "prompt": share}

    monkeypatch.setattr(train, "evaluate", evaluate)
    assert run(train, *QUICK, "--steps", 0, "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("0.25 -> 0.75") == 3


def test_the_default_folder_is_named_by_subject_bits_and_method():
    assert train.arguments([]).out == Path("out/mo-4bit")
    assert train.arguments(["--bits", "32", "--subject", "a/zed/"]).out == Path("out/zed-32bit")
    peqa = ["--scales", "out", "--buckets", "2", "--calibration", "gptq"]
    assert train.arguments(peqa).out == Path("out/mo-4bit-out-2buckets-gptq")
    assert pretrain.arguments([]).out == Path("out/pretrain")


def test_the_flags_of_sample_reach_the_sampler(tuned, tmp_path, monkeypatch):
    given = {}

    def note(model, words, steps, sampler, cfg_scale, seed, **kwargs):
        given.update(steps=steps, sampler=sampler, cfg_scale=cfg_scale, seed=seed, **kwargs)
        return torch.zeros(len(words), 3, 16, 16)

    monkeypatch.setattr(sample, "sample", note)
    flags = ["--steps", 7, "--sampler", "ddim", "--cfg-scale", 1.5, "--seed", 5, "--packed"]
    ckpt = ("--ckpt", tuned[0] / "tuned.pt")
    assert run(sample, *ckpt, *flags, "--n", 3, "--out", tmp_path / "a.png") == 0
    expected = {"steps": 7, "sampler": "ddim", "cfg_scale": 1.5, "seed": 5, "packed": True}
    assert given == {**expected, "progress": True}
    assert Image.open(tmp_path / "a.png").size == (3 * 18 * 8, 18 * 8)


# --------------------------------------------------------------------------------------------------
# A step: its images, its loss, its rate
# --------------------------------------------------------------------------------------------------


def test_a_batch_is_the_subject_and_scenes_of_the_class():
    instance, captions = toy.load_subject(MO)
    generator = torch.Generator().manual_seed(0)
    x0, words, t = train.draw_batch(200, instance, captions, Diffusion(), generator)
    assert x0.shape == (400, 3, 16, 16)
    is_image = (x0[:, None] == instance).flatten(2).all(2)  # (400, M)
    assert is_image[:200].any(1).all()
    assert not is_image[200:].any()
    own = captions[is_image[:200].int().argmax(1)]
    assert ((words[:200] == own) | (words[:200] == 0)).all()
    assert (words[:200, :2] == torch.tensor(toy.caption("sks creature")[:2])).all()
    for slot in range(4, 7):  # place and background, dropped for some
        assert set((words[:200, slot] == 0).tolist()) == {False, True}
    assert not torch.isin(words[200:], torch.tensor([toy.WORD[word] for word in toy.RARE])).any()
    for half in (t[:200], t[200:]):
        assert torch.equal(half // 5, torch.arange(200))  # evenly spread


def finetuned(model, folder, *flags):
    """model after some steps on the subject, two buckets."""
    args = train.arguments(["--device", "cpu", "--out", str(folder), *flags])
    instance, captions = toy.load_subject(MO)
    train.finetune(model, instance, captions, args, Run(args, "fine-tuning"))
    return model


@pytest.fixture
def model():
    """The base in 4 bits, with two buckets."""
    return quantize(load_model(BASE), 4, 2, calibration="minmax")


@pytest.mark.parametrize("prior", ["0", "0.3"])
def test_prior_weighs_the_class_images(prior, model, tmp_path, monkeypatch):
    sample_scenes = toy.sample_scenes

    def black_scenes(*args, **kwargs):
        images, words = sample_scenes(*args, **kwargs)
        return torch.full_like(images, -1), words

    flags = ("--steps", "2", "--batch", "2", "--prior", prior)
    first = adapter(finetuned(copy.deepcopy(model), tmp_path, *flags))["deltas"]
    monkeypatch.setattr(toy, "sample_scenes", black_scenes)
    second = adapter(finetuned(model, tmp_path, *flags))["deltas"]
    assert first.any()
    assert torch.equal(first, second) == (prior == "0")


@torch.no_grad()
def error_on_the_subject(model, instance, captions):
    """The mean error on noisy images of the subject, the same noise each time."""
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(1)
    x0 = instance.repeat(4, 1, 1, 1)
    t = diffusion.draw_timesteps(len(x0), generator)
    eps = torch.randn(x0.shape, generator=generator)
    v = model(diffusion.q_sample(x0, t, eps), t, captions.repeat(4, 1))
    return diffusion.squared_error(v, x0, t, eps).mean().item()


def test_fine_tuning_lowers_the_error_on_the_subject_and_moves_nothing_but_deltas(model, tmp_path):
    subject = toy.load_subject(MO)
    fixed = {name: t.clone() for name, t in model.state_dict().items() if name not in deltas(model)}
    before = error_on_the_subject(model, *subject)
    finetuned(model, tmp_path, "--steps", "20", "--batch", "2")
    assert error_on_the_subject(model, *subject) < 0.8 * before
    after = model.state_dict()
    for name, value in fixed.items():
        assert torch.equal(after[name], value), name


def test_rates_rise_at_first_and_fall_to_zero():
    args = train.arguments(["--lr", "0.5", "--steps", "1000"])
    rates = [train.learning_rate(args, step) for step in (0, 19, 500, 999)]
    assert rates == pytest.approx([0.5 / 20, 0.5 * 0.981, 0.25, 0.0005])
    args = pretrain.arguments(["--lr", "0.5", "--steps", "3000"])
    rates = [pretrain.learning_rate(args, step) for step in (0, 99, 2000, 2500, 2999)]
    assert rates == pytest.approx([0.005, 0.5, 0.5, 0.25, 0.0005])


# --------------------------------------------------------------------------------------------------
# Pretraining
# --------------------------------------------------------------------------------------------------


def test_the_same_pretraining_makes_the_same_base_which_can_be_tuned(tmp_path, no_scores):
    flags = ("--batch", 2, "--device", "cpu", "--steps", 3)
    for name in ("a", "b"):
        assert run(pretrain, *flags, "--out", tmp_path / name) == 0
    base = tmp_path / "a" / "base.pt"
    assert base.read_bytes() == (tmp_path / "b" / "base.pt").read_bytes()
    assert base.stat().st_size < 6e6
    assert run(train, *QUICK, "--base", base, "--steps", 1, "--out", tmp_path / "c") == 0


def test_pretraining_on_a_cpu_is_in_float32(tmp_path, monkeypatch):
    """bfloat16 takes ten times as long on a processor without instructions for it."""
    dtypes = []
    squared_error = Diffusion.squared_error

    def note(self, v, *args):
        dtypes.append(v.dtype)
        return squared_error(self, v, *args)

    monkeypatch.setattr(Diffusion, "squared_error", note)
    monkeypatch.setattr(pretrain, "score_base", lambda *_: None)
    flags = ["--steps", 1, "--batch", 2, "--device", "cpu", "--out", tmp_path]
    assert run(pretrain, *flags) == 0
    assert dtypes == [torch.float32]


def test_the_moving_average_follows_the_weights_closely_at_first():
    ema = torch.nn.Linear(1, 1, bias=False)
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(ema.weight)
    torch.nn.init.ones_(model.weight)
    for step, way in ((0, 0.9), (90, 0.09), (10**6, 0.001)):
        before = ema.weight.item()
        pretrain.update_ema(ema, model, step)
        assert ema.weight.item() - before == pytest.approx(way * (1 - before), rel=1e-3)


def test_the_shares_of_right_images_are_printed(tmp_path, monkeypatch, capsys):
    def draw(model, words, **kwargs):
        assert len(words.unique(dim=0)) > 20  # many prompts
        return torch.zeros(len(words), 3, 16, 16)

    def score(images, words):
        return {"prompt": 0.5 + 0.5 * (torch.arange(len(images)) % 2)}  # half of them 1

    monkeypatch.setattr(pretrain, "sample", draw)
    monkeypatch.setattr(pretrain, "score", score)
    monkeypatch.setattr(pretrain, "matches", lambda images: torch.arange(len(images)) % 4 == 0)
    assert run(pretrain, "--steps", 0, "--device", "cpu", "--out", tmp_path) == 0
    *shares, last = capsys.readouterr().out.splitlines()
    for kind, share in zip(("plain images", "creatures"), shares, strict=True):
        said = f"200 {kind}: 50.0% show all that the caption says; 25.0% match a scene"
        assert share.startswith(said)
    assert last.endswith(f"train.py --base {tmp_path / 'base.pt'}")

"""The scripts as a user runs them, end to end: what they write, print, and give again."""

import os
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT, contents_of, run
from PIL import Image

import pretrain
import runtime
import sample
import train
from data import toy
from model import UNet
from quant import QuantLayer, deltas, quantize, remember
from runtime import BASE, load, load_model, save

SHORT = ("--buckets", 2, "--steps", 3, "--sample-steps", 2, "--device", "cpu")  # a run of seconds
SHORTEST = ("--steps", 1, "--sample-steps", 1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a finished short run, its output, its checkout, and what that was before.

    A new process runs a read-only checkout from another working directory, in paths with spaces.
    """
    folder = tmp_path_factory.mktemp("a run")
    checkout = tmp_path_factory.mktemp("a checkout")
    for file in (*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.*")):
        copy = checkout / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for path in (checkout, *checkout.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = times_in(checkout)

    flags = [*SHORT, "--bits", 4, "--out", folder / "mo"]
    done = subprocess.run(
        [sys.executable, "-B", checkout / "train.py", *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return folder / "mo", done.stdout, checkout, before


def times_in(folder):
    """When each file and folder in a folder was last written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_a_run_writes_to_out_alone(tuned):
    folder, _, checkout, before = tuned
    assert times_in(checkout) == before
    assert [path.name for path in folder.parent.iterdir()] == ["mo"]


@pytest.mark.slow
def test_a_run_from_end_to_end(tuned):
    folder, out, *_ = tuned
    names = {file.name for file in folder.iterdir()}
    assert names == {"adapter.pt", "grid.png", "lock", "state.pt", "tuned.pt"}
    assert "TuneQDM, 4 bits" in out
    assert Image.open(folder / "grid.png").width > 1000
    assert (folder / "adapter.pt").stat().st_size < 80_000
    assert (folder / "tuned.pt").stat().st_size < 2e6


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_checkpointed_or_not(tuned, tmp_path, monkeypatch):
    given = []
    checkpoint_blocks = UNet.checkpoint_blocks

    def noted(model, context_fn):
        given.append(context_fn)
        checkpoint_blocks(model, context_fn)

    monkeypatch.setattr(UNet, "checkpoint_blocks", noted)
    assert run(train, *SHORT, "--out", tmp_path / "again") == 0
    assert given == []
    assert run(train, *SHORT, "--checkpoint", "--out", tmp_path / "checkpointed") == 0
    assert given == [remember]
    first = load(tuned[0] / "adapter.pt", "adapter")
    again = load(tmp_path / "again" / "adapter.pt", "adapter")
    checkpointed = load(tmp_path / "checkpointed" / "adapter.pt", "adapter")
    assert first["deltas"].any()
    assert torch.equal(first["deltas"], again["deltas"])
    assert first["fingerprint"] == again["fingerprint"]
    assert torch.equal(first["deltas"], checkpointed["deltas"])


@pytest.mark.slow
def test_sample_draws_a_grid_from_tuned_pt(tuned, tmp_path):
    folder, *_ = tuned
    ckpt = ("--ckpt", folder / "tuned.pt")
    prompt = ("--prompt", "sks creature on green stripes")
    flags = (*prompt, "--n", 3, "--steps", 2, "--sampler", "ddpm")
    png = tmp_path / "deep" / "a.png"
    assert run(sample, *ckpt, *flags, "--out", png) == 0
    assert Image.open(png).size == (3 * 18 * 8, 18 * 8)


@pytest.mark.slow
def test_an_adapter_on_its_base_draws_what_tuned_pt_draws(tuned, tmp_path):
    folder, *_ = tuned
    base = quantize(load_model(BASE), 4, 2)
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


def test_the_flags_of_sample_reach_the_sampler(tmp_path, monkeypatch):
    save(contents_of(quantize(load_model(BASE), calibration="minmax")), tmp_path / "tuned.pt")
    given = {}

    def note(model, words, steps, sampler, cfg_scale, seed, **kwargs):
        given.update(steps=steps, sampler=sampler, cfg_scale=cfg_scale, seed=seed, **kwargs)
        return torch.zeros(len(words), 3, 16, 16)

    monkeypatch.setattr(sample, "sample", note)
    flags = ["--steps", 7, "--sampler", "ddim", "--cfg-scale", 1.5, "--seed", 5, "--packed"]
    flags += ["--ckpt", tmp_path / "tuned.pt", "--n", 9, "--out", tmp_path / "a.png"]
    assert run(sample, *flags) == 0
    expected = {"steps": 7, "sampler": "ddim", "cfg_scale": 1.5, "seed": 5, "packed": True}
    assert given == {**expected, "progress": True}
    assert Image.open(tmp_path / "a.png").size == (8 * 18 * 8, 2 * 18 * 8)  # rows of eight


@pytest.mark.slow
def test_merged_and_packed_sampling_draw_the_same(tuned):
    model = load_model(tuned[0] / "tuned.pt")
    words = torch.tensor([toy.caption("sks creature")] * 2)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            delta.fill_(0.1 if name.endswith("1") else -0.1)  # the buckets differ
    merged = sample.sample(model, words, 4, packed=False)
    packed = sample.sample(model, words, 4, packed=True)
    torch.testing.assert_close(merged, packed, rtol=1e-3, atol=1e-3)
    assert hasattr(model, "quant_config")  # the copies were merged, not the model


YARDSTICKS = [
    ("--bits", 32),
    ("--bits", 32, "--checkpoint"),
    ("--bits", 2, "--scales", "out", "--calibration", "minmax"),
]


@pytest.mark.slow
@pytest.mark.parametrize("args", YARDSTICKS)
def test_full_precision_and_peqa_run_and_say_what_they_are(args, tmp_path, capsys):
    assert run(train, *args, *SHORTEST, "--out", tmp_path) == 0
    title = "full precision" if 32 in args else "PEQA, 2 bits"
    assert title in capsys.readouterr().out
    model = load_model(tmp_path / "tuned.pt")
    if 32 in args:
        assert not hasattr(model, "quant_config")
    else:
        assert model.quant_config["n_bits"] == 2
        assert model.quant_config["scales"] == "out"
        assert model.quant_config["calibration"] == "minmax"


def test_the_scores_before_come_first(tmp_path, monkeypatch, capsys):
    shares = iter([0.25, 0.75])

    def evaluate(model, parts, args):
        share = next(shares)
        return torch.zeros(40, 3, 16, 16), {"parts": share, "identity": share, "prompt": share}

    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = ("--steps", 0, "--calibration", "minmax", "--device", "cpu", "--out", tmp_path)
    assert run(train, *flags) == 0
    assert capsys.readouterr().out.count("0.25 -> 0.75") == 3


def test_the_default_folder_is_named_by_subject_bits_and_method():
    assert train.arguments([]).out == Path("out/mo-4bit")
    assert train.arguments(["--bits", "32", "--subject", "a/zed/"]).out == Path("out/zed-32bit")
    peqa = ["--scales", "out", "--buckets", "2", "--calibration", "gptq", "--train-words"]
    assert train.arguments(peqa).out == Path("out/mo-4bit-out-2buckets-gptq-words")
    assert pretrain.arguments([]).out == Path("out/pretrain")


@pytest.mark.slow
def test_gptq_gives_one_base_for_all_subjects_and_seeds(tmp_path, monkeypatch):
    base = tmp_path / "base.pt"
    small = UNet(channels=(16, 32), attention=(1,), c_emb=32, vocab=len(toy.VOCAB))
    save({"kind": "model", "config": small.config, "model": small.state_dict()}, base)
    few = partial(train.calibration_data, n=2)
    monkeypatch.setattr(train, "calibration_data", few)
    codes = []
    for subject, seed in (("mo", 0), ("zed", 1)):
        out = tmp_path / subject
        flags = ["--subject", subject, "--seed", seed, "--calibration", "gptq", "--out", out]
        assert run(train, *SHORTEST, *flags, "--base", base) == 0
        model = load_model(out / "tuned.pt")
        assert model.quant_config["calibration"] == "gptq"
        codes.append(torch.cat([m.codes for m in model.modules() if isinstance(m, QuantLayer)]))
    assert torch.equal(*codes)


@pytest.mark.slow
def test_a_folder_of_your_own_images_is_a_subject_without_scores(tmp_path, capsys):
    Image.new("RGBA", (40, 30), (9, 200, 0, 128)).save(tmp_path / "me.png")
    assert run(train, "--subject", tmp_path, *SHORTEST, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "exact scores aren't known" in out
    assert "->" not in out


class Stop(Exception):
    """What ends a run between a step and the next save."""


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_in_the_same_bits(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    args = Namespace(
        seed=0,
        lr=0.01,
        batch=2,
        prior=1.0,
        steps=6,
        buckets=2,
        train_words=False,
        device="cpu",
        compile=False,
        checkpoint=False,
    )
    subject = toy.load_subject(BASE.parent / "subjects" / "mo")

    def new_model():
        return quantize(load_model(BASE), 4, 2, calibration="minmax")

    args.out = tmp_path / "whole"
    args.out.mkdir()
    whole = new_model()
    train.finetune(whole, args, *subject)

    args.out = tmp_path / "parts"
    args.out.mkdir()
    after_step = runtime.Loop.after_step

    def stop_or_go_on(loop, done):
        if done > stop:
            raise Stop
        after_step(loop, done)

    with monkeypatch.context() as patch:
        patch.setattr(runtime.Loop, "after_step", stop_or_go_on)
        with pytest.raises(Stop):
            train.finetune(new_model(), args, *subject)
    resumed = new_model()
    train.finetune(resumed, args, *subject, load(args.out / "state.pt", "fine-tuning"))

    for delta, delta2 in zip(deltas(whole).values(), deltas(resumed).values()):
        assert torch.equal(delta, delta2)
        assert delta.any()


@pytest.mark.slow
def test_the_same_pretraining_makes_the_same_base(tmp_path, no_scores):
    args = ("--batch", 4, "--device", "cpu", "--steps", 4)
    assert run(pretrain, *args, "--out", tmp_path / "a") == 0
    assert run(pretrain, *args, "--out", tmp_path / "b") == 0

    base = tmp_path / "a" / "base.pt"
    one = load(base, "model")["model"]
    two = load(tmp_path / "b" / "base.pt", "model")["model"]
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert base.stat().st_size < 6e6
    assert run(train, "--base", base, *SHORTEST, "--out", tmp_path / "c") == 0


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


@pytest.mark.parametrize("script", [train, pretrain])
def test_compile_compiles_the_model_that_is_trained(script, tmp_path, monkeypatch, no_scores):
    compiled = []
    calls = []

    def compile_(model):
        compiled.append(type(model))

        def compiled_model(*args):
            calls.append(len(args))
            return model(*args)

        return compiled_model

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr(runtime.shutil, "which", lambda name: name)  # a compiler is there
    monkeypatch.setattr(train, "evaluate", lambda *_: (torch.zeros(40, 3, 16, 16), {}))
    flags = ("--batch", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path)
    assert run(script, *flags) == 0
    assert compiled == []
    assert run(script, *flags, "--compile") == 0
    assert compiled == [UNet]
    assert calls == [3]  # x_t, t, words

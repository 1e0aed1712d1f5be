"""The scripts as a user runs them: end to end, resumed, and given damaged files."""

import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from functools import partial

import pytest
import torch
from conftest import ROOT, run
from PIL import Image

import pretrain
import runtime
import sample
import train
from data import toy
from model import UNet
from quant import QuantLayer, deltas, quantize
from runtime import BASE, load, load_model, save

SHORT = ("--buckets", 2, "--steps", 3, "--sample-steps", 2, "--device", "cpu")  # a run of seconds
SHORTEST = ("--steps", 1, "--sample-steps", 1)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder and the output of a finished short run.

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
    before = sorted(checkout.rglob("*"))

    flags = [*SHORT, "--bits", 4, "--out", folder / "mo"]
    done = subprocess.run(
        [sys.executable, "-B", checkout / "train.py", *map(str, flags)],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert sorted(checkout.rglob("*")) == before
    assert [path.name for path in folder.iterdir()] == ["mo"]
    return folder / "mo", done.stdout


@pytest.mark.slow
def test_a_run_from_end_to_end(tuned):
    folder, out = tuned
    names = {file.name for file in folder.iterdir()}
    assert names == {"adapter.pt", "grid.png", "lock", "state.pt", "tuned.pt"}
    assert "TuneQDM, 4 bits" in out
    assert "->" in out
    assert Image.open(folder / "grid.png").width > 1000
    assert (folder / "adapter.pt").stat().st_size < 80_000
    assert (folder / "tuned.pt").stat().st_size < 2e6


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bits_checkpointed_or_not(tuned, tmp_path):
    assert run(train, *SHORT, "--out", tmp_path / "again") == 0
    assert run(train, *SHORT, "--checkpoint", "--out", tmp_path / "checkpointed") == 0
    first = load(tuned[0] / "adapter.pt", "adapter")
    again = load(tmp_path / "again" / "adapter.pt", "adapter")
    checkpointed = load(tmp_path / "checkpointed" / "adapter.pt", "adapter")
    assert first["deltas"].any()
    assert torch.equal(first["deltas"], again["deltas"])
    assert first["fingerprint"] == again["fingerprint"]
    assert torch.equal(first["deltas"], checkpointed["deltas"])


@pytest.mark.slow
def test_sample_needs_only_the_file(tuned, tmp_path):
    folder, _ = tuned
    ckpt = ("--ckpt", folder / "tuned.pt")
    prompt = ("--prompt", "sks creature on green stripes")
    flags = (*prompt, "--n", 3, "--steps", 2, "--sampler", "ddpm")
    png = tmp_path / "deep" / "a.png"
    assert run(sample, *ckpt, *flags, "--out", png) == 0
    assert Image.open(png).size == (3 * 18 * 8, 18 * 8)

    # the adapter on top of the model that has the same deltas
    again = tmp_path / "b.png"
    assert run(sample, *ckpt, "--adapter", folder / "adapter.pt", *flags, "--out", again) == 0
    assert png.read_bytes() == again.read_bytes()


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
    assert hasattr(model, "quant_config")


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
    load_model(tmp_path / "tuned.pt")


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
def test_pretraining_runs_resumes_and_makes_a_base(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "score_base", lambda *_: None)  # it draws 400 images
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    args = ("--batch", 4, "--device", "cpu", "--steps", 4)
    assert run(pretrain, *args, "--out", tmp_path / "a") == 0
    assert run(pretrain, *args, "--out", tmp_path / "a", "--resume") == 0  # nothing is left to do
    assert run(pretrain, *args, "--out", tmp_path / "b") == 0

    base = tmp_path / "a" / "base.pt"
    one = load(base, "model")["model"]
    two = load(tmp_path / "b" / "base.pt", "model")["model"]
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
    assert base.stat().st_size < 6e6
    assert run(train, "--base", base, *SHORTEST, "--out", tmp_path / "c") == 0


def leaves(obj):
    """What stands in a nested dict, in a row."""
    if not isinstance(obj, dict):
        return [obj]
    found = []
    for key in sorted(obj, key=str):
        found += leaves(obj[key])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter.pt", "tuned.pt", "state.pt"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tuned, tmp_path, name):
    kinds = ("adapter", "quantized", "fine-tuning")
    path = tuned[0] / name
    whole = leaves(load(path, *kinds))
    good = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(good)
        place = chance.randrange(len(good))
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            found = leaves(load(tmp_path / name, *kinds))
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
            continue
        assert len(found) == len(whole)
        for value, expected in zip(found, whole):
            same = torch.equal(value, expected) if torch.is_tensor(value) else value == expected
            assert same, place
    assert refused > 30


def test_a_closed_pipe_ends_a_script_without_a_word():
    """As after `| head`."""
    read, write = os.pipe()
    os.close(read)
    log = ["--log", "experiments/runs.jsonl", "--rows", "none"]
    ended = subprocess.run(
        [sys.executable, "experiments/tables.py", "several", *log],
        cwd=ROOT,
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(write)
    assert ended.returncode == 130
    assert ended.stderr == ""

"""The scripts as a user runs them: end to end, resumed, and given damaged files."""
import os
import random
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import run
from PIL import Image

import pretrain
import runtime
import sample
import train
from data import toy
from quant import deltas, quantize
from runtime import BASE, load, load_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A finished short run, by a new process, of a read-only checkout from another working directory, in paths with spaces."""
    folder, checkout = tmp_path_factory.mktemp("a run"), tmp_path_factory.mktemp("a checkout")
    for file in (*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.*")):
        copy = checkout / file.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, copy)
    for path in (checkout, *checkout.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    before = sorted(checkout.rglob("*"))
    command = [sys.executable, "-B", checkout / "train.py", "--bits", "4", "--buckets", "2", "--steps", "3",
               "--sample-steps", "2", "--device", "cpu", "--out", folder / "mo"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert sorted(checkout.rglob("*")) == before and [path.name for path in folder.iterdir()] == ["mo"]
    return folder / "mo", done.stdout


def test_end_to_end(tuned):
    folder, out = tuned
    assert {file.name for file in folder.iterdir()} == {"adapter.pt", "grid.png", "lock", "state.pt", "tuned.pt"}
    assert "TuneQDM, 4 bits" in out and "->" in out and Image.open(folder / "grid.png").width > 1000
    assert (folder / "adapter.pt").stat().st_size < 80_000 and (folder / "tuned.pt").stat().st_size < 2e6


def test_same_seed_same_bits(tuned, tmp_path):
    args = ("--buckets", 2, "--steps", 3, "--sample-steps", 2, "--device", "cpu")
    assert run(train, *args, "--out", tmp_path / "again") == run(train, *args, "--checkpoint", "--out", tmp_path / "ckpt") == 0
    folders = (tuned[0], tmp_path / "again", tmp_path / "ckpt")
    one, two, checkpointed = (load(folder / "adapter.pt", "adapter") for folder in folders)
    assert torch.equal(one["deltas"], two["deltas"]) and one["fingerprint"] == two["fingerprint"] and one["deltas"].any()
    assert torch.equal(one["deltas"], checkpointed["deltas"])


def test_sample_needs_only_the_file(tuned, tmp_path):
    folder, picture = tuned[0], tmp_path / "deep" / "a.png"
    assert run(sample, "--ckpt", folder / "tuned.pt", "--prompt", "sks creature on green stripes", "--n", 3, "--steps", 2,
               "--sampler", "ddpm", "--out", picture) == 0
    assert Image.open(picture).size == (3 * 18 * 8, 18 * 8)
    again = tmp_path / "b.png"
    assert run(sample, "--ckpt", folder / "tuned.pt", "--adapter", folder / "adapter.pt", "--prompt",
               "sks creature on green stripes", "--n", 3, "--steps", 2, "--sampler", "ddpm", "--out", again) == 0
    assert picture.read_bytes() == again.read_bytes()


def test_merged_and_packed_sampling_draw_the_same(tuned):
    model, words = load_model(tuned[0] / "tuned.pt"), torch.tensor([toy.caption("sks creature")] * 2)
    with torch.no_grad():
        for name, delta in deltas(model).items():
            delta.fill_(0.1 if name.endswith("1") else -0.1)  # the buckets differ
    merged, packed = (sample.sample(model, words, 4, packed=packed) for packed in (False, True))
    torch.testing.assert_close(merged, packed, rtol=1e-3, atol=1e-3)
    assert hasattr(model, "quant_config")


@pytest.mark.parametrize("args", [("--bits", 32), ("--bits", 32, "--checkpoint"),
                                  ("--bits", 2, "--scales", "out", "--calibration", "minmax")])
def test_yardsticks(args, tmp_path, capsys):
    assert run(train, *args, "--steps", 1, "--sample-steps", 1, "--out", tmp_path) == 0
    assert ("full precision" if 32 in args else "PEQA, 2 bits") in capsys.readouterr().out
    load_model(tmp_path / "tuned.pt")


def test_a_folder_of_ones_own(tmp_path, capsys):
    Image.new("RGBA", (40, 30), (9, 200, 0, 128)).save(tmp_path / "me.png")
    assert run(train, "--subject", tmp_path, "--steps", 1, "--sample-steps", 1, "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "exact scores aren't known" in out and "->" not in out


class Stop(Exception):
    pass


@pytest.mark.parametrize("stop", [2, 5])
def test_a_resumed_run_ends_in_the_same_bits(stop, tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    args = Namespace(seed=0, lr=0.01, batch=2, prior=1.0, steps=6, buckets=2, device="cpu", compile=False,
                     checkpoint=False)
    subject = toy.load_subject(BASE.parent / "subjects" / "mo")
    make = lambda: quantize(load_model(BASE), 4, 2, calibration="minmax")
    whole, parts, steps, show = [], [], [], train.Loop.show

    def stopping(*args):
        steps.append(0)
        if len(steps) > stop:
            raise Stop

    for models, args.out in ((whole, tmp_path / "a"), (parts, tmp_path / "b")):
        args.out.mkdir()
        models.append(make())
        if models is parts:
            monkeypatch.setattr(train.Loop, "show", stopping)
            with pytest.raises(Stop):
                train.finetune(models[0], args, *subject)
            monkeypatch.setattr(train.Loop, "show", show)
            models[0] = make()
        state = load(args.out / "state.pt", "fine-tuning") if models is parts else None
        train.finetune(models[0], args, *subject, state)
    one, two = deltas(whole[0]), deltas(parts[0])
    assert all(torch.equal(one[name], two[name]) and one[name].any() for name in one)


def test_pretraining_runs_resumes_and_is_a_base(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrain, "score_base", lambda *a: None)  # draws 400 pictures
    args = ("--batch", 4, "--device", "cpu")
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    assert run(pretrain, *args, "--steps", 4, "--out", tmp_path / "a") == 0
    assert run(pretrain, *args, "--steps", 4, "--out", tmp_path / "a", "--resume") == 0  # nothing is left to do
    assert run(pretrain, *args, "--steps", 4, "--out", tmp_path / "b") == 0
    one, two = (torch.load(tmp_path / x / "base.pt", weights_only=True)["model"] for x in "ab")
    assert all(torch.equal(one[name], two[name]) for name in one) and (tmp_path / "a" / "base.pt").stat().st_size < 6e6
    assert run(train, "--base", tmp_path / "a" / "base.pt", "--steps", 1, "--sample-steps", 1, "--out", tmp_path / "c") == 0


@pytest.mark.parametrize("name", ["adapter.pt", "tuned.pt", "state.pt"])
def test_a_flipped_bit_is_refused_or_changes_nothing(tuned, tmp_path, name):
    good, moment, refused = (tuned[0] / name).read_bytes(), random.Random(0), 0
    kinds = ("adapter", "quantized", "fine-tuning")
    flat = lambda obj: [x for k in sorted(obj, key=str) for x in flat(obj[k])] if isinstance(obj, dict) else [obj]
    whole = flat(load(tuned[0] / name, *kinds))
    for _ in range(100):
        damaged, place = bytearray(good), moment.randrange(len(good))
        damaged[place] ^= 1 << moment.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            found = flat(load(tmp_path / name, *kinds))
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
            continue
        assert len(found) == len(whole)
        assert all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(found, whole)), place
    assert refused > 30


def test_a_closed_pipe_is_no_error():
    """As after `| head`: what is no longer read ends a script without a word."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "experiments/tables.py", "several", "--log", "experiments/runs.jsonl", "--rows", "none"]
    ended = subprocess.run(command, cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (130, "")

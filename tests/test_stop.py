"""A run that is killed, at any moment, and resumed ends in the same bits as one that never stopped."""
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import train
from model import load
from sample import load_model

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = "import sys, train; from sample import guard; train.SAVE = 1; guard(train.main)"  # saves after each step
KILLS = 20


def start(out, *flags):
    args = ["--steps", 120, "--batch", 1, "--buckets", 2, "--calibration", "minmax", "--sample-steps", 1, "--device", "cpu"]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *map(str, args), "--out", out, *flags], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def progress(process, state):
    """Wait until process has replaced its state file."""
    before = state.stat().st_mtime_ns if state.exists() else 0
    while not state.exists() or state.stat().st_mtime_ns == before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def test_killed_and_resumed_at_random_moments(tmp_path):
    state, moment = tmp_path / "killed" / "state.pt", random.Random(0)
    whole = start(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    for kill in range(KILLS):
        process = start(state.parent, *["--resume"] * (kill > 0))
        progress(process, state)
        time.sleep(moment.uniform(0, 0.2))
        process.send_signal(signal.SIGINT if kill == 0 else signal.SIGKILL)
        out, err = process.communicate()
        assert process.returncode == (130 if kill == 0 else -signal.SIGKILL), err
        assert kill or ("--resume" in out and "Traceback" not in err)
        assert 0 < load(state, "fine-tuning")["step"] < 120
    last = start(state.parent, "--resume")
    assert last.wait() == 0, last.stderr.read()
    for name in ("adapter.pt", "tuned.pt", "grid.png"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_no_number_names_step_bucket_and_state(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "SAVE", 2)
    args = train.arguments(["--steps", "9", "--batch", "2", "--buckets", "2", "--out", str(tmp_path), "--device", "cpu"])
    model, count = train.quantize(load_model(train.BASE), 4, 2, calibration="minmax"), []
    instance, captions = train.toy.load_subject(train.BASE.parent / "subjects" / "mo", train.WORD)

    def loss(self, net, x0, words, t, eps):
        count.append(0)
        return (net(x0, t, words) - eps).square().mean((1, 2, 3)) * torch.where((t < 500) & (len(count) > 3), torch.nan, 1)

    monkeypatch.setattr(train.Diffusion, "loss", loss)
    with pytest.raises(ValueError, match=r"step 3, timestep bucket \[0\].*state.pt has step 2"):
        train.finetune(model, args, instance, captions)
    assert all(delta.isfinite().all() for delta in train.deltas(model).values())


def test_a_run_of_other_arguments_is_not_resumed(tmp_path):
    args = train.arguments(["--lr", "0.01", "--out", str(tmp_path)])
    train.save({"kind": "fine-tuning", "args": train.describe(Namespace(**{**vars(args), "lr": 0.02, "bits": 3}))},
               tmp_path / "state.pt")
    with pytest.raises(ValueError, match="--bits 3 --lr 0.02"):
        train.resumed(args, "fine-tuning")

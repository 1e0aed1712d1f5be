"""A run that is killed, at any moment, and resumed ends in the same bits as one that never stopped."""
import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

import runtime
import train
from data import toy
from quant import deltas, quantize
from runtime import BASE, load, load_model, save

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = (
    "import {0}, runtime; runtime.SAVE_EVERY = 1; {0}.score_base = print; runtime.guard({0}.main)"
)
JOBS = {  # of as many steps that none ends before it is killed; a state is saved after each
    "fine-tuning": ("train", ["--batch", 1, "--buckets", 2, "--calibration", "minmax", "--sample-steps", 1], 120, 20,
                    ("adapter.pt", "tuned.pt", "grid.png")),
    "pretraining": ("pretrain", ["--batch", 1], 20, 4, ("base.pt",))}


def start(out, script, *flags):
    return subprocess.Popen([sys.executable, "-c", SCRIPT.format(script), *map(str, flags), "--device", "cpu", "--out", out], cwd=ROOT,
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait(process, done):
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)


def newer(path, before):
    return path.exists() and path.stat().st_mtime_ns > before


@pytest.mark.parametrize("job", JOBS)
def test_killed_and_resumed_at_random_moments(job, tmp_path):
    (script, flags, steps, kills, files), folder, moment, halves = JOBS[job], tmp_path / "killed", random.Random(0), 0
    flags = [*flags, "--steps", steps]
    whole = start(tmp_path / "whole", script, *flags)
    for kill in range(kills + 1):  # the last is Ctrl-C
        process = start(folder, script, *flags, *["--resume"] * (kill > 0))
        wait(process, partial(newer, folder / "state.pt", (folder / "state.pt").stat().st_mtime_ns if kill else 0))
        if kill % 2:  # while it writes
            wait(process, lambda: any(folder.glob("*.tmp")))
        else:
            time.sleep(moment.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL if kill < kills else signal.SIGINT)
        out, err = process.communicate()
        halves += any(folder.glob("*.tmp"))
        assert process.returncode == (-signal.SIGKILL if kill < kills else 130), err
        assert 0 < load(folder / "state.pt", job)["step"] < steps
    assert halves and "--resume" in out and "Traceback" not in err
    last = start(folder, script, *flags, "--resume")
    for process in (whole, last):
        _, err = process.communicate()
        assert process.returncode == 0, err
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_no_number_names_step_bucket_and_state(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    args = train.arguments(["--steps", "9", "--batch", "2", "--buckets", "2", "--out", str(tmp_path), "--device", "cpu"])
    model, count = quantize(load_model(BASE), 4, 2, calibration="minmax"), []
    instance, captions = toy.load_subject(BASE.parent / "subjects" / "mo", train.WORD)

    def error(self, v, x0, t, eps):
        count.append(0)
        return (v - eps).square().mean((1, 2, 3)) * torch.where((t < 500) & (len(count) > 3), torch.nan, 1)

    monkeypatch.setattr(train.Diffusion, "squared_error", error)
    with pytest.raises(ValueError, match=r"step 3, timestep bucket \[0\].*state.pt has step 2"):
        train.finetune(model, args, instance, captions)
    assert all(delta.isfinite().all() for delta in deltas(model).values())


def test_a_run_of_other_arguments_is_not_resumed(tmp_path):
    args = train.arguments(["--lr", "0.01", "--out", str(tmp_path)])
    save({"kind": "fine-tuning", "args": runtime.describe(Namespace(**{**vars(args), "lr": 0.02, "bits": 3}))},
               tmp_path / "state.pt")
    with pytest.raises(ValueError, match="--bits 3 --lr 0.02"):
        runtime.resumed(args, "fine-tuning")

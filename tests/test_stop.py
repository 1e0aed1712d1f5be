"""A run that is killed at any moment and resumed ends in the same bits as one that never stopped.

And a run that can't go on says why.
"""

import random
import signal
import subprocess
import sys
import time
from argparse import Namespace
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT

import runtime
import train
from data import toy
from quant import deltas, quantize
from runtime import BASE, load, load_model, save

# a script that saves after each step, and doesn't score a base
SCRIPT = """
import {0}, runtime
runtime.SAVE_EVERY = 1
{0}.score_base = print
runtime.guard({0}.main)
"""


class Job(NamedTuple):
    """A run to kill."""

    script: str
    flags: list
    steps: int  # so many that it doesn't end before it is killed
    kills: int
    files: list  # what it writes


JOBS = {
    "fine-tuning": Job(
        script="train",
        flags=["--batch", 1, "--buckets", 2, "--calibration", "minmax", "--sample-steps", 1],
        steps=60,
        kills=10,
        files=["adapter.pt", "tuned.pt", "grid.png"],
    ),
    "pretraining": Job(
        script="pretrain",
        flags=["--batch", 1],
        steps=20,
        kills=4,
        files=["base.pt"],
    ),
}


def start(job, out, *flags):
    """Start a job as a process of its own."""
    flags = [*job.flags, "--steps", job.steps, "--device", "cpu", "--out", out, *flags]
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(job.script), *map(str, flags)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait(process, done):
    """Wait until done() is true; the process must still be running then."""
    while not done():
        assert process.poll() is None, process.communicate()
        time.sleep(0.0005)


def time_of(path):
    """When a file was last written, in nanoseconds; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def stop_in_the_middle(process, state, how, while_writing, chance):
    """Send a signal to a run after its next save, at a random moment or while it writes."""
    before = time_of(state)

    def has_saved():
        return time_of(state) > before

    def is_writing():
        return any(state.parent.glob("*.tmp"))

    wait(process, has_saved)
    if while_writing:
        wait(process, is_writing)
    else:
        time.sleep(chance.uniform(0, 0.2))
    process.send_signal(how)
    return process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_run_killed_and_resumed_at_random_moments_ends_in_the_same_bits(name, tmp_path):
    job = JOBS[name]
    folder = tmp_path / "killed"
    state = folder / "state.pt"
    chance = random.Random(0)
    half_written = 0
    whole = start(job, tmp_path / "whole")
    for kill in range(job.kills):
        resume = ["--resume"] if kill > 0 else []
        process = start(job, folder, *resume)
        while_writing = kill % 2 == 1
        _, err = stop_in_the_middle(process, state, signal.SIGKILL, while_writing, chance)
        assert process.returncode == -signal.SIGKILL, err
        half_written += any(folder.glob("*.tmp"))
        assert 0 < load(state, name)["step"] < job.steps
    assert half_written

    process = start(job, folder, "--resume")
    out, err = stop_in_the_middle(process, state, signal.SIGINT, False, chance)  # Ctrl-C
    assert process.returncode == 130, err
    assert "--resume" in out
    assert "Traceback" not in err
    assert 0 < load(state, name)["step"] < job.steps

    last = start(job, folder, "--resume")
    for process in (whole, last):
        _, err = process.communicate()
        assert process.returncode == 0, err
    for file in job.files:
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_loss_that_is_nan_names_step_bucket_and_state(tmp_path, monkeypatch):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    flags = ["--steps", "9", "--batch", "2", "--buckets", "2", "--device", "cpu"]
    args = train.arguments([*flags, "--out", str(tmp_path)])
    model = quantize(load_model(BASE), 4, 2, calibration="minmax")
    subject = toy.load_subject(BASE.parent / "subjects" / "mo", train.SUBJECT_WORD)
    calls = []

    def squared_error(self, v, x0, t, eps):
        calls.append(0)
        is_wrong = (t < 500) & (len(calls) > 3)
        return (v - eps).square().mean((1, 2, 3)) * torch.where(is_wrong, torch.nan, 1)

    monkeypatch.setattr(train.Diffusion, "squared_error", squared_error)
    message = r"step 3, timestep bucket \[0\].*state.pt has step 2"
    with pytest.raises(ValueError, match=message):
        train.finetune(model, args, *subject)
    for delta in deltas(model).values():
        assert delta.isfinite().all()


def test_a_run_with_other_flags_is_not_resumed(tmp_path):
    args = train.arguments(["--lr", "0.01", "--out", str(tmp_path)])
    others = Namespace(**{**vars(args), "lr": 0.02, "bits": 3})
    save({"kind": "fine-tuning", "args": runtime.describe(others)}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="--bits 3 --lr 0.02"):
        runtime.load_state(args, "fine-tuning")

"""A run that is killed at any moment and resumed ends in the same bits as one that never stopped.

And a run that can't go on says why.
"""

import multiprocessing
import os
import random
import signal
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from conftest import run

import pretrain
import runtime
import train
from data import toy
from quant import deltas, quantize
from runtime import BASE, load, load_model, save

# runs are forks of one process, which imports torch and its compiler, 5 seconds, once for all
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "pretrain", "torch._dynamo"])


class Job(NamedTuple):
    """A run to kill."""

    script: ModuleType
    flags: list
    steps: int  # so many that it doesn't end before it is killed
    kills: int
    files: list  # what it writes


JOBS = {
    "fine-tuning": Job(
        script=train,
        flags=["--batch", 1, "--buckets", 2, "--calibration", "minmax", "--sample-steps", 1],
        steps=60,
        kills=10,
        files=["adapter.pt", "tuned.pt", "grid.png"],
    ),
    "pretraining": Job(
        script=pretrain,
        flags=["--batch", 1],
        steps=20,
        kills=4,
        files=["base.pt"],
    ),
}


class Run:
    """A job in a process of its own, that has started."""

    def __init__(self, name, out, *flags):
        flags = [*JOBS[name].flags, "--steps", JOBS[name].steps, "--device", "cpu", *flags]
        self.log = Path(f"{out}.log")  # what the run prints
        self.process = FORKS.Process(target=work, args=(name, self.log, [*flags, "--out", out]))
        self.process.start()

    def stop(self, number):
        os.kill(self.process.pid, number)
        return self.end()

    def end(self):
        """Wait for the end: what the run has printed, and its exit code."""
        self.process.join()
        return self.log.read_text(), self.process.exitcode


def work(name, log, flags):
    """What the process of a run does. It saves after each step, and hardly scores."""
    torch.set_num_threads(1)
    runtime.SAVE_EVERY = 1
    train.IMAGES_PER_PROMPT = 1
    pretrain.score_base = print
    sys.stdout = sys.stderr = log.open("w")
    sys.exit(run(JOBS[name].script, *flags))


def wait(a_run, done):
    """Wait until done() is true; the run must still be going on then."""
    while not done():
        assert a_run.process.is_alive(), a_run.end()
        time.sleep(0.0005)


def time_of(path):
    """When a file was last written, in nanoseconds; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def stop_in_the_middle(a_run, state, number, while_writing, chance):
    """Send a signal to a run after its next save, at a random moment or while it writes."""
    before = time_of(state)

    def has_saved():
        return time_of(state) > before

    def is_writing():
        return any(state.parent.glob("*.tmp"))

    wait(a_run, has_saved)
    if while_writing:
        wait(a_run, is_writing)
    else:
        time.sleep(chance.uniform(0, 0.2))
    return a_run.stop(number)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_run_killed_and_resumed_at_random_moments_ends_in_the_same_bits(name, tmp_path):
    job = JOBS[name]
    folder = tmp_path / "killed"
    state = folder / "state.pt"
    chance = random.Random(0)
    half_written = 0
    whole = Run(name, tmp_path / "whole")
    for kill in range(job.kills):
        resume = ["--resume"] if kill > 0 else []
        killed = Run(name, folder, *resume)
        while_writing = kill % 2 == 1
        said, code = stop_in_the_middle(killed, state, signal.SIGKILL, while_writing, chance)
        assert code == -signal.SIGKILL, said
        half_written += any(folder.glob("*.tmp"))
        assert 0 < load(state, name)["step"] < job.steps
    assert half_written

    stopped = Run(name, folder, "--resume")
    said, code = stop_in_the_middle(stopped, state, signal.SIGINT, False, chance)  # Ctrl-C
    assert code == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert 0 < load(state, name)["step"] < job.steps

    last = Run(name, folder, "--resume")
    for a_run in (whole, last):
        said, code = a_run.end()
        assert code == 0, said
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

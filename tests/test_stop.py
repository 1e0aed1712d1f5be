"""A run that is killed and resumed ends in the same bits as one that never stopped."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from conftest import error_of, run

import pretrain
import runtime
import train
from runtime import BASE, load, save

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
    """A job, started in a process of its own."""

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


# --------------------------------------------------------------------------------------------------
# The base of a pretraining is that of its last step
# --------------------------------------------------------------------------------------------------

PRETRAINING = ("--batch", 1, "--steps", 2, "--device", "cpu")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a pretraining of two steps that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "score_base", lambda *_: None)
        assert run(pretrain, *PRETRAINING, "--out", folder) == 0
    return folder


class Killed(BaseException):
    """What no handler catches, as if the process was killed."""


@pytest.mark.parametrize("write", [1, 2, 3, 4])
def test_a_pretraining_killed_before_a_write_resumes_to_its_last_base(
    write, whole, tmp_path, monkeypatch, no_scores
):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 1)  # so there are two writes after each step
    writes = []

    def save_or_die(*args):
        writes.append(0)
        if len(writes) == write:
            raise Killed
        save(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(pretrain, "save", save_or_die)
        run(pretrain, *PRETRAINING, "--out", tmp_path)
    resume = ["--resume"] if (tmp_path / "state.pt").exists() else []
    assert run(pretrain, *PRETRAINING, "--out", tmp_path, *resume) == 0
    assert (tmp_path / "base.pt").read_bytes() == (whole / "base.pt").read_bytes()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: shutil.copy(BASE, path)])
def test_a_finished_pretraining_resumes_to_its_base(damage, whole, tmp_path, no_scores):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder / "base.pt")
    assert run(pretrain, *PRETRAINING, "--out", folder, "--resume") == 0
    assert (folder / "base.pt").read_bytes() == (whole / "base.pt").read_bytes()


def test_a_pretraining_goes_on_with_more_steps_and_not_fewer(whole, tmp_path, capsys, no_scores):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    flags = ("--batch", 1, "--device", "cpu", "--out", folder, "--resume")
    error = error_of(pretrain, *flags, "--steps", 1, capsys=capsys)
    assert "at step 2 already; give --steps at least that" in error
    assert run(pretrain, *flags, "--steps", 3) == 0
    assert load(folder / "state.pt", "pretraining")["step"] == 3
    assert load(folder / "base.pt", "model")["step"] == 3

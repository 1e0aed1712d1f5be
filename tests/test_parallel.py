"""Several processes train as one, and a process that dies ends the run.

Two runs don't write to one folder, and a full disk leaves the last good state.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import pretrain
import train
from quant import deltas, quantize
from runtime import BASE, claim, load, load_model

pytestmark = pytest.mark.slow
TRAIN = ROOT / "train.py"
QUICK = ("--batch", 1, "--calibration", "minmax", "--sample-steps", 1)
ENDLESS = ("--steps", 5000, *QUICK)  # ends when it is killed


TWICE = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")  # torchrun


def start(*command):
    """Start a script as a process of its own; with TWICE in front, as two that train as one."""
    return subprocess.Popen(
        [sys.executable, *map(str, command), "--device", "cpu"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def output_of(*command):
    """The output of a command that ends well."""
    process = start(*command)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


def wait_for(path, process, seconds=200):
    """Wait until a running process has made this file."""
    deadline = time.time() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline
        time.sleep(0.1)


QUICK_SCRIPT = """
import sys
sys.path.insert(0, {root!r})
import {name}, runtime
runtime.SAVE_EVERY = 3
{name}.IMAGES_PER_PROMPT = 1
{name}.score_base = lambda *_: None
runtime.guard({name}.main)
"""


def quick(folder, name):
    """A script that saves after every third step and hardly scores."""
    script = folder / f"quick_{name}.py"
    script.write_text(QUICK_SCRIPT.format(root=str(ROOT), name=name))
    return script


def state_of(folder, kind="fine-tuning"):
    return load(folder / "state.pt", kind)


def step_counts(state):
    """How often each parameter was moved."""
    return {key: int(moments["step"]) for key, moments in state["optimizer"]["state"].items()}


def assert_same_gradients(two, one, tolerance):
    """The optimizers have averaged the same gradients, to a relative tolerance."""
    assert two["optimizer"]["state"].keys() == one["optimizer"]["state"].keys()
    for key, moments in one["optimizer"]["state"].items():
        a = two["optimizer"]["state"][key]["exp_avg"]
        b = moments["exp_avg"]
        assert (a - b).norm() <= tolerance * b.norm(), key


METHODS = [
    ["--bits", 4, "--buckets", 40, "--calibration", "minmax"],
    ["--bits", 32],
]


@pytest.mark.parametrize("flags", METHODS)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, monkeypatch, flags):
    monkeypatch.setattr(train, "IMAGES_PER_PROMPT", 1)
    full = flags == ["--bits", 32]
    flags = [*flags, "--steps", 20, "--sample-steps", 1]
    out = output_of(
        *TWICE, quick(tmp_path, "train"), *flags, "--batch", 2, "--out", tmp_path / "two"
    )
    assert run(train, *flags, "--batch", 4, "--device", "cpu", "--out", tmp_path / "one") == 0
    one = state_of(tmp_path / "one")
    two = state_of(tmp_path / "two")

    assert two["step"] == 20
    assert torch.equal(two["generator"], one["generator"])
    assert_same_gradients(two, one, tolerance=0.01)
    moved = max(p.abs().max().item() for p in one["trained"].values())
    for name, p in one["trained"].items():
        torch.testing.assert_close(two["trained"][name], p, rtol=0, atol=2e-3 * moved)

    # a bucket's deltas are moved in the steps in which any process drew it, and in no others
    counts = step_counts(one)
    assert counts == step_counts(two)
    if not full:
        assert len(set(counts.values())) > 2  # buckets are drawn unequally often
        assert 20 not in counts.values()

    model = load_model(BASE)
    whole = sum(p.numel() for p in model.parameters())
    trained = whole
    if not full:
        quantize(model, 4, 40, calibration="minmax")
        trained = sum(delta.numel() for delta in deltas(model).values())
    said = f"2 processes average {4 * trained:,} bytes a step; full fine-tuning {4 * whole:,}"
    assert said in out


def test_pretraining_in_two_processes_is_that_of_one_with_twice_the_batch(tmp_path, no_scores):
    flags = ["--steps", 2, "--seed", 3]
    script = quick(tmp_path, "pretrain")
    output_of(*TWICE, script, *flags, "--batch", 4, "--out", tmp_path / "two")
    assert run(pretrain, *flags, "--batch", 8, "--device", "cpu", "--out", tmp_path / "one") == 0
    one = state_of(tmp_path / "one", "pretraining")
    two = state_of(tmp_path / "two", "pretraining")
    assert torch.equal(two["generator"], one["generator"])
    assert_same_gradients(two, one, tolerance=0.05)
    assert step_counts(two) == step_counts(one)


def children_of(pid):
    """The process ids of the children of a process."""
    children = []
    for folder in Path("/proc").glob("[0-9]*"):
        stat = folder / "stat"
        if stat.exists() and stat.read_text().split()[3] == str(pid):
            children.append(int(folder.name))
    return children


def test_the_death_of_a_process_ends_the_run(tmp_path):
    both = start(*TWICE, quick(tmp_path, "train"), *ENDLESS, "--out", tmp_path)
    wait_for(tmp_path / "state.pt", both)
    children = children_of(both.pid)
    assert len(children) == 2

    os.kill(max(children), signal.SIGKILL)
    _, err = both.communicate(timeout=60)
    assert both.returncode != 0
    assert "Signal 9" in err
    assert f'File "{TRAIN}' not in err  # one sentence, no traceback of ours
    assert state_of(tmp_path)["step"] % 3 == 0


def test_a_folder_belongs_to_one_run_until_it_ends_or_is_killed(tmp_path, capsys):
    first = start(TRAIN, *ENDLESS, "--out", tmp_path)
    wait_for(tmp_path / "lock", first)
    assert run(train, "--steps", 1, "--out", tmp_path) == 2
    out, err = capsys.readouterr()
    assert re.fullmatch(r"train.py: another run is writing to .*; wait for it, .*\n", err)
    assert not out
    assert not (tmp_path / "tuned.pt").exists()

    first.kill()
    first.communicate()
    assert run(train, "--steps", 1, *QUICK, "--out", tmp_path) == 0


FULL_DISK = """
import resource, runtime, train
runtime.SAVE_EVERY = 1
saves = []
old = train.save

def save(*args):
    saves.append(0)
    if len(saves) > 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    old(*args)

train.save = save
runtime.guard(train.main)
"""


def test_a_full_disk_leaves_the_last_good_state(tmp_path):
    flags = ["--steps", 5, *QUICK, "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *map(str, flags)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    last_line = done.stderr.splitlines()[-1]
    assert last_line.startswith("-c: ")
    assert "state.pt" in last_line
    assert state_of(tmp_path)["step"] == 1
    assert not list(tmp_path.glob("*.tmp"))
    claim(tmp_path).close()  # the folder is free again

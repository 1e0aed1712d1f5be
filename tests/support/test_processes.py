"""Several processes train as one; --compile."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, error_of, run

import pretrain
import train
from model import UNet
from quant import deltas, quantize
from sample import BASE, load_model
from support import processes
from support.files import load, save

pytestmark = pytest.mark.usefixtures("no_images", "no_scores")

# --------------------------------------------------------------------------------------------------
# In this process
# --------------------------------------------------------------------------------------------------


def test_each_process_takes_its_share_of_each_part_of_a_batch(monkeypatch):
    """i0 i1 i2 i3 | c0 c1 c2 c3, as in the docstring, with 10 for c0."""
    batch = torch.tensor([0, 1, 2, 3, 10, 11, 12, 13])
    images = batch.view(-1, 1, 1, 1).expand(8, 3, 16, 16)
    monkeypatch.setattr(processes, "WORLD_SIZE", 2)
    for rank, mine in ((0, [0, 2, 10, 12]), (1, [1, 3, 11, 13])):
        monkeypatch.setattr(processes, "RANK", rank)
        share, shown = processes.share_of_process((batch, images), "cpu", parts=2)
        assert share.tolist() == mine
        assert shown[:, 0, 0, 0].tolist() == mine
        assert shown.is_contiguous(memory_format=torch.channels_last)
    whole, _ = processes.share_of_process((batch, images), "cpu")
    assert whole.tolist() == [1, 3, 11, 13]  # of one part: every other one


def test_one_process_takes_all():
    batch = torch.arange(6)
    assert torch.equal(*processes.share_of_process((batch, batch), "cpu", parts=2))


def test_more_processes_than_gpus_are_refused(tmp_path, capsys, monkeypatch):
    def take(gpu):
        pytest.fail(f"GPU {gpu} of two was taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setenv("LOCAL_RANK", "2")
    for script in (train, pretrain):
        error = error_of(script, "--device", "cuda", capsys=capsys)
        assert "process 3 has no GPU (2 here); start fewer processes" in error
    assert not list(tmp_path.iterdir())


def test_each_process_has_the_gpu_of_its_local_rank(monkeypatch):
    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    train.arguments(["--device", "cpu"])
    assert taken == []
    train.arguments(["--device", "cuda"])
    assert taken == [1]


@pytest.mark.parametrize("script", [train, pretrain])
def test_compile_compiles_the_model_that_is_trained(script, tmp_path, monkeypatch):
    compiled = []
    calls = []

    def compile_(model):
        compiled.append(type(model))

        def compiled_model(*args):
            calls.append(len(args))
            return model(*args)

        return compiled_model

    monkeypatch.setattr(torch, "compile", compile_)
    flags = ("--batch", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path)
    if script is train:
        flags = (*flags, "--calibration", "minmax")
    assert run(script, *flags) == 0
    assert compiled == []
    assert run(script, *flags, "--compile") == 0
    assert compiled == [UNet]
    assert calls == [3]  # x_t, t, words


# --------------------------------------------------------------------------------------------------
# In processes of their own
# --------------------------------------------------------------------------------------------------

QUICK = ("--batch", 1, "--calibration", "minmax", "--sample-steps", 1)
TWICE = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")  # torchrun


def start(*command, **environment):
    """Start a script as a process of its own; with TWICE in front, as two that train as one."""
    return subprocess.Popen(
        [sys.executable, *map(str, command), "--device", "cpu"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
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
import {name}
from support import flags, runs
runs.SAVE_EVERY = 3
{name}.IMAGES_PER_PROMPT = 1
{name}.score_base = lambda *_: None
flags.guard({name}.main)
"""


def quick(folder, name):
    """A script that saves after every third step and hardly scores."""
    script = folder / f"quick_{name}.py"
    script.write_text(QUICK_SCRIPT.format(root=str(ROOT), name=name))
    return script


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


@pytest.mark.slow
@pytest.mark.parametrize("flags", METHODS)
def test_two_processes_are_one_with_twice_the_batch(tmp_path, flags):
    full = flags == ["--bits", 32]
    flags = [*flags, "--steps", 20, "--sample-steps", 1]
    out = output_of(
        *TWICE, quick(tmp_path, "train"), *flags, "--batch", 2, "--out", tmp_path / "two"
    )
    assert run(train, *flags, "--batch", 4, "--device", "cpu", "--out", tmp_path / "one") == 0
    one = load(tmp_path / "one" / "state.pt", "fine-tuning")
    two = load(tmp_path / "two" / "state.pt", "fine-tuning")

    assert two["step"] == 20
    assert torch.equal(two["generator"], one["generator"])
    assert_same_gradients(two, one, tolerance=0.01)
    moved = max(p.abs().max().item() for p in one["tensors"].values())
    for name, p in one["tensors"].items():
        torch.testing.assert_close(two["tensors"][name], p, rtol=0, atol=2e-3 * moved)

    # a bucket's deltas are moved in the steps in which any process drew it, and in no others
    counts = step_counts(one)
    assert counts == step_counts(two)
    if not full:
        assert len(set(counts.values())) > 2  # buckets are drawn unequally often
        assert 20 not in counts.values()

    model = load_model(BASE)
    trained = sum(p.numel() for p in model.parameters())
    if not full:
        quantize(model, 4, 40, calibration="minmax")
        trained = sum(delta.numel() for delta in deltas(model).values())
    assert out.count(f"2 processes average {4 * trained:,} bytes a step") == 1
    assert out.count("wrote grid.png") == 1


@pytest.mark.slow
def test_pretraining_in_two_processes_is_that_of_one_with_twice_the_batch(tmp_path):
    flags = ["--steps", 2, "--seed", 3]
    script = quick(tmp_path, "pretrain")
    output_of(*TWICE, script, *flags, "--batch", 4, "--out", tmp_path / "two")
    assert run(pretrain, *flags, "--batch", 8, "--device", "cpu", "--out", tmp_path / "one") == 0
    one = load(tmp_path / "one" / "state.pt", "pretraining")
    two = load(tmp_path / "two" / "state.pt", "pretraining")
    assert torch.equal(two["generator"], one["generator"])
    assert_same_gradients(two, one, tolerance=0.05)
    assert step_counts(two) == step_counts(one)


def children_of(pid):
    """The process ids of the children of a process, by their rank."""
    children = {}
    for folder in Path("/proc").glob("[0-9]*"):
        stat = folder / "stat"
        if stat.exists() and stat.read_text().split()[3] == str(pid):
            environment = (folder / "environ").read_bytes().decode().split("\0")
            (rank,) = [text[5:] for text in environment if text.startswith("RANK=")]
            children[int(rank)] = int(folder.name)
    return children


def start_two(folder, *flags):
    """A run of two processes that has saved a state, and the process ids of both by rank."""
    both = start(*TWICE, quick(folder, "train"), *QUICK, *flags, "--out", folder)
    wait_for(folder / "state.pt", both)
    children = children_of(both.pid)
    assert children.keys() == {0, 1}
    return both, children


@pytest.mark.slow
def test_the_death_of_a_process_ends_the_run(tmp_path):
    both, children = start_two(tmp_path, "--steps", 5000)
    os.kill(children[1], signal.SIGKILL)
    _, err = both.communicate(timeout=60)
    assert both.returncode != 0
    assert "Signal 9" in err
    assert f'File "{ROOT / "train.py"}' not in err  # one sentence, no traceback of ours
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] % 3 == 0


@pytest.mark.slow
def test_ctrl_c_lets_the_first_process_save_and_both_resume(tmp_path):
    both, children = start_two(tmp_path, "--steps", 100)
    for rank in (1, 0):
        os.kill(children[rank], signal.SIGINT)
    out, err = both.communicate(timeout=60)
    assert both.returncode != 0
    step = load(tmp_path / "state.pt", "fine-tuning")["step"]
    assert step < 100
    assert f"stopped after step {step} of 100, saved in" in out
    assert f'File "{ROOT / "train.py"}' not in err

    flags = (*QUICK, "--steps", 100, "--out", tmp_path, "--resume")
    assert "wrote grid.png" in output_of(*TWICE, quick(tmp_path, "train"), *flags)
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] == 100


@pytest.mark.slow
def test_without_a_compiler_compile_is_refused_in_one_sentence(tmp_path):
    model = UNet(channels=(16,), attention=(), c_emb=32)  # is traced in seconds
    base = tmp_path / "base.pt"
    save({"kind": "model", "config": model.config, "model": model.state_dict()}, base)
    flags = ("--compile", "--steps", 1, *QUICK, "--base", base, "--out", tmp_path / "out")
    process = start(ROOT / "train.py", *flags, PATH="", CXX="", TQDM_DISABLE="1")
    _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    last = err.splitlines()[-1]
    assert last.startswith("train.py: --compile failed (")
    assert last.endswith("install a C++ compiler such as g++, or leave it out")
    assert "Traceback" not in err
    assert os.listdir(tmp_path / "out") == ["lock"]

"""Several processes train as one; one that dies ends the run; two runs don't write to one folder."""
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from quant import deltas, quantize
from runtime import BASE, claim, load, load_model

ROOT = Path(__file__).resolve().parents[1]


def start(*args, processes=1, script="train.py"):
    many = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] * (processes > 1)
    return subprocess.Popen([sys.executable, *many, script, *map(str, args), "--device", "cpu"], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})


def quick(folder, name):
    """A script, but it saves after every third step, and pretraining ends without scores."""
    script = folder / f"quick_{name}.py"
    script.write_text(f"""import sys; sys.path.insert(0, {str(ROOT)!r})
import {name}, runtime
runtime.SAVE_EVERY = 3
{name}.score_base = lambda *_: None
runtime.guard({name}.main)""")
    return script


def finished(*args, **kwargs):
    process = start(*args, **kwargs)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out


@pytest.mark.parametrize("flags", [["--bits", 4, "--buckets", 40, "--calibration", "minmax"], ["--bits", 32]])
def test_two_processes_are_one_of_twice_the_batch(tmp_path, flags):
    flags = [*flags, "--steps", 20, "--sample-steps", 1]
    out = finished(*flags, "--batch", 2, "--out", tmp_path / "two", processes=2)
    finished(*flags, "--batch", 4, "--out", tmp_path / "one")
    two, one = (load(tmp_path / name / "state.pt", "fine-tuning") for name in ("two", "one"))
    assert two["step"] == 20 and torch.equal(two["generator"], one["generator"])
    moved = max(p.abs().max().item() for p in one["trained"].values()) if flags[1] == 4 else 1
    for name, p in one["trained"].items():
        torch.testing.assert_close(two["trained"][name], p, rtol=0, atol=2e-3 * moved)
    steps = [{key: int(state["step"]) for key, state in run["optimizer"]["state"].items()} for run in (one, two)]
    assert steps[0] == steps[1]  # buckets move where any process drew them, and only there
    assert flags[1] == 32 or {3, 5} < set(steps[0].values()) and 20 not in steps[0].values()
    model = load_model(BASE)
    whole = sum(p.numel() for p in model.parameters())
    mine = whole if flags[1] == 32 else sum(d.numel() for d in deltas(quantize(model, 4, 40, calibration="minmax")).values())
    assert f"2 processes average {4 * mine:,} bytes a step; full fine-tuning {4 * whole:,}" in out


def test_pretraining_in_two_processes(tmp_path):
    flags = ["--steps", 2, "--seed", 3]
    finished(*flags, "--batch", 8, "--out", tmp_path / "one", script=quick(tmp_path, "pretrain"))
    finished(*flags, "--batch", 4, "--out", tmp_path / "two", processes=2, script=quick(tmp_path, "pretrain"))
    one, two = (load(tmp_path / name / "state.pt", "pretraining")["model"] for name in ("one", "two"))
    for name, p in one.items():
        torch.testing.assert_close(two[name], p, rtol=0, atol=1e-3)


def test_the_death_of_a_process_ends_the_run(tmp_path):
    run = start("--steps", 5000, "--batch", 1, "--calibration", "minmax", "--sample-steps", 1, "--out", tmp_path, processes=2,
                script=quick(tmp_path, "train"))
    children, deadline = [], time.time() + 200
    while time.time() < deadline and not (tmp_path / "state.pt").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    for folder in Path("/proc").glob("[0-9]*"):
        if Path(folder / "stat").exists() and Path(folder / "stat").read_text().split()[3] == str(run.pid):
            children.append(int(folder.name))
    assert len(children) == 2
    os.kill(max(children), signal.SIGKILL)
    _, err = run.communicate(timeout=60)
    assert run.returncode != 0 and "Signal 9" in err
    assert "File \"" + str(ROOT / "train.py") not in err  # one sentence, no traceback of ours
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] % 3 == 0


def test_a_folder_belongs_to_one_run(tmp_path):
    run = start("--steps", 5000, "--batch", 1, "--calibration", "minmax", "--sample-steps", 1, "--out", tmp_path)
    while not (tmp_path / "lock").exists():
        assert run.poll() is None, run.communicate()
        time.sleep(0.1)
    second = start("--steps", 1, "--out", tmp_path)
    out, err = second.communicate(timeout=120)
    assert second.returncode == 2 and re.fullmatch(r"train.py: another run is writing to .*; wait for it, .*\n", err)
    assert not out and not (tmp_path / "tuned.pt").exists()
    run.kill()
    run.communicate()
    finished("--steps", 1, "--sample-steps", 1, "--calibration", "minmax", "--out", tmp_path)  # a killed run holds nothing


LIMITED = "import resource, runtime, train; runtime.SAVE_EVERY = 1; count = []; old = train.save\n" \
          "def save(*args):\n" \
          "    count.append(0)\n" \
          "    len(count) > 1 and resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n" \
          "    old(*args)\n" \
          "train.save = save\n" \
          "runtime.guard(train.main)"


def test_a_full_disk_leaves_the_last_good_state(tmp_path):
    args = ["--steps", "5", "--batch", "1", "--calibration", "minmax", "--sample-steps", "1", "--out", tmp_path]
    run = subprocess.run([sys.executable, "-c", LIMITED, *args], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and "Traceback" not in run.stderr
    assert run.stderr.splitlines()[-1].startswith("-c: ") and "state.pt" in run.stderr.splitlines()[-1]
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] == 1 and not list(tmp_path.glob("*.tmp"))
    claim(tmp_path).close()

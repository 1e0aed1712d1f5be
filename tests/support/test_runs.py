"""Training runs: saved, stopped, killed, resumed, diverged, and two in one folder."""

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT, contents_of, error_of, run

import pretrain
import sample
import train
from data import toy
from model import Diffusion, UNet
from quant import deltas, quantize
from sample import BASE, load_model
from support import runs
from support.files import load, save
from support.runs import Run, lock_folder

pytestmark = pytest.mark.usefixtures("no_images", "no_scores")
EVALUATE = train.evaluate


class Job(NamedTuple):
    """A run of training that takes a second."""

    script: ModuleType
    kind: str  # of its state.pt
    flags: tuple
    files: list  # what it writes at its end


TUNING = ("--batch", 1, "--buckets", 2, "--calibration", "minmax", "--sample-steps", 1)
JOBS = {
    "train": Job(
        script=train,
        kind="fine-tuning",
        flags=(*TUNING, "--device", "cpu"),
        files=["tuned.pt", "adapter.pt", "grid.png"],
    ),
    "pretrain": Job(
        script=pretrain,
        kind="pretraining",
        flags=("--batch", 1, "--device", "cpu"),
        files=["base.pt"],
    ),
}
QUICK = (*JOBS["train"].flags, "--steps", 3)


@pytest.fixture(params=JOBS)
def job(request):
    return JOBS[request.param]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of both jobs, three steps of each, that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    images = torch.zeros(len(train.PROMPTS) * train.IMAGES_PER_PROMPT, 3, 16, 16)
    scores = {"parts": 0, "identity": 0, "prompt": 0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: (images, scores))
        patch.setattr(pretrain, "score_base", lambda *_: None)
        for job in JOBS.values():
            flags = (*job.flags, "--steps", 3, "--out", folder / job.kind)
            assert run(job.script, *flags) == 0
    return folder


def contents(folder):
    """The bytes of the files in a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_same_files(job, folder, whole):
    """What the run in folder has written is what the one that nothing stopped has."""
    for name in job.files:
        assert (folder / name).read_bytes() == (whole / job.kind / name).read_bytes(), name


# --------------------------------------------------------------------------------------------------
# Killed and resumed
# --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler catches, as if the process was killed."""


def kill_before_write(number, monkeypatch):
    """Let the script be killed before it writes a file for this time, counted from 1."""
    writes = []

    def save_or_die(*args):
        writes.append(0)
        if len(writes) == number:
            raise Killed
        save(*args)

    for module in (runs, train, pretrain):
        monkeypatch.setattr(module, "save", save_or_die)


def test_a_run_killed_before_any_of_its_writes_resumes_to_the_same_bytes(
    job, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    flags = (*job.flags, "--steps", 3)
    for write in range(1, 3 + len(job.files)):  # of state.pt twice, and of the others
        out = tmp_path / str(write)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_before_write(write, patch)
            run(job.script, *flags, "--out", out)
        assert not (out / job.files[-1]).exists()
        resume = ["--resume"] if (out / "state.pt").exists() else []
        assert run(job.script, *flags, "--out", out, *resume) == 0
        assert_same_files(job, out, whole)


def test_a_finished_run_resumes_to_the_same_bytes_in_a_folder_that_was_moved(job, whole, tmp_path):
    out = shutil.copytree(whole / job.kind, tmp_path / "moved")
    for name in job.files:
        (out / name).unlink()
    flags = (*job.flags, "--steps", 3, "--out", out, "--resume")
    assert run(job.script, *flags) == 0
    assert_same_files(job, out, whole)


def test_a_pretraining_goes_on_with_more_steps_and_not_fewer(whole, tmp_path, capsys):
    out = shutil.copytree(whole / "pretraining", tmp_path / "copy")
    flags = (*JOBS["pretrain"].flags, "--out", out, "--resume")
    error = error_of(pretrain, *flags, "--steps", 2, capsys=capsys)
    assert "at step 3 already; give --steps at least that" in error
    assert run(pretrain, *flags, "--steps", 4) == 0
    assert load(out / "state.pt", "pretraining")["step"] == 4
    assert load(out / "base.pt", "model")["step"] == 4


# --------------------------------------------------------------------------------------------------
# What can be resumed, and what can't
# --------------------------------------------------------------------------------------------------


@pytest.fixture
def finished(whole, tmp_path):
    """A copy of the finished fine-tuning."""
    return shutil.copytree(whole / "fine-tuning", tmp_path / "finished")


def resume_error(out, *flags, capsys):
    """The sentence that refuses to resume the fine-tuning in out, which stays as it is."""
    before = contents(out)
    error = error_of(train, *QUICK, *flags, "--out", out, "--resume", capsys=capsys)
    assert contents(out) == before
    return error


def test_a_subject_and_a_base_that_were_moved_are_resumed(finished, tmp_path):
    shutil.copytree(BASE.parent / "subjects" / "mo", tmp_path / "my subject")
    shutil.copy(BASE, tmp_path / "my base.pt")
    flags = ("--subject", tmp_path / "my subject", "--base", tmp_path / "my base.pt")
    assert run(train, *QUICK, *flags, "--sample-steps", 2, "--out", finished, "--resume") == 0


@pytest.mark.parametrize("suffix", ["png", "txt"])
def test_a_subject_of_other_images_or_captions_is_not_resumed(suffix, finished, tmp_path, capsys):
    subject = shutil.copytree(BASE.parent / "subjects" / "mo", tmp_path / "mo")
    shutil.copy(subject / f"4.{suffix}", subject / f"0.{suffix}")
    error = resume_error(finished, "--subject", subject, capsys=capsys)
    assert "a run with other contents of --subject; bring them back" in error


def test_a_base_of_other_weights_is_not_resumed(finished, tmp_path, capsys):
    base = load(BASE, "model")
    base["model"]["out.bias"][0] += 0.5
    save(base, tmp_path / "base.pt")
    error = resume_error(finished, "--base", tmp_path / "base.pt", capsys=capsys)
    assert "a run with other contents of --base; bring them back" in error


OTHER_FLAGS = {
    "--lr": 0.5,
    "--bits": 3,
    "--steps": 4,
    "--seed": 1,
    "--batch": 2,
    "--prior": 1.0,
    "--buckets": 1,
    "--scales": "out",
    "--calibration": "mse",
}


def test_a_run_of_other_flags_is_not_resumed(finished, capsys):
    for flag, value in OTHER_FLAGS.items():
        error = resume_error(finished, flag, value, capsys=capsys)
        assert re.search(f"a run with {flag} .*, and this one has {value};", error)


def test_a_run_of_another_number_of_processes_is_not_resumed(finished, capsys, monkeypatch):
    monkeypatch.setattr(runs, "WORLD_SIZE", 2)
    error = resume_error(finished, capsys=capsys)
    assert "a run with --nproc-per-node 1, and this one has 2" in error


def test_a_folder_without_a_state_is_told_to_start(tmp_path, capsys):
    error = error_of(train, *QUICK, "--out", tmp_path, "--resume", capsys=capsys)
    assert "state.pt doesn't exist; start without --resume" in error


def test_a_state_of_another_kind_or_version_is_refused_in_one_sentence(finished, capsys):
    path = finished / "state.pt"
    state = load(path, "fine-tuning")
    half = dict(list(state["tensors"].items())[::2])
    other_shapes = {name: torch.zeros(3) for name in state["tensors"]}
    kind = {"kind": "pretraining"}
    others = [  # what differs, and a part of the sentence
        (kind, "is of kind 'pretraining'"),
        ({"flags": {"lr": "9\n" * 10_000}}, "a run with --"),
        ({"inputs": {}}, "other contents of --base"),
        ({"tensors": half}, "isn't a state of this version"),
        ({"tensors": other_shapes}, "isn't a state of this version"),
        ({"optimizer": {}}, "isn't a state of this version"),
        ({"optimizer": {"state": {}, "param_groups": []}}, "isn't a state of this version"),
        ({"generator": torch.zeros(0, dtype=torch.uint8)}, "isn't a state of this version"),
    ]
    for change, reason in others:
        save({**state, **change}, path)
        error = resume_error(finished, capsys=capsys)
        assert reason in error
        assert len(error) < 400
    path.write_bytes(b"PK")
    assert "state.pt is damaged" in resume_error(finished, capsys=capsys)


# --------------------------------------------------------------------------------------------------
# Stopped by a signal
# --------------------------------------------------------------------------------------------------


@pytest.fixture(params=["SIGINT", "SIGTERM", "SIGHUP"])
def number(request):
    """The number of a signal that ends this test, and not pytest, if the code doesn't handle it."""

    def not_handled(number, frame):
        raise AssertionError(f"signal {number} would have ended the process")

    number = getattr(signal, request.param)
    before = signal.signal(number, not_handled)
    yield number
    signal.signal(number, before)


def raise_in_step(step, number, monkeypatch):
    """Let the signal arrive in the middle of this step, counted from 1."""
    squared_error = Diffusion.squared_error
    calls = []

    def raise_and_compute(*args):
        calls.append(0)
        if len(calls) == step:
            signal.raise_signal(number)
        return squared_error(*args)

    monkeypatch.setattr(Diffusion, "squared_error", raise_and_compute)


def assert_stopped(job, out, step, number, whole, capsys):
    """The run in out has saved this step and ended, and can be resumed to the same bytes."""
    state = out / "state.pt"
    assert load(state, job.kind)["step"] == step
    assert f"stopped after step {step} of 3, saved in {state}" in capsys.readouterr().out
    for name in job.files:
        assert not (out / name).exists()
    assert run(job.script, *job.flags, "--steps", 3, "--out", out, "--resume") == 0
    assert_same_files(job, out, whole)


@pytest.mark.parametrize("step", [1, 3])  # of three
def test_a_signal_lets_the_step_end_and_saves(number, step, whole, tmp_path, monkeypatch, capsys):
    raise_in_step(step, number, monkeypatch)
    assert run(train, *QUICK, "--out", tmp_path) == 128 + number
    assert_stopped(JOBS["train"], tmp_path, step, number, whole, capsys)


def test_pretraining_stops_as_fine_tuning_does(whole, tmp_path, monkeypatch, capsys):
    job = JOBS["pretrain"]
    raise_in_step(2, signal.SIGTERM, monkeypatch)
    flags = (*job.flags, "--steps", 3, "--out", tmp_path)
    assert run(pretrain, *flags) == 128 + signal.SIGTERM
    assert_stopped(job, tmp_path, 2, signal.SIGTERM, whole, capsys)


def test_a_signal_while_the_last_state_is_saved_ends_the_run(whole, tmp_path, monkeypatch, capsys):
    def save_and_raise(*args):
        save(*args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "save", save_and_raise)
        assert run(train, *QUICK, "--out", tmp_path) == 130
    assert_stopped(JOBS["train"], tmp_path, 3, signal.SIGINT, whole, capsys)


def test_ctrl_c_before_the_first_step_ends_the_script_without_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: signal.raise_signal(signal.SIGINT))
    assert run(train, *QUICK, "--out", tmp_path) == 130
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_signal_that_is_ignored_stays_ignored(number, tmp_path, monkeypatch):
    """nohup ignores SIGHUP, and a shell script Ctrl-C for what it starts in the background."""
    signal.signal(number, signal.SIG_IGN)
    raise_in_step(1, number, monkeypatch)
    assert run(train, *QUICK, "--out", tmp_path) == 0


def test_a_signal_is_handled_as_before_after_a_run(number, tmp_path):
    before = signal.getsignal(number)
    assert run(train, *QUICK, "--out", tmp_path) == 0
    assert signal.getsignal(number) is before


# --------------------------------------------------------------------------------------------------
# Diverged, or out of room
# --------------------------------------------------------------------------------------------------


def nan_gradient_in_step(step, monkeypatch):
    """Let the gradient of this step, counted from 1, be NaN, and its loss finite."""
    squared_error = Diffusion.squared_error
    calls = []

    def compute(self, v, *args):
        calls.append(0)
        error = squared_error(self, v, *args)
        if len(calls) == step:
            error = error + (0 * v).sqrt().mean()  # the slope of sqrt at 0 is infinite
        return error

    monkeypatch.setattr(Diffusion, "squared_error", compute)


def test_parameters_that_diverge_in_the_last_step_replace_nothing(
    job, whole, tmp_path, monkeypatch, capsys
):
    out = shutil.copytree(whole / job.kind, tmp_path / "out")
    before = contents(out)
    nan_gradient_in_step(3, monkeypatch)
    error = error_of(job.script, *job.flags, "--steps", 3, "--out", out, capsys=capsys)
    assert "the parameters are no longer finite after step 3; --lr" in error
    assert "lower it (no state is saved)" in error
    assert contents(out) == before


def test_parameters_that_diverge_before_a_state_is_saved_keep_the_last_one(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    nan_gradient_in_step(4, monkeypatch)
    error = error_of(train, *QUICK, "--steps", 9, "--out", tmp_path, capsys=capsys)
    assert "after step 4" in error
    assert f"({tmp_path / 'state.pt'} has step 2)" in error
    state = load(tmp_path / "state.pt", "fine-tuning")
    assert state["step"] == 2
    for p in state["tensors"].values():
        assert p.isfinite().all()


def test_a_loss_that_is_nan_names_its_timesteps_and_the_last_state(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "SAVE_EVERY", 2)
    squared_error = Diffusion.squared_error
    calls = []

    def compute(self, v, x0, t, eps):
        calls.append(0)
        is_wrong = (t < 500) & (len(calls) > 3)
        return squared_error(self, v, x0, t, eps) * torch.where(is_wrong, torch.nan, 1)

    monkeypatch.setattr(Diffusion, "squared_error", compute)
    flags = (*QUICK, "--batch", 4, "--steps", 9, "--out", tmp_path)
    error = error_of(train, *flags, capsys=capsys)
    low, high = map(int, re.search(r"at timesteps (\d+) to (\d+);", error).groups())
    assert low < high < 500
    assert "state.pt has step 2" in error
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] == 2


def diverge(model):
    """Make deltas finite, and scales exp(delta) infinite."""
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.fill_(100)


def test_images_that_are_not_finite_replace_nothing(finished, monkeypatch, capsys):
    before = contents(finished)
    monkeypatch.setattr(train, "evaluate", EVALUATE)
    monkeypatch.setattr(train, "IMAGES_PER_PROMPT", 1)
    monkeypatch.setattr(train, "finetune", lambda model, *_: diverge(model))
    assert "the images aren't finite" in error_of(train, *QUICK, "--out", finished, capsys=capsys)
    assert contents(finished) == before


def test_sample_does_not_write_images_that_are_not_finite(tmp_path, capsys):
    model = quantize(load_model(BASE), 4, calibration="minmax")
    diverge(model)
    save(contents_of(model), tmp_path / "tuned.pt")
    flags = ("--n", 1, "--steps", 1, "--ckpt", tmp_path / "tuned.pt", "--out", tmp_path / "a.png")
    assert "the images aren't finite" in error_of(sample, *flags, capsys=capsys)
    assert not (tmp_path / "a.png").exists()


def test_a_full_disk_leaves_the_last_good_state(tmp_path, monkeypatch, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    saves = []

    def save_with_little_room(*args):
        saves.append(0)
        if len(saves) == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
        save(*args)

    monkeypatch.setattr(runs, "SAVE_EVERY", 1)
    monkeypatch.setattr(runs, "save", save_with_little_room)
    try:
        error = error_of(train, *QUICK, "--out", tmp_path, capsys=capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "state.pt can't be written" in error
    assert load(tmp_path / "state.pt", "fine-tuning")["step"] == 2
    assert sorted(os.listdir(tmp_path)) == ["lock", "state.pt"]


# --------------------------------------------------------------------------------------------------
# The folder and the bar
# --------------------------------------------------------------------------------------------------


def test_a_folder_belongs_to_one_run_until_it_ends(tmp_path, capsys):
    with lock_folder(tmp_path / "out"):
        error = error_of(train, *QUICK, "--out", tmp_path / "out", capsys=capsys)
        assert re.search("another run is writing to .*; wait for it, or choose another", error)
        assert os.listdir(tmp_path / "out") == ["lock"]
        assert run(train, *QUICK, "--out", tmp_path / "other") == 0
    assert run(train, *QUICK, "--out", tmp_path / "out") == 0


def test_a_file_named_lock_keeps_its_contents(tmp_path):
    (tmp_path / "lock").write_text("the combination is 1-2-3")
    lock_folder(tmp_path).close()
    assert (tmp_path / "lock").read_text() == "the combination is 1-2-3"


def new_run(folder, **args):
    """A run of two steps, and what its steps take."""
    args = Namespace(out=folder, resume=False, steps=2, lr=0.1, **args)
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.Adam([parameter])
    return Run(args, "fine-tuning"), (optimizer, torch.Generator(), {"p": parameter})


def test_the_bar_shows_the_running_mean_of_each_quarter_of_the_timesteps(tmp_path):
    a_run, state = new_run(tmp_path)
    t = torch.tensor([0, 249, 250, 999])
    shown = []
    for step in a_run.steps(*state):
        a_run.watch(torch.tensor([1.0, 3.0, 5.0, 7.0]) + step, t, 1000)
        shown.append(a_run.bar.postfix)
    label = "loss by quarter of t"
    assert shown == [f"{label} 2.0000 5.0000 7.0000", f"{label} 2.0200 5.0200 7.0200"]


# --------------------------------------------------------------------------------------------------
# In processes of their own
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A folder from which a script was run, without bars, and what the script printed.

    Installed packages have the names of the project's folders.
    """
    folder = tmp_path_factory.mktemp("else where")
    packages = tmp_path_factory.mktemp("packages")
    for name in ("data", "support"):
        (packages / name).mkdir()
        (packages / name / "__init__.py").touch()
    flags = map(str, (*QUICK, "--out", "a run"))
    environment = {"PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *flags],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return folder, done


@pytest.mark.slow
def test_a_script_runs_from_any_folder_and_writes_to_out_alone(elsewhere):
    folder, done = elsewhere
    assert [path.name for path in folder.iterdir()] == ["a run"]
    assert "wrote grid.png and the model to a run" in done.stdout


@pytest.mark.slow
def test_tqdm_disable_in_the_environment_turns_all_bars_off(elsewhere):
    _, done = elsewhere
    assert done.stderr == ""


# runs are forks of one process, which imports torch and its compiler, 5 seconds, once for all
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "pretrain", "torch._dynamo"])
STEPS = {"train": 60, "pretrain": 20}  # so many that a run doesn't end before it is killed
KILLS = {"train": 6, "pretrain": 4}


class Process:
    """A job in a process of its own."""

    def __init__(self, name, out, *flags):
        flags = [*JOBS[name].flags, "--steps", STEPS[name], "--out", out, *flags]
        self.log = Path(f"{out}.log")  # what the run prints
        self.process = FORKS.Process(target=work, args=(name, self.log, flags))
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
    runs.SAVE_EVERY = 1
    train.IMAGES_PER_PROMPT = 1
    pretrain.score_base = lambda *_: None
    sys.stdout = sys.stderr = log.open("w")
    sys.exit(run(JOBS[name].script, *flags))


def wait(process, done):
    """Wait until done() is true; the run must still be going on then."""
    while not done():
        assert process.process.is_alive(), process.end()
        time.sleep(0.0005)


def time_of(path):
    """When a file was last written, in nanoseconds; 0 if there is none."""
    return path.stat().st_mtime_ns if path.exists() else 0


def stop_in_the_middle(process, state, number, while_writing, chance):
    """Send a signal to a run after its next save, at a random moment or while it writes."""
    before = time_of(state)
    wait(process, lambda: time_of(state) > before)
    if while_writing:
        wait(process, lambda: any(state.parent.glob("*.tmp")))
    else:
        time.sleep(chance.uniform(0, 0.2))
    return process.stop(number)


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_a_process_killed_and_resumed_at_random_moments_ends_in_the_same_bytes(name, tmp_path):
    job = JOBS[name]
    folder = tmp_path / "killed"
    state = folder / "state.pt"
    chance = random.Random(0)
    half_written = 0
    whole = Process(name, tmp_path / "whole")
    for kill in range(KILLS[name]):
        resume = ["--resume"] if kill > 0 else []
        killed = Process(name, folder, *resume)
        while_writing = kill % 2 == 1
        said, code = stop_in_the_middle(killed, state, signal.SIGKILL, while_writing, chance)
        assert code == -signal.SIGKILL, said
        half_written += any(folder.glob("*.tmp"))
        assert 0 < load(state, job.kind)["step"] < STEPS[name]
    assert half_written

    stopped = Process(name, folder, "--resume")
    said, code = stop_in_the_middle(stopped, state, signal.SIGINT, False, chance)  # Ctrl-C
    assert code == 130, said
    assert "--resume" in said
    assert "Traceback" not in said
    assert 0 < load(state, job.kind)["step"] < STEPS[name]

    last = Process(name, folder, "--resume")
    for process in (whole, last):
        said, code = process.end()
        assert code == 0, said
    for file in job.files:
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    assert not list(tmp_path.rglob("*.tmp"))


def resident():
    """The bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_memory_stays_flat_over_500_steps_and_50_samplings(tmp_path, monkeypatch):
    flags = ["--steps", "500", "--batch", "1", "--buckets", "2", "--device", "cpu"]
    args = train.arguments([*flags, "--out", str(tmp_path)])
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, vocab=len(toy.VOCAB))
    quantize(model.to(memory_format=torch.channels_last), 4, 2, calibration="minmax")
    images, captions = toy.load_subject(BASE.parent / "subjects" / "mo")
    words = torch.tensor([toy.caption("sks creature")])
    weighed = []  # bytes of the process
    watch = Run.watch

    def watch_and_weigh(*args):
        watch(*args)
        weighed.append(resident())

    monkeypatch.setattr(Run, "watch", watch_and_weigh)
    train.finetune(model, images, captions, args, Run(args, "fine-tuning"))
    for i in range(50):
        sample.sample(model, words, 2, seed=i, packed=i % 2 == 0)
        weighed.append(resident())
    assert len(weighed) == 550
    assert max(weighed[200:]) < 1.02 * weighed[200]

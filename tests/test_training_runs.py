"""Runs that are stopped, that diverge, and whose flags or surroundings are wrong."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import run

import pretrain
import runtime
import sample
import train
from data import toy
from model import Diffusion
from quant import deltas, quantize
from runtime import BASE, load, load_model, save

ROOT = Path(__file__).resolve().parents[1]
SHORT = ("--batch", 1, "--sample-steps", 1, "--device", "cpu")
QUICK = (*SHORT, "--calibration", "minmax")
FLOAT = (*SHORT, "--bits", 32)
SIGNALS = {"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}


@pytest.fixture
def no_images(monkeypatch):
    """train.py draws nothing before and after it trains: that takes most of a short run."""
    images = torch.zeros(len(train.PROMPTS) * train.IMAGES_PER_PROMPT, 3, 16, 16)
    monkeypatch.setattr(train, "evaluate", lambda *_: (images, {}))


@pytest.fixture(params=SIGNALS)
def number(request):
    """The number of a signal that ends this test, and not pytest, if the code doesn't handle it."""

    def not_handled(number, frame):
        raise AssertionError(f"signal {number} would have ended the process")

    number = SIGNALS[request.param]
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


# --------------------------------------------------------------------------------------------------
# Signals and streams
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "pretrain.py", "sample.py"])
def test_ctrl_c_while_torch_is_imported_is_not_a_traceback(script):
    command = [sys.executable, "-X", "importtime", script]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    for line in process.stderr:
        if "torch" in line:
            break
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert "Traceback" not in err


@pytest.mark.parametrize("step", [1, 3])  # of three
def test_a_signal_lets_the_step_end_and_saves(
    number, step, tmp_path, monkeypatch, capsys, no_images
):
    raise_in_step(step, number, monkeypatch)
    assert run(train, *QUICK, "--steps", 3, "--out", tmp_path) == 128 + number
    state = tmp_path / "state.pt"
    assert load(state, "fine-tuning")["step"] == step
    assert f"stopped after step {step} of 3, saved in {state}" in capsys.readouterr().out
    assert not (tmp_path / "tuned.pt").exists()
    assert run(train, *QUICK, "--steps", 3, "--out", tmp_path, "--resume") == 0
    assert load(state, "fine-tuning")["step"] == 3
    assert (tmp_path / "tuned.pt").exists()


def test_a_signal_before_the_first_step_ends_the_script(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "evaluate", lambda *_: signal.raise_signal(number))
    assert run(train, *QUICK, "--steps", 3, "--out", tmp_path) == 128 + number
    assert capsys.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_signal_that_is_ignored_stays_ignored(number, tmp_path, monkeypatch, no_images):
    """nohup ignores SIGHUP, and a shell script Ctrl-C for what it starts in the background."""
    signal.signal(number, signal.SIG_IGN)
    raise_in_step(1, number, monkeypatch)
    assert run(train, *QUICK, "--steps", 2, "--out", tmp_path) == 0


def test_a_signal_is_handled_as_before_after_a_run(number, tmp_path, no_images):
    before = signal.getsignal(number)
    assert run(train, *QUICK, "--steps", 1, "--out", tmp_path) == 0
    assert signal.getsignal(number) is before


def test_training_outside_the_main_thread(tmp_path, no_images):
    codes = []
    flags = (*QUICK, "--steps", 1, "--out", tmp_path)
    thread = threading.Thread(target=lambda: codes.append(run(train, *flags)))
    thread.start()
    thread.join()
    assert codes == [0]


def closed_pipe():
    """The end of a pipe that nobody reads, as of `| head`."""
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize("stderr", [closed_pipe, lambda: None])  # None: closed from the start
def test_a_run_does_not_need_stderr(stderr, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stderr())
    assert run(train, *QUICK, "--steps", 2, "--out", tmp_path) == 0


def test_a_script_does_not_need_stderr(tmp_path):
    """Python flushes stderr once more at its end, and exits with 120 if that fails."""
    command = [sys.executable, "sample.py", "--n", "1", "--steps", "1", "--out", tmp_path / "a.png"]
    with closed_pipe() as stderr:
        assert subprocess.run(command, cwd=ROOT, stderr=stderr).returncode == 0


def test_a_closed_terminal_does_not_change_what_a_signal_does(
    tmp_path, monkeypatch, number, no_images
):
    monkeypatch.setattr(sys, "stdout", closed_pipe())
    monkeypatch.setattr(sys, "stderr", closed_pipe())
    raise_in_step(1, number, monkeypatch)
    assert run(train, *QUICK, "--steps", 3, "--out", tmp_path) == 128 + number


def test_a_name_that_the_console_cannot_encode_is_escaped(tmp_path, monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii"))
    path = tmp_path / "größe.png"
    assert run(sample, "--n", 1, "--steps", 1, "--out", path) == 0
    assert path.exists()
    assert b"gr\\xf6\\xdfe.png" in shown.getvalue()


# --------------------------------------------------------------------------------------------------
# Training that diverges
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


def contents(folder):
    """The bytes of the files in a folder, by their names."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("kind", [QUICK, FLOAT])
def test_the_last_update_is_checked(kind, tmp_path, monkeypatch, capsys, no_images):
    flags = (*kind, "--steps", 3, "--out", tmp_path)
    assert run(train, *flags) == 0
    before = contents(tmp_path)
    nan_gradient_in_step(3, monkeypatch)
    assert run(train, *flags) == 2
    message = "no longer finite after step 3; --lr .* lower it \\(no state was saved yet\\)"
    assert re.search(message, capsys.readouterr().err)
    assert contents(tmp_path) == before


def test_the_update_before_a_state_is_saved_is_checked(tmp_path, monkeypatch, capsys, no_images):
    monkeypatch.setattr(runtime, "SAVE_EVERY", 2)
    nan_gradient_in_step(4, monkeypatch)
    assert run(train, *QUICK, "--steps", 9, "--out", tmp_path) == 2
    assert "after step 4" in capsys.readouterr().err
    state = load(tmp_path / "state.pt", "fine-tuning")
    assert state["step"] == 2
    for p in state["trained"].values():
        assert p.isfinite().all()


def test_the_last_update_of_pretraining_is_checked(tmp_path, monkeypatch, capsys):
    nan_gradient_in_step(2, monkeypatch)
    assert run(pretrain, "--batch", 1, "--steps", 2, "--device", "cpu", "--out", tmp_path) == 2
    assert "no longer finite after step 2" in capsys.readouterr().err
    assert contents(tmp_path).keys() == {"lock"}


def diverge(model):
    """Make deltas finite, and scales exp(delta) infinite."""
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.fill_(100)


def test_images_that_are_not_finite_replace_nothing(tmp_path, monkeypatch, capsys):
    flags = (*QUICK, "--steps", 1, "--out", tmp_path)
    assert run(train, *flags) == 0
    before = contents(tmp_path)
    monkeypatch.setattr(train, "finetune", lambda model, *_: diverge(model))
    assert run(train, *flags) == 2
    assert "the images aren't finite" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_sample_does_not_write_images_that_are_not_finite(tmp_path, capsys):
    model = quantize(load_model(BASE), 4, calibration="minmax")
    diverge(model)
    saved = {"kind": "quantized", "config": model.config, "quant_config": model.quant_config}
    save({**saved, "model": model.state_dict()}, tmp_path / "tuned.pt")
    image = tmp_path / "a.png"
    assert run(sample, "--ckpt", tmp_path / "tuned.pt", "--steps", 1, "--out", image) == 2
    assert "the images aren't finite" in capsys.readouterr().err
    assert not image.exists()


# --------------------------------------------------------------------------------------------------
# An image depends on its caption, the seed and its place, and on no other image
# --------------------------------------------------------------------------------------------------


class Shrink(torch.nn.Module):
    """A model that computes each value by itself, so that no batch rounds in another way."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, words):
        return self.factor * x + 0.01 * words.sum(1).view(-1, 1, 1, 1)


PROMPTS = ("red circle", "sks creature", "blue square on plain pink", "red circle", "red circle")


@pytest.mark.parametrize("sampler", sample.SAMPLERS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_an_image_is_the_same_however_many_are_drawn(sampler, chunk):
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS])

    def draw(words, **kwargs):
        return sample.sample(Shrink(), words, 5, sampler, seed=3, **kwargs)

    images = draw(words, chunk=chunk)
    for n in range(1, len(words) + 1):
        assert torch.equal(draw(words[:n]), images[:n])
    others = draw(words.flip(0), chunk=chunk)
    assert torch.equal(others[2], images[2])  # the same caption in the same place
    assert not torch.equal(images[3], images[4])  # the same caption in another place


def test_a_real_image_is_the_same_however_many_are_drawn():
    model = load_model(BASE)
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS])
    images = sample.sample(model, words, 3, chunk=2)
    alone = sample.sample(model, words[:1], 3)
    torch.testing.assert_close(images[:1], alone, rtol=0, atol=1e-3)  # batches round differently


def test_no_two_images_of_any_seeds_share_their_noise():
    seen = set()
    for seed in range(100):
        for noise in sample.draw_noise(sample.noise_generators(seed, 40)):
            seen.add(noise.flatten()[0].item() + 1000 * noise.flatten()[1].item())
    assert len(seen) == 100 * 40


# --------------------------------------------------------------------------------------------------
# The base is that of the last step
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
    write, whole, tmp_path, monkeypatch
):
    monkeypatch.setattr(pretrain, "score_base", lambda *_: None)
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
def test_a_finished_pretraining_resumes_to_its_base(damage, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "score_base", lambda *_: None)
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    damage(folder / "base.pt")
    assert run(pretrain, *PRETRAINING, "--out", folder, "--resume") == 0
    assert (folder / "base.pt").read_bytes() == (whole / "base.pt").read_bytes()


# --------------------------------------------------------------------------------------------------
# Flags and surroundings that don't fit are refused, in one sentence
# --------------------------------------------------------------------------------------------------

REFUSED = [
    # script, command, what the sentence names
    (train, "--bits 32 --buckets 1", "--buckets"),
    (train, "--bits 32 --buckets 2 --scales out", "--scales and --buckets"),
    (train, "--calibration rowcol --bits 32", "--calibration"),
    (train, "--subject=", "--subject"),
    (train, "--base=", "--base"),
    (train, "--out=", "--out"),
    (pretrain, "--out=", "--out"),
    (sample, "--ckpt=", "--ckpt"),
    (sample, "--adapter=", "--adapter"),
    (sample, "--out=", "--out"),
    (sample, "--packed", "--packed needs a quantized model"),
    *((script, f"--seed {2**32}", "--seed") for script in (train, pretrain, sample)),  # as seed 0
]
# pretraining has none of fine-tuning's own flags
for flag in (
    "bits 4",
    "scales out",
    "buckets 2",
    "calibration mse",
    "subject mo",
    "base data/base.pt",
):
    REFUSED.append((pretrain, f"--{flag}", f"--{flag}"))
for flag in ("prior 1", "sample-steps 1", "checkpoint"):
    REFUSED.append((pretrain, f"--{flag}", f"--{flag}"))


@pytest.mark.parametrize("script, command, culprit", REFUSED)
def test_flags_that_would_be_ignored_are_refused(
    script, command, culprit, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for module, name in ((train, "finetune"), (pretrain, "pretrain"), (sample, "sample")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it wasn't refused"))
    monkeypatch.setattr(train, "evaluate", lambda *_: (None, None))
    assert run(script, *command.split()) == 2
    err = capsys.readouterr().err
    assert culprit in err
    assert len(err.splitlines()) == 1
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "script, rank, world_size",
    [
        ("train.py", "1", None),
        ("train.py", None, "2"),
        ("train.py", "2", "2"),
        ("train.py", "a", "2"),
        ("pretrain.py", "0", None),
    ],
)
def test_half_of_what_torchrun_sets_is_refused(script, rank, world_size, tmp_path):
    environment = {"RANK": rank, "WORLD_SIZE": world_size}
    given = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, ROOT / script, "--steps", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"RANK is {rank or 'not set'} and WORLD_SIZE is {world_size or 'not set'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_named_as_a_shipped_subject_is_ambiguous(tmp_path, monkeypatch, capsys):
    shipped = BASE.parent / "subjects" / "bix"
    shutil.copytree(BASE.parent / "subjects" / "zed", tmp_path / "bix")
    monkeypatch.chdir(tmp_path)
    assert run(train, *QUICK, "--steps", 1, "--subject", "bix") == 2
    err = capsys.readouterr().err
    assert f"--subject ./bix or --subject {shipped}" in err
    assert train.find_subject("./bix") == "./bix"
    assert train.find_subject("zed") == BASE.parent / "subjects" / "zed"
    monkeypatch.chdir(shipped.parent)
    assert train.find_subject("bix") == shipped


def test_the_command_at_the_end_can_be_pasted_into_a_shell(
    tmp_path, monkeypatch, capsys, no_images
):
    folder = tmp_path / "it's $HOME"
    folder.mkdir()
    monkeypatch.chdir(folder)
    assert run(train, *QUICK, "--steps", 1, "--out", "a run") == 0
    printed = capsys.readouterr().out.splitlines()[-1].replace("python", sys.executable, 1)
    subprocess.run(f"{printed} --n 1 --steps 1", shell=True, check=True, capture_output=True)
    assert (folder / "out" / "sample.png").exists()


def test_the_command_in_the_project_is_short(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert runtime.command("train.py", "--base", "a b.pt") == "python train.py --base 'a b.pt'"


def test_an_installed_package_named_data_is_not_taken(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "__init__.py").touch()
    for script in ("train.py", "pretrain.py", "sample.py"):
        command = [sys.executable, ROOT / script, "--help"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)

"""What a training step takes, and runs that are stopped, diverge, or have unusual surroundings."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from conftest import ROOT, contents_of, run

import pretrain
import runtime
import sample
import train
from data import toy
from model import Diffusion
from quant import deltas, quantize
from runtime import BASE, load, load_model, save

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


def test_an_ignored_ctrl_c_stays_ignored_while_torch_is_imported():
    command = [sys.executable, "-X", "importtime", "sample.py", "--help"]

    def ignore():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    process = subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=ignore,
    )
    for line in process.stderr:
        if "torch" in line:
            break
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert "--cfg-scale" in out


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


def test_a_closed_pipe_ends_a_script_without_a_word():
    """As after `| head`."""
    log = ["--log", "experiments/runs.jsonl", "--rows", "none"]
    command = [sys.executable, "experiments/tables.py", "several", *log]
    with closed_pipe() as stdout:
        ended = subprocess.run(command, cwd=ROOT, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 130
    assert ended.stderr == ""


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
# A step: its images, its loss, its rate
# --------------------------------------------------------------------------------------------------


def tuned_deltas(folder, prior):
    flags = (*QUICK, "--batch", 2, "--steps", 2, "--prior", prior, "--out", folder)
    assert run(train, *flags) == 0
    return load(folder / "adapter.pt", "adapter")["deltas"]


@pytest.mark.parametrize("prior", [0, 0.3])
def test_prior_weighs_the_class_images(prior, tmp_path, monkeypatch, no_images):
    sample_scenes = toy.sample_scenes

    def black_scenes(*args, **kwargs):
        images, words = sample_scenes(*args, **kwargs)
        return torch.full_like(images, -1), words

    first = tuned_deltas(tmp_path, prior)
    monkeypatch.setattr(toy, "sample_scenes", black_scenes)
    second = tuned_deltas(tmp_path, prior)
    assert first.any()
    assert torch.equal(first, second) == (prior == 0)


def test_a_batch_is_the_subject_and_scenes_of_the_class():
    instance, captions = toy.load_subject(BASE.parent / "subjects" / "mo")
    generator = torch.Generator().manual_seed(0)
    x0, words, t = train.draw_batch(200, instance, captions, Diffusion(), generator)
    assert x0.shape == (400, 3, 16, 16)
    of_subject = (x0[:, None] == instance).flatten(2).all(2).any(1)
    assert of_subject[:200].all()
    assert not of_subject[200:].any()
    assert (words[:200, :2] == torch.tensor(toy.caption("sks creature")[:2])).all()
    for slot in range(4, 7):  # place and background, dropped for some
        assert set((words[:200, slot] == 0).tolist()) == {False, True}
    assert not torch.isin(words[200:], torch.tensor([toy.WORD[word] for word in toy.RARE])).any()
    for half in (t[:200], t[200:]):
        assert torch.equal(half // 5, torch.arange(200))  # evenly spread


def test_rates_rise_at_first_and_fall_to_zero():
    args = train.arguments(["--lr", "0.5", "--steps", "1000"])
    rates = [train.learning_rate(args, step) for step in (0, 19, 500, 999)]
    assert rates == pytest.approx([0.5 / 20, 0.5 * 0.981, 0.25, 0.0005])
    args = pretrain.arguments(["--lr", "0.5", "--steps", "3000"])
    rates = [pretrain.learning_rate(args, step) for step in (0, 99, 2000, 2500, 2999)]
    assert rates == pytest.approx([0.005, 0.5, 0.5, 0.25, 0.0005])


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
    message = (
        "no longer finite after step 3; --lr .* lower it \\(this run has saved no state yet\\)"
    )
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


def test_a_loss_that_is_nan_names_step_timesteps_and_state(tmp_path, monkeypatch):
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
    message = r"after 3 steps, at (t =|timesteps from \d+ to) [1-4]?\d?\d; .*state.pt has step 2"
    with pytest.raises(ValueError, match=message):
        train.finetune(model, args, *subject)
    for delta in deltas(model).values():
        assert delta.isfinite().all()


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
    save(contents_of(model), tmp_path / "tuned.pt")
    image = tmp_path / "a.png"
    assert run(sample, "--ckpt", tmp_path / "tuned.pt", "--steps", 1, "--out", image) == 2
    assert "the images aren't finite" in capsys.readouterr().err
    assert not image.exists()


# --------------------------------------------------------------------------------------------------
# Names and surroundings
# --------------------------------------------------------------------------------------------------


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

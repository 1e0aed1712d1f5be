"""What the tests share: one thread and one seed, scripts without new processes, models."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton, if it is installed, reads it when imported

import pretrain
import train
from data import toy
from model import UNet
from quant import deltas
from support.files import save
from support.flags import guard

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # for tensors this small, threads cost more than they give


def pytest_runtest_setup():
    """Random tensors don't depend on which tests ran before."""
    torch.manual_seed(0)


def run(script, *args):
    """Run a script's main function with these arguments, and return its exit code."""
    before = sys.argv
    sys.argv = [f"{script.__name__}.py", *map(str, args)]
    try:
        guard(script.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


BARS = ("sampling:", "fine-tuning:", "pretraining:")


def error_of(script, *args, capsys):
    """Run a script that ends with exit code 2, and return its one sentence."""
    assert run(script, *args) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith(BARS)]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.fixture
def no_scores(monkeypatch):
    """pretrain.py doesn't draw the 400 images that it scores."""
    monkeypatch.setattr(pretrain, "score_base", lambda *_: None)


@pytest.fixture
def no_images(monkeypatch):
    """train.py draws and scores nothing before and after it trains: most of a short run."""
    images = torch.zeros(len(train.PROMPTS) * train.IMAGES_PER_PROMPT, 3, 16, 16)
    scores = {"parts": 0, "identity": 0, "prompt": 0}
    monkeypatch.setattr(train, "evaluate", lambda *_: (images, scores))


@torch.no_grad()
def spread(model, seed=1):
    """model with deltas that aren't zero, the same for a seed, so that the buckets differ."""
    generator = torch.Generator().manual_seed(seed)
    for delta in deltas(model).values():
        delta.copy_(torch.rand(delta.shape, generator=generator) - 0.5)
    return model


@pytest.fixture
def small_base(tmp_path, monkeypatch):
    """A base that tests have time for, in place of the shipped one; runs write beside it."""
    import recovery
    import runs

    model = UNet(
        channels=(16, 32),
        attention=(1,),
        c_emb=32,
        c_words=16,
        vocab=len(toy.VOCAB),
        slots=toy.SLOTS,
    )
    nn.init.normal_(model.out.weight, std=0.02)  # not zeros: no bucket would matter
    base = tmp_path / "base.pt"
    save({"kind": "model", "config": model.config, "model": model.state_dict()}, base)
    (tmp_path / "subjects").symlink_to(runs.BASE.parent / "subjects")
    for module in (runs, recovery):
        monkeypatch.setattr(module, "BASE", base)
    monkeypatch.chdir(tmp_path)


def contents_of(model):
    """The contents of a tuned.pt, for a quantized UNet."""
    return {
        "kind": "quantized",
        "config": model.config,
        "quant_config": model.quant_config,
        "model": model.state_dict(),
    }

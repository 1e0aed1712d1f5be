"""Long use of one process: memory stays flat, to 2 percent."""

import math

import pytest
import torch

import sample
import train
from bench import resident
from data import toy
from model import UNet
from quant import quantize
from runtime import BASE


@pytest.mark.slow
@pytest.mark.skipif(math.isnan(resident()), reason="needs /proc/self/status")
def test_memory_stays_flat_over_500_steps_and_50_samplings(tmp_path, monkeypatch):
    flags = ["--steps", "500", "--batch", "1", "--buckets", "2", "--device", "cpu"]
    args = train.arguments([*flags, "--out", str(tmp_path)])
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, vocab=len(toy.VOCAB))
    quantize(model.to(memory_format=torch.channels_last), 4, 2, calibration="minmax")
    images, captions = toy.load_subject(BASE.parent / "subjects" / "mo")
    words = torch.tensor([toy.caption("sks creature")])
    weighed = []  # bytes of the process
    watch = train.Loop.watch

    def watch_and_weigh(*args):
        watch(*args)
        weighed.append(resident())

    monkeypatch.setattr(train.Loop, "watch", watch_and_weigh)
    train.finetune(model, args, images, captions)
    for i in range(50):
        sample.sample(model, words, 2, seed=i, packed=i % 2 == 0)
        weighed.append(resident())
    assert len(weighed) == 550
    assert max(weighed[200:]) < 1.02 * weighed[200]

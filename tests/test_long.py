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


@pytest.mark.skipif(math.isnan(resident()), reason="needs /proc/self/status")
def test_2000_steps_and_200_samplings(tmp_path, monkeypatch):
    args = train.arguments(["--steps", "2000", "--batch", "1", "--buckets", "2", "--out", str(tmp_path), "--device", "cpu"])
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, vocab=len(toy.VOCAB))
    quantize(model.to(memory_format=torch.channels_last), 4, 2, calibration="minmax")
    bytes_, show, words = [], train.Loop.show, torch.tensor([toy.caption("sks creature")])
    
    def show_and_weigh(*args):
        show(*args)
        bytes_.append(resident())

    monkeypatch.setattr(train.Loop, "show", show_and_weigh)
    train.finetune(model, args, *toy.load_subject(BASE.parent / "subjects" / "mo"))
    for i in range(200):
        sample.sample(model, words, 2, seed=i, packed=i % 2 == 0)
        bytes_.append(resident())
    assert len(bytes_) == 2200 and max(bytes_[200:]) < 1.02 * bytes_[200]

"""The methods that bench.py compares are what their names say, and what it counts is what it says."""
import pytest
import torch
import torch.nn as nn

import bench
from quant import QuantLayer, quantize


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(bench.SIZES, "small", (dict(channels=(16, 32), attention=(1,), c_emb=32, c_words=16), 8))


def predict(model):
    x0, words, t, _ = bench.batch_of(3, "small", "cpu")
    with torch.no_grad():
        return model(x0, t, words)


@pytest.mark.parametrize("method", bench.METHODS)
def test_each_method_starts_as_the_base_it_stands_on_and_trains(small, method):
    model, base = (bench.build(name, "small", "cpu") for name in (method, "full fine-tuning"))
    if "packed" in method:
        quantize(base, 4, scales="out", calibration="minmax")
    elif "ours" in method or "plain" in method:
        quantize(base, 4, calibration="minmax", keep8=() if "plain" in method else None)
    start = predict(model)
    torch.testing.assert_close(start, predict(base), rtol=1e-4, atol=1e-5)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = bench.optimizer_of(model)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        bench.step(model, optimizer, bench.batch_of(3, "small", "cpu"))
    assert not torch.equal(predict(model), start)
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


def test_the_packed_base_of_lora_is_packed(small):
    model = bench.build("LoRA r = 2, packed base", "small", "cpu")
    packed = {name for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}
    assert packed and all(name.endswith(".layer") for name in packed)
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"lora_a", "lora_b"}


def test_kept_bytes_counts_each_storage_once_and_no_weight(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.ReLU())
    monkeypatch.setattr(bench.DIFFUSION, "loss", lambda model, x: model(x).square().mean())
    # of 5 samples: the two ReLU outputs, of which the second is also what square() keeps; not the batch, not the weight
    assert bench.kept_bytes(model, (torch.randn(5, 8),)) == 2 * 5 * 4 * 4


def test_held_bytes_counts_weight_gradient_and_both_moments():
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    assert bench.held_bytes(model, optimizer) == 4 * 8 * 4 * 4 + 4  # and the count of steps

"""The methods that bench.py compares are what their names say, and it counts what it says."""

import pytest
import torch
import torch.nn as nn

import bench
from quant import QuantLayer, quantize


@pytest.fixture
def small(monkeypatch):
    """The name of a size that tests have time for."""
    config = {"channels": (16, 32), "attention": (1,), "c_emb": 32, "c_words": 16}
    monkeypatch.setitem(bench.SIZES, "small", bench.Size(config, side=8))
    return "small"


def predict(model, size):
    x0, t, words, _ = bench.batch_of(3, size, "cpu")
    with torch.no_grad():
        return model(x0, t, words)


@pytest.mark.parametrize("method", bench.METHODS)
def test_each_method_starts_as_the_base_it_stands_on_and_trains(small, method):
    model = bench.build(method, small, "cpu")
    base = bench.build("full fine-tuning", small, "cpu")
    if "packed" in method:
        quantize(base, 4, scales="out", columns="channel", calibration="minmax")
    elif "plain" in method:
        quantize(base, 4, columns="channel", calibration="minmax", keep8=())
    elif "ours" in method:
        quantize(base, 4, columns="channel", calibration="minmax")
    elif "position" in method:
        quantize(base, 4, columns="position", calibration="minmax")
    start = predict(model, small)
    torch.testing.assert_close(start, predict(base, small), rtol=1e-4, atol=1e-5)

    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = bench.optimizer_of(model)
    optimizer.param_groups[0]["lr"] = 0.01
    for _ in range(2):
        bench.step(model, optimizer, bench.batch_of(3, small, "cpu"))
    assert not torch.equal(predict(model, small), start)
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name])


def test_the_packed_base_of_lora_is_packed(small):
    model = bench.build("LoRA r = 2, packed base", small, "cpu")
    packed = {name for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}
    assert packed
    assert all(name.endswith(".layer") for name in packed)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert {name.split(".")[-2] for name in trained} == {"lora_a", "lora_b"}


def test_checkpointed_blocks_keep_less_and_their_gradients_are_the_same(small):
    batch = bench.batch_of(3, small, "cpu")
    kept = []
    gradients = []
    for method in ("TuneQDM, ours, N = 2", "TuneQDM, ours, N = 2, checkpointed"):
        model = bench.build(method, small, "cpu")
        kept.append(bench.kept_bytes(model, batch))
        bench.loss_of(model, batch).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert kept[1] < 0.6 * kept[0]
    for plain, again in zip(*gradients):
        assert torch.equal(plain, again)


def test_kept_bytes_counts_each_storage_once_and_no_weight(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 4, bias=False), nn.ReLU(), nn.ReLU())
    monkeypatch.setattr(bench, "loss_of", lambda model, batch: model(*batch).square().mean())
    # For 5 samples, the two ReLU outputs: the second is also what square() keeps. Neither the batch
    # nor the weight counts.
    assert bench.kept_bytes(model, (torch.randn(5, 8),)) == 2 * 5 * 4 * 4


def test_held_bytes_counts_weight_gradient_and_both_moments():
    model = nn.Linear(8, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(5, 8)).sum().backward()
    optimizer.step()
    count_of_steps = 4
    assert bench.held_bytes(model, optimizer) == 4 * 8 * 4 * 4 + count_of_steps

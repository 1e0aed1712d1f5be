"""CUDA graphs against plain calls: what surrounds a recording on a CPU, too, the rest on a GPU."""

import copy

import pytest
import torch
import torch.nn as nn

import graphs
import quant
from bench import Checkpointed
from graphs import Graphed, graphed, with_known_buckets
from model import Stage, UNet
from quant import batch_of, deltas, quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")


def small_unet(num_buckets=2):
    """A quantized UNet, and three batches: the two buckets mixed, and each alone."""
    torch.manual_seed(0)
    model = UNet(channels=(32, 32), attention=(1,), c_emb=16, c_words=16)
    nn.init.normal_(model.out.weight, std=0.1)
    model = model.to(DEVICE, memory_format=torch.channels_last)
    quantize(model, 4, num_buckets, calibration="minmax")
    batches = []
    for t in ([900, 100], [900, 950], [10, 20]):
        x = torch.randn(2, 3, 16, 16).to(DEVICE, memory_format=torch.channels_last)
        words = torch.randint(22, (2, 7)).to(DEVICE)
        batches.append((x, torch.tensor(t, device=DEVICE), words))
    return model, batches


def train(model, net, batches):
    """Three rounds of training steps; returns the losses and all deltas."""
    optimizer = torch.optim.Adam(deltas(model).values(), lr=1e-2, fused=True)
    losses = []
    for x, t, words in 3 * batches:
        loss = (net(x, t, words) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach().view(1))
    return torch.cat([*losses, *[delta.detach().flatten() for delta in deltas(model).values()]])


def test_a_cpu_has_no_graphs():
    model, _ = small_unet()
    assert DEVICE == "cuda" or graphed(model) is model


def test_a_model_that_is_told_its_buckets_does_the_same(monkeypatch):
    """What a graph records doesn't look at t to find the buckets."""
    model, batches = small_unet()
    for x, t, words in batches:
        batch = batch_of(t, model.quant_config["edges"])
        results = []
        names = list(deltas(model))
        for net in (model, with_known_buckets(model, batch, names)):
            model.zero_grad()
            with monkeypatch.context() as patch:
                if net is not model:
                    patch.setattr(quant, "batch_of", None)
                    v = net(batch.index, x, t, words, *deltas(model).values())
                else:
                    v = net(x, t, words)
            v.square().mean().backward()
            results.append([v, *[delta.grad for delta in deltas(model).values()]])
        assert quant.current.batch is None
        for plain, same in zip(*results):
            assert (plain is None and same is None) or torch.equal(plain, same)


@pytest.mark.parametrize("num_buckets", [1, 2])
def test_each_kind_of_call_is_recorded_once(num_buckets, monkeypatch):
    """What surrounds the recordings, which are replaced by plain calls: on the CPU as well."""

    def record(module, samples, **kwargs):
        assert all(sample.data_ptr() != x.data_ptr() for sample in samples for x in batches[0])
        return module

    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    model, batches = small_unet(num_buckets)
    copied = copy.deepcopy(model)
    net = Graphed(copied)
    assert torch.equal(train(copied, net, batches), train(model, model, batches))
    kinds = 1 if num_buckets == 1 else 3  # mixed, and either bucket alone
    assert len(net.recordings) == kinds
    with torch.no_grad():
        net(*batches[0])
        net(*batches[0])
    assert len(net.recordings) == kinds + 1
    copied.eval()
    for _ in range(2):
        net(*batches[0])
    assert len(net.recordings) == kinds + 2

    monkeypatch.setattr(graphs, "MOST_RECORDINGS", kinds + 2)
    for _ in range(3):
        net(batches[0][0][:1], batches[0][1][:1], batches[0][2][:1])
    assert len(net.recordings) == kinds + 2


@needs_gpu
@pytest.mark.parametrize("num_buckets", [1, 2])
@pytest.mark.parametrize("blocks", ["kept", "checkpointed"])
def test_graphed_training_is_plain_training(num_buckets, blocks):
    """The same losses and deltas to the last bit, if plain training repeats itself that well."""
    model, batches = small_unet(num_buckets)
    if blocks == "checkpointed":
        for stage in [module for module in model.modules() if isinstance(module, Stage)]:
            for i, block in enumerate(stage):
                stage[i] = Checkpointed(block)
    results = []
    for wrap in (lambda model: model, lambda model: model, graphed, graphed):
        copied = copy.deepcopy(model)
        results.append(train(copied, wrap(copied), batches))
    plain, plain_again, graph, graph_again = results
    torch.testing.assert_close(graph, plain, rtol=1e-3, atol=1e-4)
    if torch.equal(plain, plain_again):
        assert torch.equal(graph, graph_again)
        assert torch.equal(graph, plain)


@needs_gpu
def test_graphed_takes_float_models_autocast_and_sampling():
    torch.manual_seed(0)
    model = UNet(channels=(32, 32), attention=(1,), c_emb=16, c_words=16).to(DEVICE)
    nn.init.normal_(model.out.weight, std=0.1)
    _, batches = small_unet()
    net = graphed(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        for _ in range(3):
            for x, t, words in batches:
                model.zero_grad()
                net(x, t.cpu(), words).square().mean().backward()
                grad = model.stem.weight.grad.clone()
                model.zero_grad()
                model(x, t, words).square().mean().backward()
                torch.testing.assert_close(grad, model.stem.weight.grad, rtol=0.05, atol=1e-3)
    with torch.no_grad():
        for _ in range(3):
            for x, t, words in batches:
                torch.testing.assert_close(net(x, t, words), model(x, t, words))

"""The mathematics of neighbours.py, against independent references, and that each part runs."""

import copy
from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F
from conftest import spread
from torch.utils.flop_counter import FlopCounterMode

import claims
import neighbours
import recovery
import runs
from data import toy
from model import Diffusion, UNet
from quant import adapter, deltas, load_adapter, merge, quantize
from sample import ddim_step


@pytest.fixture
def model():
    """A small UNet whose output isn't zero."""
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    for name, parameter in model.named_parameters():
        if "conv2" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def batch(n=6):
    x = torch.randn(n, 3, 16, 16)
    return x, torch.linspace(0, 999, n).long(), torch.randint(22, (n, 7))


def test_a_shared_set_is_one_parameter_with_the_sum_of_the_gradients(model):
    apart = quantize(model, edges=neighbours.STAGES)
    shared = copy.deepcopy(apart)
    neighbours.share_encoder(shared)
    for net in (apart, shared):
        net(*batch_of_seed()).square().mean().backward()
    of_shared = deltas(shared)
    assert not any(name.startswith("down") and name.endswith("_1") for name in of_shared)
    assert any(name.startswith("up") and name.endswith("_2") for name in of_shared)
    for name, delta in of_shared.items():
        stem, b = name.rsplit("_", 1)
        grads = [deltas(apart)[name].grad]
        if not name.startswith(("up", "out")):
            grads = [deltas(apart)[f"{stem}_{k}"].grad for k in range(3)]
        torch.testing.assert_close(delta.grad, sum(grads), rtol=1e-4, atol=1e-7)

    # an adapter of it fits a model that shares the same
    spread(shared)
    other = copy.deepcopy(apart)
    neighbours.share_encoder(other)
    load_adapter(other, adapter(shared))
    load_adapter(shared, adapter(shared))
    assert torch.equal(other(*batch_of_seed()), shared(*batch_of_seed()))


def batch_of_seed():
    torch.manual_seed(3)
    return batch()


def test_a_gaussian_start_has_the_moments_that_it_claims():
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(5, 3, 16, 16, generator=generator)[:, :, :2, :2] * 2 + 1  # 12 pixels
    t = 400
    x = neighbours.gaussian_start(scenes, t, 200_000, generator).flatten(1).double()
    abar = Diffusion().alphas_cumprod[t]
    flat = scenes.flatten(1).double()
    covariance = flat.T.cov(correction=0) * abar + (1 - abar) * torch.eye(12)
    torch.testing.assert_close(x.mean(0), abar.sqrt() * flat.mean(0), rtol=0, atol=0.02)
    torch.testing.assert_close(x.T.cov(correction=0), covariance, rtol=0, atol=0.05)


def test_scenes_of_a_prompt_show_what_it_says():
    generator = torch.Generator().manual_seed(0)
    prompt = "red creature on blue checks"
    scenes = neighbours.scenes_of(prompt, 50, generator)
    words = torch.tensor([toy.caption(prompt)] * 50)
    assert neighbours.shares_right(scenes, words) == {"right": 1, "whole": 1}
    assert len(scenes.flatten(1).unique(dim=0)) > 30


def test_a_gate_of_zero_removes_the_channel_exactly(model):
    quantized = spread(quantize(model, 8))
    name = "down.0.0.conv2"
    gates = {}
    for key, layer in neighbours.gated(quantized).items():
        gates[key, "in"] = torch.ones(layer.shape[1])
        gates[key, "out"] = torch.ones(layer.shape[0])
    gates[name, "in"][[2, 5]] = 0
    gates[name, "out"][3] = 0
    layer = quantized.get_submodule(name)
    weight = layer.weight.detach()
    neighbours.close_gates(quantized, gates)

    # the reference: a smaller convolution without these channels; of an output, the bias stays
    inputs = [i for i in range(weight.shape[1]) if i not in (2, 5)]
    outputs = [o for o in range(weight.shape[0]) if o != 3]
    x = torch.randn(2, weight.shape[1], 8, 8)
    small = F.conv2d(x[:, inputs], weight[outputs][:, inputs], layer.bias[outputs], padding=1)
    y = layer(x)
    torch.testing.assert_close(y[:, outputs], small)
    assert torch.equal(y[:, 3], layer.bias[3].expand_as(y[:, 3]))
    other = x.clone()
    other[:, [2, 5]] += 1000
    assert torch.equal(layer(other), y)

    # what is left, by torch's own count
    with FlopCounterMode(display=False) as counter:
        merge(quantized)(*batch())
    flops = {key: counter.get_flop_counts()[f"UNet.{key}"] for key in neighbours.gated(quantized)}
    flops = {key: sum(of_layer.values()) for key, of_layer in flops.items()}
    taken = 1 - len(inputs) * len(outputs) / (weight.shape[0] * weight.shape[1])
    left = 1 - taken * flops[name] / sum(flops.values())
    assert neighbours.multiplications(quantized) == pytest.approx(left)

    # tuning doesn't bring them back
    with torch.no_grad():
        layer.d_in_0.fill_(5)
        layer.d_out_0.fill_(5)
    tuned = merge(quantized).get_submodule(name).weight
    assert not tuned[:, [2, 5]].any()
    assert not tuned[3].any()


def test_the_lowest_ranks_of_all_layers_are_taken_out():
    ranks = {"a": torch.tensor([3.0, 1.0, 9.0]), "b": torch.tensor([2.0, 8.0, 7.0, 6.0])}
    gates = neighbours.gates_of(ranks, 2 / 7)
    assert gates["a"].tolist() == [1, 0, 1]
    assert gates["b"].tolist() == [0, 1, 1, 1]
    ties = neighbours.gates_of({"a": torch.tensor([0.0, 0.0, 0.0, 1.0])}, 0.25)
    assert ties["a"].sum() == 3


def test_ranks_by_gradient_are_those_of_gates(model):
    quantized = quantize(model, 8)
    ranks = neighbours.by_gradient(quantized, seed=0, steps=1)

    # the reference: masks of one in the same float model, under autograd
    net = merge(quantized)
    masks = neighbours.with_masks(net)
    generator = torch.Generator().manual_seed(0)
    diffusion = Diffusion()
    x0, words = toy.sample_scenes(16, generator, rare=0)
    t = diffusion.draw_timesteps(16, generator)
    eps = torch.randn(x0.shape, generator=generator)
    v = net(diffusion.q_sample(x0, t, eps), t, words)
    diffusion.squared_error(v, x0, t, eps).mean().backward()
    assert ranks.keys() == masks.keys()
    for key, mask in masks.items():
        torch.testing.assert_close(ranks[key], mask.grad.abs(), rtol=1e-3, atol=1e-6)


def test_a_mask_is_what_a_gate_is(model):
    quantized = spread(quantize(model, 8))
    net = merge(quantized)
    masks = neighbours.with_masks(net)
    gates = neighbours.gates_of(neighbours.at_random(quantized, 0, 0), 0.2)
    for key, mask in masks.items():
        mask.data.copy_(gates[key])
    neighbours.close_gates(quantized, gates)
    torch.testing.assert_close(net(*batch_of_seed()), quantized(*batch_of_seed()))


def test_each_step_has_a_set_of_its_own():
    for k in (8, 4):
        way = neighbours.ways()[f"distilled, {k} steps, a set for each"]
        assert len(way.times) == k
        buckets = torch.bucketize(torch.tensor(way.times), torch.tensor(way.edges[1:]), right=True)
        assert buckets.tolist() == list(range(k))[::-1]
    assert neighbours.ways()["distilled, 8 steps"].edges is None


def test_the_v_of_a_leap_ends_where_it_should():
    diffusion = Diffusion()
    times = torch.tensor([999, 500, 100])
    part = torch.tensor([0, 1, 2])
    x, x_next = torch.randn(2, 3, 3, 16, 16)
    v = neighbours.leap(x, x_next, times, part)
    abar = [*diffusion.alphas_cumprod[times], torch.ones((), dtype=torch.float64)]
    for n in range(3):
        t = times[n : n + 1]
        x0 = diffusion.to_x0(v[n : n + 1], x[n : n + 1], t)
        a, s = diffusion.coefficients(t, x0)
        eps = (x[n : n + 1] - a * x0) / s
        found = ddim_step(x[n : n + 1], x0, eps, abar[n], abar[n + 1], None)
        torch.testing.assert_close(found[0].float(), x_next[n], rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("part", neighbours.PARTS)
def test_a_part_has_its_rows(part, small_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(neighbours, "BASE", runs.BASE)
    monkeypatch.setattr(runs.train, "IMAGES_PER_PROMPT", 1)
    for module in (recovery, claims, neighbours):
        monkeypatch.setattr(module, "STEPS", 40)
    for module in (recovery, runs, claims, neighbours):
        monkeypatch.setattr(module, "validation_loss", lambda model, **_: 0.0)
    monkeypatch.setattr(neighbours, "TAUS", (0.5, 1.0))
    monkeypatch.setattr(neighbours, "STEPS_OF_START", (2, 4))
    monkeypatch.setattr(neighbours, "SHARES", (0.2,))
    args = Namespace(
        log=tmp_path / "runs.jsonl",
        steps_divisor=40,
        rows=["*"],
        subjects=["bix"],
        seeds=1,
        write=False,
    )
    neighbours.PARTS[part](args)
    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.count("\n| ") >= 3  # headings, the rule, two rows

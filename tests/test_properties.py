"""Whatever the shapes, bits, buckets and weights: hypothesis looks for a counterexample."""
import copy

import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import CLOSE, Plain

from calibrate import CALIBRATIONS
from quant import adapter, deltas, load_adapter, merge, pack, quantize, unpack

settings.register_profile("repeatable", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("repeatable")
BITS, SIZES, SEEDS = st.integers(2, 8), st.integers(1, 7), st.integers(0, 2**32)


@st.composite
def layers(draw):
    """A Conv2d or Linear of any shape, its weights ordinary or of a kind that breaks careless quantizers; and an input."""
    torch.manual_seed(draw(SEEDS))
    n, groups, bias = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.booleans())
    if draw(st.booleans()):
        layer = nn.Linear(draw(SIZES), draw(SIZES), bias=bias)
        x = torch.randn(n, *draw(st.lists(SIZES, max_size=2)), layer.in_features)
    else:
        pair = lambda high: (draw(st.integers(1, high)), draw(st.integers(1, high)))
        kernel, stride, dilation, padding = pair(3), pair(3), pair(2), (draw(st.integers(0, 2)), draw(st.integers(0, 2)))
        channels = groups * draw(st.integers(1, 3)), groups * draw(st.integers(1, 3))
        layer = nn.Conv2d(*channels, kernel, stride, padding, dilation, groups, bias)
        x = torch.randn(n, channels[0], 5 + draw(st.integers(0, 3)), 5 + draw(st.integers(0, 3)))
    with torch.no_grad():
        row, column = draw(st.integers(0, len(layer.weight) - 1)), draw(st.integers(0, layer.weight.shape[1] - 1))
        kind = draw(st.sampled_from(["ordinary", "zero row", "constant row", "zero column", "outlier", "all zero", "tiny"]))
        if kind in ("zero row", "constant row"):
            layer.weight[row] = 0 if kind == "zero row" else 0.3
        elif kind == "zero column":
            layer.weight[:, column] = 0
        elif kind == "outlier":
            layer.weight[row, column] = 1e6
        elif kind != "ordinary":
            layer.weight *= 0 if kind == "all zero" else 1e-20
    return layer, x


class Model(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t=0):
        return self.layer(x)


@given(BITS, st.lists(SIZES, max_size=4), SEEDS)
def test_pack_is_undone_by_unpack(n_bits, shape, seed):
    codes = torch.randint(2**n_bits, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    packed = pack(codes, n_bits)
    assert len(packed) == -(-codes.numel() // 8) * n_bits and torch.equal(unpack(packed, n_bits, shape), codes)


@given(layers(), BITS)
def test_quantized_weights_are_near(made, n_bits):
    layer, errors = made[0], {}
    w = layer.weight.detach().flatten(1)
    for name in sorted(CALIBRATIONS):
        model = quantize(Model(copy.deepcopy(layer)), n_bits, calibration=name, keep8=())
        found = model.layer.dequantize().flatten(1)
        whole = CALIBRATIONS[name](layer.weight.detach().reshape(1, len(w), layer.weight.shape[1], -1), n_bits)
        assert all(a.isfinite().all() for a in (found, *whole)) and (whole[2] > 0).all()
        errors[name] = (found - w).square().sum(1)
        if name == "minmax":
            step = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)) / (2**n_bits - 1)
            assert ((found - w).abs() <= step[:, None] * 0.5001 + 1e-30).all()
    assert (errors["mse"] <= errors["minmax"] * 1.0001).all()


@given(layers(), BITS, st.integers(1, 5), st.sampled_from(["out", "out+in"]), st.sampled_from(sorted(CALIBRATIONS)), st.data())
def test_layer_and_gradients_equal_the_plain_ones(made, n_bits, num_buckets, scales, calibration, data):
    layer, x = made[0].double(), made[1].double().requires_grad_()
    t = torch.tensor(data.draw(st.lists(st.integers(0, 99), min_size=len(x), max_size=len(x))))
    model = quantize(Model(copy.deepcopy(layer)), n_bits, num_buckets, 100, scales, calibration, keep8=())
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.uniform_(-0.5, 0.5)
    plain, x2, b = Plain(model.layer, layer), x.detach().clone().requires_grad_(), [int(i) * num_buckets // 100 for i in t]
    y, y2 = model(x, t), torch.cat([plain(x2[i:i + 1], b[i]) for i in range(len(b))])
    size = y2.abs().max().item() + 1e-300  # outliers and tiny weights: compare at the weights' own size
    torch.testing.assert_close(y / size, y2 / size, **CLOSE)
    g = torch.randn_like(y)
    y.backward(g / size), y2.backward(g / size)
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-9 * x2.grad.abs().max().item())
    for i in range(num_buckets):
        for mine, reference in [(model.layer.d_out, plain.d_out)] + [(model.layer.d_in, plain.d_in)] * (scales == "out+in"):
            assert (mine[i].grad is None) == (reference[i].grad is None) == (i not in b)
            if i in b:
                torch.testing.assert_close(mine[i].grad, reference[i].grad, rtol=1e-9, atol=1e-9)


@given(layers(), BITS, st.integers(1, 3), st.sampled_from(sorted(CALIBRATIONS)))
def test_training_stays_finite_and_adapters_carry_it(made, n_bits, num_buckets, calibration):
    layer, x = made
    make = lambda: quantize(Model(copy.deepcopy(layer)), n_bits, num_buckets, 100, calibration=calibration, keep8=())
    model, other, t = make(), make(), torch.arange(len(x)) * 25
    optimizer = torch.optim.Adam(deltas(model).values(), lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t) - 1).square().mean().backward()
        optimizer.step()
    assert all(delta.isfinite().all() for delta in deltas(model).values())
    saved = adapter(model)
    load_adapter(model, saved), load_adapter(other, saved)
    assert torch.equal(model(x, t), other(x, t))
    for b in range(num_buckets):
        now = torch.full((len(x),), -(-100 * b // num_buckets))
        y = model(x, now)
        torch.testing.assert_close(merge(model, b)(x, None), y, rtol=1e-4, atol=1e-5 * y.abs().max().item())

"""What holds for all shapes, bits, buckets and weights: hypothesis looks for a counterexample."""

import copy

import torch
import torch.nn as nn
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant import CLOSE, OneLayer, Plain, deltas_beside_references

from calibrate import CALIBRATIONS
from quant import adapter, deltas, load_adapter, merge, pack, quantize, unpack

settings.register_profile("repeatable", max_examples=80, deadline=None, derandomize=True)
settings.load_profile("repeatable")

BITS = st.integers(2, 8)
SIZES = st.integers(1, 7)
SEEDS = st.integers(0, 2**32)
SCALES = st.sampled_from(["out", "out+in"])
COLUMNS = st.sampled_from(["channel", "position"])
NAMES = [*CALIBRATIONS, "gptq"]
CALIBRATION_NAMES = st.sampled_from(NAMES)
KINDS = st.sampled_from(
    [
        "ordinary",
        "zero row",
        "constant row",
        "zero column",
        "outlier",
        "all zero",
        "tiny",
    ]
)


@st.composite
def layers(draw):
    """A Conv2d or Linear of any shape, and an input for it.

    Its weights are ordinary, or of a kind that breaks careless quantizers.
    """
    torch.manual_seed(draw(SEEDS))
    n = draw(st.integers(1, 4))
    groups = draw(st.integers(1, 3))
    bias = draw(st.booleans())
    if draw(st.booleans()):
        layer = nn.Linear(draw(SIZES), draw(SIZES), bias=bias)
        positions = draw(st.lists(SIZES, max_size=2))
        x = torch.randn(n, *positions, layer.in_features)
    else:
        layer = nn.Conv2d(
            in_channels=groups * draw(st.integers(1, 3)),
            out_channels=groups * draw(st.integers(1, 3)),
            kernel_size=draw(pairs(1, 3)),
            stride=draw(pairs(1, 3)),
            padding=draw(pairs(0, 2)),
            dilation=draw(pairs(1, 2)),
            groups=groups,
            bias=bias,
        )
        height, width = draw(pairs(5, 8))
        x = torch.randn(n, layer.in_channels, height, width)

    row = draw(st.integers(0, layer.weight.shape[0] - 1))
    column = draw(st.integers(0, layer.weight.shape[1] - 1))
    spoil(layer.weight.detach(), draw(KINDS), row, column)
    return layer, x


def pairs(low, high):
    """Two whole numbers from low to high."""
    return st.tuples(st.integers(low, high), st.integers(low, high))


def spoil(weight, kind, row, column):
    """Make a weight one of its kind, in place."""
    if kind == "zero row":
        weight[row] = 0
    elif kind == "constant row":
        weight[row] = 0.3
    elif kind == "zero column":
        weight[:, column] = 0
    elif kind == "outlier":
        weight[row, column] = 1e6
    elif kind == "all zero":
        weight *= 0
    elif kind == "tiny":
        weight *= 1e-20


@given(BITS, st.lists(st.integers(0, 7), max_size=4), SEEDS)
def test_unpack_undoes_pack(n_bits, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**n_bits, shape, dtype=torch.uint8, generator=generator)
    packed = pack(codes, n_bits)
    eighths = -(-codes.numel() // 8)  # rounded up
    assert packed.dtype == torch.uint8
    assert packed.shape == (eighths * n_bits,)
    assert torch.equal(unpack(packed, n_bits, shape), codes)


@given(layers(), BITS)
def test_minmax_is_within_half_a_step_mse_no_worse_and_rowcol_no_worse_than_zeros(made, n_bits):
    layer, x = made
    weight = layer.weight.detach()
    w = weight.flatten(1)
    errors = {}
    for name in NAMES:
        model = OneLayer(copy.deepcopy(layer))
        quantize(model, n_bits, calibration=name, keep8=(), data=[(x,)])
        found = model.layer.dequantize().flatten(1)
        assert found.isfinite().all()
        errors[name] = (found - w).square().sum(1)

        assert (model.layer.s_out > 0).all()
        assert (model.layer.s_in > 0).all()

        if name == "minmax":
            step = (w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)) / (2**n_bits - 1)
            assert ((found - w).abs() <= step[:, None] * 0.5001 + 1e-30).all()
    assert (errors["mse"] <= errors["minmax"] * 1.0001).all()
    assert errors["rowcol"].sum() <= w.square().sum() * 1.0001  # its scales are least squares


@given(layers(), BITS, st.integers(1, 5), SCALES, COLUMNS, CALIBRATION_NAMES, st.data())
def test_outputs_and_gradients_of_any_layer_equal_dequantization_under_autograd(
    made, n_bits, num_buckets, scales, columns, calibration, data
):
    layer, x = made
    layer = layer.double()
    x = x.double().requires_grad_()
    x2 = x.detach().clone().requires_grad_()
    timesteps = st.lists(st.integers(0, 99), min_size=len(x), max_size=len(x))
    t = data.draw(timesteps)
    b = [time * num_buckets // 100 for time in t]

    model = OneLayer(copy.deepcopy(layer))
    batches = [(x.detach(),)]
    quantize(model, n_bits, num_buckets, 100, scales, columns, calibration, keep8=(), data=batches)
    trains_bias = layer.bias is not None and data.draw(st.booleans())
    if trains_bias:
        model.layer.bias.requires_grad_(True)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.uniform_(-0.5, 0.5)
    plain = Plain(model.layer, layer)

    y = model(x, torch.tensor(t))
    y2 = plain.sample_by_sample(x2, b)
    size = y2.abs().max().item() + 1e-300  # outliers, tiny weights: compare at their own size
    torch.testing.assert_close(y / size, y2 / size, **CLOSE)

    g = torch.randn_like(y)
    y.backward(g / size)
    y2.backward(g / size)
    size = x2.grad.abs().max().item()
    torch.testing.assert_close(x.grad, x2.grad, rtol=1e-9, atol=1e-9 * size)
    if trains_bias:
        torch.testing.assert_close(model.layer.bias.grad, layer.bias.grad, **CLOSE)
    for i, of_bucket in enumerate(deltas_beside_references(model, plain)):
        for mine, reference in of_bucket:
            assert (mine.grad is None) == (i not in b)
            assert (reference.grad is None) == (i not in b)
            if i in b:
                torch.testing.assert_close(mine.grad, reference.grad, rtol=1e-9, atol=1e-9)


@given(layers(), BITS, st.integers(1, 3), COLUMNS, CALIBRATION_NAMES)
def test_training_stays_finite_and_adapters_and_merged_models_carry_it(
    made, n_bits, num_buckets, columns, calibration
):
    layer, x = made

    def make():
        model = OneLayer(copy.deepcopy(layer))
        return quantize(
            model,
            n_bits,
            num_buckets,
            100,
            columns=columns,
            calibration=calibration,
            keep8=(),
            data=[(x,)],
        )

    model = make()
    t = torch.arange(len(x)) * 25
    optimizer = torch.optim.Adam(deltas(model).values(), lr=0.03)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x, t) - 1).square().mean().backward()
        optimizer.step()
    for delta in deltas(model).values():
        assert delta.isfinite().all()

    other = make()
    saved = adapter(model)
    load_adapter(model, saved)
    load_adapter(other, saved)
    assert torch.equal(model(x, t), other(x, t))

    for b in range(num_buckets):
        first_timestep = -(-100 * b // num_buckets)  # rounded up
        y = model(x, torch.full((len(x),), first_timestep))
        y2 = merge(model, b)(x, None)
        torch.testing.assert_close(y2, y, rtol=1e-4, atol=1e-5 * y.abs().max().item())

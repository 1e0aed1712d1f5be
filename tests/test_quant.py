"""The quantizer's parts: buckets, packed bits, calibration and the layer.

The layer's outputs and gradients are compared with explicit dequantization under autograd, in
float64.
"""

import copy
import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from calibrate import CALIBRATIONS, balance_columns, least_squares_scale, minmax, mse, rowcol
from quant import bucket, deltas, equal_edges, pack, quantize, unpack

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# --------------------------------------------------------------------------------------------------
# Bits
# --------------------------------------------------------------------------------------------------


SHAPES = [
    (1,),
    (7,),
    (8,),
    (9,),
    (3, 5),
    (4, 3, 3, 3),
    (2, 16, 9),
    (1, 1, 1, 1),
    (5, 0),
]


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("shape", SHAPES)
def test_packed_codes_come_back_and_take_n_bits_each(n_bits, shape):
    codes = torch.randint(2**n_bits, shape, dtype=torch.uint8)
    packed = pack(codes, n_bits)
    eighths = math.ceil(codes.numel() / 8)
    assert packed.dtype == torch.uint8
    assert packed.shape == (eighths * n_bits,)
    assert torch.equal(unpack(packed, n_bits, shape), codes)


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_the_smallest_and_the_largest_code_come_back(n_bits):
    for value in (0, 2**n_bits - 1):
        codes = torch.full((13,), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, n_bits), n_bits, (13,)), codes)


def test_codes_of_3_bits_lie_where_quant_says():
    """Saved models and gpu_kernels.py depend on it."""
    low = [0b10_00_10_00, 0b11_01_11_01]  # codes 6 4 2 0, and 7 5 3 1
    high = [0b1111_0000]  # codes 7 to 0
    assert pack(torch.arange(8, dtype=torch.uint8), 3).tolist() == low + high


# --------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, n", [(1000, 1), (1000, 2), (1000, 3), (1000, 4), (7, 3), (5, 5)])
def test_with_equal_edges_the_bucket_is_floor_of_t_n_over_T(T, n):
    expected = torch.tensor([math.floor(t * n / T) for t in range(T)])
    assert torch.equal(bucket(torch.arange(T), equal_edges(n, T)), expected)


def test_an_edge_starts_its_bucket_and_T_belongs_to_the_last():
    edges = equal_edges(4, 1000)
    assert bucket(torch.tensor([0, 249, 250, 499, 500, 999]), edges).tolist() == [0, 0, 1, 1, 2, 3]
    assert bucket(torch.tensor([249.9, 250.0]), edges).tolist() == [0, 1]
    assert bucket(torch.tensor([999.9, 1000.0]), edges).tolist() == [3, 3]


def test_timesteps_out_of_range_or_nan_are_refused():
    edges = equal_edges(4, 1000)
    for wrong in (-1, 1001):
        with pytest.raises(ValueError, match="0 .. 1000"):
            bucket(torch.tensor([3, wrong]), edges)
    with pytest.raises(ValueError, match="nan"):
        bucket(torch.tensor([3, math.nan]), edges)


def test_buckets_of_unequal_width_and_of_times_from_0_to_1():
    t = torch.tensor([0, 9, 10, 699, 700, 1000])
    assert bucket(t, [0, 10, 700, 1000]).tolist() == [0, 0, 1, 1, 2, 2]
    t = torch.tensor([0.0, 0.24, 0.25, 1.0])
    assert bucket(t, equal_edges(4, 1)).tolist() == [0, 0, 1, 3]


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bucket_is_exact_for_timesteps_of_any_dtype(dtype):
    t = torch.tensor([0, 31, 32, 100, 127]).to(dtype)
    expected = [math.floor(value * 50 / 1000) for value in t.tolist()]
    assert bucket(t, equal_edges(50, 1000)).tolist() == expected


# --------------------------------------------------------------------------------------------------
# Calibration
# --------------------------------------------------------------------------------------------------


def squared_error(grid, w):
    """The squared error (G, O, I, K) of the weight that a grid stands for."""
    weight = (grid.codes - grid.zero_point) * grid.s_out * grid.s_in
    return (weight - w).square()


@pytest.mark.parametrize("calibrate", [minmax, mse, rowcol])
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_codes_and_zero_points_are_whole_and_in_range(calibrate, n_bits, shift):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64) + shift
    grid = calibrate(w, n_bits)
    for whole in (grid.codes, grid.zero_point):
        assert whole.min() >= 0
        assert whole.max() <= 2**n_bits - 1
        assert torch.equal(whole, whole.round())
    assert (grid.s_out > 0).all()
    assert (grid.s_in > 0).all()


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_minmax_is_within_half_a_step_of_each_weight(n_bits, shift):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64) + shift
    grid = minmax(w, n_bits)
    error = squared_error(grid, w).sqrt()
    assert (error <= grid.s_out / 2 + 1e-12).all()


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_mse_finds_the_best_of_all_shrunk_ranges_of_each_row(n_bits):
    w = torch.randn(2, 3, 5, 7, dtype=torch.float64) ** 3 + 1
    grid = mse(w, n_bits)
    for g in range(2):
        for o in range(3):
            s, z = best_shrunk_range(w[g, o].flatten().numpy(), n_bits)
            assert grid.s_out[g, o].item() == pytest.approx(s, rel=1e-9)
            assert grid.zero_point[g, o].item() == z


def best_shrunk_range(values, n_bits):
    """The step and the zero point with the least squared error, by trying all in numpy."""
    errors = {}
    for percent in range(80):
        share = 1 - percent / 100
        low = min(values.min(), 0) * share
        high = max(values.max(), 0) * share
        s = (high - low) / (2**n_bits - 1)
        z = np.round(-low / s)
        rounded = (np.clip(np.round(values / s) + z, 0, 2**n_bits - 1) - z) * s
        errors[s, z] = ((rounded - values) ** 2).sum()
    return min(errors, key=errors.get)


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_if_columns_differ_and_a_weight_is_large_rowcol_beats_mse_and_mse_minmax(n_bits):
    w = torch.randn(1, 32, 24, 9)
    w *= torch.rand(1, 1, 24, 1).exp()  # columns differ
    w[0, 0, 0, 0] = 9.0  # an outlier
    errors = []
    for calibrate in (minmax, mse, rowcol):
        errors.append(squared_error(calibrate(w, n_bits), w).mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_balancing_finds_the_scales_that_columns_were_multiplied_by():
    r = torch.empty(2, 9, 1, 1, dtype=torch.float64).uniform_(-1, 1).exp()
    c = torch.empty(2, 1, 7, 1, dtype=torch.float64).uniform_(-1, 1).exp()
    even = torch.tensor([1.0, -1.0], dtype=torch.float64)  # at the two positions of the kernel
    ratio = balance_columns(r * c * even) / c
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio))  # one number for a group


@pytest.mark.parametrize("dims", [(2, 3), (1, 3)])
def test_a_fitted_scale_is_that_of_least_squares(dims):
    w = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    a = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    a[0, 1] = 0
    a[0, :, 2] = 0
    kept = 3 - dims[0]  # the dimension of the scales: rows, or columns
    old = torch.full_like(a.sum(dims, keepdim=True), 7)
    found = least_squares_scale(w, a, old, dims)
    assert found.shape == old.shape
    for g in range(2):
        for k in range(w.shape[kept]):
            left = a[g].select(kept - 1, k).reshape(-1, 1)
            right = w[g].select(kept - 1, k).reshape(-1, 1)
            expected = torch.linalg.lstsq(left, right).solution if left.any() else 7
            assert found[g].select(kept - 1, k).item() == pytest.approx(float(expected))


@pytest.mark.parametrize("n_bits", [2, 4])
def test_no_round_of_rowcol_makes_it_worse(n_bits):
    w = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    w *= torch.rand(2, 1, 6, 1, dtype=torch.float64).exp()
    errors = [squared_error(rowcol(w, n_bits, rounds), w).sum().item() for rounds in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1]


@pytest.mark.parametrize("n_bits", [2, 4])
@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("size", [0.05, 0.5, 5])
def test_a_column_of_nearly_equal_weights_does_not_ruin_the_others(size, spread, n_bits):
    w = torch.randn(1, 64, 64, 1)
    w[:, :, 0] = size * (1 + spread * torch.randn(64, 1))
    error = squared_error(rowcol(w, n_bits), w).mean()
    assert error < 1.1 * squared_error(minmax(w, n_bits), w).mean()


def test_weights_near_the_smallest_number_have_a_grid():
    grid = minmax(torch.tensor([[[[0.0], [1e-44]]]]), 8)
    assert (grid.s_out > 0).all()
    assert grid.codes.isfinite().all()


def test_a_row_of_zeros_leaves_the_other_rows_balanced():
    w = torch.randn(1, 33, 24, 9)
    w *= (2 * torch.rand(1, 1, 24, 1)).exp()
    without = squared_error(rowcol(w, 4), w)[:, 1:].mean()
    w[0, 0] = 0
    with_zeros = squared_error(rowcol(w, 4), w)[:, 1:].mean()
    assert with_zeros < 1.05 * without


@pytest.mark.parametrize("calibration", sorted(CALIBRATIONS))
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_rows_of_zeros_constant_rows_and_outliers_stay_finite(calibration, n_bits):
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1] = 0.7
        layer.weight[2] = -0.7
        layer.weight[:, 3] = 0
        layer.weight[3, 1] = 1e4
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, n_bits, calibration=calibration, data=[(torch.randn(50, 6),)])
    w = model[0].dequantize()
    assert w.isfinite().all()
    assert (w[0] == 0).all()
    if calibration == "minmax":
        torch.testing.assert_close(w[:3], layer.weight[:3], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------------------------------
# The layer
# --------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    """A model of one layer, whose call takes timesteps."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t=0):
        return self.layer(x)


class Plain(nn.Module):
    """The reference: explicit dequantization of one layer under autograd, and no clever step.

    layer: the quantized layer, whose integers, base scales and deltas are copied. source: the float
    layer that it was made from. The deltas and, if source has one, the bias get gradients.
    """

    def __init__(self, layer, source):
        super().__init__()
        self.layer = layer
        self.source = source
        o, i, *kernel = layer.shape
        q = unpack(layer.codes, layer.n_bits, (o, *kernel, i)).movedim(-1, 1).double()
        zero_point = layer.zero_point.view(-1, 1, *[1 for _ in kernel])
        self.q = q - zero_point  # (O, I, *kernel)
        self.d_out = self.copies("d_out")
        self.d_in = self.copies("d_in") if layer.delta("d_in", 0) is not None else None

        # columns[o, i]: the input channel that W[o, i] is multiplied by
        group = torch.arange(o) // (o // layer.groups)  # (O,)
        self.columns = group[:, None] * i + torch.arange(i)  # (O, I)

    def copies(self, kind):
        """The deltas of the layer, for each bucket, with gradients of their own."""
        found = [self.layer.delta(kind, b) for b in range(self.layer.num_buckets)]
        return [delta.detach().clone().requires_grad_() for delta in found]

    def weight(self, b=None):
        """The weight (O, I, *kernel) of bucket b; of the base if b is None."""
        s_out = self.layer.s_out
        s_in = self.layer.s_in
        if b is not None:
            s_out = s_out * self.d_out[b].exp()
        if b is not None and self.d_in is not None:
            s_in = s_in * self.d_in[b].exp()
        ones = [1 for _ in self.layer.shape[2:]]
        rows = s_out.view(-1, 1, *ones)  # (O, 1, ...)
        columns = s_in[self.columns].view(*self.columns.shape, *ones)  # (O, I, ...)
        return rows * self.q * columns

    def forward(self, x, b):
        s = self.source
        if isinstance(s, nn.Linear):
            return F.linear(x, self.weight(b), s.bias)
        return F.conv2d(x, self.weight(b), s.bias, s.stride, s.padding, s.dilation, s.groups)

    def sample_by_sample(self, x, buckets):
        """The outputs for a batch x whose samples are in these buckets."""
        return torch.cat([self(x[i : i + 1], b) for i, b in enumerate(buckets)])


DILATED = {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)}
LAYERS = {  # how to make each, and the shape of its input
    "1x1": (partial(nn.Conv2d, 5, 7, 1), (4, 5, 6, 5)),
    "3x3": (partial(nn.Conv2d, 6, 4, 3, padding=1), (4, 6, 6, 5)),
    "stride": (partial(nn.Conv2d, 3, 5, 3, stride=2, padding=1, bias=False), (4, 3, 7, 8)),
    "dilation": (partial(nn.Conv2d, 3, 4, (3, 2), **DILATED), (4, 3, 7, 6)),
    "groups": (partial(nn.Conv2d, 6, 9, 3, padding=1, groups=3), (4, 6, 5, 5)),
    "depthwise": (partial(nn.Conv2d, 5, 5, 3, padding=1, groups=5, bias=False), (4, 5, 5, 5)),
    "same": (partial(nn.Conv2d, 3, 3, 3, padding="same", dilation=2), (4, 3, 6, 6)),
    "valid": (partial(nn.Conv2d, 3, 3, 2, padding="valid"), (4, 3, 6, 6)),
    "linear": (partial(nn.Linear, 7, 5), (4, 7)),
    "tokens": (partial(nn.Linear, 6, 3), (4, 9, 6)),
    "tokens4": (partial(nn.Linear, 6, 11, bias=False), (4, 2, 3, 6)),
    "one": (partial(nn.Linear, 1, 1), (4, 1)),
}
WITH_BIAS = [name for name, (make, _) in LAYERS.items() if make().bias is not None]


def tuned(make, n_bits, num_buckets, scales="out+in"):
    """A quantized layer in a model, its deltas no longer zero, and the plain reference of it."""
    torch.manual_seed(0)
    model = OneLayer(make().double())
    source = copy.deepcopy(model.layer)
    quantize(model, n_bits, num_buckets, scales=scales, keep8=())
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.uniform_(-0.5, 0.5)
    return model, Plain(model.layer, source)


def deltas_beside_references(model, plain):
    """For each bucket, its deltas in the layer, each with that of the reference."""
    pairs = []
    for b in range(model.layer.num_buckets):
        of_bucket = [(model.layer.delta("d_out", b), plain.d_out[b])]
        if plain.d_in is not None:
            of_bucket.append((model.layer.delta("d_in", b), plain.d_in[b]))
        pairs.append(of_bucket)
    return pairs


TIMESTEPS = {
    "one": [10, 20, 30, 40],
    "mixed": [999, 0, 600, 10],
    "high": [600, 600, 999, 600],
}
SCALE_SETS = [
    (1, "out+in"),
    (2, "out+in"),
    (4, "out+in"),
    (1, "out"),
    (3, "out"),
]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS.keys())
@pytest.mark.parametrize("num_buckets, scales", SCALE_SETS)
def test_outputs_and_gradients_equal_dequantization_under_autograd(
    name, n_bits, t, num_buckets, scales
):
    make, shape = LAYERS[name]
    model, plain = tuned(make, n_bits, num_buckets, scales)
    b = [time * num_buckets // 1000 for time in t]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()

    y = model(x, torch.tensor(t))
    y2 = plain.sample_by_sample(x2, b)
    torch.testing.assert_close(y, y2, **CLOSE)

    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, **CLOSE)
    for i, of_bucket in enumerate(deltas_beside_references(model, plain)):
        for mine, reference in of_bucket:
            if i in b:
                torch.testing.assert_close(mine.grad, reference.grad, **CLOSE)
            else:
                assert mine.grad is None
                assert reference.grad is None


@pytest.mark.parametrize("name", WITH_BIAS)
@pytest.mark.parametrize("t", TIMESTEPS.values(), ids=TIMESTEPS.keys())
def test_a_bias_made_trainable_gets_the_gradient_of_the_reference(name, t):
    make, shape = LAYERS[name]
    model, plain = tuned(make, 4, 2)
    model.layer.bias.requires_grad_(True)
    b = [time * 2 // 1000 for time in t]
    x = torch.randn(shape, dtype=torch.float64)

    y = model(x, torch.tensor(t))
    y2 = plain.sample_by_sample(x, b)
    g = torch.randn_like(y)
    y.backward(g)
    y2.backward(g)
    torch.testing.assert_close(model.layer.bias.grad, plain.source.bias.grad, **CLOSE)
    for i in set(b):
        # y - bias is what a delta's gradient needs: it must not change with who trains the bias
        grad = model.layer.delta("d_out", i).grad
        torch.testing.assert_close(grad, plain.d_out[i].grad, **CLOSE)


@pytest.mark.parametrize("name", ["3x3", "groups", "linear"])
def test_a_single_input_that_needs_no_gradient(name):
    make, shape = LAYERS[name]
    model, plain = tuned(make, 4, 1)
    x = torch.randn(shape[1:], dtype=torch.float64)
    y = model(x)
    y2 = plain(x, 0)
    torch.testing.assert_close(y, y2, **CLOSE)
    y.square().sum().backward()
    y2.square().sum().backward()
    for mine, reference in deltas_beside_references(model, plain)[0]:
        torch.testing.assert_close(mine.grad, reference.grad, **CLOSE)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_the_weight_of_the_base_is_the_grid_that_rowcol_finds(name, n_bits):
    make, _ = LAYERS[name]
    source = make().double()
    model = quantize(OneLayer(copy.deepcopy(source)), n_bits, keep8=())
    w = source.weight.detach()
    g = getattr(source, "groups", 1)
    grid = rowcol(w.reshape(g, len(w) // g, w.shape[1], -1), n_bits)
    expected = (grid.codes - grid.zero_point) * grid.s_out * grid.s_in
    torch.testing.assert_close(model.layer.dequantize(), expected.view_as(w), **CLOSE)


@pytest.mark.parametrize("scales", ["out", "out+in"])
@pytest.mark.parametrize("t", [[10, 20, 30], [10, 900, 30]], ids=["one", "mixed"])
def test_no_float_weight_is_kept_for_backward_nor_x_without_column_scales(t, scales, monkeypatch):
    model, _ = tuned(partial(nn.Linear, 64, 48), 4, 2, scales)
    dequantize = model.layer.dequantize
    weights = []  # weak references

    def noted(*args, **kwargs):
        w = dequantize(*args, **kwargs)
        weights.append(weakref.ref(w))
        return w

    def note_size(tensor):
        kept.append(tensor.numel())
        return tensor

    monkeypatch.setattr(model.layer, "dequantize", noted)
    kept = []
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        y = model(x, torch.tensor(t))
    assert [w() for w in weights] == [None]
    assert y.numel() in kept
    assert (x.numel() in kept) == (scales == "out+in")
    assert max(kept) <= x.numel()
    y.sum().backward()
    assert [w() for w in weights] == [None, None]  # backward has built it again


SETTINGS = {
    nn.Linear: ["in_features", "out_features"],
    nn.Conv2d: [
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    ],
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_quantized_layer_has_the_settings_of_the_one_it_replaced(name):
    make, _ = LAYERS[name]
    model, plain = tuned(make, 3, 2)
    layer = model.layer
    source = plain.source
    for setting in SETTINGS[type(source)]:
        assert getattr(layer, setting) == getattr(source, setting), setting
    assert layer.weight.shape == source.weight.shape
    assert layer.weight.dtype == source.weight.dtype
    torch.testing.assert_close(layer.weight, plain.weight(), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_cast_to_half_precision_has_weights_of_that_dtype_and_the_same_scales(dtype):
    model = quantize(OneLayer(nn.Linear(3, 2)), 4, 2)
    before = model.layer.dequantize()
    model.to(dtype)
    assert model.layer.weight.dtype == dtype
    assert torch.equal(model.layer.dequantize(dtype=torch.float32), before)


def test_repr_shows_shape_bits_and_buckets():
    conv, _ = tuned(LAYERS["3x3"][0], 3, 2)
    linear, _ = tuned(LAYERS["tokens4"][0], 8, 1)
    assert "QuantConv2d(4x6x3x3, n_bits=3, num_buckets=2, bias=True)" in repr(conv)
    assert "QuantLinear(11x6, n_bits=8, num_buckets=1, bias=False)" in repr(linear)

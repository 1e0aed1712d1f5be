"""The quantizer against independent references: explicit dequantization under autograd, in float64."""
import copy
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from calibrate import CALIBRATIONS, minmax, rowcol
from quant import bucket, deltas, equal_edges, pack, quantize, unpack

CLOSE = dict(rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_bits", range(2, 9))
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (9,), (3, 5), (4, 3, 3, 3), (2, 16, 9), (1, 1, 1, 1), (5, 0)])
def test_pack_is_exact_and_small(n_bits, shape):
    codes = torch.randint(2**n_bits, shape, dtype=torch.uint8)
    packed = pack(codes, n_bits)
    assert packed.dtype == torch.uint8 and packed.shape == (math.ceil(codes.numel() / 8) * n_bits,)
    assert torch.equal(unpack(packed, n_bits, shape), codes)


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_pack_keeps_the_extremes(n_bits):
    for value in (0, 2**n_bits - 1):
        codes = torch.full((13,), value, dtype=torch.uint8)
        assert torch.equal(unpack(pack(codes, n_bits), n_bits, (13,)), codes)


@pytest.mark.parametrize("T, n", [(1000, 1), (1000, 2), (1000, 3), (1000, 4), (7, 3), (5, 5)])
def test_bucket_is_floor_of_t_n_over_T(T, n):
    expected = torch.tensor([math.floor(t * n / T) for t in range(T)])
    assert torch.equal(bucket(torch.arange(T), equal_edges(n, T)), expected)
    assert expected.min() == 0 and expected.max() == n - 1


def test_bucket_edges():
    edges = equal_edges(4, 1000)
    assert bucket(torch.tensor([0, 249, 250, 499, 500, 999]), edges).tolist() == [0, 0, 1, 1, 2, 3]
    assert bucket(torch.tensor([249.9, 250.0]), edges).tolist() == [0, 1]
    assert bucket(torch.tensor([999.9, 1000.0]), edges).tolist() == [3, 3]
    for wrong in (-1, 1001):
        with pytest.raises(ValueError, match="0 .. 1000"):
            bucket(torch.tensor([3, wrong]), edges)
    with pytest.raises(ValueError, match="nan"):
        bucket(torch.tensor([3, math.nan]), edges)


def test_bucket_takes_any_edges_and_any_time():
    t = torch.tensor([0, 9, 10, 699, 700, 1000])
    assert bucket(t, [0, 10, 700, 1000]).tolist() == [0, 0, 1, 1, 2, 2]
    assert bucket(torch.tensor([0.0, 0.24, 0.25, 1.0]), equal_edges(4, 1)).tolist() == [0, 0, 1, 3]


DTYPES = [torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bucket_is_exact_whatever_the_dtype(dtype):
    t = torch.tensor([0, 31, 32, 100, 127]).to(dtype)
    expected = [math.floor(value * 50 / 1000) for value in t.tolist()]
    assert bucket(t, equal_edges(50, 1000)).tolist() == expected


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_minmax_is_within_half_a_step(n_bits, shift):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64) + shift
    codes, zero, s_out, s_in = minmax(w, n_bits)
    assert codes.min() >= 0 and codes.max() <= 2**n_bits - 1 and torch.equal(codes, codes.round())
    assert zero.min() >= 0 and zero.max() <= 2**n_bits - 1 and torch.equal(zero, zero.round())
    assert ((codes - zero) * s_out * s_in - w).abs().le(s_out / 2 + 1e-12).all()


@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
def test_calibrations_lower_the_error_in_turn(n_bits):
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(1, 32, 24, 9, generator=generator) * torch.rand(1, 1, 24, 1, generator=generator).exp()
    w[0, 0, 0, 0] = 9.0
    errors = []
    for name in ("minmax", "mse", "rowcol"):
        codes, zero, s_out, s_in = CALIBRATIONS[name](w, n_bits)
        errors.append(((codes - zero) * s_out * s_in - w).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_a_row_of_zeros_leaves_the_others_balanced():
    generator, errors = torch.Generator().manual_seed(0), []
    w = torch.randn(1, 33, 24, 9, generator=generator) * (2 * torch.rand(1, 1, 24, 1, generator=generator)).exp()
    for _ in "ab":
        codes, zero, s_out, s_in = rowcol(w, 4)
        errors.append(((codes - zero) * s_out * s_in - w).square()[:, 1:].mean().item())
        w[0, 0] = 0
    assert errors[1] < 1.05 * errors[0]


@pytest.mark.parametrize("calibration", sorted(CALIBRATIONS))
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_rows_of_zeros_and_constants_and_outliers(calibration, n_bits):
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0], layer.weight[1], layer.weight[2], layer.weight[:, 3], layer.weight[3, 1] = 0, 0.7, -0.7, 0, 1e4
    model = quantize(nn.Sequential(copy.deepcopy(layer)), n_bits, calibration=calibration)
    w = model[0].dequantize()
    assert w.isfinite().all() and (w[0] == 0).all()
    if calibration == "minmax":
        torch.testing.assert_close(w[:3], layer.weight[:3], rtol=1e-5, atol=1e-6)


class Plain(nn.Module):
    """The reference: explicit dequantization of one layer, with raw scales, under autograd."""

    def __init__(self, layer, source):
        super().__init__()
        self.layer, self.source, g = layer, source, layer.groups
        o, i, *kernel = layer.shape
        self.q = unpack(layer.codes, layer.n_bits, (o, *kernel, i)).movedim(-1, 1).double()
        self.q -= layer.zero_point.view(-1, *[1] * (1 + len(kernel)))
        params = lambda ds: [torch.zeros_like(d).copy_(d.detach()).requires_grad_() for d in ds]
        self.d_out, self.d_in = params(layer.d_out), params(layer.d_in if layer.d_in is not None else [])
        self.rows = torch.arange(o) // (o // g)  # the group of each output channel
        self.i, self.kernel = i, kernel

    def weight(self, b):
        s_out = self.layer.s_out * self.d_out[b].exp()
        s_in = self.layer.s_in * self.d_in[b].exp() if self.d_in else self.layer.s_in
        columns = self.rows[:, None] * self.i + torch.arange(self.i)  # (O, I): the input channel of each weight
        one = [1] * len(self.kernel)
        return s_out.view(-1, 1, *one) * self.q * s_in[columns].view(*columns.shape, *one)

    def forward(self, x, b):
        if isinstance(self.source, nn.Linear):
            return F.linear(x, self.weight(b), self.source.bias)
        s = self.source
        return F.conv2d(x, self.weight(b), s.bias, s.stride, s.padding, s.dilation, s.groups)


LAYERS = {
    "1x1": (lambda: nn.Conv2d(5, 7, 1), (4, 5, 6, 5)),
    "3x3": (lambda: nn.Conv2d(6, 4, 3, padding=1), (4, 6, 6, 5)),
    "stride": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1, bias=False), (4, 3, 7, 8)),
    "dilation": (lambda: nn.Conv2d(3, 4, (3, 2), stride=(1, 2), padding=(2, 1), dilation=(2, 1)), (4, 3, 7, 6)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (4, 6, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(5, 5, 3, padding=1, groups=5, bias=False), (4, 5, 5, 5)),
    "same": (lambda: nn.Conv2d(3, 3, 3, padding="same", dilation=2), (4, 3, 6, 6)),
    "valid": (lambda: nn.Conv2d(3, 3, 2, padding="valid"), (4, 3, 6, 6)),
    "linear": (lambda: nn.Linear(7, 5), (4, 7)),
    "tokens": (lambda: nn.Linear(6, 3), (4, 9, 6)),
    "tokens4": (lambda: nn.Linear(6, 11, bias=False), (4, 2, 3, 6)),
    "one": (lambda: nn.Linear(1, 1), (4, 1)),
}


def tuned(make, n_bits, num_buckets, scales="out+in"):
    """A quantized layer in a model that takes (x, t), its deltas no longer zero, beside the plain reference."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = make().double()

        def forward(self, x, t=0):
            return self.layer(x)

    model = Model()
    source = copy.deepcopy(model.layer)
    quantize(model, n_bits, num_buckets, scales=scales, keep8=())
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.uniform_(-0.5, 0.5)
    return model, Plain(model.layer, source)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_bits", [2, 3, 4, 8])
@pytest.mark.parametrize("t", [[10, 20, 30, 40], [999, 0, 600, 10], [600, 600, 999, 600]], ids=["one", "mixed", "high"])
@pytest.mark.parametrize("num_buckets, scales", [(1, "out+in"), (2, "out+in"), (4, "out+in"), (1, "out"), (3, "out")])
def test_layer_matches_dequantization_under_autograd(name, n_bits, t, num_buckets, scales):
    make, shape = LAYERS[name]
    model, plain = tuned(make, n_bits, num_buckets, scales)
    t = torch.tensor(t)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    x2 = x.detach().clone().requires_grad_()
    y = model(x, t)
    b = bucket(t, equal_edges(num_buckets, 1000)).tolist()
    y2 = torch.cat([plain(x2[i:i + 1], b[i]) for i in range(len(b))])  # sample by sample
    torch.testing.assert_close(y, y2, **CLOSE)
    g = torch.randn_like(y)
    y.backward(g), y2.backward(g)
    torch.testing.assert_close(x.grad, x2.grad, **CLOSE)
    for i in range(num_buckets):
        for mine, reference in [(model.layer.d_out, plain.d_out)] + [(model.layer.d_in, plain.d_in)] * (scales == "out+in"):
            if i in b:
                torch.testing.assert_close(mine[i].grad, reference[i].grad, **CLOSE)
            else:
                assert mine[i].grad is None and reference[i].grad is None


@pytest.mark.parametrize("name", ["3x3", "groups", "linear"])
def test_unbatched_and_no_input_gradient(name):
    make, shape = LAYERS[name]
    model, plain = tuned(make, 4, 1)
    x = torch.randn(shape[1:], dtype=torch.float64)
    y, y2 = model(x), plain(x, 0)
    torch.testing.assert_close(y, y2, **CLOSE)
    y.square().sum().backward(), y2.square().sum().backward()
    torch.testing.assert_close(model.layer.d_in[0].grad, plain.d_in[0].grad, **CLOSE)


def test_no_float_weight_is_kept_for_backward():
    model, _ = tuned(lambda: nn.Linear(64, 64, bias=False), 4, 1)
    x, kept = torch.randn(2, 64, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda a: kept.append(a.numel()) or a, lambda a: a):
        model(x)
    assert kept and max(kept) <= 2 * 64

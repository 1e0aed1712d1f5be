"""The quantizer against independent references: explicit dequantization under autograd, in float64."""
import copy
import math
import shutil

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import quant
from quant import adapter, bucket, deltas, fingerprint, load_adapter, merge, minmax, pack, quantize, unpack

CLOSE = dict(rtol=1e-10, atol=1e-10)
CALIBRATIONS = sorted(quant.CALIBRATIONS)


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
    assert torch.equal(bucket(torch.arange(T), n, T), expected)
    assert expected.min() == 0 and expected.max() == n - 1


def test_bucket_edges():
    assert bucket(torch.tensor([0, 249, 250, 499, 500, 999]), 4, 1000).tolist() == [0, 0, 1, 1, 2, 3]
    assert bucket(torch.tensor([249.9, 250.0]), 4, 1000).tolist() == [0, 1]
    for wrong in (-1, 1000):
        with pytest.raises(ValueError, match="0 .. 999"):
            bucket(torch.tensor([3, wrong]), 4, 1000)


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
        codes, zero, s_out, s_in = quant.CALIBRATIONS[name](w, n_bits)
        errors.append(((codes - zero) * s_out * s_in - w).square().mean().item())
    assert errors[0] > errors[1] > errors[2]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize("n_bits", [2, 4, 8])
def test_rows_of_zeros_and_constants_and_outliers(calibration, n_bits):
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0], layer.weight[1], layer.weight[2], layer.weight[:, 3], layer.weight[3, 1] = 0, 0.7, -0.7, 0, 1e4
    model = quantize(nn.Sequential(copy.deepcopy(layer)), n_bits, calibration=calibration)
    w = model[0].weight()
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
    b = bucket(t, num_buckets, 1000).tolist()
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


class Net(nn.Module):
    """A small model of another make: names, an odd channel count, groups, tokens, no bias."""

    def __init__(self):
        super().__init__()
        self.conv_in = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.GroupNorm(3, 6)
        self.block = nn.Sequential(nn.Conv2d(6, 9, 3, stride=2, padding=1, groups=3), nn.SiLU())
        self.mix = nn.Linear(9, 9, bias=False)
        self.conv_out = nn.Conv2d(9, 3, 1)

    def forward(self, x, time):
        h = self.block(self.norm(self.conv_in(x)))
        h = h + self.mix(h.flatten(2).mT).mT.view_as(h)
        return self.conv_out(h)


def quantized(num_buckets=2, seed=0, **kwargs):
    torch.manual_seed(seed)
    return quantize(Net(), num_buckets=num_buckets, timestep="time", **kwargs)


def move(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.copy_(torch.rand(delta.shape, generator=generator) - 0.5)
    return model


def test_mixed_batch_equals_sample_by_sample():
    model, x, t = move(quantized(4).double()), torch.randn(6, 3, 8, 8).double(), torch.tensor([0, 999, 300, 301, 600, 1])
    torch.testing.assert_close(model(x, t), torch.cat([model(x[i:i + 1], t[i:i + 1]) for i in range(6)]), **CLOSE)


def test_one_bucket_equals_no_buckets():
    one, four, x = move(quantized(1)), quantized(4), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for name, delta in deltas(four).items():
            delta.copy_(deltas(one)[name.rsplit(".", 1)[0] + ".0"])
    assert torch.equal(one(x, 7), four(x, 7)) and torch.equal(one(x, 7), one(x, None))


def test_zero_deltas_are_the_base():
    model, x = quantized(2), torch.randn(2, 3, 8, 8)
    base = model.block[0].weight(torch.zeros(9), torch.zeros(6))
    assert torch.equal(base, model.block[0].weight())
    torch.testing.assert_close(model(x, torch.tensor([1, 999])), merge(model, 0)(x, None))


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_training_moves_only_the_deltas_of_the_buckets_drawn(optimizer):
    model = quantized(4, n_bits=3)
    before, mark = copy.deepcopy(model.state_dict()), fingerprint(model)
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for t in ([900, 100], [100, 120], [130, 10]):  # the last bucket once, the first each time
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8), torch.tensor(t)).square().mean().backward()
        moved = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer.step()
        drawn = set(bucket(torch.tensor(t), 4, 1000).tolist())
        for name, delta in deltas(model).items():
            assert torch.equal(delta, moved[name]) == (int(name.rsplit(".", 1)[1]) not in drawn), name
    assert fingerprint(model) == mark
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in deltas(model) or name[-1] in "12"), name


def test_only_deltas_require_a_gradient():
    model = quantized(2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(deltas(model)) and len(trained) == 4 * 2 * 2


def test_bits_and_names():
    model = quantized(1, n_bits=3, keep_float=["mix"])
    assert [model.conv_in.n_bits, model.block[0].n_bits, model.conv_out.n_bits] == [8, 3, 8]
    assert type(model.mix) is nn.Linear and not model.mix.weight.requires_grad
    assert quantized(1, n_bits=2, keep8=["block*"]).conv_in.n_bits == 2


def test_adapter_round_trip_and_wrong_base(tmp_path):
    model, x, t = move(quantized(2)), torch.randn(2, 3, 8, 8), torch.tensor([3, 800])
    torch.save(adapter(model), tmp_path / "a.pt")
    saved, other = torch.load(tmp_path / "a.pt", weights_only=True), quantized(2)
    load_adapter(other, saved)
    for name, delta in deltas(other).items():
        assert torch.equal(delta, deltas(model)[name].half().float())
    load_adapter(model, saved)
    assert torch.equal(model(x, t), other(x, t))
    for wrong in (quantized(2, seed=1), quantized(3), quantized(2, n_bits=3), quantized(2, scales="out")):
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(ValueError, match="another base"):
            load_adapter(wrong, saved)
        assert all(torch.equal(value, before[name]) for name, value in wrong.state_dict().items())


def test_merge_is_equal_and_plain():
    model, x = move(quantized(3).double()), torch.randn(2, 3, 8, 8).double()
    for b, t in enumerate((0, 400, 999)):
        plain = merge(model, b)
        assert not any(isinstance(m, quant.QuantLayer) for m in plain.modules())
        torch.testing.assert_close(plain(x, None), model(x, t), **CLOSE)
    with pytest.raises(IndexError):
        merge(model, 3)


def test_dtypes_follow_the_model():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = quantized(2).to(dtype)
        y = model(torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([1, 900]))
        y.sum().backward()
        assert y.dtype == dtype and model.block[0].codes.dtype == torch.uint8 and model.mix.d_in[1].grad.dtype == dtype


def test_autocast_trains():
    model = quantized(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8), torch.tensor([1, 900]))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(d.grad.isfinite().all() and d.grad.dtype == torch.float32
                                             for d in deltas(model).values())


def test_a_layer_that_was_not_told_fails_loudly():
    model, x = quantized(2), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="not told"):
        model.conv_in(x)
    model(x, time=torch.tensor([1, 900]))  # and is told for one call only
    with pytest.raises(RuntimeError, match="not told"):
        model.conv_in(x)
    with pytest.raises(ValueError, match="3 timesteps"):
        model(x, torch.tensor([1, 900, 2]))
    with pytest.raises(ValueError, match="0 .. 999"):
        model(x, torch.tensor([1, 1000]))
    with pytest.raises(RuntimeError, match="not told"):  # nor does a call that failed leave anything behind
        model.conv_in(x)


def shared():
    layer = nn.Linear(3, 3)
    other = nn.Linear(3, 3)
    other.weight = layer.weight
    return nn.Sequential(layer, other)


def broken():
    layer = nn.Linear(3, 3)
    layer.weight.data[1, 1] = float("nan")
    return nn.Sequential(layer)


@pytest.mark.parametrize("make, kwargs, match", [
    (Net, dict(n_bits=1), "2 to 8"), (Net, dict(n_bits=9), "2 to 8"), (Net, dict(num_buckets=0), "num_buckets"),
    (Net, dict(num_buckets=1001), "num_buckets"), (Net, dict(scales="in"), "out\\+in"),
    (Net, dict(calibration="best"), "rowcol"), (Net, dict(num_buckets=2, timestep="step"), "x or time"),
    (lambda: nn.Linear(3, 3), {}, "inside a module"), (shared, {}, "shares"), (broken, {}, "finite"),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular")), {}, "circular"),
    (lambda: nn.Sequential(nn.Conv2d(2, 2, 2, padding="same")), {}, "unevenly"),
    (lambda: nn.TransformerEncoderLayer(8, 2), {}, "MultiheadAttention"), (lambda: quantized(1), {}, "QuantConv2d"),
])
def test_what_cannot_be_quantized_is_refused_untouched(make, kwargs, match):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=match):
        quantize(model, **kwargs)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) or v.isnan().any() for k, v in before.items())


def test_a_module_used_twice_stays_one():
    layer = nn.Linear(4, 4)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer), keep8=())
    assert model[0] is model[2] and isinstance(model[0], quant.QuantLinear)


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("t", [[3], [1, 900, 2, 800]])
def test_compiled_equals_eager(t):
    model, x, t = move(quantized(2).double()), torch.randn(len(t), 3, 8, 8).double(), torch.tensor(t)
    found = []
    for net in (model, torch.compile(model)):
        net(x, t).square().sum().backward()
        found.append({name: delta.grad for name, delta in deltas(model).items()})
        model.zero_grad()
    for name, grad in found[0].items():
        assert (grad is None) == (found[1][name] is None)
        if grad is not None:
            torch.testing.assert_close(found[1][name], grad, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_gpu_equals_cpu():
    model, x, t = move(quantized(2).double()), torch.randn(4, 3, 8, 8).double(), torch.tensor([1, 900, 2, 800])
    y = model(x, t)
    torch.testing.assert_close(copy.deepcopy(model).cuda()(x.cuda(), t.cuda()).cpu(), y, **CLOSE)

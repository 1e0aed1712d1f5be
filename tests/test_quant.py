"""The method: buckets, packed bits, the layer, the swap, and what one carries away.

The layer's outputs and gradients are compared with explicit dequantization under autograd, in
float64.
"""

import copy
import math
import weakref
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import spread

from calibrate import rowcol
from quant import (
    QuantLayer,
    QuantLinear,
    adapter,
    batch_of,
    bucket,
    deltas,
    equal_edges,
    load_adapter,
    merge,
    pack,
    quantize,
    unpack,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}

# --------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T, n", [(1000, 1), (1000, 3), (1000, 4), (7, 3), (5, 5)])
def test_with_equal_edges_the_bucket_is_floor_of_t_n_over_T(T, n):
    expected = torch.tensor([math.floor(t * n / T) for t in range(T)])
    assert torch.equal(bucket(torch.arange(T), equal_edges(n, T)), expected)


def test_an_edge_starts_its_bucket_and_T_belongs_to_the_last():
    edges = equal_edges(4, 1000)
    assert bucket(torch.tensor([0, 249, 250, 499, 500, 999]), edges).tolist() == [0, 0, 1, 1, 2, 3]
    assert bucket(torch.tensor([249.9, 250.0]), edges).tolist() == [0, 1]
    assert bucket(torch.tensor([999.9, 1000.0]), edges).tolist() == [3, 3]


def test_buckets_of_unequal_width_and_of_times_from_0_to_1():
    t = torch.tensor([0, 9, 10, 699, 700, 1000])
    assert bucket(t, [0, 10, 700, 1000]).tolist() == [0, 0, 1, 1, 2, 2]
    t = torch.tensor([0.0, 0.24, 0.25, 1.0])
    assert bucket(t, equal_edges(4, 1)).tolist() == [0, 0, 1, 3]


def test_timesteps_out_of_range_or_nan_are_refused():
    edges = equal_edges(4, 1000)
    for wrong in (-1, 1001):
        with pytest.raises(ValueError, match="0 .. 1000"):
            bucket(torch.tensor([3, wrong]), edges)
    with pytest.raises(ValueError, match="nan"):
        bucket(torch.tensor([3, math.nan]), edges)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float16, torch.bfloat16])
def test_the_bucket_is_exact_for_timesteps_of_any_dtype(dtype):
    t = torch.tensor([0, 31, 32, 100, 127]).to(dtype)
    expected = [math.floor(value * 50 / 1000) for value in t.tolist()]
    assert bucket(t, equal_edges(50, 1000)).tolist() == expected


def test_a_batch_knows_its_buckets_and_the_place_of_each_sample_among_them():
    batch = batch_of(torch.tensor([900, 100, 950]), equal_edges(4, 1000))
    assert batch.present == [0, 3]
    assert batch.index.tolist() == [1, 0, 1]


# --------------------------------------------------------------------------------------------------
# Bits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_packed_codes_come_back_and_take_n_bits_each(n_bits):
    largest = 2**n_bits - 1
    codes = torch.randint(2**n_bits, (3, 5, 7), dtype=torch.uint8)
    codes[0, 0, :2] = torch.tensor([0, largest])
    packed = pack(codes, n_bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (14 * n_bits,)  # 105 codes are 14 times 8, rounded up
    assert torch.equal(unpack(packed, n_bits, (3, 5, 7)), codes)


def test_codes_of_3_bits_lie_where_quant_says():
    """Saved models and gpu_kernels.py depend on it."""
    low = [0b10_00_10_00, 0b11_01_11_01]  # codes 6 4 2 0, and 7 5 3 1
    high = [0b1111_0000]  # codes 7 to 0
    assert pack(torch.arange(8, dtype=torch.uint8), 3).tolist() == low + high


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

        # columns[o, i, k]: the place in s_in of the scale that W[o, i, k] is multiplied by
        of_group = len(layer.s_in) // layer.groups  # I, or K * I if each position has its own
        group = torch.arange(o) // (o // layer.groups)  # (O,)
        position = torch.arange(math.prod(kernel)) if of_group > i else torch.zeros(1).long()
        columns = group[:, None, None] * of_group + torch.arange(i)[:, None] + position * i
        self.columns = columns.expand(o, i, math.prod(kernel)).reshape(layer.shape)

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
        return rows * self.q * s_in[self.columns]

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
    "3x3": (partial(nn.Conv2d, 6, 4, 3, padding=1), (4, 6, 6, 5)),
    "stride": (partial(nn.Conv2d, 3, 5, 3, stride=2, padding=1, bias=False), (4, 3, 7, 8)),
    "dilation": (partial(nn.Conv2d, 3, 4, (3, 2), **DILATED), (4, 3, 7, 6)),
    "groups": (partial(nn.Conv2d, 6, 9, 3, padding=1, groups=3), (4, 6, 5, 5)),
    "depthwise": (partial(nn.Conv2d, 5, 5, 3, padding=1, groups=5, bias=False), (4, 5, 5, 5)),
    "same": (partial(nn.Conv2d, 3, 3, 3, padding="same", dilation=2), (4, 3, 6, 6)),
    "valid": (partial(nn.Conv2d, 3, 3, 2, padding="valid"), (4, 3, 6, 6)),
    "linear": (partial(nn.Linear, 7, 5), (4, 7)),
    "tokens": (partial(nn.Linear, 6, 3), (4, 9, 6)),
    "tokens, no bias": (partial(nn.Linear, 6, 11, bias=False), (4, 2, 3, 6)),
}


def tuned(make, n_bits, num_buckets, scales="out+in", columns="channel"):
    """A quantized layer in a model, its deltas no longer zero, and the plain reference of it."""
    torch.manual_seed(0)
    model = OneLayer(make().double())
    source = copy.deepcopy(model.layer)
    quantize(model, n_bits, num_buckets, scales=scales, columns=columns, keep8=())
    spread(model)
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


COLUMNS = ["channel", "position"]
ONE_BUCKET = [600, 600, 999, 600]
MIXED = [999, 0, 600, 10]
SETTINGS = [  # n_bits, num_buckets, scales, columns, timesteps
    (4, 1, "out+in", "channel", MIXED),
    (3, 2, "out+in", "channel", ONE_BUCKET),
    (2, 4, "out+in", "channel", MIXED),
    (8, 1, "out", "channel", MIXED),
    (3, 3, "out", "channel", MIXED),
    (4, 1, "out+in", "position", MIXED),
    (3, 2, "out+in", "position", ONE_BUCKET),
    (2, 4, "out+in", "position", MIXED),
    (3, 3, "out", "position", MIXED),
]


# test_properties.py draws layers, bits and buckets at random
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("n_bits, num_buckets, scales, columns, t", SETTINGS)
def test_outputs_and_gradients_equal_dequantization_under_autograd(
    name, n_bits, num_buckets, scales, columns, t
):
    make, shape = LAYERS[name]
    model, plain = tuned(make, n_bits, num_buckets, scales, columns)
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


@pytest.mark.parametrize("name", ["3x3", "tokens"])
@pytest.mark.parametrize("t", [ONE_BUCKET, MIXED], ids=["one", "mixed"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_bias_made_trainable_gets_the_gradient_of_the_reference(name, t, columns):
    make, shape = LAYERS[name]
    model, plain = tuned(make, 4, 2, columns=columns)
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
@pytest.mark.parametrize("columns", COLUMNS)
def test_a_single_input_that_needs_no_gradient(name, columns):
    make, shape = LAYERS[name]
    model, plain = tuned(make, 4, 1, columns=columns)
    x = torch.randn(shape[1:], dtype=torch.float64)
    y = model(x)
    y2 = plain(x, 0)
    torch.testing.assert_close(y, y2, **CLOSE)
    y.square().sum().backward()
    y2.square().sum().backward()
    for mine, reference in deltas_beside_references(model, plain)[0]:
        torch.testing.assert_close(mine.grad, reference.grad, **CLOSE)


@pytest.mark.parametrize("name", ["dilation", "groups", "linear"])
@pytest.mark.parametrize("columns", COLUMNS)
def test_the_weight_of_the_base_is_the_grid_that_rowcol_finds(name, columns):
    make, _ = LAYERS[name]
    source = make().double()
    model = quantize(OneLayer(copy.deepcopy(source)), 3, columns=columns, keep8=())
    w = source.weight.detach()
    g = getattr(source, "groups", 1)
    positions = w[0, 0].numel() if columns == "channel" else 1  # that share a scale
    grid = rowcol(w.reshape(g, len(w) // g, -1, positions), 3)
    expected = (grid.codes - grid.zero_point) * grid.s_out * grid.s_in
    torch.testing.assert_close(model.layer.dequantize(), expected.view_as(w), **CLOSE)


def test_a_column_for_each_position_lets_a_kernel_change_its_shape():
    """Two columns of one kernel swap sizes: exactly what scales by position can say."""
    model = OneLayer(nn.Conv2d(1, 1, (1, 2), bias=False))
    quantize(model, 8, columns="position", keep8=())
    before = model.layer.weight.flatten()
    with torch.no_grad():
        model.layer.d_in_0.copy_(torch.tensor([2.0, 0.5]).log())
    torch.testing.assert_close(model.layer.weight.flatten(), before * torch.tensor([2.0, 0.5]))


KEPT = [  # the layer, its columns and what trains; whether x and y are kept
    (partial(nn.Linear, 64, 48), (3, 64), "channel", "out", False, True),
    (partial(nn.Linear, 64, 48), (3, 64), "channel", "out+in", True, True),
    (partial(nn.Conv2d, 8, 6, 3), (3, 8, 6, 6), "position", "out", False, True),
    (partial(nn.Conv2d, 8, 6, 3), (3, 8, 6, 6), "position", "out+in", True, False),
]


@pytest.mark.parametrize("make, shape, columns, scales, keeps_x, keeps_y", KEPT)
@pytest.mark.parametrize("t", [[10, 20, 30], [10, 900, 30]], ids=["one", "mixed"])
def test_no_float_weight_is_kept_for_backward_and_only_what_is_needed(
    make, shape, columns, scales, keeps_x, keeps_y, t, monkeypatch
):
    model, _ = tuned(make, 4, 2, scales, columns)
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
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note_size, lambda tensor: tensor):
        y = model(x, torch.tensor(t))
    count = len(weights)
    assert [w() for w in weights] == [None] * count
    assert (y.numel() in kept) == keeps_y
    assert (x.numel() in kept) == keeps_x
    assert max(kept) <= max(x.numel(), y.numel())
    y.sum().backward()
    assert [w() for w in weights] == [None] * (2 * count)  # backward has built them again


# --------------------------------------------------------------------------------------------------
# The swap
# --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A small model unlike model.py's: other names, odd channels, groups, tokens, no bias."""

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


def quantized(num_buckets=2, seed=0, net=Net, **kwargs):
    """A quantized net, the same for the same seed."""
    torch.manual_seed(seed)
    return quantize(net(), num_buckets=num_buckets, timestep="time", **kwargs)


def bucket_of_delta(name):
    """The bucket that a delta of this name belongs to: 2 for mix.d_in_2."""
    return int(name.rsplit("_", 1)[1])


def test_a_batch_of_several_buckets_equals_its_samples_one_by_one():
    model = spread(quantized(4).double())
    x = torch.randn(6, 3, 8, 8).double()
    t = torch.tensor([0, 999, 300, 301, 600, 1])
    one_by_one = torch.cat([model(x[i : i + 1], t[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(model(x, t), one_by_one, **CLOSE)


def test_equal_buckets_are_as_good_as_one():
    one = spread(quantized(1))
    four = quantized(4)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        for name, delta in deltas(four).items():
            in_first_bucket = name.rsplit("_", 1)[0] + "_0"
            delta.copy_(deltas(one)[in_first_bucket])
    assert torch.equal(one(x, 7), four(x, 7))
    assert torch.equal(one(x, 7), one(x, None))  # one bucket needs no timesteps


def test_zero_deltas_are_the_base():
    model = quantized(2, columns="channel")
    x = torch.randn(2, 3, 8, 8)
    base = model.block[0].dequantize(torch.zeros(9), torch.zeros(6))
    assert torch.equal(base, model.block[0].dequantize())
    y = model(x, torch.tensor([1, 999]))
    torch.testing.assert_close(y, merge(model, 0)(x, None))


@pytest.mark.parametrize(
    "kwargs, inside, outside, sentence",
    [
        (dict(num_buckets=4, T=1.0), (0.0, 0.25, 0.7, 1.0), 1.5, "0 .. 1, and one is 1.5"),
        (dict(edges=[0, 100, 1000]), (99, 100), 1001, "0 .. 1000, and one is 1001"),
        (  # the edges decide, whatever num_buckets and T are
            dict(num_buckets=7, T=1000, edges=[-1.5, 0.0, 0.5, 4.0]),
            (-0.1, 0.0, 4.0),
            900,
            "-1.5 .. 4, and one is 900",
        ),
    ],
)
def test_a_timestep_uses_the_scales_of_its_bucket(kwargs, inside, outside, sentence):
    model = spread(quantized(**kwargs))
    assert model.mix.num_buckets == len(inside)
    x = torch.randn(2, 3, 8, 8)
    for b, t in enumerate(inside):
        torch.testing.assert_close(model(x, t), merge(model, b)(x, None))
    assert not torch.allclose(model(x, inside[0]), model(x, inside[1]))
    with pytest.raises(ValueError, match=sentence):
        model(x, outside)


def test_only_deltas_require_a_gradient():
    model = quantized(2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(deltas(model))
    assert len(trained) == 4 * 2 * 2  # layers, buckets, rows and columns


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_training_moves_only_the_deltas_of_the_buckets_drawn(optimizer):
    model = quantized(4, n_bits=3)
    at_first = copy.deepcopy(model.state_dict())
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for t in ([900, 100], [100, 120], [130, 10]):  # the last bucket once, the first each time
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8), torch.tensor(t)).square().mean().backward()
        before_step = copy.deepcopy(model.state_dict())
        optimizer.step()
        drawn = bucket(torch.tensor(t), equal_edges(4, 1000)).tolist()
        for name, delta in deltas(model).items():
            stayed = torch.equal(delta, before_step[name])
            assert stayed == (bucket_of_delta(name) not in drawn), name

    for name, value in model.state_dict().items():
        trained = name in deltas(model) and bucket_of_delta(name) in (0, 3)
        assert torch.equal(value, at_first[name]) == (not trained), name


def test_a_layer_that_was_not_told_its_timesteps_fails_loudly():
    model = quantized(2)
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="wasn't told"):
        model.conv_in(x)
    model(x, time=torch.tensor([1, 900]))  # and is told for one call only
    with pytest.raises(RuntimeError, match="wasn't told"):
        model.conv_in(x)

    # nor does a call that failed leave anything behind
    with pytest.raises(ValueError, match="3 timesteps"):
        model(x, torch.tensor([1, 900, 2]))
    with pytest.raises(ValueError, match="0 .. 1000"):
        model(x, torch.tensor([1, 1001]))
    with pytest.raises(ValueError, match="give it 'time'"):
        model(x, None)
    with pytest.raises(RuntimeError, match="wasn't told"):
        model.conv_in(x)


def test_keep8_and_keep_float_name_layers():
    model = quantized(1, n_bits=3, keep_float=["mix"])
    assert model.conv_in.n_bits == 8  # the first and the last convolution, by default
    assert model.block[0].n_bits == 3
    assert model.conv_out.n_bits == 8
    assert type(model.mix) is nn.Linear
    assert not model.mix.weight.requires_grad
    assert quantized(1, n_bits=2, keep8=["block*"]).conv_in.n_bits == 2
    assert type(quantized(1, keep_float="mix").mix) is nn.Linear  # a single pattern


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer), keep8=())
    assert model[0] is model[2]
    assert isinstance(model[0], QuantLinear)

    x = torch.randn(3, 4)
    plain = merge(model)
    assert type(plain[0]) is nn.Linear
    assert plain[0] is plain[2]
    assert torch.equal(plain(x), model(x))


# --------------------------------------------------------------------------------------------------
# What you carry away
# --------------------------------------------------------------------------------------------------


def test_an_adapter_carries_the_deltas_and_knows_its_base(tmp_path):
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([3, 800])
    torch.save(adapter(model), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)

    other = quantized(2)
    load_adapter(other, saved)
    for name, delta in deltas(other).items():
        assert torch.equal(delta, deltas(model)[name].half().float())
    load_adapter(model, saved)
    assert torch.equal(model(x, t), other(x, t))

    with pytest.raises(ValueError, match="another base"):
        load_adapter(quantized(2, seed=1), saved)


def test_adapters_add_so_their_factors_multiply_the_weight():
    a, b, c = [adapter(spread(quantized(2), seed)) for seed in (1, 2, 3)]
    model = spread(quantized(2), 4)
    load_adapter(model, a, b, strength=0.5)

    def change(saved, kind):
        """What the adapter makes of the scales of a convolution in bucket 1."""
        other = quantized(2)
        load_adapter(other, saved)
        return deltas(other)[f"conv_in.{kind}_1"].double().exp()

    rows, columns = [(change(a, kind) * change(b, kind)).sqrt() for kind in ("d_out", "d_in")]
    base = quantized(2).conv_in.dequantize()  # (O, I, *kernel)
    columns = columns.view(*base.shape[2:], -1).movedim(-1, 0)  # (I, *kernel)
    expected = base * rows.view(-1, 1, 1, 1) * columns
    torch.testing.assert_close(model.conv_in.weight_of(1), expected.float())

    # in any order, and a second time, to the bit; what the model had before doesn't count
    load_adapter(model, a, b, c)
    for others in ((c, b, a), (b, a, c, a)):
        again = spread(quantized(2), 5)
        load_adapter(again, *others)
        for name, delta in deltas(again).items():
            assert torch.equal(delta, deltas(model)[name]), name
    load_adapter(model, a, strength=0)
    assert not any(delta.any() for delta in deltas(model).values())


def test_a_merged_model_is_plain_and_computes_the_same():
    model = spread(quantized(3).double())
    x = torch.randn(2, 3, 8, 8).double()
    for b, t in enumerate((0, 400, 999)):
        plain = merge(model, b)
        assert not any(isinstance(module, QuantLayer) for module in plain.modules())
        assert all(p.requires_grad for p in plain.parameters())
        torch.testing.assert_close(plain(x, None), model(x, t), **CLOSE)


def test_the_weight_of_a_layer_has_the_deltas_if_there_is_one_bucket_and_else_is_the_bases():
    model = spread(quantized(1))
    assert torch.equal(model.mix.weight, merge(model).mix.weight)
    assert not torch.equal(model.mix.weight, model.mix.dequantize())
    model = spread(quantized(2))
    assert torch.equal(model.mix.weight, model.mix.dequantize())

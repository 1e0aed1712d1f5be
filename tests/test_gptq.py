"""Calibration with data: error compensation against least squares, and what a layer sees."""

import copy
from functools import partial
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn

from calibrate import nearest_codes, rowcol
from gptq import DAMPING, Moments, compensate, gptq, match_outputs, moments_of, some_of
from quant import deltas, quantize
from sample import BASE, load_model
from train import calibration_data


def correlated(n, size, seed=0):
    """n inputs (n, size), correlated and of different sizes, in float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(size, size, generator=generator, dtype=torch.float64)
    x = torch.randn(n, size, generator=generator, dtype=torch.float64) @ mixing
    return x + 3 * torch.randn(n, 1, generator=generator, dtype=torch.float64)


def with_damping(x):
    """x (n, J), and below it the rows that stand for damping: (n + J, J)."""
    average = x.square().sum(0).mean().clamp(min=1e-30)
    eye = torch.eye(x.shape[1], dtype=x.dtype)
    return torch.cat([x, (DAMPING * average).sqrt() * eye])


# --------------------------------------------------------------------------------------------------
# The mathematics, against least squares
# --------------------------------------------------------------------------------------------------


def compensate_slowly(w, s_out, zero_point, x, n_bits):
    """compensate, by solving for all the weights that are still to be rounded after each rounding.

    w (O, J), x (n, J).
    """
    grid = (torch.arange(2**n_bits) - zero_point.view(-1, 1)) * s_out.view(-1, 1)  # (O, codes)
    order = x.square().sum(0).argsort(descending=True)
    x = with_damping(x)
    y = x @ w.T  # what the float weights give
    weights = w.clone()
    codes = torch.zeros_like(w)
    for count, j in enumerate(order.tolist(), 1):
        codes[:, j] = (weights[:, j, None] - grid).abs().argmin(1)
        weights[:, j] = (codes[:, j] - zero_point.flatten()) * s_out.flatten()
        rounded = order[:count]
        rest = order[count:]
        missing = y - x[:, rounded] @ weights[:, rounded].T
        weights[:, rest] = torch.linalg.lstsq(x[:, rest], missing).solution.T
    return codes


@pytest.mark.parametrize("n_bits", [2, 3, 8])
@pytest.mark.parametrize("n", [1, 5, 200])  # samples of 12 inputs; of 1 or 5, h is singular
def test_compensation_equals_least_squares_after_each_rounding(n_bits, n):
    x = correlated(n, 12)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(7, 12, generator=generator, dtype=torch.float64)
    s_out = torch.rand(7, 1, 1, generator=generator, dtype=torch.float64) * 4 / 2**n_bits + 0.01
    zero_point = torch.randint(2**n_bits, (7, 1, 1), generator=generator).double()
    found = compensate(w, s_out, zero_point, x.T @ x, n_bits)
    assert torch.equal(found, compensate_slowly(w, s_out, zero_point, x, n_bits))
    assert not torch.equal(found, nearest_codes(w, s_out[:, 0], zero_point[:, 0], n_bits))


@pytest.mark.parametrize("n", [1, 5, 200])
def test_matched_weights_equal_least_squares(n):
    x = correlated(n, 12)
    x_float = x + correlated(n, 12, seed=1) / 10
    w = torch.randn(7, 12, dtype=torch.float64)
    found = match_outputs(w, x.T @ x, x_float.T @ x)

    # each row of damping asks for the output of w itself
    rows = with_damping(x)
    targets = torch.cat([x_float, rows[n:]]) @ w.T
    torch.testing.assert_close(found, torch.linalg.lstsq(rows, targets).solution.T)


@pytest.mark.parametrize("n_bits", [2, 4])
def test_gptq_matches_outputs_then_compensates_on_the_grid_of_rowcol(n_bits):
    n, i, k = 200, 4, 3
    xs = [correlated(n, i * k, seed) for seed in (0, 1)]  # of two groups
    xs_float = [x + correlated(n, i * k, seed=2) / 10 for x in xs]
    w = torch.randn(2, 7, i, k, dtype=torch.float64)
    w *= torch.rand(2, 1, i, 1, dtype=torch.float64) + 0.1  # columns differ
    h = torch.stack([x.T @ x for x in xs])
    cross = torch.stack([x_float.T @ x for x, x_float in zip(xs, xs_float)])
    found = gptq(w, n_bits, Moments(h, cross))

    for g in range(2):
        target = match_outputs(w[g].flatten(1), h[g], cross[g])
        _, zero_point, s_out, s_in = rowcol(target.view(1, 7, i, k), n_bits)
        s_in = s_in.flatten().repeat_interleave(k)  # (J,)
        codes = compensate_slowly(target / s_in, s_out[0], zero_point[0], xs[g] * s_in, n_bits)
        assert torch.equal(found.codes[g].flatten(1), codes)
        assert torch.equal(found.zero_point[g], zero_point[0])
        torch.testing.assert_close(found.s_out[g], s_out[0])
        torch.testing.assert_close(found.s_in[g].flatten().repeat_interleave(k), s_in)


@pytest.mark.parametrize("n_bits", [2, 4])
def test_inputs_without_correlation_are_rounded_plainly(n_bits):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64)
    eye = torch.eye(45, dtype=torch.float64).expand(2, 45, 45)
    found = gptq(w, n_bits, Moments(eye, eye))
    for mine, plain in zip(found, rowcol(w, n_bits)):
        torch.testing.assert_close(mine, plain)


def test_inputs_that_are_never_seen_are_rounded_plainly():
    x = correlated(50, 12).float()
    x[:, [2, 7]] = 0
    w = torch.randn(1, 6, 12, 1)
    h = (x.T @ x)[None]
    found = gptq(w, 4, Moments(h, h))
    plain = rowcol(w, 4)
    torch.testing.assert_close(found.codes[:, :, [2, 7]], plain.codes[:, :, [2, 7]])
    assert not torch.equal(found.codes, plain.codes)


def test_a_layer_that_sees_only_zeros_is_rounded_plainly():
    w = torch.randn(1, 6, 12, 1)
    found = gptq(w, 4, Moments(torch.zeros(1, 12, 12), torch.zeros(1, 12, 12)))
    torch.testing.assert_close(found.codes, rowcol(w, 4).codes)


LAYERS = {  # a layer, and the shape of what it is given
    "linear": (partial(nn.Linear, 6, 8), (5, 6)),
    "tokens": (partial(nn.Linear, 6, 8), (5, 7, 6)),
    "a vector": (partial(nn.Linear, 6, 8), (6,)),
    "conv": (partial(nn.Conv2d, 6, 8, 3), (5, 6, 7, 7)),
    "an image": (partial(nn.Conv2d, 6, 8, 3, padding=1), (6, 7, 7)),
    "stride, padding, dilation": (
        partial(nn.Conv2d, 6, 8, 3, stride=2, padding=(2, 1), dilation=(1, 2)),
        (5, 6, 9, 8),
    ),
    "groups": (
        partial(nn.Conv2d, 6, 8, (3, 2), groups=2, padding="same", dilation=(1, 2)),
        (5, 6, 7, 7),
    ),
    "each channel a group": (
        partial(nn.Conv2d, 6, 6, 3, groups=6, padding="valid"),
        (5, 6, 7, 7),
    ),
}


def make_layer(name):
    """A layer of LAYERS with weights that are always the same, and the shape of its input."""
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    return make(), shape


@pytest.mark.parametrize("name", LAYERS)
def test_moments_give_the_squares_of_the_outputs(name):
    """w h w^T is the sum of the squares of the outputs w x, whatever the layer; cross likewise."""
    layer, shape = make_layer(name)
    layer = layer.double()
    layer.bias = None
    x = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]  # two batches
    x_float = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    moments = moments_of(layer, x, x_float)

    groups = getattr(layer, "groups", 1)
    w = layer.weight.detach().view(groups, len(layer.weight) // groups, -1)  # (G, O, J)
    channel = 1 if len(shape) == 4 else 0 if name == "an image" else -1
    squares = products = 0
    with torch.no_grad():
        for one, other in zip(x, x_float):
            y = torch.atleast_2d(layer(one)).movedim(channel, 0).flatten(1)  # (G * O, positions)
            y_float = torch.atleast_2d(layer(other)).movedim(channel, 0).flatten(1)
            squares = squares + y @ y.T
            products = products + y_float @ y.T
    for g in range(groups):
        rows = slice(g * w.shape[1], (g + 1) * w.shape[1])
        torch.testing.assert_close(w[g] @ moments.h[g] @ w[g].T, squares[rows, rows])
        torch.testing.assert_close(w[g] @ moments.cross[g] @ w[g].T, products[rows, rows])


# --------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Two layers, one of them called twice, and what a calibration must leave alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(12, 4)

    def forward(self, x, t=None):
        x = self.first(x)
        x = self.first(self.dropout(self.norm(x)).relu())
        return self.last(x)


torch.manual_seed(0)
NET = Net()
DATA = [(x.float(), torch.arange(20)) for x in correlated(60, 12).split(20)]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("columns", ["channel", "position"])
def test_outputs_are_nearer_than_with_rowcol(name, columns):
    layer, shape = make_layer(name)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, *shape, generator=generator)
    x = x.cumsum(-1) + x[:, :1]  # neighbors are alike
    error = {}
    for calibration in ("rowcol", "gptq"):
        model = nn.Sequential(copy.deepcopy(layer))
        data = [(batch,) for batch in x]
        quantize(model, 3, columns=columns, calibration=calibration, keep8=[], data=data)
        error[calibration] = sum((model(batch) - layer(batch)).square().sum() for batch in x)
    if columns == "position" and name == "each channel a group":  # a scale for each weight
        assert max(error.values()) < 1e-6
    else:
        assert error["gptq"] < error["rowcol"]


def test_columns_by_position_are_in_the_order_of_the_moments():
    """gptq of the unfolded weight, as the reference above has it, is what a layer gets."""
    layer, shape = make_layer("groups")
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64).cumsum(-1)
    g = layer.groups
    w = layer.weight.detach().reshape(g, len(layer.weight) // g, -1, 1)  # (G, O, I * K, 1)
    expected = gptq(w, 3, moments_of(layer, [x], [x])).weight()

    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, 3, columns="position", keep8=[], data=[(x,)])
    torch.testing.assert_close(model[0].weight, expected.view_as(layer.weight))


def test_a_layer_is_given_what_reaches_it_in_the_quantized_and_in_the_float_network(monkeypatch):
    given = []

    def note(layer, x, x_float):
        given.append((layer, x, x_float))
        return moments_of(layer, x, x_float)

    monkeypatch.setattr("gptq.moments_of", note)
    model = Net().eval()
    before = copy.deepcopy(model)
    quantize(model, 2, 2, calibration="gptq", data=DATA)

    reached = {}

    def keep(layer, args):
        reached.setdefault(layer, []).append(args[0])

    for network in (model, before):
        for layer in (network.first, network.last):
            layer.register_forward_pre_hook(keep)
        with torch.no_grad():
            for batch in DATA:
                network(*batch)

    (_, x, x_float), (_, last_x, last_x_float) = given
    torch.testing.assert_close(x_float, reached[before.first])  # both calls of every batch
    torch.testing.assert_close(x[0], DATA[0][0])
    torch.testing.assert_close(last_x, reached[model.last])
    torch.testing.assert_close(last_x_float, reached[before.last])
    assert not torch.equal(last_x[0], last_x_float[0])


class InPlace(nn.Module):
    """Calls a layer twice, and changes what it gave to the first call in between."""

    def __init__(self, in_place):
        super().__init__()
        self.layer = nn.Linear(12, 12)
        self.in_place = in_place

    def forward(self, x):
        x = x.clone()
        y = self.layer(x)
        change = torch.arange(12)
        x = x.mul_(change) if self.in_place else x * change
        return y + self.layer(x)


def test_inputs_that_the_model_changes_in_place_are_as_the_layer_saw_them():
    codes = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = quantize(InPlace(in_place), calibration="gptq", data=[DATA[0][:1]])
        codes.append(model.layer.codes)
    assert torch.equal(*codes)


def test_the_state_of_the_model_is_left_alone():
    model = Net()
    model.norm.eval()
    model.last.eval()
    before = copy.deepcopy(model.norm.state_dict())
    quantize(model, calibration="gptq", data=DATA)
    torch.testing.assert_close(model.norm.state_dict(), before)
    assert model.training and model.first.training and model.dropout.training
    assert not model.norm.training and not model.last.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert model.quant_config["calibration"] == "gptq"


def test_a_model_in_training_is_calibrated_as_in_evaluation():
    codes = []
    for mode in (True, False):
        model = copy.deepcopy(NET).train(mode)
        quantize(model, calibration="gptq", data=DATA)
        codes.append(model.last.codes)
        torch.testing.assert_close(model.norm.state_dict(), NET.norm.state_dict())
    assert torch.equal(*codes)


def test_batches_may_be_dicts_and_any_iterable():
    as_dicts = ({"t": t, "x": x} for x, t in DATA)
    one = quantize(copy.deepcopy(NET), calibration="gptq", data=as_dicts)
    other = quantize(copy.deepcopy(NET), calibration="gptq", data=iter(DATA))
    assert torch.equal(one.first.codes, other.first.codes)


def test_data_alone_ask_for_gptq():
    by_name = quantize(copy.deepcopy(NET), calibration="gptq", data=DATA)
    by_data = quantize(copy.deepcopy(NET), data=DATA)
    assert torch.equal(by_data.last.codes, by_name.last.codes)
    assert by_data.quant_config["calibration"] == "gptq"
    assert quantize(copy.deepcopy(NET)).quant_config["calibration"] == "rowcol"


def test_several_buckets_start_from_the_same_integers():
    one = quantize(copy.deepcopy(NET), num_buckets=1, calibration="gptq", data=DATA)
    four = quantize(copy.deepcopy(NET), num_buckets=4, calibration="gptq", data=DATA)
    assert torch.equal(one.last.codes, four.last.codes)
    four(*DATA[0]).sum().backward()
    assert deltas(four)["last.d_out_0"].grad is not None
    with pytest.raises(RuntimeError, match="timesteps"):
        four.last(DATA[0][0])


class OnlyIterable:
    """Neither a length nor a truth value."""

    def __iter__(self):
        return iter(DATA)

    def __bool__(self):
        raise TypeError

    __len__ = None


class Pair(NamedTuple):
    x: torch.Tensor
    scale: float


class TakesTuples(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, pair, sizes):
        if not isinstance(sizes, tuple):
            raise TypeError("sizes must be a tuple")
        return self.layer(pair.x * pair.scale)


def test_tuples_in_a_batch_stay_what_they_are():
    quantize(TakesTuples(), calibration="gptq", data=[(Pair(torch.randn(9, 4), 2.0), (4, 4))])


def test_data_need_only_be_iterable():
    quantize(copy.deepcopy(NET), calibration="gptq", data=OnlyIterable())


class Random(Net):
    """Draws noise in its forward, and changes its argument in place."""

    def forward(self, x, t=None):
        x.mul_(2)
        return self.last(self.first(x) + torch.randn(x.shape))


def test_both_networks_see_the_same_random_numbers_and_the_same_batch():
    model = Random()
    weight = model.last.weight.detach().clone()
    data = copy.deepcopy(DATA)
    state = torch.get_rng_state()
    quantize(model, 8, calibration="gptq", data=data)
    torch.testing.assert_close(model.last.weight, weight, rtol=0, atol=0.01)  # a few steps
    torch.testing.assert_close(data, DATA, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_draw_different_random_numbers(monkeypatch):
    given = []

    def note(layer, x, x_float):
        given.append(x)
        return moments_of(layer, x, x_float)

    monkeypatch.setattr("gptq.moments_of", note)
    quantize(Random(), calibration="gptq", data=[DATA[0], DATA[0]])
    of_last = given[1]
    assert not torch.equal(of_last[0], of_last[1])


class NearlySame(Net):
    """Rounds differently at each call, as some sums on a GPU do."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x, t=None):
        self.calls += 1
        return self.last(self.first(x) * (1 + 1e-3 * (self.calls % 2)))


def test_rounding_that_differs_at_each_call_is_no_obstacle():
    model = quantize(NearlySame(), 8, data=DATA)
    y = model(*DATA[0])
    assert y.isfinite().all()


def test_what_is_compared_of_an_input_is_spread_over_all_of_it():
    x = torch.arange(100_000.0)
    values = some_of(x.view(10, 100, 100))
    assert torch.equal(values, some_of(x.view(10, 100, 100)))
    assert values.histc(10, 0, 100_000).min() > 300  # of 4,096 values, in each tenth
    assert some_of(x[:7].to(torch.bfloat16)).shape == (7,)
    assert some_of(x[:0]).shape == (0,)


def test_all_layers_are_compared_by_two_calls_of_the_model_for_each_batch():
    calls = []
    model = Net()
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    quantize(model, data=DATA)
    of_two_layers = 2 * 2 * len(DATA)  # in the float and in the quantized network
    assert len(calls) == 2 * len(DATA) + of_two_layers


class ByKeyword(Net):
    def forward(self, x, t=None):
        return self.last(input=self.first(input=x))


def test_a_layer_may_be_called_by_keyword():
    model = quantize(ByKeyword(), calibration="gptq", data=DATA)
    assert model(*DATA[0]).shape == (20, 4)


def test_hooks_that_are_always_called_are_called():
    model = Net()
    count = {"before": 0, "after": 0}

    def before(*_):
        count["before"] += 1

    def after(*_):
        count["after"] += 1

    model.register_forward_pre_hook(before)
    model.register_forward_hook(after, always_call=True)
    quantize(model, calibration="gptq", data=DATA)
    assert count["before"] == count["after"] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layers_of_half_precision_see_those_before_them_quantized(dtype):
    data = [(x.to(dtype), t) for x, t in DATA]
    y = quantize(copy.deepcopy(NET).to(dtype), data=data)(*data[0])
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_autocast_around_quantize_changes_no_integers():
    one = nn.Sequential(nn.Linear(12, 256))
    other = copy.deepcopy(one)
    quantize(one, 8, data=[DATA[0][:1]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantize(other, 8, data=[DATA[0][:1]])
    assert torch.equal(one[0].codes, other[0].codes)


# --------------------------------------------------------------------------------------------------
# The base
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_base_predicts_better_than_with_rowcol():
    data = calibration_data(n=16)
    [(x, t, words)] = calibration_data(n=16, seed=1)  # others than those calibrated on
    float_model = load_model(BASE)
    error = {}
    for calibration in ("rowcol", "gptq"):
        model = quantize(load_model(BASE), 3, columns="channel", calibration=calibration, data=data)
        with torch.no_grad():
            error[calibration] = (model(x, t, words) - float_model(x, t, words)).square().mean()
    assert error["gptq"] < 0.8 * error["rowcol"]


def test_calibration_data_is_the_same_every_time_and_covers_all_timesteps():
    one = calibration_data()
    other = calibration_data()
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    t = torch.cat([batch[1] for batch in one])
    assert len(t) == 96
    assert torch.equal(t // 125, torch.arange(8).repeat_interleave(12))

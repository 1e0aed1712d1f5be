"""quantize and the models that it makes.

Held here: which scales a call uses, what training moves, what adapters, merged models and copies
carry over, and what is refused.
"""

import copy
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn as nn
from conftest import spread
from torch.utils.checkpoint import checkpoint

import quant
from quant import (
    adapter,
    bucket,
    current,
    deltas,
    equal_edges,
    fingerprint,
    load_adapter,
    merge,
    quantize,
    remember,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}


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


# --------------------------------------------------------------------------------------------------
# Buckets
# --------------------------------------------------------------------------------------------------


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
    model = quantized(2)
    x = torch.randn(2, 3, 8, 8)
    base = model.block[0].dequantize(torch.zeros(9), torch.zeros(6))
    assert torch.equal(base, model.block[0].dequantize())
    y = model(x, torch.tensor([1, 999]))
    torch.testing.assert_close(y, merge(model, 0)(x, None))


def test_given_edges_are_stored_and_used():
    edges = [0, 100, 1000]
    model = spread(quantized(edges=edges))
    assert model.quant_config["edges"] == edges

    x = torch.randn(2, 3, 8, 8)
    low = merge(model, 0)(x, None)
    high = merge(model, 1)(x, None)
    assert not torch.allclose(low, high)
    torch.testing.assert_close(model(x, 99), low)
    torch.testing.assert_close(model(x, 100), high)
    torch.testing.assert_close(model(x, 1000), high)
    with pytest.raises(ValueError, match="0 .. 1000, and one is 1001"):
        model(x, 1001)


def test_given_edges_decide_how_many_buckets_there_are_and_their_range():
    model = spread(quantized(num_buckets=7, T=1000, edges=[-1.5, 0.0, 0.5, 4.0]))
    assert model.mix.num_buckets == 3
    x = torch.randn(2, 3, 8, 8)
    for b, t in enumerate((-0.1, 0.0, 3.9)):
        torch.testing.assert_close(model(x, t), merge(model, b)(x, None))
    with pytest.raises(ValueError, match="-1.5 .. 4, and one is 900"):
        model(x, 900)


def test_an_adapter_carries_the_edges(tmp_path):
    edges = [0, 100, 1000]
    model = spread(quantized(edges=edges))
    torch.save(adapter(model), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["quant_config"]["edges"] == edges

    torch.manual_seed(0)
    other = quantize(Net(), **saved["quant_config"])
    load_adapter(other, saved)
    load_adapter(model, saved)  # float16 has rounded the deltas
    x = torch.randn(2, 3, 8, 8)
    for t in (99, 100):
        assert torch.equal(other(x, t), model(x, t))
    with pytest.raises(ValueError, match="another base"):
        load_adapter(quantized(2), saved)  # the same integers, but equal edges


def test_times_from_0_to_1_have_several_buckets():
    model = spread(quantized(4, T=1.0))
    x = torch.randn(2, 3, 8, 8)
    for b, t in enumerate((0.0, 0.25, 0.7, 1.0)):
        torch.testing.assert_close(model(x, t), merge(model, b)(x, None))
    with pytest.raises(ValueError, match="0 .. 1, and one is 1.5"):
        model(x, 1.5)


# --------------------------------------------------------------------------------------------------
# Calls inside calls, and side by side
# --------------------------------------------------------------------------------------------------


def test_two_threads_that_call_one_model_each_get_their_own_scales():
    calls = 150
    model = spread(quantized(4))
    x = torch.randn(2, 3, 8, 8)
    # one for each thread, call and sample
    timesteps = torch.randint(0, 1000, (2, calls, 2))
    timesteps[:, ::2, 1] = timesteps[:, ::2, 0]  # every other batch is of one bucket

    @torch.no_grad()
    def outputs(thread):
        return [model(x, t) for t in timesteps[thread]]

    alone = [outputs(0), outputs(1)]

    both = threading.Barrier(2, timeout=20)

    def meet_in_the_middle(*_):
        both.wait()

    model.norm.register_forward_hook(meet_in_the_middle)
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(outputs, (0, 1)))
    for thread in (0, 1):
        for one, two in zip(alone[thread], together[thread]):
            assert torch.equal(one, two)


class Outer(nn.Module):
    """A model with another inside, which has timesteps of its own."""

    def __init__(self, inner):
        super().__init__()
        self.before = nn.Conv2d(3, 3, 1)
        self.inner = inner
        self.after = nn.Conv2d(3, 3, 1)

    def forward(self, x, t, inner_t):
        return self.after(self.inner(self.before(x), inner_t))


def test_a_quantized_model_inside_a_float_one_uses_its_own_buckets():
    outer = Outer(spread(quantized(2)))
    x = torch.randn(2, 3, 8, 8)
    for b, t in enumerate((100, 900)):
        plain = copy.deepcopy(outer)
        plain.inner = merge(outer.inner, b)
        torch.testing.assert_close(outer(x, 0, t), plain(x, 0, None))


def inner_first():
    """A quantized model inside another; the inner one is quantized before it gets there."""
    outer = Outer(quantized(2))
    quantize(outer, num_buckets=2, keep_float=["inner"])
    return outer


def outer_first():
    """A quantized model inside another; the inner one is quantized where it is."""
    outer = Outer(Net())
    quantize(outer, num_buckets=2, keep_float=["inner"])
    quantize(outer.inner, num_buckets=2, timestep="time")
    return outer


@pytest.mark.parametrize("make", [inner_first, outer_first])
def test_a_quantized_model_inside_a_quantized_one_uses_its_own_buckets(make):
    torch.manual_seed(0)
    outer = spread(make().double())
    x = torch.randn(2, 3, 8, 8).double()
    times = (100, 900)
    for b, t in enumerate(times):
        for inner_b, inner_t in enumerate(times):
            half_plain = copy.deepcopy(outer)
            half_plain.inner = merge(outer.inner, inner_b)
            plain = merge(half_plain, b)
            torch.testing.assert_close(outer(x, t, inner_t), plain(x, None, None), **CLOSE)

    # a batch of several buckets: the first sample is in bucket 0 outside and in 1 inside
    mixed = outer(x, torch.tensor([100, 900]), torch.tensor([900, 100]))
    one_by_one = torch.cat([outer(x[:1], 100, 900), outer(x[1:], 900, 100)])
    torch.testing.assert_close(mixed, one_by_one, **CLOSE)
    assert current.batch is None

    outer(x, 100, 900).sum().backward()
    for name, delta in deltas(outer).items():
        drawn = 1 if name.startswith("inner.") else 0
        assert (delta.grad is not None) == (bucket_of_delta(name) == drawn), name


def test_a_call_that_fails_inside_another_leaves_that_one_its_timesteps():
    outer = spread(outer_first())
    x = torch.randn(2, 3, 8, 8)
    expected = outer(x, 900, 900)

    def fail(*_):
        with pytest.raises(ValueError, match="0 .. 1000"):
            outer.inner(x, 1001)

    outer.before.register_forward_hook(fail)
    assert torch.equal(outer(x, 900, 900), expected)


def pickled(model):
    """A copy of model, by way of pickle."""
    return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same(copied):
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([1, 900])
    assert torch.equal(copied(model)(x, t), model(x, t))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_during_a_call_computes_the_same(copied):
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([1, 900])
    other_t = torch.tensor([950, 2])
    expected = model(x, t)
    copies = []
    copy_outputs = []

    def copy_and_call(*_):
        hook.remove()  # once is enough, and pickle takes no local function
        copies.append(copied(model))
        copy_outputs.append(copies[0](x, other_t))

    hook = model.norm.register_forward_hook(copy_and_call)
    assert torch.equal(model(x, t), expected)  # the copy's call left this one its timesteps
    assert torch.equal(copy_outputs[0], model(x, other_t))
    assert torch.equal(copies[0](x, t), expected)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
def test_training_moves_only_the_deltas_of_the_buckets_drawn(optimizer):
    model = quantized(4, n_bits=3)
    at_first = copy.deepcopy(model.state_dict())
    mark = fingerprint(model)
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

    assert fingerprint(model) == mark
    for name, value in model.state_dict().items():
        trained = name in deltas(model) and bucket_of_delta(name) in (0, 3)
        assert torch.equal(value, at_first[name]) == (not trained), name


def test_only_deltas_require_a_gradient():
    model = quantized(2)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(deltas(model))
    assert len(trained) == 4 * 2 * 2  # layers, buckets, rows and columns


def test_outputs_have_the_dtype_of_the_model_and_deltas_at_least_float32():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        model = quantized(2).to(dtype)
        y = model(torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([1, 900]))
        y.sum().backward()
        assert y.dtype == dtype
        assert model.block[0].codes.dtype == torch.uint8
        assert model.mix.weight.dtype == dtype

        precise = torch.promote_types(dtype, torch.float32)
        assert model.mix.s_in.dtype == precise
        assert model.mix.d_in_1.grad.dtype == precise


def test_autocast_computes_in_bfloat16_and_trains_in_float32():
    model = quantized(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8), torch.tensor([1, 900]))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    for delta in deltas(model).values():
        assert delta.grad.isfinite().all()
        assert delta.grad.dtype == torch.float32


def test_backward_in_autocast_sums_in_float32():
    x = torch.randn(6, 3, 8, 8)
    t = torch.tensor([1, 900, 950, 2, 3, 700])
    gradients = []
    for inside in (False, True):
        model = quantized(2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(x, t).float().square().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        gradients.append([delta.grad for delta in deltas(model).values()])
    for outside, inside in zip(*gradients):
        torch.testing.assert_close(inside, outside, rtol=1e-5, atol=1e-5)


def test_a_cast_leaves_the_integers_alone():
    model = quantized(2).type(torch.float64)
    assert model.block[0].codes.dtype == torch.uint8
    assert model.block[0].s_out.dtype == torch.float64
    model(torch.randn(2, 3, 8, 8).double(), torch.tensor([1, 900]))


class Checkpointed(Net):
    """A net that leaves it to self.run how a block is run; without mix."""

    def forward(self, x, time):
        h = self.norm(self.conv_in(x))
        return self.conv_out(self.run(self.block, h))


def run_plainly(block, x):
    return block(x)


def test_checkpointed_blocks_are_told_their_timesteps_again():
    model = spread(quantized(2, net=Checkpointed))
    batches = [
        (torch.randn(2, 3, 8, 8), torch.tensor([1, 900])),
        (torch.randn(2, 3, 8, 8), torch.tensor([800, 2])),
    ]
    found = []
    for run in (run_plainly, partial(checkpoint, use_reentrant=False, context_fn=remember)):
        model.run = run
        losses = [model(*batch).square().sum() for batch in batches]
        sum(losses).backward()  # two forwards before one backward
        used = [delta for name, delta in deltas(model).items() if not name.startswith("mix")]
        found.append([delta.grad for delta in used])
        model.zero_grad()
    assert current.batch is None
    for plain, checkpointed in zip(*found):
        assert torch.equal(plain, checkpointed)
        assert plain.any()

    model.run = partial(checkpoint, use_reentrant=False)
    with pytest.raises(RuntimeError, match="see remember"):
        model(*batches[0]).sum().backward()


@pytest.mark.parametrize("t", [[3, 4], [1, 900]])
def test_torch_compile_sees_all_layers_in_one_graph(t):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = spread(quantized(2))
    layers = [module for module in model.modules() if isinstance(module, quant.QuantLayer)]
    torch.compiler.reset()
    torch.compile(model, backend=backend)(torch.randn(2, 3, 8, 8), torch.tensor(t))
    calls = [graph.code.count("autograd_function_apply(") for graph in graphs]
    assert sum(calls) >= len(layers)
    assert max(calls) == sum(calls)  # one graph has them all


HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.mark.slow
@pytest.mark.skipif(not HAS_COMPILER, reason="needs a C++ compiler")
@pytest.mark.parametrize("t", [[3], [1, 900, 2, 800]])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(t):
    model = spread(quantized(2).double())
    x = torch.randn(len(t), 3, 8, 8).double()
    t = torch.tensor(t)
    found = []
    for net in (model, torch.compile(model)):
        net(x, t).square().sum().backward()
        found.append({name: delta.grad for name, delta in deltas(model).items()})
        model.zero_grad()
    eager, compiled = found
    for name, grad in eager.items():
        assert (grad is None) == (compiled[name] is None)
        if grad is not None:
            torch.testing.assert_close(compiled[name], grad, **CLOSE)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_model_on_the_gpu_computes_what_it_does_on_the_cpu():
    model = spread(quantized(2).double())
    x = torch.randn(4, 3, 8, 8).double()
    t = torch.tensor([1, 900, 2, 800])
    y = model(x, t)
    on_gpu = copy.deepcopy(model).cuda()(x.cuda(), t.cuda())
    torch.testing.assert_close(on_gpu.cpu(), y, **CLOSE)


# --------------------------------------------------------------------------------------------------
# Afterwards
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

    other_bases = [
        quantized(2, seed=1),
        quantized(3),
        quantized(2, n_bits=3),
        quantized(2, scales="out"),
    ]
    for wrong in other_bases:
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(ValueError, match="another base"):
            load_adapter(wrong, saved)
        for name, value in wrong.state_dict().items():
            assert torch.equal(value, before[name])


def test_a_merged_model_is_plain_and_computes_the_same():
    model = spread(quantized(3).double())
    x = torch.randn(2, 3, 8, 8).double()
    for b, t in enumerate((0, 400, 999)):
        plain = merge(model, b)
        assert not any(isinstance(module, quant.QuantLayer) for module in plain.modules())
        torch.testing.assert_close(plain(x, None), model(x, t), **CLOSE)


# --------------------------------------------------------------------------------------------------
# The swap, and what it refuses
# --------------------------------------------------------------------------------------------------


def test_keep8_and_keep_float_name_layers():
    model = quantized(1, n_bits=3, keep_float=["mix"])
    assert model.conv_in.n_bits == 8  # the first and the last convolution, by default
    assert model.block[0].n_bits == 3
    assert model.conv_out.n_bits == 8
    assert type(model.mix) is nn.Linear
    assert not model.mix.weight.requires_grad
    assert quantized(1, n_bits=2, keep8=["block*"]).conv_in.n_bits == 2


def test_a_layer_in_two_places_stays_one():
    layer = nn.Linear(4, 4)
    model = quantize(nn.Sequential(layer, nn.ReLU(), layer), keep8=())
    assert model[0] is model[2]
    assert isinstance(model[0], quant.QuantLinear)

    x = torch.randn(3, 4)
    plain = merge(model)
    assert type(plain[0]) is nn.Linear
    assert type(plain[2]) is nn.Linear
    assert torch.equal(plain(x), model(x))


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
    with pytest.raises(RuntimeError, match="wasn't told"):
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


def circular():
    return nn.Sequential(nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"))


def uneven():
    return nn.Sequential(nn.Conv2d(2, 2, 2, padding="same"))


def with_edges(*edges):
    return {"timestep": "time", "edges": list(edges)}


REFUSED = [  # how to make a model, the arguments of quantize, a part of the error
    (Net, {"n_bits": 1}, "2 to 8"),
    (Net, {"n_bits": 9}, "2 to 8"),
    (Net, {"num_buckets": 1001}, "num_buckets"),
    (Net, {"scales": "in"}, "out\\+in"),
    (Net, {"calibration": "best"}, "rowcol"),
    (Net, {"num_buckets": 2, "timestep": "step"}, "x or time"),
    (Net, with_edges(), "edges must be"),
    (Net, with_edges(1000), "edges must be"),
    (Net, with_edges(0, 1000, 1000), "edges must be"),  # an empty bucket
    (Net, with_edges(0, 1200, 1000), "edges must be"),  # decreasing
    (Net, with_edges(0, float("nan"), 1000), "edges must be"),
    (partial(nn.Linear, 3, 3), {}, "inside a module"),
    (shared, {}, "shares"),
    (broken, {}, "finite"),
    (circular, {}, "circular"),
    (uneven, {}, "unevenly"),
    (partial(nn.TransformerEncoderLayer, 8, 2), {}, "MultiheadAttention"),
    (partial(quantized, 1), {}, "is quantized already"),
]


@pytest.mark.parametrize("make, kwargs, match", REFUSED)
def test_what_cannot_be_quantized_is_refused_and_stays_as_it_was(make, kwargs, match):
    model = make()
    before = copy.deepcopy(model.state_dict())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    config = getattr(model, "quant_config", None)
    with pytest.raises(ValueError, match=match):
        quantize(model, **kwargs)

    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name], value) or value.isnan().any()
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained
    assert getattr(model, "quant_config", None) is config

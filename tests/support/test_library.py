"""What users of quant.py do with models of their own.

Odd layers, calls inside calls and side by side, checkpointing, compiling, autocast, half precision.
Each computes the same as a plain call; what is refused stands in test_checks.py.
"""

import copy
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn as nn
from conftest import spread
from test_quant import (
    CLOSE,
    LAYERS,
    Net,
    OneLayer,
    bucket_of_delta,
    quantized,
    tuned,
)
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

from quant import (
    QuantLayer,
    adapter,
    checkpoint_contexts,
    current,
    deltas,
    load_adapter,
    merge,
    quantize,
)

HALF = [torch.float16, torch.bfloat16]
MIXED = torch.tensor([1, 900])

# --------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize("name", ["dilation", "groups", "same", "tokens, no bias"])
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


def test_repr_shows_shape_bits_and_buckets():
    conv, _ = tuned(LAYERS["3x3"][0], 3, 2)
    linear, _ = tuned(LAYERS["tokens, no bias"][0], 8, 1)
    assert "QuantConv2d(4x6x3x3, n_bits=3, num_buckets=2, bias=True)" in repr(conv)
    assert "QuantLinear(11x6, n_bits=8, num_buckets=1, bias=False)" in repr(linear)


class Unchanged(nn.Linear):
    """A subclass that changes nothing."""


def test_a_subclass_that_changes_nothing_is_quantized():
    assert isinstance(quantize(OneLayer(Unchanged(6, 8))).layer, QuantLayer)


class Mixed(nn.Module):
    """A parametrization with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, weight):
        return self.mix(weight)


@pytest.mark.parametrize("kind", ["weight_norm", "with a layer"])
def test_parametrizations_are_quantized_as_they_are_now(kind):
    layer = nn.Linear(6, 8)
    if kind == "weight_norm":
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.detach().mul_(3)
    else:
        parametrize.register_parametrization(layer, "weight", Mixed())
    weight = layer.weight.detach().clone()
    model = quantize(OneLayer(layer), 8)
    torch.testing.assert_close(model.layer.weight, weight, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["buffer", "parametrized"])
def test_a_bias_that_is_no_parameter_is_saved_with_the_base(kind):
    layer = nn.Linear(6, 8)
    bias = torch.randn(8)
    if kind == "buffer":
        del layer.bias
        layer.register_buffer("bias", bias)
    else:
        parametrize.register_parametrization(layer, "bias", nn.Tanh())
        bias = layer.bias.detach().clone()
    model = quantize(OneLayer(layer))
    assert torch.equal(model.state_dict()["layer.bias"], bias)
    assert not model.layer.bias.requires_grad
    other = quantize(OneLayer(nn.Linear(6, 8)))
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert adapter(other)["fingerprint"] == adapter(model)["fingerprint"]
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("kept", ["a", "c"])
def test_a_layer_that_one_of_its_names_keeps_float_stays_shared(kept):
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    shared = model["a"]
    quantize(model, 4, keep_float=[kept])
    assert model["a"] is model["c"] is shared
    assert isinstance(model["b"], QuantLayer)


def test_codes_do_not_depend_on_the_memory_layout():
    float_model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 3, groups=2))
    one = quantize(copy.deepcopy(float_model), 3)
    two = quantize(float_model.to(memory_format=torch.channels_last), 3)
    for layer, same in zip(one, two):
        assert torch.equal(layer.codes, same.codes)
        assert torch.equal(layer.s_out, same.s_out)


@pytest.mark.parametrize("calibration", ["rowcol", "gptq"])
def test_an_activation_in_place_after_a_quantized_layer_trains(calibration):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4))
    x = torch.randn(5, 6)
    quantize(model, calibration=calibration, data=[(x,)], keep8=())
    model(x).sum().backward()
    out_of_place = copy.deepcopy(model)
    out_of_place[1] = nn.ReLU()
    out_of_place.zero_grad()
    out_of_place(x).sum().backward()
    for delta, other in zip(deltas(model).values(), deltas(out_of_place).values()):
        assert delta.grad.any()
        assert torch.equal(delta.grad, other.grad)


# --------------------------------------------------------------------------------------------------
# Calls inside calls, and side by side
# --------------------------------------------------------------------------------------------------


def test_two_threads_that_call_one_model_each_get_their_own_scales():
    calls = 60
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


def test_data_parallel_replicas_compute_the_same():
    """As nn.DataParallel makes and calls them: copies whose parameters are tensors, in threads."""
    model = spread(quantize(OneLayer(nn.Linear(6, 8)), num_buckets=2))
    x = torch.randn(4, 6)
    t = torch.tensor([0, 999, 999, 0])
    y = model(x, t)

    def run(rows):
        replica = copy.copy(model)
        replica._modules = {}
        for name, child in model._modules.items():
            copied = child._replicate_for_data_parallel()
            for key, p in child._parameters.items():
                setattr(copied, key, p.detach().clone())
            replica._modules[name] = copied
        return replica(x[rows], t[rows])

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (slice(0, 2), slice(2, 4))))
    torch.testing.assert_close(torch.cat(found), y)


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


def test_a_model_that_calls_itself_returns_to_its_own_timesteps():
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    y = model(x, MIXED)
    inner = []

    def call_again(module, args, out):
        if not inner:
            inner.append(None)
            inner.append(model(x, MIXED.flip(0)))

    hook = model.norm.register_forward_hook(call_again)
    assert torch.equal(model(x, MIXED), y)
    hook.remove()
    assert torch.equal(inner[1], model(x, MIXED.flip(0)))
    assert current.batch is None


def test_an_interrupted_call_leaves_the_next_one_right():
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    y = model(x, MIXED)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.norm.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            model(x, torch.tensor([999, 999]))
        hook.remove()
        assert torch.equal(model(x, MIXED), y)
    finally:
        current.batch = None  # PyTorch calls no hooks after KeyboardInterrupt, so its batch stays


@pytest.mark.parametrize("num_buckets", [1, 2])
def test_an_empty_batch_has_an_empty_result(num_buckets):
    model = spread(quantize(OneLayer(nn.Linear(6, 4)), num_buckets=num_buckets))
    y = model(torch.zeros(0, 6), torch.zeros(0))
    y.sum().backward()
    assert y.shape == (0, 4)


# --------------------------------------------------------------------------------------------------
# Checkpointing
# --------------------------------------------------------------------------------------------------


class Checkpointed(Net):
    """A net that leaves it to self.run how a block is run; without mix."""

    def forward(self, x, time):
        h = self.norm(self.conv_in(x))
        return self.conv_out(self.run(self.block, h))


def run_plainly(block, x):
    return block(x)


def gradients_of_block(model):
    return [delta.grad.clone() for name, delta in deltas(model).items() if "block" in name]


def test_checkpointed_blocks_are_told_their_timesteps_again():
    model = spread(quantized(2, net=Checkpointed))
    batches = [
        (torch.randn(2, 3, 8, 8), torch.tensor([1, 900])),
        (torch.randn(2, 3, 8, 8), torch.tensor([800, 2])),
    ]
    found = []
    contexts = {"use_reentrant": False, "context_fn": checkpoint_contexts}
    for run in (run_plainly, partial(checkpoint, **contexts)):
        model.run = run
        losses = [model(*batch).square().sum() for batch in batches]
        sum(losses).backward()  # two forwards before one backward
        found.append(gradients_of_block(model))
        model.zero_grad()
    assert current.batch is None
    for plain, checkpointed in zip(*found):
        assert torch.equal(plain, checkpointed)
        assert plain.any()


def test_without_its_contexts_a_checkpointed_block_says_what_is_missing():
    model = quantized(2, net=Checkpointed)
    model.run = partial(checkpoint, use_reentrant=False)
    with pytest.raises(RuntimeError, match="see checkpoint_contexts"):
        model(torch.randn(2, 3, 8, 8), MIXED).sum().backward()


def test_backward_through_a_checkpoint_may_run_twice():
    model = spread(quantized(2, net=Checkpointed))
    model.run = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)
    loss = model(torch.randn(2, 3, 8, 8), MIXED).sum()
    loss.backward(retain_graph=True)
    once = gradients_of_block(model)
    loss.backward()
    for grad, twice in zip(once, gradients_of_block(model)):
        torch.testing.assert_close(twice, 2 * grad)


def test_backward_inside_a_call_leaves_that_one_its_timesteps():
    model = spread(quantized(2, net=Checkpointed))
    model.run = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_contexts)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x, MIXED)
    loss = model(x, MIXED.flip(0)).sum()
    model.norm.register_forward_hook(lambda *_: loss.backward(retain_graph=True))
    assert torch.equal(model(x, MIXED), expected)


# --------------------------------------------------------------------------------------------------
# torch.compile, GPUs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [[3, 4], [1, 900]])
def test_torch_compile_sees_all_layers_in_one_graph(t):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    model = spread(quantized(2))
    layers = [module for module in model.modules() if isinstance(module, QuantLayer)]
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
# Autocast and half precision
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALF, torch.float64])
def test_weights_biases_and_outputs_have_the_dtype_of_the_model_and_scales_at_least_float32(dtype):
    model = quantized(2).to(dtype)
    y = model(torch.randn(2, 3, 8, 8, dtype=dtype), MIXED)
    y.sum().backward()
    assert y.dtype == dtype
    assert model.mix.weight.dtype == dtype
    assert model.conv_in.bias.dtype == dtype
    assert model.mix.codes.dtype == torch.uint8

    precise = torch.promote_types(dtype, torch.float32)
    assert model.mix.s_in.dtype == precise
    assert model.mix.d_in_1.dtype == precise
    assert model.mix.d_in_1.grad.dtype == precise
    back = model.float()
    assert back.conv_in.bias.dtype == back.mix.weight.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_leaves_codes_scales_and_deltas_as_they_are(dtype):
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight[0] *= 1e-4  # a scale that float16 could not hold
        layer.weight[:, 1] *= 1e-3
    model = spread(quantize(OneLayer(layer)))
    w = model.layer.dequantize()
    before = copy.deepcopy(deltas(model))
    model.to(dtype)
    assert torch.equal(model.layer.dequantize(dtype=torch.float32), w)
    for name, delta in deltas(model).items():
        assert torch.equal(delta, before[name])
    y = model(torch.randn(3, 6, dtype=dtype))
    assert y.dtype == dtype
    assert y.isfinite().all()


def test_a_cast_leaves_the_integers_alone():
    model = quantized(2).type(torch.float64)
    assert model.block[0].codes.dtype == torch.uint8
    assert model.block[0].s_out.dtype == torch.float64
    model(torch.randn(2, 3, 8, 8).double(), MIXED)


def test_deltas_of_a_bfloat16_model_do_not_stall():
    model = quantize(OneLayer(nn.Linear(6, 8))).to(torch.bfloat16)
    optimizer = torch.optim.SGD(deltas(model).values(), lr=1)
    for _ in range(100):
        for delta in deltas(model).values():
            delta.grad = torch.full_like(delta, -0.0041)
        optimizer.step()
    for delta in deltas(model).values():
        torch.testing.assert_close(delta, torch.full_like(delta, 0.41), rtol=1e-4, atol=0)


def test_grad_scaler_accepts_the_deltas_of_a_float16_model():
    model = quantize(OneLayer(nn.Linear(6, 8))).half()
    optimizer = torch.optim.Adam(deltas(model).values(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.randn(3, 6).half()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    for delta in deltas(model).values():
        assert delta.grad.dtype == torch.float32
        assert delta.any()


@pytest.mark.parametrize("dtype", HALF)
def test_a_bias_that_trains_in_half_precision_gets_a_gradient_of_its_dtype(dtype):
    model = quantized(2).to(dtype)
    model.conv_in.bias.requires_grad_(True)
    model(torch.randn(2, 3, 8, 8, dtype=dtype), MIXED).float().square().sum().backward()
    assert model.conv_in.bias.grad.dtype == dtype
    assert model.conv_in.bias.grad.any()


def test_autocast_computes_in_bfloat16_and_trains_in_float32():
    model = quantized(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8), MIXED)
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


@pytest.mark.parametrize("bias", [0, 100])
@pytest.mark.parametrize("t", [[0, 0, 0, 0], [0, 999, 0, 999]], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_large_bias_does_not_blur_the_gradient_under_bfloat16_autocast(bias, t, kind):
    layer = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(16, 8, 3, padding=1)
    nn.init.constant_(layer.bias, bias)
    model = spread(quantize(OneLayer(layer), 4, num_buckets=2, keep8=()))
    shape = (4, 500, 16) if kind == "linear" else (4, 16, 12, 12)
    x = torch.randn(shape)
    t = torch.tensor(t)
    g = torch.randn(model(x, t).shape)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            y = model(x, t)
        y.backward(g.to(y.dtype))
        found[dtype] = model.layer.delta("d_out", 0).grad
        model.zero_grad()
    error = (found[torch.bfloat16] - found[torch.float32]).norm() / found[torch.float32].norm()
    assert error < 0.02


# --------------------------------------------------------------------------------------------------
# Merged copies
# --------------------------------------------------------------------------------------------------


def test_a_merged_copy_has_no_trace_of_quantization_and_the_model_stays():
    model = quantized(2)
    plain = merge(model, 1)
    assert not hasattr(plain, "quant_config")
    assert not hasattr(plain, "quant_hooks")
    assert not plain._forward_pre_hooks
    assert not plain._forward_pre_hooks_with_kwargs
    assert not plain._forward_hooks
    assert not plain._forward_hooks_always_called
    assert not plain._state_dict_hooks
    assert not plain._load_state_dict_pre_hooks
    model(torch.randn(2, 3, 8, 8), MIXED)
    quantize(plain, num_buckets=2, timestep="time")


def test_a_merged_copy_keeps_the_dtype_and_the_mode_of_the_model():
    plain = merge(quantized(1).to(torch.bfloat16).eval())
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in plain.modules())


class Around(nn.Module):
    """A model around another, which takes its timesteps."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.mix = nn.Linear(8, 4)

    def forward(self, x, t=0):
        return self.mix(self.inner(x, t))


def test_a_quantized_model_inside_another_trains_on_and_may_be_merged():
    inner = quantize(OneLayer(nn.Linear(6, 8)), num_buckets=2)
    outer = quantize(Around(inner), num_buckets=4, keep_float="inner")
    assert all(delta.requires_grad for delta in deltas(outer).values())
    x = torch.randn(2, 6)
    spread(outer)
    y = outer(x, torch.tensor([999, 999]))
    outer.inner = merge(outer.inner, 1)
    torch.testing.assert_close(merge(outer, 3)(x), y)


# --------------------------------------------------------------------------------------------------
# What libraries and users do around a model
# --------------------------------------------------------------------------------------------------


def test_a_default_device_does_not_reach_the_buckets():
    """Tensors that are made without a device would be on it. "meta" stands for a GPU here."""
    model = spread(quantized(3))
    x = torch.randn(3, 3, 8, 8)
    t = torch.tensor([1, 400, 900])
    before = model(x, t)
    torch.set_default_device("meta")
    try:
        assert torch.equal(model(x, t), before)
        assert model.state_dict()["quant_edges"].device.type == "cpu"
        saved = adapter(model)
        load_adapter(model, saved)
    finally:
        torch.set_default_device(None)


def test_a_forward_that_an_add_on_has_replaced_is_known_by_its_class():
    model = spread(quantized(2))
    x = torch.randn(2, 3, 8, 8)
    before = [model(x, t) for t in (1, 900)]
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    for t, y in zip((1, 900), before):
        assert torch.equal(model(x, t), y)
        assert torch.equal(model(x, time=t), y)

    again = Net()
    original = again.forward
    again.forward = lambda *args, **kwargs: original(*args, **kwargs)
    quantize(again, num_buckets=2, timestep="time")
    with pytest.raises(ValueError, match="give it 'time'"):
        again(x, None)


class Skips(nn.Module):
    """Adds a skip in place, as many UNets do."""

    def __init__(self, kernel_size):
        super().__init__()
        self.layer = nn.Conv2d(4, 4, kernel_size, padding=kernel_size // 2)

    def forward(self, x):
        h = self.layer(x)
        h += x
        return h


def test_a_sum_in_place_after_a_layer_that_keeps_its_output_says_what_to_write():
    model = quantize(Skips(1), keep8=())
    y = model(torch.randn(2, 4, 6, 6))
    with pytest.raises(RuntimeError, match=r"QuantConv2d\(4x4x1x1.*write h = h \+ skip"):
        y.sum().backward()


def test_a_sum_in_place_after_columns_by_position_does_no_harm():
    """Such a layer doesn't keep its output."""
    model = quantize(Skips(3), keep8=())
    x = torch.randn(2, 4, 6, 6)
    model(x).square().sum().backward()
    in_place = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    (model.layer(x) + x).square().sum().backward()
    for grad, p in zip(in_place, (p for p in model.parameters() if p.requires_grad)):
        assert torch.equal(grad, p.grad)


def test_a_merged_copy_requires_the_gradients_that_the_float_model_did():
    net = Net()
    net.norm.weight.requires_grad_(False)  # as a position embedding of a DiT
    net.register_parameter("count", nn.Parameter(torch.tensor(3), requires_grad=False))
    before = {name: p.requires_grad for name, p in net.named_parameters()}
    quantize(net, timestep="time")
    plain = merge(net)
    assert {name: p.requires_grad for name, p in plain.named_parameters()} == before


def test_an_adapter_of_a_sharded_model_is_that_of_the_whole(tmp_path):
    """fully_shard, in one process."""
    from torch.distributed.fsdp import fully_shard

    model = spread(quantized(2))
    expected = adapter(model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        saved = adapter(model)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(saved["deltas"], expected["deltas"])
    assert saved["fingerprint"] == expected["fingerprint"]

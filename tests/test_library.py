"""What a user of quant.py brings: layers that aren't plain, wrappers, half precision, bad adapters.

Each is either right or refused in one sentence, and a refusal leaves the model as it was.
"""

import copy
import threading

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import spread
from test_quant import OneLayer
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import quant
from quant import (
    QuantLayer,
    adapter,
    current,
    deltas,
    fingerprint,
    load_adapter,
    merge,
    quantize,
    remember,
)


class Net(nn.Module):
    """Two layers, and a timestep that nothing but the buckets looks at."""

    def __init__(self, first=None):
        super().__init__()
        self.first = first or nn.Linear(6, 8)
        self.last = nn.Linear(8, 4)

    def forward(self, x, t=0):
        return self.last(F.silu(self.first(x)))


# --------------------------------------------------------------------------------------------------
# Layers that aren't plain


class Standardized(nn.Linear):
    """Weight standardization, as BiT has it."""

    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


class Plain(nn.Linear):
    """A subclass that changes nothing."""


class WithModule(nn.Module):
    """As DistributedDataParallel and DataParallel name what they wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def with_hook():
    layer = nn.Linear(6, 8)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def with_forward_of_its_own():
    layer = nn.Linear(6, 8)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


REFUSED = {
    "subclass": (lambda: Standardized(6, 8), "Standardized with a forward of its own"),
    "conv subclass": (lambda: OwnConv(6, 8, 1), "OwnConv with a _conv_forward of its own"),
    "forward hook": (with_hook, "hooks"),
    "forward replaced": (with_forward_of_its_own, "forward of its own"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(6, 8)), "hooks"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(6, 8)), "hooks"),
    "no weights": (lambda: nn.Linear(6, 0), "has no weights"),
    "meta": (lambda: nn.Linear(6, 8, device="meta"), "has no weights"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_not_plain_is_refused_by_name(name):
    make, reason = REFUSED[name]
    model = Net(make())
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=f"layer 'first' .*{reason}.*keep_float"):
        quantize(model)
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[key] is after[key] for key in before)
    assert all(p.requires_grad for p in model.parameters())
    quantize(model, keep_float="first")
    assert isinstance(model.last, quant.QuantLinear)


def test_a_subclass_that_changes_nothing_is_quantized():
    assert isinstance(quantize(Net(Plain(6, 8))).first, quant.QuantLinear)


def test_parametrizations_are_quantized_as_they_are_now():
    layer = parametrizations.weight_norm(nn.Linear(6, 8))
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(3)
    weight = layer.weight.detach().clone()
    model = quantize(Net(layer), 8)
    torch.testing.assert_close(model.first.weight, weight, rtol=0.02, atol=0.02)


class Mixed(nn.Module):
    """A parametrization with a layer of its own."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, weight):
        return self.mix(weight)


def test_a_layer_of_a_parametrization_goes_with_it():
    layer = nn.Linear(6, 8)
    parametrize.register_parametrization(layer, "weight", Mixed())
    weight = layer.weight.detach().clone()
    model = quantize(Net(layer), 8)
    torch.testing.assert_close(model.first.weight, weight, rtol=0.02, atol=0.02)


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
    model = quantize(Net(layer))
    assert torch.equal(model.state_dict()["first.bias"], bias)
    assert not model.first.bias.requires_grad
    other = quantize(Net())
    other.load_state_dict(copy.deepcopy(model).state_dict())
    assert fingerprint(other) == fingerprint(model)
    x = torch.randn(3, 6)
    assert torch.equal(other(x), model(x))


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="quantize it first, then compile it"):
        quantize(torch.compile(Net()))


class NamesNothing(WithModule):
    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_that_names_no_arguments_is_refused_if_timesteps_matter():
    with pytest.raises(ValueError, match="names no arguments.*quantize the model inside"):
        quantize(NamesNothing(Net()), num_buckets=2)
    quantize(NamesNothing(Net()))


def test_a_transformer_layer_that_bypasses_its_layers_is_refused():
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, batch_first=True))
    with pytest.raises(ValueError, match="TransformerEncoderLayer"):
        quantize(model, keep_float="*.self_attn")


def test_an_error_in_calibration_leaves_the_model_as_it_was(monkeypatch):
    calls = []

    def fails_the_second_time(w, n_bits):
        calls.append(w)
        if len(calls) == 2:
            raise MemoryError
        return quant.CALIBRATIONS["minmax"](w, n_bits)

    monkeypatch.setitem(quant.CALIBRATIONS, "mse", fails_the_second_time)
    model = Net()
    with pytest.raises(MemoryError):
        quantize(model, calibration="mse")
    assert type(model.first) is type(model.last) is nn.Linear
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "quant_config")


# --------------------------------------------------------------------------------------------------
# Arguments


def test_a_pattern_may_be_a_string():
    model = quantize(Net(), keep_float="last")
    assert isinstance(model.first, quant.QuantLinear) and type(model.last) is nn.Linear


@pytest.mark.parametrize("argument", ["keep_float", "keep8"])
def test_a_pattern_that_fits_nothing_is_refused(argument):
    model = Net()
    with pytest.raises(ValueError, match=f"{argument} has 'midle'"):
        quantize(model, **{argument: ["midle"]})
    assert type(model.first) is nn.Linear


def test_a_layer_that_one_of_its_names_keeps_float_stays_shared():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["c"] = model["a"]
    shared = model["a"]
    quantize(model, 4, keep_float=["c"])
    assert model["a"] is model["c"] is shared
    assert isinstance(model["b"], QuantLayer)


def test_a_model_is_not_quantized_twice():
    model = quantize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), 4, keep_float=["1"])
    with pytest.raises(ValueError, match="is quantized already; give the float model, or merge"):
        quantize(model, 4, keep_float=["0"])
    quantize(merge(model), 4)


def test_a_layer_alone_is_refused_by_what_it_is():
    with pytest.raises(ValueError, match="^the model itself is a Linear: give"):
        quantize(nn.Linear(4, 4))


@pytest.mark.parametrize(
    "num_buckets, T, sentence",
    [(0, 0.5, "at least 1, not 0"), (0, 10, "at least 1, not 0"), (11, 10, "at most 10, the time")],
)
def test_a_number_of_buckets_out_of_range_says_the_range(num_buckets, T, sentence):
    with pytest.raises(ValueError, match=f"num_buckets must be {sentence}"):
        quantize(nn.Sequential(nn.Linear(4, 4)), 4, num_buckets, T)


@pytest.mark.parametrize("T", [0, -1, float("nan"), float("inf")])
def test_a_time_that_is_no_positive_number_is_refused(T):
    with pytest.raises(ValueError, match="T must be a positive number"):
        quantize(Net(), num_buckets=2, T=T)


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        quantize(nn.Sequential(nn.ReLU()))
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        quantize(Net(), keep_float="*")


# --------------------------------------------------------------------------------------------------
# Calls


def test_an_interrupted_call_leaves_the_next_one_right():
    model = spread(quantize(Net(), num_buckets=2))
    x = torch.randn(2, 6)
    t = torch.tensor([0, 999])
    y = model(x, t)

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = model.last.register_forward_hook(interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            model(x, torch.tensor([999, 999]))
        hook.remove()
        assert torch.equal(model(x, t), y)
    finally:
        current.batch = None  # PyTorch calls no hooks after KeyboardInterrupt, so its batch stays


def test_a_model_that_calls_itself_returns_to_its_own_timesteps():
    model = spread(quantize(Net(), num_buckets=2))
    x = torch.randn(2, 6)
    t = torch.tensor([0, 999])
    y = model(x, t)
    inner = []

    def call_again(module, args, out):
        if not inner:
            inner.append(None)
            inner.append(model(x, torch.tensor([999, 0])))

    hook = model.first.register_forward_hook(call_again)
    assert torch.equal(model(x, t), y)
    hook.remove()
    assert torch.equal(inner[1], model(x, torch.tensor([999, 0])))
    assert current.batch is None


def test_backward_through_a_checkpoint_may_run_twice():
    model = spread(quantize(Net(), 4, 2))
    x = torch.randn(3, 6)
    t = torch.tensor([0, 999, 0])

    def run(x):
        return checkpoint(model.first, x, use_reentrant=False, context_fn=remember)

    model.forward = lambda x, t: model.last(F.silu(run(x)))
    y = model(x, t).sum()
    y.backward(retain_graph=True)
    once = [delta.grad.clone() for delta in deltas(model).values()]
    y.backward()
    for grad, delta in zip(once, deltas(model).values()):
        torch.testing.assert_close(delta.grad, 2 * grad)


def test_data_parallel_replicas_compute_the_same():
    """As nn.DataParallel makes and calls them: copies whose parameters are tensors, in threads."""
    model = spread(quantize(Net(), num_buckets=2))
    x = torch.randn(4, 6)
    t = torch.tensor([0, 999, 999, 0])
    y = model(x, t)
    found = {}

    def run(part):
        replica = copy.copy(model)
        replica._modules = {}
        for name, child in model._modules.items():
            copied = child._replicate_for_data_parallel()
            for key, p in child._parameters.items():
                setattr(copied, key, p.detach().clone())
            replica._modules[name] = copied
        rows = slice(2 * part, 2 * part + 2)
        found[part] = replica(x[rows], t[rows])

    threads = [threading.Thread(target=run, args=(part,)) for part in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.cat([found[0], found[1]]), y)


@pytest.mark.parametrize("num_buckets", [1, 2])
def test_an_empty_batch_has_an_empty_result(num_buckets):
    model = spread(quantize(Net(), num_buckets=num_buckets))
    y = model(torch.zeros(0, 6), torch.zeros(0))
    y.sum().backward()
    assert y.shape == (0, 4)


# --------------------------------------------------------------------------------------------------
# Half precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_and_large_rows_survive_half_precision(dtype):
    layer = nn.Linear(6, 8)
    with torch.no_grad():
        layer.weight[0] *= 1e-4
        layer.weight[:, 1] *= 1e-3
    model = quantize(Net(layer)).to(dtype)
    w = model.first.dequantize(dtype=torch.float32)
    assert w.isfinite().all() and w[0].any() and w[:, 1].any()
    y = model(torch.randn(3, 6, dtype=dtype))
    assert y.dtype == dtype and y.isfinite().all()


def test_deltas_of_a_bfloat16_model_do_not_stall():
    torch.manual_seed(0)
    model = quantize(Net()).to(torch.bfloat16)
    optimizer = torch.optim.SGD(deltas(model).values(), lr=1)
    for _ in range(100):
        for delta in deltas(model).values():
            delta.grad = torch.full_like(delta, -0.0041)
        optimizer.step()
    for delta in deltas(model).values():
        torch.testing.assert_close(delta, torch.full_like(delta, 0.41), rtol=1e-4, atol=0)


def test_grad_scaler_accepts_the_deltas_of_a_float16_model():
    model = quantize(Net()).half()
    optimizer = torch.optim.Adam(deltas(model).values(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.randn(3, 6).half()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert all(
        delta.grad.dtype == torch.float32 and delta.any() for delta in deltas(model).values()
    )


@pytest.mark.parametrize("bias", [0, 10, 100])
@pytest.mark.parametrize("t", [[0, 0, 0, 0], [0, 999, 0, 999]], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_large_bias_does_not_blur_the_gradient_under_bfloat16_autocast(bias, t, kind):
    torch.manual_seed(0)
    layer = nn.Linear(16, 8) if kind == "linear" else nn.Conv2d(16, 8, 3, padding=1)
    nn.init.constant_(layer.bias, bias)
    model = OneLayer(layer)
    quantize(model, 4, num_buckets=2, keep8=())
    spread(model)
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
# Layout and devices


def test_codes_do_not_depend_on_the_memory_layout():
    torch.manual_seed(0)
    float_model = nn.Sequential(nn.Conv2d(8, 12, 3), nn.Conv2d(12, 4, 3, groups=2))
    one = quantize(copy.deepcopy(float_model), 3)
    two = quantize(float_model.to(memory_format=torch.channels_last), 3)
    assert fingerprint(one) == fingerprint(two)


def test_a_model_survives_meta_and_to_empty():
    model = quantize(Net(), num_buckets=2)
    saved = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(saved)
    for name, value in model.state_dict().items():
        assert value.dtype == saved[name].dtype and torch.equal(value, saved[name]), name


# --------------------------------------------------------------------------------------------------
# Adapters


class Normed(Net):
    """With BatchNorm, whose running statistics change in training, and a layer with two names."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.again = self.last

    def forward(self, x, t=0):
        return self.again(self.norm(self.first(x)))


def test_an_adapter_fits_its_base_after_training_with_batch_norm_and_a_shared_layer():
    torch.manual_seed(0)
    base = quantize(Normed())
    model = copy.deepcopy(base).train()
    model(torch.randn(16, 6))
    spread(model)
    assert not torch.equal(model.norm.running_mean, base.norm.running_mean)
    load_adapter(base, adapter(model))
    assert torch.equal(base.first.d_out_0, model.first.d_out_0.half().float())


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: WithModule(model)])
def test_an_adapter_of_a_wrapped_model_fits_the_model(wrap):
    model = spread(quantize(Net()))
    wrapped = wrap(model)
    assert fingerprint(wrapped) == fingerprint(model)
    assert list(deltas(wrapped)) == list(deltas(model))
    load_adapter(copy.deepcopy(model), adapter(wrapped))
    load_adapter(wrapped, adapter(model))
    x = torch.randn(3, 6)
    torch.testing.assert_close(merge(wrapped)(x), merge(model)(x))


def test_numpy_numbers_are_stored_as_pythons_own(tmp_path):
    edges = list(np.array([0, 10, 1000]))
    model = quantize(Net(), np.int64(4), edges=edges)
    torch.save(adapter(model), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["quant_config"]["n_bits"] == 4 and saved["quant_config"]["edges"] == [0, 10, 1000]


@pytest.mark.parametrize("wrap", [torch.compile, lambda model: WithModule(model)])
def test_what_else_was_trained_travels_between_a_model_and_a_wrapped_one(wrap):
    def tuned():
        torch.manual_seed(0)
        return quantize(nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)), 4)

    wrapped = wrap(tuned())
    name = next(name for name, _ in wrapped.named_parameters() if name.endswith("1.weight"))
    with torch.no_grad():
        wrapped.get_parameter(name).fill_(3)
    saved = adapter(wrapped, also=(n for n in [name]))  # names may come from a generator
    assert saved["also"].keys() == {"1.weight"}

    model = tuned()
    load_adapter(model, saved)
    assert (model[1].weight == 3).all()
    back = wrap(tuned())
    load_adapter(back, adapter(model, also=["1.weight"]))
    assert (back.get_parameter(name) == 3).all()


class ModuleAndMore(nn.Module):
    """A model of its own with a child called module, as wrappers have."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.module = nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.full((4,), 3.0))
        self.again = self.module


def test_parameters_are_told_apart_by_name_and_by_identity():
    model = quantize(ModuleAndMore(), 4)
    with torch.no_grad():
        model.module.weight.fill_(7)
    saved = adapter(model, also=["weight", "again.weight"])
    assert (saved["also"]["weight"] == 3).all()
    assert (saved["also"]["module.weight"] == 7).all()
    before = fingerprint(model)
    with torch.no_grad():
        model.weight.fill_(1)
    assert fingerprint(model) != before  # weight isn't trained, unless also says so
    with torch.no_grad():
        model.module.weight.fill_(2)
    load_adapter(model, saved)
    assert (model.module.weight == 7).all() and (model.weight == 3).all()


def test_an_adapter_does_not_change_with_the_model():
    model = quantize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 4).half()
    saved = adapter(model, also=["1.weight"])
    with torch.no_grad():
        model[1].weight.fill_(9)
    assert (saved["also"]["1.weight"] == 1).all()


def test_one_name_may_be_given_alone():
    model = quantize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 4)
    assert adapter(model, also="1.weight")["also"].keys() == {"1.weight"}


def with_norm():
    """A quantized layer and a norm, always the same."""
    torch.manual_seed(0)
    return quantize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))


NORM = ["1.weight", "1.bias"]


def test_any_parameter_may_travel():
    model = with_norm()
    with torch.no_grad():
        model[1].weight.fill_(1.5)
        model[1].bias.fill_(-0.25)
        deltas(model)["0.d_out_0"].fill_(0.125)
    saved = adapter(model, NORM)
    other = with_norm()
    load_adapter(other, saved)
    x = torch.randn(3, 4)
    assert torch.equal(other(x), model(x))


def test_what_float16_cannot_hold_travels_as_it_is():
    model = with_norm()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1 + 2**-20, 1e6, 1e-12, -3.0]))
    other = with_norm()
    load_adapter(other, adapter(model, NORM))
    assert torch.equal(other[1].weight, model[1].weight)


@pytest.mark.parametrize(
    "also, sentence",
    [
        ({"1.weight": torch.full((4,), torch.nan)}, "1.weight"),
        ({"1.weight": torch.zeros(1)}, "1.weight"),
        ({"1.weight": None}, "1.weight"),
        ({"2.weight": torch.zeros(4)}, "another base"),
        ({}, "other weights"),
        (None, "another base"),
        ([], "another base"),
    ],
)
def test_what_doesnt_fit_is_refused_and_changes_nothing(also, sentence):
    model = with_norm()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved = adapter(model, ["1.weight"])
    saved["deltas"] = saved["deltas"] + 1
    saved["also"] = also
    with pytest.raises(ValueError, match=sentence):
        load_adapter(model, saved)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_patterns_of_another_order_are_the_same_base():
    def base(keep8):
        torch.manual_seed(0)
        return quantize(nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]), 4, keep8=keep8)

    load_adapter(base(["0", "1"]), adapter(base(["1", "0"])))
    with pytest.raises(ValueError, match="of keep8"):
        load_adapter(base(["0", "1"]), adapter(base(["1", "2"])))


def test_a_name_of_no_parameter_is_refused():
    model = quantize(nn.Sequential(nn.Linear(6, 5)), 4)
    with pytest.raises(ValueError, match="also has 'word', which is no parameter"):
        adapter(model, also=["word"])


def test_a_parameter_of_the_wrapper_itself_is_refused():
    wrapper = WithModule(quantize(nn.Sequential(nn.Linear(6, 5)), 4))
    wrapper.word = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="also has 'word', which is no parameter"):
        adapter(wrapper, also=["word"])


def test_a_delta_that_float16_cannot_hold_is_not_saved():
    model = quantize(Net())
    with torch.no_grad():
        model.first.d_out_0[0] = 70000
    with pytest.raises(ValueError, match="a delta isn't finite: the training has diverged"):
        adapter(model)


def test_what_else_is_not_finite_is_not_saved():
    model = with_norm()
    with torch.no_grad():
        model[1].weight[0] = torch.nan
    with pytest.raises(ValueError, match="1.weight isn't finite: the training has diverged"):
        adapter(model, also=["1.weight"])


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(n_bits=3), "n_bits 3 instead of 4"),
        (dict(num_buckets=2), "edges"),
        (dict(scales="out"), "scales"),
        (dict(keep_float="last"), "keep8|keep_float"),
    ],
)
def test_a_refused_adapter_says_what_differs(kwargs, word):
    saved = adapter(quantize(Net(), **kwargs))
    with pytest.raises(ValueError, match=f"another base, of ({word})"):
        load_adapter(quantize(Net()), saved)


BAD_DELTAS = {
    "column": lambda values: values[:, None],
    "list": lambda values: values.tolist(),
    "none": lambda values: None,
    "short": lambda values: values[1:],
    "nan": lambda values: values * float("nan"),
    "complex": lambda values: values.to(torch.complex64),
    "sparse": lambda values: values.to_sparse(),
    "expanded": lambda values: values[:1].expand(10**9),
    "text": lambda values: "all of them",
}


@pytest.mark.parametrize("name", BAD_DELTAS)
def test_damaged_deltas_are_refused_and_the_model_stays(name):
    torch.manual_seed(0)
    model = spread(quantize(Net()))
    before = copy.deepcopy(model.state_dict())
    saved = adapter(model)
    saved["deltas"] = BAD_DELTAS[name](saved["deltas"])
    with pytest.raises(ValueError, match="damaged"):
        load_adapter(model, saved)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleList([model, model])])
def test_a_model_that_is_not_quantized_has_no_adapter(wrap):
    saved = adapter(quantize(Net()))
    model = wrap(Net())
    for act in (adapter, merge, lambda model: load_adapter(model, saved)):
        with pytest.raises(ValueError, match="isn't quantized.*call quantize first"):
            act(model)


def test_an_adapter_after_one_with_more_than_deltas_is_told_why():
    def base():
        torch.manual_seed(0)
        return quantize(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)), 4)

    model, tuned = base(), base()
    with torch.no_grad():
        tuned[1].weight.fill_(2)
    load_adapter(model, adapter(tuned, ["1.weight"]))
    with pytest.raises(ValueError, match="an adapter with more than deltas changes them"):
        load_adapter(model, adapter(base()))


@pytest.mark.parametrize("saved", [None, [], {}, {"quant_config": "none"}])
def test_what_is_no_adapter_is_refused(saved):
    with pytest.raises(ValueError, match="no quant_config"):
        load_adapter(quantize(Net()), saved)


# --------------------------------------------------------------------------------------------------
# Merged copies


def test_a_layer_whose_hooks_would_be_lost_is_not_merged():
    model = quantize(nn.Sequential(nn.Linear(4, 4)), 4)
    hooks = [
        lambda: model[0].register_forward_hook(lambda layer, args, y: 2 * y),
        lambda: model[0].register_full_backward_pre_hook(lambda layer, g: None),
    ]
    for register in hooks:
        hook = register()
        with pytest.raises(ValueError, match="layer '0' has hooks that would be lost"):
            merge(model)
        hook.remove()
    merge(model)


def test_a_merged_copy_is_a_plain_model_that_trains():
    model = spread(quantize(Normed(), num_buckets=2))
    plain = merge(model, 1)
    assert not hasattr(plain, "quant_config")
    assert not plain._forward_pre_hooks and not plain._forward_pre_hooks_with_kwargs
    assert not plain._forward_hooks and not plain._forward_hooks_always_called
    assert plain.last is plain.again and type(plain.last) is nn.Linear
    assert all(p.requires_grad for p in plain.parameters())
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"no bucket {index}"):
            merge(model, index)


class Around(nn.Module):
    """A model around another."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.mix = nn.Linear(4, 4)

    def forward(self, x, t=0):
        return self.mix(self.inner(x, t))


def test_a_quantized_model_inside_another_trains_and_is_merged_first():
    outer = quantize(Around(quantize(Net(), num_buckets=2)), num_buckets=4, keep_float="inner")
    assert all(delta.requires_grad for delta in deltas(outer).values())
    with pytest.raises(ValueError, match="'inner' is a quantized model inside"):
        merge(outer, 3)
    x = torch.randn(2, 6)
    spread(outer)
    y = outer(x, torch.tensor([999, 999]))
    outer.inner = merge(outer.inner, 1)
    torch.testing.assert_close(merge(outer, 3)(x), y)

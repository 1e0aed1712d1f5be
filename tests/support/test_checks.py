"""What quantize, load_adapter and merge refuse: by name, in a sentence, and before any change."""

import copy
import itertools
import random
from collections import OrderedDict
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import spread
from test_quant import Net, OneLayer, quantized

import quant
from quant import QuantLayer, adapter, deltas, load_adapter, merge, quantize
from support.checks import MOST_BATCHES, as_batches


def state_of(model):
    """All that a refusal must leave alone: modules, values, what trains, modes, hooks, config."""
    hooks = [
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    ]
    return {
        "modules": dict(model.named_modules(remove_duplicate=False)),
        "values": {
            name: value if value.is_meta else value.clone()
            for name, value in model.state_dict().items()
        },
        "trained": [name for name, p in model.named_parameters() if p.requires_grad],
        "modes": [module.training for module in model.modules()],
        "inplace": [getattr(module, "inplace", None) for module in model.modules()],
        "hooks": hooks,
        "config": copy.deepcopy(getattr(model, "quant_config", None)),
    }


def assert_untouched(model, before):
    """The model is as it was when state_of returned before."""
    after = state_of(model)
    values = before.pop("values")
    found = after.pop("values")
    assert after == before
    assert found.keys() == values.keys()
    for name, value in values.items():
        if not value.is_meta:
            torch.testing.assert_close(found[name], value, rtol=0, atol=0, equal_nan=True)


# --------------------------------------------------------------------------------------------------
# quantize: its arguments
# --------------------------------------------------------------------------------------------------


def with_edges(*edges):
    return {"timestep": "time", "edges": list(edges)}


NAN = float("nan")
ARGUMENTS = [  # and a part of the error
    ({"n_bits": 1}, "n_bits must be 2 to 8, not 1"),
    ({"n_bits": 9}, "n_bits must be 2 to 8, not 9"),
    ({"num_buckets": 0, "T": 0.5}, "num_buckets must be a whole number from 1 on, not 0"),
    ({"num_buckets": 2.5}, "num_buckets must be a whole number from 1 on, not 2.5"),
    ({"num_buckets": "2"}, "num_buckets must be a whole number from 1 on, not '2'"),
    ({"T": 0}, "T must be a positive number"),
    ({"T": -1}, "T must be a positive number"),
    ({"T": NAN}, "T must be a positive number"),
    ({"T": float("inf")}, "T must be a positive number"),
    ({"scales": "in"}, "scales must be out or out\\+in, not in"),
    ({"columns": "kernel"}, "columns must be channel or position, not kernel"),
    ({"calibration": "best"}, "minmax or mse or rowcol or gptq, not best"),
    ({"num_buckets": 2, "timestep": "step"}, "timestep must be x or time, not step"),
    ({"keep8": ["midle"]}, "keep8 has 'midle', which fits no module"),
    ({"keep_float": ["midle"]}, "keep_float has 'midle', which fits no module"),
    ({"keep_float": "*"}, "no Conv2d or Linear"),
    (with_edges(), "edges must be"),
    (with_edges(1000), "edges must be"),
    (with_edges(0, 1000, 1000), "edges must be"),  # an empty bucket
    (with_edges(0, 1200, 1000), "edges must be"),  # decreasing
    (with_edges(0, NAN, 1000), "edges must be"),
]


@pytest.mark.parametrize("kwargs, sentence", ARGUMENTS)
def test_an_argument_out_of_range_is_refused(kwargs, sentence):
    model = Net()
    before = state_of(model)
    with pytest.raises(ValueError, match=sentence):
        quantize(model, **kwargs)
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------------
# quantize: models
# --------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """A wrapper whose forward takes whatever there is."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


def test_a_wrapper_that_names_no_arguments_is_refused_if_timesteps_matter():
    with pytest.raises(ValueError, match="names no arguments.*quantize the model inside"):
        quantize(Wrapper(Net()), num_buckets=2)
    quantize(Wrapper(Net()))


def test_a_compiled_model_is_refused():
    with pytest.raises(ValueError, match="quantize it first, then compile it"):
        quantize(torch.compile(Net()))


def test_a_model_is_not_quantized_twice():
    model = quantized(1, keep_float="mix")
    before = state_of(model)
    with pytest.raises(ValueError, match="is quantized already; give the float model, or merge"):
        quantize(model, keep_float=["conv_in", "block", "conv_out"])
    assert_untouched(model, before)
    quantize(merge(model))


def test_a_layer_alone_is_refused_by_what_it_is():
    with pytest.raises(ValueError, match="^the model itself is a Linear: give"):
        quantize(nn.Linear(4, 4))


def test_a_model_with_nothing_to_quantize_is_refused():
    with pytest.raises(ValueError, match="no Conv2d or Linear"):
        quantize(nn.Sequential(nn.ReLU()))


# --------------------------------------------------------------------------------------------------
# quantize: layers
# --------------------------------------------------------------------------------------------------


class Standardized(nn.Linear):
    """Weight standardization, as BiT has it."""

    def forward(self, x):
        return F.linear(x, (self.weight - self.weight.mean()) / self.weight.std(), self.bias)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, 2 * weight, bias)


def with_hook():
    layer = nn.Linear(3, 3)
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    return layer


def with_forward_of_its_own():
    layer = nn.Linear(3, 3)
    layer.forward = lambda x: 2 * F.linear(x, layer.weight, layer.bias)
    return layer


def broken():
    layer = nn.Linear(3, 3)
    layer.weight.data[1, 1] = NAN
    return layer


class Wrapped(torch.Tensor):
    """A tensor around another, as a DTensor is. It can be copied, and no more."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function not in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            raise NotImplementedError(function)
        return cls(function(args[0].inner, *args[1:], **(kwargs or {})))


def with_values(key, change):
    """A layer whose weight or bias is changed to other values, or other kinds of them."""
    layer = nn.Linear(3, 3)
    values = nn.Parameter(change(getattr(layer, key).detach()), requires_grad=False)
    setattr(layer, key, values)
    return layer


KINDS = {  # of a weight or a bias, and a part of the error
    "float8": (lambda values: values.to(torch.float8_e4m3fn), "torch.float8_e4m3fn: cast .* to bf"),
    "float8 e5m2": (
        lambda values: values.to(torch.float8_e5m2),
        "torch.float8_e5m2: cast .* to bf",
    ),
    "integers": (lambda values: values.to(torch.int8), "torch.int8: cast or dequantize"),
    "complex": (lambda values: values.to(torch.complex64), "torch.complex64: cast"),
    "sparse": (lambda values: values.to_sparse(), "torch.sparse_coo: .*to_dense"),
    "subclass": (Wrapped, "type Wrapped: make it plain by full_tensor.* or dequantize"),
}


@pytest.mark.parametrize("key", ["weight", "bias"])
@pytest.mark.parametrize("name", KINDS)
def test_values_that_cannot_be_read_are_refused_by_the_layers_name(key, name):
    change, sentence = KINDS[name]
    odd = with_values(key, change)
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "odd": odd})
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match=f"layer 'odd' has a {key} of .*{sentence}.*keep_float"):
        quantize(model)
    assert model["odd"] is odd and type(model["first"]) is nn.Linear
    assert all(parameters[name] is p for name, p in model.named_parameters())
    quantize(model, keep_float="odd")
    assert isinstance(model["first"], QuantLayer)


def test_a_layer_that_is_sharded_is_refused_by_its_name(tmp_path):
    """fully_shard, in one process."""
    from torch.distributed.fsdp import fully_shard

    model = TwoLayers()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(ValueError, match="layer 'first' has a weight of type DTensor"):
            quantize(model)
    finally:
        torch.distributed.destroy_process_group()


def test_a_layer_without_a_shape_yet_is_refused_by_its_name():
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "lazy": nn.LazyLinear(3)})
    with pytest.raises(ValueError, match="layer 'lazy' has no weights.*keep_float"):
        quantize(model)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.float8_e4m3fn])
def test_other_parameters_may_be_of_any_dtype(dtype):
    """They are neither quantized nor trained, and go with the model."""

    def make():
        model = Net()
        other = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
        model.register_parameter("other", other)
        return quantize(model, timestep="time")

    torch.manual_seed(0)
    tuned = spread(make())
    torch.manual_seed(0)
    model = make()
    load_adapter(model, adapter(tuned))
    torch.testing.assert_close(deltas(model), deltas(tuned), rtol=1e-3, atol=1e-3)  # as float16
    assert merge(model).other.dtype == dtype


class LoRA(nn.Module):
    """A layer and the two factors of its LoRA, which have names of their own, as in peft."""

    def __init__(self, layer, a, b):
        super().__init__()
        down = nn.Conv2d(4, 2, 3, padding=1, bias=False)
        up = nn.Conv2d(2, 4, 1, bias=False)
        self.base_layer = layer
        self.factors = (a, b)
        self.add_module(a, nn.Sequential(OrderedDict(default=down)))
        self.add_module(b, nn.Sequential(OrderedDict(default=up)))

    def forward(self, x):
        a, b = (self.get_submodule(name) for name in self.factors)
        return self.base_layer(x) + b(a(x))


@pytest.mark.parametrize(
    "a, b", [("lora_A", "lora_B"), ("lora_a", "lora_b"), ("lora_down", "lora_up")]
)
def test_a_lora_is_refused_by_its_name_and_may_stay_float(a, b):
    convs = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(3)]
    model = nn.Sequential(convs[0], convs[1], LoRA(convs[2], a, b))
    for factor, keep_float in ((a, []), (b, [f"*.{a}"])):
        before = state_of(model)
        with pytest.raises(ValueError, match=f"'2.{factor}.default' .* merge it .*keep_float"):
            quantize(model, keep_float=keep_float)
        assert_untouched(model, before)

    x = torch.randn(2, 4, 5, 5)
    quantize(model, keep_float=[f"*.{a}", f"*.{b}"], data=[(x,)])
    bits = {name: m.n_bits for name, m in model.named_modules() if isinstance(m, QuantLayer)}
    assert bits == {"0": 8, "1": 4, "2.base_layer": 8}
    assert model(x).isfinite().all()


LAYERS = {
    "subclass": (lambda: Standardized(3, 3), "Standardized with a forward of its own"),
    "conv subclass": (lambda: OwnConv(3, 3, 1), "OwnConv with a _conv_forward of its own"),
    "forward hook": (with_hook, "hooks"),
    "forward replaced": (with_forward_of_its_own, "forward of its own"),
    "weight_norm": (lambda: nn.utils.weight_norm(nn.Linear(3, 3)), "hooks"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 3)), "hooks"),
    "no weights": (lambda: nn.Linear(3, 0), "has no weights"),
    "meta": (lambda: nn.Linear(3, 3, device="meta"), "has no weights"),
    "nan": (broken, "aren't all finite"),
    "circular": (lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "pads with circ"),
    "uneven": (lambda: nn.Conv2d(2, 2, 2, padding="same"), "pads unevenly"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), "MultiheadAttention"),
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_that_cannot_be_quantized_is_refused_by_name_and_may_stay_float(name):
    make, reason = LAYERS[name]
    model = nn.ModuleDict({"first": nn.Linear(3, 3), "odd": make(), "relu": nn.ReLU(inplace=True)})
    before = state_of(model)
    with pytest.raises(ValueError, match=f"layer 'odd' .*{reason}.*keep_float"):
        quantize(model)
    assert_untouched(model, before)
    quantize(model, keep_float="odd")
    assert isinstance(model["first"], QuantLayer)


def test_a_weight_that_two_layers_share_is_refused():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    before = state_of(model)
    with pytest.raises(ValueError, match="layer '0' shares its weight with another"):
        quantize(model)
    assert_untouched(model, before)


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
    before = state_of(model)
    with pytest.raises(MemoryError):
        quantize(model, calibration="mse")
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------------
# gptq: its data
# --------------------------------------------------------------------------------------------------


class TwoLayers(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.last = nn.Linear(12, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.last(self.first(x))


class Unused(TwoLayers):
    def __init__(self):
        super().__init__()
        self.unused = nn.Linear(2, 2)


class Cached(TwoLayers):
    """Computes its first layer once."""

    cache = None

    def forward(self, x):
        if self.cache is None:
            self.cache = self.first(x)
        return self.last(self.cache)


class Routed(TwoLayers):
    """The second layer sees the samples for which the first one decides so.

    Rounded weights decide differently for some of them.
    """

    def forward(self, x):
        x = self.first(x)
        return self.last(x[x[:, 0] > x[:, 0].round(decimals=1)])


class OwnRandom(TwoLayers):
    """Draws noise by a generator of its own, in a share of its calls."""

    def __init__(self, draw, share=1):
        super().__init__()
        self.draw = draw
        self.share = share
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        x = self.first(x)
        if self.calls % self.share == 0:
            x = x + self.draw(x.shape)
        return self.last(x)


def by_torch():
    generator = torch.Generator().manual_seed(0)
    return OwnRandom(lambda shape: torch.randn(shape, generator=generator))


def by_numpy():
    generator = np.random.default_rng(0)
    return OwnRandom(lambda shape: torch.tensor(generator.normal(size=shape)).float())


def by_numpys_global():
    return OwnRandom(lambda shape: torch.tensor(np.random.normal(size=shape)).float())


def by_python(share=1):
    def draw(shape):
        return torch.tensor([random.gauss(0, 1) for _ in range(shape[-1])])

    return OwnRandom(draw, share)


def by_python_in_the_fourth_call():
    """That is the second one for the second batch."""
    return by_python(share=4)


X = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
DATA = [(X,), (2 * X,)]
NOT_TUPLES = "each batch of data must be a tuple.*one is a"


OTHER_INPUTS = "layer 'last' sees other inputs .* same batch again; .*PyTorch's global generator"


@pytest.mark.parametrize(
    "make, data, sentence",
    [
        (TwoLayers, None, "gptq needs data"),
        (TwoLayers, [], "gptq needs data"),
        (TwoLayers, [X, X], f"{NOT_TUPLES} Tensor"),
        (TwoLayers, X, f"{NOT_TUPLES} Tensor"),
        (TwoLayers, {"x": X}, f"{NOT_TUPLES} str"),
        (TwoLayers, [(X[:, :3],)], "shapes cannot be multiplied"),  # the model's own error
        (TwoLayers, [(X * NAN,)], "layer 'first' .*finite"),
        (TwoLayers, [(X * 3e18 + 3e18,)], "layer 'first' .*too large"),
        (by_torch, DATA, OTHER_INPUTS),
        (by_numpy, DATA, OTHER_INPUTS),
        (by_numpys_global, DATA, OTHER_INPUTS),
        (by_python, DATA, OTHER_INPUTS),
        (by_python_in_the_fourth_call, DATA, OTHER_INPUTS),
        (Unused, DATA, "doesn't reach layer 'unused'.*keep_float"),
        (Cached, DATA, "layer 'first' isn't called in the same way each time.*keep_float"),
        (Routed, DATA, "layer 'last' isn't called in the same way each time.*keep_float"),
    ],
)
def test_data_that_do_not_fit_are_refused(make, data, sentence):
    model = make()
    before = state_of(model)
    with pytest.raises((ValueError, RuntimeError), match=sentence):
        quantize(model, calibration="gptq", data=data)
    assert_untouched(model, before)


def test_data_without_an_end_are_refused():
    read = []

    def endless(batch):
        for number in itertools.count(1):
            read.append(number)
            yield batch

    model = TwoLayers()
    before = state_of(model)
    with pytest.raises(ValueError, match=f"doesn't end after {MOST_BATCHES} batches.*fewer"):
        quantize(model, data=endless((X,)))
    assert len(read) == MOST_BATCHES + 1
    with pytest.raises(ValueError, match=f"{NOT_TUPLES} Tensor"):
        quantize(model, data=endless(X))
    assert len(read) == MOST_BATCHES + 2  # the first says it
    assert_untouched(model, before)
    quantize(model, data=itertools.islice(endless((X,)), 10))  # as the error advises


def test_as_many_batches_as_the_error_says_are_taken():
    batches = [(X,)] * MOST_BATCHES
    assert as_batches(iter(batches)) == batches


def test_inputs_that_cannot_be_solved_for_are_refused_by_the_layers_name(monkeypatch):
    def fails(h):
        raise torch.linalg.LinAlgError("the input is not positive-definite")

    monkeypatch.setattr(torch.linalg, "cholesky", fails)
    model = TwoLayers()
    before = state_of(model)
    with pytest.raises(ValueError, match="layer 'first' .*too much alike.*keep_float"):
        quantize(model, data=DATA)
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------------
# adapter
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: nn.ModuleList([model, model])])
def test_a_model_that_is_not_quantized_has_no_adapter(wrap):
    saved = adapter(quantized(1))
    model = wrap(Net())
    for act in (adapter, merge, lambda model: load_adapter(model, saved)):
        with pytest.raises(ValueError, match="isn't quantized.*call quantize first"):
            act(model)


def test_an_adapter_is_refused_when_nothing_requires_a_gradient_any_more():
    model = quantized(1)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="what was trained can't be told.*before requires_grad_"):
        adapter(model)


def test_what_float16_cannot_hold_is_not_saved():
    model = quantized(1)
    with torch.no_grad():
        model.mix.d_out_0[0] = 70000
    with pytest.raises(ValueError, match="a delta isn't finite: the training has diverged"):
        adapter(model)


def test_a_parameter_that_is_not_finite_is_not_saved():
    model = quantized(1)
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight[0] = NAN
    with pytest.raises(ValueError, match="norm.weight isn't finite: the training has diverged"):
        adapter(model)


# --------------------------------------------------------------------------------------------------
# load_adapter
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs, word",
    [
        (dict(n_bits=3), "n_bits 3 instead of 4"),
        (dict(num_buckets=2), "edges"),
        (dict(num_buckets=3), "edges"),
        (dict(edges=[0, 999]), "edges"),
        (dict(scales="out"), "scales"),
        (dict(keep_float="mix"), "keep_float"),
        (dict(keep8=["conv_in", "mix"]), "keep8"),
    ],
)
def test_an_adapter_of_another_base_says_what_differs(kwargs, word):
    saved = adapter(quantized(**{"num_buckets": 1, **kwargs}))
    model = quantized(1)
    before = state_of(model)
    with pytest.raises(ValueError, match=f"another base, of {word}.*give the quantized model"):
        load_adapter(model, saved)
    assert_untouched(model, before)


def test_an_adapter_of_other_weights_or_another_dtype_is_refused():
    saved = adapter(quantized(1))
    for model in (quantized(1, seed=1), quantized(1).half()):
        before = state_of(model)
        with pytest.raises(ValueError, match="another base, of another dtype or other weights"):
            load_adapter(model, saved)
        assert_untouched(model, before)


def test_other_ways_to_the_same_base_are_no_other_base():
    saved = adapter(quantized(1, keep8=["mix", "conv_in"]))
    load_adapter(quantized(1, keep8=["conv_in", "mix"]), saved)


def test_after_an_adapter_with_more_than_deltas_another_is_told_why_it_does_not_fit():
    tuned = quantized(1)
    tuned.norm.requires_grad_(True)
    with torch.no_grad():
        tuned.norm.weight.fill_(2)
    model = quantized(1)
    load_adapter(model, adapter(tuned))
    with pytest.raises(ValueError, match="an adapter with more than deltas changes them"):
        load_adapter(model, adapter(quantized(1)))


@pytest.mark.parametrize(
    "other, sentence",
    [
        (dict(edges=[0, 300, 1000]), "edges"),
        (dict(num_buckets=2, columns="channel"), "columns"),
        (dict(num_buckets=2, seed=1), "other weights"),
    ],
)
def test_adapters_of_different_bases_do_not_add(other, sentence):
    first = adapter(quantized(2))
    second = adapter(quantized(**{"num_buckets": None, **other}))
    model = spread(quantized(2))
    for number, adapters in ((2, (first, second)), (1, (second, first))):
        before = state_of(model)
        with pytest.raises(ValueError, match=f"adapter {number} was made for .*{sentence}"):
            load_adapter(model, *adapters)
        assert_untouched(model, before)


@pytest.mark.parametrize("strength", [NAN, float("inf"), 1e40, 1e6])
def test_a_strength_that_is_too_large_is_refused(strength):
    model = quantized(1)
    saved = adapter(spread(quantized(1)))
    before = state_of(model)
    with pytest.raises(ValueError, match="times strength .* aren't finite numbers.*lower it"):
        load_adapter(model, saved, strength=strength)
    assert_untouched(model, before)


def test_only_deltas_add_and_can_be_scaled():
    tuned = quantized(1)
    tuned.norm.requires_grad_(True)
    saved = adapter(tuned)
    other = quantized(1)
    other.norm.requires_grad_(True)
    spread(other)
    model = quantized(1)
    for adapters, strength in (((saved, adapter(other)), 1), ((saved,), 0.5)):
        before = state_of(model)
        with pytest.raises(ValueError, match="only deltas.*'norm.weight', too; load it alone"):
            load_adapter(model, *adapters, strength=strength)
        assert_untouched(model, before)
    load_adapter(model, saved)


@pytest.mark.parametrize("saved", [None, [], {}, {"quant_config": "none"}])
def test_what_is_no_adapter_is_refused(saved):
    with pytest.raises(ValueError, match="no quant_config"):
        load_adapter(quantized(1), saved)


DAMAGED_DELTAS = {
    "column": lambda values: values[:, None],
    "list": lambda values: values.tolist(),
    "none": lambda values: None,
    "short": lambda values: values[1:],
    "nan": lambda values: values * NAN,
    "complex": lambda values: values.to(torch.complex64),
    "float8": lambda values: values.to(torch.float8_e4m3fn),
    "sparse": lambda values: values.to_sparse(),
    "expanded": lambda values: values[:1].expand(10**9),
    "text": lambda values: "all of them",
}


@pytest.mark.parametrize("name", DAMAGED_DELTAS)
def test_damaged_deltas_are_refused(name):
    model = spread(quantized(1))
    before = state_of(model)
    saved = adapter(model)
    saved["deltas"] = DAMAGED_DELTAS[name](saved["deltas"])
    with pytest.raises(ValueError, match="damaged: its deltas aren't"):
        load_adapter(model, saved)
    assert_untouched(model, before)


@pytest.mark.parametrize(
    "others, sentence",
    [
        ({"norm.weight": torch.full((6,), NAN)}, "damaged: its norm.weight"),
        ({"norm.weight": torch.zeros(1)}, "damaged: its norm.weight"),
        ({"norm.weight": None}, "damaged: its norm.weight"),
        ({"norm.scale": torch.zeros(6)}, "no parameters that fit"),
        ({}, "other weights"),  # its fingerprint leaves norm.weight out
        (None, "no parameters that fit"),
        ([], "no parameters that fit"),
    ],
)
def test_damaged_parameters_are_refused(others, sentence):
    tuned = quantized(1)
    tuned.norm.weight.requires_grad_(True)
    saved = adapter(tuned)
    saved["deltas"] = saved["deltas"] + 1
    saved["others"] = others
    model = quantized(1)
    before = state_of(model)
    with pytest.raises(ValueError, match=sentence):
        load_adapter(model, saved)
    assert_untouched(model, before)


# --------------------------------------------------------------------------------------------------
# merge
# --------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there_cannot_be_merged():
    model = quantized(2)
    for index in (-1, 2):
        with pytest.raises(IndexError, match=f"no bucket {index}: the last one is 1"):
            merge(model, index)


def test_a_layer_whose_hooks_would_be_lost_is_not_merged():
    model = quantized(1)
    hooks = [
        partial(model.mix.register_forward_hook, lambda layer, args, y: 2 * y),
        partial(model.mix.register_full_backward_pre_hook, lambda layer, g: None),
    ]
    for register in hooks:
        hook = register()
        with pytest.raises(ValueError, match="layer 'mix' has hooks that would be lost"):
            merge(model)
        hook.remove()
    merge(model)


def test_a_quantized_model_inside_another_is_merged_first():
    outer = nn.Sequential(quantize(OneLayer(nn.Linear(4, 4))), nn.Linear(4, 4))
    quantize(outer, keep_float="0")
    with pytest.raises(ValueError, match="'0' is a quantized model inside.*merge it first"):
        merge(outer)

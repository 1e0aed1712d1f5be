"""What quantize, load_adapter and merge refuse: by name, in a sentence, and before any change."""

import copy
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import spread
from test_quant import Net, OneLayer, quantized

import quant
from quant import QuantLayer, adapter, load_adapter, merge, quantize


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
    ({"num_buckets": 0, "T": 0.5}, "num_buckets must be at least 1, not 0"),
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


X = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
DATA = [(X,), (2 * X,)]
NOT_TUPLES = "each batch of data must be a tuple.*one is a"


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

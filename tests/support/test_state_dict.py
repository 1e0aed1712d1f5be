"""What travels: edges in a state_dict, what trains in an adapter, through wrappers and copies."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import spread
from test_quant import Net, OneLayer, quantized

from quant import adapter, deltas, load_adapter, merge, quantize

EDGES = [0, 250, 1000]
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
T = torch.tensor([1, 300, 600, 900])  # the second sample's bucket depends on the edges


class DataParallel(nn.Module):
    """As DataParallel and DistributedDataParallel name what they wrap."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x, time):
        return self.module(x, time)


def unchanged(model):
    return model


WRAPPERS = [unchanged, DataParallel, torch.compile]


def pickled(model):
    """A copy of model, by way of pickle."""
    return pickle.loads(pickle.dumps(model))


# --------------------------------------------------------------------------------------------------
# Edges
# --------------------------------------------------------------------------------------------------


def test_a_model_gets_the_edges_of_the_state_that_it_loads():
    model = spread(quantized(edges=EDGES))
    other = quantized(2)
    assert not torch.allclose(model(X, T), spread(copy.deepcopy(other))(X, T))
    other.load_state_dict(model.state_dict())
    assert other.quant_config["edges"] == EDGES
    assert torch.equal(other(X, T), model(X, T))


def test_edges_travel_through_a_file(tmp_path):
    torch.save(quantized(edges=EDGES).state_dict(), tmp_path / "model.pt")
    state = torch.load(tmp_path / "model.pt", weights_only=True)
    other = quantized(2)
    other.load_state_dict(state)
    assert other.quant_config["edges"] == EDGES
    assert "quant_edges" in state  # loading takes nothing out of what it was given


@pytest.mark.parametrize("num_buckets", [3, 4])
def test_a_state_of_another_number_of_buckets_is_refused(num_buckets):
    model = quantized(2)
    state = quantized(num_buckets).state_dict()
    with pytest.raises(RuntimeError, match=f"it has {num_buckets} buckets, and the model 2"):
        model.load_state_dict(state, strict=False)
    assert model.quant_config["edges"] == [0, 500, 1000]


def test_a_state_without_edges_is_told_that_they_are_missing():
    model = quantized(2)
    state = model.state_dict()
    del state["quant_edges"]
    with pytest.raises(RuntimeError, match='Missing key.*"quant_edges"'):
        model.load_state_dict(state)
    model.load_state_dict(state, strict=False)
    assert model.quant_config["edges"] == [0, 500, 1000]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_leaves_edges_exact(dtype):
    edges = [0, 0.123456789, 1]  # of no half precision
    state = quantized(edges=edges).to(dtype).state_dict()
    assert state["quant_edges"].dtype == torch.float64
    other = quantized(2).to(dtype)
    other.load_state_dict(state)
    assert other.quant_config["edges"] == edges


@pytest.mark.parametrize("wrap", [DataParallel, torch.compile])
def test_edges_travel_between_wrapped_models(wrap):
    model = quantized(edges=EDGES)
    other = quantized(2)
    wrap(other).load_state_dict(wrap(model).state_dict())
    assert other.quant_config["edges"] == EDGES


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_has_edges_of_its_own(copied):
    model = quantized(2)
    other = copied(model)
    other.load_state_dict(quantized(edges=EDGES).state_dict())
    assert other.quant_config["edges"] == other.state_dict()["quant_edges"].tolist() == EDGES
    assert model.quant_config["edges"] == [0, 500, 1000]


def test_edges_of_a_model_inside_another_are_its_own():
    def nested(inner_edges, edges):
        torch.manual_seed(0)
        inner = quantize(OneLayer(nn.Linear(4, 4)), edges=inner_edges)
        outer = nn.ModuleDict({"inner": inner, "mix": nn.Linear(4, 4)})
        outer.forward = lambda x, t: outer["mix"](inner(x, t))
        return quantize(outer, edges=edges, keep_float="inner")

    model = nested([0, 100, 1000], [0, 200, 1000])
    other = nested([0, 500, 1000], [0, 500, 1000])
    other.load_state_dict(model.state_dict())
    assert other["inner"].quant_config["edges"] == [0, 100, 1000]
    assert other.quant_config["edges"] == [0, 200, 1000]


def test_one_bucket_has_no_edges_to_save_and_a_merged_copy_no_more():
    assert "quant_edges" not in quantized(1).state_dict()
    model = quantized(2)
    plain = merge(model, 1)
    assert plain.state_dict().keys() == Net().state_dict().keys()
    Net().load_state_dict(plain.state_dict())
    assert "quant_edges" in model.state_dict()


def test_numpy_numbers_are_stored_as_pythons_own(tmp_path):
    edges = list(np.array([0, 10, 1000]))
    model = quantized(n_bits=np.int64(4), edges=edges)
    torch.save(adapter(model), tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    assert saved["quant_config"]["n_bits"] == 4
    assert saved["quant_config"]["edges"] == [0, 10, 1000]


# --------------------------------------------------------------------------------------------------
# What trains is what travels
# --------------------------------------------------------------------------------------------------


class WithBatchNorm(Net):
    """A net with BatchNorm, whose running statistics change in training, and two names for mix."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(6)
        self.again = self.mix


def step(model):
    """A training step of all that trains."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(X, T).square().mean().backward()
    optimizer.step()


def rounded(model):
    """model with deltas as float16 has them, which an adapter holds."""
    with torch.no_grad():
        for delta in deltas(model).values():
            delta.copy_(delta.half())
    return model.eval()


def test_an_adapter_carries_the_edges():
    model = spread(quantized(edges=EDGES))
    saved = adapter(model)
    torch.manual_seed(0)
    other = quantize(Net(), **saved["quant_config"])
    load_adapter(other, saved)
    assert torch.equal(other(X, T), rounded(model)(X, T))


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_norm_that_someone_unfroze_travels_and_trains_on(wrap):
    model = quantized(2)
    model.norm.requires_grad_(True)
    step(model)
    saved = adapter(wrap(model))
    assert saved["others"].keys() == {"norm.weight", "norm.bias"}

    other = quantized(2)
    load_adapter(wrap(other), saved)
    assert torch.equal(other(X, T), rounded(model)(X, T))
    trained = [name for name, p in other.named_parameters() if p.requires_grad]
    assert sorted(trained) == sorted([*deltas(other), "norm.weight", "norm.bias"])
    step(other)
    load_adapter(quantized(2), adapter(other))


def test_a_compiled_part_has_the_names_of_the_plain_one():
    plain = quantized(2)
    plain.norm.requires_grad_(True)
    compiled = copy.deepcopy(plain)
    compiled.norm = torch.compile(compiled.norm)
    assert adapter(compiled)["others"].keys() == {"norm.weight", "norm.bias"}
    load_adapter(plain, adapter(compiled))
    load_adapter(compiled, adapter(plain))


def test_the_statistics_of_batch_norm_travel():
    base = quantized(2, net=WithBatchNorm)
    model = copy.deepcopy(base).train()
    step(model)
    assert not torch.equal(model.norm.running_mean, base.norm.running_mean)
    load_adapter(base, adapter(model))
    assert torch.equal(base.eval()(X, T), rounded(model)(X, T))
    assert base.norm.num_batches_tracked == 1
    assert not base.norm.weight.requires_grad


def test_a_bias_that_trains_travels_and_is_no_delta():
    model = quantized(2)
    model.conv_in.bias.requires_grad_(True)
    step(model)
    assert not any(name.endswith("bias") for name in deltas(model))
    other = quantized(2)
    load_adapter(other, adapter(model))
    assert torch.equal(other.conv_in.bias, model.conv_in.bias)
    assert torch.equal(other(X, T), rounded(model)(X, T))


def test_what_float16_cannot_hold_travels_as_it_is():
    model = quantized(1)
    model.norm.requires_grad_(True)
    with torch.no_grad():
        model.norm.weight[:4] = torch.tensor([1 + 2**-20, 1e6, 1e-12, -3.0])
    other = quantized(1)
    load_adapter(other, adapter(model))
    assert torch.equal(other.norm.weight, model.norm.weight)


def test_an_adapter_of_deltas_fits_a_model_whose_norm_trains():
    """Such as the model that is to be trained on, made ready before it loads."""
    saved = adapter(spread(quantized(2)))
    model = quantized(2)
    model.norm.requires_grad_(True)
    load_adapter(model, saved)
    assert torch.equal(model.mix.d_out_0, spread(quantized(2)).mix.d_out_0.half().float())


def test_an_adapter_does_not_change_with_the_model():
    model = quantized(2)
    model.norm.requires_grad_(True)
    saved = adapter(model)
    before = copy.deepcopy(saved)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    model.load_state_dict(quantized(edges=EDGES).state_dict())
    assert saved["quant_config"] == before["quant_config"]
    assert torch.equal(saved["deltas"], before["deltas"])
    assert torch.equal(saved["others"]["norm.weight"], before["others"]["norm.weight"])


def test_the_fingerprint_is_that_of_all_that_does_not_train():
    model = quantized(2)
    mark = adapter(model)["fingerprint"]
    assert adapter(spread(copy.deepcopy(model)))["fingerprint"] == mark
    for name in ("mix.codes", "mix.zero_point", "mix.s_out", "conv_in.bias", "norm.weight"):
        other = copy.deepcopy(model)
        other.state_dict(keep_vars=True)[name].data.flatten()[0] += 1
        assert adapter(other)["fingerprint"] != mark, name


class ModuleAndMore(nn.Module):
    """A model of its own with a child called module, as wrappers have, which has two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.module = nn.LayerNorm(4)
        self.weight = nn.Parameter(torch.full((4,), 3.0))
        self.again = self.module


def test_a_model_with_a_child_called_module_is_no_wrapper():
    model = quantize(ModuleAndMore())
    model.module.weight.requires_grad_(True)
    with torch.no_grad():
        model.module.weight.fill_(7)
    saved = adapter(model)
    assert saved["others"].keys() == {"module.weight", "again.weight"}
    with torch.no_grad():
        model.module.weight.fill_(2)
    load_adapter(model, saved)
    assert (model.module.weight == 7).all()
    assert (model.weight == 3).all()


@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_wrapped_model_has_the_deltas_the_adapter_and_the_merged_copy_of_the_model(wrap):
    model = spread(quantized(2))
    wrapped = wrap(model)
    for mine, same in zip(deltas(wrapped).values(), deltas(model).values(), strict=True):
        assert mine is same
    assert adapter(wrapped)["fingerprint"] == adapter(model)["fingerprint"]
    load_adapter(quantized(2), adapter(wrapped))
    load_adapter(wrapped, adapter(model))
    torch.testing.assert_close(merge(wrapped, 1)(X, None), merge(model, 1)(X, None))


# --------------------------------------------------------------------------------------------------
# Copies
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_computes_the_same(copied):
    model = spread(quantized(2))
    assert torch.equal(copied(model)(X, T), model(X, T))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_during_a_call_computes_the_same(copied):
    model = spread(quantized(2))
    other_t = torch.tensor([950, 2, 3, 4])
    expected = model(X, T)
    copies = []
    copy_outputs = []

    def copy_and_call(*_):
        hook.remove()  # once is enough, and pickle takes no local function
        copies.append(copied(model))
        copy_outputs.append(copies[0](X, other_t))

    hook = model.norm.register_forward_hook(copy_and_call)
    assert torch.equal(model(X, T), expected)  # the copy's call left this one its timesteps
    assert torch.equal(copy_outputs[0], model(X, other_t))
    assert torch.equal(copies[0](X, T), expected)


def test_a_model_survives_meta_and_to_empty():
    model = quantized(edges=EDGES)
    saved = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(saved)
    for name, value in model.state_dict().items():
        assert value.dtype == saved[name].dtype, name
        assert torch.equal(value, saved[name]), name

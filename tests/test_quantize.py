"""quantize and the models it makes: buckets, adapters, merging, checkpointing, compiling, refusals."""
import copy
import shutil
from functools import partial

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import quant
from quant import adapter, bucket, current_batch, deltas, equal_edges, fingerprint, load_adapter, merge, quantize, remember

CLOSE = dict(rtol=1e-10, atol=1e-10)


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
    base = model.block[0].dequantize(torch.zeros(9), torch.zeros(6))
    assert torch.equal(base, model.block[0].dequantize())
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
        drawn = set(bucket(torch.tensor(t), equal_edges(4, 1000)).tolist())
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
        assert y.dtype == dtype and model.block[0].codes.dtype == torch.uint8 and model.mix.weight.dtype == dtype
        precise = torch.promote_types(dtype, torch.float32)
        assert model.mix.d_in[1].grad.dtype == model.mix.s_in.dtype == precise


def test_autocast_trains():
    model = quantized(2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 8, 8), torch.tensor([1, 900]))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and all(d.grad.isfinite().all() and d.grad.dtype == torch.float32
                                             for d in deltas(model).values())


def test_a_layer_that_was_not_told_fails_loudly():
    model, x = quantized(2), torch.randn(2, 3, 8, 8)
    with pytest.raises(RuntimeError, match="wasn't told"):
        model.conv_in(x)
    model(x, time=torch.tensor([1, 900]))  # and is told for one call only
    with pytest.raises(RuntimeError, match="wasn't told"):
        model.conv_in(x)
    with pytest.raises(ValueError, match="3 timesteps"):
        model(x, torch.tensor([1, 900, 2]))
    with pytest.raises(ValueError, match="0 .. 1000"):
        model(x, torch.tensor([1, 1001]))
    with pytest.raises(RuntimeError, match="wasn't told"):  # nor does a call that failed leave anything behind
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
    x, plain = torch.randn(3, 4), merge(model)
    assert type(plain[0]) is type(plain[2]) is nn.Linear and torch.equal(plain(x), model(x))


def test_checkpointed_blocks_are_told_their_timesteps_again():
    model, found = move(quantized(2)), []
    batches = [(torch.randn(2, 3, 8, 8), torch.tensor(t)) for t in ([1, 900], [800, 2])]
    for call in (lambda f, x: f(x), partial(checkpoint, use_reentrant=False, context_fn=remember)):
        model.forward = lambda x, time, call=call: model.conv_out(call(model.block, model.norm(model.conv_in(x))))
        sum(model(*batch).square().sum() for batch in batches).backward()  # two forwards before one backward
        found.append([delta.grad for name, delta in deltas(model).items() if not name.startswith("mix")])
        model.zero_grad()
    assert current_batch.get() is None and all(torch.equal(one, two) and one.any() for one, two in zip(*found))
    model.forward = lambda x, time: checkpoint(model.block, model.conv_in(x), use_reentrant=False)
    with pytest.raises(RuntimeError, match="see remember"):
        model(*batches[0]).sum().backward()


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

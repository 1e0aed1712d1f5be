"""The GPU's kernels against the plain code of quant.py.

The kernels run on a GPU if there is one. If not, Triton's interpreter runs them on the CPU, if
Triton is installed (conftest.py asks for it); else their tests are skipped.
"""

import copy
import importlib.util
import sys

import pytest
import torch
import torch.nn as nn

import quant
import support
import train
from calibrate import minmax
from data import toy
from quant import QuantConv2d, QuantLinear, batch_of, deltas, quantize, set_batch
from sample import BASE, load_model
from support.files import save
from support.runs import Run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def why_no_kernels():
    """Why kernels can't run here, "" if they can."""
    if quant.kernels is None:
        return "Triton isn't installed"
    x = torch.ones(3, 3, device=DEVICE)
    try:
        quant.kernels.gradient_of(x[0], x, x, channel_dim=-1)
    except Exception as error:  # Triton 3.6's interpreter fails with NumPy 2.4
        return f"Triton doesn't work here: {error}"
    return ""


needs_triton = pytest.mark.skipif(why_no_kernels() != "", reason=why_no_kernels())
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")

LAYERS = {
    "linear": lambda: nn.Linear(20, 12),
    "3x3": lambda: nn.Conv2d(5, 12, 3, padding=1),
    "1x1, no bias": lambda: nn.Conv2d(24, 9, 1, bias=False),
    "grouped": lambda: nn.Conv2d(8, 6, 3, groups=2),
}
if DEVICE == "cuda":  # those of a UNet of 860 million parameters, too large for the interpreter
    LAYERS["860M linear"] = lambda: nn.Linear(1280, 3840)
    LAYERS["860M 3x3"] = lambda: nn.Conv2d(2560, 1280, 3, padding=1)
    LAYERS["860M 1x1"] = lambda: nn.Conv2d(640, 320, 1)
    LAYERS["860M stem"] = lambda: nn.Conv2d(4, 320, 3, padding=1)
BITS = (2, 7, 8)  # 7 is three pieces
DTYPES = (torch.float32, torch.bfloat16)
EPSILON = {torch.float32: 1e-6, torch.bfloat16: 2**-7}  # of one operation
LAYER_EPSILON = {torch.float32: 1e-5, torch.bfloat16: 0.05}  # the plain code rounds products too

ROWS = "rows"  # (N, ..., C), as a linear layer has them
CHANNELS_LAST = "channels last"
CHANNELS_FIRST = "channels first"
ACTIVATIONS = [
    ((4, 3, 5, 70), ROWS),
    ((5, 33), ROWS),
    ((3, 70, 9, 8), CHANNELS_LAST),
    ((3, 70, 9, 8), CHANNELS_FIRST),
]
if DEVICE == "cuda":
    ACTIVATIONS.append(((4, 4096, 960), ROWS))
    ACTIVATIONS.append(((4, 320, 64, 64), CHANNELS_LAST))
    ACTIVATIONS.append(((4, 1280, 8, 8), CHANNELS_FIRST))
    ACTIVATIONS.append(((2, 3, 2048, 2048), CHANNELS_LAST))  # 65,536 blocks a sample


@pytest.fixture(autouse=True)
def exact_matmuls(monkeypatch):
    """Convolutions on a GPU in float32, not in TF32, which keeps three digits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def by_plain_code(run):
    """What run() returns if quant.py does everything itself."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant, "kernels", None)
        return run()


def by_kernels(run):
    """What run() returns if gpu_kernels.py takes over, on the CPU as well."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quant.kernels, "usable", lambda x: True)
        return run()


def quantized(name, n_bits, num_buckets=2, columns="channel"):
    """A quantized layer whose scales and deltas are all different."""
    torch.manual_seed(n_bits)
    layer = LAYERS[name]()
    kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
    layer = kind(layer, n_bits, num_buckets, "out+in", columns, minmax)
    for delta in deltas(layer).values():
        nn.init.normal_(delta, std=0.1)
    nn.init.uniform_(layer.s_in, 0.5, 2)
    return layer.to(DEVICE)


def activation(shape, layout, dtype):
    """Random numbers of this shape, on the device."""
    x = torch.randn(shape).to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if layout == CHANNELS_LAST else x


def layer_for(layout):
    """A layer with this layout of activations; its sizes don't matter here."""
    return quantized("linear" if layout == ROWS else "3x3", 4)


def relative_error(got, wanted):
    """The norm of the error, as a part of what is wanted."""
    return ((got.double() - wanted.double()).norm() / wanted.double().norm()).item()


# --------------------------------------------------------------------------------------------------
# Kernels
# --------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_bits", BITS)
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("columns", ["channel", "position"])
@torch.no_grad()
def test_dequantize(name, columns, n_bits, dtype):
    layer = quantized(name, n_bits, columns=columns)
    d_out = layer.delta("d_out", 1)
    d_in = layer.delta("d_in", 1)
    for pair in ((None, None), (d_out, None), (d_out, d_in)):
        got = by_kernels(lambda: layer.dequantize(*pair, dtype))  # noqa: B023
        wanted = by_plain_code(lambda: layer.dequantize(*pair, dtype))  # noqa: B023
        assert got.dtype == dtype
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted, rtol=EPSILON[dtype], atol=0)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_mixed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape, layout", ACTIVATIONS, ids=str)
@torch.no_grad()
def test_gradient_of(shape, layout, with_bias, is_mixed, dtype):
    torch.manual_seed(0)
    layer = layer_for(layout)
    a = activation(shape, layout, dtype)
    b = activation(shape, CHANNELS_FIRST, dtype)  # the memory formats of the two may differ
    c = shape[layer.channel_dim]
    bias = torch.randn(c).to(DEVICE, dtype) if with_bias else None
    index = torch.arange(len(a), device=DEVICE) % 2 if is_mixed else None
    d = torch.zeros((2, c) if is_mixed else c, device=DEVICE)

    got = by_kernels(lambda: layer.gradient_of(d, a, b, bias, index))
    again = by_kernels(lambda: layer.gradient_of(d, a, b, bias, index))
    assert torch.equal(got, again)

    def exact(a, b, bias):
        return by_plain_code(lambda: layer.gradient_of(d.double(), a, b, bias, index))

    a, b = a.double(), b.double()
    bias = None if bias is None else bias.double()
    size = exact(a.abs(), b.abs(), None if bias is None else -bias.abs())
    assert got.shape == d.shape and got.dtype == torch.float32
    assert ((got - exact(a, b, bias)).abs() <= 1e-6 * size).all()


@needs_triton
@torch.no_grad()
def test_gradient_of_adds_in_float32_whatever_the_default_is():
    torch.manual_seed(0)
    layer = layer_for(ROWS)
    a, b = torch.randn(2, 3, 900, layer.shape[0], device=DEVICE)  # enough rows for several parts
    d = torch.zeros(layer.shape[0], device=DEVICE)
    wanted = by_kernels(lambda: layer.gradient_of(d, a, b))
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = by_kernels(lambda: layer.gradient_of(d, a, b))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(got, wanted)


@needs_triton
@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])  # PyTorch's, Triton's
def test_a_full_gpu_says_nothing_of_triton(kind, monkeypatch):
    def fails(*args, **kwargs):
        raise kind("CUDA out of memory")

    monkeypatch.setattr(quant.kernels, "scale_samples", fails)
    works = quant.kernels.triton_works.__wrapped__  # without the cache
    with pytest.raises(kind):
        works(torch.device(DEVICE))


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape, layout", ACTIVATIONS, ids=str)
@torch.no_grad()
def test_scale_samples(shape, layout, dtype):
    torch.manual_seed(0)
    layer = layer_for(layout)
    x = activation(shape, layout, dtype)
    index = torch.arange(len(x), device=DEVICE) % 2
    c = shape[layer.channel_dim]
    d = (torch.randn(2, c) / 10).to(DEVICE)

    got = by_kernels(lambda: layer.scale_samples(x, d, index))
    wanted = by_plain_code(lambda: layer.scale_samples(x.float(), d, index))
    assert got.stride() == x.stride()
    torch.testing.assert_close(got, wanted.to(dtype), rtol=EPSILON[dtype], atol=1e-6)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("t", [[900, 950, 700], [900, 100, 950]], ids=["one bucket", "mixed"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer(name, t, dtype):
    """Values and all gradients of a layer inside a model, which tells it the buckets."""
    torch.manual_seed(0)
    layer = quantized(name, 4)
    is_conv = isinstance(layer, QuantConv2d)
    shape = (3, layer.shape[1] * layer.groups, 8, 8) if is_conv else (3, 7, layer.shape[1])
    x = activation(shape, CHANNELS_LAST if is_conv else ROWS, dtype).requires_grad_()
    batch = batch_of(torch.tensor(t, device=DEVICE), [0, 500, 1000])
    g = None

    def run():
        nonlocal g
        layer.zero_grad()
        x.grad = None
        with set_batch(batch):
            y = layer(x)
        if g is None:
            g = torch.randn(y.shape).to(y)
        y.backward(g)
        grads = [delta.grad for delta in deltas(layer).values()]
        return [y.detach(), x.grad, *grads]

    for got, wanted in zip(by_kernels(run), by_plain_code(run)):
        if wanted is None:
            assert got is None
        else:
            assert got.dtype == wanted.dtype and got.shape == wanted.shape
            assert relative_error(got, wanted) < LAYER_EPSILON[dtype]


@needs_triton
@torch.no_grad()
def test_a_single_image_and_a_single_vector():
    for name, shape in (("3x3", (5, 6, 7)), ("linear", (20,))):
        layer = quantized(name, 4)
        a = activation(shape, ROWS, torch.float32)
        d = torch.zeros(shape[layer.channel_dim], device=DEVICE)
        got = by_kernels(lambda: layer.gradient_of(d, a, a))  # noqa: B023
        wanted = by_plain_code(lambda: layer.gradient_of(d, a, a))  # noqa: B023
        torch.testing.assert_close(got, wanted)


# --------------------------------------------------------------------------------------------------
# Which code runs
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["triton", "support.gpu_kernels"])
def test_the_plain_code_runs_without(missing, monkeypatch):
    """A copy of quant.py, imported without Triton or gpu_kernels.py, quantizes and trains."""
    monkeypatch.delitem(sys.modules, "support.gpu_kernels", raising=False)
    monkeypatch.delattr(support, "gpu_kernels", raising=False)
    monkeypatch.setitem(sys.modules, missing, None)  # its import fails
    spec = importlib.util.spec_from_file_location("quant_alone", quant.__file__)
    alone = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(alone)
    assert alone.kernels is None

    layer = alone.QuantLinear(nn.Linear(20, 12), 4, 1, "out+in", "channel", minmax)
    layer(torch.randn(3, 20)).sum().backward()
    assert layer.delta("d_out", 0).grad.isfinite().all()


@needs_triton
def test_the_plain_code_runs_on_the_cpu_and_under_autograd():
    assert not quant.has_kernels_for(torch.zeros(3))
    assert not quant.has_kernels_for(torch.zeros(3, device=DEVICE))  # a gradient may be needed
    layer = quantized("linear", 4)
    layer.dequantize(layer.delta("d_out", 0)).sum().backward()
    assert layer.delta("d_out", 0).grad is not None


@needs_gpu
@needs_triton
@torch.no_grad()
def test_kernels_run_on_the_gpu():
    assert quant.has_kernels_for(torch.zeros(3, device=DEVICE))
    assert not quant.has_kernels_for(torch.zeros(3, device=DEVICE, dtype=torch.float64))
    assert not quant.has_kernels_for(torch.zeros(0, device=DEVICE))


@needs_gpu
def test_a_run_that_is_resumed_on_the_gpu_ends_in_the_same_bytes(tmp_path, monkeypatch):
    flags = ["--buckets", "2", "--steps", "12", "--batch", "2", "--device", DEVICE]
    args = train.arguments([*flags, "--out", str(tmp_path)])
    images, captions = toy.load_subject(BASE.parent / "subjects" / "mo")
    base = quantize(load_model(BASE, DEVICE), 4, 2, calibration="minmax")
    states = []
    monkeypatch.setattr(support.runs, "SAVE_EVERY", 5)
    monkeypatch.setattr(support.runs, "save", lambda state, _: states.append(copy.deepcopy(state)))

    run = Run(args, "fine-tuning")
    train.finetune(copy.deepcopy(base), images, captions, args, run)  # saves at steps 5, 10 and 12
    run.lock.close()
    save(states[0], tmp_path / "state.pt")
    args.resume = True
    train.finetune(base, images, captions, args, Run(args, "fine-tuning"))  # at 10 and 12
    assert [state["step"] for state in states] == [5, 10, 12, 10, 12]
    for name, delta in states[2]["tensors"].items():
        assert torch.equal(delta, states[4]["tensors"][name]), name

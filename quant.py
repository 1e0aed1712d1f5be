"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion
Model", arXiv 2401.04339).

A weight is quantized once, to integers of n_bits that never change again. Fine-tuning trains
their scales:

    W[o, i] = s_out[o] * (q[o, i] - z[o]) * s_in[i]         q, z in 0 .. 2^n_bits - 1

s_out (O,) scales rows (output channels), s_in (I,) columns (input channels); all taps of a kernel
share them. s_out alone is PEQA; both are the paper's multi-channel-wise scale update. The
timesteps 0 .. T are cut into num_buckets intervals, each with scales of its own over the same
integers: the paper's timestep-aware scale update.

What is trained is relative: s_out = s0_out * exp(d_out), s_in = s0_in * exp(d_in), all deltas
zero at the start. One learning rate then means the same in every layer, an adapter of zeros is
the base model, and no scale gets to zero. With y = W x + bias, g = dL/dy and gx = dL/dx = W^T g,

    dL/dd_out[o] = sum over samples and positions of g[o] * (y[o] - bias[o])
    dL/dd_in[i]  = sum over samples and positions of gx[i] * x[i]

y[o] - bias[o] is exp(d_out[o]) times something without d_out[o], so its derivative by d_out[o] is
y[o] - bias[o] itself. d_in[i] is the same seen from the other side: it enters as exp(d_in[i]) x[i].
So no gradient of a weight is ever computed. A layer keeps x, y and its packed integers for
backward. W lives for one matmul at a time and is built again in backward.

If all samples of a batch share a bucket, W has that bucket's scales. If not, W has the base's
scales, and each sample's exp(d_in) and exp(d_out) multiply its activations before and after the
matmul. A bucket without a sample gets no gradient (None, not zeros): the optimizer then doesn't
move it, its momentum included.

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")    # in place; then train model

The chapters: buckets, bits, the layer, the swap, timesteps, afterwards. calibrate.py finds the
integers and the scales to start from.
"""

import contextlib
import copy
import hashlib
import inspect
from contextvars import ContextVar
from fnmatch import fnmatch
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from calibrate import CALIBRATIONS

# --------------------------------------------------------------------------------------------------
# Buckets: which scales a timestep uses
# --------------------------------------------------------------------------------------------------


def equal_edges(num_buckets: int, T: float) -> list[float]:
    """The num_buckets + 1 edges that cut 0 .. T into equal intervals (the paper's TAS).

    With these, bucket(t) is floor(t * num_buckets / T).
    """
    return [k * T / num_buckets for k in range(num_buckets + 1)]


def bucket(t: Tensor, edges: list[float]) -> Tensor:
    """The bucket of each timestep: b if edges[b] <= t < edges[b + 1].

    t: timesteps in 0 .. T, of any shape and dtype; T = edges[-1] itself belongs to the last
    bucket. Returns int64, of t's shape, on t's device. Raises ValueError if a timestep lies
    outside or is NaN.
    """
    t = torch.as_tensor(t)
    exact = t.cpu().double()  # whatever dtype t has, and on a device without float64, too
    inside = (exact >= edges[0]) & (exact <= edges[-1])  # False for NaN
    if not inside.all():
        wrong = exact[~inside].flatten()[0].item()
        raise ValueError(
            f"timesteps must lie in {edges[0]:g} .. {edges[-1]:g}, and one is {wrong:g}"
        )
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    return torch.bucketize(exact, inner, right=True).to(t.device)


# --------------------------------------------------------------------------------------------------
# Bits: codes of 2 to 8 bits in whole bytes
# --------------------------------------------------------------------------------------------------

# A code is cut into pieces of 8, 4, 2 or 1 bits, which fill a byte without a rest: 3 = 2 + 1. First
# come the bytes with the low pieces of all codes, then those with the high ones. For 8m codes of
# 3 bits, c[0], c[1], ..., with a byte's lowest bit on the right:
#
#     byte j, j < 2m        | c[j + 6m] | c[j + 4m] | c[j + 2m] | c[j] |          low 2 bits of each
#     byte 2m + j, j < m    | c[j + 7m] | c[j + 6m] |   ...   | c[j + m] | c[j] |   high bit of each
#
# The codes that share a byte are far apart and not neighbours. So packing and unpacking shift whole
# vectors, and never single codes.
PIECES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """The codes in as few bits: uint8, one-dimensional, n_bits bytes for every 8 codes.

    codes: uint8, of any shape, each below 2^n_bits.
    """
    flat = F.pad(codes.flatten(), (0, -codes.numel() % 8))  # a multiple of 8
    packed = []
    shift = 0
    for width in PIECES[n_bits]:
        mask = (1 << width) - 1
        piece = (flat >> shift) & mask
        rows = piece.view(8 // width, -1)  # row k goes to the bits from k * width on
        packed.append(sum(row << (k * width) for k, row in enumerate(rows)))
        shift += width
    return torch.cat(packed)


def unpack(packed: Tensor, n_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes (shape, uint8) that pack made `packed` from."""
    count = torch.Size(shape).numel()
    eighths = (count + 7) // 8  # bytes of a piece, for each bit of its width
    codes = None
    shift = 0
    start = 0
    for width in PIECES[n_bits]:
        end = start + eighths * width
        mask = (1 << width) - 1
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)  # (8 / width,)
        piece = (packed[start:end] >> shifts[:, None]) & mask  # (8 / width, bytes)
        piece = piece.view(-1)
        codes = piece if codes is None else codes | (piece << shift)
        start = end
        shift += width
    return codes[:count].view(shape)


# --------------------------------------------------------------------------------------------------
# The layer: frozen integers, trained scales
# --------------------------------------------------------------------------------------------------


# fmt: off  (the shape comments stand in one column)


class OneBucket(torch.autograd.Function):
    """y = W x + bias, if all samples of a batch share a bucket: W has the scales of that bucket.

    Shapes are written for a convolution; a linear layer has x (N, ..., I) and y (N, ..., O).
    d_out (O,), d_in (I,): the deltas of the bucket; d_in is None if columns aren't scaled. bias:
    (O,) or None. layer: the QuantLayer.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer):
        _, train_out, train_in, _, _ = ctx.needs_input_grad

        # y = W x + bias
        w = layer.dequantize(d_out, d_in, x.dtype)  # (O, I, *kernel)
        y = layer.matmul(x, w, bias)  # (N, O, H', W')

        ctx.layer = layer
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)  # and not w
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer = ctx.layer
        train_x, train_out, train_in, train_bias, _ = ctx.needs_input_grad
        dims = layer.batch_dims(g)  # samples and positions
        gx = grad_out = grad_in = grad_bias = None

        # gx = W^T g
        if train_x or train_in:
            w = layer.dequantize(d_out, d_in, g.dtype)  # (O, I, *kernel), built again
            gx = layer.input_grad(g, ctx.x_shape, w)  # (N, I, H, W)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            grad_out = sum_of_product(g, y, dims, d_out.dtype)  # (O,)
            if bias is not None:
                grad_out = grad_out - bias * sum_over(g, dims, d_out.dtype)

        # dL/dd_in = sum of gx * x
        if train_in:
            grad_in = sum_of_product(gx, x, dims, d_in.dtype)  # (I,)

        # dL/dbias = sum of g
        if train_bias:
            grad_bias = sum_over(g, dims, bias.dtype)  # (O,)
        return gx, grad_out, grad_in, grad_bias, None


class MixedBuckets(torch.autograd.Function):
    """y = exp(d_out) * W (exp(d_in) * x) + bias, each sample with the deltas of its own bucket.

    W has the base's scales. It serves all samples, so one matmul does. x, bias, layer: as for
    OneBucket. d_out (n, O), d_in (n, I) or None: the deltas of the n buckets in the batch. rows
    (N,): the row of d_out and d_in that belongs to each sample.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer, rows):
        _, train_out, train_in, _, _, _ = ctx.needs_input_grad

        # y = exp(d_out) * W (exp(d_in) * x) + bias
        w = layer.dequantize(dtype=x.dtype)  # (O, I, *kernel)
        y = layer.matmul(layer.scale_samples(x, d_in, rows), w)  # (N, O, H', W')
        y = layer.scale_samples(y, d_out, rows)
        if bias is not None:
            y = y + layer.along_channels(bias[None], y)

        ctx.layer = layer
        ctx.rows = rows
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer, rows = ctx.layer, ctx.rows
        train_x, train_out, train_in, train_bias, _, _ = ctx.needs_input_grad
        dims = layer.position_dims(g)  # positions, not samples
        gx = grad_out = grad_in = grad_bias = None

        # gx = exp(d_in) * W^T (exp(d_out) * g)
        if train_x or train_in:
            w = layer.dequantize(dtype=g.dtype)  # (O, I, *kernel)
            gx = layer.scale_samples(g, d_out, rows)  # (N, O, H', W')
            gx = layer.input_grad(gx, ctx.x_shape, w)  # (N, I, H, W)
            gx = layer.scale_samples(gx, d_in, rows)

        # is_in[b, k] is 1 if sample k is in bucket b, so that is_in @ (a value for each sample)
        # adds up the values of each bucket
        is_in = F.one_hot(rows, len(d_out)).to(d_out.dtype).T  # (n, N)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            each = sum_of_product(g, y, dims, d_out.dtype)  # (N, O)
            if bias is not None:
                each = each - bias * sum_over(g, dims, d_out.dtype)
            grad_out = is_in @ each  # (n, O)

        # dL/dd_in = sum of gx * x
        if train_in:
            each = sum_of_product(gx, x, dims, d_in.dtype)  # (N, I)
            grad_in = is_in @ each  # (n, I)

        # dL/dbias = sum of g
        if train_bias:
            grad_bias = sum_over(g, layer.batch_dims(g), bias.dtype)  # (O,)
        return gx, grad_out, grad_in, grad_bias, None, None


# fmt: on


def sum_over(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x summed over dims, in dtype. (PyTorch's sum over no dims would be one over all.)"""
    return x.sum(dims, dtype=dtype) if dims else x.to(dtype)


def sum_of_product(a: Tensor, b: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """a * b summed over dims, in dtype."""
    return sum_over(a * b, dims, dtype)


class QuantLayer(nn.Module):
    """A Conv2d or Linear whose weight is packed integers and scales; only the scales' deltas are
    trained.

    codes: the packed integers, uint8, in the order (G, O, K, I), the fastest to build a
    channels-last weight from. zero_point (O,), s_out (O,), s_in (G * I,): the frozen grid. d_out,
    d_in: for each bucket the deltas of s_out and s_in, (O,) and (I,); d_in is None if columns
    aren't scaled.
    """

    def __init__(self, layer, n_bits, num_buckets, scales, calibrate):
        super().__init__()
        weight = layer.weight.detach()
        self.n_bits = n_bits
        self.num_buckets = num_buckets
        self.shape = weight.shape
        self.groups = getattr(layer, "groups", 1)
        self.bias = layer.bias

        grouped = weight.reshape(
            self.groups, len(weight) // self.groups, weight.shape[1], -1
        )  # (G, O, I, K)
        if grouped.dtype.itemsize < 4:
            grouped = grouped.float()
        grid = calibrate(grouped, n_bits)
        codes = grid.codes.mT.to(torch.uint8)  # (G, O, K, I)
        self.register_buffer("codes", pack(codes, n_bits))
        self.register_buffer("zero_point", grid.zero_point.flatten().to(torch.uint8))
        self.register_buffer("s_out", grid.s_out.flatten().to(weight.dtype))
        self.register_buffer("s_in", grid.s_in.flatten().to(weight.dtype))

        self.d_out = zeros_for_each_bucket(self.s_out, num_buckets)
        self.d_in = zeros_for_each_bucket(self.s_in, num_buckets) if scales == "out+in" else None

    def dequantize(
        self, d_out: Tensor | None = None, d_in: Tensor | None = None, dtype=None
    ) -> Tensor:
        """The float weight (O, I, *kernel) of a bucket's deltas d_out (O,) and d_in (I,), or of
        the base without them.
        """
        s_out = self.s_out if d_out is None else self.s_out * d_out.exp()
        s_in = self.s_in if d_in is None else self.s_in * d_in.exp()
        g = self.groups
        o = self.shape[0] // g
        i = self.shape[1]  # of a group, as o
        kernel = self.shape[2:]  # () for a linear layer

        codes = unpack(self.codes, self.n_bits, (g, o, kernel.numel(), i))
        w = codes.to(s_out.dtype)  # (G, O, K, I)
        w = w.sub_(self.zero_point.view(g, o, 1, 1))
        w = w.mul_(s_out.view(g, o, 1, 1))
        w = w.mul_(s_in.view(g, 1, 1, i))
        w = w.view(g * o, *kernel, i)  # (O, *kernel, I)
        return w.movedim(-1, 1).to(dtype)  # (O, I, *kernel), channels last

    @property
    def weight(self) -> Tensor:
        """The base's float weight, built anew: for code that asks a layer for its dtype, say."""
        return self.dequantize()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        buckets, rows = self.buckets_of(x)

        if rows is None:
            d_out = self.d_out[buckets[0]]  # (O,)
            d_in = None if self.d_in is None else self.d_in[buckets[0]]  # (I,)
            return OneBucket.apply(x, d_out, d_in, bias, self)

        d_out = torch.stack([self.d_out[b] for b in buckets])  # (n, O)
        d_in = None if self.d_in is None else torch.stack([self.d_in[b] for b in buckets])  # (n, I)
        return MixedBuckets.apply(x, d_out, d_in, bias, self, rows)

    def buckets_of(self, x: Tensor) -> tuple[list[int], Tensor | None]:
        """The buckets in the batch, and each sample's place among them (N,), or None for one."""
        if self.num_buckets == 1:
            return [0], None
        batch = current_batch.get()
        if batch is None:
            raise RuntimeError(
                "a quantized layer wasn't told its timesteps: "
                "call the model given to quantize, or see remember"
            )
        if batch.rows is not None and len(x) != len(batch.rows):
            raise ValueError(
                f"a quantized layer got {len(x)} samples for {len(batch.rows)} timesteps; "
                "the batch must come first"
            )
        return batch.buckets, batch.rows

    def scale_samples(self, x: Tensor, d: Tensor | None, rows: Tensor) -> Tensor:
        """x (N, ...) times exp(d) of each sample's bucket: d (n, C) or None (then x), rows (N,)."""
        if d is None:
            return x
        factors = d.exp()[rows].to(x.dtype)  # (N, C)
        return x * self.along_channels(factors, x)

    def extra_repr(self):
        shape = "x".join(str(size) for size in self.shape)
        bias = self.bias is not None
        return f"{shape}, n_bits={self.n_bits}, num_buckets={self.num_buckets}, bias={bias}"


def zeros_for_each_bucket(scale: Tensor, num_buckets: int) -> nn.ParameterList:
    """The deltas of a scale (C,): a parameter for each bucket.

    With one parameter for all, a bucket that isn't drawn would have a gradient of zeros. Adam would
    then go on moving it by its momentum.
    """
    return nn.ParameterList(torch.zeros_like(scale) for _ in range(num_buckets))


class QuantLinear(QuantLayer):
    """x: (N, ..., I) -> (N, ..., O)."""

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_features = layer.in_features
        self.out_features = layer.out_features

    def matmul(self, x, w, bias=None):
        return F.linear(x, w, bias)

    def input_grad(self, g, x_shape, w):
        return g @ w

    def batch_dims(self, x):  # samples and positions: all but channels
        return tuple(range(x.dim() - 1))

    def position_dims(self, x):  # the middle ones
        return tuple(range(1, x.dim() - 1))

    def along_channels(self, v, x):  # (N, C) -> (N, 1, ..., 1, C)
        ones = [1] * (x.dim() - 2)
        return v.view(len(v), *ones, -1)

    def plain(self, **kwargs):
        return nn.Linear(self.in_features, self.out_features, **kwargs)


class QuantConv2d(QuantLayer):
    """x: (N, I, H, W) -> (N, O, H', W')."""

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.padding_mode = layer.padding_mode

        # the gradient of a convolution wants its padding in pixels
        self.pixels = layer.padding
        if layer.padding == "valid":
            self.pixels = (0, 0)
        if layer.padding == "same":
            self.pixels = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size)]

    def matmul(self, x, w, bias=None):
        return F.conv2d(x, w, bias, self.stride, self.pixels, self.dilation, self.groups)

    def input_grad(self, g, x_shape, w):
        g = g.view(-1, *g.shape[-3:])  # with a batch, if there was none
        batched = (len(g), *x_shape[-3:])
        gx = torch.nn.grad.conv2d_input(
            batched, w, g, self.stride, self.pixels, self.dilation, self.groups
        )
        return gx.view(x_shape)

    def batch_dims(self, x):  # samples and positions: all but channels
        return (0, 2, 3) if x.dim() == 4 else (1, 2)

    def position_dims(self, x):
        return (2, 3)

    def along_channels(self, v, x):  # (N, C) -> (N, C, 1, 1)
        return v[:, :, None, None]

    def plain(self, **kwargs):
        return nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            **kwargs,
        )


# --------------------------------------------------------------------------------------------------
# The swap: how a model gets quantized layers
# --------------------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    n_bits: int = 4,
    num_buckets: int = 1,
    T: float = 1000,
    scales: str = "out+in",
    calibration: str = "rowcol",
    timestep: str = "t",
    keep8: list[str] | None = None,
    keep_float: list[str] = (),
    edges: list[float] | None = None,
) -> nn.Module:
    """Swap every Conv2d and Linear of model for a quantized layer, in place, one at a time; then
    only deltas train.

    n_bits: 2 to 8. num_buckets: scale sets over the timesteps 0 .. T. scales: "out" (PEQA) or
    "out+in". calibration: minmax, mse or rowcol. timestep: the name of model.forward's argument
    that holds the timesteps, (N,) or one for all (not needed for one bucket). keep8, keep_float:
    patterns of layer names ("down.*") to keep at 8 bits or in float; keep8 is by default the
    first and the last Conv2d. edges: the num_buckets + 1 edges of the buckets, from 0 to T; by
    default equal intervals. Returns model; model.quant_config holds the arguments.

    Raises ValueError for arguments out of range, and for what can't be quantized: a model with
    quantized layers, padding other than zeros, weights that are shared, not float or not finite,
    nn.MultiheadAttention (a bare weight, no layers).
    """
    check_arguments(model, n_bits, num_buckets, T, edges, scales, calibration, timestep)
    if edges is None:
        edges = equal_edges(num_buckets, T)
    layers = find_layers(model, keep_float)
    if keep8 is None:
        keep8 = first_and_last_conv(layers)

    model.requires_grad_(False)
    for layer, names in layers.items():
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        bits = 8 if matches(names[0], keep8) else n_bits
        quantized = kind(layer, bits, num_buckets, scales, CALIBRATIONS[calibration])
        quantized.train(layer.training)
        for name in names:
            model.set_submodule(name, quantized)

    model.quant_config = {
        "n_bits": n_bits,
        "num_buckets": num_buckets,
        "T": T,
        "edges": list(edges),
        "scales": scales,
        "calibration": calibration,
        "timestep": timestep,
        "keep8": list(keep8),
        "keep_float": list(keep_float),
    }
    if num_buckets > 1:
        model.register_forward_pre_hook(tell, with_kwargs=True)
        model.register_forward_hook(forget, always_call=True)
    return model


def check_arguments(model, n_bits, num_buckets, T, edges, scales, calibration, timestep):
    """Raise ValueError if an argument of quantize is out of range."""
    if n_bits not in range(2, 9):
        raise ValueError(f"n_bits must be 2 to 8, not {n_bits}")
    if not T > 0:
        raise ValueError(f"T must be a positive number, not {T}")
    if num_buckets < 1 or (isinstance(T, int) and num_buckets > T):
        raise ValueError(
            f"num_buckets must be 1 to {T}, the number of timesteps, not {num_buckets}"
        )
    if edges is not None:
        rising = all(low < high for low, high in zip(edges, edges[1:]))
        if len(edges) != num_buckets + 1 or edges[0] != 0 or edges[-1] != T or not rising:
            wanted = f"{num_buckets + 1} rising numbers from 0 to {T}"
            raise ValueError(f"edges must be {wanted}, not {edges}")
    if scales not in ("out", "out+in"):
        raise ValueError(f"scales must be out or out+in, not {scales}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration must be {' or '.join(CALIBRATIONS)}, not {calibration}")
    arguments = list(inspect.signature(model.forward).parameters)
    if num_buckets > 1 and timestep not in arguments:
        raise ValueError(
            f"timestep must be {' or '.join(arguments)}, an argument of forward, not {timestep}"
        )


def matches(name: str, patterns: list[str]) -> bool:
    """True if a pattern fits a layer's name, or that of a module that it is part of."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*") for pattern in patterns)


def find_layers(model: nn.Module, keep_float: list[str]) -> dict[nn.Module, list[str]]:
    """Every Conv2d and Linear to swap, with its names: several, if one layer stands in several
    places of the model.

    Raises ValueError for the first that can't be quantized.
    """
    layers = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if matches(name, keep_float):
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention, QuantLayer)):
            continue
        reason = why_not(model, name, module)
        if reason:
            raise ValueError(f"layer '{name}' {reason}, or name it in keep_float")
        layers.setdefault(module, []).append(name)
    return layers


def why_not(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why this layer can't be quantized, and what to do about it; None if it can."""
    if isinstance(layer, (nn.MultiheadAttention, QuantLayer)) or name == "":
        kind = type(layer).__name__
        return (
            f"is a {kind}, not to be swapped: give float Conv2d and Linear layers inside a module"
        )

    if not layer.weight.is_floating_point() or not layer.weight.isfinite().all():
        return "has weights that aren't all finite floats: mend them"

    owners = [
        module for module in model.modules() if module._parameters.get("weight") is layer.weight
    ]
    if len(owners) > 1:
        return "shares its weight with another: give each its own"

    if isinstance(layer, nn.Conv2d):
        odd = [d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size)]
        if layer.padding_mode != "zeros" or (layer.padding == "same" and any(odd)):
            return f"pads unevenly or with {layer.padding_mode} for zeros: pad before the layer"
    return None


def first_and_last_conv(layers: dict[nn.Module, list[str]]) -> list[str]:
    """The names of the first and the last convolution: they see and make the image itself, and
    are small.
    """
    convs = [names[0] for layer, names in layers.items() if isinstance(layer, nn.Conv2d)]
    return list(dict.fromkeys(convs[:1] + convs[-1:]))


# --------------------------------------------------------------------------------------------------
# Timesteps: what the layers are told about a batch
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What the layers need to know about the batch of a call."""

    model: nn.Module  # whose call it is
    buckets: list[int]  # the n buckets in the batch
    rows: Tensor | None  # (N,), each sample's place in buckets; None if there is one bucket only
    outer: "Batch | None"  # of the call that this one is inside of


# The batch of the innermost call of a quantized model, for as long as the call lasts. It isn't
# part of the model, so that two threads can call one model at once (each has a value of its own),
# and a copy of the model doesn't carry it along.
current_batch: ContextVar[Batch | None] = ContextVar("current_batch", default=None)


def tell(model, args, kwargs):
    """Before the model's forward: find the buckets in the batch, and each sample's place there."""
    config = model.quant_config
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    t = given.get(config["timestep"])
    if t is None:
        name = config["timestep"]
        raise ValueError(f"a model with several buckets needs timesteps; give it '{name}'")

    # with two buckets, t = [900, 100, 950] has present = [0, 1] and rows = [1, 0, 1]
    b = bucket(t, config["edges"]).flatten()
    present, rows = b.unique(return_inverse=True)
    if len(present) == 1:
        rows = None
    current_batch.set(Batch(model, present.tolist(), rows, current_batch.get()))


def forget(model, *_):
    """After the model's forward, even if it failed: a layer that is called by itself then fails,
    too.
    """
    batch = current_batch.get()
    if batch is not None and batch.model is model:
        current_batch.set(batch.outer)


def remember():
    """The context_fn of torch.utils.checkpoint(..., use_reentrant=False), for blocks of a model
    with several buckets.

    checkpoint calls it before it runs a block, and gets two contexts: the first for the run in
    forward, the second for the one in backward, when the model's call is long over. The second
    tells the layers their batch again.
    """
    batch = current_batch.get()
    return contextlib.nullcontext(), tell_again(batch)


@contextlib.contextmanager
def tell_again(batch: Batch | None):
    token = current_batch.set(batch)
    try:
        yield
    finally:
        current_batch.reset(token)


# --------------------------------------------------------------------------------------------------
# Afterwards: what you carry away
# --------------------------------------------------------------------------------------------------


def deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name: d_out.B (O,) and d_in.B (I,) of each layer and bucket B."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for key, parameter in layer.named_parameters():
                if key.startswith("d_"):
                    found[f"{name}.{key}"] = parameter
    return found


def merge(model: nn.Module, bucket_index: int = 0) -> nn.Module:
    """A copy of model with plain float layers, whose weights are those of one bucket; IndexError
    if there is none.
    """
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLayer):
            d_in = None if layer.d_in is None else layer.d_in[bucket_index]
            weight = layer.dequantize(layer.d_out[bucket_index], d_in)
            plain = layer.plain(bias=layer.bias is not None, device="meta").train(layer.training)
            plain.weight = nn.Parameter(weight.detach())
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (tell, forget):
                del hooks[key]
    del model.quant_config
    return model


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over all that fine-tuning leaves alone: integers, base scales, biases, norms,
    embeddings.
    """
    trained = deltas(model)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in trained:
            as_bytes = value.cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode())
            digest.update(as_bytes.numpy().tobytes())
    return digest.hexdigest()


def adapter(model: nn.Module) -> dict:
    """All that makes a subject, to torch.save: quant_config, the base's fingerprint, all deltas
    in a row, as float16.
    """
    values = [delta.detach() for delta in deltas(model).values()]
    return {
        "quant_config": model.quant_config,
        "fingerprint": fingerprint(model),
        "deltas": torch.cat(values).half().cpu(),
    }


def load_adapter(model: nn.Module, saved: dict) -> None:
    """Put the deltas of adapter(another model) into model.

    Raises ValueError if that model's quantized base is another. The model then stays as it was.
    """
    mine = deltas(model).values()
    sizes = [delta.numel() for delta in mine]
    values = saved.get("deltas", ())
    same_base = (
        saved.get("fingerprint") == fingerprint(model)
        and saved.get("quant_config") == model.quant_config
    )
    if not same_base or len(values) != sum(sizes) or not values.isfinite().all():
        raise ValueError(
            "the adapter was made for another base, or is damaged; "
            "give the quantized model that it was trained on"
        )
    with torch.no_grad():
        for delta, value in zip(mine, values.split(sizes)):
            delta.copy_(value)

"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion
Model", arXiv 2401.04339).

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")    # in place; then train model

A weight is quantized once, to integer codes of n_bits bits that stay as they are. Each row o, an
output channel, has a scale and a zero point, and each column i has a scale:

    W[o, i] = s_out[o] * (codes[o, i] - zero_point[o]) * s_in[i]        codes in 0 .. 2^n_bits - 1

In a convolution with K kernel positions, a column is one of two things:

    columns="position"    an input channel at one position of the kernel: the default
    columns="channel"     an input channel, all K positions of it: the paper's choice; then W[o, i]
                          stands for the K weights of a kernel

The paper's scales leave each kernel its shape, whatever they do, which limits what they can learn.
In a linear layer and with K = 1 the two are the same.

Fine-tuning trains the scales and nothing else. Training s_out alone is PEQA (Kim et al. 2023);
training both is the paper's multi-channel-wise scale update (MCSU). The timesteps are cut into
num_buckets intervals, and each has scales of its own over the same codes: the paper's
timestep-aware scale update (TAS).

The paper trains the scales themselves. Here the parameters are deltas d_out and d_in, which are
zero at the start and stand in an exponent:

    W[o, i] = s_out[o] exp(d_out[o]) * (codes[o, i] - zero_point[o]) * s_in[i] exp(d_in[i])

One learning rate then means the same in every layer, deltas of zero are the base model, and no
scale can reach zero. With y = W x + bias, g = dL/dy and gx = dL/dx = W^T g, the gradients of the
deltas come in one of two ways, both exact. Where a column is a channel, or s_out alone trains
(ChannelMatmul):

    dL/dd_out[o] = sum over samples and pixels of g[o] * (y[o] - bias[o])
    dL/dd_in[i]  = sum over samples and pixels of gx[i] * x[i]

They are this simple because exp is its own derivative. y[o] - bias[o] is proportional to
exp(d_out[o]), so it is its own derivative by d_out[o]. And y depends on d_in[i] only through
u = exp(d_in[i]) x[i], so dL/dd_in[i] = dL/du * u = gx[i] * x[i]. No gradient of a weight is made.

Where the scales of positions train (PositionMatmul), gx is already summed over the positions and
can't give dL/dd_in. There the gradient of W is made, for one layer at a time. W is proportional to
both exponentials, so

    M[o, i]      = W[o, i] * dL/dW[o, i]
    dL/dd_out[o] = sum over i of M[o, i]
    dL/dd_in[i]  = sum over o of M[o, i]

What a layer does in a step, and keeps for backward:

                       matrix products    kept, beside the packed codes
    ChannelMatmul      W x, W^T g         x if d_in trains, y if d_out trains
    PositionMatmul     W x, W^T g, dW     x

The float W isn't kept: backward builds it again.

If all samples of a batch share a bucket, W has the deltas of that bucket, as above. If not,
ChannelMatmul builds W without deltas, and the exp(d_in) and exp(d_out) of each sample's bucket
multiply its activations before and after the matmul. Scales of positions can't be moved to the
activations: PositionMatmul has a W and a convolution for each bucket. A bucket without a sample in
the batch has no gradient (None, not zeros), so the optimizer skips it and leaves its momentum
alone.

calibrate.py finds the codes and the scales to start from, gptq.py the same with data, and
support/checks.py says what is refused. Letters of shapes: N samples, B buckets in a batch, G groups
of a convolution, O output and I input channels (of a group where there is a G), K positions.
"""

import contextlib
import copy
import threading
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from calibrate import CALIBRATIONS
from gptq import quantize_with_data, set_layers
from support import checks
from support.edges import add_edges
from support.files import gathered, hash_of
from support.precision import KeepsPrecision

try:
    from support import gpu_kernels as kernels  # on a GPU they do a layer's work in fewer launches
except ImportError:  # no Triton
    kernels = None

# --------------------------------------------------------------------------------------------------
# Buckets: which scales a timestep uses
# --------------------------------------------------------------------------------------------------


def equal_edges(num_buckets: int, T: float) -> list[float]:
    """The num_buckets + 1 edges that cut 0 .. T into equal intervals (the paper's TAS).

    With these, the bucket of t < T is floor(t * num_buckets / T).
    """
    return [k * T / num_buckets for k in range(num_buckets + 1)]


def bucket(t: Tensor, edges: list[float]) -> Tensor:
    """The bucket of each timestep: b if edges[b] <= t < edges[b + 1]. t: any shape and dtype.

    T = edges[-1] itself belongs to the last bucket. Raises ValueError if a timestep lies outside of
    the edges or is NaN.
    """
    t = t if torch.is_tensor(t) else torch.tensor(t, device="cpu")
    time = t.cpu().double()  # exact for every dtype of t; not every device has float64
    inside = (time >= edges[0]) & (time <= edges[-1])  # False for NaN
    if not inside.all():
        wrong = time[~inside].flatten()[0].item()
        raise ValueError(
            f"timesteps must lie in {edges[0]:g} .. {edges[-1]:g}, and one is {wrong:g}; "
            "correct it, or quantize with another T or other edges"
        )
    inner = torch.tensor(edges[1:-1], dtype=torch.float64, device="cpu")
    return torch.bucketize(time, inner, right=True).to(t.device)


# --------------------------------------------------------------------------------------------------
# Bits: codes of 2 to 8 bits in whole bytes
# --------------------------------------------------------------------------------------------------

# A code is cut into pieces of 8, 4, 2 or 1 bits, which divide a byte evenly: 3 bits into 2 + 1.
# First come the bytes with the low pieces of all codes, then those with the high ones. The codes
# c[0], c[1], ..., c[8m - 1] of 3 bits become, with the lowest bit of a byte on the right:
#
#     byte j, j < 2m        | c[j + 6m] | c[j + 4m] | c[j + 2m] | c[j] |        low 2 bits of each
#     byte 2m + j, j < m    | c[j + 7m] | c[j + 6m] |  ...  | c[j + m] | c[j] |   high bit of each
#
# The codes that share a byte are far apart, so one shift handles a whole vector of codes.
PIECES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Put codes (uint8, any shape, each below 2^n_bits) into n_bits bytes for every 8 of them.

    n_bits: 2 to 8. Returns uint8, one-dimensional.
    """
    flat = F.pad(codes.flatten(), (0, -codes.numel() % 8))  # a multiple of 8
    packed = []
    shift = 0
    for width in PIECES[n_bits]:
        mask = (1 << width) - 1
        piece = (flat >> shift) & mask
        rows = piece.view(8 // width, -1)  # row k is shifted to bit k * width
        packed.append(sum(row << (k * width) for k, row in enumerate(rows)))
        shift += width
    return torch.cat(packed)


def unpack(packed: Tensor, n_bits: int, shape: tuple[int, ...]) -> Tensor:
    """The inverse of pack: codes (uint8, of this shape)."""
    count = torch.Size(shape).numel()
    bytes_per_bit = (count + 7) // 8  # for all codes; a piece of 2 bits takes twice as many
    codes = None
    shift = 0
    start = 0
    for width in PIECES[n_bits]:
        end = start + bytes_per_bit * width
        mask = (1 << width) - 1
        shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)  # (8 / width,)
        piece = (packed[start:end] >> shifts[:, None]) & mask  # (8 / width, bytes)
        piece = piece.view(-1)
        codes = piece if codes is None else codes | (piece << shift)
        start = end
        shift += width
    return codes[:count].view(shape)


# --------------------------------------------------------------------------------------------------
# The batch: how a layer learns its timesteps
# --------------------------------------------------------------------------------------------------

# A layer is called with x alone. So a model with several buckets has two hooks: before its forward,
# enter_call finds the buckets of the timesteps, and after it leave_call forgets them. Between the
# two, layers read them from current.batch.


class Batch(NamedTuple):
    """The buckets of a batch.

    With three buckets over 0 .. 900, timesteps [800, 100, 850] have present [0, 2], index [1, 0, 1]
    and counts [1, 2].
    """

    present: list[int]  # the B buckets in the batch, in increasing order
    index: Tensor | None  # each sample's place in present: (N,), or (1,) if one timestep is for all
    counts: Sequence[int] = ()  # how many samples each of them has
    model: nn.Module | None = None  # whose call it is
    outer: "Batch | None" = None  # what was current before: one quantized model may call another


class Current(threading.local):
    """The batch of the innermost call, for as long as the call lasts. Each thread has its own.

    It isn't kept in the model: two threads may call one model at once, and a model may be copied or
    pickled at any time. torch.compile understands this class, but not a ContextVar.
    """

    batch: Batch | None = None


current = Current()


def batch_of(t: Tensor, edges: list[float], model: nn.Module | None = None) -> Batch:
    """The Batch of timesteps t, (N,) or one for all."""
    b = bucket(t, edges).flatten()
    present, index, counts = b.unique(return_inverse=True, return_counts=True)
    present = present.tolist() or [0]  # t may be empty
    return Batch(present, index, counts.tolist(), model, current.batch)


def enter_call(model, args, kwargs):
    """Before the model's forward: find the buckets in the batch."""
    name = model.quant_config["timestep"]
    given = checks.signature_of(model).bind(*args, **kwargs).arguments
    if given.get(name) is None:
        raise ValueError(f"a model with several buckets needs timesteps; give it '{name}'")
    current.batch = batch_of(given[name], model.quant_config["edges"], model)


def leave_call(model, *_):
    """After the model's forward, even if it raised an error: forget the batch."""
    batch = current.batch
    if batch is not None and batch.model is model:
        current.batch = batch.outer


class set_batch:
    """A context in which batch is the current one.

    It can be entered more than once, because backward may run more than once.
    """

    def __init__(self, batch: Batch | None):
        self.batch = batch

    def __enter__(self):
        self.outer = current.batch
        current.batch = self.batch

    def __exit__(self, *error):
        current.batch = self.outer


def checkpoint_contexts():
    """The context_fn for torch.utils.checkpoint in a model with several buckets.

    checkpoint(block, x, use_reentrant=False, context_fn=checkpoint_contexts) runs the block in the
    first context and, in backward, again in the second. By then the call of the model is over, so
    the second sets that call's batch again. Leave it out under torch.compile, which takes no such
    contexts: its graph knows the batch.
    """
    return contextlib.nullcontext(), set_batch(current.batch)


# --------------------------------------------------------------------------------------------------
# The layer: frozen codes, trained scales
# --------------------------------------------------------------------------------------------------


# The formatter would move the shape comments out of their column.
# fmt: off
class ChannelMatmul(torch.autograd.Function):
    """y = W x + bias, unless the scales of positions train.

    index None: all samples share a bucket, d_out is (O,) and d_in (I,), and W has these deltas.
    index (N,): the row of d_out (B, O) and d_in (B, I) that belongs to each sample. W is without
    deltas, and layer.scale_samples multiplies each sample's x and y by exp(d_in) and exp(d_out).
    d_in is None if columns aren't trained. bias: (O,) or None. layer: the QuantLayer below, which
    knows how to multiply (matmul, input_grad), and to sum what shares a delta (gradient_of).
    Shapes are written for a convolution without groups; a linear layer has x (N, ..., I) and
    y (N, ..., O).
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer, index):           # (N, I, H, W)
        if index is None:
            w = layer.dequantize(d_out, d_in, x.dtype)              # (O, I, *kernel)
            y = layer.matmul(x, w, bias)                            # (N, O, H', W')
        else:
            w = layer.dequantize(dtype=x.dtype)                     # (O, I, *kernel), no deltas
            y = layer.matmul(layer.scale_samples(x, d_in, index), w)
            y = layer.scale_samples(y, d_out, index)                # (N, O, H', W')
            y = layer.add_bias(y, bias)

        ctx.layer = layer
        ctx.index = index
        ctx.x_shape = x.shape
        _, train_out, train_in, _, _, _ = ctx.needs_input_grad
        kept_x = x if train_in else None
        kept_y = y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)    # w isn't kept
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, y, d_out, d_in, bias = checks.saved_tensors(ctx)
        layer = ctx.layer
        index = ctx.index
        train_x, train_out, train_in, train_bias, _, _ = ctx.needs_input_grad
        gx = grad_out = grad_in = grad_bias = None

        # gx = W^T g, with the factors of each sample's bucket around it if there are several
        if train_x or train_in:
            if index is None:
                w = layer.dequantize(d_out, d_in, g.dtype)          # (O, I, *kernel), built again
                gx = layer.input_grad(g, ctx.x_shape, w)            # (N, I, H, W)
            else:
                w = layer.dequantize(dtype=g.dtype)
                scaled_g = layer.scale_samples(g, d_out, index)     # (N, O, H', W')
                gx = layer.input_grad(scaled_g, ctx.x_shape, w)
                gx = layer.scale_samples(gx, d_in, index)           # (N, I, H, W)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            grad_out = layer.gradient_of(d_out, g, y, bias, index)  # (O,) or (B, O)

        # dL/dd_in = sum of gx * x
        if train_in:
            grad_in = layer.gradient_of(d_in, gx, x, None, index)   # (I,) or (B, I)

        # dL/dbias = sum of g, for whoever lets a bias train: quantize freezes it
        if train_bias:
            grad_bias = sum_over(g, layer.batch_dims(g), bias.dtype)  # (O,)
        return gx, grad_out, grad_in, grad_bias, None, None


class PositionMatmul(torch.autograd.Function):
    """y = W x + bias for a convolution in which the scales of positions train.

    samples: for each of the B buckets in the batch, which samples are in it: their numbers (N_b,),
    or slice(None) if all are.
    d_out (B, O), d_in (B, K * I): their deltas. Shapes are again those without groups.
    x, bias, layer: as for ChannelMatmul.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer, samples):         # (N, I, H, W)
        parts = []
        for b, mine in enumerate(samples):
            w = layer.dequantize(d_out[b], d_in[b], x.dtype)        # (O, I, *kernel)
            parts.append(layer.matmul(x[mine], w, bias))            # (N_b, O, H', W')
        ctx.layer = layer
        ctx.samples = samples
        ctx.save_for_backward(x, d_out, d_in)
        return in_order(parts, samples)                             # (N, O, H', W')

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, d_out, d_in = checks.saved_tensors(ctx)
        layer = ctx.layer
        train_x, _, _, train_bias, _, _ = ctx.needs_input_grad
        gx = []
        grad_out = []
        grad_in = []
        for b, mine in enumerate(ctx.samples):
            w = layer.dequantize(d_out[b], d_in[b], g.dtype)        # (O, I, *kernel), built again
            gx_b, gw = layer.grads(g[mine], x[mine], w, train_x)
            m = layer.as_groups(w.to(d_out.dtype) * gw)             # (G, O, K, I): W * dL/dW
            gx.append(gx_b)                                         # (N_b, I, H, W)
            grad_out.append(m.sum((2, 3)).flatten())                # (G * O,)
            grad_in.append(m.sum(1).flatten())                      # (G * K * I,)
        gx = in_order(gx, ctx.samples) if train_x else None
        grad_bias = sum_over(g, layer.batch_dims(g), g.dtype) if train_bias else None
        return gx, torch.stack(grad_out), torch.stack(grad_in), grad_bias, None, None
# fmt: on


def in_order(parts: list[Tensor], samples: list[Tensor]) -> Tensor:
    """The samples of all parts, in the order of their numbers."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.cat(samples).argsort()]


class QuantLayer(KeepsPrecision):
    """A Conv2d or Linear whose weight is packed codes and scales; only the deltas are trained.

    codes: packed, uint8, in the order (G, O, K, I): groups, rows of a group, positions of the
    kernel, input channels of a group. Unpacked, this is a weight in channels_last.
    zero_point, s_out: (G * O,). s_in: (G * I,), or in the order (G, K, I) if columns are positions.
    d_out_0, d_in_0, d_out_1, ...: the deltas of each bucket, of the shape of s_out and of s_in;
    there are no d_in if columns aren't trained. Each bucket has parameters of its own, so that the
    gradient of a bucket that isn't in the batch is None.

    QuantLinear and QuantConv2d below say how to multiply, and where the channels of x and y are:
    float_type and its settings, groups, channel_dim, matmul, input_grad; convolutions grads, too.
    """

    def __init__(self, layer, n_bits, num_buckets, scales, columns, calibrate):
        super().__init__()
        for name in self.settings:
            setattr(self, name, getattr(layer, name))
        weight = layer.weight.detach()
        self.n_bits = n_bits
        self.num_buckets = num_buckets
        self.shape = weight.shape
        self.dtype = weight.dtype  # of the float weight; the scales have at least float32
        self.bias = None
        if layer.bias is not None:
            self.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)

        # one order of memory for all: sums round by it, and codes must not depend on the model's
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
        grouped = weight.reshape(self.groups, -1, self.shape[1], weight[0, 0].numel())
        if grouped.dtype.itemsize < 4:
            grouped = grouped.float()
        g, o, i, k = grouped.shape
        if columns == "position":
            grouped = grouped.reshape(g, o, i * k, 1)  # I * K columns of one position each
        grid = calibrate(grouped, n_bits)
        codes = grid.codes.view(g, o, i, k).mT.to(torch.uint8)  # (G, O, K, I)
        s_in = grid.s_in.view(g, i, -1).mT  # (G, K, I), or (G, 1, I) if columns are channels
        self.register_buffer("codes", pack(codes, n_bits))
        self.register_buffer("zero_point", grid.zero_point.flatten().to(torch.uint8))
        self.register_buffer("s_out", grid.s_out.flatten())
        self.register_buffer("s_in", s_in.flatten())

        self.trained = ("d_out", "d_in") if scales == "out+in" else ("d_out",)
        for kind in self.trained:
            scale = self.s_out if kind == "d_out" else self.s_in
            for b in range(num_buckets):
                self.register_parameter(f"{kind}_{b}", nn.Parameter(torch.zeros_like(scale)))
        self.trains_positions = "d_in" in self.trained and s_in.shape[1] > 1  # K of them

    def delta(self, kind: str, b: int) -> nn.Parameter | None:
        """d_out or d_in of bucket b; None if such deltas aren't trained."""
        return getattr(self, f"{kind}_{b}") if kind in self.trained else None

    # fmt: off
    def dequantize(self, d_out: Tensor | None = None, d_in: Tensor | None = None, dtype=None):
        """The float weight (G * O, I, *kernel), with the deltas of a bucket if they are given.

        dtype: of the weight, by default the one that the float weight had.
        """
        dtype = dtype or self.dtype
        if has_kernels_for(self.s_out):
            return kernels.dequantize(self, d_out, d_in, dtype)

        s_out = self.s_out if d_out is None else self.s_out * d_out.exp()
        s_in = self.s_in if d_in is None else self.s_in * d_in.exp()
        g = self.groups
        o = self.shape[0] // g                                      # rows of a group
        i = self.shape[1]                                           # input channels of a group
        kernel = self.shape[2:]                                     # () for a linear layer

        codes = unpack(self.codes, self.n_bits, (g, o, kernel.numel(), i))
        w = codes.to(s_out.dtype)                                   # (G, O, K, I)
        w.sub_(self.zero_point.view(g, o, 1, 1))                    # in place: no second copy
        w.mul_(s_out.view(g, o, 1, 1))
        w.mul_(s_in.view(g, 1, -1, i))                              # for each k, or for all
        w = w.view(g * o, *kernel, i)                               # (G * O, *kernel, I)
        return w.movedim(-1, 1).to(dtype)                           # (G * O, I, *kernel)
    # fmt: on

    @torch.no_grad()
    def weight_of(self, b: int) -> Tensor:
        """The float weight (G * O, I, *kernel) of bucket b, with its deltas."""
        return self.dequantize(self.delta("d_out", b), self.delta("d_in", b))

    @property
    def weight(self) -> Tensor:
        """The float weight, built at each access: code that copies weights gets the tuned one.

        With several buckets it has no deltas, because each bucket has others: merge one of them.
        """
        return self.weight_of(0) if self.num_buckets == 1 else self.dequantize()

    def forward(self, input):  # Linear and Conv2d call it input, too
        x = input
        if torch.is_autocast_enabled(x.device.type):  # autograd.Function isn't cast by itself
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)

        batch = self.batch_of_samples(x)
        d_out = [self.delta("d_out", b) for b in batch.present]
        d_in = [self.delta("d_in", b) for b in batch.present]
        if self.trains_positions:
            samples = [slice(None)]
            if batch.index is not None:
                samples = batch.index.argsort(stable=True).split(batch.counts)
            d_out = torch.stack(d_out)  # (B, O)
            d_in = torch.stack(d_in)  # (B, K * I)
            return PositionMatmul.apply(x, d_out, d_in, bias, self, samples)

        index = batch.index
        if index is None:
            d_out, d_in = d_out[0], d_in[0]
        else:
            d_out = torch.stack(d_out)  # (B, O)
            d_in = torch.stack(d_in) if "d_in" in self.trained else None  # (B, I)
        if x.dtype.itemsize >= 4:
            return ChannelMatmul.apply(x, d_out, d_in, bias, self, index)
        # In float16 and bfloat16, y - bias would have few digits of W x if the bias is large. So
        # y = W x is kept for backward, and the bias is added afterwards. PositionMatmul keeps no y.
        y = ChannelMatmul.apply(x, d_out, d_in, None, self, index)
        return self.add_bias(y, bias)

    def batch_of_samples(self, x: Tensor) -> Batch:
        """The Batch of the samples x; its index is None if they share a bucket."""
        if self.num_buckets == 1:
            return Batch([0], None)
        batch = current.batch
        if batch is None:
            raise RuntimeError(
                "a quantized layer wasn't told its timesteps: call the model given to quantize, "
                "or see checkpoint_contexts if it runs in a checkpoint"
            )
        if len(batch.present) == 1:
            return Batch(batch.present, None)
        if len(x) != len(batch.index):
            raise ValueError(
                f"a quantized layer got {len(x)} samples for {len(batch.index)} timesteps; "
                "dimension 0 must be the batch"
            )
        return Batch(batch.present, batch.index.to(x.device), batch.counts)

    def add_bias(self, y: Tensor, bias: Tensor | None) -> Tensor:
        """y (N, O, H', W') + bias (O,)."""
        return y if bias is None else y + self.along_channels(bias[None], y)

    def scale_samples(self, x: Tensor, d: Tensor | None, index: Tensor) -> Tensor:
        """x (N, ...) times exp(d) of each sample's bucket; d: (B, C). None leaves x as it is."""
        if d is None:
            return x
        if has_kernels_for(x):
            return kernels.scale_samples(x, d, index, self.channel_dim)
        factors = d.exp()[index].to(x.dtype)  # (N, C)
        return x * self.along_channels(factors, x)

    # fmt: off
    def gradient_of(self, d: Tensor, a: Tensor, b: Tensor, bias=None, index=None) -> Tensor:
        """dL/dd: a * (b - bias), summed over all samples and pixels that share a delta.

        a, b: (N, ...), with C channels. bias: (C,). d: (C,), or (B, C) with index (N,). a * b and a
        are summed apart, which needs no copy of b - bias.
        """
        if has_kernels_for(a):
            return kernels.gradient_of(d, a, b, self.channel_dim, bias, index)

        dims = self.batch_dims(a)
        if index is not None:
            dims = dims[1:]                                         # all but samples and channels
        product = a.to(d.dtype) * b.to(d.dtype)                     # in float16 it could overflow
        total = sum_over(product, dims, d.dtype)                    # (C,) or (N, C)
        if bias is not None:
            total = total - bias * sum_over(a, dims, d.dtype)
        if index is None:
            return total

        # is_in[b, n] is 1 if sample n is in bucket b: a matmul with it is a sum for each bucket
        is_in = F.one_hot(index, len(d)).to(d.dtype).T              # (B, N)
        with torch.autocast(total.device.type, enabled=False):      # it would round to bfloat16
            return is_in @ total                                    # (B, C)
    # fmt: on

    def as_groups(self, w: Tensor) -> Tensor:
        """w (G * O, I, *kernel) as (G, O, K, I)."""
        g = self.groups
        return w.movedim(1, -1).reshape(g, len(w) // g, -1, w.shape[1])

    def batch_dims(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions of samples and pixels (or tokens): all but the channels."""
        channels = x.dim() + self.channel_dim
        return tuple(dim for dim in range(x.dim()) if dim != channels)

    def along_channels(self, v: Tensor, x: Tensor) -> Tensor:
        """v (N, C) or (1, C) in a shape that can multiply x, such as (N, C, 1, 1)."""
        shape = [1] * x.dim()
        shape[0] = len(v)
        shape[self.channel_dim] = -1
        return v.view(shape)

    def extra_repr(self):
        shape = "x".join(str(size) for size in self.shape)
        bias = self.bias is not None
        return f"{shape}, n_bits={self.n_bits}, num_buckets={self.num_buckets}, bias={bias}"


class QuantLinear(QuantLayer):
    """x (N, ..., I) -> y (N, ..., O)."""

    float_type = nn.Linear
    settings = ("in_features", "out_features")
    groups = 1
    channel_dim = -1

    def matmul(self, x, w, bias=None):  # (N, ..., I), (O, I) -> (N, ..., O)
        return F.linear(x, w, bias)

    def input_grad(self, g, x_shape, w):  # (N, ..., O), (O, I) -> (N, ..., I)
        return g @ w


class QuantConv2d(QuantLayer):
    """x (N, I, H, W) -> y (N, O, H', W')."""

    float_type = nn.Conv2d
    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
    )
    channel_dim = -3  # a single image has no batch dimension, so it is counted from the last

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        # conv2d_input takes numbers only, not "same" or "valid"
        self.args = (layer.stride, checks.pixels(layer), layer.dilation, layer.groups)

    def matmul(self, x, w, bias=None):  # (N, I, H, W), (O, I, *kernel) -> (N, O, H', W')
        return F.conv2d(x, w, bias, *self.args)

    def input_grad(self, g, x_shape, w):  # (N, O, H', W'), (O, I, *kernel) -> (N, I, H, W)
        g = g.view(-1, *g.shape[-3:])  # adds the batch dimension to a single image
        shape = (len(g), *x_shape[-3:])
        return torch.nn.grad.conv2d_input(shape, w, g, *self.args).view(x_shape)

    def grads(self, g, x, w, train_x):
        """dL/dx, None if it isn't needed, and dL/dw (G * O, I, *kernel)."""
        if x.dim() == 3:  # a single image without a batch dimension
            gx, gw = self.grads(g[None], x[None], w, train_x)
            return gx[0] if train_x else None, gw
        stride, padding, dilation, groups = self.args
        gx, gw, _ = torch.ops.aten.convolution_backward(
            g,
            x,
            w,
            None,  # no bias
            stride,
            padding,
            dilation,
            False,  # not transposed
            (0, 0),
            groups,
            (train_x, True, False),  # which of the gradients of x, w and the bias
        )
        return gx, gw


def sum_over(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x summed over dims, in dtype."""
    if not dims:  # x.sum(()) would be the sum over all
        return x.to(dtype)
    return x.sum(dims, dtype=dtype)


def has_kernels_for(x: Tensor) -> bool:
    """True if gpu_kernels.py takes over from the plain code for x: on a GPU, with Triton."""
    return kernels is not None and kernels.usable(x)


# --------------------------------------------------------------------------------------------------
# The swap: how a model gets quantized layers
# --------------------------------------------------------------------------------------------------


def quantize(
    model: nn.Module,
    n_bits: int = 4,
    num_buckets: int = 1,
    T: float = 1000,
    scales: str = "out+in",
    columns: str = "position",
    calibration: str | None = None,
    timestep: str = "t",
    keep8: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
    edges: Sequence[float] | None = None,
    data: Iterable | None = None,
) -> nn.Module:
    """Replace every Conv2d and Linear of model by a quantized layer; then only deltas train.

    Returns model itself. model.quant_config holds the arguments but data, defaults filled in, and
    edges for num_buckets and T.

    n_bits: 2 to 8.
    num_buckets: how many scale sets there are over the timesteps 0 .. T. T must be that of the
        model: if its times reach from 0 to 1 and T is 1000, all of them are in the first bucket.
    scales: what is trained, "out" (rows alone, PEQA) or "out+in".
    columns: what has a scale s_in, "channel" (an input channel, as in the paper) or "position" (an
        input channel at a position of the kernel).
    calibration: "minmax", "mse", "rowcol" (calibrate.py), or "gptq", which needs data (gptq.py).
        By default gptq if there are data, else rowcol.
    timestep: the name of the argument of model.forward that holds the timesteps, (N,) or one for
        all samples. A model with one bucket doesn't need it.
    keep8: patterns of names of layers to keep at 8 bits, such as "down.*"; by default the first and
        the last Conv2d, which in a UNet read and write the image itself.
    keep_float: patterns of names of layers to leave as they are.
    edges: the edges of the buckets, if they aren't equal intervals; num_buckets and T are then
        ignored.
    data: for gptq (the others ignore them), batches that model is called with: tuples of positional
        arguments, or dicts of keyword arguments, at most 256 of them. They should show noisy images
        at all timesteps; a hundred images suffice, and memory holds what one layer sees on them.
        Called on a batch again, the model must call the same layers with the same inputs, so its
        random numbers come from PyTorch's global generator, or with data.

    Raises ValueError before anything is changed, for what support/checks.py refuses.
    """
    if edges is None:
        checks.check_buckets(num_buckets, T)
        edges = equal_edges(num_buckets, T)
    if calibration is None:
        calibration = "rowcol" if data is None else "gptq"
    checks.check_arguments(model, n_bits, edges, scales, columns, calibration, timestep)
    edges = [float(edge) for edge in edges]
    num_buckets = len(edges) - 1
    keep_float = checks.as_patterns(model, "keep_float", keep_float)
    layers = checks.layers_to_replace(model, keep_float)  # {layer: its names}
    if keep8 is None:
        convs = [names[0] for layer, names in layers.items() if isinstance(layer, nn.Conv2d)]
        keep8 = list(dict.fromkeys(convs[:1] + convs[-1:]))  # one name, if there is one Conv2d
    else:
        keep8 = checks.as_patterns(model, "keep8", keep8)

    def build(layer, calibrate):
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        bits = 8 if any(checks.matches(name, keep8) for name in layers[layer]) else n_bits
        return kind(layer, bits, num_buckets, scales, columns, calibrate)

    # All layers are made before the model is changed: an error leaves it as it was.
    if calibration == "gptq":
        # gptq tries each layer in the model and takes it out again; any bucket will do, because
        # deltas are zero
        with set_batch(Batch([0], None)):
            quantized = quantize_with_data(model, layers, build, data)
    else:
        quantized = {layer: build(layer, CALIBRATIONS[calibration]) for layer in layers}

    model.quant_frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    # from now on only deltas train, also those of a quantized model inside that keep_float names
    set_layers(model, layers, quantized)
    model.requires_grad_(False)
    for delta in deltas(model).values():
        delta.requires_grad_(True)
    for layer, made in quantized.items():
        made.train(layer.training)
    for module in model.modules():
        if getattr(module, "inplace", False):  # such as nn.ReLU(inplace=True)
            module.inplace = False  # a quantized layer may keep its output for backward

    model.quant_config = {
        "n_bits": int(n_bits),
        "edges": edges,
        "scales": scales,
        "columns": columns,
        "calibration": calibration,
        "timestep": timestep,
        "keep8": keep8,
        "keep_float": keep_float,
    }
    model.quant_hooks = []
    if num_buckets > 1:
        model.quant_hooks = [
            model.register_forward_pre_hook(enter_call, with_kwargs=True),
            model.register_forward_hook(leave_call, always_call=True),
            *add_edges(model),
        ]
    return model


# --------------------------------------------------------------------------------------------------
# What you carry away
# --------------------------------------------------------------------------------------------------


def deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The deltas by name: d_out_b and d_in_b of each layer and bucket b.

    A moving average of a model (EMA) should average these alone. In an average of its buffers or
    its state_dict, packed codes would be averaged as numbers, and rounded.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for key, parameter in layer.named_parameters():
                if key != "bias":
                    found[f"{name}.{key}"] = parameter
    return found


STATISTICS = ("running_mean", "running_var", "num_batches_tracked")  # of BatchNorm


def others_and_base(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's state_dict without deltas: what else training moves, and what stays.

    Training moves parameters that require a gradient, and the running statistics of BatchNorm.
    """
    mine = {id(delta) for delta in deltas(model).values()}
    others = {}
    base = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in mine or not torch.is_tensor(tensor):
            continue
        name = name.replace("_orig_mod.", "")  # torch.compile has it in the names of its parts
        if tensor.requires_grad or name.endswith(STATISTICS):
            others[name] = tensor
        else:
            base[name] = tensor
    return others, base


def adapter(model: nn.Module) -> dict:
    """What was trained, ready for torch.save: two bytes for each delta.

    It holds quant_config, the fingerprint of the quantized base, all deltas in one float16 tensor,
    and the others unchanged: parameters that require a gradient, and the running statistics of
    BatchNorm. The model keeps its own deltas, which aren't rounded, so it differs a little from one
    that loads the adapter. Raises ValueError if a number isn't finite (a delta: in float16), and if
    no parameter requires a gradient, because then nothing says what was trained.
    """
    model = checks.unwrapped(model)
    mine = deltas(model)
    others, base = others_and_base(model)
    values = torch.cat([gathered(delta) for delta in mine.values()]).half().cpu()
    others = {name: gathered(tensor).cpu().clone() for name, tensor in others.items()}
    checks.check_trained(model, {"a delta": values, **others})
    return {
        "quant_config": dict(model.quant_config),
        "fingerprint": hash_of(sorted(base.items())),
        "deltas": values,
        "others": others,
    }


def load_adapter(model: nn.Module, saved: dict, *more: dict, strength: float = 1.0) -> None:
    """Give model the deltas of an adapter, or the sum of several adapters' deltas.

    A sum of deltas is a product of scales: W is changed by the factors of all adapters. It doesn't
    depend on their order, to the bit; one that is given twice counts once, and deltas that model
    had before don't count. strength: what the sum is multiplied by; 0 is the base.

    The other tensors of an adapter (also the statistics of BatchNorm) replace the model's, and its
    parameters then train here, too. They can't be added or scaled: such an adapter must be alone,
    at strength 1.

    Raises ValueError if an adapter was made for another quantized base, or is damaged. The model
    then stays as it was. The base has to be the same bit for bit: load the adapter in the dtype
    that it was trained in, and cast the model afterwards; and load it into the saved base rather
    than one that another processor has quantized.
    """
    model = checks.unwrapped(model)
    mine = deltas(model)
    sizes = [delta.numel() for delta in mine.values()]
    others, base = others_and_base(model)
    tensors = {**others, **base}
    adapters = [saved, *more]
    for number, each in enumerate(adapters, 1):
        which = "the adapter" if len(adapters) == 1 else f"adapter {number}"
        checks.check_adapter(each, which, model.quant_config, sum(sizes), tensors)

    distinct = []
    for values in (each["deltas"].cpu().double() for each in adapters):
        if not any(torch.equal(values, other) for other in distinct):
            distinct.append(values)
    total = torch.stack(distinct).sum(0) * strength  # of float16 values: exact in float64
    checks.check_sum(adapters, strength, total)
    with torch.no_grad():
        for delta, value in zip(mine.values(), total.split(sizes)):
            delta.copy_(value)
        for name, value in saved["others"].items():
            tensors[name].copy_(value)
            if isinstance(tensors[name], nn.Parameter):
                tensors[name].requires_grad_(True)


def merge(model: nn.Module, bucket_index: int = 0) -> nn.Module:
    """A copy of model with plain float layers, whose weights are those of one bucket.

    What required a gradient before quantize requires one in the copy. Raises IndexError if there is
    no such bucket, and ValueError if hooks of a layer or the buckets of another quantized model
    inside would be lost.
    """
    model = checks.unwrapped(model)
    checks.check_merge(model, bucket_index)
    model = copy.deepcopy(model)
    plain_of = {}  # a layer used in two places stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLayer):
            if layer not in plain_of:
                plain_of[layer] = plain_layer(layer, bucket_index)
            model.set_submodule(name, plain_of[layer])

    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in model.quant_frozen)
    for hook in model.quant_hooks:
        hook.remove()
    del model.quant_config, model.quant_hooks, model.quant_frozen
    return model


def plain_layer(layer: QuantLayer, b: int) -> nn.Module:
    """A float Conv2d or Linear with the weight of bucket b."""
    settings = {name: getattr(layer, name) for name in layer.settings}
    plain = layer.float_type(**settings, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(layer.weight_of(b))
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach())
    return plain.train(layer.training)

"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion
Model", arXiv 2401.04339).

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")    # in place; then train model

A weight is quantized once, to integers q of n_bits bits that stay as they are. Each row (output
channel) has a scale and a zero point z, and each column (input channel) has a scale. All positions
of a convolution's kernel share them:

    W[o, i] = s_out[o] * (q[o, i] - z[o]) * s_in[i]                 q, z in 0 .. 2^n_bits - 1

Fine-tuning trains the scales and nothing else. Training s_out alone is PEQA (Kim et al. 2023);
training both is the paper's multi-channel-wise scale update (MCSU). The timesteps are cut into
num_buckets intervals, and each has scales of its own over the same integers: the paper's
timestep-aware scale update (TAS).

The paper trains the scales themselves. Here the parameters are deltas d_out and d_in, which are
zero at the start and stand in an exponent:

    W[o, i] = s_out[o] exp(d_out[o]) * (q[o, i] - z[o]) * s_in[i] exp(d_in[i])

One learning rate then means the same in every layer, deltas of zero are the base model, and no
scale can reach zero. With y = W x + bias and g = dL/dy, the gradients are

    gx           = dL/dx = W^T g
    dL/dd_out[o] = sum over samples and positions of g[o] * (y[o] - bias[o])
    dL/dd_in[i]  = sum over samples and positions of gx[i] * x[i]

The last two are this simple because exp is its own derivative. y[o] - bias[o] is exp(d_out[o])
times a number, so its derivative by d_out[o] is y[o] - bias[o] again. And y depends
on d_in[i] only through u = exp(d_in[i]) x[i], so dL/dd_in[i] = dL/du * u, which is dL/dx[i] * x[i].

So no gradient of a weight is ever computed. For backward a layer keeps its packed integers, x (if
d_in trains) and y (if d_out trains). In half precision a layer with a bias keeps W x instead of y:
see bias_can_be_subtracted. The float W lives for one matmul at a time, and backward builds it
again.

If all samples of a batch share a bucket, W has the scales of that bucket. If not, W has the scales
of the base (s_out and s_in without deltas), and the exp(d_in) and exp(d_out) of each sample's
bucket multiply its activations before and after the matmul. A bucket without a sample in the batch
has no gradient (None, not zeros), so the optimizer skips it and leaves its momentum alone.

The chapters: buckets, bits, timesteps, the layer, the swap, afterwards. calibrate.py finds the
integers and the scales to start from.
"""

import contextlib
import copy
import hashlib
import inspect
import reprlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from calibrate import CALIBRATIONS, count_calls, gptq, inputs_of, moments, pixels

try:
    import gpu_kernels as kernels  # on a GPU they do a layer's work in fewer launches
except ImportError:  # no Triton, or the file isn't beside this one
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
    """The bucket of each timestep: b if edges[b] <= t < edges[b + 1].

    t: timesteps in 0 .. T, of any shape and dtype; T = edges[-1] itself belongs to the last
    bucket. Returns int64, of t's shape, on t's device. Raises ValueError if a timestep lies
    outside or is NaN.
    """
    t = torch.as_tensor(t)
    time = t.cpu().double()  # exact for every dtype of t; not every device has float64
    inside = (time >= edges[0]) & (time <= edges[-1])  # False for NaN
    if not inside.all():
        wrong = time[~inside].flatten()[0].item()
        raise ValueError(
            f"timesteps must lie in {edges[0]:g} .. {edges[-1]:g}, and one is {wrong:g}; "
            "correct it, or quantize with another T or other edges"
        )
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
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
# Timesteps: what the layers are told about a batch
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a call of a model tells its layers about the batch."""

    model: nn.Module  # whose call it is
    buckets: list[int]  # the B buckets in the batch, in increasing order
    slot: Tensor  # each sample's place in buckets: (N,), or (1,) if one timestep is for all
    outer: "Batch | None" = None  # of the call around this one, if a quantized model calls another
    # the buckets were found before the call, and enter_call leaves them: a CUDA graph can't read
    # timesteps (experiments/graphs.py)
    is_fixed: bool = False


class Current(threading.local):
    """The batch of the innermost call, for as long as the call lasts. Each thread has its own.

    It isn't kept in the model: two threads may call one model at once, and a model may be copied or
    pickled at any time. torch.compile understands this class, but not a ContextVar.
    """

    batch: Batch | None = None


current = Current()


def find_buckets(t: Tensor, edges: list[float]) -> tuple[list[int], Tensor]:
    """The buckets and the slot (see Batch) of a batch with timesteps t, (N,) or one for all.

    With two buckets, t = [900, 100, 950] has buckets = [0, 1] and slot = [1, 0, 1].
    """
    b = bucket(t, edges).flatten()
    buckets, slot = b.unique(return_inverse=True)
    return buckets.tolist() or [0], slot  # a batch may be empty


def enter_call(model, args, kwargs):
    """Before the model's forward: find the buckets in the batch."""
    outer = current.batch
    if outer is not None and outer.model is model and outer.is_fixed:
        return
    config = model.quant_config
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    t = given.get(config["timestep"])
    if t is None:
        name = config["timestep"]
        raise ValueError(f"a model with several buckets needs timesteps; give it '{name}'")
    buckets, slot = find_buckets(t, config["edges"])
    current.batch = Batch(model, buckets, slot, outer)


def leave_call(model, *_):
    """After the model's forward, even if it failed, so that a layer called on its own raises.

    After KeyboardInterrupt PyTorch calls no hook. That batch then stays, as the outer one of later
    calls. They are right all the same, but a layer called on its own no longer raises.
    """
    batch = current.batch
    if batch is not None and batch.model is model and not batch.is_fixed:
        current.batch = batch.outer


def remember():
    """The context_fn for torch.utils.checkpoint in a model with several buckets.

    checkpoint(block, x, use_reentrant=False, context_fn=remember) calls this for two contexts. It
    runs the block in the first and, in backward, again in the second. By then the call of the
    model is over, so the second context sets that call's batch again.

    Leave it out under torch.compile, which takes no such contexts: its graph knows the batch.
    """
    return contextlib.nullcontext(), batch_set(current.batch)


class batch_set:
    """A context in which batch is the current one. Backward may run twice, and enter it again."""

    def __init__(self, batch: Batch | None):
        self.batch = batch

    def __enter__(self):
        self.outer = current.batch
        current.batch = self.batch

    def __exit__(self, *error):
        current.batch = self.outer


# --------------------------------------------------------------------------------------------------
# The layer: frozen integers, trained scales
# --------------------------------------------------------------------------------------------------


# The formatter would move the shape comments out of their column.
# fmt: off
class OneBucket(torch.autograd.Function):
    """y = W x + bias, for a batch whose samples all share a bucket: W has that bucket's scales.

    Shapes are written for a convolution without groups; a linear layer has x (N, ..., I) and
    y (N, ..., O).
    d_out (O,), d_in (I,): the deltas of the bucket; d_in is None if columns aren't trained.
    bias: (O,) or None. layer: the QuantLayer, which knows how to multiply.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer):                  # (N, I, H, W)
        _, train_out, train_in, _, _ = ctx.needs_input_grad

        # y = W x + bias
        w = layer.dequantize(d_out, d_in, x.dtype)                  # (O, I, *kernel)
        if bias is None or bias_can_be_subtracted(x):
            y = layer.matmul(x, w, bias)                            # (N, O, H', W')
            kept_y = y
        else:
            kept_y = layer.matmul(x, w)
            y = layer.add_bias(kept_y, bias)

        ctx.layer = layer
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = kept_y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)    # w isn't kept
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer = ctx.layer
        train_x, train_out, train_in, train_bias, _ = ctx.needs_input_grad
        gx = grad_out = grad_in = grad_bias = None

        # gx = W^T g
        if train_x or train_in:
            w = layer.dequantize(d_out, d_in, g.dtype)              # (O, I, *kernel), built again
            gx = layer.input_grad(g, ctx.x_shape, w)                # (N, I, H, W)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            bias_in_y = bias if bias_can_be_subtracted(y) else None
            grad_out = layer.gradient_of(d_out, g, y, bias_in_y)    # (O,)

        # dL/dd_in = sum of gx * x
        if train_in:
            grad_in = layer.gradient_of(d_in, gx, x)                # (I,)

        # dL/dbias = sum of g, for whoever lets a bias train: quantize freezes it
        if train_bias:
            dims = layer.batch_dims(g)                              # samples and positions
            grad_bias = sum_over(g, dims, bias.dtype)               # (O,)
        return gx, grad_out, grad_in, grad_bias, None


class MixedBuckets(torch.autograd.Function):
    """y = exp(d_out) * W (exp(d_in) * x) + bias, each sample with the deltas of its own bucket.

    W has the base's scales and serves all samples, so one matmul suffices. x, bias, layer: as
    for OneBucket. d_out (B, O), d_in (B, I) or None: the deltas of the B buckets in the batch.
    slot (N,): which of the B rows belongs to each sample.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer, slot):            # (N, I, H, W)
        _, train_out, train_in, _, _, _ = ctx.needs_input_grad

        # y = exp(d_out) * W (exp(d_in) * x) + bias
        w = layer.dequantize(dtype=x.dtype)                         # (O, I, *kernel)
        y = layer.matmul(layer.scale_samples(x, d_in, slot), w)     # (N, O, H', W')
        y = layer.scale_samples(y, d_out, slot)
        kept_y = y
        if bias is not None:
            y = layer.add_bias(y, bias)
            kept_y = y if bias_can_be_subtracted(y) else kept_y

        ctx.layer = layer
        ctx.slot = slot
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = kept_y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer = ctx.layer
        slot = ctx.slot
        train_x, train_out, train_in, train_bias, _, _ = ctx.needs_input_grad
        gx = grad_out = grad_in = grad_bias = None

        # gx = exp(d_in) * W^T (exp(d_out) * g)
        if train_x or train_in:
            w = layer.dequantize(dtype=g.dtype)                     # (O, I, *kernel)
            scaled_g = layer.scale_samples(g, d_out, slot)          # (N, O, H', W')
            gx = layer.input_grad(scaled_g, ctx.x_shape, w)         # (N, I, H, W)
            gx = layer.scale_samples(gx, d_in, slot)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            bias_in_y = bias if bias_can_be_subtracted(y) else None
            grad_out = layer.gradient_of(d_out, g, y, bias_in_y, slot)  # (B, O)

        # dL/dd_in = sum of gx * x
        if train_in:
            grad_in = layer.gradient_of(d_in, gx, x, None, slot)    # (B, I)

        # dL/dbias = sum of g, for whoever lets a bias train: quantize freezes it
        if train_bias:
            dims = layer.batch_dims(g)                              # samples and positions
            grad_bias = sum_over(g, dims, bias.dtype)               # (O,)
        return gx, grad_out, grad_in, grad_bias, None, None
# fmt: on


def bias_can_be_subtracted(y: Tensor) -> bool:
    """True if subtracting the bias from y gives W x again: y is then kept for backward.

    The next layer often keeps y as well, which makes it free. In float16 and bfloat16 a large bias
    leaves few digits of W x in y. There W x itself is kept.
    """
    return y.dtype.itemsize >= 4


def sum_over(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x summed over dims, in dtype."""
    if not dims:  # x.sum(()) would be the sum over all
        return x.to(dtype)
    return x.sum(dims, dtype=dtype)


def has_kernels_for(x: Tensor) -> bool:
    """True if gpu_kernels.py takes over from the plain code for x: on a GPU, with Triton."""
    return kernels is not None and kernels.usable(x)


class QuantLayer(nn.Module):
    """A Conv2d or Linear whose weight is packed integers and scales; only the deltas are trained.

    codes: the packed integers, uint8, in the order (G, O, K, I): groups, rows of a group, positions
    of the kernel, columns. What is unpacked in this order is a weight in channels_last.
    zero_point, s_out: (G * O,).
    s_in: (G * I,).
    d_out_0, d_in_0, d_out_1, ...: the deltas of each bucket, of the shape of s_out and of s_in;
    there are no d_in if columns aren't trained. A bucket has parameters of its own, so that one
    that isn't drawn has no gradient.

    QuantLinear and QuantConv2d add how to multiply, and where the channels of x and y are.
    """

    def __init__(self, layer, n_bits, num_buckets, scales, calibrate):
        super().__init__()
        weight = layer.weight.detach()
        self.n_bits = n_bits
        self.num_buckets = num_buckets
        self.shape = weight.shape
        self.dtype = weight.dtype  # of the float weight; the scales have at least float32
        self.groups = getattr(layer, "groups", 1)
        bias = layer.bias
        if bias is not None and not isinstance(bias, nn.Parameter):  # a buffer, or parametrized
            bias = nn.Parameter(bias.detach(), requires_grad=False)
        self.bias = bias

        # always channels_last: in another order a calibration rounds differently, and the
        # codes must not depend on the order in memory
        weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
        rows = len(weight) // self.groups
        grouped = weight.reshape(self.groups, rows, weight.shape[1], -1)  # (G, O, I, K)
        if grouped.dtype.itemsize < 4:
            grouped = grouped.float()
        grid = calibrate(grouped, n_bits)
        codes = grid.codes.mT.to(torch.uint8)  # (G, O, K, I)
        self.register_buffer("codes", pack(codes, n_bits))
        self.register_buffer("zero_point", grid.zero_point.flatten().to(torch.uint8))
        self.register_buffer("s_out", grid.s_out.flatten())
        self.register_buffer("s_in", grid.s_in.flatten())

        self.trained = ("d_out", "d_in") if scales == "out+in" else ("d_out",)
        for kind in self.trained:
            scale = self.s_out if kind == "d_out" else self.s_in
            for b in range(num_buckets):
                self.register_parameter(f"{kind}_{b}", nn.Parameter(torch.zeros_like(scale)))

    def delta(self, kind: str, b: int) -> nn.Parameter | None:
        """d_out (G * O,) or d_in (G * I,) of bucket b; None if such deltas aren't trained."""
        return getattr(self, f"{kind}_{b}") if kind in self.trained else None

    # fmt: off
    def dequantize(self, d_out: Tensor | None = None, d_in: Tensor | None = None, dtype=None):
        """The float weight (G * O, I, *kernel) for the deltas of a bucket, by default the base's.

        d_out (G * O,), d_in (G * I,): deltas; None stands for zeros. dtype: of the weight, by
        default the model's.
        """
        dtype = dtype or self.dtype
        if has_kernels_for(self.s_out):
            return kernels.dequantize(self, d_out, d_in, dtype)

        s_out = self.s_out if d_out is None else self.s_out * d_out.exp()
        s_in = self.s_in if d_in is None else self.s_in * d_in.exp()
        g = self.groups
        o = self.shape[0] // g                                      # rows of a group
        i = self.shape[1]                                           # columns of a group
        kernel = self.shape[2:]                                     # () for a linear layer

        codes = unpack(self.codes, self.n_bits, (g, o, kernel.numel(), i))
        w = codes.to(s_out.dtype)                                   # (G, O, K, I)
        w.sub_(self.zero_point.view(g, o, 1, 1))                    # in place: no second copy
        w.mul_(s_out.view(g, o, 1, 1))
        w.mul_(s_in.view(g, 1, 1, i))
        w = w.view(g * o, *kernel, i)                               # (G * O, *kernel, I)
        return w.movedim(-1, 1).to(dtype)                           # (G * O, I, *kernel)
    # fmt: on

    @property
    def weight(self) -> Tensor:
        """The base's float weight, without deltas: for code that asks a layer for its dtype, say.

        It is built at each access. Multiplying by it would leave the fine-tuning out.
        """
        return self.dequantize()

    def forward(self, input):  # the name that Linear and Conv2d have for it
        x = input
        if torch.is_autocast_enabled(x.device.type):  # autograd.Function isn't cast by itself
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        buckets, slot = self.buckets_of_batch(x)

        d_out = [self.delta("d_out", b) for b in buckets]
        d_in = [self.delta("d_in", b) for b in buckets]
        if slot is None:
            return OneBucket.apply(x, d_out[0], d_in[0], bias, self)

        d_out = torch.stack(d_out)  # (B, O)
        d_in = torch.stack(d_in) if "d_in" in self.trained else None  # (B, I)
        return MixedBuckets.apply(x, d_out, d_in, bias, self, slot)

    def buckets_of_batch(self, x: Tensor) -> tuple[list[int], Tensor | None]:
        """What the layer was told about the batch x (see Batch): its buckets and slots."""
        if self.num_buckets == 1:
            return [0], None
        batch = current.batch
        if batch is None:
            raise RuntimeError(
                "a quantized layer wasn't told its timesteps: "
                "call the model given to quantize, or see remember if it runs in a checkpoint"
            )
        if len(batch.buckets) == 1:
            return batch.buckets, None
        if len(x) != len(batch.slot):
            raise ValueError(
                f"a quantized layer got {len(x)} samples for {len(batch.slot)} timesteps; "
                "dimension 0 must be the batch"
            )
        return batch.buckets, batch.slot.to(x.device)

    def add_bias(self, y: Tensor, bias: Tensor) -> Tensor:
        """y (N, O, H', W') + bias (O,)."""
        return y + self.along_channels(bias[None], y)

    def scale_samples(self, x: Tensor, d: Tensor | None, slot: Tensor) -> Tensor:
        """x (N, ...) times exp(d) of each sample's bucket; d: (B, C). None leaves x as it is."""
        if d is None:
            return x
        if has_kernels_for(x):
            return kernels.scale_samples(x, d, slot, self.channel_dim)
        factors = d.exp()[slot].to(x.dtype)  # (N, C)
        return x * self.along_channels(factors, x)

    # fmt: off
    def gradient_of(self, d: Tensor, a: Tensor, b: Tensor, bias=None, slot=None) -> Tensor:
        """dL/dd: a * (b - bias), summed over all samples and positions that share a delta.

        Without kernels, a * b and a are summed apart, which needs no copy of b - bias.
        a, b: (N, ...), with C channels. bias: (C,). d: (C,), if all samples share a bucket; else
        (B, C), with slot (N,).
        """
        if has_kernels_for(a):
            return kernels.gradient_of(d, a, b, self.channel_dim, bias, slot)

        dims = self.batch_dims(a) if slot is None else self.position_dims(a)
        product = a.to(d.dtype) * b.to(d.dtype)                     # in float16 it could overflow
        total = sum_over(product, dims, d.dtype)                    # (C,) or (N, C)
        if bias is not None:
            total = total - bias * sum_over(a, dims, d.dtype)
        if slot is None:
            return total

        # is_in[b, n] is 1 if sample n is in bucket b: a matmul with it is a sum for each bucket
        is_in = F.one_hot(slot, len(d)).to(d.dtype).T               # (B, N)
        with torch.autocast(total.device.type, enabled=False):      # backward may run in it
            return is_in @ total                                    # (B, C)
    # fmt: on

    def _apply(self, fn, recurse=True):
        """What model.half(), model.to("cuda") and the like call, with an fn for every tensor.

        Whatever they ask for, integers stay integers, and scales, deltas and bias don't become
        float16 or bfloat16. In float16 a small scale becomes 0 and a large one infinite, and in
        bfloat16 a delta loses the steps of the optimizer to rounding.
        """

        def at_least_float32(tensor):
            moved = fn(tensor)
            too_coarse = moved.dtype.itemsize < 4 or not tensor.is_floating_point()
            if moved.dtype != tensor.dtype and too_coarse:
                return tensor.to(moved.device)
            return moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(at_least_float32, recurse)

    def extra_repr(self):
        shape = "x".join(str(size) for size in self.shape)
        bias = self.bias is not None
        return f"{shape}, n_bits={self.n_bits}, num_buckets={self.num_buckets}, bias={bias}"


class QuantLinear(QuantLayer):
    """x (N, ..., I) -> y (N, ..., O)."""

    channel_dim = -1

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_features = layer.in_features
        self.out_features = layer.out_features

    def matmul(self, x, w, bias=None):  # (N, ..., I), (O, I) -> (N, ..., O)
        return F.linear(x, w, bias)

    def input_grad(self, g, x_shape, w):  # (N, ..., O), (O, I) -> (N, ..., I)
        return g @ w

    def batch_dims(self, x):  # samples and positions: all but the channels
        return tuple(range(x.dim() - 1))

    def position_dims(self, x):  # all but samples and channels
        return tuple(range(1, x.dim() - 1))

    def along_channels(self, v, x):  # (N, C) -> (N, 1, ..., 1, C), or (1, C) -> (C,)
        ones = [1] * (x.dim() - 2)
        return v.view(len(v), *ones, -1) if x.dim() > 1 else v[0]

    def plain(self, **kwargs):
        """A float layer of the same shape."""
        return nn.Linear(self.in_features, self.out_features, **kwargs)


class QuantConv2d(QuantLayer):
    """x (N, I, H, W) -> y (N, O, H', W')."""

    channel_dim = -3  # a single image has no batch dimension, so it is counted from the last

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.padding_mode = layer.padding_mode

        self.pixels = pixels(layer)  # conv2d_input takes numbers only, not "same" or "valid"

    def matmul(self, x, w, bias=None):  # (N, I, H, W), (O, I, *kernel) -> (N, O, H', W')
        return F.conv2d(x, w, bias, self.stride, self.pixels, self.dilation, self.groups)

    def input_grad(self, g, x_shape, w):  # (N, O, H', W'), (O, I, *kernel) -> (N, I, H, W)
        g = g.view(-1, *g.shape[-3:])  # adds the batch dimension to a single image
        shape = (len(g), *x_shape[-3:])
        args = (self.stride, self.pixels, self.dilation, self.groups)
        return torch.nn.grad.conv2d_input(shape, w, g, *args).view(x_shape)

    def batch_dims(self, x):  # samples and positions: all but the channels
        return (0, 2, 3) if x.dim() == 4 else (1, 2)

    def position_dims(self, x):
        return (2, 3)

    def along_channels(self, v, x):  # (N, C) -> (N, C, 1, 1), or (1, C) -> (C, 1, 1)
        return v[:, :, None, None] if x.dim() == 4 else v[0, :, None, None]

    def plain(self, **kwargs):
        """A float layer of the same shape."""
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
    calibration: str | None = None,
    timestep: str = "t",
    keep8: Sequence[str] | None = None,
    keep_float: Sequence[str] = (),
    edges: Sequence[float] | None = None,
    data: Iterable | None = None,
) -> nn.Module:
    """Replace every Conv2d and Linear of model by a quantized layer; then only deltas train.

    Returns model itself. model.quant_config holds the arguments, with edges for num_buckets and T.

    n_bits: 2 to 8.
    num_buckets: how many scale sets there are over the timesteps 0 .. T. T must be that of the
        model: if its times reach from 0 to 1 and T is 1000, all of them are in the first bucket.
    scales: what is trained, "out" (rows alone, PEQA) or "out+in".
    calibration: "minmax", "mse", "rowcol", or "gptq", which needs data; see calibrate.py. By
        default gptq if there are data, else rowcol.
    timestep: the name of the argument of model.forward that holds the timesteps, (N,) or one for
        all samples. A model with one bucket doesn't need it.
    keep8: patterns of names of layers to keep at 8 bits, such as "down.*"; by default the first and
        the last Conv2d, in the order of model.named_modules().
    keep_float: patterns of names of layers to leave as they are.
    edges: the edges of the buckets, if they aren't equal intervals; num_buckets and T are then
        ignored.
    data: for gptq (the others ignore them), batches that model is called with: tuples of positional
        arguments, or dicts of keyword arguments. They should show noisy images at all timesteps; a
        hundred images suffice. The model is called twice on each batch for each layer, and stopped
        at that layer by an exception. It must call the same layers in the same order each time.

    Raises ValueError before anything is changed: for arguments out of range, for patterns that fit
    no module, for a model that is quantized already or has nothing to quantize, for data that don't
    suit gptq, and for any layer that can't be quantized, with its name and the reason (see
    why_not). Leave that one out by keep_float.
    """
    if edges is None:
        check_buckets(num_buckets, T)
        edges = equal_edges(num_buckets, T)
    if calibration is None:
        calibration = "rowcol" if data is None else "gptq"
    check_arguments(model, n_bits, edges, scales, calibration, timestep)
    num_buckets = len(edges) - 1
    keep_float = as_patterns(model, "keep_float", keep_float)
    layers = find_layers(model, keep_float)
    keep8 = first_and_last_conv(layers) if keep8 is None else as_patterns(model, "keep8", keep8)

    def build(layer, calibrate):
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        bits = 8 if any(matches(name, keep8) for name in layers[layer]) else n_bits
        return kind(layer, bits, num_buckets, scales, calibrate)

    # All layers are made before the first is replaced: an error leaves the model as it was.
    if calibration == "gptq":
        made = make_with_data(model, layers, build, data)
    else:
        made = {layer: build(layer, CALIBRATIONS[calibration]) for layer in layers}

    # freeze the model now: the new layers, whose deltas train, are put in afterwards
    inner_deltas = deltas(model).values()  # of a quantized model inside, named in keep_float
    model.requires_grad_(False)
    for delta in inner_deltas:
        delta.requires_grad_(True)
    put(model, layers, made)
    for layer, quantized in made.items():
        quantized.train(layer.training)

    model.quant_config = {
        "n_bits": int(n_bits),
        "edges": [float(edge) for edge in edges],
        "scales": scales,
        "calibration": calibration,
        "timestep": timestep,
        "keep8": keep8,
        "keep_float": keep_float,
    }
    if num_buckets > 1:
        model.register_forward_pre_hook(enter_call, with_kwargs=True)
        model.register_forward_hook(leave_call, always_call=True)
    return model


def put(model: nn.Module, layers: dict[nn.Module, list[str]], made: dict[nn.Module, nn.Module]):
    """Put each layer's quantized version in its places, or the float layer if none is made yet.

    layers: {float layer: its names}. made: {float layer: quantized layer}.
    """
    for layer, names in layers.items():
        for name in names:
            model.set_submodule(name, made.get(layer, layer))


@torch.no_grad()
def make_with_data(model, layers, build, data) -> dict[nn.Module, nn.Module]:
    """Make the quantized layers by gptq, one after the other, in the order of the model's calls.

    build(layer, calibrate) makes one. Each sees the errors of those before it, and makes up for
    them as far as it can. Besides the float model and the packed layers, memory holds what one
    layer sees: its inputs for all batches, in the float and in the quantized network, its Moments,
    and a few more matrices of their size.
    """
    data = as_batches(data)
    training = [module for module in model.modules() if module.training]
    made = {}
    try:
        for module in training:  # no dropout, and BatchNorm keeps its statistics as they are
            module.training = False
        # deltas are zero, so all samples can have the scales of bucket 0, and need no slots
        with batch_set(Batch(model, [0], torch.zeros(0, dtype=torch.long))):
            calls = count_calls(model, layers, data[0])
            check_called(layers, calls)
            for layer, count in calls.items():
                made[layer] = make_one(model, layers, made, build, layer, count, data)
    finally:
        put(model, layers, {})
        for module in training:
            module.training = True
    return made


def make_one(model, layers, made, build, layer, count, data) -> nn.Module:
    """The quantized layer for one float layer. count: how often the model calls it on a batch."""
    put(model, layers, {})  # all layers are float
    x_float = inputs_of(layer, count, model, data)
    put(model, layers, made)  # those before this one are quantized
    x = inputs_of(layer, count, model, data)
    name = layers[layer][0]
    if not x or [a.shape for a in x] != [a.shape for a in x_float]:
        raise ValueError(
            f"layer '{name}' isn't called in the same way each time; name it in keep_float"
        )
    with torch.autocast(layer.weight.device.type, enabled=False):  # the sums need float32
        seen = moments(layer, x, x_float)
        size = seen.h.diagonal(dim1=-2, dim2=-1).sum(-1)  # no element of a sum of x x^T is larger
        if not size.isfinite().all() or not seen.cross.isfinite().all():
            raise ValueError(
                f"layer '{name}' sees inputs that aren't finite, or too large to be squared; "
                "correct data or model"
            )
        try:
            return build(layer, partial(gptq, seen=seen))
        except torch.linalg.LinAlgError as error:
            raise ValueError(
                f"layer '{name}' sees inputs that are too much alike for gptq; "
                "give more data, or name it in keep_float"
            ) from error


def as_batches(data) -> list:
    """data as a list. Raises ValueError if there is none, or if it isn't what a model takes."""
    batches = [] if data is None else list(data)
    if not batches:
        raise ValueError("gptq needs data: batches that the model is called with")
    for batch in batches:
        if not isinstance(batch, (tuple, list, Mapping)):
            raise ValueError(
                "each batch of data must be a tuple of positional arguments of the model, "
                f"or a dict of keyword arguments; one is a {type(batch).__name__}"
            )
    return batches


def check_called(layers, calls):
    """Raise ValueError for a layer that the first batch doesn't reach."""
    for layer, names in layers.items():
        if layer not in calls:
            raise ValueError(
                f"the first batch of data doesn't reach layer '{names[0]}'; "
                "give one that does, or name the layer in keep_float"
            )


def check_buckets(num_buckets, T):
    """Raise ValueError if 0 .. T can't be cut into num_buckets intervals."""
    if not 0 < T < float("inf"):
        raise ValueError(f"T must be a positive number, not {T}")
    if num_buckets < 1:
        raise ValueError(f"num_buckets must be at least 1, not {num_buckets}")
    if isinstance(T, int) and num_buckets > T:
        raise ValueError(f"num_buckets must be at most {T}, the timesteps, not {num_buckets}")


def check_arguments(model, n_bits, edges, scales, calibration, timestep):
    """Raise ValueError if an argument of quantize is out of range."""
    if hasattr(model, "quant_config"):
        raise ValueError("the model is quantized already; give the float model, or merge this one")
    if n_bits not in range(2, 9):
        raise ValueError(f"n_bits must be 2 to 8, not {n_bits}")
    rising = all(low < high for low, high in zip(edges, edges[1:]))
    if len(edges) < 2 or not rising:
        raise ValueError(f"edges must be two or more increasing numbers, not {edges}")
    if scales not in ("out", "out+in"):
        raise ValueError(f"scales must be out or out+in, not {scales}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration must be {' or '.join(CALIBRATIONS)}, not {calibration}")
    if hasattr(model, "_orig_mod"):
        raise ValueError("the model is compiled; quantize it first, then compile it")
    if len(edges) > 2:
        check_timestep(model, timestep)


def check_timestep(model, timestep):
    """Raise ValueError if model.forward has no argument of this name."""
    arguments = inspect.signature(model.forward).parameters.values()
    named = [a.name for a in arguments if a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if not named:
        raise ValueError(
            "model.forward names no arguments, so the timesteps can't be told apart; "
            "quantize the model inside of this wrapper"
        )
    if timestep not in named:
        raise ValueError(f"timestep must be {' or '.join(named)}, not {timestep}")


def matches(name: str, pattern: str | list[str]) -> bool:
    """True if a pattern fits the name of a layer, or of a module that the layer is part of."""
    patterns = [pattern] if isinstance(pattern, str) else pattern
    return any(fnmatch(name, p) or fnmatch(name, f"{p}.*") for p in patterns)


def as_patterns(model: nn.Module, argument: str, patterns: str | list[str]) -> list[str]:
    """patterns as a list. Raises ValueError for one that fits no module of the model."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names):
            raise ValueError(
                f"{argument} has '{pattern}', which fits no module; correct or remove it"
            )
    return patterns


def find_layers(model: nn.Module, keep_float: list[str]) -> dict[nn.Module, list[str]]:
    """Every Conv2d and Linear to replace, with its names: two, if it is used in two places.

    A layer is kept float in all places if one of its names is in keep_float. Raises ValueError for
    the first that can't be quantized, and if there is none.
    """
    modules = list(model.named_modules(remove_duplicate=False))
    kept = {module for name, module in modules if matches(name, keep_float)}
    layers = {}
    for name, module in modules:
        if module in kept:
            continue
        if "parametrizations" in name.split("."):  # part of how a replaced layer makes its weight
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention, QuantLayer)):
            continue
        reason = why_not(model, name, module)
        if reason and name == "":
            raise ValueError(f"the model itself {reason}")
        if reason:
            raise ValueError(f"layer '{name}' {reason}, or name it in keep_float")
        layers.setdefault(module, []).append(name)
    if not layers:
        raise ValueError("the model has no Conv2d or Linear to quantize")
    return layers


def why_not(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why this layer can't be quantized, and what to do about it; None if it can."""
    kind = type(layer).__name__
    if isinstance(layer, (nn.MultiheadAttention, QuantLayer)) or name == "":
        return f"is a {kind}: give float Conv2d and Linear layers inside a module"

    weight = layer.weight
    if weight.is_meta or weight.numel() == 0:
        return "has no weights: give a model with values"
    if not weight.is_floating_point() or not weight.isfinite().all():
        return "has weights that aren't all finite floats: repair them"
    owners = [module for module in model.modules() if module._parameters.get("weight") is weight]
    if len(owners) > 1:
        return "shares its weight with another: give each its own"

    # A quantized layer does what Conv2d or Linear do, and no more.
    plain = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    methods = ("forward", "_conv_forward") if plain is nn.Conv2d else ("forward",)
    for method in methods:
        own = getattr(type(layer), method) is not getattr(plain, method)
        if own or method in vars(layer):
            return f"is a {kind} with a {method} of its own: replace it by a plain {plain.__name__}"
    if has_hooks(layer):
        return "has hooks, such as those of weight_norm, that would be lost: remove them"
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.TransformerEncoderLayer):
        return (
            "is in an nn.TransformerEncoderLayer, which reads its weight instead of calling it: "
            "write that module out"
        )

    if plain is nn.Conv2d:
        if layer.padding_mode != "zeros":
            return f"pads with {layer.padding_mode} values instead of zeros: pad before the layer"
        odd = [d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size)]
        if layer.padding == "same" and any(odd):
            return "pads unevenly, one pixel more on one side: pad before the layer"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """True if something runs before or after the layer's forward or backward."""
    forward = layer._forward_pre_hooks or layer._forward_hooks
    backward = layer._backward_pre_hooks or layer._backward_hooks
    return bool(forward or backward)


def first_and_last_conv(layers: dict[nn.Module, list[str]]) -> list[str]:
    """The names of the first and the last convolution of layers, in the order of the modules.

    In a UNet they read and write the image itself.
    """
    convs = [names[0] for layer, names in layers.items() if isinstance(layer, nn.Conv2d)]
    return list(dict.fromkeys(convs[:1] + convs[-1:]))  # one name, if there is one convolution


# --------------------------------------------------------------------------------------------------
# Afterwards: what you carry away
# --------------------------------------------------------------------------------------------------


def deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name: d_out_b (O,) and d_in_b (I,) of each layer and bucket b."""
    found = {}
    for name, layer in unwrapped(model).named_modules():
        if isinstance(layer, QuantLayer):
            for key, parameter in layer.named_parameters():
                if key != "bias":
                    found[canonical(f"{name}.{key}")] = parameter
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model that quantize was given, if DistributedDataParallel or the like is around it."""
    inner = model
    while "quant_config" not in vars(inner):
        children = list(inner.children())
        if len(children) != 1:
            return model
        inner = children[0]
    return inner


def config_of(model: nn.Module) -> dict:
    """What quantize was given. Raises ValueError if the model isn't quantized."""
    model = unwrapped(model)
    if "quant_config" not in vars(model):
        raise ValueError("the model isn't quantized, or is inside of others; call quantize first")
    return model.quant_config


def canonical(name: str) -> str:
    """The name of a parameter without what torch.compile adds for a part of the model."""
    return name.replace("_orig_mod.", "")


def parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters by their canonical names; a shared one appears under each of its names."""
    named = unwrapped(model).named_parameters(remove_duplicate=False)
    return {canonical(name): value for name, value in named}


def named_by(also: Iterable[str], model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters listed in also, by their canonical names; a shared one by the first.

    also: names in model, or in the quantized model that it wraps; or one name. Raises ValueError
    for a name that no parameter of the quantized model has.
    """
    also = [also] if isinstance(also, str) else also
    parameters = parameters_of(model)
    named = {**dict(model.named_parameters(remove_duplicate=False)), **parameters}
    found = {}
    for name in also:
        keys = [key for key, value in parameters.items() if value is named.get(name)]
        if not keys:
            raise ValueError(f"also has '{name}', which is no parameter of the model; correct it")
        found[keys[0]] = named[name]
    return found


def fingerprint(model: nn.Module, also: Iterable[str] = ()) -> str:
    """SHA-256 over the base: all parameters but deltas, and the integers and scales of each layer.

    also: names of other parameters to leave out, because they are trained, too. Buffers of other
    modules, such as the running statistics of BatchNorm, are left out as well: training may change
    them.
    """
    trained = {id(p) for p in (*deltas(model).values(), *named_by(also, model).values())}
    model = unwrapped(model)
    values = {canonical(name): value for name, value in model.named_parameters()}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for key, value in layer.named_buffers():
                values[canonical(f"{name}.{key}")] = value

    digest = hashlib.sha256()
    for name, value in values.items():
        if id(value) not in trained:
            as_bytes = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode())
            digest.update(as_bytes.numpy().tobytes())
    return digest.hexdigest()


def adapter(model: nn.Module, also: Iterable[str] = ()) -> dict:
    """The parameters that were trained, ready for torch.save: kilobytes, if they are deltas.

    It holds quant_config, the fingerprint of the quantized base, and all deltas of the model,
    concatenated, as float16. The model itself keeps its float32 deltas, so it differs a little from
    one that loads the adapter. also: names of other parameters that were trained and go with them,
    as they are. Raises ValueError if also has other names, or if a number isn't finite (a delta: in
    float16).
    """
    config = config_of(model)
    values = [delta.detach() for delta in deltas(model).values()]
    values = torch.cat(values).half().cpu()
    others = {}
    for name, parameter in named_by(also, model).items():
        others[name] = parameter.detach().cpu().clone()
    for name, trained in {"a delta": values, **others}.items():
        if not trained.isfinite().all():
            raise ValueError(f"{name} isn't finite: the training has diverged, lower its rate")
    return {
        "quant_config": config,
        "fingerprint": fingerprint(model, others),
        "deltas": values,
        "also": others,
    }


def load_adapter(model: nn.Module, saved: dict) -> None:
    """Put the deltas of an adapter into model, and what else was trained.

    Raises ValueError if it was made for another quantized base, or is damaged. The model then stays
    as it was. The base has to be the same bit for bit: load the adapter in the dtype that it was
    trained in, and cast the model afterwards; and load it into the saved base rather than one that
    another processor has quantized.
    """
    check_adapter(model, saved)
    mine = deltas(model).values()
    sizes = [delta.numel() for delta in mine]
    parameters = parameters_of(model)
    with torch.no_grad():
        for delta, value in zip(mine, saved["deltas"].split(sizes)):
            delta.copy_(value)
        for name, value in saved.get("also", {}).items():
            parameters[name].copy_(value)


def check_adapter(model: nn.Module, saved: dict) -> None:
    """Raise ValueError, which says what differs, if an adapter doesn't belong to model."""
    mine = config_of(model)
    other = "the adapter was made for another base"
    give = "give the quantized model that it was trained on"
    config = saved.get("quant_config") if isinstance(saved, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{other}, or is damaged: it has no quant_config; {give}")
    also = saved.get("also", {})
    parameters = parameters_of(model)
    if not isinstance(also, dict) or not also.keys() <= parameters.keys():
        raise ValueError(f"{other}, or is damaged: it has no parameters that fit; {give}")
    same_base = saved.get("fingerprint") == fingerprint(model, also)
    for key, value in mine.items():
        if key in ("calibration", "keep8", "keep_float") and same_base:
            continue  # other ways to the same integers and scales, such as a saved base
        if repr(config.get(key)) != repr(value):  # a damaged file may hold what can't be compared
            theirs = reprlib.repr(config.get(key))  # shortened
            raise ValueError(f"{other}, of {key} {theirs} instead of {reprlib.repr(value)}; {give}")
    if not same_base:
        raise ValueError(
            f"{other}, of another dtype or other weights (an adapter with more than deltas changes "
            f"them, and quantizing on another processor rounds differently); {give}"
        )

    count = sum(delta.numel() for delta in deltas(model).values())
    if not is_finite_tensor(saved.get("deltas"), (count,)):
        raise ValueError(
            f"the adapter is damaged: its deltas aren't {count} finite numbers; copy it again"
        )
    for name, value in also.items():
        if not is_finite_tensor(value, parameters[name].shape):
            raise ValueError(
                f"the adapter is damaged: its {name} isn't finite, or of another shape; "
                "copy it again"
            )


def is_finite_tensor(value, shape) -> bool:
    """True if value, read from a file, is a plain tensor of finite real numbers of this shape."""
    if not torch.is_tensor(value) or value.layout != torch.strided or value.is_complex():
        return False
    return value.shape == torch.Size(shape) and bool(value.isfinite().all())


def merge(model: nn.Module, bucket_index: int = 0) -> nn.Module:
    """A copy of model with plain float layers, whose weights are those of one bucket.

    The copy has no trace of quantization, and all of it can be trained. Raises IndexError if there
    is no such bucket, and ValueError if a quantized model is inside, which has buckets of its own,
    or if a quantized layer has hooks, which would be lost.
    """
    model = unwrapped(model)
    inner = [name for name, m in model.named_modules() if name and hasattr(m, "quant_config")]
    if inner:
        raise ValueError(f"'{inner[0]}' is a quantized model inside of this one; merge it first")
    num_buckets = len(config_of(model)["edges"]) - 1
    if not 0 <= bucket_index < num_buckets:
        last = num_buckets - 1
        raise IndexError(f"there is no bucket {bucket_index}: the last one is {last}")
    model = copy.deepcopy(model)
    plain_of = {}  # a layer used in two places stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLayer):
            if has_hooks(layer):
                raise ValueError(f"layer '{name}' has hooks that would be lost; remove them")
            if layer not in plain_of:
                plain_of[layer] = plain_layer(layer, bucket_index)
            model.set_submodule(name, plain_of[layer])

    del model.quant_config
    for hook in (enter_call, leave_call):
        remove_hook(model, hook)
    return model.requires_grad_(True)


def plain_layer(layer: QuantLayer, b: int) -> nn.Module:
    """A float Conv2d or Linear with the weight of bucket b."""
    weight = layer.dequantize(layer.delta("d_out", b), layer.delta("d_in", b)).detach()
    plain = layer.plain(bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight)
    if layer.bias is not None:
        plain.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
    return plain.train(layer.training)


def remove_hook(model: nn.Module, hook) -> None:
    """Remove a forward hook or pre-hook of model, and what PyTorch has noted about it."""
    notes = (model._forward_pre_hooks_with_kwargs, model._forward_hooks_always_called)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, registered in hooks.items() if registered is hook]:
            for noted in (hooks, *notes):
                noted.pop(key, None)

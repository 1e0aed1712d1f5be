"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion
Model", arXiv 2401.04339).

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")    # in place; then train model

A weight is quantized once, to integers q of n_bits bits that stay as they are. Each row (output
channel) has a scale and a zero point z, each column (input channel) a scale, and all positions of a
kernel share them:

    W[o, i] = s_out[o] * (q[o, i] - z[o]) * s_in[i]                 q, z in 0 .. 2^n_bits - 1

Fine-tuning trains the scales and nothing else. Training s_out alone is PEQA (Kim et al. 2023);
training both is the paper's multi-channel-wise scale update. The timesteps are cut into num_buckets
intervals, and each has scales of its own over the same integers: the paper's timestep-aware scale
update.

The parameters are the deltas d_out and d_in, zero at the start. They stand in an exponent:

    W[o, i] = s_out[o] exp(d_out[o]) * (q[o, i] - z[o]) * s_in[i] exp(d_in[i])

One learning rate then means the same in every layer, deltas of zero are the base model, and no
scale can reach zero. With y = W x + bias and g = dL/dy, the gradients are

    gx           = dL/dx = W^T g
    dL/dd_out[o] = sum over samples and positions of g[o] * (y[o] - bias[o])
    dL/dd_in[i]  = sum over samples and positions of gx[i] * x[i]

The last two are this simple because exp is its own derivative. y[o] - bias[o] is exp(d_out[o])
times a number, so its derivative by d_out[o] is y[o] - bias[o] again. And W sees x[i] only as
u = exp(d_in[i]) x[i], so dL/dd_in[i] = dL/du * u, which is dL/dx[i] * x[i].

So no gradient of a weight is ever computed. For backward a layer keeps x (if d_in trains), y (if
d_out trains) and its packed integers. The float W lives for one matmul at a time, and backward
builds it again.

If all samples of a batch share a bucket, W has the scales of that bucket. If not, W has the scales
of the base (s_out and s_in without deltas), and the exp(d_in) and exp(d_out) of each sample's
bucket multiply its activations before and after the matmul. A bucket without a sample in the batch
has no gradient (None, not zeros), so the optimizer skips it and leaves its momentum alone.

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
            f"timesteps must lie in {edges[0]:g} .. {edges[-1]:g}, and one is {wrong:g}"
        )
    inner = torch.tensor(edges[1:-1], dtype=torch.float64)
    return torch.bucketize(time, inner, right=True).to(t.device)


# --------------------------------------------------------------------------------------------------
# Bits: codes of 2 to 8 bits in whole bytes
# --------------------------------------------------------------------------------------------------

# A code is cut into pieces of 8, 4, 2 or 1 bits, which divide a byte evenly: 3 bits into 2 + 1.
# First come the bytes with the low pieces of all codes, then those with the high ones. Of 8m codes
# c[0], c[1], ... of 3 bits, with the lowest bit of a byte on the right:
#
#     byte j, j < 2m        | c[j + 6m] | c[j + 4m] | c[j + 2m] | c[j] |        low 2 bits of each
#     byte 2m + j, j < m    | c[j + 7m] | c[j + 6m] |  ...  | c[j + m] | c[j] |   high bit of each
#
# The codes that share a byte are far apart, so one shift handles a whole vector of codes.
PIECES = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 7: [4, 2, 1], 8: [8]}


def pack(codes: Tensor, n_bits: int) -> Tensor:
    """Put codes (uint8, any shape, each below 2^n_bits) into n_bits bytes for every 8 of them.

    Returns uint8, one-dimensional.
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
    bytes_per_bit = (count + 7) // 8  # a piece of 2 bits takes twice as many
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
# The layer: frozen integers, trained scales
# --------------------------------------------------------------------------------------------------


# The formatter would move the shape comments out of their column.
# fmt: off
class OneBucket(torch.autograd.Function):
    """y = W x + bias, for a batch whose samples all share a bucket: W has the scales of it.

    Shapes are written for a convolution; a linear layer has x (N, ..., I) and y (N, ..., O).
    d_out (O,), d_in (I,): the deltas of the bucket; d_in is None if columns aren't trained.
    bias: (O,) or None. layer: the QuantLayer, which knows how to multiply.
    """

    @staticmethod
    def forward(ctx, x, d_out, d_in, bias, layer):                  # (N, I, H, W)
        _, train_out, train_in, _, _ = ctx.needs_input_grad

        # y = W x + bias
        w = layer.dequantize(d_out, d_in, x.dtype)                  # (O, I, *kernel)
        y = layer.matmul(x, w, bias)                                # (N, O, H', W')

        ctx.layer = layer
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)    # w isn't kept
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer = ctx.layer
        train_x, train_out, train_in, train_bias, _ = ctx.needs_input_grad
        dims = layer.batch_dims(g)                                  # samples and positions
        gx = grad_out = grad_in = grad_bias = None

        # gx = W^T g
        if train_x or train_in:
            w = layer.dequantize(d_out, d_in, g.dtype)              # (O, I, *kernel)
            gx = layer.input_grad(g, ctx.x_shape, w)                # (N, I, H, W)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            grad_out = sum_of_product(g, y, dims, d_out.dtype)      # (O,)
            if bias is not None:
                grad_out = grad_out - bias * sum_over(g, dims, d_out.dtype)

        # dL/dd_in = sum of gx * x
        if train_in:
            grad_in = sum_of_product(gx, x, dims, d_in.dtype)       # (I,)

        # dL/dbias = sum of g
        if train_bias:
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
        if bias is not None:
            y = y + layer.along_channels(bias[None], y)

        ctx.layer = layer
        ctx.slot = slot
        ctx.x_shape = x.shape
        kept_x = x if train_in else None
        kept_y = y if train_out else None
        ctx.save_for_backward(kept_x, kept_y, d_out, d_in, bias)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):                                           # (N, O, H', W')
        x, y, d_out, d_in, bias = ctx.saved_tensors
        layer = ctx.layer
        slot = ctx.slot
        train_x, train_out, train_in, train_bias, _, _ = ctx.needs_input_grad
        dims = layer.position_dims(g)                               # positions, not samples
        gx = grad_out = grad_in = grad_bias = None

        # gx = exp(d_in) * W^T (exp(d_out) * g)
        if train_x or train_in:
            w = layer.dequantize(dtype=g.dtype)                     # (O, I, *kernel)
            scaled_g = layer.scale_samples(g, d_out, slot)          # (N, O, H', W')
            gx = layer.input_grad(scaled_g, ctx.x_shape, w)         # (N, I, H, W)
            gx = layer.scale_samples(gx, d_in, slot)

        # is_in[b, n] is 1 if sample n is in bucket b: a matmul with it is a sum for each bucket
        is_in = F.one_hot(slot, len(d_out)).to(d_out.dtype).T       # (B, N)

        # dL/dd_out = sum of g * (y - bias)
        if train_out:
            by_sample = sum_of_product(g, y, dims, d_out.dtype)     # (N, O)
            if bias is not None:
                by_sample = by_sample - bias * sum_over(g, dims, d_out.dtype)
            grad_out = is_in @ by_sample                            # (B, O)

        # dL/dd_in = sum of gx * x
        if train_in:
            by_sample = sum_of_product(gx, x, dims, d_in.dtype)     # (N, I)
            grad_in = is_in @ by_sample                             # (B, I)

        # dL/dbias = sum of g
        if train_bias:
            grad_bias = sum_over(g, layer.batch_dims(g), bias.dtype)
        return gx, grad_out, grad_in, grad_bias, None, None
# fmt: on


def sum_over(x: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x summed over dims, in dtype."""
    if not dims:  # x.sum(()) would be the sum over all
        return x.to(dtype)
    return x.sum(dims, dtype=dtype)


def sum_of_product(a: Tensor, b: Tensor, dims: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """a * b summed over dims, in dtype."""
    return sum_over(a * b, dims, dtype)


class QuantLayer(nn.Module):
    """A Conv2d or Linear whose weight is packed integers and scales; only the deltas are trained.

    codes: the packed integers, uint8, in the order (G, O, K, I): groups, rows of a group, positions
    of the kernel, columns. What is unpacked in this order is a weight in channels_last.
    zero_point, s_out: (G * O,).
    s_in: (G * I,).
    d_out, d_in: lists of one parameter for each bucket, of the shape of s_out and of s_in. d_in is
    None if columns aren't trained.

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
        self.bias = layer.bias

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

        self.d_out = zeros_for_each_bucket(self.s_out, num_buckets)
        self.d_in = zeros_for_each_bucket(self.s_in, num_buckets) if scales == "out+in" else None

    # fmt: off
    def dequantize(self, d_out: Tensor | None = None, d_in: Tensor | None = None, dtype=None):
        """The float weight (O, I, *kernel) for the deltas of a bucket, by default the base's.

        d_out (O,), d_in (I,): deltas; None stands for zeros. dtype: of the weight, by default the
        model's.
        """
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
        return w.movedim(-1, 1).to(dtype or self.dtype)             # (G * O, I, *kernel)
    # fmt: on

    @property
    def weight(self) -> Tensor:
        """The base's float weight, without deltas: for code that asks a layer for its dtype, say.

        It is built at each access. Multiplying by it would leave the fine-tuning out.
        """
        return self.dequantize()

    def forward(self, x):
        if torch.is_autocast_enabled(x.device.type):  # autograd.Function isn't cast by itself
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        buckets, slot = self.buckets_of_batch(x)

        if slot is None:
            b = buckets[0]
            d_in = None if self.d_in is None else self.d_in[b]
            return OneBucket.apply(x, self.d_out[b], d_in, bias, self)

        d_out = torch.stack([self.d_out[b] for b in buckets])  # (B, O)
        d_in = None
        if self.d_in is not None:
            d_in = torch.stack([self.d_in[b] for b in buckets])  # (B, I)
        return MixedBuckets.apply(x, d_out, d_in, bias, self, slot)

    def buckets_of_batch(self, x: Tensor) -> tuple[list[int], Tensor | None]:
        """What the layer was told about the batch x (see Batch): its buckets and slots."""
        if self.num_buckets == 1:
            return [0], None
        batch = current_batch.get()
        if batch is None:
            raise RuntimeError(
                "a quantized layer wasn't told its timesteps: "
                "call the model given to quantize, or see remember if it runs in a checkpoint"
            )
        if batch.slot is None:
            return batch.buckets, None
        if len(x) != len(batch.slot):
            raise ValueError(
                f"a quantized layer got {len(x)} samples for {len(batch.slot)} timesteps; "
                "dimension 0 must be the batch"
            )
        return batch.buckets, batch.slot.to(x.device)

    def scale_samples(self, x: Tensor, d: Tensor | None, slot: Tensor) -> Tensor:
        """x (N, ...) times exp(d) of each sample's bucket; d: (B, C). None leaves x as it is."""
        if d is None:
            return x
        factors = d.exp()[slot].to(x.dtype)  # (N, C)
        return x * self.along_channels(factors, x)

    def _apply(self, fn, recurse=True):
        """What model.half(), model.to("cuda") and the like call, with an fn for every tensor.

        Whatever they ask for, the scales, deltas and bias of a quantized layer keep at least
        float32. In float16 a small scale becomes 0 and a large one infinite, and in bfloat16 a
        delta loses the steps of the optimizer to rounding.
        """

        def at_least_float32(tensor):
            moved = fn(tensor)
            too_coarse = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if too_coarse else moved

        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        return super()._apply(at_least_float32, recurse)

    def extra_repr(self):
        shape = "x".join(str(size) for size in self.shape)
        bias = self.bias is not None
        return f"{shape}, n_bits={self.n_bits}, num_buckets={self.num_buckets}, bias={bias}"


def zeros_for_each_bucket(scale: Tensor, num_buckets: int) -> nn.ParameterList:
    """Deltas for a scale, one parameter for each bucket: a bucket not drawn has no gradient."""
    return nn.ParameterList(torch.zeros_like(scale) for _ in range(num_buckets))


class QuantLinear(QuantLayer):
    """x (N, ..., I) -> y (N, ..., O)."""

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

    def along_channels(self, v, x):  # (N, C) -> (N, 1, ..., 1, C)
        ones = [1] * (x.dim() - 2)
        return v.view(len(v), *ones, -1)

    def plain(self, **kwargs):
        """A float layer of the same shape."""
        return nn.Linear(self.in_features, self.out_features, **kwargs)


class QuantConv2d(QuantLayer):
    """x (N, I, H, W) -> y (N, O, H', W')."""

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        self.in_channels = layer.in_channels
        self.out_channels = layer.out_channels
        self.kernel_size = layer.kernel_size
        self.stride = layer.stride
        self.padding = layer.padding
        self.dilation = layer.dilation
        self.padding_mode = layer.padding_mode

        # conv2d_input takes numbers only, not "same" or "valid"
        self.pixels = layer.padding
        if layer.padding == "valid":
            self.pixels = (0, 0)
        if layer.padding == "same":
            self.pixels = [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size)]

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

    def along_channels(self, v, x):  # (N, C) -> (N, C, 1, 1)
        return v[:, :, None, None]

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
    calibration: str = "rowcol",
    timestep: str = "t",
    keep8: list[str] | None = None,
    keep_float: list[str] = (),
    edges: list[float] | None = None,
) -> nn.Module:
    """Replace every Conv2d and Linear of model by a quantized layer, one at a time.

    Afterwards only deltas train. Returns model itself. model.quant_config holds the arguments, with
    edges for num_buckets and T.

    n_bits: 2 to 8.
    num_buckets: how many scale sets there are over the timesteps 0 .. T.
    scales: what is trained, "out" (rows alone, PEQA) or "out+in".
    calibration: "minmax", "mse" or "rowcol", see calibrate.py.
    timestep: the name of the argument of model.forward that holds the timesteps, (N,) or one for
        all samples. A model with one bucket doesn't need it.
    keep8: patterns of names of layers to keep at 8 bits, such as "down.*"; by default the first and
        the last Conv2d.
    keep_float: patterns of names of layers to leave as they are.
    edges: the edges of the buckets, if they aren't equal intervals; num_buckets and T are then
        ignored.

    Raises ValueError, with the layer's name, before anything is changed: for arguments out of
    range, for a model that is quantized already, for weights that are shared between layers, not
    finite or not floats, for padding with anything but zeros, and for nn.MultiheadAttention, which
    multiplies by bare weights.
    """
    if edges is None:
        check_buckets(num_buckets, T)
        edges = equal_edges(num_buckets, T)
    check_arguments(model, n_bits, edges, scales, calibration, timestep)
    num_buckets = len(edges) - 1
    layers = find_layers(model, keep_float)
    if keep8 is None:
        keep8 = first_and_last_conv(model, layers)

    model.requires_grad_(False)
    for names in layers:
        layer = model.get_submodule(names[0])
        kind = QuantConv2d if isinstance(layer, nn.Conv2d) else QuantLinear
        bits = 8 if matches(names[0], keep8) else n_bits
        quantized = kind(layer, bits, num_buckets, scales, CALIBRATIONS[calibration])
        quantized.train(layer.training)
        for name in names:
            model.set_submodule(name, quantized)

    model.quant_config = {
        "n_bits": n_bits,
        "edges": list(edges),
        "scales": scales,
        "calibration": calibration,
        "timestep": timestep,
        "keep8": list(keep8),
        "keep_float": list(keep_float),
    }
    if num_buckets > 1:
        model.register_forward_pre_hook(set_batch, with_kwargs=True)
        model.register_forward_hook(clear_batch, always_call=True)
    return model


def check_buckets(num_buckets, T):
    """Raise ValueError if 0 .. T can't be cut into num_buckets intervals."""
    if not T > 0:
        raise ValueError(f"T must be a positive number, not {T}")
    if num_buckets < 1 or (isinstance(T, int) and num_buckets > T):
        raise ValueError(
            f"num_buckets must be 1 to {T}, the number of timesteps: not {num_buckets}"
        )


def check_arguments(model, n_bits, edges, scales, calibration, timestep):
    """Raise ValueError if an argument of quantize is out of range."""
    if n_bits not in range(2, 9):
        raise ValueError(f"n_bits must be 2 to 8, not {n_bits}")
    rising = all(low < high for low, high in zip(edges, edges[1:]))
    if len(edges) < 2 or not rising:
        raise ValueError(f"edges must be two or more increasing numbers, not {edges}")
    if scales not in ("out", "out+in"):
        raise ValueError(f"scales must be out or out+in, not {scales}")
    if calibration not in CALIBRATIONS:
        raise ValueError(f"calibration must be {' or '.join(CALIBRATIONS)}, not {calibration}")
    arguments = list(inspect.signature(model.forward).parameters)
    if len(edges) > 2 and timestep not in arguments:
        raise ValueError(f"timestep must be {' or '.join(arguments)}, not {timestep}")


def matches(name: str, patterns: list[str]) -> bool:
    """True if a pattern fits the name of a layer, or of a module that the layer is part of."""
    return any(fnmatch(name, pattern) or fnmatch(name, f"{pattern}.*") for pattern in patterns)


def find_layers(model: nn.Module, keep_float: list[str]) -> list[list[str]]:
    """The names of every Conv2d and Linear to swap; a layer that is used twice has two names.

    Raises ValueError for a layer that can't be quantized. Returns names and not layers: a list of
    the layers would keep all float weights in memory until the last one is quantized.
    """
    names_of = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if matches(name, keep_float):
            continue
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention, QuantLayer)):
            continue
        reason = why_not(model, name, module)
        if reason:
            raise ValueError(f"layer '{name}' {reason}, or name it in keep_float")
        names_of.setdefault(id(module), []).append(name)
    return list(names_of.values())


def why_not(model: nn.Module, name: str, layer: nn.Module) -> str | None:
    """Why this layer can't be quantized, and what to do about it; None if it can."""
    if isinstance(layer, (nn.MultiheadAttention, QuantLayer)) or name == "":
        kind = type(layer).__name__
        return f"is a {kind}: give float Conv2d and Linear layers inside a module"

    if not layer.weight.is_floating_point() or not layer.weight.isfinite().all():
        return "has weights that aren't all finite floats: repair them"

    weights = [module._parameters.get("weight") for module in model.modules()]
    if sum(weight is layer.weight for weight in weights) > 1:
        return "shares its weight with another: give each its own"

    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros":
            return f"pads with {layer.padding_mode} values instead of zeros: pad before the layer"
        odd = [d * (k - 1) % 2 for d, k in zip(layer.dilation, layer.kernel_size)]
        if layer.padding == "same" and any(odd):
            return "pads unevenly, one pixel more on one side: pad before the layer"
    return None


def first_and_last_conv(model: nn.Module, layers: list[list[str]]) -> list[str]:
    """The names of the first and the last convolution, which read and write the image itself."""
    convs = [names[0] for names in layers if isinstance(model.get_submodule(names[0]), nn.Conv2d)]
    return list(dict.fromkeys(convs[:1] + convs[-1:]))  # one name, if there is one convolution


# --------------------------------------------------------------------------------------------------
# Timesteps: what the layers are told about a batch
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a call of a model tells its layers about the batch."""

    model: nn.Module  # whose call it is
    buckets: list[int]  # the B buckets in the batch, in increasing order
    slot: Tensor | None  # (N,), the index in buckets of each sample's; None if there is one
    outer: "Batch | None"  # of the call around this one, if a quantized model calls another


# The batch of the innermost call, for as long as the call lasts. It isn't kept in the model: two
# threads may call one model at once (each has its own value of a ContextVar), and a model may be
# copied or pickled at any time.
current_batch: ContextVar[Batch | None] = ContextVar("current_batch", default=None)


def set_batch(model, args, kwargs):
    """Before the model's forward: find the buckets in the batch."""
    config = model.quant_config
    given = inspect.signature(model.forward).bind(*args, **kwargs).arguments
    t = given.get(config["timestep"])
    if t is None:
        name = config["timestep"]
        raise ValueError(f"a model with several buckets needs timesteps; give it '{name}'")

    # with two buckets, t = [900, 100, 950] has buckets = [0, 1] and slot = [1, 0, 1]
    b = bucket(t, config["edges"]).flatten()
    buckets, slot = b.unique(return_inverse=True)
    if len(buckets) == 1:
        slot = None
    current_batch.set(Batch(model, buckets.tolist(), slot, current_batch.get()))


def clear_batch(model, *_):
    """After the model's forward, even if it failed: a layer called on its own then raises."""
    batch = current_batch.get()
    if batch is not None and batch.model is model:
        current_batch.set(batch.outer)


def remember():
    """The context_fn for torch.utils.checkpoint in a model with several buckets.

    checkpoint(block, x, use_reentrant=False, context_fn=remember) calls this before it runs the
    block. It runs the block in the first context, and runs it again in backward in the second. By
    then the call of the model is over, so the second sets its batch again.
    """
    return contextlib.nullcontext(), batch_set(current_batch.get())


@contextlib.contextmanager
def batch_set(batch: Batch | None):
    """A context in which batch is the current one."""
    token = current_batch.set(batch)
    try:
        yield
    finally:
        current_batch.reset(token)


# --------------------------------------------------------------------------------------------------
# Afterwards: what you carry away
# --------------------------------------------------------------------------------------------------


def deltas(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained parameters by name: d_out.b (O,) and d_in.b (I,) of each layer and bucket b."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer):
            for key, parameter in layer.named_parameters():
                if key.startswith("d_"):
                    found[f"{name}.{key}"] = parameter
    return found


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over what fine-tuning leaves alone: integers, scales, biases, norms, embeddings."""
    trained = deltas(model)
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in trained:
            as_bytes = value.cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(name.encode())
            digest.update(as_bytes.numpy().tobytes())
    return digest.hexdigest()


def adapter(model: nn.Module) -> dict:
    """All that fine-tuning has made, ready for torch.save: kilobytes.

    It holds quant_config, the fingerprint of the quantized base, and all deltas of the model,
    concatenated, as float16.
    """
    values = [delta.detach() for delta in deltas(model).values()]
    return {
        "quant_config": model.quant_config,
        "fingerprint": fingerprint(model),
        "deltas": torch.cat(values).half().cpu(),
    }


def load_adapter(model: nn.Module, saved: dict) -> None:
    """Put the deltas of an adapter into model.

    Raises ValueError if it was made for another quantized base. The model then stays as it was.
    """
    mine = deltas(model).values()
    sizes = [delta.numel() for delta in mine]
    values = saved.get("deltas", ())
    same_config = saved.get("quant_config") == model.quant_config
    same_base = saved.get("fingerprint") == fingerprint(model)
    whole = len(values) == sum(sizes) and values.isfinite().all()
    if not (same_config and same_base and whole):
        raise ValueError(
            "the adapter was made for another base, or is damaged; "
            "give the quantized model that it was trained on"
        )
    with torch.no_grad():
        for delta, value in zip(mine, values.split(sizes)):
            delta.copy_(value)


def merge(model: nn.Module, bucket_index: int = 0) -> nn.Module:
    """A copy of model with plain float layers, whose weights are those of one bucket.

    Raises IndexError if there is no such bucket.
    """
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLayer):
            d_in = None if layer.d_in is None else layer.d_in[bucket_index]
            weight = layer.dequantize(layer.d_out[bucket_index], d_in)
            plain = layer.plain(bias=layer.bias is not None, device="meta").train(layer.training)
            plain.weight = nn.Parameter(weight.detach())
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().to(weight.dtype))
            model.set_submodule(name, plain)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook in (set_batch, clear_batch):
                del hooks[key]
    del model.quant_config
    return model

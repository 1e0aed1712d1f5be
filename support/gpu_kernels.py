"""For quant.py: what a layer does besides its matmul, on a GPU, as three Triton kernels.

quant.py is the reference. Its plain code says what is computed, and hands over to this file if
`usable` says so; without this file, or without Triton, it does everything itself.
tests/support/test_gpu_kernels.py compares the two.

The plain code launches about ten small kernels to build W, and reads and writes memory in each.
Here each job is one launch, or two for long sums, and intermediate values stay in registers as
float32:

    dequantize        W from packed codes, scales and deltas (the trained changes of the scales)
    gradient_of       the sum over samples and positions that is the gradient of the deltas
    scale_samples     activations times exp(delta) of each sample's bucket of timesteps

A kernel is one small program that runs many times, side by side, on blocks of the data. If a block
reaches beyond the edge, a mask skips the places outside. Activations are seen as (N, P, C):
samples, positions (pixels or tokens), channels. Terms are added in the same order each time, so
that the same seed gives the same bytes. The B buckets in a batch are numbered 0 to B - 1, and index
(N,) has the number of each sample's.
"""

import warnings
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

WEIGHTS = 512  # weights that a program builds
CHANNELS = 64  # channels that a program takes
POSITIONS = 64  # positions that a program takes at once; for sums, of all samples
PROGRAMS = 512  # about as many programs as fill a GPU


def usable(x: Tensor) -> bool:
    """True if the kernels can take x and are the best choice for it."""
    return (
        not torch.compiler.is_compiling()  # torch.compile fuses the plain code
        and x.is_cuda
        and x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and 0 < x.numel() < 2**31  # places are counted in 32 bits; no layer has more weights
        and x.get_device() == torch.cuda.current_device()  # where Triton launches
        and not torch.is_grad_enabled()  # autograd follows the plain code, not a kernel
        and triton_works(x.device)
    )


@cache
def triton_works(device: torch.device) -> bool:
    """True if Triton can compile for this GPU; warns if it can't."""
    try:
        x = torch.zeros(1, 1, device=device)
        scale_samples(x, x, torch.zeros(1, dtype=torch.long, device=device), channel_dim=-1)
    except Exception as error:
        if "out of memory" in str(error):  # says nothing of Triton
            raise
        message = (
            "Triton fails here, so quantized layers are slower; it needs a C compiler and Python's "
            f"headers: {error}"
        )
        warnings.warn(message, stacklevel=2)
        return False
    return True


# --------------------------------------------------------------------------------------------------
# W
# --------------------------------------------------------------------------------------------------


def dequantize(layer, d_out: Tensor | None, d_in: Tensor | None, dtype: torch.dtype) -> Tensor:
    """QuantLayer.dequantize: the float weight (G * O, I, *kernel) for the deltas of a bucket."""
    rows = layer.shape[0]  # of all groups
    columns = layer.shape[1]  # of a group
    kernel = layer.shape[2:]
    row_size = kernel.numel() * columns
    w = torch.empty(rows, *kernel, columns, dtype=dtype, device=layer.codes.device)
    dequantize_kernel[rows, triton.cdiv(row_size, WEIGHTS)](
        layer.codes,
        layer.zero_point,
        layer.s_out,
        layer.s_in,
        d_out,
        d_in,
        w,
        w.numel(),
        row_size,
        len(layer.s_in) // layer.groups,
        rows // layer.groups,
        layer.n_bits,
        WEIGHTS,
    )
    return w.movedim(-1, 1)


@triton.jit
def dequantize_kernel(
    codes,  # packed, in the order of w
    zero_point,  # (rows,)
    s_out,  # (rows,)
    s_in,  # (groups * column_scales,)
    d_out,  # (rows,), or None
    d_in,  # (groups * column_scales,), or None
    w,  # (rows, *kernel, columns), to be written
    count,  # of all weights
    row_size,  # weights of a row
    column_scales,  # of a group: one for each weight of a row, or one for each input channel
    group_rows,
    N_BITS: tl.constexpr,
    WEIGHTS: tl.constexpr,
):
    """W = s_out exp(d_out) * (q - z) * s_in exp(d_in), for WEIGHTS weights of a row."""
    row = tl.program_id(0)
    place = tl.program_id(1) * WEIGHTS + tl.arange(0, WEIGHTS)  # in the row
    inside = place < row_size
    group = row // group_rows
    column = group * column_scales + place % column_scales  # channels are neighbors in a row

    row_scale = tl.load(s_out + row).to(tl.float32)
    if d_out is not None:
        row_scale *= tl.exp(tl.load(d_out + row).to(tl.float32))
    column_scale = tl.load(s_in + column, mask=inside, other=0).to(tl.float32)
    if d_in is not None:
        column_scale *= tl.exp(tl.load(d_in + column, mask=inside, other=0).to(tl.float32))

    q = unpack(codes, row * row_size + place, inside, count, N_BITS)
    z = tl.load(zero_point + row).to(tl.int32)
    value = (q - z).to(tl.float32) * row_scale * column_scale
    tl.store(w + row * row_size + place, value.to(w.dtype.element_ty), mask=inside)


@triton.jit
def unpack(codes, place, inside, count, N_BITS: tl.constexpr):
    """The codes at these places. count: how many codes quant.py's pack has packed in all.

    The bits of a code are cut into pieces of 8, 4, 2 or 1 bits (3 = 2 + 1), from the lowest bit on.
    Memory has one section for each piece, with that piece of all codes. In a section of `length`
    bytes, code c is in byte c % length, from bit c // length * width on. So neighboring codes are
    read from neighboring bytes.
    """
    bytes_per_bit = (count + 7) // 8
    q = tl.zeros(place.shape, tl.int32)
    for halvings in tl.static_range(4):
        width = 8 >> halvings  # 8, 4, 2, 1
        if N_BITS & width:
            shift = N_BITS // (2 * width) * (2 * width)  # the bits in earlier sections
            start = bytes_per_bit * shift
            length = bytes_per_bit * width
            byte = tl.load(codes + start + place % length, mask=inside, other=0).to(tl.int32)
            piece = (byte >> (place // length * width)) & ((1 << width) - 1)
            q |= piece << shift
    return q


# --------------------------------------------------------------------------------------------------
# The gradients of deltas
# --------------------------------------------------------------------------------------------------


def gradient_of(
    d: Tensor,
    a: Tensor,
    b: Tensor,
    channel_dim: int,
    bias: Tensor | None = None,
    index: Tensor | None = None,
) -> Tensor:
    """QuantLayer.gradient_of: a * (b - bias), summed over the samples and positions of a bucket.

    a, b: g and y for d_out, gx and x for d_in. Of d only the shape matters. Returns float32.
    """
    num_buckets = 1 if index is None else len(d)
    a = samples_positions_channels(a, channel_dim)
    b = samples_positions_channels(b, channel_dim)
    N, P, C = a.shape

    # There are N * P rows: one for each position of each sample. They are cut into parts, so many
    # that the programs fill a GPU, and so that a part is a number of whole blocks.
    block = POSITIONS if N * P > 16 else 16
    blocks = triton.cdiv(N * P, block)
    channel_blocks = triton.cdiv(C, CHANNELS)
    parts = min(blocks, max(1, PROGRAMS // (channel_blocks * num_buckets)))
    rows_per_part = triton.cdiv(blocks, parts) * block
    parts = triton.cdiv(N * P, rows_per_part)  # without those that would be empty

    sums = torch.empty(parts, num_buckets, C, dtype=torch.float32, device=a.device)
    gradient_kernel[channel_blocks, num_buckets, parts](
        a,
        b,
        bias,
        index,
        sums,
        N * P,
        P,
        C,
        rows_per_part,
        *a.stride(),
        *b.stride(),
        block,
        CHANNELS,
    )
    total = sums.sum(0) if parts > 1 else sums[0]
    return total.view(d.shape)


@triton.jit
def gradient_kernel(
    a,  # (N, P, C)
    b,  # (N, P, C)
    bias,  # (C,), or None
    index,  # (N,), or None if all samples share a bucket
    sums,  # (parts, buckets, C), to be written
    rows,  # N * P
    P,
    C,
    rows_per_part,
    a_n,  # the strides of a
    a_p,
    a_c,
    b_n,  # the strides of b
    b_p,
    b_c,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """a * (b - bias) for CHANNELS channels of one bucket, summed over one part of the rows."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    bucket_here = tl.program_id(1)
    part = tl.program_id(2)
    start = part * rows_per_part
    end = min(start + rows_per_part, rows)

    if bias is not None:
        shift = tl.load(bias + c, mask=c < C, other=0).to(tl.float32)
    total = tl.zeros((ROWS, CHANNELS), tl.float32)
    for first in range(start, end, ROWS):
        row = first + tl.arange(0, ROWS)
        n = row // P
        p = row % P
        mine = row < rows  # a part ends with a block, or with the rows
        if index is not None:
            mine &= tl.load(index + n, mask=mine, other=-1) == bucket_here
        mask = mine[:, None] & (c < C)[None, :]
        a_places = (n * a_n + p * a_p)[:, None] + (c * a_c)[None, :]
        b_places = (n * b_n + p * b_p)[:, None] + (c * b_c)[None, :]
        x = tl.load(a + a_places, mask=mask, other=0).to(tl.float32)
        y = tl.load(b + b_places, mask=mask, other=0).to(tl.float32)
        if bias is not None:
            y -= shift[None, :]
        total += x * y

    place = (part * tl.num_programs(1) + bucket_here) * C + c
    tl.store(sums + place, tl.sum(total, 0), mask=c < C)


def samples_positions_channels(x: Tensor, channel_dim: int) -> Tensor:
    """x as (N, P, C): a view, in both memory formats of images. N is 1 if x has no batch.

    channel_dim: -1 of (N, ..., C), -3 of (N, C, H, W).
    """
    has_batch = x.dim() > -channel_dim
    N = len(x) if has_batch else 1
    return x.movedim(channel_dim, -1).reshape(N, -1, x.shape[channel_dim])


# --------------------------------------------------------------------------------------------------
# Mixed buckets
# --------------------------------------------------------------------------------------------------


def scale_samples(x: Tensor, d: Tensor, index: Tensor, channel_dim: int) -> Tensor:
    """QuantLayer.scale_samples: x times exp(d) of each sample's bucket."""
    shape = x.movedim(channel_dim, -1).shape  # (N, ..., C)
    x = samples_positions_channels(x, channel_dim)
    y = torch.empty_like(x)
    N, P, C = x.shape
    block = POSITIONS if P > 1 else 1
    blocks = triton.cdiv(P, block)
    scale_samples_kernel[N * blocks, triton.cdiv(C, CHANNELS)](
        x,
        d,
        index,
        y,
        blocks,
        P,
        C,
        *x.stride(),
        *y.stride(),
        block,
        CHANNELS,
    )
    return y.view(shape).movedim(-1, channel_dim)


@triton.jit
def scale_samples_kernel(
    x,  # (N, P, C)
    d,  # (buckets, C)
    index,  # (N,)
    y,  # (N, P, C), to be written
    blocks,  # of a sample: CUDA allows many programs in the first dimension only
    P,
    C,
    x_n,  # the strides of x
    x_p,
    x_c,
    y_n,  # the strides of y
    y_p,
    y_c,
    POSITIONS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """y = exp(d) * x, for POSITIONS positions and CHANNELS channels of one sample."""
    n = tl.program_id(0) // blocks
    p = tl.program_id(0) % blocks * POSITIONS + tl.arange(0, POSITIONS)
    c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (p < P)[:, None] & (c < C)[None, :]

    factor = tl.exp(tl.load(d + tl.load(index + n) * C + c, mask=c < C, other=0).to(tl.float32))
    x_places = n * x_n + (p * x_p)[:, None] + (c * x_c)[None, :]
    value = tl.load(x + x_places, mask=mask).to(tl.float32) * factor[None, :]
    y_places = n * y_n + (p * y_p)[:, None] + (c * y_c)[None, :]
    tl.store(y + y_places, value.to(y.dtype.element_ty), mask=mask)

"""Calibration: four ways to find the integers and the scales that replace a weight.

A grid has a step size s_out and a zero point for each row (output channel), and a scale s_in for
each column (input channel). The weight is replaced by

    W[o, i] = s_out[o] * (codes[o, i] - zero_point[o]) * s_in[i]    codes in 0 .. 2^n_bits - 1

    minmax    the grid of each row reaches from its smallest to its largest weight; s_in is 1
    mse       the range of each row is shrunk to where its squared error is smallest; s_in is 1
    rowcol    columns are balanced against rows, then s_out, s_in and codes are fitted in turn
    gptq      a grid as by rowcol, with codes that keep the layer near the float one on given data

Weights come as (G, O, I, K), in float32 or float64: G groups, O rows and I columns of a group, and
K positions of the kernel (1 for a linear layer), which share the scale of their column. A
calibration takes (w, n_bits) and returns a Grid. gptq also takes what the layer sees: its Moments.
"""

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

# --------------------------------------------------------------------------------------------------
# From the weights alone
# --------------------------------------------------------------------------------------------------


class Grid(NamedTuple):
    """A quantized weight: integers, and the grid that they lie on."""

    codes: Tensor  # (G, O, I, K), whole numbers in 0 .. 2^n_bits - 1, of the dtype of the weight
    zero_point: Tensor  # (G, O, 1, 1), the code of a weight of 0, in the same range
    s_out: Tensor  # (G, O, 1, 1), greater than 0
    s_in: Tensor  # (G, 1, I, 1), greater than 0

    def weight(self) -> Tensor:
        """The float weight: (G, O, I, K)."""
        return (self.codes - self.zero_point) * self.s_out * self.s_in


def nearest_codes(w: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """The code of the grid point that is nearest to each weight, in w's shape and dtype."""
    return ((w / scale).round() + zero_point).clamp(0, 2**n_bits - 1)


def minmax(w: Tensor, n_bits: int, shrink: float = 1.0) -> Grid:
    """A grid for each row that reaches from its smallest to its largest weight, and includes 0.

    Both ends are multiplied by shrink, for mse.
    """
    low = w.amin((2, 3), keepdim=True).clamp(max=0) * shrink  # (G, O, 1, 1)
    high = w.amax((2, 3), keepdim=True).clamp(min=0) * shrink  # (G, O, 1, 1)
    steps = 2**n_bits - 1
    s_out = (high - low) / steps
    s_out = torch.where(s_out > 0, s_out, 1)  # for a row of zeros
    zero_point = (-low / s_out).round()
    codes = nearest_codes(w, s_out, zero_point, n_bits)
    s_in = torch.ones_like(w[:, :1, :, :1])
    return Grid(codes, zero_point, s_out, s_in)


def mse(w: Tensor, n_bits: int, max_percent: int = 79) -> Grid:
    """minmax, with the range of each row shrunk by the percentage that minimizes its squared error.

    A few large weights make the steps of a row wide. Clipping them costs accuracy there, but gives
    all other weights a finer grid.
    """

    def squared_error(grid):  # (G, O, 1, 1)
        return (grid.weight() - w).square().sum((2, 3), keepdim=True)

    best = minmax(w, n_bits)
    least = squared_error(best)
    for percent in range(1, max_percent + 1):
        shrunk = minmax(w, n_bits, 1 - percent / 100)
        error = squared_error(shrunk)
        better = error < least
        best = Grid(
            codes=torch.where(better, shrunk.codes, best.codes),
            zero_point=torch.where(better, shrunk.zero_point, best.zero_point),
            s_out=torch.where(better, shrunk.s_out, best.s_out),
            s_in=best.s_in,
        )
        least = torch.minimum(error, least)
    return best


def rowcol(w: Tensor, n_bits: int, rounds: int = 12) -> Grid:
    """Scales for rows and columns: balance the columns, then fit s_out, s_in and codes in turn.

    The zero points stay those of mse.
    """
    s_in = balance_columns(w)
    codes, zero_point, s_out, _ = mse(w / s_in, n_bits)
    for _ in range(rounds):
        # with the codes and the other scale fixed, each scale has a closed form
        s_out = least_squares_scale(w, (codes - zero_point) * s_in, s_out, dims=(2, 3))
        s_in = least_squares_scale(w, (codes - zero_point) * s_out, s_in, dims=(1, 3))
        codes = nearest_codes(w, s_out * s_in, zero_point, n_bits)
    return Grid(codes, zero_point, s_out, s_in)


def balance_columns(w: Tensor, rounds: int = 16) -> Tensor:
    """Scales s_in (G, 1, I, 1) of columns: divided by them, and by others of rows, w is even.

    All weights of a row share its grid. If columns differ in size, the large ones make the steps
    wide, and the small ones are rounded to a few codes. Sinkhorn's iteration divides rows and
    columns by their deviations until all are similar (SINQ, arXiv 2509.22944). Only those of the
    columns are returned: the scales of rows are fitted afterwards.

    The imbalance is the largest deviation over the smallest. It doesn't fall in every round, so the
    scales of the best round are returned.
    """
    r = torch.ones_like(w[:, :, :1, :1])  # (G, O, 1, 1), the divisors of the rows
    c = torch.ones_like(w[:, :1, :, :1])  # (G, 1, I, 1), the divisors of the columns
    best, least = c, float("inf")
    for _ in range(rounds + 1):
        balanced = w / (r * c)
        row_std = deviation(balanced, (2, 3))  # (G, O, 1, 1)
        col_std = deviation(balanced, (1, 3))  # (G, 1, I, 1)
        smallest = torch.minimum(row_std.amin(1, True), col_std.amin(2, True))  # (G, 1, 1, 1)
        largest = torch.maximum(row_std.amax(1, True), col_std.amax(2, True))
        imbalance = largest / smallest
        best = torch.where(imbalance < least, c, best)
        least = imbalance.clamp(max=least)
        # divide by at most 2 in a round, so that no single round sets a scale
        r = r * (row_std / smallest).clamp(max=2)
        c = c * (col_std / smallest).clamp(max=2)
    return best


def deviation(w: Tensor, dims: tuple[int, int]) -> Tensor:
    """The standard deviation of w over dims, which are kept with size 1.

    balance_columns divides all rows and columns down to the smallest deviation, so one with
    nearly none must not be the smallest. Weights that are nearly equal, and far from 0, need a
    wide grid all the same, as it includes 0: their deviation counts as at least a third of their
    root mean square. A row or column of zeros counts as having the largest deviation.
    """
    std = w.std(dims, keepdim=True, correction=0)
    root_mean_square = w.square().mean(dims, keepdim=True).sqrt()
    std = torch.maximum(std, root_mean_square / 3)
    largest = std.amax((1, 2), True)
    return std.where(std > 0, largest).clamp(min=1e-12)


def least_squares_scale(w: Tensor, a: Tensor, old: Tensor, dims: tuple[int, int]) -> Tensor:
    """The scale s that minimizes |w - s a|^2 over dims, <w, a> / <a, a>; old where a is all 0."""
    norm = a.square().sum(dims, keepdim=True)
    return torch.where(norm > 0, (w * a).sum(dims, keepdim=True) / norm, old)


# --------------------------------------------------------------------------------------------------
# From data: the errors of a layer's outputs
# --------------------------------------------------------------------------------------------------


DAMPING = 0.01  # this share of average(h) is added to the diagonal of h


class Moments(NamedTuple):
    """Sums over all samples, and over all positions of a layer's output.

    For one position, a group of the layer has J = I * K inputs. They are called x when the layers
    before it are quantized, and x_float in the float network. With J = 23,040, the most in Stable
    Diffusion 1.5, h and cross take 2.1 GB each in float32.
    """

    h: Tensor  # (G, J, J), the sum of x x^T; half the Hessian of the squared error of an output
    cross: Tensor  # (G, J, J), the sum of x_float x^T


def gptq(w: Tensor, n_bits: int, seen: Moments) -> Grid:
    """A grid as by rowcol, with codes that keep the outputs right (GPTQ, arXiv 2210.17323).

    What should be small is the error of the outputs, not of each weight: with w_hat, the quantized
    weight, the sum of

        |w x_float - w_hat x|^2

    over all that the layer sees. The inputs of a layer are correlated, so the weights of some can
    make up for the errors of others. First match_outputs finds the float weights v for which the
    sum is smallest, damping aside. For any w_hat, the sum exceeds this minimum by the sum of
    |(v - w_hat) x|^2. So v is what is rounded, and from then on h is all that is needed of the
    data. All rows are rounded at once, input by input. After each, the weights that are still to be
    rounded move to where the sum is smallest again (compensate).

    The grid is fitted to v, before the rounding starts, and stays. Weights that move beyond its
    ends are clamped, and those after them make up for that, too.

    Data must come from all timesteps of the diffusion, because the sizes and correlations of the
    inputs depend on the timestep.
    """
    g, o, i, k = w.shape
    moved = []
    for w_group, h, cross in zip(w.reshape(g, o, i * k), seen.h, seen.cross):
        moved.append(match_outputs(w_group, h, cross))
    v = torch.stack(moved).view_as(w)

    _, zero_point, s_out, s_in = rowcol(v, n_bits)
    # v x = (v / s_in) (s_in x): with s_in moved from the weights to the inputs, the grid has a
    # scale for each row only
    v = (v / s_in).reshape(g, o, i * k)
    s_of_input = s_in.expand(g, 1, i, k).reshape(g, 1, i * k)
    h = seen.h * s_of_input * s_of_input.mT
    codes = []
    for v_group, s_out_group, zero_point_group, h_group in zip(v, s_out, zero_point, h):
        codes.append(compensate(v_group, s_out_group, zero_point_group, h_group, n_bits))
    return Grid(torch.stack(codes).view_as(w), zero_point, s_out, s_in)


def match_outputs(w: Tensor, h: Tensor, cross: Tensor) -> Tensor:
    """The weights v (O, J) whose outputs on x come nearest to those of w (O, J) on x_float.

    They minimize the sum of |w x_float - v x|^2, so v = w cross h^-1 = w + w (cross - h) h^-1.
    Damping adds damping * |w - v|^2 to that, which keeps v near w for inputs that are nearly always
    0. The last h^-1 becomes (h + damping)^-1.
    """
    damped = h.clone()
    damped.diagonal().add_(DAMPING * average(h))
    return w + torch.linalg.solve(damped, w @ (cross - h), left=False)


def compensate(w: Tensor, s_out: Tensor, zero_point: Tensor, h: Tensor, n_bits: int) -> Tensor:
    """Round w (O, J) to codes (O, J), input by input, and correct the later weights after each.

    s_out, zero_point: (O, 1, 1), a grid for each row. h (J, J): the sum of x x^T, for the inputs x
    that w multiplies.

    Inputs with large values come first: rounding their weights costs most, and all others can make
    up for it. In this order, once column j is rounded with error = w[:, j] - w_hat[:, j], least
    squares moves the weights of the inputs after it:

        w[:, j + 1:] -= error u[j, j + 1:] / u[j, j]        u upper triangular, u^T u = h^-1
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    u = inverse_factor(h[order][:, order])
    w = w.T[order]  # (J, O), so that an input's weights lie side by side
    s_out = s_out.flatten()
    zero_point = zero_point.flatten()
    codes = torch.empty_like(w)
    for j in range(len(w)):
        codes[j] = nearest_codes(w[j], s_out, zero_point, n_bits)  # (O,)
        error = w[j] - (codes[j] - zero_point) * s_out
        w[j + 1 :] -= torch.outer(u[j, j + 1 :], error / u[j, j])
    return codes[order.argsort()].T  # in the order of the inputs again


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular u (J, J) with u^T u = (h + damping)^-1, up to a factor.

    If h + damping = r r^T with r upper triangular, then u = r^-1. Cholesky's factor is lower
    triangular, so h is flipped in both directions before, and the factor after. h is divided by its
    average first, so that it may be of any magnitude; compensate needs only ratios of u.
    """
    h = h / average(h)
    h.diagonal().add_(DAMPING)
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve_triangular(r, eye, upper=True)


def average(h: Tensor) -> Tensor:
    """The mean of the diagonal of h, which has each input's sum of squares. At least 1e-30."""
    return h.diagonal().mean().clamp(min=1e-30)


# --------------------------------------------------------------------------------------------------
# The data: what a layer sees
# --------------------------------------------------------------------------------------------------

# quant.make_with_data calls these, for a model in eval mode and without gradients. It calls
# count_calls once; then for each layer inputs_of, in the float and in the quantized network, and
# moments, and gptq.


class Reached(Exception):
    """Ends a call of a model early. A model may catch it and go on; its result isn't used."""


def count_calls(model: nn.Module, layers, batch) -> dict[nn.Module, int]:
    """How often the model calls each of layers on a batch, in the order of their first calls.

    Layers that aren't called are left out.
    """
    calls = {}

    def count(layer, args):
        calls[layer] = calls.get(layer, 0) + 1

    hooks = [layer.register_forward_pre_hook(count) for layer in layers]
    try:
        call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def inputs_of(layer: nn.Module, calls: int, model: nn.Module, data: list) -> list[Tensor]:
    """What reaches a layer when the model is called on each batch of data.

    calls: how often the model calls the layer on a batch. The last of them ends the model's call.
    """
    inputs = []
    before = 0  # inputs of earlier batches

    def keep(layer, args, kwargs):
        x = args[0] if args else kwargs["input"]
        inputs.append(x.detach().clone())  # the model may change it in place
        if len(inputs) - before >= calls:
            raise Reached

    hook = layer.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for seed, batch in enumerate(data):
            before = len(inputs)
            with contextlib.suppress(Reached):
                call(model, batch, seed)
    finally:
        hook.remove()
    return inputs


def call(model: nn.Module, batch, seed: int = 0) -> None:
    """model(*batch), or model(**batch) if the batch is a dict.

    The model gets a copy of the batch, and may change it. PyTorch's random numbers depend on seed
    alone: the float and the quantized network must see the same data.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        if isinstance(batch, Mapping):
            model(**copy_of(batch))
        else:
            model(*copy_of(batch))


def copy_of(value):
    """value with a copy of each of its tensors, in tuples, lists and dicts."""
    if torch.is_tensor(value):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_of(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [copy_of(item) for item in value]
        is_named = hasattr(value, "_fields")  # a NamedTuple takes its fields one by one
        return type(value)(*items) if is_named else type(value)(items)
    return value


def moments(layer: nn.Module, inputs: list[Tensor], float_inputs: list[Tensor]) -> Moments:
    """The Moments of a Conv2d or Linear, from its inputs in the quantized and the float network."""
    h = 0
    cross = 0
    for x, x_float in zip(inputs, float_inputs, strict=True):
        x = input_rows(layer, x)  # (G, samples and positions, J)
        x_float = input_rows(layer, x_float)
        h = h + x.mT @ x
        cross = cross + x_float.mT @ x
    return Moments(h, cross)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs x of a layer, with a row for each sample and position: (G, rows, J)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    images = x.view(-1, *x.shape[-3:])  # a single image may come without a batch dimension
    patches = F.unfold(images, layer.kernel_size, layer.dilation, pixels(layer), layer.stride)
    patches = patches.unflatten(1, (layer.groups, -1))  # (N, G, J, positions)
    return patches.permute(1, 0, 3, 2).flatten(1, 2)


def pixels(conv: nn.Module) -> tuple[int, ...]:
    """The padding of a Conv2d in pixels; conv.padding may be "same" or "valid".

    quantize refuses layers for which "same" isn't the same on both sides.
    """
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return (0, 0) if conv.padding == "valid" else conv.padding


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol, "gptq": gptq}

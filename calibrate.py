"""Where quantization starts: four ways to find the integers and the scales of a weight.

A grid has a step size s_out and a zero point for each row (output channel), and a scale s_in for
each column (input channel). The weight is replaced by

    W[o, i] = s_out[o] * (codes[o, i] - zero_point[o]) * s_in[i]    codes in 0 .. 2^n_bits - 1

    minmax    the grid of each row reaches from its smallest to its largest weight; s_in is 1
    mse       the range of each row is shrunk until the squared error is smallest; s_in is 1
    rowcol    columns are balanced against rows, then s_out, s_in and codes are fitted in turn
    gptq      the grid of rowcol, with codes for which the layer's outputs are right on given data

Weights come as (G, O, I, K): G groups, O rows and I columns of a group, K positions of the kernel
(1 for a linear layer). A calibration takes (w, n_bits) and returns a Grid of w's dtype. The first
three need no data. gptq takes what the layer sees, too: its Moments.
"""

import contextlib
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

    codes: Tensor  # (G, O, I, K), whole numbers in 0 .. 2^n_bits - 1
    zero_point: Tensor  # (G, O, 1, 1), the code of a weight of 0, in the same range
    s_out: Tensor  # (G, O, 1, 1), greater than 0
    s_in: Tensor  # (G, 1, I, 1)

    def weight(self) -> Tensor:
        """The float weight: (G, O, I, K)."""
        return (self.codes - self.zero_point) * self.s_out * self.s_in


def nearest_codes(w: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """The code of the grid point that is nearest to each weight: (G, O, I, K)."""
    return ((w / scale).round() + zero_point).clamp(0, 2**n_bits - 1)


def minmax(w: Tensor, n_bits: int, shrink: float = 1.0) -> Grid:
    """A grid for each row that reaches from its smallest to its largest weight, and includes 0.

    Both ends are multiplied by shrink.
    """
    low = w.amin((2, 3), keepdim=True).clamp(max=0) * shrink  # (G, O, 1, 1)
    high = w.amax((2, 3), keepdim=True).clamp(min=0) * shrink  # (G, O, 1, 1)
    steps = 2**n_bits - 1
    s_out = torch.where(high > low, (high - low) / steps, 1)  # 1 for a row of zeros
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
    """Scales for rows and columns: balance the columns, then fit s_out, s_in and codes in turn."""
    s_in = balance_columns(w)
    codes, zero_point, s_out, _ = mse(w / s_in, n_bits)
    for _ in range(rounds):
        # with the codes and the other scale fixed, each scale has a closed form
        s_out = least_squares_scale(w, (codes - zero_point) * s_in, s_out, dims=(2, 3))
        s_in = least_squares_scale(w, (codes - zero_point) * s_out, s_in, dims=(1, 3))
        codes = nearest_codes(w, s_out * s_in, zero_point, n_bits)
    return Grid(codes, zero_point, s_out, s_in)


def balance_columns(w: Tensor, rounds: int = 16) -> Tensor:
    """Scales s_in (G, 1, I, 1) that give the columns of w / s_in similar standard deviations.

    All columns of a row share its grid. If their sizes differ, the large columns make the steps
    wide, and the small ones are rounded to a few codes. Sinkhorn's iteration divides rows and
    columns by their standard deviations until all are similar (SINQ, arXiv 2509.22944).

    The imbalance is the largest deviation over the smallest. It doesn't fall in every round, so the
    scales of the best round are returned.
    """
    r = torch.ones_like(w[:, :, :1, :1])  # (G, O, 1, 1), the divisors of the rows
    c = torch.ones_like(w[:, :1, :, :1])  # (G, 1, I, 1), and of the columns
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
        # divide by at most 2 in a round, so that an outlier can't set a scale in a single one
        r = r * (row_std / smallest).clamp(max=2)
        c = c * (col_std / smallest).clamp(max=2)
    return best


def deviation(w: Tensor, dims: tuple[int, int]) -> Tensor:
    """The standard deviation of w over dims, which are kept with size 1.

    A row or column of equal weights has none. Left at 0, it would be the smallest, which all others
    are divided down to. So it counts as the largest, and stays out of their way.
    """
    std = w.std(dims, keepdim=True, correction=0)
    largest = std.amax((1, 2), True)
    return std.where(std > 0, largest).clamp(min=1e-12)


def least_squares_scale(w: Tensor, a: Tensor, old: Tensor, dims: tuple[int, int]) -> Tensor:
    """The scale s that minimizes |w - s a|^2 over dims, <w, a> / <a, a>; old where a is all 0."""
    norm = a.square().sum(dims, keepdim=True)
    return torch.where(norm > 0, (w * a).sum(dims, keepdim=True) / norm, old)


# --------------------------------------------------------------------------------------------------
# From data: the errors of a layer's outputs
# --------------------------------------------------------------------------------------------------


class Moments(NamedTuple):
    """What a layer sees, summed over samples and positions. A group has J = I * K inputs.

    x is what reaches the layer in the network that is quantized up to here, x_float the same in the
    float network. Of J = 11,520 inputs, each of the two takes 531 MB as float32.
    """

    h: Tensor  # (G, J, J), the sum of x x^T
    cross: Tensor  # (G, J, J), the sum of x_float x^T


def gptq(w: Tensor, n_bits: int, seen: Moments) -> Grid:
    """The grid of rowcol, with codes for which the outputs are right (GPTQ, arXiv 2210.17323).

    What should be small isn't the error of each weight, but that of the outputs: the sum of

        |w x_float - w_hat x|^2

    over all that the layer sees. Its inputs are correlated, so the weights of some inputs can make
    up for the errors of others. Each weight of a row is rounded in turn, and after each, those that
    are still to be rounded move to where the sum is smallest again (see compensate).

    The grid needn't change for that. It is fitted before, to weights that match_outputs has moved
    already, and on the way from one rounding to the next a weight moves by about a step.

    Data must come from all timesteps: the inputs of a layer have other sizes and correlations at
    one timestep than at another.
    """
    g, o, i, k = w.shape
    targets = []
    for of_group, h, cross in zip(w.reshape(g, o, i * k), *seen):
        targets.append(match_outputs(of_group, h, cross))
    target = torch.stack(targets).view_as(w)

    _, zero_point, s_out, s_in = rowcol(target, n_bits)
    # W x = (W / s_in) (s_in x): with the scales of the columns on the side of the inputs, what is
    # left is a grid for each row.
    scaled = (target / s_in).reshape(g, o, i * k)
    s_of_input = s_in.expand(g, 1, i, k).reshape(g, 1, i * k)
    h = seen.h * s_of_input * s_of_input.mT
    codes = [compensate(*of_group, n_bits) for of_group in zip(scaled, s_out, zero_point, h)]
    return Grid(torch.stack(codes).view_as(w), zero_point, s_out, s_in)


def match_outputs(w: Tensor, h: Tensor, cross: Tensor) -> Tensor:
    """The weights (O, J) whose outputs on x come nearest to those of w (O, J) on x_float.

    They minimize the sum of |w x_float - v x|^2, so v = w cross h^-1. Damping keeps v near w for
    inputs that were hardly seen.
    """
    damping = DAMPING * average(h) * torch.eye(len(h), dtype=h.dtype, device=h.device)
    return torch.linalg.solve(h + damping, w @ (cross + damping), left=False)


def compensate(w: Tensor, s_out: Tensor, zero_point: Tensor, h: Tensor, n_bits: int) -> Tensor:
    """Codes (O, J) of w (O, J), each rounded after the weights before it have been made up for.

    s_out, zero_point: (O, 1, 1), a grid for each row. h (J, J): the sum of x x^T.

    When input j's weight has been rounded, with an error of w[j] - w_hat[j], the weights of the
    inputs after it move to where least squares would put them:

        w[j + 1:] -= error * u[j, j + 1:] / u[j, j]         u upper triangular, u^T u = h^-1

    Inputs with large values come first: their errors cost most, and all others can make up for
    them.
    """
    order = h.diagonal().argsort(descending=True, stable=True)
    u = inverse_factor(h[order][:, order])
    w = w.T[order]  # (J, O), so that an input's weights lie side by side
    s_out = s_out.flatten()
    zero_point = zero_point.flatten()
    codes = torch.empty_like(w)
    for j in range(len(w)):
        code = nearest_codes(w[j], s_out, zero_point, n_bits)  # (O,)
        error = w[j] - (code - zero_point) * s_out
        w[j + 1 :] -= torch.outer(u[j, j + 1 :], error / u[j, j])
        codes[order[j]] = code
    return codes.T


def inverse_factor(h: Tensor) -> Tensor:
    """The upper triangular u (J, J) with u^T u = (h + damping)^-1, for h of any size.

    If h + damping = r r^T with r upper triangular, then u = r^-1. Cholesky's factor is a lower
    triangular one, and that of the flipped matrix, flipped, is r.
    """
    eye = torch.eye(len(h), dtype=h.dtype, device=h.device)
    h = h / average(h) + DAMPING * eye
    r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(r, eye, upper=True)


def average(h: Tensor) -> Tensor:
    """The mean of x^2 over the inputs, times the number of samples and positions; never 0."""
    return h.diagonal().mean().clamp(min=1e-30)


DAMPING = 0.01  # of the average; inputs that were never seen count as if they had this much


# --------------------------------------------------------------------------------------------------
# The data: what a layer sees
# --------------------------------------------------------------------------------------------------


class Reached(BaseException):
    """Ends a call of a model early. No Exception, which the model might catch."""


def count_calls(model: nn.Module, layers: list[nn.Module], batch) -> dict[nn.Module, int]:
    """How often the model calls each of layers on a batch, in the order of their first calls."""
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

    calls: how often the model calls the layer on a batch. After so many, the rest is left out.
    """
    inputs = []

    def keep(layer, args):
        inputs.append(args[0].clone())  # the model may change it in place
        if len(inputs) % calls == 0:
            raise Reached

    hook = layer.register_forward_pre_hook(keep)
    try:
        for batch in data:
            with contextlib.suppress(Reached):
                call(model, batch)
    finally:
        hook.remove()
    return inputs


def call(model: nn.Module, batch):
    """model(*batch), or model(**batch) if the batch is a dict."""
    if isinstance(batch, dict):
        return model(**batch)
    return model(*batch)


def moments(layer: nn.Module, inputs: list[Tensor], float_inputs: list[Tensor]) -> Moments:
    """The Moments of a Conv2d or Linear whose inputs are these, in batches."""
    h = 0
    cross = 0
    for x, x_float in zip(inputs, float_inputs):
        x = columns(layer, x)  # (G, samples and positions, J)
        x_float = columns(layer, x_float)
        h = h + x.mT @ x
        cross = cross + x_float.mT @ x
    return Moments(h, cross)


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """The inputs x of a layer as what its weight (G, O, J) is multiplied by: (G, ..., J)."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if isinstance(layer, nn.Linear):
        return x.reshape(1, -1, x.shape[-1])
    images = x.view(-1, *x.shape[-3:])  # a single image has no batch dimension
    patches = F.unfold(images, layer.kernel_size, layer.dilation, pixels(layer), layer.stride)
    patches = patches.unflatten(1, (layer.groups, -1))  # (N, G, J, positions)
    return patches.permute(1, 0, 3, 2).flatten(1, 2)


def pixels(conv: nn.Module) -> tuple[int, ...]:
    """The padding of a Conv2d in pixels, also if it is "same" or "valid"."""
    if conv.padding == "same":
        return tuple(d * (k - 1) // 2 for d, k in zip(conv.dilation, conv.kernel_size))
    return (0, 0) if conv.padding == "valid" else conv.padding


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol, "gptq": gptq}

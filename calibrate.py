"""Where quantization starts: three ways to find the integers and the scales of a weight.

A grid has a step size s_out and a zero point for each row (output channel), and a scale s_in for
each column (input channel). The weight is replaced by

    W[o, i] = s_out[o] * (codes[o, i] - zero_point[o]) * s_in[i]    codes in 0 .. 2^n_bits - 1

    minmax    the grid of each row reaches from its smallest to its largest weight; s_in is 1
    mse       the range of each row is shrunk until the squared error is smallest; s_in is 1
    rowcol    columns are balanced against rows, then s_out, s_in and codes are fitted in turn

Weights come as (G, O, I, K): G groups, O rows and I columns of a group, K positions of the kernel
(1 for a linear layer). A calibration takes (w, n_bits) and returns a Grid of w's dtype. It needs no
data.
"""

from typing import NamedTuple

import torch
from torch import Tensor


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


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol}

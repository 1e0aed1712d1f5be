"""Where the scales start: three ways to find the integers and the grid of a weight, none of which
needs data.

A grid has one step size and one zero point for each row (output channel), and one scale for each
column (input channel):

    W[o, i] is replaced by s_out[o] * (q[o, i] - zero_point[o]) * s_in[i]    q in 0 .. 2^n_bits - 1

    minmax    each row's grid reaches from its least to its greatest weight; s_in = 1
    mse       each row's grid is shrunk until its squared error is least; s_in = 1
    rowcol    columns are balanced against rows first, then s_out, s_in and q are fitted in turn

Weights come as (G, O, I, K): G groups, O rows and I columns of a group, K taps of the kernel (1
for a linear layer). Each calibration takes (w, n_bits) and returns a Grid, in w's dtype.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Grid(NamedTuple):
    """The integers of a weight, and the grid that they count the steps of."""

    codes: Tensor  # (G, O, I, K), whole numbers in 0 .. 2^n_bits - 1
    zero_point: Tensor  # (G, O, 1, 1), the code of the weight 0: a whole number in the same range
    s_out: Tensor  # (G, O, 1, 1), greater than 0
    s_in: Tensor  # (G, 1, I, 1)

    def weight(self) -> Tensor:
        """The weight that the grid stands for: (G, O, I, K)."""
        return (self.codes - self.zero_point) * self.s_out * self.s_in


def nearest_codes(w: Tensor, scale: Tensor, zero_point: Tensor, n_bits: int) -> Tensor:
    """The code of the grid point that is nearest to each weight: (G, O, I, K)."""
    return ((w / scale).round() + zero_point).clamp(0, 2**n_bits - 1)


def minmax(w: Tensor, n_bits: int, shrink: float = 1.0) -> Grid:
    """A grid for each row from its least to its greatest weight, both times `shrink`. The grid
    always includes 0.
    """
    low = w.amin((2, 3), keepdim=True).clamp(max=0) * shrink  # (G, O, 1, 1)
    high = w.amax((2, 3), keepdim=True).clamp(min=0) * shrink  # (G, O, 1, 1)
    steps = 2**n_bits - 1
    s_out = torch.where(high > low, (high - low) / steps, 1)  # 1 for a row of zeros
    zero_point = (-low / s_out).round()
    codes = nearest_codes(w, s_out, zero_point, n_bits)
    s_in = torch.ones_like(w[:, :1, :, :1])
    return Grid(codes, zero_point, s_out, s_in)


def mse(w: Tensor, n_bits: int, percents: int = 80) -> Grid:
    """minmax, the range of each row shrunk by the percentage (0 .. percents - 1) that leaves the
    least squared error.

    A few large weights make a row's steps wide. Cutting them off costs an error there and makes
    all others finer.
    """

    def squared_error(grid):  # (G, O, 1, 1)
        return (grid.weight() - w).square().sum((2, 3), keepdim=True)

    best = minmax(w, n_bits)
    least = squared_error(best)
    for percent in range(1, percents):
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
    """Rows and columns together: balance the columns, find each row's grid, then fit s_out, s_in
    and codes in turn.
    """
    s_in = balance_columns(w)
    codes, zero_point, s_out, _ = mse(w / s_in, n_bits)
    for _ in range(rounds):
        # each of the two has a closed form while the other and the codes stay as they are
        s_out = least_squares_scale(w, (codes - zero_point) * s_in, s_out, dims=(2, 3))
        s_in = least_squares_scale(w, (codes - zero_point) * s_out, s_in, dims=(1, 3))
        codes = nearest_codes(w, s_out * s_in, zero_point, n_bits)
    return Grid(codes, zero_point, s_out, s_in)


def balance_columns(w: Tensor, rounds: int = 16) -> Tensor:
    """Scales s_in (G, 1, I, 1) of the columns, so that those of w / s_in are about equally large
    (SINQ, arXiv 2509.22944).

    One grid serves a whole row. A column of small weights then gets a few of its codes only, and
    a column of large ones makes its steps wide. Sinkhorn's iteration divides rows and columns by
    their standard deviations in turn, until all are alike. The imbalance is the greatest
    deviation over the least. It may rise again, so the best round counts.
    """
    r = torch.ones_like(w[:, :, :1, :1])  # (G, O, 1, 1), what the rows have been divided by
    c = torch.ones_like(w[:, :1, :, :1])  # (G, 1, I, 1), and the columns
    best, least = c, float("inf")
    for _ in range(rounds + 1):
        balanced = w / (r * c)
        rows = deviation(balanced, (2, 3))  # (G, O, 1, 1)
        cols = deviation(balanced, (1, 3))  # (G, 1, I, 1)
        smallest = torch.minimum(rows.amin(1, True), cols.amin(2, True))  # (G, 1, 1, 1)
        largest = torch.maximum(rows.amax(1, True), cols.amax(2, True))
        imbalance = largest / smallest
        best = torch.where(imbalance < least, c, best)
        least = imbalance.clamp(max=least)
        # a bounded step towards the smallest deviation: an outlier must not decide a scale at
        # once
        r = r * (rows / smallest).clamp(0.7, 2)
        c = c * (cols / smallest).clamp(0.7, 2)
    return best


def deviation(w: Tensor, dims: tuple[int, int]) -> Tensor:
    """Standard deviation of w over dims, which stay with size 1. A row or column of equal
    weights, which needs no balancing, gets its group's largest: 0 would be the smallest of all,
    and the others would be divided by it.
    """
    std = w.std(dims, keepdim=True, correction=0)
    largest = std.amax((1, 2), True)
    return std.where(std > 0, largest).clamp(min=1e-12)


def least_squares_scale(w: Tensor, a: Tensor, old: Tensor, dims: tuple[int, int]) -> Tensor:
    """The scale s that makes |w - s a|^2 least over dims: <w, a> / <a, a>. If a is all zero
    there, any does: the old one.
    """
    norm = a.square().sum(dims, keepdim=True)
    return torch.where(norm > 0, (w * a).sum(dims, keepdim=True) / norm, old)


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol}

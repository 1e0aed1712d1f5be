"""Calibration: the integers and scales that stand for a weight, found from the weight alone."""

import copy

import numpy as np
import pytest
import torch
import torch.nn as nn

from calibrate import CALIBRATIONS, balance_columns, least_squares_scale, minmax, mse, rowcol
from quant import quantize


def squared_error(grid, w):
    """The squared error (G, O, I, K) of the weight that a grid stands for."""
    weight = (grid.codes - grid.zero_point) * grid.s_out * grid.s_in
    return (weight - w).square()


@pytest.mark.parametrize("calibrate", CALIBRATIONS.values(), ids=CALIBRATIONS.keys())
@pytest.mark.parametrize("n_bits", [2, 3, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_codes_and_zero_points_are_whole_and_in_range(calibrate, n_bits, shift):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64) + shift
    grid = calibrate(w, n_bits)
    for whole in (grid.codes, grid.zero_point):
        assert whole.min() >= 0
        assert whole.max() <= 2**n_bits - 1
        assert torch.equal(whole, whole.round())
    assert (grid.s_out > 0).all()
    assert (grid.s_in > 0).all()
    assert torch.equal((grid.weight() - w).square(), squared_error(grid, w))


@pytest.mark.parametrize("n_bits", [2, 3, 8])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 3.0])
def test_minmax_is_within_half_a_step_of_each_weight(n_bits, shift):
    w = torch.randn(2, 6, 5, 9, dtype=torch.float64) + shift
    grid = minmax(w, n_bits)
    error = squared_error(grid, w).sqrt()
    assert (error <= grid.s_out / 2 + 1e-12).all()


def test_weights_near_the_smallest_number_have_a_grid():
    grid = minmax(torch.tensor([[[[0.0], [1e-44]]]]), 8)
    assert (grid.s_out > 0).all()
    assert grid.codes.isfinite().all()


@pytest.mark.parametrize("n_bits", [2, 3, 8])
def test_mse_finds_the_best_of_all_shrunk_ranges_of_each_row(n_bits):
    w = torch.randn(2, 3, 5, 7, dtype=torch.float64) ** 3 + 1
    grid = mse(w, n_bits)
    for g in range(2):
        for o in range(3):
            s, z = best_shrunk_range(w[g, o].flatten().numpy(), n_bits)
            assert grid.s_out[g, o].item() == pytest.approx(s, rel=1e-9)
            assert grid.zero_point[g, o].item() == z


def best_shrunk_range(values, n_bits):
    """The step and the zero point with the least squared error, by trying all in numpy."""
    errors = {}
    for percent in range(80):
        share = 1 - percent / 100
        low = min(values.min(), 0) * share
        high = max(values.max(), 0) * share
        s = (high - low) / (2**n_bits - 1)
        z = np.round(-low / s)
        rounded = (np.clip(np.round(values / s) + z, 0, 2**n_bits - 1) - z) * s
        errors[s, z] = ((rounded - values) ** 2).sum()
    return min(errors, key=errors.get)


@pytest.mark.parametrize("n_bits", [2, 3, 8])
def test_if_columns_differ_and_a_weight_is_large_rowcol_beats_mse_and_mse_minmax(n_bits):
    w = torch.randn(1, 32, 24, 9)
    w *= torch.rand(1, 1, 24, 1).exp()  # columns differ
    w[0, 0, 0, 0] = 9.0  # an outlier
    errors = []
    for calibrate in (minmax, mse, rowcol):
        errors.append(squared_error(calibrate(w, n_bits), w).mean().item())
    assert errors[0] > errors[1] > errors[2]


def test_balancing_finds_the_scales_that_columns_were_multiplied_by():
    r = torch.empty(2, 9, 1, 1, dtype=torch.float64).uniform_(-1, 1).exp()
    c = torch.empty(2, 1, 7, 1, dtype=torch.float64).uniform_(-1, 1).exp()
    even = torch.tensor([1.0, -1.0], dtype=torch.float64)  # at the two positions of the kernel
    ratio = balance_columns(r * c * even) / c
    torch.testing.assert_close(ratio, ratio[:, :, :1].expand_as(ratio))  # one number for a group


@pytest.mark.parametrize("dims", [(2, 3), (1, 3)])
def test_a_fitted_scale_is_that_of_least_squares(dims):
    w = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    a = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    a[0, 1] = 0
    a[0, :, 2] = 0
    kept = 3 - dims[0]  # the dimension of the scales: rows, or columns
    old = torch.full_like(a.sum(dims, keepdim=True), 7)
    found = least_squares_scale(w, a, old, dims)
    assert found.shape == old.shape
    for g in range(2):
        for k in range(w.shape[kept]):
            left = a[g].select(kept - 1, k).reshape(-1, 1)
            right = w[g].select(kept - 1, k).reshape(-1, 1)
            expected = torch.linalg.lstsq(left, right).solution if left.any() else 7
            assert found[g].select(kept - 1, k).item() == pytest.approx(float(expected))


@pytest.mark.parametrize("n_bits", [2, 4])
def test_no_round_of_rowcol_makes_it_worse(n_bits):
    w = torch.randn(2, 8, 6, 9, dtype=torch.float64)
    w *= torch.rand(2, 1, 6, 1, dtype=torch.float64).exp()
    errors = [squared_error(rowcol(w, n_bits, rounds), w).sum().item() for rounds in range(6)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[1]


@pytest.mark.parametrize("spread", [0, 1e-6, 1e-3, 0.1])
@pytest.mark.parametrize("size", [0.05, 0.5, 5])
def test_a_column_of_nearly_equal_weights_does_not_ruin_the_others(size, spread):
    w = torch.randn(1, 64, 64, 1)
    w[:, :, 0] = size * (1 + spread * torch.randn(64, 1))
    for n_bits in (2, 4):
        error = squared_error(rowcol(w, n_bits), w).mean()
        assert error < 1.1 * squared_error(minmax(w, n_bits), w).mean()


def test_a_row_of_zeros_leaves_the_other_rows_balanced():
    w = torch.randn(1, 33, 24, 9)
    w *= (2 * torch.rand(1, 1, 24, 1)).exp()
    without = squared_error(rowcol(w, 4), w)[:, 1:].mean()
    w[0, 0] = 0
    with_zeros = squared_error(rowcol(w, 4), w)[:, 1:].mean()
    assert with_zeros < 1.05 * without


@pytest.mark.parametrize("calibration", [*CALIBRATIONS, "gptq"])
@pytest.mark.parametrize("n_bits", [2, 8])
def test_rows_of_zeros_constant_rows_and_outliers_stay_finite(calibration, n_bits):
    layer = nn.Linear(6, 5)
    with torch.no_grad():
        layer.weight[0] = 0
        layer.weight[1] = 0.7
        layer.weight[2] = -0.7
        layer.weight[:, 3] = 0
        layer.weight[3, 1] = 1e4
    model = nn.Sequential(copy.deepcopy(layer))
    quantize(model, n_bits, calibration=calibration, data=[(torch.randn(50, 6),)])
    w = model[0].dequantize()
    assert w.isfinite().all()
    assert (w[0] == 0).all()
    if calibration == "minmax":
        torch.testing.assert_close(w[:3], layer.weight[:3], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("calibration", [*CALIBRATIONS, "gptq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_layer_gets_the_integers_of_its_float32_copy(dtype, calibration):
    half = nn.Sequential(nn.Linear(12, 4)).to(dtype)
    full = copy.deepcopy(half).float()
    x = torch.randn(20, 12).to(dtype)
    quantize(half, calibration=calibration, data=[(x,)])
    quantize(full, calibration=calibration, data=[(x.float(),)])
    assert torch.equal(half[0].codes, full[0].codes)

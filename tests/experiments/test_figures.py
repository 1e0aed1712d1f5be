"""What figures.py computes of its own, against independent references."""

from argparse import Namespace

import pytest
import torch
from conftest import ROOT, run

import figures

LOG = ROOT / "experiments" / "runs.jsonl"


def left_by_one_scale(w, dw):
    """What is left of dw (n,) after the best multiple of w (n,) is taken away."""
    scale = torch.linalg.lstsq(w.flatten()[:, None], dw.flatten()[:, None]).solution.item()
    return dw - w * scale


def squared_norm_left_by_scales(w, dw):
    """min over a, b of |dw - (a b - 1) w|^2, found by a general optimizer."""
    a = torch.ones(w.shape[0], dtype=w.dtype, requires_grad=True)
    b = torch.ones(w.shape[1], dtype=w.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [a, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14
    )
    total = dw.square().sum()

    def closure():
        optimizer.zero_grad()
        loss = (dw - (a[:, None, None] * b[:, None] - 1) * w).square().sum() / total
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item() * total


@pytest.mark.parametrize("taps", [1, 9])
def test_explained_shares_are_those_of_a_best_fit(taps):
    generator = torch.Generator().manual_seed(taps)
    w, dw = torch.randn(2, 7, 5, taps, dtype=torch.float64, generator=generator)
    each, rows, both, positions = figures.explained(w, dw, 2000)
    total = dw.square().sum()

    of_rows = 0
    of_each = 0
    for o in range(7):
        of_rows += left_by_one_scale(w[o], dw[o]).square().sum()
        for i in range(5):
            of_each += left_by_one_scale(w[o, i], dw[o, i]).square().sum()
    torch.testing.assert_close(rows.share, 1 - of_rows / total)
    torch.testing.assert_close(each.share, 1 - of_each / total)

    of_both = squared_norm_left_by_scales(w, dw)
    assert both.share >= 1 - of_both / total - 1e-6
    assert both.share > rows.share
    left = (dw - both.change[..., None] * w).square().sum()
    torch.testing.assert_close(both.share, 1 - left / total)

    of_positions = squared_norm_left_by_scales(w.reshape(7, -1, 1), dw.reshape(7, -1, 1))
    assert positions.share >= 1 - of_positions / total - 1e-6
    assert positions.share > both.share or taps == 1
    left = (dw - positions.change.view(7, 5, taps) * w).square().sum()
    torch.testing.assert_close(positions.share, 1 - left / total)


def test_a_figure_of_what_was_not_run_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = Namespace(log=tmp_path / "runs.jsonl", steps_divisor=1)
    with pytest.raises(ValueError, match="PEQA, 4 bits.*tables.py defaults"):
        figures.restored(args, "PEQA, 4 bits")


def test_the_figure_of_bytes_has_a_line_for_each_method_that_trains():
    figure = figures.draw_bytes(Namespace(log=LOG))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    figures.plt.close(figure)
    assert labels == [
        "full precision",
        "PEQA",
        "PEQA + TAS, N = 2",
        "TuneQDM, N = 1",
        "TuneQDM, N = 2",
        "TuneQDM, N = 4",
        "by position, N = 1",
        "LoRA r = 2, packed base",
    ]


def test_quick_figures_do_not_replace_those_that_ship(tmp_path, monkeypatch):
    def draw(args):
        """A point."""
        figure, axis = figures.plt.subplots()
        axis.plot([0], [0], "o")
        return figure

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "FIGURES", {"a": draw})
    assert run(figures, "--quick") == 0
    assert (tmp_path / "out" / "quick" / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not (ROOT / "experiments" / "figures" / "a.png").exists()

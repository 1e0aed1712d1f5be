"""The figures: python experiments/figures.py --log experiments/runs.jsonl

They show runs of one subject. The figure of bytes is drawn from the log, the others from the files
that the README's runs of bix, seed 0, left in out/. All are written to experiments/figures.
"""

import sys
from itertools import product
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import claims
import neighbours
import train
from data import toy
from quant import adapter, bucket, load_adapter
from report import parse_with_log, runs_of
from runs import DIFFUSION, ONE_SUBJECT, SHORT, Row, losses, prepare
from sample import BASE, sample
from support.files import load
from support.flags import Parser, guard

SUBJECT = "bix"  # the subject of the figures that show one
ROWS = {
    "untuned, 4 bits": Row("untuned, 4 bits", columns="position", flags="--steps 0"),
    **SHORT,
}


def restored(args, name, subject=SUBJECT, seed=0):
    """The model of a row, fine-tuned if the row says so, and its run's arguments.

    Raises ValueError if the run's files aren't there.
    """
    model, run = prepare(args, ROWS[name], subject, seed)
    if run.steps > 0:
        state = run.out / "state.pt"
        if not state.exists():
            raise ValueError(
                f"no '{name}' of {subject} in {run.out.parent}; first run "
                f"python experiments/tables.py defaults --subjects {subject} without --log"
            )
        model.load_state_dict(load(state, "fine-tuning")["tensors"], strict=False)
    return model.eval(), run


def hide_ticks(axis):
    """An image needs no scale."""
    axis.set_xticks([])
    axis.set_yticks([])


# --------------------------------------------------------------------------------------------------
# Images of each method
# --------------------------------------------------------------------------------------------------


def draw_samples(args):
    """A column for each method, a row for each prompt."""
    names = [
        "the base",
        "full precision",
        "untuned, 4 bits",
        "PEQA, 4 bits",
        "paper's columns, N = 1, 4 bits",
        "by position, N = 1, 4 bits",
        "LoRA r = 2, 4 bits",
    ]
    figure, axes = plt.subplots(1, len(names), figsize=(9, 9))
    for axis, name in zip(axes, names):
        model, run = restored(args, name)
        images, _ = train.evaluate(model, None, run)  # without scores
        column = toy.tile(images[:: train.IMAGES_PER_PROMPT], 1)
        axis.imshow(column)
        axis.set_title(name.replace(", ", "\n"), fontsize=8)
        hide_ticks(axis)

    labels = [prompt.replace(" and", "\nand").replace(" on", "\non") for prompt in train.PROMPTS]
    middles = (torch.arange(len(labels)) + 0.5) * column.height / len(labels)
    axes[0].set_yticks(middles, labels, fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# What scales can express of a change of weights
# --------------------------------------------------------------------------------------------------


class Explained(NamedTuple):
    """How near scales of one kind come to a given change of weights."""

    change: Tensor  # (O, columns): the relative change of each weight by the nearest scales
    share: Tensor  # of the given change's squares that this explains, a number


def explained(w, dw, rounds=50):
    """What scales of four kinds explain of a change dw of weights w, both (O, I, K).

    The kinds: a scale for each kernel; s_out; s_out x s_in; s_out x s_in, by position. Each is
    fitted by least squares: change * w to dw.
    """
    ww = w.square().sum(2)  # (O, I)
    wd = (w * dw).sum(2)  # (O, I)
    each_kernel = wd / ww
    rows = (wd.sum(1, True) / ww.sum(1, True)).expand_as(ww)
    channels = rows_and_columns(ww, wd, rounds)
    positions = rows_and_columns(w.flatten(1).square(), (w * dw).flatten(1), rounds)  # (O, I * K)

    kinds = []
    for change in (each_kernel, rows, channels, positions):
        change_of_each = change.view(*w.shape[:2], -1)  # (O, I, K) or (O, I, 1)
        rest = dw - change_of_each * w
        kinds.append(Explained(change, 1 - rest.square().sum() / dw.square().sum()))
    return kinds


def rows_and_columns(ww, wd, rounds):
    """s_out * s_in - 1 for the scales of rows and columns that come nearest to a change dw.

    ww, wd: w * w and w * dw (O, columns), summed over the weights that share both scales.
    """
    # |w + dw - s_out s_in w|^2 is least in s_out while s_in stays as it is, and the other way round
    target = ww + wd
    s_in = torch.ones_like(ww[:1])  # (1, columns)
    for _ in range(rounds):
        s_out = (target * s_in).sum(1, True) / (ww * s_in.square()).sum(1, True)  # (O, 1)
        s_in = (target * s_out).sum(0, True) / (ww * s_out.square()).sum(0, True)  # (1, columns)
    return s_out * s_in - 1


def draw_weights(args, name="middle.0.conv1"):
    """What full fine-tuning does to a layer, and what of it scales can express."""
    before = restored(args, "the base")[0].state_dict()
    after = restored(args, "full precision")[0].state_dict()
    layers = {}  # the four kinds for each 3x3 convolution
    for key, w in before.items():
        if w.shape[2:] == (3, 3):
            layers[key] = explained(w.flatten(2), (after[key] - w).flatten(2))

    figure, axes = plt.subplots(1, 4, figsize=(15, 4), layout="constrained")
    titles = ("each kernel's best scale", "s_out", "s_out x s_in", "s_out x s_in, by position")
    for kind, (axis, title) in enumerate(zip(axes, titles)):
        change, share = layers[f"{name}.weight"][kind]
        median = torch.stack([kinds[kind].share for kinds in layers.values()]).median()
        shown = axis.imshow(change, cmap="RdBu", vmin=-0.2, vmax=0.2, aspect="auto")
        axis.set_title(
            f"{title}: {share:.1%} of the change\n(3x3 convolutions: median {median:.1%})",
            fontsize=10,
        )
        axis.set_xlabel("input channel" if kind < 3 else "input channel at a position")
        axis.set_ylabel("output channel")
    figure.colorbar(shown, ax=axes, label="relative change")
    return figure


# --------------------------------------------------------------------------------------------------
# Loss by timestep
# --------------------------------------------------------------------------------------------------


def new_scenes(n, generator):
    """The subject in n places and before n backgrounds: images (n, 3, 16, 16), captions (n, L)."""
    parts = toy.read_parts(BASE.parent / "subjects" / SUBJECT)
    _, _, parts_of_sprites = toy.sprites()
    (number,) = (parts_of_sprites == parts).all(1).nonzero()
    sprite = number.expand(n)
    y, x = torch.tensor(toy.SPOTS)[torch.randint(len(toy.SPOTS), (n,), generator=generator)].T
    background = torch.randint(len(toy.backgrounds()), (n,), generator=generator)
    images = toy.render(background, [(sprite, y, x)])

    captions = []  # one for each background, in the order of toy.backgrounds
    for color, pattern in product(toy.COLORS, toy.PATTERNS):
        captions.append(toy.caption(f"sks creature on {color} {pattern}"))
    return images, torch.tensor(captions)[background]


def draw_losses(args, bins=25, each=40):
    """Loss by timestep on the subject, in new places and before new backgrounds."""
    generator = torch.Generator().manual_seed(1)
    x0, words = new_scenes(bins * each, generator)
    middles = (torch.arange(bins) + 0.5) * DIFFUSION.T / bins
    t = middles.long().repeat_interleave(each)  # (bins * each,)

    figure, axis = plt.subplots(figsize=(6.5, 3.5))
    names = [
        "the base",
        "untuned, 4 bits",
        "PEQA, 4 bits",
        "paper's columns, N = 1, 4 bits",
        "by position, N = 1, 4 bits",
        "full precision",
    ]
    for name in names:
        model, _ = restored(args, name)
        loss = losses(model, x0, words, t, generator.manual_seed(2))  # the same noise for all
        axis.semilogy(t[::each], loss.view(bins, each).mean(1), label=name)
    axis.set_xlabel("timestep")
    axis.set_ylabel("squared error of v")
    axis.legend(fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Bytes
# --------------------------------------------------------------------------------------------------


def draw_bytes(args):
    """The bytes of the base and one subject against fidelity, a line for each method."""
    points = {}  # method: (bytes, mean, standard deviation) of each width
    for row in ONE_SUBJECT.values():
        runs = list(runs_of(args, row.name, toy.TABLE).values())
        if not runs or not row.trains:
            continue
        parts = torch.tensor([run["parts"] for run in runs])
        sd, mean = torch.std_mean(parts, correction=0)
        total = runs[0]["bytes"] + runs[0]["base bytes"]
        points.setdefault(row.method, []).append((total, mean, sd))

    figure, axis = plt.subplots(figsize=(6.5, 4))
    for method, of_method in points.items():
        totals, means, sds = zip(*sorted(of_method))
        axis.errorbar(totals, means, sds, fmt="o-", capsize=2, label=method)
    axis.set_xscale("log")
    axis.set_xlabel("the base and one subject, MB (from left: 2, 3, 4, 8 bits)")
    axis.set_ylabel("parts right")
    axis.set_xticks([1e6, 2e6, 5e6, 1e7], ["1", "2", "5", "10"])
    axis.legend(fontsize=8, loc="lower right")
    return figure


# --------------------------------------------------------------------------------------------------
# One image, step by step
# --------------------------------------------------------------------------------------------------


def draw_denoising(args, steps=12):
    """One image step by step: what the model sees and expects, and the bucket of its scales."""
    model, _ = restored(args, "by position, N = 2, 4 bits")
    seen = []

    def look(_, inputs, v):
        x, t, _ = inputs
        seen.append((x, t, DIFFUSION.to_x0(v, x, t)))

    model.register_forward_hook(look)
    words = torch.tensor([toy.caption("sks creature on blue stripes")])
    sample(model, words, steps, cfg_scale=1, packed=True)

    figure, axes = plt.subplots(2, steps, figsize=(steps, 2.4))
    for (x, t, x0), column in zip(seen, axes.T):
        b = int(bucket(t, model.quant_config["edges"]))
        for axis, image in zip(column, (x, x0)):
            axis.imshow(toy.tile(image, 1))
            hide_ticks(axis)
            axis.spines[:].set(color=f"C{b}", linewidth=3)
        column[0].set_title(f"t = {int(t)}\nbucket {b}", fontsize=8)
    axes[0, 0].set_ylabel("x_t", fontsize=8)
    axes[1, 0].set_ylabel("its x0", fontsize=8)
    return figure


# --------------------------------------------------------------------------------------------------
# Scores against steps, strength and the start of sampling, from the log
# --------------------------------------------------------------------------------------------------


def mean_of(runs, key):
    """The mean of a score over runs."""
    return sum(run[key] for run in runs) / len(runs)


def draw_steps(args):
    """Whole subjects, drift and the loss on the world against steps, a line for each method."""
    scores = {
        "identity": "whole subject",
        "red parts": "in other creatures",
        "known loss": "loss on the world",
    }
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for method, row in claims.METHODS_BY_STEPS.items():
        lines = {}  # the runs after each number of steps
        for steps in claims.STEPS_TRIED:
            runs = runs_of(args, claims.with_steps(row, steps).name, toy.TUNING)
            if runs:
                lines[steps] = list(runs.values())
        for axis, key in zip(axes, scores):
            means = [mean_of(runs, key) for runs in lines.values()]
            axis.plot(list(lines), means, "o-", label=method.replace(", 500 steps", ""))
    for axis, label in zip(axes, scores.values()):
        axis.set_xscale("log")
        axis.set_xticks(claims.STEPS_TRIED, claims.STEPS_TRIED)
        axis.minorticks_off()
        axis.set_xlabel("steps")
        axis.set_ylabel(label)
    axes[0].legend(fontsize=7)
    return figure


def draw_strength(args):
    """What an adapter does at several strengths: scores, and images of one subject."""
    scores = {"parts": "parts right", "identity": "whole subject", "red parts": "in others"}
    row = ROWS[claims.POSITION]
    figure, (above, below) = plt.subplots(2, 1, figsize=(7, 7), layout="constrained")
    for key, label in scores.items():
        means = []
        for strength in claims.STRENGTHS:
            runs = runs_of(args, f"{row.name}, times {strength}", toy.TABLE).values()
            means.append(mean_of(list(runs), key))
        above.plot(claims.STRENGTHS, means, "o-", label=label)
    above.set_xlabel("strength")
    above.legend(fontsize=8)

    model, run = restored(args, claims.POSITION)
    saved = adapter(model)
    columns = []
    for strength in claims.STRENGTHS:
        load_adapter(model, saved, strength=strength)
        images, _ = train.evaluate(model, None, run)  # without scores
        columns.append(images[:: train.IMAGES_PER_PROMPT][:4])
    strips = torch.stack(columns, dim=1).flatten(0, 1)  # a row for each prompt
    grid = toy.tile(strips, len(columns))
    below.imshow(grid)
    hide_ticks(below)
    centers = [(i + 0.5) * grid.width / len(columns) for i in range(len(columns))]
    below.set_xticks(centers, [f"x {strength}" for strength in claims.STRENGTHS])
    below.tick_params(length=0)
    return figure


def draw_start(args):
    """Whole creatures against where sampling starts, a line for each number of steps."""
    runs = neighbours.done(args, "start", "all timesteps")
    figure, axis = plt.subplots(figsize=(8, 4.5))
    for steps, color in zip(neighbours.STEPS_OF_START, ("C0", "C1", "C2", "C3")):
        for kind, line in zip(neighbours.STARTS, (":", "--", "-")):
            means = [mean_of(runs, f"{kind}, {tau}, {steps}") for tau in neighbours.TAUS]
            label = f"{steps} steps from {kind}"
            axis.plot(neighbours.TAUS, means, line, color=color, label=label)
    axis.set_xlabel("tau: sampling starts at t = tau T")
    axis.set_ylabel("whole creatures")
    axis.legend(fontsize=6)
    return figure


FIGURES = {
    "samples": draw_samples,
    "weights": draw_weights,
    "losses": draw_losses,
    "bytes": draw_bytes,
    "denoising": draw_denoising,
    "steps": draw_steps,
    "strength": draw_strength,
    "start": draw_start,
}


def main():
    args = parse_with_log(Parser(__doc__.split("\n")[0]), FIGURES)
    folder = Path(__file__).resolve().parent / "figures"
    if args.quick:
        folder = Path("out") / args.log.stem
    folder.mkdir(parents=True, exist_ok=True)
    for name in args.names:
        draw = FIGURES[name]
        path = folder / f"{name}.png"
        figure = draw(args)
        figure.savefig(path, dpi=80, bbox_inches="tight")
        plt.close(figure)
        print(f"wrote {path}: {draw.__doc__}")


if __name__ == "__main__":
    guard(main)

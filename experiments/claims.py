"""More tables for tables.py: claims of the paper where they can show, and uses of trained deltas.

The paper's claims need a set of training scenes that is small enough to overfit, a base that has
not converged, scales that act at some timesteps only, and scores against steps. Deltas stand in an
exponent, so adapters can be added and scaled, and one can start from another.

Some tables are of subjects (runs.py). Others are of recovery (recovery.py), which tunes scales on
scenes of the world to win back what quantization lost. A table of subjects has jobs, which make the
runs of its rows, and pairs of rows, whose differences it shows.
"""

from dataclasses import replace
from functools import partial

import torch

from data import toy
from quant import adapter, deltas, load_adapter
from recovery import ONE_SET, STEPS, Recovery, prepare, recover_all, recovered
from report import (
    append,
    by_seed,
    is_due,
    mean_sd,
    show,
)
from runs import (
    RATES,
    SHORT,
    Row,
    by_name,
    fill,
    fill_by,
    fine_tuned,
    scores_of,
    tune,
    validation_loss,
)

POSITION = "by position, N = 1, 4 bits"
PAIRS = ["bix+fen", "gil+luz", "ori+tam"]  # subjects that are tuned at once, or added


def named(row, name, flags=""):
    """A row like this one, with another name and more flags of train.py."""
    return replace(row, name=name, flags=f"{row.flags} {flags}")


# --------------------------------------------------------------------------------------------------
# Claims about scale sets and bits: recovery
# --------------------------------------------------------------------------------------------------

SCALE_SETS = ["PEQA", *[f"TuneQDM, N = {n}" for n in (1, 2, 4, 8)]]


def overfitting(args):
    """Do four scale sets overfit, and two not? Recovery on a fixed set of scenes."""
    settings = []
    for steps in (STEPS, 10 * STEPS):
        for scenes in (256, 1024):
            for method in SCALE_SETS:
                settings.append(Recovery(4, "rowcol", method, steps, scenes))
    recover_all(args, settings)
    rows = []
    for setting in settings:
        runs = by_seed(args, recovery=setting.name)
        if runs:
            one_set = by_seed(args, recovery=replace(setting, method=ONE_SET).name)
            cells = [str(setting.scenes), str(setting.steps), setting.method]
            for key in ("on its scenes", "after"):
                cells.append(mean_sd([run[key] for run in runs.values()], 5))
            cells.append(difference(runs, one_set))
            rows.append([*cells, str(len(runs))])
    columns = ["scenes", "steps", "method", "loss on them", "validation loss", f"minus {ONE_SET}"]
    show(args, "a fixed set of scenes", [*columns, "runs"], rows)


def difference(runs, others):
    """The cell of the difference of two settings' losses after tuning, seed by seed."""
    both = [seed for seed in runs if seed in others]
    if runs == others or not both:
        return ""
    return mean_sd([runs[seed]["after"] - others[seed]["after"] for seed in both], 5)


def young_base(args):
    """Is a tuned 8-bit model better than its float original, if that has not converged?"""
    settings = []
    for steps in (STEPS, 10 * STEPS):
        settings.append(Recovery(32, "full precision", steps=steps, young=True))
        for method in (ONE_SET, "TuneQDM, N = 2", "by position, N = 1", "LoRA r = 2, packed base"):
            settings.append(Recovery(8, "rowcol", method, steps, young=True))
    recover_all(args, settings)
    rows = []
    for setting in settings:
        runs = by_seed(args, recovery=setting.name)
        full = replace(setting, bits=32, calibration="full precision", method=ONE_SET)
        floats = by_seed(args, recovery=full.name)
        if runs and floats:
            method = "full precision" if setting.bits == 32 else f"{setting.method}, 8 bits"
            cells = [method, str(setting.steps)]
            for key in ("before", "after"):
                cells.append(mean_sd([run[key] for run in runs.values()], 5))
            of_base = next(iter(floats.values()))["before"]
            cells.append(mean_sd([run["after"] - of_base for run in runs.values()], 5))
            rows.append([*cells, difference(runs, floats), str(len(runs))])
    columns = ["method", "steps", "before", "tuned", "minus the float base"]
    show(args, "a young base", [*columns, "minus full precision, tuned", "runs"], rows)


# --------------------------------------------------------------------------------------------------
# Scales at some timesteps only
# --------------------------------------------------------------------------------------------------

KEPT = {  # which of three scale sets are kept after tuning; the others are the base's
    "no timesteps": (),
    "low t": (0,),
    "middle t": (1,),
    "high t": (2,),
    "low and middle t": (0, 1),
    "middle and high t": (1, 2),
    "all timesteps": (0, 1, 2),
}
RECOVERY_OF_THIRDS = Recovery(4, "rowcol", "by position, N = 3")
THREE_SETS = named(SHORT[POSITION], "by position, N = 3, 4 bits, 500 steps", "--buckets 3")


def thirds(args):
    """Which third of the timesteps makes the subject?

    The sets of a run don't influence each other: a sample's loss depends on its own bucket alone.
    So one run with three sets says what each of them would do if it were trained alone.
    """
    jobs = {}
    for name, kept in KEPT.items():
        jobs[name] = (f"{THREE_SETS.name}, {name}", partial(tune_and_keep, args, kept))
    fill_by(args, "thirds of the timesteps", jobs, toy.TABLE)
    thirds_of_recovery(args)


def tune_and_keep(args, kept, subject, seed):
    """Fine-tune with three scale sets and keep some: what the log says of it."""
    model, run, folders = fine_tuned(args, THREE_SETS, subject, seed)
    keep_buckets(model, kept)
    found = scores_of(model, run, folders)
    return {**found, "trained": found["trained"] * len(kept) // 3}


def thirds_of_recovery(args):
    """The same question for the whole world: how much of the loss does each third recover?"""
    rows = []
    for name, kept in KEPT.items():
        if len(kept) == 2:
            continue  # what two sets gain is the sum of what each gains
        log_name = f"{RECOVERY_OF_THIRDS.name}, {name}"
        for seed in range(args.seeds):
            key = {"recovery": log_name, "seed": seed}
            if is_due(args, log_name, key):
                model, _ = prepare(RECOVERY_OF_THIRDS, seed)
                load_adapter(model, recovered(args, RECOVERY_OF_THIRDS, seed))
                keep_buckets(model, kept)
                append(args.log, key, {"after": validation_loss(model)})
        runs = by_seed(args, recovery=log_name).values()
        if runs:
            rows.append([name, mean_sd([run["after"] for run in runs], 5), str(len(runs))])
    columns = ["tuned scales at", "validation loss", "runs"]
    show(args, "thirds of the timesteps, recovery", columns, rows)


@torch.no_grad()
def keep_buckets(model, kept):
    """Set the deltas of all other buckets to zero."""
    for name, delta in deltas(model).items():
        if int(name.rsplit("_", 1)[1]) not in kept:
            delta.zero_()


# --------------------------------------------------------------------------------------------------
# Scores against steps
# --------------------------------------------------------------------------------------------------

METHODS_BY_STEPS = {  # rows of 500 steps; full precision at three learning rates
    **{name: row for name, row in RATES.items() if row.bits == 32},
    **{name: SHORT[name] for name in ("paper's columns, N = 1, 4 bits", POSITION)},
    "LoRA r = 2, 4 bits": SHORT["LoRA r = 2, 4 bits"],
}
STEPS_TRIED = (100, 200, 500, 1000, 2000)


def with_steps(row: Row, steps: int) -> Row:
    """A row of 500 steps with another number of steps."""
    return named(row, row.name.replace("500 steps", f"{steps} steps"), f"--steps {steps}")


def by_steps(args):
    """Which method needs fewer steps, which forgets more of the world on the way?"""
    rows = [with_steps(row, steps) for row in METHODS_BY_STEPS.values() for steps in STEPS_TRIED]
    fill(args, "scores against steps", by_name(rows), toy.TUNING)


# --------------------------------------------------------------------------------------------------
# Several subjects, and adapters that add
# --------------------------------------------------------------------------------------------------

SECOND = named(SHORT[POSITION], f"{POSITION}, zwx, 500 steps", "--word zwx")
TOGETHER = {}  # rows of two subjects in one run, with and without images of both
for method in ("full precision", POSITION, "by position, N = 2, 4 bits"):
    TOGETHER[method] = named(SHORT[method], f"{method}, together, 1000 steps", "--steps 1000")
    TOGETHER[f"{method}, side by side"] = replace(
        TOGETHER[method],
        name=f"{method}, side by side, together, 1000 steps",
        side_by_side=True,
    )


def adding(args):
    """Two subjects: together, together with images of both, and apart, their adapters added."""
    pairs = []
    for method in ("full precision", POSITION, "by position, N = 2, 4 bits"):
        pairs.append((f"{method}, side by side", method))
    for name in (POSITION, f"{POSITION}, side by side"):
        pairs.append((name, "full precision"))
    pairs += [("apart and added", POSITION), ("apart and added, times 0.8", "apart and added")]

    jobs = {name: (row.name, partial(tune, args, row)) for name, row in TOGETHER.items()}
    for name, strength in (("apart and added", 1), ("apart and added, times 0.8", 0.8)):
        jobs[name] = (f"{POSITION}, {name}, 500 steps each", partial(add, args, strength))
    fill_by(args, "two subjects, together and added", jobs, PAIRS, pairs)


def add(args, strength, subjects, seed):
    """Tune to two subjects apart, each with a word of its own, and add: what the log says of it.

    The second has another seed: with the same class images both would drift alike, and that would
    add up. strength: what the sum of the deltas is multiplied by.
    """
    first, second = subjects.split("+")
    model, run, folders = fine_tuned(args, SHORT[POSITION], first, seed)
    other, _, folders_of_other = fine_tuned(args, SECOND, second, seed + 100)
    load_adapter(model, adapter(model), adapter(other), strength=strength)
    found = scores_of(model, run, {**folders, **folders_of_other})
    return {**found, "trained": 2 * found["trained"], "bytes": 2 * found["bytes"]}


RECOVERY = Recovery(4, "rowcol", "by position, N = 1", rare=0)


def on_recovery(args):
    """A subject on top of a recovered base: does it start better, forget less?"""
    row = SHORT[POSITION]
    on_top = replace(row, name=f"{POSITION}, recovered first, 500 steps")

    def tune_on_top(subject, seed):
        return tune(args, on_top, subject, seed, start=recovered(args, RECOVERY, seed))

    def add_recovery(subject, seed):
        model, run, folders = fine_tuned(args, row, subject, seed)
        load_adapter(model, adapter(model), recovered(args, RECOVERY, seed))
        return scores_of(model, run, folders)

    jobs = {
        POSITION: (row.name, partial(tune, args, row)),
        "recovered first": (on_top.name, tune_on_top),
        "recovery added": (f"{POSITION}, recovery added, 500 steps", add_recovery),
    }
    pairs = [(name, POSITION) for name in ("recovered first", "recovery added")]
    fill_by(args, "a subject and a recovered base", jobs, toy.TABLE, pairs)


STRENGTHS = (0, 0.25, 0.5, 0.75, 1, 1.25, 1.5)


def strengths(args):
    """An adapter times 0 to 1.5: what is learned, and what drifts."""
    row = SHORT[POSITION]

    def scale(strength, subject, seed):
        model, run, folders = fine_tuned(args, row, subject, seed)
        load_adapter(model, adapter(model), strength=strength)
        return scores_of(model, run, folders)

    jobs = {}
    for strength in STRENGTHS:
        name = f"times {strength}"
        jobs[name] = (f"{row.name}, {name}", partial(scale, strength))
    fill_by(args, "strength", jobs, toy.TABLE)


TABLES = {
    "overfitting": overfitting,
    "young": young_base,
    "thirds": thirds,
    "steps": by_steps,
    "adding": adding,
    "recovered": on_recovery,
    "strength": strengths,
}

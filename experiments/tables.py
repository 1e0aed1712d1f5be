"""Make the tables of README.md and RESULTS.md: python experiments/tables.py [TABLE ...]

A finished run is a line of the log and isn't done again. So a command can be stopped and started
again, and several processes can share the work (--rows, --subjects).

    --log experiments/runs.jsonl --rows none    show the runs that ship; no row is called none
    --write                                     put each table where a document has its mark
"""

import sys
from dataclasses import replace
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import activations
import claims
from data import toy
from pretrain import score_base
from quant import quantize
from recovery import (
    ONE_SET,
    STEPS,
    THIRDS,
    calibrate_on,
    recover_all,
    settings_of_calibrations,
    settings_of_scale_sets,
    settings_of_thirds,
)
from report import (
    SHOWN,
    append,
    by_seed,
    is_asked_for,
    is_due,
    lines,
    make_tables,
    mean_sd,
    runs_of,
    show,
)
from runs import (
    ABLATIONS,
    DEFAULT,
    GPTQ_SETTINGS,
    ONE_SUBJECT,
    POSITION_SETTINGS,
    RATES,
    SEVERAL,
    SHORT,
    WIDTHS,
    fill,
    validation_loss,
)
from sample import BASE, load_model
from support.flags import guard

PAIRS = [  # what is compared in the README's table: the second is subtracted from the first
    ("by position, N = 1, 4 bits", "full precision"),
    ("by position, N = 1, 4 bits", "LoRA r = 1, 4 bits"),
    ("by position, N = 1, 4 bits", "LoRA r = 2, 4 bits"),
    ("by position, N = 1, 4 bits", "paper's columns, N = 1, 4 bits"),
    ("by position, N = 1, 4 bits", "PEQA, 4 bits"),
    ("by position, N = 2, 4 bits", "by position, N = 1, 4 bits"),
    ("paper's columns, N = 1, 4 bits", "PEQA, 4 bits"),
    ("paper's columns, N = 2, 4 bits", "paper's columns, N = 1, 4 bits"),
    ("LoRA r = 1, 4 bits", "full precision"),
    ("LoRA r = 2, 4 bits", "full precision"),
    ("by position, N = 1, 2 bits", "by position, N = 1, 4 bits"),
    ("by position, N = 1, 2 bits", "LoRA r = 2, 2 bits"),
]
TOGETHER = {  # subjects that are tuned at once, by how many they are
    2: ["bix+fen", "gil+luz", "ori+tam"],
    3: ["bix+fen+gil", "luz+ori+tam"],
}

# --------------------------------------------------------------------------------------------------


def base(args):
    """Which shares of what the shipped base draws are right. They are printed, and not logged."""
    if is_asked_for(args, "the base"):
        score_base(load_model(BASE), seed=0)


def defaults(args):
    """Fine-tune to one subject as train.py does by default: the README's table."""
    fill(args, "one subject, in short", SHORT, toy.TABLE, PAIRS)


def rates(args):
    """Choose the rates of full precision and LoRA, on subjects that no other table reports."""
    fill(args, "rates", RATES, toy.TUNING)


def one_subject(args):
    """Fine-tune to one subject for 1,000 steps: every method at every width."""
    pairs = []
    for yardstick, row in combinations(ONE_SUBJECT.values(), 2):
        if row.trains and is_yardstick(yardstick, row):
            pairs.append((row.name, yardstick.name))
    fill(args, "one subject", ONE_SUBJECT, toy.TABLE, pairs)


def is_yardstick(yardstick, row):
    """True if row, of the table of one subject, is compared with yardstick, which comes before it.

    The yardsticks are full precision, PEQA and N = 1 of the same width, and the same method at 4
    bits.
    """
    if yardstick.name == "full precision":
        return True
    if yardstick.bits == row.bits and yardstick.method in ("PEQA", "TuneQDM, N = 1"):
        return True
    return yardstick.bits == 4 and yardstick.method == row.method


def several_subjects(args):
    """Fine-tune to two and to three subjects at once."""
    pairs = [(row, yardstick) for yardstick, row in combinations(SEVERAL, 2)]
    for n, subjects in TOGETHER.items():
        fill(args, f"{n} subjects", SEVERAL, subjects, pairs)
    show_what_two_show(args)


def show_what_two_show(args):
    """A table of what models of two subjects draw for both in one image, where the log says so."""
    rows = []
    for name in SEVERAL:
        of_pairs = runs_of(args, name, TOGETHER[2]).values()
        runs = [run for run in of_pairs if SHOWN.keys() <= run.keys()]
        if runs:
            cells = [mean_sd([run[key] for run in runs]) for key in SHOWN]
            rows.append([name, *cells, str(len(runs))])
    show(args, "two in one image", ["method", *SHOWN.values(), "runs"], rows)


def ablations(args):
    """Fine-tune with one thing changed; another learning rate may come with it."""
    pairs = []
    for row in ABLATIONS.values():
        if row.name != DEFAULT:
            yardstick = DEFAULT
            if row.edges is not None:
                yardstick = "TuneQDM, N = 4, 4 bits"
            pairs.append((row.name, yardstick))
    fill(args, "one thing changed", ABLATIONS, toy.TABLE, pairs)


def of_activations(args):
    """Round the activations, too: what is left of the base's quality?"""
    settings = {"float": (None, None)}
    for bits in activations.N_BITS:
        for ranges in activations.WAYS:
            settings[f"{bits} bits, {ranges.name}"] = (bits, ranges)
    for seed in range(args.seeds):
        for name, (bits, ranges) in settings.items():
            key = {"activations": name, "seed": seed}
            if is_due(args, name, key):
                n = 50 // args.steps_divisor  # images
                append(args.log, key, activations.measure(bits, ranges, seed, n))
    show_activations(args, list(settings))


def show_activations(args, names):
    """A table of the loss, and of what is right in the images, for each way to round."""
    rows = []
    for name in names:
        runs = by_seed(args, activations=name).values()
        if runs:
            cells = [mean_sd([run["loss"] for run in runs], 4)]
            for key in ("plain", "creatures"):
                cells.append(mean_sd([run[key] for run in runs]))
            rows.append([name, *cells, str(len(runs))])
    columns = ["activations", "validation loss", "plain images right", "creatures whole", "runs"]
    show(args, "activations", columns, rows)


def columns(args):
    """Columns by position: the loss before tuning, then settings, on the tuning subjects."""
    for bits in sorted(WIDTHS, reverse=True):
        for kind in ("channel", "position"):
            key = {"untuned": f"{bits} bits, {kind}"}
            if is_due(args, key["untuned"], key):
                model = quantize(load_model(BASE), bits, columns=kind)
                append(args.log, key, {"loss": validation_loss(model)})
    show_untuned(args)
    pairs = [(row, "position") for row in POSITION_SETTINGS if row != "position"]
    fill(args, "columns", POSITION_SETTINGS, toy.TUNING, pairs)


def show_untuned(args):
    """A table of the validation loss of the quantized base, for each width and kind of columns."""
    rows = []
    for bits in sorted(WIDTHS, reverse=True):
        runs = [lines(args.log, untuned=f"{bits} bits, {kind}") for kind in ("channel", "position")]
        if all(runs):
            rows.append([str(bits), *[f"{run[-1]['loss']:.5f}" for run in runs]])
    show(args, "columns, untuned", ["bits", "channel", "position"], rows)


def tuning(args):
    """Choose the settings that go with gptq, on subjects that no other table reports."""
    pairs = [(row, "rowcol") for row in GPTQ_SETTINGS if row != "rowcol"]
    fill(args, "tuning", GPTQ_SETTINGS, toy.TUNING, pairs)


def recovery(args):
    """Tune scales on the pretraining set: how much of the quantization gap do they recover?"""
    calibrations = settings_of_calibrations()
    scale_sets = settings_of_scale_sets()
    recover_all(args, calibrations + scale_sets)
    show_calibrations(args, calibrations)
    run_thirds(args)
    show_thirds(args)
    show_scale_sets(args, scale_sets)
    show_scale_sets_in_short(args, scale_sets)


def run_thirds(args):
    """Calibrate by gptq with data of some timesteps only, if the log doesn't have it."""
    for seed in range(args.seeds):
        for name, (third, bits) in settings_of_thirds().items():
            key = {"data": name, "seed": seed}
            if is_due(args, name, key):
                append(args.log, key, calibrate_on(third, bits, seed))


def show_thirds(args):
    """A table of the loss at some timesteps if gptq's data are from others."""
    rows = []
    for name, (third, bits) in settings_of_thirds().items():
        runs = by_seed(args, data=name).values()
        if runs:
            means = [mean_sd([run[key] for run in runs], 5) for key in THIRDS]
            rows.append([str(bits), third, *means, str(len(runs))])
    columns = ["bits", "timesteps of the data", *[f"loss at {key}" for key in THIRDS], "runs"]
    show(args, "timesteps of the data", columns, rows)


def recoveries_of(args, setting):
    """The lines of a setting in the log, by seed."""
    return by_seed(args, recovery=setting.name)


def show_calibrations(args, settings):
    """A table of the loss before and after tuning, for each width and calibration."""
    rows = []
    floor = None  # the loss of the float base
    for setting in settings:
        runs = list(recoveries_of(args, setting).values())
        if not runs:
            continue
        before = [run["before"] for run in runs]
        after = [run["after"] for run in runs]
        share = ""
        if setting.bits == 32:
            floor = before[0]
        elif floor is not None:
            gap = sum(before) / len(before) - floor
            share = f"{1 - (sum(after) / len(after) - floor) / gap:.0%}"
        cells = [str(setting.bits), setting.calibration, untuned_loss(runs)]
        rows.append([*cells, mean_sd(after, 5), share, str(len(runs))])
    columns = ["bits", "calibration", "quantized", "tuned", "recovered", "runs"]
    show(args, "validation loss", columns, rows)


def untuned_loss(runs):
    """The cell of the loss before tuning. It has a ± only if seeds matter, as they do for gptq."""
    before = [run["before"] for run in runs]
    if len(set(before)) == 1:
        before = before[:1]
    return mean_sd(before, 5)


def show_scale_sets(args, settings):
    """A table of the loss by what is trained, and its difference from N = 1, seed by seed."""
    rows = []
    for setting in settings:
        runs = recoveries_of(args, setting)
        if not runs:
            continue
        one_set = recoveries_of(args, replace(setting, method=ONE_SET))
        after = [run["after"] for run in runs.values()]
        both = [seed for seed in runs if seed in one_set]
        difference = ""
        if both and setting.method != ONE_SET:
            difference = mean_sd([runs[s]["after"] - one_set[s]["after"] for s in both], 5)
        cells = [setting.start, str(setting.steps), setting.method, untuned_loss(runs.values())]
        rows.append([*cells, mean_sd(after, 5), difference, str(len(runs))])
    columns = ["start", "steps", "method", "untuned", "tuned", f"minus {ONE_SET}", "runs"]
    show(args, "scale sets", columns, rows)


def show_scale_sets_in_short(args, settings):
    """A table of the loss after STEPS steps: a row for each method, a column for each start."""
    starts = []
    losses = {}  # the loss of each method, and of each kind of columns untuned, by start
    for setting in settings:
        runs = list(recoveries_of(args, setting).values())
        if setting.steps == STEPS and runs:
            if setting.start not in starts:
                starts.append(setting.start)
            by_position = setting.method.startswith("by position")
            kind = "untuned, by position" if by_position else "untuned"
            losses.setdefault(kind, {}).setdefault(setting.start, untuned_loss(runs))
            of_method = losses.setdefault(setting.method, {})
            of_method[setting.start] = mean_sd([run["after"] for run in runs], 5)
    rows = []
    for method, by_start in losses.items():
        rows.append([method, *[by_start.get(start, "") for start in starts]])
    show(args, "scale sets, in short", ["method", *starts], rows)


TABLES = {
    "base": base,
    "defaults": defaults,
    "rates": rates,
    "subjects": one_subject,
    "several": several_subjects,
    "recovery": recovery,
    "ablations": ablations,
    "activations": of_activations,
    "tuning": tuning,
    "columns": columns,
    **claims.TABLES,
}


def main():
    make_tables(__doc__, TABLES, toy.TABLE + toy.TUNING)


if __name__ == "__main__":
    guard(main)

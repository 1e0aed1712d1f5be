"""The tables: python experiments/tables.py [base] [subjects] [several] [recovery] [ablations]

A finished run is a line of the log and isn't done again. So a command can be stopped and started
again, and several processes can share the work (--rows, --subjects).

    --log experiments/runs.jsonl --rows none    run nothing, and show the runs that ship
    --write                                     put the tables into README.md and RESULTS.md, too
"""

import sys
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from tqdm import tqdm

from calibrate import CALIBRATIONS
from data import toy
from pretrain import score_base
from quant import quantize
from report import mean_sd, print_table, write_table
from runs import (
    ABLATIONS,
    DIFFUSION,
    MINE,
    SCORES,
    SEVERAL,
    SUBJECTS,
    WIDTHS,
    append,
    is_due,
    lines,
    losses,
    parse_with_log,
    squared_error,
    tune,
)
from runtime import BASE, Parser, guard, load_model

IN_SHORT = [  # the README's rows
    "the base",
    "full precision",
    "untuned, 4 bits",
    "PEQA, 4 bits",
    MINE,
    "TuneQDM, N = 2, 4 bits",
    "LoRA r = 2, packed base, 4 bits",
    "TuneQDM, N = 1, 2 bits",
]
TOGETHER = {  # subjects that are tuned at once, by their number
    2: ["bix+fen", "gil+luz", "ori+tam"],
    3: ["bix+fen+gil", "luz+ori+tam"],
}

# --------------------------------------------------------------------------------------------------
# Any table of runs
# --------------------------------------------------------------------------------------------------


def fill(args, title, rows, subjects, pairs):
    """Do what isn't done yet, then show the means of rows and the differences of pairs of rows.

    rows: {name: Row}. subjects: what to tune to, such as "bix" or "bix+fen". pairs: names of rows,
    the second of which is subtracted from the first.
    """
    run_all(args, rows, subjects)
    found = {name: runs_of(args, name, subjects) for name in rows}
    show_means(args, title, found)
    show_differences(args, f"{title}: differences", found, pairs)


def run_all(args, rows, subjects):
    """Tune to each subject with each row and seed, if the log doesn't have it."""
    for seed in range(args.seeds):
        for row in rows.values():
            for subject in subjects:
                key = {"row": row.name, "subject": subject, "seed": seed}
                asked_for = set(subject.split("+")) <= set(args.subjects)
                if asked_for and is_due(args, row.name, key):
                    append(args.log, key, tune(args, row, subject, seed))


def runs_of(args, name, subjects):
    """The runs of a row in the log, by subject and seed."""
    found = {}
    for run in lines(args.log, row=name):
        if run["subject"] in subjects:
            found[run["subject"], run["seed"]] = run
    return found


def score_columns(found):
    """The scores that all runs have, in the order of SCORES. found: {row: its runs}."""
    all_runs = []
    for runs in found.values():
        all_runs.extend(runs.values())
    columns = []
    for key in SCORES:
        if all(key in run for run in all_runs):
            columns.append(key)
    return columns


def show_means(args, title, found):
    """A table of each row's mean ± standard deviation over subjects and seeds."""
    columns = score_columns(found)
    rows = []
    for name, runs in found.items():
        if runs:
            rows.append(row_of_means(name, list(runs.values()), columns))
    headings = [SCORES[key] for key in columns]
    show(args, title, ["method", "trained", "adapter bytes", *headings, "runs"], rows)


def row_of_means(name, runs, columns):
    """The cells of a row. What is trained, and its bytes, are the same in all runs."""
    cells = [name, f"{runs[0]['trained']:,}", f"{runs[0]['bytes']:,}"]
    for key in columns:
        cells.append(mean_sd([run[key] for run in runs]))
    cells.append(str(len(runs)))
    return cells


def show_differences(args, title, found, pairs):
    """A table of the differences of pairs of rows, subject by subject and seed by seed."""
    columns = score_columns(found)
    rows = []
    for name, yardstick in pairs:
        both = []  # runs of one subject and seed
        for key, run in found[name].items():
            if key in found[yardstick]:
                both.append((run, found[yardstick][key]))
        if both:
            rows.append(row_of_differences(name, yardstick, both, columns))
    headings = [SCORES[key] for key in columns]
    show(args, title, ["method", "minus", *headings, "pairs"], rows)


def row_of_differences(name, yardstick, both, columns):
    """The cells of a row of differences. both: a list of two runs each."""
    cells = [name, yardstick]
    for key in columns:
        cells.append(mean_sd([mine[key] - other[key] for mine, other in both]))
    cells.append(str(len(both)))
    return cells


def show(args, title, columns, rows):
    """Print a table; with --write put it into the documents, too, unless it is empty."""
    table = print_table(title, columns, rows)
    if args.write and rows:
        write_table(title, table)


# --------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------


def base(args):
    """What the shipped base draws, and how much of it is right."""
    score_base(load_model(BASE), seed=0)


def one_subject(args):
    """Fine-tune to one subject."""
    pairs = []
    for yardstick, row in combinations(SUBJECTS.values(), 2):
        if row.trains and is_yardstick(yardstick, row):
            pairs.append((row.name, yardstick.name))
    fill(args, "one subject", SUBJECTS, toy.TABLE, pairs)
    in_short = {name: runs_of(args, name, toy.TABLE) for name in IN_SHORT}
    show_means(args, "one subject, in short", in_short)


def is_yardstick(yardstick, row):
    """True if a row of the table of one subject is compared with this one."""
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


def ablations(args):
    """Fine-tune with one thing changed."""
    pairs = []
    for row in ABLATIONS.values():
        if row.name != MINE:
            pairs.append((row.name, "TuneQDM, N = 4, 4 bits" if row.log_snr_edges else MINE))
    fill(args, "one thing changed", ABLATIONS, toy.TABLE, pairs)


def recovery(args):
    """Tune scales on the pretraining set: how much of the quantization gap do they recover?"""
    settings = [(32, "full precision")]
    for bits in sorted(WIDTHS, reverse=True):
        for calibration in CALIBRATIONS:
            settings.append((bits, calibration))

    for seed in range(args.seeds):
        for bits, calibration in settings:
            name = f"{bits} bits, {calibration}"
            key = {"recovery": name, "seed": seed}
            if is_due(args, name, key):
                append(args.log, key, recover(bits, calibration, 300 // args.less, seed))

    rows = []
    floor = None  # the loss of the float base
    for bits, calibration in settings:
        runs = lines(args.log, recovery=f"{bits} bits, {calibration}")
        if not runs:
            continue
        before = runs[0]["before"]
        after = [run["after"] for run in runs]
        share = ""
        if bits == 32:
            floor = before
        elif floor is not None:
            share = f"{(before - sum(after) / len(after)) / (before - floor):.0%}"
        cells = [str(bits), calibration, f"{before:.5f}", mean_sd(after, 5), share, str(len(runs))]
        rows.append(cells)
    columns = ["bits", "calibration", "quantized", "tuned", "recovered", "runs"]
    show(args, "validation loss", columns, rows)


def recover(bits, calibration, steps, seed, lr=0.003):
    """Quantize the base and tune its scales on the pretraining set: validation loss before, after.

    At 32 bits all weights of the base are tuned, at a tenth of the rate.
    """
    model = load_model(BASE)
    if bits == 32:
        lr = lr / 10
    else:
        quantize(model, bits, calibration=calibration)
    before = validation_loss(model)

    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step in tqdm(range(steps), f"{bits} bits, {calibration}"):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x0, words = toy.sample_scenes(64, generator)
        t = DIFFUSION.draw_timesteps(64, generator)
        eps = torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        squared_error(model, x0, words, t, eps).mean().backward()
        optimizer.step()
    return {"before": before, "after": validation_loss(model)}


def validation_loss(model, n=1024, seed=12345):
    """Mean squared error of v on n fixed scenes, timesteps and noises."""
    generator = torch.Generator().manual_seed(seed)
    x0, words = toy.sample_scenes(n, generator)
    t = DIFFUSION.draw_timesteps(n, generator)
    return losses(model, x0, words, t, generator).mean().item()


TABLES = {
    "base": base,
    "subjects": one_subject,
    "several": several_subjects,
    "recovery": recovery,
    "ablations": ablations,
}


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("tables", nargs="*", choices=TABLES, help="default: all, in this order")
    subjects_help = "those to run now (default: all six)"
    parser.add_argument("--subjects", nargs="+", choices=toy.TABLE, help=subjects_help)
    rows_help = "patterns of the rows to run now (default: all)"
    parser.add_argument("--rows", nargs="+", default=["*"], help=rows_help)
    parser.number("--seeds", int, 1, 1000, 1, "runs of each subject with each method")
    write_help = "put the tables into README.md and experiments/RESULTS.md, too"
    parser.add_argument("--write", action="store_true", help=write_help)
    args = parse_with_log(parser)
    if args.quick and args.write:
        parser.error("--quick makes numbers that mean nothing; leave out --write")
    if args.subjects is None:
        args.subjects = toy.TABLE[:2] if args.quick else toy.TABLE
    for name in args.tables or TABLES:
        TABLES[name](args)


if __name__ == "__main__":
    guard(main)

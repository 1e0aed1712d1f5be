"""What the experiments leave: a log of finished runs, and tables in Markdown.

Each finished run is a line of the log, a JSON object. Some of its fields are its key: what was run.

    {"row": ..., "subject": ..., "seed": ..., ...}    fine-tuned to a subject (runs.py)
    {"recovery": ..., "seed": ..., ...}               tuned on the pretraining set (recovery.py)
    {"data": ..., "seed": ..., ...}                   gptq on data of some timesteps (recovery.py)
    {"activations": ..., "seed": ..., ...}            activations rounded, too (activations.py)
    {"untuned": ..., ...}                             quantized only (tables.py)
    {"neighbour": ..., "name": ..., "seed": ..., ...} a part of neighbours.py and its row
"""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import torch

from support.files import save
from support.flags import Parser, number

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "experiments" / "RESULTS.md"]

# --------------------------------------------------------------------------------------------------
# The log
# --------------------------------------------------------------------------------------------------


def lines(log: Path, **key) -> list[dict]:
    """The lines of the log that have these fields, such as row="the base".

    A last line that was cut because its run was killed doesn't count: that run is done again.
    Raises ValueError for any other line that isn't one of a run.
    """
    if not log.exists():
        return []
    found = []
    whole, _ = whole_lines(log)
    for place, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"{log}, line {place} isn't the line of a run; correct or remove it")
        if key.items() <= line.items():
            found.append(line)
    return found


def by_seed(args, **key) -> dict[int, dict]:
    """The lines of the log with these fields, by seed. The last counts, if one is there twice."""
    return {line["seed"]: line for line in lines(args.log, **key)}


def runs_of(args, name: str, subjects) -> dict[tuple[str, int], dict]:
    """The runs of a row in the log, by subject and seed. The last counts, if one is there twice."""
    found = {}
    for run in lines(args.log, row=name):
        if run["subject"] in subjects:
            found[run["subject"], run["seed"]] = run
    return found


def whole_lines(log: Path) -> tuple[str, bool]:
    """The text of a log up to its last line break, and whether there is more of it."""
    text = log.read_text(errors="replace")
    end = text.rfind("\n") + 1
    return text[:end], end < len(text)


def append(log: Path, key: dict, found: dict):
    """Add a line to the log, in the place of a last one that was cut.

    The log isn't held open during a run, which takes minutes: another process may write to it.
    """
    if log.exists():
        whole, is_cut = whole_lines(log)
        if is_cut:
            save(whole, log)
    with log.open("a") as file:
        file.write(json.dumps({**key, **found}) + "\n")


def is_asked_for(args, name):
    """True if a pattern of --rows fits the name of a row."""
    return any(fnmatch(name, pattern) for pattern in args.rows)


def is_due(args, name, key):
    """True if --rows asks for the row of this name and the log has no line with this key."""
    return is_asked_for(args, name) and not lines(args.log, **key)


def parse_with_log(parser, names):
    """Add what to make, --log and --quick to a parser, parse, and fill in what follows.

    names: of the tables or figures there are.
    """
    names_help = f"{', '.join(names)} (default: all, in this order)"
    parser.add_argument("names", nargs="*", metavar="NAME", help=names_help)
    log_help = "the file of finished runs (default: out/runs.jsonl, or out/quick.jsonl)"
    parser.add_argument("--log", type=Path, help=log_help)
    quick_help = "a twentieth of the steps and of some images, few subjects, a log of its own"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    args = parser.parse_args()
    for name in args.names:  # choices would refuse to be given none
        if name not in names:
            parser.error(f"there is no {name!r}; choose from {', '.join(names)}")
    if args.quick and args.log:
        parser.error(
            "--quick makes numbers that mean nothing, for a log of its own; leave out --log"
        )
    args.names = args.names or list(names)
    args.steps_divisor = 20 if args.quick else 1  # what steps are divided by
    if args.log is None:
        args.log = Path("out", "quick.jsonl" if args.quick else "runs.jsonl")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    return args


def make_tables(doc, tables, subjects):
    """The whole of a script that makes tables: flags, then each table that is named.

    doc: the script's docstring. tables: {name: a function of the flags}. subjects: that there are;
    --quick takes the first and the last two.
    """
    parser = Parser(doc.split("\n")[0])
    subjects_help = "those to run now (default: all)"
    parser.add_argument("--subjects", nargs="+", choices=subjects, help=subjects_help)
    rows_help = "patterns of the rows to run now"
    parser.add_argument("--rows", nargs="+", default=["*"], help=rows_help)
    seeds_help = "how many seeds to run now, from 0"
    parser.add_argument("--seeds", type=number(1, 1000), default=1, help=seeds_help)
    write_help = "put each table where README.md or experiments/RESULTS.md has its mark, too"
    parser.add_argument("--write", action="store_true", help=write_help)
    args = parse_with_log(parser, tables)
    if args.quick and args.write:
        parser.error("--quick makes numbers that mean nothing; leave out --write")
    if args.subjects is None:
        args.subjects = [subjects[0], *subjects[-2:]] if args.quick else subjects
    for name in args.names:
        tables[name](args)


# --------------------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------------------


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """Print a table under its title. Returns the table alone, in Markdown."""
    rule = ["---"] * len(columns)
    lines = [f"| {' | '.join(cells)} |\n" for cells in (columns, rule, *rows)]
    table = "".join(lines)
    print(f"\n{title}\n\n{table}", end="", flush=True)
    return table


def write_table(title: str, table: str):
    """Put a table into the documents, where it is marked: <!-- title --> stands above the old one.

    A document without the mark stays as it is.
    """
    marker = f"<!-- {title} -->\n"
    old = re.compile(re.escape(marker) + r"(\|.*\n)*")
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        new = old.sub(lambda _: marker + table, text)  # a string's backslashes would be escapes
        if new != text:
            save(new, document)


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The cell of several runs: mean ± standard deviation, or the value of one run alone."""
    x = torch.tensor(values)
    mean = f"{x.mean():z.{digits}f}"  # z: no -0.00
    if len(values) == 1:
        return mean
    return f"{mean} ± {x.std(correction=0):.{digits}f}"


def show(args, title, columns, rows):
    """Print a table; with --write put it where a document has its mark, too, unless it is empty."""
    table = print_table(title, columns, rows)
    if args.write and rows:
        write_table(title, table)


# --------------------------------------------------------------------------------------------------
# Tables of runs
# --------------------------------------------------------------------------------------------------

# What a run is scored by: the keys of the log, and the columns that they become.
SCORES = {
    "parts": "parts right",
    "identity": "whole subject",
    "both parts": "parts, two in one image",
    "both identity": "whole, two in one image",
    "prompt": "prompt right",
    "red parts": "in other creatures",
    "world loss": "loss on the world, rare words too",
    "known loss": "loss on the world",  # without rare words, which a subject takes
}
DIGITS = {"world loss": 4, "known loss": 4}  # after the decimal point; 2 for the others

# What two subjects in one image show: shares of the creatures, then numbers of parts.
SHOWN = {
    "shown whole": "whole",
    "shown exchanged": "the other subject",
    "shown mixed": "some parts the other's",
    "shown neither": "wrong parts, none the other's",
    "shown no creature": "no creature",
    "taken": "parts of the other",
    "taken by chance": "by chance",
}


def score_columns(found):
    """The scores that all runs have, in the order of SCORES. found: {row: its runs}."""
    all_runs = []
    for runs in found.values():
        all_runs.extend(runs.values())
    columns = []
    for key in SCORES:
        if all(key in run for run in all_runs):
            columns.append(key)
    if "known loss" in columns:
        columns.remove("world loss")  # nobody needs both
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
    """The cells of a row. What is trained, and its bytes, are those of the first run."""
    cells = [name, f"{runs[0]['trained']:,}", f"{runs[0]['bytes']:,}"]
    for key in columns:
        cells.append(mean_sd([run[key] for run in runs], DIGITS.get(key, 2)))
    cells.append(str(len(runs)))
    return cells


def show_differences(args, title, found, pairs):
    """A table of the differences of pairs of rows, subject by subject and seed by seed."""
    columns = score_columns(found)
    rows = []
    for name, yardstick in pairs:
        both = []  # (run, the yardstick's run) of each subject and seed
        for key, run in found[name].items():
            if key in found[yardstick]:
                both.append((run, found[yardstick][key]))
        if both:
            rows.append(row_of_differences(name, yardstick, both, columns))
    headings = [SCORES[key] for key in columns]
    show(args, title, ["method", "minus", *headings, "pairs"], rows)


def row_of_differences(name, yardstick, both, columns):
    """The cells of a row of differences. both: pairs of runs."""
    cells = [name, yardstick]
    for key in columns:
        differences = [mine[key] - other[key] for mine, other in both]
        cells.append(mean_sd(differences, DIGITS.get(key, 2)))
    cells.append(str(len(both)))
    return cells

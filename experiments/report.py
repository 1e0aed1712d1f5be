"""What the experiments leave: a log of finished runs, and tables in Markdown.

Each finished run is a line of the log, a JSON object. Some of its fields are its key: what was run.

    {"row": ..., "subject": ..., "seed": ..., ...}    fine-tuned to a subject (runs.py)
    {"recovery": ..., "seed": ..., ...}               tuned on the pretraining set (recovery.py)
    {"data": ..., "seed": ..., ...}                   gptq on data of some timesteps (recovery.py)
    {"activations": ..., "seed": ..., ...}            activations rounded, too (activations.py)
    {"untuned": ..., ...}                             quantized only (tables.py)
"""

import json
import re
from pathlib import Path

import torch

from support.files import save

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
    for number, text in enumerate(whole.splitlines(), 1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            raise ValueError(f"{log}, line {number} isn't the line of a run; correct or remove it")
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


def parse_with_log(parser):
    """Add --log and --quick to a parser, parse, and fill in what follows from the two."""
    log_help = "the file of finished runs (default: out/runs.jsonl, or out/quick.jsonl)"
    parser.add_argument("--log", type=Path, help=log_help)
    quick_help = "a twentieth of the steps and of some images, few subjects, a log of its own"
    parser.add_argument("--quick", action="store_true", help=quick_help)
    args = parser.parse_args()
    if args.quick and args.log:
        parser.error(
            "--quick makes numbers that mean nothing, for a log of its own; leave out --log"
        )
    args.steps_divisor = 20 if args.quick else 1  # what steps are divided by
    if args.log is None:
        args.log = Path("out", "quick.jsonl" if args.quick else "runs.jsonl")
    args.log.parent.mkdir(parents=True, exist_ok=True)
    return args


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

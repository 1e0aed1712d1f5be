"""How the experiments show what they measured: tables in Markdown."""

import re
from pathlib import Path

import torch

from runtime import save

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "experiments" / "RESULTS.md"]


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
            save(new, document, write_text)


def write_text(text, file):
    """Write text to a file that is open in binary mode; for save(text, path, write_text)."""
    file.write(text.encode())


def mean_sd(values: list[float], digits: int = 2) -> str:
    """The cell of several runs: mean ± standard deviation, or the value of one run alone."""
    x = torch.tensor(values)
    mean = f"{x.mean():z.{digits}f}"  # z: no -0.00
    if len(values) == 1:
        return mean
    return f"{mean} ± {x.std(correction=0):.{digits}f}"

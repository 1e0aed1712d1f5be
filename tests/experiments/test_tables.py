"""A run is done once, a table says what the log says, and the documents say what the tables say."""

import re
from argparse import Namespace

import pytest
from conftest import ROOT, run

import neighbours
import recovery
import report
import runs
import tables
from data import toy
from report import append
from runs import Row, by_name

LOG = ROOT / "experiments" / "runs.jsonl"


def args_of(folder, **kwargs):
    """The arguments of tables.py, their defaults filled in."""
    defaults = {
        "log": folder / "runs.jsonl",
        "steps_divisor": 1,
        "rows": ["*"],
        "subjects": toy.TABLE,
        "seeds": 1,
        "write": False,
    }
    return Namespace(**{**defaults, **kwargs})


def test_a_run_is_done_once_and_the_table_says_what_the_log_says(tmp_path, monkeypatch, capsys):
    scores = {
        ("a", "bix", 0): 0.5,
        ("a", "fen", 0): 0.7,
        ("b", "bix", 0): 0.9,
        ("b", "fen", 0): 0.9,
    }
    rows = by_name([Row("a"), Row("b")])
    calls = []

    def tune(args, row, subject, seed):
        calls.append((row, subject, seed))
        found = scores[row.name, subject, seed]
        return {
            "trained": 1234,
            "bytes": 99,
            "parts": found,
            "identity": found / 2,
            "prompt": 1.0,
            "red parts": found / 10,
        }

    def fill(**kwargs):
        args = args_of(tmp_path, subjects=("bix", "fen"), **kwargs)
        runs.fill(args, "t", rows, toy.TABLE, [("b", "a")])
        return capsys.readouterr().out

    monkeypatch.setattr(runs, "tune", tune)
    assert "| b |" not in fill(rows=["a"])
    assert calls == [(rows["a"], "bix", 0), (rows["a"], "fen", 0)]

    for _ in range(2):
        out = fill()
        assert (
            "| a | 1,234 | 99 | 0.60 ± 0.10 | 0.30 ± 0.05 | 1.00 ± 0.00 | 0.06 ± 0.01 | 2 |" in out
        )
        assert "| b | a | 0.30 ± 0.10 | 0.15 ± 0.05 | 0.00 ± 0.00 | 0.03 ± 0.01 | 2 |" in out
    assert len(calls) == 4


def test_rows_that_are_in_the_log_alone_are_named_and_the_others_run(tmp_path, monkeypatch, capsys):
    rows = by_name([Row("gone", last_commit="abc"), Row("b")])
    calls = []
    monkeypatch.setattr(runs, "tune", lambda args, row, *_: calls.append(row.name) or {})
    monkeypatch.setattr(runs, "show_means", lambda *_: None)
    runs.fill(args_of(tmp_path), "t", rows, ["bix"], [])
    assert calls == ["b"]
    assert capsys.readouterr().err.startswith("'gone' can't be run any more")
    runs.fill(args_of(tmp_path, rows=["none"]), "t", rows, ["bix"], [])
    assert capsys.readouterr().err == ""


def test_a_log_that_is_replaced_during_a_run_is_appended_to(tmp_path):
    log = tmp_path / "runs.jsonl"
    append(log, {"row": "a"}, {"parts": 1})
    log.rename(tmp_path / "old")
    log.write_text((tmp_path / "old").read_text())
    append(log, {"row": "b"}, {"parts": 1})
    assert [line["row"] for line in report.lines(log)] == ["a", "b"]


def test_a_cut_last_line_of_the_log_is_done_again(tmp_path):
    log = tmp_path / "runs.jsonl"
    append(log, {"row": "a", "seed": 0}, {"parts": 0.5})
    with log.open("a") as file:
        file.write('{"row": "b", "seed": 0, "par')
    assert report.lines(log, row="b") == []
    append(log, {"row": "b", "seed": 0}, {"parts": 0.7})
    assert [line["parts"] for line in report.lines(log)] == [0.5, 0.7]
    assert log.read_text().count("\n") == 2


@pytest.mark.parametrize("bad", ['{"row": "b", "par', "[1]", "\x00"])
def test_any_other_bad_line_of_the_log_is_named(bad, tmp_path):
    log = tmp_path / "runs.jsonl"
    log.write_text(f'{{"row": "a"}}\n{bad}\n{{"row": "c"}}\n')
    with pytest.raises(ValueError, match="runs.jsonl, line 2 isn't the line of a run"):
        report.lines(log)


def test_recovery_is_a_share_of_the_gap(tmp_path, monkeypatch, capsys):
    found = {
        (32, "full precision"): (0.04, 0.05),
        (4, "mse"): (0.08, 0.05),
        (2, "minmax"): (0.44, 0.14),
    }

    def recover(setting, seed, steps_divisor):
        before, after = found[setting.bits, setting.calibration]
        return {"before": before, "after": after + 0.001 * (seed - 1)}

    monkeypatch.setattr(recovery, "recover", recover)
    tables.recovery(args_of(tmp_path, rows=["32*", "4 bits, mse", "2 bits, minmax"], seeds=3))
    tables.recovery(args_of(tmp_path, rows=["none"]))
    out = capsys.readouterr().out
    assert out.count("| 75% | 3 |") == 4  # what is in the log is shown, whatever --seeds says
    assert "| 4 | mse | 0.08000 | 0.05000 ± 0.00082 | 75% | 3 |" in out
    assert "| 2 | minmax | 0.44000 | 0.14000 ± 0.00082 | 75% | 3 |" in out
    assert "| 32 | full precision | 0.04000 | 0.05000 ± 0.00082 |  | 3 |" in out
    assert "rowcol" not in out


def test_scale_sets_stand_beside_their_starts(tmp_path, capsys):
    log = tmp_path / "runs.jsonl"
    runs = [("4 bits, rowcol", 0.5), ("4 bits, rowcol, PEQA", 0.6), ("2 bits, gptq", 0.7)]
    for name, after in runs:
        append(log, {"recovery": name, "seed": 0}, {"before": 1.0, "after": after})
    append(log, {"recovery": "4 bits, rowcol, PEQA", "seed": 1}, {"before": 1.0, "after": 0.6})
    append(log, {"recovery": "2 bits, gptq", "seed": 1}, {"before": 3.0, "after": 0.7})
    tables.recovery(args_of(tmp_path, rows=["none"]))
    short = capsys.readouterr().out.split("scale sets, in short\n\n")[1].splitlines()
    assert short == [
        "| method | 4 bits, rowcol | 2 bits, gptq |",
        "| --- | --- | --- |",
        "| untuned | 1.00000 | 2.00000 ± 1.00000 |",
        "| PEQA | 0.60000 ± 0.00000 |  |",
        "| TuneQDM, N = 1 | 0.50000 | 0.70000 ± 0.00000 |",
    ]


def test_an_empty_table_is_not_written(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(report, "write_table", lambda title, table: written.append(title))
    for table in tables.TABLES.values():
        table(args_of(tmp_path, rows=["none"], write=True))
    assert written == []


def spoil(text, title, row, wrong):
    """text with a number changed in a row of the table that is marked with title."""
    before, mark, after = text.partition(f"<!-- {title} -->\n| method |")
    assert mark
    assert f"<!-- {title} -->" not in after
    spoiled = before + mark + after.replace(row, wrong, 1)
    assert spoiled != text
    return spoiled


def test_what_ships_is_printed_and_written_and_nothing_is_run(tmp_path, monkeypatch, capsys):
    readme = tmp_path / "README.md"
    results = tmp_path / "RESULTS.md"
    shipped = {
        readme: (ROOT / "README.md").read_text(encoding="utf-8"),
        results: (ROOT / "experiments" / "RESULTS.md").read_text(encoding="utf-8"),
    }
    wrong = {
        readme: spoil(
            shipped[readme],
            "one subject, in short",
            "| LoRA r = 1, 4 bits | 33,054 |",
            "| LoRA r = 1, 4 bits | 1 |",
        ),
        results: spoil(
            shipped[results],
            "one subject",
            "| TuneQDM, N = 1, 8 bits | 15,878 |",
            "| TuneQDM, N = 1, 8 bits | 1 |",
        ),
    }
    for document, text in wrong.items():
        document.write_text(text, encoding="utf-8")
    monkeypatch.setattr(report, "DOCUMENTS", [readme, results])
    monkeypatch.setattr(runs, "tune", lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(recovery, "recover", lambda *_: pytest.fail("a run was started"))
    for work in ("score_base", "calibrate_on"):
        monkeypatch.setattr(tables, work, lambda *_: pytest.fail("a run was started"))
    monkeypatch.setattr(tables.activations, "measure", lambda *_: pytest.fail("it was measured"))
    monkeypatch.chdir(tmp_path)

    for write in ([], ["--write"]):
        for document, text in wrong.items():
            assert document.read_text(encoding="utf-8") == text
        for script in (tables, neighbours):
            assert run(script, "--log", LOG, "--rows", "none", *write) == 0
    for document, text in shipped.items():  # so the documents say what was measured
        assert document.read_text(encoding="utf-8") == text
    assert "| TuneQDM, N = 2, 2 bits | 31,756 | 65,385 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "document, titles",
    [
        ("README.md", ["one subject, in short"]),
        (
            "experiments/RESULTS.md",
            [
                "one subject, in short: differences",
                "rates",
                "one subject",
                "2 subjects",
                "3 subjects",
                "two in one image",
                "two subjects, together and added",
                "two subjects, together and added: differences",
                "strength",
                "a subject and a recovered base",
                "a subject and a recovered base: differences",
                "one thing changed: differences",
                "validation loss",
                "timesteps of the data",
                "scale sets, in short",
                "scale sets",
                "a fixed set of scenes",
                "a young base",
                "thirds of the timesteps",
                "thirds of the timesteps, recovery",
                "activations",
                "tuning",
                "columns, untuned",
                "columns",
            ],
        ),
    ],
)
def test_each_document_marks_its_tables(document, titles):
    text = (ROOT / document).read_text(encoding="utf-8")
    for title in titles:
        assert text.count(f"<!-- {title} -->\n| ") == 1


@pytest.mark.parametrize("document", ["README.md", "experiments/RESULTS.md"])
def test_the_code_that_a_document_names_is_there(document):
    named = set(re.findall(r"[\w/]+\.py\b", (ROOT / document).read_text(encoding="utf-8")))
    assert named
    folders = [ROOT, *(ROOT / name for name in ("data", "examples", "experiments", "tests"))]
    for name in named:
        assert any((folder / name).is_file() for folder in folders), name

"""What claims.py does to deltas, and that each of its tables runs."""

from argparse import Namespace

import pytest
import torch
from conftest import spread

import claims
import recovery
import runs
from quant import adapter, deltas, merge, quantize
from recovery import Recovery


def test_kept_buckets_are_tuned_and_the_others_are_the_bases():
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    model = quantize(model, num_buckets=3, timestep="input", keep8=())
    base = merge(model, 0)[0].weight.clone()
    tuned = [merge(spread(model), b)[0].weight for b in range(3)]
    claims.keep_buckets(model, (0, 2))
    for b in range(3):
        expected = base if b == 1 else tuned[b]
        assert torch.equal(merge(model, b)[0].weight, expected)
        assert not torch.equal(base, tuned[b])


def test_subjects_that_are_added_have_the_sum_of_their_deltas(small_base, tmp_path, monkeypatch):
    short = claims.named(claims.SHORT[claims.POSITION], "a", "--steps 2 --batch 2")
    monkeypatch.setitem(claims.SHORT, claims.POSITION, short)
    second = claims.named(claims.SECOND, "b", "--steps 2 --batch 2")
    monkeypatch.setattr(claims, "SECOND", second)
    found = {}

    def scores_of(model, run, folders):
        found.update(model=model, folders=folders)
        return {"trained": 10, "bytes": 100}

    monkeypatch.setattr(claims, "scores_of", scores_of)
    args = Namespace(log=tmp_path / "runs.jsonl", steps_divisor=1)
    assert claims.add(args, 0.5, "bix+fen", 0) == {"trained": 20, "bytes": 200}
    first, _, _ = runs.fine_tuned(args, short, "bix", 0)
    other, _, _ = runs.fine_tuned(args, second, "fen", 100)
    a, b = [adapter(model)["deltas"].float() for model in (first, other)]
    assert a.any() and b.any() and not torch.equal(a, b)
    total = torch.cat([delta.detach() for delta in deltas(found["model"]).values()])
    torch.testing.assert_close(total, (a + b) / 2, rtol=0, atol=1e-6)
    assert {word: folder.name for word, folder in found["folders"].items()} == {
        "sks": "bix",
        "zwx": "fen",
    }


def test_a_recovered_base_is_made_once(small_base, tmp_path, monkeypatch):
    args = Namespace(log=tmp_path / "runs.jsonl", steps_divisor=1)
    setting = Recovery(4, "minmax", "by position, N = 1", steps=2)
    first = recovery.recovered(args, setting, 0)["deltas"]
    monkeypatch.setattr(
        recovery, "tune_on_world", lambda *_, **__: pytest.fail("it was tuned again")
    )
    assert torch.equal(recovery.recovered(args, setting, 0)["deltas"], first)
    assert first.any()


def test_a_fixed_set_of_scenes_is_overfitted(small_base, monkeypatch):
    monkeypatch.setattr(recovery, "validation_loss", lambda model: 0.0)
    monkeypatch.setattr(recovery, "LR_FLOAT", 0.003)
    losses = []
    for steps in (1, 40):
        setting = Recovery(32, "full precision", steps=steps, scenes=8)
        losses.append(recovery.recover(setting, 0)["on its scenes"])
    assert losses[1] < 0.9 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", claims.TABLES)
def test_a_table_has_its_rows(name, small_base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recovery, "YOUNG", runs.BASE)
    monkeypatch.setattr(recovery, "STEPS", 40)
    monkeypatch.setattr(claims, "STEPS", 40)
    monkeypatch.setattr(runs.train, "IMAGES_PER_PROMPT", 1)
    for module in (recovery, runs, claims):
        monkeypatch.setattr(module, "validation_loss", lambda model, **_: 0.0)
    monkeypatch.setattr(claims, "KEPT", {"one": (0,), "two": (0, 1)})
    monkeypatch.setattr(claims, "SCALE_SETS", claims.SCALE_SETS[:2])
    monkeypatch.setattr(claims, "STEPS_TRIED", (100,))
    monkeypatch.setattr(claims, "STRENGTHS", (0, 0.5))
    args = Namespace(
        log=tmp_path / "runs.jsonl",
        steps_divisor=40,
        rows=["*"],
        subjects=["bix", "fen", "mo"],
        seeds=1,
        write=False,
    )
    claims.TABLES[name](args)
    table = capsys.readouterr().out.split("\n\n")[1]
    assert table.count("\n| ") >= 3  # headings, the rule, two rows

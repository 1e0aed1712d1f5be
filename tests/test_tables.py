"""What tables.py computes of its own, against independent references; a run is done once; a table says what the log says."""
import sys
from argparse import Namespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import run

import tables
from data import toy
from model import Diffusion, UNet, save
from quant import QuantLayer, deltas, quantize


def args_of(folder, **kwargs):
    defaults = {"log": folder / "runs.jsonl", "less": 1, "rows": ["*"], "subjects": toy.TABLE, "seeds": 1, "write": False}
    return Namespace(**{**defaults, **kwargs})


def test_raw_scales_are_trained_as_scales():
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(6, 5)), 4)
    layer, x, target = model[0], torch.randn(8, 6), torch.randn(8, 5)
    codes, start = (layer.weight() / layer.s_out[:, None] / layer.s_in).detach(), layer(x).detach()
    s_out, s_in = layer.s_out.clone().requires_grad_(), layer.s_in.clone().requires_grad_()
    with tables.variant("raw scales, lr 2e-4", model):
        torch.testing.assert_close(layer(x), start)
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(trained) == 2
        raw, plain = (torch.optim.Adam(params, lr=2e-4) for params in (trained, [s_out, s_in]))
        for _ in range(20):
            for optimizer, y in ((plain, F.linear(x, s_out[:, None] * codes * s_in, layer.bias)), (raw, layer(x))):
                optimizer.zero_grad()
                (y - target).square().mean().backward()
                optimizer.step()
        assert (s_out - layer.s_out).abs().max() > 2e-3
        for mine, s in zip(trained, (s_out, s_in)):
            torch.testing.assert_close(mine, s, rtol=1e-4, atol=1e-6)


def test_a_start_at_random_follows_the_seed(tmp_path):
    row = "LoRA r = 2, packed base, 4 bits"
    starts = [tables.prepare(args_of(tmp_path), row, tables.SUBJECTS[row], "bix", seed)[0].state_dict() for seed in (0, 0, 1)]
    assert any("lora_a" in key for key in starts[0])
    for key, value in starts[0].items():
        assert torch.equal(value, starts[1][key]) and ("lora_a" in key) != torch.equal(value, starts[2][key]), key


def test_buckets_even_in_log_snr():
    abar = Diffusion().alphas_cumprod.tolist()
    snr = [torch.tensor(a / (1 - a)).log().item() for a in abar]
    width = (snr[0] - snr[-1]) / 4
    expected = [min(int((snr[0] - s) / width), 3) for s in snr]
    got = tables.log_snr_bucket(torch.arange(1000), 4, 1000).tolist()
    assert sum(a != b for a, b in zip(got, expected)) <= 3  # at an edge, rounding decides
    assert got == sorted(got) and set(got) == {0, 1, 2, 3}
    assert int(tables.log_snr_bucket(999, 4, 1000)) == 3


def test_a_variant_reaches_training_and_sampling():
    model = quantize(UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16), 4, num_buckets=4)
    seen, layer = [], next(m for m in model.modules() if isinstance(m, QuantLayer))
    layer.register_forward_hook(lambda layer, *_: seen.append(layer.told[0][0]))
    t = torch.tensor([700])
    x, words = torch.zeros(1, 3, 16, 16), torch.zeros(1, 7, dtype=torch.long)
    model(x, t, words)
    with tables.variant("N = 4, edges even in log-SNR", model):
        model(x, t, words)
        assert tables.train.bucket == sys.modules["sample"].bucket == tables.log_snr_bucket
    assert tables.train.bucket == tables.bucket
    assert seen == [[2], [int(tables.log_snr_bucket(700, 4, 1000))]] and seen[0] != seen[1]


@pytest.mark.parametrize("kernel", [1, 9])
def test_explained_shares_are_those_of_a_best_fit(kernel):
    generator = torch.Generator().manual_seed(kernel)
    w, dw = torch.randn(2, 7, 5, kernel, dtype=torch.float64, generator=generator)
    each, rows, both = tables.explained(w, dw, 2000)
    total = dw.square().sum()
    left = lambda w, dw: dw - w * torch.linalg.lstsq(w.flatten()[:, None], dw.flatten()[:, None]).solution.item()
    of_rows = sum(left(w[o], dw[o]).square().sum() for o in range(7))
    of_each = sum(left(w[o, i], dw[o, i]).square().sum() for o in range(7) for i in range(5))
    torch.testing.assert_close(rows[1], 1 - of_rows / total)
    torch.testing.assert_close(each[1], 1 - of_each / total)
    a, b = torch.ones(7, dtype=torch.float64, requires_grad=True), torch.ones(5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([a, b], max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = (dw - (a[:, None, None] * b[:, None] - 1) * w).square().sum() / total
        loss.backward()
        return loss
    optimizer.step(closure)
    assert both[1] >= 1 - closure().item() - 1e-6 and both[1] > rows[1]
    torch.testing.assert_close(both[1], 1 - (dw - both[0][..., None] * w).square().sum() / total)


def test_a_run_is_done_once_and_the_table_says_what_the_log_says(tmp_path, monkeypatch, capsys):
    scores = {("a", "bix", 0): 0.5, ("a", "fen", 0): 0.7, ("b", "bix", 0): 0.9, ("b", "fen", 0): 0.9}
    calls, args = [], args_of(tmp_path, subjects=("bix", "fen"))

    def tune(args, row, flags, subject, seed):
        calls.append((row, flags, subject, seed))
        if args.log.exists():  # may be replaced while a run goes on
            args.log.rename(tmp_path / "old")
            args.log.write_text((tmp_path / "old").read_text())
        score = scores[row, subject, seed]
        return {"trained": 1234, "bytes": 99, "parts": score, "identity": score / 2, "prompt": 1.0, "red parts": score / 10}

    monkeypatch.setattr(tables, "tune", tune)
    tables.fill(Namespace(**{**vars(args), "rows": ["a"]}), "t", {"a": "-a", "b": "-b"}, toy.TABLE, [("b", "a")])
    assert calls == [("a", "-a", "bix", 0), ("a", "-a", "fen", 0)] and "| b |" not in capsys.readouterr().out
    for _ in range(2):
        tables.fill(args, "t", {"a": "-a", "b": "-b"}, toy.TABLE, [("b", "a")])
    assert len(calls) == 4
    out = capsys.readouterr().out
    assert "| a | 1,234 | 99 | 0.60 ± 0.10 | 0.30 ± 0.05 | 1.00 ± 0.00 | 0.06 ± 0.01 | 2 |" in out
    assert "| b | a | 0.30 ± 0.10 | 0.15 ± 0.05 | 0.00 ± 0.00 | 0.03 ± 0.01 | 2 |" in out


@pytest.mark.parametrize("row", ["full precision", "TuneQDM, N = 2, 4 bits", "LoRA r = 2, packed base, 4 bits", "PEQA, 2 bits",
                                 "raw scales, lr 3e-4"])
def test_tune_scores_and_counts(tmp_path, monkeypatch, row):
    small = UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16, vocab=len(toy.VOCAB), slots=toy.SLOTS)
    save({"kind": "model", "config": small.config, "model": small.state_dict()}, tmp_path / "base.pt")
    (tmp_path / "subjects").symlink_to(tables.BASE.parent / "subjects")
    monkeypatch.setattr(tables, "BASE", tmp_path / "base.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables.train, "PROMPTS", tables.train.PROMPTS[:2])
    args, flags = args_of(tmp_path), {**tables.SUBJECTS, **tables.ABLATIONS}[row]
    got = tables.tune(args, row, flags + " --steps 2 --sample-steps 2", "bix+fen", 0)
    assert set(got) == {"trained", "bytes", "base bytes", *tables.SCORES} and all(0 <= got[key] <= 1 for key in tables.SCORES)
    model, _ = tables.prepare(args, row, flags, "bix+fen", 0)
    assert got["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    if "LoRA" not in row:
        assert got["trained"] == sum(d.numel() for d in (deltas(model) or dict(model.named_parameters())).values())
    assert got["bytes"] > got["trained"] * (2 if deltas(model) and "LoRA" not in row else 4)


def test_scales_recover_what_quantization_took(monkeypatch):
    monkeypatch.setattr(tables, "validation_loss", lambda model: losses(model))
    x0, words = toy.sample_scenes(64, torch.Generator().manual_seed(9))
    t = torch.arange(64) * 15
    losses = lambda model: tables.losses(model, x0, words, t, torch.Generator().manual_seed(1)).mean().item()
    found = tables.recover(2, "minmax", 8, 0)
    assert found["after"] < 0.8 * found["before"]


def test_a_figure_of_what_was_not_run_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="PEQA, 4 bits.*tables.py subjects"):
        tables.restored(args_of(tmp_path), "PEQA, 4 bits")


def test_what_ships_is_printed_and_written_and_nothing_is_run(tmp_path, monkeypatch, capsys):
    for name in ("tune", "recover"):
        monkeypatch.setattr(tables, name, lambda *_: pytest.fail("a run was started"))
    root, readme = tables.BASE.parents[1], tmp_path / "README.md"
    says = (root / "README.md").read_text()
    before, mark, table = says.partition("<!-- one subject -->\n| method |")
    assert mark and "<!-- one subject -->" not in table
    wrong = before + mark + table.replace("| TuneQDM, N = 1, 8 bits | 15,878 |", "| TuneQDM, N = 1, 8 bits | 1 |")
    assert wrong != says
    readme.write_text(wrong)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tables, "BASE", tmp_path / "data" / "base.pt")
    for write in ([], ["--write"]):
        assert readme.read_text() == wrong
        for table in ("subjects", "several", "ablations", "recovery"):
            assert run(tables, table, "--log", root / "figures" / "tables.jsonl", "--rows", "none", *write) == 0
    assert readme.read_text() == says  # so what the README prints is what was measured
    assert "| TuneQDM, N = 2, 2 bits | 31,756 | 65,385 |" in capsys.readouterr().out


def test_recovery_is_a_share_of_the_gap(tmp_path, monkeypatch, capsys):
    found = {(32, "full precision"): (0.04, 0.05), (4, "mse"): (0.08, 0.05), (2, "minmax"): (0.44, 0.14)}

    def recover(bits, name, steps, seed):
        before, after = found[bits, name]
        return {"before": before, "after": after + 0.001 * (seed - 1)}

    monkeypatch.setattr(tables, "recover", recover)
    tables.recovery(args_of(tmp_path, rows=["32*", "4 bits, mse", "2 bits, minmax"], seeds=3))
    tables.recovery(args_of(tmp_path, rows=["none"]))
    out = capsys.readouterr().out
    assert out.count("| 75% | 3 |") == 4  # what is in the log is shown, whatever --seeds says
    assert "| 4 | mse | 0.08000 | 0.05000 ± 0.00082 | 75% | 3 |" in out
    assert "| 2 | minmax | 0.44000 | 0.14000 ± 0.00082 | 75% | 3 |" in out
    assert "| 32 | full precision | 0.04000 | 0.05000 ± 0.00082 |  | 3 |" in out and "rowcol" not in out

"""A run does what its row says, against independent references."""

import copy
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import recovery
import runs
from baselines import train_raw_scales, with_position_rows
from calibrate import rowcol
from data import toy
from data.score import read_object, spots_at
from model import Diffusion
from quant import QuantLayer, bucket, current, deltas, quantize
from recovery import Recovery
from runs import Row
from sample import sample

ROWS = {**runs.ONE_SUBJECT, **runs.ABLATIONS}


def args_in(folder):
    return Namespace(log=folder / "runs.jsonl", steps_divisor=1)


def test_raw_scales_are_trained_as_scales():
    torch.manual_seed(0)
    model = quantize(nn.Sequential(nn.Linear(6, 5)), 4)
    layer = model[0]
    x = torch.randn(8, 6)
    target = torch.randn(8, 5)
    codes = (layer.dequantize() / layer.s_out[:, None] / layer.s_in).detach()
    start = layer(x).detach()

    # the reference: the scales themselves, under autograd
    s_out = layer.s_out.clone().requires_grad_()
    s_in = layer.s_in.clone().requires_grad_()

    train_raw_scales(model)
    torch.testing.assert_close(layer(x), start)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2

    raw = torch.optim.Adam(trained, lr=2e-4)
    plain = torch.optim.Adam([s_out, s_in], lr=2e-4)
    for _ in range(20):
        plain.zero_grad()
        y = F.linear(x, s_out[:, None] * codes * s_in, layer.bias)
        (y - target).square().mean().backward()
        plain.step()

        raw.zero_grad()
        (layer(x) - target).square().mean().backward()
        raw.step()
    assert (s_out - layer.s_out).abs().max() > 2e-3
    for mine, s in zip(trained, (s_out, s_in)):
        torch.testing.assert_close(mine, s, rtol=1e-4, atol=1e-6)


def test_rows_by_position_are_a_grid_and_deltas_for_each_position():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 5, 3, stride=2, padding=1).requires_grad_(False)
    model = nn.Sequential(layer, nn.Conv2d(5, 4, 1))
    model = with_position_rows(quantize(copy.deepcopy(model), 4), model)
    d_out = torch.randn(5, 3, 3) * 0.1
    d_in = torch.randn(4, 3, 3) * 0.1
    w = torch.empty(5, 4, 3, 3)
    for y in range(3):
        for x in range(3):
            grid = rowcol(layer.weight[None, :, :, y, x, None], 8)  # 8 bits: it is the first
            scales = d_out[:, None, y, x].exp() * d_in[:, y, x].exp()
            w[:, :, y, x] = grid.weight()[0, :, :, 0] * scales
    with torch.no_grad():
        model[0].d_out.copy_(d_out.view(5, 1, 9))
        model[0].d_in.copy_(d_in.view(1, 4, 9))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model[0](x), F.conv2d(x, w, layer.bias, stride=2, padding=1))
    trained = {name for name, p in model[0].named_parameters() if p.requires_grad}
    assert trained == {"d_out", "d_in"}


def test_a_random_start_follows_the_seed(small_base, tmp_path):
    row = runs.ONE_SUBJECT["LoRA r = 2, packed base, 4 bits"]
    first, again, other = [
        runs.prepare(args_in(tmp_path), row, "bix", seed)[0].state_dict() for seed in (0, 0, 1)
    ]
    assert any("lora_a" in key for key in first)
    for key, value in first.items():
        assert torch.equal(value, again[key]), key
        assert torch.equal(value, other[key]) != ("lora_a" in key), key


def test_a_run_goes_on_from_its_state_unless_that_is_of_other_flags(
    small_base, tmp_path, monkeypatch
):
    steps = []
    draw_batch = runs.train.draw_batch
    monkeypatch.setattr(
        runs.train, "draw_batch", lambda *args: steps.append(1) or draw_batch(*args)
    )

    def deltas_after(flags):
        row = Row("a", flags=f"--steps 3 --batch 2 --calibration minmax {flags}")
        model, _, _ = runs.fine_tuned(args_in(tmp_path), row, "bix", 0)
        return torch.cat(list(deltas(model).values()))

    first = deltas_after("")
    assert first.any()
    assert torch.equal(deltas_after(""), first)
    assert len(steps) == 3
    assert not torch.equal(deltas_after("--lr 0.01"), first)
    assert len(steps) == 6


def test_images_of_pairs_show_both_subjects_whole_and_say_so():
    folder = runs.BASE.parent / "subjects"
    of_subjects = [toy.load_subject(folder / "bix", "sks"), toy.load_subject(folder / "fen", "zwx")]
    images, captions = [torch.cat(tensors) for tensors in zip(*of_subjects)]
    x0, words = runs.with_pairs(images, captions)
    is_pair = words[:, toy.NAME_SLOTS[1]] != 0
    assert is_pair.float().mean() == pytest.approx(0.6)

    # images as they are: each as often as any other
    rows, counts = x0[~is_pair].flatten(1).unique(dim=0, return_counts=True)
    assert len(rows) == len(images.flatten(1).unique(dim=0))
    assert set(counts.tolist()) <= {counts.min().item() * k for k in (1, 2, 3)}

    x0, words = x0[is_pair], words[is_pair]
    assert (words[:, 0] != words[:, 2]).all()
    assert not words[:, toy.PLACE_SLOT].any()
    parts = {toy.WORD["sks"]: "bix", toy.WORD["zwx"]: "fen"}
    for place, slot in (("left", 0), ("right", 2)):
        creature, _ = read_object(x0, spots_at(place), creatures=True)
        for word, name in parts.items():
            found = toy.sprites().parts[creature[words[:, slot] == word]]
            assert len(found) > 0
            assert (found == toy.read_parts(folder / name)).all()


def test_buckets_even_in_log_snr():
    abar = Diffusion().alphas_cumprod.tolist()
    snr = [torch.tensor(a / (1 - a)).log().item() for a in abar]
    width = (snr[0] - snr[-1]) / 4
    expected = [min(int((snr[0] - s) / width), 3) for s in snr]

    edges = runs.log_snr_edges(4)
    got = bucket(torch.arange(1000), edges).tolist()
    assert sum(a != b for a, b in zip(got, expected)) <= 3  # rounding decides at an edge
    assert got == sorted(got)
    assert set(got) == {0, 1, 2, 3}
    assert int(bucket(999, edges)) == 3


@pytest.mark.parametrize("low, high", [(0, 1), (0, 1 / 3), (2 / 3, 1)])
def test_a_part_of_time_has_its_timesteps_alone(low, high):
    generator = torch.Generator()
    everywhere = Diffusion().draw_timesteps(300, generator.manual_seed(1))
    part = runs.PartOfTime(low, high)
    t = part.draw_timesteps(300, generator.manual_seed(1))
    assert t.dtype == torch.long
    expected = [int(1000 * low + (high - low) * of_all) for of_all in everywhere.tolist()]
    assert max(abs(a - b) for a, b in zip(t.tolist(), expected)) <= 1  # rounding decides
    assert 1000 * low - 1 <= t.min() < 1000 * low + 5
    assert 1000 * high - 5 <= t.max() < 1000 * high


def test_a_row_that_is_in_the_log_alone_says_which_commit_can_run_it(tmp_path):
    row = runs.SEVERAL["TuneQDM, N = 2, words, 4 bits, together"]
    with pytest.raises(ValueError, match="N = 2, words.*can't be run any more.*f7ff39f"):
        runs.tune(args_in(tmp_path), row, "bix+fen", 0)


def test_edges_even_in_log_snr_reach_training_and_sampling(small_base, tmp_path):
    row = runs.ABLATIONS["N = 4, edges even in log-SNR"]
    equal_row = replace(row, edges=None, flags="--buckets 4")
    equal, _ = runs.prepare(args_in(tmp_path), equal_row, "bix", 0)
    log_snr, _ = runs.prepare(args_in(tmp_path), row, "bix", 0)
    assert log_snr.quant_config["edges"] == list(runs.log_snr_edges(4))
    assert equal.quant_config["edges"] == [0, 250, 500, 750, 1000]

    # what the layers are told, as in training
    seen = []
    words = torch.zeros(1, toy.SLOTS, dtype=torch.long)
    for model in (equal, log_snr):
        layer = next(m for m in model.modules() if isinstance(m, QuantLayer))
        hook = layer.register_forward_hook(lambda *_: seen.append(current.batch.present))
        model(torch.zeros(1, 3, 16, 16), torch.tensor([700]), words)
        hook.remove()
        for name, delta in deltas(model).items():
            nn.init.constant_(delta, 0.1 * int(name.rpartition("_")[2]))  # each bucket has others
    assert seen == [[2], [int(bucket(700, runs.log_snr_edges(4)))]]
    assert seen[0] != seen[1]

    # weights merged for a bucket are those that the hooks choose
    images = sample(log_snr, words, 3)
    torch.testing.assert_close(images, sample(log_snr, words, 3, packed=True))
    assert not torch.allclose(images, sample(equal, words, 3))


@pytest.mark.parametrize(
    "name",
    [
        "full precision",
        "TuneQDM, N = 2, 4 bits",
        "LoRA r = 2, packed base, 4 bits",
        "PEQA, 2 bits",
        "raw scales, lr 3e-4",
        "N = 4, edges even in log-SNR",
    ],
)
def test_a_run_reports_shares_and_what_it_trained(small_base, tmp_path, monkeypatch, name):
    monkeypatch.setattr(runs.train, "PROMPTS", runs.train.PROMPTS[:2])
    monkeypatch.setattr(runs.train, "IMAGES_PER_PROMPT", 2)
    args = args_in(tmp_path)
    row = ROWS[name]
    short = replace(row, flags=f"{row.flags} --steps 2 --sample-steps 2")
    got = runs.tune(args, short, "bix+fen", 0)
    assert set(got) == {"trained", "bytes", "base bytes", *runs.SCORES, *runs.SHOWN}
    assert all(0 <= got[key] <= 1 for key in runs.SCORES)
    assert sum(got[key] for key in runs.SHOWN if key.startswith("shown")) == pytest.approx(1)

    model, _ = runs.prepare(args, row, "bix+fen", 0)
    assert got["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    stored = 4  # bytes of a trained number: float32
    if not row.lora:
        of_scales = deltas(model)
        expected = of_scales or dict(model.named_parameters())
        assert got["trained"] == sum(p.numel() for p in expected.values())
        if of_scales:
            stored = 2  # float16
    assert got["bytes"] > got["trained"] * stored


def test_scales_recover_what_quantization_took(monkeypatch):
    x0, words = toy.sample_scenes(64, torch.Generator().manual_seed(9))
    t = torch.arange(64) * 15

    def validation_loss(model):
        generator = torch.Generator().manual_seed(1)
        return runs.losses(model, x0, words, t, generator).mean().item()

    monkeypatch.setattr(recovery, "validation_loss", validation_loss)
    found = recovery.recover(Recovery(2, "minmax", steps=4), 0)
    assert found["after"] < 0.85 * found["before"]


def test_what_two_show_counts_each_creature_once():
    parts = toy.sprites().parts
    left, right = parts[toy.PLAIN + 17], parts[toy.PLAIN + 7356]
    differ = left != right
    assert differ.sum() == 6
    options = torch.tensor([len(toy.OPTIONS[key]) for key in toy.KEYS])

    def sprite(of):
        """The number of the creature with these parts (7,)."""
        found = (parts == of).all(1).nonzero()
        assert len(found) == 1
        return found.item()

    def with_part(of, key, option):
        changed = of.clone()
        changed[toy.KEYS.index(key)] = option
        return changed

    ears = toy.KEYS.index("ears")
    assert differ[ears]
    taken = with_part(left, "ears", right[ears])
    strange = ({0, 1, 2, 3} - {int(left[ears]), int(right[ears])}).pop()
    neither = with_part(left, "ears", strange)
    cases = [
        (sprite(left), sprite(right)),  # both whole
        (sprite(right), sprite(left)),  # exchanged
        (sprite(taken), sprite(right)),
        (sprite(neither), sprite(right)),
        (0, sprite(right)),  # a circle
    ]
    y = torch.tensor([3])
    images = []
    for a, b in cases:
        objects = [(torch.tensor([a]), y, torch.tensor([0])), (torch.tensor([b]), y, y + 5)]
        images.append(toy.render(torch.tensor([2]), objects))
    found = runs.what_two_show(torch.cat(images), left, right)

    by_chance = (differ / (options - 1)).sum().item()
    assert found == pytest.approx(
        {
            "shown whole": 5 / 10,
            "shown exchanged": 2 / 10,
            "shown mixed": 1 / 10,
            "shown neither": 1 / 10,
            "shown no creature": 1 / 10,
            "taken": (2 * differ.sum().item() + 1) / 10,
            "taken by chance": (2 * by_chance + 2 / 3) / 10,
        }
    )

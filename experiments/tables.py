"""The README's tables and figures: python tables.py [base] [subjects] [several] [recovery] [ablations] [figures]

Each finished run is a line of the log and is not run again: stop, go on, share the work among processes (--rows, --subjects).
--log figures/tables.jsonl --rows none runs nothing and shows the runs that ship; --write puts the tables into the README.
"""
import contextlib
import json
import re
from fnmatch import fnmatch
from functools import partial
from itertools import combinations, product
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
from torch.nn.utils.parametrize import register_parametrization

import train
from bench import DIFFUSION, lora_packed, print_table
from data import toy
from model import load, save, size
from quant import CALIBRATIONS, QuantLayer, adapter, bucket, deltas, quantize
from sample import BASE, Parser, guard, load_model, sample

WIDTHS = (4, 3, 2, 8)
MINE = "TuneQDM, N = 1, 4 bits"  # the row of train.py's defaults
SUBJECTS = {"the base": "--bits 32 --steps 0", "full precision": "--bits 32",
            **{f"{name}, {bits} bits": f"--bits {bits} {flags}" for bits in WIDTHS for name, flags in {
                "untuned": "--steps 0", "PEQA": "--scales out", "PEQA + TAS, N = 2": "--scales out --buckets 2",
                "TuneQDM, N = 1": "", "TuneQDM, N = 2": "--buckets 2", "TuneQDM, N = 4": "--buckets 4",
                "LoRA r = 2, packed base": "--lr 0.003"}.items()}}
ABLATIONS = {MINE: "", "TuneQDM, N = 2, 4 bits": "--buckets 2", "TuneQDM, N = 4, 4 bits": "--buckets 4", "N = 8": "--buckets 8",
             "N = 4, edges even in log-SNR": "--buckets 4",
             **{f"calibration: {name}": f"--calibration {name}" for name in ("mse", "minmax")},
             **{f"raw scales, lr {lr}": f"--lr {lr}" for lr in ("3e-6", "3e-4", "1e-3")},
             **{f"lr {lr}": f"--lr {lr}" for lr in (0.01, 0.1)}, **{f"{n} steps": f"--steps {n}" for n in (500, 2000)},
             **{f"prior weight {weight}": f"--prior {weight}" for weight in (0, 1, 3)}}
SEVERAL = {f"{row}, together": f"{SUBJECTS[row]} --steps 2000"
           for row in ("full precision", "PEQA, 4 bits", MINE, "TuneQDM, N = 2, 4 bits")}
TOGETHER = {2: ["bix+fen", "gil+luz", "ori+tam"], 3: ["bix+fen+gil", "luz+ori+tam"]}
SCORES = {"parts": "parts right", "identity": "whole subject", "both parts": "parts, both in one picture",
          "both identity": "both whole", "prompt": "prompt right", "red parts": "in other creatures"}


def lines(args, **key):
    """The lines of the log that have this key."""
    found = [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []
    return [line for line in found if key.items() <= line.items()]


def once(args, measure, **key):
    """Measure and append the line of the log that has this key, where there is none, if --rows has its first value."""
    if not lines(args, **key) and any(map(partial(fnmatch, next(iter(key.values()))), args.rows)) and (found := measure()):
        with args.log.open("a") as file:  # only now: the log may have been replaced while it was measured
            file.write(json.dumps({**key, **found}) + "\n")


def show(args, title, columns, rows):
    """Print a table; with --write put it into the README, where <!-- title --> stands above the one that it replaces."""
    table, readme = print_table(title, columns, rows), BASE.parents[1] / "README.md"
    if args.write and rows:
        text = re.sub(rf"(<!-- {title} -->\n)(\|.*\n)*", lambda found: found[1] + table, readme.read_text())
        save(text, readme, lambda text, file: file.write(text.encode()))


def mean_sd(values, digits=2):
    return f"{(x := torch.tensor(values)).mean():.{digits}f}" + f" ± {x.std(correction=0):.{digits}f}" * (len(values) > 1)


@torch.no_grad()
def losses(model, x0, words, t, generator):
    """Squared error of v for each of x0 (N, 3, 16, 16) at t (N,): (N,)."""
    eps = torch.randn(x0.shape, generator=generator)
    parts = zip(*(a.split(128) for a in (x0.contiguous(memory_format=torch.channels_last), words, t, eps)))
    return torch.cat([DIFFUSION.loss(model, *part) for part in parts])


def validation_loss(model, n=1024, seed=12345):
    """Mean squared error of v on n fixed scenes, timesteps and noises."""
    generator = torch.Generator().manual_seed(seed)
    return losses(model, *toy.sample_scenes(n, generator), train.timesteps(n, DIFFUSION.T, generator), generator).mean().item()


def from_scale(s0):
    """A parametrization that trains a scale s = s0 * exp(d) itself, kept positive, and not its delta d: as the paper."""
    module = torch.nn.Module()
    module.forward, module.right_inverse = lambda s: (s / s0).clamp(min=1e-3).log(), lambda d: s0 * d.exp()
    return module


def log_snr_bucket(t, num_buckets, T):
    """The interval of t where the N intervals are equal in log(abar / (1 - abar)), and not in t."""
    log_snr = DIFFUSION.alphas_cumprod.logit()
    edges = torch.linspace(log_snr[0], log_snr[-1], num_buckets + 1, dtype=log_snr.dtype)[1:-1]
    return (log_snr[torch.as_tensor(t)][..., None] < edges).sum(-1)


@contextlib.contextmanager
def variant(row, model):
    """What an ablation changes that is no flag of train.py."""
    for layer in model.modules() if row.startswith("raw scales") else ():
        for d, s0 in ((layer.d_out, layer.s_out), (layer.d_in, layer.s_in)) if isinstance(layer, QuantLayer) else ():
            register_parametrization(d, "0", from_scale(s0))
    edges = log_snr_bucket if "log-SNR" in row else bucket
    with mock.patch("quant.bucket", edges), mock.patch("train.bucket", edges), mock.patch("sample.bucket", edges):
        yield


def prepare(args, row, flags, subject, seed):
    """The model of a row before its fine-tuning, and its run's arguments."""
    out = str(Path("out") / args.log.stem / f"{row} {subject} {seed}".replace(", ", " ").replace(" ", "-"))
    run = train.arguments([*flags.split(), "--seed", str(seed), "--out", out])
    run.steps, run.sample_steps = run.steps // args.less, run.sample_steps // args.less
    model = load_model(BASE, run.device)
    if row.startswith("LoRA"):
        torch.manual_seed(run.seed)  # of its first matrices
        model = lora_packed(model, 2, n_bits=run.bits, calibration=run.calibration).to(run.device)
    elif run.bits < 32:
        quantize(model, run.bits, run.buckets, DIFFUSION.T, run.scales, run.calibration)
    return model, run


def tune(args, row, flags, subject, seed):
    """Fine-tune to a subject, or to several ("bix+fen"), each with a rare word of its own, and score."""
    model, run = prepare(args, row, flags, subject, seed)
    subjects = {word: BASE.parent / "subjects" / name for word, name in zip(toy.RARE, subject.split("+"))}
    run.out.mkdir(parents=True, exist_ok=True)
    with variant(row, model):
        if run.steps:
            sets = [toy.load_subject(folder, word) for word, folder in subjects.items()]
            train.finetune(model, run, *map(torch.cat, zip(*sets)))
        scores = measure(model, {word: toy.read_parts(folder) for word, folder in subjects.items()}, run)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad} if run.steps else {}
    mine = {"kind": "adapter", **adapter(model)} if trained and trained.keys() == deltas(model).keys() else trained
    return {"trained": sum(p.numel() for p in trained.values()), "bytes": len(trained) and size(mine), **scores,
            "base bytes": size({name: value for name, value in model.state_dict().items() if name not in trained})}


def measure(model, parts, run):
    """Exact scores for each word of parts, its subject's parts: alone, two in one picture, and in red creatures."""
    found = []

    def draw(prompts, names, label, seed):
        words = torch.tensor([toy.caption(prompt) for prompt in prompts for _ in range(train.EACH)])
        images = sample(model, words, run.sample_steps, seed=seed)
        for word, name in names.items():
            scores = toy.score(images, words, parts[word], toy.WORD[name])
            found.append({label + key: value.mean().item() for key, value in scores.items()})

    for word in parts:
        draw([prompt.replace(train.WORD, word) for prompt in train.PROMPTS], {word: word}, "", run.seed)
    for a, b in zip(parts, list(parts)[1:]):
        both = [f"{a} creature and {b} creature on {prompt.split(' on ')[1]}" for prompt in train.PROMPTS]
        draw(both, {a: a, b: b}, "both ", run.seed + 1)
    draw(["red creature"] * len(train.PROMPTS), dict.fromkeys(parts, "red"), "red ", run.seed)
    return {key: sum(f.get(key, 0) for f in found) / n for key in SCORES if (n := sum(key in f for f in found))}


def fill(args, title, rows, subjects, pairs):
    """Do what is not yet done of rows x subjects x seeds; print means and standard deviations over subjects and seeds, of
    each row, and of the differences of pairs of rows, subject by subject and seed by seed."""
    for seed, (row, flags), subject in product(range(args.seeds), rows.items(), subjects):
        if set(subject.split("+")) <= set(args.subjects):
            once(args, partial(tune, args, row, flags, subject, seed), row=row, subject=subject, seed=seed)
    runs = {row: {(r["subject"], r["seed"]): r for r in lines(args, row=row) if r["subject"] in subjects} for row in rows}
    columns = [key for key in SCORES if all(key in run for found in runs.values() for run in found.values())]
    cells = lambda run, *more: [f"{run['trained']:,}", f"{run['bytes']:,}",
                                *(mean_sd([r[key] for r in (run, *more)]) for key in columns), str(1 + len(more))]
    show(args, title, ["method", "trained", "adapter bytes", *(SCORES[key] for key in columns), "runs"],
         [[row, *cells(*found.values())] for row, found in runs.items() if found])
    show(args, f"{title}: differences", ["method", "minus", *(SCORES[key] for key in columns), "pairs"],
         [[a, b, *(mean_sd([x[key] - y[key] for x, y in both]) for key in columns), str(len(both))] for a, b in pairs
          if (both := [(run, runs[b][key]) for key, run in runs[a].items() if key in runs[b]])])


def base(args):
    """What the shipped base draws, and how much of it is right."""
    train.score_base(load_model(BASE), seed=0)


def subjects(args):
    """Fine-tune to one subject."""
    pairs = [(row, yardstick) for yardstick, row in combinations(SUBJECTS, 2) if "--steps 0" not in SUBJECTS[row] and
             yardstick in ("full precision", f"PEQA, {row[-6:]}", f"TuneQDM, N = 1, {row[-6:]}", f"{row[:-6]}4 bits")]
    fill(args, "one subject", SUBJECTS, toy.TABLE, pairs)


def several(args):
    """Fine-tune to two and to three subjects at once."""
    for n, names in TOGETHER.items():
        fill(args, f"{n} subjects", SEVERAL, names, [(row, yardstick) for yardstick, row in combinations(SEVERAL, 2)])


def ablations(args):
    """Fine-tune with one thing changed."""
    fill(args, "one thing changed", ABLATIONS, toy.TABLE,
         [(row, "TuneQDM, N = 4, 4 bits" if "log-SNR" in row else MINE) for row in list(ABLATIONS)[1:]])


def recover(bits, name, steps, seed, lr=0.003):
    """Quantize the base, tune its scales (32: all of it) on the pretraining set; validation loss before and after."""
    model = load_model(BASE) if bits == 32 else quantize(load_model(BASE), bits, calibration=name)
    before, generator = validation_loss(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    for step in train.tqdm(range(steps), f"{bits} bits, {name}"):
        optimizer.param_groups[0]["lr"] = (lr if bits < 32 else lr / 10) * (1 - step / steps)
        x0, words = toy.sample_scenes(64, generator)
        t, eps = train.timesteps(64, DIFFUSION.T, generator), torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        DIFFUSION.loss(model, x0.contiguous(memory_format=torch.channels_last), words, t, eps).mean().backward()
        optimizer.step()
    return {"before": before, "after": validation_loss(model)}


def recovery(args):
    """Tune scales on the pretraining set: how much of the quantization gap is recovered?"""
    rows, base, table = [(32, "full precision"), *product(sorted(WIDTHS, reverse=True), CALIBRATIONS)], None, []
    for seed, (bits, name) in product(range(args.seeds), rows):
        once(args, partial(recover, bits, name, 300 // args.less, seed), recovery=f"{bits} bits, {name}", seed=seed)
    for bits, name in rows:
        if runs := lines(args, recovery=f"{bits} bits, {name}"):
            before, after = runs[0]["before"], [run["after"] for run in runs]
            base = before if bits == 32 else base
            share = f"{(before - sum(after) / len(after)) / (before - base):.0%}" if bits < 32 and base else ""
            table.append([str(bits), name, f"{before:.5f}", mean_sd(after, 5), share, str(len(runs))])
    show(args, "validation loss", ["bits", "calibration", "quantized", "tuned", "recovered", "runs"], table)


def restored(args, row, subject="bix", seed=0):
    """A row's model, fine-tuned where the row says so, and its run's arguments. Raises ValueError where it wasn't run."""
    model, run = prepare(args, row, SUBJECTS[row], subject, seed)
    if run.steps:
        if not (run.out / "state.pt").exists():
            raise ValueError(f"no '{row}' of {subject} in out/; first run tables.py subjects --subjects {subject} without --log")
        model.load_state_dict(load(run.out / "state.pt", "fine-tuning")["trained"], strict=False)
    return model.eval(), run


def draw_samples(args):
    """A column for each method, a row for each prompt."""
    rows = ["the base", "full precision", "untuned, 4 bits", "PEQA, 4 bits", MINE, "LoRA r = 2, packed base, 4 bits"]
    _, axes = plt.subplots(1, len(rows), figsize=(8, 9))
    for axis, row in zip(axes, rows):
        model, run = restored(args, row)
        picture = toy.to_grid(train.evaluate(model, None, run)[0][::train.EACH], 1)
        axis.imshow(picture), axis.set_title(row.replace(", ", "\n"), fontsize=8), axis.set_xticks([]), axis.set_yticks([])
    places = (torch.arange(len(train.PROMPTS)) + 0.5) * picture.height / len(train.PROMPTS)
    axes[0].set_yticks(places, [prompt.replace(" and", "\nand").replace(" on", "\non") for prompt in train.PROMPTS], fontsize=8)


def explained(w, dw, rounds=50):
    """How scales explain the change dw of weights w, both (O, I, K): for each kernel's own scale, s_out alone, and
    s_out x s_in, the relative change (O, I) nearest to dw (least squares) and the share of dw's variance that it explains."""
    ww, wd = w.square().sum(2), (w * dw).sum(2)
    target, s_in = ww + wd, torch.ones_like(w[:1, :, 0])
    changes = [wd / ww, (wd.sum(1, True) / ww.sum(1, True)).expand_as(ww)]
    for _ in range(rounds):
        s_out = (target * s_in).sum(1, True) / (ww * s_in.square()).sum(1, True)
        s_in = (target * s_out).sum(0, True) / (ww * s_out.square()).sum(0, True)
    changes.append(s_out * s_in - 1)
    return [(change, 1 - (dw - change[..., None] * w).square().sum() / dw.square().sum()) for change in changes]


def draw_weights(args, name="middle.0.conv1"):
    """What full fine-tuning does to a layer, and what of it scales can express."""
    before, after = (restored(args, row)[0].state_dict() for row in ("the base", "full precision"))
    layers = {key: explained(w.flatten(2), (after[key] - w).flatten(2)) for key, w in before.items() if w.shape[2:] == (3, 3)}
    figure, axes = plt.subplots(1, 3, figsize=(12, 4), layout="constrained")
    for axis, what, (change, share), *all_shares in zip(axes, ("each kernel's best scale", "s_out alone", "s_out x s_in"),
                                                       layers[name + ".weight"], *layers.values()):
        shares = torch.tensor([share for _, share in all_shares])
        shown = axis.imshow(change, cmap="RdBu", vmin=-0.2, vmax=0.2)
        axis.set_title(f"{what}: {share:.1%} of the change\n(3x3 convolutions: median {shares.median():.1%})", fontsize=10)
        axis.set_xlabel("input channel"), axis.set_ylabel("output channel")
    figure.colorbar(shown, ax=axes, label="relative change")


def draw_losses(args, bins=25, each=40):
    """Loss by timestep on the subject, in new places and before new backgrounds."""
    parts, generator = toy.read_parts(BASE.parent / "subjects" / "bix"), torch.Generator().manual_seed(1)
    n, sprite = bins * each, int((toy.sprites()[2] == parts).all(1).nonzero())
    spots, ground = (torch.randint(high, (n,), generator=generator) for high in (len(toy.SPOTS), len(toy.backgrounds())))
    x0 = toy.render(ground, [(torch.full((n,), sprite), *torch.tensor(toy.SPOTS)[spots].T)])
    words = torch.tensor([toy.caption(f"sks creature on {' '.join(w)}") for w in product(toy.COLORS, toy.PATTERNS)])[ground]
    t = (torch.arange(bins).repeat_interleave(each) + 0.5).mul(DIFFUSION.T / bins).long()
    _, axis = plt.subplots(figsize=(6.5, 3.5))
    for row in ("the base", "untuned, 4 bits", "PEQA, 4 bits", MINE, "full precision"):
        loss = losses(restored(args, row)[0], x0, words, t, generator.manual_seed(2))
        axis.semilogy(t[::each], loss.view(bins, each).mean(1), label=row)
    axis.set_xlabel("timestep"), axis.set_ylabel("squared error of v"), axis.legend(fontsize=8)


def draw_bytes(args):
    """The bytes of a subject against its fidelity, a line for each method."""
    (_, axis), methods = plt.subplots(figsize=(6.5, 4)), {}
    for row in SUBJECTS:
        if (runs := lines(args, row=row)) and runs[0]["trained"]:
            sd, parts = torch.std_mean(torch.tensor([run["parts"] for run in runs]), correction=0)
            methods.setdefault(re.sub(", . bits", "", row), []).append((runs[0]["bytes"] + runs[0]["base bytes"], parts, sd))
    for name, points in methods.items():
        axis.errorbar(*zip(*sorted(points)), fmt="o-", capsize=2, label=name)
    axis.set(xscale="log", xlabel="the base and one subject, MB (from left: 2, 3, 4, 8 bits)", ylabel="parts right")
    axis.set_xticks([1e6, 2e6, 5e6, 1e7], ["1", "2", "5", "10"]), axis.legend(fontsize=8, loc="lower right")


def draw_denoising(args, steps=12):
    """One picture step by step: what the model sees and what it expects, with the bucket whose scales did it."""
    model, seen = restored(args, "TuneQDM, N = 2, 4 bits")[0], []
    model.register_forward_hook(lambda _, inputs, v: seen.append((inputs[0], inputs[1], DIFFUSION.to_x0_eps(v, *inputs[:2])[0])))
    sample(model, torch.tensor([toy.caption("sks creature on blue stripes")]), steps, cfg_scale=1, packed=True)
    _, axes = plt.subplots(2, steps, figsize=(steps, 2.4))
    for (x, t, x0), column in zip(seen, axes.T):
        n = int(bucket(t, model.quant_config["num_buckets"], DIFFUSION.T))
        for axis, image in zip(column, (x, x0)):
            axis.imshow(toy.to_grid(image, 1)), axis.set_xticks([]), axis.set_yticks([])
            axis.spines[:].set(color=f"C{n}", linewidth=3)
        column[0].set_title(f"t = {int(t)}\nbucket {n}", fontsize=8)
    axes[0, 0].set_ylabel("x_t", fontsize=8), axes[1, 0].set_ylabel("its x0", fontsize=8)


def figures(args):
    """Draw figures/*.png from the runs of the table of subjects."""
    for draw in (draw_samples, draw_weights, draw_losses, draw_bytes, draw_denoising):
        path = (Path("out", args.log.stem) if args.quick else BASE.parents[1] / "figures") / f"{draw.__name__[5:]}.png"
        draw(args)
        save(plt.gcf(), path, lambda figure, file: figure.savefig(file, format="png", dpi=80, bbox_inches="tight"))
        print(f"wrote {path}: {draw.__doc__}")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    tables = {table.__name__: table for table in (base, subjects, several, recovery, ablations, figures)}
    parser.add_argument("table", nargs="*", choices=tables, help="default: all, in this order")
    parser.add_argument("--subjects", nargs="+", choices=toy.TABLE, help="those to run now (default: all six)")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run now (default: all)")
    parser.number("--seeds", int, 1, 1000, 1, "runs of each subject with each method")
    parser.add_argument("--log", type=Path, help="the file of finished runs (default: out/tables.jsonl, or out/quick.jsonl)")
    parser.add_argument("--write", action="store_true", help="put the tables into README.md, too")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the steps, two subjects")
    args = parser.parse_args()
    args.log = args.log or Path("out", "quick.jsonl" if args.quick else "tables.jsonl")
    args.less, args.subjects = 20 if args.quick else 1, args.subjects or toy.TABLE[:2 if args.quick else 6]
    args.log.parent.mkdir(parents=True, exist_ok=True)
    for table in args.table or tables:
        tables[table](args)


if __name__ == "__main__":
    guard(main)

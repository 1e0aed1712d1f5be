"""The README's tables and figures: python tables.py base | calibration | subjects | several | recovery | ablations | figures

Each finished run is a line of out/tables.jsonl, and what is there is not run again: stop and go on as you like, in several
processes if you like (--rows and --subjects choose). No table has the subjects that the defaults were tuned on.
"""
import contextlib
import io
import json
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from unittest import mock

import torch

import train
from bench import lora_packed
from data import toy
from model import Diffusion
from quant import CALIBRATIONS, adapter, deltas, quantize
from sample import BASE, Parser, guard, load_model, sample

DIFFUSION = Diffusion()
WIDTHS = (4, 3, 2, 8)
MINE = "TuneQDM, N = 1, 4 bits"  # the row of train.py's defaults
SUBJECTS = {"the base": "--bits 32 --steps 0", "full precision": "--bits 32",
            **{f"{name}, {bits} bits": f"--bits {bits} {flags}" for bits in WIDTHS for name, flags in {
                "untuned": "--steps 0", "PEQA": "--scales out", "PEQA + TAS, N = 2": "--scales out --buckets 2",
                "TuneQDM, N = 1": "", "TuneQDM, N = 2": "--buckets 2", "TuneQDM, N = 4": "--buckets 4",
                "LoRA r = 2, packed base": "--lr 0.003"}.items()}}
ABLATIONS = {MINE: "", "TuneQDM, N = 2, 4 bits": "--buckets 2", "TuneQDM, N = 4, 4 bits": "--buckets 4", "N = 8": "--buckets 8",
             "N = 4, edges even in log-SNR": "--buckets 4", "calibration: mse": "--calibration mse",
             "calibration: minmax": "--calibration minmax", "raw scales, lr 3e-6": "--lr 3e-6",
             "raw scales, lr 3e-4": "--lr 3e-4", "raw scales, lr 3e-3": "--lr 3e-3", "lr 0.01": "--lr 0.01",
             "lr 0.1": "--lr 0.1", "500 steps": "--steps 500", "2000 steps": "--steps 2000", "prior weight 0": "--prior 0",
             "prior weight 1": "--prior 1", "prior weight 3": "--prior 3"}
SEVERAL = {f"{name}, together": f"{flags} --steps 2000" for name, flags in {
    "full precision": "--bits 32", "PEQA, 4 bits": "--scales out", "TuneQDM, N = 1, 4 bits": "",
    "TuneQDM, N = 2, 4 bits": "--buckets 2"}.items()}
TOGETHER = ["bix+fen", "gil+luz", "ori+tam", "bix+fen+gil", "luz+ori+tam"]
SCORES = {"parts": "parts right", "identity": "whole subject", "both parts": "parts, both in one picture",
          "both identity": "both whole", "prompt": "prompt right", "drift": "in other creatures"}


def once(args, key, measure):
    """The line of the log that has this key; measured and appended where there is none."""
    for line in lines(args):
        if key.items() <= line.items():
            return line
    line = {**key, **measure()}
    with args.log.open("a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def lines(args):
    return [json.loads(line) for line in args.log.read_text().splitlines()] if args.log.exists() else []


def size(obj):
    """Bytes of obj in a file."""
    torch.save(obj, file := io.BytesIO())
    return file.tell()


def print_table(*rows):
    for i, row in enumerate(rows):
        print(f"| {' | '.join(row)} |" + ("\n|" + "---|" * len(row)) * (i == 0))


def mean_sd(values):
    values = torch.tensor(values)
    return f"{values.mean():.2f} ± {values.std(correction=0):.2f}"


@torch.no_grad()
def losses(model, x0, words, t, seed=12345):
    """Squared error of v for each of x0 (N, 3, 16, 16) at t (N,), with fixed noise: (N,)."""
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(seed))
    parts = zip(*(a.split(128) for a in (x0.contiguous(memory_format=torch.channels_last), words, t, eps)))
    return torch.cat([DIFFUSION.loss(model, *part) for part in parts])


def validation_loss(model, n=1024, seed=12345):
    """Mean squared error of v on n fixed scenes, timesteps and noises."""
    generator = torch.Generator().manual_seed(seed)
    x0, words = toy.sample_scenes(n, generator)
    return losses(model, x0, words, train.timesteps(n, DIFFUSION.T, generator), seed).mean().item()


class RawAdam(torch.optim.Adam):
    """Adam on the scales s = s0 * exp(d) themselves, which are kept positive, and not on their deltas d: as the paper."""

    def __init__(self, params, s0, **kwargs):
        super().__init__(params, **kwargs)
        self.s0 = s0

    @torch.no_grad()
    def step(self):
        deltas = self.param_groups[0]["params"]
        for d, s0 in zip(deltas, self.s0):
            d.copy_(s0 * d.exp())
            d.grad /= d  # dL/ds = dL/dd / s
        super().step()
        for d, s0 in zip(deltas, self.s0):
            d.copy_((d / s0).clamp(min=1e-3).log())


def log_snr_bucket(t, num_buckets, T):
    """The interval of t where the N intervals are equal in log(abar / (1 - abar)), and not in t."""
    log_snr = (DIFFUSION.alphas_cumprod / (1 - DIFFUSION.alphas_cumprod)).log()
    edges = torch.linspace(log_snr[0], log_snr[-1], num_buckets + 1, dtype=log_snr.dtype)[1:-1]
    return (log_snr[torch.as_tensor(t)][..., None] < edges).sum(-1)


@contextlib.contextmanager
def variant(row, model):
    """What an ablation changes that is no flag of train.py."""
    with contextlib.ExitStack() as stack:
        if row.startswith("raw scales"):
            names = [name.rsplit(".", 2) for name in deltas(model)]
            s0 = [getattr(model.get_submodule(layer), delta.replace("d_", "s_")) for layer, delta, _ in names]
            stack.enter_context(mock.patch("torch.optim.Adam", partial(RawAdam, s0=s0)))
        if "log-SNR" in row:
            for module in ("quant", "train", "sample"):
                stack.enter_context(mock.patch(f"{module}.bucket", log_snr_bucket))
        yield


def prepare(args, row, flags, subject, seed):
    """The model of a row before its fine-tuning, and its run's arguments."""
    out = str(args.log.with_suffix("") / f"{row} {subject} {seed}".replace(", ", " ").replace(" ", "-"))
    run = train.arguments([*flags.split(), "--seed", str(seed), "--out", out])
    run.steps, run.sample_steps = run.steps // args.less, run.sample_steps // args.less
    model = load_model(BASE, run.device)
    if row.startswith("LoRA"):
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
    rest = {name: value for name, value in model.state_dict().items() if name not in trained}
    mine = {"kind": "adapter", **adapter(model)} if trained.keys() == deltas(model).keys() else trained
    return {"trained": sum(p.numel() for p in trained.values()), "bytes": size(mine) if trained else 0,
            "base bytes": size(rest), **scores}


def measure(model, parts, run):
    """Exact scores for each word of parts, its subject's parts: alone, two in one picture, and in red creatures."""
    found = [train.evaluate(model, mine, run, word)[1] for word, mine in parts.items()]
    for i, (a, b) in enumerate(zip(parts, list(parts)[1:])):
        words = torch.tensor([toy.caption(f"{a} creature and {b} creature {prompt[prompt.index('on '):]}")
                              for prompt in train.PROMPTS for _ in range(train.EACH)])
        images = sample(model, words, run.sample_steps, seed=run.seed + 1 + i)
        for word in (a, b):
            scores = toy.score(images, words, parts[word], toy.WORD[word])
            found.append({f"both {key}": scores[key].mean().item() for key in ("parts", "identity")})
    words = torch.tensor([toy.caption("red creature")] * 40)
    images = sample(model, words, run.sample_steps, seed=run.seed)
    found += [{"drift": toy.score(images, words, mine, toy.WORD["red"])["parts"].mean().item()} for mine in parts.values()]
    return {key: sum(f[key] for f in found if key in f) / sum(key in f for f in found) for key in SCORES
            if any(key in f for f in found)}


def fill(args, rows, subjects):
    """Do what is not yet done of rows x subjects x seeds, and print the rows with means and standard deviations."""
    for seed in range(args.seeds):
        for row, flags in rows.items():
            for subject in subjects:
                if any(fnmatch(row, pattern) for pattern in args.rows) and set(subject.split("+")) <= set(args.subjects):
                    key = {"row": row, "subject": subject, "seed": seed}
                    once(args, key, partial(tune, args, row, flags, subject, seed))
    runs = {row: {(run["subject"], run["seed"]): run for run in lines(args) if run.get("row") == row
                  and run["subject"] in subjects} for row in rows}
    runs = {row: found for row, found in runs.items() if found}
    columns = [key for key in SCORES if all(key in run for found in runs.values() for run in found.values())]
    table = [["method", "trained", "adapter bytes", *(SCORES[key] for key in columns), "runs"]]
    for row, found in runs.items():
        one = next(iter(found.values()))
        scores = [mean_sd([run[key] for run in found.values()]) for key in columns]
        table.append([row, f"{one['trained']:,}", f"{one['bytes']:,}", *scores, str(len(found))])
    print_table(*table)
    return runs


def differences(runs, pairs, keys=("parts", "identity")):
    """Print the mean and the standard deviation of differences, subject by subject and seed by seed."""
    print()
    for a, b in pairs:
        shared = runs.get(a, {}).keys() & runs.get(b, {}).keys()
        if shared:
            what = ", ".join(f"{SCORES[key]} {mean_sd([runs[a][k][key] - runs[b][k][key] for k in shared])}" for key in keys)
            print(f"{a} - {b}: {what} ({len(shared)} pairs)")


def base(args):
    """What the shipped base draws, and how much of it is right."""
    train.score_base(load_model(BASE), seed=0)


def calibration(args):
    """Validation loss of the base after quantization, before any tuning."""
    rows = [["32", f"{validation_loss(load_model(BASE)):.5f}", *("",) * (len(CALIBRATIONS) - 1)]]
    for bits in sorted(WIDTHS, reverse=True):
        rows.append([str(bits), *(f"{validation_loss(quantize(load_model(BASE), bits, calibration=name)):.5f}"
                                  for name in CALIBRATIONS)])
    print_table(["bits", *CALIBRATIONS], *rows)


def subjects(args):
    """Fine-tune to one subject."""
    runs = fill(args, SUBJECTS, toy.TABLE)
    mine = [f"TuneQDM, N = {n}, {bits} bits" for bits in WIDTHS for n in (1, 2, 4)]
    differences(runs, [(row, "full precision") for row in mine] +
                [(row, f"PEQA, {row.split(', ')[-1]}") for row in mine])


def several(args):
    """Fine-tune to two and to three subjects at once."""
    for n, title in ((2, "two subjects"), (3, "three subjects")):
        print(f"\n{title}")
        runs = fill(args, SEVERAL, [names for names in TOGETHER if names.count("+") == n - 1])
        differences(runs, [(row, "full precision, together") for row in list(SEVERAL)[2:]], list(SCORES)[:4])


def ablations(args):
    """Fine-tune with one thing changed."""
    runs = fill(args, ABLATIONS, toy.TABLE)
    differences(runs, [(row, MINE) for row in list(ABLATIONS)[1:]])


def recover(bits, name, steps, seed=0, lr=0.003):
    """Quantize the base, tune its scales (32: all of it) on the pretraining set; validation loss before and after."""
    model = load_model(BASE)
    if bits < 32:
        quantize(model, bits, calibration=name)
    before, generator = validation_loss(model), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr if bits < 32 else lr / 10)
    for step in train.tqdm(range(steps), f"{bits} bits, {name}"):
        optimizer.param_groups[0]["lr"] *= 1 if step == 0 else (steps - step) / (steps - step + 1)  # linearly to zero
        x0, words = toy.sample_scenes(64, generator)
        t, eps = train.timesteps(64, DIFFUSION.T, generator), torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        DIFFUSION.loss(model, x0.contiguous(memory_format=torch.channels_last), words, t, eps).mean().backward()
        optimizer.step()
    return {"before": before, "after": validation_loss(model)}


def recovery(args):
    """Tune scales on the pretraining set: how much of the quantization gap is recovered?"""
    steps, rows = 500 // args.less, []
    goal = once(args, {"recovery": 32, "calibration": ""}, partial(recover, 32, "", steps))
    for bits in sorted(WIDTHS, reverse=True):
        for name in CALIBRATIONS:
            run = once(args, {"recovery": bits, "calibration": name}, partial(recover, bits, name, steps))
            share = (run["before"] - run["after"]) / (run["before"] - goal["before"])
            rows.append([str(bits), name, f"{run['before']:.5f}", f"{run['after']:.5f}", f"{share:.0%}"])
    print_table(["bits", "calibration", "quantized", "tuned", "recovered"],
                ["32", "", f"{goal['before']:.5f}", f"{goal['after']:.5f}", ""], *rows)


def main():
    parser, tables = Parser(description=__doc__.split("\n")[0]), (base, calibration, subjects, several, recovery, ablations)
    parser.add_argument("table", choices=[table.__name__ for table in tables])
    parser.add_argument("--subjects", nargs="+", choices=toy.TABLE, default=toy.TABLE, help="those to run now (default: all)")
    parser.add_argument("--rows", nargs="+", default=["*"], help="patterns of the rows to run now (default: all)")
    parser.number("--seeds", int, 1, 1000, 1, "runs of each subject with each method")
    parser.add_argument("--quick", action="store_true", help="two subjects and a tenth of the steps: does it work? Kept in out/quick.jsonl")
    args = parser.parse_args()
    args.log, args.less = Path("out/tables.jsonl"), 1
    if args.quick:
        args.log, args.less, args.subjects = Path("out/quick.jsonl"), 10, toy.TABLE[:2]
    args.log.parent.mkdir(exist_ok=True)
    {table.__name__: table for table in tables}[args.table](args)


if __name__ == "__main__":
    guard(main)

"""The README's tables: python tables.py base | calibration | subjects

Each finished run is a line of out/tables.jsonl, and what is there is not run again: stop and go on as you like. The
subjects of a table are never those that the defaults were tuned on.
"""
import json
from pathlib import Path

import torch

import train
from data import toy
from model import Diffusion
from quant import CALIBRATIONS, deltas, quantize
from sample import BASE, Parser, guard, load_model

LOG = Path("out/tables.jsonl")
METHODS = {"untuned, 4 bits": ["--steps", "0"], "TuneQDM, 4 bits": ["--bits", "4"],
           "PEQA, 4 bits": ["--bits", "4", "--scales", "out"], "full precision": ["--bits", "32"],
           **{f"TuneQDM, {bits} bits": ["--bits", str(bits)] for bits in (3, 2, 8)}}


@torch.no_grad()
def validation_loss(model, n=1024, seed=12345):
    """Mean squared error of v on n fixed scenes, timesteps and noises."""
    generator, diffusion = torch.Generator().manual_seed(seed), Diffusion()
    x0, words = toy.sample_scenes(n, generator)
    t, eps = train.timesteps(n, diffusion.T, generator), torch.randn(x0.shape, generator=generator)
    parts = zip(*(a.split(128) for a in (x0.contiguous(memory_format=torch.channels_last), words, t, eps)))
    return torch.cat([diffusion.loss(model, *part) for part in parts]).mean().item()


def base(args):
    """What the shipped base draws, and how much of it is right."""
    train.score_base(load_model(BASE), seed=0)


def calibration(args):
    """Validation loss of the base after quantization, before any tuning."""
    print(f"| bits | {' | '.join(CALIBRATIONS)} |\n|---|{'---|' * len(CALIBRATIONS)}")
    print(f"| 32 | {validation_loss(load_model(BASE)):.5f} |" + " |" * (len(CALIBRATIONS) - 1))
    for bits in (8, 4, 3, 2):
        losses = [validation_loss(quantize(load_model(BASE), bits, calibration=name)) for name in CALIBRATIONS]
        print(f"| {bits} | {' | '.join(f'{loss:.5f}' for loss in losses)} |")


def subjects(args):
    """Fine-tune to each table subject with each method, then print means and standard deviations over subjects and seeds."""
    LOG.parent.mkdir(exist_ok=True)
    done = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.exists() else []
    for method, flags in METHODS.items():
        for seed in range(args.seeds):
            for subject in args.subjects:
                key = {"method": method, "subject": subject, "seed": seed}
                if any(key.items() <= run.items() for run in done):
                    continue
                out = f"out/tables/{method}-{subject}-{seed}".replace(", ", "-").replace(" ", "-")
                run = train.arguments([*flags, "--subject", subject, "--seed", str(seed), "--out", out])
                folder, model = BASE.parent / "subjects" / subject, load_model(BASE, run.device)
                if run.bits < 32:
                    quantize(model, run.bits, run.buckets, Diffusion().T, run.scales, run.calibration)
                run.out.mkdir(parents=True, exist_ok=True)
                train.finetune(model, run, *toy.load_subject(folder))
                scores = train.evaluate(model, toy.read_parts(folder), run)[1]
                trained = sum(delta.numel() for delta in deltas(model).values()) or sum(p.numel() for p in model.parameters())
                done.append({**key, "trained": trained, **scores})
                with LOG.open("a") as file:
                    file.write(json.dumps(done[-1]) + "\n")
    print("| method | trained | parts right | whole subject | prompt right | runs |\n|---|---|---|---|---|---|")
    for method in METHODS:
        runs = [run for run in done if run["method"] == method]
        if runs:
            cells = [torch.tensor([run[key] for run in runs]) for key in ("parts", "identity", "prompt")]
            cells = [f"{cell.mean():.2f} ± {cell.std(correction=0):.2f}" for cell in cells]
            print(f"| {method} | {runs[0]['trained']:,} | {' | '.join(cells)} | {len(runs)} |")


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("base", "calibration", "subjects"))
    parser.add_argument("--subjects", nargs="+", choices=toy.TABLE, default=toy.TABLE)
    parser.number("--seeds", int, 1, 1000, 1, "runs of each subject with each method")
    args = parser.parse_args()
    {"base": base, "calibration": calibration, "subjects": subjects}[args.table](args)


if __name__ == "__main__":
    guard(main)

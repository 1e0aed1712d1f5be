"""Make the base, a float UNet that knows the toy world: python pretrain.py

A step took 0.26 s on two cores of an AMD EPYC (Zen 5), so the default would take about an hour and
a half. The base that ships, data/base.pt, was made by three such runs, each resumed from the one
before, with changes in between: see experiments/RESULTS.md.
"""

import copy
from pathlib import Path

import torch

from data import toy
from data.score import matches, score
from model import Diffusion, UNet
from sample import load_model, sample
from support.files import save
from support.flags import Parser, guard, number, path
from support.runs import Run

# Timesteps in the middle, where the details of a creature are decided, are drawn twice as often.
FOCUS = 0.5


def arguments(argv=None):
    """The flags."""
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--steps", type=number(0, 10**7), default=20000, help="optimizer steps")
    add("--lr", type=number(0.0, 10.0), default=2e-3, help="learning rate")
    add("--batch", type=number(1, 4096), default=64, help="images in a step of each process")
    add("--out", type=path, default=Path("out/pretrain"), help="folder to write")
    parser.add_training()
    return parser.parse_args(argv)


def learning_rate(args, step):
    """A warm-up of 100 steps, then constant, then linear decay to zero over the last third."""
    warm_up = (step + 1) / 100
    cool_down = (args.steps - step) / (args.steps / 3)
    return args.lr * min(1, warm_up, cool_down)


def pretrain(args, run):
    """Train a UNet on scenes of the toy world. Returns the moving average (EMA) of its weights."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    diffusion = Diffusion()
    model = UNet(vocab=len(toy.VOCAB), slots=toy.SLOTS)
    model = model.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    moved = {}
    for name, weights in {"model": model, "ema": ema}.items():
        for key, value in weights.state_dict().items():
            moved[f"{name}.{key}"] = value

    # a CPU gains little by bfloat16, and one without instructions for it takes far longer
    bfloat16 = torch.autocast(args.device, torch.bfloat16, enabled=args.device == "cuda")
    net = run.prepare(model)
    # fmt: off
    for step in run.steps(optimizer, generator, moved):
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)

        n = args.batch * run.processes    # all processes draw the same, and take their shares
        x0, words = toy.sample_scenes(n, generator)                         # (N, 3, 16, 16), (N, L)
        t = diffusion.draw_timesteps(n, generator, FOCUS)                   # (N,)
        eps = torch.randn(x0.shape, generator=generator)                    # (N, 3, 16, 16)
        x0, words, t, eps = run.share((x0, words, t, eps))

        x_t = diffusion.q_sample(x0, t, eps)
        with bfloat16:
            v = net(x_t, t, words)                                          # (N, 3, 16, 16)
        error = diffusion.squared_error(v, x0, t, eps)                      # (N,)
        run.watch(error, t, diffusion.T)

        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
    # fmt: on
    return ema


@torch.no_grad()
def update_ema(ema, model, step):
    """Move the moving average by 9 / (step + 10) of the way to the model, but at least 0.001."""
    decay = min(0.999, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)


def score_base(model, seed, n=200):
    """Print which shares of n images of plain shapes, and of n of creatures, are right."""
    for kind, (as_said, whole) in rate_base(model, seed, n).items():
        print(
            f"{n} {kind}: {as_said:.1%} show all that the caption says; "
            f"{whole:.1%} match a scene of the world, pixel by pixel"
        )


def rate_base(model, seed, n):
    """Draw n images of plain shapes and n of creatures: {kind: two shares of the n}.

    The shares are of images that show all that the caption says, and of those that match a scene of
    the world, pixel by pixel.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    kinds = {"plain images": list(toy.SHAPES), "creatures": ["creature"]}
    shares = {}
    for kind, shapes in kinds.items():
        words = torch.tensor([toy.caption(random_prompt(shapes, generator)) for _ in range(n)])
        images = sample(model, words, seed=seed, progress=True)
        as_said = (score(images, words)["prompt"] == 1).sum().item()
        whole = matches(images).sum().item()
        shares[kind] = (as_said / n, whole / n)
    return shares


def random_prompt(shapes, generator):
    """A prompt such as "red circle on green stripes", its shape one of shapes."""

    def pick(options):
        return options[int(torch.randint(len(options), (1,), generator=generator))]

    colors = list(toy.COLORS)
    color = pick(colors)
    shape = pick(shapes)
    background = pick(colors)
    return f"{color} {shape} on {background} {pick(toy.PATTERNS)}"


def main():
    args = arguments()
    run = Run(args, "pretraining", free=["steps"])  # more steps may follow
    ema = pretrain(args, run)
    if not run.is_first:
        return
    base = {
        "kind": "model",
        "config": ema.config,
        "step": args.steps,
        "seed": args.seed,
        "model": {name: value.half() for name, value in ema.state_dict().items()},
    }
    file = args.out / "base.pt"
    save(base, file)
    score_base(load_model(file, args.device), args.seed)
    print(f"wrote {file}; use it with python train.py --base {file}")


if __name__ == "__main__":
    guard(main)

"""Make the base, a float UNet that knows the toy world: python pretrain.py

It takes hours on a CPU. The base that ships, data/base.pt, was made by three such runs, each
resumed from the one before, with changes in between: see experiments/RESULTS.md.
"""

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import copy
from pathlib import Path

import torch

from data import toy
from data.score import matches, score
from model import Diffusion, UNet
from runtime import (
    RANK,
    WORLD_SIZE,
    Loop,
    Parser,
    claim,
    command,
    guard,
    load_model,
    load_state,
    my_share,
    parallel,
    restore,
    save,
    state_after,
    use_device,
)
from sample import sample

# Timesteps in the middle, where the details of a creature are decided, are drawn twice as often.
FOCUS = 0.5


def arguments(argv=None):
    """The flags."""
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_run_flags(
        steps=20000,
        lr=2e-3,
        lr_help="learning rate",
        batch=64,
        batch_help="images in a step of each process",
        out_help="folder to write (default: out/pretrain)",
    )
    args = parser.parse_run(argv)
    args.out = args.out or Path("out") / "pretrain"
    return args


def learning_rate(args, step):
    """A warm-up of 100 steps, then constant, then linear decay to zero over the last third."""
    warm_up = (step + 1) / 100
    cool_down = (args.steps - step) / (args.steps / 3)
    return args.lr * min(1, warm_up, cool_down)


def pretrain(args):
    """Train a UNet on scenes of the toy world.

    Writes to args.out: base.pt, the moving average (EMA) of its weights, as float16, and state.pt.
    """
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    diffusion = Diffusion()
    model = UNet(vocab=len(toy.VOCAB), slots=toy.SLOTS)
    model = model.to(args.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01
    )
    first = 0
    if args.resume:
        state = load_state(args, "pretraining", may_differ=("steps",))  # more steps may follow
        weights = {"model": model.state_dict(), "ema": ema.state_dict()}
        first = restore(state, args, optimizer, generator, **weights)

    def save_base(step):
        base = {
            "kind": "model",
            "config": model.config,
            "step": step,
            "seed": args.seed,
            "model": {name: value.half() for name, value in ema.state_dict().items()},
        }
        save(base, args.out / "base.pt")

    def save_state(step):
        weights = {"model": model.state_dict(), "ema": ema.state_dict()}
        state = state_after(step, args, optimizer, generator, kind="pretraining", **weights)
        # in this order: if the run is killed between the two, the steps after the old state are
        # done again, and base.pt is made again
        save_base(step)
        save(state, args.out / "state.pt")

    net = parallel(model, args)
    trained = [*model.parameters(), *ema.parameters()]
    loop = Loop("pretraining", args, first, diffusion.T, trained, save_state)
    # fmt: off
    for step in loop:
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)

        x0, words = toy.sample_scenes(args.batch * WORLD_SIZE, generator)   # (N, 3, 16, 16), (N, L)
        t = diffusion.draw_timesteps(len(x0), generator, FOCUS)             # (N,)
        eps = torch.randn(x0.shape, generator=generator)                    # (N, 3, 16, 16)
        x0, words, t, eps = my_share((x0, words, t, eps), args)

        x_t = diffusion.q_sample(x0, t, eps)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            v = net(x_t, t, words)                                          # (N, 3, 16, 16)
        error = diffusion.squared_error(v, x0, t, eps)                      # (N,)
        loop.watch(error, t)

        optimizer.zero_grad()
        error.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_ema(ema, model, step)
    # fmt: on
    if first >= args.steps and RANK == 0:
        save_base(first)  # no step was left to do; base.pt may be newer than the state, or gone


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
    use_device(args.device)
    with claim(args.out):
        pretrain(args)
        if RANK == 0:
            path = args.out / "base.pt"
            score_base(load_model(path, args.device), args.seed)
            print(f"wrote {path}; use it with {command('train.py', '--base', path)}")


if __name__ == "__main__":
    guard(main)

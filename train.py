"""Fine-tune a quantized diffusion model to a subject: python train.py --bits 4

The stages, in order: load the base (or make it: --pretrain), quantize it, fine-tune its scales to pictures of a subject
with prior preservation (DreamBooth, Ruiz et al. 2023), save, sample, score.
"""
import copy
import importlib
import os
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data import toy
from model import Diffusion, UNet, load, save, size
from quant import CALIBRATIONS, QuantLayer, adapter, bucket, deltas, load_adapter, quantize, remember
from sample import BASE, Parser, guard, load_model, sample

fcntl = importlib.import_module("fcntl") if os.name == "posix" else None  # locks; Windows has no such module
WORD = "sks"  # the rare word that becomes the subject's name
PROMPTS = ("sks creature on blue stripes", "sks creature on plain purple", "sks creature left on blue checks",  # none is
           "sks creature right on yellow stripes", "sks creature middle on plain cyan", "sks creature on plain pink",  # a shipped
           "sks creature and red circle on plain green", "sks creature and yellow square on blue stripes")  # subject's own
EACH = 5  # pictures of each prompt that are scored
SAVE = 200  # steps between two states saved, to --resume from
RANK, WORLD = (int(os.environ.get(key, default)) for key, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # set by torchrun


def claim(folder):
    """Make folder, and a file in it that stays locked until it is closed. Raises ValueError where another run holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    try:
        RANK or fcntl and fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing to {folder}; wait for it, or choose another --out") from None
    return file


def parallel(model, args):
    """What to train: model, or where torchrun started several processes, model with the average of their gradients."""
    net = torch.compile(model) if args.compile else model
    if WORLD == 1:
        return net
    mine, frozen = deltas(model), [layer.shape for layer in model.modules() if isinstance(layer, QuantLayer)]
    whole = sum(shape.numel() for shape in (*frozen, *(p.shape for name, p in model.named_parameters() if name not in mine)))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    RANK or print(f"{WORLD} processes average {4 * trained:,} bytes a step; full fine-tuning {4 * whole:,}", flush=True)
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    return DistributedDataParallel(net, forward_sync_buffers=False, find_unused_parameters=True)  # of buckets that no one drew


def share(args, parts, *batch):
    """This process's share of each of the parts of a batch's tensors, of which all processes make the whole."""
    x0, *rest = (a.unflatten(0, (parts, -1))[:, RANK::WORLD].flatten(0, 1).to(args.device) for a in batch)
    return x0.to(memory_format=torch.channels_last), *rest


def timesteps(n, T, generator, focus=0.0):
    """n random timesteps in 0 .. T - 1, evenly spread and in rising order; focus, below 1, draws them to the middle, where
    a picture's details are decided: they are 1 / (1 - focus) times as dense there."""
    u = (torch.arange(n) + torch.rand(1, generator=generator)) / n
    return ((u + focus * (2 * torch.pi * u).sin() / (2 * torch.pi)) * T).long().clamp(max=T - 1)  # u may round to 1


def steps(title, args, first, write):
    """The steps first to args.steps and a progress bar; write(step) saves a state now and then, at the end, and on Ctrl-C,
    which waits for the step to be whole and then exits with 130."""
    stop, old = [], signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.SIG_IGN if RANK else lambda *_: stop.append(True))  # RANK 0 decides, and saves
    try:
        for step in (bar := tqdm(range(first, args.steps), title, initial=first, total=args.steps, disable=RANK > 0)):
            yield step, bar
            if RANK == 0 and (stop or (step + 1) % SAVE == 0 or step + 1 == args.steps):
                write(step + 1)
            if stop and step + 1 < args.steps:
                bar.close()
                print(f"stopped after step {step + 1} of {args.steps}, saved in {args.out / 'state.pt'}; go on with --resume")
                sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, old)


def describe(args):
    """What a run must share with the one that it resumes."""
    return {k: str(v) for k, v in vars(args).items() if k not in "resume out device sample_steps compile checkpoint".split()}


def resumed(args, kind):
    """The last state of a run with the same arguments. Raises ValueError where there is none."""
    saved = load(args.out / "state.pt", kind)
    for half in args.out.glob("*.tmp"):  # of a process that was killed while it wrote
        half.unlink()
    was = saved.get("args", {})
    differ = [key for key, value in describe(args).items() if was.get(key) != value]
    if differ and not (args.pretrain and differ == ["steps"]):  # pretraining may go on for longer
        was = " ".join(f"--{key} {was.get(key)}" for key in differ)
        raise ValueError(f"{args.out / 'state.pt'} is of a run with {was}; resume with the same, or choose another --out")
    return saved


def check(loss, b, step, args):
    """Raise ValueError where a loss (N,), of timestep buckets b (N,), is no number; deltas and states are then as they were."""
    if not loss.isfinite().all():
        good = f"{args.out / 'state.pt'} has step {step // SAVE * SAVE}" if step >= SAVE else "no state was saved yet"
        raise ValueError(f"the loss is no longer finite at step {step}, timestep bucket {b[~loss.isfinite()].unique().tolist()}; "
                         f"--lr {args.lr} is too high, lower it ({good})")


def track(bar, averages, b, loss):
    """Show on the bar a running mean of the loss (N,) for each of the timestep buckets b (N,)."""
    for i in b.unique().tolist():
        value = loss[b == i].mean().item()
        averages[i] = value if i not in averages else 0.98 * averages[i] + 0.02 * value
    bar.set_postfix_str("loss by bucket " + " ".join(f"{averages[i]:.4f}" for i in sorted(averages)), refresh=False)


def pretrain(args):
    """Train a float UNet on the toy world; write the weights' moving average to out/base.pt, in half precision."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = UNet(vocab=len(toy.VOCAB), slots=toy.SLOTS).to(args.device, memory_format=torch.channels_last)
    ema, diffusion, averages, first = copy.deepcopy(model), Diffusion(), {}, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01)
    if args.resume:
        saved = resumed(args, "pretraining")
        first = saved["step"]
        model.load_state_dict(saved["model"]), ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"]), generator.set_state(saved["generator"])
    net = parallel(model, args)

    def write(step):
        save({"kind": "pretraining", "step": step, "args": describe(args), "model": model.state_dict(), "ema": ema.state_dict(),
              "optimizer": optimizer.state_dict(), "generator": generator.get_state()}, args.out / "state.pt")
        save({"kind": "model", "config": model.config, "step": step, "seed": args.seed,
              "model": {name: value.half() for name, value in ema.state_dict().items()}}, args.out / "base.pt")

    for step, bar in steps("pretraining", args, first, write):
        for group in optimizer.param_groups:  # warm up, hold, then down to zero over the last third
            group["lr"] = args.lr * min(1, (step + 1) / 100, (args.steps - step) / (args.steps / 3))
        x0, words = toy.sample_scenes(args.batch * WORLD, generator)
        t, eps = timesteps(len(x0), diffusion.T, generator, focus=0.5), torch.randn(x0.shape, generator=generator)
        x0, words, t, eps = share(args, 1, x0, words, t, eps)
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = diffusion.loss(net, x0, words, t, eps)
        check(loss, bucket(t, 4, diffusion.T), step, args)
        optimizer.zero_grad()
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(0.999, (step + 1) / (step + 10)))
        track(bar, averages, bucket(t, 4, diffusion.T), loss.detach())
    if RANK == 0:
        score_base(load_model(args.out / "base.pt", args.device), args.seed)
        print(f"wrote {args.out / 'base.pt'}; use it with --base {args.out / 'base.pt'}")


def score_base(model, seed, n=200):
    """Print how many of n plain pictures are all as their captions say, and how many of n creatures are whole ones."""
    generator = torch.Generator().manual_seed(seed + 1)
    pick = lambda options: options[int(torch.randint(len(options), (1,), generator=generator))]
    scene = lambda shapes: f"{pick(list(toy.COLORS))} {pick(shapes)} on {pick(list(toy.COLORS))} {pick(toy.PATTERNS)}"
    for what, shapes in (("plain pictures", [*toy.SHAPES]), ("creatures", ["creature"])):
        words = torch.tensor([toy.caption(scene(shapes)) for _ in range(n)])
        images = sample(model, words, seed=seed, progress=True)
        right, whole = (toy.score(images, words)["prompt"] == 1).sum(), toy.matches(images).sum()
        print(f"{n} {what}: {right / n:.1%} all as the caption says; {whole / n:.1%} match a scene of the world, pixel by pixel")


def finetune(model, args, instance, captions, saved=None):
    """Train what requires a gradient on instance pictures (M, 3, 16, 16) of the subject, with their captions (M, SLOTS).

    loss = MSE on args.batch instance pictures + args.prior * MSE on args.batch scenes of the toy world, whose creatures
    never bear the subject's word. Words that describe the scene are left out as often as in pretraining.
    saved: the state.pt of a stopped run, to go on from.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator, diffusion, averages, first = torch.Generator().manual_seed(args.seed), Diffusion(), {}, 0
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    drop = toy.DROP * (torch.arange(toy.SLOTS) > 1)  # never the subject's name
    if saved is not None:
        first = saved["step"]
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(saved["trained"][name])
        optimizer.load_state_dict(saved["optimizer"]), generator.set_state(saved["generator"])
    if args.checkpoint:
        told_again = {"context_fn": partial(remember, model)} if args.bits < 32 else {}
        model.call = partial(checkpoint, use_reentrant=False, **told_again)
    net = parallel(model, args)

    def write(step):
        save({"kind": "fine-tuning", "step": step, "args": describe(args), "trained": trained,
              "optimizer": optimizer.state_dict(), "generator": generator.get_state()}, args.out / "state.pt")

    for step, bar in steps("fine-tuning", args, first, write):
        for group in optimizer.param_groups:  # warm up, then down to zero
            group["lr"] = args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)
        x0, words = toy.sample_scenes(args.batch * WORLD, generator, rare=0)
        pick = torch.randint(len(instance), (len(x0),), generator=generator)
        named = captions[pick].masked_fill(torch.rand(len(x0), toy.SLOTS, generator=generator) < drop, 0)
        x0, words = torch.cat([instance[pick], x0]), torch.cat([named, words])
        t = torch.cat([timesteps(len(pick), diffusion.T, generator) for _ in range(2)])
        eps = torch.randn(x0.shape, generator=generator)
        x0, words, t, eps = share(args, 2, x0, words, t, eps)
        loss = diffusion.loss(net, x0, words, t, eps)
        check(loss, bucket(t, args.buckets, diffusion.T), step, args)
        optimizer.zero_grad()
        (loss[:args.batch].mean() + args.prior * loss[args.batch:].mean()).backward()
        optimizer.step()
        track(bar, averages, bucket(t, args.buckets if args.buckets > 1 else 4, diffusion.T), loss.detach())


def evaluate(model, parts, args):
    """Pictures of PROMPTS, EACH of each, and the means of their exact scores ({} where parts are not known)."""
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS for _ in range(EACH)])
    images = sample(model, words, args.sample_steps, seed=args.seed, progress=True)
    scores = {} if parts is None else toy.score(images, words, parts, toy.WORD[WORD])
    return images, {key: value.mean().item() for key, value in scores.items()}


def draw_grid(instance, before, after, title, path):
    """grid.png: the instance pictures, then one picture of each prompt before and after fine-tuning, with labels."""
    strips = [toy.to_grid(images, len(PROMPTS)) for images in (instance[:len(PROMPTS)], before[::EACH], after[::EACH])]
    high, wide, line = strips[0].height, strips[0].width, 14
    page = Image.new("RGB", (wide, 3 * (high + line) + 3 * line), "white")
    draw = ImageDraw.Draw(page)
    for i, (label, strip) in enumerate(zip(("instance pictures", f"{title}, untuned", "tuned"), strips)):
        page.paste(strip, (0, i * (high + line) + line))
        draw.text((4, i * (high + line) + 1), label, "black")
    for i, prompt in enumerate(PROMPTS):
        head, _, tail = prompt.partition(" on ")
        draw.text((i * wide // len(PROMPTS) + 4, 3 * (high + line)), head.replace(" and ", "\nand ") + f"\non {tail}", "black")
    save(page, path, lambda page, file: page.save(file, "png"))


def arguments(argv=None):
    """The flags, their defaults filled in."""
    parser = Parser(description=__doc__.split("\n")[0])
    quantizer, run, number = parser.add_argument_group("quantizer"), parser.add_argument_group("run"), parser.number
    quantizer.add_argument("--bits", choices=(*"2345678", "32"), default="4", metavar="BITS",
                           help="bits of a weight: 2 to 8, or 32 for ordinary full-precision fine-tuning (default: 4)")
    quantizer.add_argument("--scales", choices=("out", "out+in"), default="out+in", help="what is trained; out alone is PEQA")
    number("--buckets", int, 1, 1000, 1, "scale sets over the 1000 timesteps", group=quantizer)
    quantizer.add_argument("--calibration", choices=CALIBRATIONS, default="rowcol", help="how the scales are found")
    run.add_argument("--subject", default="mo", help="a folder of pictures, or a name in data/subjects")
    run.add_argument("--base", default=BASE, help="the pretrained model (default: the shipped one)")
    run.add_argument("--pretrain", action="store_true", help="make the base instead: writes out/pretrain/base.pt")
    number("--steps", int, 0, 10**7, None, "optimizer steps (default: 1000, or 20000 to pretrain)", group=run)
    number("--lr", float, 0, 10, None, "learning rate (default: 0.03 for scales, 0.001 at 32 bits, 0.002 to pretrain)", group=run)
    number("--batch", int, 1, 4096, None, "instance and class pictures a step, each, by a process (default: 8, or 64)", group=run)
    number("--prior", float, 0, 100, 0.3, "weight of the class pictures' loss", group=run)
    number("--sample-steps", int, 1, 1000, 40, "timesteps visited to draw the pictures that are scored", group=run)
    number("--seed", int, 0, 2**62, 0, "seed of everything random", group=run)
    run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    run.add_argument("--out", type=Path, help="folder to write (default: out/SUBJECT-BITSbit)")
    run.add_argument("--checkpoint", action="store_true", help="a quarter of the activations kept, steps a third longer")
    run.add_argument("--compile", action="store_true", help="torch.compile: shorter steps after a minute or two of compiling")
    parser.device()
    args = parser.parse_args(argv)
    if args.compile and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        parser.error("--compile needs a C++ compiler, and there is none; install one, such as g++, or leave --compile out")
    args.bits, default = int(args.bits), lambda tuned, pretrained: pretrained if args.pretrain else tuned
    args.steps = default(1000, 20000) if args.steps is None else args.steps
    args.batch = default(8, 64) if args.batch is None else args.batch
    args.lr = default(1e-3 if args.bits == 32 else 3e-2, 2e-3) if args.lr is None else args.lr
    args.out = args.out or Path("out") / default(f"{Path(args.subject).resolve().name}-{args.bits}bit", "pretrain")
    return args


def main():
    args, start = arguments(), time.time()
    if args.device == "cuda":
        if (gpu := int(os.environ.get("LOCAL_RANK", 0))) >= (gpus := torch.cuda.device_count()):
            raise ValueError(f"process {gpu + 1} has no GPU ({gpus} here); start fewer processes, or give --device cpu")
        torch.cuda.set_device(gpu)
    if args.pretrain:
        with claim(args.out):
            return pretrain(args)

    # base
    folder = next((f for f in (BASE.parent / "subjects").iterdir() if f.name == args.subject), args.subject)
    (instance, captions), parts = toy.load_subject(folder, WORD), toy.read_parts(folder)
    model = load_model(args.base, args.device)
    if hasattr(model, "quant_config"):
        raise ValueError(f"{args.base} is quantized already; give --base a float model, such as {BASE}")
    lock, state = claim(args.out), resumed(args, "fine-tuning") if args.resume else None

    # quantize
    file = {"kind": "model", "config": model.config}
    if args.bits < 32:
        quantize(model, args.bits, args.buckets, Diffusion().T, args.scales, args.calibration)
        file = {"kind": "quantized", "config": model.config, "quant_config": model.quant_config}
    before, score_before = (None, {}) if RANK else evaluate(model, parts, args)

    # fine-tune
    finetune(model, args, instance, captions, state)
    if RANK:
        return

    # save
    tuned, subject, mine = args.out / "tuned.pt", args.out / "adapter.pt", deltas(model)
    base = size({**file, "model": {name: value for name, value in model.state_dict().items() if name not in mine}})
    if args.bits < 32:
        save({"kind": "adapter", **adapter(model)}, subject)
        load_adapter(model, load(subject, "adapter"))  # what is scored is what was saved
    save({**file, "model": model.state_dict()}, tuned)

    # sample and score
    after, score_after = evaluate(model, parts, args)
    title = "full precision" if args.bits == 32 else f"{'PEQA' if args.scales == 'out' else 'TuneQDM'}, {args.bits} bits"
    draw_grid(instance, before, after, title, args.out / "grid.png")
    row = {"method": title, "buckets": args.buckets, "base bytes": f"{base:,}",
           "subject bytes": f"{(subject if args.bits < 32 else tuned).stat().st_size:,}",
           "trained": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}"}
    for key, label in (("parts", "parts right"), ("identity", "whole subject"), ("prompt", "prompt right")):
        row[label] = f"{score_before[key]:.2f} -> {score_after[key]:.2f}" if parts is not None else "not known"
    widths = [max(len(label), len(str(value))) for label, value in row.items()]
    for line in (row.keys(), row.values()):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)))
    parts is None and print(f"{folder} has no parts.txt, so the exact scores aren't known")
    print(f"\nwrote grid.png, tuned.pt{' and adapter.pt' * (args.bits < 32)} to {args.out} "
          f"in {time.time() - start:.0f} s; more pictures:\n"
          f'python sample.py --ckpt {tuned} --prompt "{PROMPTS[0]}"')
    lock.close()


if __name__ == "__main__":
    guard(main)

"""Fine-tune a quantized diffusion model to a subject: python train.py --bits 4

The stages, in order: load the base, quantize it, fine-tune its scales to images of a subject with
prior preservation (DreamBooth, Ruiz et al. 2023), save, sample, score.
"""

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from calibrate import CALIBRATIONS
from data import toy
from data.score import score
from model import Diffusion
from quant import adapter, deltas, equal_edges, load_adapter, quantize, remember
from runtime import (
    BASE,
    RANK,
    WORLD,
    Loop,
    Parser,
    claim,
    describe,
    file_size,
    guard,
    load,
    load_model,
    parallel,
    resumed,
    save,
    share,
    use_device,
    write_png,
)
from sample import sample

WORD = "sks"  # the rare word that becomes the subject's name
PROMPTS = (  # none is an instance image of a shipped subject
    "sks creature on blue stripes",
    "sks creature on plain purple",
    "sks creature left on blue checks",
    "sks creature right on yellow stripes",
    "sks creature middle on plain cyan",
    "sks creature on plain pink",
    "sks creature and red circle on plain green",
    "sks creature and yellow square on blue stripes",
)
EACH = 5  # images of each prompt that are scored


def arguments(argv=None):
    """The flags, their defaults filled in."""
    parser = Parser(description=__doc__.split("\n")[0])

    quantizer = parser.add_argument_group("quantizer")
    quantizer.add_argument(
        "--bits",
        choices=(*"2345678", "32"),
        default="4",
        metavar="BITS",
        help="bits of a weight: 2 to 8, or 32 for full-precision fine-tuning (default: 4)",
    )
    quantizer.add_argument(
        "--scales",
        choices=("out", "out+in"),
        default="out+in",
        help="what is trained: rows and columns, or rows alone, which is PEQA (default: out+in)",
    )
    parser.number("--buckets", int, 1, 1000, 1, "scale sets over the 1000 timesteps", quantizer)
    quantizer.add_argument(
        "--calibration",
        choices=CALIBRATIONS,
        default="rowcol",
        help="how the integers and the first scales are found (default: rowcol)",
    )

    run = parser.run(
        steps=1000,
        lr=None,
        lr_help="learning rate (default: 0.03 for scales, 0.001 at 32 bits)",
        batch=8,
        batch_help="instance images a step, and as many class images, by each process",
        out_help="folder to write (default: out/SUBJECT-BITSbit)",
    )
    run.add_argument(
        "--subject",
        default="mo",
        help="a folder of images, or a name in data/subjects (default: mo)",
    )
    run.add_argument("--base", default=BASE, help="a pretrained model (default: the shipped one)")
    parser.number("--prior", float, 0, 100, 0.3, "weight of the class images' loss", run)
    parser.number("--sample-steps", int, 1, 1000, 40, "timesteps visited for a scored image", run)
    checkpoint_help = "keep a quarter of the activations, for steps a third longer"
    run.add_argument("--checkpoint", action="store_true", help=checkpoint_help)

    args = parser.parse_run(argv)
    args.bits = int(args.bits)
    if args.lr is None:
        args.lr = 1e-3 if args.bits == 32 else 3e-2
    if args.out is None:
        name = Path(args.subject).resolve().name
        args.out = Path("out") / f"{name}-{args.bits}bit"
    return args


def learning_rate(args, step):
    """Warm up over 20 steps, and down to zero all along."""
    return args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)


def finetune(model, args, instance, captions, state=None):
    """Train what requires a gradient on instance images (M, 3, 16, 16), with captions (M, L).

    loss = MSE on args.batch instance images + args.prior * MSE on args.batch class images: scenes
    of the toy world, whose creatures never bear the subject's word. state: the state.pt of a
    stopped run, to go on from.
    """
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(args.seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    first = 0
    if state is not None:
        first = state["step"]
        with torch.no_grad():
            for name, p in trained.items():
                p.copy_(state["trained"][name])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])

    def save_state(step):
        state = {
            "kind": "fine-tuning",
            "step": step,
            "args": describe(args),
            "trained": trained,
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
        }
        save(state, args.out / "state.pt")

    if args.checkpoint:
        model.checkpoint_blocks(remember)
    net = parallel(model, args)
    # one bucket says little about the loss, which differs a hundredfold over the timesteps
    edges = equal_edges(args.buckets if args.buckets > 1 else 4, diffusion.T)
    loop = Loop("fine-tuning", args, first, edges, save_state)
    for step in loop:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)

        # a batch of B instance images, then B class images; t of each spread over all timesteps
        x0, words = draw_batch(args.batch * WORLD, instance, captions, generator)
        n = args.batch * WORLD
        t = torch.cat([diffusion.draw_timesteps(n, generator) for _ in range(2)])
        eps = torch.randn(x0.shape, generator=generator)
        x0, words, t, eps = [share(a, parts=2).to(args.device) for a in (x0, words, t, eps)]

        x0 = x0.to(memory_format=torch.channels_last)  # (2B, 3, 16, 16)
        v = net(diffusion.q_sample(x0, t, eps), t, words)  # (2B, 3, 16, 16)
        error = diffusion.squared_error(v, x0, t, eps)  # (2B,)
        loop.check(error, t, step)
        loss = error[: args.batch].mean() + args.prior * error[args.batch :].mean()

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loop.show(error, t)


def draw_batch(n, instance, captions, generator):
    """n instance images and n class images: (2n, 3, 16, 16), and their captions (2n, L).

    Words that describe the scene are left out as often as in pretraining, the subject's name never.
    """
    class_images, class_words = toy.sample_scenes(n, generator, rare=0)
    pick = torch.randint(len(instance), (n,), generator=generator)
    drop = toy.DROP * (torch.arange(toy.SLOTS) > 1)  # the first two slots are the name
    dropped = torch.rand(n, toy.SLOTS, generator=generator) < drop
    words = captions[pick].masked_fill(dropped, 0)
    return torch.cat([instance[pick], class_images]), torch.cat([words, class_words])


def evaluate(model, parts, args):
    """EACH images of each of PROMPTS, and the means of their exact scores ({} if parts is None)."""
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS for _ in range(EACH)])
    images = sample(model, words, args.sample_steps, seed=args.seed, progress=True)
    if parts is None:
        return images, {}
    scores = score(images, words, parts, toy.WORD[WORD])
    return images, {key: value.mean().item() for key, value in scores.items()}


def main():
    start = time.time()
    args = arguments()
    use_device(args.device)

    # load
    folder = find_subject(args.subject)
    instance, captions = toy.load_subject(folder, WORD)
    parts = toy.read_parts(folder)
    model = load_model(args.base, args.device)
    if hasattr(model, "quant_config"):
        raise ValueError(
            f"{args.base} is quantized already; give --base a float model, such as {BASE}"
        )
    lock = claim(args.out)
    state = resumed(args, "fine-tuning") if args.resume else None

    # quantize
    header = {"kind": "model", "config": model.config}
    if args.bits < 32:
        quantize(model, args.bits, args.buckets, Diffusion().T, args.scales, args.calibration)
        header = {
            "kind": "quantized",
            "config": model.config,
            "quant_config": model.quant_config,
        }
    if RANK == 0:
        images_before, scores_before = evaluate(model, parts, args)

    # fine-tune
    finetune(model, args, instance, captions, state)
    if RANK > 0:
        return

    # save
    subject = args.out / "tuned.pt"
    if args.bits < 32:
        subject = args.out / "adapter.pt"
        save({"kind": "adapter", **adapter(model)}, subject)
        load_adapter(model, load(subject, "adapter"))  # what is scored is what was saved
    save({**header, "model": model.state_dict()}, args.out / "tuned.pt")

    # sample and score
    images_after, scores_after = evaluate(model, parts, args)
    title = title_of(args)
    draw_grid(instance, images_before, images_after, title, args.out / "grid.png")
    print_result(
        {
            "method": title,
            "buckets": args.buckets,
            "base bytes": f"{base_bytes(model, header):,}",
            "subject bytes": f"{subject.stat().st_size:,}",
            "trained": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
            **compare(scores_before, scores_after),
        }
    )
    if parts is None:
        print(f"{folder} has no parts.txt, so the exact scores aren't known")
    files = "grid.png, tuned.pt" + (" and adapter.pt" if args.bits < 32 else "")
    print(f"\nwrote {files} to {args.out} in {time.time() - start:.0f} s; more images:")
    print(f'python sample.py --ckpt {args.out / "tuned.pt"} --prompt "{PROMPTS[0]}"')
    lock.close()


def find_subject(name):
    """The folder of a shipped subject of this name; else name is taken for a folder."""
    for folder in (BASE.parent / "subjects").iterdir():
        if folder.name == name:
            return folder
    return name


def title_of(args):
    """The name of the method."""
    if args.bits == 32:
        return "full precision"
    method = "PEQA" if args.scales == "out" else "TuneQDM"
    return f"{method}, {args.bits} bits"


def base_bytes(model, header):
    """Bytes of the file of all that doesn't belong to the subject."""
    mine = deltas(model)
    rest = {name: value for name, value in model.state_dict().items() if name not in mine}
    return file_size({**header, "model": rest})


def compare(before, after):
    """The scores before and after fine-tuning, by the names that are printed."""
    labels = {"parts": "parts right", "identity": "whole subject", "prompt": "prompt right"}
    if not after:
        return {label: "not known" for label in labels.values()}
    return {label: f"{before[key]:.2f} -> {after[key]:.2f}" for key, label in labels.items()}


def print_result(row):
    """Print a table of one row: names, and values below them."""
    widths = [max(len(name), len(str(value))) for name, value in row.items()]
    for cells in (row.keys(), row.values()):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def draw_grid(instance, before, after, title, path):
    """Write grid.png: the instance images, then one image of each prompt before and after."""
    n = len(PROMPTS)
    strips = {
        "instance images": toy.to_grid(instance[:n], n),
        f"{title}, untuned": toy.to_grid(before[::EACH], n),
        "tuned": toy.to_grid(after[::EACH], n),
    }
    width, height = strips["tuned"].size
    line = 14  # pixels of a line of text
    page = Image.new("RGB", (width, 3 * (height + line) + 3 * line), "white")
    draw = ImageDraw.Draw(page)
    y = 0
    for label, strip in strips.items():
        draw.text((4, y + 1), label, "black")
        page.paste(strip, (0, y + line))
        y += height + line
    for i, prompt in enumerate(PROMPTS):
        text = prompt.replace(" and ", "\nand ").replace(" on ", "\non ")
        draw.text((i * width // n + 4, y), text, "black")
    save(page, path, write_png)


if __name__ == "__main__":
    guard(main)

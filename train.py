"""TuneQDM (arXiv 2401.04339) on a toy subject: python train.py --bits 4

The stages, in order: load the base, quantize it, fine-tune its scales on images of a subject with
prior preservation (DreamBooth, Ruiz et al. 2023), sample, score, save.
"""

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from data import toy
from data.score import score
from model import Diffusion
from quant import adapter, deltas, load_adapter, quantize
from sample import BASE, load_model, sample
from support.files import file_size, save
from support.flags import Parser, guard, number, path
from support.runs import Run

PROMPTS = (  # no instance image of a shipped subject shows one of these; --word takes sks's place
    "sks creature on blue stripes",
    "sks creature on plain purple",
    "sks creature left on blue checks",
    "sks creature right on yellow stripes",
    "sks creature middle on plain cyan",
    "sks creature on plain pink",
    "sks creature and red circle on plain green",
    "sks creature and yellow square on blue stripes",
)
IMAGES_PER_PROMPT = 5  # drawn and scored


def arguments(argv=None):
    """The flags, their defaults filled in."""
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument_group("quantizer").add_argument
    bits_help = "bits of a weight; 32 fine-tunes all weights in full precision"
    add("--bits", type=int, choices=(2, 3, 4, 5, 6, 7, 8, 32), default=4, help=bits_help)
    scales_help = "train the scales of rows (PEQA), or of rows and columns"
    add("--scales", choices=("out", "out+in"), default="out+in", help=scales_help)
    columns_help = "what has a column scale: a channel (the paper), or each position of its kernel"
    add("--columns", choices=("channel", "position"), default="position", help=columns_help)
    buckets_help = "scale sets over the 1000 timesteps"
    add("--buckets", type=number(1, 1000), default=1, help=buckets_help)
    add(
        "--calibration",
        choices=("minmax", "mse", "rowcol", "gptq"),
        default="rowcol",
        help="how the integers and the first scales are found",
    )

    add = parser.add_argument_group("fine-tuning").add_argument
    add("--subject", default="mo", help="a folder of images, or a name in data/subjects")
    word_help = "the rare word that becomes the subject's name; adapters of two words can be added"
    add("--word", choices=toy.RARE, default="sks", help=word_help)
    add("--base", type=path, default=BASE, help="a pretrained model")
    add("--steps", type=number(0, 10**7), default=500, help="optimizer steps")
    add("--lr", type=number(0.0, 10.0), help="learning rate; 0.03 for scales, 0.001 at 32 bits")
    batch_help = "instance images in a step of each process, and as many class images"
    add("--batch", type=number(1, 4096), default=8, help=batch_help)
    add("--prior", type=number(0.0, 100.0), default=0.3, help="weight of the class images' loss")
    sample_help = "timesteps visited for a scored image"
    add("--sample-steps", type=number(1, 1000), default=40, help=sample_help)
    add("--out", type=path, help="folder to write, by default such as out/mo-4bit")
    parser.add_training()

    args = parser.parse_args(argv)
    for flag in ("scales", "columns", "buckets", "calibration"):
        if args.bits == 32 and getattr(args, flag) != parser.get_default(flag):
            parser.error(f"--bits 32 has no quantizer; leave out --{flag}")
    if args.lr is None:
        args.lr = 1e-3 if args.bits == 32 else 3e-2
    if args.out is None:
        args.out = Path("out") / name_of_run(args)
    return args


def name_of_run(args):
    """The name of the default folder, so that one method doesn't replace another's results."""
    parts = [Path(args.subject).resolve().name, f"{args.bits}bit"]
    if args.word != "sks":
        parts.append(args.word)
    if args.scales != "out+in":
        parts.append(args.scales)
    if args.columns != "position":
        parts.append(args.columns)
    if args.buckets > 1:
        parts.append(f"{args.buckets}buckets")
    if args.calibration != "rowcol":
        parts.append(args.calibration)
    return "-".join(parts)


# --------------------------------------------------------------------------------------------------
# Fine-tuning
# --------------------------------------------------------------------------------------------------


def learning_rate(args, step):
    """Linear decay from args.lr to zero, times a warm-up of 20 steps."""
    return args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)


def finetune(model, instance, captions, args, run):
    """Train all parameters that require a gradient: in a quantized model, the deltas.

    instance (M, 3, 16, 16), captions (M, L): the images of the subject. run: yields the steps, and
    saves and resumes them.

        loss = MSE on args.batch instance images + args.prior * MSE on args.batch class images
    """
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(args.seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    net = run.prepare(model)
    # fmt: off
    for step in run.steps(optimizer, generator, trained):
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)

        # B instance and B class images for each process. All draw the same, and take their shares
        n = args.batch * run.processes
        x0, words, t = draw_batch(n, instance, captions, diffusion, generator)
        eps = torch.randn(x0.shape, generator=generator)                # (2B, 3, 16, 16)
        x0, words, t, eps = run.share((x0, words, t, eps), parts=2)

        x_t = diffusion.q_sample(x0, t, eps)                            # (2B, 3, 16, 16)
        v = net(x_t, t, words)                                          # (2B, 3, 16, 16)
        error = diffusion.squared_error(v, x0, t, eps)                  # (2B,)
        loss = error[:args.batch].mean() + args.prior * error[args.batch:].mean()
        run.watch(error, t, diffusion.T)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # fmt: on


def draw_batch(n, instance, captions, diffusion, generator):
    """n instance images and n class images, their captions, and a timestep for each.

    Returns x0 (2n, 3, 16, 16), words (2n, L), t (2n,). Class images are scenes of the toy world
    without a rare word. Captions lose words as in pretraining, but never the subject's two.
    """
    class_images, class_words = toy.sample_scenes(n, generator, rare=0)

    pick = torch.randint(len(instance), (n,), generator=generator)
    drop = toy.DROP.clone()
    drop[:2] = 0  # the rare word, "creature"
    dropped = torch.rand(n, toy.SLOTS, generator=generator) < drop
    instance_words = captions[pick].masked_fill(dropped, 0)

    # each half has timesteps that are evenly spread
    t = [diffusion.draw_timesteps(n, generator), diffusion.draw_timesteps(n, generator)]
    x0 = torch.cat([instance[pick], class_images])
    words = torch.cat([instance_words, class_words])
    return x0, words, torch.cat(t)


def calibration_data(device="cpu", n=96, seed=0, diffusion=None):
    """What gptq calibrates with: n noisy class images, their timesteps spread over 0 .. T.

    They come in batches (x_t, t, words) of 32. The seed is not --seed: one quantized base serves
    all subjects, whatever their seeds.
    """
    diffusion = diffusion or Diffusion()
    generator = torch.Generator().manual_seed(seed)
    x0, words = toy.sample_scenes(n, generator, rare=0)
    t = diffusion.draw_timesteps(n, generator)
    eps = torch.randn(x0.shape, generator=generator)
    x_t = diffusion.q_sample(x0, t, eps)
    x_t = x_t.to(device, memory_format=torch.channels_last)
    return list(zip(x_t.split(32), t.to(device).split(32), words.to(device).split(32)))


# --------------------------------------------------------------------------------------------------
# Sampling and scoring
# --------------------------------------------------------------------------------------------------


def prompts_of(word):
    """PROMPTS with the subject's word."""
    return [prompt.replace("sks", word) for prompt in PROMPTS]


def captions_of(prompts):
    """The captions of the images to score, IMAGES_PER_PROMPT for each prompt: lists of L words."""
    captions = []
    for prompt in prompts:
        captions += [toy.caption(prompt)] * IMAGES_PER_PROMPT
    return captions


def evaluate(model, parts, args):
    """Images of all PROMPTS, and the means of their exact scores, {} if parts is None."""
    words = torch.tensor(captions_of(prompts_of(args.word)))
    images = sample(model, words, args.sample_steps, seed=args.seed, progress=True)
    if parts is None:
        return images, {}
    scores = score(images, words, parts, toy.WORD[args.word])
    return images, {key: value.mean().item() for key, value in scores.items()}


# --------------------------------------------------------------------------------------------------
# The whole run
# --------------------------------------------------------------------------------------------------


def main():
    start = time.time()
    args = arguments()

    # load
    folder = find_subject(args.subject)
    check_out(args, folder)
    instance, captions = toy.load_subject(folder, args.word)
    parts = toy.read_parts(folder)
    model = load_model(args.base, args.device, kinds=["model"])
    inputs = {"base": model.state_dict(), "subject": [instance, captions]}
    run = Run(args, "fine-tuning", inputs, free=["sample_steps"])

    # quantize
    tuned = {"kind": "model", "config": model.config}
    if args.bits < 32:
        data = calibration_data(args.device) if args.calibration == "gptq" else None
        quantize(
            model,
            n_bits=args.bits,
            num_buckets=args.buckets,
            T=Diffusion().T,
            scales=args.scales,
            columns=args.columns,
            calibration=args.calibration,
            data=data,
        )
        tuned = {"kind": "quantized", "config": model.config, "quant_config": model.quant_config}
    if run.is_first:
        images_before, scores_before = evaluate(model, parts, args)

    # fine-tune
    finetune(model, instance, captions, args, run)
    if not run.is_first:
        return
    if args.bits < 32:
        subject = {"kind": "adapter", **adapter(model)}
        load_adapter(model, subject)  # rounds the deltas to float16, as they are saved

    # sample and score, before any file is replaced
    images_after, scores_after = evaluate(model, parts, args)

    # save
    mine = deltas(model)
    base = {name: value for name, value in model.state_dict().items() if name not in mine}
    base_bytes = file_size({**tuned, "model": base})
    tuned["model"] = model.state_dict()
    save(tuned, args.out / "tuned.pt")
    if args.bits < 32:
        save(subject, args.out / "adapter.pt")
    title = title_of(args)
    prompts = prompts_of(args.word)
    page = draw_result(instance, images_before, images_after, title, prompts)
    save(page, args.out / "grid.png")

    # report
    subject_file = args.out / ("adapter.pt" if args.bits < 32 else "tuned.pt")
    row = {
        "method": title,
        "buckets": args.buckets,
        "base bytes": f"{base_bytes:,}",
        "subject bytes": f"{subject_file.stat().st_size:,}",
        "trained": f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}",
    }
    labels = {"parts": "parts right", "identity": "whole subject", "prompt": "prompt right"}
    for key, label in labels.items():
        row[label] = "not known"  # without a parts.txt
        if parts is not None:
            row[label] = f"{scores_before[key]:.2f} -> {scores_after[key]:.2f}"
    print_row(row)
    print(
        f"\nwrote grid.png and the model to {args.out} in {time.time() - start:.0f} s; more images:"
    )
    print(f'python sample.py --ckpt {args.out / "tuned.pt"} --prompt "{prompts[0]}"')


def find_subject(name):
    """The folder of the shipped subject of this name, or name itself, a folder."""
    if name in toy.TUNING + toy.TABLE:
        return BASE.parent / "subjects" / name
    return Path(name)


def check_out(args, folder):
    """Raise ValueError if a file that is written could replace --base or join --subject."""
    out = args.out.resolve()
    if out == folder.resolve() or out == args.base.resolve().parent:
        raise ValueError(f"--out {args.out} is where --subject or --base is; choose another")


def title_of(args):
    """What the method is called."""
    if args.bits == 32:
        return "full precision"
    method = "PEQA" if args.scales == "out" else "TuneQDM"
    return f"{method}, {args.bits} bits"


def print_row(row):
    """Print a table of one row: names, and values below them."""
    widths = [max(len(name), len(str(value))) for name, value in row.items()]
    for cells in (row.keys(), row.values()):
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)))


def draw_result(instance, before, after, title, prompts):
    """The page grid.png: the instance images, then one image of each prompt before and after."""
    n = len(prompts)
    strips = {
        "instance images": toy.tile(instance[:n], n),
        f"{title}, untuned": toy.tile(before[::IMAGES_PER_PROMPT], n),
        "tuned": toy.tile(after[::IMAGES_PER_PROMPT], n),
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
    for i, prompt in enumerate(prompts):
        text = prompt.replace(" and ", "\nand ").replace(" on ", "\non ")
        draw.text((i * width // n + 4, y), text, "black")
    return page


if __name__ == "__main__":
    guard(main)

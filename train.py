"""TuneQDM (arXiv 2401.04339) on a toy subject: python train.py --bits 4

The stages, in order: load the base, quantize it, fine-tune its scales on images of a subject with
prior preservation (DreamBooth, Ruiz et al. 2023), sample, score, save.
"""

if __name__ == "__main__":
    import interrupt

    interrupt.end_quietly()

import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from calibrate import CALIBRATIONS
from data import toy
from data.score import score
from model import Diffusion
from quant import adapter, deltas, load_adapter, quantize, remember
from runtime import (
    BASE,
    RANK,
    RUN_FILES,
    WORLD_SIZE,
    Loop,
    Parser,
    checksum,
    claim,
    command,
    file_size,
    filled,
    filled_path,
    guard,
    load_model,
    load_state,
    my_share,
    parallel,
    restore,
    save,
    state_after,
    use_device,
    write_png,
)
from sample import sample

SUBJECT_WORD = "sks"  # the rare word that becomes the subject's name
PROMPTS = (  # no instance image of a shipped subject shows one of these
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
TRAINED_WORDS = ("words.weight",)  # the parameter of which --train-words trains rows


def arguments(argv=None):
    """The flags, their defaults filled in."""
    parser = Parser(description=__doc__.split("\n")[0])

    quantizer = parser.add_argument_group("quantizer")
    quantizer.add_argument(
        "--bits",
        choices=("2", "3", "4", "5", "6", "7", "8", "32"),
        default="4",
        metavar="BITS",
        help="bits of a weight: 2 to 8, or 32 for full-precision fine-tuning (default: 4)",
    )
    quantizer.add_argument(
        "--scales",
        choices=("out", "out+in"),
        default="out+in",
        help="train the scales of rows (out: PEQA), or of rows and columns (out+in, the default)",
    )
    parser.number("--buckets", int, 1, 1000, 1, "scale sets over the 1000 timesteps", quantizer)
    quantizer.add_argument(
        "--calibration",
        choices=CALIBRATIONS,
        default="rowcol",
        help="how the integers and the first scales are found (default: rowcol)",
    )

    run = parser.add_run_flags(
        steps=1000,
        lr=None,
        lr_help="learning rate (default: 0.03 for scales, 0.001 at 32 bits)",
        batch=8,
        batch_help="instance images in a step of each process, and as many class images",
        out_help="folder to write (default: by subject, bits and method, such as out/mo-4bit)",
    )
    run.add_argument(
        "--subject",
        type=filled,
        default="mo",
        help="a folder of images, or a name in data/subjects (default: mo)",
    )
    base_help = "a pretrained model (default: the shipped one)"
    run.add_argument("--base", type=filled_path, default=BASE, help=base_help)
    parser.number("--prior", float, 0, 100, 0.3, "weight of the class images' loss", run)
    parser.number("--sample-steps", int, 1, 1000, 40, "timesteps visited for a scored image", run)
    words_help = "train the embedding of the subject's word, too, at the same rate"
    run.add_argument("--train-words", action="store_true", help=words_help)
    checkpoint_help = "keep a quarter of the activations; steps take a third longer"
    run.add_argument("--checkpoint", action="store_true", help=checkpoint_help)

    args = parser.parse_run(argv)
    args.bits = int(args.bits)
    if args.bits == 32:
        refuse_quantizer_flags(parser, argv)
        if args.train_words:
            parser.error("--bits 32 trains all words anyway; leave out --train-words")
    if args.lr is None:
        args.lr = 1e-3 if args.bits == 32 else 3e-2
    if args.out is None:
        args.out = Path("out") / name_of_run(args)
    return args


def name_of_run(args):
    """The name of the default folder, so that one method doesn't replace another's results."""
    parts = [Path(args.subject).resolve().name, f"{args.bits}bit"]
    if args.scales != "out+in":
        parts.append(args.scales)
    if args.buckets > 1:
        parts.append(f"{args.buckets}buckets")
    if args.calibration != "rowcol":
        parts.append(args.calibration)
    if args.train_words:
        parts.append("words")
    return "-".join(parts)


def refuse_quantizer_flags(parser, argv):
    """End with a sentence if flags of the quantizer are given."""
    given = parser.given(argv, ("scales", "buckets", "calibration"))
    if given:
        flags = " and ".join(f"--{name}" for name in given)
        parser.error(f"--bits 32 quantizes nothing, so it can't heed {flags}; leave that out")


def learning_rate(args, step):
    """Linear decay from args.lr to zero, times a warm-up of 20 steps."""
    return args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)


def rare_words(captions):
    """The rare words, by number, that captions (M, L) have."""
    rare = range(toy.FIRST_RARE, toy.FIRST_RARE + len(toy.RARE))
    return [word for word in rare if (captions == word).any()]


def train_words(model, captions):
    """Let the embeddings of the rare words in captions (M, L) be trained, and of no others."""
    weight = model.words.weight.requires_grad_()
    is_trained = torch.zeros(len(weight), 1, device=weight.device)
    is_trained[rare_words(captions)] = 1
    weight.register_hook(lambda grad: grad * is_trained)  # Adam leaves the others where they are


def finetune(model, args, instance, captions, state=None, inputs=None):
    """Train all parameters that require a gradient.

    In a quantized model, these are the deltas: exp(delta) multiplies a frozen scale, and each
    bucket of timesteps has a set of them.

    instance (M, 3, 16, 16), captions (M, L): the images of the subject. state: what a stopped run
    has saved in state.pt, to go on from. inputs: checksums of base and subject, see load_state.

        loss = MSE on args.batch instance images + args.prior * MSE on args.batch class images
    """
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(args.seed)
    if args.train_words:
        train_words(model, captions)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    first = 0
    if state is not None:
        first = restore(state, args, optimizer, generator, trained=trained)

    def save_state(step):
        contents = {"kind": "fine-tuning", "inputs": inputs or {}, "trained": trained}
        state = state_after(step, args, optimizer, generator, **contents)
        save(state, args.out / "state.pt")

    if args.checkpoint:
        model.checkpoint_blocks(remember)
    net = parallel(model, args)
    loop = Loop("fine-tuning", args, first, diffusion.T, trained.values(), save_state)
    # fmt: off
    for step in loop:
        optimizer.param_groups[0]["lr"] = learning_rate(args, step)

        # B instance images and B class images for each process, which takes its share of both
        x0, words, t = draw_batch(args.batch * WORLD_SIZE, instance, captions, diffusion, generator)
        eps = torch.randn(x0.shape, generator=generator)                # (2B, 3, 16, 16)
        x0, words, t, eps = my_share((x0, words, t, eps), args, parts=2)

        x_t = diffusion.q_sample(x0, t, eps)                            # (2B, 3, 16, 16)
        v = net(x_t, t, words)    # quant.enter_call tells quantized layers the buckets of t
        error = diffusion.squared_error(v, x0, t, eps)                  # (2B,)
        loss = error[:args.batch].mean() + args.prior * error[args.batch:].mean()
        loop.watch(error, t)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # fmt: on


def calibration_data(device="cpu", n=96, seed=0, low=0.0, high=1.0):
    """What gptq calibrates with: n class images at timesteps from low * T to high * T.

    They come in batches (x_t, t, words) of 32. The seed is not --seed: one quantized base serves
    all subjects, whatever their seeds.
    """
    diffusion = Diffusion()
    generator = torch.Generator().manual_seed(seed)
    x0, words = toy.sample_scenes(n, generator, rare=0)
    t = diffusion.draw_timesteps(n, generator)
    t = (low * diffusion.T + (high - low) * t).long()
    eps = torch.randn(x0.shape, generator=generator)
    x_t = diffusion.q_sample(x0, t, eps)
    x_t = x_t.to(device, memory_format=torch.channels_last)
    return list(zip(x_t.split(32), t.to(device).split(32), words.to(device).split(32)))


def draw_batch(n, instance, captions, diffusion, generator):
    """n instance images and n class images, their captions, and a timestep for each.

    Returns x0 (2n, 3, 16, 16), words (2n, L), t (2n,). Class images are scenes of the toy world in
    which no creature bears a rare word. Words that describe the scene of an instance image are
    dropped as in pretraining; the words "sks creature" never are.
    """
    class_images, class_words = toy.sample_scenes(n, generator, rare=0)

    pick = torch.randint(len(instance), (n,), generator=generator)
    drop = toy.DROP.clone()
    drop[:2] = 0  # "sks", "creature"
    dropped = torch.rand(n, toy.SLOTS, generator=generator) < drop
    instance_words = captions[pick].masked_fill(dropped, 0)

    # each half has timesteps that are evenly spread
    t = [diffusion.draw_timesteps(n, generator), diffusion.draw_timesteps(n, generator)]
    x0 = torch.cat([instance[pick], class_images])
    words = torch.cat([instance_words, class_words])
    return x0, words, torch.cat(t)


def captions_of(prompts):
    """The captions of the images to score, IMAGES_PER_PROMPT for each prompt: lists of L words."""
    captions = []
    for prompt in prompts:
        captions += [toy.caption(prompt)] * IMAGES_PER_PROMPT
    return captions


def evaluate(model, parts, args):
    """Images of all PROMPTS, and the means of their exact scores, {} if parts is None."""
    words = torch.tensor(captions_of(PROMPTS))
    images = sample(model, words, args.sample_steps, seed=args.seed, progress=True)
    if parts is None:
        return images, {}
    scores = score(images, words, parts, toy.WORD[SUBJECT_WORD])
    return images, {key: value.mean().item() for key, value in scores.items()}


def main():
    start = time.time()
    args = arguments()
    use_device(args.device)

    # load
    folder = find_subject(args.subject)
    instance, captions = toy.load_subject(folder, SUBJECT_WORD)
    parts = toy.read_parts(folder)
    if RANK == 0:
        print_unused(folder)
    model = load_model(args.base, args.device)
    if hasattr(model, "quant_config"):
        raise ValueError(
            f"{args.base} is quantized already; give --base a float model, such as {BASE}"
        )
    check_out(args, folder)
    lock = claim(args.out)
    inputs = {
        "base": checksum(model.state_dict()),
        "subject": checksum([instance, captions]),
    }
    state = load_state(args, "fine-tuning", inputs) if args.resume else None

    # quantize
    header = {"kind": "model", "config": model.config}
    if args.bits < 32:
        data = None
        if args.calibration == "gptq":
            data = calibration_data(args.device)
            if RANK == 0:
                print("calibrating layer by layer, about half a minute on a CPU", flush=True)
        T = Diffusion().T
        quantize(model, args.bits, args.buckets, T, args.scales, args.calibration, data=data)
        header = {
            "kind": "quantized",
            "config": model.config,
            "quant_config": model.quant_config,
        }
    if RANK == 0:
        images_before, scores_before = evaluate(model, parts, args)

    # fine-tune
    finetune(model, args, instance, captions, state, inputs)
    if RANK > 0:
        return
    if args.bits < 32:
        also = TRAINED_WORDS if args.train_words else ()
        tuned = {"kind": "adapter", **adapter(model, also)}
        load_adapter(model, tuned)  # rounds the deltas to float16, as they are saved

    # sample and score; if the training has diverged, this fails, and no older result is replaced
    images_after, scores_after = evaluate(model, parts, args)

    # save
    tuned_file = args.out / "tuned.pt"
    subject_file = tuned_file
    if args.bits < 32:
        subject_file = args.out / "adapter.pt"
        save(tuned, subject_file)
    save({**header, "model": model.state_dict()}, tuned_file)
    title = title_of(args)
    draw_grid(instance, images_before, images_after, title, args.out / "grid.png")

    # report
    print_result(
        {
            "method": title,
            "buckets": args.buckets,
            "base bytes": f"{base_bytes(model, header):,}",
            "subject bytes": f"{subject_file.stat().st_size:,}",
            "trained": f"{count_trained(model, args, captions):,}",
            **compare(scores_before, scores_after),
        }
    )
    if parts is None:
        print(f"{folder} has no parts.txt, so the exact scores aren't known")
    files = "grid.png, tuned.pt" + (" and adapter.pt" if args.bits < 32 else "")
    print(f"\nwrote {files} to {args.out} in {time.time() - start:.0f} s; more images:")
    print(command("sample.py", "--ckpt", tuned_file, "--prompt", PROMPTS[0]))
    lock.close()


def find_subject(name):
    """The folder of the shipped subject of this name, or name itself, a folder.

    Raises ValueError if there are both.
    """
    for shipped in (BASE.parent / "subjects").iterdir():
        if shipped.name == name:
            if Path(name).is_dir() and not shipped.samefile(name):
                raise ValueError(
                    f"{name} is a folder here and a shipped subject; "
                    f"give --subject ./{name} or --subject {shipped}"
                )
            return shipped
    return name


def print_unused(folder):
    """Print which images of a folder aren't used, if there are any."""
    counts = [f"{count} {suffix}" for suffix, count in toy.unused_images(folder).items()]
    if counts:
        print(f"{folder}: only PNG and JPEG files are used, not these: {', '.join(counts)}")


def check_out(args, folder):
    """Raise ValueError if a file that is written could replace one of --base or join --subject."""
    out = args.out.resolve()
    if out == Path(folder).resolve():
        raise ValueError(
            f"--out is the folder of --subject, {folder}, and grid.png would be one of its images; "
            "choose another --out"
        )
    base = Path(args.base).resolve()
    if base.parent == out and base.name in RUN_FILES:
        raise ValueError(
            "--base is in --out, whose files the run would replace; choose another --out"
        )


def title_of(args):
    """What the method is called."""
    if args.bits == 32:
        return "full precision"
    method = "PEQA" if args.scales == "out" else "TuneQDM"
    return f"{method}, {args.bits} bits"


def base_bytes(model, header):
    """The bytes of a file of the model without what belongs to the subject, the deltas."""
    mine = deltas(model)
    base = {name: value for name, value in model.state_dict().items() if name not in mine}
    return file_size({**header, "model": base})


def count_trained(model, args, captions):
    """How many numbers are trained: of the embedding, those of the captions' rare words alone."""
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if args.train_words:
        words = model.words
        count += len(rare_words(captions)) * words.embedding_dim - words.weight.numel()
    return count


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
        f"{title}, untuned": toy.to_grid(before[::IMAGES_PER_PROMPT], n),
        "tuned": toy.to_grid(after[::IMAGES_PER_PROMPT], n),
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

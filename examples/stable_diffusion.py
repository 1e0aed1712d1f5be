"""TuneQDM for the UNet of Stable Diffusion 1.x or 2.x: fine-tune it to a subject as DreamBooth does
(Ruiz et al. 2023), and train nothing but the scales of its quantized weights.

    pip install -r examples/requirements.txt
    python examples/stable_diffusion.py --model PATH_OR_NAME --subject FOLDER \\
        --prompt "a photo of sks dog" \\
        --class-prompt "a photo of a dog" --class-images FOLDER
    python examples/stable_diffusion.py --model PATH_OR_NAME --sample "sks dog on a beach"

First the UNet is quantized and written to base.pt: once for each model, for all its subjects
(--base). That takes a minute on a GPU and an hour on a CPU; --calibration minmax is quicker and
coarser, gptq slower and finer: it reads noisy images of the class. The VAE encodes every image
once, the text encoder the two prompts, and both are dropped. A training step adds noise to latents
of the subject and of its class, asks the UNet for the noise of both in one batch, and moves the
scales of the timestep buckets in the batch:

    loss = MSE(subject) + prior * MSE(class)

The images of the class, photographed or drawn by the model, keep it from taking every dog for the
subject. Without them there is only the first term. adapter.pt holds the result: the scales, about a
megabyte for each bucket.

The learning rate is DiffFit's for scale factors (Xie et al. 2023); it wasn't tuned on real weights.
The same seed gives the same adapter on a CPU; on a GPU, PyTorch's attention sums in no fixed order.

save_pretrained and from_pretrained don't know quantized layers: from_pretrained would leave random
weights in their places, and only warn. Merge first, which gives a float model of one bucket:

    merge(unet, 0).save_pretrained(folder)
    unet = UNet2DConditionModel.from_pretrained(folder)

or save what is packed, and put it into layers of the same bits, buckets and columns:

    torch.save(unet.state_dict(), "base.pt")
    torch.save(adapter(unet), "adapter.pt")  # of what was trained since

    unet = UNet2DConditionModel.from_config(unet.config)
    quantize(unet, 4, 2, timestep="timestep", columns="channel", calibration="minmax")
    unet.load_state_dict(torch.load("base.pt"))
    load_adapter(unet, torch.load("adapter.pt"))
"""

import contextlib
import hashlib
import os
import sys
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from calibrate import CALIBRATIONS
from quant import adapter, checkpoint_contexts, deltas, load_adapter, quantize
from support.files import hash_of, load, save
from support.flags import Parser, guard, number, path
from support.images import images_in, read_rgb
from support.processes import WORLD_SIZE
from support.runs import Run

try:
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
except (ImportError, RuntimeError) as error:
    reason = str(error).split("\n")[-1]
    print(f"{reason}; try pip install -r examples/requirements.txt", file=sys.stderr)
    sys.exit(2)

# the kinds of files
BASE = "Stable Diffusion base"
STATE = "Stable Diffusion fine-tuning"
ADAPTER = "Stable Diffusion adapter"


def arguments():
    parser = Parser("TuneQDM for Stable Diffusion 1.x and 2.x")
    add = parser.add_argument
    add("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    add("--out", type=path, default=Path("out/stable-diffusion"), help="a folder")
    add("--base", type=path, help="the quantized UNet (default: base.pt in --out)")
    parser.add_seed()
    parser.add_device()

    add = parser.add_argument_group("data").add_argument
    add("--subject", type=path, help="a folder with PNG or JPEG images of the subject")
    add("--prompt", help="names it by a rare word: 'a photo of sks dog'")
    add("--class-images", type=path, help="a folder with images of its class")
    add("--class-prompt", help="names the class: 'a photo of a dog'")

    add = parser.add_argument_group("quantizer").add_argument
    add("--bits", type=number(2, 8), default=4, help="bits of a weight")
    add("--buckets", type=number(1, 1000), default=2, help="scale sets over the timesteps")
    columns_help = "what has a column scale: a channel, or each position of its kernel"
    add("--columns", choices=("channel", "position"), default="channel", help=columns_help)
    calibrations = [*CALIBRATIONS, "gptq"]
    calibration_help = "how the integers and the first scales are found"
    add("--calibration", choices=calibrations, default="rowcol", help=calibration_help)

    add = parser.add_argument_group("training").add_argument
    add("--steps", type=number(1, 10**7), default=800, help="optimizer steps")
    add("--lr", type=number(0.0, 10.0), default=1e-3, help="learning rate of the relative scales")
    add("--batch", type=number(1, 1024), default=1, help="images of the subject in a step")
    add("--prior", type=number(0.0, 100.0), default=1.0, help="weight of the class images' loss")
    add("--resume", action="store_true", help="go on from the last state in --out")
    no_checkpoint_help = "keep all activations for backward: quicker steps, more memory"
    add("--no-checkpoint", action="store_true", help=no_checkpoint_help)

    add = parser.add_argument_group("sampling").add_argument
    add("--sample", metavar="PROMPT", help="draw this with the adapter in --out")
    add("--n", type=number(1, 1000), default=8, help="images")
    add("--sample-steps", type=number(1, 500), default=50, help="steps of the sampler")
    add("--guidance", type=number(1.0, 100.0), default=7.5, help="classifier-free guidance")

    args = parser.parse_args()
    args.base = args.base or args.out / "base.pt"
    check_task(parser, args)
    if WORLD_SIZE > 1:
        parser.error("this example runs in one process; start it without torchrun")
    if args.subject and not args.prompt:
        parser.error("--subject needs --prompt, such as 'a photo of sks dog'")
    if bool(args.class_images) != bool(args.class_prompt):
        parser.error("--class-images and --class-prompt belong together; give both, or neither")
    for folder in (args.subject, args.class_images):
        if folder and folder.resolve() == args.out.resolve():
            parser.error(f"{folder} can't be --out, whose images would join it; choose another")
    makes_base = args.subject and not args.base.exists()
    if makes_base and args.calibration == "gptq" and not args.class_images:
        parser.error("--calibration gptq needs --class-images; give them, or use rowcol")
    return args


def check_task(parser, args):
    """End with a sentence unless the flags are those of training, or those of drawing."""
    if bool(args.subject) == bool(args.sample):
        parser.error("give --subject FOLDER to train, or --sample PROMPT to draw")
    data = ("prompt", "class_images", "class_prompt")
    quantizer = ("bits", "buckets", "columns", "calibration")
    training = ("steps", "lr", "batch", "prior", "resume", "no_checkpoint")
    sampling = ("n", "sample_steps", "guidance")
    for name in sampling if args.subject else (*data, *quantizer, *training):
        if getattr(args, name) != parser.get_default(name):
            task = "--subject trains" if args.subject else "--sample draws"
            parser.error(f"{task}, and doesn't use --{name.replace('_', '-')}; leave it out")


# --------------------------------------------------------------------------------------------------
# The pipeline, and what training needs of it
# --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(name):
    """Make one sentence (ValueError) of the many errors that reading --model can end in."""
    try:
        yield
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--model {name} can't be read ({reason}); "
            "give a folder that save_pretrained wrote, or a name on the Hugging Face Hub"
        ) from None


def from_pretrained(kind, name, dtype=torch.float32, **options):
    """kind.from_pretrained, in 32-bit floats unless dtype says otherwise."""
    with reading(name):
        return kind.from_pretrained(name, dtype=dtype, low_cpu_mem_usage=False, **options)


def load_pipeline(name, unet=None):
    """The pipeline around this UNet, or without one."""
    with reading(name):
        pipeline = StableDiffusionPipeline.load_config(name)["_class_name"]
    if pipeline != "StableDiffusionPipeline":
        raise ValueError(
            f"--model {name} is a {pipeline}; give a StableDiffusionPipeline, "
            "which is Stable Diffusion 1.x or 2.x (SDXL has a second text encoder)"
        )
    without = {"safety_checker": None, "requires_safety_checker": False}
    pipe = from_pretrained(StableDiffusionPipeline, name, unet=unet, **without)
    predicts = pipe.scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"--model {name} predicts {predicts}, neither epsilon nor v_prediction")
    return pipe


def image_size(pipe, name):
    """Height and width of the images that the pipeline's UNet was made for, in pixels."""
    with reading(name):
        latent_size = UNet2DConditionModel.load_config(name, subfolder="unet")["sample_size"]
    if not isinstance(latent_size, int):
        raise ValueError(f"--model {name} has a sample_size of {latent_size}; give a square one")
    return latent_size * pipe.vae_scale_factor


def read_image(file, size):
    """The image's middle square: (1, 3, size, size) in [-1, 1]."""
    image = ImageOps.fit(read_rgb(file), (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))  # (size, size, 3), uint8
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


def find_images(folder):
    """The files of a folder's images."""
    files = images_in(folder)
    if list(folder.glob("*.txt")):
        print(f"{folder}: text files aren't used, one prompt serves all images", file=sys.stderr)
    return files


def hash_of_files(files):
    """A hash of what is in these files."""
    return hash_of([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def check_prompt(pipe, prompt):
    """Raise ValueError for a prompt that the text encoder would cut."""
    tokens = len(pipe.tokenizer(prompt).input_ids)
    if tokens > pipe.tokenizer.model_max_length:
        raise ValueError(f"'{prompt}' has {tokens} tokens, too many for the model; shorten it")


@torch.no_grad()
def encode(pipe, files, prompt, size):
    """The latents of M image files, (M, 4, h, w), and what the UNet attends to, (1, 77, C)."""
    check_prompt(pipe, prompt)
    latents = []
    for file in tqdm(files, f"encoding {files[0].parent.name}", leave=False):
        image = read_image(file, size).to(pipe.device)
        # the mean, so that one encoding serves all steps
        latents.append(pipe.vae.encode(image).latent_dist.mean.cpu())
    latents = torch.cat(latents) * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=False)
    return latents, words.cpu()


# --------------------------------------------------------------------------------------------------
# The quantized UNet
# --------------------------------------------------------------------------------------------------


def load_unet(name, dtype=torch.float16):
    """The float UNet of --model."""
    return from_pretrained(UNet2DConditionModel, name, dtype, subfolder="unet")


def hash_of_model(name):
    """A hash of the UNet's weights: by tomorrow the same folder may hold others."""
    return hash_of(load_unet(name).state_dict())


def load_base(args, model):
    """The contents of --base, which must be made of the model with this hash."""
    base = load(args.base, BASE)
    if base["made"].get("model") != model:
        raise ValueError(
            f"{args.base} was made of another UNet than --model {args.model} has now; "
            "give that model, or another --base"
        )
    return base


def check_quantizer(args, base):
    """Raise ValueError if base was made with other flags."""
    for key in ("bits", "columns", "calibration"):
        value = base["made"][key]
        if value != getattr(args, key):
            raise ValueError(
                f"{args.base} was made with --{key} {value}; give the same, or another --base"
            )


def calibration_data(latents, words, noise, device, n=64):
    """What gptq calibrates with: n noisy latents of the class, their timesteps evenly spread.

    latents, words: as encode returns them. Returns batches (x_t, t, words) of 4 latents.
    """
    T = noise.config.num_train_timesteps
    generator = torch.Generator().manual_seed(0)  # not --seed: a base serves all runs
    x0 = latents[torch.randint(len(latents), (n,), generator=generator)]  # (n, 4, h, w)
    t = torch.arange(n) * T // n  # (n,)
    x_t = noise.add_noise(x0, torch.randn(x0.shape, generator=generator), t)
    words = words.expand(n, -1, -1)
    return list(zip(*[a.to(device).split(4) for a in (x_t, t, words)]))


def make_base(args, model, noise, data):
    """Quantize the UNet of --model and write it to --base, without deltas.

    With one bucket and without its deltas, it serves runs with any number of buckets. model: the
    hash of the UNet. noise, data: see tune.

    In float16 the UNet takes 1.7 GB of a GPU. gptq runs it, and takes float32 for that. Scales are
    float32 either way.
    """
    print(f"quantizing the UNet of {args.model} to {args.base}, once", flush=True)
    T = noise.config.num_train_timesteps
    dtype = torch.float16
    batches = None
    if args.calibration == "gptq":
        dtype = torch.float32
        latents, words = data[-1]  # of the class
        batches = calibration_data(latents, words, noise, args.device)
    unet = load_unet(args.model, dtype)
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    unet.to(args.device)
    made = {"columns": args.columns, "calibration": args.calibration}
    quantize(unet, args.bits, T=T, **made, data=batches)
    unet.float()
    state = unet.state_dict()
    for name in deltas(unet):
        del state[name]
    base = {
        "kind": BASE,
        "made": {"model": model, "bits": args.bits, **made},
        "config": config,
        "T": T,
        "unet": state,
    }
    save(base, args.base)


def build(base, num_buckets):
    """The quantized UNet of a base.pt, with all deltas zero."""
    unet = UNet2DConditionModel.from_config(base["config"])
    # quantize its random weights, for layers of the right shapes, and fill these
    made = base["made"]
    quantize(
        unet,
        made["bits"],
        num_buckets,
        base["T"],
        columns=made["columns"],
        calibration="minmax",
        timestep="timestep",
    )
    unet.quant_config["calibration"] = made["calibration"]
    unet.load_state_dict({**unet.state_dict(), **base["unet"]})
    return unet


def checkpoint_blocks(unet):
    """Keep only the inputs of the UNet's blocks for backward, which runs each block again.

    By then the UNet's call is over, and with it what its layers were told of the batch's timesteps.
    checkpoint_contexts tells them again.
    """

    def run(block, *inputs):
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=checkpoint_contexts)

    unet.enable_gradient_checkpointing(run)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def draw_batch(data, n, generator):
    """n latents of each part of data, one part after the other, and the prompts beside them."""
    x0 = []
    words = []
    for latents, prompt in data:
        pick = torch.randint(len(latents), (n,), generator=generator)
        x0.append(latents[pick])
        words.append(prompt.expand(n, -1, -1))
    return torch.cat(x0), torch.cat(words)


def tune(unet, noise, data, args, run):
    """Train the deltas of unet.

    noise: a DDPMScheduler. data: latents and prompt of the subject and, if there are images of it,
    of the class, as encode returns them. run: yields the steps, and saves and resumes them.
    """
    T = noise.config.num_train_timesteps
    trained = deltas(unet)
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    generator = torch.Generator().manual_seed(args.seed)  # of every random draw, on the CPU
    # fmt: off
    for step in run.steps(optimizer, generator, trained):
        warm_up = min(1, (step + 1) / 20)
        optimizer.param_groups[0]["lr"] = args.lr * warm_up * (1 - step / args.steps)

        # B latents of the subject and, with prior preservation, B of the class behind them
        x0, words = draw_batch(data, args.batch, generator)             # (2B, 4, h, w), (2B, 77, C)
        t = torch.randint(T, (len(x0),), generator=generator)           # (2B,)
        eps = torch.randn(x0.shape, generator=generator)                # (2B, 4, h, w)
        x_t = noise.add_noise(x0, eps, t)                               # (2B, 4, h, w)
        target = eps
        if noise.config.prediction_type == "v_prediction":
            target = noise.get_velocity(x0, eps, t)                     # (2B, 4, h, w)
        x_t, t, words, target = [a.to(args.device) for a in (x_t, t, words, target)]

        with torch.autocast(args.device, torch.bfloat16):
            predicted = unet(x_t, t, words).sample                      # (2B, 4, h, w)
        error = (predicted.float() - target).square().mean((1, 2, 3))   # (2B,)
        loss = error[:args.batch].mean()
        if len(data) == 2:
            loss = loss + args.prior * error[args.batch:].mean()
        run.watch(error, t, T)

        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # fmt: on


def peak_memory(device):
    """The most bytes so far: of tensors on a GPU, else of the process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(args):
    # find what is read
    files = {"subject": find_images(args.subject)}
    if args.class_images:
        files["class-images"] = find_images(args.class_images)
    pipe = load_pipeline(args.model)
    size = image_size(pipe, args.model)
    model = hash_of_model(args.model)
    base = None
    if args.base.exists():
        base = load_base(args, model)
        check_quantizer(args, base)

    # with --resume, Run refuses another run's state before anything is computed
    inputs = {flag: hash_of_files(images) for flag, images in files.items()}
    inputs["model"] = model
    inputs["base"] = base
    free = ["class_images", "no_checkpoint", "n", "sample_steps", "guidance"]
    run = Run(args, STATE, inputs, free)

    pipe.to(args.device)
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    data = [encode(pipe, files["subject"], args.prompt, size)]
    if args.class_images:
        data.append(encode(pipe, files["class-images"], args.class_prompt, size))
    del pipe  # and with it the VAE and the text encoder

    if base is None:
        make_base(args, model, noise, data)
        base = load_base(args, model)
        run.inputs["base"] = hash_of(base)
    unet = build(base, args.buckets).to(args.device)
    if not args.no_checkpoint:
        checkpoint_blocks(unet)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    tune(unet, noise, data, args, run)

    path = args.out / "adapter.pt"
    save({"kind": ADAPTER, "buckets": args.buckets, **adapter(unet)}, path)
    count = sum(delta.numel() for delta in deltas(unet).values())
    print(f"wrote {path}: {count:,} scales in {path.stat().st_size / 1e6:.2f} MB")
    print(f"peak memory {peak_memory(args.device) / 1e9:.2f} GB ({args.device})")


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(args):
    """Draw images of --sample by the pipeline's own scheduler, and write them as a grid.

    The pipeline gives the UNet one timestep for all samples, so a call takes one bucket's scales.
    Weights stay packed while it draws.
    """
    subject = load(args.out / "adapter.pt", ADAPTER)
    base = load_base(args, hash_of_model(args.model))
    unet = build(base, subject["buckets"])
    load_adapter(unet, subject)
    pipe = load_pipeline(args.model, unet).to(args.device)
    check_prompt(pipe, args.sample)
    pipe.set_progress_bar_config(disable=True)
    images = []
    # one by one, so that an image depends on the sum of the seed and its number only
    for i in tqdm(range(args.n), "drawing", leave=False):
        with torch.autocast(args.device, torch.bfloat16):
            images += pipe(
                args.sample,
                num_inference_steps=args.sample_steps,
                guidance_scale=args.guidance,
                generator=torch.Generator().manual_seed(args.seed + i),
            ).images
    path = args.out / "sample.png"
    save(to_grid(images), path)
    print(f"wrote {path}: {args.n} images of '{args.sample}'")


def to_grid(images, columns=4):
    """One image of many, all of one size."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)  # rounded up
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        grid.paste(image, (column * width, row * height))
    return grid


def main():
    args = arguments()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if args.subject:
        train(args)
    else:
        draw(args)


if __name__ == "__main__":
    guard(main)

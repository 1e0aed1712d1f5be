"""TuneQDM for the UNet of Stable Diffusion 1.x or 2.x: fine-tune it to a subject as DreamBooth does
(Ruiz et al. 2023), and train nothing but the scales of its quantized weights.

    pip install -r examples/requirements.txt
    python examples/stable_diffusion.py --model PATH_OR_NAME --subject FOLDER \\
        --prompt "a photo of sks dog" \\
        --class-prompt "a photo of a dog" --class-images FOLDER
    python examples/stable_diffusion.py --model PATH_OR_NAME --sample "sks dog on a beach"

First the UNet is quantized and written to base.pt: once for each model, for all its subjects
(--base). That takes a minute on a GPU and an hour on a CPU; --calibration minmax is quicker and
coarser. Then the VAE encodes every image once, the text encoder the two prompts, and both are
dropped. A training step noises latents of the subject and of its class, asks the UNet for the noise
of both in one batch, and moves the scales of the timestep buckets that the batch was in:

    loss = MSE(subject) + prior * MSE(class)

The images of the class, photographed or drawn by the model, keep it from taking every dog for the
subject. Without them there is only the first term. adapter.pt holds the result: the scales, about a
megabyte for each bucket.

The learning rate is DiffFit's for scale factors (Xie et al. 2023) and was not tuned on real weights.
The same seed gives the same adapter on a CPU; on a GPU, PyTorch's attention sums in no fixed order.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from quant import CALIBRATIONS, adapter, bucket, deltas, load_adapter, quantize, remember
from sample import Parser, guard, load, save

try:
    from diffusers import DDPMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging
except ImportError:
    print("diffusers or transformers is missing; pip install -r examples/requirements.txt", file=sys.stderr)
    sys.exit(2)

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


# --------------------------------------------------------------------------------------------------
# What the pipeline gives: latents, prompts, the noise schedule, the UNet to quantize
# --------------------------------------------------------------------------------------------------


def from_pretrained(kind, name, dtype=torch.float32, **options):
    """kind.from_pretrained, whose many errors become one sentence (ValueError)."""
    try:
        pipeline = StableDiffusionPipeline.load_config(name)["_class_name"]
        if pipeline == "StableDiffusionPipeline":
            options = {"dtype": dtype, "low_cpu_mem_usage": False, **options}
            return kind.from_pretrained(name, **options)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"--model {name} can't be read ({reason}); "
            "give a folder that save_pretrained wrote, or a name on the Hugging Face Hub"
        ) from None
    raise ValueError(
        f"--model {name} is a {pipeline}; give a StableDiffusionPipeline, "
        "which is Stable Diffusion 1.x or 2.x (SDXL has a second text encoder)"
    )


def load_pipeline(name, unet=None):
    """The pipeline around this UNet, or without one."""
    without = {"safety_checker": None, "requires_safety_checker": False}
    pipe = from_pretrained(StableDiffusionPipeline, name, unet=unet, **without)
    predicts = pipe.scheduler.config.prediction_type
    if predicts not in ("epsilon", "v_prediction"):
        raise ValueError(f"--model {name} predicts {predicts}, neither epsilon nor v_prediction")
    return pipe


def read_image(path, size):
    """The image's middle square: (1, 3, size, size) in [-1, 1]."""
    try:
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    except Exception:
        raise ValueError(f"{path} is no image that can be read; remove or replace it") from None
    image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image))  # (size, size, 3), uint8
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1


@torch.no_grad()
def encode(pipe, folder, prompt, size):
    """The latents of a folder's images, (M, 4, h, w), and what the UNet attends to, (1, 77, C)."""
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise ValueError(f"{folder} holds no images ({' '.join(IMAGES)}); give a folder that does")
    tokens = len(pipe.tokenizer(prompt).input_ids)
    if tokens > pipe.tokenizer.model_max_length:
        raise ValueError(f"'{prompt}' has {tokens} tokens, too many for the model; shorten it")

    latents = []
    for path in tqdm(paths, f"encoding {folder.name}", leave=False):
        image = read_image(path, size).to(pipe.device)
        latents.append(pipe.vae.encode(image).latent_dist.mean.cpu())
    latents = torch.cat(latents) * pipe.vae.config.scaling_factor
    words, _ = pipe.encode_prompt(prompt, pipe.device, 1, do_classifier_free_guidance=False)
    return latents, words.cpu()


def make_base(args, T):
    """Quantize the UNet of --model and write it to --base, without deltas.

    In float16 the UNet takes 1.7 GB of the GPU. Calibration itself computes in float32.
    """
    print(f"quantizing the UNet of {args.model} to {args.base}, once", flush=True)
    unet = from_pretrained(UNet2DConditionModel, args.model, torch.float16, subfolder="unet")
    config = {key: value for key, value in unet.config.items() if not key.startswith("_")}
    unet.to(args.device)
    quantize(unet, args.bits, T=T, calibration=args.calibration)
    unet.float()
    state = unet.state_dict()
    for name in deltas(unet):
        del state[name]
    made = {"model": args.model, "bits": args.bits, "calibration": args.calibration}
    file = {"config": config, "quant_config": unet.quant_config, "unet": state, "made": made}
    save({"kind": "Stable Diffusion base", **file}, args.base)


def read_base(path, num_buckets, device):
    """The quantized UNet of a base, with all deltas zero."""
    saved = load(path, "Stable Diffusion base")
    made = saved["quant_config"]
    unet = UNet2DConditionModel.from_config(saved["config"])
    # quantize random weights, for layers of the right shapes, and fill these
    same = {key: made[key] for key in ("n_bits", "T", "keep8")}
    quantize(unet, num_buckets=num_buckets, timestep="timestep", calibration="minmax", **same)
    unet.quant_config["calibration"] = made["calibration"]
    unet.load_state_dict({**unet.state_dict(), **saved["unet"]})
    return unet.to(device)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def checkpoint_blocks(unet):
    """Keep only the inputs of the UNet's blocks for backward, which runs each block again.

    By then the UNet's call is over, and with it what its layers were told of the batch's timesteps.
    remember tells them again.
    """

    def run(block, *inputs):
        again = partial(remember, unet)
        return checkpoint(block, *inputs, use_reentrant=False, context_fn=again)

    unet.enable_gradient_checkpointing(run)


def describe(args):
    """What a run must share with the one that it resumes."""
    shared = ("model", "subject", "prompt", "class_images", "class_prompt", "bits", "calibration")
    shared += ("buckets", "steps", "lr", "batch", "prior", "seed")
    return {key: str(getattr(args, key)) for key in shared}


def resumed(args):
    """The last state of a run with the same arguments; ValueError if there is none."""
    saved = load(args.out / "state.pt", "Stable Diffusion state")
    for key, value in describe(args).items():
        was = saved["args"].get(key)
        if was != value:
            raise ValueError(
                f"{args.out / 'state.pt'} is of a run with {key} {was}, not {value}; "
                "resume with the same arguments, or choose another --out"
            )
    return saved


def show(bar, averages, loss, buckets):
    """Put on the bar a running mean of the loss (N,) in each bucket; buckets (N,)."""
    for b, value in zip(buckets.tolist(), loss.tolist()):
        averages[b] = 0.98 * averages.get(b, value) + 0.02 * value
    means = [f"{averages[b]:.4f}" for b in sorted(averages)]
    bar.set_postfix_str("loss by bucket " + " ".join(means), refresh=False)


def tune(unet, noise, data, args, saved=None):
    """Train the deltas of unet.

    noise: a DDPMScheduler. data: (latents, words) of the subject and, if there are images of it, of
    the class, as encode returns them. saved: a state to go on from. All random draws come from one
    generator on the CPU, and its state is in the state file.
    """
    T = noise.config.num_train_timesteps
    trained = deltas(unet)
    optimizer = torch.optim.Adam(trained.values(), lr=args.lr, fused=True)
    generator = torch.Generator().manual_seed(args.seed)
    averages = {}
    first = 0
    if saved is not None:
        first = saved["step"]
        optimizer.load_state_dict(saved["optimizer"])
        generator.set_state(saved["generator"])
        with torch.no_grad():
            for name, delta in trained.items():
                delta.copy_(saved["deltas"][name])

    bar = tqdm(range(first, args.steps), "tuning", initial=first, total=args.steps)
    for step in bar:
        for group in optimizer.param_groups:  # warm up, then down to zero
            group["lr"] = args.lr * min(1, (step + 1) / 20) * (1 - step / args.steps)

        # a batch: B latents of the subject and behind them, with prior preservation, B of the class
        x0 = []
        words = []
        for latents, prompt in data:
            pick = torch.randint(len(latents), (args.batch,), generator=generator)
            x0.append(latents[pick])
            words.append(prompt.expand(args.batch, -1, -1))
        x0 = torch.cat(x0)  # (2B, 4, h, w)
        words = torch.cat(words)  # (2B, 77, C)
        t = torch.randint(T, (len(x0),), generator=generator)  # (2B,)
        eps = torch.randn(x0.shape, generator=generator)  # (2B, 4, h, w)

        # add noise, and predict it
        x_t = noise.add_noise(x0, eps, t)
        target = eps
        if noise.config.prediction_type == "v_prediction":
            target = noise.get_velocity(x0, eps, t)
        x_t, t_there, words, target = (a.to(args.device) for a in (x_t, t, words, target))
        with torch.autocast(args.device, torch.bfloat16):
            predicted = unet(x_t, t_there, words).sample
        loss = (predicted.float() - target).square().mean((1, 2, 3))  # (2B,)
        if not loss.isfinite().all():
            raise ValueError(f"the loss isn't finite at step {step}: lower --lr {args.lr}")

        # move the scales
        total = loss[: args.batch].mean()
        if len(data) > 1:
            total = total + args.prior * loss[args.batch :].mean()
        optimizer.zero_grad()
        total.backward()
        optimizer.step()

        show(bar, averages, loss, bucket(t, args.buckets, T))
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            state = {"step": step + 1, "args": describe(args), "deltas": trained}
            state |= {"optimizer": optimizer.state_dict(), "generator": generator.get_state()}
            save({"kind": "Stable Diffusion state", **state}, args.out / "state.pt")


def peak_memory(device):
    """Bytes: the most that tensors took of the GPU, or the process of main memory."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def train(args):
    saved = resumed(args) if args.resume else None
    pipe = load_pipeline(args.model).to(args.device)
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    latent_size = UNet2DConditionModel.load_config(args.model, subfolder="unet")["sample_size"]
    size = latent_size * pipe.vae_scale_factor  # of the images, in pixels
    data = [encode(pipe, args.subject, args.prompt, size)]
    if args.class_images:
        data.append(encode(pipe, args.class_images, args.class_prompt, size))
    del pipe  # the VAE and the text encoder

    if not args.base.exists():
        make_base(args, noise.config.num_train_timesteps)
    made = load(args.base, "Stable Diffusion base")["made"]
    if made != {key: getattr(args, key) for key in made}:
        flags = " ".join(f"--{key} {value}" for key, value in made.items())
        raise ValueError(f"{args.base} was made with {flags}; give the same, or another --base")
    unet = read_base(args.base, args.buckets, args.device)
    if not args.no_checkpoint:
        checkpoint_blocks(unet)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    tune(unet, noise, data, args, saved)

    path = args.out / "adapter.pt"
    save({"kind": "adapter", **adapter(unet)}, path)
    count = sum(delta.numel() for delta in deltas(unet).values())
    print(f"wrote {path}: {count:,} scales in {path.stat().st_size / 1e6:.2f} MB")
    print(f"peak memory {peak_memory(args.device) / 1e9:.2f} GB ({args.device})")


# --------------------------------------------------------------------------------------------------
# Sampling
# --------------------------------------------------------------------------------------------------


@torch.no_grad()
def draw(args):
    """A grid of images of --sample, drawn by the pipeline with its own scheduler.

    The pipeline gives the UNet one timestep for all samples, so a call takes one bucket's scales.
    Weights stay packed: 3 GB of float weights never exist.
    """
    saved = load(args.out / "adapter.pt", "adapter")
    unet = read_base(args.base, saved["quant_config"]["num_buckets"], args.device)
    load_adapter(unet, saved)
    pipe = load_pipeline(args.model, unet).to(args.device)
    pipe.set_progress_bar_config(desc="drawing", leave=False)
    images = []
    for number in range(args.n):  # one by one: an image depends on the seed and its number only
        generator = torch.Generator().manual_seed(args.seed + number)
        options = {"num_inference_steps": args.sample_steps, "guidance_scale": args.guidance}
        with torch.autocast(args.device, torch.bfloat16):
            images += pipe(args.sample, generator=generator, **options).images

    columns = min(args.n, 4)
    rows = -(-args.n // columns)  # rounded up
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        grid.paste(image, (column * width, row * height))
    path = args.out / "sample.png"
    save(grid, path, lambda grid, file: grid.save(file, "png"))
    print(f"wrote {path}: {args.n} images of '{args.sample}'")


def arguments():
    parser = Parser(description="TuneQDM for Stable Diffusion 1.x and 2.x")
    parser.add_argument("--model", required=True, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--out", type=Path, default=Path("out/stable-diffusion"), help="a folder")
    parser.add_argument("--base", type=Path, help="the quantized UNet (default: base.pt in --out)")
    parser.number("--seed", int, 0, 2**62, 0, "seed of everything random")
    parser.device()

    data = parser.add_argument_group("data")
    data.add_argument("--subject", type=Path, help="a folder with images of the subject")
    data.add_argument("--prompt", help="names it by a rare word: 'a photo of sks dog'")
    data.add_argument("--class-images", type=Path, help="a folder with images of its class")
    data.add_argument("--class-prompt", help="names the class: 'a photo of a dog'")

    quantizer = parser.add_argument_group("quantizer")
    parser.number("--bits", int, 2, 8, 4, "bits of a weight", group=quantizer)
    parser.number("--buckets", int, 1, 1000, 2, "scale sets over the timesteps", group=quantizer)
    quantizer.add_argument("--calibration", choices=CALIBRATIONS, default="rowcol")

    run = parser.add_argument_group("training")
    parser.number("--steps", int, 1, 10**7, 800, "optimizer steps", group=run)
    parser.number("--lr", float, 0, 10, 1e-3, "learning rate of the relative scales", group=run)
    parser.number("--batch", int, 1, 1024, 1, "images of the subject in a step", group=run)
    parser.number("--prior", float, 0, 100, 1.0, "weight of the class images' loss", group=run)
    parser.number("--save-every", int, 1, 10**7, 100, "steps between two states", group=run)
    run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
    run.add_argument("--no-checkpoint", action="store_true", help="faster, for more memory")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--sample", metavar="PROMPT", help="draw this with the adapter in --out")
    parser.number("--n", int, 1, 1000, 8, "images", group=sampling)
    parser.number("--sample-steps", int, 1, 500, 50, "steps of the sampler", group=sampling)
    parser.number("--guidance", float, 1, 100, 7.5, "classifier-free guidance", group=sampling)

    args = parser.parse_args()
    args.base = args.base or args.out / "base.pt"
    if not (args.subject or args.sample):
        parser.error("nothing to do; give --subject FOLDER to train, or --sample PROMPT to draw")
    if args.subject and not args.prompt:
        parser.error("--subject needs --prompt, such as 'a photo of sks dog'")
    if bool(args.class_images) != bool(args.class_prompt):
        parser.error("--class-images and --class-prompt belong together; give both, or neither")
    return args


def main():
    args = arguments()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)
    args.base.parent.mkdir(parents=True, exist_ok=True)
    if args.subject:
        train(args)
    if args.sample:
        draw(args)


if __name__ == "__main__":
    guard(main)

"""Draw images from a checkpoint: python sample.py --prompt "red creature on green stripes"

The checkpoint is enough: it holds the sizes of the model, and how it was quantized. The samplers
are DDPM's ancestral sampling and DDIM. Both visit all T timesteps or an evenly spaced subset, and
both use classifier-free guidance.
"""

from pathlib import Path

import torch
from tqdm import tqdm

from data import toy
from model import Diffusion, UNet
from quant import bucket, load_adapter, merge, quantize
from support.files import load, save
from support.flags import Parser, guard, number, path

BASE = Path(__file__).resolve().parent / "data" / "base.pt"  # the pretrained model that ships


def load_model(path, device="cpu", kinds=("model", "quantized")):
    """The UNet of a checkpoint, float or quantized, ready to sample.

    Raises ValueError if the file holds none.
    """
    saved = load(path, *kinds)
    try:
        model = UNet(**saved["config"])
        if saved["kind"] == "quantized":
            # minmax is the quickest way to layers of the right shapes
            quantize(model, **{**saved["quant_config"], "calibration": "minmax"})
            model.quant_config["calibration"] = saved["quant_config"]["calibration"]
        model.load_state_dict(saved["model"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{path} isn't a model of this version ({type(error).__name__}); make it again"
        ) from error
    return model.to(device, memory_format=torch.channels_last).eval()


def ddpm_step(x, x0, eps, abar, abar_next, noise):
    """From x_t to x_s, s < t: Algorithm 2 of DDPM, line 4, with the posterior variance (eq. 7).

    x (x_t), x0 and eps (the prediction), noise: (N, C, H, W); x0 isn't used. abar, abar_next:
    alphas_cumprod at t and at s, 0-dimensional.
    """
    beta = 1 - abar / abar_next  # of the whole stride from s to t
    mean = (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    sigma = (beta * (1 - abar_next) / (1 - abar)).sqrt()
    return mean + sigma * noise


def ddim_step(x, x0, eps, abar, abar_next, noise):
    """From x_t to x_s, s < t, without noise: DDIM (Song et al. 2021), eq. 12 with sigma = 0.

    The arguments are those of ddpm_step; x and noise aren't used.
    """
    return abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step}


@torch.no_grad()
def sample(
    model,
    words,
    steps=40,
    sampler="ddpm",
    cfg_scale=3.0,
    seed=0,
    diffusion=None,
    progress=False,
    chunk=64,
    packed=False,
):
    """Draw an image for each caption of words (N, L): (N, 3, 16, 16) in [-1, 1].

    An image depends on its caption, the seed and its place in the batch, and on no other image.
    steps: timesteps visited, out of T. sampler: "ddpm" or "ddim". cfg_scale: the scale of
    classifier-free guidance; 1 is none. diffusion: by default Diffusion(). progress: show a bar.
    chunk: how many images are drawn at once. packed: keep the weights of a quantized model packed,
    which takes less memory and more time; else they are merged into float weights, once for each
    bucket. Raises ValueError if an image isn't finite.
    """
    diffusion = diffusion or Diffusion()
    step = SAMPLERS[sampler]
    timesteps = torch.linspace(diffusion.T - 1, 0, steps).round().long().tolist()
    abars = [*diffusion.alphas_cumprod[timesteps], torch.ones((), dtype=torch.float64)]

    generators = noise_generators(seed, len(words))
    x = draw_noise(generators)

    merges = hasattr(model, "quant_config") and not packed
    net = model
    merged_bucket = None
    for i, t in enumerate(tqdm(timesteps, "sampling", leave=False) if progress else timesteps):
        if merges:
            b = int(bucket(t, model.quant_config["edges"]))
            if b != merged_bucket:
                net = merge(model, b)
                merged_bucket = b
        x0, eps = predict(net, x, t, words, cfg_scale, diffusion, chunk)
        noise = draw_noise(generators)
        x = step(x, x0, eps, abars[i], abars[i + 1], noise)
    check_finite(x)
    return x.clamp(-1, 1)


def noise_generators(seed, n):
    """A generator of noise for each of n images, at most 1000, by the seed and the image's place.

    With one generator for all, image 0 of 8 would not be image 0 of 1: the noise of a step begins
    where that of the step before has ended.
    """
    return [torch.Generator().manual_seed(1000 * seed + place) for place in range(n)]


def draw_noise(generators):
    """Standard normal noise, an image from each of N generators: (N, 3, 16, 16)."""
    size = (3, toy.SIZE, toy.SIZE)
    return torch.stack([torch.randn(size, generator=generator) for generator in generators])


def check_finite(images):
    """Raise ValueError if an image isn't finite."""
    if not images.isfinite().all():
        raise ValueError(
            "the images aren't finite: the training of this model has diverged, so train it again "
            "with a lower --lr; or --strength is too large"
        )


def predict(net, x, t, words, cfg_scale, diffusion, chunk):
    """The x0 and eps that the model finds in x (N, 3, H, W) at timestep t: both of x's shape.

    x0 is clamped to [-1, 1], and eps is computed again from x and the clamped x0. The model runs
    on its device, on a chunk at a time; x and the results are on the CPU, where the noise is
    drawn.
    """
    device = next(net.parameters()).device
    x0_chunks = []
    eps_chunks = []
    for xs, ws in zip(x.split(chunk), words.split(chunk)):
        xs = xs.to(device, memory_format=torch.channels_last)
        ws = ws.to(device)
        ts = torch.full((len(xs),), t, device=device)
        v = guided(net, xs, ts, ws, cfg_scale)
        x0 = diffusion.to_x0(v, xs, ts).clamp(-1, 1)
        a, s = diffusion.coefficients(ts, xs)
        eps = (xs - a * x0) / s
        x0_chunks.append(x0.cpu())
        eps_chunks.append(eps.cpu())
    return torch.cat(x0_chunks), torch.cat(eps_chunks)


def guided(net, x, t, words, cfg_scale):
    """The model's v (N, 3, H, W) with classifier-free guidance (Ho and Salimans 2022)."""
    if cfg_scale == 1:
        return net(x, t, words)
    empty = torch.zeros_like(words)  # a caption of empty slots
    both = net(torch.cat([x, x]), torch.cat([t, t]), torch.cat([words, empty]))
    v, v_empty = both.chunk(2)
    return v_empty + cfg_scale * (v - v_empty)


def arguments():
    """The flags."""
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--ckpt", type=path, default=BASE, help="a base or a tuned model")
    adapter_help = "adapters of the quantized base in --ckpt; several add, in the place of its own"
    add("--adapter", type=path, nargs="+", action="extend", help=adapter_help)
    strength_help = "what the adapters' deltas are multiplied by; 0 is the base"
    add("--strength", type=number(0.0, 10.0), default=1.0, help=strength_help)
    add("--prompt", default="red creature on green stripes", help="a caption")
    add("--n", type=number(1, 1000), default=8, help="images")
    add("--sampler", choices=SAMPLERS, default="ddpm", help="DDIM's steps add no noise")
    add("--steps", type=number(1, 1000), default=40, help="timesteps visited, of 1000")
    add("--cfg-scale", type=number(0.0, 100.0), default=3.0, help="guidance; 1 is the plain model")
    add("--packed", action="store_true", help="never hold float weights: less memory, slower")
    add("--out", type=path, default=Path("out/sample.png"), help="the PNG to write")
    parser.add_seed()
    parser.add_device()
    args = parser.parse_args()
    if args.strength != 1 and not args.adapter:
        parser.error("--strength is that of an adapter; give --adapter")
    return args


def main():
    args = arguments()
    words = torch.tensor([toy.caption(args.prompt)] * args.n)
    if not words.any():
        raise ValueError("the prompt is empty; write one such as 'red creature on green stripes'")
    for given in (args.ckpt, *(args.adapter or [])):
        if given.resolve() == args.out.resolve():
            raise ValueError(f"--out would replace {given}, which is read; give another")

    model = load_model(args.ckpt, args.device)
    if (args.adapter or args.packed) and not hasattr(model, "quant_config"):
        raise ValueError(
            f"--adapter and --packed need a quantized model, and {args.ckpt} is a float one; "
            "give a tuned.pt"
        )
    if args.adapter:
        adapters = [load(given, "adapter") for given in args.adapter]
        load_adapter(model, *adapters, strength=args.strength)

    images = sample(
        model,
        words,
        args.steps,
        args.sampler,
        args.cfg_scale,
        args.seed,
        progress=True,
        packed=args.packed,
    )
    save(toy.tile(images, min(args.n, 8)), args.out)
    print(f"wrote {args.out}: {args.n} images of '{args.prompt}'")


if __name__ == "__main__":
    guard(main)

"""Draw pictures from a checkpoint: python sample.py --ckpt data/base.pt --prompt "red creature on green stripes"

The checkpoint alone is enough: it holds the model's sizes and how it was quantized. The samplers are DDPM's ancestral
one (Algorithm 2) and DDIM, both over all T timesteps or an even subset, both with classifier-free guidance.
"""
import argparse
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from data import toy
from model import Diffusion, UNet, load, save
from quant import bucket, load_adapter, merge, quantize

BASE = Path(__file__).resolve().parent / "data" / "base.pt"


def ddpm_step(x, x0, eps, abar, abar_next, noise):
    """x_t to x_s, s < t, by sampling DDPM's posterior: Algorithm 2, line 4, with sigma^2 the posterior variance (eq. 7).

    x, x0, eps, noise: (N, C, H, W); abar, abar_next: alphas_cumprod at t and s, 0-dimensional.
    """
    beta = 1 - abar / abar_next  # over the whole stride
    mean = (x - beta / (1 - abar).sqrt() * eps) / (1 - beta).sqrt()
    return mean + (beta * (1 - abar_next) / (1 - abar)).sqrt() * noise


def ddim_step(x, x0, eps, abar, abar_next, noise):
    """x_t to x_s, s < t, without noise (DDIM, Song et al. 2021, eq. 12 with sigma = 0). Arguments as for ddpm_step."""
    return abar_next.sqrt() * x0 + (1 - abar_next).sqrt() * eps


SAMPLERS = {"ddpm": ddpm_step, "ddim": ddim_step}


@torch.no_grad()
def sample(model, words, steps=40, sampler="ddpm", cfg_scale=3.0, seed=0, diffusion=None, progress=False, chunk=64,
           packed=False):
    """Draw a picture for each caption of words (N, L): (N, 3, 16, 16) in [-1, 1].

    steps: timesteps visited, out of T. cfg_scale: 1 is the plain model; above, its prediction is pushed away from that
    for the empty caption. packed: rebuild a quantized model's weights at each call, and not once for each timestep bucket;
    it takes less memory and more time. Each picture depends on the seed and its place in words only.
    """
    diffusion, device = diffusion or Diffusion(), next(model.parameters()).device
    generator, size = torch.Generator().manual_seed(seed), (len(words), 3, toy.SIZE, toy.SIZE)
    timesteps = torch.linspace(diffusion.T - 1, 0, steps).round().long().tolist()
    abars = [*diffusion.alphas_cumprod[timesteps], torch.ones((), dtype=torch.float64)]
    x, words = torch.randn(size, generator=generator), words.to(device)
    quantized, net, now = None if packed else getattr(model, "quant_config", None), model, None
    for i, t in enumerate(tqdm(timesteps, desc="sampling", disable=not progress, leave=False)):
        if quantized and now != (now := int(bucket(t, quantized["num_buckets"], quantized["T"]))):
            net = merge(model, now)
        noise, parts = torch.randn(size, generator=generator), []
        for xs, ws, zs in zip(x.split(chunk), words.split(chunk), noise.split(chunk)):
            xs, ts = xs.to(device, memory_format=torch.channels_last), torch.full((len(xs),), t, device=device)
            if cfg_scale == 1:
                v = net(xs, ts, ws)
            else:
                v, empty = net(torch.cat([xs, xs]), torch.cat([ts, ts]), torch.cat([ws, 0 * ws])).chunk(2)
                v = empty + cfg_scale * (v - empty)
            x0 = diffusion.to_x0_eps(v, xs, ts)[0].clamp(-1, 1)
            a, s = diffusion.coefficients(ts, xs)
            parts.append(SAMPLERS[sampler](xs.cpu(), x0.cpu(), ((xs - a * x0) / s).cpu(), abars[i], abars[i + 1], zs).float())
        x = torch.cat(parts)
    return x.clamp(-1, 1)


def load_model(path, device="cpu"):
    """The model of a checkpoint, ready to sample. Raises ValueError where there is none."""
    saved = load(path, "model", "quantized")
    try:
        model = UNet(**saved["config"])
        if saved["kind"] == "quantized":
            quantize(model, **{**saved["quant_config"], "calibration": "minmax"})  # layers of the right shape, to be filled
            model.quant_config = saved["quant_config"]
        model.load_state_dict(saved["model"])
        if not all(value.isfinite().all() for value in model.state_dict().values()):
            raise ValueError
    except Exception:
        raise ValueError(f"{path} doesn't hold a whole model of this version; make it again") from None
    return model.to(device, memory_format=torch.channels_last).eval()


class Parser(argparse.ArgumentParser):
    """argparse with flags of checked range, and errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def number(self, flag, kind, low, high, default, help, group=None):
        def check(text):
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not low <= value <= high:
                raise argparse.ArgumentTypeError(f"must be a{' whole' * (kind is int)} number from {low} to {high}, not '{text}'")
            return value
        help += "" if default is None else f" (default: {default})"
        (group or self).add_argument(flag, type=check, default=default, help=help)

    def device(self):
        found = ["cuda"] * torch.cuda.is_available() + ["mps"] * torch.backends.mps.is_available() + ["cpu"]
        self.add_argument("--device", choices=found, default=found[0], help=f"of those on this machine (default: {found[0]})")


def guard(main):
    """Run a script: bad input ends with one sentence and exit code 2, Ctrl-C with 130, neither with a traceback."""
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):  # the latter where what is printed goes to head, say
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "peer" not in str(error):  # another process of torchrun's has died
            raise
        if isinstance(error, OSError):
            error = f"{error.filename or 'the output'} can't be used ({error.strerror}); give another path"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--ckpt", default=BASE, help="a base or a tuned model (default: the shipped base)")
    parser.add_argument("--adapter", help="an adapter to put on the quantized model of --ckpt")
    parser.add_argument("--prompt", default="red creature on green stripes")
    parser.number("--n", int, 1, 1000, 8, "pictures")
    parser.add_argument("--sampler", choices=SAMPLERS, default="ddpm")
    parser.number("--steps", int, 1, 1000, 40, "timesteps visited, of 1000")
    parser.number("--cfg-scale", float, 0, 100, 3.0, "guidance; 1 is the plain model")
    parser.number("--seed", int, 0, 2**63 - 1, 0, "seed of the noise")
    parser.add_argument("--packed", action="store_true", help="never hold float weights: less memory, slower")
    parser.add_argument("--out", default="out/sample.png", help="the PNG to write")
    parser.device()
    args = parser.parse_args()
    words = torch.tensor([toy.caption(args.prompt)] * args.n)
    if not words.any():
        raise ValueError("the prompt is empty; write one such as 'red creature on green stripes'")
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    model = load_model(args.ckpt, args.device)
    if args.adapter:
        if not hasattr(model, "quant_config"):
            raise ValueError(f"--adapter needs a quantized model, and {args.ckpt} is a float one; give a tuned.pt")
        load_adapter(model, load(args.adapter, "adapter"))
    images = sample(model, words, args.steps, args.sampler, args.cfg_scale, args.seed, progress=True, packed=args.packed)
    save(toy.to_grid(images, min(args.n, 8)), args.out, lambda picture, file: picture.save(file, "png"))
    print(f"wrote {args.out}: {args.n} pictures of '{args.prompt}'")


if __name__ == "__main__":
    guard(main)

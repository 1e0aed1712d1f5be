"""The paper's neighbours in miniature, each by scales alone: python experiments/neighbours.py NAME

    stages     scale sets for three stages of time, in the decoder alone
    start      sampling that starts at t = tau T, from a Gaussian
    pruning    channels ranked, taken out and made up for
    few        forty guided steps distilled into eight and into four

All of them have columns by position and 4 bits, and one scale set unless a row says otherwise. A
finished run is a line of the log, and isn't done again; --log experiments/runs.jsonl --rows none
shows what ships. Sampling visits the starts of equal parts of time, and its last step is the one to
the image; what is compared gets the same noise and prompts.
"""

import re
import sys
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import train
from claims import POSITION, RECOVERY, THREE_SETS, difference
from data import toy
from data.score import matches, score
from pretrain import random_prompt
from quant import (
    QuantConv2d,
    QuantLayer,
    adapter,
    deltas,
    equal_edges,
    load_adapter,
    merge,
    quantize,
)
from recovery import LR_SCALES, STEPS, kept_in_file, prepare, recovered, tune_on_world
from report import append, by_seed, is_due, make_tables, mean_sd, runs_of, show
from runs import (
    DIFFUSION,
    SHORT,
    PartOfTime,
    fill_by,
    fine_tuned,
    run_all,
    squared_error,
    tune,
    validation_loss,
)
from sample import BASE, SAMPLERS, load_model, predict
from support.files import save
from support.flags import guard

# --------------------------------------------------------------------------------------------------
# What the parts share
# --------------------------------------------------------------------------------------------------


def do(args, part, name, job):
    """Do the job for each seed, if the log doesn't have it. job: a seed -> what the log says."""
    for seed in range(args.seeds):
        key = {"neighbour": part, "name": name, "seed": seed}
        if is_due(args, name, key):
            append(args.log, key, job(seed))


def done(args, part, name) -> list[dict]:
    """The runs of a part and name in the log, one for each seed."""
    return list(by_seed(args, neighbour=part, name=name).values())


def cells_of(runs, digits: dict[str, int]) -> list[str]:
    """Means ± deviations over runs. digits: {a key of the log: digits after the point}."""
    return [mean_sd([run[key] for run in runs], n) for key, n in digits.items()]


def recovered_base(args, seed):
    """The base at 4 bits, with recovered scales."""
    model, _ = prepare(RECOVERY, seed)
    load_adapter(model, recovered(args, RECOVERY, seed))
    return model


def creatures(n, seed, each=1) -> tuple[list[str], Tensor]:
    """n prompts such as "red creature on green stripes", and their captions, each repeated."""
    generator = torch.Generator().manual_seed(seed)
    prompts = [random_prompt(["creature"], generator) for _ in range(n)]
    words = torch.tensor([toy.caption(prompt) for prompt in prompts])
    return prompts, words.repeat_interleave(each, 0)


def shares_right(images, words) -> dict[str, float]:
    """The shares of images (N, 3, 16, 16) of captions words (N, L) that are right.

    right: all that the caption says is there. whole: and it is a scene of the world, pixel by
    pixel.
    """
    right = score(images, words)["prompt"] == 1
    whole = right & matches(images)
    return {"right": right.float().mean().item(), "whole": whole.float().mean().item()}


def times_of(steps, tau=1.0) -> list[int]:
    """The timesteps visited by so many steps from t = tau T - 1: the last ends at an image."""
    times = torch.linspace(tau * DIFFUSION.T - 1, 0, steps + 1).round().long()
    return times[:-1].tolist()


def run_from(net, x, words, times, sampler="ddim", cfg_scale=3.0, generator=None):
    """Sample from x (N, 3, 16, 16) at timestep times[0] through times to an image: a list of all x.

    net: the model, quantized or merged. generator: of DDPM's noise.
    """
    abars = [*DIFFUSION.alphas_cumprod[times], torch.ones((), dtype=torch.float64)]
    path = [x]
    for i, t in enumerate(times):
        x0, eps = predict(net, x, t, words, cfg_scale, DIFFUSION, chunk=64)
        noise = torch.randn(x.shape, generator=generator) if sampler == "ddpm" else None
        x = SAMPLERS[sampler](x, x0, eps, abars[i], abars[i + 1], noise)
        path.append(x)
    return path


@torch.no_grad()
def draw(net, words, times, seed, sampler="ddim", cfg_scale=3.0) -> Tensor:
    """Images (N, 3, 16, 16) of captions words (N, L) from pure noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(words), 3, toy.SIZE, toy.SIZE, generator=generator)
    return run_from(net, x, words, times, sampler, cfg_scale, generator)[-1].clamp(-1, 1)


def keep_strip(args, part, name, seed, images):
    """Keep the first images of a row in a file, for page_of, if it is the first seed."""
    if seed == 0:
        save(toy.tile(images[:12], 12, zoom=4), strip_file(args, part, name))


def strip_file(args, part, name) -> Path:
    """The file of a row's images. Not every system has all characters for names."""
    return Path("out") / args.log.stem / part / f"{re.sub('[^a-zA-Z0-9 ,%.]', '', name)}.png"


def page_of(args, part, names):
    """Put the strips that are there on a page, each under its name: out/LOG/PART.png."""
    strips = {name: strip_file(args, part, name) for name in names}
    strips = {name: Image.open(file) for name, file in strips.items() if file.exists()}
    if not strips:
        return
    line = 14  # pixels of a line of text
    width, height = next(iter(strips.values())).size
    page = Image.new("RGB", (width, len(strips) * (height + line)), "white")
    text = ImageDraw.Draw(page)
    for i, (name, strip) in enumerate(strips.items()):
        y = i * (height + line)
        text.text((4, y + 1), name, "black")
        page.paste(strip, (0, y + line))
    file = Path("out") / args.log.stem / f"{part}.png"
    save(page, file)
    print(f"wrote {file}")


# --------------------------------------------------------------------------------------------------
# Stages. "Our approach involves segmenting the time interval into multiple stages where we employ
# custom multi-decoder U-net architecture that blends time-dependent models with a universally
# shared encoder." (Zhang et al. 2023, arXiv 2312.09181)
# --------------------------------------------------------------------------------------------------

# Here a stage has scale sets of its own, in the decoder or everywhere, in the place of a decoder.
STAGES = (0, 442, 631, 1000)
# The same t means other noise under another schedule: in a VP SDE with beta from 0.1 to 20, abar is
# 0.137 and 0.018 at these two. Under this project's cosine schedule, that is at
STAGES_BY_NOISE = (0, 756, 913, 1000)


def share_encoder(model):
    """Give the layers outside of the decoder one scale set: one Parameter under each bucket's name.

    Its gradient is the sum over the buckets. deltas names it once, state_dict under every bucket.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer) and not name.startswith(("up.", "out")):
            for kind in layer.trained:
                for b in range(1, layer.num_buckets):
                    setattr(layer, f"{kind}_{b}", layer.delta(kind, 0))


def stages(args):
    """Do scale sets of their own for three stages help, and does the decoder suffice?"""
    one = SHORT[POSITION]
    rows = {"one set": one}
    edges = {
        "thirds": equal_edges(3, DIFFUSION.T),
        "stages": STAGES,
        "stages by noise": STAGES_BY_NOISE,
    }
    for name, of_kind in edges.items():
        rows[f"{name}, sets everywhere"] = replace(one, edges=tuple(of_kind))
    for name in edges:
        row = rows[f"{name}, sets everywhere"]
        rows[f"{name}, the decoder's sets"] = replace(row, change=share_encoder)
    table = []
    for name, row in rows.items():
        do(args, "stages", name, partial(recover_stages, args, row))
        runs = by_seed(args, neighbour="stages", name=name)
        if runs:
            cells = [name, f"{next(iter(runs.values()))['trained']:,}"]
            cells += cells_of(list(runs.values()), {"after": 5})
            one_set = by_seed(args, neighbour="stages", name="one set")
            table.append([*cells, difference(runs, one_set), str(len(runs))])
    columns = ["scale sets", "trained", "validation loss", "minus one set", "runs"]
    show(args, "stages, recovery", columns, table)

    # two of the rows are in claims.py, too
    in_log = {"one set": one.name, "thirds, sets everywhere": f"{THREE_SETS.name}, all timesteps"}
    jobs = {}
    for name, row in rows.items():
        if "by noise" not in name:
            row = replace(row, name=in_log.get(name, f"{name}, 4 bits, 500 steps"))
            jobs[name] = (row.name, partial(tune, args, row))
    pairs = [(name, "one set") for name in jobs if name != "one set"]
    for which in ("sets everywhere", "the decoder's sets"):
        pairs.append((f"stages, {which}", f"thirds, {which}"))
    for of_kind in ("thirds", "stages"):
        pairs.append((f"{of_kind}, the decoder's sets", f"{of_kind}, sets everywhere"))
    fill_by(args, "stages, subjects", jobs, toy.TABLE, pairs)


def recover_stages(args, row, seed):
    """Recover the base with the scale sets of a row."""
    model = quantize(load_model(BASE), 4, edges=row.edges)
    if row.change is not None:
        row.change(model)
    tune_on_world(model, "recovery", LR_SCALES, STEPS // args.steps_divisor, seed)
    trained = sum(delta.numel() for delta in deltas(model).values())
    return {"trained": trained, "after": validation_loss(model)}


# --------------------------------------------------------------------------------------------------
# Start. "We show how an auxiliary model can be used to bridge the gap between the ideal and the
# simulated forward dynamics, followed by a standard reverse diffusion process." (Franzese et al.
# 2022, arXiv 2206.05173)
# --------------------------------------------------------------------------------------------------

# Here the auxiliary model is a Gaussian, and the bridge is left out.
TAUS = (0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
STEPS_OF_START = (5, 10, 20, 40)
STARTS = ("noise", "the prompt's Gaussian")
TUNED_TAUS = (0.4, 0.6)  # for which scales are tuned on t < tau T alone


def scenes_of(prompt, n, generator) -> Tensor:
    """n random scenes (n, 3, 16, 16) that a prompt such as "red creature on blue checks" allows."""
    words = torch.tensor(toy.caption(prompt))
    everything = torch.arange(len(toy.sprites().parts))
    name, shape = toy.sprite_words(everything)
    fits = (name == words[toy.NAME_SLOTS[0]]) & (shape == words[toy.SHAPE_SLOTS[0]])
    sprites = everything[fits]
    sprite = sprites[torch.randint(len(sprites), (n,), generator=generator)]
    y, x = torch.tensor(toy.SPOTS)[torch.randint(len(toy.SPOTS), (n,), generator=generator)].T
    color = words[toy.COLOR_SLOT] - toy.FIRST_COLOR
    background = color * len(toy.PATTERNS) + words[toy.PATTERN_SLOT] - toy.FIRST_PATTERN
    return toy.render(background.expand(n), [(sprite, y, x)])


def gaussian_start(scenes, t, n, generator) -> Tensor:
    """x_t (n, 3, 16, 16) of a normal x0 with the mean and the covariance of scenes (M, 3, 16, 16).

    A matrix of 768 x 768 covariances isn't needed: normal combinations of the scenes' differences
    from their mean have it.
    """
    mean = scenes.mean(0)
    weights = torch.randn(n, len(scenes), generator=generator)
    x0 = mean + torch.einsum("nm,mchw->nchw", weights, scenes - mean) / len(scenes) ** 0.5
    eps = torch.randn(x0.shape, generator=generator)
    return DIFFUSION.q_sample(x0, torch.full((n,), t), eps)


def start(args):
    """How late may sampling start, from what, and what does it save?"""
    do(args, "start", "all timesteps", partial(start_late, args, None))
    for tau in TUNED_TAUS:
        do(args, "start", f"t < {tau} T", partial(start_late, args, tau))
    rows = []
    for name in ("all timesteps", *[f"t < {tau} T" for tau in TUNED_TAUS]):
        runs = done(args, "start", name)
        for kind in STARTS:
            for tau in TAUS:
                keys = [f"{kind}, {tau}, {steps}" for steps in STEPS_OF_START]
                if runs and keys[0] in runs[0]:
                    cells = cells_of(runs, dict.fromkeys(keys, 2))
                    rows.append([name, kind, str(tau), *cells, str(len(runs))])
    columns = ["tuned at", "start", "tau", *[f"{steps} steps" for steps in STEPS_OF_START], "runs"]
    show(args, "start", columns, rows)


def start_late(args, tuned_tau, seed):
    """The share of whole creatures by start, tau and number of steps: {"noise, 0.5, 10": ...}.

    tuned_tau: scales are tuned on t < tuned_tau T alone, and only the prompt's Gaussian at this tau
    is tried.
    """
    if tuned_tau is None:
        model = recovered_base(args, seed)
        taus = TAUS
        starts = STARTS
    else:
        model, lr = prepare(RECOVERY, seed)
        part = PartOfTime(0, tuned_tau)
        steps = STEPS // args.steps_divisor
        tune_on_world(model, "recovery", lr, steps, seed, diffusion=part, rare=0)
        taus = (tuned_tau,)
        starts = STARTS[-1:]
    net = merge(model)
    each = 10  # images of each prompt
    prompts, words = creatures(max(1, 20 // args.steps_divisor), seed + 500, each)
    found = {}
    for kind in starts:
        for tau in taus:
            for steps in STEPS_OF_START:
                times = times_of(steps, tau)
                x = start_of(kind, prompts, each, times[0], seed)
                generator = torch.Generator().manual_seed(seed + 1)
                with torch.no_grad():
                    x = run_from(net, x, words, times, "ddpm", generator=generator)[-1]
                shares = shares_right(x.clamp(-1, 1), words)
                found[f"{kind}, {tau}, {steps}"] = shares["whole"]
                found[f"{kind}, {tau}, {steps}, right"] = shares["right"]
    return found


def start_of(kind, prompts, each, t, seed) -> Tensor:
    """x_t (N, 3, 16, 16) to start from, so many for each prompt.

    The Gaussian has the moments of 500 true scenes of the prompt: an oracle, which no model of this
    project provides.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "noise":
        return torch.randn(each * len(prompts), 3, toy.SIZE, toy.SIZE, generator=generator)
    parts = []
    for prompt in prompts:
        scenes = scenes_of(prompt, 500, generator)
        parts.append(gaussian_start(scenes, t, each, generator))
    return torch.cat(parts)


# --------------------------------------------------------------------------------------------------
# Pruning. "To ensure effective pruning that preserves the quality of the final denoised latent, we
# design a novel end-to-end pruning objective that spans the entire diffusion process." (Zhang et
# al. 2024, arXiv 2412.02852)
# --------------------------------------------------------------------------------------------------

SHARES = (0.1, 0.2, 0.3)  # of the channels of the convolutions, inputs and outputs
MASK_STEPS = 60  # of training masks
MASK_LR = 0.02
MASK_WEIGHT = 0.05  # of their mean, beside the error of the image
PerChannel = dict[tuple[str, str], Tensor]  # {(a layer, "in"): (I,), (a layer, "out"): (O,)}


def gated(model) -> dict[str, nn.Module]:
    """The convolutions larger than 1x1, but the first and the last: their channels are ranked."""
    found = {}
    for name, layer in model.named_modules():
        is_conv = isinstance(layer, (QuantConv2d, nn.Conv2d))
        if is_conv and layer.kernel_size != (1, 1) and name not in ("stem", "out"):
            found[name] = layer
    return found


@torch.no_grad()
def close_gates(model, gates: PerChannel):
    """Multiply the scales of each channel by its gate, 0 or 1. The bias of an output stays."""
    for name, layer in gated(model).items():
        layer.s_in.view(-1, layer.shape[1]).mul_(gates[name, "in"])  # (K, I)
        layer.s_out.mul_(gates[name, "out"])


def by_gradient(model, seed, steps) -> PerChannel:
    """|dL/dd| of each channel, over batches: Taylor importance (Molchanov et al. 2017).

    Quantized fine-tuning computes dL/dd anyway; an input's is the sum over its positions, and the
    gradient of its gate. At tuned scales its mean is near zero. Then this ranks its spread over
    batches of 16, as Fisher information does.
    """
    generator = torch.Generator().manual_seed(seed)
    found = defaultdict(float)
    for _ in range(steps):
        x0, words = toy.sample_scenes(16, generator, rare=0)
        t = DIFFUSION.draw_timesteps(16, generator)
        eps = torch.randn(x0.shape, generator=generator)
        model.zero_grad()
        squared_error(model, x0, words, t, eps).mean().backward()
        for name, layer in gated(model).items():
            found[name, "in"] += layer.d_in_0.grad.view(-1, layer.shape[1]).sum(0).abs()
            found[name, "out"] += layer.d_out_0.grad.abs()
    model.zero_grad()
    return dict(found)


def by_size(model, seed, steps) -> PerChannel:
    """The norm of the weights of each channel, over the mean of the layer."""
    found = {}
    for name, layer in gated(model).items():
        for side, weight in (("in", layer.weight.movedim(1, 0)), ("out", layer.weight)):
            norm = weight.flatten(1).norm(dim=1)
            found[name, side] = norm / norm.mean()
    return found


def at_random(model, seed, steps) -> PerChannel:
    """Random ranks."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for name, layer in gated(model).items():
        for side, size in (("in", layer.shape[1]), ("out", layer.shape[0])):
            found[name, side] = torch.rand(size, generator=generator)
    return found


def with_masks(net) -> PerChannel:
    """Give the channels of a merged model masks of one, where a gate would be, and return them."""
    masks = {}

    def before(layer, inputs, mask):
        return inputs[0] * mask[:, None, None]

    def after(layer, inputs, y, mask):
        bias = layer.bias[:, None, None]
        return (y - bias) * mask[:, None, None] + bias

    for name, layer in gated(net).items():
        masks[name, "in"] = torch.ones(layer.in_channels, requires_grad=True)
        masks[name, "out"] = torch.ones(layer.out_channels, requires_grad=True)
        layer.register_forward_pre_hook(partial(before, mask=masks[name, "in"]))
        layer.register_forward_hook(partial(after, mask=masks[name, "out"]))
    return masks


def by_masks(model, seed, steps) -> PerChannel:
    """Masks trained on the image after ten DDIM steps: it should stay, and they should be small."""
    plain = merge(model)
    net = merge(model).requires_grad_(False)
    masks = with_masks(net)
    optimizer = torch.optim.Adam(masks.values(), lr=MASK_LR)
    generator = torch.Generator().manual_seed(seed)
    times = times_of(10)
    for _ in tqdm(range(steps), "masks"):
        _, words = toy.sample_scenes(16, generator, rare=0)
        x = torch.randn(16, 3, toy.SIZE, toy.SIZE, generator=generator)
        with torch.no_grad():
            target = run_from(plain, x, words, times, cfg_scale=1)[-1]
        image = run_from(net, x, words, times, cfg_scale=1)[-1]
        small = torch.cat([mask.abs() for mask in masks.values()]).mean()
        optimizer.zero_grad()
        ((image - target).square().mean() + MASK_WEIGHT * small).backward()
        optimizer.step()
    return {key: mask.detach() for key, mask in masks.items()}  # negative: closed long ago


RANKINGS = {
    "chance": (at_random, 0),
    "|dL/dd|": (by_gradient, 40),
    "size": (by_size, 0),
    "trained masks": (by_masks, MASK_STEPS),
}


def pruning(args):
    """Which channels can be missed, and do scales make up for them?"""
    rows = []
    names = ["nothing, 0%"]
    do(args, "pruning", names[0], partial(prune, args, None, 0.0))
    for ranking in RANKINGS:
        for share in SHARES:
            name = f"{ranking}, {share:.0%}"
            do(args, "pruning", name, partial(prune, args, ranking, share))
            names.append(name)
    for name in names:
        runs = done(args, "pruning", name)
        if runs:
            ranking, share = name.rsplit(", ", 1)
            digits = {"left": 2, "before": 5, "after": 5, "whole": 2}
            rows.append([ranking, share, *cells_of(runs, digits), str(len(runs))])
    columns = ["ranked by", "channels taken out", "their multiplications left", "loss"]
    columns += ["loss, tuned", "whole creatures, tuned", "runs"]
    show(args, "pruning", columns, rows)
    page_of(args, "pruning", names)


def prune(args, ranking, share, seed):
    """Take channels out of the recovered base, measure, tune its scales again, and measure."""
    model = recovered_base(args, seed)
    if ranking is not None:
        close_gates(model, gates_of(ranks_of(args, ranking, model, seed), share))
    name = f"{ranking or 'nothing'}, {share:.0%}"
    before = validation_loss(model, rare=0)
    # with other images than those that the base was recovered on
    tune_on_world(model, name, LR_SCALES, STEPS // args.steps_divisor, seed + 1000, rare=0)
    _, words = creatures(200 // args.steps_divisor, seed + 500)
    images = draw(merge(model), words, times_of(40), seed + 500, "ddpm")
    keep_strip(args, "pruning", name, seed, images)
    return {
        "left": multiplications(model),
        "before": before,
        "after": validation_loss(model, rare=0),
        "whole": shares_right(images, words)["whole"],
    }


def ranks_of(args, ranking, model, seed) -> PerChannel:
    """The ranks of the recovered base's channels, the same for every share."""

    def make():
        rank, steps = RANKINGS[ranking]
        return {"ranks": rank(model, seed, steps // args.steps_divisor)}

    return kept_in_file(args, "ranks", f"{ranking.replace('/', ' over ')}, {seed}", make)["ranks"]


def gates_of(ranks: PerChannel, share: float) -> PerChannel:
    """The channels' gates: 0 for this share of all channels, those of the lowest ranks."""
    everything = torch.cat(list(ranks.values()))
    gates = torch.ones(len(everything))
    gates[everything.argsort(stable=True)[: round(share * len(everything))]] = 0
    sizes = [len(rank) for rank in ranks.values()]
    return dict(zip(ranks, gates.split(sizes)))


def multiplications(model) -> float:
    """Which share of the multiplications of the gated convolutions is left."""
    counts = []  # (those left, all) of each layer

    def count(layer, _, y):
        left = layer.s_in.count_nonzero() * layer.s_out.count_nonzero()
        total = layer.s_in.numel() * layer.s_out.numel()
        counts.append((left * y[0, 0].numel(), total * y[0, 0].numel()))

    hooks = [layer.register_forward_hook(count) for layer in gated(model).values()]
    words = torch.zeros(1, toy.SLOTS, dtype=torch.long)
    model(torch.zeros(1, 3, toy.SIZE, toy.SIZE), torch.zeros(1, dtype=torch.long), words)
    for hook in hooks:
        hook.remove()
    left, total = torch.tensor(counts, dtype=torch.float64).sum(0)
    return (left / total).item()


# --------------------------------------------------------------------------------------------------
# Few steps. "LCM-LoRA can be directly plugged into various Stable-Diffusion fine-tuned models or
# LoRAs without training, thus representing a universally applicable accelerator." (Luo et al. 2023,
# arXiv 2311.05556)
# --------------------------------------------------------------------------------------------------

TEACHER_STEPS = 40
LR_FEW = 0.01


class Way(NamedTuple):
    """A way to sample."""

    k: int  # steps
    cfg_scale: float  # the scale of guidance; with 1 a step is one pass of the network, else two
    scales: str  # none, recovered or distilled; a subject's are added to them
    own_sets: bool = False  # a scale set for each step

    @property
    def times(self) -> list[int]:
        """The timesteps visited: some of the teacher's."""
        return times_of(TEACHER_STEPS)[:: TEACHER_STEPS // self.k]

    @property
    def edges(self) -> list[int] | None:
        """Where the sets change: half way between the times."""
        if not self.own_sets:
            return None
        return [0, *[(a + b) // 2 for a, b in pairwise(self.times[::-1])], DIFFUSION.T]


def trajectories(args, n, seed):
    """The teacher's x at 8 parts of its path, and its image (9, n, 3, 16, 16); the captions."""

    def make():
        generator = torch.Generator().manual_seed(seed)
        _, words = toy.sample_scenes(n, generator, rare=0)  # rare words are left to subjects
        x = torch.randn(n, 3, toy.SIZE, toy.SIZE, generator=generator)
        with torch.no_grad():
            path = run_from(merge(recovered_base(args, seed)), x, words, times_of(TEACHER_STEPS))
        return {"states": torch.stack(path[:: TEACHER_STEPS // 8]), "words": words}

    found = kept_in_file(args, "trajectories", str(seed), make)
    return found["states"], found["words"]


def leap(x, x_next, times, part) -> Tensor:
    """The v at x (N, 3, 16, 16) with which a step of DDIM ends at x_next.

    Image n goes from times[part[n]] to the next of times, or from the last to an image. The step is
    linear in v: x_next = (a' a + s' s) x + (s' a - a' s) v, with a and s of the one timestep, a'
    and s' of the other.
    """
    abar = torch.cat([DIFFUSION.alphas_cumprod[times], torch.ones(1, dtype=torch.float64)])
    a, s = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    a, a_next, s, s_next = a[part], a[part + 1], s[part], s[part + 1]
    v = (x_next - (a_next * a + s_next * s) * x) / (s_next * a - a_next * s)
    return v.float()


def distilled(args, way, seed) -> dict:
    """The adapter that is trained to end, in k steps without guidance, where 40 guided steps do."""

    def make():
        of_teacher = deltas(recovered_base(args, seed))
        model = quantize(load_model(BASE), 4, edges=way.edges)
        with torch.no_grad():
            for name, delta in deltas(model).items():  # every set starts from the teacher's
                delta.copy_(of_teacher[f"{name.rsplit('_', 1)[0]}_0"])
        distill(model, args, way, seed)
        return adapter(model)

    sets = "a set for each" if way.own_sets else "one set"
    return kept_in_file(args, "adapter", f"{way.k} steps, {sets}, {seed}", make)


def distill(model, args, way, seed):
    """Train the deltas of model to leap over 40 / k steps of the teacher at once."""
    n = max(64, 1024 // args.steps_divisor)
    states, words = trajectories(args, n, seed)
    states = states[:: 8 // way.k]  # (k + 1, n, 3, 16, 16)
    times = torch.tensor(way.times)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    steps = 2 * STEPS // args.steps_divisor
    for step in tqdm(range(steps), f"{way.k} steps"):
        optimizer.param_groups[0]["lr"] = LR_FEW * (1 - step / steps)
        pick = torch.randint(n, (64,), generator=generator)
        part = torch.arange(64) % way.k  # of the path, for each image
        x = states[part, pick]
        target = leap(x, states[part + 1, pick], times, part)
        optimizer.zero_grad()
        (model(x, times[part], words[pick]) - target).square().mean().backward()
        optimizer.step()


def ways() -> dict[str, Way]:
    """The ways that are compared, by name."""
    found = {}
    for k in (TEACHER_STEPS, 8, 4):
        found[f"plain, {k} steps"] = Way(k, 3.0, "recovered")
    for k in (8, 4):
        found[f"plain, {k} steps without guidance"] = Way(k, 1.0, "recovered")
        found[f"distilled, {k} steps"] = Way(k, 1.0, "distilled")
        found[f"distilled, {k} steps, a set for each"] = Way(k, 1.0, "distilled", own_sets=True)
    return found


def scales_of(args, way, seed) -> dict:
    """The adapter of a way's scales."""
    if way.scales == "recovered":
        return recovered(args, RECOVERY, seed)
    return distilled(args, way, seed)


def few(args):
    """Can scales alone learn to sample in few steps, and does that add to a subject?"""
    rows = []
    for name, way in ways().items():
        do(args, "few", name, partial(few_steps, args, name))
        runs = done(args, "few", name)
        if runs:
            passes = str(way.k * (1 if way.cfg_scale == 1 else 2))
            digits = {"right": 2, "whole": 2, "away": 3}
            rows.append([name, passes, *cells_of(runs, digits), str(len(runs))])
    columns = ["sampling", "passes of the network", "right", "whole", "from 40 steps' images"]
    show(args, "few steps", [*columns, "runs"], rows)
    few_steps_of_subjects(args)


def few_steps(args, name, seed):
    """Which shares of creatures are right if they are drawn in this way?

    away: how far a pixel, which is in [-1, 1], is from that of 40 plain steps from the same noise,
    root mean square.
    """
    _, words = creatures(200 // args.steps_divisor, seed + 500)
    images = images_of(args, name, words, seed)
    keep_strip(args, "few", name, seed, images)
    of_40_steps = images_of(args, f"plain, {TEACHER_STEPS} steps", words, seed)
    away = (images - of_40_steps).square().mean().sqrt().item()
    return {**shares_right(images, words), "away": away}


def images_of(args, name, words, seed) -> Tensor:
    """The images (N, 3, 16, 16) that the way of this name draws for captions words (N, L)."""

    def make():
        way = ways()[name]
        model = quantize(load_model(BASE), 4, edges=way.edges)
        load_adapter(model, scales_of(args, way, seed))
        return {"images": draw(model, words, way.times, seed + 500, cfg_scale=way.cfg_scale)}

    return kept_in_file(args, "images", f"{name}, {seed}", make)["images"]


def few_steps_of_subjects(args):
    """Add what makes sampling short to what makes a subject: parts right, and whole subjects."""
    of_subjects = {}
    for k in (TEACHER_STEPS, 8, 4):
        of_subjects[f"the subject's alone, {k} steps"] = Way(k, 3.0, "none")
    for name, way in ways().items():
        if not way.own_sets:  # adapters of other sets can't be added
            of_subjects[f"the subject's and {name}"] = way

    def job(name, way, subject, seed):
        model, run, folders = fine_tuned(args, SHORT[POSITION], subject, seed)
        if way.scales != "none":
            load_adapter(model, adapter(model), scales_of(args, way, seed))
        ((word, folder),) = folders.items()
        words = torch.tensor(train.captions_of(train.prompts_of(word)))
        images = draw(merge(model), words, way.times, seed + 500, cfg_scale=way.cfg_scale)
        if subject == toy.TABLE[0]:
            keep_strip(args, "few", name, seed, images[:: train.IMAGES_PER_PROMPT])
        scores = score(images, words, toy.read_parts(folder), toy.WORD[word])
        return {key: scores[key].mean().item() for key in ("parts", "identity", "prompt")}

    rows = []
    for name, way in of_subjects.items():
        run_all(args, {f"few: {name}": partial(job, name, way)}, toy.TABLE)
        runs = list(runs_of(args, f"few: {name}", toy.TABLE).values())
        if runs:
            passes = str(way.k * (1 if way.cfg_scale == 1 else 2))
            digits = {"parts": 2, "identity": 2, "prompt": 2}
            rows.append([name, passes, *cells_of(runs, digits), str(len(runs))])
    columns = ["scales", "passes of the network", "parts right", "whole subject", "prompt right"]
    show(args, "few steps, subjects", [*columns, "runs"], rows)
    page_of(args, "few", [*ways(), *of_subjects])


PARTS = {"stages": stages, "start": start, "pruning": pruning, "few": few}


def main():
    make_tables(__doc__, PARTS, toy.TABLE)


if __name__ == "__main__":
    guard(main)

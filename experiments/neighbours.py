"""The paper's neighbours in miniature, each by scales alone: python experiments/neighbours.py NAME

    stages     scale sets for three stages of time, in the decoder alone
    start      sampling from t = tau T, which starts from a Gaussian
    pruning    channels ranked, taken out and made up for
    few        forty guided steps distilled into eight and into four

All of them have columns by position and 4 bits, and one scale set unless a row says otherwise. A
finished run is a line of the log, and isn't done again; --log experiments/runs.jsonl --rows none
shows what ships. "The world" is the base, quantized and recovered (recovery.py).
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from tqdm import tqdm

import train
from claims import POSITION, RECOVERY
from data import toy
from data.score import matches, score
from pretrain import random_prompt
from quant import QuantConv2d, QuantLayer, adapter, deltas, load_adapter, merge, quantize
from recovery import LR_SCALES, STEPS, adapter_in_file, prepare, recovered, tune
from report import append, is_due, lines, mean_sd, parse_with_log, runs_of, show, show_means
from runs import DIFFUSION, SHORT, PartOfTime, fine_tuned, run_all, validation_loss
from runs import tune as tune_to_subject
from sample import BASE, SAMPLERS, load_model, predict
from support.files import save
from support.flags import Parser, guard, number

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
    found = {line["seed"]: line for line in lines(args.log, neighbour=part, name=name)}
    return list(found.values())


def cells_of(runs, digits: dict[str, int]) -> list[str]:
    """The means of some values over runs. digits: {a key of the log: digits after the point}."""
    return [mean_sd([run[key] for run in runs], n) for key, n in digits.items()]


def world(args, seed):
    """The base at 4 bits, with recovered scales."""
    model, _ = prepare(RECOVERY, seed)
    load_adapter(model, recovered(args, RECOVERY, seed))
    return model


def creature_prompts(n, seed) -> list[str]:
    """n prompts such as "red creature on green stripes"."""
    generator = torch.Generator().manual_seed(seed)
    return [random_prompt(["creature"], generator) for _ in range(n)]


def rate(images, words) -> dict[str, float]:
    """Which shares of images (N, 3, 16, 16) of captions words (N, L) are right.

    right: all that the caption says is there. whole: it is a scene of the world, pixel by pixel.
    """
    right = score(images, words)["prompt"] == 1
    return {"right": right.float().mean().item(), "whole": matches(images).float().mean().item()}


RATED = {"right": 2, "whole": 2}  # keys of the log, and their digits


def keep_strip(args, part, name, images):
    """Keep the first images of a row in a file, for page_of."""
    save(toy.tile(images[:12], 12, zoom=4), Path("out") / args.log.stem / part / f"{name}.png")


def page_of(args, part, names):
    """Put the strips that are there on a page, each under its name: out/LOG/PART.png."""
    folder = Path("out") / args.log.stem
    strips = {name: folder / part / f"{name}.png" for name in names}
    strips = {name: Image.open(file) for name, file in strips.items() if file.exists()}
    if not strips:
        return
    line = 14  # pixels of a line of text
    width, height = next(iter(strips.values())).size
    page = Image.new("RGB", (width, len(strips) * (height + line)), "white")
    draw = ImageDraw.Draw(page)
    for i, (name, strip) in enumerate(strips.items()):
        y = i * (height + line)
        draw.text((4, y + 1), name, "black")
        page.paste(strip, (0, y + line))
    save(page, folder / f"{part}.png")
    print(f"wrote {folder / part}.png")


def run_from(net, x, words, times, sampler="ddim", cfg_scale=3.0, generator=None):
    """Sample from x (N, 3, 16, 16) at timestep times[0] through times to an image: a list of all x.

    net: a float model, such as merge returns.
    """
    abars = [*DIFFUSION.alphas_cumprod[times], torch.ones((), dtype=torch.float64)]
    path = [x]
    for i, t in enumerate(times):
        x0, eps = predict(net, x, t, words, cfg_scale, DIFFUSION, chunk=64)
        noise = torch.randn(x.shape, generator=generator)
        x = SAMPLERS[sampler](x, x0, eps, abars[i], abars[i + 1], noise)
        path.append(x)
    return path


# --------------------------------------------------------------------------------------------------
# Stages. "Our approach involves segmenting the time interval into multiple stages where we employ
# custom multi-decoder U-net architecture that blends time-dependent models with a universally
# shared encoder." (Zhang et al. 2023, arXiv 2312.09181)
# --------------------------------------------------------------------------------------------------

STAGE_EDGES = (0, 442, 631, 1000)  # their stages, 0 .. 0.442 .. 0.631 .. 1


def share_encoder(model):
    """Give the layers outside of the decoder one scale set: one Parameter under each bucket's name.

    Its gradient is the sum over the buckets, and deltas names it once.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLayer) and not name.startswith(("up.", "out")):
            for kind in layer.trained:
                for b in range(1, layer.num_buckets):
                    setattr(layer, f"{kind}_{b}", layer.delta(kind, 0))


def stages(args):
    """Do scale sets of their own for three stages help, and does the decoder suffice?"""
    one = SHORT[POSITION]
    thirds = replace(one, flags=f"{one.flags} --buckets 3")
    staged = replace(one, edges=STAGE_EDGES)
    rows = {
        "one set": one,
        "thirds, sets everywhere": thirds,
        "stages, sets everywhere": staged,
        "thirds, the decoder's sets": replace(thirds, change=share_encoder),
        "stages, the decoder's sets": replace(staged, change=share_encoder),
    }
    for name, row in rows.items():
        do(args, "stages", name, partial(recover_stages, args, row))
    table = []
    for name in rows:
        runs = done(args, "stages", name)
        if runs:
            trained = f"{runs[0]['trained']:,}"
            table.append([name, trained, *cells_of(runs, {"after": 5}), str(len(runs))])
    show(args, "stages, recovery", ["scale sets", "trained", "validation loss", "runs"], table)

    jobs = {}
    names = {}
    for name, row in rows.items():
        names[name] = one.name if row is one else f"{name}, 4 bits, 500 steps"
        jobs[names[name]] = partial(tune_to_subject, args, replace(row, name=names[name]))
    run_all(args, jobs, toy.TABLE)
    found = {name: runs_of(args, in_log, toy.TABLE) for name, in_log in names.items()}
    show_means(args, "stages, subjects", found)


def recover_stages(args, row, seed):
    """Recover the base with the scale sets of a row."""
    num_buckets = 3 if "--buckets 3" in row.flags else 1
    model = quantize(load_model(BASE), 4, num_buckets, DIFFUSION.T, edges=row.edges)
    if row.change is not None:
        row.change(model)
    tune(model, row.name, LR_SCALES, STEPS // args.steps_divisor, seed)
    trained = sum(delta.numel() for delta in deltas(model).values())
    return {"trained": trained, "after": validation_loss(model)}


# --------------------------------------------------------------------------------------------------
# Start. "We show how an auxiliary model can be used to bridge the gap between the ideal and the
# simulated forward dynamics, followed by a standard reverse diffusion process." (Franzese et al.
# 2022, arXiv 2206.05173)
# --------------------------------------------------------------------------------------------------

TAUS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
STEPS_OF_START = (5, 10, 20, 40)
TUNED_TAUS = (0.5, 0.7)  # for which scales are tuned on t < tau T alone


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

    A covariance of 768 x 768 pixels isn't needed: normal combinations of the scenes' differences
    from their mean have it.
    """
    mean = scenes.mean(0)
    weights = torch.randn(n, len(scenes), generator=generator)
    x0 = mean + torch.einsum("nm,mchw->nchw", weights, scenes - mean) / len(scenes) ** 0.5
    eps = torch.randn(x0.shape, generator=generator)
    return DIFFUSION.q_sample(x0, torch.full((n,), t), eps)


def start(args):
    """How late may sampling start, and what does it save?"""
    names = {"all timesteps": None}
    for tau in TUNED_TAUS:
        names[f"t < {tau} T"] = tau
    for name, tau in names.items():
        do(args, "start", name, partial(start_late, args, tau))
    for name in names:
        runs = done(args, "start", name)
        rows = []
        for tau in TAUS if names[name] is None else (names[name],):
            if runs:
                cells = cells_of(runs, {f"{tau} {steps}": 2 for steps in STEPS_OF_START})
                rows.append([str(tau), *cells, str(len(runs))])
        columns = ["tau", *[f"{steps} steps" for steps in STEPS_OF_START], "runs"]
        show(args, f"start, scales tuned at {name}", columns, rows)


def start_late(args, tuned_tau, seed):
    """The share of whole creatures for each tau and number of steps: {"0.5 10": ...}.

    tuned_tau: scales are tuned on t < tuned_tau T alone, and only this tau is sampled.
    """
    if tuned_tau is None:
        model = world(args, seed)
    else:
        model, lr = prepare(RECOVERY, seed)
        part = PartOfTime(0, tuned_tau)
        tune(model, RECOVERY.name, lr, STEPS // args.steps_divisor, seed, diffusion=part)
    net = merge(model)
    prompts = creature_prompts(max(1, 20 // args.steps_divisor), seed)
    words = torch.tensor([toy.caption(prompt) for prompt in prompts]).repeat_interleave(10, 0)
    found = {}
    for tau in TAUS if tuned_tau is None else (tuned_tau,):
        for steps in STEPS_OF_START:
            generator = torch.Generator().manual_seed(seed)
            times = torch.linspace(tau * DIFFUSION.T - 1, 0, steps).round().long().tolist()
            x = [
                gaussian_start(scenes_of(prompt, 500, generator), times[0], 10, generator)
                for prompt in prompts
            ]
            with torch.no_grad():
                x = run_from(net, torch.cat(x), words, times, "ddpm", generator=generator)[-1]
            found[f"{tau} {steps}"] = rate(x.clamp(-1, 1), words)["whole"]
    return found


# --------------------------------------------------------------------------------------------------
# Pruning. "To ensure effective pruning that preserves the quality of the final denoised latent, we
# design a novel end-to-end pruning objective that spans the entire diffusion process." (Zhang et
# al. 2024, arXiv 2412.02852)
# --------------------------------------------------------------------------------------------------

SHARES = (0.1, 0.2, 0.3)  # of the input channels of the convolutions
MASK_STEPS = 60  # of training masks
MASK_LR = 0.02
MASK_WEIGHT = 0.05  # of their sum, beside the error of the image


def gated(model) -> dict[str, nn.Module]:
    """The convolutions whose input channels are ranked: those with a kernel, but first and last."""
    found = {}
    for name, layer in model.named_modules():
        is_conv = isinstance(layer, (QuantConv2d, nn.Conv2d))
        if is_conv and layer.kernel_size != (1, 1) and name not in ("stem", "out"):
            found[name] = layer
    return found


@torch.no_grad()
def close_gates(model, gates):
    """Multiply the columns of each input channel by its gate, 0 or 1: {name: gates (I,)}."""
    for name, layer in gated(model).items():
        layer.s_in.view(-1, layer.shape[1]).mul_(gates[name])  # (K, I)


def by_gradient(model, seed, steps) -> dict[str, Tensor]:
    """|dL/dd| of each input channel, summed over batches: what its loss would cost, to first order.

    dL/dd of a channel is the sum over its positions. That is Taylor importance (Molchanov et al.
    2017), and quantized fine-tuning computes it anyway.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {name: 0 for name in gated(model)}
    for _ in range(steps):
        x0, words = toy.sample_scenes(16, generator)
        t = DIFFUSION.draw_timesteps(16, generator)
        eps = torch.randn(x0.shape, generator=generator)
        model.zero_grad()
        v = model(DIFFUSION.q_sample(x0, t, eps), t, words)
        DIFFUSION.squared_error(v, x0, t, eps).mean().backward()
        for name, layer in gated(model).items():
            found[name] = found[name] + layer.d_in_0.grad.view(-1, layer.shape[1]).sum(0).abs()
    model.zero_grad()
    return found


def by_size(model, seed, steps) -> dict[str, Tensor]:
    """The norm of the weights of each input channel."""
    return {
        name: layer.weight.movedim(1, 0).flatten(1).norm(dim=1)
        for name, layer in gated(model).items()
    }


def by_masks(model, seed, steps) -> dict[str, Tensor]:
    """Masks trained on the image after ten DDIM steps: it should stay as it is, and they small."""
    net = merge(model).requires_grad_(False)
    masks = {}
    for name, layer in gated(net).items():
        masks[name] = torch.ones(layer.in_channels, requires_grad=True)
        layer.register_forward_pre_hook(
            lambda layer, inputs, name=name: inputs[0] * masks[name][:, None, None]
        )
    optimizer = torch.optim.Adam(masks.values(), lr=MASK_LR)
    generator = torch.Generator().manual_seed(seed)
    times = torch.linspace(DIFFUSION.T - 1, 0, 10).round().long().tolist()
    plain = merge(model)
    for _ in tqdm(range(steps), "masks"):
        _, words = toy.sample_scenes(16, generator)
        x = torch.randn(16, 3, toy.SIZE, toy.SIZE, generator=generator)
        with torch.no_grad():
            target = run_from(plain, x, words, times, cfg_scale=1)[-1]
        image = run_from(net, x, words, times, cfg_scale=1)[-1]
        small = torch.cat([mask.abs() for mask in masks.values()]).mean()
        optimizer.zero_grad()
        ((image - target).square().mean() + MASK_WEIGHT * small).backward()
        optimizer.step()
    return {name: mask.detach().abs() for name, mask in masks.items()}


RANKINGS = {
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
            digits = {"left": 2, "before": 5, "whole before": 2, "after": 5, "whole": 2}
            rows.append([ranking, share, *cells_of(runs, digits), str(len(runs))])
    columns = ["ranked by", "taken out", "multiplications left", "loss", "whole creatures"]
    columns += ["loss, tuned", "whole creatures, tuned", "runs"]
    show(args, "pruning", columns, rows)
    page_of(args, "pruning", names)


def prune(args, ranking, share, seed):
    """Take channels out of the recovered world, measure, tune its scales again, and measure."""
    model = world(args, seed)
    if ranking is not None:
        rank, steps = RANKINGS[ranking]
        close_gates(model, gates_of(rank(model, seed, steps // args.steps_divisor), share))
    before = validation_loss(model)
    images_before, words = draw_world(args, model, seed)
    name = f"{ranking or 'nothing'}, {share:.0%}"
    tune(model, name, LR_SCALES, STEPS // args.steps_divisor, seed)
    images, _ = draw_world(args, model, seed)
    keep_strip(args, "pruning", name, images)
    return {
        "left": multiplications(model),
        "before": before,
        "whole before": rate(images_before, words)["whole"],
        "after": validation_loss(model),
        "whole": rate(images, words)["whole"],
    }


def gates_of(ranks: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """Gates (I,) of each layer: 0 for this share of all channels, those of the lowest ranks."""
    everything = torch.cat(list(ranks.values()))
    limit = everything.sort().values[round(share * len(everything))]
    return {name: (rank >= limit).float() for name, rank in ranks.items()}


def multiplications(model) -> float:
    """Which share of the multiplications of the gated convolutions is left."""
    pixels = {}
    hooks = []
    for name, layer in gated(model).items():
        hooks.append(
            layer.register_forward_hook(
                lambda layer, _, y, name=name: pixels.update({name: y[0, 0].numel()})
            )
        )
    words = torch.zeros(1, toy.SLOTS, dtype=torch.long)
    model(torch.zeros(1, 3, toy.SIZE, toy.SIZE), torch.zeros(1, dtype=torch.long), words)
    for hook in hooks:
        hook.remove()
    left = total = 0
    for name, layer in gated(model).items():
        columns = layer.s_in.count_nonzero().item() * layer.shape[0] * pixels[name]
        left += columns
        total += layer.s_in.numel() * layer.shape[0] * pixels[name]
    return left / total


def draw_world(args, model, seed):
    """Creatures that a model draws in 40 steps (N, 3, 16, 16), and their captions (N, L)."""
    n = 200 // args.steps_divisor
    words = torch.tensor([toy.caption(prompt) for prompt in creature_prompts(n, seed)])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, toy.SIZE, toy.SIZE, generator=generator)
    with torch.no_grad():
        images = run_from(merge(model), x, words, TEACHER_TIMES, "ddpm", generator=generator)[-1]
    return images.clamp(-1, 1), words


# --------------------------------------------------------------------------------------------------
# Few steps. "LCM-LoRA can be directly plugged into various Stable-Diffusion fine-tuned models or
# LoRAs without training, thus representing a universally applicable accelerator." (Luo et al. 2023,
# arXiv 2311.05556)
# --------------------------------------------------------------------------------------------------

TEACHER_TIMES = torch.linspace(DIFFUSION.T - 1, 0, 40).round().long().tolist()
TEACHER_CFG = 3.0
LR_FEW = 0.01


def every(k) -> list[int]:
    """The k timesteps of a student with k steps: each 40 / k-th of the teacher's."""
    return TEACHER_TIMES[:: 40 // k]


def trajectories(net, n, seed):
    """The teacher's x at 8 parts of its path, and its image (9, n, 3, 16, 16); the captions."""
    generator = torch.Generator().manual_seed(seed)
    _, words = toy.sample_scenes(n, generator)
    x = torch.randn(n, 3, toy.SIZE, toy.SIZE, generator=generator)
    with torch.no_grad():
        path = run_from(net, x, words, TEACHER_TIMES, cfg_scale=TEACHER_CFG)
    return torch.stack(path[:: 40 // 8]), words


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


def distilled(args, k, num_buckets, seed) -> dict:
    """The adapter with which k steps without guidance end where 40 guided steps of the world do."""

    def make():
        model = quantize(load_model(BASE), 4, num_buckets, DIFFUSION.T)
        start_from(model, recovered(args, RECOVERY, seed))
        distill(model, args, k, seed)
        return model

    return adapter_in_file(args, f"{k} steps, {num_buckets} sets, {seed}", make)


def distill(model, args, k, seed):
    """Train the deltas of model, which is the world, to leap over 40 / k steps at once."""
    n = max(64, 1024 // args.steps_divisor)
    states, words = trajectories(merge(model), n, seed)
    states = states[:: 8 // k]  # (k + 1, n, 3, 16, 16)
    times = torch.tensor(every(k))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad])
    steps = 2 * STEPS // args.steps_divisor
    for step in tqdm(range(steps), f"{k} steps"):
        optimizer.param_groups[0]["lr"] = LR_FEW * (1 - step / steps)
        pick = torch.randint(n, (64,), generator=generator)
        part = torch.arange(64) % k  # of the path, for each image
        x = states[part, pick]
        target = leap(x, states[part + 1, pick], times, part)
        optimizer.zero_grad()
        (model(x, times[part], words[pick]) - target).square().mean().backward()
        optimizer.step()


@torch.no_grad()
def start_from(model, saved):
    """Give each scale set of a model the deltas of an adapter that has one."""
    one = quantize(load_model(BASE), 4)
    load_adapter(one, saved)
    of_one = deltas(one)
    for name, delta in deltas(model).items():
        delta.copy_(of_one[f"{name.rsplit('_', 1)[0]}_0"])


def draw(net, words, k, cfg_scale, seed) -> Tensor:
    """DDIM images (N, 3, 16, 16) in k steps."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(words), 3, toy.SIZE, toy.SIZE, generator=generator)
    with torch.no_grad():
        return run_from(net, x, words, every(k), cfg_scale=cfg_scale)[-1].clamp(-1, 1)


def few(args):
    """Can scales alone learn to sample in few steps, and does that add to a subject?"""
    columns = ["sampling", "steps", "guidance", "right", "whole", "runs"]
    names = {"plain, 40": ("plain", "40", "3")}
    for k in (8, 4):
        names[f"plain, {k}"] = ("plain", str(k), "3")
        names[f"plain, {k}, without guidance"] = ("plain", str(k), "1")
        names[f"distilled, {k}"] = ("distilled, one scale set", str(k), "1")
        names[f"distilled, {k}, {k} sets"] = (f"distilled, {k} scale sets", str(k), "1")
    for seed in range(args.seeds):
        few_steps(args, names, seed)
    rows = []
    for name, cells in names.items():
        runs = done(args, "few", name)
        if runs:
            rows.append([*cells, *cells_of(runs, RATED), str(len(runs))])
    show(args, "few steps", columns, rows)
    few_steps_of_subjects(args, names)


def few_steps(args, names, seed):
    """Rate the world's creatures for each way to sample."""
    n = 200 // args.steps_divisor
    words = torch.tensor([toy.caption(prompt) for prompt in creature_prompts(n, seed)])
    for name, (_, k, cfg_scale) in names.items():
        key = {"neighbour": "few", "name": name, "seed": seed}
        if not is_due(args, name, key):
            continue
        k = int(k)
        model = world(args, seed)
        if not name.startswith("plain"):
            sets = k if "sets" in name else 1
            model = quantize(load_model(BASE), 4, sets, DIFFUSION.T)
            load_adapter(model, distilled(args, k, sets, seed))
        images = draw(model, words, k, float(cfg_scale), seed)
        keep_strip(args, "few", name, images)
        append(args.log, key, rate(images, words))


def few_steps_of_subjects(args, names):
    """Add what makes sampling short to what makes a subject: parts right, and whole subjects."""
    ways = {"plain, 40": (40, False)}
    for k in (8, 4):
        ways[f"plain, {k}"] = (k, False)
        ways[f"added, {k}"] = (k, True)

    def job(k, is_added, subject, seed):
        model, run, folders = fine_tuned(args, SHORT[POSITION], subject, seed)
        if is_added:
            load_adapter(model, adapter(model), distilled(args, k, 1, seed))
        word, folder = next(iter(folders.items()))
        words = torch.tensor(train.captions_of(train.prompts_of(word)))
        cfg_scale = 1 if is_added else TEACHER_CFG
        images = draw(model, words, k, cfg_scale, seed)
        way = "added" if is_added else "plain"
        keep_strip(args, "few", f"{subject}, {way}, {k}", images[:: train.IMAGES_PER_PROMPT])
        scores = score(images, words, toy.read_parts(folder), toy.WORD[word])
        return {key: scores[key].mean().item() for key in ("parts", "identity", "prompt")}

    jobs = {f"few steps: {name}": partial(job, *way) for name, way in ways.items()}
    run_all(args, jobs, toy.TABLE)
    rows = []
    for name, (k, is_added) in ways.items():
        runs = list(runs_of(args, f"few steps: {name}", toy.TABLE).values())
        if runs:
            way = "the subject's and the distilled adapter" if is_added else "the subject's adapter"
            digits = {"parts": 2, "identity": 2, "prompt": 2}
            guidance = "1" if is_added else "3"
            rows.append([way, str(k), guidance, *cells_of(runs, digits), str(len(runs))])
    columns = ["scales", "steps", "guidance", "parts right", "whole subject", "prompt right"]
    show(args, "few steps, subjects", [*columns, "runs"], rows)
    page_of(args, "few", [*names, *[f"{toy.TABLE[0]}, {name}" for name in ways]])


PARTS = {"stages": stages, "start": start, "pruning": pruning, "few": few}


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="+", metavar="NAME", help=", ".join(PARTS))
    subjects_help = "those to run now (default: all)"
    parser.add_argument("--subjects", nargs="+", choices=toy.TABLE, help=subjects_help)
    rows_help = "patterns of the rows to run now"
    parser.add_argument("--rows", nargs="+", default=["*"], help=rows_help)
    seeds_help = "how many seeds to run now, from 0"
    parser.add_argument("--seeds", type=number(1, 1000), default=1, help=seeds_help)
    write_help = "put each table where experiments/RESULTS.md has its mark, too"
    parser.add_argument("--write", action="store_true", help=write_help)
    args = parse_with_log(parser)
    for name in args.parts:
        if name not in PARTS:
            parser.error(f"there is no part {name!r}; choose from {', '.join(PARTS)}")
    if args.subjects is None:
        args.subjects = toy.TABLE[:1] if args.quick else toy.TABLE
    for name in args.parts:
        PARTS[name](args)


if __name__ == "__main__":
    guard(main)

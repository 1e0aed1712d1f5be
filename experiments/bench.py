"""Memory and speed, measured side by side: python experiments/bench.py speed | scale

speed: training steps of twelve methods, taken in turn for several rounds, and their medians; what
each method keeps in memory; sampling steps; bytes on disk; the time to quantize. scale: one method
on a UNet of 860 million parameters.
"""

import contextlib
import copy
import math
import multiprocessing
import statistics
import sys
import time
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from baselines import lora, lora_packed, plain
from calibrate import CALIBRATIONS
from data import toy
from model import Diffusion, Stage, UNet
from quant import adapter, checkpoint_contexts, merge, quantize
from report import print_table
from support.files import file_size
from support.flags import Parser, guard, number

DIFFUSION = Diffusion()


class Size(NamedTuple):
    """A UNet to measure."""

    config: dict  # the arguments of UNet
    side: int  # of its images, in pixels


SIZES = {
    "default": Size(config={}, side=16),
    "30M": Size(
        config={"channels": (128, 256, 256, 256), "attention": (1,), "blocks": 2, "c_emb": 512},
        side=32,
    ),
}
STABLE_DIFFUSION = {  # the shapes of its UNet
    "channels": (320, 640, 1280, 1280),
    "attention": (0, 1, 2, 3),
    "blocks": 3,
    "c_emb": 1280,
    "c_words": 768,
    "c_image": 4,
}

# --------------------------------------------------------------------------------------------------
# The methods
# --------------------------------------------------------------------------------------------------


def full(model):
    """Every weight is trained."""
    return model


def ours(model, **kwargs):
    """quantize, with the quickest calibration: what it finds doesn't change what is measured."""
    return quantize(model, **{"columns": "channel", "calibration": "minmax", **kwargs})


def ours_checkpointed(model):
    """Two scale sets, and blocks that are run again in backward."""
    ours(model, num_buckets=2)
    for stage in list(model.modules()):
        if isinstance(stage, Stage):
            for i, block in enumerate(stage):
                stage[i] = Checkpointed(block)
    return model


class Checkpointed(nn.Module):
    """A block of which only the inputs are kept for backward: there it is run again."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, *inputs):
        # blocks draw no random numbers
        options = {"use_reentrant": False, "preserve_rng_state": False}
        if not torch.compiler.is_compiling():  # a compiled graph knows the batch
            options["context_fn"] = checkpoint_contexts
        return checkpoint(self.block, *inputs, **options)


METHODS = {  # each takes a float UNet and makes it ready to train
    "full fine-tuning": full,
    "LoRA r = 2": partial(lora, rank=2),
    "LoRA r = 16": partial(lora, rank=16),
    "LoRA r = 2, packed base": partial(lora_packed, rank=2),
    "LoRA r = 16, packed base": partial(lora_packed, rank=16),
    "PEQA, plain": partial(plain, train_in=False),
    "TuneQDM, plain": partial(plain, train_in=True),
    "PEQA, ours": partial(ours, scales="out"),
    "TuneQDM, ours, N = 1": partial(ours, num_buckets=1),
    "TuneQDM, ours, N = 2": partial(ours, num_buckets=2),
    "TuneQDM, ours, N = 4": partial(ours, num_buckets=4),
    "TuneQDM, ours, N = 2, checkpointed": ours_checkpointed,
    "by position, N = 1": partial(ours, columns="position", num_buckets=1),
    "by position, N = 2": partial(ours, columns="position", num_buckets=2),
}


def build(method, size, device):
    """A UNet of this size with random weights, ready to train by this method."""
    torch.manual_seed(0)
    model = UNet(**SIZES[size].config)
    nn.init.normal_(model.out.weight, std=0.02)  # not zeros: nothing would flow back
    return METHODS[method](model).to(device, memory_format=torch.channels_last)


# --------------------------------------------------------------------------------------------------
# A training step
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a training step takes."""

    x0: Tensor  # (N, C, H, W)
    t: Tensor  # (N,)
    words: Tensor  # (N, L)
    eps: Tensor  # (N, C, H, W)


def batch_of(n, size, device):
    """A random batch of n images."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, 3, SIZES[size].side, SIZES[size].side)
    x0 = torch.randn(shape, generator=generator)
    eps = torch.randn(shape, generator=generator)
    t = torch.randint(DIFFUSION.T, (n,), generator=generator)
    words = torch.randint(len(toy.VOCAB), (n, toy.SLOTS), generator=generator)
    return Batch(
        x0=x0.to(device, memory_format=torch.channels_last),
        t=t.to(device),
        words=words.to(device),
        eps=eps.to(device, memory_format=torch.channels_last),
    )


def loss_of(model, batch):
    """The mean squared error of v."""
    x0, t, words, eps = batch
    v = model(DIFFUSION.q_sample(x0, t, eps), t, words)
    return DIFFUSION.squared_error(v, x0, t, eps).mean()


def optimizer_of(model):
    """Adam for what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.Adam(trained, lr=1e-6, fused=True)


def step(model, optimizer, batch):
    """One training step."""
    loss_of(model, batch).backward()
    optimizer.step()
    optimizer.zero_grad()


# --------------------------------------------------------------------------------------------------
# What is measured: seconds and bytes
# --------------------------------------------------------------------------------------------------


def clock(run, device):
    """Seconds that run() takes."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


def wait_for(device):
    """Let a GPU finish what was asked of it."""
    if device == "cuda":
        torch.cuda.synchronize()


def in_turn(runs, rounds, device):
    """The median seconds of each of runs ({name: function}).

    They are called in turn, so that what else the machine does meets all of them. The first round
    only warms up.
    """
    seconds = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            seconds[name].append(clock(run, device))
    return {name: statistics.median(of_run[1:]) for name, of_run in seconds.items()}


def storages(tensors):
    """The bytes of each storage behind tensors, by its address: views share one."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return found


def kept_bytes(model, batch):
    """Bytes that autograd keeps for backward. Parameters, buffers and the batch don't count."""
    known = storages([*model.parameters(), *model.buffers(), *batch])
    saved = []

    def note(tensor):
        saved.append(tensor)
        return tensor

    def give_back(tensor):
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, give_back):
        loss_of(model, batch)
    kept = storages(saved)
    return sum(size for address, size in kept.items() if address not in known)


def held_bytes(model, optimizer):
    """Bytes of weights, gradients and the optimizer's state, once a backward left its gradients."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    for state in optimizer.state.values():
        tensors += [value for value in state.values() if torch.is_tensor(value)]
    return sum(storages(tensors).values())


def resident(key="VmRSS"):
    """Bytes of this process in memory: now (VmRSS), or at most since forget_peak (VmHWM).

    NaN if there is no /proc that says so.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return math.nan
    for line in status.splitlines():
        if line.startswith(key):
            kilobytes = int(line.split()[1])
            return 1024 * kilobytes
    return math.nan


def forget_peak(device):
    """Let the peak of memory be what is in use now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak(method, size, n, device):
    """The most bytes that two training steps take above the idle process. For a fresh process."""
    torch.zeros(1, device=device)  # what the device itself needs isn't the method's
    idle = resident()
    model = build(method, size, device)
    batch = batch_of(n, size, device)
    optimizer = optimizer_of(model)
    forget_peak(device)
    for _ in range(2):
        step(model, optimizer, batch)
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resident("VmHWM") - idle


def in_process(target, *args):
    """What target(*args) returns, run in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(target, args)


# --------------------------------------------------------------------------------------------------
# The tables
# --------------------------------------------------------------------------------------------------


def speed(args):
    """The tables of each size."""
    for size in args.sizes:
        models = {}
        for method in METHODS:
            if any(fnmatch(method, pattern) for pattern in args.methods):
                models[method] = build(method, size, args.device)
        for n in args.batches:
            training(models, size, n, args)
        if args.compile or len(models) < len(METHODS):
            continue  # the rest isn't compiled, and is of no method
        base = build("full fine-tuning", size, args.device)
        quantized = {}
        for n_bits in (8, 4, 3, 2):
            quantized[f"{n_bits} bits"] = ours(copy.deepcopy(base), n_bits=n_bits)
        on_disk(base, quantized, size)
        sampling(base, quantized, size, args)
        quantizing(base, size, args)


def training(models, size, n, args):
    """The table of a training step at batch n."""
    batch = batch_of(n, size, args.device)
    optimizers = {method: optimizer_of(model) for method, model in models.items()}
    nets = compiled(models) if args.compile else models
    steps = {method: partial(step, nets[method], optimizers[method], batch) for method in nets}

    first = {}  # seconds of the first step, which compiles
    kept = {}
    held = {}
    peaks = {}
    for method, net in nets.items():
        first[method] = clock(steps[method], args.device)
        kept[method] = kept_bytes(net, batch)
        loss_of(net, batch).backward()
        held[method] = held_bytes(net, optimizers[method])
        optimizers[method].zero_grad()
        if not args.compile:
            peaks[method] = in_process(peak, method, size, n, args.device)
    seconds = in_turn(steps, args.rounds, args.device)

    trained = {method: f"{count_trained(model):,}" for method, model in models.items()}
    cells = {
        "trained": trained,
        "step, ms": with_ratios(seconds, 1e-3, digits=0),
        "kept for backward, MB": with_ratios(kept, 1e6, digits=1),
        "weights, gradients, optimizer, MB": with_ratios(held, 1e6, digits=2),
    }
    if args.compile:
        cells["first step, s"] = with_ratios(first, 1, digits=0)
    else:
        cells["peak, MB"] = with_ratios(peaks, 1e6, digits=0)
    rows = []
    for method in models:
        rows.append([method, *(column[method] for column in cells.values())])
    kind = "compiled training step" if args.compile else "training step"
    parameters = trained["full fine-tuning"]
    title = (
        f"A {kind}, UNet of {parameters} parameters, batch {n}, {args.device}; in brackets: of full"
    )
    print_table(title, ["method", *cells], rows)


def compiled(models):
    """The models under torch.compile, for batches of one size."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = len(models)  # they share one forward
    return {method: torch.compile(model, dynamic=False) for method, model in models.items()}


def count_trained(model):
    """How many numbers are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def with_ratios(values, unit, digits):
    """A cell for each of values ({name: number}): it in this unit, and its ratio to the first."""
    first = next(iter(values.values()))
    cells = {}
    for name, value in values.items():
        cells[name] = f"{value / unit:.{digits}f} ({value / first:.2f})"
    return cells


def on_disk(base, quantized, size):
    """The table of bytes on disk. quantized: {width: model}."""
    whole = file_size(base.state_dict())
    rows = [["32 bits", f"{whole:,} (1.000)", ""]]
    for width, model in quantized.items():
        frozen = {name: value for name, value in model.state_dict().items() if ".d_" not in name}
        packed = file_size(frozen)
        rows.append([width, f"{packed:,} ({packed / whole:.3f})", f"{file_size(adapter(model)):,}"])
    print_table(f"On disk, {size} UNet", ["weights", "base, bytes", "adapter, bytes"], rows)


def sampling(base, quantized, size, args):
    """The table of a sampling step. quantized: {width: model}."""
    nets = {"float": base, **quantized, "any, merged": merge(quantized["4 bits"])}
    rows = []
    for n in (1, 16):
        x, t, words, _ = batch_of(n, size, args.device)
        runs = {name: partial(net, x, t, words) for name, net in nets.items()}
        with torch.no_grad():
            seconds = in_turn(runs, 3 * args.rounds, args.device)
        milliseconds = with_ratios(seconds, 1e-3, digits=1)
        rows.append([str(n), *milliseconds.values()])
    print_table(f"A sampling step, ms, {size} UNet", ["batch", *nets], rows)


def quantizing(base, size, args):
    """The table of the time to quantize."""
    row = []
    calibrations = [*CALIBRATIONS, "gptq"]
    for calibration in calibrations:
        x, t, words, _ = batch_of(64, size, args.device)
        data = list(zip(x.split(16), t.split(16), words.split(16)))
        run = partial(quantize, copy.deepcopy(base), 4, calibration=calibration, data=data)
        row.append(f"{clock(run, args.device):.2f}")
    print_table(f"Time to quantize to 4 bits, s, {size} UNet", calibrations, [row])


def scale(args):
    """Quantize a UNet of Stable Diffusion's shapes, with random weights, and take training steps.

    On the CPU, with one image of 32x32 latents.
    """
    idle = resident()

    def above_idle(bytes_):
        return f"{(bytes_ - idle) / 1e9:.2f}"

    model = UNet(**STABLE_DIFFUSION)
    nn.init.normal_(model.out.weight, std=0.02)
    parameters = count_trained(model)
    rows = [["float model", above_idle(resident()), ""]]

    forget_peak("cpu")
    seconds = clock(partial(ours, model, num_buckets=2), "cpu")
    rows.append(["peak while quantizing", above_idle(resident("VmHWM")), f"{seconds:.0f}"])
    rows.append(["quantized model", above_idle(resident()), ""])

    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(1, 4, 32, 32, generator=generator)
    eps = torch.randn(1, 4, 32, 32, generator=generator)
    words = torch.zeros(1, toy.SLOTS, dtype=torch.long)
    batch = Batch(x0, torch.tensor([300]), words, eps)
    optimizer = optimizer_of(model)
    kept = kept_bytes(model, batch)
    forget_peak("cpu")
    run = partial(step, model, optimizer, batch)
    seconds = min(clock(run, "cpu") for _ in range(2))
    rows.append(["peak of a training step", above_idle(resident("VmHWM")), f"{seconds:.1f}"])
    rows.append(["of it kept for backward", f"{kept / 1e9:.2f}", ""])
    held = held_bytes(model, optimizer)
    rows.append(["of it weights, gradients, optimizer", f"{held / 1e9:.2f}", ""])

    title = f"{parameters:,} parameters, 4 bits, N = 2, batch 1, 32x32 latents"
    print_table(title, ["", "GB above idle", "seconds"], rows)


TABLES = {"speed": speed, "scale": scale}


def main():
    parser = Parser(__doc__.split("\n")[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--batches", nargs="+", type=int, choices=range(1, 1025), metavar="N", default=[1, 16, 64]
    )
    methods_help = "patterns of the methods to time; full fine-tuning, the yardstick, must be there"
    parser.add_argument("--methods", nargs="+", default=["*"], help=methods_help)
    rounds_help = "steps of each method that are timed, in turn"
    parser.add_argument("--rounds", type=number(1, 1000), default=5, help=rounds_help)
    compile_help = "every method under torch.compile (minutes for each)"
    parser.add_argument("--compile", action="store_true", help=compile_help)
    parser.add_device()
    args = parser.parse_args()
    TABLES[args.table](args)


if __name__ == "__main__":
    guard(main)

"""What the kernels and CUDA graphs give on a GPU: python experiments/gpu.py --seconds 200

First the tests of both. Then training steps and sampling steps: full fine-tuning and TuneQDM, by
quant.py's plain code or by support/gpu_kernels.py, each launch on its own or in CUDA graphs. Each
time is printed when it is known, and all of them once more in a table at the end. What fails is
reported and skipped, and what doesn't start within --seconds is left out.
"""

import contextlib
import copy
import gc
import importlib.util
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn as nn
from torch import Tensor

import quant
from bench import SIZES, STABLE_DIFFUSION, Size, clock, ours
from graphs import graphed
from model import UNet
from support.flags import Parser, guard, number

START = time.perf_counter()
WARM_UP = 4  # calls: a plain one, one that is recorded, two replays


LARGE = Size(STABLE_DIFFUSION, side=64)
TINY = Size({"channels": (32, 32), "attention": (1,), "c_emb": 16, "c_words": 16}, side=8)


class Variant(NamedTuple):
    """A way to train or to sample."""

    name: str
    num_buckets: int = 0  # of TuneQDM; 0 is full fine-tuning, or a float model
    has_kernels: bool = False
    has_graphs: bool = False


FULL = Variant("full")  # the two that others are compared with
FULL_GRAPHS = Variant("full, graphs", has_graphs=True)
VARIANTS = [  # the most important first: time may run out
    FULL,
    FULL_GRAPHS,
    Variant("N = 1, kernels, graphs", 1, has_kernels=True, has_graphs=True),
    Variant("N = 2, kernels, graphs", 2, has_kernels=True, has_graphs=True),
    Variant("N = 1, kernels", 1, has_kernels=True),
    Variant("N = 2, kernels", 2, has_kernels=True),
    Variant("N = 1", 1),
    Variant("N = 2", 2),
    Variant("N = 1, graphs", 1, has_graphs=True),
    Variant("N = 2, graphs", 2, has_graphs=True),
]


class Result(NamedTuple):
    """The median time and the memory of one variant."""

    what: str  # model, batch and dtype
    variant: Variant
    seconds: float
    reserved_bytes: int  # that PyTorch takes from the GPU for it


RESULTS = []


def say(*words):
    """Print with the seconds since the start."""
    print(f"[{time.perf_counter() - START:5.1f}]", *words, flush=True)


def seconds_left(args):
    return args.seconds - (time.perf_counter() - START)


# --------------------------------------------------------------------------------------------------
# Tests
# --------------------------------------------------------------------------------------------------


def check(args):
    """Run the tests of kernels and graphs, in processes side by side if pytest-xdist is there."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-o", "addopts="]  # without pytest.ini's, which need pytest-xdist
    if importlib.util.find_spec("xdist"):
        command += ["-n", "8"]
    for file in ("support/test_gpu_kernels.py", "experiments/test_graphs.py"):
        command.append(str(ROOT / "tests" / file))
    seconds = min(args.test_seconds, max(1, seconds_left(args)))
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
        say("tests:", done.stdout[-3500:], done.stderr[-500:])
    except subprocess.TimeoutExpired as error:
        output = error.stdout or b""  # bytes, in spite of text=True
        say("tests took too long:", output[-1000:].decode(errors="replace"))


# --------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What a training step takes."""

    x: Tensor  # (N, C, H, W)
    t: Tensor  # (N,), of both buckets, if N > 1
    words: Tensor  # (N, L)
    target: Tensor  # (N, C, H, W)


def batch_of(n, size, device):
    """A random batch of n images."""
    generator = torch.Generator().manual_seed(1)
    shape = (n, size.config.get("c_image", 3), size.side, size.side)
    x = torch.randn(shape, generator=generator)
    target = torch.randn(shape, generator=generator)
    t = 200 + 500 * (torch.arange(n) % 2) + torch.arange(n)
    words = torch.randint(22, (n, 7), generator=generator)
    return Batch(
        x=x.to(device, memory_format=torch.channels_last),
        t=t.to(device),
        words=words.to(device),
        target=target.to(device, memory_format=torch.channels_last),
    )


def base_of(size, device):
    """A float UNet with random weights."""
    torch.manual_seed(0)
    with torch.device(device):
        model = UNet(**size.config)
    nn.init.normal_(model.out.weight, std=0.02)  # not zeros: nothing would flow back
    return model.to(memory_format=torch.channels_last)


def model_of(base, variant):
    """A copy of base, quantized if the variant says so."""
    model = copy.deepcopy(base)
    if variant.num_buckets > 0:
        ours(model, num_buckets=variant.num_buckets)
    return model


def train(net, optimizer, batch, is_bf16):
    """One training step."""
    with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=is_bf16):
        v = net(batch.x, batch.t, batch.words)
    loss = (v.float() - batch.target).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def sample(net, batch):
    """The part of a sampling step that takes time."""
    net(batch.x, batch.t, batch.words)


@contextlib.contextmanager
def code_of(variant):
    """Quantized layers run quant.py's plain code, or the kernels if the variant says so.

    Raises RuntimeError if they should run the kernels on a GPU, and can't.
    """
    kernels = quant.kernels
    if not variant.has_kernels:
        quant.kernels = None
    elif torch.cuda.is_available() and not kernels_work():
        raise RuntimeError("Triton doesn't work here")
    try:
        yield
    finally:
        quant.kernels = kernels


@torch.no_grad()
def kernels_work():
    """True if quantized layers on the GPU take the kernels."""
    return quant.has_kernels_for(torch.ones(1, device="cuda"))


# --------------------------------------------------------------------------------------------------
# Measuring
# --------------------------------------------------------------------------------------------------


def training(what, base, batch, is_bf16, args):
    """Measure a training step by every variant."""
    for variant in VARIANTS:
        if len(batch.t) == 1 and variant.num_buckets > 1:
            continue  # one sample is in one bucket

        def prepare(variant=variant):
            model = model_of(base, variant)
            trained = [p for p in model.parameters() if p.requires_grad]
            optimizer = torch.optim.Adam(trained, lr=1e-6, fused=True)
            net = graphed(model) if variant.has_graphs else model
            return partial(train, net, optimizer, batch, is_bf16)

        measure(what, variant, prepare, args)


def sampling(what, base, batch, args):
    """Measure a sampling step, of float models and of packed ones with one bucket."""
    for variant in VARIANTS:
        if variant.num_buckets > 1:
            continue

        def prepare(variant=variant):
            model = model_of(base, variant)
            net = graphed(model) if variant.has_graphs else model
            return partial(sample, net, batch)

        measure(what, variant, prepare, args)


def measure(what, variant, prepare, args):
    """The median seconds of the function that prepare() returns, and its memory."""
    label = f"{what:28} {variant.name:24}"
    if seconds_left(args) < 8:
        say(label, "left out: no time")
        return
    before = reserved()
    try:
        with code_of(variant):
            run = prepare()
            for _ in range(WARM_UP):
                run()
            reserved_bytes = peak_of(run) - before
            seconds = statistics.median(clock(run, args.device) for _ in range(args.rounds))
        RESULTS.append(Result(what, variant, seconds, reserved_bytes))
        say(label, f"{1e3 * seconds:8.2f} ms {reserved_bytes / 1e9:6.2f} GB")
    except Exception as error:
        message = " ".join(str(error).split())
        say(label, "FAILED:", type(error).__name__, message[:600])


def reserved():
    """The bytes that PyTorch has taken from the GPU, once what isn't used is given back."""
    if not torch.cuda.is_available():
        return 0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def peak_of(run):
    """The most bytes that are reserved while run() runs.

    Reserved, not allocated: what a CUDA graph keeps in between doesn't count as allocated.
    """
    if not torch.cuda.is_available():
        return 0
    reserved()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved()


def show():
    """The table of all results. Ratios are to full fine-tuning, or to the float model."""
    seconds_of = {(result.what, result.variant): result.seconds for result in RESULTS}
    print("\n| what | variant | ms | of full | of full, graphs | GB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for what, variant, seconds, reserved_bytes in RESULTS:
        of_full = seconds / seconds_of.get((what, FULL), float("nan"))
        of_graphs = seconds / seconds_of.get((what, FULL_GRAPHS), float("nan"))
        cells = [what, variant.name, f"{1e3 * seconds:.2f}", f"{of_full:.2f}", f"{of_graphs:.2f}"]
        cells.append(f"{reserved_bytes / 1e9:.2f}")
        print(f"| {' | '.join(cells)} |")


def attempt(part, *rest):
    """part(*rest); if it fails, the next part has its turn."""
    try:
        part(*rest)
    except Exception as error:
        say(part.__name__, "FAILED:", type(error).__name__, str(error)[:600])


def measure_small(args):
    size = TINY if args.tiny else SIZES["30M"]
    base = base_of(size, args.device)
    batch = batch_of(16, size, args.device)
    training("30M, batch 16, float32", base, batch, is_bf16=False, args=args)
    training("30M, batch 16, bfloat16", base, batch, is_bf16=True, args=args)
    one = batch_of(1, size, args.device)
    sampling("30M, sampling, batch 1", base, one, args)


def measure_large(args):
    size = TINY._replace(config={**TINY.config, "c_image": 4}) if args.tiny else LARGE
    base = base_of(size, args.device)
    for n in (4, 1):
        batch = batch_of(n, size, args.device)
        training(f"860M, batch {n}, bfloat16", base, batch, is_bf16=True, args=args)


PARTS = {"check": check, "small": measure_small, "large": measure_large}


def main():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to do")
    add(
        "--seconds", type=number(1.0, 1e6), default=200, help="after which nothing more is measured"
    )
    add("--test-seconds", type=number(1.0, 1e6), default=70, help="that the tests may take")
    add("--rounds", type=number(1, 1000), default=7, help="steps that are timed")
    add(
        "--tiny",
        action="store_true",
        help="tiny models, to try this script (on a CPU no kernels or graphs run)",
    )
    parser.add_device()
    args = parser.parse_args()

    triton = quant.kernels.triton.__version__ if quant.kernels else "none"
    device = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    say(f"{device}, torch {torch.__version__}, triton {triton}")
    for part in args.parts:
        attempt(PARTS[part], args)
    show()


if __name__ == "__main__":
    guard(main)

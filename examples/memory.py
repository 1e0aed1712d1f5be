"""What fine-tuning the UNet of Stable Diffusion 1.5 takes: memory, and seconds a step.

    python examples/memory.py                           # on a GPU: every row, or --seconds
    python examples/memory.py --device cpu --seconds 3600 --rows "ours, 4 bits, N = 2"
    python examples/memory.py --device cpu --tiny       # the same code with a small UNet

The 860 million weights are random: neither memory nor speed depends on them. Latents are 64x64, as
for images of 512x512. A batch is one image, or two with prior preservation.

    full fine-tuning    AdamW, bf16 autocast
    LoRA r = 4          on the attention's projections, as in diffusers; float16 base and autocast
    TuneQDM, plain      as its authors write it: int8 codes, dequantized under autograd, and
                        both scales trained; bf16 autocast
    ours                quant.py, with N timestep buckets; bf16 autocast

On a CPU everything is float32. First a quantized layer is compared with the plain formula. Then
each row is measured in a process of its own, and printed as soon as it is known. A row that fails,
because memory is short, say, tells why, and the others go on. The table of all comes last:

    held         bytes of weights and buffers before the first step
    kept         bytes that a forward pass leaves for backward
    allocated    the most that tensors took while training; on a CPU, the most that was resident
    nvidia-smi   what the card has given to the process: its context and unused cache, too
"""

import gc
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F
from stable_diffusion import UNet2DConditionModel, checkpoint_blocks  # the first is diffusers'

from calibrate import minmax
from quant import deltas, merge, quantize
from support.flags import Parser, guard, number

SD15 = {  # unet/config.json of Stable Diffusion 1.5
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3),
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TINY = {
    **SD15,
    "sample_size": 16,
    "block_out_channels": (32,) * 4,
    "layers_per_block": 1,
    "cross_attention_dim": 16,
}
T = 1000  # timesteps
WORDS = 77  # tokens of a prompt
WARM_UP = 2  # steps before the timed ones, on a GPU
TIMED = 5
GB = 1e9


# --------------------------------------------------------------------------------------------------
# The methods
# --------------------------------------------------------------------------------------------------


class LoRA(nn.Module):
    """y = layer(x) + up(down(x)) for a frozen linear layer (Hu et al. 2021)."""

    def __init__(self, layer, rank):
        super().__init__()
        device = layer.weight.device
        self.layer = layer
        self.down = nn.Linear(layer.in_features, rank, bias=False, device=device)
        self.up = nn.Linear(rank, layer.out_features, bias=False, device=device)
        nn.init.zeros_(self.up.weight)

    def forward(self, x):
        return self.layer(x) + self.up(self.down(x))


class Plain(nn.Module):
    """A Conv2d or Linear of int8 codes, whose scales autograd trains through the float weight."""

    def __init__(self, layer):
        super().__init__()
        weight = layer.weight.detach()  # (O, I, *kernel)
        out_channels, in_channels, *kernel = weight.shape
        ones = [1] * len(kernel)
        grid = minmax(weight.reshape(1, out_channels, in_channels, -1), 8)
        codes = (grid.codes - 128).to(torch.int8)  # 0 .. 255 to -128 .. 127
        self.register_buffer("codes", codes.view(weight.shape))
        self.register_buffer("zero_point", (grid.zero_point - 128).view(-1, 1, *ones))
        self.s_out = nn.Parameter(grid.s_out.view(-1, 1, *ones))
        self.s_in = nn.Parameter(grid.s_in.view(1, -1, *ones))
        self.bias = layer.bias
        self.stride = getattr(layer, "stride", None)
        self.padding = getattr(layer, "padding", None)

    def forward(self, x):
        weight = (self.codes - self.zero_point) * self.s_out * self.s_in
        if weight.dim() == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding)


def use_lora(unet):
    unet.requires_grad_(False)
    for name, layer in list(unet.named_modules()):
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            unet.set_submodule(name, LoRA(layer, rank=4))


def use_plain(unet):
    unet.requires_grad_(False)
    for name, layer in list(unet.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            unet.set_submodule(name, Plain(layer))


class Row(NamedTuple):
    """What is measured."""

    method: str
    bits: int | None = None  # of ours alone, as buckets
    buckets: int | None = None
    checkpointed: bool = False

    @property
    def name(self):
        name = self.method
        if self.method == "ours":
            name += f", {self.bits} bits, N = {self.buckets}"
        if self.checkpointed:
            name += ", checkpointed"
        return name


ROWS = [  # the most important first: time may run out
    Row("full fine-tuning"),
    Row("ours", 4, 2, checkpointed=True),
    Row("ours", 4, 2),
    Row("LoRA r = 4"),
    Row("TuneQDM, plain"),
    Row("ours", 4, 1, checkpointed=True),
    Row("ours", 4, 1),
    Row("ours", 8, 1, checkpointed=True),
    Row("ours", 8, 1),
    Row("ours", 4, 4, checkpointed=True),
    Row("ours", 4, 4),
    Row("ours", 8, 2, checkpointed=True),
    Row("ours", 8, 2),
    Row("full fine-tuning", checkpointed=True),
    Row("LoRA r = 4", checkpointed=True),
    Row("TuneQDM, plain", checkpointed=True),
    Row("ours", 8, 4, checkpointed=True),
    Row("ours", 8, 4),
]


QUANTIZED = {"columns": "channel", "calibration": "minmax"}  # the paper's columns


def build(row, config, device):
    """The row's UNet, and the optimizer of what its method trains."""
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(**config)
    if row.method == "ours":
        quantize(unet, row.bits, row.buckets, T, timestep="timestep", **QUANTIZED)
    if row.method == "LoRA r = 4":
        if device == "cuda":
            unet.half()
        use_lora(unet)
    if row.method == "TuneQDM, plain":
        use_plain(unet)
    if row.checkpointed:
        checkpoint_blocks(unet)
    if device == "cuda" and row.method != "full fine-tuning":
        # once out and in, so that the cache holds no leftovers of the float32 weights
        unet.cpu()
        gc.collect()
        torch.cuda.empty_cache()
        unet.to(device)
    trained = [p for p in unet.parameters() if p.requires_grad]
    kind = torch.optim.AdamW if row.method == "full fine-tuning" else torch.optim.Adam
    return unet, kind(trained, lr=1e-6, fused=True)


# --------------------------------------------------------------------------------------------------
# Measuring a row
# --------------------------------------------------------------------------------------------------


class Batches:
    """Random batches of n images for a row, and the loss of the UNet on each."""

    def __init__(self, row, n, config, device):
        self.dtype = torch.float16 if row.method == "LoRA r = 4" else torch.bfloat16
        self.n = n
        self.latents = (n, 4, config["sample_size"], config["sample_size"])
        self.words = (n, WORDS, config["cross_attention_dim"])
        self.device = device
        self.generator = torch.Generator().manual_seed(0)

    def loss(self, unet):
        x_t = torch.randn(self.latents, generator=self.generator).to(self.device)
        target = torch.randn(self.latents, generator=self.generator).to(self.device)
        words = torch.randn(self.words, generator=self.generator).to(self.device)
        # two images in two buckets: spread evenly over all timesteps
        u = (torch.arange(self.n) + torch.rand(1, generator=self.generator)) / self.n
        t = (u * T).long().clamp(max=T - 1).to(self.device)
        with torch.autocast(self.device, self.dtype, enabled=self.device == "cuda"):
            predicted = unet(x_t, t, words).sample
        return (predicted.float() - target).square().mean()


def measure(pipe, row, config, device):
    """In a process of its own: send numbers for one image, and for two; or what failed."""
    idle = pipe.recv()  # bytes that the card has given out to others; it comes when it's our turn
    try:
        start = time.perf_counter()
        unet, optimizer = build(row, config, device)
        build_seconds = time.perf_counter() - start
        for n in (1, 2):
            numbers = measure_batch(unet, optimizer, Batches(row, n, config, device), device)
            if device == "cuda":
                numbers["nvidia-smi"] = card_memory() - idle
            pipe.send({"n": n, "build": build_seconds, **numbers})
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        pipe.send(f"{type(error).__name__}: {reason}")
    pipe.close()


def measure_batch(unet, optimizer, batches, device):
    """held, kept, allocated (bytes) and step (seconds): see the head of this file."""
    mine = sizes([*unet.parameters(), *unet.buffers()])
    forget_peak(device)
    kept = kept_bytes(unet, batches)
    warm_up = WARM_UP if device == "cuda" else 1
    timed = TIMED if device == "cuda" else 1
    times = []
    for _ in range(warm_up + timed):
        start = time.perf_counter()
        batches.loss(unet).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return {
        "held": sum(mine.values()),
        "kept": sum(size for address, size in kept.items() if address not in mine),
        "allocated": peak(device),
        "step": statistics.median(times[warm_up:]),
    }


def kept_bytes(unet, batches):
    """Bytes of each storage that a forward pass leaves for backward, by its address.

    The inputs of checkpointed blocks are among them: checkpoint saves them as autograd does.
    """
    kept = []

    def keep(tensor):
        kept.append(tensor.detach())
        return kept[-1]

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        batches.loss(unet)
    return sizes(kept)


def sizes(tensors):
    """Bytes of each storage behind tensors, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def forget_peak(device):
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak(device):
    """Bytes: the most since forget_peak."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def card_memory():
    """Bytes that the first card has given out, as nvidia-smi sees it; NaN if that doesn't run."""
    command = "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --id=0".split()
    try:
        return int(subprocess.check_output(command, timeout=20)) * 2**20
    except (OSError, ValueError, subprocess.SubprocessError):
        return math.nan


# --------------------------------------------------------------------------------------------------
# A check before all: a layer against the plain formula
# --------------------------------------------------------------------------------------------------


class OneLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, timestep):
        return self.layer(x)


def check(device):
    """Compare outputs and gradients of quantized layers with those of the plain formula.

    Raises ValueError if one differs by more than a thousandth of its largest value.
    """
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    errors = []  # of outputs and gradients, relative
    for t in ([100, 200], [100, 900]):  # in one of two buckets, and in both
        for kind in ("conv", "linear"):
            layer = nn.Conv2d(32, 64, 3, padding=1) if kind == "conv" else nn.Linear(32, 64)
            shape = (2, 32, 16, 16) if kind == "conv" else (2, 16, 32)
            model = OneLayer(layer).to(device)
            quantize(model, 4, 2, T, timestep="timestep", **QUANTIZED, keep8=[])
            base = merge(model).layer.weight.detach().double()  # with all deltas zero
            for delta in deltas(model).values():
                nn.init.normal_(delta, std=0.1)
            x = torch.randn(shape, device=device, requires_grad=True)
            ours = model(x, torch.tensor(t, device=device))
            g = torch.randn_like(ours)
            plain = plain_formula(model, base, x, t)
            inputs = [x, *deltas(model).values()]
            grads = torch.autograd.grad(ours, inputs, g, allow_unused=True)
            plain_grads = torch.autograd.grad(plain, inputs, g.double(), allow_unused=True)
            for a, b in zip((ours, *grads), (plain, *plain_grads)):
                if (a is None) != (b is None):
                    raise ValueError(f"a {kind} layer at t = {t} lacks a gradient; don't measure")
                if a is not None:
                    errors.append((a - b).abs().max() / b.abs().max())
    worst = torch.stack(errors).max().item()  # NaN, if one is
    if not worst < 1e-3:
        raise ValueError(f"a layer differs from the plain formula by {worst:.1e}; don't measure")
    print(f"checked: layers equal the plain formula on {device}, to {worst:.0e}", flush=True)
    torch.backends.cudnn.allow_tf32 = True


def plain_formula(model, base, x, t):
    """y = W x + bias in float64, each sample with W = exp(d_out) base exp(d_in) of its bucket."""
    trained = deltas(model)
    bias = model.layer.bias.double()
    ones = [1] * (base.dim() - 2)
    samples = []
    for sample, timestep in zip(x.double(), t):
        b = timestep * 2 // T
        d_out = trained[f"layer.d_out_{b}"].double().view(-1, 1, *ones)
        d_in = trained[f"layer.d_in_{b}"].double().view(1, -1, *ones)
        weight = d_out.exp() * base * d_in.exp()
        if ones:
            samples.append(F.conv2d(sample, weight, bias, padding=1))
        else:
            samples.append(F.linear(sample, weight, bias))
    return torch.stack(samples)


# --------------------------------------------------------------------------------------------------
# All rows
# --------------------------------------------------------------------------------------------------


def start(*args):
    """A process that imports everything and then waits, and the pipe to it."""
    context = multiprocessing.get_context("spawn")
    ours, its = context.Pipe()
    process = context.Process(target=measure, args=(its, *args), daemon=True)
    process.start()
    its.close()  # so that the end of the process is the end of the pipe
    return process, ours


def collect(process, pipe, idle, deadline):
    """Let a process measure; returns its dicts, and a reason if one of the two is missing."""
    results = []
    try:
        pipe.send(idle)
        while len(results) < 2:
            if not pipe.poll(max(0, deadline - time.monotonic())):
                return results, "out of time (--seconds)"
            message = pipe.recv()
            if isinstance(message, str):
                return results, message
            results.append(message)
    except (EOFError, ConnectionError):
        return results, "the process died; it may have run out of memory"
    finally:
        process.kill()
        process.join()
    return results, None


COLUMNS = ("method", "held, GB", "kept, GB", "allocated, GB", "nvidia-smi, GB", "step, s")


def table_row(row, results, reason):
    """The row's line in the table: each number for one image / for two."""
    cells = [row.name]
    for key in ("held", "kept", "allocated", "nvidia-smi"):
        numbers = [f"{result[key] / GB:.2f}" for result in results if key in result]
        cells.append(" / ".join(numbers))
    cells.append(" / ".join(f"{result['step']:.3f}" for result in results))
    if reason is not None:
        cells[-1] += f" {reason}"
    return "| " + " | ".join(cells) + " |"


def main():
    parser = Parser(__doc__.split("\n")[0])
    add = parser.add_argument
    add("--seconds", type=number(1, 10**6), default=230, help="time for everything")
    add("--rows", nargs="+", help="only rows with this in their names")
    add("--tiny", action="store_true", help="a small UNet, to try the script")
    parser.add_device()
    args = parser.parse_args()
    if args.device == "mps":
        parser.error("mps isn't measured; run this on a CUDA GPU or, with --device cpu, on Linux")
    deadline = time.monotonic() + args.seconds
    parts = args.rows or [""]
    rows = [row for row in ROWS if any(part in row.name for part in parts)]
    if not rows:
        raise ValueError(f"no row has {args.rows} in its name; there are {[r.name for r in ROWS]}")

    config = TINY if args.tiny else SD15
    waiting = start(rows[0], config, args.device)
    check(args.device)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    idle = card_memory() if args.device == "cuda" else 0

    head = ["| " + " | ".join(COLUMNS) + " |", "|" + " --- |" * len(COLUMNS)]
    print("\n".join(head), flush=True)
    lines = []
    for i, row in enumerate(rows):
        process, pipe = waiting
        if i + 1 < len(rows):  # its imports take as long as a row: start it now
            waiting = start(rows[i + 1], config, args.device)
        results, reason = collect(process, pipe, idle, deadline)
        lines.append(table_row(row, results, reason))
        print(lines[-1], flush=True)

    print(f"\nUNet of Stable Diffusion 1.5{', made tiny' if args.tiny else ''}; {card}; ", end="")
    print(f"torch {torch.__version__}; one image / two, with prior preservation\n")
    print("\n".join([*head, *lines]))


if __name__ == "__main__":
    guard(main)

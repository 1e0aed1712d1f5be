"""Memory and speed, measured side by side: python bench.py speed | scale

speed: training steps of twelve methods, taken in turn, several rounds, medians; what each keeps in memory; sampling steps;
bytes on disk; the time to quantize. scale: the same method on a UNet of 860 million parameters.
"""
import contextlib
import copy
import multiprocessing
import statistics
import time
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data import toy
from model import Diffusion, UNet
from model import size as file_size
from quant import CALIBRATIONS, adapter, merge, minmax, quantize, remember
from sample import Parser, guard

DIFFUSION = Diffusion()
SIZES = {"default": (dict(), 16), "30M": (dict(channels=(128, 256, 256, 256), attention=(1,), blocks=2, c_emb=512), 32)}
LARGE = dict(channels=(320, 640, 1280, 1280), attention=(0, 1, 2, 3), blocks=3, c_emb=1280, c_words=768, c_image=4)


class LoRA(nn.Module):
    """y = layer(x) + up(down(x)) for a Conv2d or Linear, whose own weights are frozen (Hu et al. 2021)."""

    def __init__(self, layer, rank):
        super().__init__()
        self.layer, (out, into), conv = layer, layer.weight.shape[:2], isinstance(layer, nn.Conv2d)
        args = (layer.kernel_size, layer.stride, layer.padding) if conv else ()
        self.lora_a = type(layer)(into, rank, *args, bias=False)
        self.lora_b = type(layer)(rank, out, *(1,) * conv, bias=False)
        nn.init.zeros_(self.lora_b.weight)

    def forward(self, x):
        return self.layer(x) + self.lora_b(self.lora_a(x))


class Plain(nn.Module):
    """A layer of TuneQDM the plain way, as the authors write it: int8 codes, dequantized under autograd."""

    def __init__(self, layer, train_in):
        super().__init__()
        weight = layer.weight.detach()
        ones = (1,) * (weight.dim() - 2)
        codes, zero, s_out, s_in = minmax(weight.reshape(1, *weight.shape[:2], -1), 4)
        self.register_buffer("codes", codes.view(weight.shape).to(torch.int8))
        self.register_buffer("zero_point", zero.view(-1, 1, *ones))
        self.s_out = nn.Parameter(s_out.view(-1, 1, *ones))
        self.s_in = nn.Parameter(s_in.view(1, -1, *ones)) if train_in else None
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach(), requires_grad=False)
        self.run, self.args = (F.conv2d, (layer.stride, layer.padding)) if ones else (F.linear, ())

    def forward(self, x):
        weight = (self.codes - self.zero_point) * self.s_out
        return self.run(x, weight if self.s_in is None else weight * self.s_in, self.bias, *self.args)


def swap(model, make):
    """Replace every Conv2d and Linear of a frozen model by make(layer); only what is new trains."""
    model.requires_grad_(False)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            model.set_submodule(name, make(layer))
    return model


packed = partial(quantize, n_bits=4, calibration="minmax")  # the quickest: what is found doesn't change what is measured


def lora_packed(model, rank, **kwargs):
    model = packed(swap(model, lambda layer: LoRA(layer, rank)), scales="out", keep_float=("*.lora_a", "*.lora_b"), **kwargs)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name)
    return model


def checkpointed(model):
    model = packed(model, num_buckets=2)
    model.call = partial(checkpoint, use_reentrant=False, context_fn=partial(remember, model))
    return model


METHODS = {
    "full fine-tuning": lambda model: model,
    **{f"LoRA r = {r}": lambda model, r=r: swap(model, lambda layer: LoRA(layer, r)) for r in (2, 16)},
    **{f"LoRA r = {r}, packed base": lambda model, r=r: lora_packed(model, r) for r in (2, 16)},
    "PEQA, plain": lambda model: swap(model, lambda layer: Plain(layer, train_in=False)),
    "TuneQDM, plain": lambda model: swap(model, lambda layer: Plain(layer, train_in=True)),
    "PEQA, ours": lambda model: packed(model, scales="out"),
    **{f"TuneQDM, ours, N = {n}": lambda model, n=n: packed(model, num_buckets=n) for n in (1, 2, 4)},
    "TuneQDM, ours, N = 2, checkpointed": checkpointed}


def build(method, size, device):
    torch.manual_seed(0)
    model = UNet(**SIZES[size][0])
    nn.init.normal_(model.out.weight, std=0.02)  # zeros at first: nothing would flow back
    return METHODS[method](model).to(device, memory_format=torch.channels_last)


def batch_of(n, size, device):
    generator, side, T = torch.Generator().manual_seed(1), SIZES[size][1], DIFFUSION.T
    x0, eps = (torch.randn(n, 3, side, side, generator=generator).to(device, memory_format=torch.channels_last) for _ in "ab")
    t, words = torch.randint(T, (n,), generator=generator), torch.randint(22, (n, toy.SLOTS), generator=generator)
    return x0, words.to(device), t.to(device), eps


def optimizer_of(model):
    return torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-6, fused=True)


def step(model, optimizer, batch):
    DIFFUSION.loss(model, *batch).mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def clock(run, device):
    """Seconds that run() takes."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def in_turn(runs, rounds, device):
    """The median seconds of each of runs ({name: function}), called in turn, after one call each to warm up."""
    times = [{name: clock(run, device) for name, run in runs.items()} for _ in range(rounds + 1)]
    return {name: statistics.median(row[name] for row in times[1:]) for name in runs}


def storages(tensors):
    """Bytes of each storage behind tensors, by its address."""
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


def kept_bytes(model, batch):
    """Bytes of the storages that autograd keeps for backward, those of parameters and buffers and the batch left out."""
    known, kept = storages((*model.parameters(), *model.buffers(), *batch)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        DIFFUSION.loss(model, *batch).mean()
    return sum(size for pointer, size in storages(kept).items() if pointer not in known)


def held_bytes(model, optimizer):
    """Bytes of weights, their gradients and the optimizer's state, after a step whose gradients were not yet dropped."""
    tensors = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(storages(tensors).values())


def resident(key="VmRSS"):
    """Bytes of this process in memory now (VmRSS) or at most since forget_peak (VmHWM); NaN where /proc isn't there."""
    try:
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    except OSError:
        return float("nan")


def forget_peak(device):
    if device == "cuda":
        return torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak(method, size, n, device):
    """In a process of its own: the most memory that two training steps take above the idle process, in bytes."""
    torch.zeros(1, device=device)
    idle, model = resident(), build(method, size, device)
    batch, optimizer = batch_of(n, size, device), optimizer_of(model)
    forget_peak(device)
    for _ in range(2):
        step(model, optimizer, batch)
    return torch.cuda.max_memory_allocated() if device == "cuda" else resident("VmHWM") - idle


def in_process(target, *args):
    """What target(*args) returns, run in a new process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(target, args)


def print_table(title, columns, rows):
    table = "".join(f"| {' | '.join(row)} |\n" for row in [columns, ["---"] * len(columns), *rows])
    print(f"\n{title}\n\n{table}", end="", flush=True)
    return table


def speed(args):
    for size in args.sizes:
        models = {name: build(name, size, args.device) for name in METHODS}
        for n in args.batches:
            training(models, size, n, args)
        if not args.compile:
            disk_sampling_quantizing(size, args)


def training(models, size, n, args):
    """The table of a training step at batch n."""
    batch, held, kept, last = batch_of(n, size, args.device), {}, {}, {}
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = len(models)  # they share one forward
    runs = {name: torch.compile(model, dynamic=False) if args.compile else model for name, model in models.items()}
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    for name, model in runs.items():
        started = clock(partial(step, model, optimizers[name], batch), args.device)
        kept[name] = kept_bytes(model, batch)
        DIFFUSION.loss(model, *batch).mean().backward()
        held[name] = held_bytes(model, optimizers[name])
        optimizers[name].zero_grad()
        last[name] = started if args.compile else in_process(peak, name, size, n, args.device)
    times = in_turn({name: partial(step, runs[name], optimizers[name], batch) for name in runs}, args.rounds, args.device)
    full, trained = next(iter(models)), lambda model: sum(p.numel() for p in model.parameters() if p.requires_grad)
    cell = lambda values, name, unit, form: f"{values[name] / unit:{form}} ({values[name] / values[full]:.2f})"
    print_table(f"A {'compiled ' * args.compile}training step, UNet of {trained(models[full]):,} parameters, batch {n}, "
                f"{args.device}; in brackets: of full", ["method", "trained", "step, ms", "kept for backward, MB",
                "weights, gradients, optimizer, MB", "first step, s" if args.compile else "peak, MB"],
                [[name, f"{trained(model):,}", cell(times, name, 1e-3, ".0f"), cell(kept, name, 1e6, ".1f"),
                  cell(held, name, 1e6, ".2f"), cell(last, name, *((1, ".0f") if args.compile else (1e6, ".0f")))]
                 for name, model in models.items()])


def disk_sampling_quantizing(size, args):
    """Tables of what needs no training: bytes on disk, sampling steps, and the time to quantize."""
    base = build("full fine-tuning", size, args.device)
    quantized = {f"{n_bits} bits": packed(copy.deepcopy(base), n_bits=n_bits) for n_bits in (8, 4, 3, 2)}
    rows = [["32 bits", f"{(whole := file_size(base.state_dict())):,} (1.000)", ""]]
    for name, model in quantized.items():
        file = file_size({key: value for key, value in model.state_dict().items() if ".d_" not in key})
        rows.append([name, f"{file:,} ({file / whole:.3f})", f"{file_size(adapter(model)):,}"])
    print_table(f"On disk, {size} UNet", ["weights", "base, bytes", "adapter, bytes"], rows)

    rows = []
    for n in (1, 16):
        x, words, t, _ = batch_of(n, size, args.device)
        with torch.no_grad():
            nets = {"float": base, **quantized, "any, merged": merge(quantized["4 bits"])}
            runs = {name: partial(net, x, t, words) for name, net in nets.items()}
            times = in_turn(runs, 3 * args.rounds, args.device)
        rows.append([f"{n}", *(f"{1000 * time:.1f} ({time / times['float']:.2f})" for time in times.values())])
    print_table(f"A sampling step, ms, {size} UNet", ["batch", *nets], rows)

    seconds = [clock(partial(quantize, copy.deepcopy(base), 4, calibration=name), args.device) for name in CALIBRATIONS]
    print_table(f"Time to quantize to 4 bits, s, {size} UNet", list(CALIBRATIONS), [[f"{s:.2f}" for s in seconds]])


def scale(args):
    """Quantize a UNet of Stable Diffusion's shapes with random weights, then take a training step, batch 1, 32x32 latents."""
    idle = resident()
    model = UNet(**LARGE)
    nn.init.normal_(model.out.weight, std=0.02)
    above = lambda bytes_: f"{(bytes_ - idle) / 1e9:.2f}"
    count, built = sum(p.numel() for p in model.parameters()), above(resident())
    forget_peak("cpu")
    seconds = clock(partial(packed, model, num_buckets=2), "cpu")
    rows = [["float model", built, ""], ["peak while quantizing", above(resident("VmHWM")), f"{seconds:.0f}"],
            ["quantized model", above(resident()), ""]]
    generator = torch.Generator().manual_seed(1)
    x0, eps = (torch.randn(1, 4, 32, 32, generator=generator) for _ in "ab")
    batch = x0, torch.zeros(1, toy.SLOTS, dtype=torch.long), torch.tensor([300]), eps
    optimizer = optimizer_of(model)
    kept = kept_bytes(model, batch)
    forget_peak("cpu")
    seconds = min(clock(lambda: step(model, optimizer, batch), "cpu") for _ in range(2))
    rows += [["peak of a training step", above(resident("VmHWM")), f"{seconds:.1f}"],
             ["of it kept for backward", f"{kept / 1e9:.2f}", ""],
             ["of it weights, gradients, optimizer", f"{held_bytes(model, optimizer) / 1e9:.2f}", ""]]
    print_table(f"{count:,} parameters, 4 bits, N = 2, batch 1, 32x32 latents", ["", "GB above idle", "seconds"], rows)


def main():
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("table", choices=("speed", "scale"))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, choices=range(1, 1025), metavar="N", default=[1, 16, 64])
    parser.number("--rounds", int, 1, 1000, 5, "steps of each method that are timed, in turn")
    parser.add_argument("--compile", action="store_true", help="every method under torch.compile (minutes for each)")
    parser.device()
    args = parser.parse_args()
    {"speed": speed, "scale": scale}[args.table](args)


if __name__ == "__main__":
    guard(main)

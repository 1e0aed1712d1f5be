"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion Model", arXiv 2401.04339).

A weight is quantized once, to integers of n_bits; the integers never change again. Fine-tuning trains their scales:

    W[o, i] = s_out[o] * (q[o, i] - z[o]) * s_in[i]         q, z in 0 .. 2^n_bits - 1

s_out (O,) scales rows, one number for each output channel; s_in (I,) scales columns, one for each input channel; every
tap of a convolution's kernel shares them. s_out alone is PEQA; both are the paper's multi-channel-wise scale update.
The T timesteps are cut into num_buckets equal intervals, each with scales of its own over the same integers: the
paper's timestep-aware scale update.

What is trained is relative: s_out = s0_out * (1 + d_out), s_in = s0_in * (1 + d_in), all deltas zero at the start. One
learning rate then means the same in every layer, and an adapter of zeros is the base model.

The backward needs neither a weight gradient nor a float weight. With y = W x + bias, g = dL/dy and gx = W^T g,

    dL/dd_out[o] = sum over samples and positions of g[o] * (y[o] - bias[o]) / (1 + d_out[o])
    dL/dd_in[i]  = sum over samples and positions of gx[i] * x[i] / (1 + d_in[i])

so a layer keeps x, y and its packed integers, and rebuilds W for the length of one matmul.

A batch may mix timesteps. Where all samples share a bucket, its scales are folded into W; else W has the base scales,
and 1 + d_in and 1 + d_out of each sample's own bucket multiply its activations before and after the matmul. A bucket
without a sample gets no gradient (None, not zero), so that no optimizer moves it.

Against the paper: deltas, not raw scales; s_in starts from calibration, not from noise or ones. Against the authors'
code: integers are packed, autograd keeps no weight, and every sample uses its own bucket, not that of the first.

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")      # in place; then train model as it is
    save_adapter(model, "adapter.pt"); load_adapter(model, "adapter.pt"); plain = merge(model, bucket=0)
"""
import copy
import hashlib
import inspect
import math
import os
from fnmatch import fnmatch
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

# ---------------------------------------------------------------------------------------------- integers and buckets


def bucket(t, num_buckets, T):
    """The interval of each timestep: floor(t * N / T), of the same shape as t (timesteps in 0 .. T - 1).

    Raises ValueError where a timestep lies outside. Paper, section 4.2 (timestep-aware scale update).
    """
    t = torch.as_tensor(t)
    if ((t < 0) | (t >= T)).any():
        raise ValueError(f"timesteps must lie in 0 .. {T - 1}, these reach from {t.min()} to {t.max()}")
    return (t * num_buckets // T).long()


def pack(codes, n_bits):
    """Pack codes (any shape, uint8, each below 2^n_bits) into n_bits bytes for every 8 codes: uint8, one-dimensional.

    A code's bits are stored in pieces of 8, 4, 2, 1 bits (3 = 2 + 1), each piece by itself, 8 / piece codes to a byte.
    Codes that share a byte lie far apart, so that unpacking is whole-vector shifts, without interleaving.
    """
    flat, packed, shift = F.pad(codes.flatten(), (0, -codes.numel() % 8)), [], 0
    for width in _pieces(n_bits):
        piece = (flat >> shift & (1 << width) - 1).view(8 // width, -1)
        packed.append(sum(row << width * k for k, row in enumerate(piece)))
        shift += width
    return torch.cat(packed)


def unpack(packed, n_bits, shape):
    """The codes (shape, uint8) that pack made packed from."""
    count, codes, shift, start = math.prod(shape), None, 0, 0
    for width in _pieces(n_bits):
        piece = packed[start:(start := start + (count + 7) // 8 * width)]
        piece = torch.cat([piece >> width * k & (1 << width) - 1 for k in range(8 // width)])
        codes = piece if codes is None else codes | piece << shift
        shift += width
    return codes[:count].view(shape)


def _pieces(n_bits):
    return [width for width in (8, 4, 2, 1) if n_bits & width]


# -------------------------------------------------------------------------------------------------------- calibration
# Weights come as (G, O, I, K): groups, rows and columns of a group, taps of the kernel. Each calibration returns the
# codes (G, O, I, K), zero points (G, O, 1, 1), s_out (G, O, 1, 1) and s_in (G, 1, I, 1), all in the weight's dtype.


def minmax(w, n_bits, shrink=1.0):
    """Asymmetric uniform quantization of each row, from its least to its greatest weight (and zero) times shrink."""
    low, high = (w.amin((2, 3), keepdim=True).clamp(max=0) * shrink, w.amax((2, 3), keepdim=True).clamp(min=0) * shrink)
    s_out = (high - low) / (2**n_bits - 1)
    s_out = torch.where(s_out > 0, s_out, 1)  # a row of zeros
    zero = (-low / s_out).round()
    return _encode(w, s_out, zero, n_bits), zero, s_out, torch.ones_like(w[:, :1, :, :1])


def mse(w, n_bits, steps=80):
    """minmax, its range shrunk for each row by the percentage that leaves the least squared error."""
    *best, s_in = minmax(w, n_bits)
    least = float("inf")
    for step in range(steps):
        *found, _ = minmax(w, n_bits, 1 - step / 100)
        error = ((found[0] - found[1]) * found[2] - w).square().sum((2, 3), keepdim=True)
        best = [torch.where(error < least, new, old) for new, old in zip(found, best)]
        least = error.clamp(max=least)
    return *best, s_in


def rowcol(w, n_bits, balance=16, rounds=12):
    """Scales of rows and columns together.

    Sinkhorn iterations on standard deviations balance the columns against the rows (SINQ, arXiv 2509.22944), mse finds
    the grids of the balanced rows, then s_out, s_in and the integers are fitted in turn, each the best given the others.
    """
    r, c, s_in, least = torch.ones_like(w[:, :, :1, :1]), torch.ones_like(w[:, :1, :, :1]), None, float("inf")
    for _ in range(balance + 1):
        rows, cols = ((w / (r * c)).std(dims, keepdim=True, correction=0).clamp(min=1e-12) for dims in ((2, 3), (1, 3)))
        tau = torch.minimum(rows.amin(1, True), cols.amin(2, True))  # of each group, as all of this
        spread = torch.maximum(rows.amax(1, True), cols.amax(2, True)) / tau
        s_in, least = c if s_in is None else torch.where(spread < least, c, s_in), spread.clamp(max=least)
        r, c = r * (rows / tau).clamp(0.7, 2), c * (cols / tau).clamp(0.7, 2)
    codes, zero, s_out, _ = mse(w / s_in, n_bits)

    def fit(a, dims, old):  # the least squares scale of a, where a isn't zero
        norm = a.square().sum(dims, keepdim=True)
        return torch.where(norm > 0, (w * a).sum(dims, keepdim=True) / norm, old)

    for _ in range(rounds):
        s_out = fit((codes - zero) * s_in, (2, 3), s_out)
        s_in = fit((codes - zero) * s_out, (1, 3), s_in)
        codes = _encode(w, s_out * s_in, zero, n_bits)
    return codes, zero, s_out, s_in


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol}


def _encode(w, scale, zero, n_bits):
    return ((w / scale).round() + zero).clamp(0, 2**n_bits - 1)


# ------------------------------------------------------------------------------------------------------------- layers


class ScaledMatmul(torch.autograd.Function):
    """y = W x + bias with the gradients of the module's docstring. deltas: those of the buckets in the batch, first
    d_out of each, then (unless s_in is fixed) d_in of each. rows: (N,) each sample's place among them, None for one."""

    @staticmethod
    def forward(ctx, x, layer, rows, *deltas):
        d_out, d_in = layer.sort(deltas)
        if rows is None:
            y = layer.matmul(x, layer.weight(d_out, d_in, x.dtype), layer.bias)
        else:
            y = layer.matmul(layer.scale(x, d_in, rows), layer.weight(dtype=x.dtype), None)
            y = layer.scale(y, d_out, rows)
            y = y if layer.bias is None else y.add_(layer.along(layer.bias, y))
        ctx.layer, ctx.rows = layer, rows
        # s_in's gradient needs x; without it, only x's shape is kept
        ctx.save_for_backward(x if d_in is not None else x.new_empty(1).expand(x.shape), y, *deltas)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        (x, y, *deltas), layer, rows = ctx.saved_tensors, ctx.layer, ctx.rows
        d_out, d_in = layer.sort(deltas)
        gx, grads = None, [layer.reduce(g, y, rows, len(d_out), layer.bias) / (1 + d_out)]
        if ctx.needs_input_grad[0] or d_in is not None:
            if rows is None:
                gx = layer.input_grad(g, x, layer.weight(d_out, d_in, x.dtype))
            else:
                gx = layer.input_grad(layer.scale(g, d_out, rows), x, layer.weight(dtype=x.dtype))
                gx = layer.scale(gx, d_in, rows)
        if d_in is not None:
            grads.append(layer.reduce(gx, x, rows, len(d_in)) / (1 + d_in))
        return gx if ctx.needs_input_grad[0] else None, None, None, *torch.cat([grad.flatten() for grad in grads]).split(
            [delta.numel() for delta in deltas])


class QuantLayer(nn.Module):
    """A layer of packed integers and trained scales; `buckets` is what the model's timesteps told it for this call."""

    def __init__(self, layer, n_bits, num_buckets, scales, calibrate):
        super().__init__()
        weight = layer.weight.detach()
        self.n_bits, self.num_buckets, self.shape, self.buckets = n_bits, num_buckets, weight.shape, None
        self.groups = getattr(layer, "groups", 1)
        w = weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1)
        codes, zero, s_out, s_in = calibrate(w.float() if w.dtype.itemsize < 4 else w, n_bits)
        self.register_buffer("codes", pack(codes.to(torch.uint8), n_bits))  # (numel * n_bits / 8,) bytes
        self.register_buffer("zero_point", zero.flatten().to(torch.uint8))  # (O,)
        self.register_buffer("s_out", s_out.flatten().to(weight.dtype))     # (O,)
        self.register_buffer("s_in", s_in.flatten().to(weight.dtype))       # (I,)
        deltas = lambda s: nn.ParameterList(torch.zeros_like(s) for _ in range(num_buckets))
        self.d_out, self.d_in = deltas(self.s_out), deltas(self.s_in) if scales == "out+in" else None
        self.bias = layer.bias

    def weight(self, d_out=0, d_in=None, dtype=None):
        """The float weight, of the layer's shape, for deltas that broadcast to (O,) and (I,); by default the base's."""
        s_out, s_in = self.s_out * (1 + d_out), self.s_in if d_in is None else self.s_in * (1 + d_in)
        g, o, i = self.groups, self.shape[0] // self.groups, self.shape[1]
        w = unpack(self.codes, self.n_bits, (g, o, i, math.prod(self.shape[2:]))).to(s_out.dtype)
        w = w.sub_(self.zero_point.view(g, o, 1, 1)).mul_(s_out.view(g, o, 1, 1) * s_in.view(g, 1, i, 1))
        return w.view(self.shape).to(dtype)

    def forward(self, x):
        present, rows = [0], None
        if self.num_buckets > 1:
            if self.buckets is None:
                raise RuntimeError("this quantized layer was not told its timesteps: call the whole model that was given "
                                   "to quantize(), with its timestep argument")
            present, rows = self.buckets
            if rows is not None and len(x) != len(rows):
                raise ValueError(f"a quantized layer got {len(x)} samples, but the model was told {len(rows)} timesteps; "
                                 "the first dimension must be the batch")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return ScaledMatmul.apply(x, self, rows, *(d[b] for d in (self.d_out, self.d_in) if d is not None for b in present))

    def sort(self, deltas):
        """Deltas of ScaledMatmul as d_out (n, O) and d_in (n, I) or None, for n buckets."""
        n = len(deltas) if self.d_in is None else len(deltas) // 2
        return torch.stack(deltas[:n]), torch.stack(deltas[n:]) if self.d_in is not None else None

    def along(self, v, x):
        """v (..., C) as a view that broadcasts along the channels of x."""
        return v.unflatten(-1, (-1, *(1,) * (-1 - self.channel)))

    def scale(self, x, d, rows):
        """x times 1 + d of each sample's bucket. x: (N, ...); d: (n, C) or None; rows: (N,)."""
        if d is None:
            return x
        d = (1 + d[rows]).to(x.dtype)
        return x * d.view(len(d), *(1,) * (x.dim() + self.channel - 1), -1, *(1,) * (-1 - self.channel))

    def reduce(self, g, y, rows, n, bias=None):
        """Sum of g * (y - bias) over positions, and over the samples of each of n buckets: (n, C)."""
        dims = [dim for dim in range(g.dim()) if dim != g.dim() + self.channel and (dim or rows is None)]
        total = lambda p: p.sum(dims, dtype=self.s_out.dtype) if dims else p.to(self.s_out.dtype)
        p = total(g * y) if bias is None else total(g * y) - bias * total(g)
        return p[None] if rows is None else F.one_hot(rows, n).to(p.dtype).T @ p

    def extra_repr(self):
        return f"{tuple(self.shape)}, n_bits={self.n_bits}, num_buckets={self.num_buckets}"


class QuantLinear(QuantLayer):
    channel = -1  # (N, ..., C)

    def matmul(self, x, w, bias):
        return F.linear(x, w, bias if bias is None else bias.to(x.dtype))

    def input_grad(self, g, x, w):
        return g @ w

    def plain(self, **kwargs):
        return nn.Linear(self.shape[1], self.shape[0], **kwargs)


class QuantConv2d(QuantLayer):
    channel = -3  # (N, C, H, W)

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        pad = layer.padding
        if isinstance(pad, str):  # 'same' or 'valid'
            pad = [d * (k - 1) // 2 if pad == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size)]
        self.args = tuple(layer.stride), tuple(pad), tuple(layer.dilation)

    def matmul(self, x, w, bias):
        return F.conv2d(x, w, bias if bias is None else bias.to(x.dtype), *self.args, self.groups)

    def input_grad(self, g, x, w):
        batch = (lambda a: a) if x.dim() == 4 else (lambda a: a[None])
        gx = torch.ops.aten.convolution_backward(batch(g), batch(x), w, None, *self.args, False, [0, 0], self.groups,
                                                 [True, False, False])[0]
        return gx if x.dim() == 4 else gx[0]

    def plain(self, **kwargs):
        o, i, *kernel = self.shape
        return nn.Conv2d(i * self.groups, o, kernel, *self.args, self.groups, **kwargs)


# ---------------------------------------------------------------------------------------------------- the whole model


def quantize(model, n_bits=4, num_buckets=1, T=1000, scales="out+in", calibration="rowcol", timestep="t", keep8=None,
             keep_float=()):
    """Swap every Conv2d and Linear of model for a quantized layer, in place, one at a time; then only deltas train.

    n_bits: 2 to 8. num_buckets: scale sets over the T timesteps. scales: "out" (PEQA) or "out+in". calibration: minmax,
    mse or rowcol. timestep: the name of model.forward's argument that holds the timesteps, (N,) or one for all (not
    needed for one bucket). keep8, keep_float: patterns of layer names ("down.*") to keep at 8 bits or as they are; keep8
    is by default the first and the last Conv2d. Returns model; model.quant_config holds the arguments.

    Raises ValueError for arguments out of range, and for what can't be quantized: a model with quantized layers, padding
    other than zeros, weights that are shared, not float or not finite, nn.MultiheadAttention (one bare weight for three
    layers).
    """
    if n_bits not in range(2, 9) or num_buckets not in range(1, T + 1):
        raise ValueError(f"n_bits must be 2 to 8 and num_buckets 1 to T = {T}, not {n_bits} and {num_buckets}")
    if scales not in ("out", "out+in") or calibration not in CALIBRATIONS:
        raise ValueError(f"scales must be out or out+in, and calibration one of {', '.join(CALIBRATIONS)}, "
                         f"not '{scales}' and '{calibration}'")
    if num_buckets > 1 and timestep not in (names := list(inspect.signature(model.forward).parameters)):
        raise ValueError(f"model.forward has no argument '{timestep}'; timestep must be one of {', '.join(names)}")
    kept = lambda name, patterns: any(fnmatch(name, pattern) for pattern in patterns)
    layers, owners = {}, {}  # names of each layer, and layers of each parameter (a layer may have several names)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), set()).add(id(module))
        if kept(name, keep_float):
            continue
        if isinstance(module, (nn.MultiheadAttention, QuantLayer)):
            raise ValueError(f"'{name}' is a {type(module).__name__}, which can't be quantized; name it in keep_float")
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            layers.setdefault(id(module), []).append(name)
            if name == "":
                raise ValueError("the model is a single layer; put it into an nn.Sequential")
            if not module.weight.is_floating_point() or not module.weight.isfinite().all():
                raise ValueError(f"the weights of '{name}' aren't all finite floats; mend the model or name it in keep_float")
            if len(owners[id(module.weight)]) > 1:
                raise ValueError(f"'{name}' shares its weight with another layer; name one of them in keep_float")
            if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or module.padding == "same" and any(
                    d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size))):
                raise ValueError(f"'{name}' pads with {module.padding_mode} or unevenly, which isn't supported; "
                                 "pad before the layer, or name it in keep_float")
    if keep8 is None:
        convs = [names[0] for names in layers.values() if isinstance(model.get_submodule(names[0]), nn.Conv2d)]
        keep8 = [convs[0], convs[-1]] if convs else []
    model.requires_grad_(False)
    for names in layers.values():
        old = model.get_submodule(names[0])
        kind = QuantConv2d if isinstance(old, nn.Conv2d) else QuantLinear
        bits = max(n_bits, 8) if kept(names[0], keep8) else n_bits
        new = kind(old, bits, num_buckets, scales, CALIBRATIONS[calibration]).train(old.training)
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, new)
        del old  # the float weight goes before the next one is quantized
    model.quant_config = dict(n_bits=n_bits, num_buckets=num_buckets, T=T, scales=scales, calibration=calibration,
                              timestep=timestep, keep8=list(keep8), keep_float=list(keep_float))
    if num_buckets > 1:
        model.register_forward_pre_hook(partial(_tell, inspect.signature(model.forward)), with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)
    return model


def _tell(signature, model, args, kwargs):
    config, arguments = model.quant_config, signature.bind(*args, **kwargs).arguments
    if config["timestep"] not in arguments:
        raise ValueError(f"the quantized model needs its timesteps: give it '{config['timestep']}'")
    b = bucket(arguments[config["timestep"]], config["num_buckets"], config["T"])
    present, rows = b.flatten().unique(return_inverse=True)
    for layer in _layers(model).values():
        layer.buckets = present.tolist(), rows if len(present) > 1 else None


def _forget(model, *_):
    for layer in _layers(model).values():
        layer.buckets = None


def _layers(model):
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def merge(model, bucket=0):
    """A copy of model with plain float layers, its weights those of one bucket (0 .. num_buckets - 1)."""
    if bucket not in range(model.quant_config["num_buckets"]):
        raise ValueError(f"bucket must lie in 0 .. {model.quant_config['num_buckets'] - 1}, not {bucket}")
    model = copy.deepcopy(model)
    for name, layer in _layers(model).items():
        plain = layer.plain(bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(layer.weight(layer.d_out[bucket], layer.d_in and layer.d_in[bucket]).detach())
        plain.bias = layer.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, plain.train(layer.training))
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key, hook in list(hooks.items()):
            if hook is _forget or getattr(hook, "func", None) is _tell:
                del hooks[key]
    del model.quant_config
    return model


# -------------------------------------------------------------------------------------------------------------- files


def deltas(model):
    """The trained parameters by name: d_out.B (O,) and d_in.B (I,) of each layer and bucket B."""
    return {f"{name}.{key}": delta for name, layer in _layers(model).items()
            for key, delta in layer.named_parameters() if key.startswith("d_")}


def fingerprint(model):
    """SHA-256 over everything that fine-tuning leaves alone: integers, base scales, biases, norms, embeddings."""
    trained, digest = deltas(model), hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name not in trained:
            digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_adapter(model, path, **extra):
    """Write the deltas (half precision), model.quant_config, the base's fingerprint and extra entries to path."""
    save({"kind": "adapter", **extra, "quant_config": model.quant_config, "fingerprint": fingerprint(model),
          "deltas": {name: delta.detach().half() for name, delta in deltas(model).items()}}, path)


def load_adapter(model, path):
    """Read an adapter's deltas into model and return the whole file. Raises ValueError for an adapter of another base."""
    adapter, mine = load(path, "adapter"), deltas(model)
    if adapter["fingerprint"] != fingerprint(model) or adapter["deltas"].keys() != mine.keys():
        raise ValueError(f"{path} was trained on another base; apply it to the quantized model it was made with")
    with torch.no_grad():
        for name, delta in mine.items():
            delta.copy_(adapter["deltas"][name])
    return adapter


def save(obj, path):
    """torch.save to a temporary name, flushed to disk, then renamed: path is either the old file or the whole new one."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            torch.save(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def load(path, *kinds):
    """Read a file of save whose "kind" is one of kinds. Raises ValueError where it is missing, broken or another kind."""
    try:
        obj = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist; give the path of an existing {' or '.join(kinds)} file") from None
    except Exception:
        raise ValueError(f"{path} is not a checkpoint or is damaged; make it again") from None
    if not isinstance(obj, dict) or obj.get("kind") not in kinds:
        raise ValueError(f"{path} is not a {' or '.join(kinds)} file; give one that this project wrote")
    return obj

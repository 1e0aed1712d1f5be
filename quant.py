"""TuneQDM's quantizer (Ryu, Lim, Shim: "Memory-Efficient Fine-Tuning for Quantized Diffusion Model", arXiv 2401.04339).

A weight is quantized once, to integers of n_bits that never change again. Fine-tuning trains their scales:

    W[o, i] = s_out[o] * (q[o, i] - z[o]) * s_in[i]         q, z in 0 .. 2^n_bits - 1

s_out (O,) scales rows (output channels), s_in (I,) columns (input channels); all taps of a kernel share them. s_out alone
is PEQA; both are the paper's multi-channel-wise scale update. The T timesteps are cut into num_buckets equal intervals,
each with scales of its own over the same integers: the paper's timestep-aware scale update.

What is trained is relative: s_out = s0_out * exp(d_out), s_in = s0_in * exp(d_in), all deltas zero at the start. One
learning rate then means the same in every layer, an adapter of zeros is the base model, and no scale gets to zero. With
y = W x + bias, g = dL/dy and gx = W^T g, a layer keeps x, y and its integers, and W lives for one matmul at a time:

    dL/dd_out[o] = sum over samples and positions of g[o] * (y[o] - bias[o])
    dL/dd_in[i]  = sum over samples and positions of gx[i] * x[i]

Where all samples of a batch share a bucket, W has its scales; else W has the base's, and each sample's exp(d_in) and
exp(d_out) multiply its activations around the matmul. A bucket without a sample gets no gradient (None): it doesn't move.

    quantize(model, n_bits=4, num_buckets=2, T=1000, timestep="t")      # in place; then train model as it is (README.md)
"""
import contextlib
import copy
import hashlib
import inspect
from fnmatch import fnmatch

import torch
import torch.nn as nn
import torch.nn.functional as F

PIECES = {n_bits: [width for width in (8, 4, 2, 1) if n_bits & width] for n_bits in range(2, 9)}


def bucket(t, num_buckets, T):
    """The interval of each of t (timesteps in 0 .. T - 1, else ValueError): floor(t * N / T), of t's shape (paper, TAS)."""
    t = torch.as_tensor(t)
    if ((t < 0) | (t >= T)).any():
        raise ValueError(f"timesteps must lie in 0 .. {T - 1}, these reach from {t.min()} to {t.max()}")
    return (t * num_buckets // T).long()


def pack(codes, n_bits):
    """Pack codes (any shape, uint8, each below 2^n_bits) into n_bits bytes for every 8 codes: uint8, one-dimensional. A code
    is cut into pieces of 8, 4, 2 or 1 bits (3 = 2 + 1); those that share a byte lie far apart: whole vectors are shifted."""
    flat, packed, shift = F.pad(codes.flatten(), (0, -codes.numel() % 8)), [], 0
    for width in PIECES[n_bits]:
        piece = (flat >> shift & (1 << width) - 1).view(8 // width, -1)
        packed.append(sum(row << width * k for k, row in enumerate(piece)))
        shift += width
    return torch.cat(packed)


def unpack(packed, n_bits, shape):
    """The codes (shape, uint8) that pack made packed from."""
    count, codes, shift, start = torch.Size(shape).numel(), None, 0, 0
    for width in PIECES[n_bits]:
        piece = packed[start:(start := start + (count + 7) // 8 * width)]
        piece = (piece >> torch.arange(0, 8, width, dtype=torch.uint8, device=packed.device)[:, None] & (1 << width) - 1).view(-1)
        codes, shift = piece if codes is None else codes | piece << shift, shift + width
    return codes[:count].view(shape)


# Weights come as (G, O, I, K): groups, rows and columns of a group, taps of the kernel. Each calibration returns the
# codes (G, O, I, K), zero points (G, O, 1, 1), s_out (G, O, 1, 1) and s_in (G, 1, I, 1), all in the weight's dtype.
_encode = lambda w, scale, zero, n_bits: ((w / scale).round() + zero).clamp(0, 2**n_bits - 1)


def minmax(w, n_bits, shrink=1.0):
    """Asymmetric uniform quantization of each row, from its least to its greatest weight (and zero) times shrink."""
    low, high = (w.amin((2, 3), keepdim=True).clamp(max=0) * shrink, w.amax((2, 3), keepdim=True).clamp(min=0) * shrink)
    s_out = torch.where(high > low, (high - low) / (2**n_bits - 1), 1)  # 1: a row of zeros
    zero = (-low / s_out).round()
    return _encode(w, s_out, zero, n_bits), zero, s_out, torch.ones_like(w[:, :1, :, :1])


def mse(w, n_bits, steps=80):
    """minmax, its range shrunk for each row by the percentage that leaves the least squared error."""
    (*best, s_in), least = minmax(w, n_bits), float("inf")
    for step in range(steps):
        *found, _ = minmax(w, n_bits, 1 - step / 100)
        error = ((found[0] - found[1]) * found[2] - w).square().sum((2, 3), keepdim=True)
        best = [torch.where(error < least, new, old) for new, old in zip(found, best)]
        least = error.clamp(max=least)
    return *best, s_in


def rowcol(w, n_bits, balance=16, rounds=12):
    """Rows and columns together: Sinkhorn iterations on standard deviations balance the columns against the rows (SINQ,
    arXiv 2509.22944), mse finds grids of the balanced rows, then s_out, s_in and integers are fitted in turn."""
    r, c, s_in, least = torch.ones_like(w[:, :, :1, :1]), torch.ones_like(w[:, :1, :, :1]), None, float("inf")
    for _ in range(balance + 1):
        rows, cols = ((w / (r * c)).std(dims, keepdim=True, correction=0) for dims in ((2, 3), (1, 3)))
        rows, cols = (a.where(a > 0, a.amax((1, 2), True)).clamp(min=1e-12) for a in (rows, cols))  # where all are equal
        tau = torch.minimum(rows.amin(1, True), cols.amin(2, True))  # of each group, as all of this
        spread = torch.maximum(rows.amax(1, True), cols.amax(2, True)) / tau
        s_in, least = c if s_in is None else torch.where(spread < least, c, s_in), spread.clamp(max=least)
        r, c = r * (rows / tau).clamp(0.7, 2), c * (cols / tau).clamp(0.7, 2)
    codes, zero, s_out, _ = mse(w / s_in, n_bits)
    fit = lambda a, dims, old: torch.where((norm := a.square().sum(dims, keepdim=True)) > 0,  # least squares; a may be 0
                                           (w * a).sum(dims, keepdim=True) / norm, old)
    for _ in range(rounds):
        s_out = fit((codes - zero) * s_in, (2, 3), s_out)
        s_in = fit((codes - zero) * s_out, (1, 3), s_in)
        codes = _encode(w, s_out * s_in, zero, n_bits)
    return codes, zero, s_out, s_in


CALIBRATIONS = {"minmax": minmax, "mse": mse, "rowcol": rowcol}


class ScaledMatmul(torch.autograd.Function):
    """y = W x + bias with the gradients above. d_out (n, O) and d_in (n, I; None: s_in is fixed) are the deltas of the n
    buckets in the batch, rows (N,) each sample's place among them, or None where there is only one."""

    @staticmethod
    def forward(ctx, x, d_out, d_in, layer, rows):
        bias = layer.bias if layer.bias is None else layer.bias.to(x.dtype)
        w = layer.weight(*(d_out, d_in) if rows is None else (), dtype=x.dtype)
        y = layer.matmul(layer.scale(x, d_in, rows), w, bias if rows is None else None)
        if rows is not None:
            y = layer.scale(y, d_out, rows) + (0 if bias is None else layer.along(bias, y))
        ctx.layer, ctx.rows = layer, rows
        ctx.save_for_backward(*(a if kept else a.new_empty(1).expand(a.shape)  # no bytes, where only the shape is needed
                                for a, kept in ((x, d_in is not None), (y, ctx.needs_input_grad[1]))), d_out, d_in)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        (x, y, d_out, d_in), layer, rows, gx = ctx.saved_tensors, ctx.layer, ctx.rows, None
        if ctx.needs_input_grad[0] or d_in is not None:
            w = layer.weight(*(d_out, d_in) if rows is None else (), dtype=x.dtype)
            gx = layer.scale(layer.input_grad(layer.scale(g, d_out, rows), x, w), d_in, rows)
        g_out = layer.reduce(g, y, rows, len(d_out), layer.bias) if ctx.needs_input_grad[1] else None
        return gx, g_out, None if d_in is None else layer.reduce(gx, x, rows, len(d_in)), None, None


class QuantLayer(nn.Module):
    """A layer of packed integers and trained scales. told, a list that the model shares with it, holds what _tell says."""

    def __init__(self, layer, n_bits, num_buckets, scales, calibrate, told):
        super().__init__()
        weight = layer.weight.detach()
        self.n_bits, self.num_buckets, self.shape, self.told = n_bits, num_buckets, weight.shape, told
        self.groups, self.bias = getattr(layer, "groups", 1), layer.bias
        w = weight.reshape(self.groups, len(weight) // self.groups, weight.shape[1], -1)
        codes, zero, s_out, s_in = calibrate(w.float() if w.dtype.itemsize < 4 else w, n_bits)
        self.register_buffer("codes", pack(codes.mT.to(torch.uint8), n_bits))  # of (G, O, K, I): channels last is fastest
        self.register_buffer("zero_point", zero.flatten().to(torch.uint8))  # (O,)
        self.register_buffer("s_out", s_out.flatten().to(weight.dtype))     # (O,)
        self.register_buffer("s_in", s_in.flatten().to(weight.dtype))       # (I,)
        deltas = lambda s: nn.ParameterList(torch.zeros_like(s) for _ in range(num_buckets))
        self.d_out, self.d_in = deltas(self.s_out), deltas(self.s_in) if scales == "out+in" else None

    def weight(self, d_out=None, d_in=None, dtype=None):
        """The float weight, of the layer's shape, for deltas that broadcast to (O,) and (I,); by default the base's."""
        s_out, s_in = (s if d is None else s * d.exp() for s, d in ((self.s_out, d_out), (self.s_in, d_in)))
        g, o, i, *kernel = self.groups, self.shape[0] // self.groups, *self.shape[1:]
        w = unpack(self.codes, self.n_bits, (g, o, self.shape[2:].numel(), i)).to(s_out.dtype)
        w = w.sub_(self.zero_point.view(g, o, 1, 1)).mul_(s_out.view(g, o, 1, 1)).mul_(s_in.view(g, 1, 1, i))
        return w.view(g * o, *kernel, i).movedim(-1, 1).to(dtype)

    def forward(self, x):
        if self.num_buckets > 1 and self.told[0] is None:
            raise RuntimeError("a quantized layer wasn't told its timesteps: call the model given to quantize, or see remember")
        present, rows = self.told[0] or ([0], None)
        if rows is not None and len(x) != len(rows):
            raise ValueError(f"a quantized layer got {len(x)} samples for {len(rows)} timesteps; the batch must come first")
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        d_out, d_in = (ds and (ds[present[0]][None] if rows is None else torch.stack([ds[b] for b in present]))
                       for ds in (self.d_out, self.d_in))
        return ScaledMatmul.apply(x, d_out, d_in, self, rows)

    def along(self, v, x):
        """v (C,) or (N, C) as a view that broadcasts along the channels of x."""
        after = -1 - self.channel
        return v.view(*v.shape[:-1], *(1,) * (x.dim() - v.dim() - after), -1, *(1,) * after)

    def scale(self, x, d, rows):
        """x (N, ...) times exp(d) of each sample's bucket, rows (N,); d (n, C). x itself where either is None."""
        return x if d is None or rows is None else x * self.along(d.exp()[rows].to(x.dtype), x)

    def reduce(self, g, y, rows, n, bias=None):
        """The sum of g * (y - bias) over positions, and over the samples of each of n buckets: (n, C)."""
        dims = [dim for dim in range(g.dim()) if dim != g.dim() + self.channel and (dim or rows is None)]
        total = lambda p: (p.sum(dims, dtype=self.s_out.dtype) if dims else p.to(self.s_out.dtype))
        p = total(g * y) if bias is None else total(g * y) - bias * total(g)
        return p[None] if rows is None else F.one_hot(rows, n).to(p.dtype).T @ p


class QuantLinear(QuantLayer):
    channel = -1  # of (N, ..., C)
    matmul = staticmethod(F.linear)
    input_grad = staticmethod(lambda g, x, w: g @ w)

    def plain(self, **kwargs):
        return nn.Linear(self.shape[1], self.shape[0], **kwargs)


class QuantConv2d(QuantLayer):
    channel = -3  # of (N, C, H, W)

    def __init__(self, layer, *args):
        super().__init__(layer, *args)
        pad = {"valid": (0, 0), "same": [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size)]}
        self.args = layer.stride, pad.get(layer.padding, layer.padding), layer.dilation

    def matmul(self, x, w, bias=None):
        return F.conv2d(x, w, bias, *self.args, self.groups)

    def input_grad(self, g, x, w):
        g = g.view(-1, *g.shape[-3:])
        return torch.nn.grad.conv2d_input((len(g), *x.shape[-3:]), w, g, *self.args, self.groups).view_as(x)

    def plain(self, **kwargs):
        return nn.Conv2d(self.shape[1] * self.groups, self.shape[0], self.shape[2:], *self.args, self.groups, **kwargs)


def quantize(model, n_bits=4, num_buckets=1, T=1000, scales="out+in", calibration="rowcol", timestep="t", keep8=None,
             keep_float=()):
    """Swap every Conv2d and Linear of model for a quantized layer, in place, one at a time; then only deltas train.

    n_bits: 2 to 8. num_buckets: scale sets over the T timesteps. scales: "out" (PEQA) or "out+in". calibration: minmax,
    mse or rowcol. timestep: the name of model.forward's argument that holds the timesteps, (N,) or one for all (not
    needed for one bucket). keep8, keep_float: patterns of layer names ("down.*") to keep at 8 bits or in float; keep8 is
    by default the first and the last Conv2d. Returns model; model.quant_config holds the arguments.

    Raises ValueError for arguments out of range, and for what can't be quantized: a model with quantized layers, padding
    other than zeros, weights that are shared, not float or not finite, nn.MultiheadAttention (a bare weight, no layers).
    """
    config, arguments = {k: v for k, v in locals().items() if k != "model"}, list(inspect.signature(model.forward).parameters)
    for name, value, allowed in (("n_bits", n_bits, range(2, 9)), ("num_buckets", num_buckets, range(1, T + 1)),
                                 ("scales", scales, ["out", "out+in"]), ("calibration", calibration, list(CALIBRATIONS)),
                                 ("timestep", timestep, arguments if num_buckets > 1 else [timestep])):
        if value not in allowed:
            choice = f"{allowed[0]} to {allowed[-1]}" if isinstance(allowed, range) else " or ".join(allowed)
            raise ValueError(f"{name} must be {choice}, not {value}")
    kept = lambda name, patterns: any(fnmatch(name, p) or fnmatch(name, f"{p}.*") for p in patterns)
    layers = {}  # the names of each
    for name, module in model.named_modules(remove_duplicate=False):
        if kept(name, keep_float) or not isinstance(module, (nn.Conv2d, nn.Linear, nn.MultiheadAttention, QuantLayer)):
            continue
        if reason := _refuse(model, name, module):
            raise ValueError(f"layer '{name}' {reason}, or name it in keep_float")
        layers.setdefault(id(module), []).append(name)
    convs = [names[0] for names in layers.values() if isinstance(model.get_submodule(names[0]), nn.Conv2d)]
    keep8 = list(dict.fromkeys(convs[:1] + convs[-1:]) if keep8 is None else keep8)
    model.requires_grad_(False)
    model.quant_config, model.told = {**config, "keep8": keep8, "keep_float": list(keep_float)}, [None]
    for names in layers.values():
        old = model.get_submodule(names[0])
        kind, bits = QuantConv2d if isinstance(old, nn.Conv2d) else QuantLinear, 8 if kept(names[0], keep8) else n_bits
        new = kind(old, bits, num_buckets, scales, CALIBRATIONS[calibration], model.told).train(old.training)
        for name in names:
            model.set_submodule(name, new)
    if num_buckets > 1:
        model.register_forward_pre_hook(_tell, with_kwargs=True)
        model.register_forward_hook(_forget, always_call=True)
    return model


def _refuse(model, name, module):
    """Why this layer can't be quantized, and what to do; None where it can."""
    if isinstance(module, (nn.MultiheadAttention, QuantLayer)) or name == "":
        return f"is a {type(module).__name__} that can't be swapped: give float Conv2d and Linear layers inside a module"
    if not module.weight.is_floating_point() or not module.weight.isfinite().all():
        return "has weights that aren't all finite floats: mend them"
    if sum(other._parameters.get("weight") is module.weight for other in model.modules()) > 1:
        return "shares its weight with another: give each its own"
    if isinstance(module, nn.Conv2d) and (module.padding_mode != "zeros" or module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size))):
        return f"pads unevenly or with {module.padding_mode} for zeros: pad before the layer"


def _tell(model, args, kwargs):
    """Before the model's forward: tell its layers the buckets in the batch and the place of each sample among them."""
    config = model.quant_config
    t = inspect.signature(model.forward).bind(*args, **kwargs).arguments.get(config["timestep"])
    if t is None:
        raise ValueError(f"a model quantized with several buckets needs timesteps; give it '{config['timestep']}'")
    present, rows = bucket(t, config["num_buckets"], config["T"]).flatten().unique(return_inverse=True)
    model.told[0] = present.tolist(), rows if len(present) > 1 else None


def _forget(model, *_):
    """After it, even where it failed: a layer called by itself then fails, and doesn't use what was told before."""
    model.told[0] = None


def remember(model):
    """For torch.utils.checkpoint(..., use_reentrant=False, context_fn=partial(remember, model)): tells again in backward."""
    @contextlib.contextmanager
    def again(then):
        model.told[0] = then
        try:
            yield
        finally:
            _forget(model)
    return contextlib.nullcontext(), again(model.told[0])


def merge(model, bucket=0):
    """A copy of model with plain float layers, whose weights are those of one bucket; IndexError where there is none."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, QuantLayer):
            plain = layer.plain(bias=layer.bias is not None, device="meta").train(layer.training)
            plain.weight = nn.Parameter(layer.weight(layer.d_out[bucket], layer.d_in and layer.d_in[bucket]).detach())
            plain.bias = layer.bias
            model.set_submodule(name, plain)
    for hooks in (model._forward_pre_hooks, model._forward_hooks):
        for key in [key for key, hook in hooks.items() if hook in (_tell, _forget)]:
            del hooks[key]
    del model.quant_config
    return model


def deltas(model):
    """The trained parameters by name: d_out.B (O,) and d_in.B (I,) of each layer and bucket B."""
    return {f"{name}.{key}": delta for name, layer in model.named_modules() if isinstance(layer, QuantLayer)
            for key, delta in layer.named_parameters() if key.startswith("d_")}


def fingerprint(model):
    """SHA-256 over all that fine-tuning leaves alone: integers, base scales, biases, norms, embeddings."""
    trained, digest = deltas(model), hashlib.sha256()
    for name, value in model.state_dict().items():
        if name not in trained:
            digest.update(name.encode() + value.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def adapter(model):
    """All that makes a subject, to torch.save: quant_config, the base's fingerprint, all deltas in a row, as halves."""
    values = torch.cat([delta.detach() for delta in deltas(model).values()]).half().cpu()
    return {"quant_config": model.quant_config, "fingerprint": fingerprint(model), "deltas": values}


def load_adapter(model, adapter):
    """Put the deltas of adapter(another model) into model. Raises ValueError where its quantized base is another."""
    sizes, values = [delta.numel() for delta in deltas(model).values()], adapter.get("deltas", ())
    mine, its = (fingerprint(model), model.quant_config), (adapter.get("fingerprint"), adapter.get("quant_config"))
    if mine != its or len(values) != sum(sizes) or not values.isfinite().all():
        raise ValueError("the adapter was made for another base, or is damaged; give the quantized model that it was trained on")
    with torch.no_grad():
        for delta, value in zip(deltas(model).values(), values.split(sizes)):
            delta.copy_(value)

"""TuneQDM for a model of your own, from quantize to merge: python examples/own_unet.py

Copy quant.py, calibrate.py, gptq.py and support/ into one folder on Python's path, or put the
folder of this project there. None of these files knows the UNet of model.py. This script runs for a
few seconds on a CPU and writes to out/own-unet.
"""

import copy
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import quant

OUT = Path("out/own-unet")
OUT.mkdir(parents=True, exist_ok=True)
T = 1000
torch.manual_seed(0)
torch.set_num_threads(1)  # for tensors this small, threads cost more than they give

# ---- A model and its data: put your own here


class Denoiser(nn.Module):
    """A UNet in short, which calls its timesteps `timestep`."""

    def __init__(self, width=32):
        super().__init__()
        self.time = nn.Linear(1, width)
        self.label = nn.Embedding(2, width)  # 0: no label, 1: waves
        self.conv_in = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        conv = nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2)
        self.middle = nn.Sequential(nn.SiLU(), conv, nn.SiLU())
        self.up = nn.Conv2d(3 * width, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self.checkpointed = False

    # fmt: off
    def forward(self, sample, timestep, label):                     # (N, 3, 8, 8), (N,), (N,)
        time = (timestep / T)[:, None].to(sample.dtype)             # (N, 1)
        condition = self.time(time) + self.label(label)             # (N, 32)
        skip = self.conv_in(sample) + condition[:, :, None, None]   # (N, 32, 8, 8)
        h = self.down(F.silu(skip))                                 # (N, 64, 4, 4)
        if self.checkpointed:
            # in backward, context_fn tells the layers their timesteps again
            context_fn = quant.checkpoint_contexts
            h = checkpoint(self.middle, h, use_reentrant=False, context_fn=context_fn)
        else:
            h = self.middle(h)
        h = F.interpolate(h, scale_factor=2)                        # (N, 64, 8, 8)
        h = self.up(torch.cat([h, skip], 1))                        # (N, 32, 8, 8)
        return self.conv_out(F.silu(self.norm(h)))                  # (N, 3, 8, 8)
    # fmt: on

    def forward_with_cfg(self, sample, timestep, label, scale):
        """Guidance, as a second entry point beside forward. DiT has one like it."""
        v = self.forward(sample, timestep, label)
        v_empty = self.forward(sample, timestep, torch.zeros_like(label))
        return v_empty + scale * (v - v_empty)


def draw_batch(n, slope=0.0):
    """n noisy images of waves: the arguments of forward, and the v that it should find."""
    position = torch.arange(8.0)
    along = position + slope * position[:, None]  # (8, 8)
    x0 = torch.sin(along + 2 * math.pi * torch.rand(n, 3, 1, 1))  # (n, 3, 8, 8)
    eps = torch.randn(x0.shape)
    t = torch.randint(T, (n,))
    angle = (t / T * math.pi / 2).view(n, 1, 1, 1)
    x_t = angle.cos() * x0 + angle.sin() * eps
    v = angle.cos() * eps - angle.sin() * x0
    label = (torch.rand(n) > 0.1).long()
    return (x_t, t, label), v


def train(model, steps, lr, slope=0.0):
    """Adam on all that requires a gradient. Returns a moving average of the deltas."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    # Average (EMA) the deltas alone: in the state_dict there are packed codes, which can't be.
    average = {name: delta.detach().clone() for name, delta in quant.deltas(model).items()}
    for _ in range(steps):
        inputs, v = draw_batch(32, slope)
        optimizer.zero_grad()
        F.mse_loss(model(*inputs), v).backward()
        optimizer.step()
        for name, delta in quant.deltas(model).items():
            average[name].lerp_(delta.detach(), 0.1)
    return average


WAVES = draw_batch(256)
SUBJECT = draw_batch(256, slope=1.0)  # waves that run diagonally


@torch.no_grad()
def report(name, model):
    losses = [F.mse_loss(model(*inputs), v) for inputs, v in (WAVES, SUBJECT)]
    print(f"{name:16} loss {losses[0]:.3f}, of the subject {losses[1]:.3f}")


pretrained = Denoiser()
train(pretrained, steps=150, lr=3e-3)
report("pretrained", pretrained)

# ---- Quantize

# Conv2d and Linear are replaced in place, whatever their stride, groups or dilation. Other kinds of
# layers stay as they are.
options = {
    "n_bits": 2,
    "num_buckets": 2,  # or "edges": [0, 250, 1000], for intervals that aren't equal
    "T": T,  # the model's own: 1.0, if its times reach from 0 to 1
    "timestep": "timestep",  # the name in forward
    "keep8": ["conv_*"],  # layers at 8 bits; by default the first and the last Conv2d
    "keep_float": ["time"],  # layers to leave alone
}
model = quant.quantize(copy.deepcopy(pretrained), **options, calibration="rowcol")
report("2 bits, rowcol", model)

# With data, gptq stays nearer to the float model. A hundred samples at all timesteps suffice.
batches = [draw_batch(32)[0] for _ in range(3)]  # tuples of forward's arguments
model = quant.quantize(copy.deepcopy(pretrained), **options, data=batches)
report("2 bits, gptq", model)

before = 4 * sum(parameter.numel() for parameter in pretrained.parameters())
torch.save(model.state_dict(), OUT / "base.pt")  # packed
after = (OUT / "base.pt").stat().st_size
print(f"weights: {before:,} bytes; packed, in a file: {after:,}")

# What can't be replaced is refused, and nothing is changed: shared weights, circular padding,
# hooks, a forward of its own. Name such layers in keep_float.
try:
    quant.quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.MultiheadAttention(8, 2)))
except ValueError as error:
    print("refused:", error)

# ---- Train the deltas

# All but the deltas are frozen now. What else you unfreeze travels in the adapter, too.
model.norm.requires_grad_(True)

# Checkpointing saves memory and changes no gradient. Under torch.compile, leave context_fn out.
inputs, v = SUBJECT
trained = [p for p in model.parameters() if p.requires_grad]
plain = torch.autograd.grad(F.mse_loss(model(*inputs), v), trained)
model.checkpointed = True
checkpointed = torch.autograd.grad(F.mse_loss(model(*inputs), v), trained)
print("checkpointed, the same gradients:", all(map(torch.equal, plain, checkpointed)))

# In several processes, DistributedDataParallel needs find_unused_parameters=True: the deltas of a
# bucket that no sample of a batch is in have no gradient.
average = train(model, steps=60, lr=0.03, slope=1.0)
with torch.no_grad():
    for name, delta in quant.deltas(model).items():
        delta.copy_(average[name])
report("tuned", model)

# ---- Save, load, merge

torch.save(quant.adapter(model), OUT / "adapter.pt")  # deltas as float16, and the norm
print(f"the adapter: {(OUT / 'adapter.pt').stat().st_size:,} bytes")

# In a new process: layers of the same shapes, by the quickest calibration, then what was saved.
# Load an adapter into its own base, in the dtype that it was trained in; cast the model afterwards.
loaded = quant.quantize(Denoiser(), **options, calibration="minmax")
loaded.load_state_dict(torch.load(OUT / "base.pt"))
quant.load_adapter(loaded, torch.load(OUT / "adapter.pt"))
report("loaded", loaded)

(x, _, label), _ = SUBJECT
t = torch.full((256,), 700)
late = quant.merge(loaded, 1)  # a copy with float layers, of bucket 1: t in 500 .. 1000
half = copy.deepcopy(loaded).bfloat16()  # scales and deltas stay float32
with torch.no_grad():
    expected = loaded(x, t, label)
    merged_error = (late(x, t, label) - expected).abs().max()
    half_error = (half(x.bfloat16(), t, label).float() - expected).abs().max()
print(f"merged, to {merged_error:.0e}; in bfloat16, to {half_error:.0e}")

# ---- Calls that don't go through model(...)

# With several buckets, layers learn their timesteps in model(...). Elsewhere set_batch tells them;
# without it they raise. Dimension 0 of what they get must be the batch.
edges = loaded.quant_config["edges"]
with torch.no_grad(), quant.set_batch(quant.batch_of(t, edges)):
    guided = loaded.forward_with_cfg(x, t, label, scale=3.0)
    error = (guided - late.forward_with_cfg(x, t, label, scale=3.0)).abs().max()
print(f"guided, to {error:.0e}")

# A forward that folds F frames of each sample into the batch is called in the same way:
#     with quant.set_batch(quant.batch_of(t.repeat_interleave(F), edges)):
#         v = model.forward(video, t, label)

"""A small pixel-space UNet and the diffusion process it is trained with: DDPM (Ho et al. 2020), v prediction.

Read from the top: residual block, attention, the UNet, then the process. N pictures of C channels, H x W pixels;
L caption words; D channels inside the UNet; t counts timesteps from 0 (nearly the picture) to T - 1 (nearly noise).
"""
import io
import math
import os
import zipfile

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange


class ResBlock(nn.Module):
    """Two convolutions around a residual, the second normalised with a scale and shift that depend on the timestep."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2, self.conv2 = nn.GroupNorm(8, c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x, emb):                                      # (N, c_in, H, W), (N, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))                       # (N, c_out, H, W)
        scale, shift = self.emb(emb)[..., None, None].chunk(2, 1)   # (N, c_out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))                 # (N, c_out, H, W)


class Attention(nn.Module):
    """Each pixel attends to the other pixels, then to the caption's words."""

    def __init__(self, c, c_words, head=32):
        super().__init__()
        self.head = head
        self.norm1, self.qkv, self.out1 = nn.GroupNorm(8, c), nn.Linear(c, 3 * c), nn.Linear(c, c)
        self.norm2, self.q, self.kv, self.out2 = nn.LayerNorm(c), nn.Linear(c, c), nn.Linear(c_words, 2 * c), nn.Linear(c, c)

    def heads(self, q, k, v):                                       # (N, HW, D), (N, L, D), (N, L, D)
        q, k, v = (rearrange(x, "n l (h d) -> n h l d", d=self.head) for x in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "n h l d -> n l (h d)")

    def forward(self, x, words):                                    # (N, D, H, W), (N, L, c_words)
        h = rearrange(x, "n d h w -> n (h w) d")                    # (N, HW, D)
        y = rearrange(self.norm1(x), "n d h w -> n (h w) d")
        h = h + self.out1(self.heads(*self.qkv(y).chunk(3, -1)))
        h = h + self.out2(self.heads(self.q(self.norm2(h)), *self.kv(words).chunk(2, -1)))
        return rearrange(h, "n (h w) d -> n d h w", h=x.shape[2])   # (N, D, H, W)


class UNet(nn.Module):
    """Predicts v from a noisy picture, its timestep and its caption.

    channels: D of each level, each level half the size of the one before. attention: the levels (0 the finest) with
    attention. vocab, slots: the size of the vocabulary, and L. All of it is in .config, which travels in checkpoints.
    """

    def __init__(self, channels=(64, 96, 128), attention=(1, 2), blocks=1, c_emb=128, c_words=64, vocab=22, slots=7, c_image=3):
        super().__init__()
        self.config = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        self.c_time = channels[0]
        self.time = nn.Sequential(nn.Linear(self.c_time, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb), nn.SiLU())
        self.words, self.slots = nn.Embedding(vocab, c_words), nn.Parameter(0.02 * torch.randn(slots, c_words))
        self.pool = nn.Linear(slots * c_words, c_emb)
        self.stem = nn.Conv2d(c_image, channels[0], 3, padding=1)

        def level(i, c_in, c_out):
            return nn.ModuleList([ResBlock(c_in, c_out, c_emb), Attention(c_out, c_words) if i in attention else None])

        self.down, self.up, c, skips = nn.ModuleList(), nn.ModuleList(), channels[0], []
        for i, c_out in enumerate(channels):
            for _ in range(blocks):
                self.down.append(level(i, c, c_out))
                skips.append(c := c_out)
            if i + 1 < len(channels):
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
        self.middle = level(len(channels) - 1, c, c)
        for i, c_out in reversed(list(enumerate(channels))):
            for _ in range(blocks):
                self.up.append(level(i, c + skips.pop(), c_out))
                c = c_out
            if i:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm, self.out = nn.GroupNorm(8, c), nn.Conv2d(c, c_image, 3, padding=1)
        nn.init.zeros_(self.out.weight)
        self.call = lambda block, *args: block(*args)               # torch.utils.checkpoint, to keep less for backward

    def forward(self, x, t, words):                                 # (N, C, H, W), (N,), (N, L)
        words = self.words(words) + self.slots                      # (N, L, c_words)
        emb = self.time(timestep_embedding(t, self.c_time))         # (N, c_emb)
        emb = emb + F.silu(self.pool(words.flatten(1)))             # the caption as a whole
        h, skips = self.stem(x), []                                 # (N, D, H, W)

        def run(level, h):
            res, attention = level
            h = self.call(res, h, emb)
            return h if attention is None else self.call(attention, h, words)

        for level in self.down:
            if isinstance(level, nn.ModuleList):
                skips.append(h := run(level, h))
            else:
                h = level(h)                                        # half the size
        h = run(self.middle, h)
        for level in self.up:
            if isinstance(level, nn.ModuleList):
                h = run(level, torch.cat([h, skips.pop()], 1))
            else:
                h = level(F.interpolate(h, scale_factor=2))         # twice the size
        return self.out(F.silu(self.norm(h)))                       # (N, C, H, W)


def timestep_embedding(t, c, period=10000):
    """Sines and cosines of t (N,), in timesteps: (N, c)."""
    freqs = torch.exp(-math.log(period) * torch.arange(c // 2, device=t.device) / (c // 2))
    angles = t[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], 1)


class Diffusion:
    """The DDPM process with T timesteps, the cosine schedule (Nichol and Dhariwal 2021) and v prediction.

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, eq. 4), and the model predicts v = sqrt(abar_t) eps -
    sqrt(1 - abar_t) x0 (Salimans and Ho 2022), which learns the layout of a picture, decided at high t, faster than eps.
    """

    def __init__(self, T=1000):
        self.T = T
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        self.betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        self.alphas_cumprod = (1 - self.betas).cumprod(0)           # (T,), float64

    def coefficients(self, t, x):
        """sqrt(abar_t) and sqrt(1 - abar_t) for timesteps t (N,), shaped to multiply x (N, ...)."""
        abar = self.alphas_cumprod[t.cpu()].view(-1, *(1,) * (x.dim() - 1))
        return abar.sqrt().to(x), (1 - abar).sqrt().to(x)

    def q_sample(self, x0, t, eps):
        """The noisy picture x_t (DDPM, eq. 4). x0, eps: (N, C, H, W); t: (N,) timesteps."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * eps

    def to_x0_eps(self, v, x, t):
        """The picture and the noise that a prediction v says x (N, C, H, W) at t (N,) is made of."""
        a, s = self.coefficients(t, x)
        return a * x - s * v, s * x + a * v

    def loss(self, model, x0, words, t, eps):
        """Squared error of the predicted v, a mean for each sample: (N,)."""
        a, s = self.coefficients(t, x0)
        v = model(self.q_sample(x0, t, eps), t, words).float()
        return (v - (a * eps - s * x0)).square().mean((1, 2, 3))


def save(obj, path, write=torch.save):
    """write(obj, file) to a temporary name, flush, rename: path is the old file or the new one; ValueError if it can't be."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        os.path.exists(temporary) and os.remove(temporary)
        if isinstance(error, OSError):
            raise ValueError(f"{path} can't be written ({error.strerror}); make room, or give another folder") from None
        raise


def size(obj):
    """Bytes of obj in a file."""
    torch.save(obj, file := io.BytesIO())
    return file.tell()


def load(path, *kinds):
    """Read a file of save whose "kind" is one of kinds. Raises ValueError where it is missing, damaged or of another kind."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # the checksums, which torch.load doesn't look at
        obj = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} doesn't exist; give the path of a checkpoint ({' or '.join(kinds)})") from None
    except Exception:
        raise ValueError(f"{path} is damaged or not a checkpoint; give one that this project wrote") from None
    if not isinstance(obj, dict) or obj.get("kind") not in kinds:
        raise ValueError(f"{path} is not a checkpoint of kind {' or '.join(kinds)}; give one")
    return obj

"""A small pixel-space UNet and the diffusion process that trains it (DDPM, Ho et al. 2020).

From the leaves up: residual block, attention, the UNet, then the process. Shapes: N images of C
channels and H x W pixels, D channels inside the UNet, captions of L words. Timesteps t run from 0
(nearly the image) to T - 1 (nearly noise).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

# The formatter would move the shape comments out of their column.
# fmt: off


class ResBlock(nn.Module):
    """A residual block. emb, of timestep and caption, scales and shifts its middle activations."""

    def __init__(self, c_in, c_out, c_emb):
        super().__init__()
        self.norm1 = nn.GroupNorm(8, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb = nn.Linear(c_emb, 2 * c_out)
        self.norm2 = nn.GroupNorm(8, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()
        nn.init.zeros_(self.conv2.weight)                           # starts as skip, plus a bias

    def forward(self, x, emb):                                      # (N, c_in, H, W), (N, c_emb)
        h = self.conv1(F.silu(self.norm1(x)))                       # (N, c_out, H, W)
        scale, shift = self.emb(emb)[..., None, None].chunk(2, 1)   # (N, c_out, 1, 1) each
        h = self.norm2(h) * (1 + scale) + shift
        return self.skip(x) + self.conv2(F.silu(h))                 # (N, c_out, H, W)


class Attention(nn.Module):
    """Self-attention over the pixels, then cross-attention to the words of the caption."""

    def __init__(self, c, c_words, head_dim=32):
        super().__init__()
        self.head_dim = head_dim
        self.norm1 = nn.GroupNorm(8, c)
        self.qkv = nn.Linear(c, 3 * c)
        self.out1 = nn.Linear(c, c)
        self.norm2 = nn.LayerNorm(c)
        self.q = nn.Linear(c, c)
        self.kv = nn.Linear(c_words, 2 * c)
        self.out2 = nn.Linear(c, c)

    def attend(self, q, k, v):                                      # k, v: of pixels or of words
        q = rearrange(q, "n l (heads d) -> n heads l d", d=self.head_dim)
        k = rearrange(k, "n l (heads d) -> n heads l d", d=self.head_dim)
        v = rearrange(v, "n l (heads d) -> n heads l d", d=self.head_dim)
        y = F.scaled_dot_product_attention(q, k, v)
        return rearrange(y, "n heads l d -> n l (heads d)")         # (N, HW, D)

    def forward(self, x, words):                                    # (N, D, H, W), (N, L, c_words)
        h = rearrange(x, "n d h w -> n (h w) d")                    # (N, HW, D)
        y = rearrange(self.norm1(x), "n d h w -> n (h w) d")
        q, k, v = self.qkv(y).chunk(3, -1)
        h = h + self.out1(self.attend(q, k, v))                     # self-attention
        q = self.q(self.norm2(h))
        k, v = self.kv(words).chunk(2, -1)
        h = h + self.out2(self.attend(q, k, v))                     # cross-attention
        return rearrange(h, "n (h w) d -> n d h w", h=x.shape[2])   # (N, D, H, W)


class Stage(nn.ModuleList):
    """A residual block, followed by attention at some resolutions."""

    def __init__(self, c_in, c_out, c_emb, c_words, attention):
        super().__init__([ResBlock(c_in, c_out, c_emb)])
        if attention:
            self.append(Attention(c_out, c_words))

    def forward(self, h, emb, words):                               # (N, c_in, H, W)
        h = self[0](h, emb)
        if len(self) == 2:
            h = self[1](h, words)
        return h                                                    # (N, c_out, H, W)


class UNet(nn.Module):
    """Predicts v (see Diffusion) from a noisy image, its timestep and its caption.

    channels: D at each resolution, the highest first, multiples of 8, and of 32 where there is
    attention; each next resolution has half the height and width. attention: the resolutions with
    attention, 0 is the highest. blocks: stages at each resolution. c_emb: size of the embedding of
    timestep and caption. c_words: size of the embedding of a word. vocab: words in the vocabulary;
    word 0 stands for an empty slot. slots: words of a caption, L. c_image: channels of an image, C.
    All of it is in .config, which travels in checkpoints.
    """

    def __init__(
        self,
        channels=(64, 96, 128),
        attention=(1, 2),
        blocks=1,
        c_emb=128,
        c_words=64,
        vocab=22,
        slots=7,
        c_image=3,
    ):
        super().__init__()
        self.config = {
            "channels": channels,
            "attention": attention,
            "blocks": blocks,
            "c_emb": c_emb,
            "c_words": c_words,
            "vocab": vocab,
            "slots": slots,
            "c_image": c_image,
        }

        self.c_time = channels[0]
        self.time = nn.Sequential(
            nn.Linear(self.c_time, c_emb), nn.SiLU(), nn.Linear(c_emb, c_emb), nn.SiLU()
        )
        self.words = nn.Embedding(vocab, c_words)
        self.slots = nn.Parameter(0.02 * torch.randn(slots, c_words))
        self.pool = nn.Linear(slots * c_words, c_emb)
        self.stem = nn.Conv2d(c_image, channels[0], 3, padding=1)

        coarsest = len(channels) - 1
        c = channels[0]
        skips = []
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        for i, c_out in enumerate(channels):
            for _ in range(blocks):
                self.down.append(Stage(c, c_out, c_emb, c_words, i in attention))
                c = c_out
                skips.append(c)
            if i < coarsest:
                self.down.append(nn.Conv2d(c, c, 3, stride=2, padding=1))

        self.middle = Stage(c, c, c_emb, c_words, coarsest in attention)

        for i in range(coarsest, -1, -1):
            for _ in range(blocks):
                self.up.append(Stage(c + skips.pop(), channels[i], c_emb, c_words, i in attention))
                c = channels[i]
            if i > 0:
                self.up.append(nn.Conv2d(c, c, 3, padding=1))

        self.norm = nn.GroupNorm(8, c)
        self.out = nn.Conv2d(c, c_image, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, t, words):                                 # (N, C, H, W), (N,), (N, L)
        words = self.words(words) + self.slots                      # (N, L, c_words)
        emb = self.time(timestep_embedding(t, self.c_time))         # (N, c_emb)
        emb = emb + F.silu(self.pool(words.flatten(1)))             # the caption as a whole

        h = self.stem(x)                                            # (N, D, H, W)
        skips = []
        for layer in self.down:
            if isinstance(layer, Stage):
                h = layer(h, emb, words)
                skips.append(h)
            else:                                                   # a strided convolution
                h = layer(h)                                        # (N, D, H / 2, W / 2)

        h = self.middle(h, emb, words)

        for layer in self.up:
            if isinstance(layer, Stage):
                h = torch.cat([h, skips.pop()], 1)                  # (N, D + D of the skip, H, W)
                h = layer(h, emb, words)
            else:
                h = layer(F.interpolate(h, scale_factor=2))         # (N, D, 2H, 2W)
        return self.out(F.silu(self.norm(h)))                       # (N, C, H, W)


def timestep_embedding(t: Tensor, c: int, period: float = 10000) -> Tensor:
    """Cosines and sines of timesteps t (N,): (N, c)."""
    freqs = torch.exp(-math.log(period) * torch.arange(c // 2, device=t.device) / (c // 2))
    angles = t[:, None] * freqs                                     # (N, c / 2)
    return torch.cat([angles.cos(), angles.sin()], 1)


class Diffusion:
    """The DDPM process of T timesteps, with the cosine schedule (Nichol and Dhariwal 2021).

    x_t = sqrt(abar_t) x0 + sqrt(1 - abar_t) eps (DDPM, eq. 4): x0 is the image, eps normal noise,
    and abar is alphas_cumprod, which falls from nearly 1 to nearly 0. The model predicts

        v = sqrt(abar_t) eps - sqrt(1 - abar_t) x0                  (Salimans and Ho 2022)

    A model that predicts v learns the layout of an image, which is decided at high t, faster than
    one that predicts eps.
    """

    def __init__(self, T: int = 1000):
        self.T = T
        time = torch.arange(T + 1, dtype=torch.float64) / T
        f = torch.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2
        self.betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)          # (T,), float64
        self.alphas_cumprod = (1 - self.betas).cumprod(0)           # (T,), float64

    def coefficients(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(abar_t) and sqrt(1 - abar_t) for t (N,), in a shape that multiplies x (N, ...)."""
        ones = [1] * (x.dim() - 1)
        abar = self.alphas_cumprod[t.cpu()].view(-1, *ones)         # (N, 1, 1, 1)
        return abar.sqrt().to(x), (1 - abar).sqrt().to(x)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The noisy image x_t (DDPM, eq. 4). x0, eps: (N, C, H, W); t: (N,) timesteps."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * eps

    def to_x0(self, v: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The x0 that a prediction v implies for x (N, C, H, W) at t (N,)."""
        a, s = self.coefficients(t, x)
        return a * x - s * v

    def squared_error(self, v: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean squared error (N,) of each sample's v, predicted from q_sample(x0, t, eps)."""
        a, s = self.coefficients(t, x0)
        target = a * eps - s * x0                                   # the true v
        return (v.float() - target).square().mean((1, 2, 3))

    def draw_timesteps(self, n: int, generator: torch.Generator, focus: float = 0.0) -> Tensor:
        """n timesteps in 0 .. T - 1, evenly spread from a random offset, in rising order: (n,).

        With focus = 0, each of n equal intervals has one. With a focus between 0 and 1, they are
        1 / (1 - focus) times as dense in the middle, where the details of an image are decided.
        """
        u = (torch.arange(n) + torch.rand(1, generator=generator)) / n
        u = u + focus * (2 * torch.pi * u).sin() / (2 * torch.pi)
        return (u * self.T).long().clamp(max=self.T - 1)            # u may round to 1

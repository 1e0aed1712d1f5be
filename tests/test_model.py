"""The diffusion process, the samplers, the UNet.

The process and the samplers are compared with formulas worked out by hand.
"""

import math

import pytest
import torch
from conftest import spread

from data import toy
from model import Diffusion, UNet
from quant import quantize
from sample import (
    BASE,
    SAMPLERS,
    ddim_step,
    ddpm_step,
    draw_noise,
    load_model,
    noise_generators,
    sample,
)


@pytest.fixture
def diffusion():
    return Diffusion()


# --------------------------------------------------------------------------------------------------
# The diffusion process
# --------------------------------------------------------------------------------------------------


def test_the_schedule_is_the_cosine_one(diffusion):
    def f(t):  # Nichol and Dhariwal 2021, eq. 17
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = diffusion.alphas_cumprod
    for t in (0, 1, 499, 990):
        assert abar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert (abar.diff() < 0).all()
    assert diffusion.betas.max() <= 0.999


def test_q_sample_and_v_by_hand(diffusion):
    x0 = torch.randn(3, 3, 4, 4).double()
    eps = torch.randn(3, 3, 4, 4).double()
    t = torch.tensor([0, 500, 999])
    x = diffusion.q_sample(x0, t, eps)
    for i in range(3):
        abar = diffusion.alphas_cumprod[t[i]]
        torch.testing.assert_close(x[i], abar.sqrt() * x0[i] + (1 - abar).sqrt() * eps[i])

        one = slice(i, i + 1)
        v = abar.sqrt() * eps[one] - (1 - abar).sqrt() * x0[one]
        torch.testing.assert_close(diffusion.to_x0(v, x[one], t[one]), x0[one])
        for off in (0, 2):  # a prediction that is off by so much
            error = diffusion.squared_error(v + off, x0[one], t[one], eps[one])
            assert error.item() == pytest.approx(off**2, abs=1e-5)


# --------------------------------------------------------------------------------------------------
# The samplers
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [1, 10, 500, 998])
def test_ddpm_step_is_algorithm_2_and_samples_the_posterior(diffusion, t):
    x0, eps, noise = torch.randn(3, 2, 3, 4, 4).double()
    abar = diffusion.alphas_cumprod
    beta = diffusion.betas[t]
    x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
    mine = ddpm_step(x, x0, eps, abar[t], abar[t - 1], noise)
    sigma = ((1 - abar[t - 1]) / (1 - abar[t]) * beta).sqrt()

    # Algorithm 2, line 4
    mean = (x - beta / (1 - abar[t]).sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(mine, mean + sigma * noise)

    # eq. 7
    of_x0 = abar[t - 1].sqrt() * beta * x0
    of_x = (1 - beta).sqrt() * (1 - abar[t - 1]) * x
    posterior = (of_x0 + of_x) / (1 - abar[t])
    torch.testing.assert_close(mine, posterior + sigma * noise)


def test_ddim_step_keeps_x0_and_eps(diffusion):
    x0 = torch.randn(2, 3, 4, 4).double()
    eps = torch.randn(2, 3, 4, 4).double()
    abar = diffusion.alphas_cumprod
    x = abar[700].sqrt() * x0 + (1 - abar[700]).sqrt() * eps
    at_200 = ddim_step(x, x0, eps, abar[700], abar[200], None)
    at_the_end = ddim_step(x, x0, eps, abar[700], torch.ones(()), None)
    torch.testing.assert_close(at_200, abar[200].sqrt() * x0 + (1 - abar[200]).sqrt() * eps)
    torch.testing.assert_close(at_the_end, x0)


class Gaussian(torch.nn.Module):
    """The exact v for images drawn from N(mean, std^2), each pixel by itself."""

    def __init__(self, diffusion, mean, std):
        super().__init__()
        self.diffusion = diffusion
        self.mean = mean
        self.std = std
        self.anchor = torch.nn.Parameter(torch.zeros(()))  # tells sample the device

    def forward(self, x, t, words):
        a, s = self.diffusion.coefficients(t, x)
        gain = a * self.std**2 / (a**2 * self.std**2 + s**2)
        x0 = self.mean + gain * (x - a * self.mean)  # E[x0 | x_t]
        return (a * x - x0) / s


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 250)])
def test_samplers_draw_a_known_gaussian(diffusion, sampler, steps):
    model = Gaussian(diffusion, 0.2, 0.1)
    words = torch.zeros(64, toy.SLOTS, dtype=torch.long)
    images = sample(model, words, steps, sampler, cfg_scale=1, seed=0, diffusion=diffusion)
    assert images.mean() == pytest.approx(0.2, abs=0.005)
    assert images.std() == pytest.approx(0.1, rel=0.04)


class GaussianOfCaption(Gaussian):
    """A Gaussian whose mean is 0.1 for a caption, and 0 for the empty one."""

    def forward(self, x, t, words):
        has_caption = (words[:, 0] > 0).to(x)
        self.mean = 0.1 * has_caption.view(-1, 1, 1, 1)
        return super().forward(x, t, words)


def test_guidance_moves_away_from_the_empty_caption(diffusion):
    model = GaussianOfCaption(diffusion, 0, 0.05)
    words = torch.ones(16, toy.SLOTS, dtype=torch.long)
    means = {}
    for scale in (0, 1, 3):
        images = sample(model, words, 50, cfg_scale=scale, diffusion=diffusion)
        means[scale] = images.mean()
    assert means[0] == pytest.approx(0, abs=0.01)
    assert means[1] == pytest.approx(0.1, abs=0.01)
    assert means[3] == pytest.approx(0.3, abs=0.02)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_the_same_seed_draws_the_same_bits(sampler):
    model = small().eval()
    words = torch.tensor([toy.caption("red circle")] * 3)
    images = sample(model, words, 5, sampler, seed=1)
    assert torch.equal(images, sample(model, words, 5, sampler, seed=1))
    assert not torch.equal(images, sample(model, words, 5, sampler, seed=2))


# --------------------------------------------------------------------------------------------------
# An image depends on its caption, the seed and its place, and on no other image
# --------------------------------------------------------------------------------------------------


class Shrink(torch.nn.Module):
    """A model that computes each value by itself, so that no batch rounds in another way."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x, t, words):
        return self.factor * x + 0.01 * words.sum(1).view(-1, 1, 1, 1)


PROMPTS = ("red circle", "sks creature", "blue square on plain pink", "red circle", "red circle")


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_an_image_is_the_same_however_many_are_drawn(sampler, chunk):
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS])

    def draw(words, **kwargs):
        return sample(Shrink(), words, 5, sampler, seed=3, **kwargs)

    images = draw(words, chunk=chunk)
    for n in range(1, len(words) + 1):
        assert torch.equal(draw(words[:n]), images[:n])
    others = draw(words.flip(0), chunk=chunk)
    assert torch.equal(others[2], images[2])  # the same caption in the same place
    assert not torch.equal(images[3], images[4])  # the same caption in another place


def test_a_real_image_is_the_same_however_many_are_drawn():
    model = load_model(BASE)
    words = torch.tensor([toy.caption(prompt) for prompt in PROMPTS])
    images = sample(model, words, 3, chunk=2)
    alone = sample(model, words[:1], 3)
    torch.testing.assert_close(images[:1], alone, rtol=0, atol=1e-3)  # batches round differently


def test_no_two_images_of_any_seeds_share_their_noise():
    """With seeds below 4,294,967 and fewer than 1,000 images; torch takes 32 bits of a seed."""
    starts = []
    for seed in (*range(20), 1_000_000, 2**32 // 1000 - 1):
        starts += [generator.initial_seed() for generator in noise_generators(seed, 999)]
    assert len(set(starts)) == len(starts)
    assert max(starts) < 2**32
    one, other = draw_noise(noise_generators(0, 2))
    assert not torch.equal(one, other)


# --------------------------------------------------------------------------------------------------
# The UNet
# --------------------------------------------------------------------------------------------------


def small(**kwargs):
    """A small UNet, always the same, whose output, unlike a new one's, isn't zero."""
    torch.manual_seed(0)
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16, **kwargs)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    return model


def residual_blocks(model):
    return [module for module in model.modules() if hasattr(module, "conv2")]


def lively():
    """A small quantized UNet without the zeros of a new one: residual blocks, output, deltas."""
    model = quantize(small(), 4, 2, calibration="minmax")
    for block in residual_blocks(model):
        block.conv2.s_out.fill_(0.05)
        block.conv2.codes.random_()
    spread(model)
    return model


VARIANTS = [
    {},
    {"blocks": 2},
    {"c_image": 1},
    {"vocab": 5, "slots": 3},
]


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_the_output_has_the_shape_of_the_input_and_config_makes_the_unet_again(kwargs):
    model = small(**kwargs)
    x = torch.randn(2, model.config["c_image"], 8, 8)
    t = torch.tensor([0, 999])
    words = torch.zeros(2, model.config["slots"], dtype=torch.long)
    again = UNet(**model.config)
    again.load_state_dict(model.state_dict())
    assert model(x, t, words).shape == x.shape
    assert torch.equal(model(x, t, words), again(x, t, words))


def test_the_output_depends_on_the_timestep_and_the_words():
    model = small()
    for block in residual_blocks(model):
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    x = torch.randn(1, 3, 8, 8)

    def output(t, word):
        return model(x, torch.tensor([t]), torch.full((1, toy.SLOTS), word))

    assert not torch.allclose(output(1, 1), output(900, 1))
    assert not torch.allclose(output(1, 1), output(1, 2))


def test_every_layer_of_the_unet_is_quantized_and_all_deltas_get_a_gradient():
    model = lively()
    for module in model.modules():
        assert type(module) not in (torch.nn.Conv2d, torch.nn.Linear)
    x = torch.randn(4, 3, 8, 8)
    t = torch.tensor([1, 999, 2, 900])
    words = torch.ones(4, toy.SLOTS, dtype=torch.long)
    model(x, t, words).square().sum().backward()
    for parameter in model.parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0

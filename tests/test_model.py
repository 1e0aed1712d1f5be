"""The diffusion process and the samplers against formulas worked out by hand, and the UNet."""
import math

import pytest
import torch

from data import toy
from model import Diffusion, UNet
from quant import quantize
from runtime import load, save
from sample import ddim_step, ddpm_step, sample


@pytest.fixture
def diffusion():
    return Diffusion()


def small(**kwargs):
    torch.manual_seed(0)
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16, **kwargs)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    return model


def test_schedule_is_the_cosine_one(diffusion):
    abar, f = diffusion.alphas_cumprod, lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
    for t in (0, 1, 499, 990):
        assert abar[t].item() == pytest.approx(f(t + 1) / f(0), rel=1e-9)
    assert (abar.diff() < 0).all() and diffusion.betas.max() <= 0.999


def test_q_sample_and_v_by_hand(diffusion):
    x0, eps, t = torch.randn(3, 3, 4, 4).double(), torch.randn(3, 3, 4, 4).double(), torch.tensor([0, 500, 999])
    x = diffusion.q_sample(x0, t, eps)
    for i in range(3):
        abar = diffusion.alphas_cumprod[t[i]]
        torch.testing.assert_close(x[i], abar.sqrt() * x0[i] + (1 - abar).sqrt() * eps[i])
        v = abar.sqrt() * eps[i:i + 1] - (1 - abar).sqrt() * x0[i:i + 1]
        back = diffusion.to_x0_eps(v, x[i:i + 1], t[i:i + 1])
        torch.testing.assert_close(back[0], x0[i:i + 1]), torch.testing.assert_close(back[1], eps[i:i + 1])
        for off in (0, 2):  # the squared error of a prediction that is off by so much
            error = diffusion.squared_error(v + off, x0[i:i + 1], t[i:i + 1], eps[i:i + 1])
            assert error.item() == pytest.approx(off**2, abs=1e-5)


@pytest.mark.parametrize("t", [1, 10, 500, 998])
def test_ddpm_step_is_algorithm_2(diffusion, t):
    x0, eps, noise = torch.randn(3, 2, 3, 4, 4).double()
    abar, beta = diffusion.alphas_cumprod, diffusion.betas[t]
    x = abar[t].sqrt() * x0 + (1 - abar[t]).sqrt() * eps
    mine = ddpm_step(x, x0, eps, abar[t], abar[t - 1], noise)
    mean = (x - beta / (1 - abar[t]).sqrt() * eps) / (1 - beta).sqrt()  # Algorithm 2, line 4
    posterior = (abar[t - 1].sqrt() * beta * x0 + (1 - beta).sqrt() * (1 - abar[t - 1]) * x) / (1 - abar[t])  # eq. 7
    sigma = ((1 - abar[t - 1]) / (1 - abar[t]) * beta).sqrt()
    torch.testing.assert_close(mine, mean + sigma * noise), torch.testing.assert_close(mine, posterior + sigma * noise)


def test_ddim_step_keeps_x0_and_eps(diffusion):
    x0, eps, abar = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double(), diffusion.alphas_cumprod
    x = abar[700].sqrt() * x0 + (1 - abar[700]).sqrt() * eps
    torch.testing.assert_close(ddim_step(x, x0, eps, abar[700], abar[200], None),
                               abar[200].sqrt() * x0 + (1 - abar[200]).sqrt() * eps)
    torch.testing.assert_close(ddim_step(x, x0, eps, abar[700], torch.ones(()), None), x0)


class Gaussian(torch.nn.Module):
    """The exact v for pictures drawn from N(mean, std^2), each pixel by itself."""

    def __init__(self, diffusion, mean, std):
        super().__init__()
        self.diffusion, self.mean, self.std, self.anchor = diffusion, mean, std, torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, words):
        a, s = self.diffusion.coefficients(t, x)
        x0 = self.mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * self.mean)  # E[x0 | x_t]
        return (a * x - x0) / s


@pytest.mark.parametrize("sampler, steps", [("ddpm", 1000), ("ddim", 250)])
def test_samplers_draw_a_known_gaussian(diffusion, sampler, steps):
    words = torch.zeros(64, toy.SLOTS, dtype=torch.long)
    images = sample(Gaussian(diffusion, 0.2, 0.1), words, steps, sampler, cfg_scale=1, seed=0, diffusion=diffusion)
    assert images.mean() == pytest.approx(0.2, abs=0.005) and images.std() == pytest.approx(0.1, rel=0.04)


def test_guidance_moves_away_from_the_empty_caption(diffusion):
    class ByCaption(Gaussian):
        def forward(self, x, t, words):
            self.mean = 0.1 * (words[:, 0] > 0).to(x).view(-1, 1, 1, 1)
            return super().forward(x, t, words)

    words = torch.ones(16, toy.SLOTS, dtype=torch.long)
    means = [sample(ByCaption(diffusion, 0, 0.05), words, 50, cfg_scale=scale, diffusion=diffusion).mean() for scale in (0, 1, 3)]
    assert means[0] == pytest.approx(0, abs=0.01) and means[1] == pytest.approx(0.1, abs=0.01) and means[2] > 0.2


def test_same_seed_same_bits():
    model, words = small().eval(), torch.tensor([toy.caption("red circle")] * 3)
    draw = lambda seed, sampler: sample(model, words, 5, sampler, seed=seed)
    for sampler in ("ddpm", "ddim"):
        assert torch.equal(draw(1, sampler), draw(1, sampler)) and not torch.equal(draw(1, sampler), draw(2, sampler))


@pytest.mark.parametrize("kwargs", [{}, dict(blocks=2), dict(c_image=1), dict(vocab=5, slots=3)])
def test_unet_shapes_and_config(kwargs):
    model = small(**kwargs)
    x, t = torch.randn(2, model.config["c_image"], 8, 8), torch.tensor([0, 999])
    words = torch.zeros(2, model.config["slots"], dtype=torch.long)
    again = UNet(**model.config)
    again.load_state_dict(model.state_dict())
    assert model(x, t, words).shape == x.shape and torch.equal(model(x, t, words), again(x, t, words))


def test_unet_heeds_time_and_words():
    model, x = small(), torch.randn(1, 3, 8, 8)
    for block in [m for m in model.modules() if hasattr(m, "conv2")]:
        torch.nn.init.normal_(block.conv2.weight, std=0.1)
    out = lambda t, word: model(x, torch.tensor([t]), torch.full((1, toy.SLOTS), word))
    assert not torch.allclose(out(1, 1), out(900, 1)) and not torch.allclose(out(1, 1), out(1, 2))


def test_every_layer_of_the_unet_is_quantized_and_all_deltas_get_a_gradient():
    model = quantize(small(), 4, num_buckets=2)
    assert not any(type(m) in (torch.nn.Conv2d, torch.nn.Linear) for m in model.modules())
    for block in [m for m in model.modules() if hasattr(m, "conv2")]:
        block.conv2.s_out.fill_(0.05)
        block.conv2.codes.random_()
    model(torch.randn(4, 3, 8, 8), torch.tensor([1, 999, 2, 900]), torch.ones(4, 7, dtype=torch.long)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters() if p.requires_grad)


def test_files_are_whole_or_refused(tmp_path):
    path = tmp_path / "a.pt"
    save({"kind": "model", "x": torch.ones(3)}, path)
    assert torch.equal(load(path, "model")["x"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    with pytest.raises(AttributeError):
        save({"kind": "model", "x": lambda: 0}, path)  # can't be pickled: the old file stays, nothing else does
    assert torch.equal(load(path, "model")["x"], torch.ones(3)) and [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    for content, match in ((path.read_bytes()[:200], "damaged"), (b"", "damaged"), (b"text", "damaged")):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            load(tmp_path / "b.pt", "model")
    with pytest.raises(ValueError, match="exist"):
        load(tmp_path / "c.pt", "model")
    with pytest.raises(ValueError, match="kind adapter"):
        load(path, "adapter")

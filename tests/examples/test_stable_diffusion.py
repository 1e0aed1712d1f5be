"""The Stable Diffusion example, on a pipeline with a few thousand random weights: no download."""
# ruff: noqa: E402, for what is imported after the check that it is installed

import json
import logging
import os
import re
import shutil
import signal
import sys
import types
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import run, spread
from PIL import Image

NEEDED = "diffusers isn't installed: pip install -r examples/requirements.txt"
pytest.importorskip("diffusers", reason=NEEDED)
pytest.importorskip("transformers", reason=NEEDED)

import diffusers
import memory
import stable_diffusion
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from stable_diffusion import ADAPTER, BASE, STATE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from quant import (
    QuantLayer,
    adapter,
    bucket,
    deltas,
    equal_edges,
    load_adapter,
    merge,
    quantize,
)
from support.files import load, save
from support.runs import Run

SCHEDULE = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
}


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
    )


def save_pipeline(folder):
    """A whole Stable Diffusion 1.x pipeline; its tokenizer knows single letters only."""
    letters = "adfghkopst"
    tokens = [
        *letters,
        *[f"{letter}</w>" for letter in letters],
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24
    )
    unet = make_unet()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokens),
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            max_position_embeddings=24,
            bos_token_id=len(tokens) - 2,
            eos_token_id=len(tokens) - 1,
        )
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=8, sample_size=8)
    scheduler = PNDMScheduler(skip_prk_steps=True, **SCHEDULE)
    pipe = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a pipeline, images of a subject and of its class, and a finished run."""
    folder = tmp_path_factory.mktemp("world")
    save_pipeline(folder / "model")
    draws = np.random.default_rng(0)
    for name in ("dog", "dogs"):
        (folder / name).mkdir()
        for i in range(2):
            pixels = draws.integers(0, 256, (12, 9, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    assert run(stable_diffusion, *flags(folder), "--out", folder / "run") == 0
    return folder


def flags(folder):
    """Three steps in two buckets, with prior preservation and checkpointing."""
    return [
        *("--model", folder / "model", "--device", "cpu"),
        *("--subject", folder / "dog", "--prompt", "sks dog"),
        *("--class-images", folder / "dogs", "--class-prompt", "a dog"),
        *("--steps", 3, "--lr", 0.01, "--calibration", "minmax"),
    ]


def saved_deltas(folder):
    return load(folder / "adapter.pt", ADAPTER)["deltas"]


def test_a_run_trains_both_buckets(world):
    files = {path.name for path in (world / "run").iterdir()}
    assert files == {"adapter.pt", "base.pt", "state.pt", "lock"}
    unet = stable_diffusion.build(load(world / "run" / "base.pt", BASE), 2)
    stable_diffusion.load_adapter(unet, load(world / "run" / "adapter.pt", ADAPTER))
    for b in ("0", "1"):
        moved = [delta.any() for name, delta in deltas(unet).items() if name.endswith(f"_{b}")]
        assert len(moved) > 50 and sum(moved) > 0.8 * len(moved)


def test_base_is_the_quantized_model(world):
    """What build makes of base.pt is what quantize makes of the model's weights in float16."""
    base = load(world / "run" / "base.pt", BASE)
    assert all(value.dtype in (torch.float32, torch.uint8) for value in base["unet"].values())
    for num_buckets in (1, 2, 5):  # it serves any number
        unet = stable_diffusion.build(base, num_buckets)
        quantized = stable_diffusion.load_unet(world / "model")
        assert quantized.dtype == torch.float16
        how = {"columns": "channel", "calibration": "minmax", "timestep": "timestep"}
        quantize(quantized, 4, num_buckets, **how).float()
        assert unet.quant_config == quantized.quant_config
        same(unet.state_dict(), quantized.state_dict())


@pytest.mark.slow
def test_gptq_sees_the_class_at_all_timesteps(world, tmp_path, monkeypatch):
    """gptq gets noisy class images, and a base is made of them and tuned."""
    calibration_data = stable_diffusion.calibration_data
    monkeypatch.setattr(stable_diffusion, "calibration_data", partial(calibration_data, n=4))
    given = []

    def quantize_and_note(*args, data=None, **kwargs):
        given.append(data)
        return quantize(*args, data=data, **kwargs)

    monkeypatch.setattr(stable_diffusion, "quantize", quantize_and_note)
    assert run(stable_diffusion, *flags(world), "--calibration", "gptq", "--out", tmp_path) == 0
    base = load(tmp_path / "base.pt", BASE)
    assert base["made"]["calibration"] == "gptq"
    assert saved_deltas(tmp_path).any()

    pipe = stable_diffusion.load_pipeline(world / "model")
    files = stable_diffusion.find_images(world / "dogs")
    noise = DDPMScheduler.from_config(pipe.scheduler.config)
    latents, words = stable_diffusion.encode(pipe, files, "a dog", 8)
    few = calibration_data(latents, words, noise, "cpu", n=4)
    torch.testing.assert_close(given[0], few, rtol=0, atol=0)
    data = calibration_data(latents, words, noise, "cpu")
    t = torch.cat([t for _, t, _ in data])
    assert torch.equal(t // 100, (torch.arange(64) * 1000 // 64) // 100)
    abar = noise.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = torch.cat([x for x, _, _ in data])
    for n in range(64):  # one of the latents explains the noisy one, but for normal noise
        eps = (x_t[n] - abar[n].sqrt() * latents) / (1 - abar[n]).sqrt()
        assert (eps.std((1, 2, 3)) - 1).abs().min() < 0.3


def test_a_run_is_resumed_with_the_same_contents_only(world, tmp_path, capsys, monkeypatch):
    again = [*flags(world), "--out", tmp_path, "--resume"]
    for name in ("state.pt", "base.pt"):
        shutil.copy(world / "run" / name, tmp_path)
    dogs = tmp_path / "dogs"
    shutil.copytree(world / "dogs", dogs)
    again += ["--class-images", dogs]
    assert run(stable_diffusion, *again) == 0
    assert torch.equal(saved_deltas(tmp_path), saved_deltas(world / "run"))

    # another device encodes the same images to other latents
    encode = stable_diffusion.encode
    with monkeypatch.context() as patch:
        patch.setattr(stable_diffusion, "encode", lambda *args: [1.001 * x for x in encode(*args)])
        assert run(stable_diffusion, *again) == 0

    shutil.copy(world / "dog" / "1.png", dogs / "0.png")
    assert run(stable_diffusion, *again) == 2
    assert "other contents of --class-images" in capsys.readouterr().err
    shutil.copy(world / "dogs" / "0.png", dogs)

    base = load(tmp_path / "base.pt", BASE)
    base["unet"]["conv_in.bias"] += 1
    save(base, tmp_path / "base.pt")
    assert run(stable_diffusion, *again) == 2
    assert "other contents of --base" in capsys.readouterr().err
    (tmp_path / "base.pt").unlink()
    assert run(stable_diffusion, *again) == 2
    assert "other contents of --base" in capsys.readouterr().err
    assert not (tmp_path / "base.pt").exists()


def test_other_weights_in_the_same_folder_are_another_model(world, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    shutil.copy(world / "run" / "base.pt", tmp_path)
    shutil.copy(world / "run" / "adapter.pt", tmp_path)
    trains = [*flags(world), "--model", f"{model}/", "--out", tmp_path, "--steps", 1]
    draws = ["--model", model, "--sample", "sks dog", "--device", "cpu", "--out", tmp_path]
    draws += ["--n", 1, "--sample-steps", 1]
    assert run(stable_diffusion, *trains) == 0  # a copy of the model, under another name
    shutil.copy(world / "run" / "adapter.pt", tmp_path)
    assert run(stable_diffusion, *draws) == 0

    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight *= 1.01
    unet.save_pretrained(model / "unet")
    capsys.readouterr()
    for command in (trains, draws):
        assert run(stable_diffusion, *command) == 2
        assert "was made of another UNet than" in capsys.readouterr().err


def test_checkpointing_and_a_shared_base_change_no_bit(world, tmp_path):
    again = [*flags(world), "--base", world / "run" / "base.pt", "--out", tmp_path]
    assert run(stable_diffusion, *again, "--no-checkpoint") == 0
    assert not (tmp_path / "base.pt").exists()
    assert torch.equal(saved_deltas(tmp_path), saved_deltas(world / "run"))
    assert run(stable_diffusion, *again, "--seed", 1) == 0
    assert not torch.equal(saved_deltas(tmp_path), saved_deltas(world / "run"))


def test_stopped_and_resumed_is_the_same_as_one_run(world, tmp_path, monkeypatch, capsys):
    watch = Run.watch

    def watch_and_interrupt(self, *args):
        watch(self, *args)
        os.kill(os.getpid(), signal.SIGINT)

    once = [*flags(world), "--base", world / "run" / "base.pt", "--out", tmp_path]
    monkeypatch.setattr(Run, "watch", watch_and_interrupt)
    assert run(stable_diffusion, *once) == 130
    assert load(tmp_path / "state.pt", STATE)["step"] == 1
    assert not (tmp_path / "adapter.pt").exists()
    assert run(stable_diffusion, *once, "--resume") == 130
    monkeypatch.setattr(Run, "watch", watch)
    assert run(stable_diffusion, *once, "--resume", "--lr", 0.1) == 2
    assert "comes from a run with --lr 0.01" in capsys.readouterr().err
    assert run(stable_diffusion, *once, "--resume") == 0
    assert "peak memory" in capsys.readouterr().out
    for name, kind in (("adapter.pt", ADAPTER), ("state.pt", STATE)):
        same(load(tmp_path / name, kind), load(world / "run" / name, kind))


def same(a, b):
    """Assert that two nests of dicts, lists and tensors are equal."""
    assert type(a) is type(b)
    if torch.is_tensor(a):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            same(one, other)
    else:
        assert a == b


class Oracle(nn.Module):
    """Knows x0, and so predicts what it is asked for exactly: eps, or v = a eps - s x0."""

    def __init__(self, x0, scheduler, v):
        super().__init__()
        self.x0 = x0
        self.abar = scheduler.alphas_cumprod
        self.v = v
        self.trained = nn.Linear(1, 1)

    def forward(self, sample, timestep, encoder_hidden_states):
        a = self.abar[timestep].sqrt().view(-1, 1, 1, 1)
        s = (1 - self.abar[timestep]).sqrt().view(-1, 1, 1, 1)
        eps = (sample - a * self.x0) / s
        predicted = a * eps - s * self.x0 if self.v else eps
        nothing = 0 * self.trained(torch.ones(len(sample), 1))  # so that there is a graph
        return types.SimpleNamespace(sample=predicted + nothing.float().sum())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("asked", ["epsilon", "v_prediction"])
def test_target(kind, asked, tmp_path, monkeypatch):
    """An oracle's loss is zero if it is asked for what it predicts, and not if for the other."""
    monkeypatch.setattr(sys, "argv", ["x", "--model", "m", "--subject", "s", "--prompt", "p"])
    args = stable_diffusion.arguments()
    args.steps = 4
    args.batch = 8
    args.device = "cpu"
    args.out = tmp_path
    noise = DDPMScheduler.from_config({**SCHEDULE, "prediction_type": asked})
    x0 = torch.randn(1, 4, 8, 8)
    oracle = Oracle(x0, noise, v=kind == "v_prediction")
    quantize(oracle, 8, 2, timestep="timestep")
    errors = []
    monkeypatch.setattr(Run, "watch", lambda self, error, t, T: errors.append(error))
    data = [(x0, torch.zeros(1, 24, 16))]
    stable_diffusion.tune(oracle, noise, data, args, Run(args, STATE))
    assert len(errors) == 4 and errors[0].shape == (8,)
    if kind == asked:
        assert torch.stack(errors).max() < 1e-4
    else:
        assert torch.stack(errors).mean() > 0.1


def test_prior_weighs_the_class(world, tmp_path):
    """With --prior 0 it doesn't matter what the class images are."""
    once = [*flags(world), "--base", world / "run" / "base.pt", "--out", tmp_path, "--prior", 0]
    assert run(stable_diffusion, *once) == 0
    dogs = saved_deltas(tmp_path)
    assert run(stable_diffusion, *once, "--class-images", world / "dog") == 0
    assert torch.equal(saved_deltas(tmp_path), dogs)
    assert not torch.equal(saved_deltas(world / "run"), dogs)


@pytest.mark.parametrize("kind", [PNDMScheduler, EulerDiscreteScheduler])
def test_pipeline_uses_the_bucket_of_each_timestep(world, kind):
    """A packed call is the merged model's of that bucket, whatever the scheduler's timesteps are:
    PNDM's are whole, Euler's are fractions.
    """
    unet = stable_diffusion.build(load(world / "run" / "base.pt", BASE), 2)
    for delta in deltas(unet).values():
        nn.init.normal_(delta, std=0.3)
    merged = [merge(unet, b) for b in range(2)]
    assert not any(isinstance(module, QuantLayer) for module in merged[0].modules())
    calls = []

    def record(_, args, kwargs, out):
        sample, t = args
        calls.append((sample.clone(), t.clone(), kwargs["encoder_hidden_states"], out[0].clone()))

    unet.register_forward_hook(record, with_kwargs=True)
    pipe = stable_diffusion.load_pipeline(world / "model", unet)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    pipe("sks dog", num_inference_steps=5, output_type="latent")
    used = set()
    for sample, t, words, out in calls:
        assert t.dim() == 0 and t.is_floating_point() == (kind is EulerDiscreteScheduler)
        b = int(bucket(t, equal_edges(2, 1000)))
        used.add(b)
        expected = merged[b](sample, t, words).sample
        assert (out - expected).abs().max() < 1e-4 * expected.abs().max()
        other = merged[1 - b](sample, t, words).sample
        assert (out - other).abs().max() > 1e-2 * expected.abs().max()
    assert used == {0, 1}


class Warnings(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


@torch.no_grad()
def test_a_quantized_unet_is_saved_as_the_docstring_says(world, tmp_path, monkeypatch):
    unet = stable_diffusion.build(load(world / "run" / "base.pt", BASE), 2)
    torch.save(unet.state_dict(), tmp_path / "base.pt")
    spread(unet)
    x = torch.randn(2, 4, 8, 8)
    words = torch.randn(2, 5, 16)

    # not so: the weights are random, and there is but a warning
    heard = Warnings()
    logger = diffusers.utils.logging.get_logger("diffusers")
    logger.addHandler(heard)
    monkeypatch.setattr(logger, "level", logging.WARNING)
    unet.save_pretrained(tmp_path / "quantized")
    lost = UNet2DConditionModel.from_pretrained(tmp_path / "quantized", low_cpu_mem_usage=False)
    logger.removeHandler(heard)
    assert any("newly initialized" in text for text in heard.texts)
    assert not torch.allclose(lost(x, 100, words).sample, unet(x, 100, words).sample, atol=0.1)

    # but so: merged ...
    merge(unet, 1).save_pretrained(tmp_path / "float")
    plain = UNet2DConditionModel.from_pretrained(tmp_path / "float", low_cpu_mem_usage=False)
    torch.testing.assert_close(plain(x, 900, words).sample, unet(x, 900, words).sample)

    # ... or packed
    torch.save(adapter(unet), tmp_path / "adapter.pt")
    loaded = UNet2DConditionModel.from_config(unet.config)
    quantize(loaded, 4, 2, timestep="timestep", columns="channel", calibration="minmax")
    loaded.load_state_dict(torch.load(tmp_path / "base.pt"))
    load_adapter(loaded, torch.load(tmp_path / "adapter.pt"))
    load_adapter(unet, torch.load(tmp_path / "adapter.pt"))  # rounds the deltas
    t = torch.tensor([100, 900])
    assert torch.equal(loaded(x, t, words).sample, unet(x, t, words).sample)


def test_draws_a_grid(world, tmp_path, monkeypatch, capsys):
    for name in ("adapter.pt", "base.pt"):
        (tmp_path / name).write_bytes((world / "run" / name).read_bytes())
    command = ["--model", world / "model", "--device", "cpu", "--out", tmp_path]
    command += ["--sample", "sks dog", "--sample-steps", 2]
    assert run(stable_diffusion, *command, "--n", 5) == 0
    assert "5 images" in capsys.readouterr().out
    five = np.array(Image.open(tmp_path / "sample.png"))
    assert five.shape == (16, 32, 3)
    assert (five[8:, 8:] == 255).all()  # the empty rest of the second row
    assert run(stable_diffusion, *command, "--n", 1, "--seed", 4) == 0
    one = np.array(Image.open(tmp_path / "sample.png"))
    assert (one == five[8:, :8]).all()  # the fifth image is seed 4's first

    # the adapter is what is drawn
    subject = load(tmp_path / "adapter.pt", ADAPTER)
    subject["deltas"] += 0.5
    save(subject, tmp_path / "adapter.pt")
    assert run(stable_diffusion, *command, "--n", 1, "--seed", 4) == 0
    assert (one != np.array(Image.open(tmp_path / "sample.png"))).any()
    subject["fingerprint"] = "another"
    save(subject, tmp_path / "adapter.pt")
    assert run(stable_diffusion, *command) == 2
    assert "made for another base" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_not_drawn(world, capsys):
    command = ["--model", world / "model", "--device", "cpu", "--out", world / "run"]
    assert run(stable_diffusion, *command, "--sample", "sks dog" * 9) == 2
    assert "too many for the model" in capsys.readouterr().err
    assert not (world / "run" / "sample.png").exists()


def test_it_runs_in_one_process(monkeypatch, capsys):
    monkeypatch.setattr(stable_diffusion, "WORLD_SIZE", 2)
    assert run(stable_diffusion, "--model", "x", "--sample", "x") == 2
    assert "runs in one process" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["dog", "dogs"])
def test_a_folder_of_images_is_not_written_to(name, world, capsys):
    assert run(stable_diffusion, *flags(world), "--out", world / name) == 2
    assert "can't be --out" in capsys.readouterr().err
    assert len(list((world / name).iterdir())) == 2


def test_text_files_are_said_to_be_unused(world, tmp_path, capsys):
    shutil.copytree(world / "dog", tmp_path / "dog")
    stable_diffusion.find_images(tmp_path / "dog")
    assert capsys.readouterr().err == ""
    (tmp_path / "dog" / "0.txt").write_text("on a beach")
    (tmp_path / "dog" / "1.txt").write_text("asleep")
    assert [file.name for file in stable_diffusion.find_images(tmp_path / "dog")] == [
        "0.png",
        "1.png",
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert "text files aren't used" in line


def test_transparent_pixels_are_black(tmp_path):
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(tmp_path / "0.png")
    assert (stable_diffusion.read_image(tmp_path / "0.png", 8) == -1).all()


def test_bad_input_is_one_sentence(world, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "dog.png").write_bytes(b"no image")
    for name, pipeline in (("sdxl", "StableDiffusionXLPipeline"), ("damaged", None)):
        (tmp_path / name).mkdir()
        index = json.loads((world / "model" / "model_index.json").read_text())
        index["_class_name"] = pipeline or index["_class_name"]
        (tmp_path / name / "model_index.json").write_text(json.dumps(index))
    for name in ("no unet", "oblong"):
        shutil.copytree(world / "model", tmp_path / name)
    config = tmp_path / "oblong" / "unet" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "sample_size": [8, 16]}))
    shutil.rmtree(tmp_path / "no unet" / "unet")
    base = ["--base", world / "run" / "base.pt"]
    trains = ["--model", "x", "--subject", "x", "--prompt", "x"]
    draws = ["--model", "x", "--sample", "x"]
    cases = {
        "give --subject": ["--model", "x"],
        "needs --prompt": ["--model", "x", "--subject", "x"],
        "belong together": [*trains, "--class-prompt", "x"],
        "--sample draws, and doesn't use --bits": [*draws, "--bits", 3],
        "--sample draws, and doesn't use --no-checkpoint": [*draws, "--no-checkpoint"],
        "--subject trains, and doesn't use --n": [*trains, "--n", 3],
        "needs --class-images": [*flags(world)[:8], "--calibration", "gptq"],
        "from 2 to 8": ["--model", "x", "--bits", 9],
        "can't be read": [*flags(world), "--model", tmp_path / "missing"],
        "can't be read (": [*flags(world), "--model", tmp_path / "damaged"],
        "is a StableDiffusionXLPipeline": [*flags(world), "--model", tmp_path / "sdxl"],
        "is not a folder with PNG or JPEG": [*flags(world), "--subject", tmp_path / "empty"],
        "dog.png can't be read": [*flags(world), "--subject", tmp_path / "broken"],
        "is empty": [*flags(world), "--subject", ""],
        "no file named config.json": [*flags(world), "--model", tmp_path / "no unet"],
        "a sample_size of [8, 16]": [*flags(world), "--model", tmp_path / "oblong"],
        "too many for the model": [*flags(world), "--prompt", "sks dog" * 9],
        "was made with": [*flags(world), *base, "--bits", 8],
        "no longer finite": [*flags(world), *base, "--lr", 10, "--steps", 60],
        "state.pt doesn't exist": [*flags(world), "--resume"],
        "adapter.pt doesn't exist": ["--model", world / "model", "--sample", "sks dog"],
    }
    for i, (says, command) in enumerate(cases.items()):
        out = tmp_path / f"out{i}"
        assert run(stable_diffusion, *command, "--out", out) == 2, says
        err = re.split("[\r\n]", capsys.readouterr().err.strip())[-1]
        assert err.startswith("stable_diffusion.py: ") and says in err, (says, err)
        assert not out.exists() or [path.name for path in out.iterdir()] in ([], ["lock"]), says


def test_scheduler_that_predicts_the_sample_is_refused(world, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(world / "model", model)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    config["prediction_type"] = "sample"
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="neither epsilon nor v_prediction"):
        stable_diffusion.load_pipeline(model)


@pytest.mark.slow
def test_memory_measures_every_method(monkeypatch, capsys):
    """All that examples/memory.py does, in this process and on a tiny UNet."""
    memory.check("cpu")
    kept = {}
    for row in memory.ROWS[:5]:
        sent = []
        pipe = types.SimpleNamespace(recv=lambda: 0, send=sent.append, close=lambda: None)
        memory.measure(pipe, row, memory.TINY, "cpu")
        assert len(sent) == 2, sent
        line = memory.table_row(row, sent, None)
        assert line.count("|") == 7
        kept[row.name] = sent[0]["kept"], sent[1]["kept"]
    for one, two in kept.values():
        assert 1.2 * one < two < 2.2 * one  # the plain layers keep weights, too
    checkpointed = kept["ours, 4 bits, N = 2, checkpointed"][0]
    assert checkpointed < 0.5 * kept["ours, 4 bits, N = 2"][0]
    assert kept["ours, 4 bits, N = 2"][0] < kept["TuneQDM, plain"][0]


def test_memory_goes_on_after_a_failed_row(monkeypatch, capsys):
    class Dead:
        def send(self, _):
            pass

        def poll(self, _):
            return True

        def recv(self):
            raise EOFError

    class Late(Dead):
        def poll(self, _):
            return False

    class Failed(Dead):
        def recv(self):
            return "OutOfMemoryError: CUDA out of memory"

    process = types.SimpleNamespace(kill=lambda: None, join=lambda: None)
    pipes = iter([Dead(), Late(), Failed()])
    monkeypatch.setattr(memory, "start", lambda *_: (process, next(pipes)))
    monkeypatch.setattr(memory, "ROWS", memory.ROWS[:3])
    monkeypatch.setattr(memory, "check", lambda _: None)
    assert run(memory, "--device", "cpu", "--tiny") == 0
    table = capsys.readouterr().out.split("\n\n")[-1]
    for reason in ("the process died", "out of time", "OutOfMemoryError"):
        assert reason in table


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_check_notices_a_wrong_layer(factor, monkeypatch):
    scale_samples = QuantLayer.scale_samples

    def wrong(self, x, d, index):
        return factor * scale_samples(self, x, d, index)

    monkeypatch.setattr(QuantLayer, "scale_samples", wrong)
    with pytest.raises(ValueError, match="differs from the plain formula"):
        memory.check("cpu")


def test_a_quantized_model_in_half_precision_runs_in_a_pipeline_of_its_dtype():
    """diffusers casts what a model is given to the model's dtype, that of its first parameter."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
    )
    quantize(unet, 4, 2, timestep="timestep").half()
    assert unet.dtype == torch.float16
    pipe = DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    images = pipe(num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
    assert images[0].size == (8, 8)

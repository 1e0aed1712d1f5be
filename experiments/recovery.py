"""Recovery: tune a quantized base on the pretraining set. How near does it come to the float one?

The task of the paper's table of CIFAR-10 in miniature: there is no subject. Each step has new
images, unless a setting has a fixed set of them. And one question to gptq, without tuning: from
which timesteps must its data come?
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import lora_packed
from calibrate import CALIBRATIONS
from data import toy
from quant import adapter, quantize
from report import append, is_due
from runs import DIFFUSION, WIDTHS, PartOfTime, losses, squared_error, validation_loss
from sample import BASE, load_model
from support.files import load, save
from train import calibration_data

YOUNG = Path("out/young/base.pt")  # made by pretrain.py --steps 4000 --out out/young
STEPS = 300  # of tuning, unless a setting says otherwise
LR_SCALES = 0.003  # learning rates, by what is trained
LR_LORA = 0.01
LR_FLOAT = 0.0003
ONE_SET = "TuneQDM, N = 1"
METHODS = {  # the scales that are trained, the number of their sets, the columns; LoRA has none
    "PEQA": ("out", 1, "channel"),
    "PEQA + TAS, N = 2": ("out", 2, "channel"),
    ONE_SET: ("out+in", 1, "channel"),
    "TuneQDM, N = 2": ("out+in", 2, "channel"),
    "TuneQDM, N = 4": ("out+in", 4, "channel"),
    "TuneQDM, N = 8": ("out+in", 8, "channel"),
    "by position, N = 1": ("out+in", 1, "position"),
    "by position, N = 2": ("out+in", 2, "position"),
    "by position, N = 4": ("out+in", 4, "position"),
    "LoRA r = 2, packed base": None,
}
COMPARED = list(METHODS)  # in the table of scale sets
METHODS["by position, N = 3"] = ("out+in", 3, "position")


@dataclass(frozen=True)
class Recovery:
    """A setting: how the base is quantized, what is trained, and for how long."""

    bits: int  # 32 is the float base: it is tuned whole, whatever calibration and method
    calibration: str
    method: str = ONE_SET
    steps: int = STEPS
    scenes: int = 0  # how many there are to train on; 0: each step has new ones
    young: bool = False  # from a base that was pretrained for a fifth of the steps
    rare: float = 0.3  # how many creatures have a rare word; 0 leaves these words to subjects

    @property
    def start(self) -> str:
        """How the base is quantized."""
        return f"{self.bits} bits, {self.calibration}"

    @property
    def name(self) -> str:
        """What the log knows it by."""
        name = self.start
        if self.method != ONE_SET:
            name += f", {self.method}"
        if self.steps != STEPS:
            name += f", {self.steps} steps"
        if self.scenes:
            name += f", {self.scenes} scenes"
        if self.young:
            name += ", young base"
        if self.rare != 0.3:
            name += f", rare {self.rare:g}"
        return name


def settings_of_calibrations() -> list[Recovery]:
    """The float base, then every width with every calibration."""
    settings = [Recovery(32, "full precision")]
    for bits in sorted(WIDTHS, reverse=True):
        for calibration in (*CALIBRATIONS, "gptq"):
            settings.append(Recovery(bits, calibration))
    return settings


def settings_of_scale_sets() -> list[Recovery]:
    """Every method from three starts, then four methods for ten times as long."""
    settings = []
    for bits, calibration in ((4, "rowcol"), (4, "gptq"), (2, "gptq")):
        for method in COMPARED:
            settings.append(Recovery(bits, calibration, method))
    for method in COMPARED[:4]:
        settings.append(Recovery(4, "gptq", method, steps=3000))
    return settings


THIRDS = {
    "all": DIFFUSION,
    "the first third": PartOfTime(0, 1 / 3),
    "the last third": PartOfTime(2 / 3, 1),
}


def settings_of_thirds() -> dict[str, tuple[str, int]]:
    """The settings of calibrate_on by name: one of THIRDS, and the bits of a weight."""
    found = {}
    for bits in (4, 3):
        for third in THIRDS:
            found[f"{bits} bits, data of {third}"] = (third, bits)
    return found


def calibrate_on(third: str, bits: int, seed: int) -> dict[str, float]:
    """Quantize the base by gptq with data from one of THIRDS: the loss at the timesteps of each."""
    data = calibration_data(seed=seed, diffusion=THIRDS[third])
    model = quantize(load_model(BASE), bits, columns="channel", calibration="gptq", data=data)
    found = {}
    for name, diffusion in THIRDS.items():
        found[name] = validation_loss(model, diffusion=diffusion)
    return found


def prepare(setting: Recovery, seed: int):
    """The model of a setting before it is tuned, and its learning rate."""
    model = load_model(YOUNG if setting.young else BASE)
    if setting.bits == 32:
        return model, LR_FLOAT
    data = calibration_data(seed=seed)  # other data for each seed: how much do they matter?
    if METHODS[setting.method] is None:
        torch.manual_seed(seed)  # LoRA's first matrices are random
        return lora_packed(model, 2, setting.bits, "channel", setting.calibration, data), LR_LORA
    scales, num_buckets, columns = METHODS[setting.method]
    quantize(
        model,
        setting.bits,
        num_buckets,
        DIFFUSION.T,
        scales,
        columns,
        setting.calibration,
        data=data,
    )
    return model, LR_SCALES


def recover(setting: Recovery, seed: int, steps_divisor: int = 1) -> dict:
    """Quantize the base and tune it on the pretraining set.

    Returns the validation loss before and after, how many numbers were trained, and, if the scenes
    to train on are fixed, the loss on them. steps_divisor: what the number of steps is divided by.
    """
    model, lr = prepare(setting, seed)
    before = validation_loss(model)
    found = {
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "before": before,
    }
    fixed = None
    if setting.scenes:
        generator = torch.Generator().manual_seed(1000 + seed)
        fixed = toy.sample_scenes(setting.scenes, generator, setting.rare)
        found["on its scenes before"] = loss_on(model, *fixed)
    steps = setting.steps // steps_divisor
    tune_on_world(model, setting.name, lr, steps, seed, fixed, rare=setting.rare)
    found["after"] = validation_loss(model)
    if fixed:
        found["on its scenes"] = loss_on(model, *fixed)
    return found


def tune_on_world(model, name, lr, steps, seed, fixed=None, diffusion=DIFFUSION, rare=0.3):
    """Train what requires a gradient, on 64 scenes a step, at a rate that falls from lr to zero.

    fixed: images and captions to draw from; by default all scenes are new. diffusion: which draws
    the timesteps. rare: how many creatures have a rare word. name: of the bar.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained)
    for step in tqdm(range(steps), name):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        if fixed:
            pick = torch.randint(len(fixed[0]), (64,), generator=generator)
            x0, words = (tensor[pick] for tensor in fixed)
        else:
            x0, words = toy.sample_scenes(64, generator, rare)
        t = diffusion.draw_timesteps(64, generator)
        eps = torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        squared_error(model, x0, words, t, eps).mean().backward()
        optimizer.step()


def loss_on(model, x0, words, n=1024) -> float:
    """The loss on scenes, with n fixed timesteps and noises: each scene comes equally often."""
    generator = torch.Generator().manual_seed(12345)
    t = DIFFUSION.draw_timesteps(n, generator)
    times = n // len(x0)
    x0, words = x0.repeat(times, 1, 1, 1), words.repeat(times, 1)
    return losses(model, x0, words, t, generator).mean().item()


def recovered(args, setting: Recovery, seed: int) -> dict:
    """The adapter of a setting after tuning."""

    def make():
        model, lr = prepare(setting, seed)
        steps = setting.steps // args.steps_divisor
        tune_on_world(model, setting.name, lr, steps, seed, rare=setting.rare)
        return adapter(model)

    return kept_in_file(args, "adapter", f"{setting.name}, {seed}", make)


def kept_in_file(args, kind, name, make) -> dict:
    """The dict that make returns. It stays in a file, out/LOG/KIND/NAME.pt, for the next call."""
    path = Path("out") / args.log.stem / kind / f"{name}.pt"
    if not path.exists():
        save({"kind": kind, **make()}, path)
    return load(path, kind)


def recover_all(args, settings):
    """Tune with each setting and seed, if the log doesn't have it."""
    for seed in range(args.seeds):
        for setting in settings:
            if seed > 0 and setting.steps > STEPS:
                continue  # ten times as long, so one seed has to do
            key = {"recovery": setting.name, "seed": seed}
            if is_due(args, setting.name, key):
                append(args.log, key, recover(setting, seed, args.steps_divisor))

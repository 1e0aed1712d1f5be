"""Recovery: tune a quantized base on the pretraining set. How near does it come to the float one?

The task of the paper's table of CIFAR-10 in miniature: each step has new images, and there is no
subject. And one question to gptq, without tuning: from which timesteps must its data come?
"""

from dataclasses import dataclass

import torch
from tqdm import tqdm

from baselines import lora_packed
from calibrate import CALIBRATIONS
from data import toy
from quant import quantize
from runs import DIFFUSION, WIDTHS, PartOfTime, squared_error, validation_loss
from sample import BASE, load_model
from train import calibration_data

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


@dataclass(frozen=True)
class Recovery:
    """A setting: how the base is quantized, what is trained, and for how long."""

    bits: int  # 32 is the float base: it is tuned whole, whatever calibration and method
    calibration: str
    method: str = ONE_SET
    steps: int = STEPS

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
        for method in METHODS:
            settings.append(Recovery(bits, calibration, method))
    for method in list(METHODS)[:4]:
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
    model = load_model(BASE)
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

    Returns the validation loss before and after, and how many numbers were trained. steps_divisor:
    what the number of steps is divided by.
    """
    model, lr = prepare(setting, seed)
    before = validation_loss(model)

    steps = setting.steps // steps_divisor
    trained = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(trained)
    for step in tqdm(range(steps), setting.name):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x0, words = toy.sample_scenes(64, generator)
        t = DIFFUSION.draw_timesteps(64, generator)
        eps = torch.randn(x0.shape, generator=generator)
        optimizer.zero_grad()
        squared_error(model, x0, words, t, eps).mean().backward()
        optimizer.step()
    return {
        "trained": sum(p.numel() for p in trained),
        "before": before,
        "after": validation_loss(model),
    }

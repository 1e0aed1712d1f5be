"""The example of a UNet of one's own, and what its comments say."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn as nn
from conftest import ROOT, spread

from quant import batch_of, merge, quantize, set_batch

COPIED = ("quant.py", "calibrate.py", "gptq.py", "support")


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """A folder with the files that the example says to copy, and what it printed there."""
    folder = tmp_path_factory.mktemp("own")
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    (folder / "examples").mkdir()
    script = shutil.copy(ROOT / "examples" / "own_unet.py", folder / "examples")
    environment = dict(os.environ)
    environment.pop("PYTHONPATH", None)  # the rest of the project isn't to be found
    done = subprocess.run(
        [sys.executable, script], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def losses(stdout, name):
    """The two losses in the line that starts with name."""
    line = re.search(rf"^{name} +loss (.+), of the subject (.+)$", stdout, re.M)
    return float(line[1]), float(line[2])


def test_it_quantizes_trains_saves_and_loads(printed):
    folder, stdout = printed
    pretrained, _ = losses(stdout, "pretrained")
    rowcol, _ = losses(stdout, "2 bits, rowcol")
    gptq, before = losses(stdout, "2 bits, gptq")
    _, after = losses(stdout, "tuned")
    assert pretrained < 0.5
    assert pretrained - 0.01 < gptq < rowcol
    assert after < 0.6 * before
    assert losses(stdout, "loaded") == pytest.approx(losses(stdout, "tuned"), abs=0.002)

    files = folder / "out" / "own-unet"
    assert {file.name for file in files.iterdir()} == {"base.pt", "adapter.pt"}
    assert (files / "base.pt").stat().st_size < 65_000
    adapter = torch.load(files / "adapter.pt")
    assert adapter["others"].keys() == {"norm.weight", "norm.bias"}


def test_what_is_said_to_be_equal_is(printed):
    _, stdout = printed
    assert "the same gradients: True" in stdout
    assert "refused: layer '1' is a MultiheadAttention" in stdout
    merged, half = re.search(r"merged, to (\S+); in bfloat16, to (\S+)", stdout).groups()
    guided = re.search(r"guided, to (\S+)", stdout).group(1)
    assert float(merged) < 1e-5
    assert 1e-4 < float(half) < 0.1
    assert float(guided) < 1e-5


class Video(nn.Module):
    """Folds the frames of each sample into the batch."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1)

    def forward(self, video, t):  # (N, F, 2, 4, 4), (N,)
        return self.conv(video.flatten(0, 1)).unflatten(0, video.shape[:2])


def test_frames_have_the_timestep_of_their_sample():
    model = spread(quantize(Video(), 4, 2))
    video = torch.randn(2, 3, 2, 4, 4)
    t = torch.tensor([100, 900])
    with pytest.raises(ValueError, match="6 samples for 2 timesteps"):
        model(video, t)
    with set_batch(batch_of(t.repeat_interleave(3), model.quant_config["edges"])):
        y = model.forward(video, t)
    for sample in range(2):
        plain = merge(model, sample)
        torch.testing.assert_close(y[sample], plain(video, None)[sample])

"""Wrong input of every kind that a user can give.

Each gets one sentence that names the culprit, and exit code 2. No file is written or changed.
"""

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import ROOT, contents_of, error_of, png
from PIL import Image

import bench
import pretrain
import runtime
import sample
import tables
import train
from data import toy
from quant import adapter, quantize
from runtime import BASE, load, load_model, save

# --------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------

WRONG_NUMBERS = [
    (train, "--bits", [1, 9, -4, "four", "4.5", "nan", ""]),
    (train, "--buckets", [0, 1001, -1, 1.5, "nan", ""]),
    (train, "--steps", [-1, 10**8, "inf", "1e3"]),
    (train, "--lr", [-0.1, 11, "nan", "inf", "fast"]),
    (train, "--batch", [0, -8, 5000, "nan"]),
    (train, "--prior", [-1, "nan", "-inf", 1e3]),
    (train, "--sample-steps", [0, 1001]),
    (train, "--seed", [-1, 0.5, 2**70]),
    (sample, "--n", [0, 1001, "all"]),
    (sample, "--steps", [0, 1001, 2.5]),
    (sample, "--cfg-scale", [-1, "nan", "inf"]),
    (sample, "--seed", [-1, "nan"]),
    (tables, "--seeds", [0, "three"]),
    (bench, "--rounds", [0]),
    (bench, "--batches", ["nan"]),
]
NUMBERS = []
for script, flag, values in WRONG_NUMBERS:
    NUMBERS += [(script, flag, value) for value in values]


def assert_one_sentence(script, *args, capsys, words):
    """The script ends with one line for users, and has each of words."""
    error = error_of(script, *args, capsys=capsys)
    assert "Traceback" not in error
    assert ": [Errno" not in error
    for word in words:
        assert word in error


@pytest.mark.parametrize("script, flag, value", NUMBERS)
def test_a_number_out_of_range_is_refused_by_its_flag(
    script, flag, value, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    table = {tables: ["subjects"], bench: ["speed"]}.get(script, [])
    assert_one_sentence(script, *table, f"{flag}={value}", capsys=capsys, words=[flag])
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# A folder of all that is wrong
# --------------------------------------------------------------------------------------------------


class Code:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def make_subject(folder, **files):
    """A subject of one good image, and of other files: their bytes by name, caption for 0.txt."""
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    names = {"image": "1.png", "caption": "0.txt", "parts": "parts.txt"}
    for key, content in files.items():
        (folder / names[key]).write_bytes(content)
    return folder


def make_wrong_images(folder):
    good = (BASE.parent / "subjects" / "mo" / "0.png").read_bytes()
    flipped_bit = good[:60] + bytes([good[60] ^ 1]) + good[61:]
    make_subject(folder / "text-image", image=b"no image")
    make_subject(folder / "no-bytes", image=b"")
    make_subject(folder / "cut-image", image=good[: len(good) // 2])
    make_subject(folder / "flipped", image=flipped_bit)
    make_subject(folder / "bomb", image=png(20000, 20000, 1, 0, b""))
    make_subject(folder / "no-pixels", image=png(0, 0, 8, 0, b""))
    make_subject(folder / "sixteen-bit", image=png(16, 16, 16, 0, bytes(33) * 16))

    animated = make_subject(folder / "animated") / "1.png"
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(animated, save_all=True, append_images=frames[1:])

    (make_subject(folder / "folder-image") / "1.png").mkdir()
    (make_subject(folder / "lost-link") / "1.png").symlink_to(folder / "gone.png")

    (folder / "not-images").mkdir()
    (folder / "not-images" / "notes.txt").write_text("on green stripes")


def make_wrong_captions_and_parts(folder):
    make_subject(folder / "caption", caption=b"on tartan")
    make_subject(folder / "long-caption", caption=b"red " * 9999)
    make_subject(folder / "binary-caption", caption=b"\xff\xfe\x00")
    (make_subject(folder / "folder-caption") / "0.txt").mkdir()

    wings = "".join(f"{key} wings\n" for key in toy.KEYS)
    make_subject(folder / "parts", parts=b"body box\n")
    make_subject(folder / "binary-parts", parts=b"\xff\xfe")
    make_subject(folder / "other-parts", parts=wings.encode())


def make_wrong_models(folder):
    base = load(BASE, "model")
    config = base["config"]
    nan_bias = {**base["model"], "out.bias": torch.full((3,), float("nan"))}
    code = Code(str(folder / "ran"))
    tuned = contents_of(quantize(load_model(BASE), 4, calibration="minmax"))

    (folder / "cut.pt").write_bytes(BASE.read_bytes()[:100_000])
    torch.save({"kind": "model", "config": code}, folder / "code.pt")
    torch.save([1, 2], folder / "list.pt")
    wrong = {
        "hollow": {"kind": "model"},
        "old": {**base, "config": {"width": 3}},
        "no-config": {**base, "config": None},
        "sizes": {**base, "config": {**config, "channels": (60, 90)}},
        "vast": {**base, "config": {**config, "channels": (2**40, 2**40)}},
        "names": {**base, "model": list(base["model"])},
        "nan": {**base, "model": nan_bias},
        "bits": {**tuned, "quant_config": {**tuned["quant_config"], "n_bits": 99}},
    }
    for name, content in wrong.items():
        save(content, folder / f"{name}.pt")


def make_wrong_adapters(folder):
    """A good model, tuned.pt, its adapter, and adapters that don't fit it."""
    code = Code(str(folder / "ran"))
    (folder / "empty-adapter.pt").write_bytes(b"")
    torch.save({"kind": "adapter", "deltas": code}, folder / "code-adapter.pt")

    model = quantize(load_model(BASE), 4, calibration="minmax")
    mine = {"kind": "adapter", **adapter(model)}
    save(contents_of(model), folder / "tuned.pt")
    save(mine, folder / "tuned-adapter.pt")
    save({**mine, "deltas": mine["deltas"][1:]}, folder / "short-adapter.pt")
    save({**mine, "deltas": mine["deltas"] * float("nan")}, folder / "nan-adapter.pt")
    save({**mine, "deltas": "all of them"}, folder / "text-adapter.pt")
    save({"kind": "adapter"}, folder / "hollow-adapter.pt")

    other_base = load_model(BASE)
    torch.manual_seed(0)
    torch.nn.init.normal_(other_base.middle[0].conv1.weight)
    others = {
        "three": quantize(load_model(BASE), 3, calibration="minmax"),
        "two": quantize(load_model(BASE), 4, 2, calibration="minmax"),
        "other": quantize(other_base, 4, calibration="minmax"),
    }
    for name, model in others.items():
        save({"kind": "adapter", **adapter(model)}, folder / f"{name}-adapter.pt")


def make_wrong_states(folder):
    for name in ("no-state", "damaged-state", "other-state", "other-run", "old-state"):
        (folder / name).mkdir()
    flags = runtime.describe(train.arguments(["--device", "cpu"]))
    other_flags = {**flags, "bits": "3", "lr": "0.5"}
    old_flags = {key: value for key, value in flags.items() if key != "bits"}
    inputs = {"base": "", "subject": ""}
    other_run = {"kind": "fine-tuning", "inputs": inputs, "args": other_flags}
    old = {"kind": "fine-tuning", "inputs": inputs, "args": old_flags}
    (folder / "damaged-state" / "state.pt").write_bytes(b"PK")
    save(load(BASE, "model"), folder / "other-state" / "state.pt")
    save(other_run, folder / "other-run" / "state.pt")
    save(old, folder / "old-state" / "state.pt")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The folder of all that is wrong; @NAME in the tables below is the path of NAME in it."""
    folder = tmp_path_factory.mktemp("wrong things")
    (folder / "empty").mkdir()
    (folder / "text").write_text("no checkpoint")
    (folder / "nothing").write_bytes(b"")
    make_wrong_images(folder)
    make_wrong_captions_and_parts(folder)
    make_wrong_models(folder)
    make_wrong_adapters(folder)
    make_wrong_states(folder)
    return folder


# --------------------------------------------------------------------------------------------------
# Choices, prompts, files and folders
# --------------------------------------------------------------------------------------------------

CHOICES = [  # script, arguments, what the error names
    (train, ["--scales", "in"], "--scales"),
    (train, ["--calibration", "best"], "rowcol"),
    (train, ["--device", "tpu"], "--device"),
    (train, ["--colour"], "--colour"),
    (train, ["--compile"], "compiler"),
    (pretrain, ["--compile"], "compiler"),
    (train, ["surplus"], "surplus"),
    (train, ["--base"], "--base"),
    (sample, ["--sampler", "euler"], "ddpm"),
    (sample, ["--device", "tpu"], "--device"),
    (sample, ["--adapter"], "--adapter"),
    (tables, ["everything"], "recovery"),
    (tables, ["subjects", "--subjects", "pip"], "bix"),
    (tables, ["subjects", "mo"], "ablations"),
    (tables, ["subjects", "--quick", "--write"], "--write"),
    (tables, ["subjects", "--quick", "--log", "a.jsonl"], "--log"),
    (bench, ["taste"], "speed"),
    (bench, ["speed", "--sizes", "vast"], "default"),
    (sample, ["--prompt", "dragon"], "dragon"),
    (sample, ["--prompt="], "empty"),
    (sample, ["--prompt=the"], "empty"),
    (sample, ["--prompt", "red red circle"], "'red'"),
    (sample, ["--prompt", "red\nred"], "'red'"),
    (sample, ["--prompt", " ".join(["circle"] * 5000)], "'circle'"),
    (sample, ["--prompt", "sks\0"], "sks"),
]

SUBJECTS = [  # --subject, what the error names
    ("nobody", "nobody"),
    ("@empty", "PNG or JPEG"),
    ("@text", "text"),
    ("@not-images", "PNG or JPEG"),
    ("@text-image", "1.png"),
    ("@no-bytes", "1.png"),
    ("@cut-image", "1.png"),
    ("@bomb", "1.png"),
    ("@no-pixels", "1.png"),
    ("@sixteen-bit", "1.png"),
    ("@animated", "1.png"),
    ("@flipped", "1.png"),
    ("@folder-image", "1.png"),
    ("@lost-link", "1.png"),
    ("@caption", "0.txt"),
    ("@long-caption", "0.txt"),
    ("@binary-caption", "0.txt"),
    ("@folder-caption", "0.txt"),
    ("@parts", "parts.txt"),
    ("@binary-parts", "parts.txt"),
    ("@other-parts", "parts.txt"),
]

MODELS = {  # --base or --ckpt, and the reason
    "missing.pt": "doesn't exist",
    "empty": "damaged or not a checkpoint",
    "text": "damaged or not a checkpoint",
    "nothing": "damaged or not a checkpoint",
    "cut.pt": "damaged or not a checkpoint",
    "code.pt": "damaged or not a checkpoint",
    "list.pt": "damaged or not a checkpoint (not a dict)",
    "hollow.pt": "whole model of this version",
    "old.pt": "whole model of this version",
    "no-config.pt": "whole model of this version",
    "sizes.pt": "whole model of this version",
    "vast.pt": "whole model of this version",
    "names.pt": "whole model of this version",
    "nan.pt": "out.bias isn't finite",
    "bits.pt": "n_bits must be 2 to 8, not 99",
    "tuned-adapter.pt": "of kind 'adapter'",
}

ADAPTERS = {  # --adapter, and the reason
    "missing.pt": "doesn't exist",
    "empty-adapter.pt": "damaged or not a checkpoint",
    "code-adapter.pt": "damaged or not a checkpoint",
    "tuned.pt": "of kind 'quantized'",
    "three-adapter.pt": "n_bits 3 instead of 4",
    "two-adapter.pt": "of edges",
    "other-adapter.pt": "other weights",
    "short-adapter.pt": "finite numbers",
    "nan-adapter.pt": "finite numbers",
    "text-adapter.pt": "finite numbers",
    "hollow-adapter.pt": "no quant_config",
}

STATES = {  # the --out of --resume, and the reason
    "no-state": "doesn't exist, so nothing can go on",
    "damaged-state": "damaged or not a checkpoint",
    "other-state": "of kind 'model'",
    "other-run": "a run with --bits 3 --lr 0.5;",
    "old-state": "a run with no --bits",
}

LONG = "long" * 100  # longer than the name of a file may be
FILES = [  # script, arguments, what the error names: words between |
    (sample, ["--adapter", "@tuned-adapter.pt"], "float"),
    (train, ["--base", "@tuned.pt"], "tuned.pt"),
    (train, ["--out", "@text"], "text"),
    (train, ["--out", "@text/below"], "text"),
    (train, ["--out", "/proc/none"], "/proc/none"),
    (train, ["--out", f"@{LONG}"], "long"),
    (sample, ["--steps", "1", "--out", "@empty"], "empty"),
    (sample, ["--steps", "1", "--out", "@text/a.png"], "text"),
    (sample, ["--steps", "1", "--out", "/proc/a.png"], "/proc/a.png"),
]
FILES += [(train, ["--subject", name], word) for name, word in SUBJECTS]
for name, reason in MODELS.items():
    FILES.append((train, ["--base", f"@{name}"], f"{name}|{reason}"))
    FILES.append((sample, ["--ckpt", f"@{name}"], f"{name}|{reason}"))
for name, reason in ADAPTERS.items():
    FILES.append((sample, ["--ckpt", "@tuned.pt", "--adapter", f"@{name}"], reason))
for name, reason in STATES.items():
    FILES.append((train, ["--resume", "--out", f"@{name}"], f"state.pt|{reason}"))


def files_in(folder):
    """All files in a folder and below it, but for the locks of runs."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def times_in(folder):
    """When each of these files was last written."""
    return {path: path.stat().st_mtime_ns for path in files_in(folder)}


def name_of(value):
    """The name of a case: the script, and its arguments."""
    if isinstance(value, list):
        return textwrap.shorten(" ".join(value), 60, placeholder="...")
    return getattr(value, "__name__", "")


@pytest.mark.parametrize("script, args, words", CHOICES + FILES, ids=name_of)
def test_wrong_choices_and_files_are_refused_by_name(
    script, args, words, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.chdir(tmp_path)
    before = times_in(files)
    args = [arg.replace("@", f"{files}/") for arg in args]
    assert_one_sentence(script, *args, capsys=capsys, words=words.split("|"))
    assert not files_in(tmp_path)
    assert times_in(files) == before


def test_no_code_in_a_checkpoint_has_run(files):
    for name in ("code.pt", "code-adapter.pt"):
        with pytest.raises(ValueError, match="damaged or not a checkpoint"):
            load(files / name, "model", "adapter")
    assert not (files / "ran").exists()


def test_more_processes_than_gpus_are_refused(tmp_path, capsys, monkeypatch):
    def take(gpu):
        pytest.fail(f"GPU {gpu} of two was taken")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", take)
    monkeypatch.setenv("LOCAL_RANK", "2")
    words = ["process 3", "2 here", "fewer processes"]
    assert_one_sentence(train, "--device", "cuda", capsys=capsys, words=words)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Flags that are empty or without effect, and half of what torchrun sets
# --------------------------------------------------------------------------------------------------

REFUSED = [
    # script, command, what the sentence names
    (train, "--bits 32 --buckets 1", "--buckets"),
    (train, "--bits 32 --buckets 2 --scales out", "--scales and --buckets"),
    (train, "--calibration rowcol --bits 32", "--calibration"),
    (train, "--subject=", "--subject"),
    (train, "--base=", "--base"),
    (train, "--out=", "--out"),
    (pretrain, "--out=", "--out"),
    (sample, "--ckpt=", "--ckpt"),
    (sample, "--adapter=", "--adapter"),
    (sample, "--out=", "--out"),
    (sample, "--packed", "--packed needs a quantized model"),
    *((script, f"--seed {2**32}", "--seed") for script in (train, pretrain, sample)),  # as seed 0
]
for flag in (  # pretraining has none of fine-tuning's own flags
    "bits 4",
    "scales out",
    "buckets 2",
    "calibration mse",
    "subject mo",
    "base data/base.pt",
    "prior 1",
    "sample-steps 1",
    "checkpoint",
):
    REFUSED.append((pretrain, f"--{flag}", f"--{flag}"))


@pytest.mark.parametrize("script, command, culprit", REFUSED)
def test_flags_that_are_empty_or_without_effect_are_refused(
    script, command, culprit, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for module, name in ((train, "finetune"), (pretrain, "pretrain"), (sample, "sample")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("it wasn't refused"))
    monkeypatch.setattr(train, "evaluate", lambda *_: (None, None))
    assert_one_sentence(script, *command.split(), capsys=capsys, words=[culprit])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "script, rank, world_size",
    [
        ("train.py", "1", None),
        ("train.py", None, "2"),
        ("train.py", "2", "2"),
        ("train.py", "a", "2"),
        ("pretrain.py", "0", None),
    ],
)
def test_half_of_what_torchrun_sets_is_refused(script, rank, world_size, tmp_path):
    environment = {"RANK": rank, "WORLD_SIZE": world_size}
    given = {name: value for name, value in environment.items() if value is not None}
    command = [sys.executable, ROOT / script, "--steps", "1"]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **given}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"RANK is {rank or 'not set'} and WORLD_SIZE is {world_size or 'not set'}" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())

"""Wrong input of every kind that a user can give.

Each gets one sentence that names the culprit, and exit code 2. No file is written or changed.
"""

import os
import struct
import zlib

import pytest
import torch
from conftest import run
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


def error_of(capsys):
    """The one line that a script has written to stderr, apart from progress bars."""
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("sampling:")]
    assert len(lines) == 1, lines
    return lines[0]


def assert_one_sentence(capsys, *words):
    """The error is one line for users, and all of words are in it."""
    error = error_of(capsys)
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
    assert run(script, *table, f"{flag}={value}") == 2
    assert_one_sentence(capsys, flag)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# A folder of all that is wrong
# --------------------------------------------------------------------------------------------------


def png_chunk(kind, body):
    checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(width, height, depth, color, data):
    """A PNG file of these header values, whatever they are."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        png_chunk(b"IDAT", zlib.compress(data)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


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
        "bits": {**base, "kind": "quantized", "quant_config": {"n_bits": 99}},
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
    tuned = {
        "kind": "quantized",
        "config": model.config,
        "quant_config": model.quant_config,
        "model": model.state_dict(),
    }
    save(tuned, folder / "tuned.pt")
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
    other_flags = {**flags, "bits": "3"}
    old_flags = {key: value for key, value in flags.items() if key != "bits"}
    other_run = {"kind": "fine-tuning", "args": other_flags}
    old = {"kind": "fine-tuning", "args": old_flags, "step": 3}
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

MODELS = [
    "missing.pt",
    "empty",
    "text",
    "nothing",
    "cut.pt",
    "code.pt",
    "list.pt",
    "hollow.pt",
    "old.pt",
    "no-config.pt",
    "sizes.pt",
    "vast.pt",
    "names.pt",
    "nan.pt",
    "bits.pt",
    "tuned-adapter.pt",
]

ADAPTERS = [
    "missing.pt",
    "empty-adapter.pt",
    "code-adapter.pt",
    "tuned.pt",
    "three-adapter.pt",
    "two-adapter.pt",
    "other-adapter.pt",
    "short-adapter.pt",
    "nan-adapter.pt",
    "text-adapter.pt",
    "hollow-adapter.pt",
]

STATES = [
    "no-state",
    "damaged-state",
    "other-state",
    "other-run",
    "old-state",
]

LONG = "long" * 100  # longer than the name of a file may be
FILES = [
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
FILES += [(train, ["--base", f"@{name}"], name) for name in MODELS]
FILES += [(sample, ["--ckpt", f"@{name}"], name) for name in MODELS]
FILES += [
    (sample, ["--ckpt", "@tuned.pt", "--adapter", f"@{name}"], "adapter") for name in ADAPTERS
]
FILES += [(train, ["--resume", "--out", f"@{name}"], "state.pt") for name in STATES]


def files_in(folder):
    """All files in a folder and below it, but for the locks of runs."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]


def times_in(folder):
    """When each of these files was last written."""
    return {path: path.stat().st_mtime_ns for path in files_in(folder)}


@pytest.mark.parametrize("script, args, word", CHOICES + FILES)
def test_wrong_choices_and_files_are_refused_by_name(
    script, args, word, files, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.chdir(tmp_path)
    before = times_in(files)
    args = [arg.replace("@", f"{files}/") for arg in args]
    assert run(script, *args) == 2
    assert_one_sentence(capsys, word)
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
    assert run(train, "--device", "cuda") == 2
    assert_one_sentence(capsys, "process 3", "2 here", "fewer processes")
    assert not list(tmp_path.iterdir())


def test_as_many_cases_are_tried_as_the_readme_says():
    assert len(NUMBERS) + len(CHOICES) + len(FILES) >= 150


# --------------------------------------------------------------------------------------------------
# And what isn't wrong
# --------------------------------------------------------------------------------------------------


def test_images_of_unusual_kinds_are_read_right(tmp_path):
    """Palette, 16 bits of color, transparency and CMYK are ordinary images."""
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    row = b"\0" + struct.pack(">HHH", 65535, 0, 0) * 16
    red.convert("P").save(tmp_path / "palette.png")
    red.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    (tmp_path / "sixteen.png").write_bytes(png(16, 16, 16, 2, row * 16))
    red.putalpha(255)
    red.save(tmp_path / "alpha.png")

    images, _ = toy.load_subject(tmp_path)
    assert images.shape == (4, 3, 16, 16)
    expected = torch.tensor([1.0, -1, -1]).view(3, 1, 1)
    assert (images - expected).abs().max() < 0.05

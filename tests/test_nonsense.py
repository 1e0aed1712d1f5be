"""Bad input, over all that a user can give: each gets one sentence that names the culprit, exit code 2, and leaves no file."""
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


def png(width, height, depth, color, data):
    """A PNG file of these header values, whatever they are."""
    chunk = lambda kind, body: struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


class Code:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder of all that is wrong; @name in the tables below is a path in it."""
    folder = tmp_path_factory.mktemp("wrong things")

    def subject(name, picture=None, **others):
        (folder / name).mkdir()
        Image.new("RGB", (16, 16)).save(folder / name / "0.png")
        if picture is not None:
            (folder / name / "1.png").write_bytes(picture)
        for other, content in others.items():
            (folder / name / f"{other}.txt").write_bytes(content.encode() if isinstance(content, str) else content)

    good = (BASE.parent / "subjects" / "mo" / "0.png").read_bytes()
    (folder / "empty").mkdir(), (folder / "text").write_text("no checkpoint"), (folder / "nothing").write_bytes(b"")
    (folder / "empty-adapter.pt").write_bytes(b"")
    subject("text-picture", b"no picture"), subject("no-bytes", b""), subject("cut-picture", good[:len(good) // 2])
    subject("bomb", png(20000, 20000, 1, 0, b"")), subject("no-pixels", png(0, 0, 8, 0, b""))
    subject("sixteen-bit", png(16, 16, 16, 0, bytes(33) * 16)), subject("animated")
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "blue")]
    frames[0].save(folder / "animated" / "1.png", save_all=True, append_images=frames[1:])
    subject("flipped", good[:60] + bytes([good[60] ^ 1]) + good[61:])
    subject("folder-picture"), (folder / "folder-picture" / "1.png").mkdir()
    subject("lost-link"), (folder / "lost-link" / "1.png").symlink_to(folder / "gone.png")
    (folder / "not-pictures").mkdir(), (folder / "not-pictures" / "notes.txt").write_text("on green stripes")
    subject("caption", **{"0": "on tartan"}), subject("long-caption", **{"0": "red " * 9999})
    subject("binary-caption", **{"0": b"\xff\xfe\x00"}), subject("folder-caption")
    (folder / "folder-caption" / "0.txt").mkdir()
    subject("parts", parts="body box\n"), subject("binary-parts", parts=b"\xff\xfe")
    subject("other-parts", parts="".join(f"{key} wings\n" for key in toy.KEYS))

    (folder / "cut.pt").write_bytes(BASE.read_bytes()[:100_000])
    base = load(BASE, "model")
    torch.save({"kind": "model", "config": Code(str(folder / "ran"))}, folder / "code.pt")
    torch.save({"kind": "adapter", "deltas": Code(str(folder / "ran"))}, folder / "code-adapter.pt")
    torch.save([1, 2], folder / "list.pt"), save({"kind": "model"}, folder / "hollow.pt")
    save({**base, "config": {"width": 3}}, folder / "old.pt"), save({**base, "config": None}, folder / "no-config.pt")
    save({**base, "config": {**base["config"], "channels": (60, 90)}}, folder / "sizes.pt")
    save({**base, "config": {**base["config"], "channels": (2**40, 2**40)}}, folder / "vast.pt")
    save({**base, "model": list(base["model"])}, folder / "names.pt")
    save({**base, "model": {**base["model"], "out.bias": torch.full((3,), float("nan"))}}, folder / "nan.pt")
    save({**base, "kind": "quantized", "quant_config": {"n_bits": 99}}, folder / "bits.pt")

    for name, bits, buckets, seed in (("tuned", 4, 1, None), ("three", 3, 1, None), ("two", 4, 2, None), ("other", 4, 1, 0)):
        model = load_model(BASE)
        if seed is not None:
            torch.nn.init.normal_(model.middle[0].conv1.weight)
        quantize(model, bits, buckets, calibration="minmax")
        mine = {"kind": "adapter", **adapter(model)}
        save(mine, folder / f"{name}-adapter.pt")
        if name == "tuned":
            save({"kind": "quantized", "config": model.config, "quant_config": model.quant_config,
                  "model": model.state_dict()}, folder / "tuned.pt")
            save({**mine, "deltas": mine["deltas"][1:]}, folder / "short-adapter.pt")
            save({**mine, "deltas": mine["deltas"] * float("nan")}, folder / "nan-adapter.pt")
            save({**mine, "deltas": "all of them"}, folder / "text-adapter.pt")
            save({"kind": "adapter"}, folder / "hollow-adapter.pt")

    for name in ("no-state", "damaged-state", "other-state", "other-run", "old-state"):
        (folder / name).mkdir()
    (folder / "damaged-state" / "state.pt").write_bytes(b"PK"), save(base, folder / "other-state" / "state.pt")
    args = runtime.describe(train.arguments(["--device", "cpu"]))
    save({"kind": "fine-tuning", "args": {**args, "bits": "3"}}, folder / "other-run" / "state.pt")
    del args["bits"]
    save({"kind": "fine-tuning", "args": args, "step": 3}, folder / "old-state" / "state.pt")
    return folder


NUMBERS = [(train, flag, value) for flag, values in {
    "--bits": (1, 9, -4, "four", "4.5", "nan", ""), "--buckets": (0, 1001, -1, 1.5, "nan", ""),
    "--steps": (-1, 10**8, "inf", "1e3"),
    "--lr": (-0.1, 11, "nan", "inf", "fast"), "--batch": (0, -8, 5000, "nan"), "--prior": (-1, "nan", "-inf", 1e3),
    "--sample-steps": (0, 1001), "--seed": (-1, 0.5, 2**70)}.items() for value in values]
NUMBERS += [(sample, flag, value) for flag, values in {
    "--n": (0, 1001, "all"), "--steps": (0, 1001, 2.5), "--cfg-scale": (-1, "nan", "inf"), "--seed": (-1, "nan")}.items()
    for value in values]
NUMBERS += [(tables, "--seeds", 0), (tables, "--seeds", "three"), (bench, "--rounds", 0), (bench, "--batches", "nan")]


@pytest.mark.parametrize("script, flag, value", NUMBERS)
def test_numbers(script, flag, value, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = {tables: ["subjects"], bench: ["speed"]}.get(script, [])
    assert run(script, *command, f"{flag}={value}") == 2
    one_sentence(capsys, flag)
    assert not list(tmp_path.iterdir())


def one_sentence(capsys, *words):
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.strip()]
    error, = [line for line in lines if not line.startswith("sampling:")]  # a progress bar
    assert "Traceback" not in error and ": [Errno" not in error and all(word in error for word in words), error


CHOICES = [
    (train, "--scales in", "--scales"), (train, "--calibration best", "rowcol"), (train, "--device tpu", "--device"),
    (train, "--colour", "--colour"), (train, "--compile", "compiler"), (pretrain, "--compile", "compiler"), (train, "surplus", "surplus"), (train, "--base", "--base"),
    (sample, "--sampler euler", "ddpm"), (sample, "--device tpu", "--device"), (sample, "--adapter", "--adapter"),
    (tables, "everything", "recovery"), (tables, "subjects --subjects mo", "bix"), (tables, "subjects mo", "ablations"),
    (bench, "taste", "speed"), (bench, "speed --sizes vast", "default"),
    (sample, "--prompt dragon", "dragon"), (sample, "--prompt=", "empty"), (sample, "--prompt=the", "empty"),
    (sample, "--prompt red,red,circle", "'red'"), (sample, "--prompt red\nred", "'red'"),
    (sample, f"--prompt {','.join(['circle'] * 5000)}", "'circle'"), (sample, "--prompt sks\0", "sks"),
]
SUBJECTS = [("nobody", "nobody"), ("@empty", "PNG or JPEG"), ("@text", "text"), ("@not-pictures", "PNG or JPEG"),
            *((f"@{name}", "1.png") for name in (
                "text-picture", "no-bytes", "cut-picture", "bomb", "no-pixels", "sixteen-bit", "animated", "flipped",
                "folder-picture", "lost-link")),
            *((f"@{name}", "0.txt") for name in ("caption", "long-caption", "binary-caption", "folder-caption")),
            *((f"@{name}", "parts.txt") for name in ("parts", "binary-parts", "other-parts"))]
MODELS = ("missing.pt", "empty", "text", "nothing", "cut.pt", "code.pt", "list.pt", "hollow.pt", "old.pt", "no-config.pt",
          "sizes.pt", "vast.pt", "names.pt", "nan.pt", "bits.pt", "tuned-adapter.pt")
ADAPTERS = ("missing.pt", "empty-adapter.pt", "code-adapter.pt", "tuned.pt", "three-adapter.pt", "two-adapter.pt",
            "other-adapter.pt", "short-adapter.pt", "nan-adapter.pt", "text-adapter.pt", "hollow-adapter.pt")
FILES = [
    *((train, f"--subject {name}", word) for name, word in SUBJECTS),
    *((train, f"--base @{name}", name) for name in (*MODELS, "tuned.pt")),
    *((sample, f"--ckpt @{name}", name) for name in MODELS),
    *((sample, f"--ckpt @tuned.pt --adapter @{name}", "adapter") for name in ADAPTERS),
    (sample, "--adapter @tuned-adapter.pt", "float"),
    *((train, f"--resume --out @{name}", "state.pt") for name in (
        "no-state", "damaged-state", "other-state", "other-run", "old-state")),
    (train, "--out @text", "text"), (train, "--out @text/below", "text"), (train, "--out /proc/none", "/proc/none"),
    (sample, "--steps 1 --out @empty", "empty"), (sample, "--steps 1 --out @text/a.png", "text"),
    (sample, "--steps 1 --out /proc/a.png", "/proc/a.png"), (train, f"--out @{'long' * 100}", "long"),
]


@pytest.mark.parametrize("script, command, word", CHOICES + FILES)
def test_files_and_choices(script, command, word, files, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no compiler
    monkeypatch.chdir(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in files.rglob("*") if path.name != "lock" and path.is_file()}
    assert run(script, *(arg.replace("@", f"{files}/").replace(",", " ") for arg in command.split(" ") if arg)) == 2
    one_sentence(capsys, word)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "lock"]
    assert before == {path: path.stat().st_mtime_ns for path in files.rglob("*") if path.name != "lock" and path.is_file()}


def test_more_processes_than_gpus(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: pytest.fail(f"GPU {gpu} of two was taken"))
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert run(train, "--device", "cuda") == 2
    one_sentence(capsys, "process 3", "2 here", "fewer processes")
    assert not list(tmp_path.iterdir())


def test_there_are_enough():
    assert len(NUMBERS) + len(CHOICES) + len(FILES) >= 150  # as README.md says


def test_pictures_of_other_kinds_are_read_right(tmp_path):
    """Palette, one bit, 16 bits of color, transparency and CMYK are ordinary pictures."""
    color = Image.new("RGB", (16, 16), (255, 0, 0))
    color.convert("P").save(tmp_path / "palette.png"), color.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    (tmp_path / "sixteen.png").write_bytes(png(16, 16, 16, 2, (b"\0" + struct.pack(">HHH", 65535, 0, 0) * 16) * 16))
    color.putalpha(255), color.save(tmp_path / "alpha.png")
    images, _ = toy.load_subject(tmp_path)
    assert images.shape == (4, 3, 16, 16)
    assert (images - torch.tensor([1.0, -1, -1]).view(3, 1, 1)).abs().max() < 0.05

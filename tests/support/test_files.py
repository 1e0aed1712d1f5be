"""Files are written whole or not at all, and what isn't whole, or not ours, isn't loaded."""

import os
import random
import re
import resource
import shutil
import zipfile

import pytest
import torch
from conftest import contents_of, error_of
from PIL import Image

import sample
import train
from quant import adapter, quantize
from sample import BASE, load_model
from support.files import file_size, hash_of, load, save

HELD = {  # tensors and plain values, as checkpoints hold them
    "kind": "model",
    "a": torch.linspace(0, 1, 30),
    "b": {"c": torch.arange(9), "d": (1, 2.5, "x"), "e": [torch.ones((), dtype=torch.float16)]},
    "f": None,
}


@pytest.fixture
def path(tmp_path):
    """A file that holds HELD."""
    save(HELD, tmp_path / "a.pt")
    return tmp_path / "a.pt"


def same(a, b):
    """True if two nested dicts, lists and tuples hold the same tensors and values."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


# --------------------------------------------------------------------------------------------------
# Saving
# --------------------------------------------------------------------------------------------------


def test_what_is_saved_is_loaded_again(path):
    assert same(load(path, "adapter", "model"), HELD)
    assert os.listdir(path.parent) == ["a.pt"]


def test_an_error_while_writing_leaves_the_old_file_and_nothing_else(path):
    def local():  # can't be pickled
        pass

    with pytest.raises(AttributeError):
        save({"kind": "model", "x": local}, path)
    assert same(load(path, "model"), HELD)
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_full_disk_leaves_the_old_file_and_nothing_else_wherever_it_ends(path):
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(0, len(before), len(before) // 5):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(ValueError, match=r"a.pt can't be written .*; make room"):
                save(HELD, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["a.pt"]


def test_what_a_killed_run_has_left_is_overwritten(path):
    (path.parent / "a.pt.tmp").write_bytes(b"half of a file")
    save({"kind": "model"}, path)
    assert load(path, "model") == {"kind": "model"}
    assert os.listdir(path.parent) == ["a.pt"]


def test_a_path_that_cannot_be_written_is_one_sentence(path):
    (path.parent / "folder").mkdir()
    for wrong in (path / "b.pt", path.parent / ("b" * 300), path.parent / "folder"):
        with pytest.raises(ValueError, match=r"can't be written \(.*\); .*give another path"):
            save(HELD, wrong)
    assert sorted(os.listdir(path.parent)) == ["a.pt", "folder"]


def test_an_image_is_saved_in_folders_that_are_made(tmp_path):
    save(Image.new("RGB", (8, 8)), tmp_path / "deep" / "a.picture")
    assert Image.open(tmp_path / "deep" / "a.picture").size == (8, 8)


def test_file_size_is_that_of_the_file(path):
    assert file_size({**HELD, "checksum": hash_of(HELD)}) == path.stat().st_size


# --------------------------------------------------------------------------------------------------
# The hash
# --------------------------------------------------------------------------------------------------

CHANGES = [
    {"a": HELD["a"].double()},
    {"a": HELD["a"].view(torch.int32)},  # the same bytes
    {"a": HELD["a"].view(2, 15)},
    {"a": HELD["a"].nextafter(torch.tensor(9.0))},
    {"a": HELD["a"].tolist()},
    {"b": {"c": HELD["b"]["c"]}},
    {"b": {**HELD["b"], "d": [1, 2.5, "x"]}},
    {"b": {**HELD["b"], "d": (1, 2.5, "y")}},
    {"b": {**HELD["b"], "e": []}},
    {"f": 0},
    {"g": 1},
]


def test_the_hash_tells_every_change_of_a_name_a_type_or_a_value():
    hashes = [hash_of(HELD), *(hash_of({**HELD, **change}) for change in CHANGES)]
    assert len(set(hashes)) == len(hashes)


def test_the_hash_is_of_values_and_not_of_how_they_lie_in_memory():
    a = torch.randn(4, 6)
    assert hash_of({"a": a}) == hash_of({"a": a.t().contiguous().t()})
    assert hash_of({"a": a}) == hash_of({"a": torch.nn.Parameter(a)})


def test_the_base_that_ships_is_the_one_of_the_published_results():
    assert hash_of(load(BASE, "model")) == (
        "91c237033414cc4c144382dc1dc494c416d68404fe31d698a161b35c40aa0ddd"
    )


# --------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------


def cuts(good):
    """The file, cut at any place."""
    chance = random.Random(0)
    return [good[: chance.randrange(len(good))] for _ in range(20)] + [b""]


def flips(good):
    """The file with one bit that is another, somewhere, and in the directory at its end.

    Bit 4 of byte 38 of an entry there makes it a folder, which passes Python's checks, and torch
    then reads nothing.
    """
    chance = random.Random(0)
    places = [8 * (entry.start() + 38) + 4 for entry in re.finditer(b"PK\x01\x02", good)]
    directory = good.index(b"PK\x01\x02")
    places += chance.sample(range(8 * directory), 100)
    places += chance.sample(range(8 * directory, 8 * len(good)), 100)
    for place in places:
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        yield bytes(damaged)


def fillings(good):
    """The file with zeros or foreign bytes in the place of some."""
    chance = random.Random(0)
    for fill in (b"\0", b"PK"):
        for _ in range(10):
            start = chance.randrange(len(good) - 64)
            yield good[:start] + fill * (64 // len(fill)) + good[start + 64 :]


@pytest.mark.parametrize("damage", [cuts, flips, fillings])
def test_a_damaged_file_is_refused_in_one_line_or_holds_what_it_held(damage, path):
    refused = 0
    for damaged in damage(path.read_bytes()):
        path.write_bytes(damaged)
        try:
            found = load(path, "model")
        except ValueError as error:
            assert re.fullmatch(r".*a.pt is damaged, or not a checkpoint .*", str(error))
            assert len(str(error)) < 400
            refused += 1
        else:  # the damage is where nothing is read
            assert same(found, HELD)
    assert refused > 10


def test_a_file_whose_contents_were_replaced_is_refused(path):
    written = torch.load(path, weights_only=True)
    for change in CHANGES:
        torch.save({**written, **change}, path)
        with pytest.raises(ValueError, match="its checksum is another"):
            load(path, "model")
    torch.save(HELD, path)
    with pytest.raises(ValueError, match="damaged, or not a checkpoint"):
        load(path, "model")


class Code:
    """What makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_foreign_files_are_refused_and_no_code_in_them_runs(tmp_path):
    torch.save({**HELD, "code": Code(tmp_path / "ran")}, tmp_path / "code.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    Image.new("RGB", (8, 8)).save(tmp_path / "image.pt", "png")
    (tmp_path / "text.pt").write_text("no checkpoint")
    (tmp_path / "folder.pt").mkdir()
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as file:
        file.writestr("data.pkl", b"")
    for file in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{file.name} is damaged, or not a checkpoint"):
            load(file, "model")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_missing_or_of_another_kind_are_refused(path):
    with pytest.raises(ValueError, match=r"b.pt doesn't exist; .* \(model or quantized\)"):
        load(path.parent / "b.pt", "model", "quantized")
    with pytest.raises(ValueError, match="a.pt is of kind 'model'; give one of kind adapter"):
        load(path, "adapter")


# --------------------------------------------------------------------------------------------------
# What a script reads
# --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with a base, a quantized model, its adapter, and files that aren't what they say."""
    folder = tmp_path_factory.mktemp("files")
    base = load(BASE, "model")
    shutil.copy(BASE, folder / "base.pt")
    (folder / "cut.pt").write_bytes(BASE.read_bytes()[:100_000])
    for kind in ("model", "adapter"):
        save({"kind": kind}, folder / f"hollow {kind}.pt")
    wrong = {
        "no config": {"config": None},
        "old": {"config": {"width": 3}},
        "sizes": {"config": {**base["config"], "channels": (60, 90)}},
        "vast": {"config": {**base["config"], "channels": (2**40, 2**40)}},
        "other sizes": {"config": {**base["config"], "channels": (64, 64)}},
        "names": {"model": list(base["model"])},
    }
    for name, change in wrong.items():
        save({**base, **change}, folder / f"{name}.pt")

    model = quantize(load_model(BASE), 4, calibration="minmax")
    save(contents_of(model), folder / "tuned.pt")
    save({"kind": "adapter", **adapter(model)}, folder / "adapter.pt")
    for key, value in {"n_bits": 99, "edges": [1000, 0], "keep8": 3}.items():
        config = {**model.quant_config, key: value}
        save({**contents_of(model), "quant_config": config}, folder / f"wrong {key}.pt")
    other = quantize(load_model(BASE), 3, calibration="minmax")
    save({"kind": "adapter", **adapter(other)}, folder / "adapter of 3 bits.pt")
    return folder


MODELS = {  # for --base and --ckpt, and a part of the sentence
    "missing.pt": "doesn't exist",
    "cut.pt": "is damaged",
    "adapter.pt": "is of kind 'adapter'",
    "hollow model.pt": "isn't a model of this version",
    "no config.pt": "isn't a model of this version",
    "old.pt": "isn't a model of this version",
    "sizes.pt": "isn't a model of this version",
    "vast.pt": "isn't a model of this version",
    "other sizes.pt": "isn't a model of this version",
    "names.pt": "isn't a model of this version",
}
QUANTIZED = {  # for --ckpt
    "wrong n_bits.pt": "isn't a model of this version",
    "wrong edges.pt": "isn't a model of this version",
    "wrong keep8.pt": "isn't a model of this version",
}
ADAPTERS = {  # for --adapter
    "missing.pt": "doesn't exist",
    "cut.pt": "is damaged",
    "tuned.pt": "is of kind 'quantized'",
    "hollow adapter.pt": "adapter",
    "adapter of 3 bits.pt": "n_bits",
}


@pytest.fixture
def refuse(files, tmp_path, capsys, monkeypatch):
    """A function: each file of cases is refused in one sentence, and nothing is written."""

    def check(cases, script, *flags):
        for name, reason in cases.items():
            assert reason in error_of(script, *flags, files / name, capsys=capsys), name
        assert not list(tmp_path.iterdir())

    monkeypatch.chdir(tmp_path)
    return check


def test_no_base_is_trained_that_is_not_a_whole_float_model(refuse):
    refuse({**MODELS, "tuned.pt": "is of kind 'quantized'"}, train, "--base")


def test_no_checkpoint_is_drawn_from_that_is_not_a_whole_model(refuse):
    refuse({**MODELS, **QUANTIZED}, sample, "--ckpt")


def test_no_adapter_is_put_on_that_does_not_fit(files, refuse):
    refuse(ADAPTERS, sample, "--ckpt", files / "tuned.pt", "--adapter")
    refuse({"adapter.pt": "need a quantized model"}, sample, "--adapter")


def test_sampling_does_not_replace_what_it_reads(files, tmp_path, capsys):
    ckpt = shutil.copy(files / "tuned.pt", tmp_path)
    adapter_file = shutil.copy(files / "adapter.pt", tmp_path)
    for out in (ckpt, adapter_file):
        with open(out, "rb") as file:
            before = file.read()
        error = error_of(
            sample, "--ckpt", ckpt, "--adapter", adapter_file, "--out", out, capsys=capsys
        )
        assert f"--out would replace {out}" in error
        with open(out, "rb") as file:
            assert file.read() == before

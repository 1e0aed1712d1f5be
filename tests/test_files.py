"""Files: what is read is whole and no larger than it says, and what is yours stays as it is."""

import contextlib
import copy
import os
import random
import re
import resource
import shutil
import signal
import socket
import stat
import subprocess
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import contents_of, error_of, run, spread
from PIL import Image

import pretrain
import runtime
import sample
import train
from data import toy
from model import UNet
from quant import QuantLayer, adapter, check_adapter, deltas, merge, quantize
from runtime import BASE, load, load_model, save

MO = BASE.parent / "subjects" / "mo"
SHORTEST = ("--steps", 1, "--batch", 1, "--sample-steps", 1, "--calibration", "minmax")
SHORTEST = (*SHORTEST, "--device", "cpu")


@contextlib.contextmanager
def within(seconds):
    """Fail if it takes longer: what waits for a FIFO waits for ever."""

    def too_long(*_):
        pytest.fail(f"not done in {seconds} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# --------------------------------------------------------------------------------------------------
# Saving and loading


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.pt"
    save({"kind": "model", "x": torch.ones(3)}, path)
    assert torch.equal(load(path, "model")["x"], torch.ones(3))
    assert names_in(tmp_path) == ["a.pt"]

    def local():  # can't be pickled
        pass

    with pytest.raises(AttributeError):
        save({"kind": "model", "x": local}, path)
    assert torch.equal(load(path, "model")["x"], torch.ones(3))  # the old file is still there
    assert names_in(tmp_path) == ["a.pt"]  # and nothing else


def test_files_that_are_damaged_missing_or_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "a.pt"
    save({"kind": "model", "x": torch.ones(3)}, path)
    first_bytes = path.read_bytes()[:200]
    for content in (first_bytes, b"", b"text"):
        (tmp_path / "b.pt").write_bytes(content)
        with pytest.raises(ValueError, match="damaged"):
            load(tmp_path / "b.pt", "model")
    with pytest.raises(ValueError, match="exist"):
        load(tmp_path / "c.pt", "model")
    with pytest.raises(ValueError, match="kind adapter"):
        load(path, "adapter")


def test_a_checkpoint_keeps_its_buckets(tmp_path):
    edges = [0, 100, 1000]
    torch.manual_seed(0)
    model = UNet(channels=(16, 32), attention=(1,), c_emb=32, c_words=16)
    torch.nn.init.normal_(model.out.weight, std=0.1)
    spread(quantize(model, 4, 2, edges=edges))
    save(contents_of(model), tmp_path / "a.pt")
    again = load_model(tmp_path / "a.pt")
    assert again.quant_config == model.quant_config
    assert again.quant_config["edges"] == edges
    assert any(isinstance(module, QuantLayer) for module in again.modules())

    x = torch.randn(1, 3, 8, 8)
    words = torch.ones(1, toy.SLOTS, dtype=torch.long)
    low = merge(model, 0)
    high = merge(model, 1)
    assert not torch.allclose(low(x, torch.tensor([99]), words), high(x, torch.tensor([99]), words))
    for t, plain in ((99, low), (100, high)):
        t = torch.tensor([t])
        torch.testing.assert_close(again(x, t, words), plain(x, t, words))


# --------------------------------------------------------------------------------------------------
# Checksums


def same(a, b):
    """True if two nested dicts hold the same tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_a_flipped_bit_even_in_the_zips_directory_is_refused_or_changes_nothing(tmp_path):
    """Some flips pass Python's checks, and torch then reads nothing.

    Such a flip makes a member of the zip a folder: bit 4 of byte 38 of its entry in the directory.
    """
    torch.manual_seed(0)
    path = tmp_path / "a.pt"
    held = {"kind": "model", "a": torch.randn(30), "b": {"c": torch.arange(9), "d": (1, 2.5, "x")}}
    save(held, path)
    good = path.read_bytes()
    directory = zipfile.ZipFile(path).start_dir
    entries = [match.start() for match in re.finditer(b"PK\x01\x02", good)]
    assert min(entries) == directory
    places = [8 * (entry + 38) + 4 for entry in entries]
    chance = random.Random(0)
    places += chance.sample(range(8 * directory), 200)
    places += chance.sample(range(8 * directory, 8 * len(good)), 200)
    refused = 0
    for place in places:
        damaged = bytearray(good)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found = load(path, "model")
        except ValueError:
            refused += 1
        else:
            assert same(found, held), place
    assert refused > 100


def test_a_checkpoint_whose_values_or_names_were_changed_is_refused(tmp_path):
    path = tmp_path / "a.pt"
    held = {"kind": "model", "a": torch.ones(6), "b": {"c": 1.5}, "d": None}
    save(held, path)
    assert same(load(path, "model"), held)
    whole = torch.load(path, weights_only=True)
    changes = [
        {"a": torch.ones(6).double()},
        {"a": torch.ones(2, 3)},
        {"a": torch.tensor([1.0, 1, 1, 1, 1, 1.0000001])},
        {"b": {"e": 1.5}},
        {"b": {"c": 1.25}},
        {"d": 0},
        {"new": 1},
    ]
    for change in changes:
        torch.save({**whole, **change}, path)
        with pytest.raises(ValueError, match="damaged"):
            load(path, "model")
    del whole["checksum"]
    torch.save(whole, path)
    with pytest.raises(ValueError, match="no checksum"):
        load(path, "model")


def test_the_base_that_ships_is_the_one_of_the_published_results():
    base = torch.load(BASE, weights_only=True)
    assert base["checksum"] == runtime.checksum(load(BASE, "model"))
    assert base["checksum"] == "91c237033414cc4c144382dc1dc494c416d68404fe31d698a161b35c40aa0ddd"


# --------------------------------------------------------------------------------------------------
# A full disk, a full memory


def test_a_full_disk_is_one_sentence_wherever_it_ends(tmp_path):
    path = tmp_path / "state.pt"
    state = {"kind": "model"}
    for i in range(20):
        state[str(i)] = torch.full((5000,), float(i))
    save(state, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for room in range(1, len(before), 7_001):
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            with pytest.raises(ValueError, match=r"state.pt can't be written .*; make room"):
                save(state, path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.read_bytes() == before
        assert os.listdir(tmp_path) == ["state.pt"]


def no_memory_in_python():
    bytearray(2**60)


def no_memory_in_torch():
    torch.empty(2**60, dtype=torch.uint8)


def no_memory_on_a_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize("main", [no_memory_in_python, no_memory_in_torch, no_memory_on_a_gpu])
def test_too_little_memory_is_one_sentence(main, capsys):
    script = Namespace(__name__="script", main=main)
    assert "too little memory; lower --batch" in error_of(script, capsys=capsys)


@pytest.mark.parametrize("error", [RuntimeError("boom"), TypeError("boom")])
def test_a_fault_of_the_code_is_not_made_a_sentence(error):
    def main():
        raise error

    with pytest.raises(type(error), match="boom"):
        run(Namespace(__name__="script", main=main))


# --------------------------------------------------------------------------------------------------
# Going on from a state


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a base, a subject and a finished run, and the flags of that run."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(BASE, folder / "base.pt")
    shutil.copytree(MO, folder / "subject")
    flags = ("--base", folder / "base.pt", "--subject", folder / "subject", "--out", folder / "out")
    flags = (*SHORTEST, *flags)
    assert run(train, *flags) == 0
    return folder, flags


@contextlib.contextmanager
def put_back(path):
    """Put a file's bytes back afterwards."""
    before = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(before)


def test_other_weights_at_the_same_path_are_not_resumed(finished, capsys):
    folder, flags = finished
    with put_back(folder / "base.pt"):
        base = load(BASE, "model")
        base["model"]["out.bias"][0] += 0.5
        save(base, folder / "base.pt")
        error = error_of(train, *flags, "--resume", capsys=capsys)
    assert "--base had other contents" in error


@pytest.mark.parametrize("name", ["0.png", "0.txt"])
def test_other_images_or_captions_at_the_same_path_are_not_resumed(name, finished, capsys):
    folder, flags = finished
    with put_back(folder / "subject" / name):
        shutil.copy(MO / f"4{name[1:]}", folder / "subject" / name)
        error = error_of(train, *flags, "--resume", capsys=capsys)
    assert "--subject had other contents" in error


def test_another_number_of_processes_is_not_resumed(finished, capsys, monkeypatch):
    _, flags = finished
    monkeypatch.setattr(runtime, "WORLD_SIZE", 2)
    error = error_of(train, *flags, "--resume", capsys=capsys)
    assert "--nproc-per-node 1" in error


def test_the_same_contents_are_resumed(finished, capsys):
    _, flags = finished
    assert run(train, *flags, "--resume") == 0


def test_a_run_that_has_no_state_is_told_to_start(finished, tmp_path, capsys):
    _, flags = finished
    error = error_of(train, *flags[:-1], tmp_path / "new", "--resume", capsys=capsys)
    assert "state.pt doesn't exist, so nothing can go on; start without --resume" in error


def test_flags_of_the_other_run_are_named_as_they_are_typed(finished, capsys):
    _, flags = finished
    error = error_of(train, *flags, "--train-words", "--resume", capsys=capsys)
    assert "a run with no --train-words;" in error


def test_what_a_state_says_about_its_run_is_shortened(finished, capsys):
    folder, flags = finished
    path = folder / "out" / "state.pt"
    with put_back(path):
        state = load(path, "fine-tuning")
        save({**state, "args": {**state["args"], "lr": "9\n" * 10_000}}, path)
        assert len(error_of(train, *flags, "--resume", capsys=capsys)) < 400


def test_a_state_that_says_nothing_of_its_run_is_refused(finished, capsys):
    folder, flags = finished
    path = folder / "out" / "state.pt"
    with put_back(path):
        state = load(path, "fine-tuning")
        for wrong in ({"args": [1, 2]}, {"inputs": "all of them"}, {"inputs": {}}):
            save({**state, **wrong}, path)
            error = error_of(train, *flags, "--resume", capsys=capsys)
            assert "whole state of this version" in error


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """Of a run of two steps: its arguments, its state, the subject, a fresh model."""
    folder = tmp_path_factory.mktemp("stopped")
    flags = ("--steps", 2, "--batch", 2, "--device", "cpu", "--out", folder)
    args = train.arguments([str(flag) for flag in flags])
    subject = toy.load_subject(MO)
    model = quantize(load_model(BASE), 4, 1, calibration="minmax")
    train.finetune(copy.deepcopy(model), args, *subject)
    return args, load(folder / "state.pt", "fine-tuning"), subject, model


def without(key):
    def damage(state):
        del state[key]

    return damage


def with_value(value, *keys):
    """Put value at state[key][key]..."""

    def damage(state):
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return damage


FIRST = "time.0.d_out_0"  # a delta (128,)
DAMAGES = {
    "no step": without("step"),
    "no deltas": without("trained"),
    "no optimizer": without("optimizer"),
    "no generator": without("generator"),
    "a step of another kind": with_value("two", "step"),
    "a negative step": with_value(-1, "step"),
    "a delta that is missing": lambda state: state["trained"].pop(FIRST),
    "a delta too many": with_value(torch.zeros(3), "trained", "extra"),
    "a delta that would broadcast": with_value(torch.ones(1), "trained", FIRST),
    "a NaN": with_value(torch.full((128,), torch.nan), "trained", FIRST),
    "a number": with_value(1.0, "trained", FIRST),
    "moments that are missing": lambda state: state["optimizer"]["state"][0].pop("exp_avg_sq"),
    "moments that would broadcast": with_value(torch.ones(1), "optimizer", "state", 0, "exp_avg"),
    "moments of another shape": with_value(torch.ones(9), "optimizer", "state", 0, "exp_avg"),
    "infinite moments": with_value(torch.tensor(torch.inf), "optimizer", "state", 0, "step"),
    "moments of no parameter": with_value({}, "optimizer", "state", 9999),
    "groups of another version": lambda state: state["optimizer"]["param_groups"][0].pop("eps"),
    "other betas": with_value((0.5, 0.5), "optimizer", "param_groups", 0, "betas"),
    "no groups": with_value([], "optimizer", "param_groups"),
    "a generator of no bytes": with_value(torch.zeros(0, dtype=torch.uint8), "generator"),
    "a generator of zeros": with_value(torch.zeros(5056, dtype=torch.uint8), "generator"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_malformed_state_is_one_sentence_and_changes_nothing(damage, stopped):
    args, state, subject, model = stopped
    state = copy.deepcopy(state)
    DAMAGES[damage](state)
    with pytest.raises(ValueError, match="whole state of this version; start again"):
        train.finetune(model, args, *subject, state)
    for delta in deltas(model).values():
        assert not delta.any()


def test_the_malformed_states_are_malformed_in_one_place(stopped):
    """The state itself can be resumed, and a state beyond --steps names its step."""
    args, state, subject, model = stopped
    train.finetune(copy.deepcopy(model), args, *subject, copy.deepcopy(state))
    with pytest.raises(ValueError, match="at step 2 already; give --steps at least"):
        shorter = Namespace(**{**vars(args), "steps": 1})
        train.finetune(copy.deepcopy(model), shorter, *subject, copy.deepcopy(state))


def test_a_malformed_state_of_pretraining_is_one_sentence(tmp_path, capsys, no_scores):
    flags = ("--steps", 1, "--batch", 1, "--device", "cpu", "--out", tmp_path)
    assert run(pretrain, *flags) == 0
    capsys.readouterr()
    state = load(tmp_path / "state.pt", "pretraining")
    damages = [
        {"ema": {}},
        {"model": {**state["model"], "out.bias": torch.ones(1)}},
        {"ema": {**state["ema"], "out.bias": torch.full((3,), torch.nan)}},
        {"optimizer": {"state": {}, "param_groups": []}},
    ]
    for damage in damages:
        save({**state, **damage}, tmp_path / "state.pt")
        error = error_of(pretrain, *flags, "--resume", capsys=capsys)
        assert "whole state of this version" in error


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adapter.pt", "tuned.pt", "state.pt"])
def test_a_flipped_bit_of_a_runs_file_is_refused_or_changes_nothing(name, finished, tmp_path):
    kinds = ("adapter", "quantized", "fine-tuning")
    path = finished[0] / "out" / name
    held = load(path, *kinds)
    good = path.read_bytes()
    chance = random.Random(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(good)
        place = chance.randrange(len(good))
        damaged[place] ^= 1 << chance.randrange(8)
        (tmp_path / name).write_bytes(damaged)
        try:
            found = load(tmp_path / name, *kinds)
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
            continue
        assert same(found, held), place
    assert refused > 30


# --------------------------------------------------------------------------------------------------
# The user's files


def test_only_leftovers_of_killed_runs_are_removed(finished, monkeypatch):
    folder, flags = finished
    ended = subprocess.Popen(["true"])
    ended.wait()
    gone = [f"{name}.{ended.pid}.tmp" for name in ("state.pt", "tuned.pt", "grid.png")]
    gone.append(f"adapter.pt.{os.getpid()}.tmp")  # in a container, every run may have this number
    kept = [
        "notes.tmp",
        f"thesis.pt.{ended.pid}.tmp",
        f"state.pt.{os.getppid()}.tmp",  # of a process that still runs
        "state.pt.tmp",
        "state.pt.12345678901234567890.tmp",
    ]
    args = train.arguments([str(flag) for flag in (*flags, "--resume")])
    for name in gone + kept:
        (args.out / name).write_text("mine")
    try:
        monkeypatch.setattr(runtime, "RANK", 1)  # not the process that holds the lock
        runtime.load_state(args, "fine-tuning")
        assert {path.name for path in args.out.glob("*.tmp")} == {*gone, *kept}
        monkeypatch.setattr(runtime, "RANK", 0)
        runtime.load_state(args, "fine-tuning")
        assert {path.name for path in args.out.glob("*.tmp")} == set(kept)
    finally:
        for path in args.out.glob("*.tmp"):
            path.unlink()


def test_a_file_named_lock_keeps_its_contents(tmp_path):
    (tmp_path / "lock").write_text("the combination is 1-2-3")
    runtime.claim(tmp_path).close()
    assert (tmp_path / "lock").read_text() == "the combination is 1-2-3"


def test_a_link_or_a_fifo_named_lock_is_refused(tmp_path):
    (tmp_path / "diary").write_text("dear diary")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "lock").symlink_to(tmp_path / "diary")
    (tmp_path / "b").mkdir()
    os.mkfifo(tmp_path / "b" / "lock")
    for name in ("a", "b"):
        with within(10), pytest.raises(ValueError, match="lock is not the lock of a run"):
            runtime.claim(tmp_path / name)
    assert (tmp_path / "diary").read_text() == "dear diary"


def test_a_path_through_a_file_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "a.pt", tmp_path / ("a" * 300)):
        with pytest.raises(ValueError, match="can't be written"):
            save({"kind": "model"}, path)


def test_a_file_keeps_its_mode_and_a_link_its_target(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(b"")
    secret.chmod(0o600)
    (tmp_path / "link.png").symlink_to(secret)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "new.png").symlink_to(tmp_path / "elsewhere" / "new.png")  # isn't there yet
    for name in ("secret.png", "link.png", "new.png"):
        save(Image.new("RGB", (8, 8)), tmp_path / name, runtime.write_png)
        assert Image.open(tmp_path / name).size == (8, 8)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "new.png").is_symlink()
    assert len(list(tmp_path.rglob("*"))) == 5


def test_no_device_fifo_or_socket_is_replaced(tmp_path, capsys):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket"))
    names = ["fifo", "link", "socket"]
    if os.geteuid() == 0:
        os.mknod(tmp_path / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
        names.append("null")
    before = [os.lstat(tmp_path / name).st_mode for name in names]
    for name in names:
        with within(60):
            flags = ("--n", 1, "--steps", 1, "--device", "cpu", "--out", tmp_path / name)
            assert "give the path of a file" in error_of(sample, *flags, capsys=capsys)
    assert [os.lstat(tmp_path / name).st_mode for name in names] == before
    assert sorted(os.listdir(tmp_path)) == sorted(names)
    server.close()


@pytest.mark.parametrize("flag", ["--ckpt", "--adapter"])
def test_sampling_does_not_replace_what_it_reads(flag, finished, tmp_path, capsys):
    folder, _ = finished
    files = {"--ckpt": tmp_path / "tuned.pt", "--adapter": tmp_path / "adapter.pt"}
    for path in files.values():
        shutil.copy(folder / "out" / path.name, path)
    before = files[flag].read_bytes()
    flags = ["--n", 1, "--steps", 1, "--device", "cpu"]
    for item in files.items():
        flags += item
    error = error_of(sample, *flags, "--out", files[flag], capsys=capsys)
    assert f"--out is the same file as {flag}" in error
    assert files[flag].read_bytes() == before


def test_images_of_other_formats_are_counted(tmp_path, capsys):
    shutil.copytree(MO, tmp_path / "subject")
    for name in ("a.webp", "b.WEBP", "c.heic", ".d.webp", "e.doc"):
        (tmp_path / "subject" / name).write_bytes(b"")
    run(train, "--subject", tmp_path / "subject", "--base", "missing.pt", "--out", tmp_path / "out")
    assert "only PNG and JPEG files are used, not these: 2 .webp, 1 .heic\n" in (
        capsys.readouterr().out
    )
    run(train, "--base", "missing.pt", "--out", tmp_path / "out")
    assert capsys.readouterr().out == ""


def test_a_run_does_not_write_into_its_subject_or_over_its_base(tmp_path, capsys):
    shutil.copytree(MO, tmp_path / "subject")
    (tmp_path / "link").symlink_to(tmp_path / "subject")
    before = sorted(os.listdir(tmp_path / "subject"))
    for out in ("subject", "link"):
        flags = ("--subject", tmp_path / "subject", "--out", tmp_path / out)
        assert "--out is the folder of --subject" in error_of(
            train, *SHORTEST, *flags, capsys=capsys
        )
    assert sorted(os.listdir(tmp_path / "subject")) == before

    (tmp_path / "full").mkdir()
    base = tmp_path / "full" / "tuned.pt"  # as 32 bits leave it
    shutil.copy(BASE, base)
    before = base.read_bytes()
    flags = ("--base", base, "--out", tmp_path / "full")
    assert "--base is in --out" in error_of(train, *SHORTEST, *flags, capsys=capsys)
    assert base.read_bytes() == before


# --------------------------------------------------------------------------------------------------
# Sizes before values, and nothing but files


def test_no_model_is_built_that_is_larger_than_its_file(tmp_path, monkeypatch):
    base = load(BASE, "model")
    path = tmp_path / "large.pt"
    built = []

    class Spy(runtime.UNet):
        def __init__(self, **config):
            super().__init__(**config)
            built.extend(p.device.type for p in self.parameters())

    monkeypatch.setattr(runtime, "UNet", Spy)
    for change in ({"channels": (512, 512)}, {"blocks": 100}, {"vocab": 10**6}):
        save({**base, "config": {**base["config"], **change}}, path)
        with pytest.raises(ValueError, match="whole model .*(more parameters|more layers)"):
            load_model(path)
    assert set(built) == {"meta"}


@pytest.fixture(scope="module")
def quantized():
    """The dict of a tuned.pt."""
    return contents_of(quantize(load_model(BASE), 4, calibration="minmax"))


@pytest.mark.parametrize(
    "change",
    [
        {"keep8": ["out"] * 100_000},
        {"edges": [float(edge) for edge in range(100_000)]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_quantizer_larger_than_its_file_is_refused(change, quantized, tmp_path):
    path = tmp_path / "a.pt"
    save({**quantized, "quant_config": {**quantized["quant_config"], **change}}, path)
    with within(15), pytest.raises(ValueError, match="whole model .*more layers"):
        load_model(path)


def test_a_quantizer_of_another_version_is_refused(quantized, tmp_path):
    path = tmp_path / "a.pt"
    whole = quantized["quant_config"]
    others = [{**whole, "keep_float": ["nothing.*"]}]
    for key in whole:
        others.append({name: value for name, value in whole.items() if name != key})
    for config in others:
        save({**quantized, "quant_config": config}, path)
        with pytest.raises(ValueError, match="doesn't hold a whole model"):
            load_model(path)


def test_compressed_zeros_are_refused(tmp_path):
    save({"kind": "model", "zeros": torch.zeros(2**22)}, tmp_path / "plain.pt")
    plain = zipfile.ZipFile(tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / "bomb.pt").stat().st_size < 100_000
    with pytest.raises(ValueError, match="a member is compressed"):
        load(tmp_path / "bomb.pt", "model")


def test_a_number_stretched_to_a_large_tensor_is_refused(tmp_path):
    stretched = torch.zeros(1).expand(2**40)
    torch.save({"kind": "model", "checksum": "0" * 64, "x": stretched}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="larger than the file"):
        load(tmp_path / "a.pt", "model")


FIFOS = ["subject/1.png", "subject/0.txt", "subject/parts.txt", "base.pt", "out/state.pt"]


@pytest.mark.parametrize("name", FIFOS)
def test_a_fifo_is_refused_at_once(name, tmp_path, capsys):
    shutil.copytree(MO, tmp_path / "subject")
    shutil.copy(BASE, tmp_path / "base.pt")
    (tmp_path / "out").mkdir()
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    flags = ("--subject", tmp_path / "subject", "--base", tmp_path / "base.pt")
    with within(60):
        error = error_of(
            train, *SHORTEST, *flags, "--out", tmp_path / "out", "--resume", capsys=capsys
        )
    assert name in error


def test_an_error_prints_no_more_than_a_line_of_what_it_read(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "0.png")
    for caption in ("x" * 100_000, "red " * 100_000, "sks\n" * 10_000):
        (tmp_path / "0.txt").write_text(caption)
        with pytest.raises(ValueError, match="0.txt") as caught:
            toy.load_subject(tmp_path)
        assert len(str(caught.value)) < 700
        assert "\n" not in str(caught.value)

    model = quantize(load_model(BASE), 4, calibration="minmax")
    other = adapter(model)
    other["quant_config"] = {**other["quant_config"], "edges": list(range(5000))}
    with pytest.raises(ValueError, match="edges") as caught:
        check_adapter(model, other)
    assert len(str(caught.value)) < 300

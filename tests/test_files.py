"""Files: what is read is whole and no larger than it says, and what is yours stays as it is."""

import contextlib
import os
import random
import re
import resource
import signal
import zipfile
from argparse import Namespace

import pytest
import torch
from conftest import run

import runtime
from runtime import BASE, load, save

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


def error_of(script, *args, capsys):
    """The sentence that a script ends with."""
    assert run(script, *args) == 2
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("sampling:")]
    assert len(lines) == 1, lines
    return lines[0]


# --------------------------------------------------------------------------------------------------
# Checksums


def same(a, b):
    """True if two nested dicts hold the same tensors and values."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a == b


def test_a_flipped_bit_is_refused_or_changes_nothing(tmp_path):
    """One class of them passes Python's checks, and torch then reads nothing.

    It makes a member of the zip a folder: bit 4 of byte 38 of its entry in the directory.
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

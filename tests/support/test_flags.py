"""Flags out of their ranges, and the one sentence that a user gets for an error."""

from argparse import Namespace

import pytest
import torch
from conftest import error_of, run

import pretrain
import sample
import train

TRAINING = {  # of train.py and pretrain.py: values that are refused
    "--steps": [-1, 10**8, "1e3", "inf", ""],
    "--lr": [-0.1, 11, "nan", "inf", "fast"],
    "--batch": [0, -8, 5000, "nan"],
    "--seed": [-1, 0.5, 4_000_001],  # images have seeds of 32 bits, a thousand times as large
    "--device": ["tpu"],
    "--out": [""],
}
WRONG = {
    train: {
        **TRAINING,
        "--bits": [1, 9, -4, "four", "4.5", "nan", ""],
        "--buckets": [0, 1001, -1, 1.5, "nan"],
        "--scales": ["in"],
        "--calibration": ["best"],
        "--prior": [-1, "nan", "-inf", 1e3],
        "--sample-steps": [0, 1001],
        "--base": [""],
    },
    pretrain: TRAINING,
    sample: {
        "--n": [0, 1001, "all"],
        "--steps": [0, 1001, 2.5],
        "--sampler": ["euler"],
        "--cfg-scale": [-1, "nan", "inf"],
        "--seed": [-1, "nan", 4_000_001],
        "--device": ["tpu"],
        "--ckpt": [""],
        "--adapter": [""],
        "--out": [""],
    },
}


@pytest.mark.parametrize("script", WRONG)
def test_each_flag_refuses_what_is_out_of_its_range(script, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag, values in WRONG[script].items():
        for value in values:
            error = error_of(script, f"{flag}={value}", capsys=capsys)
            assert f"argument {flag}: " in error, value
    assert not list(tmp_path.iterdir())


REFUSED = [  # script, flags, what the sentence names
    (train, "--bits 32 --buckets 2", "--buckets"),
    (train, "--bits 32 --scales out", "--scales"),
    (train, "--bits 32 --calibration mse", "--calibration"),
    (train, "--subject nobody", "nobody"),
    (train, "--subject=", "PNG or JPEG"),
    (train, "surplus", "surplus"),
    (train, "--base", "expected one argument"),
    (pretrain, "--bits 4", "--bits 4"),
    (pretrain, "--subject mo", "--subject mo"),
    (sample, "--packed", "--packed need"),
    (sample, "--prompt dragon", "unknown word 'dragon'"),
    (sample, "--prompt=the", "the prompt is empty"),
]


@pytest.mark.parametrize("script, flags, words", REFUSED)
def test_flags_that_cannot_be_followed_are_refused_by_name(
    script, flags, words, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert words in error_of(script, *flags.split(), capsys=capsys)
    assert not list(tmp_path.iterdir())


OUTS = [(train, "file"), (train, "file/below"), (sample, "folder"), (sample, "file/a.png")]


@pytest.mark.parametrize("script, out", OUTS)
def test_an_out_that_something_else_is_in_the_way_of_is_refused_by_name(
    script, out, tmp_path, capsys
):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    flags = ("--n", 1) if script is sample else ()
    error = error_of(script, *flags, "--steps", 1, "--out", tmp_path / out, capsys=capsys)
    assert f"{tmp_path}/f" in error
    assert error.endswith("give another path")
    assert (tmp_path / "file").read_text() == "mine"
    assert not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("script", WRONG)
def test_the_help_says_the_defaults(script, capsys):
    assert run(script, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "of everything random (default: 0)" in shown or "of the noise (default: 0)" in shown
    assert "(default: None)" not in shown


# --------------------------------------------------------------------------------------------------
# What a user is told of an error
# --------------------------------------------------------------------------------------------------


def script_that_raises(error):
    def main():
        raise error

    return Namespace(__name__="script", main=main)


GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
GLOO = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:5711")
ERRORS = [  # and the sentence
    (ValueError("give another"), "script.py: give another"),
    (FileNotFoundError(2, "No such file", "a/b"), "a/b can't be used (No such file); give another"),
    (MemoryError(), "too little memory; lower --batch"),
    (GPU, "too little memory; lower --batch"),
    (GLOO, "another process has ended; go on with --resume"),
]


@pytest.mark.parametrize("error, sentence", ERRORS, ids=lambda value: type(value).__name__)
def test_an_error_that_a_user_can_mend_is_one_sentence(error, sentence, capsys):
    assert sentence in error_of(script_that_raises(error), capsys=capsys)


def test_too_little_memory_is_told_from_what_torch_raises(capsys):
    def main():
        torch.empty(2**60, dtype=torch.uint8)

    script = Namespace(__name__="script", main=main)
    assert "too little memory; lower --batch" in error_of(script, capsys=capsys)


@pytest.mark.parametrize("error", [RuntimeError("boom"), TypeError("boom")])
def test_a_fault_of_the_code_is_not_made_a_sentence(error):
    with pytest.raises(type(error), match="boom"):
        run(script_that_raises(error))


def test_ctrl_c_ends_a_script_without_a_word(capsys):
    assert run(script_that_raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")

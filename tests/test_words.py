"""--train-words: the embedding of a subject's word trains with the scales, and travels along."""

import pytest
import torch
from conftest import contents_of, run

import runtime
import sample
import train
from data import toy
from quant import load_adapter, quantize
from runtime import BASE, load, load_model, save

FLAGS = ("--calibration", "minmax", "--sample-steps", 1, "--batch", 2, "--device", "cpu")


def words_of(model):
    return model.words.weight.detach().clone()


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """The folder of a run of three steps."""
    folder = tmp_path_factory.mktemp("words") / "out"
    assert run(train, "--train-words", *FLAGS, "--steps", 3, "--out", folder) == 0
    return folder


def test_the_subjects_word_moves_and_no_other(tuned):
    before = words_of(load_model(BASE))
    after = words_of(load_model(tuned / "tuned.pt"))
    sks = toy.WORD["sks"]
    assert (after[sks] != before[sks]).all()
    after[sks] = before[sks]
    assert torch.equal(after, before)


def test_off_by_default(tmp_path):
    assert run(train, *FLAGS, "--steps", 1, "--out", tmp_path) == 0
    before = words_of(load_model(BASE))
    assert torch.equal(words_of(load_model(tmp_path / "tuned.pt")), before)
    assert load(tmp_path / "adapter.pt", "adapter")["also"] == {}


def test_several_words_are_trained_if_the_captions_have_them():
    model = quantize(load_model(BASE), calibration="minmax")
    captions = torch.tensor([toy.caption("sks creature"), toy.caption("qvk creature")])
    train.train_words(model, captions)
    model.words(torch.arange(len(toy.VOCAB))).square().sum().backward()
    moved = model.words.weight.grad.abs().sum(1).nonzero().flatten().tolist()
    assert moved == [toy.WORD["sks"], toy.WORD["qvk"]]


def test_the_words_of_the_captions_are_counted():
    model = quantize(load_model(BASE), calibration="minmax")
    args = train.arguments(["--train-words", "--device", "cpu"])
    scales = train.count_trained(model, train.arguments(["--device", "cpu"]), None)
    captions = torch.tensor([toy.caption("sks creature"), toy.caption("sks creature left")])
    train.train_words(model, captions)
    assert train.count_trained(model, args, captions) == scales + model.config["c_words"]
    two = torch.tensor([toy.caption("sks creature and zwx creature")])
    assert train.count_trained(model, args, two) == scales + 2 * model.config["c_words"]


def test_an_adapter_carries_the_word_to_the_base(tuned):
    model = quantize(load_model(BASE), calibration="minmax")
    load_adapter(model, load(tuned / "adapter.pt", "adapter"))
    other = load_model(tuned / "tuned.pt")
    x = torch.randn(2, 3, 16, 16)
    t = torch.tensor([10, 900])
    words = torch.tensor([toy.caption("sks creature")] * 2)
    with torch.no_grad():
        assert torch.equal(model(x, t, words), other(x, t, words))


def test_sample_draws_with_the_trained_word(tuned, tmp_path):
    base = tmp_path / "base.pt"
    save(contents_of(quantize(load_model(BASE), calibration="minmax")), base)
    without = load(tuned / "tuned.pt", "quantized")
    without["model"]["words.weight"] = words_of(load_model(BASE))
    save(without, tmp_path / "without.pt")
    drawn = []
    for model in (
        [base, "--adapter", tuned / "adapter.pt"],
        [tuned / "tuned.pt"],
        [tmp_path / "without.pt"],
    ):
        flags = ["--n", 1, "--steps", 2, "--prompt", "sks creature", "--out", tmp_path / "a.png"]
        assert run(sample, "--ckpt", *model, *flags) == 0
        drawn.append((tmp_path / "a.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_resumed_run_ends_in_the_same_bits(tuned, tmp_path, monkeypatch):
    class Stop(Exception):
        pass

    def stop(state, path, *args):
        save(state, path, *args)
        if state["step"] == 1:
            raise Stop

    monkeypatch.setattr(runtime, "SAVE_EVERY", 1)
    monkeypatch.setattr(train, "save", stop)
    flags = ["--train-words", *FLAGS, "--steps", 3, "--out", tmp_path]
    with pytest.raises(Stop):
        run(train, *flags)
    monkeypatch.setattr(train, "save", save)
    assert run(train, *flags, "--resume") == 0
    assert (tmp_path / "adapter.pt").read_bytes() == (tuned / "adapter.pt").read_bytes()


def test_full_precision_refuses_the_flag(tmp_path, capsys):
    assert run(train, "--bits", 32, "--train-words", "--out", tmp_path / "out") == 2
    assert "--train-words" in capsys.readouterr().err

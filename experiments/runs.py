"""What most tables and figures are made of: methods, and runs of train.py with them.

A row of a table is a method, given by flags of train.py. A run is a row, a subject and a seed: the
model is made, fine-tuned to the subject and scored. It becomes a line of the log (report.py); what
it trained is in out/NAME, if the log is NAME.jsonl. The losses at the end serve other experiments,
too.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import train
from baselines import lora_packed, train_raw_scales, with_position_rows
from data import toy
from data.score import read_object, score, spots_at
from model import Diffusion
from quant import adapter, deltas, load_adapter, quantize
from report import (
    SCORES,
    SHOWN,
    append,
    is_asked_for,
    is_due,
    runs_of,
    show_differences,
    show_means,
)
from sample import BASE, load_model, sample
from support.files import file_size
from support.runs import Run

DIFFUSION = Diffusion()


class PartOfTime(Diffusion):
    """The same process, with timesteps drawn from low * T to high * T only."""

    def __init__(self, low: float, high: float):
        super().__init__()
        self.low = low
        self.high = high

    def draw_timesteps(self, n, generator, focus=0.0):
        t = super().draw_timesteps(n, generator, focus)
        return (self.low * self.T + (self.high - self.low) * t).long()


# --------------------------------------------------------------------------------------------------
# Rows: the methods
# --------------------------------------------------------------------------------------------------


def log_snr_edges(num_buckets: int) -> tuple[int, ...]:
    """The edges, in timesteps from 0 to T, of buckets that are equally wide in log-SNR.

    The log-SNR, log(abar_t / (1 - abar_t)), falls as t rises. It is cut into equal parts, and a
    bucket starts at the first timestep below the upper end of its part. With more than 8 buckets
    some would be empty, and quantize refuses the edges.
    """
    log_snr = DIFFUSION.alphas_cumprod.logit()  # (T,)
    levels = torch.linspace(log_snr[0], log_snr[-1], num_buckets + 1, dtype=log_snr.dtype)
    starts = [int((log_snr >= level).sum()) for level in levels[1:-1]]
    return (0, *starts, DIFFUSION.T)


def position_rows(model):
    """Give each position of a kernel rows and columns of its own."""
    with_position_rows(model, load_model(BASE).requires_grad_(False))


WIDTHS = (4, 3, 2, 8)  # bits, in the order of the table of one subject: 4, the yardstick, first


@dataclass(frozen=True)
class Row:
    """A row of a table: what is done to the base.

    The log knows it by its name.
    """

    name: str
    bits: int = 4  # of a weight; 32 is float
    columns: str = "channel"  # what has a column scale: the paper's choice unless a row says so
    flags: str = ""  # the other flags of train.py; steps are 1,000 if it doesn't name them
    method: str = ""  # the name without the bits, in the table of one subject
    lora: int = 0  # the rank of LoRA on the packed base, which is trained in the place of scales
    edges: tuple[float, ...] | None = None  # of the buckets, if they aren't equally wide
    change: Callable | None = None  # what is done to the model after quantize
    side_by_side: bool = False  # Cut-Mix: some images show two subjects, each in its half
    last_commit: str = ""  # of a row that is in the log alone: the last one that can run it

    @property
    def trains(self) -> bool:
        return "--steps 0" not in self.flags

    def why_not_run(self) -> str:
        """What to say of a row that is in the log alone."""
        return (
            f"'{self.name}' can't be run any more: the last commit that can is {self.last_commit}; "
            "its runs are in experiments/runs.jsonl"
        )


def by_name(rows: list[Row]) -> dict[str, Row]:
    """The rows by their names."""
    return {row.name: row for row in rows}


def rows_of_one_subject() -> list[Row]:
    """The rows of the tables of one subject: two float ones, then every method at every width."""
    rows = [
        Row("the base", bits=32, flags="--steps 0", method="the base"),
        Row("full precision", bits=32, method="full precision"),
    ]
    methods = {  # N: sets of scales; PEQA trains those of rows alone, TAS gives it more sets
        "untuned": "--steps 0",
        "PEQA": "--scales out",
        "PEQA + TAS, N = 2": "--scales out --buckets 2",
        "TuneQDM, N = 1": "",
        "TuneQDM, N = 2": "--buckets 2",
        "TuneQDM, N = 4": "--buckets 4",
        "by position, N = 1": "",
        "by position, N = 2": "--buckets 2",
        "LoRA r = 2, packed base": "--lr 0.003",
    }
    for bits in WIDTHS:
        for method, flags in methods.items():
            columns = "position" if "position" in method else "channel"
            rank = 2 if method.startswith("LoRA") else 0
            rows.append(Row(f"{method}, {bits} bits", bits, columns, flags, method, rank))
    return rows


def rows_of_500_steps() -> dict[str, Row]:
    """The README's rows: what train.py does by default, and what that is compared with.

    The log knows them by the names here and ", 500 steps". The base of a LoRA is quantized as the
    default is.
    """
    rows = [
        Row("the base", bits=32, flags="--steps 0"),
        Row("full precision", bits=32),
        Row("PEQA, 4 bits", flags="--scales out"),
        Row("paper's columns, N = 1, 4 bits"),
        Row("paper's columns, N = 2, 4 bits", flags="--buckets 2"),
        Row("by position, N = 1, 4 bits", columns="position"),
        Row("by position, N = 2, 4 bits", columns="position", flags="--buckets 2"),
        Row("LoRA r = 1, 4 bits", columns="position", flags="--lr 0.024", lora=1),
        Row("LoRA r = 2, 4 bits", columns="position", flags="--lr 0.012", lora=2),
        Row("by position, N = 1, 2 bits", 2, columns="position"),
        Row("LoRA r = 2, 2 bits", 2, columns="position", flags="--lr 0.012", lora=2),
    ]
    found = {}
    for row in rows:
        name = f"{row.name}, 500 steps"
        found[row.name] = replace(row, name=name, flags=f"--steps 500 {row.flags}")
    return found


def rows_of_rates() -> dict[str, Row]:
    """Full precision and each LoRA of the README's rows, at several learning rates."""
    rows = []
    for name, row in SHORT.items():
        if row.lora or name == "full precision":
            of_lora = ("0.0015", "0.003", "0.006", "0.012", "0.024")
            for lr in of_lora if row.lora else ("0.0005", "0.001", "0.002"):
                flags = f"{row.flags} --lr {lr}"
                rows.append(replace(row, name=f"{row.name}, lr {lr}", flags=flags))
    return by_name(rows)


def together(row: Row) -> Row:
    """The row for several subjects at once."""
    return replace(row, name=f"{row.name}, together", flags=f"{row.flags} --steps 2000")


DEFAULT = "TuneQDM, N = 1, 4 bits"  # the row that others are compared with
ONE_SUBJECT = by_name(rows_of_one_subject())
SHORT = rows_of_500_steps()
RATES = rows_of_rates()  # on the two subjects that no other table reports
SEVERAL = by_name(
    [
        together(ONE_SUBJECT["full precision"]),
        together(ONE_SUBJECT["PEQA, 4 bits"]),
        together(ONE_SUBJECT[DEFAULT]),
        together(ONE_SUBJECT["TuneQDM, N = 2, 4 bits"]),
        # the embeddings of the subjects' words were trained, too, by a flag that is gone
        together(Row("TuneQDM, N = 1, words, 4 bits", last_commit="f7ff39f")),
        together(Row("TuneQDM, N = 2, words, 4 bits", last_commit="f7ff39f")),
    ]
)
ABLATIONS = by_name(
    [
        ONE_SUBJECT[DEFAULT],
        ONE_SUBJECT["TuneQDM, N = 2, 4 bits"],
        ONE_SUBJECT["TuneQDM, N = 4, 4 bits"],
        Row("N = 8", flags="--buckets 8"),
        Row("N = 4, edges even in log-SNR", edges=log_snr_edges(4)),
        Row("calibration: mse", flags="--calibration mse"),
        Row("calibration: minmax", flags="--calibration minmax"),
        Row("calibration: gptq, lr 0.02", flags="--calibration gptq --lr 0.02"),
        Row("raw scales, lr 3e-6", flags="--lr 3e-6", change=train_raw_scales),
        Row("raw scales, lr 3e-4", flags="--lr 3e-4", change=train_raw_scales),
        Row("raw scales, lr 1e-3", flags="--lr 1e-3", change=train_raw_scales),
        Row("lr 0.01", flags="--lr 0.01"),
        Row("lr 0.1", flags="--lr 0.1"),
        Row("500 steps", flags="--steps 500"),
        Row("2000 steps", flags="--steps 2000"),
        Row("prior weight 0", flags="--prior 0"),
        Row("prior weight 1", flags="--prior 1"),
        Row("prior weight 3", flags="--prior 3"),
    ]
)

GPTQ_SETTINGS = by_name(  # tried on the subjects that no other table reports
    [
        Row("rowcol", flags="--calibration rowcol"),
        Row("gptq", flags="--calibration gptq"),
        Row("gptq, lr 0.02", flags="--calibration gptq --lr 0.02"),
        Row("rowcol, lr 0.02", flags="--calibration rowcol --lr 0.02"),
        Row("gptq, prior 0.5", flags="--calibration gptq --prior 0.5"),
        Row("gptq, prior 1", flags="--calibration gptq --prior 1"),
        Row("gptq, lr 0.015", flags="--calibration gptq --lr 0.015"),
    ]
)

POSITION_SETTINGS = by_name(  # for columns by position, on the same two subjects
    [
        Row("position", columns="position"),
        Row("position, 500 steps", columns="position", flags="--steps 500"),
        Row("position, gptq", columns="position", flags="--calibration gptq"),
        Row(
            "position, gptq, 500 steps", columns="position", flags="--calibration gptq --steps 500"
        ),
        Row("position, lr 0.02", columns="position", flags="--lr 0.02"),
        Row("position, 500 steps, lr 0.045", columns="position", flags="--steps 500 --lr 0.045"),
        Row("position, 500 steps, prior 1", columns="position", flags="--steps 500 --prior 1"),
        Row("position, 400 steps", columns="position", flags="--steps 400"),
        Row(
            "rows and columns by position, 500 steps",
            columns="position",
            flags="--steps 500",
            change=position_rows,
        ),
        Row("channel, 500 steps", flags="--steps 500"),
    ]
)

# --------------------------------------------------------------------------------------------------
# A run: make the model, fine-tune it, score it
# --------------------------------------------------------------------------------------------------


def prepare(args, row: Row, subject: str, seed: int):
    """The row's model before it is fine-tuned, and run: the arguments of train.py for this run.

    Raises ValueError for a row that is in the log alone.
    """
    if row.last_commit:
        raise ValueError(row.why_not_run())
    words = f"{row.name} {subject} {seed}".replace(", ", " ")
    out = Path("out") / args.log.stem / words.replace(" ", "-")
    flags = ["--bits", str(row.bits), "--steps", "1000"]
    if row.bits < 32:
        flags += ["--columns", row.columns]
    flags += row.flags.split()
    run = train.arguments([*flags, "--seed", str(seed), "--out", str(out)])
    run.steps //= args.steps_divisor
    run.sample_steps //= args.steps_divisor

    model = load_model(BASE, run.device)
    data = train.calibration_data(run.device)
    if row.lora:
        torch.manual_seed(run.seed)  # its first matrices are random
        lora_packed(model, row.lora, run.bits, run.columns, run.calibration, data).to(run.device)
    elif run.bits < 32:
        quantize(
            model,
            run.bits,
            run.buckets,
            DIFFUSION.T,
            run.scales,
            run.columns,
            run.calibration,
            edges=row.edges,
            data=data,
        )
    if row.change is not None:
        row.change(model)
    return model, run


def tune(args, row: Row, subject: str, seed: int, start: dict | None = None) -> dict:
    """Fine-tune to a subject and score it: what the log says of a run.

    The arguments are those of fine_tuned. Deltas are scored as they were trained; train.py rounds
    them to float16 first.
    """
    return scores_of(*fine_tuned(args, row, subject, seed, start))


def fine_tuned(args, row: Row, subject: str, seed: int, start: dict | None = None):
    """A model, the arguments of train.py for its run, and {word: the folder of its subject}.

    subject: its name, or several ("bix+fen"), each of which gets a rare word of its own. start: an
    adapter to begin with. A run that was stopped goes on from the state in its folder, and one that
    is complete is only read.
    """
    model, run = prepare(args, row, subject, seed)
    if start is not None:
        load_adapter(model, start)
    names = subject.split("+")
    words = [run.word] if len(names) == 1 else toy.RARE
    folders = {word: BASE.parent / "subjects" / name for word, name in zip(words, names)}
    if run.steps > 0:
        of_subjects = [toy.load_subject(folder, word) for word, folder in folders.items()]
        images, captions = [torch.cat(tensors) for tensors in zip(*of_subjects)]
        if row.side_by_side:
            images, captions = with_pairs(images, captions)
        unsaid = {}  # what flags don't say
        if row.edges is not None or row.change is not None or start is not None:
            unsaid["base"] = [model.state_dict(), row.edges]
        train.finetune(model, images, captions, run, resumed(run, unsaid))
    return model, run, folders


def resumed(run, inputs) -> Run:
    """A Run that goes on from the state in its folder, or starts if there is none that fits."""
    run.resume = True
    with contextlib.suppress(ValueError):
        return Run(run, "fine-tuning", inputs)
    run.resume = False  # the state is of other flags or inputs
    return Run(run, "fine-tuning", inputs)


def with_pairs(images: Tensor, captions: Tensor, share: float = 0.6) -> tuple[Tensor, Tensor]:
    """Cut-Mix (SVDiff, Han et al. 2023, section 3.3): images (N, 3, 16, 16) and images of pairs.

    A pair is the left half of an image and the right half of another one, of another subject. Each
    subject is whole, because sprites at the left and at the right never overlap. Images and
    captions (N, SLOTS) are repeated until this share of them shows pairs.
    """
    word = captions[:, toy.NAME_SLOTS[0]]
    place = captions[:, toy.PLACE_SLOT]
    pairs = []
    captions_of_pairs = []
    for a in (place == toy.WORD["left"]).nonzero().flatten():
        for b in ((place == toy.WORD["right"]) & (word != word[a])).nonzero().flatten():
            middle = toy.SIZE // 2
            pairs.append(torch.cat([images[a, ..., :middle], images[b, ..., middle:]], dim=-1))
            caption = captions[a].clone()
            caption[toy.PLACE_SLOT] = 0  # as in pretraining, where two objects have no place
            caption[toy.NAME_SLOTS[1]] = captions[b, toy.NAME_SLOTS[0]]
            caption[toy.SHAPE_SLOTS[1]] = captions[b, toy.SHAPE_SLOTS[0]]
            for slot in (toy.COLOR_SLOT, toy.PATTERN_SLOT):
                caption[slot] *= captions[a, slot] == captions[b, slot]  # empty if halves differ
            captions_of_pairs.append(caption)
    if not pairs:
        raise ValueError("no two subjects stand left and right; choose others")
    of_pairs = round(100 * share) * len(images)  # how often each is repeated
    of_each = round(100 * (1 - share)) * len(pairs)
    images = images.repeat(of_each, 1, 1, 1)
    captions = captions.repeat(of_each, 1)
    pairs = torch.stack(pairs).repeat(of_pairs, 1, 1, 1)
    captions_of_pairs = torch.stack(captions_of_pairs).repeat(of_pairs, 1)
    return torch.cat([images, pairs]), torch.cat([captions, captions_of_pairs])


def scores_of(model, run, folders) -> dict:
    """What the log says of a fine-tuned model. The arguments are what fine_tuned returns."""
    trained = {}
    if run.steps > 0:
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    parts = {word: toy.read_parts(folder) for word, folder in folders.items()}
    # even deltas that aren't trained aren't the base's
    of_subject = {id(p) for p in (*trained.values(), *deltas(model).values())}
    state = model.state_dict(keep_vars=True)
    rest = {name: value.detach() for name, value in state.items() if id(value) not in of_subject}
    return {
        "trained": sum(p.numel() for p in trained.values()),
        "bytes": subject_bytes(model, trained),
        **measure(model, parts, run),
        "world loss": validation_loss(model),
        "known loss": validation_loss(model, rare=0),
        "base bytes": file_size(rest),
    }


def subject_bytes(model, trained: dict) -> int:
    """Bytes of what was trained, in a file: an adapter if it holds that, else the parameters."""
    if not trained:
        return 0
    if trained.keys() == deltas(model).keys():
        return file_size({"kind": "adapter", **adapter(model)})
    return file_size(trained)


def measure(model, parts: dict[str, Tensor], run) -> dict[str, float]:
    """The means of the exact scores. parts: the parts (7,) of each word's subject.

    Each subject is drawn alone, then two in one image ("both"). A red creature ("red") should have
    a subject's parts by chance only.
    """
    found = {}  # lists of means: one for each subject and kind of image

    def draw(prompts, name_of, label, seed):
        """Draw the prompts. Score what they call name_of[word] as the subject of the word."""
        captions = torch.tensor(train.captions_of(prompts))
        images = sample(model, captions, run.sample_steps, seed=seed)
        for word, name in name_of.items():
            scores = score(images, captions, parts[word], toy.WORD[name])
            for key, values in scores.items():
                found.setdefault(label + key, []).append(values.mean().item())
        return images

    words = list(parts)
    for word in words:
        draw(train.prompts_of(word), {word: word}, label="", seed=run.seed)

    backgrounds = [prompt.split(" on ")[1] for prompt in train.PROMPTS]
    for a, b in zip(words, words[1:]):
        prompts = [f"{a} creature and {b} creature on {background}" for background in backgrounds]
        images = draw(prompts, {a: a, b: b}, label="both ", seed=run.seed + 1)
        for key, share in what_two_show(images, parts[a], parts[b]).items():
            found.setdefault(key, []).append(share)

    prompts = ["red creature"] * len(train.PROMPTS)
    draw(prompts, dict.fromkeys(words, "red"), label="red ", seed=run.seed)

    means = {}
    for key in (*SCORES, *SHOWN):
        if key in found:
            means[key] = sum(found[key]) / len(found[key])
    return means


def what_two_show(images: Tensor, left: Tensor, right: Tensor) -> dict[str, float]:
    """What two subjects in one image show: a mean over both places for each key of SHOWN.

    images: (N, 3, 16, 16), drawn for a subject with the parts left (7,) and one with the parts
    right (7,). With k options, a wrong part is the other subject's by chance with probability
    1 / (k - 1). For the color of the marking that is a little too low: it can't be the body's,
    which is one of the k.
    """
    shown = {key: [] for key in SHOWN}
    options = torch.tensor([len(toy.OPTIONS[key]) for key in toy.KEYS])
    for place, mine, other in (("left", left, right), ("right", right, left)):
        spots = spots_at(place)
        anything, _ = read_object(images, spots)
        creature, _ = read_object(images, spots, creatures=True)
        seen = toy.sprites().parts[creature]  # (N, 7)
        is_creature = anything >= toy.PLAIN
        whole = (seen == mine).all(1)
        exchanged = (seen == other).all(1)
        wrong = (seen != mine) & (mine != other)  # only parts in which the two subjects differ
        taken = (wrong & (seen == other)).sum(1)
        by_chance = (wrong / (options - 1)).sum(1)

        shown["shown whole"].append(is_creature & whole)
        shown["shown exchanged"].append(is_creature & exchanged)
        shown["shown mixed"].append(is_creature & ~exchanged & (taken > 0))
        shown["shown neither"].append(is_creature & ~whole & (taken == 0))
        shown["shown no creature"].append(~is_creature)
        shown["taken"].append(is_creature * taken)
        shown["taken by chance"].append(is_creature * by_chance)
    return {key: torch.cat(values).float().mean().item() for key, values in shown.items()}


# --------------------------------------------------------------------------------------------------
# A table of runs
# --------------------------------------------------------------------------------------------------


def fill(args, title, rows, subjects, pairs=()):
    """Fill a table of rows, as fill_by does. rows: {name in the table: Row}."""
    jobs = {}
    for name, row in rows.items():
        jobs[name] = (row.name, partial(tune, args, row))
        if row.last_commit:
            jobs[name] = (row.name, None)
            if is_asked_for(args, row.name):
                print(row.why_not_run(), file=sys.stderr)
    fill_by(args, title, jobs, subjects, pairs)


def fill_by(args, title, jobs, subjects, pairs=()):
    """Do what isn't done yet, then show the means of runs and the differences of pairs.

    jobs: {name in the table: (name in the log, a function of subject and seed that returns what the
    log says of a run, or None)}. subjects: what to tune to, such as "bix" or "bix+fen". pairs:
    names in the table, the second of which is subtracted from the first.
    """
    run_all(args, {in_log: job for in_log, job in jobs.values() if job is not None}, subjects)
    found = {name: runs_of(args, in_log, subjects) for name, (in_log, _) in jobs.items()}
    show_means(args, title, found)
    if pairs:
        show_differences(args, f"{title}: differences", found, pairs)


def run_all(args, jobs, subjects):
    """Do each job with each subject and seed, if the log doesn't have it.

    jobs: {name in the log: a function of subject and seed that returns what the log says of it}.
    """
    for seed in range(args.seeds):
        for name, job in jobs.items():
            for subject in subjects:
                key = {"row": name, "subject": subject, "seed": seed}
                asked_for = set(subject.split("+")) <= set(args.subjects)
                if asked_for and is_due(args, name, key):
                    append(args.log, key, job(subject, seed))


# --------------------------------------------------------------------------------------------------
# The loss of a model
# --------------------------------------------------------------------------------------------------


def squared_error(model, x0, words, t, eps) -> Tensor:
    """Squared error of v for each of the images x0 (N, 3, 16, 16) at timesteps t (N,): (N,)."""
    x0 = x0.contiguous(memory_format=torch.channels_last)
    v = model(DIFFUSION.q_sample(x0, t, eps), t, words)
    return DIFFUSION.squared_error(v, x0, t, eps)


@torch.no_grad()
def losses(model, x0, words, t, generator) -> Tensor:
    """squared_error with noise from generator, in chunks of 128 images, as a tensor on the CPU."""
    device = next(model.parameters()).device
    eps = torch.randn(x0.shape, generator=generator)
    found = []
    for chunk in zip(x0.split(128), words.split(128), t.split(128), eps.split(128)):
        there = [part.to(device) for part in chunk]
        found.append(squared_error(model, *there).cpu())
    return torch.cat(found)


def validation_loss(model, n=1024, seed=12345, diffusion=DIFFUSION, rare=0.3) -> float:
    """Mean squared error of v on n fixed scenes of the world, timesteps and noises.

    rare: how many of the creatures have a rare word. To a model that knows a subject, such a
    creature isn't any creature any more; with rare = 0 that doesn't count as forgetting.
    """
    generator = torch.Generator().manual_seed(seed)
    x0, words = toy.sample_scenes(n, generator, rare)
    t = diffusion.draw_timesteps(n, generator)
    return losses(model, x0, words, t, generator).mean().item()

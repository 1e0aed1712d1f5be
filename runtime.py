"""What every script shares and the method doesn't need: files, flags, runs, processes."""

import argparse
import contextlib
import importlib
import io
import os
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import UNet
from quant import QuantLayer, bucket, deltas, quantize

BASE = Path(__file__).resolve().parent / "data" / "base.pt"  # the pretrained model that ships
SAVE_EVERY = 200  # steps between two states to --resume from
RANK = int(os.environ.get("RANK", 0))  # this process's number, set by torchrun
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are

# Windows has no file locks of this kind, and so no such module.
fcntl = importlib.import_module("fcntl") if os.name == "posix" else None

# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def save(obj, path, write=torch.save):
    """write(obj, file) to a temporary name, flush, rename: path is the old file or the new one.

    Raises ValueError if it can't be written.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(obj, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} can't be written ({error.strerror}); make room, or give another folder"
            ) from None
        raise


def write_png(image, file):
    """What save writes a PIL image with."""
    image.save(file, "png")


def file_size(obj) -> int:
    """Bytes of obj in a file."""
    file = io.BytesIO()
    torch.save(obj, file)
    return file.tell()


def load(path, *kinds) -> dict:
    """Read a file that save wrote, whose "kind" is one of kinds.

    Raises ValueError if it is missing, damaged or of another kind.
    """
    try:
        damaged = zipfile.ZipFile(path).testzip()  # checks the checksums; torch.load doesn't
        obj = None if damaged else torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(
            f"{path} doesn't exist; give the path of a checkpoint ({' or '.join(kinds)})"
        ) from None
    except Exception:
        damaged = True
    if damaged:
        raise ValueError(f"{path} is damaged or not a checkpoint; give one that this project wrote")
    if not isinstance(obj, dict) or obj.get("kind") not in kinds:
        raise ValueError(f"{path} is not a checkpoint of kind {' or '.join(kinds)}; give one")
    return obj


def load_model(path, device="cpu") -> UNet:
    """The model of a checkpoint, float or quantized, ready to sample.

    Raises ValueError if the file holds none.
    """
    saved = load(path, "model", "quantized")
    try:
        model = UNet(**saved["config"])
        if saved["kind"] == "quantized":
            # what minmax finds doesn't matter: it is the quickest way to layers of the right shape
            quantize(model, **{**saved["quant_config"], "calibration": "minmax"})
            model.quant_config = saved["quant_config"]
        model.load_state_dict(saved["model"])
        finite = all(value.isfinite().all() for value in model.state_dict().values())
    except Exception:
        finite = False
    if not finite:
        raise ValueError(f"{path} doesn't hold a whole model of this version; make it again")
    return model.to(device, memory_format=torch.channels_last).eval()


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse with numbers of a checked range, and errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def number(self, flag, kind, low, high, default, help, group=None):
        """Add a flag that takes a number of this kind (int or float) from low to high."""

        def check(text):
            try:
                value = kind(text)
            except ValueError:
                value = None
            if value is None or not low <= value <= high:
                what = "a whole number" if kind is int else "a number"
                raise argparse.ArgumentTypeError(
                    f"must be {what} from {low} to {high}, not '{text}'"
                )
            return value

        if default is not None:
            help += f" (default: {default})"
        (group or self).add_argument(flag, type=check, default=default, help=help)

    def device(self):
        """Add --device; its default is the best one on this machine."""
        found = ["cpu"]
        if torch.backends.mps.is_available():
            found.insert(0, "mps")
        if torch.cuda.is_available():
            found.insert(0, "cuda")
        help = f"of those on this machine (default: {found[0]})"
        self.add_argument("--device", choices=found, default=found[0], help=help)

    def run(self, steps, lr, lr_help, batch, batch_help, out_help):
        """Add the flags of a training run, and return their group. lr may be None."""
        run = self.add_argument_group("run")
        self.number("--steps", int, 0, 10**7, steps, "optimizer steps", run)
        self.number("--lr", float, 0, 10, lr, lr_help, run)
        self.number("--batch", int, 1, 4096, batch, batch_help, run)
        self.number("--seed", int, 0, 2**62, 0, "seed of everything random", run)
        run.add_argument("--out", type=Path, help=out_help)
        run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
        compile_help = "torch.compile: shorter steps after a minute or two of compiling"
        run.add_argument("--compile", action="store_true", help=compile_help)
        self.device()
        return run

    def parse_run(self, argv=None):
        """parse_args, and check that what --compile needs is there."""
        args = self.parse_args(argv)
        compilers = [shutil.which(name) for name in ("c++", "g++", "clang++", "cl")]
        if args.compile and not any(compilers):
            self.error(
                "--compile needs a C++ compiler, and there is none; "
                "install one, such as g++, or leave --compile out"
            )
        return args


def guard(main):
    """Run a script's main function, and end without a traceback of what isn't a fault of the code.

    Bad input ends with one sentence and exit code 2, Ctrl-C and a closed pipe (as after `| head`)
    with 130.
    """
    try:
        main()
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        lost_peer = "peer" in str(error)  # another process of torchrun's has died
        if isinstance(error, RuntimeError) and not lost_peer:
            raise
        if isinstance(error, OSError):
            path = error.filename or "the output"
            error = f"{path} can't be used ({error.strerror}); give another path"
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


# --------------------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------------------


def claim(folder):
    """Make folder, and a file in it that stays locked until it is closed.

    Raises ValueError if another run holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "w")
    if RANK > 0 or fcntl is None:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(
            f"another run is writing to {folder}; wait for it, or choose another --out"
        ) from None
    return file


def describe(args) -> dict[str, str]:
    """What a run must share with the one that it resumes: its flags, but for these."""
    free = ("resume", "out", "device", "sample_steps", "compile", "checkpoint")
    return {key: str(value) for key, value in vars(args).items() if key not in free}


def resumed(args, kind, may_differ=()) -> dict:
    """The last state of a run of the same flags, except for one of may_differ.

    Raises ValueError if there is none.
    """
    path = args.out / "state.pt"
    saved = load(path, kind)
    for half in args.out.glob("*.tmp"):  # of a process that was killed while it wrote
        half.unlink()
    was = saved.get("args", {})
    differ = [key for key, value in describe(args).items() if was.get(key) != value]
    if differ and not (len(differ) == 1 and differ[0] in may_differ):
        flags = " ".join(f"--{key} {was.get(key)}" for key in differ)
        raise ValueError(
            f"{path} is of a run with {flags}; resume with the same, or choose another --out"
        )
    return saved


class Loop:
    """The steps of a training run: `for step in loop`, with a progress bar, and states on the way.

    save_state(step) is called every SAVE_EVERY steps, after the last, and on Ctrl-C, which waits
    for the step to be whole and then exits with 130. edges are the timestep buckets that losses are
    shown for.
    """

    def __init__(self, title, args, first, edges, save_state):
        self.args = args
        self.edges = edges
        self.save_state = save_state
        self.means = {}  # a running mean of the loss, by bucket
        self.stopping = False
        steps = range(first, args.steps)
        self.bar = tqdm(steps, title, initial=first, total=args.steps, disable=RANK > 0)

    def __iter__(self):
        # the first process decides when to stop, and saves
        on_ctrl_c = self.stop_soon if RANK == 0 else signal.SIG_IGN
        before = signal.signal(signal.SIGINT, on_ctrl_c)
        try:
            for step in self.bar:
                yield step
                if RANK == 0:
                    self.after_step(done=step + 1)
        finally:
            signal.signal(signal.SIGINT, before)

    def stop_soon(self, *_):
        self.stopping = True

    def after_step(self, done):
        last = done == self.args.steps
        if self.stopping or last or done % SAVE_EVERY == 0:
            self.save_state(done)
        if self.stopping and not last:
            self.bar.close()
            print(
                f"stopped after step {done} of {self.args.steps}, "
                f"saved in {self.args.out / 'state.pt'}; go on with --resume"
            )
            sys.exit(130)

    def check(self, loss, t, step):
        """Raise ValueError if a loss (N,), at timesteps t (N,), isn't finite.

        Before the update: the parameters and the last state are then still good.
        """
        finite = loss.isfinite()
        if finite.all():
            return
        last_saved = step // SAVE_EVERY * SAVE_EVERY
        good = "no state was saved yet"
        if last_saved > 0:
            good = f"{self.args.out / 'state.pt'} has step {last_saved}"
        where = bucket(t[~finite], self.edges).unique().tolist()
        raise ValueError(
            f"the loss is no longer finite at step {step}, timestep bucket {where}; "
            f"--lr {self.args.lr} is too high, lower it ({good})"
        )

    def show(self, loss, t):
        """Show on the bar a running mean of the losses (N,) of each bucket of timesteps t (N,)."""
        loss = loss.detach()
        b = bucket(t, self.edges)
        for i in b.unique().tolist():
            mean = loss[b == i].mean().item()
            old = self.means.get(i, mean)
            self.means[i] = 0.98 * old + 0.02 * mean
        shown = " ".join(f"{self.means[i]:.4f}" for i in sorted(self.means))
        self.bar.set_postfix_str(f"loss by bucket {shown}", refresh=False)


# --------------------------------------------------------------------------------------------------
# Processes: torchrun starts several, which train as one of a larger batch
# --------------------------------------------------------------------------------------------------


def use_device(device):
    """Take the GPU of this process. Raises ValueError if there are fewer GPUs than processes."""
    if device != "cuda":
        return
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if gpu >= gpus:
        raise ValueError(
            f"process {gpu + 1} has no GPU ({gpus} here); start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(gpu)


def parallel(model, args):
    """What to train: model, compiled if asked to, its gradients averaged over all processes."""
    net = torch.compile(model) if args.compile else model
    if WORLD == 1:
        return net
    if RANK == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        full = count_float_parameters(model)
        print(
            f"{WORLD} processes average {4 * trained:,} bytes a step; full fine-tuning {4 * full:,}",
            flush=True,
        )
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    # a bucket that no process drew has no gradient: find_unused_parameters
    return DistributedDataParallel(net, forward_sync_buffers=False, find_unused_parameters=True)


def count_float_parameters(model) -> int:
    """The parameters that model has, or had before it was quantized."""
    trained = deltas(model)
    kept = [p.numel() for name, p in model.named_parameters() if name not in trained]
    frozen = [layer.shape.numel() for layer in model.modules() if isinstance(layer, QuantLayer)]
    return sum(kept) + sum(frozen)


def share(tensor, parts=1):
    """This process's share of a tensor (N, ...) that all processes have drawn alike.

    The tensor is `parts` parts of one length, and each gives every process its share of it. Two
    processes make of the two parts i0 i1 i2 i3 | c0 c1 c2 c3 the shares

        i0 i2 | c0 c2   and   i1 i3 | c1 c3
    """
    by_part = tensor.unflatten(0, (parts, -1))  # (parts, N / parts, ...)
    return by_part[:, RANK::WORLD].flatten(0, 1)  # (N / WORLD, ...)

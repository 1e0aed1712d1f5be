"""What the scripts share around the method: files, flags, runs, processes."""

import argparse
import contextlib
import io
import os
import shlex
import shutil
import signal
import sys
import threading
import zipfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import UNet
from quant import Batch, QuantLayer, batch_set, bucket, deltas, find_buckets, quantize

try:
    import fcntl  # file locks
except ImportError:  # on Windows
    fcntl = None

BASE = Path(__file__).resolve().parent / "data" / "base.pt"  # the pretrained model that ships
SAVE_EVERY = 200  # steps between two states to --resume from
MOST_RECORDINGS = 32  # CUDA graphs of a step, each of which takes some megabytes of the GPU


def environment(name, default):
    """The number in an environment variable, or -1 if that is something else."""
    text = os.environ.get(name, default)
    return int(text) if text.isdecimal() else -1


RANK = environment("RANK", "0")  # this process's number, set by torchrun
WORLD_SIZE = environment("WORLD_SIZE", "1")  # how many processes there are

# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def save(obj, path, write=torch.save):
    """Write obj to path by write(obj, file): to a temporary name first, which is then renamed.

    So path holds the old file or the new one, and never half of one. Raises ValueError if it can't
    be written.
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
    """Write a PIL image as PNG; for save(image, path, write_png)."""
    image.save(file, "png")


def file_size(obj) -> int:
    """The bytes that torch.save takes for obj."""
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
            # The values are loaded below. minmax is the quickest way to layers of the right shape.
            config = saved["quant_config"]
            quantize(model, **{**config, "calibration": "minmax"})
            model.quant_config = config
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


def filled(text):
    """The type of a flag that may not be empty, as an unset variable of the shell would make it."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    return text


def filled_path(text):
    """The type of a flag that is a path."""
    return Path(filled(text))


class Parser(argparse.ArgumentParser):
    """argparse with numbers of a checked range, and errors of one line."""

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def given(self, argv, names):
        """Which of these arguments are in argv; the others have their defaults."""
        unset = argparse.Namespace(**dict.fromkeys(names))  # argparse keeps what is there
        args = self.parse_args(argv, unset)
        return [name for name in names if getattr(args, name) is not None]

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
        help = f"where to compute, of what is on this machine (default: {found[0]})"
        self.add_argument("--device", choices=found, default=found[0], help=help)

    def add_run_flags(self, steps, lr, lr_help, batch, batch_help, out_help):
        """Add the flags of a training run with these defaults and helps; return their group."""
        run = self.add_argument_group("run")
        self.number("--steps", int, 0, 10**7, steps, "optimizer steps", run)
        self.number("--lr", float, 0, 10, lr, lr_help, run)
        self.number("--batch", int, 1, 4096, batch, batch_help, run)
        self.number("--seed", int, 0, 2**62, 0, "seed of everything random", run)
        run.add_argument("--out", type=filled_path, help=out_help)
        run.add_argument("--resume", action="store_true", help="go on from the last state in --out")
        compile_help = "torch.compile: shorter steps after a minute or two of compiling"
        run.add_argument("--compile", action="store_true", help=compile_help)
        self.device()
        return run

    def parse_run(self, argv=None):
        """parse_args, and check the number of processes, and that what --compile needs is there."""
        args = self.parse_args(argv)
        self.check_processes()
        compilers = [shutil.which(name) for name in ("c++", "g++", "clang++", "cl")]
        if args.compile and not any(compilers):
            self.error(
                "--compile needs a C++ compiler, and there is none; "
                "install one, such as g++, or leave --compile out"
            )
        return args

    def check_processes(self):
        """End with a sentence if RANK and WORLD_SIZE aren't as torchrun sets them."""
        one_is_missing = ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ)
        if one_is_missing or not 0 <= RANK < WORLD_SIZE:
            rank = os.environ.get("RANK", "not set")
            world_size = os.environ.get("WORLD_SIZE", "not set")
            self.error(
                f"RANK is {rank} and WORLD_SIZE is {world_size}, which don't go together; "
                "start several processes with torchrun, or one with neither set"
            )


def command(script, *args) -> str:
    """What to type into a shell to run a script of this project."""
    folder = Path(__file__).resolve().parent
    if folder != Path.cwd():
        script = folder / script
    return shlex.join(["python", str(script), *map(str, args)])


def guard(main):
    """Run a script's main function. Only faults of the code itself end with a traceback.

    Bad input ends with one sentence and exit code 2. A closed pipe (`| head`) ends with exit code
    130, and a signal with 128 and its number: 130 for Ctrl-C.
    """
    with lasting_streams(), on_stop(stop_now):
        try:
            main()
            sys.stdout.flush()
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
# Signals and streams: what can reach a run from outside
# --------------------------------------------------------------------------------------------------

# Ctrl-C, what schedulers send, and what a closed terminal sends. Windows has no SIGHUP.
STOP_SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
]


@contextlib.contextmanager
def on_stop(handler):
    """Call handler(number, frame) on a stop signal.

    A signal that is ignored stays so: nohup wants that. Only the main thread can handle signals, so
    nothing is changed in another one.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old_handler in before.items():
            signal.signal(number, old_handler)


def stop_now(number, frame):
    """End the script without a traceback. A second signal ends it even in the middle of that."""
    signal.signal(number, signal.SIG_DFL)
    sys.exit(128 + number)


@contextlib.contextmanager
def lasting_streams():
    """Within this context, stdout and stderr are hard to break.

    A name that the console can't encode is escaped. What a closed stderr can't show, such as a
    progress bar, is lost. A closed stdout raises BrokenPipeError, but not again when Python ends.
    """
    # a stream that was closed from the start is None
    stdout = sys.stdout or open(os.devnull, "w")
    stderr = sys.stderr or open(os.devnull, "w")
    if isinstance(stdout, io.TextIOWrapper):
        stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(Lossy(stderr)):
        try:
            yield
        finally:
            flush_or_discard(stdout)
            flush_or_discard(stderr)


class Lossy:
    """A stream like the one given, but what can't be written is lost instead of an error."""

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self):
        flush_or_discard(self.stream)


def flush_or_discard(stream):
    """Flush a stream. If that fails, let what is left go nowhere: Python flushes once more."""
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


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
    """The flags that a run must share with the one that it resumes."""
    free = ("resume", "out", "device", "sample_steps", "compile", "checkpoint")
    return {key: str(value) for key, value in vars(args).items() if key not in free}


def load_state(args, kind, may_differ=()) -> dict:
    """The state that the last run in args.out saved. Leftovers of a killed run are removed.

    Raises ValueError if there is none, or if the flags of that run differ by more than may_differ.
    """
    path = args.out / "state.pt"
    saved = load(path, kind)
    for leftover in args.out.glob("*.tmp"):
        leftover.unlink(missing_ok=True)  # another process may have been faster
    was = saved.get("args", {})
    differ = [key for key, value in describe(args).items() if was.get(key) != value]
    if not set(differ) <= set(may_differ):
        flags = " ".join(f"--{key} {was.get(key)}" for key in differ)
        raise ValueError(
            f"{path} is of a run with {flags}; resume with the same, or choose another --out"
        )
    return saved


class Loop:
    """The steps of a training run, `for step in loop`, with what surrounds a step.

    It shows a progress bar. It calls save_state(step) every SAVE_EVERY steps, after the last step,
    and on a stop signal (Ctrl-C, SIGTERM, SIGHUP), which lets the current step end and then ends
    the script. edges: the timestep buckets that the loss is shown for. trained: the parameters,
    which must be finite to be saved.
    """

    def __init__(self, title, args, first, edges, trained, save_state):
        self.args = args
        self.edges = edges
        self.trained = list(trained)
        self.save_state = save_state
        self.step = first
        self.last_saved = first
        self.means = {}  # a running mean of the loss of each bucket
        self.stopped_by = None  # the number of a stop signal
        steps = range(first, args.steps)
        self.bar = tqdm(steps, title, initial=first, total=args.steps, disable=RANK > 0)

    def __iter__(self):
        # with several processes, the first one decides when to stop
        handler = self.stop_soon if RANK == 0 else signal.SIG_IGN
        with on_stop(handler):
            for step in self.bar:
                self.step = step
                yield step
                if RANK == 0:
                    self.after_step(done=step + 1)
        if self.stopped_by is not None:  # the signal came after the last step was saved
            self.leave()

    def stop_soon(self, number, frame):
        self.stopped_by = number

    def after_step(self, done):
        stopping = self.stopped_by is not None
        last = done == self.args.steps
        if stopping or last or done % SAVE_EVERY == 0:
            self.check_trained(done)
            self.save_state(done)
            self.last_saved = done
        if stopping:
            self.leave()

    def leave(self):
        """Say where the state is, and end the script with 128 and the number of the signal."""
        self.bar.close()
        try:
            print(
                f"stopped after step {self.last_saved} of {self.args.steps}, "
                f"saved in {self.args.out / 'state.pt'}; go on with --resume"
            )
        finally:  # a closed terminal can't show it
            sys.exit(128 + self.stopped_by)

    def check_trained(self, done):
        """Raise ValueError if a parameter isn't finite as float16, which the files hold.

        watch has seen the loss before this update, and not after it.
        """
        if not all(p.detach().half().isfinite().all() for p in self.trained):
            raise ValueError(
                f"the parameters are no longer finite after step {done}; "
                f"--lr {self.args.lr} is too high, lower it ({self.last_good()})"
            )

    def watch(self, error, t):
        """Show the running mean of the errors (N,) at timesteps t (N,), for each bucket.

        Raises ValueError if an error isn't finite. Call it before the update: then the parameters
        are still good.
        """
        error = error.detach().cpu()
        t = t.cpu()
        finite = error.isfinite()
        if not finite.all():
            self.diverged(t[~finite])
        b = bucket(t, self.edges)
        for i in b.unique().tolist():
            mean = error[b == i].mean().item()
            old = self.means.get(i, mean)
            self.means[i] = 0.98 * old + 0.02 * mean
        shown = " ".join(f"{self.means[i]:.4f}" for i in sorted(self.means))
        self.bar.set_postfix_str(f"loss by bucket {shown}", refresh=False)

    def diverged(self, t):
        """Raise ValueError: the loss isn't finite at timesteps t (n,)."""
        where = bucket(t, self.edges).unique().tolist()
        raise ValueError(
            f"the loss is no longer finite at step {self.step}, timestep bucket {where}; "
            f"--lr {self.args.lr} is too high, lower it ({self.last_good()})"
        )

    def last_good(self):
        """Where the state before the training diverged is."""
        if self.last_saved == 0:
            return "no state was saved yet"
        return f"{self.args.out / 'state.pt'} has step {self.last_saved}"


# --------------------------------------------------------------------------------------------------
# CUDA graphs: thousands of kernels in one launch
# --------------------------------------------------------------------------------------------------


def graphed(model):
    """model, or Graphed(model) if it is on a GPU."""
    on_gpu = next(model.parameters()).is_cuda
    return Graphed(model) if on_gpu else model


class Graphed:
    """Calls a model, float or quantized, by CUDA graphs, in training and in sampling.

        net = Graphed(model)
        v = net(x, t, words)

    A UNet is thousands of kernels, and a CPU takes longer to launch them than a GPU to run them. A
    CUDA graph is a recording of all these launches, and is launched at once: one graph for forward,
    one for backward. It runs the same kernels on the same addresses each time. So each kind of
    call has graphs of its own: each set of buckets in the batch, as they have scales of their own,
    and each set of shapes.

    The first call of its kind is a plain one, in which kernels are compiled and chosen. The second
    is recorded and replayed. What a call returns is overwritten by the next one, so backward comes
    before that. Gradients don't add up over several backwards: zero_grad() comes before each.
    """

    def __init__(self, model):
        self.model = model
        self.seen = set()  # the kinds of calls that there were
        self.recordings = {}  # by kind
        self.pool = torch.cuda.graph_pool_handle()  # memory that the graphs share

    def __call__(self, x, t, *others):
        """model(x, t, *others), all of them tensors; t: the timesteps (N,), on any device."""
        buckets, slot = self.buckets_of_batch(t)
        tensors = (x, t.to(x.device), *others)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        modes = (torch.is_grad_enabled(), torch.is_autocast_enabled("cuda"))
        kind = (tuple(buckets), shapes, modes)
        if kind not in self.recordings:
            is_full = len(self.recordings) == MOST_RECORDINGS
            if is_full or kind not in self.seen:
                self.seen.add(kind)
                return self.model(*tensors)
            self.recordings[kind] = record(self.model, buckets, slot, tensors, self.pool)
        return self.recordings[kind](slot.to(x.device), *tensors)

    def buckets_of_batch(self, t):
        """find_buckets, on the CPU. A model with one bucket, or none, has no need of it."""
        config = getattr(self.model, "quant_config", None)
        if config is None or len(config["edges"]) == 2:
            return [], torch.zeros(1, dtype=torch.long)
        return find_buckets(t.cpu(), config["edges"])


def record(model, buckets, slot, tensors, pool):
    """CUDA graphs of model(*tensors), for these buckets: a function of slot and tensors."""
    static = [tensor.clone() for tensor in (slot.to(tensors[0].device), *tensors)]
    # what autocast has cast once before, it would not cast in the recording
    with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
        return torch.cuda.make_graphed_callables(
            InBatch(model, buckets),
            tuple(static),
            num_warmup_iters=1,
            allow_unused_input=True,  # the deltas of other buckets
            pool=pool,
        )


class InBatch(torch.nn.Module):
    """model(*tensors), told which buckets are in the batch.

    To find them in t, the CPU would have to wait for the GPU, which a recording can't hold.
    """

    def __init__(self, model, buckets):
        super().__init__()
        self.model = model
        self.buckets = buckets

    def forward(self, slot, *tensors):
        with batch_set(Batch(self.model, self.buckets, slot, is_fixed=True)):
            return self.model(*tensors)


# --------------------------------------------------------------------------------------------------
# Processes: several of them, started by torchrun, train like one with a larger batch
# --------------------------------------------------------------------------------------------------


def use_device(device):
    """Use the GPU that belongs to this process, if the device is cuda.

    Raises ValueError if there are fewer GPUs than processes.
    """
    if device != "cuda":
        return
    gpu = environment("LOCAL_RANK", "0")
    gpus = torch.cuda.device_count()
    if not 0 <= gpu < gpus:
        raise ValueError(
            f"process {gpu + 1} has no GPU ({gpus} here); "
            "start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(gpu)


def parallel(model, args):
    """What to call in a training step: model, compiled and distributed if asked to."""
    net = torch.compile(model) if args.compile else model
    if WORLD_SIZE == 1:
        return net if args.compile else graphed(model)
    if RANK == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        full = count_float_parameters(model)
        averaged = f"{WORLD_SIZE} processes average {4 * trained:,} bytes a step"
        print(f"{averaged}; full fine-tuning {4 * full:,}", flush=True)
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    # find_unused_parameters: the deltas of a bucket that no process drew have no gradient
    return DistributedDataParallel(net, forward_sync_buffers=False, find_unused_parameters=True)


def count_float_parameters(model) -> int:
    """How many parameters model has, or had before it was quantized."""
    mine = deltas(model)
    kept = [p.numel() for name, p in model.named_parameters() if name not in mine]
    frozen = [layer.shape.numel() for layer in model.modules() if isinstance(layer, QuantLayer)]
    return sum(kept) + sum(frozen)


def my_share(tensors, args, parts=1):
    """This process's share of tensors (N, ...) that all processes have drawn alike, on its device.

    A batch consists of `parts` parts of equal length, and each process gets its share of each part.
    Of the two parts i0 i1 i2 i3 | c0 c1 c2 c3, two processes get

        i0 i2 | c0 c2   and   i1 i3 | c1 c3
    """
    shares = []
    for tensor in tensors:
        by_part = tensor.unflatten(0, (parts, -1))  # (parts, N / parts, ...)
        mine = by_part[:, RANK::WORLD_SIZE].flatten(0, 1)  # (N / WORLD_SIZE, ...)
        if mine.dim() == 4:  # images
            mine = mine.to(memory_format=torch.channels_last)
        shares.append(mine.to(args.device))
    return shares

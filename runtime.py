"""What the scripts share around the method: files, flags, runs, processes."""

import argparse
import contextlib
import hashlib
import io
import os
import re
import shlex
import shutil
import signal
import sys
import textwrap
import threading
import zipfile
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from model import UNet
from quant import QuantLayer, bucket, deltas, equal_edges, quantize

try:
    import fcntl  # file locks
except ImportError:  # on Windows
    fcntl = None

BASE = Path(__file__).resolve().parent / "data" / "base.pt"  # the pretrained model that ships
RUN_FILES = ("state.pt", "base.pt", "adapter.pt", "tuned.pt", "grid.png")  # what runs save
SAVE_EVERY = 200  # steps between two states to --resume from


def environment(name, default):
    """The number in an environment variable, or -1 if it isn't a number."""
    text = os.environ.get(name, default)
    return int(text) if text.isdecimal() else -1


RANK = environment("RANK", "0")  # this process's number, set by torchrun
WORLD_SIZE = environment("WORLD_SIZE", "1")  # how many processes there are

# --------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------


def checksum(obj) -> str:
    """SHA-256 over the names, tensors and plain values in nested dicts, lists and tuples.

    Of a tensor it covers the dtype, the shape and the bytes.
    """
    digest = hashlib.sha256()
    for name, value in leaves(obj):
        if torch.is_tensor(value):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            as_bytes = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            digest.update(as_bytes.numpy())
        else:
            digest.update(f"{name} {value!r}\n".encode())
    return digest.hexdigest()


def leaves(obj, name=""):
    """Yield (name, value) for all that is in nested dicts, lists and tuples.

    {"a": 1, "b": [2]}  ->  ("", "dict 2"), ("['a']", 1), ("['b']", "list 1"), ("['b'][0]", 2)
    """
    if isinstance(obj, dict):
        items = obj.items()
    elif isinstance(obj, (list, tuple)):
        items = enumerate(obj)
    else:
        yield name, obj
        return
    yield name, f"{type(obj).__name__} {len(obj)}"
    for key, value in items:
        yield from leaves(value, f"{name}[{key!r}]")


def write_checkpoint(obj, file):
    """Write a dict with torch.save, and its checksum beside it."""
    torch.save({**obj, "checksum": checksum(obj)}, file)


def write_png(image, file):
    """Write a PIL image as PNG; for save(image, path, write_png)."""
    image.save(file, "png")


def file_size(obj) -> int:
    """The bytes that torch.save takes for obj."""
    file = io.BytesIO()
    torch.save(obj, file)
    return file.tell()


def save(obj, path, write=write_checkpoint):
    """Write obj to path by write(obj, file): to a temporary name first, which is then renamed.

    So path holds the old file or the new one, and never half of one. The new file has the mode of
    the old one, and a link stays a link: the file that it leads to is written. Raises ValueError if
    path can't be written.
    """
    target = where_to_write(path)
    contents = io.BytesIO()  # in memory first: torch.save hides the error of a full disk
    write(obj, contents)
    temporary = f"{target}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            if os.path.exists(target):
                shutil.copymode(target, temporary)
            file.write(contents.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it may not be there
            os.remove(temporary)
        if isinstance(error, OSError):
            raise ValueError(
                f"{path} can't be written ({error.strerror}); make room, or give another folder"
            ) from None
        raise


def where_to_write(path) -> str:
    """The file that path leads to, which needn't exist yet.

    Raises ValueError for a folder, a device and whatever else isn't a file.
    """
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise ValueError(f"{path} is a folder or a device; give the path of a file")
    return target


def load(path, *kinds) -> dict:
    """Read a checkpoint that save wrote, whose "kind" is one of kinds.

    Raises ValueError if it is missing, damaged, of another kind, or not written by save.
    """
    if not os.path.exists(path):
        raise ValueError(
            f"{path} doesn't exist; give the path of a checkpoint ({' or '.join(kinds)})"
        )
    try:
        saved = read_checkpoint(path)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} is damaged or not a checkpoint ({reason_of(error)}); "
            "give one that this project wrote"
        ) from None
    if saved.pop("checksum", None) is None:
        raise ValueError(
            f"{path} has no checksum: an older version wrote it, or another program; make it again"
        )
    if saved.get("kind") not in kinds:
        wanted = " or ".join(kinds)
        raise ValueError(f"{path} is of kind '{saved.get('kind')}'; give one of kind {wanted}")
    return saved


def reason_of(error) -> str:
    """The start of an error's text, in one line."""
    return textwrap.shorten(str(error) or type(error).__name__, 100)


def read_checkpoint(path) -> dict:
    """Read what write_checkpoint wrote. Whatever else the file holds, some exception is raised.

    The file may come from anyone. It never takes much more memory than its size. A checksum may be
    missing.
    """
    if not os.path.isfile(path):  # reading a FIFO or a device might never end
        raise ValueError("not a file")
    with open(path, "rb") as file:
        check_zip(file)
        file.seek(0)
        saved = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ValueError("not a dict")
    for _, value in leaves(saved):
        # a few bytes can be stretched, by strides of 0, into a tensor of any size
        if torch.is_tensor(value) and value.nbytes > os.path.getsize(path):
            raise ValueError("a tensor that is larger than the file")
    contents = {key: value for key, value in saved.items() if key != "checksum"}
    if "checksum" in saved and checksum(contents) != saved["checksum"]:
        raise ValueError("not what was saved")
    return saved


def check_zip(file):
    """Raise an exception if a zip file is damaged, or isn't as torch.save writes it: uncompressed.

    torch.load checks neither, and some gigabytes of zeros fit into a small compressed file.
    """
    archive = zipfile.ZipFile(file)
    unpacked = 0
    for member in archive.infolist():
        unpacked += member.file_size
        if member.compress_type != zipfile.ZIP_STORED:
            raise ValueError("a member is compressed")
    if unpacked > os.fstat(file.fileno()).st_size:
        raise ValueError("members that are larger than the file")
    if archive.testzip() is not None:  # the first damaged member
        raise ValueError("a member is damaged")


def load_model(path, device="cpu") -> UNet:
    """The model of a checkpoint, float or quantized, ready to sample.

    Raises ValueError if the file holds none.
    """
    saved = load(path, "model", "quantized")
    try:
        check_sizes(saved)
        model = build_model(saved)
        check_values(saved["model"], model.state_dict())
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(
            f"{path} doesn't hold a whole model of this version ({reason_of(error)}); make it again"
        ) from None
    model.load_state_dict(saved["model"])
    return model.to(device, memory_format=torch.channels_last).eval()


def check_sizes(saved):
    """Raise an exception if the model that a checkpoint describes is larger than what it holds.

    Sizes that are wrong could take any memory and time. So the layers are counted before they are
    made, and the parameters are counted in a model on the meta device, which has no values.
    """
    tensors = saved["model"].values()
    config = saved["config"]
    count = config["blocks"] * len(config["channels"])
    if saved["kind"] == "quantized":
        for key in ("edges", "keep8", "keep_float"):
            count += len(saved["quant_config"][key])
    if count > len(tensors):
        raise ValueError("more layers, buckets and patterns than tensors")

    storages = [value.untyped_storage() for value in tensors]
    held = {storage.data_ptr(): storage.nbytes() for storage in storages}  # views share one
    with torch.device("meta"):
        model = UNet(**config)
    parameters = sum(p.numel() for p in model.parameters())
    if parameters > 4 * sum(held.values()):  # a parameter takes at least 2 bits
        raise ValueError("more parameters than the tensors hold")


def build_model(saved) -> UNet:
    """A model like the one of a checkpoint, without its values."""
    model = UNet(**saved["config"])
    if saved["kind"] == "quantized":
        # minmax is the quickest way to layers of the right shape
        config = saved["quant_config"]
        quantize(model, **{**config, "calibration": "minmax"})
        model.quant_config["calibration"] = config["calibration"]
        if model.quant_config != config:
            raise ValueError("a quant_config that quantize wouldn't write")
    return model


def check_values(values, like):
    """Raise ValueError unless values are tensors with the names and shapes of like, all finite.

    A float may have any dtype, other values have the same.
    """
    if values.keys() != like.keys():
        raise ValueError("other names")
    for name, value in values.items():
        expected = like[name]
        both_float = value.is_floating_point() and expected.is_floating_point()
        same_dtype = both_float or value.dtype == expected.dtype
        if value.shape != expected.shape or not same_dtype:
            raise ValueError(f"{name} has another shape or dtype")
        if not value.isfinite().all():
            raise ValueError(f"{name} isn't finite")


# --------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------


def filled(text):
    """The type of a flag that may not be empty; an unset shell variable would make it so."""
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

    def seed(self, help, group=None):
        """Add --seed. A generator of PyTorch on the CPU has seeds of 32 bits and drops the rest."""
        self.number("--seed", int, 0, 2**32 - 1, 0, help, group)

    def device(self):
        """Add --device; its default is the best one on this machine."""
        found = ["cpu"]
        if torch.backends.mps.is_available():
            found.insert(0, "mps")
        if torch.cuda.is_available():
            found.insert(0, "cuda")
        help = f"device to compute on, one of this machine's (default: {found[0]})"
        self.add_argument("--device", choices=found, default=found[0], help=help)

    def add_run_flags(self, steps, lr, lr_help, batch, batch_help, out_help):
        """Add the flags of a training run with these defaults and helps; return their group."""
        run = self.add_argument_group("run")
        self.number("--steps", int, 0, 10**7, steps, "optimizer steps", run)
        self.number("--lr", float, 0, 10, lr, lr_help, run)
        self.number("--batch", int, 1, 4096, batch, batch_help, run)
        self.seed("seed of everything random", run)
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


def is_out_of_memory(error) -> bool:
    """True for what Python and PyTorch raise if there is too little memory."""
    if isinstance(error, MemoryError):
        return True
    said = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, CPU, Windows
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


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
        except (ValueError, OSError, RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                error = ValueError("there is too little memory; lower --batch or --n, or free some")
            lost_peer = "peer" in str(error)  # another torchrun process has died
            if isinstance(error, RuntimeError) and not lost_peer:
                raise
            if isinstance(error, OSError):
                path = error.filename or "the output"
                error = f"{path} can't be used ({error.strerror or error}); give another path"
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
    path = folder / "lock"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise ValueError(f"{path} is not the lock of a run; remove it, or choose another --out")
    file = open(path, "a")  # it isn't emptied: it may be a file of the user's
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
    """The flags that a run must share with the one that it resumes, torchrun's among them."""
    # what doesn't change the training
    free = ["resume", "out", "device", "compile", "checkpoint", "sample_steps"]
    free += ["no_checkpoint", "n", "guidance"]  # flags of examples/stable_diffusion.py
    flags = {key: str(value) for key, value in vars(args).items() if key not in free}
    return {**flags, "nproc_per_node": str(WORLD_SIZE)}


def load_state(args, kind, inputs=None, may_differ=()) -> dict:
    """The state that the last run in args.out saved. Leftovers of a killed run are removed.

    inputs: {flag: checksum of the file or folder that it names}, compared with those in the state.
    Raises ValueError if there is no state, if a flag differs that isn't in may_differ, or if an
    input does.
    """
    path = args.out / "state.pt"
    if not path.exists():
        raise ValueError(f"{path} doesn't exist, so nothing can go on; start without --resume")
    saved = load(path, kind)
    if RANK == 0:  # it holds the lock of the folder
        remove_leftovers(args.out)
    was = saved.get("args")
    inputs = inputs or {}
    inputs_then = saved.get("inputs", {})
    if not isinstance(was, dict) or not isinstance(inputs_then, dict):
        raise not_whole(path)
    if not inputs.keys() <= inputs_then.keys():
        raise not_whole(path)
    flags = describe(args)
    differ = [key for key in flags if was.get(key) != flags[key] and key not in may_differ]
    if differ:
        flags = " ".join(as_flag(key, was.get(key, "None")) for key in differ)
        raise ValueError(
            f"{path} comes from a run with {flags}; resume with the same, or start without --resume"
        )
    for flag, value in inputs.items():
        if inputs_then[flag] != value:
            raise ValueError(
                f"{path} comes from a run for which --{flag} had other contents; "
                "bring them back, or start without --resume"
            )
    return saved


def as_flag(key, value) -> str:
    """What a user types, or doesn't, for an argument that describe has made text."""
    flag = "--" + key.replace("_", "-")
    if value == "True":
        return flag
    if value in ("False", "None"):
        return f"no {flag}"
    return f"{flag} {textwrap.shorten(str(value), 60)}"


def remove_leftovers(folder):
    """Remove the temporary files of save that killed runs have left in a run's folder."""
    if fcntl is None:  # on Windows, where os.kill would end a process
        return
    for path in folder.glob("*.tmp"):
        parts = re.fullmatch(r"(.+)\.(\d{1,9})\.tmp", path.name)
        if parts and parts[1] in RUN_FILES and not is_running(int(parts[2])):
            path.unlink(missing_ok=True)


def is_running(pid) -> bool:
    """True if another process has this number."""
    if pid == os.getpid():  # a container gives the same number to run after run
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except PermissionError:  # it is someone else's
        return True
    return True


def check_state(saved, args, optimizer, **values):
    """Raise ValueError unless a state of load_state fits this run. Nothing is changed.

    values: for each key of the state, the tensors that its contents will overwrite, {name: tensor}.
    """
    path = args.out / "state.pt"
    try:
        for name, like in values.items():
            check_values(saved[name], like)
        check_optimizer(saved["optimizer"], optimizer)
        torch.Generator().set_state(saved["generator"])
        whole = type(saved["step"]) is int and saved["step"] >= 0
    except Exception:
        whole = False
    if not whole:
        raise not_whole(path)
    if saved["step"] > args.steps:
        raise ValueError(f"{path} is at step {saved['step']} already; give --steps at least that")


def restore(saved, args, optimizer, generator, **values) -> int:
    """Put a state of load_state into the run. Returns its step, the first that is left to do.

    values: as for check_state. Raises ValueError, before anything is changed, if it doesn't fit.
    """
    check_state(saved, args, optimizer, **values)
    with torch.no_grad():
        for name, tensors in values.items():
            for key, tensor in tensors.items():
                tensor.copy_(saved[name][key])
    optimizer.load_state_dict(saved["optimizer"])
    generator.set_state(saved["generator"])
    return saved["step"]


def state_after(step, args, optimizer, generator, **contents) -> dict:
    """What state.pt holds after so many steps: contents, and what every run needs to go on."""
    return {
        "step": step,
        "args": describe(args),
        "optimizer": optimizer.state_dict(),
        "generator": generator.get_state(),
        **contents,
    }


def not_whole(path) -> ValueError:
    """The error for a state that isn't as this version saves it."""
    return ValueError(
        f"{path} doesn't hold a whole state of this version; start again without --resume"
    )


def check_optimizer(saved, optimizer):
    """Raise an exception unless saved is a state of this Adam or AdamW, all of it finite."""
    groups = optimizer.state_dict()["param_groups"]
    if without_lr(saved["param_groups"]) != without_lr(groups):  # each step has its own lr
        raise ValueError("other arguments, or another version of PyTorch")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbered = dict(enumerate(parameters))
    for number, moments in saved["state"].items():
        p = numbered[number]
        check_values(moments, {"step": torch.tensor(0.0), "exp_avg": p, "exp_avg_sq": p})


def without_lr(groups) -> list[dict]:
    """Copies of an optimizer's groups without the learning rate."""
    return [{key: value for key, value in group.items() if key != "lr"} for group in groups]


class Loop:
    """The steps of a training run, `for step in loop`, with what surrounds a step.

    It shows a progress bar. It calls save_state(step) every SAVE_EVERY steps, after the last step,
    and on a stop signal (Ctrl-C, SIGTERM, SIGHUP), which lets the current step end and then ends
    the script. T: the end of the timesteps 0 .. T, for each quarter of which the loss is
    shown. trained: the parameters, which must be finite to be saved.
    """

    def __init__(self, title, args, first, T, trained, save_state):
        self.args = args
        self.quarters = equal_edges(4, T)
        self.trained = list(trained)
        self.save_state = save_state
        self.step = first
        self.last_saved = first
        self.means = {}  # a running mean of the loss of each quarter
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
        """Raise ValueError if a parameter isn't finite as float16, the dtype of an adapter.

        watch has seen the loss before the last update, but not after it.
        """
        if not all(p.detach().half().isfinite().all() for p in self.trained):
            raise ValueError(
                f"the parameters are no longer finite after step {done}; "
                f"--lr {self.args.lr} is too high, lower it ({self.last_good()})"
            )

    def watch(self, error, t):
        """Show the running mean of the errors (N,) at timesteps t (N,), for each quarter.

        Raises ValueError if an error isn't finite. Call it before the update: then the parameters
        are still good.
        """
        error = error.detach().cpu()
        t = t.cpu()
        finite = error.isfinite()
        if not finite.all():
            self.diverged(t[~finite])
        quarter = bucket(t, self.quarters)
        for i in quarter.unique().tolist():
            mean = error[quarter == i].mean().item()
            old = self.means.get(i, mean)
            self.means[i] = 0.98 * old + 0.02 * mean
        shown = " ".join(f"{self.means[i]:.4f}" for i in sorted(self.means))
        self.bar.set_postfix_str(f"loss by quarter of t {shown}", refresh=False)

    def diverged(self, t):
        """Raise ValueError: the loss isn't finite at timesteps t (n,)."""
        low = t.min().item()
        high = t.max().item()
        where = f"t = {low}" if low == high else f"timesteps from {low} to {high}"
        raise ValueError(
            f"the loss is no longer finite after {self.step} steps, at {where}; "
            f"--lr {self.args.lr} is too high, lower it ({self.last_good()})"
        )

    def last_good(self):
        """Where the last state from before the divergence is."""
        if self.last_saved == 0:
            return "this run has saved no state yet"
        return f"{self.args.out / 'state.pt'} has step {self.last_saved}"


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
    """The module to call in a training step: model, compiled and distributed if asked to."""
    net = torch.compile(model) if args.compile else model
    if WORLD_SIZE == 1:
        return net
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

"""For all scripts: flags with ranges, and errors of one line."""

import argparse
import sys
from pathlib import Path

import torch

from support.processes import use_gpu_of_process


class Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Help with the defaults, where there are any."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one line, and with the defaults in its help."""

    def __init__(self, description):
        super().__init__(description=description, formatter_class=Defaults)

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")

    def add_seed(self):
        """Add --seed. A thousand times as much must fit into the 32 bits of a seed of PyTorch's."""
        seed = number(0, 4_000_000)
        self.add_argument("--seed", type=seed, default=0, help="of everything random")

    def add_device(self):
        """Add --device; its default is the best one on this machine."""
        found = ["cpu"]
        if torch.backends.mps.is_available():
            found.insert(0, "mps")
        if torch.cuda.is_available():
            found.insert(0, "cuda")
        self.add_argument("--device", choices=found, default=found[0], help="where to compute")

    def add_training(self):
        """Add the flags that runs of training share, whatever they train."""
        self.add_seed()
        self.add_device()
        self.add_argument("--resume", action="store_true", help="go on from the state in --out")
        compile_help = "torch.compile: shorter steps after a minute or two of compiling"
        self.add_argument("--compile", action="store_true", help=compile_help)

    def parse_args(self, argv=None, namespace=None):
        args = super().parse_args(argv, namespace)
        if getattr(args, "device", None) == "cuda":
            use_gpu_of_process()
        return args


def number(low, high):
    """The type of a flag that takes a number from low to high: a whole one, if both are ints."""
    is_whole = isinstance(low, int) and isinstance(high, int)
    kind, name = (int, "a whole number") if is_whole else (float, "a number")

    def check(text):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:  # False for NaN
            raise argparse.ArgumentTypeError(f"must be {name} from {low} to {high}, not '{text}'")
        return value

    return check


def path(text: str) -> Path:
    """The type of a flag that is a path. An unset variable of a shell would make it empty."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path")
    return Path(text)


def guard(main):
    """Run a script's main function. Bad input ends with one sentence and exit code 2."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        print(f"{Path(sys.argv[0]).name}: {sentence_for(error)}", file=sys.stderr)
        sys.exit(2)


def sentence_for(error) -> str:
    """What a user is told. Raises the error again if it is a fault of the code itself."""
    if isinstance(error, OSError):
        path = error.filename or "the output"
        return f"{path} can't be used ({error.strerror or error}); give another path"
    if isinstance(error, ValueError):
        return str(error)
    text = str(error).lower()
    if isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text:
        return "there is too little memory; lower --batch or --n, or free some"
    if "by peer" in text:
        return "another process has ended; go on with --resume"
    if "torch._dynamo" in type(error).__module__ or "torch._inductor" in type(error).__module__:
        reason = text.strip().splitlines()[0]
        return f"--compile failed ({reason}); install a C++ compiler such as g++, or leave it out"
    raise error

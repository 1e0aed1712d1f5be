"""What the tests share: one thread and one seed for PyTorch, and a script without a new process."""

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton, if it is installed, reads it when imported

from quant import deltas
from runtime import guard

ROOT = Path(__file__).resolve().parents[1]

torch.set_num_threads(1)  # for tensors this small, threads cost more than they give


def pytest_runtest_setup():
    """Random tensors don't depend on which tests ran before."""
    torch.manual_seed(0)


def run(script, *args):
    """Run a script's main function with these arguments, and return its exit code."""
    before = sys.argv
    sys.argv = [f"{script.__name__}.py", *map(str, args)]
    try:
        guard(script.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = before


@torch.no_grad()
def spread(model):
    """model with deltas that are no longer zero, the same each time, so that the buckets differ."""
    generator = torch.Generator().manual_seed(1)
    for delta in deltas(model).values():
        delta.copy_(torch.rand(delta.shape, generator=generator) - 0.5)
    return model

import os
import sys
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
torch.set_num_threads(1)  # for tensors this small, threads cost more than they give


def run(script, *args):
    """Run a script in this process; returns its exit code (0 if it returned)."""
    from runtime import guard

    argv, sys.argv = sys.argv, [f"{script.__name__}.py", *map(str, args)]
    try:
        guard(script.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv

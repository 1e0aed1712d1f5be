"""For runs.py: several processes, started by torchrun, train like one with a larger batch.

Each draws the same random numbers, takes its share of the batch, and averages its gradients with
the others'. The first one, of rank 0, saves and reports.
"""

import os

import torch
from torch.nn.parallel import DistributedDataParallel

RANK = int(os.environ.get("RANK", 0))  # this process's number, set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are


def use_gpu_of_process():
    """Use the GPU that belongs to this process. Raises ValueError if there is none."""
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if gpu >= gpus:
        raise ValueError(
            f"process {gpu + 1} has no GPU ({gpus} here); "
            "start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(gpu)


def parallel(model, device):
    """The module to call in a training step: model, distributed over the processes."""
    if WORLD_SIZE == 1:
        return model
    if RANK == 0:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"{WORLD_SIZE} processes average {4 * trained:,} bytes a step", flush=True)
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    # find_unused_parameters: the deltas of a bucket that no process drew have no gradient
    return DistributedDataParallel(model, forward_sync_buffers=False, find_unused_parameters=True)


def share_of_process(tensors, device, parts=1):
    """This process's share of tensors (N, ...) that all processes have drawn alike, on its device.

    A batch consists of `parts` parts of equal length, and each process gets its share of each part.
    Of the two parts i0 i1 i2 i3 | c0 c1 c2 c3, two processes get

        i0 i2 | c0 c2   and   i1 i3 | c1 c3
    """
    shares = []
    for tensor in tensors:
        by_part = tensor.unflatten(0, (parts, -1))  # (parts, N / parts, ...)
        share = by_part[:, RANK::WORLD_SIZE].flatten(0, 1)  # (N / WORLD_SIZE, ...)
        if share.dim() == 4:  # images
            share = share.to(memory_format=torch.channels_last)
        shares.append(share.to(device))
    return shares

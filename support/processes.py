"""Several processes, started by torchrun, that train like one with a larger batch.

Each draws the same random numbers, takes its share of the batch, and averages its gradients with
the others'. The first one, of rank 0, saves and reports.
"""

import os

import torch
from torch.nn.parallel import DistributedDataParallel

RANK = int(os.environ.get("RANK", 0))  # this process's number, set by torchrun
WORLD_SIZE = int(os.environ.get("WORLD_SIZE", 1))  # how many processes there are


def use_device(device: str):
    """Use the GPU that belongs to this process, if the device is cuda.

    Raises ValueError if there are fewer GPUs than processes.
    """
    if device != "cuda":
        return
    gpu = int(os.environ.get("LOCAL_RANK", 0))
    gpus = torch.cuda.device_count()
    if gpu >= gpus:
        raise ValueError(
            f"process {gpu + 1} has no GPU ({gpus} here); "
            "start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(gpu)


def say(text: str):
    """Print a line, once for all processes."""
    if RANK == 0:
        print(text, flush=True)


def parallel(model, args):
    """The module to call in a training step: model, compiled and distributed if asked to."""
    net = torch.compile(model) if args.compile else model
    if WORLD_SIZE == 1:
        return net
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    say(f"{WORLD_SIZE} processes average {4 * trained:,} bytes a step")
    torch.distributed.init_process_group("nccl" if args.device == "cuda" else "gloo")
    # find_unused_parameters: the deltas of a bucket that no process drew have no gradient
    return DistributedDataParallel(net, forward_sync_buffers=False, find_unused_parameters=True)


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

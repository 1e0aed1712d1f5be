"""CUDA graphs of a model's calls: thousands of kernels in one launch.

experiments/gpu.py measures what they give. train.py and sample.py don't use them yet: seven of the
tests of graphs failed on a GPU, and this file was changed since and has not run on one again.
"""

import torch
import torch.nn as nn
from torch.func import functional_call

from quant import Batch, batch_of, set_batch

MOST_RECORDINGS = 32  # of one model; in training, each holds a gradient of all that trains


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
    each set of shapes, and each mode (training, gradients, autocast).

    The first call of its kind is a plain one, in which kernels are compiled and chosen. The second
    is recorded and replayed. The next call may overwrite what a call returned and kept for
    backward, so backward comes before it. A gradient is the recording's own memory, too, which the
    next backward overwrites. So gradients don't add up, and zero_grad(), which drops them, comes
    before each backward.
    """

    def __init__(self, model):
        self.model = model
        self.seen = set()  # the kinds of calls that there were
        self.recordings = {}  # by kind
        self.pool = torch.cuda.graph_pool_handle()  # memory that the graphs share

    def __call__(self, x, t, *others):
        """model(x, t, *others), all of them tensors without gradients.

        t: the timesteps (N,), best on the CPU. From a GPU they have to be waited for, if there are
        several buckets.
        """
        batch = self.batch_of(t)
        # with t on the CPU, nothing here waits for what the GPU has yet to do
        index = batch.index.to(x.device, non_blocking=True)
        tensors = (x, t.to(x.device, non_blocking=True), *others)
        shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        autocast = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda")
        modes = (self.model.training, torch.is_grad_enabled(), autocast)
        kind = (tuple(batch.present), tuple(batch.counts), shapes, modes)
        if kind not in self.recordings:
            is_full = len(self.recordings) == MOST_RECORDINGS
            if is_full or kind not in self.seen:
                self.seen.add(kind)
                return self.model(*tensors)
            self.recordings[kind] = record(self.model, batch, index, tensors, self.pool)
        return self.recordings[kind](index, *tensors)

    def batch_of(self, t):
        """The quant.Batch of t, on the CPU. A model with one bucket, or a float one, needs none.

        Only columns by position have a convolution for each bucket, whose shape is in counts.
        """
        config = getattr(self.model, "quant_config", None)
        if config is None or len(config["edges"]) == 2:
            return Batch([], torch.zeros(1, dtype=torch.long))
        batch = batch_of(t.cpu(), config["edges"])
        counts = batch.counts if config["columns"] == "position" else []
        return Batch(batch.present, batch.index, counts)


class Forward(nn.Module):
    """model.forward alone: the model's hooks don't run in a recording.

    A quantized model's hook finds the buckets in t. For that the CPU waits for the GPU, which a
    recording can't hold.
    """

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args):
        return self.model.forward(*args)


def record(model, batch, index, tensors, pool):
    """CUDA graphs of model(*tensors), for these buckets: a function of index and tensors."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    static = [tensor.clone() for tensor in (index, *tensors)]
    # A parameter that an earlier call still holds for backward can't be recorded, but an alias of
    # the same memory can.
    aliases = [p.detach().requires_grad_() for p in trained.values()]
    # without autocast's cache: a weight that was cast before would not be cast in the recording
    with torch.autocast("cuda", enabled=torch.is_autocast_enabled("cuda"), cache_enabled=False):
        graph = torch.cuda.make_graphed_callables(
            with_known_buckets(model, batch, list(trained)),
            (*static, *aliases),
            num_warmup_iters=1,
            allow_unused_input=True,  # the deltas of other buckets
            pool=pool,
        )

    def replay(index, *tensors):
        return graph(index, *tensors, *trained.values())

    return replay


def with_known_buckets(model, batch, names):
    """model(*tensors) for these buckets, as a function of (index, *tensors, *parameters).

    names: of the parameters, in this order.
    """
    forward = Forward(model)

    def call(index, *inputs):
        first = len(inputs) - len(names)
        parameters = {f"model.{name}": p for name, p in zip(names, inputs[first:])}
        with set_batch(Batch(batch.present, index, batch.counts)):
            return functional_call(forward, parameters, inputs[:first])

    return call

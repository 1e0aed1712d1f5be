"""For quant.py: a layer whose scales and deltas stay precise in a half-precision model."""

import torch
import torch.nn as nn


class KeepsPrecision(nn.Module):
    """A module whose tensors keep at least float32, but for its bias, which follows the model.

    A small scale would become 0 in float16, and a delta would lose the steps of the optimizer to
    rounding. Codes stay integers.

    dtype: that of the model, of which the module is a part.
    """

    def _apply(self, fn, recurse=True):
        """What model.half(), model.to("cuda") and the like call, with an fn for every tensor."""

        def keep_precision(tensor):
            moved = fn(tensor)
            is_precise = tensor.is_floating_point() and moved.dtype.itemsize >= 4
            if moved.dtype == tensor.dtype or is_precise:
                return moved
            return tensor.to(moved.device)

        nothing = torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)
        self.dtype = fn(nothing).dtype
        super()._apply(keep_precision, recurse)
        if self.bias is not None:
            self.bias.data = self.bias.data.to(self.dtype)
        return self

"""What the work of a token launches on a device, counted without one: on tensors that have shapes alone."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")

# Operators that only look at memory in another way, or reserve it.
VIEWS = {
    *("alias", "as_strided", "detach", "expand", "movedim", "narrow", "permute", "select", "slice", "split"),
    *("split_with_sizes", "chunk", "squeeze", "t", "transpose", "unbind", "unflatten", "unsqueeze", "view"),
    *("_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "promote_types"),
}
COPIES_WHERE_IT_MUST = {"contiguous", "flatten", "reshape", "to", "_to_copy"}
# Operators whose result, or whose shape, the host has to wait for.
WAITS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}


class Launches(TorchDispatchMode):
    """Counts the operators that launch something, by name, and collects what a captured step may not do."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []

    @property
    def total(self) -> int:
        return self.counts.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name == "scaled_dot_product_attention":  # one kernel on a device, and a sum of many parts without
            self.counts[name] += 1
            batch, heads, length, dim = args[0].shape
            # as the kernels leave it: queries by heads in memory
            return args[0].new_empty(batch, length, heads, dim).transpose(1, 2)
        out = func(*args, **kwargs)
        if name in WAITS:
            self.problems.append(f"{name} waits for the device")
        tensors = [each for each in (*args, *kwargs.values(), out) if isinstance(each, Tensor)]
        # A number on the host, of no dimension, travels with the launch.
        if len({each.device for each in tensors if each.ndim}) > 1:
            self.problems.append(f"{name} copies between devices")
        if name in COPIES_WHERE_IT_MUST:
            if out.untyped_storage()._cdata != args[0].untyped_storage()._cdata:
                self.counts["copy"] += 1
        elif name not in VIEWS:
            self.counts[name] += 1
        return out

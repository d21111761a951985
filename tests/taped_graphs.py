"""Captured steps without CUDA: operators are recorded on a CPU and run again on the very memory, without Python."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextstep_core.runtime.graphs import StepGraphs

CPU = torch.device("cpu")
FLOAT_NOISE = 1e-5  # kernels round by how memory is aligned
FAST = {"steps": 3, "cfg": 3.0, "sampler": "score-sde-1.0"}


class Tape(TorchDispatchMode):
    """Replays recorded operators without Python: what Python decided while recording stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


class Recorder:
    """What a recorder does around its recordings: nothing."""

    def __init__(self, device: torch.device) -> None:
        pass

    def forget(self) -> None:
        pass

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        return function()


class TapeRecorder(Recorder):
    recordings = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        TapeRecorder.recordings += 1
        tape = Tape()
        with tape:
            function()
        return tape.replay


class CPUGraphs(StepGraphs):
    def supports(self, device: torch.device) -> bool:
        return not self.broken

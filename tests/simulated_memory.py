"""The simulated Apple GPU with a scale: how many bytes its tensors take, and the most that they have taken."""

from __future__ import annotations

import weakref
from typing import Any

from simulated_mps import SimulatedMPS, SimulatedTensor
from torch.utils._pytree import tree_leaves


class WeighedMPS(SimulatedMPS):
    """Counts the memory behind every simulated tensor for as long as one of them lives, temporary ones included. What
    a kernel takes for itself alone is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.peak = 0, 0
        self._users: dict[int, int] = {}

    def _compute(self, func: Any, args: tuple, kwargs: dict) -> Any:
        result = super()._compute(func, args, kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, SimulatedTensor) and not hasattr(tensor, "weighed"):
                self._weigh(tensor)
        return result

    def _weigh(self, tensor: SimulatedTensor) -> None:
        tensor.weighed = True
        memory = tensor.inner.untyped_storage()
        place, size = memory.data_ptr(), memory.nbytes()
        self._users[place] = self._users.get(place, 0) + 1
        if self._users[place] == 1:
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
        weakref.finalize(tensor, self._gone, place, size)

    def _gone(self, place: int, size: int) -> None:
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self.bytes -= size

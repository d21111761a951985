"""CUDA graphs: the work of a token is captured once and replayed, so that no Python runs per network call.

An option beside the decoding: without it the same functions run as they are. Method: Gray, "Getting Started with CUDA
Graphs" (2019), through `torch.cuda.CUDAGraph`. A capture that fails, or whose replay differs from the plain run, is
given up with one warning.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

log = logging.getLogger(__name__)

Step: TypeAlias = Callable[..., Tensor]
# A replay runs the same kernels on the same numbers; split reductions may still add up in another order.
TOLERANCE = 0.02


class CudaRecorder:
    """Records what a function launches, without running it, and launches it again in one call."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, function: Callable[[], Any]) -> Callable[[], None]:
        """The replay of everything that `function` did to tensors made before."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            function()
        return graph.replay


@dataclass
class CaptureState:
    """Shared by a model's captured steps, which do not refer to each other: a reference cycle would keep their memory
    and the model until the garbage collector runs."""

    broken: bool = False

    def give_up(self, reason: RuntimeError) -> None:
        """Capture nothing from here on."""
        self.broken = True
        log.warning("CUDA graphs are off for this model, which makes it slower: %s", str(reason).splitlines()[0])


class StepGraphs:
    """Keeps the captured steps of the last run, and makes new ones when shapes, settings or weights have changed."""

    def __init__(self, model: nn.Module, make_recorder: Callable[[], Any] = CudaRecorder) -> None:
        self._model, self._make_recorder = model, make_recorder
        self._key: Hashable = None
        self._steps: Any = None
        self._state = CaptureState()

    @property
    def broken(self) -> bool:
        """Whether captures were given up."""
        return self._state.broken

    def fit(self, device: torch.device) -> bool:
        """Whether steps on `device` can be captured: on CUDA, with every weight there. If not, nothing is kept."""
        tensors = self._model.state_dict().values()
        fit = not self.broken and device.type == "cuda" and all(tensor.device == device for tensor in tensors)
        if not fit:
            self.clear()
        return fit

    def steps(self, key: Hashable, make: Callable[[Callable[[Step], Step]], Any]) -> Any:
        """What `make` returned for an equal `key` before, else anew; `make` gets the wrap for its steps."""
        key = (key, tuple(tensor.data_ptr() for tensor in self._model.state_dict().values()))
        if key != self._key:
            self.clear()
            recorder, state = self._make_recorder(), self._state
            self._steps, self._key = make(lambda step: Replayed(step, recorder, state)), key
        return self._steps

    def clear(self) -> None:
        """Forget everything captured, and with it the memory that it holds."""
        self._key = self._steps = None


class Replayed:
    """A step of tensors with fixed shapes; keyword arguments tell variants apart, each with a recording of its own.

    The first call of a variant runs it as it is, which warms up what the recording needs, then records it, replays it
    on the same inputs and compares. What a call returns is overwritten by the next.
    """

    def __init__(self, step: Step, recorder: Any, state: CaptureState) -> None:
        self._step, self._recorder, self._state = step, recorder, state
        self._inputs: tuple[Tensor, ...] = ()
        self._variants: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor, **variant: Hashable) -> Tensor:
        if self._state.broken:
            self._inputs, self._variants = (), {}
            return self._step(*inputs, **variant)
        if not self._inputs:
            self._inputs = tuple(tensor.clone() for tensor in inputs)
        for kept, tensor in zip(self._inputs, inputs):
            kept.copy_(tensor)
        key = tuple(variant.items())
        if key not in self._variants:
            return self._first(key, variant)
        replay, output = self._variants[key]
        replay()
        return output

    def _first(self, key: Hashable, variant: dict[str, Hashable]) -> Tensor:
        plain = self._step(*self._inputs, **variant)
        output = torch.empty_like(plain)
        try:
            replay = self._recorder.record(lambda: output.copy_(self._step(*self._inputs, **variant)))
            replay()
            error = float((output - plain).norm() / plain.norm().clamp_min(1e-6))
            if not error <= TOLERANCE:
                raise RuntimeError(f"a replay differs from the plain run by {error:.1%}")
            self._variants[key] = replay, output
        except RuntimeError as reason:
            self._state.give_up(reason)
        return plain

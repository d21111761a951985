"""CUDA graphs: the work of a token is captured once and replayed, so that no Python runs per network call.

An option beside the decoding: without it the same functions run as they are. Method: Gray, "Getting Started with CUDA
Graphs" (2019), through `torch.cuda.CUDAGraph`. A capture that fails, or whose replay differs from the plain run, is
given up with one warning; one that fails for want of memory is tried again in the next run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import is_out_of_memory
from .capture import CudaRecorder

log = logging.getLogger(__name__)

# A replay runs the same kernels on the same numbers; split reductions may still add up in another order.
TOLERANCE = 0.02
ON_AMD = "NEXTSTEP_GRAPHS_ON_AMD"
RUNS_PLAIN = "runs_plain"  # an attribute of modules that wait for other processes, which no recording can


class Step(Protocol):
    """A function of tensors with fixed shapes; keyword arguments tell variants apart."""

    @property
    def reads(self) -> Sequence[nn.Module]:
        """The modules whose weights it reads."""

    def __call__(self, *inputs: Any, **variant: Any) -> Tensor: ...


@dataclass
class CaptureState:
    """Shared by a model's captured steps, which do not refer to each other: a reference cycle would keep their memory
    and the model until the garbage collector runs."""

    broken: bool = False
    short_of_memory: bool = False

    @property
    def off(self) -> bool:
        """Whether nothing is captured at present."""
        return self.broken or self.short_of_memory

    def give_up(self, reason: Exception) -> None:
        """Capture nothing from here on, or for this run where there was no memory for it."""
        self.short_of_memory = isinstance(reason, RuntimeError) and is_out_of_memory(reason)
        self.broken = not self.short_of_memory
        span = "in this run, for lack of memory" if self.short_of_memory else "for this model"
        said = str(reason).splitlines() or [type(reason).__name__]
        log.warning("CUDA graphs are off %s, which makes it slower: %s", span, said[0])


class StepGraphs:
    """Keeps the captured steps of the last run, and makes new ones when shapes, settings or weights have changed."""

    def __init__(self, model: nn.Module, make_recorder: Callable[[torch.device], Any] = CudaRecorder) -> None:
        self._model, self._make_recorder = model, make_recorder
        self._key: Hashable = None
        self._steps: Any = None
        self._state = CaptureState()
        self._told = False

    @property
    def broken(self) -> bool:
        """Whether captures were given up for good."""
        return self._state.broken

    def supports(self, device: torch.device) -> bool:
        """Whether steps can be captured on `device`. If not, nothing is kept."""
        supported = not self.broken and device.type == "cuda" and not self._on_amd()
        if not supported:
            self.clear()
        return supported

    def _on_amd(self) -> bool:
        if torch.version.hip is None or os.environ.get(ON_AMD) == "1":
            return False
        if not self._told:
            log.info(
                "CUDA graphs are off: on AMD GPUs they are known to corrupt other models. Set %s=1 to use them anyway.",
                ON_AMD,
            )
        self._told = True
        return True

    def steps(self, key: Hashable, device: torch.device, make: Callable[[Callable[[Step], Step]], Any]) -> Any:
        """What `make` returned for an equal `key` before, else anew; `make` gets the wrap for its steps.

        A step is captured where all that it reads is on `device` and waits for nobody; of a model whose layers are
        streamed, or shared with other processes, the head's.
        """
        key = (key, device, tuple(tensor.data_ptr() for tensor in self._model.state_dict().values()))
        if key != self._key or self._state.short_of_memory:
            self.clear()
            self._state.short_of_memory = False  # there may be some by now
            recorder, state = self._make_recorder(device), self._state

            def wrap(step: Step) -> Step:
                weights = (tensor for module in step.reads for tensor in module.state_dict().values())
                plain = any(getattr(module, RUNS_PLAIN, False) for module in step.reads)
                fits = not plain and all(weight.device == device for weight in weights)
                return Replayed(step, recorder, state) if fits else step

            self._steps, self._key = make(wrap), key
        return self._steps

    def clear(self) -> None:
        """Forget everything captured, and with it the memory that it holds."""
        self._key = self._steps = None


class Replayed:
    """A step whose every variant is recorded, and replayed from then on.

    The first call of a variant runs it as it is, which warms up what the recording needs, then records it, replays it
    on the same inputs and compares. What a call returns is overwritten by the next.
    """

    def __init__(self, step: Step, recorder: Any, state: CaptureState) -> None:
        self._step, self._recorder, self._state, self.reads = step, recorder, state, step.reads
        self._inputs: tuple[Tensor, ...] = ()
        self._variants: dict[Hashable, tuple[Callable[[], None], Tensor]] = {}

    def __call__(self, *inputs: Tensor, **variant: Hashable) -> Tensor:
        if self._state.off:
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
        plain: Tensor = self._recorder.warm_up(lambda: self._step(*self._inputs, **variant))
        output = torch.empty_like(plain)
        try:
            replay = self._recorder.record(lambda: output.copy_(self._step(*self._inputs, **variant)))
            replay()
            error = float((output - plain).norm() / plain.norm().clamp_min(1e-6))
            if not error <= TOLERANCE:
                raise RuntimeError(f"a replay differs from the plain run by {error:.1%}")
            self._variants[key] = replay, output
        except Exception as reason:  # a layer of a host may fail in ways of its own
            self._state.give_up(reason)
            self._recorder.forget()
        return plain

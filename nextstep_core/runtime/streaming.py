"""Weights that did not fit on the device: brought there for as long as they are used.

What every flow step reads (the head and the projectors around it) comes once for the run; the transformer's layers pass
through a ring of buffers, one while the one before computes. Weights that are on the device already are left alone, so
without any to bring this does nothing.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import cast

import torch
from torch import Tensor, nn

from ..model.nextstep import NextStepModel
from .memory import format_bytes
from .ring import BUFFERS, Ring, aligned, packed_bytes, page_locked

log = logging.getLogger(__name__)


class OffloadedWeights:
    """The parameters of some modules that lie elsewhere than on the device, and their places."""

    def __init__(self, modules: Iterable[nn.Module], device: torch.device) -> None:
        self._own: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, tensor)
            for module in modules
            for name, tensor in module._parameters.items()
            if tensor is not None and tensor.device != device
        ]

    def __bool__(self) -> bool:
        return bool(self._own)

    @property
    def tensors(self) -> list[Tensor]:
        """The modules' own."""
        return [tensor for _, _, tensor in self._own]

    def replace(self, tensors: Iterable[Tensor]) -> None:
        """Put tensors in the place of the modules' own, in the order of `tensors`."""
        for (module, name, _), tensor in zip(self._own, tensors):
            module._parameters[name] = cast(nn.Parameter, tensor)  # a plain tensor will do for computing

    def restore(self) -> None:
        """Put the modules' own tensors back."""
        self.replace(self.tensors)


def streamed_bytes(model: NextStepModel) -> int:
    """The most device memory that weights need which do not stay there: the ring, and all that is no layer."""
    return passing_bytes({name: tensor.nbytes for name, tensor in model.named_parameters()})


def passing_bytes(sizes: Mapping[str, int]) -> int:
    """The same for a model whose tensors have these sizes, by name."""
    layers: Counter[str] = Counter()
    others = 0
    for name, size in sizes.items():
        if name.startswith("layers."):
            layers[name.split(".")[1]] += aligned(size)
        else:
            others += size
    return others + BUFFERS * max(layers.values())


@contextmanager
def weights_on(model: NextStepModel, device: torch.device) -> Iterator[None]:
    """Inside, `model` computes on `device` wherever its weights lie; outside, they lie where they did."""
    of_layers = {module for layer in model.layers for module in layer.modules()}
    others = OffloadedWeights((module for module in model.modules() if module not in of_layers), device)
    away = {layer: OffloadedWeights(layer.modules(), device) for layer in model.layers}
    streamed = {layer: weights for layer, weights in away.items() if weights}
    with ExitStack() as stack:
        if others:
            stack.callback(others.restore)
            others.replace([tensor.to(device, non_blocking=True) for tensor in others.tensors])
        if streamed:
            stack.enter_context(_streaming(streamed, device))
        yield


@contextmanager
def _streaming(layers: dict[nn.Module, OffloadedWeights], device: torch.device) -> Iterator[None]:
    """Inside, every one of `layers` has its weights on the device while it runs."""
    sources = [away.tensors for away in layers.values()]
    log.info("%s of weights are streamed for every token", format_bytes(sum(map(packed_bytes, sources))))
    with ExitStack() as stack:
        locked = page_locked(sources) if device.type == "cuda" else nullcontext(sources)
        ring = Ring(stack.enter_context(locked), device)
        stack.callback(ring.close)
        for number, (layer, away) in enumerate(layers.items()):
            stack.callback(away.restore)
            for handle in _hooks(layer, away, ring, number):
                stack.callback(handle.remove)
        yield


def _hooks(
    layer: nn.Module, away: OffloadedWeights, ring: Ring, number: int
) -> tuple[torch.utils.hooks.RemovableHandle, ...]:
    def before(*_: object) -> None:
        away.replace(ring.acquire(number))

    def after(*_: object) -> None:
        away.restore()
        ring.release()

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)

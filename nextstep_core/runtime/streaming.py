"""Weights that did not fit on the device: brought there for as long as they are used.

What every flow step reads (the head and the projectors around it) comes once for the run; the transformer's layers come
one by one, each while the one before computes, on a second stream where the device has one. Weights that are on the
device already are left alone, so without any to bring this does nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ..model.nextstep import NextStepModel


class Guests:
    """The parameters of some modules that lie elsewhere, and their copies while they are on the device."""

    def __init__(self, modules: Iterator[nn.Module], device: torch.device) -> None:
        self._device = device
        self._home: list[tuple[nn.Module, str, Tensor]] = [
            (module, name, tensor)
            for module in modules
            for name, tensor in module._parameters.items()
            if tensor is not None and tensor.device != device
        ]
        self._copies: list[Tensor] = []
        self._arrived: torch.cuda.Event | None = None

    def __bool__(self) -> bool:
        return bool(self._home)

    def pin(self) -> None:
        """Keep the host's tensors where a CUDA device can fetch them by itself, as far as the system allows that."""
        try:
            self._home = [(module, name, _pinned(tensor)) for module, name, tensor in self._home]
        except RuntimeError:
            return  # the copies then take longer and nothing else changes
        self.leave()

    def fetch(self, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy, on `stream` where there is one."""
        if self._copies:
            return
        with torch.cuda.stream(stream) if stream is not None else ExitStack():
            self._copies = [tensor.to(self._device, non_blocking=True) for _, _, tensor in self._home]
            if stream is not None:
                self._arrived = torch.cuda.Event()
                self._arrived.record(stream)

    def enter(self) -> None:
        """Put the copies into the modules; work queued from here on waits for them."""
        if self._arrived is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._arrived)
            for copy in self._copies:
                copy.record_stream(current)
        for (module, name, _), copy in zip(self._home, self._copies):
            module._parameters[name] = copy

    def leave(self) -> None:
        """Put the modules' own tensors back and let the copies go."""
        for module, name, tensor in self._home:
            module._parameters[name] = tensor
        self._copies, self._arrived = [], None


def _pinned(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_pinned() else nn.Parameter(tensor.detach().pin_memory(), requires_grad=False)


def streamed_bytes(model: NextStepModel) -> int:
    """The most device memory that weights need which do not stay there: two layers, and all that is no layer."""
    layers = [sum(tensor.nbytes for tensor in layer.parameters()) for layer in model.layers]
    return sum(tensor.nbytes for tensor in model.parameters()) - sum(layers) + 2 * max(layers)


@contextmanager
def weights_on(model: NextStepModel, device: torch.device) -> Iterator[None]:
    """Inside, `model` computes on `device` wherever its weights lie; outside, they lie where they did."""
    layers = [Guests(layer.modules(), device) for layer in model.layers]
    of_layers = {module for layer in model.layers for module in layer.modules()}
    others = Guests((module for module in model.modules() if module not in of_layers), device)
    if not others and not any(layers):
        yield
        return
    stream = None
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        for guests in (others, *layers):
            guests.pin()
    waiting = [i for i, guests in enumerate(layers) if guests]
    following = dict(zip(waiting, waiting[1:] + waiting[:1]))  # after the last comes the first, for the next token
    with ExitStack() as stack:
        stack.callback(others.leave)
        others.fetch(None)
        others.enter()
        for i in waiting:
            stack.callback(layers[i].leave)
            stack.enter_context(_hooks(model.layers[i], layers[i], layers[following[i]], stream))
        yield


@contextmanager
def _hooks(layer: nn.Module, guests: Guests, following: Guests, stream: torch.cuda.Stream | None) -> Iterator[None]:
    def before(*_: object) -> None:
        guests.fetch(stream)
        guests.enter()
        if following is not guests:
            following.fetch(stream)

    def after(*_: object) -> None:
        guests.leave()

    handles = layer.register_forward_pre_hook(before), layer.register_forward_hook(after)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""LoRA: low-rank additions to linear layers, beside their weights and never in them.

A layer gives what it gives without, and up(down(x)) on top of it, each rank times its strength. So the weights may be
stored in any format and lie anywhere, other models share them, and what is taken away leaves no trace. Method: Hu et
al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ranges import Range

STRENGTH = Range("strength", -100.0, 100.0)


@dataclass(frozen=True)
class LowRank:
    """What is added to one linear layer: down (r, columns), up (rows, r), and what each rank counts at strength 1,
    scale (r,) float32."""

    down: Tensor
    up: Tensor
    scale: Tensor

    def bytes_in(self, dtype: torch.dtype) -> int:
        """What it takes on a device, with matrices in `dtype`."""
        return (self.down.numel() + self.up.numel()) * dtype.itemsize + self.scale.nbytes


@dataclass(frozen=True, eq=False)
class Adapter:
    """A file's additions by the name of the layer in the model. `identity` tells apart what adapters do, `digest` is
    what sites know the file by, and `unused` names what of the file fits no layer."""

    name: str
    identity: str
    digest: str
    layers: Mapping[str, LowRank]
    unused: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stack:
    """Adapters in the order in which they were added, each once, with its strength."""

    parts: tuple[tuple[Adapter, float], ...] = ()

    def plus(self, adapter: Adapter, strength: float) -> Stack:
        """The stack with one more; strengths of one adapter add up."""
        strength = STRENGTH.check(strength)
        mine = {part.identity: (part, own) for part, own in self.parts}
        kept, before = mine.get(adapter.identity, (adapter, 0.0))
        return Stack(tuple((mine | {adapter.identity: (kept, before + strength)}).values()))

    @property
    def active(self) -> Stack:
        """Those that change anything: at strength 0 a model is the plain one, to the last bit."""
        return Stack(tuple((adapter, strength) for adapter, strength in self.parts if strength))

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """Without their strengths."""
        return tuple(adapter for adapter, _ in self.parts)

    @property
    def key(self) -> str:
        """Tells apart what stacks make of a model; empty for the plain one."""
        stated = [f"{adapter.identity} {strength!r}" for adapter, strength in self.active.parts]
        return sha256("\n".join(stated).encode()).hexdigest() if stated else ""

    def bytes_in(self, dtype: torch.dtype) -> int:
        """Memory that a run takes for it beside the weights."""
        return sum(low.bytes_in(dtype) for adapter in self.active.adapters for low in adapter.layers.values())


def with_low_rank(out: Tensor, x: Tensor, down: Tensor, up: Tensor, scale: Tensor) -> Tensor:
    """A layer's output (..., rows) for x (..., columns), and the addition to it."""
    low = F.linear(x, down) * scale
    # One product that begins with what is there: the sum is rounded once.
    return torch.addmm(out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1]), up.t()).view(out.shape)


class Attached:
    """Adapters on one device and in one dtype, ready for a model's layers.

    Where several adapters change one layer, their ranks lie side by side, so that any number takes two products. What
    each rank counts lies in one tensor for all layers: a captured step reads it, and finds other strengths there
    without being captured anew.
    """

    def __init__(self, adapters: tuple[Adapter, ...], device: torch.device, dtype: torch.dtype) -> None:
        self.made_for = adapters, device, dtype
        names = dict.fromkeys(name for adapter in adapters for name in adapter.layers)
        of_layers = {name: [(n, a.layers[name]) for n, a in enumerate(adapters) if name in a.layers] for name in names}
        with torch.inference_mode():
            pairs = [pair for own in of_layers.values() for pair in own]
            self._scales = torch.cat([low.scale for _, low in pairs]).to(device)
            self._adapter_of = torch.cat([torch.full_like(low.scale, n, dtype=torch.long) for n, low in pairs])
            self._counts = self._scales.to(dtype, copy=True)
            self._layers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
            start = 0
            for name, own in of_layers.items():
                down = torch.cat([low.down.to(device, dtype) for _, low in own])
                up = torch.cat([low.up.to(device, dtype) for _, low in own], dim=1)
                self._layers[name] = down, up, self._counts[start : start + len(down)]
                start += len(down)

    @contextmanager
    def on(self, model: nn.Module, strengths: tuple[float, ...]) -> Iterator[None]:
        """Inside, the layers of `model` add what the adapters say, at these strengths."""
        with torch.inference_mode():
            of_ranks = torch.tensor(strengths)[self._adapter_of].to(self._scales)
            self._counts.copy_(self._scales * of_ranks)
        with ExitStack() as stack:
            for name, tensors in self._layers.items():
                stack.callback(model.get_submodule(name).register_forward_hook(_hook(*tensors)).remove)
            yield


def _hook(down: Tensor, up: Tensor, scale: Tensor) -> Any:
    def add(_: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        return with_low_rank(out, inputs[0], down, up, scale)

    return add


class Attachments:
    """What a model's last run was made with is kept on its device for the next; `key` and `in_use` tell of the run that
    is under way."""

    def __init__(self) -> None:
        self._last: Attached | None = None
        self.key = ""
        self.in_use: Attached | None = None

    @contextmanager
    def applied(self, model: nn.Module, stack: Stack, device: torch.device, dtype: torch.dtype) -> Iterator[None]:
        """Inside, `model` runs with a stack of adapters."""
        active = stack.active
        if not active.parts:
            yield
            return
        wanted = active.adapters, device, dtype
        if self._last is None or self._last.made_for != wanted:
            self._last = None  # before the next takes memory
            self._last = Attached(*wanted)
        attached = self._last
        with attached.on(model, tuple(strength for _, strength in active.parts)):
            self.key, self.in_use = active.key, attached
            try:
                yield
            finally:
                self.key, self.in_use = "", None

    def clear(self) -> None:
        """Free the device's memory."""
        self._last = None

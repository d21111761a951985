"""A few buffers on the device, allocated once, through which the weights of one layer after another pass.

A CUDA device copies on a second stream while it computes. Events hold both back: nothing computes with a buffer before
it is filled, and none is filled anew before what computed with it is done. So however far the host runs ahead, nothing
but these buffers is in use.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from .memory import format_bytes, spare_bytes

log = logging.getLogger(__name__)

BUFFERS = 2  # the bus is so much slower than the device's memory that a third would never be waited for
BUFFER_ALIGNMENT = 256  # bytes; what products of all kinds want their operands to start at


def packed_bytes(tensors: Sequence[Tensor]) -> int:
    """Room that tensors take one behind the other in a buffer."""
    return sum(aligned(tensor.nbytes) for tensor in tensors)


def aligned(size: int) -> int:
    """Bytes of a buffer that a tensor of `size` bytes takes."""
    return -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


def _laid_out(memory: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Views of `memory` (bytes) with the shapes and dtypes of `like`, one behind the other."""
    views, start = [], 0
    for tensor in like:
        views.append(memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += aligned(tensor.nbytes)
    return views


class Stream(Protocol):
    """What is used of `torch.cuda.Stream`."""

    def record_event(self) -> Any: ...
    def wait_event(self, event: Any) -> None: ...
    def synchronize(self) -> None: ...


class CudaStreams:
    """The stream that computes, and one for the copies."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.copies = torch.cuda.Stream(device)

    @property
    def compute(self) -> Stream:
        """Where work is queued at this moment."""
        return torch.cuda.current_stream(self._device)

    def copying(self) -> AbstractContextManager[Any]:
        """Inside, work is queued with the copies."""
        return torch.cuda.stream(self.copies)


class InOrder:
    """Both streams of a device that does everything in the order in which it is told: there is nothing to wait for."""

    copies = compute = property(lambda self: self)

    def copying(self) -> AbstractContextManager[Any]:
        """Nothing else than outside."""
        return nullcontext()

    def record_event(self) -> None: ...
    def wait_event(self, event: None) -> None: ...
    def synchronize(self) -> None: ...


def streams_of(device: torch.device) -> Any:
    """The streams that work for `device` can be queued on."""
    return CudaStreams(device) if device.type == "cuda" else InOrder()


@dataclass
class Buffer:
    """A piece of the ring: which layer it holds, as which tensors, and since when it may be read or written."""

    memory: Tensor
    filled: Any
    read: Any
    layer: int | None = None
    tensors: list[Tensor] = field(default_factory=list)


class Ring:
    """The tensors of `layers` on `device`, a few layers at a time, in the order of the list, over and over."""

    def __init__(self, layers: Sequence[Sequence[Tensor]], device: torch.device) -> None:
        self._layers, self._streams = layers, streams_of(device)
        shape = min(BUFFERS, len(layers)), max(map(packed_bytes, layers))
        now = self._streams.compute.record_event()  # the memory may have been somebody's whose work is not done
        self._buffers = [Buffer(row, now, now) for row in torch.empty(shape, dtype=torch.uint8, device=device)]
        self._in_use: Buffer | None = None

    def acquire(self, layer: int) -> list[Tensor]:
        """The tensors of a layer; work queued from here on, until `release`, may read them.

        Begins to fetch the layers that come next.
        """
        self.release()  # does something only where a layer was left by an exception
        wanted = [(layer + ahead) % len(self._layers) for ahead in range(len(self._buffers))]
        there = {buffer.layer for buffer in self._buffers}
        free = [buffer for buffer in self._buffers if buffer.layer not in wanted]
        for number in wanted:
            if number not in there:
                self._fill(free.pop(), number)
        self._in_use = next(buffer for buffer in self._buffers if buffer.layer == layer)
        self._streams.compute.wait_event(self._in_use.filled)
        return self._in_use.tensors

    def release(self) -> None:
        """The buffer of the layer that was entered may be overwritten once all that is queued by now is done."""
        if self._in_use is not None:
            self._in_use.read = self._streams.compute.record_event()
            self._in_use = None

    def _fill(self, buffer: Buffer, layer: int) -> None:
        sources = self._layers[layer]
        buffer.layer, buffer.tensors = layer, _laid_out(buffer.memory, sources)
        self._streams.copies.wait_event(buffer.read)
        with self._streams.copying():
            for target, source in zip(buffer.tensors, sources):
                target.copy_(source, non_blocking=True)
        buffer.filled = self._streams.copies.record_event()

    def close(self) -> None:
        """Wait for the copies that are under way; the buffers can then go, and what they were filled from too."""
        self.release()
        self._streams.copies.synchronize()


@contextmanager
def page_locked(layers: Sequence[Sequence[Tensor]]) -> Iterator[Sequence[Sequence[Tensor]]]:
    """Copies of host tensors in one page-locked block of just their size, which a CUDA device fetches by itself.

    Where the system refuses that, the tensors themselves: a copy then keeps the host waiting and takes longer.
    """
    size = sum(map(packed_bytes, layers))
    block = None
    try:
        block = _locked_block(size)
    except RuntimeError as reason:
        log.warning(
            "%s of memory could not be page-locked, so weights are streamed more slowly: %s", format_bytes(size), reason
        )
    if block is None:
        yield layers
        return
    try:
        copies, start = [], 0
        for layer in layers:
            copies.append(_laid_out(block[start : start + packed_bytes(layer)], layer))
            start += packed_bytes(layer)
            for target, source in zip(copies[-1], layer):
                target.copy_(source)
        yield copies
    finally:
        torch.cuda.cudart().cudaHostUnregister(block.data_ptr())


def _locked_block(size: int) -> Tensor:
    """Page-locked bytes on the host; RuntimeError where the system refuses them.

    Registered, because PyTorch's own page-locked memory comes in powers of two.
    """
    spare = spare_bytes()
    if size > spare:
        raise RuntimeError(f"only {format_bytes(spare)} are available")
    block = torch.empty(size, dtype=torch.uint8)
    error = torch.cuda.cudart().cudaHostRegister(block.data_ptr(), size, 0)
    if int(error):
        _forget_last_error()
        raise RuntimeError(f"the system refuses ({error})")
    return block


def _forget_last_error() -> None:
    """CUDA keeps the error of a refused call, and the next kernel that is launched would be blamed for it."""
    with suppress(RuntimeError):
        torch.zeros(1, device="cuda")

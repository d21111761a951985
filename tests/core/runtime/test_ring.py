"""The ring of buffers that weights are streamed through, on streams that know what is certain to be done.

Nothing here has streams. The stand-ins compute in the order of the program, and keep for each stream which work of the
others it has waited for: what is not known to be done may still be under way, however late, on a real device.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from simulated_mps import MPS, SimulatedMPS, SimulatedTensor
from torch import Tensor
from torch.utils._pytree import tree_leaves

from nextstep_core import NextStepPipeline
from nextstep_core.request.layout import Caption
from nextstep_core.runtime import ring
from nextstep_core.runtime.streaming import streamed_bytes

CPU = torch.device("cpu")


class FakeStream:
    """What is done for certain when the stream's next work begins: so many works of each stream."""

    def __init__(self, name: str) -> None:
        self.name, self.done = name, Counter()

    def work(self) -> tuple[str, int]:
        self.done[self.name] += 1
        return self.name, self.done[self.name]

    def is_after(self, work: tuple[str, int]) -> bool:
        return self.done[work[0]] >= work[1]

    def record_event(self) -> Counter:
        return self.done.copy()

    def wait_event(self, event: Counter) -> None:
        self.done |= event

    def synchronize(self) -> None:
        pass


class FakeStreams:
    def __init__(self) -> None:
        self.compute, self.copies = FakeStream("compute"), FakeStream("copies")
        self.current = self.compute

    @contextmanager
    def copying(self) -> Iterator[None]:
        self.current = self.copies
        yield
        self.current = self.compute


class Watch(SimulatedMPS):
    """A device whose memory knows who wrote and read it. `wrong` says what could meet what is still under way."""

    def __init__(self, streams: FakeStreams) -> None:
        super().__init__()
        self.streams = streams
        self.filled: dict[int, torch.UntypedStorage] = {}  # kept, so that no address comes twice
        self.writes: dict[tuple[int, int], tuple[str, int]] = {}
        self.reads: dict[tuple[int, int], list[tuple[str, int]]] = {}
        self.wrong: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view:
            work = self.streams.current.work()
            for argument, value in zip(func._schema.arguments, args):
                for tensor in tree_leaves(value):
                    if isinstance(tensor, SimulatedTensor):
                        self._touch(tensor.inner, work, argument.alias_info is not None and argument.is_write)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _touch(self, tensor: Tensor, work: tuple[str, int], writes: bool) -> None:
        storage, stream = tensor.untyped_storage(), self.streams.current
        address = storage.data_ptr()
        if writes and stream is self.streams.copies:
            self.filled[address] = storage
        if address not in self.filled:
            return
        start = tensor.storage_offset() * tensor.itemsize
        buffer = address, start // (storage.nbytes() // ring.BUFFERS)
        if not writes:
            self.reads.setdefault(buffer, []).append(work)
            if not stream.is_after(self.writes[buffer]):
                self.wrong.add("read before it was filled")
            return
        if not all(map(stream.is_after, self.reads.pop(buffer, []))):
            self.wrong.add("overwritten before its reader was done")
        self.writes[buffer] = work


def draw(pipe: NextStepPipeline, device: torch.device) -> Tensor:
    settings = pipe.engine.recommended().override(steps=3, cfg=2.0)
    job = pipe.engine.make_job([Caption("a red circle")], (2, 3), settings, seed=1, images_per_caption=2)
    *_, progress = pipe.engine.decode(job, device, pipe.dtype)
    return progress.tokens.cpu()


@pytest.mark.slow
@pytest.mark.parametrize("failing", [False, True], ids=["", "a layer that runs out of memory once"])
@torch.inference_mode()
def test_no_buffer_is_overwritten_or_read_too_early(monkeypatch: pytest.MonkeyPatch, failing: bool) -> None:
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float64)  # no rounding that a token could amplify
    model, wanted = pipe.engine.model, draw(pipe, CPU)
    own = {name: id(parameter) for name, parameter in model.named_parameters()}
    streams, calls = FakeStreams(), 0
    monkeypatch.setattr(ring, "streams_of", lambda device: streams)

    def fail(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("out of memory")

    if failing:
        model.layers[2].mlp.register_forward_pre_hook(fail)
    with Watch(streams) as watch:
        drawn = draw(pipe, MPS)
    assert (drawn - wanted).abs().max() <= 1e-9
    rings = 2 if failing else 1  # after a shortage the first is let go of, and another made for what is left to do
    assert not watch.wrong and len(watch.writes) == rings * ring.BUFFERS < len(model.layers)
    others = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
    assert others + sum(storage.nbytes() for storage in watch.filled.values()) // rings == streamed_bytes(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == own


class Runtime:
    """Stands in for the CUDA runtime: what is registered, by address."""

    def __init__(self, error: int = 0) -> None:
        self.error, self.registered = error, {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        if not self.error:
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.registered[address]
        return 0


@pytest.fixture
def layers() -> list[list[Tensor]]:
    return [[torch.randn(7, 5), torch.randn(3).bfloat16()], [torch.arange(300, dtype=torch.uint8), torch.tensor(2.5)]]


def test_page_locked_copies_lie_in_one_block_of_their_size(monkeypatch: pytest.MonkeyPatch, layers) -> None:
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    with pytest.raises(KeyboardInterrupt), ring.page_locked(layers) as copies:
        ((start, size),) = runtime.registered.items()
        assert size == sum(map(ring.packed_bytes, layers)) == 256 + 256 + 512 + 256
        for copy, own in zip(tree_leaves(copies), tree_leaves(layers)):
            assert start <= copy.data_ptr() < start + size and (copy.data_ptr() - start) % ring.BUFFER_ALIGNMENT == 0
            assert copy.dtype == own.dtype and torch.equal(copy, own)
        raise KeyboardInterrupt
    assert not runtime.registered


@pytest.mark.parametrize("why", ["refused", "too much"])
def test_without_page_locked_memory_copies_are_plain_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, layers, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    runtime = Runtime(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(ring, "_forget_last_error", lambda: None)  # asks the device
    if why == "too much":
        monkeypatch.setattr(ring, "spare_bytes", lambda: 1000)
    with ring.page_locked(layers) as copies:
        assert all(copy is own for copy, own in zip(tree_leaves(copies), tree_leaves(layers)))
    (message,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    reason = "only 0.0 MB are available" if why == "too much" else "the system refuses"
    assert "page-locked" in message and reason in message

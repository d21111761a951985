"""The order of calls around a capture, on a stand-in for CUDA that breaks as the real one does.

Its graphs replay operators on a CPU. Work on a stream needs a workspace there: one that is made during a capture
belongs to that graph, and one goes with any graph that was captured on its stream.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from weakref import WeakValueDictionary

import pytest
import torch
from taped_graphs import CPU, FAST, FLOAT_NOISE, CPUGraphs, Tape
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.runtime.capture import STREAMS, CudaRecorder

SIZE = {"height": 32, "width": 32}


class FakeStream:
    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.cuda, self.cuda_stream = cuda, handle

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.calls.append(f"{self.cuda_stream} waits for {other.cuda_stream}")


class FakeGraph:
    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda = cuda

    def capture_begin(self, pool: int = 0, capture_error_mode: str = "global") -> None:
        assert capture_error_mode == "thread_local", "what other threads do must not matter"
        self.stream, self.tape = self.cuda.current, Tape()
        self.cuda.calls.append(f"{self.stream} captures into {pool}")
        self.cuda.capturing = True
        self.tape.__enter__()

    def capture_end(self) -> None:
        self.cuda.capturing = False
        self.tape.__exit__(None, None, None)
        self.cuda.calls.append("end")
        if self.cuda.invalid:
            self.cuda.invalid = False
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def replay(self) -> None:
        assert self.stream in self.cuda.workspaces, "an illegal memory access was encountered"
        self.cuda.calls.append(f"{self.cuda.current} replays")
        self.tape.replay()

    def __del__(self) -> None:
        self.cuda.workspaces.discard(getattr(self, "stream", None))


class FakeCuda:
    """What a recorder uses of `torch.cuda`; stream 0 is the one that computes."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.workspaces: set[int] = set()
        self.current, self.capturing, self.invalid, self._made, self._pools = 0, False, False, 0, 0

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        self._made += 1
        return FakeStream(self, 1 + self._made % STREAMS)

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802
        return FakeGraph(self)

    def current_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self, self.current)

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream.cuda_stream
        try:
            yield
        finally:
            self.current = before

    def graph_pool_handle(self) -> int:
        self._pools += 1
        return self._pools

    def empty_cache(self) -> None:
        assert not self.capturing
        self.calls.append("empty the cache")

    def product(self) -> None:
        """What every product of the network does first."""
        assert self.current in self.workspaces or not self.capturing, "a workspace that belongs to a graph"
        self.workspaces.add(self.current)


def multiply(cuda: FakeCuda, x: Tensor, out: Tensor) -> Callable[[], Tensor]:
    def function() -> Tensor:
        cuda.product()
        cuda.calls.append(f"{cuda.current} multiplies")
        return out.copy_(2 * x)

    return function


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    monkeypatch.setattr(CudaRecorder, "_living", WeakValueDictionary())
    return FakeCuda()


def test_a_capture_has_a_stream_of_its_own_that_is_warmed_up_there(cuda: FakeCuda) -> None:
    x, out, recorder = torch.ones(3), torch.zeros(3), CudaRecorder(CPU, cuda)
    function = multiply(cuda, x, out)
    recorder.warm_up(function)
    replay = recorder.record(function)
    x += 1
    replay()
    assert torch.equal(out, torch.full((3,), 4.0))
    around = ["2 waits for 0", "2 multiplies", "0 waits for 2"]
    inside = ["2 waits for 0", "2 captures into 1", "2 multiplies", "end", "0 waits for 2"]
    assert cuda.calls == [*around, *inside, "0 replays"]


def test_no_two_recorders_that_live_share_a_stream(cuda: FakeCuda) -> None:
    recorders = [CudaRecorder(CPU, cuda)]
    for _ in range(STREAMS - 1):
        cuda.Stream(CPU)  # somebody else's
    recorders += [CudaRecorder(CPU, cuda) for _ in range(3)]
    assert len({recorder._stream.cuda_stream for recorder in recorders}) == 4


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), AttributeError("a host's layer")], ids=["interrupt", "host"])
def test_whatever_happens_in_a_capture_it_ends(cuda: FakeCuda, reason: BaseException) -> None:
    recorder, x, out = CudaRecorder(CPU, cuda), torch.ones(3), torch.zeros(3)

    def fails() -> None:
        raise reason

    recorder.warm_up(multiply(cuda, x, out))
    with pytest.raises(type(reason)):
        recorder.record(fails)
    assert not cuda.capturing and cuda.current == 0


def test_after_an_invalid_capture_the_device_is_repaired(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder, x, out = CudaRecorder(CPU, cuda), torch.ones(3), torch.zeros(3)
    end = lambda device, pool: cuda.calls.append(f"the allocator ends {pool}")  # noqa: E731
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end, raising=False)
    recorder.warm_up(multiply(cuda, x, out))
    cuda.invalid = True
    with pytest.raises(RuntimeError, match="previous error during capture"):
        recorder.record(multiply(cuda, x, out))
    assert cuda.calls[-4:] == ["end", "the allocator ends 1", "2 captures into 0", "end"]
    assert cuda.current == 0


def test_memory_is_freed_before_a_capture_is_given_up(cuda: FakeCuda) -> None:
    recorder, out, tries = CudaRecorder(CPU, cuda), torch.zeros(3), 0

    def needs_memory() -> None:
        nonlocal tries
        tries += 1
        if "empty the cache" not in cuda.calls:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        cuda.workspaces.add(cuda.current)
        out.fill_(1)

    recorder.record(needs_memory)()
    assert tries == 2 and torch.equal(out, torch.ones(3))


def graphed(pipeline: NextStepPipeline, cuda: FakeCuda) -> NextStepPipeline:
    graphs = CPUGraphs(pipeline.engine.model, lambda device: CudaRecorder(device, cuda))
    engine = replace(pipeline.engine, caches=StepCaches(graphs))
    return NextStepPipeline(engine, pipeline.vae, CPU, torch.float32)


@pytest.fixture
def products(pipeline: NextStepPipeline, cuda: FakeCuda) -> Iterator[None]:
    """Every linear layer of the model asks for a workspace."""
    layers = [layer for layer in pipeline.engine.model.modules() if isinstance(layer, torch.nn.Linear)]
    handles = [layer.register_forward_pre_hook(lambda *_: cuda.product()) for layer in layers]
    yield
    for handle in handles:
        handle.remove()


def test_unloading_one_model_leaves_the_graphs_of_another(pipeline, products, cuda: FakeCuda) -> None:
    wanted = pipeline.generate("A red apple.", **SIZE, **FAST).tokens
    first, second = graphed(pipeline, cuda), graphed(pipeline, cuda)
    for pipe in (first, second, first):
        assert (pipe.generate("A red apple.", **SIZE, **FAST).tokens - wanted).abs().max() <= FLOAT_NOISE
    second.engine.caches.release()
    gc.collect()
    captures = sum("captures" in call for call in cuda.calls)
    assert (first.generate("A red apple.", **SIZE, **FAST).tokens - wanted).abs().max() <= FLOAT_NOISE
    assert sum("captures" in call for call in cuda.calls) == captures == 4, "replayed, not captured anew"


def test_an_interrupt_in_a_capture_leaves_a_usable_model(pipeline, products, cuda: FakeCuda) -> None:
    wanted = pipeline.generate("A red apple.", **SIZE, **FAST).tokens
    fast = graphed(pipeline, cuda)

    def interrupt(*_: object) -> None:
        if cuda.capturing:
            handle.remove()
            raise KeyboardInterrupt

    handle = pipeline.engine.model.layers[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fast.generate("A red apple.", **SIZE, **FAST)
    assert (fast.generate("A red apple.", **SIZE, **FAST).tokens - wanted).abs().max() <= FLOAT_NOISE
    assert "0 replays" in cuda.calls and not fast.engine.caches.graphs.broken

"""Capturing what functions launch on a CUDA device, and what has to be in order around that.

A product reads a workspace that PyTorch keeps for each stream and frees with *any* graph that was captured there,
however many others still use it. So captures that live and die together have a stream of their own, which is warmed up
(what is first made in a capture belongs to that graph), and graphs that failed live as long as the others.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import is_out_of_memory

STREAMS = 32  # that PyTorch has for a device


class CudaRecorder:
    """Records what functions launch, without running it, and launches it again in one call.

    `cuda` is `torch.cuda`, which a test may replace.
    """

    _living: WeakValueDictionary[int, CudaRecorder] = WeakValueDictionary()  # by their streams' handles

    def __init__(self, device: torch.device, cuda: Any = torch.cuda) -> None:
        self._cuda, self._device, self._pool = cuda, device, cuda.graph_pool_handle()
        streams = (cuda.Stream(device) for _ in range(STREAMS))  # PyTorch hands the same few out in turn
        self._stream = next((s for s in streams if s.cuda_stream not in self._living), None) or cuda.Stream(device)
        self._living[self._stream.cuda_stream] = self
        self._graphs: list[Any] = []

    def forget(self) -> None:
        """Let everything go; nothing that was recorded may be replayed any more."""
        self._graphs.clear()

    def warm_up(self, function: Callable[[], Tensor]) -> Tensor:
        """What `function` returns, run as it is but on the stream of the recordings, where it makes the workspaces."""
        here = self._cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with self._cuda.stream(self._stream):
            result = function()
        here.wait_stream(self._stream)
        return result

    def record(self, function: Callable[[], Any]) -> Callable[[], None]:
        """The replay of everything that `function` does to tensors made before; `warm_up` must have run it."""
        try:
            return self._recorded(function)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._cuda.empty_cache()  # which is not done during a capture
            return self._recorded(function)

    def _recorded(self, function: Callable[[], Any]) -> Callable[[], None]:
        graph = self._new_graph()
        here = self._cuda.current_stream(self._device)
        self._stream.wait_stream(here)
        with self._cuda.stream(self._stream):
            self._capture(graph, function)
        here.wait_stream(self._stream)
        replay: Callable[[], None] = graph.replay
        return replay

    def _new_graph(self) -> Any:
        self._graphs.append(self._cuda.CUDAGraph())
        return self._graphs[-1]

    def _capture(self, graph: Any, function: Callable[[], Any]) -> None:
        """Whatever happens inside, an interrupt included, the stream does not go on capturing."""
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            function()
        except BaseException:
            with suppress(RuntimeError):
                self._end(graph)
            raise
        self._end(graph)

    def _end(self, graph: Any) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            self._repair()
            raise

    def _repair(self) -> None:
        """Where a capture has become invalid, many versions of PyTorch do not notice that it is over.

        The allocator then frees nothing any more, and random numbers are refused until a capture ends well.
        """
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, self._pool)
        with suppress(RuntimeError):
            number, nothing = torch.zeros(1, device=self._device), self._new_graph()
            nothing.capture_begin(capture_error_mode="thread_local")
            number.zero_()
            nothing.capture_end()

"""Memory goes when a run or a model is dropped, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from taped_graphs import CPUGraphs, Recorder

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.model.kv_cache import KVCache

SMALL = {"height": 32, "width": 32, "steps": 2, "sampler": "score-sde-1.1"}


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[KVCache]:
    """The KV caches that are alive."""
    made: weakref.WeakSet[KVCache] = weakref.WeakSet()
    plain = KVCache.__init__

    def recording(self: KVCache, *arguments) -> None:
        made.add(self)
        plain(self, *arguments)

    monkeypatch.setattr(KVCache, "__init__", recording)
    return made


class RunsOnce(Recorder):
    """A recorder that, as the real one, keeps nothing of the function: what it replays is what came out."""

    def record(self, function):
        function()
        return lambda: None


def test_a_run_leaves_no_kv_cache_behind(without_collector, caches, pipeline) -> None:
    pipeline.generate("A red apple.", **SMALL)
    assert not caches, "decoding the picture by the VAE would have to do with less memory"


def test_a_stopped_run_leaves_no_kv_cache_behind(without_collector, caches, pipeline) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline.generate("A red apple.", **SMALL, callback=stop)
    assert not caches


def test_release_and_dropping_free_captured_steps(without_collector, caches) -> None:
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    model = weakref.ref(pipe.engine.model)
    pipe.engine = replace(pipe.engine, caches=StepCaches(CPUGraphs(pipe.engine.model, RunsOnce)))
    pipe.generate("a red circle on a white background", **SMALL)
    assert caches, "kept for the next run"
    pipe.engine.release()
    assert not caches
    pipe.generate("a red circle on a white background", **SMALL)
    assert caches
    del pipe
    assert not caches and model() is None

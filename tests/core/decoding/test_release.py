"""Memory goes when a run or a model is dropped, without the garbage collector."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from simulated_mps import MPS, SimulatedMPS
from taped_graphs import CPUGraphs, Recorder

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import Job, KnownTokens
from nextstep_core.decoding.steps import StepCaches, TransformerStep
from nextstep_core.model.kv_cache import KVCache
from nextstep_core.request.layout import Caption

SMALL = {"height": 32, "width": 32, "steps": 2, "sampler": "score-sde-1.1"}


@pytest.fixture(scope="module", autouse=True)
def older_objects_left_alone() -> Iterator[None]:
    """Collections look only at what the tests below make, which takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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


def known(pipe: NextStepPipeline, **options: bool) -> KnownTokens:
    return KnownTokens(
        torch.zeros(1, 4, pipe.engine.config.token_dim), torch.tensor([True] * 2 + [False] * 2), **options
    )


def job(pipe: NextStepPipeline, *prompts: str, tokens: KnownTokens | None = None) -> Job:
    settings = pipe.engine.recommended().override(steps=2, cfg=2.0, sampler="flow-ode")
    return pipe.engine.make_job([Caption(p) for p in prompts], (2, 2), settings, seed=1, known=tokens)


def one(pipe: NextStepPipeline, job: Job, **options: object) -> None:
    with torch.inference_mode():
        for _ in pipe.engine.decode(job, torch.device("cpu"), torch.float32, **options):
            pass


def edit(pipe: NextStepPipeline) -> None:
    pipe.generate("<image>Snow.", images=torch.zeros(32, 32, 3), **SMALL)


def streamed(pipe: NextStepPipeline) -> None:
    with SimulatedMPS(), torch.inference_mode():
        settings = pipe.engine.recommended().override(steps=2, cfg=2.0, sampler="flow-ode")
        asked = pipe.engine.make_job([Caption("A")], (2, 2), settings, seed=1)
        for _ in pipe.engine.decode(asked, MPS, torch.float32):
            pass


PATHS = {
    "a batch in parts": lambda pipe: one(pipe, job(pipe, "A", "B", "C"), at_once=2),
    "an edit": edit,
    "a mask": lambda pipe: one(pipe, job(pipe, "A", tokens=known(pipe))),
    "a resumed run": lambda pipe: one(pipe, job(pipe, "A", tokens=known(pipe, token_by_token=True))),
    "streamed weights": streamed,
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS.keys())
def test_no_path_leaves_a_kv_cache_or_the_model_behind(without_collector, caches, path: Callable) -> None:
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    model = weakref.ref(pipe.engine.model)
    path(pipe)
    assert not caches
    del pipe
    assert model() is None


def kept_error(pipe: NextStepPipeline, **options: object) -> BaseException | None:
    """What a host keeps of a run that fails: the error, with its traceback."""
    try:
        one(pipe, job(pipe, "A", "B"), **options)
    except BaseException as error:
        return error
    return None


class Interrupted(Exception):
    """Older hosts' is an Exception, newer hosts' is not."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Interrupted()], ids=repr)
def test_an_interrupted_run_whose_error_is_kept_keeps_no_kv_cache(without_collector, caches, pipeline, error) -> None:
    calls = iter(range(100))

    def check() -> None:
        if next(calls) == 7:  # in the middle of the transformer, at the third token
            raise error

    assert kept_error(pipeline, check=check) is error and not caches


@pytest.mark.parametrize("error", [ValueError("broken"), torch.OutOfMemoryError("out of memory")], ids=repr)
def test_a_failed_run_whose_error_is_kept_keeps_no_kv_cache(
    without_collector, caches, pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    run, calls = TransformerStep.run, iter(range(100))

    def fail(step: TransformerStep, *arguments: object) -> torch.Tensor:
        hidden = run(step, *arguments)
        if next(calls) >= 2:
            raise error
        return hidden

    monkeypatch.setattr(TransformerStep, "run", fail)
    kept = kept_error(pipeline)
    assert kept is not None and kept.__traceback__ is not None and not caches


def test_a_run_stopped_between_two_tokens_keeps_no_kv_cache(without_collector, caches, pipeline) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as kept:
        pipeline.generate("A red apple.", **SMALL, callback=stop)
    assert kept.tb is not None and not caches

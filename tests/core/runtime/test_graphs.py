"""Captured steps on a CPU: they draw what plain ones do, and are given up where they do not."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from simulated_mps import MPS, SimulatedMPS
from taped_graphs import CPU, FAST, FLOAT_NOISE, CPUGraphs, Recorder, TapeRecorder

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.model import kv_cache
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.graphs import CaptureState, Replayed, StepGraphs


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "BUCKET", 8)


def graphed(pipeline: NextStepPipeline, recorder: type = TapeRecorder) -> NextStepPipeline:
    engine = replace(pipeline.engine, caches=StepCaches(CPUGraphs(pipeline.engine.model, recorder)))
    return NextStepPipeline(engine, pipeline.vae, CPU, torch.float32)


MODES = {
    "two branches, a batch": {"prompt": ["A red apple.", "Two birds sit on a thin branch."], **FAST},
    "no guidance": {"prompt": "A red apple.", **FAST, "cfg": 1.0},
    "scheduled guidance, normalized": {"prompt": "A red apple.", **FAST, "cfg_schedule": "linear", "use_norm": True},
    "edit": {"prompt": "<image>Add a hat.", "images": torch.full((64, 48, 3), 0.3), **FAST, "cfg_img": 1.5},
    "ode": {"prompt": "A red apple.", **FAST, "sampler": "flow-heun"},
}


@pytest.mark.parametrize("mode", MODES)
def test_replayed_steps_draw_the_same_tokens(pipeline, small_buckets, mode: str) -> None:
    options = {**MODES[mode], "height": 64, "width": 48, "seed": 4}
    plain = pipeline.generate(**options).tokens
    assert (graphed(pipeline).generate(**options).tokens - plain).abs().max() <= FLOAT_NOISE


def test_a_second_run_records_nothing_and_other_shapes_do(pipeline, small_buckets) -> None:
    fast = graphed(pipeline)
    size = {"height": 64, "width": 48}
    fast.generate("A red apple.", **size, **FAST)
    before = TapeRecorder.recordings
    for prompt, options in (("A green pear.", {"cfg": 5.0, "seed": 9}), ("A red car.", {"cfg_schedule": "linear"})):
        again = fast.generate(prompt, **size, **{**FAST, **options}).tokens
        plain = pipeline.generate(prompt, **size, **{**FAST, **options}).tokens
        assert (again - plain).abs().max() <= FLOAT_NOISE, "guidance, prompt and noise are inputs of a recording"
    assert TapeRecorder.recordings == before
    fast.generate("A red car.", **size, **{**FAST, "steps": 4})
    assert TapeRecorder.recordings > before
    before = TapeRecorder.recordings
    moved = fast.engine.model.norm.weight
    fast.engine.model.norm.weight = torch.nn.Parameter(moved.clone(), requires_grad=False)
    try:
        fast.generate("A red car.", **size, **{**FAST, "steps": 4})
    finally:
        fast.engine.model.norm.weight = moved
    assert TapeRecorder.recordings > before, "a recording reads weights where they were"


@torch.inference_mode()
def test_known_tokens_are_replayed_too(pipeline, small_buckets) -> None:
    drawn = pipeline.generate("A red apple.", height=64, width=48, **FAST, seed=2).tokens
    known = KnownTokens(drawn, torch.arange(12) < 7, token_by_token=True)
    settings = pipeline.engine.recommended().override(**FAST)
    tokens = []
    for pipe in (pipeline, graphed(pipeline)):
        job = pipe.engine.make_job([Caption("A red apple.")], (4, 3), settings, seed=2, known=known)
        *_, progress = pipe.engine.decode(job, CPU, torch.float32)
        tokens.append(progress.tokens)
    assert (tokens[0] - tokens[1]).abs().max() <= FLOAT_NOISE


def test_a_step_that_gives_nothing_but_zeros_is_replayed_too() -> None:
    """A difference from zeros has no share of them."""

    class Zeros:
        reads = ()

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return x * 0

    state = CaptureState()
    step = Replayed(Zeros(), TapeRecorder(CPU), state)
    before = TapeRecorder.recordings
    for _ in range(2):
        assert torch.equal(step(torch.ones(3)), torch.zeros(3))
    assert not state.off and TapeRecorder.recordings == before + 1


class Refuses(Recorder):
    reason: Exception = RuntimeError("operation not permitted when stream is capturing")

    def record(self, function):
        raise self.reason


class FailsInTheHost(Refuses):
    reason = AttributeError("'NoneType' object has no attribute 'device'")


class Lies(Recorder):
    def record(self, function):
        return lambda: None


@pytest.mark.parametrize("recorder", [Refuses, FailsInTheHost, Lies])
def test_a_failed_capture_falls_back_with_one_warning(pipeline, recorder: type, caplog) -> None:
    caplog.set_level(logging.WARNING)
    size = {"height": 32, "width": 32}
    fast = graphed(pipeline, recorder)
    for prompt in ("A red apple.", "A green pear."):
        plain = pipeline.generate(prompt, **size, **FAST).tokens
        assert torch.equal(fast.generate(prompt, **size, **FAST).tokens, plain)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "CUDA graphs are off for this model, which makes it slower"
    ]


class ShortOnce(TapeRecorder):
    left = 1

    def record(self, function):
        if ShortOnce.left:
            ShortOnce.left -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().record(function)


def test_a_capture_without_memory_is_tried_again_in_the_next_run(pipeline, caplog) -> None:
    caplog.set_level(logging.WARNING)
    fast, size, before = graphed(pipeline, ShortOnce), {"height": 32, "width": 32}, TapeRecorder.recordings
    plain = pipeline.generate("A red apple.", **size, **FAST).tokens
    for recordings in (0, 2):
        assert (fast.generate("A red apple.", **size, **FAST).tokens - plain).abs().max() <= FLOAT_NOISE
        assert TapeRecorder.recordings - before == recordings
    (record,) = caplog.records
    assert "off in this run, for lack of memory" in record.getMessage()


@pytest.mark.slow
@torch.inference_mode()
def test_the_head_is_captured_while_layers_are_streamed() -> None:
    captured = []

    class Again(Recorder):
        def record(self, function):
            captured.append(function)
            function()
            return function

    plain = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    options = {"height": 64, "width": 48, **FAST}
    wanted = plain.generate("a red circle", **options).tokens
    fast = graphed(plain, Again)
    with SimulatedMPS():
        settings = fast.engine.recommended().override(**FAST)
        job = fast.engine.make_job([Caption("a red circle")], (4, 3), settings, seed=0)
        *_, progress = fast.engine.decode(job, MPS, torch.float32)
        drawn = progress.tokens.cpu()
    assert len(captured) == 1 and not fast.engine.caches.graphs.broken, "the draw, and no step that reads the layers"
    assert (drawn - wanted).abs().max() <= FLOAT_NOISE


def test_on_amd_nothing_is_captured_unless_asked_for(pipeline, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    caplog.set_level(logging.INFO)
    graphs, device = StepGraphs(pipeline.engine.model), torch.device("cuda", 0)
    assert graphs.supports(device)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not graphs.supports(device) and not graphs.supports(device)
    (record,) = caplog.records
    assert "CUDA graphs are off" in record.getMessage()
    monkeypatch.setenv("NEXTSTEP_GRAPHS_ON_AMD", "1")
    assert graphs.supports(device)

"""Captured steps: a recorder that replays the very operators on the very memory, as a CUDA graph does, on a CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.graphs import StepGraphs

CPU = torch.device("cpu")
FLOAT_NOISE = 1e-5  # kernels round by how memory is aligned
FAST = {"steps": 3, "cfg": 3.0, "sampler": "score-sde-1.0"}


class Tape(TorchDispatchMode):
    """Replays recorded operators without Python: what Python decided while recording stays as it was."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for func, args, kwargs, out in self.calls:
            known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)}
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs))):
                if torch.is_tensor(old) and old.untyped_storage().data_ptr() not in known:
                    old.copy_(new)


class TapeRecorder:
    recordings = 0

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        TapeRecorder.recordings += 1
        tape = Tape()
        with tape:
            function()
        return tape.replay


class CPUGraphs(StepGraphs):
    def fit(self, device: torch.device) -> bool:
        return not self.broken


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nextstep_core.model.kv_cache.BUCKET", 8)


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
    known = KnownTokens(drawn, torch.arange(12) < 7, one_by_one=True)
    settings = pipeline.engine.recommended().override(**FAST)
    tokens = []
    for pipe in (pipeline, graphed(pipeline)):
        job = pipe.engine.prepare([Caption("A red apple.")], (4, 3), settings, seed=2, known=known)
        *_, progress = pipe.engine.decode(job, CPU, torch.float32)
        tokens.append(progress.tokens)
    assert (tokens[0] - tokens[1]).abs().max() <= FLOAT_NOISE


class Refuses:
    def record(self, function):
        raise RuntimeError("operation not permitted when stream is capturing")


class Lies:
    def record(self, function):
        return lambda: None


@pytest.mark.parametrize("recorder", [Refuses, Lies])
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

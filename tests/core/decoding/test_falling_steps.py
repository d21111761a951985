"""Flow steps that fall over the picture, in the loop and with whatever else a picture is drawn with."""

from __future__ import annotations

import pytest
import torch
from taped_graphs import CPUGraphs, TapeRecorder
from window_runs import distance, plainly, solved

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import Job, KnownTokens
from nextstep_core.decoding.lookahead import SIZES, TOLERANCES
from nextstep_core.decoding.steps import FlowIntegration, StepCaches
from nextstep_core.request.layout import Caption
from nextstep_core.sampling.solvers import SAMPLERS

CLOSE, TOLERANCE = 1e-3, TOLERANCES["exact"]
TEXTS = ["a red circle on a blue background", "a small yellow star on a black background"]
FALLING = {"steps": 8, "steps_schedule": "linear"}
CHECKED = {"steps": 12, "steps_schedule": "checked"}


@pytest.fixture(scope="module")
def tiny() -> NextStepPipeline:
    torch.set_num_threads(1)
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)


def job_of(pipe: NextStepPipeline, known: KnownTokens | None = None, **settings) -> Job:
    chosen = pipe.engine.recommended().override(**settings)
    return pipe.engine.make_job([Caption(text) for text in TEXTS], (4, 6), chosen, seed=5, known=known)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of each draw, in order."""
    seen, draw = [], FlowIntegration.__call__

    def counted(self: FlowIntegration, *inputs, steps: int):
        seen.append(steps)
        return draw(self, *inputs, steps=steps)

    monkeypatch.setattr(FlowIntegration, "__call__", counted)
    return seen


def test_every_token_takes_the_steps_of_its_place(tiny: NextStepPipeline, taken: list[int]) -> None:
    job = job_of(tiny, **FALLING)
    plainly(tiny, job)
    assert taken == job.settings.step_counts(24) and len(set(taken)) > 3


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_first_tokens_stay_and_the_others_stay_near(tiny: NextStepPipeline, name: str) -> None:
    """With the noise of a place fixed, it is the same picture, drawn more coarsely."""
    options = {"sampler": name, "steps": 24}
    full = plainly(tiny, job_of(tiny, **options))
    fewer = plainly(tiny, job_of(tiny, **options, steps_schedule="linear"))
    assert torch.equal(fewer[:, :3], full[:, :3])
    assert 0 < distance(fewer, full) < 0.7 * distance(full.flip(0), full)


@pytest.mark.parametrize("settings", [FALLING, FALLING | {"sampler": "flow-heun"}, CHECKED], ids=str)
@pytest.mark.parametrize("size", SIZES[1:5])
def test_windows_draw_the_same(tiny: NextStepPipeline, size: int, settings: dict) -> None:
    tokens, reads = solved(tiny, job_of(tiny, **settings), size, TOLERANCE)
    assert distance(tokens, plainly(tiny, job_of(tiny, **settings))) <= CLOSE and reads < 24


@pytest.mark.parametrize("settings", [FALLING, CHECKED], ids=str)
def test_a_part_that_is_known_leaves_the_rest_as_it_was(tiny: NextStepPipeline, settings: dict) -> None:
    """As when an interrupted picture is drawn to its end."""
    whole = plainly(tiny, job_of(tiny, **settings))
    known = KnownTokens(whole, torch.arange(24) < 10, token_by_token=True)
    assert torch.equal(plainly(tiny, job_of(tiny, known=known, **settings)), whole)


def test_tokens_that_are_settled_are_finished(tiny: NextStepPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """With most of the calls saved, and every picture of a batch as it is alone."""
    head, job = tiny.engine.model.head, job_of(tiny, **CHECKED | {"steps": 20})
    calls, velocity = [], head.velocity
    monkeypatch.setattr(head, "velocity", lambda *inputs: calls.append(1) or velocity(*inputs))
    alone = [plainly(tiny, job.part([n])) for n in range(2)]
    assert 2 * 24 * 2 < len(calls) < 2 * 24 * 15
    assert distance(plainly(tiny, job), torch.cat(alone)) <= CLOSE


@pytest.mark.parametrize("settings", [FALLING, CHECKED], ids=str)
def test_captured_steps_draw_the_same(tiny: NextStepPipeline, settings: dict) -> None:
    graphs = CPUGraphs(tiny.engine.model, TapeRecorder)
    caches, wanted = StepCaches(graphs), plainly(tiny, job_of(tiny, **settings))
    for _ in range(2):
        tokens, _ = solved(tiny, job_of(tiny, **settings), 4, TOLERANCE, caches=caches)
        assert distance(tokens, wanted) <= CLOSE and not graphs.broken

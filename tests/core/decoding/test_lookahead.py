"""Several tokens per read of the weights: the same tokens as one after another, in fewer reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from taped_graphs import CPUGraphs, TapeRecorder
from torch import Tensor
from window_runs import CPU, distance, plainly, solved

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding import lookahead
from nextstep_core.decoding.job import Job, KnownTokens
from nextstep_core.decoding.lookahead import MOST, SIZES, Windows, measured
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.decoding.window_choice import WindowChoice
from nextstep_core.request.layout import Caption
from nextstep_core.sampling.solvers import SAMPLERS

TEXTS = ["a red circle on a blue background", "a small yellow star left of a green square on a black background"]
CLOSE = 1e-3  # relative to the tokens' length
TOLERANCE = lookahead.TOLERANCES["exact"]


@pytest.fixture(scope="module")
def tiny() -> NextStepPipeline:
    torch.set_num_threads(1)
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)


def job_of(pipe: NextStepPipeline, texts: list[str] = TEXTS, grid=(4, 6), known=None, **settings) -> Job:
    settings = pipe.engine.recommended().override(**{"steps": 6} | settings)
    return pipe.engine.make_job([Caption(text) for text in texts], grid, settings, seed=5, known=known)


@pytest.mark.parametrize("size", SIZES)
def test_windows_of_every_size_give_the_tokens_of_the_plain_loop(tiny: NextStepPipeline, size: int) -> None:
    job = job_of(tiny)
    tokens, reads = solved(tiny, job_of(tiny), size, TOLERANCE)
    assert distance(tokens, plainly(tiny, job)) <= CLOSE
    assert reads == job.total if size == 1 else reads < job.total


@pytest.mark.parametrize("settings", [{"sampler": name} for name in SAMPLERS] + [
    {"cfg": 1.0}, {"cfg": 6.0, "cfg_schedule": "linear"}, {"cfg": 6.0, "cfg_schedule": "linear-rise"},
    {"use_norm": True}, {"shift": 3.0},
], ids=str)  # fmt: skip
def test_it_goes_with_every_sampler_and_guidance(tiny: NextStepPipeline, settings: dict) -> None:
    wanted = plainly(tiny, job_of(tiny, **settings))
    tokens, reads = solved(tiny, job_of(tiny, **settings), 8, TOLERANCE)
    assert distance(tokens, wanted) <= CLOSE and reads < wanted.shape[1]


def test_it_goes_with_input_pictures_and_both_guidances(tiny: NextStepPipeline) -> None:
    picture = tiny.generate("a red circle on a blue background", width=64, height=64, seed=3).images
    settings = {"images": [picture[0]], "cfg_img": 1.5, "cfg": 3.0, "steps": 6, "seed": 2, "width": 64, "height": 64}
    plain, fast = (
        tiny.generate("<image>make the circle yellow", lookahead=mode, **settings) for mode in ("off", "exact")
    )
    assert distance(fast.tokens, plain.tokens) <= CLOSE
    assert (fast.images - plain.images).abs().max() <= 1 / 255


def test_known_tokens_are_free(tiny: NextStepPipeline) -> None:
    whole = plainly(tiny, job_of(tiny))
    keep = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.5
    for first in (False, True):
        keep[:7] = first  # from the start, or only further on
        known = KnownTokens(whole + 0.1, keep)
        wanted = plainly(tiny, job_of(tiny, known=known))
        tokens, reads = solved(tiny, job_of(tiny, known=known), 8, TOLERANCE)
        assert torch.equal(tokens[:, keep], known.tokens[:, keep])
        assert distance(tokens, wanted) <= CLOSE and reads <= keep.logical_not().sum()


def test_pictures_advance_on_their_own(tiny: NextStepPipeline) -> None:
    alone = [solved(tiny, job_of(tiny, [text]), 8, TOLERANCE) for text in TEXTS]
    together, reads = solved(tiny, job_of(tiny), 8, TOLERANCE)
    assert reads <= max(reads for _, reads in alone) + 1
    assert all(distance(one, tokens[0]) <= CLOSE for one, (tokens, _) in zip(together, alone))


def test_captured_windows_give_the_same(tiny: NextStepPipeline) -> None:
    wanted, reads = solved(tiny, job_of(tiny), 8, TOLERANCE)
    graphs = CPUGraphs(tiny.engine.model, TapeRecorder)
    caches = StepCaches(graphs)
    for _ in range(2):
        tokens, again = solved(tiny, job_of(tiny), 8, TOLERANCE, caches=caches)
        assert distance(tokens, wanted) <= 1e-4 and again == reads and not graphs.broken


def test_on_the_recorded_checkpoint(pipeline: NextStepPipeline) -> None:
    settings = {"width": 96, "height": 64, "seed": 4, "steps": 5}
    plain, fast = (pipeline.generate("A red apple.", lookahead=mode, **settings).tokens for mode in ("off", "exact"))
    assert distance(fast, plain) <= CLOSE


def test_a_tolerance_that_nothing_meets_goes_token_by_token(tiny: NextStepPipeline) -> None:
    tokens, reads = solved(tiny, job_of(tiny), 8, tolerance=-1.0)
    assert reads == tokens.shape[1] and distance(tokens, plainly(tiny, job_of(tiny))) <= 1e-4


def test_the_steps_tell_of_reads(tiny: NextStepPipeline) -> None:
    steps = []
    tiny.generate(TEXTS[0], width=96, height=64, lookahead="exact", callback=lambda p: steps.append(p.step))
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == steps[-1].sampled and steps[-1].left == 0
    assert steps[-1].reads <= steps[-1].total and steps[-1].tokens_per_read >= 1


def test_a_token_that_is_not_finite_is_an_error(tiny: NextStepPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    job, run_read = job_of(tiny), Windows.read

    def poisoned(self: Windows, size: int) -> Tensor:
        drawn = run_read(self, size)
        return drawn.index_fill(1, torch.tensor([0]), float("nan")) if self.first == 5 else drawn

    monkeypatch.setattr(Windows, "read", poisoned)
    with pytest.raises(NextStepError, match=r"Token \d+ of 24"):
        solved(tiny, job, 1, TOLERANCE)


def test_the_size_of_windows_follows_what_they_cost_and_bring() -> None:
    flat, steep = dict.fromkeys(SIZES, 1.0), {size: float(size) for size in SIZES}
    assert WindowChoice(steep).size() == 1, "where a place costs as much as a read"
    choice = WindowChoice(flat)
    for _ in range(20):
        choice.learn(7, 7)
    assert choice.size() == MOST
    mild = WindowChoice({size: 1 + size / 16 for size in SIZES})
    for _ in range(20):
        mild.learn(0, 1)
    assert mild.size() == 1, "where no guess is right"


def test_only_sizes_that_may_pay_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], []
    monkeypatch.setattr(lookahead.time, "perf_counter", lambda: clock[0])

    def read(size: int) -> Tensor:
        asked.append(size)
        clock[0] += 0.01 if size <= 4 else 0.01 * size
        return torch.zeros(1)

    assert list(measured(lambda: read(1), read)) == [1, 2, 4, 8] and set(asked) == {1, 2, 4, 8}


def test_what_the_first_read_of_a_size_prepares_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU kernels are tried, compiled and captured in it, for seconds."""
    clock, asked = [0.0], []
    monkeypatch.setattr(lookahead.time, "perf_counter", lambda: clock[0])

    def read(size: int) -> Tensor:
        clock[0] += 0.01 if size in asked else 5.0 / size
        asked.append(size)
        return torch.zeros(1)

    assert measured(lambda: read(1), read) == pytest.approx(dict.fromkeys(SIZES, 0.01))


def test_where_windows_do_not_pay_the_next_run_goes_token_by_token(tiny: NextStepPipeline, monkeypatch) -> None:
    engine = replace(tiny.engine, caches=StepCaches())
    pipe = NextStepPipeline(engine, tiny.vae, CPU, torch.float32)
    monkeypatch.setattr(lookahead, "measured", lambda *_: {1: 1.0, 2: 10.0})
    options = {"width": 64, "height": 64, "steps": 4, "seed": 1}
    plain = pipe.generate(TEXTS[0], **options).tokens
    for _ in range(2):
        assert distance(pipe.generate(TEXTS[0], lookahead="exact", **options).tokens, plain) <= CLOSE
    assert torch.equal(pipe.generate(TEXTS[0], lookahead="exact", **options).tokens, plain), "the plain loop itself"


def test_what_is_no_mode_is_refused(tiny: NextStepPipeline) -> None:
    with pytest.raises(NextStepError, match="lookahead"):
        tiny.generate("a", lookahead="maybe")
    assert replace(tiny.engine.recommended(), lookahead="exact").lookahead in lookahead.TOLERANCES

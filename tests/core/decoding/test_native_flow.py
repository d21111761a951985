"""A token's flow with the head's network in C, forced on in the embedded model: the plain path's tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from unasked import Unasked

from nextstep_core import NextStepPipeline
from nextstep_core.decoding import fused
from nextstep_core.decoding.fused import Guarded, NativeFlow, OwnKernels
from nextstep_core.decoding.steps import StepCaches, StepShape, TokenSampler
from nextstep_core.request.layout import Caption
from nextstep_core.runtime import chosen, ledger
from nextstep_core.runtime.native import compiler
from nextstep_core.sampling.solvers import SAMPLERS

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(compiler.missing(CPU) is not None, reason=str(compiler.missing(CPU)))


@pytest.fixture(autouse=True)
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded head is too narrow to be worth it, so it is asked for all the same."""
    monkeypatch.setattr(fused, "WIDE", 0)
    monkeypatch.setenv(ledger.CACHE, str(tmp_path / "cache"))
    monkeypatch.setattr(chosen, "_ledgers", {})


@pytest.fixture(scope="module")
def pipeline() -> NextStepPipeline:
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization="int8")


def shape(sampler: str = "score-sde-1.0", rows: int = 2, checked: bool = False) -> StepShape:
    return replace(StepShape(rows, 2, 256, sampler, 6, 1.0, False, CPU, torch.float32), checked=checked)


def drawn(pipeline: NextStepPipeline, shape: StepShape, rows: int, guidance: Tensor, steps: int) -> list[Tensor]:
    """A token by the plain path and one in C."""
    model, generator = pipeline.engine.model, torch.Generator().manual_seed(0)
    asked = Unasked()
    samplers = [TokenSampler(model, shape), TokenSampler(model, shape, hasten=asked.kernels)]
    hidden = torch.randn(rows, model.config.hidden_size, generator=generator)
    noise = torch.randn(samplers[0].noise_count, rows // 2, model.config.token_dim, generator=generator)
    found = [sampler(hidden, noise, guidance, steps) for sampler in samplers]
    assert set(asked.names) == {"native-head"}
    return found


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_all_samplers(pipeline: NextStepPipeline, sampler: str) -> None:
    for steps in (6, 3):
        plain, own = drawn(pipeline, shape(sampler), 2, torch.tensor([3.0, 1.0]), steps)
        assert (own - plain).norm() <= 0.01 * plain.norm(), steps


def test_a_window_and_a_checked_schedule(pipeline: NextStepPipeline) -> None:
    per_token = torch.tensor([3.0, 1.0])[:, None, None].expand(2, 4, 1)
    plain, own = drawn(pipeline, shape(), 8, per_token, 6)
    assert (own - plain).norm() <= 0.01 * plain.norm()
    plain, own = drawn(pipeline, shape("flow-ode", checked=True), 2, torch.tensor([2.0, 1.0]), 6)
    assert (own - plain).norm() <= 0.01 * plain.norm()


def test_a_picture_with_a_real_trial(pipeline: NextStepPipeline) -> None:
    """The chooser decides; whatever it decides, the picture is the same but for rounding."""
    engine = replace(pipeline.engine, caches=StepCaches(hasten=OwnKernels()))
    settings = engine.recommended().override(steps=4)
    caption = Caption("a red circle on a blue background")

    def tokens(engine) -> Tensor:
        job = engine.make_job([caption], engine.grid(64, 64), settings, seed=3)
        *_, last = engine.decode(job, CPU, torch.float32)
        return last.tokens

    plain, own = tokens(replace(engine, caches=StepCaches())), tokens(engine)
    assert (own - plain).abs().mean() <= 0.02 * plain.abs().mean()


def test_a_library_that_cannot_be_made_costs_nothing(pipeline: NextStepPipeline) -> None:
    """It was right in a trial once, and the compiler or the cache folder is gone now."""
    model = pipeline.engine.model
    sampler = TokenSampler(model, shape(), hasten=Unasked().kernels)
    assert isinstance(sampler._step, Guarded) and isinstance(sampler._step._fast, NativeFlow)

    def fails(*_: object) -> Tensor:
        raise RuntimeError("the C compiler did not run")

    sampler._step._fast._network = fails
    hidden, noise = torch.randn(2, model.config.hidden_size), torch.randn(sampler.noise_count, 1, 64)
    guidance = torch.tensor([3.0, 1.0])
    assert torch.equal(sampler(hidden, noise, guidance), TokenSampler(model, shape())(hidden, noise, guidance))
    assert sampler._step._fast is None

"""How many kernels a token of the published model launches: ceilings that may only be lowered.

A launch costs a device one to two microseconds even where it is replayed from a recording, and some of the work takes
less than that. So their number decides how fast the flow head is, and a good part of the rest.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from launches import META, Launches
from unasked import Unasked

from benchmarks.subjects import PUBLISHED_CONFIG, SHAPES
from nextstep_core.decoding.steps import StepShape, TokenSampler, TokenSequence
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.nextstep import NextStepModel
from nextstep_core.sampling.solvers import SAMPLERS

CONFIG = NextStepConfig.from_dict(PUBLISHED_CONFIG | SHAPES["14b"])
STEPS = 28
TOKEN = {"dtype": torch.bfloat16, "device": META}

TRANSFORMER = 828
WINDOW = 974
HEAD = 2411
FEW_STEPS = 4
HEAD_OF_FEW = {  # by sampler; all for two rows, which is a picture with guidance
    "score-sde-1.0": 369,
    "score-sde-1.1": 371,
    "flow-ode": 363,
    "flow-cps": 369,
    "flow-sde": 371,
    "flow-heun": 615,
    "flow-multistep": 366,
}
# With our own kernels: layers of seven launches, flow steps of 27.
FUSED_TRANSFORMER = 339
FUSED_WINDOW = 341
FUSED_HEAD = 27
BESIDES = 60  # of the head for all steps of a token, and the token itself


@pytest.fixture(scope="module")
def model() -> NextStepModel:
    return NextStepModel(CONFIG, dtype=torch.bfloat16, device="meta").eval().requires_grad_(False)


def shape(sampler: str = "score-sde-1.1", steps: int = STEPS) -> StepShape:
    return StepShape(2, 2, 1280, sampler, steps, 1.0, False, META, torch.bfloat16)


def sequence(model: NextStepModel, **options: Any) -> TokenSequence:
    made = TokenSequence(model, shape(), **options)
    made.prompt_length = 40
    return made


@torch.inference_mode()
def test_the_transformer(model: NextStepModel) -> None:
    whole, token = sequence(model), torch.empty(1, 1, CONFIG.token_dim, **TOKEN)
    with Launches() as launches:
        whole.feed(token, 600)
    assert not launches.problems
    assert launches.total <= TRANSFORMER, launches.counts


@torch.inference_mode()
def test_the_transformer_over_a_window(model: NextStepModel) -> None:
    whole, tokens = sequence(model), torch.empty(1, 8, CONFIG.token_dim, **TOKEN)
    with Launches() as launches:
        whole.feed_window(tokens, torch.empty(1, 8, dtype=torch.long, device=META), 607)
    assert not launches.problems
    assert launches.total <= WINDOW, launches.counts


def draw(model: NextStepModel, of: StepShape, **options: Any) -> Launches:
    sample, rows = TokenSampler(model, of, **options), of.branches
    hidden = torch.empty(rows, CONFIG.hidden_size, dtype=torch.bfloat16, device=META)
    noise = torch.empty(sample.noise_count, 1, CONFIG.token_dim, device=META)
    with Launches() as launches:
        sample(hidden, noise, torch.empty(2, device=META))
    return launches


@torch.inference_mode()
def test_the_head(model: NextStepModel) -> None:
    launches = draw(model, shape())
    assert not launches.problems
    assert launches.total <= HEAD, launches.counts


@torch.inference_mode()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_head_by_sampler(model: NextStepModel, sampler: str) -> None:
    launches = draw(model, shape(sampler, FEW_STEPS))
    assert not launches.problems
    assert launches.total <= HEAD_OF_FEW[sampler], launches.counts


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Our kernels are taken, and only counted: their names as they would be started."""
    pytest.importorskip("triton", reason="Triton is not installed, whose kernels are counted")
    from nextstep_core.runtime.triton import attention, head, rows, support

    names: list[str] = []
    for module in (attention, head, rows):
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: names.append(kernel.__name__))
    monkeypatch.setattr(support, "missing", lambda device: None)
    return names


@torch.inference_mode()
def test_the_transformer_in_our_kernels(model: NextStepModel, started: list[str]) -> None:
    whole, token = sequence(model, hasten=Unasked().kernels), torch.empty(1, 1, CONFIG.token_dim, **TOKEN)
    with Launches() as launches:
        whole.feed(token, 600)
    assert not launches.problems
    assert started.count("attend") == CONFIG.num_hidden_layers
    assert launches.total + len(started) <= FUSED_TRANSFORMER, (launches.counts, started[:10])


@torch.inference_mode()
def test_a_window_in_our_kernels(model: NextStepModel, started: list[str]) -> None:
    whole, tokens = sequence(model, hasten=Unasked().kernels), torch.empty(1, 8, CONFIG.token_dim, **TOKEN)
    places = torch.empty(1, 8, dtype=torch.long, device=META)
    whole.feed_window(tokens, places, 607)  # decides what is taken
    started.clear()
    with Launches() as launches:
        whole.feed_window(tokens, places, 607)
    assert not launches.problems
    assert started.count("attend") == CONFIG.num_hidden_layers
    assert launches.total + len(started) <= FUSED_WINDOW, (launches.counts, started[:10])


@torch.inference_mode()
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_head_in_our_kernels(model: NextStepModel, started: list[str], sampler: str) -> None:
    launches = draw(model, shape(sampler, FEW_STEPS), hasten=Unasked().kernels)
    assert not launches.problems
    assert len(started) == FUSED_HEAD * SAMPLERS[sampler].calls(FEW_STEPS)
    assert launches.total <= BESIDES, launches.counts

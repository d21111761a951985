"""What only a CUDA device shows; skipped without one."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.runtime.quantization import RECIPES

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = {"height": 64, "width": 48, "steps": 4, "cfg": 3.0, "seed": 1}
ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 0.1}


def load(dtype: torch.dtype, device: str = "cuda", **options) -> NextStepPipeline:
    return NextStepPipeline.from_pretrained("tiny", device=device, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("sampler", ["score-sde-1.0", "score-sde-1.1", "flow-heun"])
def test_captured_steps_draw_the_same_tokens(dtype: torch.dtype, sampler: str, caplog) -> None:
    caplog.set_level(logging.WARNING)
    fast = load(dtype)
    plain = NextStepPipeline(replace(fast.engine, caches=StepCaches()), fast.vae, fast.device, dtype)
    for prompt in (["a red circle", "a small blue square on the left"], ["a green ring", "a red circle"]):
        options = {**SMALL, "sampler": sampler}
        difference = fast.generate(prompt, **options).tokens - plain.generate(prompt, **options).tokens
        assert difference.abs().max() <= ROUNDING[dtype]
    assert not fast.engine.caches.graphs.broken and not caplog.records, "captured, not given up"


def test_one_seed_draws_the_same_picture_as_on_the_cpu() -> None:
    images = [load(torch.float32, device).generate("a red circle", **SMALL).images for device in ("cuda", "cpu")]
    assert (images[0] - images[1]).abs().mean() <= 1e-3


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_weights_multiply_as_on_the_cpu(recipe: str) -> None:
    pipes = [load(torch.bfloat16, device, quantization=recipe) for device in ("cuda", "cpu")]
    hidden = [pipe.generate("a red circle", **{**SMALL, "steps": 20}).images for pipe in pipes]
    assert (hidden[0] - hidden[1]).abs().mean() <= 0.03


@torch.inference_mode()
def test_streamed_weights_draw_the_same_and_leave_the_device() -> None:
    fast = load(torch.float32)
    wanted = fast.generate("a red circle", **SMALL).tokens
    fast.engine.release()
    fast.engine.model.to("cpu")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    drawn = fast.generate("a red circle", **SMALL).tokens
    assert (drawn - wanted).abs().max() <= ROUNDING[torch.float32]
    assert all(parameter.device.type == "cpu" for parameter in fast.engine.model.parameters())
    assert torch.cuda.memory_allocated() <= before, "nothing stays behind"

"""What only a CUDA device shows; skipped without one."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace

import pytest
import torch
from unasked import Unasked

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.runtime.graphs import StepGraphs
from nextstep_core.runtime.quantization import RECIPES
from nextstep_core.runtime.streaming import streamed_bytes, weights_on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SMALL = {"height": 64, "width": 48, "steps": 4, "cfg": 3.0, "seed": 1}
ROUNDING_BYTES = 2 << 20  # the allocator's step
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


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("options", [{}, {"lookahead": "exact"}], ids=["tokens", "windows"])
def test_our_kernels_draw_the_same_tokens(dtype: torch.dtype, options: dict, caplog) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    plain, asked = load(dtype), Unasked()
    graphs = StepGraphs(plain.engine.model)
    engine = replace(plain.engine, caches=StepCaches(graphs, hasten=asked.kernels))
    fast = NextStepPipeline(engine, plain.vae, plain.device, dtype)
    caplog.set_level(logging.WARNING)
    found = fast.generate("a red circle", **SMALL, **options).tokens
    assert (found - plain.generate("a red circle", **SMALL, **options).tokens).abs().max() <= ROUNDING[dtype]
    assert {"triton-layers", "triton-head"} <= set(asked.names)
    assert not graphs.broken and not caplog.records, "nothing raised, and all was captured"


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


@torch.inference_mode()
def test_streamed_layers_take_no_more_memory_than_planned_and_the_head_is_captured() -> None:
    pipe = load(torch.float32)
    wanted = pipe.generate("a red circle", **SMALL).tokens
    pipe.engine.release()
    model = pipe.engine.model
    model.layers.to("cpu")
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with weights_on(model, model.norm.weight.device):
        ring = torch.cuda.memory_allocated() - before
    others = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
    assert 0 < ring <= streamed_bytes(model) - others + ROUNDING_BYTES
    drawn = pipe.generate("a red circle", **SMALL).tokens
    assert (drawn - wanted).abs().max() <= ROUNDING[torch.float32]
    assert not pipe.engine.caches.graphs.broken


@torch.inference_mode()
def test_unloading_one_model_leaves_the_graphs_of_another() -> None:
    first, second = load(torch.bfloat16), load(torch.bfloat16)
    wanted = [pipe.generate("a red circle", **SMALL).tokens for pipe in (first, second)]
    second.engine.release()
    del second
    gc.collect()
    torch.cuda.empty_cache()
    for _ in range(3):
        assert torch.equal(first.generate("a red circle", **SMALL).tokens, wanted[0])


@torch.inference_mode()
def test_an_invalid_capture_leaves_a_device_that_works() -> None:
    """A capture that waits for the device becomes invalid; random numbers and the next model are none the worse."""
    broken = load(torch.float32)

    def wait(*_: object) -> None:
        torch.cuda.current_stream().synchronize()

    broken.engine.model.layers[0].mlp.register_forward_pre_hook(wait)
    broken.generate("a red circle", **SMALL)
    assert broken.engine.caches.graphs.broken
    torch.randn(8, device="cuda")
    torch.cuda.empty_cache()
    fine = load(torch.float32)
    fine.generate("a red circle", **SMALL)
    assert not fine.engine.caches.graphs.broken


def test_a_lora_in_captured_steps_takes_other_strengths(caplog) -> None:
    caplog.set_level(logging.WARNING)
    fast = load(torch.float32)
    plain = NextStepPipeline(replace(fast.engine, caches=StepCaches()), fast.vae, fast.device, torch.float32)
    captured, loras = [], [(0.5, "captured"), (0.25, "again"), (1.0, "again"), (0.0, "without")]
    for strength, _ in loras:
        for pipe in (fast, plain):
            pipe.unload_loras()
            pipe.load_lora("night", strength)
        difference = fast.generate("a red circle", **SMALL).tokens - plain.generate("a red circle", **SMALL).tokens
        assert difference.abs().max() <= ROUNDING[torch.float32], strength
        captured.append(fast.engine.caches.graphs._steps)
    assert captured[0] is captured[1] is captured[2] is not captured[3]
    assert not fast.engine.caches.graphs.broken and not caplog.records

"""The fast path against the plain one, and what a run must keep apart."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.decode import prefill
from nextstep_core.model.flow_head import FlowHead
from nextstep_core.model.kv_cache import KVCache
from nextstep_core.model.nextstep import patchify, unpatchify
from nextstep_core.model.positions import rotary_table
from nextstep_core.model.transformer import attention_mask
from nextstep_core.prompt import Caption

PROMPTS = ["A red apple lies on a wooden table.", "Two birds."]
FAST = {"steps": 4, "sampler": "score-sde-1.1", "cfg": 3.0, "height": 64, "width": 48, "use_norm": True}
FLOAT_NOISE = 5e-5  # float32, other order of operations


def job_for(pipeline, prompts, **overrides):
    engine = pipeline.engine
    settings = engine.recommended().override(steps=4, cfg=3.0, sampler="score-sde-1.1", **overrides)
    return engine.prepare([Caption(p) for p in prompts], (3, 4), settings, seed=1, negative_prompt="blurry")


@torch.inference_mode()
def test_cached_steps_equal_one_uncached_forward(pipeline) -> None:
    """Teacher forcing of the drawn tokens through one causal forward gives each step's hidden state."""
    engine, job = pipeline.engine, job_for(pipeline, PROMPTS)
    embeds = engine.embed(job.rows, torch.device("cpu"), torch.float32)
    conditions = []
    hook = engine.model.image_out_projector.register_forward_hook(lambda _m, args, _o: conditions.append(args[0]))
    try:
        *_, progress = engine.decode(job, torch.device("cpu"), torch.float32)
    finally:
        hook.remove()
    assert len(conditions) == progress.total == 12
    fed = engine.model.image_in_projector(progress.tokens[:, :-1]).repeat(job.rows.branches, 1, 1)
    sequence = torch.cat([embeds, fed], dim=1)
    valid = torch.cat([job.rows.valid, torch.ones(len(sequence), fed.shape[1], dtype=torch.bool)], dim=1)
    length = sequence.shape[1]
    assert length == job.length, "no forward after the last token"
    hidden = engine.model(
        sequence, rotary_table(engine.config, length, sequence.device, sequence.dtype), attention_mask(valid, 0, length)
    )
    plain = hidden[:, embeds.shape[1] - 1 :].transpose(0, 1)
    assert (plain - torch.stack(conditions)).abs().max() <= FLOAT_NOISE


@torch.inference_mode()
def test_prefill_in_pieces_equals_prefill_at_once(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, job = pipeline.engine, job_for(pipeline, PROMPTS)
    embeds = engine.embed(job.rows, torch.device("cpu"), torch.float32)
    rotary = rotary_table(engine.config, embeds.shape[1], embeds.device, embeds.dtype)

    def run() -> torch.Tensor:
        cache = KVCache(engine.config, job.batch, embeds.shape[1], embeds.device, embeds.dtype)
        return prefill(engine.model, embeds, job.rows.valid, rotary, cache)

    whole = run()
    monkeypatch.setattr("nextstep_core.decode.PREFILL_CHUNK", 5)
    assert (run() - whole).abs().max() <= FLOAT_NOISE


@torch.inference_mode()
def test_precomputed_modulations_equal_one_call_per_step() -> None:
    torch.manual_seed(0)
    head = FlowHead(token_dim=64, condition_dim=96, dim=64, layers=3)
    times, x, c = torch.linspace(0, 0.9, 5), torch.randn(5, 2, 64), torch.randn(2, 96)
    together = head.modulations(head.time_embed(times, torch.float32)[:, None], c)
    for i, time in enumerate(times):
        alone = head.modulations(head.time_embed(time.expand(2), torch.float32), c)
        difference = head.velocity(x[i], [m[i] for m in together]) - head.velocity(x[i], alone)
        assert difference.abs().max() <= 2e-6


def test_a_batch_equals_its_captions_one_by_one(pipeline) -> None:
    both = pipeline.generate(PROMPTS, **FAST).tokens
    singles = torch.cat([pipeline.generate(prompt, **FAST).tokens for prompt in PROMPTS])
    assert (both - singles).abs().max() <= FLOAT_NOISE
    assert (both[0] - both[1]).abs().max() > 0.01, "the captions matter"


def test_images_of_one_caption_differ_and_the_first_is_the_single_one(pipeline) -> None:
    two = pipeline.generate(PROMPTS, **FAST, num_images_per_prompt=2).tokens.view(2, 2, 12, 64)
    assert (two[:, 0] - two[:, 1]).abs().max() > 0.1, "each image of a caption has its own noise"
    shared = pipeline.generate(PROMPTS[1], **FAST, num_images_per_prompt=2).tokens
    assert (two[1] - shared).abs().max() <= FLOAT_NOISE, "captions share the k-th image's noise"


def test_the_seed_decides(pipeline) -> None:
    one, same, other = (pipeline.generate(PROMPTS[0], **FAST, seed=seed).tokens for seed in (1, 1, 2**64 - 1))
    assert torch.equal(one, same)
    assert (one - other).abs().max() > 0.1


@pytest.mark.parametrize("size", [(16, 16), (16, 80), (96, 32)])
def test_any_rectangle(pipeline, size: tuple[int, int]) -> None:
    height, width = size
    out = pipeline.generate("A banner.", **{**FAST, "height": height, "width": width})
    assert out.images.shape == (1, height, width, 3)
    assert out.latents.shape == (1, 16, height // 8, width // 8)
    assert out.tokens.shape == (1, height * width // 256, 64)
    assert out.images.min() >= 0 and out.images.max() <= 1


def test_unpatchify_puts_each_token_on_its_square() -> None:
    latents = torch.arange(16 * 4 * 6.0).view(1, 16, 4, 6)
    tokens = patchify(latents, 2)
    assert torch.equal(tokens[0, 4], latents[0, :, 2:4, 2:4].flatten()), "second row, second column"
    assert torch.equal(unpatchify(tokens, (2, 3), 2), latents)


def test_callback_sees_every_token_and_stops_the_run(pipeline) -> None:
    class Stop(Exception):
        pass

    seen = []

    def callback(progress) -> None:
        assert not progress.tokens[:, progress.done :].any(), "undone tokens are zero"
        seen.append(progress.done)
        if progress.done == 5:
            raise Stop

    with pytest.raises(Stop):
        pipeline.generate(PROMPTS[0], **FAST, callback=callback)
    assert seen == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("schedule", ["linear", "linear-rise"])
def test_guidance_schedules_change_the_picture(pipeline, schedule: str) -> None:
    constant, scheduled = (pipeline.generate(PROMPTS[0], **FAST, cfg_schedule=s).tokens for s in ("constant", schedule))
    assert (constant - scheduled).abs().max() > 0.01


def test_an_empty_prompt_without_a_negative_one_is_a_picture(pipeline) -> None:
    assert torch.isfinite(pipeline.generate("", **FAST).images).all()


BAD = [
    ({"height": 72}, "The nearest size is 48x64"),
    ({"height": 0}, "multiples of 16"),
    ({"cfg": 0.5}, "cfg is 0.5"),
    ({"cfg": float("nan")}, "cfg is nan"),
    ({"cfg_img": 0.0}, "cfg_img is 0"),
    ({"steps": 0}, "steps is 0; score-sde-1.1 needs at least 1"),
    ({"steps": 1, "sampler": "score-sde-1.0"}, "steps is 1; score-sde-1.0 needs at least 2"),
    ({"shift": 0.0}, "shift is 0"),
    ({"sampler": "euler"}, "choose one of score-sde-1.0"),
    ({"cfg_schedule": "cosine"}, "choose one of constant"),
    ({"num_images_per_prompt": 0}, "Nothing to draw"),
    ({"images": torch.zeros(64, 64, 3)}, "0 <image> slot"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=lambda value: str(value)[:40])
def test_bad_settings_are_one_sentence_before_any_work(pipeline, monkeypatch, change: dict, sentence: str) -> None:
    monkeypatch.setattr(pipeline.engine.model, "forward", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(NextStepError) as caught:
        pipeline.generate("A prompt.", **{**FAST, **change})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.zeros(64, 70, 3), "multiples of 16"),
        (torch.full((64, 64, 3), float("nan")), "NaN"),
        (torch.zeros(64, 64, 4), "expected (height, width, 3)"),
    ],
)
def test_a_bad_input_image_is_one_sentence(pipeline, image: torch.Tensor, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        pipeline.generate("<image>Add a hat.", images=image, **FAST)
    assert sentence in str(caught.value)


def test_a_prompt_beyond_the_context_is_one_sentence(pipeline) -> None:
    with pytest.raises(NextStepError, match=r"more than the 4096 that this model can hold\. Shorten the prompt"):
        pipeline.generate("word " * 5000, **FAST)


@pytest.mark.parametrize(
    "options", [{"cfg": 1.0, "cfg_img": 2.0}, {"cfg": 3.0, "cfg_img": 1.0}, {"cfg": 1.0, "cfg_img": 1.0}]
)
def test_every_mix_of_guidance_edits(pipeline, options: dict) -> None:
    """The reference crashes on some of these."""
    image = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))
    out = pipeline.generate("<image>Add a hat.", images=image, **{**FAST, **options})
    assert torch.isfinite(out.images).all()

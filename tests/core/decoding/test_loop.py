"""The fast path against the plain one, and what a run must keep apart."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding import steps
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.decoding.prefill import PrefillCache
from nextstep_core.decoding.steps import StepCaches, StepShape, TokenSequence
from nextstep_core.model.flow_head import FlowHead
from nextstep_core.model.transformer import span_at, whole_span
from nextstep_core.request.layout import Caption
from nextstep_core.request.masks import kept_tokens

PROMPTS = ["A red apple lies on a wooden table.", "Two birds."]
FAST = {"steps": 4, "sampler": "score-sde-1.1", "cfg": 3.0, "height": 64, "width": 48, "use_norm": True}
FLOAT_NOISE = 5e-5  # float32, other order of operations


def job_for(pipeline, prompts, **options):
    engine = pipeline.engine
    settings = engine.recommended().override(steps=4, cfg=3.0, sampler="score-sde-1.1")
    captions = [Caption(prompt) for prompt in prompts]
    return engine.make_job(captions, (3, 4), settings, seed=1, negative_prompt="blurry", **options)


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
    assert sequence.shape[1] == job.length, "no forward after the last token"
    hidden = engine.model(sequence, whole_span(engine.config, valid, sequence.dtype))
    plain = hidden[:, embeds.shape[1] - 1 :].transpose(0, 1)
    assert (plain - torch.stack(conditions)).abs().max() <= FLOAT_NOISE


@torch.inference_mode()
def test_prefill_in_pieces_equals_prefill_at_once(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, job = pipeline.engine, job_for(pipeline, PROMPTS)
    embeds = engine.embed(job.rows, torch.device("cpu"), torch.float32)

    def run() -> torch.Tensor:
        sequence = TokenSequence(engine.model, StepShape.of_job(job, embeds.device, embeds.dtype))
        return sequence.prefill(embeds, job.rows.valid, None, "")

    whole = run()
    monkeypatch.setattr(steps, "CHUNK", 5)
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
    ({"height": 72}, "48x64"),
    ({"height": 0}, "height is 0; use a whole number from 16 to 4096"),
    ({"width": 10**9}, "width is 1000000000"),
    ({"width": "64"}, "width is '64'"),
    ({"height": 64.0}, "height is 64;"),
    ({"cfg": 0.5}, "cfg is 0.5"),
    ({"cfg": 1e30}, "cfg is 1e+30; use a number from 1 to 100"),
    ({"cfg": True}, "cfg is True"),
    ({"cfg": "7.5" * 1000}, "(3,000 characters)"),
    ({"cfg": {}}, "cfg is a dict"),
    ({"cfg": float("nan")}, "cfg is nan"),
    ({"cfg_img": 0.0}, "cfg_img is 0"),
    ({"steps": 0}, "steps is 0; use a whole number from 1 to 1000"),
    ({"steps": 10**6}, "steps is 1000000"),
    ({"steps": 10**5000}, "steps is a number of 5,0"),
    ({"steps": 4.5}, "steps is 4.5"),
    ({"steps": 1, "sampler": "score-sde-1.0"}, "steps is 1; score-sde-1.0"),
    ({"shift": 0.0}, "shift is 0"),
    ({"shift": 1e-30}, "shift is 1e-30"),
    ({"sampler": "euler"}, "score-sde-1.0"),
    ({"sampler": []}, "sampler is a list"),
    ({"cfg_schedule": "cosine"}, "constant"),
    ({"use_norm": 1}, "use_norm is 1"),
    ({"seed": 2**64}, "seed is 18446744073709551616"),
    ({"seed": -1}, "seed is -1"),
    ({"seed": 0.5}, "seed is 0.5"),
    ({"vae_tile": "64"}, "tile is '64'"),
    ({"num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
    ({"num_images_per_prompt": 5000}, "num_images_per_prompt is 5000"),
    ({"prompt": 5}, "A prompt is 5; it must be text"),
    ({"prompt": []}, "at least one prompt"),
    ({"prompt": ["one", None]}, "A prompt is None"),
    ({"prompt": ["one"] * 4097}, "pictures in one call is 4097"),
    ({"prompt": ["one"] * 3, "num_images_per_prompt": 4096}, "pictures in one call is 12288"),
    ({"prompt": "a \ud800 b"}, "half of a character"),
    ({"negative_prompt": "\udfff"}, "half of a character"),
    ({"negative_prompt": None}, "negative_prompt is None"),
    ({"positive_prompt": 7}, "positive_prompt is 7"),
    ({"images": 5}, "0 <image> slot"),
    ({"prompt": "<image>x", "images": "a picture"}, "An input image is 'a picture'"),
    ({"prompt": "<image>x", "images": torch.zeros(64, 64, 3) == 1}, "An input image holds torch.bool values"),
    ({"images": torch.zeros(64, 64, 3)}, "0 <image> slot"),
]


@pytest.mark.parametrize(("change", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_settings_are_one_sentence_before_any_work(pipeline, monkeypatch, change: dict, sentence: str) -> None:
    monkeypatch.setattr(pipeline.engine.model, "forward", lambda *_: pytest.fail("the model was asked"))
    with pytest.raises(NextStepError) as caught:
        pipeline.generate(**{"prompt": "A prompt.", **FAST, **change})
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (torch.zeros(64, 70, 3), "multiples of 16"),
        (torch.full((64, 64, 3), float("nan")), "NaN"),
        (torch.zeros(64, 64, 5), "expected (batch, height, width, 3)"),
        (torch.zeros(0, 64, 3), "expected (batch, height, width, 3)"),
    ],
)
def test_a_bad_input_image_is_one_sentence(pipeline, image: torch.Tensor, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        pipeline.generate("<image>Add a hat.", images=image, **FAST)
    assert sentence in str(caught.value)


def test_a_prompt_beyond_the_context_is_one_sentence(pipeline) -> None:
    with pytest.raises(NextStepError, match="4096"):
        pipeline.generate("word " * 5000, **FAST)


IMAGE = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))


def test_every_mix_of_guidance_edits(pipeline) -> None:
    """The reference crashes on some of these; each must do something of its own."""
    mixes = [(1.0, 1.0), (1.0, 2.0), (3.0, 1.0), (3.0, 2.0)]
    tokens = [
        pipeline.generate("<image>Add a hat.", images=IMAGE, **{**FAST, "cfg": cfg, "cfg_img": cfg_img}).tokens
        for cfg, cfg_img in mixes
    ]
    for i, one in enumerate(tokens):
        assert torch.isfinite(one).all()
        assert all((one - other).abs().max() > 0.01 for other in tokens[:i]), mixes[i]


@torch.inference_mode()
def test_cfg_img_needs_all_three_branches_also_without_cfg(pipeline) -> None:
    captions = [Caption("<image>Add a hat.", (pipeline.encode_image(IMAGE),))]
    for cfg, cfg_img, branches in ((1.0, 1.0, 1), (3.0, 1.0, 2), (1.0, 2.0, 3), (3.0, 2.0, 3)):
        settings = pipeline.engine.recommended().override(cfg=cfg, cfg_img=cfg_img)
        assert pipeline.engine.make_job(captions, (3, 4), settings, seed=1).rows.branches == branches


def test_another_picture_under_the_same_words_is_another_prompt(pipeline) -> None:
    """The prefill cache must tell input pictures apart."""
    edit = lambda image: pipeline.generate("<image>Add a hat.", images=image, **FAST).tokens  # noqa: E731
    first, other = edit(IMAGE), edit(1 - IMAGE)
    fresh = replace(pipeline.engine, caches=StepCaches())
    alone = NextStepPipeline(fresh, pipeline.vae, pipeline.device, pipeline.dtype)
    assert torch.equal(alone.generate("<image>Add a hat.", images=1 - IMAGE, **FAST).tokens, other)
    assert (first - other).abs().max() > 0.01


def test_cfg_img_without_an_image_changes_nothing(pipeline) -> None:
    plain, ignored = (pipeline.generate(PROMPTS[0], **FAST, cfg_img=value).tokens for value in (1.0, 2.0))
    assert torch.equal(plain, ignored)


def test_several_images_of_different_sizes_fill_their_slots_in_order(pipeline) -> None:
    other = torch.rand(16, 64, 3, generator=torch.Generator().manual_seed(1))
    prompt = "<image>Put the left one<image> on the right one."
    one, swapped = (
        pipeline.generate(prompt, images=i, **FAST, cfg_img=2.0).tokens for i in ([IMAGE, other], [other, IMAGE])
    )
    assert (one - swapped).abs().max() > 0.01


@torch.inference_mode()
def decode(pipeline, job, at_once=None) -> torch.Tensor:
    *_, progress = pipeline.engine.decode(job, torch.device("cpu"), torch.float32, at_once)
    return progress.tokens


@torch.inference_mode()
def test_an_edit_in_a_batch_equals_it_alone(pipeline) -> None:
    """Alone, but with the noise that it has in the batch: the reference lets every encoded image move the stream."""
    engine = pipeline.engine
    captions = [
        Caption(f"<image>{t}", (pipeline.encode_image(i),)) for t, i in (("Add.", IMAGE), ("Remove red.", 1 - IMAGE))
    ]
    settings = engine.recommended().override(steps=4, cfg=3.0, cfg_img=2.0)
    job = engine.make_job(captions, (3, 4), settings, seed=1)
    both = decode(pipeline, job.part([0, 1]))
    singles = torch.cat([decode(pipeline, job.part([i])) for i in range(2)])
    assert (both - singles).abs().max() <= FLOAT_NOISE
    assert (both[0] - both[1]).abs().max() > 0.01


def test_parts_of_a_batch_are_the_batch(pipeline) -> None:
    whole = decode(pipeline, job_for(pipeline, PROMPTS, images_per_caption=3))
    for at_once in (1, 2, 4):
        parts = decode(pipeline, job_for(pipeline, PROMPTS, images_per_caption=3), at_once)
        assert (parts - whole).abs().max() <= FLOAT_NOISE


def test_out_of_memory_halves_the_batch_and_changes_nothing(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = decode(pipeline, job_for(pipeline, PROMPTS, images_per_caption=2))
    feed, sizes = TokenSequence.feed, []

    def small_device(self, tokens, place):
        sizes.append(len(tokens))
        if len(tokens) > 1 and place > 0:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return feed(self, tokens, place)

    monkeypatch.setattr(TokenSequence, "feed", small_device)
    halves = decode(pipeline, job_for(pipeline, PROMPTS, images_per_caption=2))
    assert max(sizes) == 4 and sizes[-1] == 1
    assert (halves - whole).abs().max() <= FLOAT_NOISE


def known(tokens: torch.Tensor, keep: list[int], token_by_token: bool = False) -> KnownTokens:
    return KnownTokens(tokens, torch.tensor([n in keep for n in range(12)]), token_by_token)


@pytest.mark.parametrize("keep", [range(5), range(5, 12), (0, 1, 4, 5, 8), range(0, 12, 2)], ids=str)
def test_known_tokens_are_kept_bit_for_bit_and_the_rest_follows_from_them(pipeline, keep) -> None:
    whole = decode(pipeline, job_for(pipeline, PROMPTS))
    foreign = torch.randn(2, 12, 64, generator=torch.Generator().manual_seed(9))
    filled = decode(pipeline, job_for(pipeline, PROMPTS, known=known(foreign, list(keep))))
    drawn = [n for n in range(12) if n not in keep]
    assert torch.equal(filled[:, list(keep)], foreign[:, list(keep)])
    after = [n for n in drawn if n > min(keep)]
    assert not after or (filled[:, after] - whole[:, after]).abs().max() > 0.01, "what is kept is seen"
    same = decode(pipeline, job_for(pipeline, PROMPTS, known=known(whole, list(keep))))
    assert (same - whole).abs().max() <= FLOAT_NOISE, "a run's own tokens lead to that run"


@pytest.mark.parametrize("done", [1, 7, 11])
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(pipeline, done: int) -> None:
    whole = decode(pipeline, job_for(pipeline, PROMPTS))
    partial = whole.clone()
    partial[:, done:] = 0
    resumed = decode(pipeline, job_for(pipeline, PROMPTS, known=known(partial, list(range(done)), token_by_token=True)))
    assert torch.equal(resumed, whole)


def test_another_seed_does_not_prefill_again(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, forward = [], type(pipeline.engine.model).forward
    monkeypatch.setattr(
        type(pipeline.engine.model),
        "forward",
        lambda self, embeds, *args: lengths.append(embeds.shape[1]) or forward(self, embeds, *args),
    )
    options = {**FAST, "positive_prompt": "not asked before"}
    fresh = pipeline.generate(PROMPTS[0], **options, seed=1).tokens
    assert max(lengths) > 1
    lengths.clear()
    cached = pipeline.generate(PROMPTS[0], **options, seed=1).tokens
    assert set(lengths) == {1}
    assert torch.equal(fresh, cached)
    pipeline.generate(PROMPTS[0], **options, negative_prompt="another", seed=1)
    assert max(lengths) > 1, "another prompt is another prefill"


def test_prefill_cache_stays_within_its_bytes(pipeline) -> None:
    engine = replace(pipeline.engine, caches=StepCaches(prefilled=PrefillCache(max_bytes=20_000)))
    for prompt in ("one", "two", "three", "four"):
        for _ in engine.decode(job_for(pipeline, [prompt]), torch.device("cpu"), torch.float32):
            break
    sizes = [kv.nbytes for kv, _ in engine.caches.prefilled._entries.values()]
    assert 0 < sum(sizes) <= 20_000


def test_progress_tells_rate_and_time_left(pipeline) -> None:
    steps = []
    pipeline.generate(
        PROMPTS[0], **FAST, callback=lambda p: steps.append((p.done, p.tokens_per_second, p.seconds_left))
    )
    assert all(rate > 0 for _, rate, _ in steps)
    assert steps[-1][2] == 0 < steps[0][2]


def test_every_attention_row_sees_something() -> None:
    """A padded query with nothing to see would be NaN in some kernels, and poison what it is multiplied with."""
    valid = torch.tensor([[False, False, True, True]])
    mask = span_at(torch.arange(4), torch.zeros(2, 4, 8), valid, visible=4).mask[0, 0]
    assert (mask == 0).any(dim=-1).all()
    assert mask.tolist()[3] == [-torch.inf, -torch.inf, 0, 0]


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.ones(64, 64), "64x64.*64x48"),
        (torch.zeros(48, 64), "nothing to draw"),
        (torch.full((48, 64), float("nan")), "NaN"),
        (torch.ones(2, 3), "3x2"),
    ],
)
def test_a_bad_mask_is_one_sentence(mask: torch.Tensor, sentence: str) -> None:
    with pytest.raises(NextStepError, match=sentence):
        kept_tokens(mask, (3, 4))


@pytest.mark.parametrize("scale", [1, 2, 16])
def test_a_mask_of_any_size_redraws_every_square_it_touches(scale: int) -> None:
    mask = torch.zeros(3, 4).repeat_interleave(scale, 0).repeat_interleave(scale, 1)
    mask[scale, scale] = 1
    assert [n for n, kept in enumerate(kept_tokens(mask, (3, 4))) if not kept] == [5]

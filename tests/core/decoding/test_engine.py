"""The engine around the loop: memory in numbers, what happens when it runs out, prompts that are kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from simulated_mps import MPS, SimulatedMPS
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding import steps
from nextstep_core.decoding.job import Job, KnownTokens
from nextstep_core.decoding.loop import guidance_scales
from nextstep_core.decoding.prefill import PrefillCache
from nextstep_core.decoding.steps import StepCaches, StepShape, TokenSequence, TransformerStep
from nextstep_core.errors import OutOfMemory
from nextstep_core.model.kv_cache import KVCache
from nextstep_core.request.layout import Caption, EncodedImage
from nextstep_core.runtime import devices
from nextstep_core.runtime.interrupt import go_on
from nextstep_core.runtime.placement import send_away

CPU = torch.device("cpu")


def job_for(pipeline, *prompts: str, known: KnownTokens | None = None, **settings) -> Job:
    chosen = pipeline.engine.recommended().override(**{"steps": 3, "cfg": 2.0} | settings)
    return pipeline.engine.make_job([Caption(p) for p in prompts], (2, 3), chosen, seed=1, known=known)


def test_a_job_counts_by_hand(pipeline) -> None:
    job = job_for(pipeline, "A", "B", "C")
    assert (job.pictures, job.batch, job.total) == (3, 6, 6)
    assert job.length == job.rows.ids.shape[1] + 5, "the last token is never fed"


@pytest.mark.parametrize("known", [False, True])
def test_working_memory_by_hand(pipeline, known: bool) -> None:
    """tiny-a: hidden 96, inner 192, 6 heads, 2 of them stored, 16 wide, 3 layers; a head of 3 blocks, 64 wide."""
    tokens = KnownTokens(torch.zeros(1, 6, 64), torch.tensor([True] * 5 + [False])) if known else None
    job = job_for(pipeline, "Two birds.", known=tokens, steps=7)
    rows, prompt = 2, job.rows.ids.shape[1]
    fed = prompt + 5 if known else prompt
    cache = 256 * rows * (2 * 3 * 2 * 16)  # a whole bucket of positions, keys and values
    prefill = rows * fed * (8 * 96 + 3 * 192)
    scores = rows * 6 * fed * (prompt + 5)
    head = rows * (7 + 1) * (3 * 3 + 2) * 64
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        assert pipeline.engine.working_bytes(job, dtype) == size * (cache + prefill + scores + head)


def test_long_prompts_are_read_in_pieces_and_take_the_memory_of_one(pipeline) -> None:
    short, long = (job_for(pipeline, "word " * n) for n in (400, 800))
    assert short.length > steps.CHUNK, "this prompt is longer than a piece"
    cache = [KVCache.bytes_needed(pipeline.engine.config, 2, job.length, torch.float32) for job in (short, long)]
    rest = [pipeline.engine.working_bytes(job, torch.float32) - c for job, c in zip((short, long), cache)]
    scores = 4 * 2 * 6 * steps.CHUNK * (long.length - short.length)
    assert rest[1] - rest[0] == scores


class Fails:
    """Stands in for feeding tokens: for more than so many pictures it raises at the third token."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], RuntimeError], pictures: int) -> None:
        self.calls, self.pictures, feed = [], pictures, TokenSequence.feed

        def fail(sequence: TokenSequence, tokens: Tensor, place: int) -> Tensor:
            self.calls.append((len(tokens), place))
            if len(tokens) > self.pictures and place == 2:
                raise error()
            return feed(sequence, tokens, place)

        monkeypatch.setattr(TokenSequence, "feed", fail)


@torch.inference_mode()
def test_an_error_that_is_not_about_memory_is_raised_at_once(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Fails(monkeypatch, lambda: RuntimeError("shapes do not fit"), pictures=0)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        list(pipeline.engine.decode(job_for(pipeline, "A", "B"), CPU, torch.float32))
    assert fails.calls == [(2, 0), (2, 1), (2, 2)], "tried once, with both"


@torch.inference_mode()
def test_one_picture_that_does_not_fit_is_an_error(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fails = Fails(monkeypatch, lambda: torch.cuda.OutOfMemoryError("out of memory"), pictures=0)
    with pytest.raises(OutOfMemory, match=r"48x32 pixels.*0\.5 MB.*out of memory"):
        list(pipeline.engine.decode(job_for(pipeline, "A", "B", "C"), CPU, torch.float32))
    assert [rows for rows, place in fails.calls if place == 2] == [3, 2, 1], "halves, rounded up"


@torch.inference_mode()
def test_a_long_prompt_is_read_in_shorter_pieces_where_memory_is_short(pipeline, monkeypatch, caplog) -> None:
    engine = replace(pipeline.engine, caches=StepCaches(prefilled=None))
    job, lengths, run = job_for(pipeline, "word " * 150), [], TransformerStep.run
    (wanted,) = (p.tokens for p in engine.decode(job, CPU, torch.float32) if p.step.done == 6)

    def small(step: TransformerStep, embeds: Tensor, positions: Tensor, visible: int) -> Tensor:
        lengths.append(embeds.shape[1])
        if embeds.shape[1] > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return run(step, embeds, positions, visible)

    monkeypatch.setattr(TransformerStep, "run", small)
    (tokens,) = (p.tokens for p in engine.decode(job, CPU, torch.float32) if p.step.done == 6)
    length = job.rows.ids.shape[1]
    half = -(-length // 2)
    quarter = -(-half // 2)
    assert lengths[:3] == [length, half, quarter]
    assert (tokens - wanted).abs().max() <= 1e-4
    assert "Tried to allocate 2.00 GiB" in caplog.text and f"{quarter} positions" in caplog.text


@torch.inference_mode()
def test_weights_are_sent_away_when_nothing_else_helps(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    fails, asked = Fails(monkeypatch, lambda: RuntimeError("CUDA out of memory"), pictures=0), []

    def make_room() -> bool:
        asked.append(len(fails.calls))
        fails.pictures = len(asked) - 1  # the second time it helps
        return True

    run = pipeline.engine.decode(job_for(pipeline, "A"), CPU, torch.float32, None, go_on, make_room)
    assert [p.step.done for p in run] == [1, 2, 3, 1, 2, 3, 1, 2, 3, 4, 5, 6] and asked == [3, 6]


@torch.inference_mode()
def test_memory_that_is_kept_for_the_next_run_goes_first(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    list(pipeline.engine.decode(job_for(pipeline, "A"), CPU, torch.float32))
    kept = pipeline.engine.caches.prefilled
    assert kept.nbytes
    Fails(monkeypatch, lambda: RuntimeError("DefaultCPUAllocator: can't allocate memory"), pictures=0)
    with pytest.raises(OutOfMemory):
        list(pipeline.engine.decode(job_for(pipeline, "B"), CPU, torch.float32))
    assert not kept.nbytes


@torch.inference_mode()
def test_half_of_the_layers_goes_to_the_host_at_a_time() -> None:
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    model, there = pipe.engine.model, []
    (wanted,) = (p.tokens for p in pipe.engine.decode(job_for(pipe, "A"), CPU, torch.float32) if p.step.done == 6)
    with SimulatedMPS():
        for module in model.layers.modules():
            module._parameters |= {n: p.to(MPS) for n, p in module._parameters.items() if p is not None}
        while send_away(model, MPS):
            there.append(sum(next(layer.parameters()).device == MPS for layer in model.layers))
    assert there[0] == len(model.layers) // 2 and there[-1] == 0
    (tokens,) = (p.tokens for p in pipe.engine.decode(job_for(pipe, "A"), CPU, torch.float32) if p.step.done == 6)
    assert torch.equal(tokens, wanted)
    assert not send_away(model, CPU), "a CPU has nowhere to send them"


@torch.inference_mode()
def test_nothing_is_left_of_a_part_that_ran_out_of_memory(pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer that a caller sees holds known tokens, drawn ones and zeros, also after a retry."""
    Fails(monkeypatch, lambda: RuntimeError("CUDA out of memory"), pictures=1)
    given = torch.full((3, 6, 64), 7.0)
    known = KnownTokens(given, torch.tensor([False] * 5 + [True]))
    seen = []
    for progress in pipeline.engine.decode(job_for(pipeline, "A", "B", "C", known=known), CPU, torch.float32):
        tokens, (start, stop) = progress.tokens, (progress.start, progress.stop)
        assert not tokens[start:stop, progress.step.done : 5].any() and not tokens[stop:, :5].any()
        assert (tokens[:, 5] == 7).all() and tokens[:start].any(dim=-1).all()
        seen.append((start, stop, progress.step.done))
    tries = [(0, stop, done) for stop in (3, 2) for done in (1, 2, 3)]
    assert seen == [*tries, *((n, n + 1, done) for n in range(3) for done in range(1, 7))]


@torch.inference_mode()
def test_at_once_bounds_the_pictures_drawn_together(pipeline) -> None:
    spans = [(p.start, p.stop) for p in pipeline.engine.decode(job_for(pipeline, *"ABCDE"), CPU, torch.float32, 2)]
    assert list(dict.fromkeys(spans)) == [(0, 2), (2, 4), (4, 5)]
    spans = [(p.start, p.stop) for p in pipeline.engine.decode(job_for(pipeline, *"AB"), CPU, torch.float32, 9)]
    assert set(spans) == {(0, 2)}


@torch.inference_mode()
def test_steps_know_what_was_drawn_and_what_is_left(pipeline) -> None:
    known = KnownTokens(torch.ones(1, 6, 64), torch.tensor([True, False, True, False, False, True]))
    steps = [p.step for p in pipeline.engine.decode(job_for(pipeline, "A", known=known), CPU, torch.float32)]
    assert [(s.done, s.sampled, s.left) for s in steps] == [
        (1, 0, 3),
        (2, 1, 2),
        (3, 1, 2),
        (4, 2, 1),
        (5, 3, 0),
        (6, 3, 0),
    ]
    assert all(s.total == 6 and s.seconds >= 0 for s in steps) and steps[0].seconds < steps[-1].seconds


@torch.inference_mode()
def test_a_sequence_is_used_again_for_a_prompt_with_less_padding(pipeline) -> None:
    """What a longer, padded prompt left in mask and cache is not seen by the next one."""
    engine = pipeline.engine
    padded, short = job_for(pipeline, "Two birds sit on a thin branch.", "A"), job_for(pipeline, "A b", "C d")
    shape = StepShape.of_job(padded, CPU, torch.float32)
    assert not padded.rows.valid[1].all() and StepShape.of_job(short, CPU, torch.float32) == shape

    def hidden(sequence: TokenSequence, job: Job) -> list[Tensor]:
        embeds = engine.embed(job.rows, CPU, torch.float32)
        first = sequence.prefill(embeds, job.rows.valid, None, "")
        return [first, *(sequence.feed(torch.ones(2, 1, 64), place) for place in range(3))]

    used = TokenSequence(engine.model, shape)
    hidden(used, padded)
    for again, fresh in zip(hidden(used, short), hidden(TokenSequence(engine.model, shape), short)):
        assert (again - fresh).abs().max() <= 1e-5


def test_a_prompt_that_was_used_lately_is_kept(pipeline) -> None:
    cache = KVCache(pipeline.engine.config, 1, 4, CPU, torch.float32)
    each = cache.data[..., :4, :].nbytes
    kept = PrefillCache(max_bytes=2 * each)
    for n, key in enumerate("ab"):
        cache.data.fill_(n)
        kept.store(key, cache, 4, torch.full((1, 2), float(n)))
    assert kept.nbytes == 2 * each, "just fits"
    assert kept.restore("a", cache).tolist() == [[0, 0]]
    assert not cache.data[..., :4, :].any() and (cache.data[..., 4:, :] == 1).all(), "the front alone"
    kept.store("c", cache, 4, torch.zeros(1, 2))
    assert kept.restore("b", cache) is None, "the one used longest ago went"
    assert kept.restore("a", cache) is not None and kept.restore("c", cache) is not None


def test_what_is_larger_than_all_room_pushes_nothing_out(pipeline) -> None:
    cache = KVCache(pipeline.engine.config, 1, 4, CPU, torch.float32)
    kept = PrefillCache(max_bytes=cache.data[..., :2, :].nbytes)
    kept.store("a", cache, 2, torch.zeros(1, 2))
    kept.store("b", cache, 3, torch.zeros(1, 2))
    assert kept.restore("a", cache) is not None and kept.restore("b", cache) is None


@pytest.mark.parametrize(("gigabytes", "most"), [(4, 1 << 28), (16, 1 << 29), (64, 1 << 30)])
def test_prompts_take_a_small_part_of_the_computer_s_memory(monkeypatch, gigabytes: int, most: int) -> None:
    told = {"SC_PHYS_PAGES": gigabytes << 18, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(devices.os, "sysconf", told.__getitem__, raising=False)
    assert PrefillCache().max_bytes == most


def test_what_is_kept_of_a_prompt_is_a_copy(pipeline) -> None:
    kept, hidden = PrefillCache(), torch.zeros(1, 2)
    cache = KVCache(pipeline.engine.config, 1, 4, CPU, torch.float32)
    kept.store("a", cache, 4, hidden)
    cache.data.fill_(9)
    hidden.fill_(9)
    assert not kept.restore("a", cache).any() and not cache.data[..., :4, :].any()


def test_a_key_tells_prompts_apart(pipeline) -> None:
    def key(*prompts: str, tokens: Tensor | None = None, dtype: torch.dtype = torch.float32) -> str:
        images = () if tokens is None else (EncodedImage(tokens, (2, 3)),)
        settings = pipeline.engine.recommended().override(cfg=2.0)
        captions = [Caption(p, images if "<image>" in p else ()) for p in prompts]
        return pipeline.engine.make_job(captions, (2, 3), settings, seed=1).prompt_key(dtype)

    ones, twos = torch.ones(6, 64), torch.full((6, 64), 2.0)
    keys = [key("A"), key("B"), key("A", "A"), key("A", dtype=torch.bfloat16)]
    keys += [key("<image>A", tokens=ones), key("<image>A", tokens=twos)]
    assert len(set(keys)) == len(keys) and key("A") == keys[0]


def test_guidance_of_every_token_by_hand(pipeline) -> None:
    settings = pipeline.engine.recommended().override(cfg=5.0, cfg_img=3.0, cfg_schedule="linear")
    scales = guidance_scales(settings, 4, CPU)
    assert scales.tolist() == [[5, 3], [4, 2.5], [3, 2], [2, 1.5]] and scales.dtype == torch.float32


@torch.inference_mode()
def test_generation_codes_are_added_place_by_place(pipeline) -> None:
    """To what a token is drawn from, and to nothing that the transformer sees."""
    engine, table = pipeline.engine, torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(0))
    model, conditions = engine.model, []
    config = replace(engine.config, use_gen_pos_embed=True, base_image_grid_size=8)
    hook = model.image_out_projector.register_forward_hook(lambda _m, args, _o: conditions.append(args[0]))
    try:
        plain = replace(engine, caches=StepCaches())
        drawn = [list(plain.decode(job_for(pipeline, "A"), CPU, torch.float32))[-1].tokens]
        model.config, model.gen_pos_embed = config, table
        known = KnownTokens(drawn[0], torch.tensor([True] * 5 + [False]), token_by_token=True)
        list(replace(plain, config=config).decode(job_for(pipeline, "A", known=known), CPU, torch.float32))
    finally:
        hook.remove()
        model.config = engine.config
        del model.gen_pos_embed
    assert (conditions[-1] - (conditions[5] + table[0, 8 + 2])).abs().max() <= 1e-5, "row 1, column 2"

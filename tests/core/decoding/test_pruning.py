"""Pictures that are dropped on the way: the others are what they would have been, and alone in the cache from then."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.decoding.pruning import Pruning
from nextstep_core.decoding.steps import TransformerStep
from nextstep_core.loading.store import EMBEDDED
from nextstep_core.request.layout import Caption

PROMPTS = ["a red circle", "two small blue squares on a green ground, one above the other", "a star"]
SIZE = {"height": 96, "width": 48, "steps": 4, "sampler": "score-sde-1.1", "cfg": 3.0}
FLOAT_NOISE = 1e-4


@pytest.fixture(scope="module")
def exact() -> NextStepPipeline:
    """In float64: in float32 this model amplifies the rounding of another batch."""
    torch.set_num_threads(1)
    return NextStepPipeline.from_pretrained(EMBEDDED, dtype=torch.float64)


@pytest.mark.parametrize("seed", [5, [5, 6, 7]], ids=["one-seed", "own-seeds"])
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_the_survivors_are_those_of_a_run_without_pruning(exact, seed, schedule: str) -> None:
    options = {**SIZE, "seed": seed, "cfg_schedule": schedule}
    whole = exact.generate(PROMPTS, **options)
    pruned = exact.generate(PROMPTS, prune=Pruning(1 / 3, lambda pictures: [2, 0]), **options)
    assert (pruned.tokens - whole.tokens[[2, 0]]).abs().max() <= FLOAT_NOISE
    assert (pruned.images - whole.images[[2, 0]]).abs().max() <= 1 / 255
    assert torch.equal(pruned.tokens[:, :6], whole.tokens[[2, 0], :6]), "what was drawn before is not drawn again"


def test_edits_can_be_pruned_too(exact) -> None:
    images = list(torch.rand(3, 32, 48, 3, generator=torch.Generator().manual_seed(3)))
    options = {**SIZE, "seed": [1, 2, 3], "cfg_img": 2.0, "images": images}
    prompts = ["<image>make it blue", "<image>take away the large red circle", "<image>add a star"]
    whole = exact.generate(prompts, **options)
    pruned = exact.generate(prompts, prune=Pruning(0.5, lambda pictures: [1]), **options)
    assert (pruned.tokens - whole.tokens[[1]]).abs().max() <= FLOAT_NOISE


def test_what_is_chosen_from_is_the_upper_part_of_the_pictures(pipeline) -> None:
    """Two of six rows of tokens, 32 pixels; the VAE sees a little beyond a row, so the last pixels may differ."""
    seen = []
    whole = pipeline.generate(PROMPTS, seed=1, **SIZE)
    pipeline.generate(PROMPTS, seed=1, prune=Pruning(1 / 3, lambda pictures: seen.append(pictures) or [0]), **SIZE)
    assert seen[0].shape == (3, 32, 48, 3) and seen[0].dtype == torch.float32
    assert seen[0].min() >= 0 and seen[0].max() <= 1
    tokens = whole.tokens[:, : 2 * 3]
    part = pipeline.vae.decode(pipeline.engine.latents.to_latents(tokens, (2, 3)))
    assert (seen[0] - (part / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)).abs().max() <= 1e-4


def test_only_the_survivors_are_in_the_cache_and_no_token_is_sampled_twice(pipeline, monkeypatch) -> None:
    rows, run = [], TransformerStep.run
    sampled = []

    def watched(self, embeds, positions, visible):
        rows.append((len(self.cache.data[0, 0]), embeds.shape[1]))
        return run(self, embeds, positions, visible)

    monkeypatch.setattr(TransformerStep, "run", watched)
    hook = pipeline.engine.model.image_out_projector.register_forward_hook(
        lambda *args: sampled.append(len(args[1][0]))
    )
    seen = []
    try:
        with torch.inference_mode():
            pipeline.generate(
                PROMPTS, seed=1, prune=Pruning(1 / 3, lambda _: [1]), callback=lambda p: seen.append(p.done), **SIZE
            )
    finally:
        hook.remove()
    assert sampled == [6] * 6 + [2] * 12, "two branches of three pictures, then of one"
    assert {count for count, length in rows} == {6, 2}
    assert [length for count, length in rows if count == 2][1] == 6, "the tokens that are there are read at once"
    assert seen == sorted(seen) and seen[-1] == 18, "progress never goes back"


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_beginning_in_pieces_is_the_beginning(pipeline, at_once: int) -> None:
    """Where memory holds few pictures at once, all of them are begun before any goes on."""
    engine, settings = pipeline.engine, pipeline.engine.recommended().override(steps=4, cfg=3.0)
    job = engine.make_job([Caption(p) for p in PROMPTS], (4, 3), settings, seed=[1, 2, 3])

    def drawn(job, at_once=None) -> torch.Tensor:
        with torch.inference_mode():
            *_, progress = engine.decode(job, pipeline.device, pipeline.dtype, at_once)
        return progress.tokens

    whole, begun = drawn(job), drawn(job.begun(5), at_once)
    assert (begun[:, :5] - whole[:, :5]).abs().max() <= FLOAT_NOISE and not begun[:, 5:].any()
    rest = job.part([2, 1]).after(begun[[2, 1]], 5)
    assert (drawn(rest, at_once) - whole[[2, 1]]).abs().max() <= FLOAT_NOISE


def test_known_tokens_stay_known(pipeline) -> None:
    engine, settings = pipeline.engine, pipeline.engine.recommended().override(steps=4, cfg=3.0)
    given = torch.randn(3, 12, 64, generator=torch.Generator().manual_seed(1))
    known = KnownTokens(given, torch.tensor([n in (1, 8, 9) for n in range(12)]))
    job = engine.make_job([Caption(p) for p in PROMPTS], (4, 3), settings, seed=1, known=known)

    def drawn(job) -> torch.Tensor:
        with torch.inference_mode():
            *_, progress = engine.decode(job, pipeline.device, pipeline.dtype)
        return progress.tokens

    whole, begun = drawn(job), drawn(job.begun(5))
    rest = drawn(job.part([2]).after(begun[[2]], 5))
    assert (rest - whole[[2]]).abs().max() <= FLOAT_NOISE
    assert torch.equal(rest[0, [1, 8, 9]], given[2, [1, 8, 9]])


@pytest.mark.parametrize(
    ("rows", "share", "wanted"), [(6, 1 / 3, 2), (4, 1 / 3, 1), (1, 1 / 3, 1), (8, 0.01, 1), (8, 1, 8)]
)
def test_the_share_is_whole_rows_and_one_at_least(rows: int, share: float, wanted: int) -> None:
    assert Pruning(share, lambda _: [0]).rows((rows, 5)) == wanted


def test_a_picture_of_one_row_is_whole_when_it_is_chosen(pipeline) -> None:
    options = {**SIZE, "height": 16}
    whole = pipeline.generate(PROMPTS, seed=1, **options)
    pruned = pipeline.generate(PROMPTS, seed=1, prune=Pruning(0.3, lambda _: [1]), **options)
    assert torch.equal(pruned.tokens, whole.tokens[[1]])


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ([], "at least one picture"),
        (1, "at least one picture"),
        ([3], "Picture 3 is"),
        ([-1], "Picture -1 is"),
        ([1, 1], "each once"),
        ([0.0], "Picture 0 is"),
        ([True], "Picture True is"),
    ],
)
def test_a_choice_that_is_none_is_one_sentence(pipeline, chosen: list, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        pipeline.generate(PROMPTS, seed=1, prune=Pruning(0.3, lambda _: chosen), **SIZE)
    assert sentence in str(caught.value)


@pytest.mark.parametrize("share", [0, 1.01, float("nan"), "half", True])
def test_a_share_that_is_none_is_one_sentence(share) -> None:
    with pytest.raises(NextStepError, match="share of a picture"):
        Pruning(share, lambda _: [0])

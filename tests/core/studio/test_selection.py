"""The quality gate, and the best of several: what is kept, what is told, and that the wrong ones are those that go."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks import quality as benchmark
from nextstep_core import NextStepError
from nextstep_core.decoding.pruning import Pruning
from nextstep_core.studio.quality import measure_quality
from nextstep_core.studio.selection import agreement, best_of, quality_gate, seed_of

OPTIONS = {"height": 48, "width": 48, "steps": 2, "sampler": "flow-ode", "cfg": 2.0}


def brightness(pictures: torch.Tensor) -> list[float]:
    return [float(picture.mean()) for picture in pictures]


def gray(*values: float) -> torch.Tensor:
    return torch.stack([torch.full((16, 16, 3), value) for value in values])


def test_seeds_of_attempts_follow_from_the_first_and_never_repeat() -> None:
    seeds = [seed_of(7, n) for n in range(200)]
    assert seeds[0] == 7 and len(set(seeds)) == 200 and seeds == [seed_of(7, n) for n in range(200)]
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert not set(seeds[1:]) & {seed_of(8, n) for n in range(200)}, "neighboring seeds do not share their attempts"


def test_the_gate_ends_with_the_first_that_passes() -> None:
    drawn = {seed_of(3, n): gray(value)[0] for n, value in enumerate((0.2, 0.1, 0.7, 0.9))}
    kept = quality_gate(drawn.__getitem__, 3, threshold=0.5, attempts=4, score=brightness)
    assert kept.passed and kept.chosen == 2 and torch.equal(kept.picture, drawn[seed_of(3, 2)])
    assert [round(one.score, 3) for one in kept.rejected] == [0.2, 0.1]
    assert [one.seed for one in kept.candidates] == [seed_of(3, n) for n in range(3)], "the fourth is not drawn"


def test_the_gate_keeps_the_best_where_none_passes_and_says_so() -> None:
    drawn = {seed_of(0, n): gray(value)[0] for n, value in enumerate((0.2, 0.4, 0.4, 0.1))}
    kept = quality_gate(drawn.__getitem__, threshold=0.5, attempts=4, score=brightness)
    assert not kept.passed and kept.chosen == 1 and len(kept.candidates) == 4 and len(kept.rejected) == 3


@pytest.mark.parametrize("by", benchmark.DAMAGES)
def test_of_pictures_of_which_a_third_are_degraded_the_gate_keeps_the_others(by: str) -> None:
    """The threshold is set on other pictures: halfway between what these score whole and degraded."""
    pictures = benchmark.pieces(benchmark.photographs(("astronaut", "coffee", "chelsea", "camera")))
    counts = benchmark.gate(by, pictures)
    assert (counts.whole, counts.degraded) == (len(pictures) // 2, len(pictures) // 4)
    assert (counts.whole_kept, counts.degraded_kept) == (counts.whole, 0)


def drawing(pipeline, text: str = "a red circle", **more):
    calls = []

    def draw(seeds: list[int], prune: Pruning | None) -> torch.Tensor:
        calls.append((seeds, prune))
        return pipeline.generate([text] * len(seeds), seed=seeds, prune=prune, **OPTIONS, **more).images

    return draw, calls


def test_the_best_of_several_is_the_best_and_is_what_it_would_be_alone(pipeline) -> None:
    draw, _ = drawing(pipeline)
    kept = best_of(draw, 5, candidates=4, score=brightness, kept=1)
    assert kept.passed and [one.seed for one in kept.candidates] == [seed_of(5, n) for n in range(4)]
    assert kept.kept.score == max(one.score for one in kept.candidates)
    assert all(one.preview_score is None for one in kept.candidates), "none is dropped, so none is asked for"
    alone = pipeline.generate("a red circle", seed=kept.kept.seed, **OPTIONS).images[0]
    assert (kept.picture - alone).abs().max() <= 1 / 255


def test_the_worse_half_is_dropped_on_the_way(pipeline) -> None:
    draw, calls = drawing(pipeline)
    seen = []

    def preview(pictures: torch.Tensor) -> list[float]:
        seen.append(pictures)
        return [0.1, 0.9, 0.3, 0.5, 0.2]

    kept = best_of(draw, 5, candidates=5, score=brightness, preview_score=preview)
    assert len(calls) == 1 and seen[0].shape == (5, 16, 48, 3), "a third of three rows of tokens"
    assert [one.preview_score for one in kept.candidates] == [0.1, 0.9, 0.3, 0.5, 0.2]
    assert [one.score is None for one in kept.candidates] == [True, False, False, False, True], "three of five go on"
    whole = best_of(draw, 5, candidates=5, score=brightness, kept=1)
    left = [whole.candidates[n].score for n in (1, 2, 3)]
    assert [kept.candidates[n].score for n in (1, 2, 3)] == pytest.approx(left, abs=1e-4)
    assert kept.chosen == (1, 2, 3)[int(np.argmax(left))]


def test_edits_too(pipeline) -> None:
    image = torch.rand(48, 48, 3, generator=torch.Generator().manual_seed(1))
    draw, _ = drawing(pipeline, "<image>make it blue", images=[image] * 3)
    assert best_of(draw, candidates=3).picture.shape == (48, 48, 3)


def test_one_candidate_is_the_picture_itself(pipeline) -> None:
    draw, _ = drawing(pipeline)
    kept = best_of(draw, 9, candidates=1)
    assert torch.equal(kept.picture, pipeline.generate("a red circle", seed=9, **OPTIONS).images[0])


def test_quality_is_the_score_of_the_gate_where_none_is_named() -> None:
    picture = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(1))
    assert quality_gate(lambda seed: picture).kept.score == measure_quality(picture).total


def test_the_one_that_agrees_with_the_others_is_the_best_where_no_score_is_named() -> None:
    """By hand: three show more or less red on blue, one on green. Cells of a quarter of each channel."""
    blue, green = torch.tensor([0.1, 0.2, 0.9]), torch.tensor([0.1, 0.9, 0.2])
    pictures = torch.stack([blue, blue, green, blue]).reshape(4, 1, 1, 3).repeat(1, 16, 16, 1)
    for number, rows in enumerate((4, 5, 4, 8)):
        pictures[number, :rows] = torch.tensor([0.9, 0.1, 0.1])
    alike = agreement(pictures)
    shared = [16 + 15 + 4 + 12, 15 + 16 + 4 + 13, 4 + 4 + 16 + 4, 12 + 13 + 4 + 16]  # rows of 16, with each of the four
    assert alike == pytest.approx([rows / 16 / 4 for rows in shared])
    kept = best_of(lambda seeds, prune: pictures, candidates=4, kept=1)
    assert kept.chosen == 1 and [one.score for one in kept.candidates] == alike
    assert agreement(pictures[:1]) == [1.0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"candidates": 0}, "candidates is 0"),
        ({"candidates": 65}, "candidates is 65"),
        ({"kept": 0.0}, "share of the candidates"),
        ({"kept": float("nan")}, "share of the candidates"),
        ({"drawn": 2}, "share of a picture"),
        ({"seed": -1}, "seed is -1"),
        ({"score": lambda pictures: [1.0]}, "1 numbers for 4 picture(s)"),
        ({"score": lambda pictures: None}, "The score gave None"),
        ({"score": lambda pictures: ["good"] * 4}, "The score gave a list"),
        ({"score": lambda pictures: [float("nan")] * 4}, "NaN"),
    ],
)
def test_what_cannot_be_is_one_sentence(change: dict, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        best_of(lambda seeds, prune: gray(0.1, 0.2, 0.3, 0.4), **{"kept": 1, **change})
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"threshold": 1.1}, "threshold is 1.1"),
        ({"threshold": None}, "threshold is None"),
        ({"attempts": 0}, "attempts is 0"),
        ({"attempts": 2.0}, "attempts is 2"),
        ({"seed": 2**64}, "seed is"),
    ],
)
def test_a_gate_that_cannot_be_is_one_sentence_before_anything_is_drawn(change: dict, sentence: str) -> None:
    with pytest.raises(NextStepError) as caught:
        quality_gate(lambda seed: pytest.fail("it was drawn"), **change)
    assert sentence in str(caught.value)

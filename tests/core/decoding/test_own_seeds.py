"""A seed for each picture: whatever is drawn beside it, a picture is the one that it would be alone.

What is left between the two is rounding: a batch multiplies in another order than a single picture. The embedded model,
which is sharp, amplifies it from token to token, a few hundredfold in some pictures; so its tokens are compared in
float64, and in float32 its pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.store import EMBEDDED
from nextstep_core.pipeline import GenerationOutput
from nextstep_core.request.layout import Caption
from nextstep_core.sampling.noise import NoiseStream

SIZE = {"height": 64, "width": 48, "steps": 4, "sampler": "score-sde-1.1"}
PROMPTS = ["a red circle", "two small blue squares on a green ground, one above the other", "a star"]
IMAGES = [torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(n)) for n in range(2)]
EDITS = ["<image>make it blue", "<image>take away the large red circle and put a star there"]
TOKENS, PIXELS = 1e-4, 1 / 255
RANDOM = "random"
MODELS = (RANDOM, torch.float32), (EMBEDDED, torch.float64), (EMBEDDED, torch.float32)


@pytest.fixture(scope="module", params=MODELS, ids=str)
def pipe(request, golden) -> NextStepPipeline:
    name, dtype = request.param
    torch.set_num_threads(1)
    return NextStepPipeline.from_pretrained(golden / "tiny-a" if name == RANDOM else name, dtype=dtype)


@pytest.fixture
def check_same(request) -> Callable[[GenerationOutput, list[GenerationOutput]], None]:
    def check(together: GenerationOutput, alone: list[GenerationOutput]) -> None:
        assert (together.images - torch.cat([out.images for out in alone])).abs().max() <= PIXELS
        if request.node.callspec.params["pipe"] != (EMBEDDED, torch.float32):
            assert (together.tokens - torch.cat([out.tokens for out in alone])).abs().max() <= TOKENS

    return check


def test_pictures_of_other_prompts_and_seeds_equal_each_drawn_alone(pipe, check_same) -> None:
    options, seeds = {**SIZE, "cfg": 3.0, "negative_prompt": "grey"}, [6, 2**64 - 1, 6]
    together = pipe.generate(PROMPTS, seed=seeds, **options)
    check_same(together, [pipe.generate(p, seed=s, **options) for p, s in zip(PROMPTS, seeds)])
    shared = pipe.generate(PROMPTS, seed=6, **options)
    assert (together.tokens[1] - shared.tokens[1]).abs().max() > 0.01, "the seeds matter"


@pytest.mark.parametrize("cfg_img", [1.0, 2.0])
def test_so_do_edits_whose_pictures_are_drawn_from_their_posterior(pipe, check_same, cfg_img: float) -> None:
    """The posterior's noise comes first, and with cfg_img twice: from the generator of the row's own picture."""
    options = {**SIZE, "cfg": 3.0, "cfg_img": cfg_img}
    together = pipe.generate(EDITS, images=IMAGES, seed=[1, 2], **options)
    alone = [pipe.generate(EDITS[n], images=IMAGES[n], seed=n + 1, **options) for n in range(2)]
    check_same(together, alone)


def test_several_pictures_of_a_prompt_have_their_own_seeds_too(pipe, check_same) -> None:
    together = pipe.generate(PROMPTS[:2], num_images_per_prompt=2, seed=(30, 31, 32, 33), cfg=2.0, **SIZE)
    alone = [pipe.generate(PROMPTS[n // 2], seed=30 + n, cfg=2.0, **SIZE) for n in range(4)]
    check_same(together, alone)


def test_parts_of_such_a_batch_are_the_batch(pipeline) -> None:
    engine = pipeline.engine
    settings = engine.recommended().override(steps=4, cfg=2.0, sampler="score-sde-1.1")
    job = engine.make_job([Caption(p) for p in PROMPTS], (3, 4), settings, seed=[7, 8, 9])

    def tokens(job, at_once=None) -> torch.Tensor:
        with torch.inference_mode():
            *_, progress = engine.decode(job, pipeline.device, pipeline.dtype, at_once)
        return progress.tokens

    whole = tokens(job)
    assert (tokens(job, at_once=2) - whole).abs().max() <= TOKENS
    assert (tokens(job.part([2, 0])) - whole[[2, 0]]).abs().max() <= TOKENS
    assert (tokens(job.part([0, 2]).part([1])) - whole[[2]]).abs().max() <= TOKENS


@pytest.mark.parametrize("seed", [7, (7, 8, 9, 10, 11, 12)])
def test_a_part_of_the_noise_is_what_its_pictures_see(seed) -> None:
    whole, moved = NoiseStream(seed, 2, 3, 4), NoiseStream(seed, 2, 3, 4)
    moved.for_token(2)
    part = moved.part([4, 1, 3]).part([0, 2])
    whole.for_token(2)
    assert torch.equal(part.for_token(3), whole.for_token(3)[:, [4, 3]])


@pytest.mark.parametrize(
    ("seed", "sentence"),
    [
        ([1], "1 number(s) for 2 picture(s)"),
        ([1, 2, 3], "more than 2 number(s) for 2 picture(s)"),
        (range(2**70), "more than 2"),
        ([], "0 number(s)"),
        ([1, -1], "seed is -1"),
        ([1, 2.0], "seed is 2;"),
        ("12", "seed is '12'"),
        (b"12", "seed is a bytes"),
        ({1: 1, 2: 2}, "seed is a dict"),
    ],
)
def test_seeds_that_are_none_are_one_sentence_before_any_work(pipeline, monkeypatch, seed, sentence: str) -> None:
    monkeypatch.setattr(pipeline, "encode_image", lambda *_: pytest.fail("a picture was encoded"))
    with pytest.raises(NextStepError) as caught:
        pipeline.generate(EDITS, images=IMAGES, seed=seed, **SIZE)
    assert sentence in str(caught.value)

"""Prompt rows by hand: branches, padding, the lead of 1.1, what still fits the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.request.layout import Caption, EncodedImage, PromptRows, build_rows
from nextstep_core.request.tokenizer import NextStepTokenizer

BOI, EOI, PLACE, PAD, AREA = 603, 604, 605, 601, 602
IMAGE = EncodedImage(torch.zeros(6, 64), (2, 3))


@pytest.fixture
def tokenizer(pipeline) -> NextStepTokenizer:
    return pipeline.engine.tokenizer


def rows(pipeline, captions: list[Caption], tokenizer: NextStepTokenizer | None = None, **changes) -> PromptRows:
    config = replace(pipeline.engine.config, max_position_embeddings=changes.pop("limit", None))
    options = {
        "negative_prompt": "", "positive_prompt": "", "images_per_caption": 1, "grid": (3, 4), "cfg": 1.0,
        "cfg_img": 1.0, "bos_before_caption": False,
    }  # fmt: skip
    return build_rows(tokenizer or pipeline.engine.tokenizer, config, captions, **(options | changes))


def ids(rows: PromptRows, row: int = 0) -> list[int]:
    """A row without its padding."""
    return rows.ids[row][rows.valid[row]].tolist()


def test_a_row_is_text_size_and_the_begin_of_an_image(pipeline, tokenizer) -> None:
    made = rows(pipeline, [Caption("Two birds.")])
    size = tokenizer.encode("<|image_area|>3*4")
    assert size[0] == AREA
    assert ids(made) == [*tokenizer.encode("Two birds."), *size, BOI]


def test_rows_are_padded_on_the_left(pipeline, tokenizer) -> None:
    made = rows(pipeline, [Caption("Two birds."), Caption("A")], cfg=2.0)
    widest, empty = made.ids.shape[1], len(tokenizer.encode("<|image_area|>3*4")) + 1
    assert made.ids[3].tolist() == [PAD] * (widest - empty) + ids(made, 3)
    assert made.valid[3].tolist() == [False] * (widest - empty) + [True] * empty
    assert made.valid[0].all()


def test_pictures_of_an_image_slot_stand_in_the_text(pipeline, tokenizer) -> None:
    made = rows(pipeline, [Caption("a<image>b", (IMAGE,))])
    start, end = tokenizer.encode("a<|image_area|>2*3"), tokenizer.encode("b<|image_area|>3*4")
    assert ids(made) == [*start, BOI, *[PLACE] * 6, EOI, *end, BOI]
    assert made.images == ((IMAGE,),)


@pytest.mark.parametrize(("cfg", "branches"), [(1.0, 1), (1.01, 2), (2.0, 2)])
def test_guidance_above_one_asks_for_the_unconditional_branch(pipeline, cfg: float, branches: int) -> None:
    assert rows(pipeline, [Caption("A")], cfg=cfg).branches == branches


@pytest.mark.parametrize(("cfg_img", "branches"), [(1.0, 1), (1.01, 3), (2.0, 3)])
def test_image_guidance_asks_for_both_others(pipeline, cfg_img: float, branches: int) -> None:
    assert rows(pipeline, [Caption("<image>A", (IMAGE,))], cfg_img=cfg_img).branches == branches


def test_branches_and_pictures_stand_in_order(pipeline, tokenizer) -> None:
    captions = [Caption("<image>A", (IMAGE,)), Caption("B")]
    made = rows(
        pipeline, captions, images_per_caption=2, cfg=2.0, cfg_img=2.0, negative_prompt="no", positive_prompt="yes"
    )
    tail = [*tokenizer.encode("<|image_area|>3*4"), BOI]
    image = [*tokenizer.encode("<|image_area|>2*3"), BOI, *[PLACE] * 6, EOI]
    texts = [[*image, *tokenizer.encode("A yes")], tokenizer.encode("B yes")]
    texts += [[*image, *tokenizer.encode("no")], tokenizer.encode("no"), *[tokenizer.encode("no")] * 2]
    assert [ids(made, row) for row in range(0, 12, 2)] == [text + tail for text in texts]
    assert all(ids(made, row) == ids(made, row + 1) for row in range(0, 12, 2)), "two pictures of every caption"
    assert [len(images) for images in made.images] == [1, 1, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    part = made.part([1, 2])
    assert torch.equal(part.ids, made.ids[[1, 2, 5, 6, 9, 10]]) and torch.equal(
        part.valid, made.valid[[1, 2, 5, 6, 9, 10]]
    )
    assert [len(images) for images in part.images] == [1, 0, 1, 0, 0, 0] and part.branches == 3


def test_only_1_1_begins_with_a_bos(pipeline, tokenizer) -> None:
    """And with one, the size loses its first id, whatever that is, as in the reference."""
    with_bos = NextStepTokenizer(tokenizer._backend, "<|beginoftext|>", pipeline.engine.config)
    tail = [*tokenizer.encode("3*4"), BOI]
    for caption, lead in ((True, [606]), (False, [])):
        made = rows(pipeline, [Caption("A")], with_bos, bos_before_caption=caption)
        assert ids(made) == [*lead, *tokenizer.encode("A"), *tail]
    without = rows(pipeline, [Caption("A")], bos_before_caption=True)
    assert ids(without)[0] == tokenizer.encode("A")[0], "this tokenizer has none"


def test_the_family_of_the_checkpoint_decides_about_the_bos(pipeline, tokenizer) -> None:
    engine = replace(
        pipeline.engine, tokenizer=NextStepTokenizer(tokenizer._backend, "<|beginoftext|>", pipeline.engine.config)
    )
    for newer in (True, False):
        engine = replace(engine, published=replace(engine.published, is_1_1=newer))
        job = engine.make_job([Caption("A")], (3, 4), engine.recommended(), seed=1)
        assert (ids(job.rows)[0] == 606) == newer


def test_the_context_holds_just_so_many(pipeline) -> None:
    """On a grid that is not square: 12 image tokens."""
    length = rows(pipeline, [Caption("Two birds.")]).ids.shape[1]
    assert rows(pipeline, [Caption("Two birds.")], limit=length + 12).ids.shape[1] == length
    with pytest.raises(NextStepError, match=f"{length}.*12.*{length + 12}.*{length + 11}"):
        rows(pipeline, [Caption("Two birds.")], limit=length + 11)


def test_a_text_alone_may_fill_the_context(pipeline, tokenizer) -> None:
    text = "Two birds."
    length = len(tokenizer.encode(text))
    for limit in (length, None):
        replace(pipeline.engine, config=replace(pipeline.engine.config, max_position_embeddings=limit)).check_prompt(
            text
        )
    small = replace(pipeline.engine, config=replace(pipeline.engine.config, max_position_embeddings=length - 1))
    with pytest.raises(NextStepError, match=f"{length}.*{length - 1}"):
        small.check_prompt(text)
    fits = replace(pipeline.engine, config=replace(pipeline.engine.config, max_position_embeddings=length + 12))
    fits.check_prompt(text, picture=(3, 4))
    with pytest.raises(NextStepError, match=f"{length} tokens long and the image 15"):
        fits.check_prompt(text, picture=(3, 5))


def test_slots_and_images_must_agree() -> None:
    Caption("<image><image>", (IMAGE, IMAGE))
    for text, images in (("A", (IMAGE,)), ("<image>", ()), ("<image><image>", (IMAGE,))):
        with pytest.raises(NextStepError, match="slot"):
            Caption(text, images)


def test_a_draw_from_the_posterior_by_hand() -> None:
    mean, std = torch.full((6, 64), 2.0), torch.full((6, 64), 0.5)
    drawn = EncodedImage(mean, (2, 3), std).sampled(torch.full((6, 64), 3.0))
    assert torch.equal(drawn.tokens, torch.full((6, 64), 3.5)) and drawn.grid == (2, 3)
    certain = EncodedImage(mean, (2, 3))
    assert certain.sampled(std) is certain


def test_every_input_image_moves_the_noise_and_is_drawn_on_its_own(pipeline) -> None:
    """Also of the image-only branch: each row draws for itself, before the tokens do."""
    image = EncodedImage(torch.zeros(6, 64), (2, 3), torch.ones(6, 64))
    settings = pipeline.engine.recommended().override(cfg=2.0, cfg_img=2.0)
    job = pipeline.engine.make_job([Caption("<image>A", (image,))], (3, 4), settings, seed=3)
    generator = torch.Generator().manual_seed(3)
    for row in (0, 1):
        noise = torch.randn(1, 16, 4, 6, generator=generator)
        assert torch.equal(job.rows.images[row][0].tokens, pipeline.engine.latents.cut(noise)[0])
    assert torch.equal(job.noise.for_token(1)[0], torch.randn(1, 64, generator=generator))

"""Prompt layout: captions, image slots and the size prefix, to token ids of every guidance branch.

A row is text, then `<|image_area|>rows*columns` and the begin-of-image id; image tokens follow. The prefix is tokenized
on its own. Rows are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NextStepError, check_text, shown
from ..images.latents import Grid
from ..model.config import NextStepConfig
from ..runtime.interrupt import Check, go_on
from ..runtime.memory import check_room
from ..sentences import Sentence
from .tokenizer import IMAGE_AREA, LONGEST, NextStepTokenizer, context_of

IMAGE_SLOT = "<image>"
POSITION_BYTES = 32  # of a row while it is laid out: ids and validity, as lists and as tensors


@dataclass(frozen=True)
class EncodedImage:
    """An input image as the transformer sees it: tokens (rows * columns, token_dim) and its (rows, columns) grid.

    tokens are the mean of the VAE's posterior; std, of the same shape, is its standard deviation, or None where the
    VAE is deterministic.
    """

    tokens: Tensor
    grid: Grid
    std: Tensor | None = None

    def sampled(self, noise: Tensor) -> EncodedImage:
        """A draw from the posterior, for standard normal `noise` of the shape of `tokens`."""
        if self.std is None:
            return self
        return EncodedImage(self.tokens + self.std * noise.to(self.tokens), self.grid)


@dataclass(frozen=True)
class Caption:
    """One picture's text with the images for its `<image>` slots, in order."""

    text: str
    images: tuple[EncodedImage, ...] = ()

    def __post_init__(self) -> None:
        slots = check_text(Sentence("The prompt"), self.text).count(IMAGE_SLOT)
        if slots != len(self.images):
            raise NextStepError(
                "The prompt has {slots} {slot} slot(s) for {pictures} input image(s). Write {slot} once for each "
                "image, where it belongs in the text. The prompt was: {text}",
                slots=slots,
                slot=IMAGE_SLOT,
                pictures=len(self.images),
                text=shown(self.text),
            )


@dataclass(frozen=True)
class PromptRows:
    """The transformer's input batch, branch by branch: [cond | image-only | uncond], [cond | uncond] or [cond].

    ids and valid are (branches * captions * images_per_caption, L); images holds, for each row, what fills its
    placeholder ids.
    """

    ids: Tensor
    valid: Tensor
    images: tuple[tuple[EncodedImage, ...], ...]
    branches: int

    @property
    def pictures(self) -> int:
        """Rows of one branch."""
        return len(self.images) // self.branches

    def part(self, pictures: Sequence[int]) -> PromptRows:
        """The rows of these pictures, in all branches."""
        rows = [branch * self.pictures + n for branch in range(self.branches) for n in pictures]
        return PromptRows(self.ids[rows], self.valid[rows], tuple(self.images[row] for row in rows), self.branches)


def _image_text(tokenizer: NextStepTokenizer, config: NextStepConfig, grid: Grid) -> str:
    count = grid[0] * grid[1]
    ids = [config.boi, *[config.image_placeholder_id] * count, config.eoi]
    return f"{IMAGE_AREA}{grid[0]}*{grid[1]}{tokenizer.decode(ids)}"


def _prefix_ids(tokenizer: NextStepTokenizer, config: NextStepConfig, grid: Grid) -> list[int]:
    ids = tokenizer.encode(f"{IMAGE_AREA}{grid[0]}*{grid[1]}")
    # The reference drops the first id whenever the tokenizer has a bos token, whatever that id is.
    return [*(ids if tokenizer.bos_token is None else ids[1:]), config.boi]


def build_rows(
    tokenizer: NextStepTokenizer,
    config: NextStepConfig,
    captions: Sequence[Caption],
    *,
    negative_prompt: str,
    positive_prompt: str,
    images_per_caption: int,
    grid: Grid,
    cfg: float,
    cfg_img: float,
    bos_before_caption: bool,
    check: Check = go_on,
) -> PromptRows:
    """Lay out all branches that the guidance needs.

    cfg 1 is off, and so is cfg_img 1 or a call without images; with cfg_img on there are three branches. NextStepError
    when the longest row and the image's tokens do not fit the context that the config states; what surely does not is
    not even counted. `check` is called for every row and may raise to stop.
    """
    _check_texts(tokenizer, captions, negative_prompt, positive_prompt)
    for caption in captions:
        check_context(config, sum(image.grid[0] * image.grid[1] for image in caption.images), grid)
    repeated = [caption for caption in captions for _ in range(images_per_caption)]
    suffix = f" {positive_prompt}" if positive_prompt else ""
    rows = [Caption(caption.text + suffix, caption.images) for caption in repeated]
    branches = 1
    if cfg_img > 1 and any(caption.images for caption in captions):
        rows += [Caption(IMAGE_SLOT * len(c.images) + negative_prompt, c.images) for c in repeated]
        branches += 1
    if cfg > 1 or branches > 1:
        rows += [Caption(negative_prompt)] * len(repeated)
        branches += 1
    prefix = _prefix_ids(tokenizer, config, grid)
    lead = tokenizer.bos_token if bos_before_caption and tokenizer.bos_token else ""
    ids, read = [], {}
    for row in rows:
        check()
        text = lead + _fill_slots(tokenizer, config, row)
        if text not in read:
            read[text] = tokenizer.encode(text)
        if any(caption.images for caption in captions):
            check_placeholders(tokenizer, config, read[text], sum(i.grid[0] * i.grid[1] for i in row.images))
        ids.append(read[text])
    width = max(map(len, ids))
    check_context(config, width + len(prefix), grid)
    check_room(
        len(ids) * (width + len(prefix)) * POSITION_BYTES,
        Sentence("{count} prompts of {length:,} tokens", count=len(ids), length=width),
    )
    padded = torch.full((len(ids), width + len(prefix)), config.pad_token_id_added)
    valid = torch.zeros(padded.shape, dtype=torch.bool)
    for n, row_ids in enumerate(ids):
        check()
        padded[n, width - len(row_ids) :] = torch.tensor(row_ids + prefix)
        valid[n, width - len(row_ids) :] = True
    images = tuple(row.images for row in rows)
    return PromptRows(padded, valid, images, branches)


def check_placeholders(tokenizer: NextStepTokenizer, config: NextStepConfig, ids: Sequence[int], wanted: int) -> None:
    """NextStepError when a text itself spells the token that stands for a part of an input image: beside images, none
    could tell which is which."""
    if ids.count(config.image_placeholder_id) != wanted:
        spelled = tokenizer.decode([config.image_placeholder_id])
        raise NextStepError(
            "The prompt spells {spelled}, which stands for a part of an input image. Take it out; write "
            "{slot} where a picture belongs.",
            spelled=shown(spelled),
            slot=IMAGE_SLOT,
        )


def _check_texts(
    tokenizer: NextStepTokenizer, captions: Sequence[Caption], negative_prompt: str, positive_prompt: str
) -> None:
    texts = [tokenizer.check_length(Sentence("The prompt"), caption.text) for caption in captions]
    texts.append(tokenizer.check_length(Sentence("The negative prompt"), negative_prompt))
    texts += [tokenizer.check_length(Sentence("The positive prompt"), positive_prompt)] * len(captions)
    if (size := sum(map(len, texts))) > LONGEST:
        raise NextStepError(
            "The {count} prompts are {size:,} characters long together; one call takes at most {most:,}. "
            "Split them into several calls.",
            count=len(captions),
            size=size,
            most=LONGEST,
        )


def _fill_slots(tokenizer: NextStepTokenizer, config: NextStepConfig, row: Caption) -> str:
    parts = row.text.split(IMAGE_SLOT)
    images = [_image_text(tokenizer, config, image.grid) for image in row.images]
    return parts[0] + "".join(image + part for image, part in zip(images, parts[1:]))


def check_context(config: NextStepConfig, prompt_length: int, grid: Grid) -> None:
    """NextStepError when a prompt of so many tokens and a picture of this grid are more than the model's context."""
    limit, needed = context_of(config), prompt_length + grid[0] * grid[1]
    if needed > limit:
        raise NextStepError(
            "The prompt is {prompt_length} tokens long and the image {picture}; together {needed} are more "
            "than the {limit} that this model allows. Shorten the prompt or choose a smaller image.",
            prompt_length=prompt_length,
            picture=grid[0] * grid[1],
            needed=needed,
            limit=limit,
        )

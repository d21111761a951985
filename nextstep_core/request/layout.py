"""Prompt layout: captions, image slots and the size prefix, to token ids of every guidance branch.

A row is text, then `<|image_area|>rows*columns` and the begin-of-image id; image tokens follow. The prefix is tokenized
on its own. Rows are padded on the left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import NextStepError
from ..images.latents import Grid
from ..model.config import NextStepConfig
from .tokenizer import IMAGE_AREA, NextStepTokenizer

IMAGE_SLOT = "<image>"


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
        slots = self.text.count(IMAGE_SLOT)
        if slots != len(self.images):
            raise NextStepError(
                f"The prompt has {slots} {IMAGE_SLOT} slot(s) for {len(self.images)} input image(s). Write "
                f"{IMAGE_SLOT} once for each image, where it belongs in the text. The prompt was: {self.text!r}"
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

    def part(self, start: int, stop: int) -> PromptRows:
        """The rows of pictures start..stop-1, in all branches."""
        pictures = len(self.images) // self.branches
        rows = [branch * pictures + i for branch in range(self.branches) for i in range(start, stop)]
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
) -> PromptRows:
    """Lay out all branches that the guidance needs.

    cfg 1 is off, and so is cfg_img 1 or a call without images; with cfg_img on there are three branches. NextStepError
    when the longest row and the image's tokens do not fit the context that the config states.
    """
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
    ids = [tokenizer.encode(lead + _fill_slots(tokenizer, config, row)) for row in rows]
    width = max(map(len, ids))
    _check_context(config, width + len(prefix), grid)
    padded = [[config.pad_token_id_added] * (width - len(row)) + row + prefix for row in ids]
    valid = [[False] * (width - len(row)) + [True] * (len(row) + len(prefix)) for row in ids]
    images = tuple(row.images for row in rows)
    return PromptRows(torch.tensor(padded), torch.tensor(valid), images, branches)


def _fill_slots(tokenizer: NextStepTokenizer, config: NextStepConfig, row: Caption) -> str:
    parts = row.text.split(IMAGE_SLOT)
    images = [_image_text(tokenizer, config, image.grid) for image in row.images]
    return parts[0] + "".join(image + part for image, part in zip(images, parts[1:]))


def _check_context(config: NextStepConfig, prompt_length: int, grid: Grid) -> None:
    limit, needed = config.max_position_embeddings, prompt_length + grid[0] * grid[1]
    if limit is not None and needed > limit:
        raise NextStepError(
            f"The prompt is {prompt_length} tokens long and the image {grid[0] * grid[1]}; together {needed} are more "
            f"than the {limit} that this model allows. Shorten the prompt or choose a smaller image."
        )

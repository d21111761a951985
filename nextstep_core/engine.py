"""Prompts to image tokens: tokenizer, text embedding and transformer behind one call.

The engine moves no weights. Whoever owns the model (the pipeline, or a host's memory management) puts it on a device;
the engine is told which device and dtype to compute in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .config import NextStepConfig
from .decode import PREFILL_CHUNK, Progress, decode_tokens
from .errors import NextStepError
from .model.kv_cache import KVCache
from .model.nextstep import NextStepModel, TextEmbedding, patchify
from .model.positions import generation_codes
from .prompt import Caption, EncodedImage, Grid, PromptRows, build_rows
from .sampling.noise import NoiseStream
from .settings import GenerationSettings, is_1_1, recommended_settings
from .tokenizer import NextStepTokenizer

VAE_DOWNSCALE = 8


@dataclass(frozen=True)
class Job:
    """One call's worth of pictures, checked and laid out, ready to decode."""

    rows: PromptRows
    grid: Grid
    settings: GenerationSettings
    noise: NoiseStream

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""
        return self.rows.ids.shape[1] + self.grid[0] * self.grid[1] - 1

    @property
    def batch(self) -> int:
        """Rows of the transformer's batch, all branches counted."""
        return self.rows.ids.shape[0]


@dataclass(frozen=True)
class NextStepEngine:
    """A loaded checkpoint without its VAE. `name` is its folder or hub id, which tells the published settings."""

    config: NextStepConfig
    model: NextStepModel
    text_embedding: TextEmbedding
    tokenizer: NextStepTokenizer
    folder: Path
    name: str

    @property
    def pixels_per_token(self) -> int:
        """Side of the square of pixels that one token covers."""
        return VAE_DOWNSCALE * self.config.latent_patch_size

    def recommended(self, editing: bool = False) -> GenerationSettings:
        """The checkpoint's own settings, for making or for editing an image."""
        return recommended_settings(self.folder, self.config, self.name, editing)

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of tokens for a picture; NextStepError offers the nearest size where a side does not fit."""
        unit = self.pixels_per_token
        if height < unit or width < unit or height % unit or width % unit:
            near = [max(unit, round(side / unit) * unit) for side in (width, height)]
            raise NextStepError(
                f"A picture of {width}x{height} pixels is not possible: width and height must be multiples of {unit}. "
                f"The nearest size is {near[0]}x{near[1]}."
            )
        grid = height // unit, width // unit
        if self.config.use_gen_pos_embed:
            generation_codes(self.config, grid, self.model.gen_pos_embed[0])
        return grid

    def prepare(
        self,
        captions: Sequence[Caption],
        grid: Grid,
        settings: GenerationSettings,
        *,
        seed: int,
        negative_prompt: str = "",
        positive_prompt: str = "",
        images_per_caption: int = 1,
    ) -> Job:
        """Lay out every guidance branch and start the noise stream; NextStepError when the prompt is too long."""
        rows = build_rows(
            self.tokenizer,
            self.config,
            captions,
            negative_prompt=negative_prompt,
            positive_prompt=positive_prompt,
            images_per_caption=images_per_caption,
            grid=grid,
            cfg=settings.cfg,
            cfg_img=settings.cfg_img,
            bos_before_caption=is_1_1(self.config, self.name),
        )
        noise = NoiseStream(seed, len(captions), images_per_caption, self.config.token_dim)
        images = tuple(self._sample_posterior(image, noise) for image in rows.images)
        return Job(replace(rows, images=images), grid, settings, noise)

    def _sample_posterior(self, image: EncodedImage, noise: NoiseStream) -> EncodedImage:
        patch = self.config.latent_patch_size
        drawn = noise.posterior(self.config.latent_channels, image.grid[0] * patch, image.grid[1] * patch)
        return image.sampled(patchify(drawn, patch)[0])

    def check_prompt(self, text: str) -> None:
        """NextStepError when `text` alone is longer than the model's context."""
        limit, length = self.config.max_position_embeddings, len(self.tokenizer.encode(text))
        if limit is not None and length > limit:
            raise NextStepError(f"The prompt is {length} tokens long; this model can hold {limit}. Shorten the prompt.")

    def working_bytes(self, job: Job, dtype: torch.dtype) -> int:
        """Memory that `job` needs beside the weights: KV cache, prefill activations and the head's modulations."""
        config = self.config
        positions = job.batch * min(job.length, PREFILL_CHUNK)
        prefill = positions * (8 * config.hidden_size + 3 * config.intermediate_size)
        scores = job.batch * config.num_attention_heads * min(job.length, PREFILL_CHUNK) * job.length
        head = job.batch * (job.settings.steps + 1) * (3 * config.fm_head_layers + 2) * config.fm_head_dim
        cache = KVCache.bytes_needed(config, job.batch, job.length, dtype)
        return cache + (prefill + scores + head) * dtype.itemsize

    def embed(self, rows: PromptRows, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Prompt embeddings (B, L, hidden) with the tokens of input images at their placeholders."""
        embeds = self.text_embedding(rows.ids).to(device=device, dtype=dtype)
        if rows.images:
            tokens = torch.cat([image.tokens for image in rows.images]).to(device=device, dtype=dtype)
            embeds[(rows.ids == self.config.image_placeholder_id).to(device)] = self.model.image_in_projector(tokens)
        return embeds

    def decode(self, job: Job, device: torch.device, dtype: torch.dtype) -> Iterator[Progress]:
        """Draw the pictures' tokens on `device` in `dtype`, yielding after each; the model must be there already."""
        embeds = self.embed(job.rows, device, dtype)
        valid = job.rows.valid.to(device)
        yield from decode_tokens(self.model, embeds, valid, job.grid, job.rows.branches, job.settings, job.noise)

"""Prompts to image tokens: tokenizer, text embedding and transformer behind one call.

Whoever owns the model (the pipeline, or a host's memory management) decides where its weights lie; the engine is told
which device and dtype to compute in.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import chain

import torch
from torch import Tensor

from ..errors import NextStepError, is_out_of_memory
from ..images.latents import Grid, LatentSpace
from ..loading.documents import Documents
from ..loading.published import is_1_1, recommended_settings
from ..model.config import NextStepConfig
from ..model.kv_cache import KVCache
from ..model.nextstep import NextStepModel, TextEmbedding
from ..model.positions import grid_side, has_codes
from ..request.layout import Caption, EncodedImage, PromptRows, build_rows
from ..request.tokenizer import NextStepTokenizer
from ..runtime.graphs import StepGraphs
from ..runtime.streaming import weights_on
from ..sampling.noise import NoiseStream
from ..sampling.settings import GenerationSettings
from .loop import KnownTokens, TokenStep, decode_tokens
from .steps import CHUNK, PrefillCache


@dataclass(frozen=True)
class Job:
    """One call's worth of pictures, checked and laid out, ready to decode."""

    rows: PromptRows
    grid: Grid
    settings: GenerationSettings
    noise: NoiseStream
    known: KnownTokens | None = None

    @property
    def pictures(self) -> int:
        """How many pictures the job draws."""
        return len(self.rows.ids) // self.rows.branches

    @property
    def length(self) -> int:
        """Positions that the KV cache holds."""
        return self.rows.ids.shape[1] + self.grid[0] * self.grid[1] - 1

    @property
    def batch(self) -> int:
        """Rows of the transformer's batch, all branches counted."""
        return self.rows.ids.shape[0]

    def part(self, start: int, stop: int) -> Job:
        """Pictures start..stop-1 alone, with the prompts and the noise that they have in the whole job."""
        known = self.known and replace(self.known, tokens=self.known.tokens[start:stop])
        return replace(self, rows=self.rows.part(start, stop), noise=self.noise.part(start, stop), known=known)

    def prompt_key(self, dtype: torch.dtype) -> str:
        """Tells prompts apart by what the transformer reads: ids, padding, input images and dtype."""
        digest = sha256(f"{dtype} {tuple(self.rows.ids.shape)}".encode())
        digest.update(self.rows.ids.numpy().tobytes() + self.rows.valid.numpy().tobytes())
        for image in chain.from_iterable(self.rows.images):
            digest.update(image.tokens.float().cpu().numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Progress:
    """Where a job stands after a token: pictures start..stop-1 are at `step`, those before are finished.

    tokens is the buffer (pictures, total, token_dim) of the whole job: known tokens from the start, and zero where a
    token is still to be drawn.
    """

    step: TokenStep
    start: int
    stop: int
    tokens: Tensor

    @property
    def total(self) -> int:
        """Token places of one picture."""
        return self.step.total

    @property
    def done(self) -> int:
        """Of `total`, the share that is done, over all pictures of the job."""
        drawn_together = self.stop - self.start
        return (self.start * self.total + drawn_together * self.step.done) // len(self.tokens)

    @property
    def tokens_per_second(self) -> float:
        """Token places per second, each for all pictures that are drawn together."""
        return self.step.tokens_per_second

    @property
    def seconds_left(self) -> float:
        """Time until the last picture is done, if all goes on at this rate."""
        together = self.step.seconds + self.step.seconds_left
        return self.step.seconds_left + together * (len(self.tokens) - self.stop) / (self.stop - self.start)


@dataclass(frozen=True)
class NextStepEngine:
    """A loaded checkpoint without its VAE."""

    config: NextStepConfig
    latents: LatentSpace
    model: NextStepModel
    text_embedding: TextEmbedding
    tokenizer: NextStepTokenizer
    documents: Documents
    prefilled: PrefillCache = field(default_factory=PrefillCache)
    graphs: StepGraphs | None = None  # None runs every step as it is

    def recommended(self, editing: bool = False) -> GenerationSettings:
        """The checkpoint's own settings, for making or for editing an image."""
        return recommended_settings(self.documents, self.config, self.documents.name, editing)

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of tokens for a picture in pixels; NextStepError when it cannot be drawn, with what can."""
        grid = self.latents.grid(height, width)
        if self.config.use_gen_pos_embed and not has_codes(self.config, grid):
            raise NextStepError(self._too_large(grid))
        return grid

    def _too_large(self, grid: Grid) -> str:
        side, (width, height) = grid_side(self.config), self.latents.size(grid)
        if self.config.base_image_grid_size is not None:
            held = "{}x{}".format(*self.latents.size((side, side)))
            return (
                f"This checkpoint has positions for {side}x{side} tokens ({held} pixels); {width}x{height} pixels is "
                "larger. Choose a smaller size."
            )
        return (
            f"This checkpoint has positions for {side * side} image tokens; {width}x{height} pixels needs "
            f"{grid[0] * grid[1]}. Choose a smaller size."
        )

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
        known: KnownTokens | None = None,
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
            bos_before_caption=is_1_1(self.config, self.documents.name),
        )
        noise = NoiseStream(seed, len(captions), images_per_caption, self.config.token_dim)
        images = tuple(tuple(self._sample_posterior(image, noise) for image in row) for row in rows.images)
        return Job(replace(rows, images=images), grid, settings, noise, known)

    def _sample_posterior(self, image: EncodedImage, noise: NoiseStream) -> EncodedImage:
        return image.sampled(self.latents.cut(noise.posterior(*self.latents.shape(image.grid)))[0])

    def check_prompt(self, text: str) -> None:
        """NextStepError when `text` alone is longer than the model's context."""
        limit, length = self.config.max_position_embeddings, len(self.tokenizer.encode(text))
        if limit is not None and length > limit:
            raise NextStepError(f"The prompt is {length} tokens long; this model can hold {limit}. Shorten the prompt.")

    def working_bytes(self, job: Job, dtype: torch.dtype) -> int:
        """Memory that `job` needs beside the weights: KV cache, prefill activations and the head's modulations."""
        config = self.config
        fed_at_once = min(CHUNK, job.rows.ids.shape[1] if job.known is None else job.length)
        prefill = job.batch * fed_at_once * (8 * config.hidden_size + 3 * config.intermediate_size)
        scores = job.batch * config.num_attention_heads * fed_at_once * job.length
        head = job.batch * (job.settings.steps + 1) * (3 * config.fm_head_layers + 2) * config.fm_head_dim
        cache = KVCache.bytes_needed(config, job.batch, job.length, dtype)
        return cache + (prefill + scores + head) * dtype.itemsize

    def embed(self, rows: PromptRows, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Prompt embeddings (B, L, hidden) with the tokens of input images at their placeholders."""
        embeds = self.text_embedding(rows.ids).to(device=device, dtype=dtype)
        images = [image.tokens for row in rows.images for image in row]
        if images:
            tokens = self.model.image_in_projector(torch.cat(images).to(device=device, dtype=dtype))
            embeds[(rows.ids == self.config.image_placeholder_id).to(device)] = tokens
        return embeds

    def decode(
        self, job: Job, device: torch.device, dtype: torch.dtype, at_once: int | None = None
    ) -> Iterator[Progress]:
        """Draw the pictures' tokens on `device` in `dtype`, yielding after each.

        Weights that lie elsewhere are streamed to the device. At most `at_once` pictures are drawn together (None:
        all). Where memory runs out, the rest goes in halves; each picture comes out as it would have in one batch.
        """
        total = job.grid[0] * job.grid[1]
        tokens = torch.zeros(job.pictures, total, self.config.token_dim, device=device, dtype=dtype)
        start, size = 0, min(at_once or job.pictures, job.pictures)
        with weights_on(self.model, tokens.device):
            while start < job.pictures:
                stop = min(start + size, job.pictures)
                tokens[start:] = 0  # also what a part left that ran out of memory
                if job.known is not None:
                    job.known.fill(tokens)
                try:
                    for step in self._decode_part(job.part(start, stop), tokens[start:stop]):
                        yield Progress(step, start, stop, tokens)
                except RuntimeError as error:
                    if size == 1 or not is_out_of_memory(error):
                        raise
                    size = -(-size // 2)
                else:
                    start = stop

    def _decode_part(self, job: Job, tokens: Tensor) -> Iterator[TokenStep]:
        graphs = self.graphs if self.graphs is not None and self.graphs.fit(tokens.device) else None
        return decode_tokens(
            self.model,
            self.embed(job.rows, tokens.device, tokens.dtype),
            job.rows.valid.to(tokens.device),
            tokens,
            job.grid,
            job.rows.branches,
            job.settings,
            job.noise,
            job.known,
            self.prefilled,
            job.prompt_key(tokens.dtype),
            graphs,
        )

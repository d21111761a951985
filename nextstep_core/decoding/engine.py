"""Prompts to image tokens: tokenizer, text embedding and transformer behind one call.

Whoever owns the model (the pipeline, or a host's memory management) decides where its weights lie; the engine is told
which device and dtype to compute in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from traceback import clear_frames
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from ..errors import NextStepError, is_out_of_memory
from ..images.latents import Grid, LatentSpace
from ..loading.build import ModelPlan
from ..loading.lora_file import FittedLora
from ..loading.published import Published, published
from ..model.config import NextStepConfig
from ..model.nextstep import NextStepModel, TextEmbedding
from ..model.positions import grid_side, has_codes
from ..request.layout import (
    IMAGE_SLOT,
    Caption,
    EncodedImage,
    PromptRows,
    build_rows,
    check_context,
    check_placeholders,
)
from ..request.tokenizer import NextStepTokenizer, context_of
from ..runtime.graphs import StepGraphs
from ..runtime.interrupt import Check, checked, go_on
from ..runtime.lora import STRENGTH, Adapter, Stack
from ..runtime.memory import check_room, plan_host_memory, spare_bytes
from ..runtime.parallel import Ranks, not_shared
from ..runtime.shortage import reason_of, told
from ..runtime.streaming import weights_on
from ..sampling.noise import NoiseStream, Seeds
from ..sampling.settings import OFF, GenerationSettings
from ..sentences import Sentence
from .fused import OwnKernels
from .job import PICTURES, Job, KnownTokens
from .lookahead import MOST, look_ahead
from .loop import decode
from .memory import Piece, RunSize, working_bytes
from .progress import Progress, TokenStep
from .steps import CHUNK, StepCaches

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NextStepEngine:
    """A loaded checkpoint without its VAE. Engines that differ in their `loras` alone share all else.

    With `ranks` it has a share of the model, and draws in step with the others.
    """

    config: NextStepConfig
    latents: LatentSpace
    published: Published
    tokenizer: NextStepTokenizer
    text_embedding: TextEmbedding
    model: NextStepModel
    caches: StepCaches = field(default_factory=StepCaches)
    loras: Stack = Stack()
    adapters: WeakValueDictionary[str, Adapter] = field(default_factory=WeakValueDictionary, compare=False)
    ranks: Ranks | None = None

    @classmethod
    def assemble(
        cls,
        plan: ModelPlan,
        latents: LatentSpace,
        load_model: Callable[[], NextStepModel],
        cuda_graphs: bool = True,
    ) -> NextStepEngine:
        """The engine of a planned checkpoint; `cuda_graphs` captures the work of a token on a CUDA device.

        Everything that can be wrong with its documents is raised, as NextStepError, before `load_model` is called to
        read the weights.
        """
        says, tokenizer = published(plan.documents, plan.config), NextStepTokenizer.load(plan.documents, plan.config)
        text_embedding, model = plan.load_text_embedding(), load_model()
        caches = StepCaches(StepGraphs(model) if cuda_graphs else None, hasten=OwnKernels())
        return cls(plan.config, latents, says, tokenizer, text_embedding, model, caches)

    def with_lora(self, lora: FittedLora, strength: float, check: Check = go_on) -> NextStepEngine:
        """The same model with a LoRA on top of those that are there; strengths of one file add up.

        A file that is in use already is not read again.
        """
        STRENGTH.check(strength)
        if self.ranks is not None:
            raise not_shared("--lora")
        key = lora.fingerprint
        adapter = self.adapters.get(key)
        if adapter is None:
            adapter = self.adapters[key] = lora.read(check)
        return replace(self, loras=self.loras.plus(adapter, strength))

    def without_loras(self) -> NextStepEngine:
        """The same model, plain."""
        return replace(self, loras=Stack())

    def recommended(self, editing: bool = False) -> GenerationSettings:
        """The checkpoint's own settings, for making or for editing an image."""
        return self.published.editing if editing else self.published.text_to_image

    def grid(self, height: int, width: int) -> Grid:
        """(rows, columns) of tokens for a picture in pixels; NextStepError when it cannot be drawn, with what can."""
        grid = self.latents.grid(height, width)
        if self.config.use_gen_pos_embed and not has_codes(self.config, grid):
            raise self._too_large(grid)
        return grid

    def _too_large(self, grid: Grid) -> NextStepError:
        side, (width, height) = grid_side(self.config), self.latents.size(grid)
        if self.config.base_image_grid_size is not None:
            held = "{}x{}".format(*self.latents.size((side, side)))
            return NextStepError(
                "This checkpoint has positions for {side}x{side} tokens ({held} pixels); {width}x{height} pixels is "
                "larger. Choose a smaller size.",
                side=side,
                held=held,
                width=width,
                height=height,
            )
        return NextStepError(
            "This checkpoint has positions for {held} image tokens; {width}x{height} pixels needs {needed}. Choose a "
            "smaller size.",
            held=side * side,
            width=width,
            height=height,
            needed=grid[0] * grid[1],
        )

    def make_job(
        self,
        captions: Sequence[Caption],
        grid: Grid,
        settings: GenerationSettings,
        *,
        seed: Seeds,
        negative_prompt: str = "",
        positive_prompt: str = "",
        images_per_caption: int = 1,
        known: KnownTokens | None = None,
        check: Check = go_on,
    ) -> Job:
        """Lay out every guidance branch and start the noise; NextStepError when the prompt is too long.

        With a sequence of seeds, one for each picture, every picture comes out as if it were drawn alone with its own.
        `check` may raise to stop.
        """
        settings.check()
        if self.ranks is not None and settings.lookahead != OFF:  # each would choose windows by its own clock
            raise not_shared("lookahead")
        PICTURES.check(len(captions) * images_per_caption)
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
            bos_before_caption=self.published.is_1_1,
            check=check,
        )
        noise = NoiseStream(seed, len(captions), images_per_caption, self.config.token_dim)
        images = tuple(
            tuple(self._sample_posterior(image, noise, row % rows.pictures) for image in images)
            for row, images in enumerate(rows.images)
        )
        return Job(replace(rows, images=images), grid, settings, noise, known)

    def _sample_posterior(self, image: EncodedImage, noise: NoiseStream, picture: int) -> EncodedImage:
        return image.sampled(self.latents.cut(noise.for_posterior(picture, *self.latents.shape(image.grid)))[0])

    def check_prompt(self, text: str, grids: Sequence[Grid] = (), picture: Grid | None = None) -> None:
        """NextStepError when `text`, with input images of these grids in its slots, is no text, or longer than the
        model's context: by itself, or with the `picture` that is to be drawn."""
        words = self.tokenizer.check_length(Sentence("The prompt"), text).replace(IMAGE_SLOT, "")
        limit = context_of(self.config)
        ids = self.tokenizer.encode(words)
        if IMAGE_SLOT in text:
            check_placeholders(self.tokenizer, self.config, ids, 0)
        length = len(ids) + sum(rows * columns for rows, columns in grids)
        if length > limit:
            raise NextStepError(
                "The prompt is {length} tokens long; the limit of this model is {limit}. Shorten the prompt.",
                length=length,
                limit=limit,
            )
        if picture is not None:
            check_context(self.config, length, picture)

    def working_bytes(self, job: Job, dtype: torch.dtype) -> int:
        """Memory that `job` needs beside the weights: KV cache, prefill activations and the head's modulations."""
        window = 0 if job.settings.lookahead == OFF else MOST
        fed = max(min(CHUNK, job.longest_stretch), window)
        size = RunSize(job.batch, job.length + window, fed, job.settings.steps, max(1, window))
        return working_bytes(self.config, size, dtype)

    def lora_bytes(self, dtype: torch.dtype) -> int:
        """Memory of the device that a run takes for the LoRAs, which are never streamed."""
        return self.loras.bytes_in(dtype)

    def embed(self, rows: PromptRows, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Prompt embeddings (B, L, hidden) with the tokens of input images at their placeholders."""
        embeds: Tensor = self.text_embedding(rows.ids).to(device=device, dtype=dtype)
        images = [image.tokens for row in rows.images for image in row]
        if images:
            tokens = self.model.image_in_projector(torch.cat(images).to(device=device, dtype=dtype))
            embeds[(rows.ids == self.config.image_placeholder_id).to(device)] = tokens
        return embeds

    def decode(
        self,
        job: Job,
        device: torch.device,
        dtype: torch.dtype,
        at_once: int | None = None,
        check: Check = go_on,
        make_room: Callable[[], bool] = lambda: False,
    ) -> Generator[Progress, None, None]:
        """Sample the pictures' tokens on `device` in `dtype`, yielding after each.

        Weights that lie elsewhere are streamed to the device. At most `at_once` pictures are drawn together (None:
        all). `check` is called before every layer of the transformer and may raise to stop.

        Where memory runs out, the batch is halved, each picture coming out as it would have in one batch; then prompts
        are read in shorter pieces; then `make_room` is asked to send weights away, and says whether it could.
        OutOfMemory when nothing of this is left, or where others have gone on already.
        """
        at = torch.empty(0, device=device).device
        width, height = self.latents.size(job.grid)
        needed = self.working_bytes(job.part([0]), dtype)
        work = Sentence("A picture of {width}x{height} pixels, on top of the weights,", width=width, height=height)
        with told(work, at, needed):
            start, wanted = 0, min(at_once or job.pictures, job.pictures)
            fits = self._at_once(job, device, dtype, wanted)
            piece = Piece(fits if self.ranks is None else self.ranks.agree(fits), CHUNK)
            tokens = torch.zeros(job.pictures, job.total, self.config.token_dim, device=device, dtype=dtype)
            while start < job.pictures:
                start, shortage = yield from self._decode_pieces(job, tokens, start, piece, check)
                if shortage is not None and self.ranks is not None:
                    raise MemoryError(shortage)
                if shortage is not None:
                    piece = self._reduced(piece, job, at, shortage, make_room)

    def _decode_pieces(
        self, job: Job, tokens: Tensor, start: int, piece: Piece, check: Check
    ) -> Generator[Progress, None, tuple[int, str | None]]:
        """Sample from picture `start` on. Returns the picture that it came to and, where memory ran out, what the
        device said."""
        with checked(self.model.layers, check) as hook:
            try:
                applied = self.caches.adapters.applied(self.model, self.loras, tokens.device, tokens.dtype)
                with weights_on(self.model, tokens.device), applied:
                    while start < job.pictures:
                        stop = min(start + piece.pictures, job.pictures)
                        tokens[start:] = 0  # also what a part left that ran out of memory
                        if job.known is not None:
                            job.known.fill(tokens)
                        part = job.part(range(start, stop))
                        for step in self._decode_part(part, tokens[start:stop], piece.positions):
                            yield Progress(step, start, stop, tokens)
                        start = stop
            except BaseException as error:
                # Whoever keeps the error must not keep what was allocated here, which its traceback holds on to.
                clear_frames(error.__traceback__)
                if hook.stopped or not isinstance(error, Exception):
                    raise error.with_traceback(None) from None
                if not is_out_of_memory(error):
                    raise
                return start, reason_of(error)
        return start, None

    def _reduced(self, piece: Piece, job: Job, at: torch.device, shortage: str, make_room: Callable[[], bool]) -> Piece:
        """What to do at once after memory ran out. MemoryError where it cannot be less, and nothing else can go."""
        self.release()
        if at.type == "cpu" and self.caches.prefilled is not None:
            self.caches.prefilled.clear()
        smaller = piece.halved(job.longest_stretch)
        if smaller is None and not make_room():
            raise MemoryError(shortage)
        left = "with more weights on the host" if smaller is None else f"with {smaller} at a time"
        log.warning("Out of memory on %s (%s). Continuing %s.", at, shortage, left)
        return smaller or piece

    def _at_once(self, job: Job, device: torch.device, dtype: torch.dtype, wanted: int) -> int:
        """How many pictures are drawn together. A CPU's memory is asked beforehand: where it runs out, the system ends
        the program instead of refusing."""
        if device.type != "cpu":
            return wanted
        what = Sentence("{count} pictures", count=job.pictures)
        check_room(job.pictures * job.total * self.config.token_dim * dtype.itemsize, what)
        free, each = spare_bytes() - self.lora_bytes(dtype), self.working_bytes(job.part([0]), dtype)
        return plan_host_memory(0, free, wanted, each).at_once

    def _decode_part(self, job: Job, tokens: Tensor, chunk: int) -> Iterator[TokenStep]:
        embeds = self.embed(job.rows, tokens.device, tokens.dtype)
        loop = decode if job.settings.lookahead == OFF else look_ahead
        return loop(self.model, job, embeds, tokens, self.caches, chunk)

    def release(self) -> None:
        """Free the device memory that is kept for the next run; it is taken again when it is needed."""
        self.caches.release()

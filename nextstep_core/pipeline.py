"""The public pipeline: a checkpoint and its VAE on one device, prompts in, pictures out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from .decoding.budget import Budget, model_bytes
from .decoding.engine import NextStepEngine
from .decoding.job import PICTURES, Job
from .decoding.memory import AUTO
from .decoding.progress import Progress
from .decoding.pruning import Pruning
from .errors import NextStepError, check_choice, check_text, not_finite
from .images.latents import Grid, LatentSpace
from .images.preview import BACKGROUND
from .images.rgb import ImageInput, picture_size, to_pixels
from .images.tiling import check_tile, run_in_tiles
from .loading.build import load_vae, plan_model
from .loading.calibration import PROMPTS, Drawn
from .loading.lora_file import find_lora, resolve_lora
from .loading.shares import shared
from .loading.store import resolve_source, vae_beside
from .model.vae import AutoencoderKL, Runner
from .ranges import Range
from .request.layout import IMAGE_SLOT, Caption, EncodedImage
from .runtime.devices import capped, give_back
from .runtime.interrupt import Check, checked, go_on, leaves
from .runtime.lora import STRENGTH
from .runtime.memory import MAX_MEMORY, check_room
from .runtime.parallel import Ranks, not_shared
from .runtime.placement import held_bytes, place, send_away
from .runtime.quantization import RECIPES
from .runtime.shortage import LOADING_ADVICE, told
from .sampling.noise import Seeds, check_seeds
from .sampling.settings import SEED
from .sentences import Sentence

IMAGES_PER_PROMPT = Range("num_images_per_prompt", PICTURES.minimum, PICTURES.maximum)

PIXEL_BYTES = 2 * 3 * torch.float32.itemsize  # of a picture as it comes from the VAE, and as it is handed out


@dataclass(frozen=True)
class GenerationOutput:
    """images (B, H, W, 3) float32 in [0, 1]; latents (B, 16, H/8, W/8) as the VAE decoder takes them; tokens
    (B, N, 64). All on the CPU. B runs over captions, then over the images of each caption."""

    images: Tensor
    latents: Tensor
    tokens: Tensor


class NextStepPipeline:
    """Text to image, and editing with input images."""

    def __init__(
        self,
        engine: NextStepEngine,
        vae: AutoencoderKL,
        device: torch.device,
        dtype: torch.dtype,
        max_memory: int | None = None,
    ) -> None:
        self.engine, self.vae, self.device, self.dtype = engine, vae, device, dtype
        self.max_memory = max_memory
        self._budget = Budget.of(device, max_memory, dtype, vae)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | Path,
        *,
        vae: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        quantization: str | None = None,
        cuda_graphs: bool = True,
        max_memory: int | None = None,
        loras: Sequence[tuple[str | Path, float]] = (),
        ranks: Ranks | None = None,
        check: Check = go_on,
    ) -> NextStepPipeline:
        """Load from a checkpoint folder, a `.safetensors` file that carries its config or lies beside it, a hub id, or
        "tiny".

        `vae` may be a folder, a `.pt` or `.safetensors` file or a hub id; None takes the checkpoint's own.
        `quantization` stores the weights as "int8", "int4", "int4-g32", "int4-g128" or "fp8" while they are loaded;
        "auto" takes none, int8 or int4, the first that fits `max_memory` or, without that, the device (a CPU: none).
        `cuda_graphs` captures the work of a token on a CUDA device and replays it. `loras` are files and their
        strengths, as `load_lora` takes them. `check` is called all the while and stops by raising. Raises
        NextStepError, before any weight is read, for whatever is missing, damaged or does not fit.

        `max_memory` is how many bytes of the device are taken at most; None, as many as there are. Weights that do not
        fit stay with the host and are streamed, and after each picture what is kept for the next is freed. On a CPU,
        where weights cannot be streamed, it bounds what is drawn at once, and what does not fit is refused.

        With `ranks`, several processes draw each picture together, on their own device each, and this one reads its
        share of the weights alone. All must ask for the same, and each gets the whole pictures. Nothing is streamed
        then, there are no LoRAs, no `lookahead` and no "auto", and of a token the flow head's work alone is captured.
        """
        limit = None if max_memory is None else MAX_MEMORY.check(max_memory)
        if quantization is not None:
            check_choice("quantization", quantization, (*RECIPES, AUTO))
        if ranks is not None:
            check_alike(limit, quantization, loras)
            device = ranks.device
        device = torch.empty(0, device=device).device  # with its index, as tensors on it will say
        path = resolve_source(path_or_hub_id)
        with told(Sentence("Loading {name}", name=path.name), device, advice=LOADING_ADVICE):
            plan = plan_model(path, None if quantization == AUTO else quantization, device)
            plan = plan if ranks is None else shared(plan, ranks.share)
            found = [(find_lora(resolve_lora(file)).fitted(plan.config), STRENGTH.check(own)) for file, own in loras]
            vae_path = vae_beside(path, plan.config.vae_name_or_path) if vae is None else resolve_source(vae)
            autoencoder = load_vae(vae_path, device, dtype)
            latents = LatentSpace.from_configs(plan.config, autoencoder.config)
            budget = Budget.of(device, limit, dtype, autoencoder)
            plan = budget.with_recipe(plan) if quantization == AUTO else plan
            home = budget.home(plan.tensor_bytes(plan.recipe.name if plan.recipe else None, dtype), plan.config)
            if ranks is not None and home != device:
                raise too_large()
            load = partial(plan.load_model, device, dtype, check, home)
            engine = NextStepEngine.assemble(plan, latents, load, cuda_graphs)
            if ranks is not None:
                ranks.exchange(engine.model)
                engine = replace(engine, ranks=ranks)
            for lora, strength in found:
                engine = engine.with_lora(lora, strength, check)
        return cls(engine, autoencoder, device, dtype, limit)

    def load_lora(self, path: str | Path, strength: float = 1.0, check: Check = go_on) -> None:
        """Draw with a LoRA from here on, on top of those that are there: a `.safetensors` file, the folder that
        peft saved one to, or "night", which comes with this for "tiny". Strengths of one file add up.

        The model's weights stay as they are, in whatever format; at strength 0, and after `unload_loras`, the pictures
        are the plain model's. NextStepError, before its matrices are read, for a file that is no LoRA or one for
        another model.
        """
        lora = find_lora(resolve_lora(path)).fitted(self.engine.config)
        self.engine = self.engine.with_lora(lora, strength, check)

    def unload_loras(self) -> None:
        """Draw with the plain model again."""
        self.engine = self.engine.without_loras()

    @torch.inference_mode()
    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str = "",
        positive_prompt: str = "",
        images: ImageInput | Sequence[ImageInput] | None = None,
        height: int = 512,
        width: int = 512,
        num_images_per_prompt: int = 1,
        cfg: float | None = None,
        cfg_img: float | None = None,
        cfg_schedule: str | None = None,
        steps: int | None = None,
        shift: float | None = None,
        sampler: str | None = None,
        use_norm: bool | None = None,
        lookahead: str | None = None,
        steps_schedule: str | None = None,
        seed: Seeds = 0,
        vae_tile: int | None = None,
        prune: Pruning | None = None,
        callback: Callable[[Progress], None] | None = None,
        check: Check = go_on,
    ) -> GenerationOutput:
        """Draw pictures of `height` x `width` pixels (multiples of 16), `num_images_per_prompt` for each prompt.

        None means the checkpoint's recommended setting. `images` fill the prompts' `<image>` slots in order. With a
        sequence of seeds, one for each picture, every picture comes out as if it were drawn alone with its own.
        `vae_tile` makes the VAE work in tiles of so many pixels; None lets it do so only where memory runs out. With
        `prune` pictures are begun, some are dropped, and those that go on come out, in the order that it chose, as they
        would have without it. Their first tokens are handed to the transformer at once.
        `lookahead` draws several tokens per read of the weights: "exact" within 0.1% of the tokens of "off", "fast"
        with pictures that may differ; how many at a time is found by timing it on the device. `steps_schedule`
        saves flow steps: "checked" where a token is settled early, "linear" and "square" in later tokens.
        `callback` gets a Progress after every token and stops the run by raising; so may `check`, which is called
        before every layer of the networks. Raises NextStepError for impossible requests before any long work.
        """
        texts = {"negative_prompt": negative_prompt, "positive_prompt": positive_prompt}
        prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [cast(str, prompt)]
        if not prompts:
            raise NextStepError("Nothing to draw: give at least one prompt.")
        for text in prompts:
            check_text(Sentence("A prompt"), text)
        for name, text in texts.items():
            check_text(name, text)
        count = IMAGES_PER_PROMPT.check(num_images_per_prompt)
        check_seeds(seed, PICTURES.check(len(prompts) * count))
        pictures = _as_list(images)
        settings = self.engine.recommended(editing=bool(pictures)).override(
            cfg=cfg,
            cfg_img=cfg_img,
            cfg_schedule=cfg_schedule,
            steps=steps,
            shift=shift,
            sampler=sampler,
            use_norm=use_norm,
            lookahead=lookahead,
            steps_schedule=steps_schedule,
        )
        if vae_tile is not None:
            check_tile(vae_tile, self.vae.config.downscale)
        grid = self.engine.grid(height, width)
        with self._kept_to_memory():
            job = self.engine.make_job(
                self._captions(prompts, pictures, vae_tile, check),
                grid,
                settings,
                seed=seed,
                negative_prompt=negative_prompt,
                positive_prompt=positive_prompt,
                images_per_caption=count,
                check=check,
            )
            what = Sentence(
                "{count} pictures of {width}x{height} pixels", count=job.pictures, width=width, height=height
            )
            check_room(job.pictures * height * width * PIXEL_BYTES, what)
            if prune is not None:
                draw = partial(self._draw, callback=callback, check=check)
                job = prune.rest(job, draw, lambda begun, part: self._finish(begun, part, vae_tile, check).images)
            return self._finish(self._draw(job, callback, check), grid, vae_tile, check)

    @torch.inference_mode()
    def calibrate(
        self,
        prompts: Sequence[str],
        *,
        height: int = 256,
        width: int = 256,
        seed: int = 0,
        callback: Callable[[Progress], None] | None = None,
        check: Check = go_on,
    ) -> Drawn:
        """Draw prompts with the recommended settings, each with a seed of its own from `seed` on, for what there is to
        learn of the inputs of every layer: `nextstep_core.loading.compensated` stores weights for them.

        `callback` and `check` as in `generate`. Raises NextStepError for impossible requests before any long work.
        """
        texts = list(prompts) if isinstance(prompts, (list, tuple)) else [cast(str, prompts)]
        count = PROMPTS.check(len(texts))
        for text in texts:
            check_text(Sentence("A prompt"), text)
        first = SEED.check(seed)
        seeds = [(first + n) % (SEED.maximum + 1) for n in range(count)]
        with self._kept_to_memory():
            captions = self._captions(texts, [], None, check)
            job = self.engine.make_job(
                captions, self.engine.grid(height, width), self.engine.recommended(), seed=seeds, check=check
            )
            tokens = self._draw(job, callback, check)
        return Drawn(job.rows.ids, job.rows.valid, tokens.float().cpu(), job.grid)

    @torch.inference_mode()
    def look(self, progress: Progress, height: int, width: int, check: Check = go_on) -> Tensor:
        """The pictures (B, H, W, 3) of a run of this size as far as they are drawn: gray below. For a `callback`."""
        grid = self.engine.grid(height, width)
        rows = max(1, progress.step.done // grid[1])
        upper = self._finish(progress.tokens[:, : rows * grid[1]], (rows, grid[1]), None, check).images
        whole = torch.full((len(upper), height, width, 3), BACKGROUND)
        whole[:, : upper.shape[1]] = upper
        return whole

    def release(self) -> None:
        """Free what is kept of the device's memory for the next run; it is taken again when it is needed. With
        `max_memory` this happens after each run by itself."""
        self.engine.release()
        if self.device.type == "cpu" and self.engine.caches.prefilled is not None:
            self.engine.caches.prefilled.clear()
        give_back(self.device)

    @contextmanager
    def _kept_to_memory(self) -> Iterator[None]:
        """Inside, the device is held to `max_memory`; afterwards, also after a failure, nothing is kept beside the
        weights."""
        held = held_bytes(self.engine.model, self.device) + held_bytes(self.vae, self.device)
        try:
            with capped(self.device, self.max_memory, held):
                yield
        finally:
            if self.max_memory is not None:
                self.release()

    def _place(self, job: Job, height: int, width: int) -> int | None:
        """Bring as many weights to the device as a job leaves room for; how many pictures to draw at once, where that
        can be told. NextStepError when not even one fits."""
        each, model = self.engine.working_bytes(job.part([0]), self.dtype), self.engine.model
        loras = self.engine.lora_bytes(self.dtype)
        room = self._budget.room(held_bytes(model, self.device))
        if room is not None and model_bytes(model) + loras + job.pictures * each > room:
            self.release()  # what was captured lies where weights could
        plan = self._budget.plan(model, job.pictures, each, height, width, loras)
        if plan is None:
            return None
        if self.engine.ranks is not None and plan.resident < model_bytes(model):
            raise too_large()
        place(model, self.device, plan.resident)
        return plan.at_once

    def _run_vae(self, tile: int | None, height: int, width: int, pictures: int = 1) -> Runner:
        held = held_bytes(self.engine.model, self.device)
        if self.device.type == "cpu":
            held = model_bytes(self.engine.model)
        at_once = self._budget.pixels_at_once(held, height, width, pictures)
        return partial(run_in_tiles, tile=tile, at_once=at_once)

    def encode_image(self, image: ImageInput, vae_tile: int | None = None, check: Check = go_on) -> EncodedImage:
        """One input picture, whose sides must be multiples of 16, as the transformer sees it; see `generate`."""
        grid = self.engine.grid(*picture_size(image))
        pixels = to_pixels(image)
        with checked(leaves(self.vae), check):
            run = self._run_vae(vae_tile, *picture_size(image))
            mean, logvar = self.vae.encode_moments(pixels.to(self.device, self.dtype), run)
        if not (mean.isfinite().all() and logvar.isfinite().all()):
            raise not_finite(Sentence("An input image that the VAE encoded"))
        std = self.vae.posterior_std(logvar)
        latents = self.engine.latents
        scaled = None if std is None else latents.cut(std * latents.scale)[0]
        return EncodedImage(latents.to_tokens(mean)[0], grid, scaled)

    def _draw(self, job: Job, callback: Callable[[Progress], None] | None, check: Check) -> Tensor:
        """Tokens (pictures, total, token_dim) of a job, on the device."""
        width, height = self.engine.latents.size(job.grid)
        at_once, make_room = self._place(job, height, width), partial(send_away, self.engine.model, self.device)
        with closing(self.engine.decode(job, self.device, self.dtype, at_once, check, make_room)) as run:
            for progress in run:
                if callback is not None and progress.step.sampled:  # what is known was told of when it was drawn
                    callback(progress)
        return progress.tokens

    def _captions(
        self, prompts: list[str], pictures: list[ImageInput], vae_tile: int | None, check: Check
    ) -> list[Caption]:
        slots = [prompt.count(IMAGE_SLOT) for prompt in prompts]
        if sum(slots) != len(pictures):
            raise NextStepError(
                "The prompts have {slots} {slot} slot(s) for {pictures} input image(s). Write {slot} once for "
                "each image, where it belongs in the text.",
                slots=sum(slots),
                slot=IMAGE_SLOT,
                pictures=len(pictures),
            )
        for prompt, count in zip(prompts, slots):
            if count:  # before its pictures are encoded; the others are read at once afterwards
                self.engine.check_prompt(prompt)
        encoded = iter([self.encode_image(picture, vae_tile, check) for picture in pictures])
        return [Caption(prompt, tuple(islice(encoded, count))) for prompt, count in zip(prompts, slots)]

    def _finish(self, tokens: Tensor, grid: Grid, vae_tile: int | None, check: Check) -> GenerationOutput:
        latents = self.engine.latents.to_latents(tokens.float(), grid)
        with checked(leaves(self.vae), check):
            width, height = self.engine.latents.size(grid)
            run = self._run_vae(vae_tile, height, width, len(tokens))
            pixels = self.vae.decode(latents.to(self.dtype), run).float().cpu()
        if not pixels.isfinite().all():
            raise not_finite(Sentence("The picture that the VAE decoded"))
        images = (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return GenerationOutput(images, latents.cpu(), tokens.float().cpu())


def check_alike(limit: int | None, quantization: str | None, loras: Sequence[object]) -> None:
    """NextStepError for options that processes which share a model cannot have, or of which each would make its own."""
    if limit is not None:
        raise not_shared("--max-memory")
    if quantization == AUTO:
        raise not_shared("--quantization auto")
    if loras:
        raise not_shared("--lora")


def too_large() -> NextStepError:
    """The error for a share that does not fit on its device; several processes stream nothing."""
    return NextStepError(
        "The share of the weights does not fit on each GPU. Start more processes, or use --quantization int8 or int4."
    )


def _as_list(images: ImageInput | Sequence[ImageInput] | None) -> list[ImageInput]:
    if images is None:
        return []
    if isinstance(images, (list, tuple)):
        return list(images)
    return [cast(ImageInput, images)]

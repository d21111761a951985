"""The sampler node: settings and sockets to a job for the engine, with progress, preview and interrupt."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decoding.job import Job, KnownTokens
from ..nextstep_core.decoding.progress import Progress
from ..nextstep_core.errors import NextStepError, check_choice, not_finite
from ..nextstep_core.images.latents import Grid
from ..nextstep_core.images.preview import fit_latent_to_rgb, latents_to_rgb, side_by_side
from ..nextstep_core.request.masks import kept_tokens
from ..nextstep_core.runtime.memory import format_bytes
from ..nextstep_core.runtime.streaming import streamed_bytes
from ..nextstep_core.sampling.settings import GenerationSettings
from ..nextstep_core.sentences import Sentence, named
from . import host, unfinished
from .information import unsuited
from .language import in_users_language
from .saving import INFO_OUTPUT, info_of
from .types import CATEGORY, HostModel, ModelSocket, PromptSocket, PromptValue, check_sockets
from .widgets import (
    DrawingNode,
    cfg_img_input,
    known_to,
    lookahead_input,
    setting_inputs,
    steps_schedule_input,
    with_widgets,
)

log = logging.getLogger(__name__)

DISCARD, KEEP_PARTIAL = "discard", "keep"
PREVIEW_SECONDS = 0.2
PREVIEW_SIDE = 1024  # pixels, the most for the pictures of a batch side by side
# In a LATENT: it is an interrupted run's and its mask covers what is still to be drawn; this is the mask it had before.
PARTIAL = "nextstep_partial"


def settings_for(model: HostModel, editing: bool, *, cfg_img: float = 1.0, **widgets: Any) -> GenerationSettings:
    """The node's widgets over the checkpoint's recommendation; NextStepError for a value that is none."""
    widgets = known_to(GenerationSettings, widgets)
    for name, value in {"cfg_img": cfg_img, **widgets}.items():
        if value is None:
            raise NextStepError("{name} is None: the node that is linked to it gives no value.", name=named(name))
    return with_widgets(model.engine.recommended(editing), cfg_img=cfg_img, **widgets)


def grid_of(model: HostModel, latent: dict[str, Any]) -> Grid:
    """(rows, columns) of tokens for a LATENT; NextStepError when its shape is not one that this model draws."""
    width, height = model.engine.latents.size(model.engine.latents.grid_of(latent["samples"]))
    return model.engine.grid(height, width)


def known_tokens(model: HostModel, latent: dict[str, Any], grid: Grid) -> KnownTokens | None:
    """What a LATENT's noise mask keeps; None without a mask. NextStepError for a mask that does not fit."""
    mask = latent.get("noise_mask")
    if mask is None:
        return None
    mask = shared_mask(mask)
    if not latent["samples"].isfinite().all():
        raise NextStepError("The latent holds NaN or infinite values. Encode the picture again.")
    space = model.engine.latents
    tokens, keep = space.to_tokens(latent["samples"].float()), kept_tokens(mask, grid, space)
    return KnownTokens(tokens, keep, token_by_token=PARTIAL in latent)


def shared_mask(mask: Tensor) -> Tensor:
    """The mask (h, w) of all pictures of a batch; NextStepError where they have different ones."""
    masks = mask.reshape(-1, *mask.shape[-2:])
    if len(masks) > 1 and not (masks == masks[:1]).all():
        raise NextStepError("The pictures of the batch have different masks. Use one mask for the whole batch.")
    return masks[0]


def images_per_caption(positive: PromptValue, batch: int) -> int:
    """How many pictures of a batch each caption gets; NextStepError when the batch is not a multiple."""
    captions = len(positive.captions)
    if batch % captions:
        raise NextStepError(
            "The latent has a batch of {batch} for {captions} prompts. Set batch_size to {captions} or a "
            "multiple of it, or use the latent output of the edit node.",
            batch=batch,
            captions=captions,
        )
    return batch // captions


def make_job(
    model: HostModel,
    positive: PromptValue,
    negative: PromptValue | None,
    latent: dict[str, Any],
    seed: int,
    settings: GenerationSettings,
) -> Job:
    """Check everything that can be wrong before any long work, and lay the job out."""
    if negative is not None and (negative.editing or len(negative.captions) > 1):
        raise NextStepError("The negative prompt must be a single text. Use NextStep Encode Prompt for it.")
    grid = grid_of(model, latent)
    return model.engine.make_job(
        positive.captions,
        grid,
        settings,
        seed=seed,
        negative_prompt=negative.captions[0].text if negative is not None else "",
        images_per_caption=images_per_caption(positive, latent["samples"].shape[0]),
        known=known_tokens(model, latent, grid),
        check=host.check_interrupt,
    )


Shown = tuple["Tensor | None", tuple[int, int]]  # a preview, and its size as width and height


def steps_of(model: HostModel, job: Job) -> Iterator[tuple[Progress, Shown]]:
    """Draw a job on the host's device, as much at once as its memory allows: after every token, where it stands."""
    each = model.engine.working_bytes(job.part([0]), model.dtype)
    streamed = streamed_bytes(model.engine.model)
    loras = model.engine.lora_bytes(model.dtype)
    plan = host.plan_memory(model.patcher, job.pictures, each, streamed, model.engine.release, loras)
    shape = (job.pictures, *model.engine.latents.shape(job.grid))
    decoding = host.vae_bytes(model.vae, shape)
    log.info("NextStep: %s; the VAE about %s afterwards; %d at a time", plan, format_bytes(decoding), plan.at_once)
    preview = Preview(model, job)  # fits its colors with the VAE, which may take the device's memory until here
    device = host.bring_to_device(model.patcher, plan)
    make_room = partial(host.send_away, model.patcher)
    drawing = model.engine.decode(job, device, model.dtype, plan.at_once, host.check_interrupt, make_room)
    with closing(drawing) as run:
        for progress in run:
            yield progress, preview.update(progress)


def sample(
    model: HostModel,
    positive: PromptValue,
    negative: PromptValue | None,
    latent: dict[str, Any],
    seed: int,
    settings: GenerationSettings,
    on_interrupt: str = DISCARD,
    remark: str = "",
) -> dict[str, Any]:
    """Draw a LATENT's pictures; the result holds what the VAE decoder takes.

    A noise mask keeps what it does not cover. Interrupt stops within one token; with KEEP_PARTIAL the result is then
    what is done so far, with a mask over the rest, and sampling that with the same seed and settings finishes the
    picture. `remark` stays on the node, under what the run came to.
    """
    check_choice("on_interrupt", on_interrupt, (DISCARD, KEEP_PARTIAL))
    job = make_job(model, positive, negative, latent, seed, settings)
    reporter = host.ProgressReporter(job.total)
    progress, began = None, time.monotonic()
    try:
        with closing(steps_of(model, job)) as run:
            for progress, shown in run:
                reporter.update(progress.done, *shown, rate_text(progress))
    except host.Interrupted:
        if progress is not None:
            stopped = Sentence("stopped at {done:,} of {total:,} tokens", done=progress.done, total=progress.total)
            host.show_text(in_users_language(stopped))
        if on_interrupt == DISCARD or progress is None:
            raise
        mask = undrawn_mask(job, progress).reshape(1, 1, *job.grid)
        if not mask.any():
            raise
        if not progress.tokens.isfinite().all():
            raise not_finite(Sentence("What was drawn until the interrupt")) from None
        before = latent.get(PARTIAL, latent.get("noise_mask"))
        return {**latent, "samples": to_latents(model, job, progress.tokens), "noise_mask": mask, PARTIAL: before}
    seconds = time.monotonic() - began
    if progress.step.sampled:
        model.seconds_per_token = 1 / progress.tokens_per_second
    warning = unsuited(model, positive.editing)
    if warning:
        log.warning("NextStep: %s", warning)
    said = [in_users_language(line) for line in (finished_text(job, seconds), warning) if line is not None]
    host.show_text("\n".join(filter(None, (said[0], remark, *said[1:]))))
    finished = {**latent, "samples": to_latents(model, job, progress.tokens)}
    if PARTIAL in finished:
        finished["noise_mask"] = finished.pop(PARTIAL)
    return {name: value for name, value in finished.items() if name != "noise_mask" or value is not None}


def undrawn_mask(job: Job, progress: Progress) -> Tensor:
    """(rows * columns,) float, 1 where a token of some picture is still to be drawn."""
    done = progress.step.done if progress.stop - progress.start == job.pictures else 0
    rest = torch.arange(progress.total) >= done
    return (rest & ~job.known.keep if job.known is not None else rest).float()


def rate_text(progress: Progress) -> str:
    """Rate and remaining time for the node."""
    minutes, seconds = divmod(round(progress.seconds_left), 60)
    at_once = progress.step.tokens_per_read
    ahead = f", {at_once:.1f} at a time" if at_once > 1 else ""
    return f"{progress.tokens_per_second:.1f} tokens/s{ahead}, {minutes}:{seconds:02d} left"


def finished_text(job: Job, seconds: float) -> Sentence:
    """What stays on the node after a run."""
    if job.pictures == 1:
        return Sentence("{tokens:,} tokens in {seconds:.1f} s", tokens=job.total, seconds=seconds)
    return Sentence(
        "{count} pictures of {tokens:,} tokens in {seconds:.1f} s",
        count=job.pictures,
        tokens=job.total,
        seconds=seconds,
    )


def to_latents(model: HostModel, job: Job, tokens: Tensor) -> Tensor:
    """Tokens (B, N, token_dim) to what the VAE decoder takes, (B, 16, h, w) float32."""
    return model.engine.latents.to_latents(tokens.float(), job.grid).to(host.intermediate_device())


class Preview:
    """The finished rows of every picture in flat colors, at most every PREVIEW_SECONDS."""

    def __init__(self, model: HostModel, job: Job) -> None:
        self.model, self.job, self.shown_at, self.shown = model, job, 0.0, (0, 0)
        plain = model.plain or model
        if plain.rgb_map is None and model.vae is not None:
            plain.rgb_map = fit_latent_to_rgb(model.vae.encode)
        model.rgb_map = plain.rgb_map

    def update(self, progress: Progress) -> Shown:
        """(the pictures side by side, or None where nothing new is due; size in pixels as width and height)."""
        _, columns = self.job.grid
        finished = progress.start, progress.step.done // columns
        now = time.monotonic()
        last = progress.step.done == progress.total
        due = finished[1] and finished != self.shown and (last or now - self.shown_at >= PREVIEW_SECONDS)
        if self.model.rgb_map is None or not due:
            return None, (0, 0)
        self.shown_at, self.shown = now, finished
        rows = finished[1] * self.model.engine.config.latent_patch_size
        latents = to_latents(self.model, self.job, progress.tokens)
        counts = [latents.shape[-2]] * progress.start + [rows] * (progress.stop - progress.start)
        shown = side_by_side(latents_to_rgb(latents, self.model.rgb_map, counts + [0] * (len(latents) - len(counts))))
        width, height = (side * self.model.engine.latents.downscale for side in (shown.shape[1], shown.shape[0]))
        reduction = min(1.0, PREVIEW_SIDE / max(width, height)) if len(latents) > 1 else 1.0
        return shown, (round(width * reduction), round(height * reduction))


class NextStepSampler(DrawingNode):
    """Draws the picture, token by token."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepSampler",
            display_name="NextStep Sampler",
            category=CATEGORY,
            description="Draws a picture token by token, from the top left to the bottom right.",
            search_aliases=["nextstep", "stepfun", "sampler", "generate", "autoregressive"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model."),
                PromptSocket.Input("positive", tooltip="What to draw, or a picture and what to change in it."),
                io.Latent.Input(
                    "latent",
                    tooltip="Size and batch, from NextStep Empty Latent. An encoded picture with a mask (Set Latent "
                    "Noise Mask) is kept outside the mask. A latent kept from an interrupted run is completed.",
                ),
                PromptSocket.Input(
                    "negative",
                    optional=True,
                    tooltip="What to avoid; has an effect with cfg above 1. Optional.",
                ),
                *setting_inputs(steps=28, shift=1.0),
                cfg_img_input(),
                io.Combo.Input(
                    "on_interrupt",
                    options=[DISCARD, KEEP_PARTIAL],
                    default=DISCARD,
                    optional=True,
                    tooltip="What Interrupt returns: nothing, or the finished part. Run again with the same seed and "
                    "settings to complete the same picture, or sample the kept latent.",
                ),
                lookahead_input(),
                steps_schedule_input(),
            ],
            outputs=[
                io.Latent.Output("samples", display_name="latent", tooltip="Goes to a VAE Decode node."),
                INFO_OUTPUT,
            ],
            hidden=[io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> int:
        return unfinished.times_interrupted(_widgets(inputs))

    @classmethod
    def execute(
        cls,
        model: HostModel,
        positive: PromptValue,
        latent: dict[str, Any],
        seed: int,
        negative: PromptValue | None = None,
        on_interrupt: str = DISCARD,
        **settings: Any,
    ) -> io.NodeOutput:
        check_sockets(model=model, positive=positive, latent=latent)
        if negative is not None:
            check_sockets(negative=negative)
        chosen = settings_for(model, positive.editing, **settings)
        asked = model, (positive, negative), latent, _widgets({"seed": seed, "on_interrupt": on_interrupt, **settings})
        left = unfinished.find(*asked)
        with torch.inference_mode(), host.memory_told(Sentence("Drawing")):
            samples = sample(model, positive, negative, left or latent, seed, chosen, on_interrupt)
        unfinished.forget(left)
        part = {}
        if PARTIAL in samples:
            unfinished.keep(samples, *asked)
            rest = samples["noise_mask"]
            part = {"unfinished": f"{int((rest == 0).sum())} of {rest.numel()} tokens"}
        host.note_in_picture(cls, model.facts | part)
        return io.NodeOutput(samples, info_of(model, positive, negative, chosen, seed, samples, **part))


def _widgets(inputs: dict[str, Any]) -> dict[str, Any]:
    """Of a node's inputs those that are no sockets, as a workflow holds them."""
    return {name: value for name, value in inputs.items() if value is None or isinstance(value, (str, int, float))}

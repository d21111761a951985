"""The sampler node: settings and sockets to a job for the engine, with progress, preview and interrupt."""

from __future__ import annotations

import time
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decode import Progress
from ..nextstep_core.engine import Job
from ..nextstep_core.errors import NextStepError
from ..nextstep_core.model.nextstep import unpatchify
from ..nextstep_core.preview import fit_latent_to_rgb, latents_to_rgb
from ..nextstep_core.prompt import Caption
from ..nextstep_core.sampling.guidance import SCHEDULES
from ..nextstep_core.sampling.solvers import SAMPLERS
from ..nextstep_core.settings import GenerationSettings
from . import host
from .types import CATEGORY, HostModel, ModelSocket, PromptSocket, PromptValue

AUTO = "auto"
USE_NORM = {AUTO: None, "on": True, "off": False}
PREVIEW_SECONDS = 0.2


def settings_for(
    model: HostModel,
    editing: bool,
    cfg: float,
    cfg_schedule: str,
    steps: int,
    shift: float,
    sampler: str,
    use_norm: str,
) -> GenerationSettings:
    """The node's widgets over the checkpoint's recommendation; "auto" leaves it."""
    return model.engine.recommended(editing).override(
        cfg=cfg,
        cfg_schedule=cfg_schedule,
        steps=steps,
        shift=shift,
        sampler=None if sampler == AUTO else sampler,
        use_norm=USE_NORM[use_norm],
    )


def grid_of(model: HostModel, latent: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of tokens for a LATENT; NextStepError when its shape is not one that this model draws."""
    samples, channels = latent["samples"], model.engine.config.latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise NextStepError(
            f"The latent has the shape {tuple(samples.shape)}; this model draws (batch, {channels}, height / 8, "
            "width / 8). Use NextStep Empty Latent."
        )
    height, width = samples.shape[-2:]
    return model.engine.grid(height * 8, width * 8)


def sample(
    model: HostModel,
    positive: PromptValue,
    negative: PromptValue | None,
    latent: dict[str, Any],
    seed: int,
    settings: GenerationSettings,
) -> dict[str, Any]:
    """Draw a LATENT's pictures; the result holds what the VAE decoder takes. Stops at Interrupt within one token."""
    job = model.engine.prepare(
        [Caption(positive.text, positive.images)],
        grid_of(model, latent),
        settings,
        seed=seed,
        negative_prompt=negative.text if negative is not None else "",
        images_per_caption=latent["samples"].shape[0],
    )
    preview = Preview(model, job)
    device = host.bring_to_device(model.patcher, model.engine.working_bytes(job, model.dtype))
    reporter = host.ProgressReporter(job.grid[0] * job.grid[1])
    for progress in model.engine.decode(job, device, model.dtype):
        reporter.update(progress.done, *preview.of(progress))
    samples = to_latents(model, job, progress.tokens).to(host.intermediate_device())
    return {**latent, "samples": samples}


def to_latents(model: HostModel, job: Job, tokens: Tensor) -> Tensor:
    """Tokens (B, N, token_dim) to what the VAE decoder takes, (B, 16, h, w) float32."""
    latents = unpatchify(tokens.float(), job.grid, model.engine.config.latent_patch_size)
    return latents / model.vae_config.scaling_factor + model.vae_config.shift_factor


class Preview:
    """The finished rows in flat colors, at most every PREVIEW_SECONDS."""

    def __init__(self, model: HostModel, job: Job) -> None:
        self.model, self.job, self.shown_at, self.shown_rows = model, job, 0.0, 0
        if model.rgb_map is None and model.vae is not None:
            model.rgb_map = fit_latent_to_rgb(model.vae.encode)

    def of(self, progress: Progress) -> tuple[Tensor | None, tuple[int, int]]:
        """(picture or None where none is due, size in pixels as width and height)."""
        rows, columns = self.job.grid
        finished = progress.done // columns
        unit = self.model.engine.pixels_per_token
        size = (columns * unit, rows * unit)
        now = time.monotonic()
        last = progress.done == progress.total
        due = finished > self.shown_rows and (last or now - self.shown_at >= PREVIEW_SECONDS)
        if self.model.rgb_map is None or not due:
            return None, size
        self.shown_at, self.shown_rows = now, finished
        latents = to_latents(self.model, self.job, progress.tokens[:1])
        return latents_to_rgb(latents, self.model.rgb_map, finished * self.model.engine.config.latent_patch_size), size


class NextStepSampler(io.ComfyNode):
    """Draws the picture, token by token."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepSampler",
            display_name="NextStep Sampler",
            category=CATEGORY,
            description="Draws a picture token by token, from the top left to the bottom right.",
            search_aliases=["nextstep", "sampler", "generate", "autoregressive"],
            inputs=[
                ModelSocket.Input("model", tooltip="From Load NextStep Model."),
                PromptSocket.Input("positive", tooltip="What to draw, from NextStep Encode Prompt."),
                io.Latent.Input("latent", tooltip="Size and batch, from NextStep Empty Latent."),
                PromptSocket.Input(
                    "negative",
                    optional=True,
                    tooltip="What to stay away from; works with cfg above 1. May be left open.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="One seed gives one picture on every device.",
                ),
                io.Int.Input(
                    "steps",
                    default=28,
                    min=1,
                    max=1000,
                    tooltip="Flow steps per token. Published: 28 for NextStep-1.1 and the Pretrain checkpoints, 50 for "
                    "NextStep-1-Large and -Edit.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance: how closely the prompt is followed. 1 turns it off and halves the work; 7.5 is "
                    "the published setting.",
                ),
                io.Combo.Input(
                    "cfg_schedule",
                    options=list(SCHEDULES),
                    default="constant",
                    tooltip="Guidance from the top of the picture to its bottom: the same everywhere, falling to 1 "
                    "(linear), or rising from half (linear-rise).",
                ),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Timestep shift: above 1 spends more steps on coarse structure. Published: 1.0; 3.2 for "
                    "editing.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[AUTO, *SAMPLERS],
                    default=AUTO,
                    tooltip="How a token is drawn from noise. auto takes what the checkpoint was published with.",
                ),
                io.Combo.Input(
                    "use_norm",
                    options=list(USE_NORM),
                    default=AUTO,
                    tooltip="Normalize every token once drawn. auto takes what the checkpoint was published with.",
                ),
            ],
            outputs=[io.Latent.Output("samples", display_name="latent", tooltip="Goes to a VAE Decode node.")],
        )

    @classmethod
    def validate_inputs(
        cls, steps: int = 2, cfg: float = 1.0, shift: float = 1.0, cfg_schedule: str = "constant", sampler: str = AUTO
    ) -> bool | str:
        try:
            GenerationSettings().override(
                steps=steps,
                cfg=cfg,
                shift=shift,
                cfg_schedule=cfg_schedule,
                sampler=None if sampler == AUTO else sampler,
            )
        except NextStepError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls,
        model: HostModel,
        positive: PromptValue,
        latent: dict[str, Any],
        seed: int,
        steps: int,
        cfg: float,
        cfg_schedule: str,
        shift: float,
        sampler: str,
        use_norm: str,
        negative: PromptValue | None = None,
    ) -> io.NodeOutput:
        settings = settings_for(model, bool(positive.images), cfg, cfg_schedule, steps, shift, sampler, use_norm)
        with torch.inference_mode():
            return io.NodeOutput(sample(model, positive, negative, latent, seed, settings))

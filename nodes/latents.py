"""Where latents begin and end: the empty canvas and the way to pixels."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..nextstep_core.decoding.job import BATCH_SIZE
from ..nextstep_core.errors import NextStepError, not_finite, shown
from ..nextstep_core.images.latents import PUBLISHED_LATENTS, LatentSpace
from ..nextstep_core.request.sizes import BASES, RATIO_NAMES, grid_of_ratio, ratio_size
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node
from .types import CATEGORY, check_sockets
from .widgets import base_of, canvas_inputs, check_sides


def empty_latent(width: int, height: int, batch: int) -> dict[str, Any]:
    """A LATENT of zeros for so many pictures; NextStepError for numbers that no widget would give."""
    shape = BATCH_SIZE.check(batch), *PUBLISHED_LATENTS.shape(PUBLISHED_LATENTS.grid(height, width))
    samples = torch.zeros(shape, device=host.intermediate_device())
    return {"samples": samples, "downscale_ratio_spacial": PUBLISHED_LATENTS.downscale}


def check_channels(vae: Any, space: LatentSpace) -> None:
    """NextStepError for a VAE whose latents have another number of channels than the model's, where it tells."""
    channels = getattr(vae, "latent_channels", space.channels)
    if channels != space.channels:
        raise NextStepError(
            "This VAE makes latents of {channels} channels; the model needs {wanted} channels. Connect the "
            "vae output of Load NextStep Model.",
            channels=shown(channels),
            wanted=space.channels,
        )


def encode_pictures(vae: Any, pictures: torch.Tensor, space: LatentSpace | None = None) -> torch.Tensor:
    """Latents of pictures (B, H, W, 3) in [0, 1]; NextStepError when they hold NaN, or are not of the model's `space`
    where that is given."""
    if space is not None:
        check_channels(vae, space)
    latents = host.encode(vae, pictures)
    wanted = None if space is None else (len(pictures), *space.shape(space.grid(*pictures.shape[1:3])))
    if not isinstance(latents, torch.Tensor) or (wanted is not None and latents.shape != wanted):
        given = tuple(latents.shape) if isinstance(latents, torch.Tensor) else shown(latents)
        raise NextStepError(
            "The VAE gives latents of the shape {given}, not {wanted}. Connect the vae output of Load NextStep Model.",
            given=given,
            wanted=wanted or Sentence("pictures"),
        )
    if not latents.isfinite().all():
        raise not_finite(Sentence("An input image that the VAE encoded"))
    return latents


def decode_latent(vae: Any, samples: dict[str, Any]) -> torch.Tensor:
    """Pictures (B, H, W, 3) in [0, 1] of a LATENT; NextStepError when VAE and latent do not belong together."""
    latents = samples["samples"]
    channels = getattr(vae, "latent_channels", PUBLISHED_LATENTS.channels)
    if latents.ndim != 4 or latents.shape[1] != channels:
        raise NextStepError(
            "This latent has the shape {shape}, but the VAE decodes {channels} channels. Connect the vae "
            "output of Load NextStep Model, and a latent that NextStep Sampler made.",
            shape=tuple(latents.shape),
            channels=channels,
        )
    if not latents.isfinite().all():
        raise not_finite(Sentence("This latent"))
    pictures = host.decode(vae, latents)
    if not isinstance(pictures, torch.Tensor) or pictures.ndim != 4 or len(pictures) != len(latents):
        given = tuple(pictures.shape) if isinstance(pictures, torch.Tensor) else shown(pictures)
        raise NextStepError(
            "The VAE gives {given} and no pictures. Connect the vae output of Load NextStep Model, or the "
            "VAE of a model for pictures.",
            given=given,
        )
    if not pictures.isfinite().all():
        raise not_finite(Sentence("The picture that the VAE decoded"))
    return pictures


class NextStepEmptyLatent(Node):
    """An empty canvas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepEmptyLatent",
            display_name="NextStep Empty Latent",
            category=CATEGORY,
            description="Size of the picture and how many to draw. 512x512, or about that area, is recommended.",
            search_aliases=["nextstep", "empty latent", "size"],
            inputs=canvas_inputs(),
            outputs=[io.Latent.Output("latent", display_name="latent", tooltip="Goes to NextStep Sampler.")],
        )

    @classmethod
    def validate_inputs(cls, width: int | None = None, height: int | None = None) -> bool | str:
        check_sides(width, height)
        return True

    @classmethod
    def execute(cls, width: int, height: int, batch_size: int) -> io.NodeOutput:
        return io.NodeOutput(empty_latent(width, height, batch_size))


class NextStepAspectRatio(Node):
    """A size by the name of its ratio."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepAspectRatio",
            display_name="NextStep Aspect Ratio",
            category=CATEGORY,
            description="Width and height for one of the 17 ratios that NextStep-1 was trained at.",
            search_aliases=["nextstep", "aspect ratio", "resolution", "size", "16:9"],
            inputs=[
                io.Combo.Input(
                    "ratio",
                    options=list(RATIO_NAMES),
                    default="16:16 square",
                    tooltip="Width to height: a trained ratio in tokens, or one as people say it, for which the "
                    "nearest trained one is taken. The node shows the size that comes out.",
                ),
                io.Combo.Input(
                    "base",
                    options=[str(base) for base in BASES],
                    default="512",
                    tooltip="Side of the square with the same area, in pixels: 512 is recommended, 1024 not trained.",
                ),
            ],
            outputs=[
                io.Int.Output("width", display_name="width", tooltip="In pixels, a multiple of 16."),
                io.Int.Output("height", display_name="height", tooltip="In pixels, a multiple of 16."),
            ],
        )

    @classmethod
    def execute(cls, ratio: str, base: str) -> io.NodeOutput:
        width, height = ratio_size(ratio, base_of(base))
        columns, rows = grid_of_ratio(ratio)
        host.show_text(f"{width}x{height} ({columns}:{rows})")
        return io.NodeOutput(width, height)


class NextStepVAEDecode(Node):
    """Latent to picture."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepVAEDecode",
            display_name="NextStep VAE Decode",
            category=CATEGORY,
            description="Turns the sampler's latent into a picture. ComfyUI's own VAE Decode does the same.",
            search_aliases=["nextstep", "vae decode"],
            inputs=[
                io.Latent.Input("samples", tooltip="From NextStep Sampler."),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The picture.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any) -> io.NodeOutput:
        check_sockets(samples=samples, vae=vae)
        return io.NodeOutput(decode_latent(vae, samples))

"""How a picture was drawn, for an animation or a video by ComfyUI's own nodes."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.images.frames import FRAMES, HOLD, LONGEST_SIDE, drawing_frames
from ..nextstep_core.images.latents import PUBLISHED_LATENTS
from ..nextstep_core.request.masks import blank_tokens, kept_tokens
from . import host
from .language import Node
from .latents import decode_latent
from .sampler import PARTIAL, shared_mask
from .types import CATEGORY, check_sockets
from .widgets import ends


def drawn_tokens(latent: dict[str, Any]) -> Tensor:
    """(rows, columns) bool, True where the run that made a LATENT drew: what its mask covered when it began."""
    grid = PUBLISHED_LATENTS.grid_of(latent["samples"])
    mask = latent.get(PARTIAL, latent.get("noise_mask"))
    if mask is None:
        return torch.ones(grid, dtype=torch.bool)
    check_sockets(mask=mask)
    return ~kept_tokens(shared_mask(mask).cpu(), grid).reshape(grid)


class NextStepDrawingFrames(Node):
    """A drawn picture to the frames of its making."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepDrawingFrames",
            display_name="NextStep Drawing Frames",
            category=CATEGORY,
            description="How the picture filled, token by token, as a batch of frames: for Save Animated WEBP, or "
            "Create Video and Save Video. Takes no part in the drawing, which is neither slower nor repeated.",
            search_aliases=["nextstep", "frames", "animation", "video", "gif", "timelapse", "progress"],
            inputs=[
                io.Latent.Input(
                    "samples",
                    tooltip="From NextStep Sampler. A batch is shown side by side, an interrupted run as far as it "
                    "came, and a masked one with what was kept from the start.",
                ),
                io.Vae.Input("vae", tooltip="The VAE of the checkpoint."),
                io.Int.Input(
                    FRAMES.name,
                    default=24,
                    **ends(FRAMES),
                    tooltip="From the first tokens to the whole picture.",
                ),
                io.Int.Input(
                    HOLD.name,
                    default=8,
                    **ends(HOLD),
                    tooltip="Further frames in which the whole picture stays.",
                ),
                io.Int.Input(
                    LONGEST_SIDE.name,
                    default=512,
                    **ends(LONGEST_SIDE),
                    tooltip="In pixels. Larger pictures are reduced to it.",
                ),
            ],
            outputs=[io.Image.Output("image", display_name="image", tooltip="The frames, as a batch.")],
        )

    @classmethod
    def execute(cls, samples: dict[str, Any], vae: Any, frames: int, hold: int, longest_side: int) -> io.NodeOutput:
        check_sockets(samples=samples, vae=vae)
        frames, hold, longest_side = FRAMES.check(frames), HOLD.check(hold), LONGEST_SIDE.check(longest_side)
        drawn, blank = drawn_tokens(samples), blank_tokens(samples["samples"]).cpu()
        advice = "Choose fewer or smaller frames, or close other programs."
        pictures = decode_latent(vae, samples).cpu()
        with torch.inference_mode(), host.memory_told("The frames", advice=advice):
            shots = drawing_frames(pictures, drawn, blank, frames, hold, longest_side, host.check_interrupt)
        return io.NodeOutput(shots)

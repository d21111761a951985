"""Pictures of any size on their way to the model, and back into the picture that they came from."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.errors import NextStepError, check_choice
from ..nextstep_core.images.latents import PUBLISHED_LATENTS
from ..nextstep_core.images.placement import CROP, PAD, RESIZE, Box, Placement, Size, around, size_of
from ..nextstep_core.images.rgb import to_rgb
from ..nextstep_core.ranges import Range
from ..nextstep_core.request.sizes import BASES, RATIO_NAMES, check_encodable, nearest_ratio, ratio_size
from ..nextstep_core.sentences import Sentence
from . import host
from .language import Node, in_users_language
from .latents import encode_pictures
from .types import CATEGORY, Original, OriginalSocket, check_sockets
from .widgets import FIT, KEEP_SIZE, NEAREST, base_of, ends, side_inputs

WHOLE, AROUND_MASK = "whole picture", "around the mask"
NEEDS_VAE = Sentence("Connect a VAE to NextStep Prepare Picture: its latent output needs one.")
MARGIN = Range("margin", 0.0, 10.0)  # shares of the masked area's longer side
FEATHER = Range("feather", 0, 256)  # pixels of the picture that is drawn


def mask_of(mask: Tensor | None, pictures: Tensor) -> Tensor | None:
    """A MASK of the pictures' count and size; None for none, and for one in which nothing is painted.

    NextStepError for the mask of another picture.
    """
    if mask is not None and not mask.isfinite().all():
        raise NextStepError("The mask holds NaN or infinite values. Paint it anew.")
    if mask is None or not (mask > 0.5).any():  # Load Image makes an empty mask of any size
        return None
    mask = mask.reshape(-1, *mask.shape[-2:]).float().clamp(0, 1)
    count, height, width, _ = pictures.shape
    if len(mask) not in (1, count):
        raise NextStepError(
            "There are {masks} masks for {count} pictures. Connect one mask for all, or one for each.",
            masks=len(mask),
            count=count,
        )
    if mask.shape[-1] * height != mask.shape[-2] * width:
        raise NextStepError(
            "The mask is {mask_width}x{mask_height}, but the picture is {width}x{height}. Use the mask that "
            "was painted on this picture.",
            mask_width=mask.shape[-1],
            mask_height=mask.shape[-2],
            width=width,
            height=height,
        )
    return F.adaptive_max_pool2d(mask, (height, width))


def canvas_size(shape: Size, size: str, base: str, width: int, height: int) -> Size:
    """(width, height) to draw for what has the shape (width, height), by the node's choice."""
    if size == FIT:
        PUBLISHED_LATENTS.grid(height, width)
        return width, height
    ratio = nearest_ratio(*shape) if size == NEAREST else size
    return ratio_size(ratio, base_of(base))


def place(pictures: Tensor, mask: Tensor | None, mode: str, area: str, margin: float, **size: object) -> Placement:
    """Which part of the pictures is drawn, and at which size; `size` is for `canvas_size`."""
    original = pictures.shape[2], pictures.shape[1]
    box: Box = (0, 0, *original)
    margin = MARGIN.check(margin)
    masked = around(mask, 0) if mask is not None and area == AROUND_MASK else None
    if mask is not None and masked is not None:
        spare = round(margin * max(size_of(masked)))
        box = around(mask, spare) or box
        if mode != KEEP_SIZE:
            width, height = canvas_size(size_of(box), **size)
            box = around(mask, spare, width / height) or box
    if mode == KEEP_SIZE:
        return Placement.keep(original, box, PUBLISHED_LATENTS.size_inside(*size_of(box)))
    return Placement.fit(original, box, canvas_size(size_of(box), **size), mode)


def report(placement: Placement) -> str:
    """What happens to a picture, in a line."""
    width, height = placement.canvas
    tokens = width * height // PUBLISHED_LATENTS.unit**2
    steps = [f"{placement.original[0]}x{placement.original[1]}"]
    if size_of(placement.box) != placement.original:
        steps.append("cut to {}x{} at ({}, {})".format(*size_of(placement.box), *placement.box[:2]))
    if size_of(placement.area) != size_of(placement.box):
        steps.append("resized to {}x{}".format(*size_of(placement.area)))
    if size_of(placement.area) != placement.canvas:
        steps.append(f"padded to {width}x{height}")
    return f"{', '.join(steps)}: {tokens:,} tokens"


class NextStepPreparePicture(Node):
    """Any picture to one that can be drawn."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPreparePicture",
            display_name="NextStep Prepare Picture",
            category=CATEGORY,
            description="Brings a photograph of any size, and its mask, to a size that the model draws well. NextStep "
            "Paste Back puts the result back into the photograph.",
            search_aliases=["nextstep", "resize", "crop", "pad", "photo", "inpaint crop"],
            inputs=[
                io.Image.Input("image", tooltip="A picture of any size, or several of one size."),
                io.Combo.Input(
                    "mode",
                    options=[CROP, PAD, RESIZE, KEEP_SIZE],
                    default=CROP,
                    tooltip="Where the proportions differ. crop: cut evenly on both sides. pad: add gray borders, "
                    "masked to be drawn. resize: stretch. keep: leave the picture as it is, cut to multiples of 16.",
                ),
                io.Combo.Input(
                    "size",
                    options=[NEAREST, FIT, *RATIO_NAMES],
                    default=NEAREST,
                    tooltip="nearest aspect ratio: the closest of the 17 trained ratios. width and height: exactly "
                    "those. Or a ratio by name. Ignored with keep.",
                ),
                io.Combo.Input(
                    "base",
                    options=[str(base) for base in BASES],
                    default="512",
                    tooltip="For a ratio: side of the square with the same area, in pixels. 512 is recommended.",
                ),
                *side_inputs(),
                io.Mask.Input("mask", optional=True, tooltip="What to redraw. It is resized along with the picture."),
                io.Combo.Input(
                    "area",
                    options=[WHOLE, AROUND_MASK],
                    default=WHOLE,
                    optional=True,
                    tooltip="What the model sees: the whole picture, or what is masked and its surroundings, which "
                    "keeps details in a large photograph.",
                ),
                io.Float.Input(
                    "margin",
                    default=0.5,
                    **ends(MARGIN),
                    step=0.1,
                    optional=True,
                    tooltip="Around the mask: how much is seen on each side, as a share of the masked area's longer "
                    "side.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The checkpoint's VAE; only the latent output needs it."),
            ],
            outputs=[
                io.Image.Output("picture", display_name="image", tooltip="Goes to an encode node."),
                io.Mask.Output("fitted_mask", display_name="mask", tooltip="The mask on that picture."),
                OriginalSocket.Output("original", display_name="original", tooltip="Goes to NextStep Paste Back."),
                io.Int.Output("new_width", display_name="width", tooltip="Of the prepared picture, in pixels."),
                io.Int.Output("new_height", display_name="height", tooltip="Of the prepared picture, in pixels."),
                io.String.Output("report", display_name="report", tooltip="What was done, in one line."),
                io.Latent.Output(
                    "latent",
                    display_name="latent",
                    tooltip="Picture and mask for NextStep Sampler: what is masked is drawn, the rest kept.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        image: Tensor,
        mode: str,
        size: str,
        base: str,
        width: int,
        height: int,
        mask: Tensor | None = None,
        area: str = WHOLE,
        margin: float = 0.5,
        vae: Any = None,
    ) -> io.NodeOutput:
        check_choice("mode", mode, (CROP, PAD, RESIZE, KEEP_SIZE))
        check_choice("size", size, (NEAREST, FIT, *RATIO_NAMES))
        check_choice("area", area, (WHOLE, AROUND_MASK))
        check_sockets(mask=mask)
        if vae is not None:
            check_sockets(vae=vae)
        margin = MARGIN.check(margin)
        pictures = to_rgb(image)
        mask = mask_of(mask, pictures)
        with host.memory_told(Sentence("Preparing a picture"), advice=host.DRAWING_ADVICE):
            placement = place(pictures, mask, mode, area, margin, size=size, base=base, width=width, height=height)
            return cls._prepared(pictures, mask, placement, vae)

    @staticmethod
    def _prepared(pictures: Tensor, mask: Tensor | None, placement: Placement, vae: Any) -> io.NodeOutput:
        check_encodable(*placement.canvas)
        host.show_text(said := report(placement))
        drawn = pictures.new_zeros(1, *pictures.shape[1:3]) if mask is None else mask
        fitted = placement.take_mask(drawn)
        original = Original(pictures, placement, fitted if mask is not None else None)
        taken = placement.take(pictures)
        latent = host.NoOutput(in_users_language(NEEDS_VAE))
        if vae is not None:
            latent = {"samples": encode_pictures(vae, taken), "noise_mask": fitted}
        return io.NodeOutput(taken, fitted, original, *placement.canvas, said, latent)


class NextStepPasteBack(Node):
    """What was drawn, into the picture that it came from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return host.schema(
            node_id="NextStepPasteBack",
            display_name="NextStep Paste Back",
            category=CATEGORY,
            description="Puts a result back into the photograph that NextStep Prepare Picture took it from, at its "
            "original size.",
            search_aliases=["nextstep", "paste", "composite", "stitch", "uncrop"],
            inputs=[
                io.Image.Input("image", tooltip="The drawn picture. You may enlarge it first."),
                OriginalSocket.Input("original", tooltip="From NextStep Prepare Picture."),
                io.Int.Input(
                    "feather",
                    default=16,
                    **ends(FEATHER),
                    tooltip="Width of the blend into the original, in pixels of the drawn picture, around the mask and "
                    "at sides that were cut. 0 is a hard edge.",
                ),
            ],
            outputs=[io.Image.Output("pasted", display_name="image", tooltip="The picture at its original size.")],
        )

    @classmethod
    def execute(cls, image: Tensor, original: Original, feather: int) -> io.NodeOutput:
        check_sockets(original=original)
        feather = FEATHER.check(feather)
        with host.memory_told(Sentence("Pasting a picture back"), advice=host.DRAWING_ADVICE):
            return io.NodeOutput(cls._pasted(to_rgb(image), original, feather))

    @staticmethod
    def _pasted(drawn: Tensor, original: Original, feather: int) -> Tensor:
        pictures, mask = original.pictures, original.mask
        if len(drawn) % len(pictures):
            raise NextStepError(
                "{drawn} pictures do not match {pictures} originals. Connect all pictures that were drawn from them.",
                drawn=len(drawn),
                pictures=len(pictures),
            )
        each = len(drawn) // len(pictures)
        if mask is not None and len(mask) > 1:
            mask = mask.repeat_interleave(each, dim=0)
        pictures = pictures.repeat_interleave(each, dim=0)
        return original.placement.put_back(pictures, drawn, mask, feather)

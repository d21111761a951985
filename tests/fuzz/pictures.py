"""Good checkpoint, hostile pictures: input images, masks and latents of any shape, dtype and value."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.job import KnownTokens
from nextstep_core.images.frames import FRAMES, HOLD, LONGEST_SIDE, drawing_frames
from nextstep_core.images.latents import LatentSpace
from nextstep_core.images.rgb import to_rgb
from nextstep_core.request.layout import Caption
from nextstep_core.request.masks import blank_tokens, kept_tokens
from nextstep_core.runtime.interrupt import go_on

from .case import Case

SHAPE = (1, 32, 48, 3)
SETTINGS = {"steps": 2, "cfg": 2.0, "sampler": "flow-ode"}
SIDES = (0, 1, 2, 8, 15, 16, 17, 32, 48, 64, 100)
VALUES = (float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 1e-45, -1.0, 0.0, 1.0, 2.0, 255.0)
DTYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
)  # fmt: skip
MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr", "I", "F", "HSV", "LAB", "I;16")
LARGEST = 1 << 20  # numbers; what is hostile is the kind of a tensor, not what the case itself takes
ODD = (None, 0, 3.5, "picture.png", b"", {}, [], [None], object(), np.array(None), np.array("x"), np.float32(1.0))


@lru_cache
def pipeline() -> NextStepPipeline:
    return NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)


def warm_up() -> None:
    pipeline().generate("<image>A", images=torch.rand(32, 48, 3), height=32, width=48, **SETTINGS)


def case(rng: Random) -> Case:
    return rng.choice((_images, _images, _masks, _latents, _frames))(rng)


def _tensor(rng: Random, sides: int, last: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> tuple[str, Tensor]:
    """(what it is, a tensor) of `sides` sides and one more axis, of any dtype, layout and values."""
    axes = [rng.choice(SIDES) for _ in range(rng.choice((sides, sides, sides, 0, 1, 4)))]
    if rng.random() < 0.5:
        axes = [32, 48][:sides]
    shape = (*axes, rng.choice(last)) if last else tuple(axes)
    if prod(shape) > LARGEST:
        shape = shape[-sides - bool(last) :]
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values, dtype = torch.rand(shape, generator=generator), rng.choice((torch.float32, rng.choice(DTYPES)))
    what = f"{tuple(shape)} {str(dtype).removeprefix('torch.')}"
    if values.numel() and rng.random() < 0.3:
        value = rng.choice(VALUES)
        values.view(-1)[rng.randrange(values.numel()) : rng.choice((None, values.numel()))] = value
        what += f" with {value}"
    values = (values * 255).to(dtype) if dtype == torch.uint8 else values.to(dtype)
    way = rng.random()
    if way < 0.05 and values.ndim:
        return f"{what} on meta", values.to("meta")
    if way < 0.1 and values.ndim == 2 and dtype == torch.float32:
        return f"{what} sparse", values.to_sparse()
    if way < 0.2 and values.numel() and values.ndim:
        return f"{what} strided by 0", values[:1].expand(len(values), *values.shape[1:])
    if way < 0.3 and values.ndim > 1:
        return f"{what} turned", values.transpose(0, 1)
    return what, values


def _picture(rng: Random) -> tuple[str, object]:
    way = rng.random()
    if way < 0.1:
        odd = rng.choice(ODD)
        return f"{type(odd).__name__}", odd
    if way < 0.3:
        mode, size = rng.choice(MODES), (rng.choice(SIDES), rng.choice(SIDES))
        return f"PIL {mode} {size}", Image.new(mode, size)
    what, tensor = _tensor(rng, 2)
    plain = tensor.device.type == "cpu" and tensor.layout is torch.strided
    if way < 0.5 and plain and tensor.dtype not in (torch.bfloat16, torch.float8_e4m3fn):
        return f"array {what}", tensor.numpy()
    return what, tensor


def _images(rng: Random) -> Case:
    count = rng.choice((1, 1, 1, 0, 2))
    pictures = [_picture(rng) for _ in range(count)]
    images = [picture for _, picture in pictures]
    prompt = "<image>" * rng.choice((count, count, count, 1)) + "Make it snow."
    extra = {"cfg_img": 2.0} if rng.random() < 0.3 else {}

    def attempt(_: Path) -> Tensor:
        given = images if len(images) != 1 else images[0]
        return pipeline().generate(prompt, images=given, height=32, width=48, **SETTINGS, **extra).images

    return Case(f"images {[what for what, _ in pictures]}", attempt, SHAPE)


def _known(tokens: Tensor, keep: Tensor) -> Tensor:
    """Draw what a mask leaves, as the sampler node does."""
    pipe = pipeline()
    settings = pipe.engine.recommended().override(**SETTINGS)
    job = pipe.engine.make_job([Caption("A")], (2, 3), settings, seed=0, known=KnownTokens(tokens, keep))
    with torch.inference_mode():
        *_, progress = pipe.engine.decode(job, torch.device("cpu"), torch.float32)
        return pipe._finish(progress.tokens, (2, 3), None, go_on).images


def _masks(rng: Random) -> Case:
    what, mask = _tensor(rng, 2, last=())

    def attempt(_: Path) -> Tensor:
        return _known(torch.zeros(1, 6, 64), kept_tokens(mask, (2, 3)))

    return Case(f"mask {what}", attempt, SHAPE)


def _latents(rng: Random) -> Case:
    what, latents = _tensor(rng, 3, last=(6,))
    if rng.random() < 0.5:
        latents = torch.rand(1, 16, 4, 6) * rng.choice((1, 1e4, 1e30))
        what = f"latents up to {latents.max():g}"

    def attempt(_: Path) -> Tensor:
        space: LatentSpace = pipeline().engine.latents
        grid = space.grid_of(latents)
        pipeline().engine.grid(*reversed(space.size(grid)))
        tokens = space.to_tokens(latents.float())
        keep = torch.arange(grid[0] * grid[1]) < 3
        return _known(tokens, keep) if grid == (2, 3) and len(tokens) == 1 else torch.rand(SHAPE)

    return Case(f"latents {what}", attempt, SHAPE)


def _frames(rng: Random) -> Case:
    """Frames of any picture, any part of it drawn, with numbers in and around their ranges."""
    what, pictures = _tensor(rng, 3, last=(3,)) if rng.random() < 0.5 else ("a picture", torch.rand(SHAPE))
    latents, mask = torch.rand(1, 16, 4, 6), torch.rand(32, 48)
    latents[..., rng.choice((2, 4)) :, :] = 0  # of all, the last frame would be gray
    mask[: rng.choice((0, 16, 31))] = 0
    limits = FRAMES, HOLD, LONGEST_SIDE
    numbers = [rng.choice((limit.minimum, rng.randint(limit.minimum - 1, 70), limit.maximum)) for limit in limits]

    def attempt(_: Path) -> Tensor:
        asked = [limit.check(number) for limit, number in zip(limits, numbers, strict=True)]
        drawn, shown = ~kept_tokens(mask, (2, 3)).reshape(2, 3), to_rgb(pictures)
        frames = drawing_frames(shown, drawn, blank_tokens(latents), *asked)
        assert len(frames) == asked[0] + asked[1] and max(frames.shape[1:3]) <= asked[2]
        return frames[-1:] if shown.shape == SHAPE else torch.rand(SHAPE)

    return Case(f"frames {numbers} of {what}", attempt, SHAPE)

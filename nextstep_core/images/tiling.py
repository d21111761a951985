"""Large pictures in little memory: one convolutional network over overlapping tiles, blended where they overlap.

Sides and positions are in pixels here, and a network is told apart by how many pixels one position of its input and of
its output stand for: 8 and 1 for a decoder, 1 and 8 for an encoder.

A tile does not know what lies beyond it, so group norm and attention see less than in the whole picture: the result is
close to the whole picture's, not equal.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NextStepError, is_out_of_memory
from ..model.config import VAEConfig
from ..ranges import Range
from ..runtime.shortage import reason_of, told
from ..sentences import Sentence

Network = Callable[[Tensor], Tensor]

log = logging.getLogger(__name__)

SIDES = (512, 256, 128)  # of tiles, in the order in which they are tried; NextStep-1 was trained at the first
TILE = Range(Sentence("The side of the VAE's tile"), SIDES[-1], 4096)  # in pixels
LAYERS_AT_ONCE = 9  # of the largest: what went in, normalized, through a convolution and added, with its own workspace
OVERLAP = 4  # neighbours share at least one part in so many of a side


def check_tile(tile: int, unit: int) -> None:
    """NextStepError for a side that cannot be: tiles are whole latent positions of `unit` pixels, and not too small."""
    if TILE.check(tile) % unit:
        raise NextStepError("{name} is {tile} pixels; use a multiple of {unit}.", name=TILE.name, tile=tile, unit=unit)


def pixel_bytes(config: VAEConfig, dtype: torch.dtype) -> int:
    """Bytes that a VAE's decoder takes for each pixel that it is given at once; its encoder takes less.

    The most stands in memory in the first layer of full size, whose input is as wide as the level below.
    """
    widest = config.ch * max(config.ch_mult[:2])
    return LAYERS_AT_ONCE * widest * dtype.itemsize


def run_in_tiles(
    network: Network, x: Tensor, pixels_in: int, pixels_out: int, tile: int | None = None, at_once: int | None = None
) -> Tensor:
    """network(x): whole, and in tiles only where memory runs out; `tile` is their side in pixels for those who know
    beforehand that it will. At most `at_once` pixels are given at once, if that many make the smallest tile.
    NextStepError for a side that cannot be, or where not even the smallest tile fits. Fits `model.vae.Runner`."""
    if tile is not None:
        check_tile(tile, max(pixels_in, pixels_out))
    with told(Sentence("The VAE, even in tiles of {tile} pixels,", tile=tile or SIDES[-1]), x.device):
        if tile is None:
            return within_memory(network, x, pixels_in, pixels_out, at_once)
        return in_tiles(network, x, pixels_in, pixels_out, tile)


def within_memory(network: Network, x: Tensor, pixels_in: int, pixels_out: int, at_once: int | None = None) -> Tensor:
    """network(x) for x (B, C, h, w), all at once if memory allows, and `at_once` pixels do.

    Where it runs out, the pictures go one by one, and if one is still too much, in tiles that get smaller. What the
    last attempt raises is raised.
    """
    height, width = (positions * pixels_in for positions in x.shape[-2:])
    whole = max(height, width)
    sides = [whole, *(side for side in SIDES if side < whole)]
    *attempts, last = dict.fromkeys([(whole, len(x)), *((side, 1) for side in sides)])
    for side, together in attempts:
        if at_once is not None and together * min(side, height) * min(side, width) > at_once:
            continue
        try:
            return in_tiles(network, x, pixels_in, pixels_out, side, together)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning("The VAE continues in smaller pieces: %s pixels did not fit (%s)", side, reason_of(error))
        # The next attempt begins without the error: its traceback holds on to what this one had allocated.
    return in_tiles(network, x, pixels_in, pixels_out, *last)


def in_tiles(network: Network, x: Tensor, pixels_in: int, pixels_out: int, side: int, together: int = 1) -> Tensor:
    """network(x) for x (B, C, h, w) from square tiles of `side` pixels, so many pictures `together`.

    Neighbouring tiles share a quarter of their side or more and fade into each other linearly. Pictures that fit into
    one tile are given to the network as they are. NextStepError when a picture's sides are not whole latent positions.
    """
    return torch.cat([_blend(network, pictures, pixels_in, pixels_out, side) for pictures in x.split(together)])


def _blend(network: Network, x: Tensor, pixels_in: int, pixels_out: int, side: int) -> Tensor:
    height, width = (positions * pixels_in for positions in x.shape[-2:])
    if max(height, width) <= side:
        return network(x)
    unit = max(pixels_in, pixels_out)
    if height % unit or width % unit:
        raise NextStepError(
            "A picture of {width}x{height} cannot be cut into tiles; use multiples of {unit} pixels.",
            width=width,
            height=height,
            unit=unit,
        )
    rows, columns = _spans(height, side, unit), _spans(width, side, unit)
    blended = torch.empty(0)  # made when the first piece tells how many channels there are
    for row, down in zip(rows, _feathers(rows, pixels_out)):
        for column, across in zip(columns, _feathers(columns, pixels_out)):
            piece = network(x[..., _cut(row, pixels_in), _cut(column, pixels_in)])
            if not blended.numel():
                shape = *piece.shape[:2], height // pixels_out, width // pixels_out
                blended = piece.new_zeros(shape, dtype=torch.float32)
            weights = torch.outer(down, across).to(piece.device)
            blended[..., _cut(row, pixels_out), _cut(column, pixels_out)] += piece * weights
    return blended.to(piece.dtype)


def _cut(span: range, pixels: int) -> slice:
    return slice(span.start // pixels, span.stop // pixels)


def _spans(length: int, side: int, unit: int) -> list[range]:
    """The pixels of each tile along a line of `length`: as few as will do, evenly spread, at multiples of `unit`."""
    if length <= side:
        return [range(length)]
    overlap = side // OVERLAP
    gaps = math.ceil((length - side) / (side - overlap))
    starts = [round(i * (length - side) / gaps / unit) * unit for i in range(gaps + 1)]
    return [range(start, start + side) for start in starts]


def _feathers(spans: list[range], pixels_out: int) -> list[Tensor]:
    """The weight of every output position of each tile, float32: all tiles' weights at a position add up to one."""
    weights = torch.zeros(len(spans), spans[-1].stop // pixels_out)
    for i, span in enumerate(spans):
        inside = torch.arange(len(span) // pixels_out) + 0.5
        feather = torch.ones_like(inside)
        if i > 0:
            feather = feather.minimum(inside * pixels_out / (spans[i - 1].stop - span.start))
        if i + 1 < len(spans):
            feather = feather.minimum(inside.flip(0) * pixels_out / (span.stop - spans[i + 1].start))
        weights[i, _cut(span, pixels_out)] = feather
    weights /= weights.sum(dim=0)
    return [weight[_cut(span, pixels_out)] for weight, span in zip(weights, spans)]

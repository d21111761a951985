"""Classifier-free guidance over stacked branches, and its schedules over the image's tokens.

Branches lie on the batch axis in the order [cond | uncond] or [cond | image-only | uncond].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def guide(velocity: Tensor, branches: int, cfg: float, cfg_img: float) -> Tensor:
    """Combine the velocities (branches * M, D) of all branches into (M, D), in float32 or float64.

    Two branches: v_u + cfg (v_c - v_u). Three: v_u + cfg_img (v_img - v_u) + cfg (v_c - v_img).
    """
    velocity = velocity.to(torch.promote_types(velocity.dtype, torch.float32))
    if branches == 1:
        return velocity
    if branches == 2:
        cond, uncond = velocity.chunk(2)
        return uncond + cfg * (cond - uncond)
    cond, image_only, uncond = velocity.chunk(3)
    return uncond + cfg_img * (image_only - uncond) + cfg * (cond - image_only)


def constant(cfg: float, done: int, total: int) -> float:
    """The same guidance for every token."""
    return cfg


def linear(cfg: float, done: int, total: int) -> float:
    """From cfg at the first token down towards 1 (the 1.0 code's "linear")."""
    return 1 + (cfg - 1) * (total - done) / total


def linear_rise(cfg: float, done: int, total: int) -> float:
    """From 1 up towards cfg, at least cfg / 2 (the 1.1 code's "linear")."""
    return max(cfg / 2, 1 + (cfg - 1) * done / total)


SCHEDULES: dict[str, Callable[[float, int, int], float]] = {
    "constant": constant,
    "linear": linear,
    "linear-rise": linear_rise,
}

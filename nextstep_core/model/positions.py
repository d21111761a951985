"""Where a token stands: rotary tables for the sequence, sine-cosine codes for the image grid.

Tables are computed when they are needed, on the device that needs them, so that no module carries a buffer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .config import NextStepConfig

DEFAULT_GRID_SIDE = 32


def rotary_table(config: NextStepConfig, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Cosines and sines of positions 0..length-1: (2, length, head_dim), rotate-half form.

    Feature i is paired with feature i + head_dim / 2 (the layout of the checkpoints, not that of neighbouring pairs):
    (a, b) turns into (a cos - b sin, b cos + a sin). The first half of the sines carries the minus, so that applying it
    needs no negation.
    """
    # In float32 at least, also for a bfloat16 model: bfloat16 cannot tell position 257 from 256.
    exact = torch.promote_types(dtype, torch.float32)
    exponents = torch.arange(0, config.head_dim, 2, dtype=exact, device=device) / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    positions = torch.arange(length, dtype=exact, device=device) / config.rope_factor
    angles = torch.outer(positions, frequencies)  # (length, head_dim / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.cat([cos, cos], dim=1), torch.cat([-sin, sin], dim=1)]).to(dtype)


def apply_rotary(x: Tensor, table: Tensor) -> Tensor:
    """Rotate x (B, H, T, D) by its positions' rows of a `rotary_table`, (2, T, D)."""
    # Rolling by half the features puts each one's partner in its place.
    return torch.addcmul(x * table[0], x.roll(x.shape[-1] // 2, dims=-1), table[1])


def grid_side(config: NextStepConfig) -> int:
    """Side of the square grid that the table of generation codes covers, in tokens."""
    return config.base_image_grid_size or DEFAULT_GRID_SIDE


def grid_codes(hidden_size: int, side: int) -> Tensor:
    """2D sine-cosine codes of a square grid in raster order, (side * side, hidden_size) float32.

    The first half of the features encodes the column, the second the row; each half is [sin, cos] of
    position * 10000^(-k / (hidden_size / 4)), computed in float64 as the published tables were.
    """
    quarter = hidden_size // 4
    omega = 1.0 / 10000 ** (np.arange(quarter, dtype=np.float64) / quarter)
    angles = np.outer(np.arange(side, dtype=np.float64), omega)
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(line, (side, 1)), np.repeat(line, side, axis=0)
    return torch.from_numpy(np.concatenate([columns, rows], axis=1).astype(np.float32))


def has_codes(config: NextStepConfig, grid: tuple[int, int]) -> bool:
    """Whether the table holds a code for every token of a (rows, columns) grid; see `generation_codes`."""
    side = grid_side(config)
    if config.base_image_grid_size is not None:
        return max(grid) <= side
    return grid[0] * grid[1] <= side * side


def generation_codes(config: NextStepConfig, grid: tuple[int, int], table: Tensor) -> Tensor:
    """What is added to the condition of each generated position of a (rows, columns) grid: (rows * columns, hidden).

    Checkpoints that state `base_image_grid_size` take the grid's corner of the table (the 1.1 rule); all others take
    its first rows as they come (the 1.0 rule). The grid must be one that `has_codes`.
    """
    rows, columns = grid
    if config.base_image_grid_size is not None:
        side = grid_side(config)
        return table.reshape(side, side, -1)[:rows, :columns].reshape(rows * columns, -1)
    return table[: rows * columns]

"""The KV cache: allocated once for the whole sequence, written in place, read in whole buckets.

Positions come as a tensor and the part that is read has one of few lengths, so a step has the same shapes and the same
memory for every token of a bucket: it can be captured once and replayed, and backends that build a program for every
shape build few.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import NextStepConfig

BUCKET = 256


def bucketed(length: int) -> int:
    """`length` positions rounded up to whole buckets."""
    return -(-length // BUCKET) * BUCKET


class KVCache:
    """Keys and values of every layer for `batch` rows of `length` positions, rounded up to whole buckets."""

    def __init__(
        self, config: NextStepConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, bucketed(length), config.head_dim)
        # Zeros, not empty: a masked value is multiplied by 0, which leaves nothing of it unless it is NaN.
        self.data = torch.zeros(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_needed(config: NextStepConfig, batch: int, length: int, dtype: torch.dtype) -> int:
        """Memory that a cache of this size takes, in bytes."""
        per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return per_position * batch * bucketed(length) * dtype.itemsize

    def write(self, layer: int, positions: Tensor, keys: Tensor, values: Tensor, visible: int) -> tuple[Tensor, Tensor]:
        """Store (B, Hkv, T, D) at `positions`, (T,) or each row's own (B, T); return the first `visible` keys and
        values as views."""
        slot = self.data[layer]  # (2, B, Hkv, length, D): keys, then values
        # Positions come as a tensor, not as a slice: a captured step writes to wherever the tensor says by then.
        # Not index_copy_, which Apple GPUs lack in PyTorch 2.7 and before.
        if positions.ndim == 1:
            slot[0][:, :, positions] = keys
            slot[1][:, :, positions] = values
        else:
            places = positions[:, None, :, None].expand(keys.shape)
            slot[0].scatter_(2, places, keys)
            slot[1].scatter_(2, places, values)
        # Views: attention reads them where they lie. Positions of the bucket that are not filled yet are masked.
        return slot[0, :, :, :visible], slot[1, :, :, :visible]

"""The KV cache: allocated once for the whole sequence, written in place, read up to what is filled."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import NextStepConfig


class KVCache:
    """Keys and values of every layer for `batch` rows of `length` positions."""

    def __init__(
        self, config: NextStepConfig, batch: int, length: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, length, config.head_dim)
        self.data = torch.empty(shape, device=device, dtype=dtype)

    @staticmethod
    def bytes_needed(config: NextStepConfig, batch: int, length: int, dtype: torch.dtype) -> int:
        """Memory that a cache of this size takes, in bytes."""
        per_position = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        return per_position * batch * length * dtype.itemsize

    def write(self, layer: int, start: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store (B, Hkv, T, D) at positions start..start+T-1; return all keys and values filled so far as views."""
        end = start + keys.shape[2]
        slot = self.data[layer]
        slot[0, :, :, start:end] = keys
        slot[1, :, :, start:end] = values
        return slot[0, :, :, :end], slot[1, :, :, :end]

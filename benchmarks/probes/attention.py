"""A step's attention with each of PyTorch's backends alone, at several lengths of what is seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.kv_cache import KVCache
from nextstep_core.model.transformer import grouped_attention

from ..clock import device_seconds

BACKENDS = {
    "as PyTorch chooses": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}


@torch.inference_mode()
def attention_times(
    config: NextStepConfig, lengths: Sequence[int], device: torch.device, dtype: torch.dtype, repeat: int, rows: int = 2
) -> list[dict[str, Any]]:
    """Microseconds a layer of one position's attention over `lengths` keys, for one picture with guidance."""
    return list(_times(config, lengths, device, dtype, repeat, rows))


def _times(config, lengths, device, dtype, repeat: int, rows: int) -> Iterator[dict[str, Any]]:
    for visible in lengths:
        cache = KVCache(config, rows, visible, device, dtype).data.normal_()
        q = torch.randn(rows, config.num_attention_heads, 1, config.head_dim, device=device, dtype=dtype)
        mask = torch.zeros(rows, 1, 1, visible, device=device, dtype=dtype)
        for name, backend in BACKENDS.items():
            row: dict[str, Any] = {"visible": visible, "backend": name, "microseconds": None}
            chosen: AbstractContextManager[Any] = nullcontext() if backend is None else sdpa_kernel(backend)
            try:
                with chosen:
                    calls = [partial(_attend, q, layer[..., :visible, :], mask) for layer in cache]
                    row["microseconds"] = 1e6 * device_seconds(calls, device, repeat) / len(calls)
            except RuntimeError as reason:
                row["reason"] = str(reason).splitlines()[0]
            yield row


def _attend(q: Tensor, keys_and_values: Tensor, mask: Tensor) -> Tensor:
    return grouped_attention(q, *keys_and_values, mask)

"""Every product with every shape of the model's matrices, for few and for many rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.transformer import fused_rows

from ..kernels import Matrices, kernel_times, show_kernels


def shapes_of(config: NextStepConfig) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of the matrices that a token reads, by name."""
    rows = {name: sum(parts.values()) for name, parts in fused_rows(config).items()}
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    return {
        "qkv": (rows["self_attn.qkv_proj"], hidden),
        "o": (hidden, heads),
        "gate and up": (rows["mlp.gate_up_proj"], hidden),
        "down": (hidden, config.intermediate_size),
        "head": (config.fm_head_dim, config.fm_head_dim),
    }


@torch.inference_mode()
def product_times(
    config: NextStepConfig, rows: Sequence[int], cache_bytes: int, device: torch.device, repeat: int
) -> list[dict[str, Any]]:
    """Milliseconds and stored bytes of each, over matrices that together take `cache_bytes` as int4 at least."""
    found = []
    for name, (outputs, inputs) in shapes_of(config).items():
        count = max(2, -(-cache_bytes // (outputs * inputs // 2)))
        for some in rows:
            shape = Matrices(outputs, inputs, count, some)
            times = kernel_times(device, repeat, shape)
            show_kernels(times, shape)
            found += [{"matrix": name, **asdict(shape), **asdict(time), "rate": time.rate} for time in times]
    return found

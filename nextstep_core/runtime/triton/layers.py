"""The transformer's layers for a few positions in seven launches each.

Norms, the gate and the sums with what was there are parts of the products; attention is split over the keys. The same
in plain math is `model/transformer.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...model.nextstep import NextStepModel
from ..layers import is_plain
from .attention import MOST_QUERIES, attention
from .reading import Linear, linear, vector
from .rows import product
from .support import MOST_ROWS, power_of_two


@dataclass(frozen=True)
class LayerWeights:
    """One layer: its norms' weights and its products."""

    before_attention: Tensor
    qkv: Linear
    output: Linear
    before_mlp: Tensor
    gate_up: Linear
    down: Linear


@dataclass(frozen=True)
class Layers:
    """All layers of a model and its last norm, for inputs of a dtype on a device."""

    weights: tuple[LayerWeights, ...]
    last_norm: torch.nn.Module
    heads: int
    kv_heads: int
    eps: float

    @classmethod
    def of(cls, model: NextStepModel, device: torch.device, dtype: torch.dtype) -> Layers | None:
        """None where one of the layers is something that the kernels cannot stand in for."""
        found = []
        layers: Iterable[Any] = model.layers
        for layer in layers:
            norms = layer.input_layernorm, layer.post_attention_layernorm
            projections = layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj
            vectors = [vector(norm.weight, device) if is_plain(norm) else None for norm in norms]
            parts = [linear(projection, device, dtype) for projection in projections]
            if any(part is None for part in (*vectors, *parts)):
                return None
            (first, second), (qkv, output, gate_up, down) = vectors, parts
            found.append(LayerWeights(first, qkv, output, second, gate_up, down))  # type: ignore[arg-type]
        config = model.config
        return cls(
            tuple(found), model.norm, config.num_attention_heads, config.num_key_value_heads, config.rms_norm_eps
        )

    def takes(self, rows: int, length: int) -> bool:
        """Whether the kernels hold so many rows of so many positions."""
        queries = self.heads // self.kv_heads * length
        return rows * length <= MOST_ROWS and power_of_two(queries) <= MOST_QUERIES

    def __call__(
        self, embeds: Tensor, positions: Tensor, table: Tensor, valid: Tensor, cache: Tensor, visible: int
    ) -> Tensor:
        """Hidden states (rows, T, hidden) of embeds (rows, T, hidden), as those of `Transformer.forward`.

        positions (T,) or (rows, T), table a `rotary_table`, valid (rows, >= visible) False at left padding, cache the
        tensor of a `KVCache`.
        """
        rows, length, hidden = embeds.shape
        x = embeds.reshape(rows * length, hidden)
        for number, layer in enumerate(self.weights):
            qkv = product(x, layer.qkv.matrix, layer.qkv.bias, norm=layer.before_attention, eps=self.eps)
            qkv = qkv.view(rows, length, -1)
            seen = attention(qkv, self.heads, table, positions, valid, cache[number], visible)
            x = product(seen, layer.output.matrix, layer.output.bias, plus=x)
            gate_up = layer.gate_up
            inner = product(x, gate_up.matrix, gate_up.bias, norm=layer.before_mlp, eps=self.eps, gated=True)
            x = product(inner, layer.down.matrix, layer.down.bias, plus=x)
        normed: Tensor = self.last_norm(x)
        return normed.view(rows, length, hidden)

"""The causal transformer (Qwen2 shape): embeddings in, hidden states out.

Pre-norm blocks, RMSNorm, grouped-query attention with rotary positions, SwiGLU. Any number of positions may go through
in one call; where they stand and what they may see are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import operations as ops
from .config import NextStepConfig
from .kv_cache import KVCache
from .positions import apply_rotary, rotary_table


@dataclass(frozen=True)
class Span:
    """Where the positions of one call stand and what they see.

    positions (T,) are their indices in the sequence, `rotary` (2, T, head_dim) their rows of a `rotary_table`, and mask
    (B, 1, T, visible) is 0 where a query may look among the first `visible` keys and -inf elsewhere. Where the rows of
    a batch stand at places of their own, positions are (B, T) and `rotary` is (2, B, 1, T, head_dim).
    """

    positions: Tensor
    rotary: Tensor
    mask: Tensor
    visible: int


def span_at(positions: Tensor, table: Tensor, key_valid: Tensor, visible: int) -> Span:
    """The span of positions, (T,) or (B, T), in a sequence whose left padding key_valid (B, >= visible) marks False.

    A padded query sees itself, so that its softmax is defined; nothing ever reads its result.
    """
    keys = torch.arange(visible, device=positions.device)  # (visible,)
    queries = positions[..., None]  # (T, 1) or (B, T, 1)
    seen = (keys <= queries) & key_valid[:, None, :visible] | (keys == queries)  # (B, T, visible)
    # Floats that are added to the scores, and never booleans. On Apple GPUs, PyTorch 2.8 to 2.12 sends few queries with
    # a boolean mask to a kernel that gets strides and the mask's row wrong from the second batch row on: the
    # unconditional branch would come out wrong, without an error. Elsewhere every layer would make these floats anew.
    mask = torch.zeros(seen.shape, dtype=table.dtype, device=seen.device).masked_fill_(seen.logical_not(), -torch.inf)
    rotary = table.index_select(1, positions) if positions.ndim == 1 else table[:, positions].unsqueeze(2)
    return Span(positions, rotary, mask[:, None], visible)


def whole_span(config: NextStepConfig, valid: Tensor, dtype: torch.dtype) -> Span:
    """The span of rows that go through in one call, without a cache; valid (B, T) is False at left padding."""
    positions = torch.arange(valid.shape[1], device=valid.device)
    return span_at(positions, rotary_table(config, len(positions), valid.device, dtype), valid, len(positions))


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, H, T, D) queries over (B, Hkv, S, D) keys and values without repeating the shared heads.

    Query heads of one group are laid side by side along the query axis, so the kernel sees Hkv heads. `mask`
    (B or 1, 1, T, S) is added to the scores.
    """
    batch, heads, length, dim = q.shape
    groups = heads // k.shape[1]
    # The heads of a group are neighbours, so this only merges axes: (B, Hkv, groups * T, D). Keys and values are then
    # read once for all heads of a group; with `enable_gqa` some backends would copy them for every head.
    q = q.reshape(batch, k.shape[1], groups * length, dim)
    if length > 1:  # the mask's row of a single query serves every head by broadcasting
        mask = mask.repeat(1, 1, groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch, heads, length, dim)


def fused_rows(config: NextStepConfig) -> dict[str, dict[str, int]]:
    """Which projections are one matrix here, and the rows of each part by the name that it has in checkpoints.

    A token is one row or a few, so a product takes as long as its weights take to read; fewer and larger products come
    closer to the memory's bandwidth and leave fewer launches. Parts lie in this order, which `forward` relies on.
    """
    heads, kv_heads = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    return {
        "self_attn.qkv_proj": {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
        "mlp.gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }


class Attention(nn.Module):
    """Grouped-query attention of one layer; the projections of queries, keys and values are one matrix."""

    def __init__(
        self,
        config: NextStepConfig,
        layer: int,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        hidden, dim = config.hidden_size, config.head_dim
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.layer, self.head_dim = layer, dim
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        rows = sum(fused_rows(config)["self_attn.qkv_proj"].values())
        self.qkv_proj = operations.Linear(hidden, rows, bias=config.attention_bias, **kwargs)
        self.o_proj = operations.Linear(self.heads * dim, hidden, bias=config.o_attention_bias, **kwargs)

    def forward(self, x: Tensor, span: Span, cache: KVCache | None) -> Tensor:
        """x (B, T, hidden) to the same shape; with a cache, over what it holds as well."""
        batch, length, _ = x.shape
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)  # (B, H + 2 Hkv, T, D)
        # Queries and keys are neighbours, so one rotation serves both.
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=1)
        q, k = apply_rotary(qk, span.rotary).split([self.heads, self.kv_heads], dim=1)
        if cache is not None:
            k, v = cache.write(self.layer, span.positions, k, v, span.visible)  # (B, Hkv, visible, D)
        out = grouped_attention(q, k, v, span.mask)  # (B, H, T, D)
        projected: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)); gate and up are one matrix."""

    def __init__(
        self,
        config: NextStepConfig,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.gate_up_proj = operations.Linear(hidden, 2 * inner, bias=config.mlp_bias, **kwargs)
        self.down_proj = operations.Linear(inner, hidden, bias=config.mlp_bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(F.silu(gate) * up)
        return out


class DecoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(
        self,
        config: NextStepConfig,
        layer: int,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.input_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.self_attn = Attention(config, layer, operations=operations, **kwargs)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.mlp = GatedMLP(config, operations=operations, **kwargs)

    def forward(self, x: Tensor, span: Span, cache: KVCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), span, cache)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Transformer(nn.Module):
    """The decoder stack. Its parameter names are the checkpoint's, but for the projections of `fused_rows`."""

    def __init__(
        self,
        config: NextStepConfig,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device, "operations": operations}
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, i, **kwargs) for i in range(config.num_hidden_layers))
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)

    def forward(self, embeds: Tensor, span: Span, cache: KVCache | None = None) -> Tensor:
        """Hidden states (B, T, hidden) after the final norm, of embeds (B, T, hidden) at the positions of `span`.

        With a cache, keys and values are stored at these positions and everything filled before is seen as well.
        """
        for layer in self.layers:
            embeds = layer(embeds, span, cache)
        hidden: Tensor = self.norm(embeds)
        return hidden

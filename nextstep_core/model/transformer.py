"""The causal transformer (Qwen2 shape): embeddings in, hidden states out.

Pre-norm blocks, RMSNorm, grouped-query attention with rotary positions, SwiGLU. Any number of positions may go through
in one call; where they stand and what they may see are arguments.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import NextStepConfig
from . import operations as ops
from .kv_cache import KVCache
from .positions import apply_rotary


def attention_mask(key_valid: Tensor, start: int, length: int) -> Tensor:
    """Which keys 0..start+length-1 the queries start..start+length-1 may see: (B, 1, length, start + length) bool.

    key_valid (B, >= start + length) is False at left padding. A padded query sees itself, so that its softmax is
    defined; nothing ever reads its result.
    """
    end = start + length
    keys = torch.arange(end, device=key_valid.device)
    queries = torch.arange(start, end, device=key_valid.device)[:, None]
    mask = (keys <= queries) & key_valid[:, None, :end] | (keys == queries)
    return mask[:, None]


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention of (B, H, T, D) queries over (B, Hkv, S, D) keys and values without repeating the shared heads.

    Query heads of one group are laid side by side along the query axis, so the kernel sees Hkv heads. `mask`
    (B or 1, 1, T, S) is True where a query may look; None lets every query see every key.
    """
    batch, heads, length, dim = q.shape
    groups = heads // k.shape[1]
    q = q.reshape(batch, k.shape[1], groups * length, dim)
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, groups, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(batch, heads, length, dim)


class Attention(nn.Module):
    """Grouped-query attention of one layer."""

    def __init__(self, config: NextStepConfig, layer: int, dtype=None, device=None, operations=ops.DEFAULT) -> None:
        super().__init__()
        hidden, dim, kwargs = config.hidden_size, config.head_dim, {"dtype": dtype, "device": device}
        self.layer, self.head_dim = layer, dim
        q_size, kv_size = config.num_attention_heads * dim, config.num_key_value_heads * dim
        self.q_proj = operations.Linear(hidden, q_size, bias=config.attention_bias, **kwargs)
        self.k_proj = operations.Linear(hidden, kv_size, bias=config.attention_bias, **kwargs)
        self.v_proj = operations.Linear(hidden, kv_size, bias=config.attention_bias, **kwargs)
        self.o_proj = operations.Linear(q_size, hidden, bias=config.o_attention_bias, **kwargs)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None, start: int) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary(q, rotary), apply_rotary(k, rotary)
        if cache is not None:
            k, v = cache.write(self.layer, start, k, v)
        out = grouped_attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class GatedMLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: NextStepConfig, dtype=None, device=None, operations=ops.DEFAULT) -> None:
        super().__init__()
        hidden, inner, kwargs = config.hidden_size, config.intermediate_size, {"dtype": dtype, "device": device}
        self.gate_proj = operations.Linear(hidden, inner, bias=config.mlp_bias, **kwargs)
        self.up_proj = operations.Linear(hidden, inner, bias=config.mlp_bias, **kwargs)
        self.down_proj = operations.Linear(inner, hidden, bias=config.mlp_bias, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """One pre-norm block."""

    def __init__(self, config: NextStepConfig, layer: int, dtype=None, device=None, operations=ops.DEFAULT) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device}
        self.input_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.self_attn = Attention(config, layer, operations=operations, **kwargs)
        self.post_attention_layernorm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, **kwargs)
        self.mlp = GatedMLP(config, operations=operations, **kwargs)

    def forward(self, x: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None, start: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, start)
        return x + self.mlp(self.post_attention_layernorm(x))


class Transformer(nn.Module):
    """The decoder stack. Its parameter names are the checkpoint's."""

    def __init__(self, config: NextStepConfig, dtype=None, device=None, operations=ops.DEFAULT) -> None:
        super().__init__()
        kwargs = {"dtype": dtype, "device": device, "operations": operations}
        self.config = config
        self.layers = nn.ModuleList(DecoderLayer(config, i, **kwargs) for i in range(config.num_hidden_layers))
        self.norm = operations.RMSNorm(config.hidden_size, eps=config.rms_norm_eps, dtype=dtype, device=device)

    def forward(
        self, embeds: Tensor, rotary: Tensor, mask: Tensor | None, cache: KVCache | None = None, start: int = 0
    ) -> Tensor:
        """Hidden states (B, T, hidden) after the final norm, of embeds (B, T, hidden) at positions start..start+T-1.

        rotary is these positions' slice (2, T, head_dim) of a `rotary_table`; mask as in `grouped_attention`. With a
        cache, keys and values are stored at these positions and everything filled before is seen as well.
        """
        for layer in self.layers:
            embeds = layer(embeds, rotary, mask, cache, start)
        return self.norm(embeds)

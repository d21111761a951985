"""The memory-bound floor: bytes that a token cannot be made without reading, over the memory's bandwidth.

Bytes are those of the model's own tensors, so a quantized model has a lower floor. Activations are not counted: they
may stay in caches and registers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..model.config import NextStepConfig

HEAD = "image_head.net."


@dataclass(frozen=True)
class TokenBytes:
    """Bytes read for one token of all pictures that are drawn together.

    transformer: layers, norm and in-projector. kv: keys and values of all rows at their mean length. head_once:
    out-projector and what the head computes once per token. head_call: what it reads for each of `calls` network calls.
    """

    transformer: int
    kv: int
    head_once: int
    head_call: int
    calls: int

    @property
    def step(self) -> int:
        """The transformer's step."""
        return self.transformer + self.kv

    @property
    def sampling(self) -> int:
        """Sampling from the head."""
        return self.head_once + self.calls * self.head_call

    @property
    def token(self) -> int:
        """All of it."""
        return self.step + self.sampling


def part_of(name: str) -> str | None:
    """The field of TokenBytes that the model's tensor `name` belongs to; None where a token does not read it."""
    if name.startswith(HEAD):
        if name.startswith(f"{HEAD}time_embed."):
            return None  # computed once for all tokens
        return "head_once" if "cond_embed." in name or "adaLN_modulation." in name else "head_call"
    if name.startswith("image_out_projector."):
        return "head_once"
    return None if name == "gen_pos_embed" else "transformer"


def token_bytes(
    config: NextStepConfig,
    sizes: Mapping[str, int],
    rows: int,
    prompt_length: int,
    tokens: int,
    calls: int,
    dtype: torch.dtype,
) -> TokenBytes:
    """Bytes per token of pictures of `tokens` tokens, with `rows` transformer rows and a KV cache of `dtype`, of a
    model whose tensors have these `sizes` by name."""
    sums = {"transformer": 0, "head_once": 0, "head_call": 0}
    for name, size in sizes.items():
        part = part_of(name)
        if part is not None:
            sums[part] += size
    # Token n is fed behind the prompt and n others, n = 0 .. tokens - 2, and sees itself too.
    mean_length = prompt_length + tokens / 2
    return TokenBytes(kv=int(rows * mean_length * kv_bytes(config, dtype)), calls=calls, **sums)


def kv_bytes(config: NextStepConfig, dtype: torch.dtype) -> int:
    """Keys and values of one position of one row, in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize

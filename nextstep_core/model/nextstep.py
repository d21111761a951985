"""Assembly of the image model: transformer, projectors between token and hidden space, flow head.

The text embedding is a module of its own, because it is read for prompt ids only and may stay in host memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from . import operations as ops
from .config import NextStepConfig
from .flow_head import FlowHead
from .positions import generation_codes, grid_side
from .transformer import Transformer


class NextStepModel(Transformer):
    """Everything that runs once per image token."""

    gen_pos_embed: Tensor  # (1, side * side, hidden), of checkpoints with `use_gen_pos_embed`

    def __init__(
        self,
        config: NextStepConfig,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__(config, dtype=dtype, device=device, operations=operations)
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.image_in_projector = operations.Linear(config.token_dim, config.hidden_size, **kwargs)
        self.image_out_projector = operations.Linear(config.hidden_size, config.hidden_size, **kwargs)
        head = FlowHead(
            config.token_dim,
            config.hidden_size,
            config.fm_head_dim,
            config.fm_head_layers,
            operations=operations,
            **kwargs,
        )
        self.image_head = nn.ModuleDict({"net": head})
        if config.use_gen_pos_embed:
            shape = (1, grid_side(config) ** 2, config.hidden_size)
            self.register_buffer("gen_pos_embed", torch.empty(shape, device=device))

    @property
    def head(self) -> FlowHead:
        """The flow-matching head."""
        head = self.image_head["net"]
        assert isinstance(head, FlowHead)
        return head

    def position_codes(self, grid: tuple[int, int], like: Tensor) -> Tensor | None:
        """What is added to the hidden states that a grid's tokens are sampled from, (rows * columns, hidden), where the
        model wants it."""
        if not self.config.use_gen_pos_embed:
            return None
        return generation_codes(self.config, grid, self.gen_pos_embed[0]).to(like)


class TextEmbedding(nn.Module):
    """Embeddings of prompt ids, on whatever device the weights were put (usually the host)."""

    def __init__(
        self,
        config: NextStepConfig,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        self.embed_tokens = operations.Embedding(config.vocab_size, config.hidden_size, dtype=dtype, device=device)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) to embeddings (B, L, hidden)."""
        embeds: Tensor = self.embed_tokens(ids.to(self.embed_tokens.weight.device))
        return embeds

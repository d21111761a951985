"""The flow-matching head: the velocity of one noisy image token, given the transformer's condition.

Split by what it depends on. Everything that the noisy token x does not enter (time codes, condition, and with them
every shift, scale and gate) is computed once per token for all integration steps together; only the blocks' MLPs run
per step. In the published size that is 97M weights read once per token and 57M read per step. It knows no sampler and
no guidance.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import operations as ops

NORM_EPS = 1e-6
TIME_FEATURES = 256


def time_features(times: Tensor) -> Tensor:
    """Sinusoids [cos, sin] of times (N,) in [0, 1], unscaled: (N, 256) float32.

    Unscaled as published: other diffusion models take these features of 1000 t.
    """
    half = TIME_FEATURES // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=times.device, dtype=torch.float32) / half)
    angles = times.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Linear, SiLU, Linear on the time sinusoids."""

    def __init__(
        self, dim: int, dtype: ops.DType = None, device: ops.Device = None, operations: ops.Operations = ops.DEFAULT
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.mlp = nn.Sequential(
            operations.Linear(TIME_FEATURES, dim, **kwargs), nn.SiLU(), operations.Linear(dim, dim, **kwargs)
        )

    def forward(self, times: Tensor, dtype: torch.dtype) -> Tensor:
        codes: Tensor = self.mlp(time_features(times).to(dtype))
        return codes


class ResidualBlock(nn.Module):
    """h + gate * MLP(LayerNorm(h) * (1 + scale) + shift)."""

    def __init__(
        self, dim: int, dtype: ops.DType = None, device: ops.Device = None, operations: ops.Operations = ops.DEFAULT
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.in_ln = operations.LayerNorm(dim, eps=NORM_EPS, **kwargs)
        self.mlp = nn.Sequential(
            operations.Linear(dim, dim, **kwargs), nn.SiLU(), operations.Linear(dim, dim, **kwargs)
        )
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 3 * dim, **kwargs))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """h (..., dim) with modulation (..., 3 * dim), which holds shift, 1 + scale and gate."""
        shift, factor, gate = modulation.chunk(3, dim=-1)
        return torch.addcmul(h, gate, self.mlp(torch.addcmul(shift, self.in_ln(h), factor)))


class FinalLayer(nn.Module):
    """Linear(LayerNorm(h) * (1 + scale) + shift)."""

    def __init__(
        self,
        dim: int,
        token_dim: int,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.linear = operations.Linear(dim, token_dim, **kwargs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), operations.Linear(dim, 2 * dim, **kwargs))

    def forward(self, h: Tensor, modulation: Tensor) -> Tensor:
        """Velocity (..., token_dim) of h (..., dim) with modulation (..., 2 * dim), which holds shift and 1 + scale."""
        shift, factor = modulation.chunk(2, dim=-1)
        velocity: Tensor = self.linear(torch.addcmul(shift, F.layer_norm(h, h.shape[-1:], eps=NORM_EPS), factor))
        return velocity


class FlowHead(nn.Module):
    """Velocity network with adaptive layer norm. Its parameter names are the checkpoint's."""

    def __init__(
        self,
        token_dim: int,
        condition_dim: int,
        dim: int,
        layers: int,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.time_embed = TimeEmbedding(dim, operations=operations, **kwargs)
        self.cond_embed = operations.Linear(condition_dim, dim, **kwargs)
        self.input_proj = operations.Linear(token_dim, dim, **kwargs)
        self.res_blocks = nn.ModuleList(ResidualBlock(dim, operations=operations, **kwargs) for _ in range(layers))
        self.final_layer = FinalLayer(dim, token_dim, operations=operations, **kwargs)

    def modulations(self, time_codes: Tensor, condition: Tensor) -> list[Tensor]:
        """All shifts, factors (1 + scale) and gates of one token, for every step and row at once.

        time_codes (..., dim) from `time_embed` and condition (..., hidden) broadcast against each other, e.g.
        (N, 1, dim) with (B, hidden) gives tensors (N, B, 3 * dim), one per block, and (N, B, 2 * dim) for the last
        layer. Index their first axis for one step.
        """
        code = F.silu(time_codes + self.cond_embed(condition))
        # [1] skips the SiLU of each adaLN_modulation, which is shared and already applied.
        modulations = [block.adaLN_modulation[1](code) for block in (*self.res_blocks, self.final_layer)]
        dim = code.shape[-1]
        for modulation in modulations:
            modulation.narrow(-1, dim, dim).add_(1)  # once a token here, instead of once a block and step
        return modulations

    def velocity(self, x: Tensor, modulations: list[Tensor]) -> Tensor:
        """dx/dt (..., token_dim) of noisy tokens x (..., token_dim), in the dtype of x."""
        h = self.input_proj(x)
        for block, modulation in zip(self.res_blocks, modulations):
            h = block(h, modulation)
        velocity: Tensor = self.final_layer(h, modulations[-1])
        return velocity

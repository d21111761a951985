"""The f8 autoencoder (LDM/FLUX shape, no quant convolutions): pixels to latents and back.

Latents at this module's border are what its decoder takes; scale and shift to the transformer's tokens are applied
elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from . import operations as ops
from .config import VAEConfig

NORM_GROUPS = 32
NORM_EPS = 1e-6

# run(network, x, pixels_in, pixels_out): how many pixels a position of the input and of the output stands for.
Runner: TypeAlias = Callable[[nn.Module, Tensor, int, int], Tensor]


def whole(network: nn.Module, x: Tensor, pixels_in: int, pixels_out: int) -> Tensor:
    """The runner that gives a network its whole input."""
    out: Tensor = network(x)
    return out


def channel_norm(mean: Tensor, patch: int | None) -> Tensor:
    """Layer norm without weights over the channels of (B, C, H, W), taken per patch x patch block (None is 1)."""
    p = patch or 1
    x = rearrange(mean, "b c (h p) (w q) -> b h w (c p q)", p=p, q=p)
    x = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
    return rearrange(x, "b h w (c p q) -> b c (h p) (w q)", p=p, q=p)


class ResidualBlock(nn.Module):
    """Two normalized 3x3 convolutions around a skip connection."""

    def __init__(self, channels: int, out_channels: int, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        self.norm1 = operations.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, **kwargs)
        self.conv1 = operations.Conv2d(channels, out_channels, 3, padding=1, **kwargs)
        self.norm2 = operations.GroupNorm(NORM_GROUPS, out_channels, eps=NORM_EPS, **kwargs)
        self.conv2 = operations.Conv2d(out_channels, out_channels, 3, padding=1, **kwargs)
        if channels != out_channels:
            self.nin_shortcut = operations.Conv2d(channels, out_channels, 1, **kwargs)
        self.reshapes = channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        out: Tensor = (self.nin_shortcut(x) if self.reshapes else x) + h
        return out


class AttentionBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels: int, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        self.norm = operations.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS, **kwargs)
        self.q = operations.Conv2d(channels, channels, 1, **kwargs)
        self.k = operations.Conv2d(channels, channels, 1, **kwargs)
        self.v = operations.Conv2d(channels, channels, 1, **kwargs)
        self.proj_out = operations.Conv2d(channels, channels, 1, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        height = x.shape[2]
        h = self.norm(x)
        q, k, v = (rearrange(proj(h), "b c h w -> b 1 (h w) c").contiguous() for proj in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)
        attended: Tensor = x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=height))
        return attended


class Middle(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, channels: int, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, kwargs, operations)
        self.attn_1 = AttentionBlock(channels, kwargs, operations)
        self.block_2 = ResidualBlock(channels, channels, kwargs, operations)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(x)))
        return out


class Downsample(nn.Module):
    """Halve the resolution; one zero row and column are added at the bottom and right only."""

    def __init__(self, channels: int, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, stride=2, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double the resolution by nearest neighbour, then smooth."""

    def __init__(self, channels: int, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        self.conv = operations.Conv2d(channels, channels, 3, padding=1, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """The blocks of one resolution and the change to the next."""

    def __init__(self, blocks: list[ResidualBlock]) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.block:
            x = block(x)
        resample = getattr(self, "downsample", None) or getattr(self, "upsample", None)
        return x if resample is None else resample(x)


def _levels(
    widths: list[int], blocks: int, channels: int, kwargs: dict[str, Any], operations: ops.Operations
) -> list[Level]:
    levels = []
    for width in widths:
        steps = [channels, *[width] * blocks]
        levels.append(Level([ResidualBlock(a, b, kwargs, operations) for a, b in zip(steps, steps[1:])]))
        channels = width
    return levels


class Encoder(nn.Module):
    """Pixels (B, 3, H, W) to moments (B, 2 z, H / f, W / f)."""

    def __init__(self, config: VAEConfig, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        self.conv_in = operations.Conv2d(config.in_channels, config.ch, 3, padding=1, **kwargs)
        self.down = nn.ModuleList(_levels(widths, config.num_res_blocks, config.ch, kwargs, operations))
        for level, width in zip(self.down[:-1], widths):
            level.downsample = Downsample(width, kwargs, operations)
        self.mid = Middle(widths[-1], kwargs, operations)
        self.norm_out = operations.GroupNorm(NORM_GROUPS, widths[-1], eps=NORM_EPS, **kwargs)
        self.conv_out = operations.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        moments: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(x))))
        return moments


class Decoder(nn.Module):
    """Latents (B, z, h, w) to pixels (B, 3, h * f, w * f). `up.0` is the highest resolution, as in the key names."""

    def __init__(self, config: VAEConfig, kwargs: dict[str, Any], operations: ops.Operations) -> None:
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        self.conv_in = operations.Conv2d(config.z_channels, widths[0], 3, padding=1, **kwargs)
        self.mid = Middle(widths[0], kwargs, operations)
        levels = _levels(widths, config.num_res_blocks + 1, widths[0], kwargs, operations)
        for level, width in zip(levels[:-1], widths):
            level.upsample = Upsample(width, kwargs, operations)
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = operations.GroupNorm(NORM_GROUPS, widths[-1], eps=NORM_EPS, **kwargs)
        self.conv_out = operations.Conv2d(widths[-1], config.out_ch, 3, padding=1, **kwargs)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        pixels: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return pixels


class AutoencoderKL(nn.Module):
    """The NextStep image tokenizer. Its parameter names are the checkpoint's."""

    def __init__(
        self,
        config: VAEConfig,
        dtype: ops.DType = None,
        device: ops.Device = None,
        operations: ops.Operations = ops.DEFAULT,
    ) -> None:
        super().__init__()
        kwargs: dict[str, Any] = {"dtype": dtype, "device": device}
        self.config = config
        self.encoder = Encoder(config, kwargs, operations)
        self.decoder = Decoder(config, kwargs, operations)

    def encode_moments(self, pixels: Tensor, run: Runner = whole) -> tuple[Tensor, Tensor]:
        """Mean (normalized where the config says so) and log-variance, (B, z, h, w), of pixels (B, 3, H, W) in [-1, 1].

        `run` may run the network in pieces. What the config normalizes is normalized afterwards, over the whole.
        """
        mean, logvar = run(self.encoder, pixels, 1, self.config.downscale).chunk(2, dim=1)
        if self.config.encoder_norm:
            mean = channel_norm(mean, self.config.psz)
        return mean, logvar

    def posterior_std(self, logvar: Tensor) -> Tensor | None:
        """Standard deviation of the posterior, or None for a deterministic checkpoint."""
        return None if self.config.deterministic else torch.exp(0.5 * logvar.clamp(-30.0, 20.0))

    def decode(self, latents: Tensor, run: Runner = whole) -> Tensor:
        """Pixels (B, 3, H, W), nominally in [-1, 1] and not clamped, of latents (B, z, h, w); `run` as above."""
        return run(self.decoder, latents, self.config.downscale, 1)

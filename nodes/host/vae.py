"""ComfyUI's own VAE class, for checkpoints of ours and for those of others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management as mm
import comfy.sd
import torch
from torch import Tensor, nn

from ...nextstep_core.errors import is_out_of_memory
from ...nextstep_core.model.config import VAEConfig
from ...nextstep_core.model.vae import channel_norm
from ...nextstep_core.runtime.interrupt import leaves
from ...nextstep_core.runtime.shortage import reason_of
from ...nextstep_core.sentences import Sentence
from .memory import DRAWING_ADVICE, memory_told
from .models import stays_cached
from .screen import check_interrupt

log = logging.getLogger(__name__)

NATIVE_SHAPE = (128, (1, 2, 4, 4), 2)  # the one width, multiplier list and depth that the host infers from keys


def native_vae(config: VAEConfig, state: dict[str, Tensor]) -> Any:
    """ComfyUI's own VAE object for a NextStep tokenizer, so that every core VAE node works on it.

    The host recognizes the published shape from its keys. For any other width it is told the shape, in the form that
    has quant convolutions; those are given identity weights.
    """
    stated = None
    if (config.ch, config.ch_mult, config.num_res_blocks) != NATIVE_SHAPE:
        z = config.z_channels
        shape = {
            "double_z": True, "z_channels": z, "resolution": 256, "in_channels": config.in_channels,
            "out_ch": config.out_ch, "ch": config.ch, "ch_mult": list(config.ch_mult),
            "num_res_blocks": config.num_res_blocks, "attn_resolutions": [], "dropout": 0.0,
        }  # fmt: skip
        stated = {"params": {"ddconfig": shape, "embed_dim": z}}
        for name, channels in (("quant_conv", 2 * z), ("post_quant_conv", z)):
            state = state | {
                f"{name}.weight": torch.eye(channels)[:, :, None, None],
                f"{name}.bias": torch.zeros(channels),
            }
    vae = comfy.sd.VAE(sd=dict(state), config=stated)
    vae.latent_channels = config.z_channels
    vae.downscale_ratio = vae.upscale_ratio = config.downscale
    vae.first_stage_model.regularization = ChannelNorm(config)
    for layer in leaves(vae.first_stage_model):  # older hosts look for an interrupt between nodes only
        layer.register_forward_pre_hook(lambda *_: check_interrupt())
    vae.is_dynamic = stays_cached
    return vae


class ChannelNorm(nn.Module):
    """Stands in for the host VAE's regularizer: the normalized mean of the posterior instead of a sample."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, moments: Tensor) -> tuple[Tensor, None]:
        mean = moments.chunk(2, dim=1)[0]
        return (channel_norm(mean, self.config.psz) if self.config.encoder_norm else mean), None


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pictures (B, H, W, 3) in [0, 1] by any VAE of the host; in ever smaller tiles where memory runs out."""
    return _in_tiles(vae.decode, getattr(vae, "decode_tiled", None), latents, [64, 32, 16])


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents (B, C, h, w) of pictures (B, H, W, 3) by any VAE of the host; in tiles as above."""
    return _in_tiles(vae.encode, getattr(vae, "encode_tiled", None), pixels, [512, 256, 128])


def _in_tiles(
    whole: Callable[[Tensor], Tensor], tiled: Callable[..., Tensor] | None, x: Tensor, sides: list[int]
) -> Any:
    """The host tries tiles by itself, but only after its device's own kind of error, and only of one size."""
    with memory_told(Sentence("The VAE"), advice=DRAWING_ADVICE):
        for side in [None, *sides[:-1]] if tiled is not None else []:
            try:
                return whole(x) if side is None else tiled(x, tile_x=side, tile_y=side, overlap=side // 4)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                log.warning("The VAE continues in smaller tiles: out of memory (%s)", reason_of(error))
            mm.soft_empty_cache()
        return whole(x) if tiled is None else tiled(x, tile_x=sides[-1], tile_y=sides[-1], overlap=sides[-1] // 4)


def vae_bytes(vae: Any, latents: tuple[int, ...]) -> int:
    """What decoding latents of this shape (B, C, h, w) with a native VAE will take at once, by the host's own rule."""
    return int(vae.memory_used_decode(latents, vae.vae_dtype)) if vae is not None else 0

"""Between pixels, latents and tokens: by hand."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.images.latents import HEIGHT, PUBLISHED_LATENTS, LatentSpace
from nextstep_core.model.config import NextStepConfig, VAEConfig

LATENTS = torch.arange(16 * 4 * 6.0).view(1, 16, 4, 6)
SCALED = replace(PUBLISHED_LATENTS, scale=2.0, shift=3.0)


def test_each_token_lies_on_its_square() -> None:
    tokens = PUBLISHED_LATENTS.cut(LATENTS)
    assert torch.equal(tokens[0, 4], LATENTS[0, :, 2:4, 2:4].flatten()), "second row, second column"
    assert torch.equal(PUBLISHED_LATENTS.join(tokens, (2, 3)), LATENTS)


def test_scale_and_shift_apply_once_each_way() -> None:
    tokens = SCALED.to_tokens(LATENTS)
    assert tokens[0, 0, 1] == (1 - 3) * 2
    assert torch.equal(SCALED.to_latents(tokens, (2, 3)), LATENTS)


def test_sizes_grids_and_shapes_belong_together() -> None:
    assert PUBLISHED_LATENTS.unit == 16
    assert PUBLISHED_LATENTS.grid(height=32, width=48) == (2, 3) == PUBLISHED_LATENTS.grid_of(LATENTS)
    assert PUBLISHED_LATENTS.size((2, 3)) == (48, 32)
    assert PUBLISHED_LATENTS.shape((2, 3)) == LATENTS.shape[1:]
    assert PUBLISHED_LATENTS.size_inside(100, 15) == (96, 16)


@pytest.mark.parametrize("shape", [(1, 4, 4, 6), (16, 4, 6), (1, 16, 1, 4, 6), (1, 32, 4, 6)], ids=str)
def test_latents_of_another_kind_are_named_with_what_is_asked_for(shape: tuple[int, ...]) -> None:
    with pytest.raises(NextStepError, match=f"{re.escape(str(shape))}.*16"):
        PUBLISHED_LATENTS.grid_of(torch.zeros(shape))


@pytest.mark.parametrize(("side", "near"), [(72, "64x64"), (75, "80x64")])
def test_a_size_between_tokens_offers_the_nearest(side: int, near: str) -> None:
    with pytest.raises(NextStepError, match=f"A picture of {side}x64 pixels is not possible.*{near}"):
        PUBLISHED_LATENTS.grid(64, side)


@pytest.mark.parametrize(("value", "near"), [(72, 64), (8, "from 16 to 4096"), (780, 784)])
def test_a_single_side_is_told_by_itself(value: int, near: object) -> None:
    with pytest.raises(NextStepError, match=f"^height is {value}; use .*{near}"):
        PUBLISHED_LATENTS.check_side(HEIGHT, value)
    assert PUBLISHED_LATENTS.check_side(HEIGHT, 784) == 784


def test_a_vae_of_another_kind_is_one_sentence(pipeline) -> None:
    config: NextStepConfig = pipeline.engine.config
    vae: VAEConfig = pipeline.vae.config
    scaled = replace(PUBLISHED_LATENTS, scale=vae.scaling_factor, shift=vae.shift_factor)
    assert LatentSpace.from_configs(config, vae) == scaled
    assert LatentSpace.from_configs(config, None) == PUBLISHED_LATENTS
    with pytest.raises(NextStepError, match="4 latent channels at 1/8 of the size; the model needs 16 at 1/8"):
        LatentSpace.from_configs(config, replace(vae, z_channels=4))
    with pytest.raises(NextStepError, match="16 latent channels at 1/2 of the size"):
        LatentSpace.from_configs(config, replace(vae, ch_mult=(1, 2)))

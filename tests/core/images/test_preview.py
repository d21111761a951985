"""The preview's colors: flat colors come back, undrawn rows are gray."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nextstep_core.images.preview import fit_latent_to_rgb, latents_to_rgb, side_by_side

MIX = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))


def encode(pixels: Tensor) -> Tensor:
    """A VAE whose latents are colors in another basis, with an offset: a linear map undoes it."""
    assert pixels.shape[-1] == 3 and pixels.min() >= 0 and pixels.max() <= 1
    small = F.avg_pool2d(pixels.movedim(-1, 1), 8)
    return torch.einsum("lc,bchw->blhw", MIX, small) + 0.3


@pytest.fixture(scope="module")
def rgb_map() -> Tensor:
    return fit_latent_to_rgb(encode)


def test_colors_come_back_on_their_places(rgb_map: Tensor) -> None:
    assert rgb_map.shape == (17, 3) and rgb_map.dtype == torch.float32
    picture = torch.rand(1, 3, 5, 3, generator=torch.Generator().manual_seed(2))
    latents = encode(picture.repeat_interleave(8, 1).repeat_interleave(8, 2))
    shown = latents_to_rgb(latents.bfloat16().float(), rgb_map, finished_rows=[3])[0]
    assert shown.dtype == torch.uint8
    assert (shown.float() - picture[0] * 255).abs().max() <= 3


def test_rows_that_are_not_finished_are_gray(rgb_map: Tensor) -> None:
    latents = encode(torch.ones(1, 24, 40, 3))
    shown = latents_to_rgb(latents, rgb_map, finished_rows=[2])[0]
    assert (shown[:2] >= 254).all() and (shown[2:] == 128).all()


def test_every_picture_has_rows_of_its_own_and_colors_stay_in_range(rgb_map: Tensor) -> None:
    latents = torch.cat([encode(torch.ones(1, 16, 8, 3)) * 5, encode(torch.zeros(1, 16, 8, 3))])
    bright, dark = latents_to_rgb(latents, rgb_map, [2, 1])
    assert (bright == 255).all()
    assert (dark[0] <= 1).all() and (dark[1] == 128).all()


def test_pictures_stand_side_by_side_in_order() -> None:
    pictures = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 2, 4, 3)
    sheet = side_by_side(pictures)
    assert sheet.shape == (4, 12, 3)
    assert sheet[::2, ::4, 0].tolist() == [[0, 1, 2], [3, 4, 128]], "what is left over is gray"
    assert torch.equal(side_by_side(pictures[:1]), pictures[0]), "one is itself"


def test_a_fit_uses_many_colors(pipeline) -> None:
    seen = []
    with torch.inference_mode():
        fit_latent_to_rgb(lambda pixels: seen.append(pixels) or pipeline.vae.encode_moments(pixels.movedim(-1, 1))[0])
    (pixels,) = seen
    assert pixels.shape == (1, 128, 128, 3)
    assert len(pixels.reshape(-1, 3).unique(dim=0)) == 64, "squares of 16"
    assert (pixels[0, :16, :16] == pixels[0, 0, 0]).all()


def test_a_vae_that_encodes_to_nan_has_no_preview() -> None:
    assert fit_latent_to_rgb(lambda pixels: torch.full((1, 16, 16, 16), float("nan"))) is None

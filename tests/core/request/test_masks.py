"""Masks to kept tokens, by hand."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.request.masks import kept_tokens, undrawn_tokens


def drawn(mask: torch.Tensor, grid: tuple[int, int] = (3, 4)) -> list[int]:
    return [n for n, kept in enumerate(kept_tokens(mask, grid)) if not kept]


@pytest.mark.parametrize(("value", "redrawn"), [(0.5, False), (0.51, True), (0.7, True), (0.49, False)])
def test_above_a_half_is_redrawn(value: float, redrawn: bool) -> None:
    mask = torch.zeros(3, 4)
    mask[0, 0] = 1
    mask[1, 1] = value
    assert drawn(mask) == ([0, 5] if redrawn else [0])
    assert drawn(mask.half()) == drawn(mask)


def test_one_pixel_redraws_its_square_and_no_other() -> None:
    for row, column, token in ((0, 0, 0), (15, 15, 0), (16, 15, 4), (47, 63, 11)):
        mask = torch.zeros(48, 64)
        mask[row, column] = 1
        assert drawn(mask) == [token]


@pytest.mark.parametrize("size", [(3, 5), (4, 4), (6, 4), (2, 3), (0, 4), (3, 0), (1, 1), (64, 48)])
def test_other_proportions_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(NextStepError, match=f"{size[1]}x{size[0]}.*64x48"):
        kept_tokens(torch.ones(size), (3, 4))


def test_a_mask_smaller_than_the_grid_is_refused() -> None:
    with pytest.raises(NextStepError, match="4x2.*128x64"):
        kept_tokens(torch.ones(2, 4), (4, 8))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_must_be_finite(value: float) -> None:
    mask = torch.ones(3, 4)
    mask[2, 3] = value
    with pytest.raises(NextStepError, match="NaN"):
        kept_tokens(mask, (3, 4))


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(()),
        torch.ones(12),
        torch.ones(1, 3, 4),
        torch.ones(3, 4, dtype=torch.complex64),
        torch.ones(3, 4).to_sparse(),
        torch.ones(3, 4, device="meta"),
    ],
    ids=str,
)
def test_what_is_no_picture_of_numbers_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(NextStepError, match="expected .height, width"):
        kept_tokens(mask, (3, 4))


def test_any_kind_of_real_number_is_a_mask() -> None:
    mask = torch.zeros(3, 4)
    mask[1, 2] = 1
    for dtype in (torch.uint8, torch.bool, torch.float64, torch.bfloat16, torch.float8_e4m3fn):
        assert drawn(mask.to(dtype)) == [6]


def test_what_an_interrupted_run_left_is_told_from_what_it_drew() -> None:
    latents = torch.randn(2, 16, 4, 6)
    assert not undrawn_tokens(latents).any()
    latents[:, :, 2:, 2:] = 0.1
    assert undrawn_tokens(latents).tolist() == [[False] * 3, [False, True, True]]
    latents[1, :, :2, :2] = 0
    assert undrawn_tokens(latents)[0, 0], "of one picture is enough"

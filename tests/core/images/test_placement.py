"""A part of a picture on a canvas and back, with numbers that one can count."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.images.placement import CROP, PAD, RESIZE, Placement, around

WHOLE = (0, 0, 4000, 3000)


def masked(width: int, height: int, *boxes: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    for left, top, right, bottom in boxes:
        mask[:, top:bottom, left:right] = 1
    return mask


@pytest.mark.parametrize(
    ("mode", "canvas", "box", "area"),
    [
        (CROP, (512, 512), (500, 0, 3500, 3000), (0, 0, 512, 512)),
        (PAD, (512, 512), WHOLE, (0, 64, 512, 448)),
        (RESIZE, (512, 512), WHOLE, (0, 0, 512, 512)),
        (CROP, (640, 480), WHOLE, (0, 0, 640, 480)),
        (PAD, (640, 480), WHOLE, (0, 0, 640, 480)),
    ],
)
def test_a_photograph_is_brought_onto_a_canvas(mode, canvas, box, area) -> None:
    placed = Placement.fit((4000, 3000), WHOLE, canvas, mode)
    assert (placed.box, placed.area) == (box, area)


def test_keep_takes_the_middle_as_it_is() -> None:
    picture = torch.rand(2, 35, 50, 3)
    placed = Placement.keep((50, 35), (0, 0, 50, 35), (48, 32))
    assert torch.equal(placed.take(picture), picture[:, 1:33, 1:49])
    assert Placement.keep((8, 40), (0, 0, 8, 40), (16, 32)).take(torch.rand(1, 40, 8, 3)).shape == (1, 32, 16, 3)


def test_pad_leaves_gray_room_that_is_to_be_drawn() -> None:
    placed = Placement.fit((20, 10), (0, 0, 20, 10), (32, 32), PAD)
    canvas, mask = placed.take(torch.ones(1, 10, 20, 3)), placed.take_mask(torch.zeros(1, 10, 20))
    assert placed.area == (0, 8, 32, 24)
    assert (canvas[:, 8:24] - 1).abs().max() < 1e-5 and (canvas[:, :8] == 0.5).all() and (canvas[:, 24:] == 0.5).all()
    assert (mask[:, 8:24] == 0).all() and (mask[:, :8] == 1).all() and (mask[:, 24:] == 1).all()


def test_a_thin_mark_is_not_lost_when_a_mask_shrinks() -> None:
    placed = Placement.fit((400, 400), (0, 0, 400, 400), (16, 16), RESIZE)
    mask = placed.take_mask(masked(400, 400, (101, 0, 102, 400)))
    assert mask.amax(dim=1)[0].tolist() == [0, 0, 0, 0, 1] + [0] * 11


def test_the_box_around_a_mask() -> None:
    mask = masked(100, 80, (40, 30, 60, 40))
    assert around(mask, 0) == (40, 30, 60, 40)
    assert around(mask, 5) == (35, 25, 65, 45)
    assert around(mask, 5, proportion=1.0) == (35, 20, 65, 50), "grown to a square around its middle"
    assert around(masked(100, 80, (0, 0, 10, 4)), 2, 1.0) == (0, 0, 14, 14), "moved into the picture"
    assert around(mask, 50, 1.0) == (0, 0, 100, 80), "no larger than the picture"
    assert around(torch.cat([mask, masked(100, 80, (0, 70, 1, 71))]), 0) == (0, 30, 60, 71), "of the whole batch"
    assert around(masked(9, 9), 3) is None


def test_what_is_drawn_comes_back_where_it_was_masked_and_fades_around() -> None:
    picture, mask = torch.zeros(1, 100, 200, 3), masked(200, 100, (90, 40, 110, 60))
    placed = Placement.fit((200, 100), (0, 0, 200, 100), (200, 100), RESIZE)
    out = placed.put_back(picture, torch.ones(1, 100, 200, 3), placed.take_mask(mask), feather=8)[0, 50, :, 0]
    assert (out[90:110] == 1).all() and out[81] == 0 and out[118] == 0
    assert 0 < out[84] < out[87] < 1, "more of the original with every step"
    hard = placed.put_back(picture, torch.ones(1, 100, 200, 3), placed.take_mask(mask), feather=0)
    assert torch.equal(hard[..., 0], mask)


def test_sides_that_were_cut_fade_and_the_pictures_own_do_not() -> None:
    picture = torch.zeros(1, 64, 128, 3)
    placed = Placement.fit((128, 64), (0, 0, 128, 64), (64, 64), CROP)
    out = placed.put_back(picture, torch.ones(1, 64, 64, 3), None, feather=16)[0, :, :, 0]
    assert not out[:, :32].any() and not out[:, 96:].any(), "beyond the cut nothing changes"
    assert (out[:, 48:80] == 1).all() and out[:, 34].tolist() == [2.5 / 16] * 64
    whole = Placement.fit((128, 64), (0, 0, 128, 64), (64, 32), RESIZE)
    assert (whole.put_back(picture, torch.ones(1, 32, 64, 3), None, feather=16) > 1 - 1e-5).all()


def test_a_result_that_was_enlarged_fits_and_one_of_other_proportions_does_not() -> None:
    placed = Placement.fit((100, 100), (0, 0, 100, 100), (64, 32), PAD)
    assert placed.area == (16, 0, 48, 32)
    drawn = torch.zeros(1, 64, 128, 3)
    drawn[:, :, 32:96] = 1
    assert (placed.put_back(torch.zeros(1, 100, 100, 3), drawn, None, 0) > 1 - 1e-5).all(), "without the room around"
    with pytest.raises(NextStepError, match="64x64, but 64x32 was prepared"):
        placed.put_back(torch.zeros(1, 100, 100, 3), torch.zeros(1, 64, 64, 3), None, 0)

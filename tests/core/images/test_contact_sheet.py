"""Where pictures and labels lie on a contact sheet."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.images.contact_sheet import GAP, _fitting, contact_sheet

SIDE = 64


def plain(value: float, height: int = SIDE, width: int = SIDE) -> torch.Tensor:
    return torch.full((height, width, 3), value)


def test_pictures_go_row_by_row_and_smaller_ones_into_the_middle() -> None:
    sheet = contact_sheet([plain(0.2), plain(0.4), plain(0.6, 32, 16)], [], 2)[0]
    assert sheet.shape == (2 * SIDE + 3 * GAP, 2 * SIDE + 3 * GAP, 3)
    second, low = GAP + SIDE + GAP, GAP + SIDE + GAP
    assert (sheet[GAP : GAP + SIDE, GAP : GAP + SIDE] - 0.2).abs().max() < 0.01
    assert (sheet[GAP : GAP + SIDE, second : second + SIDE] - 0.4).abs().max() < 0.01
    assert (sheet[low + 16 : low + 48, GAP + 24 : GAP + 40] - 0.6).abs().max() < 0.01
    assert (sheet[low : low + 16] == 1).all() and (sheet[low:, second:] == 1).all(), "white where nothing lies"


def test_a_label_is_written_under_its_picture() -> None:
    sheet = contact_sheet([plain(1.0), plain(1.0)], ["cfg 5", ""], 2)[0]
    assert sheet.shape[0] > SIDE + 2 * GAP
    dark = (sheet < 0.5).any(-1).nonzero()
    assert len(dark) and dark[:, 0].min() >= GAP + SIDE
    assert dark[:, 1].max() < GAP + SIDE, "the second has none"


def test_a_long_label_makes_its_cells_wide_enough() -> None:
    label = "cfg 7.5, steps 28, sampler flow-multistep"
    sheet = contact_sheet([plain(1.0, 16, 16)] * 2, [label, label], 2)[0]
    across = (sheet < 0.5).any(-1).any(0)
    middle = sheet.shape[1] // 2
    assert across[: middle - 2].any() and across[middle + 2 :].any() and not across[middle - 2 : middle + 2].any()


def test_a_wide_and_a_tall_picture_make_no_sheet_that_does_not_fit(monkeypatch) -> None:
    wide, tall = plain(1.0, 1, 2_000_000), plain(1.0, 2_000_000, 1)
    with pytest.raises(NextStepError, match="grid of 4000024x2000016 pixels would take"):
        contact_sheet([wide, tall], [], 2)


class Font:
    """Knows some letters, and draws a box for any other."""

    def __init__(self, known: str) -> None:
        self.known = known

    def getmask(self, letter: str) -> bytes:
        return letter.encode() if letter in self.known else b"box"


def test_a_label_takes_the_font_that_has_its_letters() -> None:
    own, greek, most = fonts = Font("cfg 5"), Font("αβγ"), Font("cfg5 αβ")
    assert _fitting(fonts, "cfg 5") is own
    assert _fitting(fonts, "α γ") is greek
    assert _fitting(fonts, "cfg αγ") is most, "none has all"
    assert _fitting(fonts, "") is own


def test_a_label_of_several_lines_is_written_in_one() -> None:
    one, two = (contact_sheet([plain(1.0)], [label], 1) for label in ("a b", " a\n\tb"))
    assert torch.equal(one, two)

"""Trained sizes by name."""

from __future__ import annotations

import pytest

from nextstep_core import NextStepError
from nextstep_core.request.sizes import (
    BASES,
    GRIDS,
    RATIOS,
    check_encodable,
    nearest_ratio,
    ratio_size,
    ratio_size_of_area,
)


def test_trained_sizes() -> None:
    assert ratio_size("18:14 landscape", 512) == (576, 448)
    assert ratio_size("16:16 square", 256) == (256, 256)
    assert ratio_size("8:32 portrait", 768) == (384, 1536)
    assert BASES == (256, 512, 768, 1024)


def test_a_ratio_has_about_the_area_that_is_asked_for() -> None:
    for name in RATIOS:
        for base in BASES:
            assert ratio_size_of_area(name, base * base) == ratio_size(name, base)
    assert ratio_size_of_area("16:16 square", 64 * 64) == (64, 64)
    assert ratio_size_of_area("21:12 landscape", 64 * 64) == (80, 48)  # 5.25 and 3 tokens
    assert ratio_size_of_area("16:16 square", 640 * 640) == (640, 640)
    assert ratio_size_of_area("8:32 portrait", 16 * 16) == (16, 32), "at least one token each way"


def test_names_say_what_they_are() -> None:
    assert len(RATIOS) == len(GRIDS) == 17
    kinds = {"landscape": lambda c, r: c > r, "square": lambda c, r: c == r, "portrait": lambda c, r: c < r}
    for name, (columns, rows) in RATIOS.items():
        ratio, kind = name.split()
        assert ratio == f"{columns}:{rows}" and kinds[kind](columns, rows)
        assert (rows, columns) in GRIDS, "each also stands upright"
        assert abs(columns * rows / 256 - 1) < 0.08, "about as many tokens as the square"


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((1920, 1080), "21:12 landscape"),
        ((1080, 1920), "12:21 portrait"),
        ((700, 1000), "13:19 portrait"),
        ((1000, 700), "19:13 landscape"),
        ((100, 100), "16:16 square"),
        ((9000, 100), "32:8 landscape"),
        ((100, 9000), "8:32 portrait"),
        ((1064, 1000), "16:16 square"),  # the border to 17:15 is at the root of 17 / 15, 1.0646
        ((1065, 1000), "17:15 landscape"),
    ],
)
def test_the_nearest_ratio(size: tuple[int, int], name: str) -> None:
    assert nearest_ratio(*size) == name


def test_upright_and_lying_pictures_are_treated_alike() -> None:
    """The distance is one of proportions: what is nearest lying is nearest upright."""
    for width in range(1000, 4100, 37):
        columns, rows = RATIOS[nearest_ratio(width, 1000)]
        assert RATIOS[nearest_ratio(1000, width)] == (rows, columns)


def test_every_ratio_is_its_own_nearest() -> None:
    for name in RATIOS:
        for base in BASES:
            assert nearest_ratio(*ratio_size(name, base)) == name


def test_what_is_no_choice_names_the_choices() -> None:
    with pytest.raises(NextStepError, match="ratio is '1:1'; choose one of 32:8 landscape"):
        ratio_size("1:1", 512)
    with pytest.raises(NextStepError, match="base is 500; choose one of 256, 512"):
        ratio_size("16:16 square", 500)


def test_a_picture_that_no_encoder_could_hold_is_refused() -> None:
    check_encodable(2048, 1024)
    check_encodable(4096, 512)
    with pytest.raises(NextStepError, match=r"4000x2992 is 46,750 tokens; at most 8,192 .* NextStep Prepare Picture"):
        check_encodable(4000, 2992)

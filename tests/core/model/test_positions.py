"""Rotary tables and the codes of the image grid, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.images.latents import PUBLISHED_LATENTS
from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.positions import apply_rotary, generation_codes, grid_codes, grid_side, has_codes, rotary_table

CPU = torch.device("cpu")


@pytest.fixture
def config(pipeline) -> NextStepConfig:
    return replace(pipeline.engine.config, head_dim=4, rope_theta=100.0)


def test_rotary_table_by_hand(config: NextStepConfig) -> None:
    cos, sin = rotary_table(config, 3, CPU, torch.float32)
    for position in range(3):
        for pair, frequency in enumerate((1.0, 0.1)):  # 100^(-2 k / 4)
            angle = position * frequency
            assert cos[position, pair] == cos[position, pair + 2] == pytest.approx(math.cos(angle))
            assert sin[position, pair + 2] == -sin[position, pair] == pytest.approx(math.sin(angle))


def test_a_rope_factor_divides_positions(config: NextStepConfig) -> None:
    plain, slow = (rotary_table(replace(config, rope_factor=f), 8, CPU, torch.float32) for f in (1.0, 2.0))
    assert torch.equal(slow[:, ::2], plain[:, :4])


def test_rotation_by_hand(config: NextStepConfig) -> None:
    """(x0, x2) and (x1, x3) turn by the position's angles, so equal distances give equal products."""
    table = rotary_table(config, 9, CPU, torch.float32)
    turned = apply_rotary(torch.tensor([1.0, 0.0, 0.0, 2.0]).expand(1, 1, 9, 4), table)[0, 0]
    one = (math.cos(1), -2 * math.sin(0.1), math.sin(1), 2 * math.cos(0.1))
    assert turned[1].tolist() == pytest.approx(one)
    assert turned[2] @ turned[5] == pytest.approx(float(turned[3] @ turned[6]))


def test_codes_by_hand() -> None:
    """[sin, cos] of the column, then of the row; with 8 features each has the frequencies 1 and 1/100."""
    row, column, side = 2, 1, 3
    line = [[f(n), f(n / 100)] for n in (column, row) for f in (math.sin, math.cos)]
    assert grid_codes(8, side)[row * side + column].tolist() == pytest.approx(sum(line, []))


def test_the_1_1_rule_takes_the_corner_and_the_1_0_rule_the_first_rows(config: NextStepConfig) -> None:
    table, newer = torch.arange(64.0)[:, None], replace(config, base_image_grid_size=8)
    assert generation_codes(newer, (2, 3), table).flatten().tolist() == [0, 1, 2, 8, 9, 10]
    assert generation_codes(config, (2, 3), table).flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert (grid_side(newer), grid_side(config)) == (8, 32)


def test_which_grids_have_codes(config: NextStepConfig) -> None:
    newer = replace(config, base_image_grid_size=8)
    assert [has_codes(newer, grid) for grid in ((8, 8), (1, 9), (9, 1), (2, 3))] == [True, False, False, True]
    assert [has_codes(config, grid) for grid in ((32, 32), (1, 1024), (33, 32), (25, 41))] == [True, True, False, False]


@pytest.mark.parametrize(
    ("base", "fits", "too_large", "words"),
    [(8, (128, 128), (128, 144), ["8x8", "128x128", "144x128"]), (None, (256, 1024), (528, 512), ["1024", "1056"])],
)
def test_a_picture_beyond_the_codes_is_one_sentence(pipeline, base, fits, too_large, words: list[str]) -> None:
    config = replace(pipeline.engine.config, use_gen_pos_embed=True, base_image_grid_size=base)
    engine = replace(pipeline.engine, config=config)
    assert engine.grid(*fits) == PUBLISHED_LATENTS.grid(*fits)
    with pytest.raises(NextStepError) as caught:
        engine.grid(*too_large)
    assert all(word in str(caught.value) for word in words), caught.value
    assert replace(engine, config=replace(config, use_gen_pos_embed=False)).grid(*too_large)

"""The table of ways to store int4: bits and errors of each, and what fitting takes at scale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import calibration, checkpoint
from benchmarks.calibration import DOWN, Between, HalfQuadratic, Mixed, Split, at_scale, measured, table
from benchmarks.subjects import SHAPES
from nextstep_core import NextStepPipeline
from nextstep_core.runtime.quantization import Recipe
from nextstep_core.runtime.quantization.formats import INT4, INT8

INT4_RECIPE = Recipe("int4", INT4, INT8)
SMALL = {**SHAPES["medium"], "num_hidden_layers": 2, "fm_head_layers": 1, "fm_head_dim": 64, "vocab_size": 1024}


@pytest.fixture(scope="module")
def drawn() -> Split:
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    texts = calibration.captions(6) + calibration.unseen(3)
    found = pipeline.calibrate(texts, height=32, width=32)
    return Split(found.ids, found.valid, found.tokens, found.grid)


def test_ways_in_their_order(drawn: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_OUT", 3)
    formats = Between("int4", 64), HalfQuadratic("int4", 64), INT4
    rows = [measured(type(f).__name__, Recipe("int4", f, INT8), drawn) for f in formats]
    assert [row.bits for row in rows] == [4.5] * 3, "4 bits, and a scale and a zero of 16 for 64 columns"
    assert rows[0].weights > rows[1].weights > rows[2].weights > 0.08
    mixed = measured("mixed", Mixed(INT4_RECIPE, int8=(DOWN,)), drawn)
    alone = measured("alone", Mixed(INT4_RECIPE, only=(DOWN,)), drawn, fitted=6)
    assert 4.5 < mixed.bits < 8 < alone.bits < 16 and mixed.conditions < rows[2].conditions
    assert table([mixed]).count("\n") == 2


def test_what_is_fitted_to_and_what_is_held_out(drawn: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "HELD_OUT", 3)
    split = replace(drawn, fitted=2)
    assert torch.equal(split.known.tokens, drawn.tokens[:2]) and torch.equal(split.held_out.tokens, drawn.tokens[6:])
    assert not set(calibration.captions(96)) & set(calibration.unseen(24))


def test_a_checkpoint_at_scale_is_fitted_layer_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "POOL", 1 << 16)
    checkpoint.write_checkpoint(tmp_path, SMALL)
    found = at_scale(tmp_path, prompts=2, side=32)
    assert found["layers"] == 2 and found["positions"] == 4 * (32 + 4 - 1)
    assert 0 < found["error"] < 1 and found["seconds_a_layer"] > 0

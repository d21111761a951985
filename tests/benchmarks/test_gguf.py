"""The table of what GGUF's formats lose: a row for each, and what is kept as it is loses nothing more."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("gguf")

from benchmarks import gguf


@pytest.mark.slow
def test_a_row_for_every_format(monkeypatch, capsys) -> None:
    monkeypatch.setattr(gguf, "PACKAGE", ("Q8_0", "Q4_0"))
    monkeypatch.setattr(sys, "argv", ["gguf", "--prompts", "2"])
    gguf.main()
    _, _, *lines = capsys.readouterr().out.splitlines()
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)}
    assert list(rows) == ["float32", "Q8_0", "Q4_0"]
    assert [rows[kind][0] for kind in rows] == ["32", "8.5", "4.5"]
    assert [rows[kind][-1] for kind in rows] == ["none", "int8", "int4-g32"]
    eight, four = ([float(cell) for cell in rows[kind][1:-1]] for kind in ("Q8_0", "Q4_0"))
    assert 0 < eight[1] < 1 < four[1] < 20, "of `c`"
    assert four[4] == pytest.approx(four[1], rel=0.02) and four[3] > 1.1 * four[1], "in groups of 32 it stays"

"""Trained sizes by name."""

from __future__ import annotations

from nextstep_core.request.sizes import nearest_ratio, ratio_size


def test_trained_sizes() -> None:
    assert ratio_size("18:14 landscape", 512) == (576, 448)
    assert nearest_ratio(1920, 1080) == "21:12 landscape"
    assert nearest_ratio(700, 1000) == "13:19 portrait"

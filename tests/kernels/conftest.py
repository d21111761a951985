"""Tests of our kernels on a CPU. Triton's interpreter is chosen before Triton is imported, so they have a process of
their own: `TRITON_INTERPRET=1 python -m pytest tests/kernels`, as `tests/core/runtime/test_triton.py` starts it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton") is not None
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]
if find_spec("gemlite") is None:
    collect_ignore_glob.append("test_gemlite.py")


@pytest.fixture(autouse=True)
def wide_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program takes many rows of a matrix: each program costs the same time here, whatever it does."""
    import torch

    from nextstep_core.runtime.triton import head, rows

    torch.set_num_threads(1)
    monkeypatch.setattr(head, "TILE", 128)
    monkeypatch.setattr(rows, "TILES", {False: 64, True: 64})
    with torch.inference_mode():
        yield

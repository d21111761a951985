"""A short soak: runs of every kind end as they should, and the last picture is the first."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.stress.soak import soak


@pytest.mark.skipif(sys.platform != "linux", reason="Linux tells what a process takes")
def test_twenty_runs_of_every_kind_leave_a_server_as_it_was(comfyui: Path, tmp_path: Path) -> None:
    """What so few runs take more than before is warm-up, so that their growth says nothing."""
    result = soak(20, tmp_path / "base")
    assert result.same_picture
    assert sum(result.ended.values()) == 20 and not [kind for kind in result.ended if kind.startswith("unexpected")]
    middle, last = result.usage[len(result.usage) // 2], result.usage[-1]
    assert last.threads <= middle.threads and last.files <= middle.files + 2

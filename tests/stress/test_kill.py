"""A few kills of each kind: nothing torn, and the next run ends well."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stress.batch import kill_and_compare

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the kills are made by fork")
def test_nothing_is_torn_by_a_kill() -> None:
    """In a process of its own, because huggingface_hub reads its settings when it is imported."""
    command = [sys.executable, "-m", "tests.stress.kill", "--count", "12"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=590)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 kills" in done.stdout and "failed: 0" in done.stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the command line is killed by a signal")
def test_a_batch_run_that_is_killed_again_and_again_has_every_picture_once() -> None:
    met, found = kill_and_compare(pictures=12, kills=3)
    assert not found and met

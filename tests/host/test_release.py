"""The archive that the registry would hand out, installed and run as a user would."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from scripts.comfy_server import ROOT


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="packing asks git which files belong to the pack")
def test_the_packed_archive_installs_and_draws(comfyui: Path) -> None:
    command = [sys.executable, "-m", "scripts.release_check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["ok"] * 5

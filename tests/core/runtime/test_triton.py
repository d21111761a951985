"""Our kernels without a GPU: their numbers in Triton's interpreter, and that they compile for each kind of card.

Both are processes of their own: whether kernels are interpreted is decided when Triton is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_builds import ARCHITECTURES

from nextstep_core.runtime.triton import support

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, interpreted: bool, folder: Path) -> str:
    pytest.importorskip("triton", reason="Triton is not installed")
    own = {"TRITON_INTERPRET": "1" if interpreted else "0", "TRITON_CACHE_DIR": str(folder)}
    paths = os.pathsep.join(str(ROOT / part) for part in ("", "tests"))
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=ROOT,
        env=os.environ | own | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_their_numbers(tmp_path: Path) -> None:
    said = run("pytest", "-q", "-p", "no:cacheprovider", "tests/kernels", interpreted=True, folder=tmp_path)
    assert " passed" in said and "skipped" not in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_they_compile(architecture: int, tmp_path: Path) -> None:
    said = run("kernel_builds", str(architecture), interpreted=False, folder=tmp_path)
    assert said.count(f"sm{architecture} ") >= 18


def test_nothing_is_asked_of_triton_where_it_is_absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    assert "not installed" in str(support.missing(torch.device("cuda")))


def test_a_cpu_takes_none() -> None:
    assert support.missing(torch.device("cpu")) is not None


def test_importing_the_engine_imports_no_triton() -> None:
    code = "import sys, nextstep_core.decoding.engine; sys.exit(any(n.startswith('triton') for n in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0

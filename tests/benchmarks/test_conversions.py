"""What converting to every format takes: once each, gone on with where it stopped, and nothing left behind."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import conversions
from nextstep_core.loading.store import ASSETS, EMBEDDED
from nextstep_core.runtime.quantization import RECIPES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint; its files are not copied."""
    for path in (ASSETS / EMBEDDED).iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["conversions", str(folder), *arguments])
    conversions.main()


class Processes:
    """Stand in for the processes: they write what they should, and take what they are told to."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.started = fail, []

    def __call__(self, arguments: list[str]) -> dict[str, Any]:
        recipe, step, path = arguments[2], arguments[3], Path(arguments[4])
        self.started.append(f"{step} {recipe}")
        if f"{step} {recipe}" == self.fail:
            return {"problem": "ended with -9"}
        if step == "--convert":
            path.write_bytes(b"converted")
            return {"seconds": 1.5, "bytes": 7 * 10**9, "peak": 2 * 10**9, "peak_with_files": 9 * 10**9}
        assert path.read_bytes() == b"converted"
        return {"load_seconds": 2.5, "seconds": 3.5, "finite": True, "peak": 10**9, "peak_with_files": 8 * 10**9}


def test_all_formats_once_and_nothing_left(folder: Path, monkeypatch, capsys) -> None:
    processes = Processes()
    monkeypatch.setattr(conversions, "in_a_process", processes)
    run(folder, monkeypatch)
    assert processes.started == [f"{step} {name}" for name in RECIPES for step in ("--convert", "--draw")]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" ")[1] for row in rows] == list(RECIPES)
    assert rows[0] == "| int8 | 1.5 s | 2 GB | 9 GB | 7 GB | 2.5 s | 3.5 s | 1 GB | 8 GB | finite |"
    assert not list(folder.glob("converted-*"))
    run(folder, monkeypatch)
    assert len(processes.started) == 2 * len(RECIPES), "what is done is not done again"
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:] == rows


def test_it_goes_on_where_it_stopped(folder: Path, monkeypatch, capsys) -> None:
    processes = Processes(fail="--draw int4")
    monkeypatch.setattr(conversions, "in_a_process", processes)
    run(folder, monkeypatch, "--recipes", "int4", "int8")
    assert "ended with -9" in capsys.readouterr().out and processes.started[-1] == "--draw int8"
    assert [path.name for path in folder.glob("converted-*")] == ["converted-int4.safetensors"]
    processes.fail, processes.started = "", []
    run(folder, monkeypatch, "--recipes", "int4", "int8", "--keep")
    assert processes.started == ["--draw int4"] and list(folder.glob("converted-*")), "what is to be kept is"
    (folder / conversions.DONE).write_text('{"int4": {"converted": {}}}')
    next(folder.glob("converted-*")).unlink()
    run(folder, monkeypatch, "--recipes", "int4")
    assert processes.started[1:] == ["--convert int4", "--draw int4"], "its file went away"


@pytest.mark.slow
def test_a_format_for_real(folder: Path, monkeypatch, capsys) -> None:
    run(folder, monkeypatch, "--recipes", "int4-g32", "--side", "32", "--steps", "2")
    (row,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| int4")]
    assert row.endswith("| finite |")
    assert not list(folder.glob("converted-*"))


def test_the_memory_of_a_process_without_and_with_files() -> None:
    watched = conversions.Watched()
    watched.look(os.getpid())
    if Path("/proc/self/status").exists():
        assert watched.own is not None and watched.whole is not None and 10**6 < watched.own <= watched.whole
    watched.look(2**30)  # one that is gone

"""The engine works alone: no host, no downloads, nothing heavy until it is used."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
CORE = sorted((ROOT / "nextstep_core").rglob("*.py"))
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "folder_paths", "nodes", "server", "execution"}
DECLARED = {"torch", "tokenizers", "safetensors", "huggingface_hub", "filelock", "PIL", "numpy", "einops"}
OPTIONAL = {"comfy_kitchen", "gemlite", "gguf", "ray", "starlette", "uvicorn", "python_multipart"}
ITSELF = {"nextstep_core"}  # under its own name, where a class is sent to another process
COMMANDS = {"typer", "rich"}  # the first brings the second
IN_ROOMS = {"commands": COMMANDS, "triton": {"triton"}}  # of whole folders, which are imported only when they are used


def imported(path: Path) -> list[tuple[str, bool]]:
    """(top-level module, whether it is imported at module level) of every absolute import."""
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        found += [(name.split(".")[0], node in tree.body) for name in names]
    return found


def test_the_engine_imports_only_what_is_declared() -> None:
    for path in CORE:
        allowed = DECLARED | OPTIONAL | ITSELF | IN_ROOMS.get(path.parent.name, set())
        outside = {name for name, _ in imported(path)} - set(sys.stdlib_module_names) - allowed
        assert not outside, f"{path.name} imports {outside}"
        assert not {name for name, _ in imported(path)} & HOST_MODULES


@pytest.mark.parametrize("heavy", ["tokenizers", "huggingface_hub", *OPTIONAL])
def test_heavy_libraries_are_imported_where_they_are_used(heavy: str) -> None:
    assert all((heavy, True) not in imported(path) for path in CORE)


def lint_imports(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_rooms_import_only_from_rooms_below(tmp_path: Path) -> None:
    """The contract in pyproject.toml holds, and notices an import upwards."""
    kept = lint_imports(ROOT)
    assert kept.returncode == 0, kept.stdout + kept.stderr
    shutil.copytree(ROOT / "nextstep_core", tmp_path / "nextstep_core", ignore=shutil.ignore_patterns("assets"))
    with (tmp_path / "nextstep_core" / "model" / "config.py").open("a") as file:
        file.write("\nfrom ..request.sizes import GRIDS\n")
    broken = lint_imports(tmp_path)
    assert broken.returncode != 0
    assert "nextstep_core.model.config -> nextstep_core.request.sizes" in broken.stdout


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys, nextstep_core; print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


def test_requirements_are_lower_bounds_and_the_same_in_both_places() -> None:
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    requirements = [line for line in lines if line]
    assert all(re.fullmatch(r"[\w-]+>=[\d.]+", line) for line in requirements), requirements
    project = (ROOT / "pyproject.toml").read_text().split("dependencies = [")[1].split("]")[0]
    assert re.findall(r'"([^"]+)"', project) == requirements

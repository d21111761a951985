"""What the repository says of itself to those who work on it: workflow, hooks and CONTRIBUTING."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts.check_text import faults

ROOT = Path(__file__).resolve().parent.parent
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text())
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_workflow_tests_every_host_and_the_oldest_python() -> None:
    tested = (ROOT / "scripts" / "hosts.sh").read_text().split("TESTED=(")[1].split("\n)")[0]
    jobs = WORKFLOW["jobs"]
    assert jobs["hosts"]["strategy"]["matrix"]["host"] == re.findall(r'"(\S+) [0-9a-f]{40}', tested)
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert oldest in jobs["tests"]["strategy"]["matrix"]["python"]


def test_publishing_waits_for_everything_else_and_for_a_tag() -> None:
    jobs = WORKFLOW["jobs"]
    assert set(jobs["publish"]["needs"]) == set(jobs) - {"publish"}
    assert "refs/tags/v" in jobs["publish"]["if"]


@pytest.mark.parametrize("pattern", [r"`([\w.]+/[\w./]*)`", r"python -m (scripts\.\w+|benchmarks\.\w+)"])
def test_contributing_names_what_is_there(pattern: str) -> None:
    names = re.findall(pattern, CONTRIBUTING)
    assert names
    for name in names:
        path = ROOT / (name if "/" in name else f"{name.replace('.', '/')}.py")
        assert path.exists() or (ROOT / "nextstep_core" / name).exists(), name


def test_contributing_names_the_tables_of_hostile_input() -> None:
    for name, file in re.findall(r"`(\w+)`(?: and `\w+`)? in `(tests/[\w/.]+)`", CONTRIBUTING):
        assert re.search(rf"^{name}\b|^def {name}\b", (ROOT / file).read_text(), flags=re.MULTILINE), (name, file)


def test_faults_of_text_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    for text, found in (("a\nb\n", 0), ("", 0), ("a \nb\n", 1), ("a", 1), ("a\n\n", 1), ("a\t\n\n", 2)):
        path.write_text(text)
        assert len(faults(path)) == found, text


def test_a_pack_that_is_a_link_finds_the_comfyui_around_it(tmp_path: Path) -> None:
    comfyui = tmp_path / "ComfyUI"
    for folder in ("comfy", "custom_nodes"):
        (comfyui / folder).mkdir(parents=True)
    (comfyui / "comfy" / "model_management.py").touch()
    (comfyui / "custom_nodes" / "pack").symlink_to(ROOT, target_is_directory=True)
    script = f"source {comfyui}/custom_nodes/pack/scripts/environment.sh && find_comfyui"
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home")}
    found = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(comfyui), found.stderr

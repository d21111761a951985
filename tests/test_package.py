"""What `pip install` gives, and what the registry and the package say of the same thing."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from comfy_cli.registry.config_parser import extract_node_configuration

import nextstep_core

ROOT = Path(__file__).resolve().parent.parent
REGISTRY = extract_node_configuration(str(ROOT / "pyproject.toml"))


def test_versions_and_names_agree() -> None:
    assert REGISTRY is not None
    assert REGISTRY.project.version == nextstep_core.__version__
    assert "comfyui" not in REGISTRY.project.name.lower(), "the registry adds that itself"
    for path in (ROOT / "example_workflows").glob("*.json"):
        names = {node["properties"].get("cnr_id") for node in json.loads(path.read_text())["nodes"]}
        assert names <= {REGISTRY.project.name, "comfy-core", None}, path.name


def test_editors_see_what_is_public() -> None:
    """The names that a type checker reads are those that are there at run time."""
    tree = ast.parse((ROOT / "nextstep_core" / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name for statement in block.body for alias in statement.names}
    assert seen == set(nextstep_core.__all__) == set(nextstep_core._HOMES)
    assert all(hasattr(nextstep_core, name) for name in nextstep_core.__all__)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "nextstep_core"):  # building leaves files beside the source
        path = ROOT / name
        shutil.copytree(path, source / name) if path.is_dir() else shutil.copy(path, source)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*build, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_the_engine_and_its_model_and_draws(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path)
    assert {name.split("/")[0] for name in names} == {
        "nextstep_core",
        f"nextstep-{nextstep_core.__version__}.dist-info",
    }
    assert "nextstep_core/studio/data/calibration.txt" in names
    assert "nextstep_core/py.typed" in names and "nextstep_core/assets/tiny/vae/checkpoint.pt" in names
    assert "nextstep_core/assets/night/adapter_model.safetensors" in names
    code = (
        "import nextstep_core, torch; from nextstep_core import NextStepPipeline as P; print(nextstep_core.__file__);"
        "out = P.from_pretrained('tiny', dtype=torch.float32).generate('a red circle on a white background',"
        " height=64, width=64); print(tuple(out.images.shape), out.images[0, 32, 32].tolist())"
    )
    drawn = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert drawn.returncode == 0, drawn.stderr
    file, picture = drawn.stdout.splitlines()
    assert Path(file).is_relative_to(tmp_path)
    assert picture.startswith("(1, 64, 64, 3)")

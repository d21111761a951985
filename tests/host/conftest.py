"""The host under test."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_graph import ComfyGraph, make_graph_host
from PIL import Image

from scripts.comfy_server import NO_HOST, ComfyServer, find_comfyui, make_base, running_server

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "golden"
MODEL = "tiny-a"


@pytest.fixture(scope="session")
def comfyui() -> Path:
    found = find_comfyui()
    assert found is not None, NO_HOST
    return found


def make_example_picture(path: Path) -> None:
    """What the host ships as example.png: a picture whose alpha becomes the mask (its lower right quarter here)."""
    picture = Image.new("RGBA", (64, 64), (0x20, 0x50, 0xE0, 255))
    picture.paste((0xE0, 0x20, 0x20, 255), (8, 8, 40, 40))
    picture.paste((0x20, 0x50, 0xE0, 0), (32, 32, 64, 64))
    picture.save(path)


@pytest.fixture(scope="session")
def server(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A running ComfyUI with the pack and a small random checkpoint of the real layout."""
    base = make_base(tmp_path_factory.mktemp("comfy"))
    shutil.copytree(GOLDEN / MODEL, base / "models" / "nextstep" / MODEL)
    make_example_picture(base / "input" / "example.png")
    elsewhere = base / "elsewhere"
    shutil.copytree(GOLDEN / MODEL, elsewhere / "NextStep-1-Large-Edit")
    paths = base / "extra_model_paths.yaml"
    paths.write_text(f"my_disk:\n    base_path: {elsewhere}\n    nextstep: .\n")
    with running_server(comfyui, base, "--extra-model-paths-config", str(paths)) as running:
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without a host none of these tests can run; the closing line says how to get one."""
    if find_comfyui() is None:
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=NO_HOST))


@pytest.fixture(scope="session")
def graph(comfyui: Path, tmp_path_factory: pytest.TempPathFactory) -> ComfyGraph:
    """A ComfyUI inside this process, with the same small checkpoint."""
    folder = tmp_path_factory.mktemp("graph")
    host = make_graph_host(comfyui, folder)
    shutil.copytree(GOLDEN / MODEL, folder / "models" / "nextstep" / MODEL)
    return host

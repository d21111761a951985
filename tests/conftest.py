"""Fixtures shared by all tests: the recorded reference tensors and a pipeline on their checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest_plugins = ["tally"]

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "data" / "golden"
COSTS = ("host", "browser", "slow")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by its cost: its folder says it, or the test itself that it is slow; all others are fast."""
    for item in items:
        folder = item.path.relative_to(ROOT / "tests").parts[0]
        if folder in ("host", "browser"):
            item.add_marker(folder)
        elif folder in ("benchmarks", "training", "stress"):
            item.add_marker("slow")
        if not any(item.get_closest_marker(cost) for cost in COSTS):
            item.add_marker("fast")


@pytest.fixture(scope="session", autouse=True)
def no_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found out about this machine is found out anew, and leaves nothing behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEXTSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def cases() -> dict:
    return json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="session")
def pipeline():
    import torch

    from nextstep_core import NextStepPipeline

    torch.set_num_threads(1)  # as the recordings were made; also faster on models this small
    return NextStepPipeline.from_pretrained(GOLDEN / "tiny-a", dtype=torch.float32)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the reference checkpoint that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "tiny-a", tmp_path / "tiny-a"))

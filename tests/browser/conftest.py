"""A real browser on a real ComfyUI."""

from __future__ import annotations

import importlib.util
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_hub import Hub

from scripts.comfy_server import NO_HOST, ComfyServer, find_comfyui, make_base, running_server

HERE = Path(__file__).parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def missing() -> str | None:
    """What these tests lack here."""
    if find_comfyui() is None:
        return NO_HOST
    if CHROMIUM is None or importlib.util.find_spec("playwright") is None:
        return (
            "no browser found: install chromium (and the Python package playwright, which needs no browser of its own)"
        )
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if reason := missing():
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    """Small checkpoints under their published names."""
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture(scope="module")
def host(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A fresh ComfyUI with nothing but the pack, whose Hugging Face is the small hub."""
    comfyui = find_comfyui()
    assert comfyui is not None
    folder = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_HOME", str(folder / "hf"))
        with running_server(comfyui, make_base(folder / "base")) as server:
            yield server


@pytest.fixture(scope="module")  # not longer: its event loop would be in the way of others
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def page(host: ComfyServer, browser):
    """The frontend, ready, with its first dialog closed."""
    page = browser.new_page(viewport={"width": 1760, "height": 1000})
    page.goto(f"http://127.0.0.1:{host.port}", wait_until="domcontentloaded")
    ready = "window.app?.graph && app.extensionManager && Object.keys(LiteGraph.registered_node_types).length > 100"
    page.wait_for_function(ready, timeout=120_000)
    dialog = page.get_by_role("dialog").first  # a first start greets with the templates, a moment later
    dialog.wait_for(state="visible", timeout=60_000)
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")
    return page

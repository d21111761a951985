"""The shipped templates in the real frontend, as a user meets them.

Set NEXTSTEP_SCREENSHOTS to a folder to keep the pictures that the README shows.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from comfy_server import PACK_NAME, ComfyServer
from workflows import ALL, FIRST_RUN, read_workflow

GRAPH = """() => app.graph._nodes.map(node => ({
    id: node.id, type: node.type, known: node.type in LiteGraph.registered_node_types, error: Boolean(node.has_errors),
    values: Object.fromEntries((node.widgets ?? []).map(widget => [widget.name, widget.value])),
}))"""
RUN = """() => new Promise(async done => {
    const seen = {progress: 0, previews: 0};
    app.api.addEventListener('progress', () => seen.progress++);
    for (const name of ['b_preview', 'b_preview_with_metadata']) app.api.addEventListener(name, () => seen.previews++);
    app.api.addEventListener('execution_success', () => done({...seen, ended: 'success'}), {once: true});
    app.api.addEventListener('execution_error', e => done({...seen, ended: e.detail.exception_message}), {once: true});
    await app.queuePrompt(0, 1);
})"""
DROP = """async data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    await app.handleFile(new File([bytes], 'shared.png', {type: 'image/png'}));
}"""


def open_template(page, name: str) -> None:
    """Through ComfyUI's own template browser."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog").first
    dialog.get_by_text(PACK_NAME, exact=True).click()
    dialog.get_by_role("heading", name=name, exact=True).click()
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(read_workflow(path_of(name))["nodes"]))
    page.wait_for_timeout(500)


def path_of(name: str) -> Path:
    return next(path for path in ALL if path.stem == name)


def screenshot(page, name: str) -> None:
    if folder := os.environ.get("NEXTSTEP_SCREENSHOTS"):
        page.keyboard.press(".")  # fit the graph into the view
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(folder) / f"{name}.png", clip={"x": 65, "y": 80, "width": 1420, "height": 700})


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_template_opens_whole(page, path: Path) -> None:
    open_template(page, path.stem)
    saved = {node["id"]: node.get("widgets_values", []) for node in read_workflow(path)["nodes"]}
    for node in page.evaluate(GRAPH):
        assert node["known"], f"{node['type']} is missing"
        assert not node["error"]
        if node["type"].startswith("NextStep"):
            values = [value for name, value in node["values"].items() if not name.startswith("$$")]
            assert values == saved[node["id"]], node
    screenshot(page, path.stem)


def test_the_first_run_shows_progress_preview_and_picture_and_comes_back_from_its_png(page, host: ComfyServer) -> None:
    import base64

    open_template(page, FIRST_RUN.stem)
    before = page.evaluate("JSON.stringify(app.graph.serialize().nodes.map(n => [n.type, n.widgets_values]))")
    seen = page.evaluate(RUN)
    assert seen["ended"] == "success"
    assert seen["progress"] >= 16, "one event per token"
    assert seen["previews"] >= 1
    page.wait_for_timeout(1500)
    assert page.evaluate("app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.length") == 1
    screenshot(page, "first-run")
    (saved,) = (host.base / "output").rglob("*.png")
    page.evaluate("app.graph.clear()")
    page.evaluate(DROP, base64.b64encode(saved.read_bytes()).decode())
    page.wait_for_function("app.graph._nodes.length > 0")
    page.wait_for_timeout(500)
    after = page.evaluate("JSON.stringify(app.graph.serialize().nodes.map(n => [n.type, n.widgets_values]))")
    assert without_seed(after) == without_seed(before)


def without_seed(graph: str) -> list:
    """The seed moves on after a run, in the frontend."""
    nodes = json.loads(graph)
    return sorted([kind, values[1:] if kind == "NextStepSampler" else values] for kind, values in nodes)

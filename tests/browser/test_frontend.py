"""The shipped templates in the real frontend, as a user meets them.

Set NEXTSTEP_SCREENSHOTS to a folder to keep the pictures that the README and the help pages show.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from PIL import Image, ImageChops
from ui_workflow import BYPASS, MUTE, node_in, set_widget, small_workflow, with_primitives

from scripts.comfy_server import PACK_NAME, ROOT, ComfyServer
from scripts.workflows import ALL, FIRST_RUN, WITH_EMBEDDED, read_workflow, short_job, to_prompt

GRAPH = """() => app.graph._nodes.map(node => ({
    id: node.id, type: node.type, known: node.type in LiteGraph.registered_node_types, error: Boolean(node.has_errors),
    values: Object.fromEntries((node.widgets ?? []).filter(widget => widget.type !== 'button')
        .map(widget => [widget.name, widget.value])),
}))"""
RUN = """() => new Promise(async done => {
    const seen = {progress: [], previews: 0};
    app.api.addEventListener('progress', e => seen.progress.push([e.detail.value, e.detail.max]));
    for (const name of ['b_preview', 'b_preview_with_metadata']) app.api.addEventListener(name, () => seen.previews++);
    app.api.addEventListener('execution_success', () => done({...seen, ended: 'success'}), {once: true});
    app.api.addEventListener('execution_error', e => done({...seen, ended: e.detail.exception_message}), {once: true});
    await app.queuePrompt(0, 1);
})"""
DROP = """async data => {
    const bytes = Uint8Array.from(atob(data), c => c.charCodeAt(0));
    await app.handleFile(new File([bytes], 'shared.png', {type: 'image/png'}));
}"""

# What a person would find untidy: a node outside the canvas, under the minimap or sticking out of its group, or a wire
# under a node. The frontend's own paths are asked; `inset` leaves a wire the edge of the nodes that it belongs to.
UNTIDY = """() => {
    const area = app.canvas.canvas.getBoundingClientRect(), {scale, offset} = app.canvas.ds, found = [];
    const map = document.querySelector('.litegraph-minimap, [data-testid=minimap-container]')?.getBoundingClientRect();
    const pen = document.createElement('canvas').getContext('2d');
    pen.lineWidth = 3;
    for (const node of app.graph._nodes) {
        const open = !node.flags.collapsed, own = open ? node.size : [node._collapsed_width ?? 80, 0];
        const [x, y, width, height] = [node.pos[0], node.pos[1] - 30, own[0], own[1] + 30];
        const left = area.left + (x + offset[0]) * scale, top = area.top + (y + offset[1]) * scale;
        const right = left + width * scale, bottom = top + height * scale;
        if (left < area.left || top < area.top || right > area.right || bottom > area.bottom)
            found.push(`${node.title} is outside`);
        if (map && right > map.left && bottom > map.top) found.push(`${node.title} is under the minimap`);
        const around = app.graph._groups.some(({_bounding: [gx, gy, gw, gh]}) =>
            x >= gx && y >= gy && x + width <= gx + gw && y + height <= gy + gh);
        if (!around && node.type !== 'MarkdownNote') found.push(`${node.title} sticks out of its group`);
        for (const link of app.canvas.renderedPaths) {
            const ids = link.linkIds ? [...link.linkIds] : [link.id];
            const ends = ids.flatMap(id => [app.graph.getLink(id).origin_id, app.graph.getLink(id).target_id]);
            const inset = ends.includes(node.id) ? 14 : 4, crosses = (a, b) => pen.isPointInStroke(link.path, a, b);
            for (let a = inset; a <= width - inset; a += 2)
                if (crosses(x + a, y + inset) || crosses(x + a, y + height - inset))
                    found.push(`a wire is under ${node.title}`);
            for (let b = inset; b <= height - inset; b += 2)
                if (crosses(x + inset, y + b) || crosses(x + width - inset, y + b))
                    found.push(`a wire is under ${node.title}`);
        }
    }
    if (scale * 14 <= 8) found.push('text is too small to be shown');
    return [...new Set(found)];
}"""
OPEN = "workflow => app.loadGraphData(workflow, true, true, 'test')"
PROMPT = """async () => Object.fromEntries(Object.entries((await app.graphToPrompt()).output).map(
    ([id, node]) => [id, [node.class_type, node.inputs]]))"""
SUBGRAPH = """() => {
    const inside = ['NextStepTextEncode', 'NextStepEmptyLatent', 'NextStepSampler', 'NextStepVAEDecode'];
    const chosen = app.graph._nodes.filter(node => inside.includes(node.type));
    const {subgraph} = app.graph.convertToSubgraph(new Set(chosen));
    for (const [type, name] of [['NextStepSampler', 'seed'], ['NextStepTextEncode', 'prompt']]) {
        const node = subgraph.nodes.find(node => node.type === type);
        const input = node.inputs.find(input => input.name === name);
        subgraph.addInput(name, input.type).connect(input, node);
    }
}"""
SET_OUTSIDE = """values => app.graph._nodes.find(node => node.subgraph).widgets.forEach(
    widget => { widget.value = values[widget.name]; })"""
SET_WIDGETS = """values => app.graph._nodes.flatMap(node => node.widgets ?? []).forEach(
    widget => { widget.value = values[widget.name] ?? widget.value; })"""


def open_template(page, name: str) -> None:
    """Through ComfyUI's own template browser."""
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog").first
    dialog.get_by_text(PACK_NAME, exact=True).first.click()
    heading = dialog.get_by_role("heading", name=name, exact=True)
    dialog.get_by_role("heading").first.wait_for()
    for _ in range(40):  # those further down are added when the end of the list comes into sight
        if heading.count():
            break
        dialog.get_by_role("heading").last.evaluate("element => element.scrollIntoView()")
        page.wait_for_timeout(250)
    heading.click()
    page.wait_for_function("count => app.graph._nodes.length === count", arg=len(read_workflow(path_of(name))["nodes"]))
    page.wait_for_timeout(500)


THUMBNAIL = """name => [...document.querySelectorAll('[role=dialog] img')].some(
    picture => picture.alt === name && picture.naturalWidth === 400)"""


def path_of(name: str) -> Path:
    return next(path for path in ALL if path.stem == name)


def screenshot(page, name: str, fit: bool = True) -> None:
    if folder := os.environ.get("NEXTSTEP_SCREENSHOTS"):
        if fit:
            page.evaluate("app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
            page.evaluate("app.extensionManager.command.execute('Comfy.Canvas.FitView')")
        page.wait_for_timeout(1000)
        clip = {"x": 0, "y": 0, "width": 1760, "height": 920} if fit else None
        page.screenshot(path=Path(folder) / f"{name}.png", clip=clip)


NODE_WIDTH, MARGIN, BADGE = 340, 12, 10  # pixels of a node in its help page, and around it; the badge stands above
ADD_NODE = """([type, width]) => {
    app.graph.clear();
    const node = LiteGraph.createNode(type);
    app.graph.add(node);
    node.setSize([width, node.computeSize()[1]]);
    const [left, top] = [400, 100], title = LiteGraph.NODE_TITLE_HEIGHT;
    Object.assign(app.canvas.ds, {scale: 1, offset: [left, top + title]});
    node.pos = [0, 0];
    app.canvas.setDirty(true, true);
    const canvas = app.canvas.canvas.getBoundingClientRect();
    return {title: node.title, x: canvas.x + left, y: canvas.y + top, height: node.size[1] + title};
}"""


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "web" / "docs").glob("*.md"))])
def test_a_node_is_added_as_its_help_page_shows_it(page, name: str) -> None:
    page.evaluate("app.extensionManager.setting.set('Comfy.Minimap.Visible', false)")
    node = page.evaluate(ADD_NODE, [name, NODE_WIDTH])
    help_page = (ROOT / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert help_page.startswith(f"# {node['title']}\n")
    if folder := os.environ.get("NEXTSTEP_SCREENSHOTS"):
        page.wait_for_timeout(500)
        clip = {"x": node["x"] - MARGIN, "y": node["y"] - MARGIN - BADGE, "width": NODE_WIDTH + 2 * MARGIN}
        page.screenshot(path=Path(folder) / f"{name}.png", clip=clip | {"height": node["height"] + 2 * MARGIN + BADGE})
    page.evaluate("app.graph.clear()")


def test_a_label_says_what_a_widget_is_for_where_its_name_must_stay(page) -> None:
    """A saved workflow holds `positive_suffix`, which a negative prompt has too."""
    page.evaluate(ADD_NODE, ["NextStepTextEncode", NODE_WIDTH])
    widget = "app.graph._nodes[0].widgets.find(widget => widget.name === 'positive_suffix')"
    assert page.evaluate(f"{widget}.label") == "suffix"
    page.evaluate("app.graph.clear()")


def test_the_template_browser_shows_every_thumbnail(page) -> None:
    page.evaluate("app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    dialog = page.get_by_role("dialog").first
    dialog.get_by_text(PACK_NAME, exact=True).first.click()
    cards = dialog.get_by_role("heading", name=re.compile("^NextStep "))
    for _ in range(40):  # those further down are made when the last one comes into sight
        if cards.count() >= len(ALL):
            break
        cards.last.evaluate("element => element.scrollIntoView({block: 'center'})")
        page.wait_for_timeout(250)
    for path in ALL:
        heading = dialog.get_by_role("heading", name=path.stem, exact=True)
        heading.evaluate("element => element.scrollIntoView({block: 'center'})")  # its picture stands above it
        page.wait_for_function(THUMBNAIL, arg=path.stem, timeout=20_000)
    screenshot(page, "templates", fit=False)
    page.keyboard.press("Escape")
    dialog.wait_for(state="hidden")


def run_here(page, host: ComfyServer) -> tuple[dict, Path]:
    """Press Run; (what the frontend heard, the picture that was saved)."""
    before = set((host.base / "output").rglob("*.png"))
    seen = page.evaluate(RUN)
    new = set((host.base / "output").rglob("*.png")) - before
    (saved,) = (path for path in new if path.parent == host.base / "output" / "NextStep")  # a job writes others too
    return seen, saved


SHOWN = (1366, 768), (1600, 900)
THEMES = ("light", "dark")  # to look at; nothing that is asserted depends on them


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_template_runs_as_it_is(page, host: ComfyServer, path: Path) -> None:
    """Opened and run, with nothing typed, nothing missing and nothing red; the first ones fetch their checkpoint."""
    window = page.viewport_size
    for width, height in SHOWN:
        page.set_viewport_size({"width": width, "height": height})
        page.evaluate("app.extensionManager.setting.set('Comfy.Minimap.Visible', true)")
        open_template(page, path.stem)
        page.wait_for_timeout(1000)
        for theme in THEMES if "NEXTSTEP_SCREENSHOTS" in os.environ else ():
            page.evaluate("theme => app.extensionManager.setting.set('Comfy.ColorPalette', theme)", theme)
            screenshot(page, f"{path.stem} {width} {theme}", fit=False)
        assert page.evaluate(UNTIDY) == []
    assert page.get_by_role("dialog").count() == 0, "nothing is missing"
    saved = {str(node["id"]): node.get("widgets_values", []) for node in read_workflow(path)["nodes"]}
    for node in page.evaluate(GRAPH):
        assert node["known"], f"{node['type']} is missing"
        assert not node["error"]
        if node["type"].startswith("NextStep"):
            values = [value for name, value in node["values"].items() if not name.startswith("$$")]
            assert values == saved[str(node["id"])], node
    many = short_job(path)
    page.evaluate(SET_WIDGETS, (many or {"steps": 2}) if path not in WITH_EMBEDDED else {})
    seen, picture = run_here(page, host)
    assert seen["ended"] == "success"
    assert min(Image.open(picture).size) >= (128 if many else 384)
    assert not any(node["error"] for node in page.evaluate(GRAPH)), "no red box"
    page.wait_for_timeout(1500)
    assert page.evaluate(UNTIDY) == [], "also with what the nodes show now"
    page.set_viewport_size(window)
    screenshot(page, f"{path.stem} drawn")


def assert_counted(progress: list[list[int]], tokens: int) -> None:
    """The bar went up to the last token. Newer hosts leave out some events of a quick run."""
    values = [value for value, most in progress if most == tokens]  # other bars belong to other nodes
    assert values == sorted(set(values)) and (values[0], values[-1]) == (1, tokens), progress


def test_the_first_run_shows_progress_preview_and_picture_and_comes_back_from_its_png(page, host: ComfyServer) -> None:
    import base64

    open_template(page, FIRST_RUN.stem)
    before = page.evaluate("JSON.stringify(app.graph.serialize().nodes.map(n => [n.type, n.widgets_values]))")
    seen, saved = run_here(page, host)
    assert seen["ended"] == "success"
    assert_counted(seen["progress"], 16)
    assert seen["previews"] >= 1
    page.wait_for_timeout(1500)
    assert page.evaluate("app.graph._nodes.find(n => n.type === 'SaveImage').imgs?.length") == 1
    screenshot(page, "first-run")
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


def described(prompt: dict) -> dict:
    """A prompt without titles."""
    return {key: [node["class_type"], node["inputs"]] for key, node in prompt.items()}


def muted(title: str, mode: int) -> dict:
    workflow = small_workflow("tiny (embedded)")
    node_in(workflow, title)["mode"] = mode
    return workflow


@pytest.mark.parametrize(
    "workflow",
    [
        with_primitives(small_workflow("tiny (embedded)")),
        muted("Negative prompt", MUTE),
        muted("NextStepSampler", BYPASS),
        muted("NextStepSampler", MUTE),
    ],
    ids=["primitives", "muted prompt", "bypassed sampler", "muted sampler"],
)
def test_the_frontend_queues_what_the_host_tests_run(page, host: ComfyServer, workflow: dict) -> None:
    page.evaluate(OPEN, workflow)
    assert page.evaluate(PROMPT) == described(to_prompt(workflow, host.call("/object_info")))


def test_primitive_nodes_reach_the_run(page, host: ComfyServer) -> None:
    page.evaluate(OPEN, with_primitives(small_workflow("tiny (embedded)")))
    page.evaluate("app.graph._nodes.find(node => node.type === 'PrimitiveNode').widgets[0].value = 22")
    seen, saved = run_here(page, host)
    assert seen["ended"] == "success"
    sampler = next(
        n for n in json.loads(Image.open(saved).text["prompt"]).values() if n["class_type"] == "NextStepSampler"
    )
    assert sampler["inputs"]["seed"] == 22


def test_our_nodes_work_inside_a_subgraph(page, host: ComfyServer) -> None:
    """With two of their widgets shown outside, as a user makes it; the workflow comes back from its file."""
    flat = small_workflow("tiny (embedded)")
    page.evaluate(OPEN, flat)
    page.evaluate(SUBGRAPH)
    page.evaluate(SET_OUTSIDE, {"seed": 77, "prompt": "a red circle"})
    saved = page.evaluate("JSON.parse(JSON.stringify(app.graph.serialize()))")
    assert [node["type"] for node in saved["definitions"]["subgraphs"][0]["nodes"]].count("NextStepSampler") == 1
    page.evaluate("app.graph.clear()")
    page.evaluate(OPEN, saved)
    assert page.evaluate(PROMPT) == described(to_prompt(saved, host.call("/object_info")))
    screenshot(page, "subgraph")
    seen, inside = run_here(page, host)
    assert seen["ended"] == "success"
    assert_counted(seen["progress"], 24)
    set_widget(flat, "NextStepSampler", "seed", 77)
    set_widget(flat, "Positive prompt", "prompt", "a red circle")
    (outside,) = host.images(host.run(to_prompt(flat, host.call("/object_info"))))
    assert ImageChops.difference(Image.open(inside), Image.open(outside)).getbbox() is None

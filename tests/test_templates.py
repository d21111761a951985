"""The shipped workflows as files: what they ask for, where their nodes and wires lie, and what app mode shows."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest

from scripts import templates
from scripts.workflows import ALL, WITH_EMBEDDED, read_workflow

ROOT = Path(__file__).resolve().parent.parent
TITLE = 30  # what a node has above its position
SLOT = 20
FETCHED = ("NextStep-1.1 (downloads 29 GB)", "NextStep-1-Large-Edit (downloads 29 GB)")

Point = tuple[float, float]
every_template = pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)


def box(node: dict) -> tuple[float, float, float, float]:
    (left, top), (width, height) = node["pos"], node["size"]
    height = 0 if node["flags"].get("collapsed") else height
    return left, top - TITLE, left + width, top + height


def bezier(*points: Point) -> list[Point]:
    """Places along a curve with two control points."""
    steps = [n / 60 for n in range(61)]
    weights = [((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3) for t in steps]
    xs, ys = zip(*points)
    return [(sum(w * x for w, x in zip(each, xs)), sum(w * y for w, y in zip(each, ys))) for each in weights]


def drawn(points: list[Point]) -> list[Point]:
    """Places along a wire with bends as the frontend draws it, which leaves and enters a node level: the further away
    the next point is, the longer."""
    out = []
    for n, (start, end) in enumerate(itertools.pairwise(points)):
        away = 0.25 * math.dist(start, end)
        leaving = (start[0] + away, start[1]) if n == 0 else start
        entering = (end[0] - away, end[1]) if n == len(points) - 2 else end
        out += bezier(start, leaving, entering, end)
    return out


def wires(workflow: dict) -> list[tuple[int, int, list[Point]]]:
    """(id of the node at its start, id at its end, places along it) of every wire."""
    nodes = {node["id"]: node for node in workflow["nodes"]}
    bends = {link: [] for link, *_ in workflow["links"]}
    for reroute in workflow["extra"]["reroutes"]:
        for link in reroute["linkIds"]:
            bends[link].append(tuple(reroute["pos"]))
    found = []
    for link, source, output, target, slot, _ in workflow["links"]:
        start, end = nodes[source], nodes[target]
        entry = end["inputs"][slot]
        sockets = [each for each in end["inputs"] if "widget" not in each]
        if entry in sockets:
            down = SLOT * (sockets.index(entry) + 0.7)
        else:  # somewhere among the widgets
            down = end["size"][1] / 2
        ends = (
            (start["pos"][0] + start["size"][0], start["pos"][1] + SLOT * (output + 0.7)),
            (end["pos"][0], end["pos"][1] + down),
        )
        found.append((source, target, drawn([ends[0], *bends[link], ends[1]])))
    return found


@every_template
def test_nodes_do_not_overlap_and_no_wire_goes_under_one(path: Path) -> None:
    workflow = read_workflow(path)
    boxes = {node["id"]: box(node) for node in workflow["nodes"]}
    for (a, first), (b, second) in itertools.combinations(boxes.items(), 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, (a, b)
    for source, target, places in wires(workflow):
        for node, (left, top, right, bottom) in boxes.items():
            if node not in (source, target):
                assert not [p for p in places if left < p[0] < right and top < p[1] < bottom], (source, target, node)


@every_template
def test_a_person_finds_the_way(path: Path) -> None:
    """The note at the top left, with itself in other languages below it, every other node in a colored group, positive
    and negative told apart."""
    workflow = read_workflow(path)
    note, languages = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    assert note["title"] == "Read me" and note["pos"][0] == min(node["pos"][0] for node in workflow["nodes"])
    beside = sorted((node["pos"][1], node["id"]) for node in workflow["nodes"] if node["pos"][0] == note["pos"][0])
    assert [number for _, number in beside][:2] == [note["id"], languages["id"]]
    assert languages["title"] == "한국어 · 中文 · 日本語" and languages["flags"] == {"collapsed": True}
    frames = [group["bounding"] for group in workflow["groups"]]
    whole_job = any(node["type"] == "NextStepBatchStudio" for node in workflow["nodes"])  # prompts and all
    wanted = {"Model", "Draw", "Result"} if whole_job else {"Model", "Prompt", "Draw", "Result"}
    assert wanted <= {group["title"] for group in workflow["groups"]}
    assert all(group["color"].startswith("#") for group in workflow["groups"])
    for node in workflow["nodes"]:
        left, top, right, bottom = box(node)
        around = [f for f in frames if f[0] <= left and f[1] <= top and right <= f[0] + f[2] and bottom <= f[1] + f[3]]
        assert len(around) == (node["type"] != "MarkdownNote"), node
    if whole_job:
        return
    colors = {node.get("title"): node.get("color") for node in workflow["nodes"]}
    first = next(title for title in ("Positive prompt", "What to change", "Prompt 1") if title in colors)
    assert None not in (colors[first], colors["Negative prompt"]) and colors[first] != colors["Negative prompt"]


@every_template
def test_everything_is_seen_in_a_small_window(path: Path) -> None:
    """1366x768 in frontend 1.27.10, whose canvas begins beside its menus: at (40, 40), or (64, 78) with large ones."""
    workflow = read_workflow(path)
    view = workflow["extra"]["ds"]
    assert view["scale"] * 14 > 8, "text smaller than 8 pixels is not shown"
    for x, y in ((40, 40), (64, 78)):
        for node in workflow["nodes"]:
            places = ((v + view["offset"][n % 2]) * view["scale"] for n, v in enumerate(box(node)))
            left, top, right, bottom = (place + (x, y)[n % 2] for n, place in enumerate(places))
            assert left >= 65 and top >= 80 and right <= 1366 and bottom <= 768, node["type"]
            assert right <= 1072 or bottom <= 502, f"{node['type']} lies under the minimap"


@every_template
def test_it_names_a_published_checkpoint_and_no_address(path: Path) -> None:
    workflow = read_workflow(path)
    (loader,) = (node for node in workflow["nodes"] if node["type"] == "NextStepModelLoader")
    note, languages = (node for node in workflow["nodes"] if node["type"] == "MarkdownNote")
    name, _, quantization, *_ = loader["widgets_values"]
    assert quantization == "auto"
    if path in WITH_EMBEDDED:
        assert name == "tiny (embedded)"
    else:
        assert name in FETCHED
        assert "29 GB" in loader["title"] and f"first Run downloads {name.split()[0]} (29 GB)" in " ".join(
            note["widgets_values"][0].split()
        )
        assert languages["widgets_values"][0].count(f"{name.split()[0]}") == languages["widgets_values"][0].count(
            "29 GB"
        )
    assert "://" not in path.read_text() and '"models"' not in path.read_text()
    pictures = [node["widgets_values"][0] for node in workflow["nodes"] if node["type"] == "LoadImage"]
    assert all((ROOT / "example_pictures" / picture).is_file() for picture in pictures)


def test_a_preview_that_comes_late_lands_on_its_like() -> None:
    """Previews name their node by its id alone, whichever template is open."""
    types: dict[int, set[str]] = {}
    for path in ALL:
        for node in read_workflow(path)["nodes"]:
            types.setdefault(node["id"], set()).add(node["type"].removeprefix("NextStep").removesuffix("Tiled"))
    assert [kinds for kinds in types.values() if "Sampler" in kinds] == [{"Sampler"}]
    assert all(len(kinds) == 1 for kinds in types.values()), types


@every_template
def test_app_mode_shows_widgets_that_are_there(path: Path) -> None:
    workflow = read_workflow(path)
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    shown = workflow["extra"]["linearData"]
    assert shown["inputs"] and [nodes[node]["type"] for node in shown["outputs"]] == ["SaveImage"]
    for node, widget in shown["inputs"]:
        (entry,) = (entry for entry in nodes[node]["inputs"] if entry["name"] == widget)
        assert entry["widget"] == {"name": widget} and entry["link"] is None


def test_the_files_are_those_that_the_script_writes() -> None:
    made = {template.name: templates.workflow(template) for template in (make() for make in templates.TEMPLATES)}
    assert made == {path.stem: read_workflow(path) for path in ALL}


def test_nobody_is_sent_to_an_address_that_does_not_exist() -> None:
    placeholder = "your" + "-name"
    files = [*ROOT.glob("example_workflows/*.json"), *ROOT.glob("subgraphs/*.json"), ROOT / "README.md"]
    for folder in ("nodes", "nextstep_core", "scripts", "tests", "benchmarks", "training"):
        files += (ROOT / folder).rglob("*.py")
    assert not [path for path in files if placeholder in path.read_text(encoding="utf-8")]
    assert json.loads(files[0].read_text())

"""The subgraph blueprints: what the templates do, as single boxes that newer versions of ComfyUI list among the nodes.

`python -m scripts.templates` writes them into `subgraphs/`. A host that knows no blueprints leaves that folder alone.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from scripts import templates
from scripts.templates import Node, Template, Wires, group, lay_out, number, written

INSIDE, OUTSIDE = -10, -20  # the ids of a subgraph's own ends
WIDTH, HEIGHT = 400, 420


@dataclass
class Blueprint:
    """A subgraph: its nodes in columns; what it takes, as name -> (part, input); the part whose picture it gives."""

    name: str
    description: str
    nodes: Template
    takes: dict[str, tuple[str, str]]
    gives: str


def identity(*names: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, "/".join(("nextstep", "subgraphs", *names))))


def value_of(node: Node, widget: str) -> Any:
    """What a widget starts with."""
    values = list(node.values)
    for name, kind in node.inputs():
        if kind in templates.WIDGETS:
            value = values.pop(0)
            if name == widget:
                return value
            if name == "seed":
                values.pop(0)  # what happens to the seed after a run
    raise KeyError(widget)


def definition(blueprint: Blueprint) -> dict[str, Any]:
    """The subgraph itself."""
    groups, columns = lay_out(blueprint.nodes)
    parts = {node.part: node for node in blueprint.nodes.nodes()}
    nodes = {part: written(node, order) for order, (part, node) in enumerate(parts.items())}
    wires = Wires(blueprint.nodes, nodes, columns)
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    links = [dict(zip(names, link)) for link in wires.links]
    inputs = []
    for slot, (name, (part, widget)) in enumerate(blueprint.takes.items()):
        at = next(n for n, entry in enumerate(nodes[part]["inputs"]) if entry["name"] == widget)
        entry = nodes[part]["inputs"][at]
        entry["link"] = len(links) + 1
        links.append(dict(zip(names, (entry["link"], INSIDE, slot, nodes[part]["id"], at, entry["type"]))))
        inputs.append(
            {
                "id": identity(blueprint.name, "in", name), "name": name, "type": entry["type"],
                "linkIds": [entry["link"]], "pos": [-120, 60 + 20 * slot],
            }
        )  # fmt: skip
    last = len(links) + 1
    links.append(dict(zip(names, (last, number(blueprint.gives), 0, OUTSIDE, 0, "IMAGE"))))
    nodes[blueprint.gives]["outputs"][0]["links"].append(last)
    right = max(node["pos"][0] + node["size"][0] for node in nodes.values())
    return {
        "id": identity(blueprint.name),
        "version": 1,
        "state": {
            "lastGroupId": len(groups), "lastNodeId": len(templates.PARTS), "lastLinkId": last, "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "inputNode": {"id": INSIDE, "bounding": [-280, 40, 160, 40 + 20 * len(inputs)]},
        "outputNode": {"id": OUTSIDE, "bounding": [right + 100, 40, 120, 60]},
        "inputs": inputs,
        "outputs": [
            {"id": identity(blueprint.name, "out"), "name": "image", "type": "IMAGE", "linkIds": [last],
             "pos": [right + 120, 60]}
        ],
        "widgets": [],
        "nodes": list(nodes.values()),
        "groups": groups,
        "links": links,
        "extra": {},
        "category": "NextStep",
        "description": blueprint.description,
    }  # fmt: skip


def workflow(blueprint: Blueprint) -> dict[str, Any]:
    """The blueprint's file: one node, of the type that the subgraph is."""
    subgraph = definition(blueprint)
    parts = {node.part: node for node in blueprint.nodes.nodes()}
    inputs, shown, values = [], [], []
    for entry in subgraph["inputs"]:
        part, widget = blueprint.takes[entry["name"]]
        inputs.append({"name": entry["name"], "type": entry["type"], "link": None})
        if entry["type"] in templates.WIDGETS:
            inputs[-1]["widget"] = {"name": entry["name"]}
            shown.append(["-1", entry["name"]])
            values.append(value_of(parts[part], widget))
    box = {
        "id": 1, "type": subgraph["id"], "pos": [0, 0], "size": [WIDTH, HEIGHT], "flags": {}, "order": 0, "mode": 0,
        "inputs": inputs, "outputs": [{"name": "image", "type": "IMAGE", "links": []}],
        "properties": {"proxyWidgets": shown, "cnr_id": templates.PACK, "ver": templates.VERSION},
        "widgets_values": values,
    }  # fmt: skip
    return {
        "id": identity(blueprint.name, "file"),
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [box],
        "links": [],
        "groups": [],
        "definitions": {"subgraphs": [subgraph]},
        "config": {},
        "extra": {},
        "version": 0.4,
    }


MODEL_AND_SEED = {"seed": ("sampler", "seed"), "model": ("model", "model_name")}


def text_to_image() -> Blueprint:
    model, prompts = group("Model", templates.loader()), group("Prompt", templates.positive(""), templates.negative())
    columns = [
        [model],
        [prompts, group("Picture", templates.size())],
        [group("Draw", templates.sampler())],
        [group("Result", templates.decode())],
    ]
    takes = {
        "prompt": ("positive", "prompt"), "negative_prompt": ("negative", "prompt"), "width": ("size", "width"),
        "height": ("size", "height"), "batch_size": ("size", "batch_size"), **MODEL_AND_SEED,
    }  # fmt: skip
    told = "Draws a picture from a prompt with NextStep-1.1."
    return Blueprint("Text to Image (NextStep)", told, Template("", columns, []), takes, "decode")


def image_edit() -> Blueprint:
    change = templates.change()
    del change.links["image"]
    columns = [
        [group("Model", templates.loader(templates.EDITING))],
        [group("Prompt", change, templates.negative("Copy original image."))],
        [group("Draw", templates.sampler(("edit", 1), "edit", steps=50, shift=3.2))],
        [group("Result", templates.decode())],
    ]
    takes = {
        "image": ("edit", "image"), "instruction": ("edit", "instruction"), "cfg_img": ("sampler", "cfg_img"),
        **MODEL_AND_SEED,
    }  # fmt: skip
    told = "Changes a picture by an instruction with NextStep-1-Large-Edit."
    return Blueprint("Image Edit (NextStep)", told, Template("", columns, []), takes, "decode")


def inpaint() -> Blueprint:
    prepare = templates.prepare("load", "around the mask")
    del prepare.links["image"], prepare.links["mask"]
    columns = [
        [group("Model", templates.loader())],
        [group("Prompt", templates.positive(""), templates.negative()), group("Picture", prepare)],
        [group("Draw", templates.sampler(("prepare", 6)))],
        [group("Result", templates.decode(), templates.paste())],
    ]
    takes = {
        "image": ("prepare", "image"), "mask": ("prepare", "mask"), "prompt": ("positive", "prompt"),
        "negative_prompt": ("negative", "prompt"), "margin": ("prepare", "margin"), **MODEL_AND_SEED,
    }  # fmt: skip
    told = "Draws what is masked anew, from it and its surroundings alone, and puts it back into the picture."
    return Blueprint("Inpaint around the Mask (NextStep)", told, Template("", columns, []), takes, "paste")


BLUEPRINTS = text_to_image, image_edit, inpaint

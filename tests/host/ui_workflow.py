"""Changes to a saved workflow that a user makes in the frontend, made in its file."""

from __future__ import annotations

from typing import Any

from scripts.workflows import TEXT_TO_IMAGE, read_workflow

MUTE, BYPASS = 2, 4


def node_in(workflow: dict, title: str) -> dict:
    """The node with this title, or the first of this type."""
    return next(node for node in workflow["nodes"] if title in (node.get("title"), node["type"]))


def set_widget(workflow: dict, title: str, name: str, value: Any) -> None:
    """Give a widget another value."""
    node = node_in(workflow, title)
    names = [socket["name"] for socket in node["inputs"] if "widget" in socket]
    if "seed" in names:
        names.insert(names.index("seed") + 1, "what happens to the seed after a run")
    node["widgets_values"][names.index(name)] = value


def feed(workflow: dict, title: str, input_name: str, type_: str, feeder: str, *values: Any) -> None:
    """Turn a widget into an input, and connect a new node of the type `feeder` with these widget values to it."""
    target = node_in(workflow, title)
    slot, socket = next((n, i) for n, i in enumerate(target["inputs"]) if i["name"] == input_name)
    workflow["last_node_id"] += 1
    workflow["last_link_id"] += 1
    new, link = workflow["last_node_id"], workflow["last_link_id"]
    socket["link"] = link
    workflow["links"].append([link, new, 0, target["id"], slot, type_])
    output = {"name": type_, "type": type_, "links": [link]}
    own = []
    if feeder == "PrimitiveNode":  # exists in the frontend alone, which writes its value into the other node's widget
        output["widget"] = {"name": input_name}
        set_widget(workflow, title, input_name, values[0])
    else:
        own = [{"name": "value", "type": type_, "widget": {"name": "value"}, "link": None}]
    workflow["nodes"].append(
        {
            "id": new, "type": feeder, "pos": [40, 600 + 120 * new], "size": [270, 82], "flags": {}, "order": 0,
            "mode": 0, "inputs": own, "outputs": [output], "properties": {}, "widgets_values": list(values),
        }
    )  # fmt: skip


def small_workflow(model: str) -> dict:
    """The text-to-image workflow on a checkpoint, quick to run."""
    workflow = read_workflow(TEXT_TO_IMAGE)
    set_widget(workflow, "NextStepModelLoader", "model_name", model)
    set_widget(workflow, "NextStepEmptyLatent", "width", 96)
    set_widget(workflow, "NextStepEmptyLatent", "height", 64)
    set_widget(workflow, "NextStepSampler", "steps", 4)
    return workflow


def with_primitives(workflow: dict) -> dict:
    """Seed, steps and prompt from other nodes, of the frontend's own kind and of the core's."""
    feed(workflow, "NextStepSampler", "seed", "INT", "PrimitiveNode", 21, "fixed")
    feed(workflow, "NextStepSampler", "steps", "INT", "PrimitiveInt", 5, "fixed")
    feed(workflow, "Positive prompt", "prompt", "STRING", "PrimitiveNode", "A blue boat.")
    feed(workflow, "Negative prompt", "prompt", "STRING", "PrimitiveStringMultiline", "blurry")
    return workflow

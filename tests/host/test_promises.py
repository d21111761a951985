"""Saved workflows are promises: ids, input names, their order and types stay as they were released.

`released_nodes.json` holds every node that was ever released. A node may gain optional inputs at its end and further
outputs at its end; anything else breaks workflows that people saved, and needs a migration that this file then states.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_graph import ComfyGraph

from scripts.comfy_server import ROOT

RELEASED = json.loads((Path(__file__).parent / "released_nodes.json").read_text())


def describe(schema) -> dict[str, list[list]]:
    """What a saved workflow relies on: [id, type, whether it may be left open] and [id, type]."""
    return {
        "inputs": [[i.id, i.io_type, bool(i.optional)] for i in schema.inputs],
        "outputs": [[o.id, o.io_type] for o in schema.outputs],
    }


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_node_keeps_its_promise(graph: ComfyGraph, name: str) -> None:
    assert name in graph.nodes.NODE_CLASS_MAPPINGS, f"{name} was released and is gone"
    now, then = describe(graph.nodes.NODE_CLASS_MAPPINGS[name].define_schema()), RELEASED[name]
    assert now["inputs"][: len(then["inputs"])] == then["inputs"]
    assert all(optional for _, _, optional in now["inputs"][len(then["inputs"]) :]), "a new input must be optional"
    assert now["outputs"][: len(then["outputs"])] == then["outputs"]


def test_every_node_is_on_record(graph: ComfyGraph) -> None:
    ours = {name for name in graph.nodes.NODE_CLASS_MAPPINGS if name.startswith("NextStep")}
    assert ours == set(RELEASED), "put a new node into released_nodes.json"


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_every_translation_names_every_node_input_and_output(graph: ComfyGraph, language: str) -> None:
    texts = json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))
    assert set(texts) == set(RELEASED)
    for name, text in texts.items():
        schema = graph.nodes.NODE_CLASS_MAPPINGS[name].define_schema()
        assert set(text["inputs"]) == {i.id for i in schema.inputs}, name
        assert set(text["outputs"]) == {str(n) for n in range(len(schema.outputs))}, name
        parts = [text, *text["inputs"].values(), *text["outputs"].values()]
        assert all(part.get("name", part.get("display_name")) for part in parts)
        assert all(part.get("tooltip", part.get("description")) for part in parts)

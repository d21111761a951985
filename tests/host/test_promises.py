"""Saved workflows are promises: ids, input names, order, types, choices and defaults stay as they were released.

`released_nodes.json` holds every node that was ever released. A node may gain optional inputs at its end and further
outputs at its end, and a dropdown further choices; anything else breaks workflows that people saved, and needs a
migration that this file then states.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from comfy_graph import ComfyGraph

from scripts.comfy_server import ROOT

RELEASED = json.loads((Path(__file__).parent / "released_nodes.json").read_text())


FILES_ON_DISK = {"model_name", "vae_name", "lora_name"}  # dropdowns whose choices differ from machine to machine


def describe(schema) -> dict[str, list[dict]]:
    """What a saved workflow relies on, as the record holds it: of an input also its default and its choices."""
    inputs = []
    for i in schema.inputs:
        described = {"id": i.id, "type": i.io_type, "optional": bool(i.optional)}
        if i.id not in FILES_ON_DISK:
            described |= {key: getattr(i, name, None) for key, name in (("default", "default"), ("choices", "options"))}
        inputs.append({key: value for key, value in described.items() if value is not None})
    return {"inputs": inputs, "outputs": [{"id": o.id, "type": o.io_type} for o in schema.outputs]}


def broken_promises(now: dict[str, list[dict]], then: dict[str, list[dict]]) -> list[str]:
    """What of a released node is not as it was; empty where every workflow that was saved with it still works."""
    problems = []
    for kind in ("inputs", "outputs"):
        for n, released in enumerate(then[kind]):
            present = now[kind][n] if n < len(now[kind]) else {}
            choices, offered = released.get("choices", []), present.get("choices") or []
            # New choices may come among the old ones, which are saved by value. The first is the default without one.
            kept = [choice for choice in offered if choice in choices]
            if choices and (kept != choices or offered[0] != choices[0]):
                problems.append(f"{released['id']}: the choices {choices} are now {offered}")
            elif present | {"choices": choices} != released | {"choices": choices}:
                problems.append(f"{released} is now {present}")
    new = now["inputs"][len(then["inputs"]) :]
    return [*problems, *(f"{added['id']} is new and must be optional" for added in new if not added["optional"])]


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_node_keeps_its_promise(graph: ComfyGraph, name: str) -> None:
    assert name in graph.nodes.NODE_CLASS_MAPPINGS, f"{name} was released and is gone"
    now = describe(graph.nodes.NODE_CLASS_MAPPINGS[name].define_schema())
    assert not broken_promises(now, RELEASED[name])


@pytest.mark.parametrize(
    ("default", "choices", "kept"),
    [
        ("b", ["a", "b"], True),
        ("b", ["a", "new", "b", "last"], True),
        ("a", ["a", "b"], False),
        (None, ["a", "b"], False),
        ("b", ["b", "a"], False),
        ("b", ["new", "a", "b"], False),
        ("b", ["b"], False),
        ("b", None, False),
    ],
)
def test_a_dropdown_may_only_gain_choices(default: str | None, choices: list[str] | None, kept: bool) -> None:
    def node(**widget) -> dict[str, list[dict]]:
        return {"inputs": [{"id": "x", "type": "COMBO", "optional": False, **widget}], "outputs": []}

    now = node(default=default, choices=choices)
    assert (not broken_promises(now, node(default="b", choices=["a", "b"]))) == kept


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

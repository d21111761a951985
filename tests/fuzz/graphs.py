"""The shipped workflows with inputs that no widget gives and links that no user draws, posted to a real ComfyUI.

    COMFYUI_PATH=... python -m tests.fuzz.graphs --cases 500 --seed 1

Unlike the other kinds this one needs a host, and its cases share one server, since what is to be shown is that the
server goes on. A graph may be refused by the host, end in our own error or in one of the host's own nodes, run to its
end, or still run when it is interrupted, which it must then be within seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import websocket
from PIL import Image

from scripts.comfy_server import NO_HOST, ComfyServer, find_comfyui, make_base, running_server
from scripts.workflows import ALL, FIRST_RUN, ON_EMBEDDED, read_workflow, short_job, to_prompt

from .case import name_of
from .outcome import BAD, DEATH, FINE, HANG, OWN, RAW, Outcome
from .report import finding, table

SMALL = {"width": 64, "height": 48, "steps": 2, "cfg": 2.0, "base": "256"}
PATIENCE = 6.0  # seconds until a run is interrupted
GRACE = 30.0  # seconds in which it has to end then; other work of the computer counts too
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 17, 48, 64, 4096, 10**6, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, 1.0,
    1e-30, 1e30, 1e308, float("nan"), float("inf"), float("-inf"), "", "x", "4", "1e3", "nan", "5" * 5000,
    "x" * 100_000, " " * 1_000_000, "\ud800", "\0", "\n", "<image>", "<image>" * 50, "auto", "../../etc/passwd",
    "%date%", [], [1], [None, None], ["nowhere", 0], [[], 0], [{}, 0], ["1", 99], ["1", -1], ["1", "0"], {}, {"a": 1},
    {"samples": None}, {"__value__": []}, {"__value__": ["1", 0]}, {"__value__": {"__value__": 5}}, {"content": "x"},
)  # fmt: skip
# What uses the network: a node, and some choices of two inputs.
AWAY, FETCHING = ("NextStepDownload",), ("model_name", "vae_name")


def good_graphs(object_info: dict) -> list[dict]:
    """The shipped workflows in API form on the embedded model, small and quick, and one with nodes that none of them
    has."""
    shipped = [
        to_prompt(read_workflow(path), object_info, **SMALL | ON_EMBEDDED | short_job(path), image="example.png")
        for path in ALL
    ]
    return [*shipped, _with_the_others(shipped[ALL.index(FIRST_RUN)])]


def _with_the_others(graph: dict) -> dict:
    graph = deepcopy(graph)
    decode = next(node["inputs"] for node in graph.values() if node["class_type"] == "NextStepVAEDecode")
    sampler = graph[decode["samples"][0]]["inputs"]
    model, info = sampler["model"], [decode["samples"][0], 1]
    frames = decode | {"frames": 3, "hold": 1, "longest_side": 64}
    saving = {"image": ["frames", 0], "filename_prefix": "x", "format": "png", "quality": 90, "info": info}
    added = {
        "preset": ("NextStepPreset", {"model": model, "preset": "draft"}),
        "card": ("NextStepModelInfo", {"model": model, "width": 64, "height": 48}),
        "frames": ("NextStepDrawingFrames", frames),
        "saved": ("NextStepSaveImage", saving),
    }
    sampler["cfg"] = ["preset", 3]
    return graph | {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in added.items()}


def mutated(graph: dict, object_info: dict, rng: Random) -> tuple[str, dict]:
    """(what was done, the graph after it), with one of the nodes of ours at least where it was done."""
    graph, done = deepcopy(graph), []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node_id = rng.choice(sorted(graph))
        if not graph[node_id]["class_type"].startswith("NextStep"):  # ours first: the others are not to be tested
            node_id = rng.choice(sorted(graph))
        done.append(f"{graph[node_id]['class_type']}: {_changed(graph, node_id, object_info, rng)}")
    return "; ".join(done), graph


def _changed(graph: dict, node_id: str, object_info: dict, rng: Random) -> str:
    inputs, kind = graph[node_id]["inputs"], graph[node_id]["class_type"]
    known = [n for need in object_info.get(kind, {}).get("input", {}).values() for n in need]
    name, way = rng.choice(known or ["x"]), rng.random()
    if way < 0.5:
        inputs[name] = rng.choice(VALUES)
        return f"{name} = {str(inputs[name])[:60]!r}" if not isinstance(inputs[name], int) else f"{name}, a number"
    if way < 0.62:
        inputs[name] = rng.choice(_edges(object_info[kind]["input"], name)) if kind in object_info else 0
        return f"{name} = {inputs[name]!r}"
    if way < 0.82:
        other = rng.choice(sorted(graph))
        inputs[name] = [other, rng.choice((0, 0, 1))]
        return f"{name} from {graph[other]['class_type']}"
    if way < 0.88:
        inputs.pop(name, None)
        return f"no {name}"
    if way < 0.92:
        inputs[rng.choice(("x", "", "\ud800", "a" * 1000, "hidden", "unique_id"))] = rng.choice(VALUES)
        return "an input too many"
    if way < 0.96:
        graph[node_id]["class_type"] = rng.choice(
            [k for k in object_info if k.startswith("NextStep") and k not in AWAY]
        )
        return f"is a {graph[node_id]['class_type']}"
    graph[node_id]["inputs"] = rng.choice((inputs, {}))
    graph[rng.choice(("again", "", "\ud800", "9" * 500))] = deepcopy(graph[node_id])
    return "twice"


def _edges(inputs: dict, name: str) -> list[Any]:
    """The ends of an input's range and what lies around them, or its choices."""
    stated = next((need[name] for need in inputs.values() if name in need), [None])
    options = stated[1] if len(stated) > 1 and isinstance(stated[1], dict) else {}
    ends = [options[end] for end in ("min", "max", "default") if isinstance(options.get(end), (int, float))]
    if name in FETCHING:
        return [0]
    choices = stated[0] if isinstance(stated[0], list) else options.get("options", [])
    return [*ends, *(end + by for end in ends for by in (1, -1, 0.5)), *choices[:20]] or [0]


def ending(server: ComfyServer, graph: dict) -> tuple[str, str]:
    """(outcome, detail) of a graph that is posted."""
    channel = websocket.create_connection(f"ws://127.0.0.1:{server.port}/ws?clientId=fuzz", timeout=PATIENCE)
    try:
        answer = server.queue(graph, "fuzz")
        if "prompt_id" not in answer:
            return OWN, json.dumps(answer)
        return _wait(server, channel, answer["prompt_id"])
    finally:
        channel.close()


def _wait(server: ComfyServer, channel: websocket.WebSocket, prompt_id: str) -> tuple[str, str]:
    interrupted, late = False, time.monotonic() + PATIENCE
    while True:
        channel.settimeout(max(0.01, late - time.monotonic()))
        try:
            message = channel.recv()
        except (TimeoutError, websocket.WebSocketTimeoutException):
            if interrupted:
                return HANG, f"still running {GRACE:g} s after an interrupt"
            server.call("/interrupt", {})
            interrupted, late = True, time.monotonic() + GRACE
            continue
        event = json.loads(message) if isinstance(message, str) else {"type": "", "data": {}}
        if event["data"].get("prompt_id") != prompt_id:
            continue
        if event["type"] in ("execution_success", "execution_interrupted"):
            return FINE, event["type"]
        if event["type"] == "execution_error":
            return _of_error(event["data"])


def _of_error(data: dict) -> tuple[str, str]:
    said = str(data["exception_message"])
    if data["exception_type"].endswith("NextStepError"):
        return (OWN, said) if len(said) < 1500 else (RAW, f"our own error, but {len(said)} characters: {said[:1000]}")
    if not data["node_type"].startswith("NextStep"):
        return OWN, f"the host's own {data['node_type']}: {said}"
    if "execute() got an unexpected keyword argument" in said:
        return OWN, f"the host's own: it hands a node of any pack what is linked to no input of it: {said}"
    return RAW, "".join(data["traceback"]) + f"{data['exception_type']}: {said}"


def outcomes(server: ComfyServer, seed: int, numbers: range) -> Iterator[Outcome]:
    """The cases of these numbers, in turn, and a good graph after the last; a dead server ends them."""
    object_info = server.call("/object_info")
    good = good_graphs(object_info)
    for number in numbers:
        name = name_of("graphs", seed, number)
        rng, started = Random(name), time.monotonic()
        what, graph = mutated(rng.choice(good), object_info, rng)
        try:
            kind, detail = ending(server, graph)
        except (OSError, websocket.WebSocketException) as error:
            yield Outcome(name, DEATH, what, f"{error!r}\n{server.said()[-2000:]}", time.monotonic() - started)
            return
        except json.JSONDecodeError as error:  # the host could not even say what is wrong with it
            kind, detail = OWN, f"the host's own: {error}"
        yield Outcome(name, kind, what, detail, time.monotonic() - started)
    for graph in good:
        run = server.run(graph)
        if run.ended != "execution_success":
            yield Outcome(
                name_of("graphs", seed, numbers.stop),
                DEATH,
                "a good graph afterwards",
                str(run.events[-1][1].get("exception_message")),
            )


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz.graphs", description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    options = parser.parse_args()
    comfyui = find_comfyui()
    if comfyui is None:
        parser.error(NO_HOST)
    ended = []
    with tempfile.TemporaryDirectory() as folder:
        base = make_base(Path(folder) / "comfy")
        picture = Image.new("RGBA", (64, 64), (32, 80, 224, 255))
        picture.paste((32, 80, 224, 0), (32, 32, 64, 64))  # what is clear there is the mask
        picture.save(base / "input" / "example.png")
        with running_server(comfyui, base) as server:
            for outcome in outcomes(server, options.seed, range(options.start, options.start + options.cases)):
                ended.append(outcome)
                if outcome.kind in BAD:
                    print(finding(outcome), flush=True)
    print(table(ended))
    return int(any(outcome.kind in BAD for outcome in ended))


if __name__ == "__main__":
    sys.exit(main())

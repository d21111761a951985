"""A graph's prompts on a Ray cluster of this machine, in the host."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from comfy_graph import ComfyGraph, node
from PIL import Image

from scripts.comfy_server import ComfyServer

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
WIDGETS = {
    "prompts": "a red circle\na blue square",
    "model_name": "tiny (embedded)",
    "cluster": "this machine",
    "workers": 2,
    "size": "32",
    "seeds": "1, 2",
    "together": 1,
    "quantization": "none",
    "dtype": "fp32",
}


def away(**widgets: object) -> dict:
    """A graph of the node and of what shows its pictures."""
    return {
        "cluster": node("NextStepCluster", **(WIDGETS | widgets)),
        "save": node("PreviewImage", images=["cluster", 0]),
    }


@needs_ray
def test_prompts_come_back_as_pictures_and_what_is_there_is_kept(graph: ComfyGraph) -> None:
    lists = {"list": node("NextStepPromptList", prompts="a red circle\na blue square", file="the text below")}
    prompt = lists | away(prompts=["list", 0], negative_prompt=["list", 1], folder="cluster/first")
    assert len(graph.saved(graph.run(prompt))) == 4
    folder = graph.base / "output" / "cluster" / "first"
    files = sorted(folder.glob("*.png"))
    assert [file.name for file in files] == [
        "001-a-red-circle-1.png",
        "002-a-red-circle-2.png",
        "003-a-blue-square-1.png",
        "004-a-blue-square-2.png",
    ]
    assert (folder / "report.html").exists()
    made = [file.stat().st_mtime_ns for file in files]
    assert graph.value(prompt, "cluster", 2) == 4
    assert [file.stat().st_mtime_ns for file in files] == made
    (first, *_) = [graph.value(prompt, "cluster", 0)]
    picture = first if isinstance(first, torch.Tensor) else first[0]
    with Image.open(files[-1]) as image:
        assert picture.shape == (1, 32, 32, 3) and image.size == (32, 32)


@pytest.mark.parametrize(
    ("widgets", "said"),
    [
        ({"prompts": ""}, "no prompt"),
        ({"cluster": "ray://elsewhere:10001"}, "cluster is"),
        ({"cluster": 3}, "cluster is 3"),
        ({"model_name": "gone"}, "There is no NextStep model"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"seeds": "1, x"}, "seeds is"),
        ({"folder": "../outside"}, "inside ComfyUI's output folder"),
        ({"quantization": "int3"}, "int3"),
        ({"dtype": "fp8"}, "fp8"),
        ({"together": 0}, "0"),
        ({"workers": -1}, "-1"),
    ],
)
def test_what_is_wrong_is_told_before_a_worker_is_started(graph: ComfyGraph, widgets: dict, said: str) -> None:
    ending, message = graph.ending(away(**({"folder": "cluster/wrong"} | widgets)))
    assert ending != "done" and said in message
    assert not (graph.base / "output" / "cluster" / "wrong").exists()


def test_clusters_are_those_that_the_user_has_named(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    module = graph.pack("nodes.cluster")
    assert module.addresses() == []
    monkeypatch.setenv(module.ADDRESSES, " ray://one:10001, two:6379,, ")
    (cluster,) = [i for i in module.NextStepCluster.define_schema().inputs if i.id == "cluster"]
    assert cluster.options == [module.HERE, "ray://one:10001", "two:6379"]


@needs_ray
def test_interrupt_lets_the_workers_go_and_keeps_what_is_drawn(server: ComfyServer) -> None:
    prompts = "\n".join(f"a red circle {n}" for n in range(100))
    prompt = away(prompts=prompts, seeds="1", size="64", folder="cluster/stopped")
    stopped = server.run(prompt, interrupt_at=50)  # of a thousand
    assert stopped.ended == "execution_interrupted"
    folder = server.base / "output" / "cluster" / "stopped"
    drawn = len(list(folder.glob("*.png")))
    assert 0 < drawn < 100 and (folder / "report.html").exists()
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == drawn

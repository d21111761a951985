"""Many pictures in the host: lists of prompts, templates, a whole job in one node, and its report."""

from __future__ import annotations

import json
from types import SimpleNamespace
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import torch
from comfy_graph import ComfyGraph, node
from PIL import Image

from scripts.comfy_server import ComfyServer

EMBEDDED = "tiny (embedded)"
JOB = {"prompts": ["a red circle", "a blue square"], "settings": {"size": 32, "steps": 2}, "seeds": [1, 2]}


def studio(**widgets: object) -> dict:
    """A graph of the node alone, on the embedded model."""
    values = {"job": "the text below", "text": json.dumps(JOB), "lists": "", "size": "", "seeds": "", "together": 4}
    loader = node("NextStepModelLoader", model_name=EMBEDDED, dtype="fp32")
    batch = node("NextStepBatchStudio", model=["model", 0], vae=["model", 1], **(values | widgets))
    return {"model": loader, "batch": batch}


def test_a_list_of_prompts_from_lines_and_from_a_file(graph: ComfyGraph) -> None:
    lines = node("NextStepPromptList", prompts="a\n# no\nb", file="the text below")
    assert graph.value({"list": lines}, "list", 2) == 2
    (graph.base / "input" / "mine.csv").write_text("prompt,negative_prompt\nfrom a file,blur\n")
    table = {"list": node("NextStepPromptList", prompts="", file="mine.csv")}
    assert [graph.value(table, "list", output) for output in range(3)] == ["from a file", "blur", 1]


def test_a_template_is_expanded_and_refused_before_the_run(graph: ComfyGraph) -> None:
    widgets = {"template": "a {color} cup", "lists": "color: red | blue", "combine": "grid"}
    assert graph.value({"list": node("NextStepPromptTemplate", **widgets)}, "list", 1) == 2
    wrong = node("NextStepPromptTemplate", **(widgets | {"lists": "colour: red"}))
    saved = {"list": wrong, "show": node("PreviewAny", source=["list", 0])}
    ending, message = graph.ending(saved)
    assert ending == "refused" and "{color}" in message


def test_a_job_into_a_folder_and_what_is_missing_by_the_next_run(graph: ComfyGraph) -> None:
    outputs = graph.run(studio(folder="jobs/first"))
    files = graph.saved(outputs, "batch")
    assert [file.name for file in files] == [
        "001-a-red-circle-1.png",
        "002-a-red-circle-2.png",
        "003-a-blue-square-1.png",
        "004-a-blue-square-2.png",
    ]
    with Image.open(files[0]) as image:
        assert image.size == (32, 32)
        assert image.text["parameters"].startswith("a red circle\nSteps: 2,")  # type: ignore[attr-defined]
    assert (files[0].parent / "report.html").exists() and (files[0].parent / "contact-sheet.jpg").exists()
    made = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    again = graph.saved(graph.run(studio(folder="jobs/first")), "batch")
    assert again == files
    assert [file.stat().st_mtime_ns == made[file] for file in files] == [True, False, True, True]


def test_a_shipped_set_in_a_size_of_ones_own(graph: ComfyGraph) -> None:
    prompt = studio(job="brand", size="32", seeds="3", lists="brand: Harbor Tea", folder="jobs/brand")
    prompt["batch"]["inputs"]["preset"] = "draft"
    files = graph.saved(graph.run(prompt), "batch")
    assert len(files) == 5
    told = json.loads((files[0].parent / f"{files[0].name}.json").read_text())
    assert "Harbor Tea" in told["prompt"] and told["settings"]["steps"] == 20


@pytest.mark.parametrize(
    ("widgets", "said"),
    [
        ({"text": '{"prompts": ["a"],\n"settings": {"steps": 0}}'}, "text, line 2: steps is 0"),
        ({"text": ""}, "no prompt"),
        ({"job": "gone.json"}, "gone.json"),
        ({"job": "../secret.json"}, "not the name of a file"),
        ({"folder": "../outside"}, "inside ComfyUI's output folder"),
        ({"folder": "/outside"}, "inside ComfyUI's output folder"),
        ({"folder": ""}, "inside ComfyUI's output folder"),
        ({"size": "huge"}, "size is 'huge'"),
        ({"seeds": "1, x"}, "seeds is"),
        ({"lists": "brand: x"}, "has no lists"),
        ({"text": '{"jobs": [{"prompt": "a", "images": ["../x.png"]}]}'}, "outside of the job's folder"),
    ],
)
def test_what_is_wrong_with_a_job(graph: ComfyGraph, widgets: dict, said: str) -> None:
    ending, message = graph.ending(studio(**({"folder": "jobs/wrong"} | widgets)))
    assert ending not in ("done", "refused") and said in message
    assert not (graph.base / "output" / "jobs" / "wrong").exists()


def test_a_picture_of_the_input_folder_is_edited(graph: ComfyGraph) -> None:
    Image.new("RGB", (80, 40), "red").save(graph.base / "input" / "cup.png")
    text = json.dumps(
        {"jobs": [{"prompt": "Make it blue.", "images": ["cup.png"]}], "settings": {"size": 32, "steps": 2}}
    )
    assert len(graph.saved(graph.run(studio(text=text, folder="jobs/edit")), "batch")) == 1


def test_pictures_in_the_host_equal_those_of_a_pipeline(graph: ComfyGraph) -> None:
    """One job, both ways."""
    files = graph.saved(graph.run(studio(folder="jobs/same")), "batch")
    kit = SimpleNamespace(
        read=graph.pack("nextstep_core.studio.job_file").parse_job,
        run=graph.pack("nextstep_core.studio.batch").BatchRun,
        alone=graph.pack("nextstep_core.studio.hands").Alone,
        artist=graph.pack("nextstep_core.studio.drawing").PipelineArtist,
        pipeline=graph.pack("nextstep_core.pipeline").NextStepPipeline,
    )
    other = graph.base / "commands"
    artist = kit.artist(kit.pipeline.from_pretrained("tiny", dtype=torch.float32), {}, "")
    kit.run(kit.read(json.dumps(JOB), "j"), kit.alone(artist), other).run()
    for file in files:
        with Image.open(file) as ours, Image.open(other / file.name) as theirs:
            apart = max(abs(a - b) for a, b in zip(ours.tobytes(), theirs.tobytes()))
        assert apart <= 1


def test_interrupt_keeps_what_is_drawn(server: ComfyServer) -> None:
    text = json.dumps({"prompts": ["a red circle"], "settings": {"size": 64}, "seeds": {"first": 1, "count": 40}})
    prompt = studio(text=text, folder="jobs/stopped", together=2)
    stopped = server.run(prompt, interrupt_at=200)  # of a thousand
    assert stopped.ended == "execution_interrupted"
    folder = server.base / "output" / "jobs" / "stopped"
    drawn = len(list(folder.glob("*.png")))
    assert 0 < drawn < 40 and (folder / "report.html").exists()
    assert server.run(prompt).ended == "execution_success"
    assert len(list(folder.glob("*.png"))) == 40


def test_the_report_is_served_with_its_pictures_and_nothing_else(server: ComfyServer) -> None:
    server.run(studio(folder="jobs/with report"))
    address = f"http://127.0.0.1:{server.port}"
    with urlopen(f"{address}/nextstep/report?{urlencode({'folder': 'jobs/with report'})}") as answer:
        page = answer.read().decode()
        assert answer.headers["Content-Type"].startswith("text/html")
    assert '"served_from": "jobs/with report"' in page and "001-a-red-circle-1.png" in page
    for folder in ("../models", "/etc", "none", ""):
        status = server_status(f"{address}/nextstep/report?{urlencode({'folder': folder})}")
        assert status == 404


def server_status(address: str) -> int:
    from urllib.error import HTTPError

    try:
        with urlopen(address) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


def selecting(kind: str, **widgets: object) -> dict:
    """A graph of a node that draws several times, on the embedded model."""
    settings = {"steps": 4, "cfg": 3.0, "cfg_schedule": "constant", "shift": 1.0, "sampler": "auto", "use_norm": "auto"}
    sockets = {
        "model": ["model", 0],
        "vae": ["model", 1],
        "positive": ["prompt", 0],
        "latent": ["latent", 0],
        "seed": 1,
    }
    return {
        "model": node("NextStepModelLoader", model_name=EMBEDDED, dtype="fp32"),
        "prompt": node("NextStepTextEncode", model=["model", 0], prompt="a red circle"),
        "latent": node("NextStepEmptyLatent", width=64, height=64, batch_size=1),
        "select": node(kind, **({"seed": 1} | sockets | settings | widgets)),
    }


def test_the_gate_stops_at_the_first_that_is_good_enough_or_keeps_the_best(graph: ComfyGraph) -> None:
    widgets = {"threshold": 0.0, "attempts": 3, "score": "total"}
    assert graph.value(selecting("NextStepQualityGate", **widgets), "select", 3).startswith("kept seed 1: ")
    prompt = selecting("NextStepQualityGate", **(widgets | {"threshold": 1.0}))
    told = graph.value(prompt, "select", 3)
    assert told.startswith("none passed; kept seed ") and told.count("seed ") == 3
    best = graph.value(prompt, "select", 1)
    assert (
        best == max(float(part.split(": ")[1].split(".")[0] + "." + part.split(".")[1][:2]) for part in [told])
        or best > 0
    )


def test_the_best_of_several_is_what_its_seed_draws_alone(graph: ComfyGraph) -> None:
    prompt = selecting("NextStepBestOfN", candidates=4, drop_early=True, score="sharpness")
    told, seed = graph.value(prompt, "select", 3), graph.value(prompt, "select", 2)
    assert told.count("dropped at") == 2 and told.count("seed ") == 4
    picture = graph.value(prompt, "select", 0)
    alone = selecting("NextStepQualityGate", threshold=0.0, attempts=1, score="total", seed=seed)
    assert (graph.value(alone, "select", 0) - picture).abs().max() <= 1 / 255


def test_scores_of_a_batch(graph: ComfyGraph) -> None:
    graph.pack("nodes.selection")
    pictures = {"give": node("EmptyImage", width=32, height=32, batch_size=2, color=0x808080)}
    told = graph.value(pictures | {"score": node("NextStepQualityScore", image=["give", 0])}, "score", 1)
    assert len(told.splitlines()) == 2 and "total 0." in told


@pytest.mark.parametrize(
    ("kind", "widgets", "said"),
    [
        ("NextStepQualityGate", {"threshold": 0.5, "attempts": 2, "score": "total", "latent": ["masked", 0]}, "mask"),
        (
            "NextStepBestOfN",
            {"candidates": 2, "drop_early": True, "score": "total", "positive": ["two", 0]},
            "2 prompts",
        ),
    ],
)
def test_what_such_a_node_does_not_draw(graph: ComfyGraph, kind: str, widgets: dict, said: str) -> None:
    prompt = selecting(kind, **({"score": "total"} | widgets))
    prompt["two"] = node("NextStepPromptBatch", first=["prompt", 0], second=["prompt", 0])
    prompt["mask"] = node("SolidMask", value=1.0, width=64, height=64)
    prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["mask", 0])
    ending, message = graph.ending(prompt | {"show": node("PreviewAny", source=["select", 3])})
    assert ending not in ("done", "refused") and said in message

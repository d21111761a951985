"""The text-to-image workflow in a real ComfyUI, over its HTTP and websocket API."""

from __future__ import annotations

import io
import json
import re
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sd_parsers import ParserManager
from ui_workflow import BYPASS, MUTE, node_in, set_widget, small_workflow, with_primitives

from scripts.comfy_server import PACK_NAME, ComfyServer
from scripts.workflows import ALL, EMBEDDED, FIRST_RUN, ON_EMBEDDED, TEXT_TO_IMAGE, read_workflow, short_job, to_prompt

SMALL = {"model_name": "tiny-a", "width": 96, "height": 64, "steps": 4, "seed": 7, "cfg": 3.0}
LONG = {**SMALL, "width": 512, "height": 512, "steps": 20}


@pytest.fixture(scope="module")
def workflow() -> dict:
    return read_workflow(TEXT_TO_IMAGE)


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict:
    return server.call("/object_info")


def node_of(prompt: dict, class_type: str) -> str:
    return next(key for key, node in prompt.items() if node["class_type"] == class_type)


def test_workflow_runs_and_saves_the_engines_picture(server, workflow, object_info, pipeline) -> None:
    prompt = to_prompt(workflow, object_info, **SMALL)
    run = server.run(prompt, workflow)
    assert run.ended == "execution_success", run.events[-1]
    (path,) = server.images(run)
    picture = Image.open(path)
    assert picture.size == (96, 64)
    assert json.loads(picture.text["workflow"]) == workflow
    assert json.loads(picture.text["prompt"])[node_of(prompt, "NextStepSampler")]["inputs"]["seed"] == 7

    positive, negative = (n["inputs"]["prompt"] for n in prompt.values() if n["class_type"] == "NextStepTextEncode")
    ours = pipeline.generate(
        positive, negative_prompt=negative, width=96, height=64, steps=4, cfg=3.0, seed=7, shift=1.0
    )
    expected = (ours.images[0].numpy() * 255).clip(0, 255)
    assert np.abs(np.asarray(picture, dtype=np.float32) - expected).max() <= 2  # the host truncates to 8 bits

    sampler = node_of(prompt, "NextStepSampler")
    values = [event["value"] for event in run.events_of("progress") if event["node"] == sampler]
    assert values == sorted(set(values)) and (values[0], values[-1]) == (1, 24), "newer hosts leave some of them out"


def test_a_new_seed_keeps_the_model_and_changes_the_picture(server, workflow, object_info) -> None:
    pictures = []
    for seed in (100, 101):
        prompt = to_prompt(workflow, object_info, **{**SMALL, "seed": seed})
        run = server.run(prompt)
        pictures.append(np.asarray(Image.open(server.images(run)[0]), dtype=np.float32))
    cached = run.events_of("execution_cached")[0]["nodes"]
    assert node_of(prompt, "NextStepModelLoader") in cached
    assert server.log.read_text().count("NextStep model tiny-a:") == 1
    assert np.abs(pictures[0] - pictures[1]).mean() > 5


def test_preview_shows_finished_rows_in_the_pictures_size(server, workflow, object_info) -> None:
    widgets = {**LONG, "width": 256, "height": 384, "seed": 5}
    run = server.run(to_prompt(workflow, object_info, **widgets))
    assert run.ended == "execution_success"
    assert len(run.previews) > 1
    *under_way, finished = run.texts
    assert all(re.fullmatch(r"\d+\.\d tokens/s, \d+:\d\d left", text) for text in under_way) and under_way
    assert re.fullmatch(r"384 tokens in \d+\.\d s", finished)
    first, last = (
        np.asarray(Image.open(io.BytesIO(data)), dtype=np.float32) for data in (run.previews[0], run.previews[-1])
    )
    assert first.shape == (384, 256, 3)
    assert np.abs(first[-32:] - 127.5).max() < 8, "rows that are not drawn yet are gray"
    assert np.abs(last - first).mean() > np.abs(last[:8] - first[:8]).mean(), "later previews show more rows"


def test_interrupt_stops_at_once_and_the_next_run_is_healthy(server, workflow, object_info) -> None:
    run = server.run(to_prompt(workflow, object_info, **{**LONG, "seed": 6}), interrupt_at=20)
    assert run.ended == "execution_interrupted"
    assert run.events_of("progress")[-1]["value"] < 200, "stopped long before the last of 1024 tokens"
    again = server.run(to_prompt(workflow, object_info, **{**SMALL, "seed": 8}))
    assert again.ended == "execution_success"
    assert server.images(again)[0].is_file()


def test_a_kept_run_goes_down_the_graph(server, workflow, object_info) -> None:
    prompt = to_prompt(workflow, object_info, **{**LONG, "seed": 16, "on_interrupt": "keep"})
    run = server.run(prompt, interrupt_at=40)
    assert run.ended == "execution_success"
    picture = np.asarray(Image.open(server.images(run)[0]), dtype=np.float32)
    assert picture[-64:].std(axis=(0, 1)).max() < picture[:16].std(axis=(0, 1)).min(), "drawn above, plain below"
    assert re.fullmatch(r"stopped at \d+ of 1,024 tokens", run.texts[-1])


def test_the_next_run_completes_a_kept_one_and_is_cached_then(server, workflow, object_info) -> None:
    """A part is never handed out for the whole: not by the host's cache either."""
    widgets = {**LONG, "width": 256, "height": 256}
    whole = to_prompt(workflow, object_info, **{**widgets, "seed": 17})
    wanted = np.asarray(Image.open(server.images(server.run(whole))[0]))
    kept = to_prompt(workflow, object_info, **{**widgets, "seed": 17, "on_interrupt": "keep"})
    part = server.run(kept, workflow, interrupt_at=20)
    assert part.ended == "execution_success" and "unfinished" in part_of(server, part)
    completed = server.run(kept, workflow)
    assert "unfinished" not in part_of(server, completed)
    assert np.array_equal(np.asarray(Image.open(server.images(completed)[0])), wanted)
    again = server.run(kept, workflow)
    assert node_of(kept, "NextStepSampler") in again.events_of("execution_cached")[0]["nodes"]


def part_of(server, run) -> dict:
    """What a saved picture tells of its run."""
    return json.loads(Image.open(server.images(run)[0]).text["nextstep"])


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_saved_pictures_tell_other_programs_what_made_them(server, workflow, object_info, format: str) -> None:
    prompt = to_prompt(workflow, object_info, **{**SMALL, "seed": 18})
    save, sampler = node_of(prompt, "SaveImage"), node_of(prompt, "NextStepSampler")
    inputs = {"image": prompt[save]["inputs"]["images"], "filename_prefix": "told/%width%", "info": [sampler, 1]}
    prompt[save] = {"class_type": "NextStepSaveImage", "inputs": {**inputs, "format": format, "quality": 90}}
    run = server.run(prompt, workflow)
    assert run.ended == "execution_success", run.events[-1]
    (path,) = server.images(run)
    assert path.parent.name == "told" and path.name.startswith("96_0000")
    read = ParserManager().parse(path)
    asked = [node["inputs"]["prompt"] for node in prompt.values() if node["class_type"] == "NextStepTextEncode"]
    assert {read.prompts[0].value, read.negative_prompts[0].value} == set(asked)
    assert read.samplers[0].model.name == "tiny-a" and len(read.samplers[0].model.hash) == 10
    assert read.metadata["Size"] == "96x64" and read.samplers[0].parameters["seed"] == "18"
    if format == "png":
        text = Image.open(path).text
        assert json.loads(text["workflow"]) == workflow
        assert json.loads(text["prompt"])[sampler]["inputs"]["seed"] == 18
        assert str(server.base) not in str(text), "no folder of the user's is told to those who get the picture"


def saved_by_us(workflow: dict, object_info: dict, **inputs: object) -> dict:
    prompt = to_prompt(workflow, object_info, **{**SMALL, "seed": 18})
    save = node_of(prompt, "SaveImage")
    plain = {"image": prompt[save]["inputs"]["images"], "filename_prefix": "x", "format": "png", "quality": 90}
    prompt[save] = {"class_type": "NextStepSaveImage", "inputs": plain | inputs}
    return prompt


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"filename_prefix": "../out"}, "'../out' is not a name inside ComfyUI's output folder"),
        ({"filename_prefix": "/elsewhere/x"}, "is not a name inside ComfyUI's output folder"),
        ({"filename_prefix": "a\0b"}, "is not a name inside ComfyUI's output folder"),
    ],
)
def test_what_cannot_be_saved_is_refused_before_it_is_drawn(server, workflow, object_info, inputs, sentence) -> None:
    answer = server.queue(saved_by_us(workflow, object_info, **inputs), "tests")
    texts = [error["details"] for node in answer["node_errors"].values() for error in node["errors"]]
    assert any(sentence in text for text in texts), answer


def test_a_picture_with_another_info_is_one_sentence(server, workflow, object_info) -> None:
    run = server.run(saved_by_us(workflow, object_info, info=3))
    said = run.events[-1][1]["exception_message"]
    assert run.ended == "execution_error" and "info is 3; connect the output of NextStep Sampler" in said


def test_core_vae_decode_gives_the_same_picture(server, workflow, object_info) -> None:
    prompt = to_prompt(workflow, object_info, **{**SMALL, "seed": 9})
    ours = np.asarray(Image.open(server.images(server.run(prompt))[0]))
    prompt[node_of(prompt, "NextStepVAEDecode")]["class_type"] = "VAEDecode"
    core = np.asarray(Image.open(server.images(server.run(prompt))[0]))
    assert np.array_equal(ours, core)


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"width": 72}, "The nearest size is 64x64."),
        ({"cfg": 0.5}, "cfg is 0.5; use a number from 1 to 100, where 1 turns this guidance off"),
        ({"steps": 0}, "steps is 0"),
        (
            {"model_name": "gone"},
            "There is no NextStep model 'gone'. Of those you have, tiny-a will do",
        ),
    ],
)
def test_bad_widgets_are_refused_before_anything_runs(server, workflow, object_info, widgets, sentence) -> None:
    answer = server.queue(to_prompt(workflow, object_info, **{**SMALL, **widgets}), "tests")
    texts = [error["details"] for node in answer["node_errors"].values() for error in node["errors"]]
    assert any(sentence in text for text in texts), answer


def test_a_foreign_latent_is_one_sentence_and_the_queue_lives_on(server, workflow, object_info) -> None:
    prompt = to_prompt(workflow, object_info, **{**SMALL, "seed": 10})
    prompt[node_of(prompt, "NextStepEmptyLatent")]["class_type"] = "EmptyLatentImage"
    failed = server.run(prompt)
    assert failed.ended == "execution_error"
    assert "Use NextStep Empty Latent." in failed.events[-1][1]["exception_message"]
    assert server.run(to_prompt(workflow, object_info, **SMALL)).ended == "execution_success"


def test_a_prompt_beyond_the_context_is_one_sentence(server, workflow, object_info) -> None:
    prompt = to_prompt(workflow, object_info, **SMALL)
    node = next(n for n in prompt.values() if n["class_type"] == "NextStepTextEncode")
    node["inputs"]["prompt"] = "word " * 6000
    failed = server.run(prompt)
    assert failed.ended == "execution_error"
    assert "4096. Shorten the prompt." in failed.events[-1][1]["exception_message"]


def test_translations_and_help_reach_the_frontend(server) -> None:
    assert server.call("/i18n")["ja"]["nodeDefs"]["NextStepSampler"]["display_name"] == "NextStep サンプラー"
    with urllib.request.urlopen(
        f"http://127.0.0.1:{server.port}/extensions/{PACK_NAME}/docs/NextStepSampler.md"
    ) as page:
        assert page.read().startswith(b"# NextStep Sampler")


def test_extra_model_paths_are_listed_and_load(server, workflow, object_info) -> None:
    options = object_info["NextStepModelLoader"]["input"]["required"]["model_name"][1]["options"]
    assert {"tiny-a", "NextStep-1-Large-Edit", EMBEDDED} <= set(options)
    assert all("(downloads" in option for option in options[options.index(EMBEDDED) + 1 :]), "the last that is there"
    run = server.run(to_prompt(workflow, object_info, **{**SMALL, "model_name": "NextStep-1-Large-Edit"}))
    assert run.ended == "execution_success"


def picture_of(server: ComfyServer, workflow: dict, object_info: dict) -> np.ndarray:
    """The picture that a saved workflow makes, run as the frontend runs it."""
    run = server.run(to_prompt(workflow, object_info), workflow)
    assert run.ended == "execution_success", run.events[-1]
    return np.asarray(Image.open(server.images(run)[0]))


def test_a_saved_workflow_is_fed_by_primitive_nodes(server, object_info) -> None:
    plain = small_workflow("tiny-a")
    set_widget(plain, "NextStepSampler", "seed", 21)
    set_widget(plain, "NextStepSampler", "steps", 5)
    set_widget(plain, "Positive prompt", "prompt", "A blue boat.")
    set_widget(plain, "Negative prompt", "prompt", "blurry")
    assert np.array_equal(
        picture_of(server, with_primitives(small_workflow("tiny-a")), object_info),
        picture_of(server, plain, object_info),
    )


def test_a_muted_negative_prompt_is_none(server, object_info) -> None:
    muted, unlinked, empty = (small_workflow("tiny-a") for _ in range(3))
    node_in(muted, "Negative prompt")["mode"] = MUTE
    socket = next(i for i in node_in(unlinked, "NextStepSampler")["inputs"] if i["name"] == "negative")
    unlinked["links"] = [link for link in unlinked["links"] if link[0] != socket["link"]]
    socket["link"] = None
    set_widget(empty, "Negative prompt", "prompt", "")
    pictures = [picture_of(server, workflow, object_info) for workflow in (muted, unlinked, empty)]
    assert np.array_equal(pictures[0], pictures[1]) and np.array_equal(pictures[0], pictures[2])
    assert not np.array_equal(pictures[0], picture_of(server, small_workflow("tiny-a"), object_info))


def test_a_bypassed_sampler_hands_its_latent_on(server, object_info) -> None:
    """As every core sampler: what comes in goes out, and the decoder shows it."""
    bypassed = small_workflow("tiny-a")
    node_in(bypassed, "NextStepSampler")["mode"] = BYPASS
    prompt = to_prompt(small_workflow("tiny-a"), object_info)
    prompt[node_of(prompt, "NextStepVAEDecode")]["inputs"]["samples"] = [node_of(prompt, "NextStepEmptyLatent"), 0]
    empty = np.asarray(Image.open(server.images(server.run(prompt))[0]))
    assert np.array_equal(picture_of(server, bypassed, object_info), empty)


def test_a_muted_sampler_is_named_before_anything_runs(server, object_info) -> None:
    workflow = small_workflow("tiny-a")
    node_in(workflow, "NextStepSampler")["mode"] = MUTE
    answer = server.queue(to_prompt(workflow, object_info), "tests")
    (decode,) = (node["id"] for node in workflow["nodes"] if node["type"] == "NextStepVAEDecode")
    assert [e["type"] for e in answer["node_errors"][str(decode)]["errors"]] == ["required_input_missing"], answer


def test_free_lets_the_model_go_and_the_next_run_loads_it_again(server, object_info) -> None:
    def loaded() -> int:
        return server.log.read_text().count("NextStep model tiny-a:")

    pictures = [picture_of(server, small_workflow("tiny-a"), object_info)]
    before = loaded()
    server.call("/free", {"unload_models": True, "free_memory": True})
    # The server frees between two runs: before the first of these or after it.
    pictures += [picture_of(server, small_workflow("tiny-a"), object_info) for _ in range(2)]
    assert loaded() == before + 1, "what is still alive somewhere would be used again"
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_shipped_workflow_runs(server, object_info, path: Path) -> None:
    """With the embedded model in place of the one that the user is asked to get, and few steps."""
    workflow = read_workflow(path)
    notes = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 2, "a short note on the canvas, and what it says in other languages"
    for node in workflow["nodes"]:
        if node not in notes:
            pack = "nextstep" if node["type"].startswith("NextStep") else "comfy-core"
            assert node["type"] in object_info
            assert node["properties"]["Node name for S&R"] == node["type"]
            assert (node["properties"]["cnr_id"], bool(node["properties"]["ver"])) == (pack, True)
    small = {
        **ON_EMBEDDED, "steps": 3, "width": 64, "height": 64, "base": "256", "bottom": 32,
        "size": "width and height",
    }  # fmt: skip
    run = server.run(to_prompt(workflow, object_info, **small | short_job(path)), workflow)
    assert run.ended == "execution_success", run.events[-1]
    assert server.images(run)[0].is_file()


def test_the_first_run_needs_nothing_but_the_pack(server, object_info) -> None:
    workflow = read_workflow(FIRST_RUN)
    run = server.run(to_prompt(workflow, object_info), workflow)
    assert run.ended == "execution_success", run.events[-1]
    picture = np.asarray(Image.open(server.images(run)[0]), dtype=np.float32)
    assert picture.shape == (384, 384, 3)
    red, blue = (0xE0, 0x20, 0x20), (0x20, 0x50, 0xE0)
    near = [(np.abs(picture - color).max(axis=-1) < 40).mean() for color in (red, blue)]
    assert near[0] > 0.04 and near[1] > 0.3, "a red circle on a blue background"

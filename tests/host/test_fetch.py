"""Checkpoints that fetch themselves when they are chosen, in a real ComfyUI against a small hub on this machine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from comfy_graph import ComfyGraph, text_to_image
from fake_hub import EDITING, REPO, Hub
from PIL import Image

from scripts.comfy_server import ComfyServer, Run, make_base, running_server
from scripts.workflows import EMBEDDED

CHOICE = "NextStep-1.1 (downloads 29 GB)"
EDIT_CHOICE = "NextStep-1-Large-Edit (downloads 29 GB)"
VAE_CHOICE = "NextStep-1-f8ch16-Tokenizer (downloads 0.3 GB)"


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def start(
    comfyui: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> partial[AbstractContextManager[ComfyServer]]:
    """Starts a ComfyUI whose Hugging Face is the small hub, on one base directory with an empty models folder."""
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    return partial(running_server, comfyui, make_base(tmp_path / "base"))


def options(server: ComfyServer, node: str = "NextStepModelLoader", name: str = "model_name") -> list[str]:
    return server.call(f"/object_info/{node}")[node]["input"]["required"][name][1]["options"]


def drawing(model_name: str, seed: int = 1) -> dict:
    prompt = text_to_image(seed)
    prompt["model"]["inputs"]["model_name"] = model_name
    return prompt


def picture(server: ComfyServer, run: Run) -> np.ndarray:
    assert run.ended == "execution_success", run.events[-1]
    return np.asarray(Image.open(server.images(run)[0]))


def test_from_nothing_to_a_picture_and_a_second_start_fetches_nothing(start, hub: Hub, tmp_path: Path) -> None:
    with start() as server:
        assert options(server)[:3] == [EMBEDDED, CHOICE, "NextStep-1.1-Pretrain (downloads 29 GB)"]
        assert options(server)[-1] == "NextStep-1.1-W4A16-AutoRound (downloads 10 GB)"
        assert options(server, "NextStepVAELoader", "vae_name") == [EMBEDDED, VAE_CHOICE]
        assert not hub.asked and not any((tmp_path / "base" / "models" / "nextstep").iterdir())
        first = server.run(drawing(CHOICE))
        drawn = picture(server, first)
        loading = [event for event in first.events_of("progress") if event["node"] == "model"]
        assert any("MB" in text and REPO in text for text in first.texts), first.texts
        assert loading and "NextStep-1.1: " in server.said()
        assert {"NextStep-1.1", EDIT_CHOICE} <= set(options(server)) and CHOICE not in options(server)
    hub.asked.clear()
    with start() as server:
        saved = [picture(server, server.run(drawing(name))) for name in (CHOICE, "NextStep-1.1")]
        assert all(np.array_equal(again, drawn) for again in saved)
    assert not hub.asked


def test_the_vae_alone_and_an_edit_checkpoint_are_fetched_by_their_own_names(start, hub: Hub) -> None:
    with start() as server:
        prompt = drawing(EDIT_CHOICE)
        prompt["vae"] = {"class_type": "NextStepVAELoader", "inputs": {"vae_name": VAE_CHOICE}}
        prompt["decode"]["inputs"]["vae"] = ["vae", 0]
        picture(server, server.run(prompt))
        assert {"NextStep-1-Large-Edit"} <= set(options(server))
        assert options(server, "NextStepVAELoader", "vae_name")[:1] == ["NextStep-1-Large-Edit/vae"]
        assert "NextStep-1-f8ch16-Tokenizer" in options(server, "NextStepVAELoader", "vae_name")


def test_an_interrupt_keeps_what_is_there_and_the_next_run_goes_on(start, hub: Hub, tmp_path: Path) -> None:
    with start() as server:
        hub.pause = 0.02
        stopped = server.run(drawing(CHOICE), interrupt_at=200_000)
        assert stopped.ended == "execution_interrupted"
        folder = tmp_path / "base" / "models" / "nextstep" / "NextStep-1.1"
        kept = {path.name for path in folder.iterdir() if path.is_file()}
        assert kept and CHOICE in options(server), "half of it is not listed"
        hub.pause = 0.0
        hub.asked.clear()
        picture(server, server.run(drawing(CHOICE)))
        assert not kept & {name for name, _ in hub.asked}
        names = [name for name in hub.files if name.endswith(".safetensors")]
        assert all((folder / name).read_bytes() == hub.files[name] for name in names)


def refusals(server: ComfyServer, prompt: dict) -> str:
    answer = server.queue(prompt, "tests")
    return " ".join(error["details"] for node in answer["node_errors"].values() for error in node["errors"])


def test_offline_nothing_is_offered_and_a_saved_choice_says_how_to_get_it(start, hub: Hub, monkeypatch, golden) -> None:
    monkeypatch.setenv("NEXTSTEP_OFFLINE", "1")
    with start() as server:
        assert options(server) == [EMBEDDED]
        said = refusals(server, drawing(CHOICE))
        assert "There is no NextStep model 'NextStep-1.1'. To get NextStep-1.1: unset NEXTSTEP_OFFLINE" in said
        assert f"{hub.address}/{REPO} into {server.base / 'models' / 'nextstep' / 'NextStep-1.1'}" in said
        shutil.copytree(golden / "tiny-a", server.base / "models" / "nextstep" / "NextStep-1.1")
        picture(server, server.run(drawing(CHOICE)))
    assert not hub.asked


def test_a_refusal_of_the_hub_is_one_sentence_and_the_queue_lives_on(start, hub: Hub) -> None:
    hub.refusal = 403, "GatedRepo"
    with start() as server:
        failed = server.run(drawing(CHOICE))
        said = failed.events[-1][1]["exception_message"]
        assert failed.ended == "execution_error" and "accept the terms" in said and "By hand" in said, said
        assert "There is no NextStep model 'NextStep-1.1'." in refusals(server, drawing("NextStep-1.1"))
        assert EDITING in refusals(server, drawing("nextstep-1-large-edit-int8.safetensors"))
        picture(server, server.run(drawing(EMBEDDED)))


def test_the_cache_answers_to_a_saved_name(graph: ComfyGraph, golden: Path, tmp_path: Path, monkeypatch) -> None:
    snapshot = tmp_path / "models--stepfun-ai--NextStep-1.1" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(golden / "tiny-a", target_is_directory=True)
    alone = tmp_path / "models--stepfun-ai--NextStep-1-f8ch16-Tokenizer" / "snapshots" / "abc"
    alone.parent.mkdir(parents=True)
    alone.symlink_to(golden / "tiny-a" / "vae", target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    catalog = graph.pack("nodes.catalog")
    assert catalog.find_model(CHOICE) == catalog.find_model("NextStep-1.1") == snapshot
    assert catalog.find_vae(VAE_CHOICE) == alone
    assert CHOICE not in catalog.model_options() and VAE_CHOICE not in catalog.vae_options()

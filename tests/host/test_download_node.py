"""The download node in a real ComfyUI, against a small hub on this machine."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from comfy_graph import ComfyGraph
from fake_hub import REPO, Hub

from scripts.comfy_server import ComfyServer, make_base, running_server

PROMPT = {"get": {"class_type": "NextStepDownload", "inputs": {"checkpoint": "NextStep-1.1", "revision": "main"}}}


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.fixture
def own_server(comfyui: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ComfyServer]:
    """A ComfyUI whose Hugging Face is the small hub."""
    monkeypatch.setenv("HF_ENDPOINT", hub.address)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with running_server(comfyui, make_base(tmp_path / "base")) as running:
        yield running


def models_of(server: ComfyServer) -> list[str]:
    info = server.call("/object_info/NextStepModelLoader")
    return info["NextStepModelLoader"]["input"]["required"]["model_name"][1]["options"]


def test_the_node_fetches_when_it_is_run_and_only_then(own_server: ComfyServer, hub: Hub) -> None:
    assert "NextStep-1.1" not in models_of(own_server)
    assert not hub.asked, "nothing is fetched that nobody asked for"
    hub.pause = 0.02
    stopped = own_server.run(PROMPT, interrupt_at=100_000)
    assert stopped.ended == "execution_interrupted"
    assert "NextStep-1.1" not in models_of(own_server), "half a checkpoint is not listed"
    hub.pause = 0.0
    done = own_server.run(PROMPT)
    assert done.ended == "execution_success", done.events[-1]
    values = [event["value"] for event in done.events_of("progress")]
    assert values == sorted(values) and values[-1] == done.events_of("progress")[-1]["max"], "bytes"
    assert any(REPO in text and "GB in" in text for text in done.texts), "the size is said"
    assert "NextStep-1.1" in models_of(own_server)


def test_a_checkpoint_in_the_cache_is_listed_and_used_in_place(
    comfyui: Path, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "hf" / "hub" / "models--stepfun-ai--NextStep-1-Large" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(golden / "tiny-a", target_is_directory=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with running_server(comfyui, make_base(tmp_path / "base")) as server:
        assert "stepfun-ai/NextStep-1-Large (Hugging Face cache)" in models_of(server)


@pytest.mark.parametrize("why", ["NEXTSTEP_OFFLINE", "could not be reached"])
def test_offline_the_node_takes_what_is_there_and_says_what_to_do_where_nothing_is(
    graph: ComfyGraph, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str
) -> None:
    monkeypatch.setattr(graph.pack("nodes.host"), "model_roots", lambda: [tmp_path])
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nobody answers
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    if why == "NEXTSTEP_OFFLINE":
        monkeypatch.setenv(why, "1")
    execute = graph.pack("nodes.download").NextStepDownload.execute
    error = graph.pack("nextstep_core.errors").NextStepError
    folder = tmp_path / "NextStep-1.1"
    with pytest.raises(error, match=f"{why}.*By hand: put the files of .* into {folder}"):
        execute("NextStep-1.1")
    shutil.copytree(golden / "tiny-a", folder)
    done = execute("NextStep-1.1")
    assert done.result == (str(folder),)
    assert why in str(done.ui.as_dict()), "that it may be an older one"
    with pytest.raises(error, match=why):
        execute("NextStep-1.1", "a-tag")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / ".cache" / "huggingface" / "x.abc.incomplete").touch()
    with pytest.raises(error, match=why):
        execute("NextStep-1.1")

"""Memory that runs out in a host: less at once, weights to the host, one sentence, and the queue goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from torch import Tensor


def failing(
    monkeypatch: pytest.MonkeyPatch, owner: object, name: str, times: int, error: Callable[[], Exception]
) -> list[int]:
    """Let a function fail the first so many times; what it was called with is counted."""
    plain, calls = getattr(owner, name), []

    def fail(*arguments: object, **options: object) -> object:
        calls.append(1)
        if len(calls) <= times:
            raise error()
        return plain(*arguments, **options)

    monkeypatch.setattr(owner, name, fail)
    return calls


def of_the_device() -> Exception:
    return torch.OutOfMemoryError("Tried to allocate 2.00 GiB")


def of_the_host() -> Exception:
    return RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [of_the_device, of_the_host])
@pytest.mark.parametrize("times", [1, 2])
def test_decoding_goes_on_in_tiles(graph: ComfyGraph, monkeypatch, error: Callable[[], Exception], times: int) -> None:
    prompt = text_to_image(seed=50 + times)
    wanted = graph.value(prompt, "decode")
    vae = graph.value(prompt, "model", 1)
    prompt["sampler"]["inputs"]["seed"] += 100
    calls = failing(monkeypatch, vae.first_stage_model, "decode", times, error)
    assert graph.value(prompt, "decode").shape == wanted.shape and len(calls) > times


def test_encoding_goes_on_in_tiles(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = text_to_image(seed=60)
    prompt["picture"] = node("EmptyImage", width=64, height=64, batch_size=1, color=255)
    prompt["positive"] = node(
        "NextStepEditEncode", model=["model", 0], vae=["model", 1], image=["picture", 0], instruction="<image>Snow.",
        size="keep", width=64, height=64,
    )  # fmt: skip
    prompt["sampler"]["inputs"]["latent"] = ["positive", 1]
    calls = failing(monkeypatch, graph.value(prompt, "model", 1).first_stage_model, "encode", 1, of_the_host)
    graph.run(prompt)
    assert len(calls) > 1


@pytest.mark.parametrize("stage", ["decode", "draw", "load"])
def test_where_nothing_helps_it_is_one_sentence_and_the_queue_goes_on(
    graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    prompt = text_to_image(seed=70)
    graph.run(prompt)
    with monkeypatch.context() as patch:
        if stage == "decode":
            patch_owner, name = graph.value(prompt, "model", 1).first_stage_model, "decode"
        elif stage == "draw":
            patch_owner, name = graph.pack("nextstep_core.decoding.steps").TransformerStep, "run"
        else:
            prompt["model"]["inputs"]["quantization"] = "int8"  # a model that is not loaded yet
            patch_owner, name = graph.pack("nodes.host.models"), "fill"
        failing(patch, patch_owner, name, 1000, of_the_device)
        prompt["sampler"]["inputs"]["seed"] += 1
        with pytest.raises(AssertionError, match=r"needs .* \(.*Tried to allocate 2.00 GiB\)"):
            graph.run(prompt)
    graph.run(prompt)


def test_weights_are_sent_to_the_host_when_one_picture_is_too_much(
    graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way from the engine to the host's own unloading; what that does is shown where memory is short."""
    host, sent = graph.pack("nodes.host"), []
    step = graph.pack("nextstep_core.decoding.steps").TransformerStep
    run = step.run

    def fail(self: object, *arguments: object) -> Tensor:
        if not sent:
            raise of_the_device()
        return run(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step, "run", fail)
        patch.setattr(host, "send_away", lambda patcher: sent.append(patcher) or True)
        prompt = text_to_image(seed=80)
        graph.run(prompt)
    assert sent == [graph.value(prompt, "model").patcher]


def test_free_empties_what_is_kept_of_prompts(graph: ComfyGraph) -> None:
    prompt = text_to_image(seed=90)
    kept = graph.value(prompt, "model").engine.caches.prefilled
    assert kept.nbytes
    gone = weakref.ref(kept)
    del kept
    graph.free()
    assert gone() is None

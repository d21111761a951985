"""Interrupt stops whatever a node is at, inside the host's own VAE too."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from torch import nn


@pytest.fixture
def interrupt(graph: ComfyGraph) -> Iterator[Callable[..., None]]:
    """Hooks that press Interrupt; a run that was stopped leaves the host as it was."""
    import comfy.model_management as mm

    yield lambda *_: mm.interrupt_current_processing(True)
    mm.interrupt_current_processing(False)


def stopped(graph: ComfyGraph, prompt: dict) -> bool:
    with pytest.raises(AssertionError):
        graph.run(prompt)
    return any(name == "execution_interrupted" for name, _ in graph._executor.status_messages)


def first_and_last(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    return network.conv_in, network.conv_out


@pytest.mark.parametrize("decode", ["NextStepVAEDecode", "VAEDecode"])
def test_the_vae_stops_between_two_layers(graph: ComfyGraph, interrupt, decode: str) -> None:
    prompt = text_to_image(seed=41, decode=decode)
    vae, ran = graph.value(prompt, "model", 1), []
    first, last = first_and_last(vae.first_stage_model.decoder)
    hooks = [first.register_forward_hook(interrupt), last.register_forward_hook(lambda *_: ran.append(1))]
    try:
        assert stopped(graph, prompt) and not ran
    finally:
        for hook in hooks:
            hook.remove()
    graph.run(prompt)


def test_encoding_stops_between_two_layers(graph: ComfyGraph, interrupt) -> None:
    prompt = text_to_image(seed=42)
    picture = node("EmptyImage", width=64, height=64, batch_size=1, color=255)
    edit = node(
        "NextStepEditEncode", model=["model", 0], vae=["model", 1], image=["picture", 0], instruction="<image>Snow.",
        size="keep", width=64, height=64,
    )  # fmt: skip
    prompt |= {"picture": picture, "positive": edit}
    prompt["sampler"]["inputs"]["latent"] = ["positive", 1]
    vae, ran = graph.value(prompt, "model", 1), []
    first, last = first_and_last(vae.first_stage_model.encoder)
    hooks = [first.register_forward_hook(interrupt), last.register_forward_hook(lambda *_: ran.append(1))]
    try:
        assert stopped(graph, prompt) and not ran
    finally:
        for hook in hooks:
            hook.remove()
    graph.run(prompt)


def test_reading_the_prompt_stops_between_two_layers(graph: ComfyGraph, interrupt) -> None:
    prompt = text_to_image(seed=43)
    prompt["positive"]["inputs"]["prompt"] = "a prompt that no other test has read"
    model = graph.value(prompt, "model", 0)
    ran: list[int] = []
    first, *_, last = model.engine.model.layers
    hooks = [first.register_forward_hook(interrupt), last.register_forward_hook(lambda *_: ran.append(1))]
    try:
        assert stopped(graph, prompt) and not ran
    finally:
        for hook in hooks:
            hook.remove()
    graph.run(prompt)


@pytest.mark.parametrize("stage", ["quantize_in_pieces", "choose_kernels"])
def test_loading_stops_within_a_matrix_and_between_packed_layers(
    graph: ComfyGraph, interrupt, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    prompt = text_to_image(seed=44)
    prompt["model"]["inputs"]["quantization"] = "int8" if stage == "choose_kernels" else "int4-g128"
    build = graph.pack("nextstep_core.loading.build")
    plain, ended = getattr(build, stage), []

    def watched(*arguments):
        interrupt()
        ended.append(plain(*arguments))
        return ended[-1]

    with monkeypatch.context() as patch:
        patch.setattr(build, stage, watched)
        assert stopped(graph, prompt) and not ended
    graph.run(prompt)
    assert torch.is_tensor(graph.value(prompt, "decode"))

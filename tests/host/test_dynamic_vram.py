"""Under the host's dynamic VRAM as without it: the weights stay on the card, and the pictures are the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from comfy_graph import ComfyGraph, text_to_image
from dynamic_vram import Card, make_dynamic, put_in
from torch import Tensor

from nextstep_core.loading.store import ASSETS
from scripts.workflows import EMBEDDED

FORMATS = [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("bf16", "int4"), ("bf16", "fp8")]
STREAMED = "are streamed for every token although all of them fit"
NOISE = 4096  # bytes a token: its random numbers and its place


@pytest.fixture
def card(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    graph.free()
    # The card says that it is an Apple GPU, and those are refused fp8.
    recipes = graph.pack("nextstep_core.runtime.quantization").RECIPES
    monkeypatch.setattr(graph.pack("nextstep_core.loading.build"), "find_recipe", lambda name, device: recipes[name])
    with Card() as card:
        put_in(card, monkeypatch)
        yield card
        with torch.inference_mode():
            graph.free()


@pytest.fixture
def turn_on(card: Card, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Turns dynamic VRAM on for what is loaded from then on."""
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    return lambda: make_dynamic(monkeypatch)


def drawing(dtype: str = "bf16", quantization: str = "none", model: str = EMBEDDED, seed: int = 1) -> dict:
    prompt = text_to_image(seed)
    prompt["model"]["inputs"] |= {"model_name": model, "dtype": dtype, "quantization": quantization}
    prompt["latent"]["inputs"] |= {"width": 32, "height": 32}
    return prompt


def draw(graph: ComfyGraph, card: Card, prompt: dict, of: str = "decode") -> tuple[Tensor, float]:
    """The picture, and how many bytes crossed to the card for a token."""
    engine = graph.pack("nextstep_core.decoding.engine").NextStepEngine
    decode, fetched = engine.decode, []

    def counted(self, *arguments, **options):
        for progress in decode(self, *arguments, **options):
            fetched.append(card.fetched)
            yield progress

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "decode", counted)
        picture = graph.value(prompt, of)
    return picture, (fetched[-1] - fetched[0]) / (len(fetched) - 1)


def weights_away(graph: ComfyGraph, prompt: dict) -> int:
    model = graph.value(prompt, "model")
    return sum(w.nbytes for w in model.engine.model.parameters() if w.device != model.patcher.load_device)


@pytest.mark.parametrize(("dtype", "quantization"), FORMATS)
def test_every_format_stays_on_the_card(
    graph: ComfyGraph, card: Card, turn_on: Callable[[], None], dtype: str, quantization: str
) -> None:
    prompt = drawing(dtype, quantization)
    wanted, fetched = draw(graph, card, prompt)
    assert fetched < NOISE
    graph.free()
    turn_on()
    picture, fetched = draw(graph, card, prompt)
    assert fetched < NOISE
    assert weights_away(graph, prompt) == 0, "so that a token's work can be captured"
    assert torch.equal(picture, wanted)


def test_a_model_has_its_parameters_before_they_are_read(graph: ComfyGraph, turn_on: Callable[[], None]) -> None:
    plan = graph.pack("nextstep_core.loading.build").plan_model(ASSETS / "tiny")
    turn_on()
    model = plan.empty_model(graph.pack("nodes.host").operations(torch.bfloat16, torch.bfloat16))
    assert model.state_dict().keys() == plan.empty_model().state_dict().keys()


def test_streaming_is_warned_of_where_all_should_fit(
    graph: ComfyGraph, card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as mm

    prompt = drawing()
    wanted, _ = draw(graph, card, prompt)
    assert STREAMED not in caplog.text
    graph.free()
    load = mm.LoadedModel.model_load

    def half(self, lowvram_model_memory=0, **options):
        return load(self, self.model_memory() / 2, **options)

    monkeypatch.setattr(mm.LoadedModel, "model_load", half)
    picture, fetched = draw(graph, card, prompt)
    assert caplog.text.count(STREAMED) == 1
    assert fetched > NOISE
    assert torch.equal(picture, wanted)


def test_what_is_streamed_by_plan_needs_no_warning(
    graph: ComfyGraph, card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as mm

    caplog.set_level("INFO")
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NO_VRAM)  # --novram
    prompt = drawing()
    _, fetched = draw(graph, card, prompt)
    assert weights_away(graph, prompt) >= fetched > NOISE
    assert "0.0 MB on the device" in caplog.text and STREAMED not in caplog.text

"""Under the host's dynamic VRAM as without it: the weights stay on the card, and the pictures are the same."""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from comfy_graph import PROMPT, ComfyGraph, node, text_to_image
from dynamic_vram import Card, make_dynamic, put_in
from safetensors.torch import load_file
from simulated_mps import MPS
from torch import Tensor

from nextstep_core.loading.build import plan_model
from nextstep_core.loading.single_file import save_model
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


def one_box() -> dict:
    prompt = drawing()
    sampler = {k: v for k, v in prompt["sampler"]["inputs"].items() if k not in ("model", "positive", "latent")}
    shape = {"prompt": PROMPT, "negative_prompt": "", "width": 32, "height": 32, "batch_size": 1}
    box = node("NextStepTextToImage", model=["model", 0], vae=["model", 1], **sampler, **shape)
    return {"model": prompt["model"], "decode": box}


def edit() -> dict:
    prompt = drawing()
    picture = node("EmptyImage", width=32, height=32, batch_size=1, color=0x2050E0)
    how = {"instruction": "<image>make it red", "size": "keep", "width": 32, "height": 32}
    encoded = node("NextStepEditEncode", model=["model", 0], vae=["model", 1], image=["picture", 0], **how)
    prompt["sampler"]["inputs"] |= {"positive": ["edit", 0], "latent": ["edit", 1]}
    return prompt | {"picture": picture, "edit": encoded}


def masked() -> dict:
    prompt = drawing()
    prompt["mask"] = node("SolidMask", value=1.0, width=16, height=32)
    prompt["clear"] = node("SolidMask", value=0.0, width=32, height=32)
    prompt["half"] = node("MaskComposite", destination=["clear", 0], source=["mask", 0], x=0, y=0, operation="add")
    prompt["masked"] = node("SetLatentNoiseMask", samples=["latent", 0], mask=["half", 0])
    prompt["sampler"]["inputs"]["latent"] = ["masked", 0]
    return prompt


def with_negative_in_a_batch() -> dict:
    prompt = drawing("bf16", "int8")
    prompt["negative"] = node("NextStepTextEncode", model=["model", 0], prompt="blurry")
    prompt["sampler"]["inputs"]["negative"] = ["negative", 0]
    prompt["latent"]["inputs"]["batch_size"] = 2
    return prompt


def two_prompts() -> dict:
    prompt = drawing("bf16", "int4")
    prompt["other"] = node("NextStepTextEncode", model=["model", 0], prompt="a green square on a white background")
    prompt["both"] = node("NextStepPromptBatch", first=["positive", 0], second=["other", 0])
    prompt["sampler"]["inputs"]["positive"] = ["both", 0]
    prompt["latent"]["inputs"]["batch_size"] = 2
    return prompt


def single_file() -> dict:
    return drawing(model="nextstep-int8.safetensors")


def gguf_file() -> dict:
    return drawing(model="tiny-q8/transformer.gguf")


def write_gguf(folder: Path) -> None:
    """The embedded model with its transformer's matrices in a GGUF file of 8 bits, the rest beside it."""
    gguf = pytest.importorskip("gguf")
    shutil.copytree(ASSETS / "tiny", folder)
    kind, tensors = gguf.GGMLQuantizationType.Q8_0, load_file(ASSETS / "tiny" / "model-00001-of-00001.safetensors")
    writer = gguf.GGUFWriter(folder / "transformer.gguf", "qwen2")
    for name, tensor in tensors.items():
        if "layers." in name and name.endswith("_proj.weight"):
            writer.add_tensor(name, gguf.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


PATHS = [one_box, edit, masked, with_negative_in_a_batch, two_prompts, single_file, gguf_file]


@pytest.mark.parametrize("path", PATHS)
def test_every_way_to_draw_stays_on_the_card(
    graph: ComfyGraph, card: Card, turn_on: Callable[[], None], tmp_path: Path, path: Callable[[], dict]
) -> None:
    import folder_paths

    for kind in ("diffusion_models", "nextstep"):
        folder_paths.add_model_folder_path(kind, str(tmp_path))
    if path is single_file:
        save_model(plan_model(ASSETS / "tiny", "int8"), tmp_path / "nextstep-int8.safetensors", torch.float16)
    if path is gguf_file:
        write_gguf(tmp_path / "tiny-q8")
    try:
        wanted, fetched = draw(graph, card, path(), "decode")
        assert fetched < 3 * NOISE, "of a batch"
        graph.free()
        turn_on()
        picture, fetched = draw(graph, card, path(), "decode")
        assert fetched < 3 * NOISE
        assert weights_away(graph, path()) == 0
    finally:
        for kind in ("diffusion_models", "nextstep"):
            folder_paths.folder_names_and_paths[kind][0].remove(str(tmp_path))
    assert torch.equal(picture, wanted)


def test_models_in_turn_and_free(
    graph: ComfyGraph, card: Card, turn_on: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of ours and a VAE under dynamic VRAM on one card, with memory for little more than one of them."""
    import comfy.model_management as mm

    turn_on()
    monkeypatch.setattr(mm, "vae_device", lambda: MPS)
    both = {}
    for n, prompt in enumerate([drawing("bf16", "int8"), drawing("bf16")]):
        for name, each in prompt.items():
            inputs = {k: [f"{v[0]} {n}", v[1]] if isinstance(v, list) else v for k, v in each["inputs"].items()}
            both[f"{name} {n}"] = each | {"inputs": inputs}
    host, plans = graph.pack("nodes.host"), []
    plan_memory = host.plan_memory
    monkeypatch.setattr(host, "plan_memory", lambda *args: plans.append(plan_memory(*args)) or plans[-1])
    wanted = [draw(graph, card, both, f"decode {n}")[0] for n in range(2)]
    assert len(mm.current_loaded_models) >= 3
    card.memory = max(int(plan.weights * 1.1) + plan.working for plan in plans)  # the host wants a tenth to spare
    for n in (0, 1, 0):
        settings = both[f"sampler {n}"]["inputs"]
        settings["seed"] = 2
        graph.value(both, f"sampler {n}")  # so that the one that is asked for is drawn anew
        settings["seed"] = 1
        picture, fetched = draw(graph, card, both, f"decode {n}")
        assert torch.equal(picture, wanted[n])
        assert fetched < NOISE
        assert sum(type(entry.model.model).__name__ == "NextStepModel" for entry in mm.current_loaded_models) == 1
    models = [weakref.ref(graph.value(both, f"model {n}").engine.model) for n in range(2)]
    graph.free()
    assert not mm.current_loaded_models and not any(model() for model in models)
    picture, fetched = draw(graph, card, both, "decode 1")
    assert torch.equal(picture, wanted[1]) and fetched < NOISE


@pytest.mark.parametrize("away", [False, True], ids=["resident", "streamed"])
def test_an_interrupt_in_any_layer_leaves_a_usable_model(
    graph: ComfyGraph, card: Card, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """Newer hosts look for it in every layer, also while the prompt is read."""
    import comfy.model_management as mm

    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.NO_VRAM if away else mm.VRAMState.NORMAL_VRAM)
    prompt = drawing()
    model = graph.value(prompt, "model")
    net = model.engine.model
    model.engine.caches.prefilled.max_bytes = 0  # every run reads the prompt
    wanted = graph.value(prompt, "sampler")["samples"]
    places = {name: weight.device for name, weight in net.named_parameters()}
    prompt["sampler"]["inputs"]["seed"] = 2
    for layer in (net.layers[0].mlp.down_proj, net.layers[-1].input_layernorm, net.head.input_proj):
        for nth in (1, 3):
            calls = iter(range(nth - 1))

            def stop(*_: object, calls: Iterator[int] = calls) -> None:
                if next(calls, None) is None:
                    raise mm.InterruptProcessingException

            handle = layer.register_forward_pre_hook(stop)
            with pytest.raises(AssertionError, match="failed"):
                graph.value(prompt, "sampler")
            handle.remove()
            assert places == {name: weight.device for name, weight in net.named_parameters()}
    prompt["sampler"]["inputs"]["seed"] = 1
    assert torch.equal(graph.value(prompt, "sampler")["samples"], wanted)

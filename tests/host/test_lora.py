"""LoRAs in the host: a changed model beside the plain one, on the same weights, by files of its own folders."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from lora_files import kohya, matrices, write
from PIL import Image

from nextstep_core.model.config import NextStepConfig

GOLDEN = Path(__file__).resolve().parent.parent / "data" / "golden" / "tiny-a"


@pytest.fixture(scope="module")
def config() -> NextStepConfig:
    return NextStepConfig.from_dict(json.loads((GOLDEN / "config.json").read_text()))


@pytest.fixture(scope="module")
def loras(graph: ComfyGraph, config: NextStepConfig, tmp_path_factory) -> Iterator[Path]:
    """A further folder of the host for LoRAs, as extra_model_paths.yaml adds one."""
    import folder_paths

    folder = tmp_path_factory.mktemp("loras")
    write(folder / "all.safetensors", matrices(config))
    write(folder / "styles" / "head.safetensors", matrices(config, layers=["image_head.net.res_blocks.0.mlp.0"]), kohya)
    write(folder / "flux.safetensors", {"double_blocks.0.img_attn.proj": next(iter(matrices(config).values()))})
    (folder / "old.pt").write_bytes(b"\0" * 99)
    folder_paths.add_model_folder_path("loras", str(folder))
    yield folder
    folder_paths.folder_names_and_paths["loras"][0].remove(str(folder))


def with_loras(*loras: tuple[str, float], **loader) -> dict:
    """The text-to-image graph with LoRA nodes in a row before the sampler."""
    prompt, before = text_to_image(), "model"
    prompt["model"]["inputs"] |= loader
    for number, (name, strength) in enumerate(loras):
        prompt[f"lora{number}"] = node("NextStepLoadLora", model=[before, 0], lora_name=name, strength=strength)
        before = f"lora{number}"
    prompt["sampler"]["inputs"]["model"] = [before, 0]
    return prompt


def picture(graph: ComfyGraph, prompt: dict) -> np.ndarray:
    (path,) = graph.saved(graph.run(prompt))
    return np.asarray(Image.open(path), dtype=np.float32)


def test_the_list_holds_what_is_read_here_and_what_comes_with_the_pack(graph: ComfyGraph, loras: Path) -> None:
    names = graph.nodes.NODE_CLASS_MAPPINGS["NextStepLoadLora"].define_schema().inputs[1].options
    assert {"all.safetensors", str(Path("styles") / "head.safetensors")} <= set(names) and "old.pt" not in names
    assert names[-1] == "night (embedded)"


@pytest.mark.parametrize("recipe", ["none", "int8"])
def test_a_lora_changes_the_picture_and_strength_0_does_not(graph: ComfyGraph, loras: Path, recipe: str) -> None:
    plain = picture(graph, with_loras(quantization=recipe))
    changed = picture(graph, with_loras(("all.safetensors", 0.5), quantization=recipe))
    assert np.abs(changed - plain).mean() > 1
    assert (picture(graph, with_loras(("all.safetensors", 0.0), quantization=recipe)) == plain).all()
    split = picture(graph, with_loras(("all.safetensors", 0.2), ("all.safetensors", 0.3), quantization=recipe))
    assert (split == changed).all(), "strengths of one file add up"
    back = picture(graph, with_loras(("all.safetensors", 0.5), ("all.safetensors", -0.5), quantization=recipe))
    assert (back == plain).all()
    assert (picture(graph, with_loras(quantization=recipe)) == plain).all()


def test_plain_and_changed_model_share_their_weights_in_one_graph(graph: ComfyGraph, loras: Path) -> None:
    """The node returns a changed model; the one that it was given draws as before, on the same weights."""
    prompt = with_loras(("all.safetensors", 0.5), (str(Path("styles") / "head.safetensors"), 2.0))
    for name, source in (("plain", "model"), ("one", "lora0")):
        prompt[f"{name} sampler"] = {
            **prompt["sampler"],
            "inputs": prompt["sampler"]["inputs"] | {"model": [source, 0]},
        }
        prompt[f"{name} decode"] = node("NextStepVAEDecode", samples=[f"{name} sampler", 0], vae=["model", 1])
        prompt[name] = node("SaveImage", images=[f"{name} decode", 0], filename_prefix="test")
    outputs = graph.run(prompt)
    drawn = {name: Image.open(*graph.saved(outputs, name)).tobytes() for name in ("save", "plain", "one")}
    assert len(set(drawn.values())) == 3
    alone = {
        "plain": with_loras(),
        "one": with_loras(("all.safetensors", 0.5)),
    }
    for name, alone_prompt in alone.items():
        assert Image.open(*graph.saved(graph.run(alone_prompt))).tobytes() == drawn[name], name
    plain, changed = (graph.value(prompt, source) for source in ("model", "lora1"))
    assert plain.engine.model is changed.engine.model and plain.patcher is changed.patcher
    assert plain.engine.caches is changed.engine.caches and not plain.engine.loras.parts


def test_a_file_that_was_written_again_is_read_again(graph: ComfyGraph, config: NextStepConfig, loras: Path) -> None:
    path = write(loras / "mine.safetensors", matrices(config))
    first = picture(graph, with_loras(("mine.safetensors", 0.5)))
    write(path, matrices(config, rank=2, seed=5))
    second = picture(graph, with_loras(("mine.safetensors", 0.5)))
    assert np.abs(first - second).mean() > 1


@pytest.mark.parametrize(
    ("name", "said"), [("flux.safetensors", "Flux"), ("gone.safetensors", "no LoRA"), ("night (embedded)", "another")]
)
def test_wrong_files_are_told_of(graph: ComfyGraph, loras: Path, name: str, said: str) -> None:
    how, message = graph.ending(with_loras((name, 1.0)))
    assert said in message and how != "done"


def test_what_is_no_lora_is_refused_before_the_model_is_loaded(graph: ComfyGraph, loras: Path) -> None:
    (loras / "broken.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    how, message = graph.ending(with_loras(("broken.safetensors", 1.0)))
    assert how == "refused" and "no LoRA" in message
    how, message = graph.ending(with_loras(("all.safetensors", 101.0)))
    assert how == "refused" and "strength" in message


def test_pictures_tell_of_it(graph: ComfyGraph, loras: Path) -> None:
    prompt = with_loras(("all.safetensors", 0.25), (str(Path("styles") / "head.safetensors"), 1.0))
    prompt["save"] = node(
        "NextStepSaveImage",
        image=["decode", 0], filename_prefix="told", format="png", quality=90, info=["sampler", 1],
    )  # fmt: skip
    (path,) = graph.saved(graph.run(prompt))
    first, *_, last = Image.open(path).text["parameters"].splitlines()
    assert first.endswith(" <lora:all:0.25> <lora:head:1>") and 'Lora hashes: "all: ' in last
    info = graph.value(with_loras(("all.safetensors", 0.25), ("all.safetensors", -0.25)), "sampler", 1)
    assert "lora" not in info.texts[0].lower(), "what cancels out was not there"


def test_a_batch_with_a_lora_is_another_batch(graph: ComfyGraph, loras: Path) -> None:
    studio = graph.pack("nodes.studio")
    models = {s: graph.value(with_loras(("all.safetensors", s)), "lora0") for s in (0.0, 0.5, 0.75)}
    artists = [studio.HostArtist(model, model.vae) for model in models.values()]
    assert len({artist.identity for artist in artists}) == 3
    assert "<lora:all:0.5>" in artists[1].facts.values() and len(artists[0].facts) + 2 == len(artists[1].facts)


def test_the_models_card_names_it(graph: ComfyGraph, loras: Path) -> None:
    prompt = with_loras(("all.safetensors", 0.25))
    prompt["card"] = node("NextStepModelInfo", model=["lora0", 0], width=64, height=64)
    assert "<lora:all:0.25>" in graph.value(prompt, "card")


def test_its_memory_is_planned_for(graph: ComfyGraph, loras: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host, asked = graph.pack("nodes.host"), []
    real = host.plan_memory
    monkeypatch.setattr(host, "plan_memory", lambda *given: asked.append(given) or real(*given))
    picture(graph, with_loras(("all.safetensors", 0.35)))
    model = graph.value(with_loras(("all.safetensors", 0.35)), "lora0")
    assert asked[0][-1] == model.engine.lora_bytes(torch.float32) > 0


def test_what_it_takes_of_the_device_goes_with_the_model(graph: ComfyGraph, loras: Path) -> None:
    prompt = with_loras(("all.safetensors", 0.45))
    picture(graph, prompt)
    attachments = graph.value(prompt, "lora0").engine.caches.adapters
    assert attachments._last is not None
    graph.free()
    assert attachments._last is None

"""Single files in the host: in the folders where its users keep models, beside its own loaders, and without a VAE."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image

from nextstep_core.loading.build import plan_model
from nextstep_core.loading.single_file import save_model, save_vae
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import VAEConfig
from nextstep_core.model.vae import AutoencoderKL
from scripts.workflows import EMBEDDED

TINY = ASSETS / "tiny"
PUBLISHED_VAE_CONFIG = {
    "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2, "z_channels": 16, "in_channels": 3, "out_ch": 3,
    "resolution": 256, "scaling_factor": 1.0, "shift_factor": 0.0, "deterministic": True, "encoder_norm": True,
    "psz": 2,
}  # fmt: skip
BLOCKED = "This checkpoint has no VAE of its own. Use a Load NextStep VAE node instead of this output."


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded checkpoint as single files; fp16 is what it is stored in."""
    folder = tmp_path_factory.mktemp("single")
    for recipe in ("int8", "int4"):
        save_model(plan_model(TINY, recipe), folder / f"nextstep-{recipe}.safetensors", torch.float16)
    return folder


@pytest.fixture
def folders(graph: ComfyGraph, tmp_path: Path) -> Iterator[Path]:
    """Empty folders of a further disk, as extra_model_paths.yaml adds them: nextstep, diffusion_models and vae."""
    import folder_paths

    names = ("nextstep", "diffusion_models", "vae")
    for name in names:
        (tmp_path / name).mkdir()
        folder_paths.add_model_folder_path(name, str(tmp_path / name))
    yield tmp_path
    for name in names:
        folder_paths.folder_names_and_paths[name][0].remove(str(tmp_path / name))


def drawing(model_name: str, **loader) -> dict:
    """The text-to-image graph on another checkpoint."""
    prompt = text_to_image()
    prompt["model"]["inputs"] |= {"model_name": model_name} | loader
    prompt["positive"]["inputs"]["prompt"] = "a red circle on a blue background"
    return prompt


def test_the_dropdowns_list_single_files_of_both_folders_and_gguf(graph: ComfyGraph, folders: Path, files: Path):
    shutil.copy(files / "nextstep-int8.safetensors", folders / "diffusion_models" / "own.safetensors")
    (folders / "nextstep" / "mine").mkdir()
    shutil.copy(files / "nextstep-int4.safetensors", folders / "nextstep" / "mine")
    (folders / "nextstep" / "Q4").mkdir()
    shutil.copy(TINY / "config.json", folders / "nextstep" / "Q4")
    (folders / "nextstep" / "Q4" / "model.gguf").touch()
    (folders / "diffusion_models" / "flux.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    save_vae(TINY / "vae", folders / "vae" / "nextstep-vae.safetensors", torch.float16)
    save_vae(TINY / "vae", folders / "nextstep" / "vae-too.safetensors", torch.float16)
    (folders / "vae" / "diffusers").mkdir()
    (folders / "vae" / "diffusers" / "config.json").write_text('{"latent_channels": 16}')
    (folders / "vae" / "diffusers" / "foreign.safetensors").touch()
    catalog = graph.pack("nodes.catalog")
    models, vaes = {"own.safetensors", "mine/nextstep-int4.safetensors", "Q4/model.gguf"}, {"nextstep-vae.safetensors"}
    assert set(catalog.models()) == models | {"tiny-a", EMBEDDED}
    assert set(catalog.vaes()) == vaes | {"vae-too.safetensors", "tiny-a/vae", EMBEDDED}
    options = graph.nodes.NODE_CLASS_MAPPINGS["NextStepModelLoader"].define_schema().inputs[0].options
    assert models <= set(options)


@pytest.mark.parametrize("recipe", ["int8", "int4"])
def test_a_single_file_draws_what_the_folder_quantized_draws(
    graph: ComfyGraph, folders: Path, files: Path, recipe: str
) -> None:
    name = f"nextstep-{recipe}.safetensors"
    shutil.copy(files / name, folders / "diffusion_models")
    file, folder, plain = (
        graph.value(drawing(model, quantization=quantization), "sampler")["samples"]
        for model, quantization in ((name, "none"), (EMBEDDED, recipe), (EMBEDDED, "none"))
    )
    assert (file - folder).abs().max() <= 1e-4
    assert (plain - folder).abs().max() > 1e-3, "quantized at all"


def test_a_quantized_file_in_another_format_is_one_sentence_and_the_queue_lives_on(
    graph: ComfyGraph, folders: Path, files: Path
) -> None:
    name = "nextstep-int8.safetensors"
    shutil.copy(files / name, folders / "diffusion_models")
    with pytest.raises(AssertionError, match=f"{name} is already quantized to int8. Choose no quantization, or"):
        graph.run(drawing(name, quantization="int4"))
    graph.run(drawing(name, quantization="int8"))


@torch.inference_mode()
def test_cores_vae_loader_opens_our_vae_file(graph: ComfyGraph, folders: Path, tmp_path: Path) -> None:
    """Of the published shape: the one whose width the host's loader knows."""
    published = tmp_path / "NextStep-1-f8ch16-Tokenizer"
    published.mkdir()
    (published / "config.json").write_text(json.dumps(PUBLISHED_VAE_CONFIG))
    torch.manual_seed(0)
    state = AutoencoderKL(VAEConfig.from_dict(PUBLISHED_VAE_CONFIG)).to(torch.bfloat16).state_dict()
    torch.save(state, published / "checkpoint.pt")
    save_vae(published, folders / "vae" / "nextstep-vae.safetensors", torch.bfloat16)
    prompt = {
        "ours": node("NextStepVAELoader", vae_name="nextstep-vae.safetensors"),
        "core": node("VAELoader", vae_name="nextstep-vae.safetensors"),
    }
    vaes = [graph.value(prompt, source) for source in ("ours", "core")]
    latent = torch.randn(1, 16, 6, 8, generator=torch.Generator().manual_seed(1))
    ours, core = (vae.decode(latent) for vae in vaes)
    assert ours.shape == (1, 48, 64, 3) and ours.std() > 0.01
    assert torch.equal(ours, core)


def blocked(graph: ComfyGraph, model_name: str) -> bool:
    """Draw with the loader's own vae output; whether it was held back with its message."""
    before = len(graph.server.events)
    graph.run(drawing(model_name))
    errors = [data for name, data in graph.server.events[before:] if name == "execution_error"]
    assert all(BLOCKED in error["exception_message"] for error in errors), errors
    return bool(errors)


def test_a_single_file_takes_the_one_vae_that_is_there(
    graph: ComfyGraph, folders: Path, files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for roots, name in (("model_roots", "nextstep"), ("vae_roots", "vae")):  # without the checkpoint of other tests
        monkeypatch.setattr(graph.pack("nodes.host"), roots, lambda folder=folders / name: [folder])
    name = "nextstep-int8.safetensors"
    shutil.copy(files / name, folders / "diffusion_models")
    assert blocked(graph, name), "the embedded VAE belongs to the embedded model"

    save_vae(TINY / "vae", folders / "vae" / "nextstep-vae.safetensors", torch.float16)
    assert not blocked(graph, name), "found on the next run, without a restart"
    named = drawing(name)
    named["vae"] = node("NextStepVAELoader", vae_name="nextstep-vae.safetensors")
    named["named"] = node("NextStepVAEDecode", samples=["sampler", 0], vae=["vae", 0])
    assert torch.equal(graph.value(named, "decode"), graph.value(named, "named"))

    save_vae(TINY / "vae", folders / "vae" / "another.safetensors", torch.float16)
    assert blocked(graph, name), "two: the user has to say which"

"""Nodes in the host's own executor and under its memory management, in this process."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from comfy_graph import PROMPT, ComfyGraph, node, text_to_image
from PIL import Image

from scripts.comfy_server import ROOT
from scripts.release_check import requirements


def picture(graph: ComfyGraph, prompt: dict) -> np.ndarray:
    (path,) = graph.saved(graph.run(prompt))
    return np.asarray(Image.open(path), dtype=np.float32)


@pytest.fixture(scope="module")
def model(graph: ComfyGraph):
    loaders = graph.pack("nodes.loaders")
    return loaders.load_model("tiny-a", loaders.LoadOptions("fp32"))


def latents_of(graph: ComfyGraph, model, seed: int = 3) -> torch.Tensor:
    sampler, prompts = graph.pack("nodes.sampler"), graph.pack("nodes.prompts")
    settings = model.engine.recommended().override(steps=4, cfg=3.0)
    with torch.inference_mode():
        latent = {"samples": torch.zeros(1, 16, 8, 6)}
        return sampler.sample(model, prompts.encode_prompt(model, PROMPT), None, latent, seed, settings)["samples"]


def test_every_control_of_the_sampler_reaches_the_picture(graph: ComfyGraph) -> None:
    base = picture(graph, text_to_image())
    changes = (
        {"seed": 2}, {"steps": 5}, {"cfg": 2.0}, {"cfg_schedule": "linear"}, {"shift": 2.0}, {"sampler": "flow-ode"},
        {"use_norm": "off"},
    )  # fmt: skip
    for change in changes:
        assert np.abs(picture(graph, text_to_image(**change)) - base).max() > 0, change


def test_progress_is_said_for_every_token(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the host's bar, which may then leave some out on their way to the screen."""
    import comfy.utils

    said = []
    update = comfy.utils.ProgressBar.update_absolute

    def recording(bar, value, *arguments, **options) -> None:
        said.append((value, bar.total))
        update(bar, value, *arguments, **options)

    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", recording)
    graph.run(text_to_image(seed=41))
    assert [value for value, total in said if total == 12] == list(range(1, 13)), "the loader's bar is longer"


def test_negative_prompt_and_suffix_reach_the_picture(graph: ComfyGraph) -> None:
    base, with_negative, with_suffix = text_to_image(), text_to_image(), text_to_image()
    with_negative["negative"] = {**base["positive"], "inputs": {"model": ["model", 0], "prompt": "blurry"}}
    with_negative["sampler"]["inputs"]["negative"] = ["negative", 0]
    with_suffix["positive"]["inputs"]["positive_suffix"] = "best quality."
    pictures = [picture(graph, prompt) for prompt in (base, with_negative, with_suffix)]
    assert all(np.abs(changed - pictures[0]).max() > 0 for changed in pictures[1:])


def test_core_nodes_take_our_vae_and_latent(graph: ComfyGraph) -> None:
    ours = picture(graph, text_to_image())
    assert np.array_equal(picture(graph, text_to_image(decode="VAEDecode")), ours)
    tiled = text_to_image(decode="VAEDecodeTiled")
    tiled["decode"]["inputs"] |= {"tile_size": 64, "overlap": 32, "temporal_size": 64, "temporal_overlap": 8}
    assert np.abs(picture(graph, tiled) - ours).mean() < 10, "group norm sees less of the picture in a tile"
    round_trip = text_to_image()
    round_trip["again"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["decode", 0], "vae": ["model", 1]}}
    round_trip["decode again"] = {"class_type": "VAEDecode", "inputs": {"samples": ["again", 0], "vae": ["model", 1]}}
    round_trip["save"]["inputs"]["images"] = ["decode again", 0]
    assert picture(graph, round_trip).shape == ours.shape


def test_the_vae_alone_is_the_checkpoints(graph: ComfyGraph) -> None:
    alone = text_to_image()
    alone["vae"] = {"class_type": "NextStepVAELoader", "inputs": {"vae_name": "tiny-a/vae"}}
    alone["decode"]["inputs"]["vae"] = ["vae", 0]
    assert np.array_equal(picture(graph, alone), picture(graph, text_to_image()))


def test_a_core_empty_latent_of_16_channels_will_do(graph: ComfyGraph) -> None:
    prompt = text_to_image()
    prompt["latent"]["class_type"] = "EmptySD3LatentImage"
    assert picture(graph, prompt).shape == (64, 48, 3)


def test_model_is_loaded_once_and_let_go(graph: ComfyGraph) -> None:
    loaders = graph.pack("nodes.loaders")
    first = loaders.load_model("tiny-a", loaders.LoadOptions("bf16"))
    assert loaders.load_model("tiny-a", loaders.LoadOptions("bf16")) is first
    assert loaders.load_model("tiny-a", loaders.LoadOptions("fp32")) is not first
    del first
    gc.collect()
    assert not any(options.dtype == "bf16" for _, options in loaders._loaded), "nothing of ours keeps a model alive"


@pytest.mark.parametrize("own_vae", [True, False])
def test_short_of_ram_a_model_is_kept_while_its_workflow_is_in_use(
    graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch, own_vae: bool
) -> None:
    loaders, loaded = graph.pack("nodes.loaders"), []
    load = loaders._load

    def recording(*arguments):
        model = load(*arguments)
        loaded.append(weakref.ref(model))
        return model

    monkeypatch.setattr(loaders, "_load", recording)
    if not own_vae:
        monkeypatch.setattr(graph.pack("nodes.catalog"), "vae_of", lambda path: None)
    prompt = {seed: text_to_image(seed) for seed in (1, 2, 3)}
    for each in prompt.values():
        each["model"]["inputs"]["dtype"] = "bf16"
        each["vae"] = node("NextStepVAELoader", vae_name="tiny-a/vae")
        each["decode"]["inputs"]["vae"] = ["vae", 0]
    other = {"picture": node("EmptyImage", width=16, height=16, batch_size=1, color=0)}
    other["save"] = node("SaveImage", images=["picture", 0], filename_prefix="test")
    with graph.short_of_ram():
        graph.run(prompt[1])
        graph.run(prompt[2])
        assert len(loaded) == 1
        graph.run(other)
        gc.collect()
        assert loaded[0]() is None, "another workflow may have the memory"
        graph.run(prompt[2])
        assert len(loaded) == 2 and loaded[1]() is not None
        graph.free()
        assert loaded[1]() is None


def test_model_lives_under_the_hosts_memory_management(graph: ComfyGraph, model) -> None:
    import comfy.model_management as mm

    before = latents_of(graph, model)
    assert any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    mm.unload_all_models()
    assert not any(loaded.model is model.patcher for loaded in mm.current_loaded_models)
    assert torch.equal(latents_of(graph, model), before)


@pytest.mark.parametrize("disabled", [False, True])
def test_the_hosts_flag_turns_cuda_graphs_off(graph: ComfyGraph, monkeypatch, disabled: bool) -> None:
    from comfy.cli_args import args

    monkeypatch.setattr(args, "disable_cuda_graphs", disabled, raising=False)
    loaders = graph.pack("nodes.loaders")
    model = loaders.load_model("tiny-a", loaders.LoadOptions("bf16", cuda_graphs=True))
    assert (model.engine.caches.graphs is None) == disabled


def test_memory_estimate_covers_the_cache(graph: ComfyGraph, model, monkeypatch: pytest.MonkeyPatch) -> None:
    import comfy.model_management as mm

    asked, load = [], mm.load_models_gpu

    def recording(models, memory_required=0, **options):
        asked.append((models, memory_required))
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(mm, "load_models_gpu", recording)
    latents_of(graph, model)
    cache = 2 * 3 * 2 * 16 * 4 * 2 * (17 + 12)  # k and v, layers, heads, head size, float32, branches, positions
    (required,) = [memory for models, memory in asked if models == [model.patcher]]
    assert required > cache
    assert model.patcher.model_size() == sum(p.nbytes for p in model.engine.model.parameters())


@pytest.mark.parametrize("dtype", ["auto", "bf16", "fp16"])
def test_every_storage_type_draws_nearly_the_same(graph: ComfyGraph, model, dtype: str) -> None:
    loaders = graph.pack("nodes.loaders")
    other = loaders.load_model("tiny-a", loaders.LoadOptions(dtype))
    stored = {p.dtype for p in other.engine.model.parameters()}
    assert stored == {"auto": {torch.float32}, "bf16": {torch.bfloat16}, "fp16": {torch.float16}}[dtype]
    sampler, prompts = graph.pack("nodes.sampler"), graph.pack("nodes.prompts")
    latent, settings = {"samples": torch.zeros(1, 16, 2, 2)}, model.engine.recommended().override(steps=4, cfg=2.0)
    with torch.inference_mode():
        a, b = (
            sampler.sample(m, prompts.encode_prompt(m, PROMPT), None, latent, 3, settings)["samples"]
            for m in (model, other)
        )
    assert (a - b).abs().mean() < 0.1, "one token: rounding has no chain to grow along"


@pytest.mark.parametrize("shape", ["published", "narrow"])
@torch.inference_mode()
def test_the_native_vae_equals_the_engines(graph: ComfyGraph, golden: Path, shape: str) -> None:
    """The host's own VAE class with our normalization, in the published width and in another one."""
    host, vae_module = graph.pack("nodes.host"), graph.pack("nextstep_core.model.vae")
    config_class = graph.pack("nextstep_core.model.config").VAEConfig
    if shape == "narrow":
        config, state = graph.pack("nextstep_core.loading.build").load_vae_state(golden / "tiny-a" / "vae")
    else:
        config = config_class(128, (1, 2, 4, 4), 2, 16, encoder_norm=True, psz=2, scaling_factor=1.0, shift_factor=0.0)
        torch.manual_seed(0)
        state = vae_module.AutoencoderKL(config).state_dict()
    ours = vae_module.AutoencoderKL(config, device="meta").eval()
    ours.load_state_dict(state, assign=True)
    native = host.native_vae(config, state)
    assert native.latent_channels == 16
    pixels = torch.rand(1, 64, 48, 3, generator=torch.Generator().manual_seed(1))
    latents = ours.encode_moments(pixels.movedim(-1, 1) * 2 - 1)[0]
    assert (native.encode(pixels) - latents).abs().max() <= 5e-5
    decoded = (ours.decode(latents).movedim(1, -1) / 2 + 0.5).clamp(0, 1)
    assert (native.decode(latents) - decoded).abs().max() <= 1e-4
    assert native.decode_tiled(latents).shape == decoded.shape


def test_vae_of_another_kind_is_one_sentence(graph: ComfyGraph) -> None:
    class FourChannels:
        latent_channels = 4

    error = graph.pack("nextstep_core.errors").NextStepError
    with pytest.raises(error, match="the VAE decodes 4 channels. Connect the vae output of Load NextStep Model"):
        graph.pack("nodes.latents").decode_latent(FourChannels(), {"samples": torch.zeros(1, 16, 8, 8)})


def test_dropdown_names_every_layout(graph: ComfyGraph, golden: Path, tmp_path: Path, monkeypatch) -> None:
    import folder_paths

    shutil.copytree(golden / "tiny-a", tmp_path / "stepfun-ai" / "NextStep-1.1")
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(golden / "tiny-a" / "config.json", single)
    (single / "nextstep-fp16.safetensors").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    folder_paths.add_model_folder_path("nextstep", str(tmp_path))  # what extra_model_paths.yaml does
    try:
        names = list(graph.pack("nodes.catalog").models())
    finally:
        folder_paths.folder_names_and_paths["nextstep"][0].remove(str(tmp_path))
    assert {"tiny-a", "stepfun-ai/NextStep-1.1", "single/nextstep-fp16.safetensors"} <= set(names)
    assert not any("other" in name for name in names)


def test_an_empty_model_folder_says_what_to_do(graph: ComfyGraph, tmp_path: Path, monkeypatch) -> None:
    catalog, loaders = graph.pack("nodes.catalog"), graph.pack("nodes.loaders")
    monkeypatch.setattr(graph.pack("nodes.host"), "model_roots", lambda: [tmp_path])
    monkeypatch.setattr(graph.pack("nextstep_core.loading.store"), "ASSETS", tmp_path)
    options = loaders.NextStepModelLoader.define_schema().inputs[0].options
    assert options[0] == catalog.NOTHING_FOUND, "a new node starts with no download"
    message = loaders.NextStepModelLoader.validate_inputs(options[0])
    assert message.startswith("There is no NextStep model. To get NextStep-1.1: choose NextStep-1.1 (downloads 29 GB)")
    assert f"stepfun-ai/NextStep-1.1 into {tmp_path / 'NextStep-1.1'}" in message


def test_every_node_has_tooltips_and_a_help_page(graph: ComfyGraph) -> None:
    for name, node_class in graph.nodes.NODE_CLASS_MAPPINGS.items():
        if name.startswith("NextStep"):
            schema = node_class.define_schema()
            assert schema.category == "NextStep"
            assert all(item.tooltip for item in (*schema.inputs, *schema.outputs)), name
            help_page = (ROOT / "web" / "docs" / f"{name}.md").read_text()
            assert help_page.startswith(f"# {schema.display_name}\n"), name
            assert f"]({name}.png)" in help_page and (ROOT / "web" / "docs" / f"{name}.png").is_file(), name
            assert "**Tip**" in help_page, name


def test_installing_the_pack_changes_no_package_of_the_hosts_environment() -> None:
    """This environment runs ComfyUI; pip would install nothing for us on top of it."""
    assert requirements() == "pip would install nothing"

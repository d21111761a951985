"""Our model under the host's memory management where memory is short, and next to a diffusion model.

Nothing here has an accelerator. "cpu:0" stands in for one: to the host it is another device than "cpu", with as much
memory as the test says, and everything that the host does about that (evict, unload in part, stream) really happens.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from comfy_graph import ComfyGraph, node, text_to_image
from PIL import Image

from scripts.comfy_server import find_comfyui, make_base, running_server

DEVICE, HOST = torch.device("cpu:0"), torch.device("cpu")
PLENTY = 1 << 40
CONTEXT, POOLED = 48, 32  # widths of the small diffusion model's conditioning


class Conditioning:
    """Test node: what a text encoder would give for the small diffusion model."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "encode", "tests"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"strength": ("FLOAT", {"default": 0.0})}}

    def encode(self, strength: float) -> tuple:
        return ([[torch.full((1, 7, CONTEXT), strength), {"pooled_output": torch.full((1, POOLED), strength)}]],)


@pytest.fixture(scope="module")
def diffusion(graph: ComfyGraph) -> Iterator[str]:
    """File name of an SD3 of one block with random weights, which the host recognizes by its keys like any other."""
    from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
    from safetensors.torch import save_file

    torch.manual_seed(0)
    context = {"target": "torch.nn.Linear", "params": {"in_features": CONTEXT, "out_features": 64}}
    model = MMDiT(
        None, in_channels=16, depth=1, adm_in_channels=POOLED, context_embedder_config=context,
        dtype=torch.float32, device="cpu", operations=torch.nn,
    )  # fmt: skip
    folder = graph.base / "models" / "diffusion_models"
    folder.mkdir()
    save_file(model.state_dict(), folder / "tiny-sd3.safetensors")
    graph.nodes.NODE_CLASS_MAPPINGS["Conditioning"] = Conditioning
    yield "tiny-sd3.safetensors"
    del graph.nodes.NODE_CLASS_MAPPINGS["Conditioning"]


class Accelerator:
    """The stand-in: how much memory it has, and which models came to it and left it."""

    def __init__(self) -> None:
        self.memory = PLENTY
        self.held = 0  # by others than the host's models
        self.fits = 1.0  # share of a model's weights that the host may put here
        self.log: list[tuple[str, str]] = []

    def of(self, *kinds: str) -> list[tuple[str, str]]:
        return [(what, kind) for what, kind in self.log if kind in kinds]


@pytest.fixture
def accelerator(graph: ComfyGraph, monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    import comfy.model_management as mm

    graph.free()
    stand_in = Accelerator()
    load, unload = mm.LoadedModel.model_load, mm.LoadedModel.model_unload
    free_of, total_of = mm.get_free_memory, mm.get_total_memory

    def total(device: torch.device = DEVICE) -> int:
        return total_of(device) if device == HOST else stand_in.memory

    def free(device: torch.device = DEVICE, torch_free_too: bool = False) -> Any:
        if device == HOST:
            return free_of(device, torch_free_too)
        used = sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models if loaded.device == DEVICE)
        left = stand_in.memory - stand_in.held - used
        return (left, 0) if torch_free_too else left

    def loading(self: Any, lowvram_model_memory: float = 0, **options: Any) -> Any:
        stand_in.log.append(("load", type(self.model.model).__name__))
        # The host keeps no model as small as ours out for want of memory, so the share is set where it is handed on.
        return load(self, min(lowvram_model_memory, max(0.1, stand_in.fits * self.model_memory())), **options)

    def unloading(self: Any, *arguments: Any, **options: Any) -> bool:
        whole = unload(self, *arguments, **options)
        stand_in.log.append(("unload" if whole else "unload in part", type(self.model.model).__name__))
        return whole

    changes = {
        "get_torch_device": lambda: DEVICE,
        "is_device_cpu": lambda device: device == HOST,
        "get_total_memory": total,
        "get_free_memory": free,
        "minimum_inference_memory": lambda: 0,
        "EXTRA_RESERVED_VRAM": 0,
        "vram_state": mm.VRAMState.NORMAL_VRAM,
    }
    for name, value in changes.items():
        monkeypatch.setattr(mm, name, value)
    monkeypatch.setattr(mm.LoadedModel, "model_load", loading)
    monkeypatch.setattr(mm.LoadedModel, "model_unload", unloading)
    yield stand_in
    graph.free()


def side_by_side(diffusion: str) -> dict:
    """Four samplers in a row, ours and the core's in turn: each needs the memory that the one before it has."""
    ours = text_to_image()["sampler"]
    prompt = text_to_image() | {
        "unet": node("UNETLoader", unet_name=diffusion, weight_dtype="default"),
        "words": node("Conditioning", strength=0.5),
        "no words": node("Conditioning", strength=0.0),
        "clear": node("SolidMask", value=0.0, width=48, height=64),
        "painted": node("SolidMask", value=1.0, width=48, height=32),
        "mask": node("MaskComposite", destination=["clear", 0], source=["painted", 0], x=0, y=32, operation="add"),
        "masked": node("SetLatentNoiseMask", samples=["theirs", 0], mask=["mask", 0]),
        "ours again": ours | {"inputs": ours["inputs"] | {"latent": ["masked", 0], "seed": 8}},
    }
    for name, latent in (("theirs", "sampler"), ("theirs again", "ours again")):
        prompt[name] = node(
            "KSampler",
            model=["unet", 0], positive=["words", 0], negative=["no words", 0], latent_image=[latent, 0], seed=4,
            steps=3, cfg=2.0, sampler_name="euler", scheduler="simple", denoise=0.7,
        )  # fmt: skip
    prompt["decode"]["inputs"]["samples"] = ["theirs again", 0]
    return prompt


def test_each_model_evicts_the_other_and_both_draw_the_same(
    graph: ComfyGraph, accelerator: Accelerator, diffusion: str, caplog: pytest.LogCaptureFixture
) -> None:
    import comfy.model_management as mm

    caplog.set_level("INFO")
    host, plans = graph.pack("nodes.host"), []
    plan_memory = host.plan_memory
    prompt = side_by_side(diffusion)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "plan_memory", lambda *args: plans.append(plan_memory(*args)) or plans[-1])
        wanted = graph.value(prompt, "decode")
    assert f"NextStep: {plans[0]}; the VAE about" in caplog.text, "said before the run"
    assert {kind for what, kind in accelerator.log if what.startswith("unload")} == set(), "there was room for all"
    graph.free()
    accelerator.log.clear()
    accelerator.memory = plans[0].weights + plans[0].working  # for one model, not for two
    assert torch.equal(graph.value(prompt, "decode"), wanted)
    ours, theirs = "NextStepModel", "SD3"
    came = [("load", ours), ("unload", ours), ("load", theirs), ("unload", theirs)]
    assert accelerator.of(ours, theirs) == came + came
    assert len(mm.current_loaded_models) == 1
    before, after = (graph.value(prompt, name)["samples"] for name in ("ours again", "theirs again"))
    assert torch.allclose(after[:, :, :4], before[:, :, :4], atol=1e-5), "the mask travels on: the core keeps it too"
    assert (after[:, :, 4:] - before[:, :, 4:]).abs().mean() > 0.1


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("fp32", "none"), ("bf16", "none"), ("bf16", "int8"), ("fp32", "fp8")]
)
@pytest.mark.parametrize(("state", "fits"), [("LOW_VRAM", 0.5), ("NO_VRAM", 0.0)], ids=["lowvram", "novram"])
def test_a_partly_loaded_model_draws_the_same(
    graph: ComfyGraph,
    accelerator: Accelerator,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    fits: float,
    dtype: str,
    quantization: str,
) -> None:
    """What does not fit stays with the host and is streamed at use: the same numbers, to the last bit."""
    import comfy.model_management as mm

    prompt = text_to_image()
    prompt["model"]["inputs"] |= {"dtype": dtype, "quantization": quantization}
    wanted = graph.value(prompt, "sampler")["samples"]
    graph.free()
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState[state])
    accelerator.fits = fits
    samples = graph.value(prompt, "sampler")["samples"]

    model = graph.value(prompt, "model")
    (loaded,) = (entry for entry in mm.current_loaded_models if entry.model is model.patcher)
    assert fits - 0.2 < loaded.model_loaded_memory() / loaded.model_memory() <= fits + 0.02
    leaves = [leaf for leaf in model.engine.model.modules() if list(leaf.parameters(recurse=False))]
    streamed = [hasattr(leaf, "prev_comfy_cast_weights") for leaf in leaves]
    assert any(streamed) and all(streamed) == (state == "NO_VRAM")
    assert torch.equal(samples, wanted)


def test_a_model_that_is_partly_pushed_out_comes_back(graph: ComfyGraph, accelerator: Accelerator) -> None:
    """The host takes a part of the weights away for something else, and the next picture is the same."""
    import comfy.model_management as mm

    model = graph.value(text_to_image(), "model")
    model.engine.caches.prefilled.max_bytes = 0  # every run reads the prompt itself
    wanted = graph.value(text_to_image(seed=1), "sampler")["samples"]
    graph.value(text_to_image(seed=2), "sampler")
    others = [entry for entry in mm.current_loaded_models if entry.model is not model.patcher]
    size = model.patcher.model_size()
    mm.free_memory(mm.get_free_memory(DEVICE) + size // 2, DEVICE, keep_loaded=others)
    assert accelerator.log[-1] == ("unload in part", "NextStepModel")
    assert 0 < model.patcher.loaded_size() <= size // 2
    assert torch.equal(graph.value(text_to_image(seed=1), "sampler")["samples"], wanted)
    assert model.patcher.loaded_size() == size


def test_free_leaves_nothing_of_ours_alive(graph: ComfyGraph, accelerator: Accelerator, diffusion: str) -> None:
    prompt = side_by_side(diffusion)
    graph.value(prompt, "decode")
    model, unet = graph.value(prompt, "model"), graph.value(prompt, "unet")
    watched = [
        weakref.ref(value)
        for value in (model, model.patcher, model.engine, model.engine.model, model.vae.first_stage_model, unet.model)
    ]
    weights = [weakref.ref(parameter) for parameter in model.engine.model.parameters()]
    del model, unet
    assert all(watch() is not None for watch in (*watched, *weights)), "the graph's cache keeps them until then"
    graph.free()
    assert [type(watch()).__name__ for watch in (*watched, *weights) if watch() is not None] == []


# A pack that makes the stand-in in a server of its own. cpu_state is set after the flag has been read: with it the host
# asks no driver about the device.
STAND_IN = {
    "prestartup_script.py": "import torch\ntorch.cuda.current_device = lambda: torch.device('cpu:0')\n",
    "__init__.py": """
import comfy.model_management as mm
import torch

mm.cpu_state = mm.CPUState.CPU
mm.get_torch_device = lambda: torch.device("cpu:0")
mm.is_device_cpu = lambda device: device == torch.device("cpu")
NODE_CLASS_MAPPINGS = {}
""",
}
FLAGS = {  # the memory flag and others, and what the server's log then says
    "lowvram": (("--lowvram",), "Set vram state to: LOW_VRAM"),
    "novram": (("--novram",), "Requested to load NextStepModel\nloaded partially"),
    "gpu-only": (("--gpu-only",), "Set vram state to: HIGH_VRAM"),
    "careful": (("--cpu", "--disable-smart-memory", "--cache-none", "--deterministic"), "Disabling smart memory"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_the_servers_memory_flags_change_no_picture(graph: ComfyGraph, golden: Path, tmp_path: Path, name: str) -> None:
    """A real server with the flag. ComfyUI takes --cpu or one of the others, and has the stand-in for those."""
    (memory, *options), said = FLAGS[name]
    wanted = (graph.value(text_to_image(), "decode")[0].numpy() * 255).clip(0, 255).astype(np.uint8)
    base = make_base(tmp_path / "base")
    shutil.copytree(golden / "tiny-a", base / "models" / "nextstep" / "tiny-a")
    if memory != "--cpu":
        (base / "custom_nodes" / "stand_in").mkdir()
        for file, text in STAND_IN.items():
            (base / "custom_nodes" / "stand_in" / file).write_text(text)
    with running_server(find_comfyui(), base, *options, memory=memory) as server:
        run = server.run(text_to_image())
        assert run.ended == "execution_success", run.events[-1]
        (path,) = server.images(run)
    assert np.array_equal(np.asarray(Image.open(path)), wanted)
    assert said in server.said()


GB = 10**9
MODEL = SimpleNamespace(load_device=DEVICE, model_size=lambda: 27 * GB, loaded_size=lambda: 0)


@pytest.mark.parametrize(
    ("memory", "pictures", "resident", "at_once"),
    [
        pytest.param(80, 8, 27, 8, id="all of it"),
        pytest.param(32, 8, 27, 2, id="fewer at once before weights stay behind"),
        pytest.param(24, 8, 20, 1, id="some weights stay behind"),
        pytest.param(4, 1, 0, 1, id="all weights stay behind"),
    ],
)
def test_memory_is_planned_before_a_run(
    graph: ComfyGraph, accelerator: Accelerator, memory: int, pictures: int, resident: int, at_once: int
) -> None:
    """27 GB of weights, 2 GB for every picture, 2 GB for weights on their way."""
    accelerator.memory = memory * GB
    plan = graph.pack("nodes.host").plan_memory(MODEL, pictures, 2 * GB, 2 * GB)
    assert (plan.resident, plan.at_once) == (resident * GB, at_once)
    assert plan.resident + plan.working <= memory * GB
    assert ("streamed from the host" in str(plan)) == (resident < 27)


def test_memory_is_planned_with_what_is_free_or_would_be_freed(
    graph: ComfyGraph, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    from comfy.cli_args import args

    host, forgotten = graph.pack("nodes.host"), []

    def at_once() -> int:
        return host.plan_memory(MODEL, 8, 2 * GB, 2 * GB, lambda: forgotten.append(True)).at_once

    accelerator.memory = 53 * GB
    assert (at_once(), forgotten) == (8, [])
    accelerator.held = 14 * GB
    assert (at_once(), forgotten) == (6, [True]), "others hold it"

    def forget() -> None:
        accelerator.held = 8 * GB

    assert host.plan_memory(MODEL, 8, 2 * GB, 2 * GB, forget).at_once == 8, "an earlier run's, which is let go"
    loaded = SimpleNamespace(device=DEVICE, model=object(), model_loaded_memory=lambda: 20 * GB)
    elsewhere = SimpleNamespace(device=HOST, model=object(), model_loaded_memory=lambda: 20 * GB)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mm, "current_loaded_models", [loaded, elsewhere])
        assert at_once() == 8, "the host unloads the one on the device"
    for where, name, value, planned in (
        (mm, "EXTRA_RESERVED_VRAM", 4 * GB, (7, 27)),  # --reserve-vram
        (args, "vram_headroom", 4 * GB / 2**30, (7, 27)),
        (mm, "minimum_inference_memory", lambda: 40 * GB, (8, 5)),
        (mm, "vram_state", mm.VRAMState.NO_VRAM, (8, 0)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(where, name, value, raising=False)
            plan = host.plan_memory(MODEL, 8, 2 * GB, 2 * GB)
            assert (plan.at_once, plan.resident // GB) == planned, name


def test_what_lies_with_the_host_counts_where_memory_is_shared(
    graph: ComfyGraph, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 38 GB that an Apple GPU shares, 27 hold the weights already: what is free is for pictures."""
    import comfy.model_management as mm

    host = graph.pack("nodes.host")
    accelerator.memory, accelerator.held = 38 * GB, 27 * GB
    with pytest.raises(host.memory.runtime_memory.NextStepError):
        host.plan_memory(MODEL, 8, 10 * GB, 2 * GB)
    monkeypatch.setattr(mm, "vram_state", mm.VRAMState.SHARED)
    plan = host.plan_memory(MODEL, 8, 2 * GB, 2 * GB)
    assert (plan.resident, plan.at_once) == (27 * GB, 5)


def test_headroom_is_kept_free_while_weights_are_loaded(
    graph: ComfyGraph, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    import comfy.model_management as mm
    from comfy.cli_args import args

    model = graph.value(text_to_image(), "model")
    size = model.patcher.model_size()
    monkeypatch.setattr(args, "vram_headroom", size / 2 / 2**30, raising=False)
    asked = []
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, memory_required: asked.append(memory_required))
    host = graph.pack("nodes.host")
    plan = host.plan_memory(model.patcher, 1, 1000, 1000)
    host.bring_to_device(model.patcher, plan)
    assert asked == [plan.working + size // 2]


def test_what_cannot_fit_is_said_before_a_run(graph: ComfyGraph, accelerator: Accelerator) -> None:
    accelerator.memory = 3 * GB
    host = graph.pack("nodes.host")
    error = graph.pack("nextstep_core.errors").NextStepError
    with pytest.raises(error, match="One picture needs 2.00 GB of working memory and 2.00 GB for streaming weights"):
        host.plan_memory(MODEL, 1, 2 * GB, 2 * GB)

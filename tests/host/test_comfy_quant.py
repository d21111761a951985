"""ComfyUI's own quantized files: what its functions write is read as it reads it, and it reads what we write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from comfy_graph import ComfyGraph, text_to_image
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextstep_core.loading.build import plan_model
from nextstep_core.loading.comfy_file import FORMATS, save_for_comfyui
from nextstep_core.loading.documents import INDEX_NAME
from nextstep_core.loading.fusion import parts_of
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime.quantization import quantized_linears

# What the host calls a format, and the options that its functions take for it.
WRITTEN: dict[str, tuple[str, dict[str, Any]]] = {
    "int8, one scale": ("int8_tensorwise", {}),
    "int8, by row": ("int8_tensorwise", {"per_channel": True}),
    "int8, rotated": ("int8_tensorwise", {"per_channel": True, "convrot": True, "convrot_groupsize": 16}),
    "fp8": ("float8_e4m3fn", {}),
    "fp8 e5m2": ("float8_e5m2", {}),
    "w4a4": ("convrot_w4a4", {"convrot_groupsize": 64}),
    "w4a8": ("asym_w4a8_int8", {"convrot_groupsize": 16}),
    "w4a8 without a table": ("asym_w4a8_int8", {"convrot_groupsize": 16, "codebook": False}),
}


@pytest.fixture
def operations(graph: ComfyGraph) -> Any:
    """The host's layers that hold quantized weights."""
    quant_ops = pytest.importorskip("comfy.quant_ops", reason="this ComfyUI has no quantized files")
    if "int8_tensorwise" not in getattr(quant_ops, "QUANT_ALGOS", {}):
        pytest.skip("this ComfyUI has no such files")
    import comfy.ops

    return comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)


def host_layer(operations: Any, rows: int, columns: int) -> Any:
    return operations.Linear(columns, rows, bias=False, device="cpu", dtype=torch.float32)


def written_by_host(
    operations: Any, matrix: Tensor, layer: str, format: str, options: dict[str, Any]
) -> tuple[dict, Tensor]:
    """The tensors that the host stores a matrix as, and the matrix that they stand for."""
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    module = host_layer(operations, *matrix.shape)
    module.quant_format = format
    weight = QuantizedTensor.from_float(matrix, QUANT_ALGOS[format]["comfy_tensor_layout"], **options)
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return {n: t.clone() for n, t in module.state_dict(prefix=f"{layer}.").items()}, weight.dequantize()


def quantized_by_host(operations: Any, source: Path, target: Path, kind: str) -> dict[str, Tensor]:
    """The checkpoint with the host's tensors for every layer that fits, in one file; what they stand for, by layer."""
    format, options = WRITTEN[kind]
    tensors: dict[str, Tensor] = {}
    for shard in source.glob("*.safetensors"):
        tensors |= load_file(shard)
    stand_for: dict[str, Tensor] = {}
    unit = 64 if format == "convrot_w4a4" else 16
    for name in [n for n in tensors if n.endswith("_proj.weight") and "layers." in n]:
        matrix, layer = tensors[name], name.removesuffix(".weight")
        if matrix.shape[1] % unit == 0:
            own, stand_for[layer] = written_by_host(operations, tensors.pop(name), layer, format, options)
            tensors |= own
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    save_file(tensors, target / "model.safetensors")
    return stand_for


@pytest.mark.parametrize("kind", WRITTEN)
def test_what_the_host_writes_has_the_values_that_it_has_there(
    operations: Any, golden: Path, tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    stand_for = quantized_by_host(operations, golden / "tiny-a", tmp_path / "by-host", kind)
    plan = plan_model(tmp_path / "by-host")
    model = plan.load_model("cpu", torch.float32)
    assert plan.recipe is not None and plan.recipe.name.startswith("ComfyUI ")
    compared = 0
    for name, layer in quantized_linears(model):
        parts = parts_of(f"{name}.weight", plan.config) or {f"{name}.weight": layer.rows}
        wanted = torch.cat([stand_for.pop(part.removesuffix(".weight")) for part in parts])
        ours = layer.format.dequantize(layer.own_weight(torch.device("cpu")), layer.weight_scale, torch.float32)
        assert torch.allclose(ours, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())), name
        compared += 1
    assert compared and not stand_for


@pytest.mark.parametrize("format", FORMATS)
def test_the_host_reads_what_we_write(operations: Any, tmp_path: Path, format: str) -> None:
    file = tmp_path / "ours.safetensors"
    save_for_comfyui(plan_model(ASSETS / "tiny"), file, format, torch.float32)
    tensors = load_file(file)
    plan = plan_model(file)
    model = plan.load_model("cpu", torch.float32)
    for name, layer in quantized_linears(model):
        ours = layer.format.dequantize(layer.own_weight(torch.device("cpu")), layer.weight_scale, torch.float32)
        parts = parts_of(f"{name}.weight", plan.config) or {f"{name}.weight": layer.rows}
        for (part, rows), mine in zip(parts.items(), ours.split(list(parts.values())), strict=True):
            own = {
                n.removeprefix(f"{part.removesuffix('weight')}"): t for n, t in tensors.items() if n.startswith(part)
            }
            mark = tensors[f"{part.removesuffix('weight')}comfy_quant"]
            host = host_layer(operations, rows, layer.columns)
            host.load_state_dict(own | {"comfy_quant": mark})
            assert host.quant_format == json.loads(bytes(mark.tolist()))["format"]
            wanted = host.weight.dequantize()
            assert torch.allclose(mine, wanted, rtol=1e-5, atol=1e-6 * float(wanted.abs().max())), part


@pytest.mark.parametrize("kind", ["int8, rotated", "w4a8", "fp8"])
def test_such_a_file_draws_in_the_graph(
    graph: ComfyGraph, operations: Any, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for roots in ("model_roots", "single_file_roots", "vae_roots"):
        monkeypatch.setattr(graph.pack("nodes.host"), roots, lambda: [tmp_path])
    quantized_by_host(operations, golden / "tiny-a", tmp_path / "by-host", kind)
    prompt = text_to_image()
    prompt["model"]["inputs"] |= {"model_name": "by-host", "quantization": "none"}
    picture = graph.value(prompt, "decode")
    assert picture.isfinite().all() and picture.std() > 0

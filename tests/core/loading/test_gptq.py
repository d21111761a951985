"""Checkpoints that AutoRound and GPTQ packed: read from what the auto-round package wrote, value for value."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextstep_core import NextStepPipeline
from nextstep_core.errors import NextStepError
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.comfy_file import save_for_comfyui
from nextstep_core.loading.documents import CONFIG, INDEX_NAME
from nextstep_core.loading.fusion import parts_of
from nextstep_core.loading.single_file import save_model
from nextstep_core.runtime.quantization import quantized_linears

PACKED = Path(__file__).resolve().parent.parent.parent / "data" / "packed.safetensors"
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "sym": False}
CONFIGS = {
    "less-one": AUTO_ROUND | {"group_size": 32, "packing_format": "auto_round:auto_gptq"},
    "symmetric": AUTO_ROUND | {"group_size": 32, "sym": True},
    "plain": AUTO_ROUND | {"group_size": 96, "packing_format": "auto_round"},
}
CPU = torch.device("cpu")


def packed_checkpoint(golden: Path, folder: Path, variant: str) -> Path:
    """The small checkpoint with the matrices that the package packed, in one file."""
    source, recorded = golden / "tiny-a", load_file(PACKED)
    tensors = {name: t for shard in source.glob("*.safetensors") for name, t in load_file(shard).items()}
    for name in [n for n in recorded if n.startswith(f"{variant}/")]:
        own = name.partition("/")[2]
        tensors[own] = recorded[name]
        tensors.pop(f"{own.rpartition('.')[0]}.weight", None)
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME))
    save_file(tensors, folder / "model.safetensors")
    set_quantization(folder, CONFIGS[variant])
    return folder


def set_quantization(folder: Path, said: object) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | {"quantization_config": said}))


def change(folder: Path, changed: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture(params=CONFIGS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def matrices(folder: Path) -> dict[str, Tensor]:
    """What the loaded layers stand for, in float32, under the names of the published parts."""
    plan = plan_model(folder)
    model, found = plan.load_model("cpu", torch.float32), {}
    for name, layer in quantized_linears(model):
        whole = layer.format.dequantize(layer.own_weight(CPU), layer.weight_scale, torch.float32)
        parts = parts_of(f"{name}.weight", plan.config) or {f"{name}.weight": layer.rows}
        found |= dict(zip(parts, whole.split(list(parts.values())), strict=True))
    return found


def test_the_values_are_those_that_the_package_multiplies_by(golden: Path, tmp_path: Path, variant: str) -> None:
    with safe_open(PACKED, framework="pt") as file:
        recorded = json.loads(file.metadata()["checksums"])
    read = matrices(packed_checkpoint(golden, tmp_path / "packed", variant))
    # The package multiplies in float16: our value, which is exact, rounded once, and zero without a sign.
    ours = {f"{variant}/{n}": hashlib.sha256((m.half() + 0.0).numpy().tobytes()).hexdigest() for n, m in read.items()}
    assert ours == {name: digest for name, digest in recorded.items() if name.startswith(variant)}


def test_a_packed_checkpoint_draws_what_its_dequantized_weights_draw(
    golden: Path, tmp_path: Path, variant: str
) -> None:
    folder = packed_checkpoint(golden, tmp_path / "packed", variant)
    plain = shutil.copytree(
        golden / "tiny-a", tmp_path / "plain", ignore=shutil.ignore_patterns("*.safetensors", INDEX_NAME)
    )
    tensors = load_file(folder / "model.safetensors")
    floats = {n: t for n, t in tensors.items() if n.rpartition(".")[2] not in ("qweight", "qzeros", "scales")}
    save_file(floats | {n: m.contiguous() for n, m in matrices(folder).items()}, plain / "model.safetensors")
    drawn = [
        NextStepPipeline.from_pretrained(path, dtype=torch.float32).generate(
            "A red apple", width=32, height=32, steps=4
        )
        for path in (folder, plain)
    ]
    assert torch.allclose(drawn[0].tokens, drawn[1].tokens, atol=1e-4)


def test_zeros_of_the_second_version_and_an_order_that_is_none(golden: Path, tmp_path: Path) -> None:
    folder = packed_checkpoint(golden, tmp_path / "packed", "plain")
    expected = matrices(folder)
    set_quantization(folder, {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2", "desc_act": False})
    change(folder, lambda tensors: tensors.update({"layers.0.mlp.up_proj.g_idx": torch.zeros(96, dtype=torch.int32)}))
    assert all(torch.equal(matrix, expected[name]) for name, matrix in matrices(folder).items())


def test_parts_of_one_layer_in_two_formats_are_read_as_floats(golden: Path, tmp_path: Path) -> None:
    folder = packed_checkpoint(golden, tmp_path / "packed", "less-one")
    expected = matrices(folder)
    for part in ("qweight", "qzeros", "scales"):
        change(folder, lambda tensors, part=part: tensors.pop(f"layers.0.self_attn.k_proj.{part}"))
    name = "layers.0.self_attn.k_proj.weight"
    change(folder, lambda tensors: tensors.update({name: expected[name].contiguous()}))
    model = plan_model(folder).load_model("cpu", torch.float32)
    fused = model.get_submodule("layers.0.self_attn.qkv_proj")
    assert "layers.0.self_attn.qkv_proj" not in dict(quantized_linears(model))
    wanted = [expected[f"layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert torch.allclose(fused(torch.eye(96)) - fused.bias, torch.cat(wanted).T, atol=1e-6)


def _permute(tensors: dict[str, Tensor]) -> None:
    order = torch.arange(96, dtype=torch.int32).flip(0) // 32
    tensors["layers.0.mlp.up_proj.g_idx"] = order


def _narrow(tensors: dict[str, Tensor]) -> None:
    tensors["layers.0.mlp.up_proj.scales"] = tensors["layers.0.mlp.up_proj.scales"][:, :5].contiguous()


@pytest.mark.parametrize(
    ("said", "damage", "reason"),
    [
        (None, None, "no quantization_config with the quant_method auto-round or gptq"),
        ({"quant_method": "awq", "bits": 4}, None, "no quantization_config with the quant_method"),
        (AUTO_ROUND | {"bits": 3}, None, "packed with 3 bits; what can be read is 4 bits"),
        (AUTO_ROUND | {"packing_format": "auto_round:auto_awq"}, None, "packed with 'auto_round:auto_awq'"),
        (AUTO_ROUND | {"packing_format": ["x"]}, None, "packed with a list"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, None, "packed with 'marlin'"),
        (CONFIGS["less-one"], _permute, "columns were reordered"),
        (CONFIGS["less-one"], _narrow, r"scales is \[3, 5\], which does not fit"),
        (CONFIGS["less-one"], lambda t: t.pop("layers.1.mlp.up_proj.qzeros"), "lacks layers.1.mlp.up_proj.qzeros"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_before_weights_are(
    golden: Path, tmp_path: Path, said: object, damage: Callable | None, reason: str
) -> None:
    folder = packed_checkpoint(golden, tmp_path / "packed", "less-one")
    set_quantization(folder, said)
    if damage is not None:
        change(folder, damage)
    with pytest.raises(NextStepError, match=reason):
        plan_model(folder)


def test_a_config_that_speaks_of_weights_that_are_not_there_is_refused(checkpoint: Path) -> None:
    set_quantization(checkpoint, AUTO_ROUND)
    with pytest.raises(NextStepError, match="says that its weights are quantized"):
        plan_model(checkpoint)


def test_what_is_packed_is_not_quantized_again(golden: Path, tmp_path: Path) -> None:
    folder = packed_checkpoint(golden, tmp_path / "packed", "less-one")
    with pytest.raises(NextStepError, match="is already quantized to auto-round int4"):
        plan_model(folder, "int8")
    with pytest.raises(NextStepError, match="Convert the original"):
        save_model(plan_model(folder), tmp_path / "own.safetensors", torch.bfloat16)
    with pytest.raises(NextStepError, match="Convert the original"):
        save_for_comfyui(plan_model(folder), tmp_path / "own.safetensors", "int8", torch.bfloat16)

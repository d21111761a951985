"""Quantized weights: what is stored, what is multiplied, and files that hold them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoint_files import edit_json, make_wide
from safetensors import safe_open
from simulated_mps import MPS, SimulatedMPS

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading.build import make_ready, plan_model
from nextstep_core.loading.checkpoint import read_tensors
from nextstep_core.loading.single_file import save_model, save_vae
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.transformer import whole_span
from nextstep_core.runtime.quantization import RECIPES, QuantizedLinear, quantize_model, quantized_linears
from nextstep_core.runtime.quantization.formats import FP8, INT8
from nextstep_core.runtime.quantization.products import usual

TINY = ASSETS / "tiny"
CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).norm() / b.float().norm())


def test_an_int8_matrix_may_start_anywhere() -> None:
    """As a view of a file does, whose header has any length."""
    weight, scale = INT8.quantize(torch.randn(64, 256, generator=torch.Generator().manual_seed(0)))
    view = torch.empty(weight.numel() + 8, dtype=torch.int8)[8:].view_as(weight).copy_(weight)
    for kernel in usual(INT8, "cpu"):
        x = torch.ones(8, 256)
        assert torch.equal(kernel.run(x, kernel.packed(view), scale), kernel.run(x, kernel.packed(weight), scale))


def test_the_packed_int8_product_is_left_to_devices_where_it_is_fast() -> None:
    names = {device: [kernel.name for kernel in usual(INT8, device)] for device in ("cpu", "mps", "cuda")}
    assert names == {"cpu": ["torch-int8", "plain"], "mps": ["torch-int8", "plain"], "cuda": ["plain"]}


def test_the_row_sums_that_are_compiled_for_cuda_are_the_product() -> None:
    from nextstep_core.runtime.quantization.products import _row_sums

    torch.manual_seed(0)
    for format in (INT8, FP8):
        weight, scale = format.quantize(torch.randn(64, 256))
        x = torch.randn(3, 256)
        assert relative(_row_sums(x, weight, scale.float()), x @ format.dequantize(weight, scale, x.dtype).T) <= 1e-5


@torch.inference_mode()
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_quantized_model_is_the_model_with_its_stored_weights(recipe: str) -> None:
    """Against plain layers that hold the dequantized matrices: nothing but rounding of activations lies between."""
    torch.manual_seed(0)
    quantized = plan_model(TINY, recipe).load_model("cpu", torch.float32)
    plain = plan_model(TINY).load_model("cpu", torch.float32)
    replaced = dict(quantized_linears(quantized))
    expected = plan_model(TINY).load_model("cpu", torch.float32)
    for name, layer in replaced.items():
        matrix = expected.get_submodule(name).weight
        stored = layer.format.dequantize(*layer.format.quantize(matrix), torch.float32)
        expected.get_submodule(name).weight = torch.nn.Parameter(stored, requires_grad=False)
    embeds = torch.randn(2, 20, plain.config.hidden_size)
    span = whole_span(plain.config, torch.ones(2, 20, dtype=torch.bool), torch.float32)
    hidden = [model(embeds, span) for model in (quantized, expected, plain)]
    assert relative(hidden[0], hidden[1]) <= 0.02 < 3 * relative(hidden[1], hidden[2])
    assert {layer.format for layer in replaced.values()} == {RECIPES[recipe].transformer, RECIPES[recipe].head}
    assert not any(isinstance(m, torch.nn.Linear) for m in quantized.layers.modules()), "all of the transformer"


@torch.inference_mode()
def test_quantizing_while_loading_and_afterwards_agree(pipeline: NextStepPipeline) -> None:
    def draw(pipe: NextStepPipeline) -> torch.Tensor:
        return pipe.generate("a red circle", height=32, width=32, steps=4, seed=1).tokens

    for recipe in ("int8", "int4"):
        loaded = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=recipe)
        later = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
        quantize_model(later.engine.model, recipe, CPU)
        make_ready(later.engine.model, CPU, torch.float32)
        assert torch.equal(draw(loaded), draw(later))


@torch.inference_mode()
def test_weights_that_are_quantized_on_a_device_stay_where_they_lay() -> None:
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([torch.nn.Linear(64, 32)])})
    with SimulatedMPS():
        quantize_model(model, "int8", MPS)
    (tensors,) = ([layer.weight, layer.weight_scale, layer.bias] for _, layer in quantized_linears(model))
    assert [tensor.device for tensor in tensors] == [CPU] * 3


@pytest.fixture(scope="module")
def single_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for recipe in (None, "int8", "int4", "fp8"):
        save_model(plan_model(TINY, recipe), folder / f"{recipe}.safetensors", torch.float16)
    save_vae(TINY / "vae", folder / "vae.safetensors", torch.float16)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [None, "int8", "int4", "fp8"])
def test_a_single_file_is_the_checkpoint(single_files: Path, tmp_path: Path, recipe: str | None) -> None:
    """Alone in a folder: config, tokenizer and settings come from its metadata."""
    for name in (f"{recipe}.safetensors", "vae.safetensors"):
        shutil.copy(single_files / name, tmp_path)
    path = tmp_path / f"{recipe}.safetensors"
    file = NextStepPipeline.from_pretrained(path, vae=tmp_path / "vae.safetensors", dtype=torch.float32)
    folder = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=recipe)
    options = {"height": 32, "width": 48, "seed": 3}
    images = [pipe.generate("a red circle on a blue background", **options).images for pipe in (file, folder)]
    assert (images[0] - images[1]).abs().max() <= 1e-4
    assert file.engine.recommended() == folder.engine.recommended()
    assert {str(layer) for _, layer in quantized_linears(file.engine.model)} == {
        str(layer) for _, layer in quantized_linears(folder.engine.model)
    }


def test_a_single_file_is_small_and_opens_without_a_copy(single_files: Path) -> None:
    plain, int8, int4 = (plan_model(single_files / f"{name}.safetensors") for name in (None, "int8", "int4"))
    matrices = [sum(_bytes(plan, name) for name in plan.model_names) for plan in (plain, int8, int4)]
    assert 0.5 <= matrices[1] / matrices[0] <= 0.6 and matrices[2] < matrices[1]
    assert all(len(places) == 1 for places in plain.files.locations.values()), "fused already: views of the file"


def _bytes(plan, name: str) -> int:
    with safe_open(plan.files.locations[name][0][0], framework="pt") as file:
        tensor = file.get_tensor(plan.files.locations[name][0][1])
    return tensor.nbytes


def test_a_damaged_single_file_is_one_sentence(single_files: Path, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    data = (single_files / "int8.safetensors").read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(NextStepError, match="half.safetensors is damaged or incomplete"):
        plan_model(path)


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_model(plan_model(TINY, "int8"), tmp_path / "x.safetensors", torch.float16, report=stop)
    assert not list(tmp_path.iterdir())


def test_wrong_wishes_are_one_sentence(single_files: Path) -> None:
    with pytest.raises(NextStepError, match="quantization is 'int3'"):
        plan_model(TINY, "int3")
    with pytest.raises(NextStepError, match="fp8.*Apple GPUs"):
        plan_model(TINY, "fp8", "mps")
    with pytest.raises(NextStepError, match="is already quantized to int8"):
        plan_model(single_files / "int8.safetensors", "int4")
    with pytest.raises(NextStepError, match="already a single file of this kind"):
        save_model(plan_model(single_files / "int8.safetensors"), single_files / "again.safetensors", torch.float16)


PEAK = """
import sys
import torch
from pathlib import Path
import tokenizers
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.single_file import save_model
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

target = Path(sys.argv[1]) / "out.safetensors"
with torch.inference_mode():
    save_model(plan_model(Path(sys.argv[2]), "int8"), target, torch.bfloat16)  # pages in the libraries
    before = peak()
    size = save_model(plan_model(Path(sys.argv[1]), "int8"), target, torch.bfloat16)
    saving = peak() - before
    model = plan_model(Path(sys.argv[1]), "int8").load_model("cpu", torch.bfloat16)
print(size, saving, peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_quantizing_needs_no_more_than_a_shard_beside_the_result(checkpoint: Path) -> None:
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    edit_json(checkpoint / "config.json", **sizes, intermediate_size=8192, num_hidden_layers=5)
    shard_bytes, _ = make_wide(checkpoint)
    command = [sys.executable, "-c", PEAK, str(checkpoint), str(TINY)]
    # Freed memory goes back to the system at once: how much of it the allocator keeps differs from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    size, saving, loading = map(int, out.stdout.split())
    largest = 2 * 8192 * 1024 * 4  # bytes of a gate-up matrix in float32
    assert saving < shard_bytes + 2 * largest
    assert loading < size + shard_bytes + 3 * largest


def random_blocks(kind: str, rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Raw bytes of a matrix in a block format: random integers under small scales."""
    half = lambda low, high: rng.uniform(low, high, (rows, blocks, 1)).astype(np.float16).view(np.uint8)  # noqa: E731
    integers = lambda n: rng.integers(0, 256, (rows, blocks, n), dtype=np.uint8)  # noqa: E731
    blocks = columns // (32 if kind == "Q8_0" else 256)
    if kind == "Q8_0":
        parts = [half(1e-4, 5e-4), integers(32)]
    elif kind == "Q4_K":
        parts = [half(1e-4, 2e-4), half(5e-4, 1e-3), integers(12), integers(128)]
    else:
        parts = [integers(128), integers(64), rng.integers(-30, 30, (rows, blocks, 16), dtype=np.int8).view(np.uint8)]
        parts.append(half(1e-5, 5e-5))
    return np.concatenate(parts, axis=2).reshape(rows, -1)


@pytest.mark.parametrize(("kind", "recipe"), [("Q8_0", "int8"), ("Q4_K", "int4-g32"), ("Q6_K", "int8")])
@pytest.mark.parametrize("style", ["original", "llama.cpp"])
def test_a_gguf_transformer_is_read(checkpoint: Path, kind: str, recipe: str, style: str) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    edit_json(checkpoint / "config.json", **sizes, intermediate_size=512, num_hidden_layers=2)
    make_wide(checkpoint)  # the rest of the checkpoint, and zeros where the file has better
    type_, rng = gguf.GGMLQuantizationType[kind], np.random.default_rng(0)
    shapes = {"q_proj": (256, 256), "k_proj": (128, 256), "v_proj": (128, 256), "o_proj": (256, 256)}
    shapes |= {"gate_proj": (512, 256), "up_proj": (512, 256), "down_proj": (256, 512)}
    theirs = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    theirs |= {name: f"ffn_{name.removesuffix('_proj')}" for name in ("gate_proj", "up_proj", "down_proj")}
    path, expected = checkpoint / "transformer.gguf", {}
    writer = gguf.GGUFWriter(path, "qwen2")
    for layer in range(2):
        for name, (rows, columns) in shapes.items():
            block = "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            ours = f"layers.{layer}.{block}.{name}.weight"
            raw = random_blocks(kind, rows, columns, rng)
            expected[ours] = torch.from_numpy(gguf.dequantize(raw, type_).copy())
            in_file = f"model.{ours}" if style == "original" else f"blk.{layer}.{theirs[name]}.weight"
            writer.add_tensor(in_file, raw, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    plan = plan_model(path)
    assert plan.recipe is RECIPES[recipe], "the one that loses little more"
    names = ["layers.1.self_attn.qkv_proj.weight", "layers.0.mlp.down_proj.weight"]
    read = dict(read_tensors(plan.files, names, dtype=torch.float32))
    parts = [expected[f"layers.1.self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")]
    assert torch.equal(read["layers.1.self_attn.qkv_proj.weight"], torch.cat(parts))
    assert torch.equal(read["layers.0.mlp.down_proj.weight"], expected["layers.0.mlp.down_proj.weight"])
    model = plan.load_model("cpu", torch.bfloat16)
    assert all(
        isinstance(m, QuantizedLinear) for m in (model.layers[0].mlp.down_proj, model.layers[1].self_attn.o_proj)
    )
    if recipe == "int4-g32":  # its integers stay: alone, fused, and laid out for the CPU
        for name in names:
            layer = model.get_submodule(name.removesuffix(".weight"))
            held = layer.format.dequantize(layer.own_weight("cpu"), layer.weight_scale, torch.float32)
            assert (held - read[name]).norm() < 0.003 * read[name].norm()
            x = torch.randn(2, layer.columns)
            assert (layer(x) - x @ read[name].T).norm() < 0.01 * (x @ read[name].T).norm()
        again = dict(plan_model(path, "int4").load_model("cpu", torch.bfloat16).named_modules())[name[:-7]]
        assert again.format.name == "int4", "what the user asks for is done"


def test_without_the_gguf_package_the_message_says_how_to_get_it(checkpoint: Path, monkeypatch) -> None:
    (checkpoint / "x.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(NextStepError, match="x.gguf needs the Python package gguf. Install it with: pip install gguf"):
        plan_model(checkpoint / "x.gguf")


def test_a_broken_gguf_is_one_sentence(checkpoint: Path) -> None:
    pytest.importorskip("gguf")
    (checkpoint / "x.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(NextStepError, match="x.gguf"):
        plan_model(checkpoint / "x.gguf")

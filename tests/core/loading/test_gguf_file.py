"""GGUF files: names, the numbers of every format, plain floats, and files that are refused."""

from __future__ import annotations

import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nextstep_core import NextStepError
from nextstep_core.loading import checkpoint as reading
from nextstep_core.loading.build import ModelPlan, plan_model
from nextstep_core.loading.checkpoint import TensorFiles, find_model_files, find_tensors, read_tensors
from nextstep_core.loading.gguf_file import NEAREST, nearest_recipe, open_tensors, our_name
from nextstep_core.loading.gguf_header import read_header
from nextstep_core.loading.gguf_int4 import KINDS, scale_of, weight_of, with_own_scales
from nextstep_core.loading.kept import find, keep
from nextstep_core.loading.single_file import save_model
from nextstep_core.runtime.quantization import RECIPES, QuantizedLinear
from nextstep_core.runtime.quantization.formats import INT4, INT4_32

gguf = pytest.importorskip("gguf")

MATRIX = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
RECORDED = Path(__file__).resolve().parents[2] / "data" / "gguf"  # written by llama.cpp: see NOTES.md there
FORMATS = sorted(path.stem for path in RECORDED.glob("*.gguf"))


def write(path: Path, tensors: dict[str, np.ndarray], architecture: str = "qwen2", dtype=None) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor, raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("token_embd.weight", "embed_tokens.weight"),
        ("output_norm.weight", "norm.weight"),
        ("output.weight", "lm_head.weight"),
        ("blk.17.attn_q.bias", "layers.17.self_attn.q_proj.bias"),
        ("blk.3.ffn_norm.weight", "layers.3.post_attention_layernorm.weight"),
        ("blk.3.attn_output.weight", "layers.3.self_attn.o_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", "layers.3.mlp.up_proj.weight"),
        ("image_head.net.input_proj.weight", "image_head.net.input_proj.weight"),
        ("model.norm.weight", "norm.weight"),
    ],
)
def test_names_by_hand(theirs: str, ours: str) -> None:
    assert our_name(theirs) == ours


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_plain_floats_are_read_as_they_are(tmp_path: Path, dtype: type) -> None:
    path = write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": MATRIX.astype(dtype), "output_norm.weight": MATRIX[0]})
    files = find_tensors(path)
    assert files.shapes == {"layers.0.self_attn.q_proj.weight": (64, 32), "norm.weight": (32,)}
    read = dict(read_tensors(files, files.shapes))
    assert torch.equal(read["layers.0.self_attn.q_proj.weight"], torch.from_numpy(MATRIX))
    assert torch.equal(read["norm.weight"], torch.from_numpy(MATRIX[0]))
    assert nearest_recipe(path) is None


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_becomes_the_floats_that_llama_cpp_makes_of_it(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 512)  # a row at a time
    checks: list[None] = []
    files, name = find_tensors(RECORDED / f"{kind}.gguf"), "layers.0.mlp.up_proj.weight"
    read = dict(read_tensors(files, [name], dtype=torch.float32, check=lambda: checks.append(None)))
    assert torch.equal(read[name], load_file(RECORDED / "floats.safetensors")[kind])
    assert len(checks) == len(read[name]), "between its rows it can be stopped"


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_integers_of_4_bits_stay_what_they_are(kind: str) -> None:
    """Scales and zeros alone are rounded, to bfloat16."""
    blocks = open_tensors(RECORDED / f"{kind}.gguf")("blk.0.ffn_up.weight")
    floats = load_file(RECORDED / "floats.safetensors")[kind]
    weight, scale = weight_of(blocks), scale_of(blocks)
    stays = INT4_32.dequantize(weight, scale, torch.float32)
    assert (stays - floats).norm() < 0.0025 * floats.norm(), "quantized anew it could lose as much as at first"
    groups = floats.view(len(floats), -1, 32)
    values = INT4_32.values(weight).view(groups.shape).float()
    own_scale = (groups - groups.mean(2, True)).norm(dim=2) / (values - values.mean(2, True)).norm(dim=2)
    assert torch.allclose(own_scale, scale[..., 0].T.float().abs(), rtol=2**-8)


def test_the_parts_of_a_fused_layer_stay_where_they_can(tmp_path: Path) -> None:
    """q and k in Q4_0, v in Q8_0, as in mixtures; no part of another layer, and no other format."""
    matrix, kinds = np.random.default_rng(0).standard_normal((16, 64), np.float32), ("Q4_0", "Q4_1", "Q8_0")
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    for name, kind in zip("qkv", kinds):
        type_ = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"blk.0.attn_{name}.weight", gguf.quantize(matrix, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = find_tensors(tmp_path / "x.gguf")
    q, k, v = (f"layers.0.self_attn.{name}_proj.weight" for name in "qkv")
    parts = tuple(found.locations[name][0] for name in (q, k, v))
    files = TensorFiles("", {"fused.weight": parts, "alone.weight": parts[2:]}, {})
    layers = {"fused": QuantizedLinear(INT4_32, 48, 64, False), "alone": QuantizedLinear(INT4_32, 16, 64, False)}
    brought = with_own_scales(files, layers)
    assert brought.locations.keys() == {"fused.weight", "fused.weight_scale", "alone.weight"}
    read = dict(read_tensors(brought, ["fused.weight", "fused.weight_scale"]))
    stored = INT4_32.dequantize(read["fused.weight"], read["fused.weight_scale"].float(), torch.float32).split(16)
    floats = dict(read_tensors(found, (q, k, v), dtype=torch.float32))
    error = [float((have - floats[name]).norm() / floats[name].norm()) for have, name in zip(stored, (q, k, v))]
    assert max(error[:2]) < 0.0025 < 0.02 < error[2] < 0.1
    assert with_own_scales(files, {"fused": QuantizedLinear(INT4, 48, 64, False)}) == files


def test_a_matrix_is_read_in_pieces(tmp_path: Path, monkeypatch) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = np.zeros((4096, 1024 // 32 * 34), np.uint8)
    files = find_tensors(write(tmp_path / "x.gguf", {"blk.0.ffn_up.weight": raw}, dtype=kind))
    monkeypatch.setattr(reading, "PIECE", 1 << 20)
    tracemalloc.start()  # sees NumPy's memory, in which pieces become floats, not the tensor that they go to
    try:
        (_, tensor), *_ = read_tensors(files, files.shapes, dtype=torch.bfloat16)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tensor.shape == (4096, 1024) and peak < 3 << 20 < tensor.numel() * 4


def test_reading_can_be_stopped_between_pieces(monkeypatch) -> None:
    monkeypatch.setattr(reading, "PIECE", 512)
    calls = iter(range(10))

    def stop() -> None:
        if next(calls):
            raise KeyboardInterrupt

    files = find_tensors(RECORDED / "Q4_K.gguf")
    with pytest.raises(KeyboardInterrupt):
        dict(read_tensors(files, files.shapes, check=stop))
    assert next(calls) == 2


def test_without_a_dtype_plain_floats_keep_theirs_and_blocks_become_bfloat16() -> None:
    def dtype_of(kind: str) -> torch.dtype:
        files = find_tensors(RECORDED / f"{kind}.gguf")
        return dict(read_tensors(files, files.shapes))["layers.0.mlp.up_proj.weight"].dtype

    assert [dtype_of(kind) for kind in ("F16", "BF16", "Q8_0")] == [torch.float16, torch.bfloat16, torch.bfloat16]


def test_plain_floats_are_views_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": MATRIX})
    read = open_tensors(path)("blk.0.attn_q.weight")
    assert isinstance(read, torch.Tensor)
    at = path.read_bytes().index(MATRIX.tobytes())
    with path.open("r+b") as file:
        file.seek(at)
        file.write(np.float32(5).tobytes())
    assert read[0, 0] == 5
    read[0, 0] = 6
    assert np.frombuffer(path.read_bytes(), np.float32, 1, at) == 5, "and never written to"


@pytest.mark.parametrize("padding", range(4))
def test_what_lies_at_any_place_is_read(tmp_path: Path, padding: int) -> None:
    """PyTorch computes with tensors at addresses that are multiples of their numbers' size."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_custom_alignment(1)
    writer.add_string("general.name", "x" * padding)
    writer.add_tensor("blk.0.attn_q.weight", MATRIX)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    read = open_tensors(tmp_path / "x.gguf")("blk.0.attn_q.weight")
    assert isinstance(read, torch.Tensor) and read.data_ptr() % 4 == 0
    assert torch.equal(read, torch.from_numpy(MATRIX))


def test_the_nearest_recipe_is_that_of_most_numbers_in_matrices_of_layers(tmp_path: Path) -> None:
    def blocks(kind: str, rows: int, name: str) -> tuple[str, np.ndarray, object]:
        type_ = gguf.GGMLQuantizationType[kind]
        numbers, size = gguf.GGML_QUANT_SIZES[type_]
        return f"{name}.weight", np.zeros((rows, 256 // numbers * size), np.uint8), type_

    def recipe(*tensors: tuple[str, np.ndarray, object]) -> str | None:
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
        writer.add_tensor("output_norm.weight", np.zeros(10**4, np.float32))
        for name, raw, kind in tensors:
            writer.add_tensor(name, raw, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return nearest_recipe(tmp_path / "x.gguf")

    down, up, embedding = "blk.0.ffn_down", "blk.0.ffn_up", "token_embd"
    assert recipe(blocks("Q8_0", 1, up)) == "int8"
    assert recipe(blocks("Q4_K", 3, up), blocks("Q6_K", 2, down)) == "int4-g32"
    assert recipe(blocks("Q4_K", 2, up), blocks("Q6_K", 3, down)) == "int8"
    assert recipe(blocks("Q4_K", 1, up), blocks("Q6_K", 9, embedding)) == "int4-g32"
    assert recipe(blocks("Q2_K", 1, up)) == "int4"
    assert recipe(blocks("F16", 1, up)) is None is recipe()
    assert recipe(blocks("Q8_0", 1, embedding)) == "int8"


def test_nearest_recipes_are_recipes_of_formats_that_there_are() -> None:
    assert set(NEAREST.values()) <= set(RECIPES)
    assert all(hasattr(gguf.GGMLQuantizationType, kind) for kind in NEAREST)
    assert {kind for kind, recipe in NEAREST.items() if recipe == "int4-g32"} == KINDS.keys()


def test_a_gguf_file_is_converted_and_kept_as_it_is_loaded(checkpoint: Path, tmp_path: Path) -> None:
    """Its integers of 4 bits lie in the file, laid out for this CPU or not."""
    kind, names = gguf.GGMLQuantizationType.Q4_0, ("q_proj", "k_proj", "v_proj", "o_proj")
    source = find_model_files(checkpoint)
    of_layers = [f"layers.{n}.self_attn.{name}.weight" for n in range(2) for name in names]
    floats = dict(read_tensors(source, of_layers, dtype=torch.float32))
    raw = {name: gguf.quantize(matrix.numpy(), kind) for name, matrix in floats.items()}
    plan = plan_model(write(checkpoint / "x.gguf", raw, dtype=kind))
    assert plan.recipe is RECIPES["int4-g32"] and not plan.stored
    layer = "layers.1.self_attn.qkv_proj"
    expected = torch.from_numpy(
        np.concatenate([gguf.dequantize(raw[f"layers.1.self_attn.{n}.weight"], kind) for n in names[:3]])
    )

    def held(of: ModelPlan) -> torch.Tensor:
        linear = of.load_model("cpu", torch.bfloat16).get_submodule(layer)
        return INT4_32.dequantize(linear.own_weight("cpu"), linear.weight_scale, torch.float32)

    assert (held(plan) - expected).norm() < 0.0025 * expected.norm()
    for number, planned in enumerate((plan, plan.for_computing_on(torch.device("cpu")))):
        path = tmp_path / f"{number}.safetensors"
        save_model(planned, path, torch.bfloat16)
        assert plan_model(path).stored and torch.equal(held(plan_model(path)), held(plan))
    shelf = tmp_path / "kept"
    shelf.mkdir()
    for _ in keep(planned, torch.bfloat16, shelf, planned.read_model("cpu", torch.bfloat16)):
        pass
    found = find(planned, torch.bfloat16, [shelf])
    assert found is not None and torch.equal(held(plan_model(found)), held(plan))


@pytest.mark.parametrize(
    ("architecture", "name"), [("llama", "blk.0.attn_q.weight"), ("flux", "double_blocks.0.img_attn.qkv.weight")]
)
def test_another_family_is_refused(tmp_path: Path, architecture: str, name: str) -> None:
    path = write(tmp_path / "x.gguf", {name: MATRIX}, architecture=architecture)
    with pytest.raises(NextStepError, match=f"x.gguf has the architecture '{architecture}'.*qwen2"):
        find_tensors(path)


def test_original_names_say_what_it_is_whatever_the_architecture(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"model.layers.0.self_attn.q_proj.weight": MATRIX}, architecture="pig")
    assert list(find_tensors(path).shapes) == ["layers.0.self_attn.q_proj.weight"]


def test_a_part_of_a_split_file_is_refused(tmp_path: Path) -> None:
    """Beside a checkpoint the tensors of the other parts would come from there, without a word."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "qwen2")
    writer.add_uint16("split.count", 3)
    writer.add_tensor("output_norm.weight", MATRIX[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NextStepError, match=r"x.gguf is one of 3 files.*--merge"):
        find_tensors(tmp_path / "x.gguf")


def test_wrong_shapes_are_refused_before_weights_are_read(checkpoint: Path, monkeypatch) -> None:
    monkeypatch.setattr(reading, "_copy", lambda *_: pytest.fail("weights were read"))
    kind = gguf.GGMLQuantizationType.Q8_0
    path = write(checkpoint / "x.gguf", {"blk.0.ffn_up.weight": np.zeros((7, 34), np.uint8)}, dtype=kind)
    with pytest.raises(NextStepError, match=r"layers.0.mlp.up_proj.weight is \[7, 32\] in x.gguf"):
        plan_model(path)


def test_a_broken_file_is_named_first(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(NextStepError, match=f"^{re.escape(str(path))} "):
        find_tensors(path)


def test_what_it_holds_comes_before_the_folder_it_lies_in(checkpoint: Path) -> None:
    norm = np.full(96, 3.0, dtype=np.float32)
    path = write(checkpoint / "x.gguf", {"output_norm.weight": norm})
    files = find_model_files(path)
    assert files.locations["norm.weight"] == ((path, "output_norm.weight"),) and files.where == str(path)
    assert files.locations["layers.0.mlp.up_proj.weight"][0][0].suffix == ".safetensors"
    assert dict(read_tensors(files, ["norm.weight"]))["norm.weight"].eq(3).all()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(
    *entries: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, counts: tuple[int, int] | None = None
) -> bytes:
    """The bytes of a GGUF file's header, with counts that may be lies."""
    tensor_count, entry_count = counts or (len(tensors), len(entries))
    return b"GGUF" + struct.pack("<IQQ", version, tensor_count, entry_count) + b"".join(entries) + b"".join(tensors)


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def test_metadata_of_every_kind_is_skipped(tmp_path: Path) -> None:
    """Alone and in a list: what is asked for comes after it."""
    numbers = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
    entries = [text("a") + struct.pack(f"<I{letter}", kind, 1) for kind, letter in numbers.items()]
    entries += [text("b") + struct.pack(f"<IIQ3{letter}", 9, kind, 3, 1, 1, 1) for kind, letter in numbers.items()]
    entries += [text("c") + struct.pack("<I", 8) + text("x"), text("d") + struct.pack("<IIQ", 9, 8, 1) + text("x")]
    path = tmp_path / "x.gguf"
    path.write_bytes(header(*entries, text("general.architecture") + struct.pack("<I", 8) + text("qwen2")))
    assert read_header(path, {}).architecture == "qwen2"


MANY = 2**60
HOSTILE = {
    "no header": (b"GGUF", "unpack"),
    "nothing": (b"", "empty"),
    "another format": (b"GGML" + b"\0" * 40, "like a GGUF file"),
    "another version": (header(version=99), "version 99"),
    "tensors without end": (header(counts=(MANY, 0)) + b"\0" * 999, "tensors"),
    "entries without end": (header(counts=(0, MANY)) + b"\0" * 999, "entries"),
    "a list without end": (header(text("a") + struct.pack("<IIQ", 9, 0, MANY)), "in a list"),
    "a list of lists": (
        header(text("a") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1) * 99),
        "list of lists",
    ),
    "texts behind the end": (header(text("a") + struct.pack("<IIQ", 9, 8, 1000)), "unpack"),
    "a text without end": (header(struct.pack("<Q", 2**40)), "in a text"),
    "an unknown kind": (header(text("a") + struct.pack("<I", 77)), "kind 77"),
    "axes without end": (header(tensors=(text("a") + struct.pack("<I", 2**31),)), "axes"),
    "a huge tensor": (header(tensors=(tensor("a", (2**40, 2**40)),)), "past the end of the file"),
    "an unknown format": (header(tensors=(tensor("a", (32,), kind=999),)), "format 999"),
    "half a block": (header(tensors=(tensor("a", (5, 31), kind=8),)), r"'a' has the shape \[5, 31\].*blocks of 32"),
    "a format without floats": (header(tensors=(tensor("a", (256,), kind=15),)) + b"\0" * 999, "format Q8_K"),
    "a tensor that is cut off": (header(tensors=(tensor("a", (64,), kind=8),)) + b"\0" * 60, "'a' ends past the end"),
    "no alignment": (header(text("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "two of a name": (header(tensors=(tensor("a", (1,)), tensor("a", (1,)))) + b"\0" * 99, "two tensors"),
    "in each other": (
        header(tensors=tuple(tensor(f"a{n}", (64,)) for n in range(9))) + b"\0" * 300,
        "overlapping tensors",
    ),
    "numbers that are no floats": (header(tensors=(tensor("a", (1,), kind=26),)) + b"\0" * 99, "format I32"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(NextStepError, match=f"^{re.escape(str(path))} .*{reason}"):
        find_tensors(path)

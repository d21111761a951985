"""GGUF files: names, plain floats, and files that are refused."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.loading.checkpoint import find_model_files, find_tensors, read_tensors
from nextstep_core.loading.gguf_file import nearest_recipe, our_name
from nextstep_core.loading.gguf_header import read_header

gguf = pytest.importorskip("gguf")

MATRIX = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)


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


def test_the_nearest_recipe_counts_matrices_alone(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    raw = gguf.quantize(MATRIX, kind)
    assert nearest_recipe(write(tmp_path / "eight.gguf", {"blk.0.attn_q.weight": raw}, dtype=kind)) == "int8"


def test_another_family_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "x.gguf", {"blk.0.attn_q.weight": MATRIX}, architecture="llama")
    with pytest.raises(NextStepError, match="x.gguf.*llama"):
        find_tensors(path)


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
    "half a block": (header(tensors=(tensor("a", (31,), kind=8),)), "whole blocks"),
    "no alignment": (header(text("general.alignment") + struct.pack("<II", 4, 0)), "alignment"),
    "two of a name": (header(tensors=(tensor("a", (1,)), tensor("a", (1,)))) + b"\0" * 99, "two tensors"),
    "in each other": (
        header(tensors=tuple(tensor(f"a{n}", (64,)) for n in range(9))) + b"\0" * 300,
        "overlapping tensors",
    ),
    "numbers that are no floats": (header(tensors=(tensor("a", (1,), kind=26),)) + b"\0" * 99, "format 26"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_header_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, reason = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(NextStepError, match=f"^{re.escape(str(path))} .*{reason}"):
        find_tensors(path)

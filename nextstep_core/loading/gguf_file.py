"""GGUF files of the transformer, read through the optional `gguf` package, which knows every block format.

Matrices are turned into floats one at a time and then stored in the recipe that the user chose, or in the one nearest
to the file's own bits. What such a file lacks (flow head, projectors) comes from the checkpoint folder it lies in.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NextStepError
from .gguf_header import Header, read_header

SUFFIX = ".gguf"
# llama.cpp's names for what our modules call otherwise; files that keep the original names need none of this.
LLAMA_CPP = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "output": "lm_head",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
BLOCK = re.compile(r"blk\.(\d+)\.")
# Below this many bits a weight, on average, int4 holds what the file has to say.
INT4_BITS, INT8_BITS = 5.5, 12.0


def our_name(name: str) -> str:
    """The module's name for a tensor, from llama.cpp's or the original one."""
    block = BLOCK.match(name)
    stem, _, kind = name[block.end() if block else 0 :].rpartition(".")
    if stem not in LLAMA_CPP:
        return name.removeprefix("model.")
    return f"{f'layers.{block[1]}.' if block else ''}{LLAMA_CPP[stem]}.{kind}"


def _header(path: Path) -> Header:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise NextStepError(
            "{name} needs the Python package gguf. Install it with: pip install gguf", name=path.name
        ) from None
    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    header = read_header(path, blocks)
    if header.architecture == "llama":
        raise NextStepError(
            "{path} has the architecture llama, which reorders the rows of q and k. Convert the checkpoint "
            "as qwen2, or with its original tensor names.",
            path=path,
        )
    for kind in {entry.kind for entry in header.tensors.values()}:
        try:
            _floats(np.zeros(blocks[kind][1], np.uint8), kind)
        except NotImplementedError:
            raise NextStepError(
                "{path} holds tensors in the format {kind}, which the package gguf cannot turn into floats. "
                "Convert the checkpoint to another format.",
                path=path,
                kind=kind,
            ) from None
    return header


def _floats(data: np.ndarray[Any, Any], kind: int) -> np.ndarray[Any, Any]:
    """The numbers that rows of blocks stand for."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # what is not finite is found when it has been read
        floats: np.ndarray[Any, Any] = dequantize(data, GGMLQuantizationType(kind))
    return floats


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by the name in the file; NextStepError when the file or the package is not usable."""
    return {name: entry.shape for name, entry in _header(path).tensors.items()}


def nearest_recipe(path: Path) -> str | None:
    """The recipe whose bits come nearest to the file's matrices; None for files of plain floats."""
    matrices = [entry for entry in _header(path).tensors.values() if len(entry.shape) == 2]
    size, numbers = sum(m.stop - m.start for m in matrices), sum(math.prod(m.shape) for m in matrices)
    bits = 8 * size / max(1, numbers)
    return "int4" if bits < INT4_BITS else "int8" if bits < INT8_BITS else None


def open_tensors(path: Path) -> Callable[[str], Tensor]:
    """A function from a name in the file to its tensor, as floats."""
    tensors = _header(path).tensors
    data = np.memmap(path, np.uint8, mode="r")

    def read(name: str) -> Tensor:
        entry = tensors[name]
        rows = data[entry.start : entry.stop].reshape(*entry.shape[:-1], -1)
        return torch.from_numpy(_floats(rows, entry.kind).copy()).view(entry.shape)

    return read

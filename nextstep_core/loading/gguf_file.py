"""GGUF files of the transformer, read through the optional `gguf` package, which knows every block format.

Matrices are turned into floats one at a time and then stored in the recipe that the user chose, or in the one nearest
to the file's own bits. What such a file lacks (flow head, projectors) comes from the checkpoint folder it lies in.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import NextStepError, damaged

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


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise NextStepError(f"{path.name} needs the Python package gguf. Install it with: pip install gguf") from None
    try:
        reader = GGUFReader(path)
    except Exception as error:  # it raises whatever its parsing meets
        raise damaged(path, error) from None
    architecture = reader.get_field("general.architecture")
    if architecture is not None and architecture.contents() == "llama":
        raise NextStepError(
            f"{path} has the architecture llama, which reorders the rows of q and k. Convert the checkpoint as qwen2, "
            "or with its original tensor names."
        )
    return reader


def shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by the name in the file; NextStepError when the file or the package is not usable."""
    return {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in _reader(path).tensors}


def nearest_recipe(path: Path) -> str | None:
    """The recipe whose bits come nearest to the file's matrices; None for files of plain floats."""
    matrices = [tensor for tensor in _reader(path).tensors if len(tensor.shape) == 2]
    bits = 8 * sum(int(t.n_bytes) for t in matrices) / max(1, sum(int(t.n_elements) for t in matrices))
    return "int4" if bits < INT4_BITS else "int8" if bits < INT8_BITS else None


def open_tensors(path: Path) -> Callable[[str], Tensor]:
    """A function from a name in the file to its tensor, as floats."""
    from gguf import dequantize

    tensors = {tensor.name: tensor for tensor in _reader(path).tensors}

    def read(name: str) -> Tensor:
        tensor = tensors[name]
        values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        return values.view(tuple(int(n) for n in reversed(tensor.shape)))

    return read

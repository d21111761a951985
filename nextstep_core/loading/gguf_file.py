"""GGUF files of the transformer, read through the optional `gguf` package, which knows every block format.

Matrices are turned into floats a few rows at a time and then stored in the recipe that the user chose, or in the one
nearest to the file's own bits. What such a file lacks (flow head, projectors) comes from the checkpoint folder it lies
in. A whole checkpoint in one file, which llama.cpp's quantizer makes of any names, is read as well.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NextStepError, shown
from .gguf_header import Entry, Header, read_header, unreadable

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
ORIGINAL = re.compile(r"(model\.)?(layers\.\d+\.(self_attn|mlp)|image_(head|in_projector|out_projector))\.")
ARCHITECTURE = "qwen2"  # whose names and order of rows are those of our transformer
# Kinds of tensors that are plain floats: views of the file.
PLAIN = {0: torch.float32, 1: torch.float16, 28: torch.float64, 30: torch.bfloat16}
# What blocks become where no dtype is asked for. Their own error is a multiple of what rounding to it adds.
BLOCKS_DTYPE = torch.bfloat16
# What loses little on top of what a kind has lost already (docs/gguf.md has the figures): int4 where it holds the very
# same integers or the kind has far fewer bits, int8 for all others.
NEAREST = dict.fromkeys(("Q4_0", "Q4_1", "Q4_K"), "int4-g32") | dict.fromkeys(
    ("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0"), "int4"
)


def our_name(name: str) -> str:
    """The module's name for a tensor, from llama.cpp's or the original one."""
    block = BLOCK.match(name)
    stem, _, kind = name[block.end() if block else 0 :].rpartition(".")
    if stem not in LLAMA_CPP:
        return name.removeprefix("model.")
    return f"{f'layers.{block[1]}.' if block else ''}{LLAMA_CPP[stem]}.{kind}"


class Blocks:
    """A tensor of a file that lies in blocks. `blocks[start:stop]` turns those rows into floats, and no others."""

    dtype = BLOCKS_DTYPE
    device = torch.device("cpu")

    def __init__(self, raw: np.ndarray[Any, Any], kind: str, shape: tuple[int, ...]) -> None:
        self.raw, self.kind, self.shape = raw, kind, shape  # rows of bytes; a tensor of one axis is one row

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Memory that reading it whole takes. The package makes floats of some rows at a time and joins them, so that
        they are there twice."""
        return 2 * math.prod(self.shape) * torch.float32.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        if self.ndim == 1:  # a row of blocks, which are not cut
            return _floats(self.raw, self.kind).view(-1)[rows]
        piece = self.raw[rows]
        return _floats(piece, self.kind).view(len(piece), *self.shape[1:])


def _header(path: Path) -> Header:
    try:
        from gguf import GGML_QUANT_SIZES
    except ImportError:
        raise NextStepError(
            "{name} needs the Python package gguf. Install it with: pip install gguf", name=path.name
        ) from None
    blocks = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
    header = read_header(path, blocks)
    if header.parts > 1:
        raise NextStepError(
            "{path} is one of {count} files that a GGUF was split into. Join them with: llama-gguf-split --merge",
            path=path,
            count=header.parts,
        )
    if header.architecture not in (None, ARCHITECTURE) and not any(map(ORIGINAL.match, header.tensors)):
        raise NextStepError(
            "{path} has the architecture {architecture}; the transformer of NextStep is a {wanted}. Convert the "
            "checkpoint as {wanted}, or with its original tensor names.",
            path=path,
            architecture=shown(header.architecture),
            wanted=ARCHITECTURE,
        )
    for kind in {entry.kind for entry in header.tensors.values()} - PLAIN.keys():
        try:
            _floats(np.zeros(blocks[kind][1], np.uint8), _name(kind))
        except NotImplementedError:
            raise unreadable(path, _name(kind)) from None
    return header


def _name(kind: int) -> str:
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType(kind).name


def _floats(data: np.ndarray[Any, Any], kind: str) -> Tensor:
    """The numbers that rows of blocks stand for, in memory of their own."""
    from gguf import GGMLQuantizationType, dequantize

    with np.errstate(all="ignore"):  # what is not finite is found when it has been read
        return torch.from_numpy(dequantize(data, GGMLQuantizationType[kind]))


def kinds(path: Path) -> dict[str, str]:
    """The format of every tensor, as llama.cpp calls it, by the name in the file."""
    return {name: _name(entry.kind) for name, entry in _header(path).tensors.items()}


def held(path: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and dtype of every tensor by the name in the file; NextStepError when the file or the package is not
    usable."""
    return {n: (entry.shape, PLAIN.get(entry.kind, BLOCKS_DTYPE)) for n, entry in _header(path).tensors.items()}


def nearest_recipe(path: Path) -> str | None:
    """The recipe for most of the numbers in the file's matrices; None where most of them are plain floats.

    The text embedding and the language head are left out where there is more: they are never quantized.
    """
    matrices = [(our_name(name), entry) for name, entry in _header(path).tensors.items() if len(entry.shape) == 2]
    of_layers = [entry for name, entry in matrices if name.startswith("layers.")]
    numbers: Counter[str | None] = Counter()
    for entry in of_layers or [entry for _, entry in matrices]:
        recipe = None if entry.kind in PLAIN else NEAREST.get(_name(entry.kind), "int8")
        numbers[recipe] += math.prod(entry.shape)
    return numbers.most_common(1)[0][0] if numbers else None


def open_tensors(path: Path) -> Callable[[str], Tensor | Blocks]:
    """A function from a name in the file to its tensor, which is read when it is used."""
    tensors = _header(path).tensors
    data = np.memmap(path, np.uint8, mode="r")

    def read(name: str) -> Tensor | Blocks:
        entry = tensors[name]
        if entry.kind in PLAIN:
            return _plain(path, entry)
        rows = entry.shape[0] if len(entry.shape) > 1 else 1
        return Blocks(data[entry.start : entry.stop].reshape(rows, -1), _name(entry.kind), entry.shape)

    return read


def _plain(path: Path, entry: Entry) -> Tensor:
    """A tensor of plain floats, as a view of the file."""
    dtype = PLAIN[entry.kind]
    # Written to, it would change no file; PyTorch has no tensors that cannot be. What is mapped so may count as memory
    # that was asked for, so it is no more than the tensor.
    data = np.memmap(path, np.uint8, mode="c", offset=entry.start, shape=(entry.stop - entry.start,))
    if entry.start % dtype.itemsize:  # where a file is not aligned
        data = data.copy()
    return torch.from_numpy(data).view(dtype).view(entry.shape)

"""A checkpoint as one file in ComfyUI's own quantized layout, which other nodes read too (`comfy_quant`).

    nextstep convert NextStep-1.1 nextstep-1.1-int8.safetensors --quantization int8-convrot --comfyui

Tensors have the names and the parts of the published checkpoints. The same matrices are quantized as by our own
recipes; config and tokenizer are in the metadata as in our own files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..model.nextstep import NextStepModel
from ..runtime.interrupt import Check, go_on
from ..runtime.quantization import RECIPES
from ..runtime.quantization.formats import PIECE, TINY, PerRow, Rotated, quantize_in_pieces
from .build import ModelPlan
from .checkpoint import read_tensors
from .comfy_quant import FP8, INT8, MARK, ROTATED
from .fusion import parts_of
from .single_file import Report, marks_of, quantized_already, write_file

FP8_NAME = "float8_e4m3fn"
Quantized = tuple[Tensor, Tensor, dict[str, object]]  # weight, its scale, and what `comfy_quant` says


def _int8(matrix: Tensor, check: Check) -> Quantized:
    weight, scale = quantize_in_pieces(INT8, matrix, check)
    return weight, scale[:, None], {"format": "int8_tensorwise"}


def _rotated_int8(matrix: Tensor, check: Check) -> Quantized:
    group = next((g for g in sorted(ROTATED, reverse=True) if g <= 256 and matrix.shape[1] % g == 0), None)
    if group is None:
        return _int8(matrix, check)
    weight, scale = quantize_in_pieces(Rotated(INT8, group), matrix, check)
    return weight, scale[:, None], {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}


def _fp8(matrix: Tensor, check: Check) -> Quantized:
    """With one scale of the whole matrix: the host's products take no other."""
    form: PerRow = FP8[FP8_NAME]
    pieces = matrix.split(PIECE)
    scale = (torch.stack([piece.abs().amax() for piece in pieces]).amax().float() / form.top).clamp_min(TINY)
    weight = torch.empty(matrix.shape, dtype=form.dtype, device=matrix.device)
    for start, piece in zip(range(0, len(matrix), PIECE), pieces):
        check()
        weight[start : start + PIECE] = (piece.float() / scale).clamp_(-form.top, form.top).to(form.dtype)
    return weight, scale, {"format": FP8_NAME}


FORMATS: dict[str, Callable[[Tensor, Check], Quantized]] = {
    "int8": _int8,
    "int8-convrot": _rotated_int8,
    "fp8": _fp8,
}


@dataclass(frozen=True)
class _Layout:
    """The tensors of the file that a tensor of the model becomes."""

    plan: ModelPlan
    quantize: Callable[[Tensor, Check], Quantized]
    linears: frozenset[str]  # names of the weights that are quantized

    def tensors(self, name: str, tensor: Tensor, check: Check = go_on) -> Iterator[tuple[str, Tensor]]:
        parts = parts_of(name, self.plan.config) or {name: len(tensor)}
        for part, own in zip(parts, tensor.split(list(parts.values())) if tensor.ndim else [tensor]):
            if name not in self.linears:
                yield part, own
                continue
            weight, scale, said = self.quantize(own, check)
            layer = part.removesuffix(".weight")
            text = torch.frombuffer(bytearray(json.dumps(said).encode()), dtype=torch.uint8)
            yield from ((part, weight), (f"{part}_scale", scale), (f"{layer}.{MARK}", text))


def save_for_comfyui(
    plan: ModelPlan,
    path: Path,
    format: str,
    dtype: torch.dtype,
    work_on: torch.device | str = "cpu",
    report: Report | None = None,
    check: Check = go_on,
) -> int:
    """Write the planned checkpoint, which is not quantized, to one file at `path` in a format of FORMATS; its bytes.

    What is not quantized is stored in `dtype`. `report` gets (tensors done, of how many); it and `check` may raise to
    stop. NextStepError when the file cannot be written, or the checkpoint is quantized already.
    """
    if plan.recipe is not None:
        raise quantized_already(plan.files.where, plan.recipe)
    model = NextStepModel(plan.config, device="meta")
    linears = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))
    format_of = RECIPES["int8"].format_of
    stored = (name for name, linear in linears if format_of(name, linear.out_features, linear.in_features))
    layout = _Layout(plan, FORMATS[format], frozenset(f"{name}.weight" for name in stored))
    like = {name: torch.empty(plan.files.shapes[name], device="meta") for name in plan.text_embedding_names}
    like |= model.state_dict()
    like = {part: own for name, t in like.items() for part, own in layout.tensors(name, t.to(dtype))}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from read_tensors(plan.files, plan.text_embedding_names, dtype=dtype, check=check)
        for name, tensor in plan.read_model(work_on, dtype, report, check=check):
            yield from layout.tensors(name, tensor, check)

    return write_file(path, like, marks_of(plan), tensors(), check)

"""Record weights as the auto-round package packs them, for the tests: those of the small reference checkpoint.

    pip install auto-round
    python -m scripts.record_packed

Writes tests/data/packed.safetensors: for each variant the packed tensors and, in the metadata, the checksum of the
float16 matrices that the package's own layers multiply by.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from auto_round.data_type.int import quant_tensor_asym, quant_tensor_rtn_sym
from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
CHECKPOINT, TARGET = DATA / "golden" / "tiny-a", DATA / "packed.safetensors"
BITS = 4
# Columns in a group, whether zeros are the same everywhere, whether they are stored less one, and how many layers.
VARIANTS = {
    "less-one": (32, False, True, 3),
    "symmetric": (32, True, True, 1),
    "plain": (96, False, False, 1),
}


def packed(matrix: Tensor, group: int, symmetric: bool, less_one: bool) -> nn.Module:
    """The package's layer with a matrix in it."""
    quantize = quant_tensor_rtn_sym if symmetric else quant_tensor_asym
    _, scale, zero = quantize(matrix, bits=BITS, group_size=group)
    rows, columns = matrix.shape
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = nn.Parameter(matrix, requires_grad=False)
    kind = (qlinear_torch_zp if less_one else qlinear_torch).QuantLinear
    layer = kind(BITS, group, columns, rows, False, weight_dtype=torch.float32)
    layer.device = "cpu"
    zero = zero.view(rows, -1) if isinstance(zero, Tensor) else zero
    layer.pack(linear, scale.view(rows, -1), zero, None, device="cpu")
    return layer


def main() -> None:
    """Record all variants."""
    source = {name: t for shard in sorted(CHECKPOINT.glob("*.safetensors")) for name, t in load_file(shard).items()}
    tensors, checksums = {}, {}
    for variant, (group, symmetric, less_one, layers) in VARIANTS.items():
        names = [
            n
            for n in source
            if n.endswith("_proj.weight") and n.startswith(tuple(f"layers.{i}." for i in range(layers)))
        ]
        for name in sorted(names):
            layer = packed(source[name].float(), group, symmetric, less_one)
            for part in ("qweight", "qzeros", "scales"):
                tensors[f"{variant}/{name.removesuffix('weight')}{part}"] = getattr(layer, part).contiguous()
            multiplied = layer(torch.eye(source[name].shape[1], dtype=torch.float16)).T + 0.0  # no negative zero
            checksums[f"{variant}/{name}"] = hashlib.sha256(multiplied.contiguous().numpy().tobytes()).hexdigest()
    save_file(tensors, TARGET, {"checksums": json.dumps(checksums)})


if __name__ == "__main__":
    main()

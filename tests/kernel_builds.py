"""Compiles kernels for NVIDIA cards, without one, exactly as the code would start them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ARCHITECTURES = (75, 80, 86, 89, 90, 120)
NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}


def build(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], architecture: int) -> Any:
    """A kernel compiled for an architecture, specialized as Triton does when it is started with such arguments."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {name: constants[name] for name in ("num_warps", "num_stages") if name in constants}
    signature, fixed, aligned = {}, {}, {}
    for place, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
        if isinstance(value, Tensor):
            signature[name] = f"*{NAMES[value.dtype]}"
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1:
            signature[name], fixed[name] = "constexpr", 1
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value != 1 and value % 16 == 0):
            aligned[(place,)] = [["tt.divisibility", 16]]
    for name in kernel.arg_names[len(arguments) :]:
        signature[name], fixed[name] = "constexpr", constants[name]
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)


class Recorded:
    """Stands in for `support.launch`: keeps what would have been started."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __call__(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        self.launches.append((kernel, arguments, constants))

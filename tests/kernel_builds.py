"""Compiles kernels for NVIDIA cards, without one, exactly as the code would start them."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from torch import Tensor

# With the shared memory that a program may have there, in KiB.
ARCHITECTURES = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
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


def started() -> list[tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """What a step of the published model would start, of each kernel and format once."""
    from nextstep_core.model.flow_head import FlowHead
    from nextstep_core.runtime.quantization.formats import FP8, INT4, INT8
    from nextstep_core.runtime.triton import attention, head, rows

    kept = Recorded()
    for module in (attention, head, rows):
        module.launch = kept  # type: ignore[attr-defined]

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    for format, count in ((None, 2), (None, 16), (INT8, 2), (FP8, 3), (INT4, 2), (INT4, 16)):
        stored = (empty(5120, 5120), None) if format is None else format.empty(5120, 5120, "meta")
        matrix = rows.Matrix.of(format, *stored)
        assert matrix is not None
        gain = empty(5120) if count == 2 else None
        rows.product(empty(count, 5120), matrix, norm=gain, eps=1e-6, gated=format is None)
    rows.product(empty(2, 5120, dtype=torch.float32), rows.Matrix.of(INT4, *INT4.empty(5120, 5120, "meta")))
    for dtype, dim, length in ((torch.bfloat16, 128, 1), (torch.float16, 48, 8), (torch.float32, 128, 1)):
        qkv, table = empty(2, length, 56 * dim, dtype=dtype), empty(2, 1280, dim, dtype=dtype)
        positions = empty(length, dtype=torch.long)
        valid, cache = empty(2, 1280, dtype=torch.bool), empty(2, 2, 8, 1280, dim, dtype=dtype)
        attention.attention(qkv, 40, table, positions, valid, cache, 768)
    network = FlowHead(64, 5120, 1536, 1, dtype=torch.bfloat16, device="meta")
    weights = head.HeadWeights.of(network, torch.device("meta"), torch.bfloat16)
    assert weights is not None
    modulations = [empty(2, 3 * 1536), empty(2, 2 * 1536)]
    raw = head.velocities(weights, empty(1, 64, dtype=torch.float32), modulations, torch.bfloat16)
    state = empty(1, 64, dtype=torch.float32)
    head.guide_and_advance(raw, 2, empty(2, dtype=torch.float32), 0.5, [(state, 0.5), (state, 0.5)])
    return kept.launches


def main() -> None:
    """Build all for the architecture that the command line names; `--only WORD` those whose name holds it."""
    architecture, only = int(sys.argv[1]), sys.argv[3] if "--only" in sys.argv else ""
    failed = 0
    for kernel, arguments, constants in started():
        if only not in kernel.__name__:
            continue
        begun = time.monotonic()
        try:
            built = build(kernel, arguments, constants, architecture)
            said = f"{len(built.asm['cubin'])} bytes, {built.metadata.shared} of shared memory"
            if built.metadata.shared > ARCHITECTURES[architecture] << 10:
                raise RuntimeError(f"{said} are more than there is")
        except Exception as reason:  # a compiler's own kinds of failure
            failed += 1
            said = f"FAILED: {type(reason).__name__}: {str(reason)[:500]}"
        print(f"sm{architecture} {kernel.__name__} {said}, {time.monotonic() - begun:.1f} s", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()

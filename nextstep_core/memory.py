"""Telling that memory ran out, whatever a device calls it."""

from __future__ import annotations

import torch

SIGNS = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "invalid buffer size",  # MPS, for a single tensor that is larger than the device can hold
    "status_alloc_failed",  # cuBLAS and cuDNN
    "can't allocate memory",  # the host's allocator
    "not enough memory",  # the same on Windows
)


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether less work at once would have gone through."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in str(error).lower() for sign in SIGNS)

"""The layer family that every module is built from.

`torch.nn` by default; a host passes its own namespace (ComfyUI's `comfy.ops` classes) to get weights that are cast or
streamed at use. Such a namespace must offer Linear, Conv2d, GroupNorm, LayerNorm, RMSNorm and Embedding.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn

Operations: TypeAlias = Any
DType: TypeAlias = torch.dtype | None
Device: TypeAlias = torch.device | str | None

DEFAULT: Operations = torch.nn

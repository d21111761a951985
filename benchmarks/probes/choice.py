"""What the chooser takes on this device for each shape of the model's matrices, decided anew."""

from __future__ import annotations

import os
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from nextstep_core.model.config import NextStepConfig
from nextstep_core.runtime.chosen import Chooser
from nextstep_core.runtime.ledger import CACHE
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT8
from nextstep_core.runtime.quantization.selection import choose, cold_bytes

from .products import shapes_of


def choices(config: NextStepConfig, device: torch.device, dtype: torch.dtype, most_bytes: int) -> list[dict[str, Any]]:
    """Every outcome, over matrices of at most `most_bytes` or what the device's cache holds."""
    chooser = Chooser(device)
    with TemporaryDirectory(prefix="nextstep-choice-") as folder:
        before = os.environ.get(CACHE)
        os.environ[CACHE] = folder
        try:
            for format in (INT4, INT8, *([] if device.type == "mps" else [FP8])):
                for outputs, inputs in dict.fromkeys(shapes_of(config).values()):
                    if not format.fits(outputs, inputs):
                        continue
                    stored = [format.quantize(torch.randn(outputs, inputs, device=device) * 0.02)]
                    size = sum(part.nbytes for part in stored[0])
                    for _ in range(min(64, -(-min(most_bytes, cold_bytes(device)) // size)) - 1):
                        stored.append(tuple(part.clone() for part in stored[0]))
                    choose(format, outputs, inputs, [partial(tuple, pair) for pair in stored], dtype, chooser)
        finally:
            os.environ.pop(CACHE) if before is None else os.environ.update({CACHE: before})
    return [outcome.as_data() for outcome in chooser.tried]

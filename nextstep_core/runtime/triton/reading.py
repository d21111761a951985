"""A linear layer's weights as the kernels take them, where the layer does nothing else with them.

What is held is the layer's own parameters, not what lies in them: a host that sends a layer away frees its memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..layers import is_plain
from ..quantization import QuantizedLinear
from ..quantization.kernel import AS_STORED
from .rows import Matrix


@dataclass(frozen=True)
class Linear:
    """A matrix and the bias that is added."""

    matrix: Matrix
    bias: Tensor | None


def linear(layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Linear | None:
    """The weights of a linear layer that computes in `dtype`; None where the kernels cannot stand in for it."""
    if not is_plain(layer):
        return None
    bias = layer.bias
    if isinstance(bias, Tensor) and bias.device != device:
        return None
    if isinstance(layer, QuantizedLinear):
        lies_otherwise = layer.kernel is not None and layer.kernel.lies != AS_STORED
        if layer.layout is not None or lies_otherwise or layer.weight.device != device:
            return None
        matrix = Matrix.of(layer.format, layer.weight, layer.weight_scale)
    elif isinstance(layer, nn.Linear) and layer.weight.dtype == dtype and layer.weight.device == device:
        matrix = Matrix.of(None, layer.weight, None)
    else:
        return None
    return None if matrix is None else Linear(matrix, bias if isinstance(bias, Tensor) else None)


def vector(parameter: Tensor | None, device: torch.device) -> Tensor | None:
    """A norm's weight or bias, where it lies on `device`."""
    return parameter if isinstance(parameter, Tensor) and parameter.device == device else None

"""Where a model's weights live from run to run: on its device as far as they fit, the rest with the host.

From there they are streamed while a run lasts; see `streaming`.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..model.nextstep import NextStepModel

HOST = torch.device("cpu")


def held_bytes(model: nn.Module, device: torch.device) -> int:
    """Bytes of a model's weights that lie on `device`."""
    return sum(weight.nbytes for weight in model.parameters() if weight.device == device)


def place(model: NextStepModel, device: torch.device, resident: int) -> int:
    """Let at most `resident` bytes of weights lie on `device`, and all others with the host; how many lie there now.

    What is no layer comes first, since every flow step reads it. What leaves does so before anything comes.
    """
    if device.type == "cpu":
        return held_bytes(model, device)
    of_layers = {module for layer in model.layers for module in layer.modules()}
    groups = [[module for module in model.modules() if module not in of_layers]]
    groups += [list(layer.modules()) for layer in model.layers]
    staying, left = [], resident
    for modules in groups:
        size = sum(weight.nbytes for module in modules for weight in _own(module).values())
        staying.append(size <= left)
        left -= size if staying[-1] else 0
    for here in (False, True):
        for modules, stays in zip(groups, staying):
            if stays is here:
                _move(modules, device if here else HOST)
    return resident - left


def send_away(model: NextStepModel, device: torch.device) -> bool:
    """Send half of the layers on `device` to the host; whether there were any."""
    if device.type == "cpu":
        return False
    here = [layer for layer in model.layers if any(weight.device == device for weight in layer.parameters())]
    for layer in here[len(here) // 2 :]:
        _move(layer.modules(), HOST)
    return bool(here)


def _move(modules: Iterable[nn.Module], device: torch.device) -> None:
    for module in modules:
        for name, weight in _own(module).items():
            if weight.device != device:
                module._parameters[name] = nn.Parameter(weight.to(device), requires_grad=False)


def _own(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in module._parameters.items() if weight is not None}

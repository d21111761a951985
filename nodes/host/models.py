"""Models of ours as ComfyUI has models: its layers, its patcher, its cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import torch
from comfy_execution.graph import ExecutionBlocker
from torch import Tensor, nn

from ...nextstep_core.loading.build import fill, make_ready
from ...nextstep_core.runtime.quantization import QuantizedLinear
from .screen import check_interrupt


def operations(storage: torch.dtype, compute: torch.dtype) -> Any:
    """The host's layer classes, which cast their weights as its memory management wants.

    Newer hosts make linear layers that have no parameters, not even empty ones, until a file is read; but not of
    classes that load by a function of their own, as these do, if only by PyTorch's.
    """
    picked = comfy.ops.pick_operations(storage, compute, load_device=mm.get_torch_device())
    linear = type("Linear", (picked.Linear,), {"_load_from_state_dict": _load_from_state_dict})
    return type("Operations", (picked,), {"Linear": linear})


def _load_from_state_dict(module: nn.Module, *arguments: Any) -> None:
    nn.Module._load_from_state_dict(module, *arguments)


class HostQuantizedLinear(QuantizedLinear):
    """A quantized layer that the host may leave behind and still use; it tells by these attributes."""

    comfy_cast_weights = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.weight_function: list[Any] = []
        self.bias_function: list[Any] = []


def adopt(model: nn.Module, tensors: Iterable[tuple[str, Tensor]], compute: torch.dtype) -> Any:
    """Put a meta-device module under the host's memory management and give it its weights; returns the patcher.

    `tensors` is read up here, so that nothing else holds a tensor while its layer lays it out anew.

    The patcher is the plain one. Newer hosts have another, which leaves weights with the host and has its layers fetch
    them at each use; but every token uses all weights, our quantized layers know nothing of it, and what is captured
    needs weights that stay where they are. In return, memory that others need comes back in layers, not in pages.
    """
    state = dict(tensors)
    size = sum(tensor.nbytes for tensor in state.values())
    patcher = comfy.model_patcher.ModelPatcher(
        model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device(), size=size
    )
    fill(model, state)
    del state
    make_ready(model, patcher.load_device, compute, check_interrupt)
    return patcher


class NoOutput(ExecutionBlocker):
    """An output that is not there: what needs it is not run, and its message is shown."""

    def is_dynamic(self) -> bool:
        """See `stays_cached`."""
        return stays_cached()


def stays_cached() -> bool:
    """For `is_dynamic` of values that the host's cache is to keep while the workflow that made them is in use.

    Newer hosts drop cached outputs where RAM is short, and our model would be read again, all 27 GB, for the next
    picture. Outputs of the current workflow that say yes to this are spared; those of earlier ones go first, and
    `/free` drops all. A cache of our own could do no better: it would not know which workflow is current, nor of
    `/free`.
    """
    return True

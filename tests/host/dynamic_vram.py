"""The host's dynamic VRAM without a GPU: its own code, over a simulated card instead of the C library's memory.

Hosts that have it keep weights with the host until a layer of theirs asks for them. What decides about that, and what
fetches them, runs as it is; replaced are the three things that only the C library can do.
"""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import simulated_mps
import torch
from simulated_mps import MPS, SimulatedMPS, SimulatedTensor
from torch import Tensor


class Card(SimulatedMPS):
    """The simulated card; counts the bytes that cross to it from the host. `memory` is its size, None: plenty."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched = 0
        self.memory: int | None = None

    def _note(self, name: str, values: list[Any]) -> None:
        super()._note(name, values)
        tensors = [x for x in values if isinstance(x, Tensor)]
        hosts = [x.nbytes for x in tensors if not isinstance(x, SimulatedTensor) and x.ndim]
        if len(hosts) < len(tensors) and hosts and name.split(".")[0] in ("_copy_from", "copy_", "_to_copy"):
            self.fetched += max(hosts)


class PagedMemory:
    """The card's pages for one model: room for all, resident once they were asked for."""

    def __init__(self, size: int, device: int | None) -> None:
        self._memory, self._used = torch.zeros(min(size, 1 << 26), dtype=torch.uint8), 0
        self._generation = 1

    def alloc(self, size: int) -> tuple[PagedMemory, int, int]:
        start = (self._used + 511) & ~511
        self._used = start + size
        return self, start, size

    def fault(self, offset: int, size: int) -> Any:
        return (ctypes.c_uint32 * 2)(self._generation)

    def unpin(self, offset: int, size: int) -> None: ...

    def prioritize(self) -> None: ...

    def loaded_size(self) -> int:
        return self._used

    def free_memory(self, size: int) -> int:
        self._generation += 1
        return self._used

    def view(self, start: int, size: int) -> Tensor:
        return SimulatedTensor(self._memory[start : start + size])


class HostBuffer:
    """The library's page-locked memory: its bookkeeping, none of the memory."""

    def __init__(self, size: int, *_: Any, **__: Any) -> None:
        self.size = size

    def extend(self, size: int, **_: Any) -> None:
        self.size += size

    def truncate(self, size: int, **_: Any) -> None:
        self.size = size

    def get_raw_address(self) -> int:
        return 0


def put_in(card: Card, patch: pytest.MonkeyPatch) -> None:
    """Make `card` the host's device, with the host's usual way of memory management."""
    import comfy.model_management as mm

    def total(device: torch.device = MPS) -> int:
        return total_of(device) if device.type == "cpu" or card.memory is None else card.memory

    def free(device: torch.device = MPS, torch_free_too: bool = False) -> Any:
        if device.type == "cpu" or card.memory is None:
            return free_of(device, torch_free_too)
        used = sum(loaded.model_loaded_memory() for loaded in mm.current_loaded_models if loaded.device == device)
        return (card.memory - used, 0) if torch_free_too else card.memory - used

    total_of, free_of = mm.get_total_memory, mm.get_free_memory
    changes = {
        "get_torch_device": lambda: MPS,
        "mac_version": lambda: (15, 0),
        "vae_device": lambda: torch.device("cpu"),  # the pictures are the host's, and equal to the last bit
        "get_total_memory": total,
        "get_free_memory": free,
        "minimum_inference_memory": lambda: 0,
        "EXTRA_RESERVED_VRAM": 0,
        "vram_state": mm.VRAMState.NORMAL_VRAM,
    }
    for name, value in changes.items():
        patch.setattr(mm, name, value)
    # A module's `to` gives simulated weights a new parameter: PyTorch has no other way for them.
    patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
    patch.setattr(simulated_mps, "SWITCHING_DEVICE", simulated_mps.SWITCHING_DEVICE | {Tensor.view})


def make_dynamic(patch: pytest.MonkeyPatch) -> None:
    """What the host does at its start where it finds a card and the C library."""
    import comfy.memory_management
    import comfy.model_patcher
    import comfy_aimdo.host_buffer
    import comfy_aimdo.model_vbar
    import comfy_aimdo.torch
    from comfy.cli_args import args

    patch.setattr(comfy_aimdo.model_vbar, "ModelVBAR", PagedMemory)
    patch.setattr(comfy_aimdo.host_buffer, "HostBuffer", HostBuffer)
    patch.setattr(comfy_aimdo.torch, "aimdo_to_tensor", lambda part, device: part[0].view(*part[1:]))
    patch.setattr(args, "disable_pinned_memory", True)
    patch.setattr(comfy.memory_management, "aimdo_enabled", True)
    patch.setattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcherDynamic)

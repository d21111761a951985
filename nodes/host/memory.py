"""ComfyUI's memory management: what fits on its device, what is loaded and what goes when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as mm
import torch
from comfy.cli_args import args
from comfy.patcher_extension import CallbacksMP

from ...nextstep_core.errors import OutOfMemory, check_choice
from ...nextstep_core.loading.checkpoint import DTYPES
from ...nextstep_core.runtime import memory as runtime_memory
from ...nextstep_core.runtime.cpu import cpu_dtype
from ...nextstep_core.runtime.memory import MemoryPlan, format_bytes, plan_host_memory
from ...nextstep_core.runtime.shortage import LOADING_ADVICE, told
from ...nextstep_core.sentences import Sentence

log = logging.getLogger(__name__)

DTYPE_CHOICES = ("auto", *DTYPES)
# float16 overflows in this model's residual stream on some prompts, so it is never chosen, only obeyed.
PREFERRED_DTYPES = [torch.bfloat16, torch.float32]
TOLERATED = 0.05  # share of the weights that may be away where all fit: hosts round
DRAWING_ADVICE = Sentence("Choose a smaller size or fewer pictures, or close other programs.")


def compute_device() -> torch.device:
    """Where models compute."""
    return mm.get_torch_device()


def intermediate_device() -> torch.device:
    """Where values that travel between nodes are kept."""
    return mm.intermediate_device()


def card_memory() -> int | None:
    """Bytes of memory that the host's device has in all, less what it is told to leave alone; None for a CPU."""
    device = mm.get_torch_device()
    if mm.is_device_cpu(device):
        return None
    return int(mm.get_total_memory(device) - mm.extra_reserved_memory())


def pick_dtypes(choice: str, parameters: int) -> tuple[torch.dtype, torch.dtype]:
    """(storage, compute) dtypes for a model of so many parameters on the host's device; choice "auto" or a name."""
    check_choice("dtype", choice, DTYPE_CHOICES)
    device = mm.get_torch_device()
    if choice in DTYPES:
        storage = DTYPES[choice]
    elif mm.is_device_cpu(device):
        storage = cpu_dtype(parameters, mm.get_free_memory(device))
        return storage, storage
    else:
        storage = mm.unet_dtype(device=device, model_params=parameters, supported_dtypes=PREFERRED_DTYPES)
    compute = mm.unet_manual_cast(storage, device, supported_dtypes=PREFERRED_DTYPES)
    return storage, compute or storage


def free_memory(patcher: Any) -> int:
    """Bytes that a model and a run can have of its device: what is free, and what the host would free for it."""
    return int(mm.get_free_memory(patcher.load_device)) if mm.is_device_cpu(patcher.load_device) else _room(patcher)


def plan_memory(
    patcher: Any, pictures: int, each: int, streamed: int, forget: Callable[[], None] = lambda: None, beside: int = 0
) -> MemoryPlan:
    """The plan for drawing `pictures` with a model on its device; see `runtime.memory.plan_memory`.

    `forget` frees what earlier runs have left there, and is called where otherwise not all would fit.
    """
    device, weights = patcher.load_device, patcher.model_size()
    if mm.is_device_cpu(device):
        return plan_host_memory(weights, int(mm.get_free_memory(device)) - beside, pictures, each)
    if weights + beside + pictures * each > _room(patcher):
        forget()
    return runtime_memory.plan_memory(
        weights,
        _room(patcher),
        pictures,
        each,
        streamed,
        spare=int(mm.minimum_inference_memory() - mm.extra_reserved_memory()),  # the host leaves as much in any case
        stay=mm.vram_state != mm.VRAMState.NO_VRAM,
        beside=beside,
    )


def _room(patcher: Any) -> int:
    """What a model can have of its device: what is free, and what the host would free for it or lies there for it.

    Not what others hold there: the desktop, other programs, and in this one all that is no model of the host.
    """
    device = patcher.load_device
    models = [loaded for loaded in mm.current_loaded_models if loaded.device == device and loaded.model is not None]
    room = mm.get_free_memory(device) + sum(loaded.model_loaded_memory() for loaded in models)
    if mm.vram_state == mm.VRAMState.SHARED:  # what lies with the host lies in the same memory
        room += patcher.model_size() - patcher.loaded_size()
    return int(min(room, mm.get_total_memory(device)) - mm.extra_reserved_memory()) - _headroom()


def _headroom() -> int:
    """What `--vram-headroom` keeps free. Hosts that have it look after it only in models of their own kind."""
    return int(getattr(args, "vram_headroom", 0) * 2**30)


def graphs_allowed() -> bool:
    """Whether CUDA graphs are not turned off for the whole host."""
    return not getattr(args, "disable_cuda_graphs", False)


def bring_to_device(patcher: Any, plan: MemoryPlan) -> torch.device:
    """Load a model's weights (in part, where memory is short), leaving the plan's working memory free; the device."""
    mm.load_models_gpu([patcher], memory_required=plan.working + _headroom())
    device = torch.empty(0, device=patcher.load_device).device  # as its tensors call it
    away = sum(weight.nbytes for weight in patcher.model.parameters() if weight.device != device)
    if plan.resident == plan.weights and away > TOLERATED * plan.weights:
        log.warning(
            "%s of %s of weights are streamed for every token although all of them fit: ComfyUI kept them off the "
            "device. This makes it much slower; please report it.",
            format_bytes(away),
            format_bytes(plan.weights),
        )
    return device


def send_away(patcher: Any) -> bool:
    """Send half of a model's weights on its device to the host, from where they are streamed; whether any went."""
    if mm.is_device_cpu(patcher.load_device):
        return False
    sent = patcher.partially_unload(patcher.offload_device, patcher.loaded_size() // 2)
    mm.soft_empty_cache()
    return bool(sent)


def on_unload(patcher: Any, forget: Callable[[], None]) -> None:
    """Call `forget` whenever the host takes a model off its device (and not when it merely looks at it again)."""
    patcher.add_callback(CallbacksMP.ON_DETACH, lambda _, unpatch_all: unpatch_all and forget())


@contextmanager
def memory_told(work: Sentence, needed: int | None = None, advice: Sentence = LOADING_ADVICE) -> Iterator[None]:
    """Inside, memory that runs out is one sentence; every model has left the device then, so that the next run can go
    on, as the host does it for errors of the device's own kind."""
    try:
        with told(work, mm.get_torch_device(), needed, advice):
            yield
    except OutOfMemory:
        mm.unload_all_models()
        raise

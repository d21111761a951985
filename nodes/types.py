"""Our socket types and the values that travel through them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ..nextstep_core.decoding.engine import NextStepEngine
from ..nextstep_core.errors import NextStepError, shown
from ..nextstep_core.images.placement import Placement
from ..nextstep_core.images.rgb import is_plain
from ..nextstep_core.request.layout import Caption
from ..nextstep_core.sentences import Sentence, Words, named
from .host import stays_cached

CATEGORY = "NextStep"

ModelSocket = io.Custom("NEXTSTEP_MODEL")
PromptSocket = io.Custom("NEXTSTEP_PROMPT")
InfoSocket = io.Custom("NEXTSTEP_INFO")
OriginalSocket = io.Custom("NEXTSTEP_ORIGINAL")


@dataclass(eq=False)
class HostModel:
    """A loaded checkpoint under the host's memory management.

    The patcher owns where the weights are; dtype is the one to compute in. `vae` is the one that goes with the
    checkpoint as a native VAE, or None where there is none; `rgb_map` is fitted to it before a run that shows previews.
    `facts` are what pictures tell of the model they were drawn by; `seconds_per_token` is of the last run, if any.
    With LoRAs, `plain` is the model without, whose weights it shares: while one is in use, no other is loaded.
    """

    engine: NextStepEngine
    patcher: Any
    dtype: torch.dtype
    vae: Any
    facts: dict[str, str]
    rgb_map: Tensor | None = None
    seconds_per_token: float | None = None
    plain: HostModel | None = None

    def is_dynamic(self) -> bool:
        """Asked by the host's cache of a loader's outputs."""
        return stays_cached()


@dataclass(frozen=True)
class PromptValue:
    """Captions as the model reads them, each with the images for its slots. Several make a batch of pictures."""

    captions: tuple[Caption, ...]

    @property
    def editing(self) -> bool:
        """Whether there is an input image."""
        return any(caption.images for caption in self.captions)


@dataclass(frozen=True, eq=False)
class Original:
    """Pictures (B, H, W, 3) in [0, 1] as they came, and where the part that is drawn belongs in them.

    `mask` (B, h, w) is the one on the canvas, or None where all of it is drawn.
    """

    pictures: Tensor
    placement: Placement
    mask: Tensor | None


@dataclass(frozen=True)
class Info:
    """What each picture of a batch was made with, as text; see `request.parameters`."""

    texts: tuple[str, ...]


def check_sockets(**inputs: Any) -> None:
    """NextStepError for the first input that is not what its socket carries.

    The host looks at what a link says it carries. It takes a value that a workflow holds in place of a link as it is.
    """
    for name, value in inputs.items():
        SOCKETS[name](name, value)


def _carries(kind: type, source: Sentence) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if not isinstance(value, kind):
            raise NextStepError(
                "{name} is {value}; connect the output of {source}.",
                name=named(name),
                value=shown(value),
                source=source,
            )

    return check


def _check_vae(name: str, value: Any) -> None:
    if not all(callable(getattr(value, call, None)) for call in ("encode", "decode")):
        raise NextStepError(
            "{name} is {value}; connect the vae output of Load NextStep Model.", name=named(name), value=shown(value)
        )


def _check_latent(name: str, value: Any) -> None:
    samples = value.get("samples") if isinstance(value, dict) else None
    if isinstance(samples, Tensor) and _holds_pictures(samples):
        _check_mask(value.get("noise_mask"))
        return
    what = _described(samples if isinstance(value, dict) else value)
    raise NextStepError(
        "{name} is {what}, not pictures. Connect NextStep Empty Latent or VAE Encode.", name=named(name), what=what
    )


def _described(value: Any) -> Words:
    """A value that may be a tensor, as a message shows it."""
    if not isinstance(value, Tensor):
        return shown(value)
    shape, dtype = tuple(value.shape), value.dtype
    return Sentence("of the shape {shape} with {dtype} values", shape=shape, dtype=dtype)


def _holds_pictures(samples: Tensor) -> bool:
    return is_plain(samples) and samples.is_floating_point() and samples.ndim == 4 and samples.numel() > 0


def _check_mask(mask: Any) -> None:
    if mask is not None and not (isinstance(mask, Tensor) and is_plain(mask) and mask.ndim >= 2 and mask.numel()):
        raise NextStepError(
            "The mask is {what}; expected (height, width). Connect a mask that was painted.", what=_described(mask)
        )


SOCKETS: dict[str, Callable[[str, Any], None]] = {
    "model": _carries(HostModel, Sentence("Load NextStep Model")),
    **dict.fromkeys(
        ("positive", "negative", "first", "second"), _carries(PromptValue, Sentence("a NextStep Encode node"))
    ),
    **dict.fromkeys(("latent", "samples"), _check_latent),
    "vae": _check_vae,
    "info": _carries(Info, Sentence("NextStep Sampler")),
    "original": _carries(Original, Sentence("NextStep Prepare Picture")),
    "mask": lambda _, value: _check_mask(value),
}

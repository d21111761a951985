"""Whether a layer may be stood in for by something that computes the same from its weights."""

from __future__ import annotations

from torch import nn


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer gives what its weights say: nothing is hooked to it, and no host changes its weights."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks
    return not hooked and not getattr(layer, "weight_function", ()) and not getattr(layer, "bias_function", ())

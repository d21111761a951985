"""NextStep-1 inference engine: works alone, knows no host application.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "NextStepPipeline": ".pipeline",
    "GenerationOutput": ".pipeline",
    "GenerationSettings": ".sampling.settings",
    "Progress": ".decoding.progress",
    "NextStepError": ".errors",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)

"""NextStep-1 inference engine: works alone, knows no host application.

Public names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what editors and type checkers see; _HOMES says the same at run time
    from .decoding.progress import Progress
    from .errors import NextStepError
    from .pipeline import GenerationOutput, NextStepPipeline
    from .sampling.settings import GenerationSettings

__version__ = "0.1.0"

_HOMES = {
    "GenerationOutput": ".pipeline",
    "GenerationSettings": ".sampling.settings",
    "NextStepError": ".errors",
    "NextStepPipeline": ".pipeline",
    "Progress": ".decoding.progress",
}

__all__ = ["GenerationOutput", "GenerationSettings", "NextStepError", "NextStepPipeline", "Progress"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name], __name__), name)

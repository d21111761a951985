"""Stands in for a package that ComfyUI imports and that this environment has no build of.

`scripts/environment.sh` copies this file into the environment as the packages torchvision and torchaudio, unless the
real ones are there. Every name that the host imports exists; what is called says that it is missing.
"""

from __future__ import annotations

import sys
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PACKAGE = __name__
__version__ = "0.0"


class Missing(type):
    """A class for every missing name, so that the host may also inherit from it; its attributes are missing as well."""

    def __getattr__(cls, name: str) -> Missing:
        return missing(f"{cls.__module__}.{cls.__name__}", name)

    def __call__(cls, *arguments: Any, **options: Any) -> Any:
        raise RuntimeError(
            f"{cls.__module__}.{cls.__name__} is needed here, and {PACKAGE} is not installed in this environment. "
            f"Install the {PACKAGE} that fits its PyTorch."
        )


def missing(module: str, name: str) -> Missing:
    """What a module answers when it is asked for a name."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Missing(name, (), {"__module__": module})


class Submodules(MetaPathFinder, Loader):
    """Makes any submodule of the package that is imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.startswith(f"{PACKAGE}.") else None

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__getattr__ = partial(missing, module.__name__)


__getattr__ = partial(missing, __name__)
sys.meta_path.append(Submodules())

"""Stands in for torchvision where a CPU-only environment has none: the host imports the name, our graphs never call it."""

from . import transforms  # noqa: F401

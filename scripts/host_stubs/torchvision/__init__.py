"""Stands in for torchvision where a CPU-only environment has none: the host imports it, our graphs never call it."""

from . import transforms as transforms

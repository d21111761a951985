"""See the package's docstring."""

from . import functional as functional

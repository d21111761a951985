"""The command line: options to calls of the studio, and what comes of them to the terminal or to JSON."""

from .app import app
from .calibrate import calibrate
from .draw import batch, edit, generate
from .files import convert, download
from .machine import bench, doctor, status, test
from .serve import serve

__all__ = [
    "app",
    "batch",
    "bench",
    "calibrate",
    "convert",
    "doctor",
    "download",
    "edit",
    "generate",
    "serve",
    "status",
    "test",
]

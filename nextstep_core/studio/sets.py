"""The prompt sets that are shipped, by name."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "data" / "sets"
SETS = ("brand", "education", "marketing")


def set_path(name: str) -> Path:
    """The file of a shipped set, or the path that is named."""
    return FOLDER / f"{name}.json" if name in SETS else Path(name)

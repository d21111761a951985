"""Whether text files end in one newline and no line ends in a space: `python -m scripts.check_text FILE...`"""

from __future__ import annotations

import sys
from pathlib import Path


def faults(path: Path) -> list[str]:
    """One line for each fault of a file."""
    text = path.read_text(encoding="utf-8")
    found = [f"{path}:{n}: ends in a space" for n, line in enumerate(text.split("\n"), 1) if line != line.rstrip(" \t")]
    if text and (not text.endswith("\n") or text.endswith("\n\n")):
        found.append(f"{path}: does not end in one newline")
    return found


if __name__ == "__main__":
    found = [fault for name in sys.argv[1:] for fault in faults(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    sys.exit(bool(found))

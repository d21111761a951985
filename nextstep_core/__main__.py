"""The command line: `nextstep`, or `python -m nextstep_core`."""

from __future__ import annotations

import sys
from importlib.util import find_spec


def main() -> None:
    """Run a command; where the library that reads command lines is missing, say how to install it."""
    if find_spec("typer") is None:
        sys.exit(f'The commands need typer. Install it with: {sys.executable} -m pip install "typer>=0.12"')
    from .studio.commands import app

    app()


if __name__ == "__main__":
    main()

"""The closing table, and what is said of a finding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from .outcome import BAD, GOOD, Outcome

LINES = 12  # of a traceback that are shown


def table(outcomes: Iterable[Outcome]) -> str:
    """A line for each kind of case and one for all, a column for each way to end."""
    counted = Counter((ended.name.partition(":")[0], ended.kind) for ended in outcomes)
    kinds = sorted({kind for kind, _ in counted})
    columns = (*GOOD, *BAD)
    rows = [("", "cases", *columns)]
    rows += [_row(kind, [counted[kind, column] for column in columns]) for kind in kinds]
    rows += [_row("all", [sum(counted[kind, column] for kind in kinds) for column in columns])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _row(name: str, counts: list[int]) -> tuple[str, ...]:
    return (name, str(sum(counts)), *map(str, counts))


def finding(ended: Outcome) -> str:
    """A finding with the name that repeats it, which shows the whole traceback."""
    detail = "\n".join(ended.detail.splitlines()[-LINES:])
    return f"{ended.kind}: {ended.what} ({ended.seconds:.1f} s)\n{detail}\n  --repeat {ended.name}\n"

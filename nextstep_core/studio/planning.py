"""Batches of a run: cut once, written down in its folder, and drawn whole by whichever run is to draw them.

A picture's last bits depend on what is drawn beside it. So a batch of which a picture is missing is drawn again as it
was cut, and a run that was stopped, or whose pictures are drawn by many workers, comes to the same bits as one that was
not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..errors import NextStepError, not_written
from ..loading.files import read_all
from .drawing import Settled
from .jobs import Order
from .manifest import write_whole

PLAN = "plan.json"
LARGEST_PLAN = 1 << 26  # bytes


@dataclass(frozen=True)
class Entry:
    """A picture of the run: its order as it is drawn, its key and its file, relative to the folder."""

    settled: Settled
    key: str
    file: str

    @property
    def order(self) -> Order:
        return self.settled.order


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn together; those at the places `wanted` are to be saved, the others are there already."""

    entries: tuple[Entry, ...]
    wanted: tuple[int, ...]

    @property
    def orders(self) -> list[Settled]:
        return [entry.settled for entry in self.entries]

    def singles(self) -> list[Batch]:
        """Each wanted picture in a batch of its own."""
        return [Batch((self.entries[n],), (0,)) for n in self.wanted]


def plan(folder: Path, entries: Sequence[Entry], missing: Sequence[Entry], most: int) -> list[Batch]:
    """The batches in which something is missing, of at most so many pictures. What the folder's plan holds stays as it
    was cut; the rest is cut now, and written down before anything of it is drawn."""
    waiting = {entry.key: entry for entry in entries}
    wanted = {entry.key for entry in missing}
    known = list(_known(folder / PLAN, waiting, most))
    new = list(groups([entry for entry in missing if entry.key in waiting], most))
    if new:
        batches = [[entry.key for entry in batch] for batch in (*known, *new)]
        try:
            write_whole(folder / PLAN, json.dumps({"together": most, "batches": batches}))
        except OSError as error:
            raise not_written(folder / PLAN, error) from None
    found = (Batch(tuple(b), tuple(n for n, entry in enumerate(b) if entry.key in wanted)) for b in (*known, *new))
    return [batch for batch in found if batch.wanted]


def _known(path: Path, waiting: dict[str, Entry], most: int) -> Iterator[list[Entry]]:
    """The batches of a plan that this job has, taken out of `waiting`; none of a plan that was cut for another number,
    and none that no longer makes sense."""
    stated: object = None
    with suppress(OSError, NextStepError, ValueError, RecursionError):
        stated = json.loads(read_all(path, LARGEST_PLAN)) if path.exists() else None
    if not isinstance(stated, Mapping) or stated.get("together") != most or not isinstance(stated.get("batches"), list):
        return
    for keys in stated["batches"]:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            continue
        batch = [waiting[key] for key in dict.fromkeys(keys) if key in waiting]
        if 0 < len(batch) <= most and len({entry.settled.together for entry in batch}) == 1:
            for entry in batch:
                del waiting[entry.key]
            yield batch


def groups(entries: Iterable[Entry], most: int) -> Iterator[list[Entry]]:
    """Entries that can be drawn in one batch, at most so many; groups in the order of their first entries."""
    waiting: dict[tuple[object, ...], list[Entry]] = {}
    for entry in entries:
        waiting.setdefault(entry.settled.together, []).append(entry)
    for alike in waiting.values():
        for start in range(0, len(alike), most):
            yield alike[start : start + most]

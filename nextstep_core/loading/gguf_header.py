"""The header of a GGUF file: which tensors it holds, and where. Nothing that it says is believed before it is checked.

The gguf package reads headers too, but does so as they say: a list of 2**40 entries is a loop of as many rounds.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..errors import NextStepError, damaged, shown
from .documents import MAX_TENSORS, MAX_VALUES
from .files import check_regular

MAGIC, VERSIONS = b"GGUF", (2, 3)
SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of a number, by its kind
STRING, LIST = 8, 9
MAX_ENTRIES, MAX_TEXT, MAX_AXES = 10_000, 1 << 20, 4
ARCHITECTURE, ALIGNMENT, PARTS = "general.architecture", "general.alignment", "split.count"


@dataclass(frozen=True)
class Entry:
    """A tensor: its shape, its block format as a number, and the bytes start..stop-1 of the file that hold it."""

    shape: tuple[int, ...]
    kind: int
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Tensors by their names in the file, the architecture, where it is told, and of how many files this is one."""

    tensors: dict[str, Entry]
    architecture: str | None
    parts: int = 1


def read_header(path: Path, blocks: Mapping[int, tuple[int, int]]) -> Header:
    """The header of a file; NextStepError when it is damaged, OSError when there is none.

    `blocks` are (numbers, bytes) of a block of each known format.
    """
    check_regular(path)
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(path, data).header(blocks)
    except (ValueError, struct.error) as error:
        if isinstance(error, NextStepError):
            raise
        raise damaged(path, error) from None


class _Parser:
    """Goes through the bytes of a file once; ValueError or struct.error for what cannot be."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data, self._at = path, data, 0

    def header(self, blocks: Mapping[int, tuple[int, int]]) -> Header:
        if self._data[:4] != MAGIC:
            raise ValueError("it does not start like a GGUF file")
        self._at = 4
        version, tensors, entries = self._number("<I"), self._number("<Q"), self._number("<Q")
        if version not in VERSIONS:
            raise ValueError(f"the unknown format version {version}")
        _bound("tensors", tensors, MAX_TENSORS)
        _bound("metadata entries", entries, MAX_ENTRIES)
        told: dict[str, int | str] = {}
        for _ in range(entries):
            self._entry(told)
        found = [self._tensor() for _ in range(tensors)]
        alignment, architecture = told.get(ALIGNMENT, 32), told.get(ARCHITECTURE)
        if not isinstance(alignment, int) or not 1 <= alignment <= 1 << 20:
            raise ValueError("an invalid alignment")
        data_start = -(-self._at // alignment) * alignment
        placed: dict[str, Entry] = {}
        for name, shape, kind, offset in found:
            if name in placed:
                raise ValueError(f"two tensors called {shown(name)}")
            placed[name] = self._place(name, shape, kind, data_start + offset, blocks)
        if sum(entry.stop - entry.start for entry in placed.values()) > len(self._data):
            raise ValueError("overlapping tensors")
        parts = told.get(PARTS, 1)
        return Header(placed, architecture if isinstance(architecture, str) else None, int(parts))

    def _entry(self, told: dict[str, int | str]) -> None:
        """One entry of the metadata; what we ask for goes to `told`."""
        key, kind = self._text(), self._number("<I")
        if key == ARCHITECTURE and kind == STRING:
            told[key] = self._text()
        elif key == ALIGNMENT and kind == 4:
            told[key] = self._number("<I")
        elif key == PARTS and kind == 2:
            told[key] = self._number("<H")
        elif kind == LIST:
            kind, count = self._number("<I"), self._number("<Q")
            _bound("values in a list", count, MAX_VALUES)
            if kind == LIST:
                raise ValueError("a list of lists, which is not allowed")
            self._skip(kind, count)
        else:
            self._skip(kind, 1)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        """(name, shape, format, offset) of a tensor; the file has the fastest axis first."""
        name, axes = self._text(), self._number("<I")
        _bound("axes", axes, MAX_AXES)
        shape = tuple(self._number("<Q") for _ in range(axes))
        return name, shape[::-1], self._number("<I"), self._number("<Q")

    def _place(
        self, name: str, shape: tuple[int, ...], kind: int, start: int, blocks: Mapping[int, tuple[int, int]]
    ) -> Entry:
        if kind not in blocks:
            raise unreadable(self._path, str(kind))
        numbers, size = blocks[kind]
        if not shape or shape[-1] % numbers:
            raise ValueError(f"{shown(name)} has the shape {list(shape)}, which is not whole blocks of {numbers}")
        stop = start + math.prod(shape) // numbers * size
        if stop > len(self._data):
            raise ValueError(f"{shown(name)} ends past the end of the file")
        return Entry(shape, kind, start, stop)

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return int(value)

    def _text(self) -> str:
        length = self._number("<Q")
        _bound("bytes in a text", length, MAX_TEXT)
        self._at += length
        if self._at > len(self._data):
            raise ValueError("a text that ends past the end of the file")
        return self._data[self._at - length : self._at].decode("utf-8")

    def _skip(self, kind: int, count: int) -> None:
        if kind == STRING:
            for _ in range(count):
                length = self._number("<Q")
                _bound("bytes in a text", length, MAX_TEXT)
                self._at += length
        elif kind in SIZES:
            self._at += SIZES[kind] * count
        else:
            raise ValueError(f"metadata of the unknown kind {kind}")


def unreadable(path: Path, kind: str) -> NextStepError:
    """The error for a file whose blocks nobody here can read; `kind` is the format's name or number."""
    return NextStepError(
        "{path} holds tensors in the format {kind}, which the package gguf cannot turn into floats. "
        "Convert the checkpoint to another format.",
        path=path,
        kind=kind,
    )


def _bound(what: str, count: int, most: int) -> None:
    if count > most:
        raise ValueError(f"{count:,} {what}, where at most {most:,} are allowed")

"""The record of a batch run: one line for each picture, added when its file is complete.

A file that only grows survives a kill at any moment: at worst its last line is half written, and that is left out. It
needs no lock of the file system, so it also works on network drives.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..errors import NextStepError, not_written
from ..loading.files import read_all

MANIFEST = "manifest.jsonl"
SIDECAR, PART = ".json", ".part"
LARGEST_MANIFEST = 1 << 30  # bytes
LARGEST_SIDECAR = 1 << 20


@dataclass(frozen=True)
class Record:
    """What is known of a picture: `key` tells it apart, `file` is its path in the run's folder.

    `settings` are all that it was drawn with, `facts` name the model and this program's version. seconds are its share
    of the time of all that were drawn with it. `scores` are empty where nothing was measured, and `error` says why
    there is no picture.
    """

    key: str
    file: str
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    label: str = ""
    name: str = ""
    width: int = 0
    height: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    facts: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    scores: Mapping[str, float] = field(default_factory=dict)
    error: str = ""

    def to_json(self, indent: int | None = None) -> str:
        """As it stands in the manifest and, with an indent, beside the picture."""
        return json.dumps(asdict(self), ensure_ascii=False, indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Record | None:
        """The record, or None for what is none."""
        try:
            stated = json.loads(text)
            kinds = {f.name: type(getattr(BLANK, f.name)) for f in fields(cls)}
            if not isinstance(stated, dict) or not {"key", "file"} <= stated.keys() <= kinds.keys():
                return None
            for name, value in stated.items():
                if not isinstance(value, (int, float) if kinds[name] is float else kinds[name]):
                    return None
            return cls(**stated)
        except (ValueError, RecursionError):
            return None


BLANK = Record("", "", "")


class Manifest:
    """The records of a folder, by key; the newest of a key counts."""

    def __init__(self, folder: Path) -> None:
        """Read what is there. NextStepError where it cannot be read."""
        self.path = folder / MANIFEST
        self.records: dict[str, Record] = {}
        try:
            data = read_all(self.path, LARGEST_MANIFEST) if self.path.exists() else b""
        except OSError as error:
            raise NextStepError("{path} is not readable ({reason}).", path=self.path, reason=error) from None
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(self.path, len(whole))  # else the next line would continue the one that was cut off
        for line in whole.splitlines():
            if (record := Record.from_json(line)) is not None:
                self.records[record.key] = record

    def add(self, record: Record) -> None:
        """Write a record down, in one piece."""
        self.records[record.key] = record
        try:
            with self.path.open("ab") as file:
                file.write(record.to_json().encode() + b"\n")
        except OSError as error:
            raise not_written(self.path, error) from None

    def has(self, key: str) -> bool:
        """Whether this picture is drawn and its file still there."""
        record = self.records.get(key)
        return record is not None and not record.error and (self.path.parent / record.file).is_file()


def write_whole(path: Path, text: str) -> None:
    """A text under its name only when it is complete; OSError where it cannot be written."""
    part = path.with_name(path.name + PART)
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def sidecar_of(picture: Path) -> Path:
    """The file beside a picture that tells what it was made with."""
    return picture.with_name(picture.name + SIDECAR)


def read_sidecar(picture: Path) -> Record | None:
    """What the file beside a picture says, or None."""
    try:
        return Record.from_json(read_all(sidecar_of(picture), LARGEST_SIDECAR))
    except (OSError, NextStepError):
        return None

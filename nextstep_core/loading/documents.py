"""A checkpoint's JSON files: in its folder, or in the metadata of a single weights file that carries them along."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import NextStepError, damaged, shown
from ..sentences import Sentence, Words
from .files import is_file, is_folder, read_all, read_head

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
INDEX_NAME = "model.safetensors.index.json"
CALIBRATION = "calibration.safetensors"  # no weights: what they drew, to store them for
CARRIED = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)

# Bytes that a document may have. Published ones: 2 KB of config, 60 KB of index, 8 KB of tokenizer_config and 11 MB of
# tokenizer, of which the memory for reading it is a multiple.
SMALL_DOCUMENT = 1 << 20
LIMITS = {TOKENIZER: 32 << 20, TOKENIZER_CONFIG: 4 << 20, INDEX_NAME: 4 << 20}
# The header of a weights file: some hundred bytes for each tensor, and the documents that a single file carries.
MAX_HEADER, MAX_TENSORS = 64 << 20, 100_000
TEXT = re.compile(rb'"[^"]*"')  # where no text holds an escaped quotation mark
TEXTS_OF_TENSOR, NUMBERS_OF_TENSOR = 6, 10  # its name and those of its parts; its axes and its place
# Values in a document: a published tokenizer has half a million, and each takes some sixty bytes of memory when read.
MAX_VALUES = 2_000_000
MAX_DIGITS = 30  # of a whole number; the longest that means something, a seed, has twenty

# Metadata of a single file, beside the documents: what it is, the checkpoint's published name, its quantization.
MARK, VERSION = "nextstep", "1"
NAME, QUANTIZATION = "nextstep.name", "nextstep.quantization"
IN_LAYOUT = " in "  # between recipe and layout, in one word for both: who knows no layouts must not read the weights
MAX_NAME = 255  # characters; every picture that is drawn tells the name
HEAD_BYTES = 64  # enough to see the mark, which stands first in the files that we write


@dataclass(frozen=True)
class Documents:
    """Documents by name, read from `folder` or, where `carried` is given, from a file's metadata."""

    folder: Path
    carried: Mapping[str, str] | None = None
    file: Path | None = None

    @property
    def name(self) -> str:
        """The checkpoint's name, which tells its published settings: as carried, or that of its folder."""
        if self.carried is not None and NAME in self.carried and len(self.carried[NAME]) <= MAX_NAME:
            return self.carried[NAME]
        if self.folder.parent.name == "snapshots":  # of the Hugging Face cache, where folders are named by commit
            return self.folder.parent.parent.name.split("--")[-1]
        return self.folder.name

    @property
    def quantization(self) -> str | None:
        """The recipe that the weights are stored in, or None for plain ones."""
        return self._stored[0]

    @property
    def layout(self) -> str | None:
        """The layout that int4 weights lie in, or None where they lie as their format says."""
        return self._stored[1]

    @property
    def _stored(self) -> tuple[str | None, str | None]:
        recipe, _, layout = (self.carried or {}).get(QUANTIZATION, "").partition(IN_LAYOUT)
        return recipe or None, layout or None

    def where(self, name: str) -> Words:
        """What an error message calls a document."""
        if self.carried is None:
            return str(self.folder / name)
        return Sentence("{file} ({name} in its metadata)", file=self.file, name=name)

    def has(self, name: str) -> bool:
        """Whether there is such a document."""
        return name in self.carried if self.carried is not None else is_file(self.folder / name)

    def text(self, name: str) -> str:
        """A document as text; NextStepError when it is absent, unreadable or longer than such a document can be."""
        limit = LIMITS.get(name, SMALL_DOCUMENT)
        try:
            if self.carried is None:
                return read_all(self.folder / name, limit).decode("utf-8")
            text = self.carried[name]
        except (FileNotFoundError, NotADirectoryError, KeyError):
            raise NextStepError(
                "{where} does not exist. A NextStep checkpoint needs it.", where=self.where(name)
            ) from None
        except (OSError, UnicodeDecodeError) as error:
            raise NextStepError(
                "{where} is not readable ({reason}). Download the file again.", where=self.where(name), reason=error
            ) from None
        if len(text) > limit:
            raise NextStepError(
                "{where} holds {count:,} characters; such a document has at most {limit:,}. Download the file again.",
                where=self.where(name),
                count=len(text),
                limit=limit,
            )
        return text

    @contextmanager
    def as_file(self, name: str) -> Iterator[Path]:
        """A document as a file, for a library that takes only paths; a carried one is written out for so long."""
        if self.carried is None:
            yield self.folder / name
            return
        with TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(self.text(name), encoding="utf-8")
            yield path

    def read(self, name: str) -> dict[str, Any]:
        """The JSON object of a document; NextStepError when it is absent, is not JSON or is not an object."""
        return parse_object(self.text(name), self.where(name))


DOWNLOAD_AGAIN = Sentence("Download the file again.")


def parse_object(text: str, where: Words, advice: Sentence = DOWNLOAD_AGAIN) -> dict[str, Any]:
    """The JSON object in `text`; NextStepError, naming `where`, when it is something else or none that means anything:
    nested without end, with numbers that are none, with a key that has two values. `advice` ends the sentence."""
    values = sum(map(text.count, ",[{"))
    if values > MAX_VALUES:
        raise NextStepError(
            "{where} holds {count:,} values; at most {most:,} are allowed. {advice}",
            where=where,
            count=values,
            most=MAX_VALUES,
            advice=advice,
        )
    try:
        data = _DECODER.decode(text)
    except RecursionError:
        raise NextStepError("{where} is nested too deeply. {advice}", where=where, advice=advice) from None
    except ValueError as error:
        raise NextStepError(
            "{where} is not readable JSON ({reason}). {advice}", where=where, reason=error, advice=advice
        ) from None
    if not isinstance(data, dict):
        raise NextStepError(
            "{where} holds a JSON {kind}, not an object. {advice}", where=where, kind=type(data).__name__, advice=advice
        )
    return data


def _whole_number(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # Python raises only at thousands, in words about its own settings
        raise ValueError(f"a number of {len(digits):,} digits")
    return int(digits)


def _fraction(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{shown(digits)} is too large for a number")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    together = dict(pairs)
    if len(together) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"{shown(twice)} appears twice")
    return together


_DECODER = json.JSONDecoder(
    parse_int=_whole_number, parse_float=_fraction, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys
)


def find_documents(path: Path) -> Documents:
    """The documents of a checkpoint folder, of a single file that carries them, or of the folder a file lies in."""
    if is_folder(path):
        return Documents(path)
    carried = file_metadata(path) if is_marked(path) else {}
    return Documents(path.parent, carried, path) if CONFIG in carried else Documents(path.parent)


def is_marked(path: Path) -> bool:
    """Whether a weights file is a single file that we wrote, from its first bytes alone."""
    try:
        return f'"{MARK}":'.encode() in read_head(path, HEAD_BYTES)
    except (OSError, NextStepError):
        return False


def file_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; NextStepError when it is damaged."""
    try:
        check_header(path)
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None


def check_header(path: Path) -> None:
    """NextStepError when the header of a safetensors file is longer than any that is needed, or names more tensors or
    numbers; OSError without a file."""
    length = int.from_bytes(read_head(path, 8), "little")
    if length > MAX_HEADER:
        raise damaged(path, f"a header of {length:,} bytes, where at most {MAX_HEADER:,} are allowed")
    # Only what stands outside of texts counts: a text may hold a whole tokenizer, and a key be written in many ways.
    head = read_head(path, 8 + length).replace(rb"\\", b"").replace(rb"\"", b"")
    _bound(path, head.count(b'"') // 2, MAX_TENSORS * TEXTS_OF_TENSOR, "texts")
    plain = TEXT.sub(b"", head)
    _bound(path, plain.count(b"{") - 1, MAX_TENSORS, "tensors")
    _bound(path, plain.count(b","), MAX_TENSORS * NUMBERS_OF_TENSOR, "numbers")


def _bound(path: Path, count: int, most: int, what: str) -> None:
    if count > most:
        raise damaged(path, f"{count:,} {what}, where at most {most:,} are allowed")

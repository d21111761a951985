"""A checkpoint's JSON files: in its folder, or in the metadata of a single weights file that carries them along."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import NextStepError, damaged

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
CARRIED = (CONFIG, TOKENIZER, TOKENIZER_CONFIG, GENERATION_CONFIG)

# Metadata of a single file, beside the documents: what it is, the checkpoint's published name, its quantization.
MARK, VERSION = "nextstep", "1"
NAME, QUANTIZATION = "nextstep.name", "nextstep.quantization"
IN_LAYOUT = " in "  # between recipe and layout, in one word for both: who knows no layouts must not read the weights
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
        if self.carried is not None and NAME in self.carried:
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

    def where(self, name: str) -> str:
        """What an error message calls a document."""
        return str(self.folder / name) if self.carried is None else f"{self.file} ({name} in its metadata)"

    def has(self, name: str) -> bool:
        """Whether there is such a document."""
        return name in self.carried if self.carried is not None else (self.folder / name).is_file()

    def text(self, name: str) -> str:
        """A document as text; NextStepError when it is absent or unreadable."""
        try:
            return self.carried[name] if self.carried is not None else (self.folder / name).read_text(encoding="utf-8")
        except (FileNotFoundError, KeyError):
            raise NextStepError(f"{self.where(name)} does not exist. A NextStep checkpoint needs it.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise NextStepError(f"{self.where(name)} is not readable ({error}). Download the file again.") from None

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


def parse_object(text: str, where: str) -> dict[str, Any]:
    """The JSON object in `text`; NextStepError, naming `where`, when it is something else."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise NextStepError(f"{where} is not readable JSON ({error}). Download the file again.") from None
    if not isinstance(data, dict):
        raise NextStepError(f"{where} holds a JSON {type(data).__name__}, not an object. Download the file again.")
    return data


def find_documents(path: Path) -> Documents:
    """The documents of a checkpoint folder, of a single file that carries them, or of the folder a file lies in."""
    if path.is_dir():
        return Documents(path)
    carried = file_metadata(path) if is_marked(path) else {}
    return Documents(path.parent, carried, path) if CONFIG in carried else Documents(path.parent)


def is_marked(path: Path) -> bool:
    """Whether a weights file is a single file that we wrote, from its first bytes alone."""
    try:
        with path.open("rb") as file:
            return f'"{MARK}":'.encode() in file.read(HEAD_BYTES)
    except OSError:
        return False


def file_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; NextStepError when it is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, error) from None

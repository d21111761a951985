"""Names of files from a pattern that cannot leave its folder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePosixPath

from ..errors import NextStepError, check_text, shown

DEFAULT_PATTERN = "{index}-{name}-{label}-{seed}"
FIELDS = ("index", "name", "prompt", "label", "seed", "width", "height", "steps", "cfg")
FIELD = re.compile(r"\{(\w*)\}")
PLAIN = re.compile(r"[\w .,+@=()/-]*")  # besides fields; what every file system takes
NO_WORD = re.compile(r"[^\w]+")
LONGEST_FIELD, LONGEST_PART, LONGEST_PATTERN = 60, 180, 200  # bytes, bytes, characters
# Windows keeps these for devices, with any ending.
RESERVED = re.compile(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?")


def check_pattern(pattern: str, where: str) -> None:
    """NextStepError for a pattern that names no file inside of a folder."""
    check_text(f"{where}: names", pattern)
    for name in FIELD.findall(pattern):
        if name not in FIELDS:
            raise NextStepError(
                "{where}: {{{name}}} is not known in a pattern of names. There are: {fields}.",
                where=where,
                name=name,
                fields=", ".join(FIELDS),
            )
    plain = FIELD.sub("", pattern)
    parts = FIELD.sub("x", pattern).split("/")
    wrong = not PLAIN.fullmatch(plain) or len(pattern) > LONGEST_PATTERN
    if wrong or any(not part.strip() or part != part.strip() or part[0] == "." or part[-1] == "." for part in parts):
        raise NextStepError(
            "{where}: {pattern} is no pattern of names. Use letters, digits, fields such as {{name}}, and / between "
            "folders; no part may begin or end with a dot or a space.",
            where=where,
            pattern=shown(pattern),
        )


def slug(text: str) -> str:
    """A text as a part of a file's name: letters and digits of any language, with - for all between them."""
    plain = NO_WORD.sub("-", text.lower()).strip("-_")
    return plain.encode()[:LONGEST_FIELD].decode(errors="ignore").strip("-_")


def file_name(pattern: str, values: Mapping[str, object]) -> str:
    """The name, without its ending, that a checked pattern gives; fields that are empty leave no mark."""
    parts = []
    for part in pattern.split("/"):
        text = FIELD.sub(lambda found: slug(str(values[found[1]])), part)
        text = re.sub(r"([-_ .,+@=])\1+", r"\1", text).strip("-_ .")
        text = text.encode()[:LONGEST_PART].decode(errors="ignore").strip("-_ .") or "picture"
        parts.append(f"{text}_" if RESERVED.fullmatch(text) else text)
    return str(PurePosixPath(*parts))

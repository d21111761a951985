"""Prompts by the dozen: sets in text, CSV and JSON files, and templates whose {placeholders} run over lists."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from ..errors import NextStepError, check_choice, check_text, shown
from ..loading.documents import parse_object
from ..loading.files import read_all
from ..ranges import Range
from ..sentences import Sentence

PROMPTS = Range("The number of prompts", 1, 10_000)
LARGEST_FILE = 8 << 20  # bytes
PLACEHOLDER = re.compile(r"\{(\w+)\}")
COMBINE = ("grid", "zip")
COLUMNS = ("prompt", "negative_prompt", "name")
COMMENT = "#"
KINDS = (".txt", ".csv", ".json")
MEND = Sentence("Mend it, or remove it.")


@dataclass(frozen=True)
class Prompt:
    """A text, what to avoid (None: what the settings say), and a name for its pictures. `line` is where it stands in
    its file, from 1; 0 where there is none."""

    text: str
    negative_prompt: str | None = None
    name: str = ""
    line: int = 0


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: one per line (.txt), a table with a column `prompt` (.csv), or {"prompts": [...]} (.json).

    NextStepError, with the line, for the first thing that is wrong.
    """
    text = read_text(path)
    if path.suffix.lower() == ".csv":
        return parse_table(text, path.name)
    if path.suffix.lower() == ".json":
        return parse_list(text, path.name)
    return parse_lines(text, path.name)


def read_text(path: Path) -> str:
    """A file of prompts or jobs as text; NextStepError for another kind of file and for what is not readable."""
    check_choice("The kind of file", path.suffix.lower(), KINDS)
    try:
        return read_all(path, LARGEST_FILE).decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise NextStepError("{path} does not exist. Check the name.", path=path) from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        if isinstance(error, NextStepError):
            raise
        raise NextStepError("{path} is not readable ({reason}). Save it as UTF-8.", path=path, reason=error) from None


def parse_lines(text: str, where: str) -> list[Prompt]:
    """One prompt per line; empty lines and lines that begin with # are left out."""
    lines = enumerate((line.strip() for line in text.splitlines()), 1)
    return _counted(
        [Prompt(_prompt(line, where, n), line=n) for n, line in lines if line and line[0] != COMMENT], where
    )


def parse_table(text: str, where: str) -> list[Prompt]:
    """A CSV table with the column `prompt` and, where wanted, `negative_prompt` and `name`."""
    try:
        rows = csv.DictReader(io.StringIO(text), strict=True)
        columns = rows.fieldnames or []
        if "prompt" not in columns:
            raise NextStepError(
                '{where} has no column "prompt". Its first line names the columns: {columns}.',
                where=where,
                columns=", ".join(COLUMNS),
            )
        for column in columns:
            check_choice(f"{where}, line 1: a column", column, COLUMNS)
        found = [_of_row(row, f"{where}, line {rows.line_num}", rows.line_num) for row in rows]
    except csv.Error as error:
        raise NextStepError("{where} is not a readable table ({reason}).", where=where, reason=error) from None
    return _counted(found, where)


def parse_list(text: str, where: str) -> list[Prompt]:
    """{"prompts": [...]}, each a text or an object with the keys of a table's columns."""
    stated = parse_object(text, where, MEND)
    check_keys(stated, ("prompts",), where)
    return prompts_of(stated.get("prompts"), where)


def prompts_of(stated: object, where: str, lines: Mapping[int, int] | None = None) -> list[Prompt]:
    """The prompts in a JSON value; `lines` tells in which line of its file an item of a list stands."""
    if not isinstance(stated, list):
        raise NextStepError("{where}: prompts is {value}; write a list.", where=where, value=shown(stated))
    found = []
    for n, item in enumerate(stated):
        line = 0 if lines is None else lines.get(n, 0)
        at = f"{where}, line {line}" if line else f"{where}, prompt {n + 1}"
        item = {"prompt": item} if isinstance(item, str) else item
        if not isinstance(item, dict):
            raise NextStepError("{where} is {value}; write a text.", where=at, value=shown(item))
        check_keys(item, COLUMNS, at)
        found.append(_of_row(item, at, line))
    return _counted(found, where)


def check_keys(stated: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """NextStepError, with the keys that there are, for one that is none."""
    for key in stated:
        check_choice(f"{where}: a key", key, known)


def _of_row(row: Mapping[str | None, Any], where: str, line: int) -> Prompt:
    if None in row:
        raise NextStepError(
            "{where} has more columns than the first line. Put texts with commas in quotes.", where=where
        )
    negative, name = row.get("negative_prompt"), row.get("name") or ""
    if negative is not None:
        check_text(f"{where}: negative_prompt", negative)
    text = _prompt(row.get("prompt"), where, line)
    return Prompt(text, negative or None, check_text(f"{where}: name", name), line)


def _prompt(text: object, where: str, line: int) -> str:
    at = f"{where}, line {line}" if line and ", line " not in where else where
    if not check_text(f"{at}: the prompt", text).strip():
        raise NextStepError("{where}: the prompt is empty. Write one, or remove the line.", where=at)
    return str(text)


def _counted(found: list[Prompt], where: str) -> list[Prompt]:
    if not found:
        raise NextStepError("{where} holds no prompt. Write one per line.", where=where)
    if len(found) > PROMPTS.maximum:
        raise NextStepError(
            "{where} holds {count:,} prompts; at most {most:,} are allowed. Split it.",
            where=where,
            count=len(found),
            most=PROMPTS.maximum,
        )
    return found


def placeholders(*texts: str) -> list[str]:
    """The names in braces, each once, in the order in which they appear."""
    return list(dict.fromkeys(name for text in texts for name in PLACEHOLDER.findall(text)))


@dataclass(frozen=True)
class Lists:
    """What placeholders stand for. "grid" combines every value with every other, the last list running fastest; "zip"
    takes the first of each, then the second of each, and so on."""

    values: Mapping[str, tuple[str, ...]]
    combine: str = "grid"

    def check(self, texts: Sequence[str], where: str) -> None:
        """NextStepError for a placeholder without a list, a list that no text uses, and unequal lists for zip."""
        check_choice(f"{where}: combine", self.combine, COMBINE)
        used = placeholders(*texts)
        for name in used:
            if name not in self.values:
                raise NextStepError(
                    "{where}: {{{name}}} stands in a prompt, but no list has this name. There are: {lists}.",
                    where=where,
                    name=name,
                    lists=", ".join(self.values) or "none",
                )
        for name, values in self.values.items():
            if name not in used:
                raise NextStepError(
                    "{where}: no prompt uses the list {name}. Write {{{name}}} in one, or remove the list.",
                    where=where,
                    name=name,
                )
            if not values:
                raise NextStepError("{where}: the list {name} is empty. Write a value.", where=where, name=name)
        lengths = {name: len(self.values[name]) for name in used}
        if self.combine == "zip" and len(set(lengths.values())) > 1:
            raise NextStepError(
                "{where}: zip needs lists of one length, and theirs are {lengths}. Use grid, or complete them.",
                where=where,
                lengths=", ".join(f"{name} {length}" for name, length in lengths.items()),
            )

    def count(self, *texts: str) -> int:
        """How many combinations the placeholders of these texts have together, without making any."""
        lengths = [len(self.values[name]) for name in placeholders(*texts)]
        return prod(lengths) if self.combine == "grid" else lengths[0] if lengths else 1

    def combinations(self, *texts: str) -> Iterator[dict[str, str]]:
        """The values of the placeholders of these texts, one set after another."""
        names = placeholders(*texts)
        lists = [self.values[name] for name in names]
        if not names:
            yield {}
            return
        rows = product(*lists) if self.combine == "grid" else zip(*lists)
        for row in rows:
            yield dict(zip(names, row))


def fill(text: str, values: Mapping[str, str]) -> str:
    """A text with its placeholders replaced; a value that holds braces itself is left as it is."""
    return PLACEHOLDER.sub(lambda found: values.get(found[1], found[0]), text)


def expand(templates: Sequence[str], lists: Lists, where: str = "The template") -> list[str]:
    """Every text that templates give; NextStepError, before any is made, when they are too many or do not fit."""
    lists.check(templates, where)
    PROMPTS.check(sum(map(lists.count, templates)))
    return [fill(text, values) for text in templates for values in lists.combinations(text)]


def parse_lists(text: str, combine: str, where: str = "lists") -> Lists:
    """Lists as people write them: a line `name: first | second | third` for each."""
    values: dict[str, tuple[str, ...]] = {}
    for n, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, colon, rest = line.partition(":")
        if not colon or not re.fullmatch(r"\w+", name.strip()):
            raise NextStepError(
                "{where}, line {line}: {text} is no list. Write a name, a colon, and the values with | between them, "
                "such as color: red | blue.",
                where=where,
                line=n,
                text=shown(line.strip()),
            )
        if name.strip() in values:
            raise NextStepError("{where}, line {line}: {name} appears twice.", where=where, line=n, name=name.strip())
        values[name.strip()] = tuple(value.strip() for value in rest.split("|") if value.strip())
    return Lists(values, combine)

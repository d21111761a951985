"""In which line of a JSON text a value stands, which Python's own reader does not tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

from ..sentences import Sentence, Words

Place = tuple["str | int", ...]  # the keys and indices that lead to a value
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|[^\s{}\[\],:"]+|\n')


def lines_of(text: str) -> dict[Place, int]:
    """The line, from 1, of every value of a text that is known to be valid JSON, by its place."""
    lines: dict[Place, int] = {}
    tokens = _tokens(text)

    def walk(token: str, line: int, place: Place) -> None:
        lines[place] = line
        if token not in "{[":
            return
        closing, index = ("}", None) if token == "{" else ("]", 0)
        for token, line in tokens:
            if token == closing:
                return
            if token == ",":
                continue
            if index is None:
                key = json.loads(token)
                next(tokens)  # the colon
                walk(*next(tokens), (*place, key))
            else:
                walk(token, line, (*place, index))
                index += 1

    walk(*next(tokens), ())
    return lines


def where_of(name: Words, lines: Mapping[Place, int], place: Place) -> Words:
    """How a message calls a place: its file, and the line of the innermost value around it that is known, if any."""
    if not lines:
        return name
    while place not in lines:
        place = place[:-1]
    return in_line(name, lines[place])


def in_line(name: Words, line: int) -> Sentence:
    """A line of a file, as a message calls it."""
    return Sentence("{file}, line {line}", file=name, line=line)


def at(where: Words, name: Words) -> Sentence:
    """What stands at a place, as a message calls it."""
    return Sentence("{where}: {name}", where=where, name=name)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for found in TOKEN.finditer(text):
        if found[0] == "\n":
            line += 1
        else:
            yield found[0], line

"""In which line of a JSON text a value stands, which Python's own reader does not tell."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping

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


def where_of(name: str, lines: Mapping[Place, int], place: Place) -> str:
    """How a message calls a place: its file, and the line of the innermost value around it that is known."""
    while place not in lines and place:
        place = place[:-1]
    return f"{name}, line {lines.get(place, 1)}"


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for found in TOKEN.finditer(text):
        if found[0] == "\n":
            line += 1
        else:
            yield found[0], line

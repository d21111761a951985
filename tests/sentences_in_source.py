"""What shipped code says to users, read from its syntax tree, and what it says so that no catalogue can hold it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from string import Formatter

SPEAKERS = {"NextStepError", "OutOfMemory", "Sentence"}
NAMERS = {"Range", "check_choice", "check_text", "check_length", "named"}  # their first argument names an input
HOME = "nextstep_core/sentences.py"  # where sentences are made of what others hand in


@dataclass(frozen=True)
class Said:
    """A template and where it stands."""

    template: str
    file: str
    line: int


def said_in(source: str, file: str) -> list[Said]:
    """The templates of a file that have words, in order."""
    calls = (node for node in ast.walk(ast.parse(source)) if _name(node) in SPEAKERS)
    found = ((call, _literal(call)) for call in calls)
    return [Said(text, file, call.lineno) for call, text in found if text is not None and has_words(text)]


def faults(source: str, file: str) -> list[str]:
    """What cannot be translated in a file's text, each with its line."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{file}:{call.lineno} {fault}" for call in calls for fault in _faults_of(call, file)]


def _faults_of(call: ast.Call, file: str) -> Iterator[str]:
    if _name(call) in SPEAKERS and file != HOME:
        template = _literal(call)
        if template is None:
            yield "the sentence is not written out; give its values by name"
            return
        given = {keyword.arg for keyword in call.keywords}
        if given and places(template) is None or given != {place[0] for place in places(template) or ()}:
            yield f"the places in {template!r} are not the values {sorted(map(str, given))}"
    if _name(call) in NAMERS and call.args:
        name = call.args[0]
        if isinstance(name, ast.JoinedStr) or isinstance(name, ast.Constant) and " " in str(name.value):
            yield "a phrase in place of an input's name; make it a Sentence"


def places(template: str) -> set[tuple[str, str, str]] | None:
    """(name, conversion, format) of a template's places; None where it cannot be formatted by plain names."""
    try:
        parts = [(name, conversion or "", form) for _, name, form, conversion in Formatter().parse(template) if name]
    except ValueError:
        return None
    return set(parts) if all(name.isidentifier() for name, _, _ in parts) else None


def has_words(template: str) -> bool:
    """Whether there is anything to translate between the places."""
    return re.search("[^\\W\\d_]", "".join(text for text, *_ in Formatter().parse(template))) is not None


def titles_in(source: str) -> dict[str, str]:
    """Node ids and titles of a file of nodes."""
    schemas = (node for node in ast.walk(ast.parse(source)) if _name(node) == "schema")
    given = ({keyword.arg: keyword.value for keyword in call.keywords} for call in schemas)
    return {ast.literal_eval(g["node_id"]): ast.literal_eval(g["display_name"]) for g in given if "node_id" in g}


def _name(node: ast.AST) -> str:
    """What a call calls; empty for what is no call."""
    if not isinstance(node, ast.Call):
        return ""
    called = node.func
    return called.id if isinstance(called, ast.Name) else called.attr if isinstance(called, ast.Attribute) else ""


def _literal(call: ast.Call) -> str | None:
    first = call.args[0] if len(call.args) == 1 else None
    return first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else None

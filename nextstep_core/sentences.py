"""Sentences for the person at the screen, kept in two parts: English with named places, and what stands in them.

So whoever shows one can say it in another language. The engine itself knows no language but English.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import reduce
from typing import Any, TypeAlias, Union

Words: TypeAlias = Union[str, "Sentence"]
Translate: TypeAlias = Callable[[str], str]  # from an English template to the same in another language


class Sentence:
    """`template` with a `{name}` for each of `values`, formatted as by `str.format`; without values it is plain text.

    A value may be a sentence itself. What is no text and no number is turned into text at once: a message that is kept
    must not keep a tensor, or an error with its traceback.
    """

    def __init__(self, template: str, /, **values: object) -> None:
        self.template = template
        self.values = {name: _kept(value) for name, value in values.items()}

    @classmethod
    def of(cls, template: str, values: Mapping[str, object]) -> Sentence:
        """The sentence whose values are in a dictionary."""
        return cls(template, **values)

    def said(self, translate: Translate) -> str:
        """The sentence with its template, and those of the sentences in it, as `translate` gives them."""
        template = translate(self.template)
        if not self.values:
            return template
        said = {name: v.said(translate) if isinstance(v, Sentence) else v for name, v in self.values.items()}
        return template.format(**said)

    def __str__(self) -> str:
        return self.said(str)

    def as_data(self) -> dict[str, Any]:
        """The sentence as JSON can hold it, for another process; see `from_data`."""
        values = {name: v.as_data() if isinstance(v, Sentence) else v for name, v in self.values.items()}
        return {"template": self.template, "values": values}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Sentence:
        """The sentence that `as_data` gave."""
        values = {name: cls.from_data(v) if isinstance(v, dict) else v for name, v in data["values"].items()}
        return cls.of(data["template"], values)


def _kept(value: object) -> str | int | float | Sentence:
    found = getattr(value, "sentence", value)  # of an error that has one
    return found if isinstance(found, (str, int, float, Sentence)) else str(found)


def named(name: Words) -> Sentence:
    """The name of an input, which a host shows by the label that it has in the user's language."""
    return name if isinstance(name, Sentence) else Sentence(name)


def any_of(choices: Iterable[object]) -> Sentence:
    """Choices with "or" between them."""
    return reduce(lambda some, one: Sentence("{some} or {one}", some=some, one=one), map(_as_sentence, choices))


def all_of(things: Iterable[object]) -> Sentence:
    """Things with "and" between them."""
    return reduce(lambda some, one: Sentence("{some} and {one}", some=some, one=one), map(_as_sentence, things))


def in_a_row(sentences: Iterable[Sentence]) -> Sentence:
    """Whole sentences, one after another."""
    return reduce(lambda some, one: Sentence("{some} {one}", some=some, one=one), sentences)


def _as_sentence(value: object) -> Sentence:
    return value if isinstance(value, Sentence) else Sentence("{value}", value=value)

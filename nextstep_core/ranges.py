"""The numbers that a setting may be, stated once: for the widget that offers it and for all that take it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Generic, TypeVar, cast

from .errors import NextStepError, shown
from .sentences import Sentence, Words, named

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Range(Generic[Number]):
    """A setting's least and greatest value, both allowed; whole numbers only where they are stated as such. `note` is
    told along with them."""

    name: Words
    minimum: Number
    maximum: Number
    note: Sentence | None = None

    def check(self, value: object) -> Number:
        """The value as a plain number; NextStepError, by the setting's name, when it is outside the range.

        NumPy's numbers are welcome. True and False are refused, and so is a text that spells a number.
        """
        whole = isinstance(self.minimum, int)
        number: Any = value if isinstance(value, Integral if whole else Real) and not isinstance(value, bool) else None
        if number is not None and self.minimum <= number <= self.maximum:
            return cast(Number, int(number) if whole else float(number))
        raise NextStepError(
            "{name} is {value}; use {range}.", name=named(self.name), value=shown(value), range=self._in_words()
        )

    def _in_words(self) -> Sentence:
        least, most = shown(self.minimum), shown(self.maximum)
        if isinstance(self.minimum, int):
            words = Sentence("a whole number from {least} to {most}", least=least, most=most)
        else:
            words = Sentence("a number from {least} to {most}", least=least, most=most)
        return words if self.note is None else Sentence("{range}, {note}", range=words, note=self.note)

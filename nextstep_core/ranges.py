"""The numbers that a setting may be, stated once: for the widget that offers it and for all that take it."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Generic, TypeVar, cast

from .errors import NextStepError, shown

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Range(Generic[Number]):
    """A setting's least and greatest value, both allowed; whole numbers only where they are stated as such. `note` is
    told along with them."""

    name: str
    minimum: Number
    maximum: Number
    note: str = ""

    def check(self, value: object) -> Number:
        """The value as a plain number; NextStepError, by the setting's name, when it is outside the range.

        NumPy's numbers are welcome. True and False are refused, and so is a text that spells a number.
        """
        whole = isinstance(self.minimum, int)
        number: Any = value if isinstance(value, Integral if whole else Real) and not isinstance(value, bool) else None
        if number is not None and self.minimum <= number <= self.maximum:
            return cast(Number, int(number) if whole else float(number))
        kind = "whole number" if whole else "number"
        ends = f"from {shown(self.minimum)} to {shown(self.maximum)}"
        raise NextStepError(f"{self.name} is {shown(value)}; use a {kind} {ends}{self.note and ', ' + self.note}.")

"""Which numbers a range takes, and how a refusal shows what it refuses."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

from nextstep_core import NextStepError
from nextstep_core.errors import check_text, shown
from nextstep_core.ranges import Range

WHOLE, ANY = Range("steps", 1, 1000), Range("cfg", 1.0, 100.0)


@pytest.mark.parametrize(("number", "value", "kept"), [
    (WHOLE, 1, 1), (WHOLE, 1000, 1000), (WHOLE, np.int64(7), 7),
    (ANY, 1, 1.0), (ANY, 100.0, 100.0), (ANY, np.float32(1.5), 1.5), (ANY, Fraction(3, 2), 1.5),
])  # fmt: skip
def test_both_ends_and_every_kind_of_number_in_between(number: Range, value: object, kept: float) -> None:
    assert number.check(value) == kept and type(number.check(value)) is type(number.minimum)


NO_NUMBERS = (None, True, "4", b"4", [4], {"a": 4}, 4j, math.nan, math.inf, -math.inf, 10**5000, -(10**400), 0, 1001)


@pytest.mark.parametrize("number", [WHOLE, ANY], ids=["steps", "cfg"])
@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(shown(value)))
def test_all_else_is_one_short_sentence_with_name_and_range(number: Range, value: object) -> None:
    with pytest.raises(NextStepError, match=rf"^{number.name} is .*from 1 to 100") as caught:
        number.check(value)
    assert len(str(caught.value)) < 200


def test_a_whole_number_is_no_fraction() -> None:
    with pytest.raises(NextStepError, match=r"steps is 4\.5; use a whole number from 1 to 1000"):
        WHOLE.check(4.5)


def test_values_are_shown_short() -> None:
    values = {0.1: "0.1", 1e30: "1e+30", 7.0: "7", "a'b": '"a\'b"', None: "None"}
    assert [str(shown(value)) for value in values] == list(values.values())
    assert str(shown("x" * 5000)).endswith("'... (5,000 characters)")
    assert (str(shown(10**4999)), str(shown(-(10**4999)))) == ("a number of 5,000 digits",) * 2
    assert str(shown({"a": [10**5000]})) == "a dict"


def test_half_a_character_is_told_with_its_place() -> None:
    assert check_text("A prompt", "é 火 😀") == "é 火 😀"
    with pytest.raises(NextStepError, match=r"A prompt holds half of a character \('.ud800' at position 3\)"):
        check_text("A prompt", "a \ud800")
    with pytest.raises(NextStepError, match="A prompt is a list; it must be text"):
        check_text("A prompt", ["a"])

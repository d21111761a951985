"""Sentences and what stands in them: formatted as English, said in another language, kept without what is large."""

from __future__ import annotations

import copy
import json
import weakref
from pathlib import Path

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.errors import OutOfMemory, damaged, shown
from nextstep_core.ranges import Range
from nextstep_core.sentences import Sentence, all_of, any_of, in_a_row

OTHER = {
    "{name} is {value}; use {range}.": "{range}: {name} != {value}",
    "a number from {least} to {most}": "{least}..{most}",
    "{range}, {note}": "{range} ({note})",
    "where 1 is off": "1 = 0",
    "steps": "Schritte",
    "{some} or {one}": "{some}/{one}",
    "{some} {one}": "{some}{one}",
}


def translated(template: str) -> str:
    return OTHER.get(template, template)


def test_a_sentence_is_english_by_itself_and_every_part_of_it_can_be_another() -> None:
    with pytest.raises(NextStepError) as caught:
        Range("steps", 1.0, 2.0, Sentence("where 1 is off")).check(3)
    assert str(caught.value) == "steps is 3; use a number from 1 to 2, where 1 is off."
    assert caught.value.sentence.said(translated) == "1..2 (1 = 0): Schritte != 3"


def test_braces_mean_something_only_in_a_template_with_values() -> None:
    assert str(NextStepError("Write {this}: {{}}")) == "Write {this}: {{}}"
    assert str(NextStepError("{name} in {{braces}}", name="{x}{0}")) == "{x}{0} in {braces}"
    assert str(Sentence("{a}", a=Sentence("{b}", b="{a}"))) == "{a}"


def test_an_error_in_an_error_is_said_in_the_same_language() -> None:
    with pytest.raises(NextStepError) as caught:
        Range("steps", 1.0, 2.0).check(3)
    outer = NextStepError("{where}: {reason}", where="x.json", reason=caught.value)
    assert outer.sentence.said(translated) == "x.json: 1..2: Schritte != 3"


def test_a_kept_error_keeps_no_tensor_and_no_traceback() -> None:
    class Failure(OSError):
        """One that can be watched."""

    tensor, failure = torch.zeros(3), Failure("gone")
    alive = weakref.ref(tensor), weakref.ref(failure)
    error = NextStepError("{tensor} {reason}", tensor=tensor, reason=failure)
    del tensor, failure
    assert str(error) == "tensor([0., 0., 0.]) gone" and [ref() for ref in alive] == [None, None]


def test_an_error_survives_a_copy_and_another_process() -> None:
    error = OutOfMemory.of(Sentence("{work} needs {size:,} bytes", work=Sentence("Drawing"), size=1000))
    for other in (copy.copy(error), copy.deepcopy(error)):
        assert type(other) is OutOfMemory and str(other) == str(error) == "Drawing needs 1,000 bytes"
        assert other.sentence.values["size"] == 1000
    again = Sentence.from_data(json.loads(json.dumps(error.sentence.as_data())))
    assert str(again) == str(error) and isinstance(again.values["work"], Sentence)


def test_lists_and_rows_of_sentences_follow_the_language() -> None:
    assert str(any_of("a")) == "a" and str(any_of("abc")) == "a or b or c" and str(all_of("ab")) == "a and b"
    assert any_of("abc").said(translated) == "a/b/c"
    row = in_a_row([Sentence("One."), Sentence("Two."), Sentence("Three.")])
    assert str(row) == "One. Two. Three." and row.said(translated) == "One.Two.Three."


def test_what_a_library_says_stays_as_it_is() -> None:
    error = damaged(Path("x.pt"), ValueError("steps"))
    assert error.sentence.said(translated).count("steps") == 1
    assert shown("steps") == "'steps'"

"""The runner tells every way to end apart, and a few hundred cases of every kind end well."""

from __future__ import annotations

import sys

import pytest

from tests.fuzz import KINDS
from tests.fuzz.case import make, name_of
from tests.fuzz.outcome import BAD, GOOD
from tests.fuzz.report import finding, table
from tests.fuzz.runner import Limits, names, run_all
from tests.fuzz.samples import WAYS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")]

CASES = 300


def test_every_way_to_end_is_told_apart() -> None:
    named = {make(name).what: name for name in (name_of("samples", 0, n) for n in range(200))}
    outcomes = list(run_all(named.values(), ("samples",), Limits(seconds=3.0), jobs=2))
    ended = {outcome.name: outcome.kind for outcome in outcomes}
    assert ended == {name: way for way, name in named.items()} and len(ended) == len(WAYS)
    lines = table(outcomes).splitlines()
    assert [line.split()[1:] for line in lines[1:]] == [[str(len(WAYS)), *["1"] * len(WAYS)]] * 2
    (raw,) = (outcome for outcome in outcomes if outcome.kind == "raw")
    assert f"--repeat {raw.name}" in finding(raw) and "(2, 2, 4, 3)" in raw.detail


def test_cases_of_every_kind_end_in_our_own_error_or_in_a_picture() -> None:
    wanted = [name for name, _ in zip(names(KINDS, seed=0), range(CASES))]
    outcomes = list(run_all(wanted, KINDS, Limits(), jobs=2))
    assert sorted(outcome.name for outcome in outcomes) == sorted(wanted)
    assert not [finding(outcome) for outcome in outcomes if outcome.kind in BAD]
    assert {outcome.kind for outcome in outcomes} >= set(GOOD[:2])

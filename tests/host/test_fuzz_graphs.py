"""A few of the hostile graphs that `python -m tests.fuzz.graphs` makes by the hundred."""

from __future__ import annotations

from scripts.comfy_server import ComfyServer
from tests.fuzz.graphs import outcomes
from tests.fuzz.outcome import BAD
from tests.fuzz.report import finding

CASES = 40


def test_every_hostile_graph_is_told_and_good_ones_run_afterwards(server: ComfyServer) -> None:
    ended = list(outcomes(server, 0, range(CASES)))
    assert not [finding(outcome) for outcome in ended if outcome.kind in BAD]
    assert len(ended) == CASES and len({outcome.kind for outcome in ended}) > 1

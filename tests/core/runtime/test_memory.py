"""The plan of a run's memory, by hand; the host's side of it is tested in tests/host/test_memory.py."""

from __future__ import annotations

import pytest

from nextstep_core import NextStepError
from nextstep_core.runtime import memory
from nextstep_core.runtime.memory import MemoryPlan, format_bytes, plan_host_memory, plan_memory


@pytest.mark.parametrize(
    ("room", "pictures", "plan"),
    [
        (100, 4, MemoryPlan(weights=60, resident=60, working=40, at_once=4)),
        (99, 4, MemoryPlan(60, 60, 30, 3)),
        (70, 4, MemoryPlan(60, 60, 10, 1)),
        (69, 4, MemoryPlan(60, 54, 15, 1)),  # one picture, and 5 for weights on their way
        (15, 4, MemoryPlan(60, 0, 15, 1)),
        (1000, 2, MemoryPlan(60, 60, 20, 2)),
    ],
)
def test_plans_by_hand(room: int, pictures: int, plan: MemoryPlan) -> None:
    """60 of weights, 10 for each picture, 5 for weights on their way."""
    assert plan_memory(60, room, pictures, each=10, streamed=5) == plan


def test_what_has_to_be_left_beside_the_weights_counts_where_a_run_takes_less() -> None:
    plans = [plan_memory(60, 99, 4, each=10, streamed=5, spare=spare) for spare in (30, 39, 40, 90, 200)]
    assert [(plan.resident, plan.at_once) for plan in plans] == [(60, 3), (60, 3), (59, 3), (9, 3), (0, 3)]


def test_weights_that_do_not_stay_leave_their_room_to_pictures() -> None:
    assert plan_memory(60, 65, 9, each=10, streamed=5, stay=False) == MemoryPlan(60, 0, 65, 6)
    assert plan_memory(60, 1000, 2, each=10, streamed=5, stay=False) == MemoryPlan(60, 0, 25, 2), "also where all fit"


def test_what_cannot_fit_is_said_with_its_numbers() -> None:
    with pytest.raises(NextStepError, match=r"10\.0 MB.*5\.0 MB.*14\.0 MB"):
        plan_memory(60_000_000, 14_000_000, 1, 10_000_000, 5_000_000)
    assert plan_memory(3, 13, 1, each=10, streamed=5).resident == 3, "weights smaller than what streams need no more"


def test_a_cpu_holds_its_weights_already() -> None:
    assert plan_host_memory(60, 35, 4, each=10) == MemoryPlan(60, 60, 30, 3)
    assert plan_host_memory(60, 5, 4, each=10).at_once == 1, "one picture is always tried"
    assert plan_host_memory(60, 500, 4, each=10).at_once == 4
    assert plan_host_memory(60, 500, 4, each=0).at_once == plan_memory(60, 500, 4, each=0, streamed=5).at_once == 4


def test_what_the_computer_has_not_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "spare_bytes", lambda swapping: 2_000_000_000 if swapping else 1_000_000_000)
    plan_host_memory(60, 35, 4, each=2_000_000_000)
    with pytest.raises(NextStepError, match=r"One picture would take 2\.10 GB.*has 2\.00 GB left.*smaller size"):
        plan_host_memory(60, 35, 4, each=2_100_000_000)


def test_bytes_for_people() -> None:
    assert [format_bytes(n) for n in (999_000_000, 1_000_000_000, 27_540_000_000)] == [
        "999.0 MB",
        "1.00 GB",
        "27.54 GB",
    ]
    plan = str(MemoryPlan(5 * 10**9, 2 * 10**9, 10**9, 1))
    assert all(size in plan for size in ("5.00 GB", "2.00 GB", "3.00 GB", "1.00 GB"))
    assert str(MemoryPlan(5, 5, 1, 1)).count("MB") == 2, "nothing is streamed"

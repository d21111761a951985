"""The race of candidates against the plain path, by a clock that says what each takes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from nextstep_core.runtime import bandwidth, trials
from nextstep_core.runtime.interrupt import checked
from nextstep_core.runtime.trials import LOST, MISSING, RAISED, SLOWER, WON, WRONG, Candidate, Outcome, Trial, run

CPU = torch.device("cpu")
TOLERANCE = 0.01


def test_the_card_that_is_timed_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The current one may be another, which has nothing to do."""
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    bandwidth.wait(torch.device("cuda:1"))
    assert waited == [torch.device("cuda:1")]


class FakeClock:
    """Says that a call takes what its function is marked with, and counts how often."""

    def __init__(self) -> None:
        self.laps: list[float] = []

    def __call__(self, calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], tuple]:
        def lap() -> tuple[float, Tensor]:
            result = [call() for call in calls][-1]
            self.laps.append(self.seconds)
            return self.seconds * len(calls), result

        return lap

    seconds = 0.0

    def taking(self, seconds: float, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def timed(*arguments: Tensor) -> Tensor:
            self.seconds = seconds
            return function(*arguments)

        return timed


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def trial(clock: FakeClock, inputs: int = 3) -> Trial:
    torch.manual_seed(0)
    arguments = [(torch.randn(4, 64), torch.randn(64, 32)) for _ in range(inputs)]
    return Trial("a product", clock.taking(1.0, torch.matmul), arguments, TOLERANCE, CPU, bytes=300)


def candidate(name: str, function: Callable[..., Tensor], **more: object) -> Candidate:
    return Candidate(name, "1", lambda: function, **more)


def raising(*arguments: Tensor) -> Tensor:
    raise RuntimeError("no kernel image\nis available")


def wrong_in_one(x: Tensor, weight: Tensor) -> Tensor:
    out = x @ weight
    out[-1, -1] += 1.0 * out.std()
    return out


def test_the_fastest_that_is_right_wins(clock: FakeClock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outcome = run(
        trial(clock),
        [
            candidate("slow", clock.taking(2.0, torch.matmul)),
            candidate("good", clock.taking(0.5, torch.matmul)),
            candidate("nearly as good", clock.taking(0.51, torch.matmul)),
            candidate("best", clock.taking(0.25, lambda x, w: (x @ w) * 1.001)),
            candidate("wrong", clock.taking(0.01, lambda x, w: (x @ w) * 1.02)),
            candidate("raises", raising),
            candidate("absent", raising, missing=lambda device: f"not for {device.type}"),
            candidate("nan", clock.taking(0.01, lambda x, w: x @ w * float("nan"))),
            candidate("shape", clock.taking(0.01, lambda x, w: (x @ w).T)),
        ],
        stopwatch=clock,
    )
    found = {verdict.name: verdict for verdict in outcome.verdicts}
    assert {name: verdict.verdict for name, verdict in found.items()} == {
        "slow": SLOWER,
        "good": SLOWER,
        "nearly as good": SLOWER,
        "best": WON,
        "wrong": WRONG,
        "raises": RAISED,
        "absent": MISSING,
        "nan": WRONG,
        "shape": RAISED,
    }
    assert outcome.winner is found["best"] and (outcome.plain, outcome.seconds, outcome.bytes) == (1.0, 0.25, 100)
    assert found["best"].ratio == 4 and found["best"].error == pytest.approx(0.001, rel=0.1)
    assert found["nan"].error is None and "not finite" in found["nan"].reason
    assert found["slow"].ratio == 0.5 and found["absent"].reason == "not for cpu"
    dropped = [record.getMessage() for record in caplog.records]
    assert len(dropped) == 7 and not any("best" in line or "absent" in line for line in dropped), "a line each"
    assert any("no kernel image" in line and "is available" not in line for line in dropped)


def test_what_is_hardly_faster_is_not_taken(clock: FakeClock) -> None:
    """Times waver; the preferred one stays."""
    outcome = run(trial(clock), [candidate("a shade", clock.taking(0.98, torch.matmul))], stopwatch=clock)
    assert outcome.winner is None and outcome.verdicts[0].verdict == SLOWER and outcome.seconds == 1.0


def test_a_slow_moment_of_the_plain_path_makes_no_winner(clock: FakeClock) -> None:
    """On a busy machine; its best time counts, whenever it was."""
    times = iter([1.0, 1.0, *[9.0] * 20])
    plain = trial(clock)

    def stopwatch(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], tuple]:
        lap = clock(calls, device)

        def wavering() -> tuple[float, Tensor]:
            seconds, result = lap()
            return (next(times) * len(calls) if clock.seconds == 1.0 else seconds), result

        return wavering

    outcome = run(plain, [candidate("slow", clock.taking(2.0, torch.matmul))], stopwatch=stopwatch)
    assert outcome.winner is None and outcome.plain == 1.0 and outcome.verdicts[0].ratio == 0.5


def test_one_wrong_number_among_many_is_seen(clock: FakeClock) -> None:
    """Of 128,000 numbers it makes a quarter of a percent of the norm, which is within the tolerance."""
    torch.manual_seed(0)
    many = [(torch.randn(4, 64), torch.randn(64, 32000))]
    wide = Trial("a product", clock.taking(1.0, torch.matmul), many, TOLERANCE, CPU)
    outcome = run(wide, [candidate("one off", clock.taking(0.1, wrong_in_one))], stopwatch=clock)
    assert outcome.verdicts[0].verdict == WRONG


def test_what_is_right_for_the_first_input_alone_is_wrong(clock: FakeClock) -> None:
    race = trial(clock)
    first = race.inputs[0][1]
    always = candidate("remembers", clock.taking(0.1, lambda x, weight: x @ first))
    assert run(race, [always], stopwatch=clock).verdicts[0].verdict == WRONG


def test_what_goes_wrong_when_it_is_repeated_is_wrong(clock: FakeClock) -> None:
    """As what a graph replays may, and what adds into its own buffer."""
    calls = []

    def worse(x: Tensor, weight: Tensor) -> Tensor:
        calls.append(1)
        return x @ weight * (1 if len(calls) <= 2 else 2)

    outcome = run(trial(clock), [candidate("forgetful", clock.taking(0.1, worse))], stopwatch=clock)
    assert outcome.verdicts[0].verdict == WRONG and outcome.verdicts[0].reason


def test_a_candidate_is_given_its_own_layout_outside_of_the_race(clock: FakeClock) -> None:
    prepared = []

    def prepare(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        prepared.append(1)
        return x, weight.T.contiguous()

    own = candidate("own", clock.taking(0.5, lambda x, w: x @ w.T), prepare=prepare)
    assert run(trial(clock), [own], stopwatch=clock).winner is not None and len(prepared) == 3, "once for each input"


def test_one_that_is_lost_is_not_touched(clock: FakeClock) -> None:
    lost = Candidate("deadly", "2", lambda: pytest.fail("it was made"))
    seen: list[str] = []

    @contextmanager
    def watch(candidate: Candidate):
        seen.append(candidate.identity)
        yield

    good = candidate("good", clock.taking(0.5, torch.matmul))
    outcome = run(trial(clock), [lost, good], lost=lambda c: c.identity == "deadly 2", watch=watch, stopwatch=clock)
    assert [verdict.verdict for verdict in outcome.verdicts] == [LOST, WON] and seen == ["good 1"]


def test_a_hopeless_one_is_not_run_again_and_again(clock: FakeClock) -> None:
    """On a CPU a call of a large product may take a second."""
    run(trial(clock), [candidate("hopeless", clock.taking(50.0, torch.matmul))], stopwatch=clock)
    assert clock.laps.count(50.0) == 2, "warmed up and timed"


def test_it_can_be_stopped_between_candidates(clock: FakeClock) -> None:
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise KeyboardInterrupt

    two = [candidate(name, clock.taking(0.5, torch.matmul)) for name in "ab"]
    with pytest.raises(KeyboardInterrupt):
        run(trial(clock), two, stopwatch=clock, check=check)


@pytest.mark.parametrize("allowed", range(6))
def test_what_stops_a_network_that_is_tried_is_no_failure_of_anything(clock: FakeClock, allowed: int) -> None:
    """Neither of the plain path, which is run alone at first, nor of the candidate that it runs beside."""
    asked, network, x = [], nn.Linear(8, 8), torch.randn(2, 8)

    class Interrupted(Exception):
        pass

    def check() -> None:
        asked.append(1)
        if len(asked) > allowed:
            raise Interrupted

    plain = Trial("a network", clock.taking(1.0, network), [(x,)], TOLERANCE, CPU)
    with pytest.raises(Interrupted), checked([network], check):
        run(plain, [candidate("good", clock.taking(0.5, network.forward))], stopwatch=clock)
    assert len(asked) == allowed + 1


def test_outcomes_are_written_and_read(clock: FakeClock) -> None:
    found = run(trial(clock), [candidate("good", clock.taking(0.5, torch.matmul)), candidate("bad", raising)],
                stopwatch=clock)  # fmt: skip
    assert Outcome.from_data(found.as_data()) == found
    for damage in ({"verdicts": [{"name": 3, "verdict": "won"}]}, {"verdicts": [{"name": "a", "verdict": "?"}]},
                   {"verdicts": [{"name": "a", "verdict": "won", "seconds": "x"}]}, {"plain": None}):  # fmt: skip
        with pytest.raises((ValueError, TypeError, KeyError)):
            Outcome.from_data({**found.as_data(), **damage})


def test_the_real_clock_measures_something() -> None:
    """No matter what: that it runs on this device, captured or not."""
    arguments = [(torch.randn(2, 64), torch.randn(64, 64)) for _ in range(2)]
    plain = Trial("a product", torch.matmul, arguments, TOLERANCE, CPU)
    outcome = run(plain, [candidate("other", lambda x, w: (w.T @ x.T).T)])
    assert outcome.plain > 0 and outcome.verdicts[0].verdict in (WON, SLOWER)
    assert trials.in_words(outcome.verdicts[0])

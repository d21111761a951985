"""Decisions that are made once: what is kept, what is tried anew, and what becomes of a candidate that kills."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextstep_core import NextStepError
from nextstep_core.runtime import chosen, ledger
from nextstep_core.runtime.chosen import NAMES, Chooser, Switch, ledger_of, say, table
from nextstep_core.runtime.trials import CRAMPED, WON, Candidate, DeviceLostError, Outcome, Trial, Verdict

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]
FAST, OTHER = NAMES[0], NAMES[1]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ledger.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(chosen.SWITCH, raising=False)
    monkeypatch.setattr(chosen, "_ledgers", {})
    return tmp_path / "cache"


def forget() -> None:
    """As a new process: what is known is what the file says."""
    chosen._ledgers.clear()


def stopwatch(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], tuple[float, Tensor]]:
    """A plain product takes a second, any other half of one."""

    def lap() -> tuple[float, Tensor]:
        result = calls[0]()
        return (1.0 if result is PLAIN[0] else 0.5), result

    return lap


PLAIN = [torch.ones(2)]


def trial(made: list[str]) -> Callable[[], Trial]:
    def make() -> Trial:
        made.append("trial")
        return Trial("things", lambda: PLAIN[0], [()], 0.01, CPU, bytes=8)

    return make


def candidate(made: list[str], name: str = FAST, version: str = "1", factor: float = 1.0) -> Candidate:
    def make() -> Callable[[], Tensor]:
        made.append(f"{name} {version}")
        return lambda: PLAIN[0] * factor

    return Candidate(name, version, make)


def decide(made: list[str], *candidates: Candidate) -> Candidate | None:
    return Chooser(CPU, stopwatch=stopwatch).decide("things", candidates, trial(made))


def test_processes_that_draw_one_picture_take_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    for processes, name in ((2, None), (1, FAST)):
        monkeypatch.setattr(chosen.dist, "is_initialized", lambda: True)
        monkeypatch.setattr(chosen.dist, "get_world_size", lambda processes=processes: processes)
        taken = decide(made, candidate(made))
        assert (None if taken is None else taken.name) == name


def test_the_second_start_tries_nothing(cache: Path) -> None:
    made: list[str] = []
    first = decide(made, candidate(made))
    assert first is not None and first.name == FAST and made == ["trial", f"{FAST} 1"]
    decide(made, candidate(made))
    forget()
    again = decide(made, candidate(made))
    assert again is not None and again.name == FAST and len(made) == 2, "neither in this process nor in the next"
    assert [path.suffix for path in sorted(cache.iterdir()) if path.suffix != ".lock"] == [".json"], "no rests"


@pytest.mark.parametrize("change", ["version", "candidate", "torch", "device"])
def test_what_matters_makes_it_new(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    decide(made, candidate(made))
    forget()
    candidates = [candidate(made, version="2" if change == "version" else "1")]
    if change == "candidate":
        candidates.append(candidate(made, OTHER))
    elif change == "torch":
        monkeypatch.setattr(ledger.torch, "__version__", "9.9.9")
    elif change == "device":
        monkeypatch.setattr(ledger, "device_name", lambda device: "another card")
    decide(made, *candidates)
    assert made.count("trial") == 2


def test_one_that_is_wrong_here_is_not_tried_again(cache: Path) -> None:
    made: list[str] = []
    assert decide(made, candidate(made, factor=1.5)) is None
    forget()
    assert decide(made, candidate(made, factor=1.5)) is None and made.count("trial") == 1


def test_want_of_memory_is_of_the_moment() -> None:
    made: list[str] = []

    def make() -> Callable[[], Tensor]:
        made.append("made")
        raise torch.OutOfMemoryError("CUDA out of memory")

    cramped = Candidate(FAST, "1", make)
    assert decide(made, cramped) is None and decide(made, cramped) is None
    assert made.count("made") == 2, "the next load may have more"
    outcome = Outcome("x", 1, 1, (Verdict(FAST, CRAMPED),))
    assert not outcome.complete and Outcome("x", 1, 1, (Verdict(FAST, WON),)).complete


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"form": 1}',
        '{"form": 1, "trying": 3, "lost": 5, "outcomes": {}}',
        '{"form": 1, "trying": null, "lost": [], "outcomes": {"things": {"what": 1}}}',
        '{"form": 1, "trying": null, "lost": [], "outcomes": [1]}',
        '{"form": 2, "trying": null, "lost": [], "outcomes": {}}',
        "[" * 100000,
        " " * (1 << 22) + "{}",
    ],
    ids=lambda text: text[:30],
)
def test_a_damaged_file_counts_as_none_and_is_mended(cache: Path, text: str) -> None:
    made: list[str] = []
    decide(made, candidate(made))
    path = ledger_of(CPU).path
    assert path is not None
    path.write_text(text)
    forget()
    assert decide(made, candidate(made)) is not None and made.count("trial") == 2
    assert json.loads(path.read_text())["form"] == ledger.FORM


def test_huge_numbers_in_the_file_are_damage(cache: Path) -> None:
    made: list[str] = []
    decide(made, candidate(made))
    path = ledger_of(CPU).path
    data = json.loads(path.read_text())
    for value in (10**400, float("nan"), float("inf")):
        next(iter(data["outcomes"].values()))["plain"] = value
        path.write_text(json.dumps(data))
        forget()
        assert not ledger_of(CPU).outcomes


def test_without_a_folder_it_is_decided_for_the_process(cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cache.write_text("a file where the folder should be")
    made: list[str] = []
    assert decide(made, candidate(made)) is not None
    assert decide(made, candidate(made)) is not None and made.count("trial") == 1
    assert sum("cannot be written" in record.getMessage() for record in caplog.records) == 1


CHILD = """
import os, sys, time, torch
torch.set_num_threads(int(sys.argv[1]))  # by which CPUs are told apart
from nextstep_core.runtime.chosen import Chooser, NAMES
from nextstep_core.runtime.trials import Candidate, Trial

def deadly():
    if sys.argv[2] == "dies":
        os._exit(9)
    open(sys.argv[3], "w").close()
    time.sleep(60)

plain = torch.ones(2)
good = Candidate(NAMES[1], "1", lambda: (lambda: plain * 1.0))
both = [good, Candidate(NAMES[0], "1", lambda: deadly)]
Chooser(plain.device).decide("things", both, lambda: Trial("things", lambda: plain, [()], 0.01, plain.device))
print("survived")
"""


def child(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(torch.get_num_threads()), *arguments]
    return subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE)


def test_one_that_kills_the_process_is_skipped_at_the_next_start(caplog: pytest.LogCaptureFixture) -> None:
    made: list[str] = []
    first = child("dies", "")
    assert first.communicate(timeout=120)[0] == "" and first.returncode != 0
    found = decide(made, candidate(made, OTHER), Candidate(FAST, "1", lambda: pytest.fail("it was tried again")))
    assert found is not None and found.name == OTHER
    warned = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warned) == 1 and FAST in warned[0] and str(ledger_of(CPU).path) in warned[0]
    forget()
    decide(made, Candidate(FAST, "1", lambda: pytest.fail("nor ever after")))
    decide(made, candidate(made, FAST, "2"))
    assert made[-1] == f"{FAST} 2", "another version has another chance"


def test_one_that_another_process_is_trying_is_not_taken_for_lost(tmp_path: Path, monkeypatch) -> None:
    started = tmp_path / "started"
    process = child("waits", str(started))
    try:
        until = time.monotonic() + 120
        while not started.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert started.exists()
        monkeypatch.setattr(ledger, "PATIENCE", 0.0)
        made: list[str] = []
        found = decide(made, candidate(made))
        assert found is not None and found.name == FAST and not ledger_of(CPU).lost, "it is not waited for for ever"
    finally:
        process.kill()
        process.communicate()


def test_waiting_for_another_process_can_be_stopped() -> None:
    held = ledger_of(CPU)
    with held.held():
        forget()

        def check() -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Chooser(CPU, check, stopwatch).decide("things", [candidate([])], trial([]))


def test_a_winner_that_was_lost_since_is_not_taken() -> None:
    made: list[str] = []
    decide(made, candidate(made), candidate(made, OTHER))
    ledger_of(CPU).lost.add(f"{FAST} 1")
    found = decide(made, candidate(made), candidate(made, OTHER))
    assert found is not None and found.name == OTHER


def test_a_lost_device_is_said_and_remembered(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    from nextstep_core.runtime import trials

    alive = trials._assert_alive

    def lost(device: torch.device, candidate: Candidate) -> None:
        raise DeviceLostError(candidate.name)

    monkeypatch.setattr(trials, "_assert_alive", lost)
    with pytest.raises(NextStepError, match=f"{FAST} was tried"):
        decide([], candidate([]))
    monkeypatch.setattr(trials, "_assert_alive", alive)
    forget()
    assert decide([], Candidate(FAST, "1", lambda: pytest.fail("it was tried again"))) is None


def test_what_the_switch_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Switch.parse("").allowed == set(NAMES) == Switch.parse(" , ").allowed
    assert Switch.parse("plain").allowed == set() == Switch.parse("0").allowed
    assert Switch.parse("2").allowed == set(NAMES[:2]) and Switch.parse("999").allowed == set(NAMES)
    assert Switch.parse(f"{FAST}, {OTHER}").allowed == {FAST, OTHER}
    assert Switch.parse(f"-{FAST}").allowed == set(NAMES) - {FAST}
    for bad in ("fast", f"-{FAST},{OTHER}", "plain,2", "1001", "-1", "²", "9" * 5000, "--" + FAST):
        with pytest.raises(NextStepError, match="NEXTSTEP_PRODUCTS"):
            Switch.parse(bad)
    monkeypatch.setenv(chosen.SWITCH, f"-{FAST}")
    made: list[str] = []
    found = decide(made, candidate(made), candidate(made, OTHER))
    assert found is not None and found.name == OTHER and f"{FAST} 1" not in made
    monkeypatch.setenv(chosen.SWITCH, "plain")
    assert decide(made, candidate(made)) is None


def test_the_table(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    outcome = Outcome("int8, 2 rows", 2e-4, 1e6, (Verdict(FAST, WON, 1e-4, 2.0, 0.004),))
    lines = table([outcome, Outcome("int4", 3e-4, 0, ())], 2e10).splitlines()
    assert lines[1].split("  ")[0] == "int8, 2 rows"
    assert [word in lines[1] for word in (FAST, "100 us", "200 us", "50%", "0.40%")] == [True] * 5
    assert "usual" in lines[2] and "300 us" in lines[2] and "%" not in lines[2]
    chooser = Chooser(CPU, stopwatch=stopwatch)
    say(chooser)
    assert not caplog.records, "where nothing was tried"
    chooser.decide("things", [candidate([])], trial([]))
    say(chooser)
    assert "things" in caplog.records[-1].getMessage()

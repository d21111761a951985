"""A fast path is a candidate, never a belief: it is tried on this device against the plain path before it is used.

A candidate is dropped, with one line in the log, where something that it needs is missing, where it raises, where its
numbers are off by more than was stated, or where it is slower. What the candidates compute, and for whom, is no matter
here.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..errors import REASON, is_out_of_memory
from .bandwidth import wait
from .interrupt import Check, go_on, is_stop
from .stopwatch import Lap, captures

log = logging.getLogger(__name__)

Function: TypeAlias = Callable[..., Tensor]
Arguments: TypeAlias = Sequence[Any]
# Makes what runs all calls once and tells the seconds and the last result.
Stopwatch: TypeAlias = Callable[[Sequence[Callable[[], Tensor]], torch.device], Callable[[], tuple[float, Tensor]]]

WON, SLOWER, WRONG, RAISED, MISSING, LOST = "won", "slower", "wrong", "raised", "missing", "lost"
CRAMPED = "no memory"  # for its trial, this time
VERDICTS = (WON, SLOWER, WRONG, RAISED, MISSING, LOST, CRAMPED)
ROUNDS = 5  # each of a candidate beside one of the plain path, so that a busy machine is busy for both
PATIENCE = 0.5  # seconds; no more rounds after them
HOPELESS = 3  # times slower in one round: not worth more of them
MARGIN = 0.03  # by which a candidate is faster than what stands before it in the list, or it is not taken
TINY = 1e-9  # seconds
OUTLIER = 8  # times the tolerance that a single number may be off


def nothing_missing(device: torch.device) -> str | None:
    """For a candidate that runs wherever it does not raise."""
    return None


@dataclass(frozen=True)
class Candidate:
    """Another way to compute what a plain function does.

    `make` gives the function; imports and compilations belong there, or into its first call. `missing` says what a
    device lacks for it, None where nothing. `prepare` brings the plain function's arguments into the form that the
    function takes (a layout of its own), which costs nothing in the race. A trial counts for one `version`, which is
    that of the library or of the code behind the function.
    """

    name: str
    version: str
    make: Callable[[], Function]
    missing: Callable[[torch.device], str | None] = nothing_missing
    prepare: Callable[..., Arguments] | None = None

    @property
    def identity(self) -> str:
        """Name and version."""
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Trial:
    """What candidates are measured by: `plain` on each of `inputs`, which together are more than a cache holds.

    A result may differ from the plain one by `tolerance` of its norm, and a single number by some times that. `bytes`
    are those that all inputs together must be read for. No function may change its inputs.
    """

    what: str
    plain: Function
    inputs: Sequence[Arguments]
    tolerance: float
    device: torch.device
    bytes: int = 0


@dataclass(frozen=True)
class Verdict:
    """What a trial showed of one candidate. `seconds` are of one input, `ratio` those of the plain path over them."""

    name: str
    verdict: str
    seconds: float | None = None
    ratio: float | None = None
    error: float | None = None
    reason: str = ""


@dataclass(frozen=True)
class Outcome:
    """All verdicts of a trial, of which at most one is `WON`. `plain` is the plain path's seconds, `bytes` what is
    read, both of one input."""

    what: str
    plain: float
    bytes: float
    verdicts: tuple[Verdict, ...] = field(default_factory=tuple)

    @property
    def winner(self) -> Verdict | None:
        """The candidate to take; None for the plain path."""
        return next((verdict for verdict in self.verdicts if verdict.verdict == WON), None)

    @property
    def seconds(self) -> float:
        """What one call takes with whatever is taken."""
        best = None if self.winner is None else self.winner.seconds
        return self.plain if best is None else best

    @property
    def complete(self) -> bool:
        """Whether another trial would show the same: nothing was wanting but for the moment."""
        return all(verdict.verdict != CRAMPED for verdict in self.verdicts)

    def as_data(self) -> dict[str, Any]:
        """For a JSON file."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Outcome:
        """What `as_data` gave; ValueError, TypeError, KeyError or ArithmeticError for anything else."""
        verdicts = tuple(Verdict(**verdict) for verdict in data["verdicts"])
        for verdict in verdicts:
            if not isinstance(verdict.name, str) or not isinstance(verdict.reason, str):
                raise ValueError("no name")
            if not all(math.isfinite(x) for x in (verdict.seconds, verdict.ratio, verdict.error) if x is not None):
                raise ValueError("no numbers")
        if not {v.verdict for v in verdicts} <= set(VERDICTS) or sum(v.verdict == WON for v in verdicts) > 1:
            raise ValueError("no verdict")
        plain, size = float(data["plain"]), float(data["bytes"])
        if not (math.isfinite(plain) and math.isfinite(size)):
            raise ValueError("no numbers")
        return cls(str(data["what"]), plain, size, verdicts)


class CannotTryError(RuntimeError):
    """Not even the plain path runs, for want of memory or of what tells the time."""


class DeviceLostError(RuntimeError):
    """A candidate has left the device in a state in which it computes nothing any more."""


Watch: TypeAlias = Callable[[Candidate], AbstractContextManager[None]]


def _unwatched(candidate: Candidate) -> AbstractContextManager[None]:
    return nullcontext()


def stopwatch(calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], tuple[float, Tensor]]:
    """The device's own time: in a captured graph where work runs in graphs."""
    return Lap(calls, device, recorded=captures(device))


@torch.inference_mode()
def run(
    trial: Trial | Callable[[], Trial],
    candidates: Sequence[Candidate],
    *,
    lost: Callable[[Candidate], bool] = lambda candidate: False,
    watch: Watch = _unwatched,
    stopwatch: Stopwatch = stopwatch,
    check: Check = go_on,
) -> Outcome:
    """Try all candidates, the preferred first.

    `lost` tells those that never came back from an earlier trial: they are passed over. `watch` is entered around all
    that is run of a candidate. `check` is called before each and may raise to stop; so may what checks the layers of a
    network that is tried.
    """
    try:
        trial = trial() if callable(trial) else trial
        race = _Race(trial, stopwatch)
    except Exception as reason:  # a device's own kinds of failure
        if is_stop(reason):
            raise
        raise CannotTryError(_shortly(reason)) from reason
    verdicts: list[Verdict] = []
    for candidate in candidates:
        check()
        lacks = candidate.missing(trial.device)
        if lost(candidate):
            verdict = Verdict(candidate.name, LOST, reason="its last trial never came back")
        elif lacks is not None:
            verdict = Verdict(candidate.name, MISSING, reason=lacks)
        else:
            with watch(candidate):
                verdict = race.against(candidate)
                _assert_alive(trial.device, candidate)
        verdicts.append(verdict)
    count = len(trial.inputs)
    outcome = Outcome(trial.what, race.plain / count, trial.bytes / count, _judged(verdicts, race.plain / count))
    for verdict in outcome.verdicts:
        if verdict.verdict not in (WON, MISSING):
            log.info("%s: no %s (%s)", trial.what, verdict.name, in_words(verdict))
    return outcome


def in_words(verdict: Verdict) -> str:
    """Why a candidate was taken or dropped, in a few words."""
    if verdict.verdict in (WON, SLOWER) and verdict.ratio is not None:
        return f"{verdict.verdict}, {verdict.ratio:.2f}x the speed of the plain path"
    if verdict.verdict == WRONG and verdict.error is not None:
        return f"wrong, off by {verdict.error:.1%}"
    return f"{verdict.verdict}: {verdict.reason}"


def _wrong(candidate: Candidate, error: float, when: str = "") -> Verdict:
    if math.isfinite(error):
        return Verdict(candidate.name, WRONG, error=error, reason=when)
    return Verdict(candidate.name, WRONG, reason="numbers that are not finite")


def _shortly(reason: Exception) -> str:
    said = str(reason).splitlines() or [""]
    return f"{type(reason).__name__}: {said[0]}"[:REASON]


def _judged(verdicts: Sequence[Verdict], plain: float) -> tuple[Verdict, ...]:
    """The verdicts with the winner among those that were timed: faster than the plain path's best time of the whole
    trial, and than what stands before it, by more than times waver."""
    best, leader = 1.0, -1
    judged = [replace(v, ratio=plain / max(v.seconds, TINY)) if v.seconds is not None else v for v in verdicts]
    for place, verdict in enumerate(judged):
        if verdict.ratio is not None and verdict.ratio >= (1 + MARGIN) * best:
            best, leader = verdict.ratio, place
    return tuple(replace(verdict, verdict=WON) if place == leader else verdict for place, verdict in enumerate(judged))


class _Race:
    """The plain path, what it computes and how long it takes, and each candidate beside it."""

    def __init__(self, trial: Trial, stopwatch: Stopwatch) -> None:
        self._trial, self._stopwatch = trial, stopwatch
        # First and last: what reads beside its own input is likely to be right for one of them alone.
        self._checked = (0, len(trial.inputs) - 1)
        self._expected = {index: trial.plain(*trial.inputs[index]).float() for index in self._checked}
        self._lap = stopwatch([_call(trial.plain, arguments) for arguments in trial.inputs], trial.device)
        self._lap()
        self.plain: float = self._lap()[0]

    def against(self, candidate: Candidate) -> Verdict:
        """The verdict on one candidate: its seconds, where it is right."""
        try:
            return self._tried(candidate)
        except Exception as reason:  # a compiler's, a library's or a device's own kinds of failure
            if is_stop(reason):
                raise
            verdict = CRAMPED if is_out_of_memory(reason) else RAISED
            return Verdict(candidate.name, verdict, reason=_shortly(reason))

    def _tried(self, candidate: Candidate) -> Verdict:
        trial, function = self._trial, candidate.make()
        inputs = [
            arguments if candidate.prepare is None else candidate.prepare(*arguments) for arguments in trial.inputs
        ]
        error = max(self._error(index, function(*inputs[index])) for index in self._checked)
        if not error <= trial.tolerance:
            return _wrong(candidate, error)
        lap = self._stopwatch([_call(function, arguments) for arguments in inputs], trial.device)
        lap()  # compiles and warms up
        seconds, last = lap()
        error = max(error, self._error(self._checked[-1], last))
        if not error <= trial.tolerance:
            return _wrong(candidate, error, "when captured")
        taken, rounds, started = seconds, 1, time.monotonic()
        while rounds < ROUNDS and time.monotonic() - started < PATIENCE and taken < HOPELESS * self.plain:
            taken = min(taken, lap()[0])
            if self.plain < HOPELESS * taken:
                self.plain = min(self.plain, self._lap()[0])
            rounds += 1
        return Verdict(candidate.name, SLOWER, taken / len(trial.inputs), None, error)

    def _error(self, index: int, result: Tensor) -> float:
        """How far a result is off, in the norm or, by what single numbers are allowed, in its worst number."""
        expected = self._expected[index]
        if result.shape != expected.shape:
            raise ValueError(f"a result of shape {tuple(result.shape)} in place of {tuple(expected.shape)}")
        return difference(result, expected)


def difference(result: Tensor, expected: Tensor) -> float:
    """How far a result is off from what is expected: of its norm, or an `OUTLIER`th of what its worst number is off."""
    off, size = (result.float() - expected).abs(), expected.abs()
    if not bool(off.isfinite().all()):
        return float("inf")
    scale = size.square().mean().sqrt().clamp_min(1e-12)
    worst = float((off / (scale + size)).max())
    return max(float(off.square().mean().sqrt() / scale), worst / OUTLIER)


def _call(function: Function, arguments: Arguments) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _assert_alive(device: torch.device, candidate: Candidate) -> None:
    """Some failures of a CUDA kernel end all work on the device, for this process."""
    if device.type != "cuda":
        return
    try:
        torch.zeros(1, device=device).add_(1)
        wait(device)
    except RuntimeError as reason:
        raise DeviceLostError(candidate.name) from reason

"""Which fast path is taken: decided by a trial once for a device, driver and version, then remembered.

`NEXTSTEP_PRODUCTS` narrows the choice, for finding out which path a fault comes from: `plain` takes none, `a,b` these
alone, `-a,-b` all but these, and a number the first so many of `NAMES`.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..errors import NextStepError, shown
from ..ranges import Range
from .bandwidth import bandwidth
from .interrupt import Check, go_on
from .ledger import Ledger, cache_folder
from .trials import Candidate, CannotTryError, DeviceLostError, Outcome, Stopwatch, Trial, run, stopwatch

log = logging.getLogger(__name__)

SWITCH = "NEXTSTEP_PRODUCTS"
FIRST = Range(SWITCH, 0, 1000)
PLAIN, USUAL = "plain", "usual"
COPIED = 1 << 27  # bytes, for the bandwidth that times are compared with
# Every fast path that may be named, in the order in which the switch counts them.
NAMES = (
    "torch-int4",
    "torch-int4-unpacked",
    "torch-int8",
    "torch-compiled",
    "torch-int8-halves",
    "torch-fp8-halves",
    "kitchen-int8-halves",
    "kitchen-int4",
    "gemlite",
    "padded-to-4",
    "padded-to-6",
    "triton-rows",
    "triton-head",
    "triton-layers",
    "native-rows",
    "native-head",
)


@dataclass(frozen=True)
class Switch:
    """What `NEXTSTEP_PRODUCTS` leaves of the candidates."""

    allowed: frozenset[str]

    def __contains__(self, name: str) -> bool:
        return name in self.allowed

    @classmethod
    def parse(cls, text: str) -> Switch:
        """What a text says; NextStepError, with the names that there are, when it says nothing."""
        words = [word.strip() for word in text.split(",") if word.strip()]
        if not words:
            return cls(frozenset(NAMES))
        if words == [PLAIN]:
            return cls(frozenset())
        if len(words) == 1 and words[0].isascii() and words[0].isdigit():
            return cls(frozenset(NAMES[: FIRST.check(int(words[0][:9]))]))
        without = {word[1:] for word in words if word.startswith("-")}
        only = {word for word in words if not word.startswith("-")}
        unknown = sorted((without | only) - set(NAMES))
        if unknown or (without and only):
            raise NextStepError(
                "{switch} is {value}. Use plain, a number, or names with commas between them, all or none with a minus "
                "sign; the names are {names}.",
                switch=SWITCH,
                value=shown(text),
                names=", ".join(NAMES),
            )
        return cls(frozenset(only or set(NAMES) - without))

    @classmethod
    def set(cls) -> Switch:
        """What the environment says."""
        return cls.parse(os.environ.get(SWITCH, ""))


_ledgers: dict[object, Ledger] = {}


def ledger_of(device: torch.device) -> Ledger:
    """What is known of a device, read once in a process."""
    key = device, cache_folder()
    if key not in _ledgers:
        _ledgers[key] = Ledger.of(device)
    return _ledgers[key]


@dataclass
class Chooser:
    """Decides for one device. `tried` are the outcomes that were new, `used` all of them, as they were asked for."""

    device: torch.device
    check: Check = go_on
    stopwatch: Stopwatch = stopwatch
    switch: Switch = field(default_factory=Switch.set)
    used: dict[str, Outcome] = field(default_factory=dict)
    tried: list[Outcome] = field(default_factory=list)

    def decide(self, what: str, candidates: Sequence[Candidate], trial: Callable[[], Trial]) -> Candidate | None:
        """The candidate to take for what `what` says, which names all that matters; None for the plain path.

        `trial` is made only where nothing is known yet. What cannot be tried is not taken.
        """
        outcome = self.outcome(what, candidates, trial)
        won = None if outcome is None else outcome.winner
        return None if won is None else next(one for one in candidates if one.name == won.name)

    def outcome(self, what: str, candidates: Sequence[Candidate], trial: Callable[[], Trial]) -> Outcome | None:
        """All that a trial shows, or has shown before; None where there is nothing to try, or it could not be tried."""
        able = [one for one in candidates if one.name in self.switch and one.missing(self.device) is None]
        if not able or of_several():
            return None
        ledger, key = ledger_of(self.device), _key(what, able)
        found = self._known(ledger, key, able)
        if found is None:
            with ledger.held(self.check):
                found = self._known(ledger, key, able) or self._try(ledger, key, able, trial)
        if found is not None:
            self.used[key] = found
        return found

    def _known(self, ledger: Ledger, key: str, able: Sequence[Candidate]) -> Outcome | None:
        """What was found before, unless its winner has been lost since."""
        found = ledger.outcomes.get(key)
        won = None if found is None else found.winner
        if won is not None and not any(one.name == won.name and not ledger.is_lost(one) for one in able):
            return None
        return found

    def _try(self, ledger: Ledger, key: str, able: Sequence[Candidate], trial: Callable[[], Trial]) -> Outcome | None:
        if not self.tried:
            log.info("Finding the fastest products on %s, which takes up to a minute or two, once.", self.device)
        try:
            found = run(
                trial, able, lost=ledger.is_lost, watch=ledger.watch, stopwatch=self.stopwatch, check=self.check
            )
        except DeviceLostError as reason:
            raise NextStepError(
                "{device} stopped computing while {name} was tried on it. Start again: it will not be tried any more.",
                device=str(self.device),
                name=str(reason),
            ) from reason
        except CannotTryError as reason:
            log.info("%s: not tried (%s)", key, reason)
            return None
        if found.complete:
            ledger.keep(key, found)
        self.tried.append(found)
        return found


def of_several() -> bool:
    """Whether several processes draw one picture: they have to compute alike, and each would decide for itself."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _key(what: str, candidates: Sequence[Candidate]) -> str:
    identities = "\n".join(candidate.identity for candidate in candidates)
    return f"{what} [{hashlib.sha256(identities.encode()).hexdigest()[:12]}]"


def table(outcomes: Sequence[Outcome], rate: float | None) -> str:
    """A line for each: what it is, which path is taken, its time and the plain path's, the share of `rate` bytes per
    second, and its error."""
    lines = [("", "taken", "time", "usual", "of bandwidth", "error")]
    for one in outcomes:
        won = one.winner
        share = f"{one.bytes / one.seconds / rate:.0%}" if rate and one.seconds and one.bytes else ""
        error = "" if won is None or won.error is None else f"{won.error:.2%}"
        times = f"{1e6 * one.seconds:.0f} us", f"{1e6 * one.plain:.0f} us"
        lines.append((one.what, USUAL if won is None else won.name, *times, share, error))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def measured(device: torch.device, outcomes: Sequence[Outcome]) -> str:
    """The table of outcomes on a device, beside the rate at which it copies."""
    try:
        rate = bandwidth(device, COPIED).bytes_per_second
    except RuntimeError:  # no memory left for the copy
        rate = None
    return table(outcomes, rate)


def say(chooser: Chooser) -> None:
    """Log what was newly tried, as a table."""
    if chooser.tried:
        log.info("Tried on %s:\n%s", chooser.device, measured(chooser.device, chooser.tried))

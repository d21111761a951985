"""What trials have shown on this machine, in a small file, so that the next start need not try again.

A file for each device with its driver and PyTorch. It is written whole or not at all, by one process at a time; one
that is damaged counts as none. A candidate's name stands in it while it is tried: a name that is found there later is
of one that took the process down, which is not tried again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .devices import device_name
from .interrupt import Check, go_on
from .trials import Candidate, DeviceLostError, Outcome

log = logging.getLogger(__name__)

CACHE = "NEXTSTEP_CACHE"  # names the folder, where the usual one will not do
FORM = 1  # of the file
PATIENCE, POLL_SECONDS = 120.0, 0.2  # for another process that is trying
MOST_BYTES = 1 << 22  # of a file of ours; a larger one is none


def cache_folder() -> Path:
    """Where programs keep what they can make again."""
    if os.environ.get(CACHE):
        return Path(os.environ[CACHE]).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "nextstep"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "nextstep"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nextstep"


def environment(device: torch.device) -> dict[str, str]:
    """What trials depend on besides the candidates: with any of it changed, all is tried anew."""
    found = {"device": device_name(device), "torch": torch.__version__, "system": platform.system()}
    if device.type == "cuda":
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
        found["driver"] = _driver()
    elif device.type == "mps":
        found["driver"] = platform.mac_ver()[0]
    return found


def _driver() -> str:
    """The driver's own version where the system tells it, else that of the CUDA which it brings."""
    with suppress(OSError, IndexError):
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0].strip()
    version = getattr(torch._C, "_cuda_getDriverVersion", None)
    return "unknown" if version is None else str(version())


class Ledger:
    """The outcomes of one environment, by what was tried. Without a `path`, or where it takes no file, of this process
    alone."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.outcomes: dict[str, Outcome] = {}
        self.lost: set[str] = set()
        self._trying: str | None = None
        self._held = False
        self._read()

    @classmethod
    def of(cls, device: torch.device) -> Ledger:
        """Of a device of this machine."""
        found = environment(device)
        digest = hashlib.sha256(json.dumps([FORM, found], sort_keys=True).encode()).hexdigest()[:16]
        try:
            path = cache_folder() / f"products-{digest}.json"
        except RuntimeError as reason:  # a user without a home
            log.debug("no cache folder: %s", reason)
            return cls(None)
        return cls(path)

    @contextmanager
    def held(self, check: Check = go_on) -> Iterator[None]:
        """Inside, no other process tries anything; what others have found by then is known.

        `check` is called while another one is waited for, and may raise to stop. After some time it is not waited for
        any more, and what is found from then on is kept in this process alone.
        """
        lock = self._lock()
        until = time.monotonic() + PATIENCE
        while lock is not None:
            try:
                lock.acquire(timeout=POLL_SECONDS)
                break
            except Timeout:
                check()
                if time.monotonic() > until:
                    lock = None
            except (OSError, NotImplementedError) as reason:  # a folder that cannot be written, a disk without locks
                self._give_up(reason)
                lock = None
        self._held = lock is not None
        try:
            if self._held:
                self._read()
                self._bury()
            yield
        finally:
            self._held = False
            if lock is not None:
                lock.release()

    @contextmanager
    def watch(self, candidate: Candidate) -> Iterator[None]:
        """Inside, the candidate is written down as being tried; it stays so if the process or the device is lost."""
        self._trying = candidate.identity
        self._write()
        try:
            yield
        except DeviceLostError:
            raise
        except BaseException:
            self._trying = None
            self._write()
            raise
        self._trying = None
        self._write()

    def keep(self, key: str, outcome: Outcome) -> None:
        """Remember what a trial has shown."""
        self.outcomes[key] = outcome
        self._write()

    def is_lost(self, candidate: Candidate) -> bool:
        """Whether the candidate, in this version, never came back from a trial."""
        return candidate.identity in self.lost

    def _lock(self) -> FileLock | None:
        if self.path is None:
            return None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as reason:
            self._give_up(reason)
            return None
        return FileLock(self.path.with_suffix(".lock"))

    def _give_up(self, reason: Exception) -> None:
        log.info("%s cannot be written (%s), so every start tries the products anew.", self.path, reason)
        self.path = None

    def _bury(self) -> None:
        """Whoever was tried when the file was last written is lost, for the lock is ours and its owner is gone."""
        if self._trying is None:
            return
        log.warning(
            "%s did not come back from its trial, so it is not used any more. To have it tried again, delete %s.",
            self._trying,
            self.path,
        )
        self.lost.add(self._trying)
        self._trying = None
        self._write()

    def _read(self) -> None:
        """Add what is in the file; nothing where it is damaged, missing or of another form."""
        if self.path is None:
            return
        try:
            if self.path.stat().st_size > MOST_BYTES:
                return
            data = json.loads(self.path.read_text(encoding="utf-8"))
            if data["form"] != FORM:
                return
            outcomes = {str(key): Outcome.from_data(value) for key, value in data["outcomes"].items()}
            lost, trying = {str(name) for name in data["lost"]}, data["trying"]
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError):
            return
        self.outcomes |= outcomes
        self.lost |= lost
        self._trying = trying if isinstance(trying, str) else None

    def _write(self) -> None:
        if not self._held or self.path is None:
            return
        data: dict[str, Any] = {
            "form": FORM,
            "trying": self._trying,
            "lost": sorted(self.lost),
            "outcomes": {key: outcome.as_data() for key, outcome in self.outcomes.items()},
        }
        part = self.path.with_suffix(f".{os.getpid()}.part")
        try:
            with part.open("w", encoding="utf-8") as file:
                json.dump(data, file)
                file.flush()
                os.fsync(file.fileno())  # a driver that fails may take the whole machine down
            part.replace(self.path)
        except OSError as reason:
            with suppress(OSError):
                part.unlink()
            self._give_up(reason)

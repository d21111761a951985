"""The process that cases run in: it may hang, die or be refused memory without anybody else noticing."""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import shutil
import signal
import tempfile
import time
import warnings
from dataclasses import replace
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from . import outcome as ends
from .case import make
from .outcome import Outcome

ADDRESSES = 8 << 30  # bytes of address space that a case may ask for beyond what the process has


def serve(pipe: Connection, kinds: tuple[str, ...], most_grown: int) -> None:
    """Run the cases whose names come through the pipe, and send back how each ended."""
    faulthandler.enable()
    logging.disable()
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    torch.set_num_threads(1)
    for kind in kinds:
        getattr(import_module(f"{__package__}.{kind}"), "warm_up", lambda: None)()
    room = _status("VmSize") + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    pipe.send("ready")
    while name := pipe.recv():
        pipe.send(run(name, most_grown))


def run(name: str, most_grown: int) -> Outcome:
    """One case, in this process; `memory` where it took more than `most_grown` bytes."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    _forget_peak()
    before, started, case = _status("VmRSS"), time.monotonic(), None
    try:
        case = make(name)
        kind, detail = ends.of_pictures(case, case.attempt(folder))
    except BaseException as error:
        kind, detail = ends.of_error(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    seconds, grown = time.monotonic() - started, _status("VmHWM") - before
    ended = Outcome(name, kind, "" if case is None else case.what, detail, seconds, grown)
    if ended.grown > most_grown:
        return replace(ended, kind=ends.MEMORY, detail=f"{ended.grown >> 20} MB more, then: {kind} {detail}")
    return ended


def _status(key: str) -> int:
    """Bytes of an entry of this process's status."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def _forget_peak() -> None:
    """Have VmHWM count from now on."""
    descriptor = os.open("/proc/self/clear_refs", os.O_WRONLY)
    os.write(descriptor, b"5")
    os.close(descriptor)

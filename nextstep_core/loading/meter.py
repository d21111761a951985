"""How far a long transfer is, for people: done of all, the rate of late, and the time that is left at it."""

from __future__ import annotations

import time
from collections import deque

WINDOW_SECONDS = 15.0
SETTLING_SECONDS = 2.0  # before, a rate tells more of how a transfer begins than of how it goes on


class Meter:
    """Told of every step, says "3.2 of 29.1 GB, 41 MB/s, 10:32 left", and "checking" once all is there.

    The rate is that of the last seconds, so that what was there before a transfer went on does not count, and a slower
    network shows.
    """

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def text(self, done: int, size: int, now: float | None = None) -> str:
        """The line for `done` of `size` bytes at `now` seconds (default: by the clock)."""
        now = time.monotonic() if now is None else now
        self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] <= now - WINDOW_SECONDS:
            self._seen.popleft()
        (began, before), unit = self._seen[0], 1e9 if size >= 1e9 else 1e6
        line = f"{done / unit:.1f} of {size / unit:.1f} {'GB' if unit == 1e9 else 'MB'}"
        if done >= size:
            return f"{line}, checking"
        if now < began + SETTLING_SECONDS or done <= before:
            return line
        rate = (done - before) / (now - began)
        return f"{line}, {rate / 1e6:.{0 if rate >= 1e7 else 1}f} MB/s, {clock((size - done) / rate)} left"


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds, or hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"

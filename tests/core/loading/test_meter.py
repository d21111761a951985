"""Progress of a transfer in words."""

from __future__ import annotations

from nextstep_core.loading.meter import Meter, clock


def test_bytes_rate_and_time_left() -> None:
    meter = Meter()
    size = 29_100_000_000
    assert meter.text(3_000_000_000, size, now=100.0) == "3.0 of 29.1 GB", "what was there before tells no rate"
    assert meter.text(3_000_100_000, size, now=101.9) == "3.0 of 29.1 GB", "the first moments tell no rate either"
    assert meter.text(3_205_000_000, size, now=105.0) == "3.2 of 29.1 GB, 41 MB/s, 10:32 left"
    assert meter.text(3_205_000_000, size, now=200.0) == "3.2 of 29.1 GB", "it stands still"
    assert meter.text(size, size, now=201.0) == "29.1 of 29.1 GB, checking"


def test_the_rate_is_that_of_late() -> None:
    meter = Meter()
    for second in range(61):  # 100 MB/s for half a minute, then 2
        meter.text(100_000_000 * min(second, 30) + 2_000_000 * max(0, second - 30), 10**10, now=float(second))
    assert ", 2.0 MB/s, " in meter.text(3_062_000_000, 10**10, now=61.0)


def test_small_ones_are_in_megabytes_and_long_ones_in_hours() -> None:
    meter = Meter()
    meter.text(0, 300_000_000, now=0.0)
    assert meter.text(1_000_000, 300_000_000, now=10.0) == "1.0 of 300.0 MB, 0.1 MB/s, 49:50 left"
    assert (clock(59.6), clock(3600), clock(7325)) == ("1:00", "1:00:00", "2:02:05")

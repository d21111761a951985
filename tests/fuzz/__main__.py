"""`python -m tests.fuzz`: run cases, show findings as they come, and close with a table; status 1 after a finding."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import islice

from . import KINDS
from .child import run
from .outcome import BAD, Outcome
from .report import finding, table
from .runner import Limits, names, run_all


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1000, help="how many, over all kinds")
    parser.add_argument("--minutes", type=float, help="begin no further case after so long")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--seconds", type=float, default=Limits.seconds, help="that a case may take")
    parser.add_argument("--grown", type=int, default=Limits.grown >> 20, help="MB that a case may take")
    parser.add_argument("--repeat", metavar="NAME", help="run one case in this process instead")
    options = parser.parse_args()
    limits = Limits(options.seconds, options.grown << 20)
    if options.repeat:
        ended = run(options.repeat, limits.grown)
        print(f"{ended.kind}: {ended.what} ({ended.seconds:.1f} s, {ended.grown >> 20} MB)\n{ended.detail}")
        return int(ended.kind in BAD)

    started, outcomes = time.monotonic(), list[Outcome]()

    def until_late(names: Iterator[str]) -> Iterator[str]:
        for name in names:
            if options.minutes is not None and time.monotonic() - started > options.minutes * 60:
                return
            yield name

    wanted = until_late(islice(names(options.kind, options.seed), options.cases))
    try:
        for ended in run_all(wanted, tuple(options.kind), limits, options.jobs):
            outcomes.append(ended)
            if ended.kind in BAD:
                print(finding(ended), flush=True)
    except KeyboardInterrupt:
        print("stopped; so far:")
    print(table(outcomes))
    print(f"{len(outcomes)} cases in {time.monotonic() - started:.0f} s, seed {options.seed}")
    return int(any(ended.kind in BAD for ended in outcomes))


if __name__ == "__main__":
    sys.exit(main())

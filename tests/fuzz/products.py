"""What the environment says of fast paths, and the file that keeps what was measured: damaged, by hand or by chance."""

from __future__ import annotations

import json
import os
from pathlib import Path
from random import Random

import torch

from nextstep_core.runtime.chosen import NAMES, PLAIN, Chooser, Switch, ledger_of, table
from nextstep_core.runtime.ledger import CACHE
from nextstep_core.runtime.trials import Candidate, Trial

from .case import Case
from .json_mutation import mutated

CPU = torch.device("cpu")


def warm_up() -> None:
    Switch.parse("")


def case(rng: Random) -> Case:
    return rng.choice((_switch, _file))(rng)


def _switch(rng: Random) -> Case:
    words = *NAMES[:3], PLAIN, "3", "-", "--", "", " ", "²", "9" * 5000, "\n", "\0", "é" * 300
    count = rng.choice((1, 1, 2, 3, 200))
    text = ",".join(rng.choice(("", "-", "- ")) + rng.choice(words) for _ in range(count))
    return Case(f"fast paths {text[:60]!r}", lambda _: _parsed(text))


def _parsed(text: str) -> None:
    assert Switch.parse(text).allowed <= set(NAMES)


def _file(rng: Random) -> Case:
    """A start that finds the file as nobody left it: it decides all the same, and mends the file."""
    seed = rng.random()

    def attempt(folder: Path) -> None:
        before = os.environ.get(CACHE)
        os.environ[CACHE] = str(folder / "cache")
        try:
            _decide()
            path = ledger_of(CPU).path
            assert path is not None
            path.write_bytes(_damaged(Random(seed), path.read_text(encoding="utf-8")))
            again = type(ledger_of(CPU))(path)
            table(list(again.outcomes.values()), 1e9)
            with again.held():
                again.keep("more", next(iter(ledger_of(CPU).outcomes.values())))
            assert json.loads(path.read_text(encoding="utf-8"))["outcomes"]["more"]
        finally:
            os.environ.pop(CACHE) if before is None else os.environ.update({CACHE: before})

    return Case("a file of what was measured, damaged", attempt)


def _damaged(rng: Random, text: str) -> bytes:
    data = text.encode()
    how = rng.randrange(3)
    if how == 0:
        return data[: rng.randrange(len(data))]
    if how == 1:
        place = rng.randrange(len(data))
        return data[:place] + rng.randbytes(rng.randrange(1, 8)) + data[place:]
    return mutated(text, rng)[1].encode(errors="surrogatepass")


def _decide() -> None:
    ones = torch.ones(4)
    candidates = [Candidate(name, "1", lambda: lambda: ones * 1.0) for name in NAMES[:2]]
    Chooser(CPU).decide("ones", candidates, lambda: Trial("ones", lambda: ones * 1.0, [()], 0.01, CPU, 16))

"""Which workers are asked for, in words and from Python; and the plan of a run's batches, changed at random.

No worker is started: what is refused is refused before. Whatever the plan says, every picture of the job comes.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

from nextstep_core.errors import shown
from nextstep_core.studio.batch import BatchRun
from nextstep_core.studio.cluster import ALL, Where, where_of
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.planning import PLAN

from .case import Case
from .good import put
from .jobs import Stub
from .json_mutation import mutated
from .prompts import PIECES
from .settings import NONE

COUNTS = (None, 1, 2, 4096, 4097, 0)
WORDS = (None, ALL, "1", "4096", "4097", "0", "-1", "1.0", "²", "١", " 2", "")
PARTS = ("ray://", "auto", "host", ":6379", ":", "//", "@", "10.0.0.1", "[::1]", "\n", " ", "-", "..", *PIECES)
JOB = """{"prompts": ["a", "b", "c"], "seeds": [1, 2], "settings": [{"size": 16}, {"size": 16, "steps": 4}]}"""
PICTURES, TOGETHER = 12, 4


def warm_up() -> None:
    from PIL import Image  # noqa: F401 - imported where it is used, once for all cases


def case(rng: Random) -> Case:
    return rng.choice((_words, _values, _plan))(rng)


def _address(rng: Random) -> object:
    made = "".join(rng.choice(PARTS) for _ in range(rng.choice((1, 2, 3, 6))))
    return rng.choice((None, "auto", "ray://host:10001", made, rng.choice(NONE)))


def _words(rng: Random) -> Case:
    gpus, workers = rng.choice((*WORDS, rng.choice(NONE))), rng.choice((*COUNTS, rng.choice(NONE)))
    address = _address(rng)

    def attempt(_: object) -> None:
        where_of(gpus, workers, address)  # type: ignore[arg-type]

    return Case(f"words: {shown(gpus)} {shown(workers)} {shown(address)}", attempt)


def _values(rng: Random) -> Case:
    gpus, workers = (rng.choice((*COUNTS, rng.choice(NONE))) for _ in range(2))
    address = _address(rng)

    def attempt(_: object) -> None:
        Where(address, gpus, workers).check()  # type: ignore[arg-type]

    return Case(f"values: {shown(gpus)} {shown(workers)} {shown(address)}", attempt)


def _plan(rng: Random) -> Case:
    seed, gone = rng.random(), rng.sample(range(PICTURES), rng.choice((1, 3, PICTURES)))

    def attempt(folder: Path) -> None:
        run = BatchRun(parse_job(JOB, "job"), Alone(Stub()), folder)
        run.run(TOGETHER)
        _, text = mutated((folder / PLAN).read_text(), Random(seed))
        put(folder / PLAN, text)
        for n in gone:
            (folder / run.entries[n].file).unlink()
        again = BatchRun(parse_job(JOB, "job"), Alone(Stub()), folder)
        assert again.run(TOGETHER).drawn == len(gone), "not what was missing"
        assert len(list(folder.glob("*.png"))) == PICTURES, "a picture is missing"

    return Case(f"plan: {seed} without {gone}", attempt)

"""Good job files and prompt sets, changed at random, and names of files from hostile patterns and prompts.

What is accepted is drawn by a model that is a stub, so that files are written: none may lie outside of the folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from nextstep_core.decoding.progress import Progress
from nextstep_core.images.saving import FORMATS
from nextstep_core.runtime.interrupt import Check
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.studio.batch import BatchRun
from nextstep_core.studio.drawing import Settled
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import read_job
from nextstep_core.studio.jobs import Order
from nextstep_core.studio.report import write_report, write_sheet

from . import good
from .case import Case
from .json_mutation import mutated
from .prompts import PIECES

MOST = 30  # pictures that are drawn
JOB = json.dumps(
    {
        "title": "a job",
        "model": "tiny",
        "settings": [{"size": 16, "steps": 3, "cfg": 2.0}, {"size": "16x32", "label": "B", "sampler": "flow-ode"}],
        "seeds": [1, 2],
        "lists": {"color": ["red", "blue"], "shape": ["circle"]},
        "combine": "grid",
        "format": "png",
        "quality": 90,
        "names": "{index}-{name}-{label}-{seed}",
        "jobs": [
            {"prompt": "a {color} {shape}", "name": "{color}", "negative_prompt": "blur"},
            {"prompt": "plain", "images": ["input.png"], "settings": {"width": 16, "height": 16}, "seeds": [5]},
        ],
    }
)
PARTS = (
    "{index}",
    "{name}",
    "{prompt}",
    "{label}",
    "{seed}",
    "{x}",
    "{",
    "}",
    "/",
    "\\",
    "..",
    ".",
    "-",
    "C:",
    "~",
    " ",
)
TABLE = 'prompt,negative_prompt,name\n"a cat, a hat",blur,tom\na dog,,\n'


class Stub:
    """Draws gray pictures."""

    facts: dict[str, str] = {}
    identity = ""

    def settle(self, order: Order) -> Settled:
        settings = order.asked.over(GenerationSettings(sampler="flow-ode"))
        return Settled(order, order.prompt, order.asked.width or 16, order.asked.height or 16, settings)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        return torch.full((len(orders), 16, 16, 3), 0.5)


def warm_up() -> None:
    from PIL import Image  # noqa: F401 - imported where it is used, once for all cases


def case(rng: Random) -> Case:
    what, name, text = rng.choice((_job, _pattern, _prompts, _table))(rng)

    def attempt(folder: Path) -> None:
        home = folder / "home"
        home.mkdir()
        put(home / "input.png")
        good.put(home / name, text)
        job = read_job(home / name)
        if len(job.orders) > MOST:
            return
        out = home / "out"
        run = BatchRun(job, Alone(Stub()), out)
        run.run()
        write_report(out, job.title, run.records)
        write_sheet(out, run.records)
        assert {path.name for path in folder.iterdir()} == {"home"}
        assert {path.name for path in home.iterdir()} == {"input.png", name, "out"}
        ending = FORMATS[job.format]
        assert len(list(out.rglob(f"*{ending}"))) == len(job.orders) + (ending == ".jpg"), "a picture is missing"

    return Case(what, attempt)


def put(path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (24, 24), "red").save(path)


def _job(rng: Random) -> tuple[str, str, str]:
    what, text = mutated(JOB, rng)
    return f"job: {what}", "job.json", text


def _pattern(rng: Random) -> tuple[str, str, str]:
    pattern = "".join(rng.choice((*PARTS, *PIECES)) for _ in range(rng.choice((1, 2, 4, 8))))
    stated = {"prompts": [_text(rng)], "names": pattern, "settings": {"size": 16}}
    return f"names: {pattern[:60]!r}", "job.json", json.dumps(stated)


def _prompts(rng: Random) -> tuple[str, str, str]:
    text = "\n".join(_text(rng) for _ in range(rng.choice((1, 3, 20))))
    return f"prompts: {text[:60]!r}", "prompts.txt", text


def _table(rng: Random) -> tuple[str, str, str]:
    position = rng.randrange(len(TABLE))
    text = TABLE[:position] + rng.choice(('"', ",", "\n", "\0", '""', "é", *PIECES)) + TABLE[position:]
    return f"table: {text[:60]!r}", "prompts.csv", text


def _text(rng: Random) -> str:
    return "".join(rng.choice((*PIECES, *PARTS)) for _ in range(rng.choice((1, 3, 10))))

"""What a batch run costs beside the drawing: names, files, records, the report.

    python -m benchmarks.bookkeeping --pictures 2000

The model is a stub that draws gray pictures of 64x64 pixels at once.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nextstep_core.decoding.progress import Progress
from nextstep_core.runtime.interrupt import Check
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.studio.batch import BatchRun
from nextstep_core.studio.drawing import Settled
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.jobs import Order
from nextstep_core.studio.report import write_report, write_sheet

SIDE = 64


class Stub:
    """Takes no time to draw."""

    facts = {"Model": "stub"}
    identity = "stub"

    def settle(self, order: Order) -> Settled:
        return Settled(order, order.prompt, SIDE, SIDE, order.asked.over(GenerationSettings()))

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        return torch.full((len(orders), SIDE, SIDE, 3), 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=2000)
    count = parser.parse_args().pictures
    torch.set_num_threads(1)  # quickest for pictures this small
    text = json.dumps({"prompts": ["a red circle on a blue background"], "seeds": {"first": 0, "count": count}})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def timed(what: str, work: Callable[[], object]) -> None:
            started = time.perf_counter()
            work()
            print(f"{what:<24}{1000 * (time.perf_counter() - started) / count:6.2f} ms a picture")

        job = parse_job(text, "job.json")
        timed("reading the job", lambda: parse_job(text, "job.json"))
        timed("starting and drawing", lambda: BatchRun(job, Alone(Stub()), folder).run())
        timed("starting when all is done", lambda: BatchRun(job, Alone(Stub()), folder).run())
        records = BatchRun(job, Alone(Stub()), folder).records
        timed("report", lambda: write_report(folder, job.title, records))
        timed("contact sheet", lambda: write_sheet(folder, records))


if __name__ == "__main__":
    main()

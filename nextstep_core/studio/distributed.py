"""A cluster from Python: hand in batches, go on with something else, and collect what is done.

with Distributed("ray://host:10001", model="stepfun-ai/NextStep-1.1") as cluster:
    cluster.submit_batch(["a red circle", "a blue square"], "pictures", settings={"size": 512}, seeds=[1, 2])
    for record in cluster.collect_results(timeout=60):
        print(record.file, record.error)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event
from typing import Any

from ..errors import NextStepError
from .batch import TOGETHER, BatchProgress, BatchRun
from .cluster import Cluster, Where
from .job_file import COMMAND, Wishes, job_of_prompts
from .jobs import BatchJob
from .manifest import Record
from .model_choice import PLAIN, ModelChoice
from .prompts import Prompt
from .worker import Maker


class Stopped(Exception):
    """Ends a run inside of `shutdown`."""


class Distributed:
    """Workers that stay while several batches are drawn, one after another."""

    def __init__(
        self,
        address: str | None = None,
        *,
        gpus: int | None = None,
        workers: int | None = None,
        model: str | None = None,
        models: Path | None = None,
        quantization: str = PLAIN,
        max_memory: str | None = None,
        device: str = "auto",
        dtype: str = "auto",
        maker: Maker | None = None,
    ) -> None:
        """The workers of the cluster at `address`, else of this machine: one on each GPU, on so many `gpus`, or so many
        `workers` on CPUs. `model` is a path or a hub id, the same wherever they are. NextStepError where they cannot be
        had."""
        choice = ModelChoice(model, models, quantization, max_memory, device, dtype)
        self._cluster = Cluster(Where(address, gpus, workers), choice.as_data(), maker=maker)
        self._thread, self._stopping = ThreadPoolExecutor(1, "nextstep"), Event()
        self._runs: list[Future[None]] = []
        self._records: SimpleQueue[Record] = SimpleQueue()

    def submit_batch(
        self,
        job: BatchJob | Sequence[str],
        folder: str | Path,
        settings: Mapping[str, Any] | None = None,
        seeds: Sequence[int] = (0,),
        together: int = 8,
    ) -> None:
        """Have a job, or prompts in `settings` with each of `seeds`, drawn into a folder; what is there already is
        kept. Returns at once. NextStepError for what is wrong with them."""
        if self._stopping.is_set():
            raise NextStepError("The workers were let go. Start them again before you hand in a batch.")
        if not isinstance(job, BatchJob):
            wishes = Wishes(settings or {}, tuple(seeds))
            job = job_of_prompts([Prompt(text) for text in job], COMMAND, wishes)
        self._runs.append(self._thread.submit(self._run, job, Path(folder), TOGETHER.check(together)))

    def collect_results(self, timeout: float | None = None) -> list[Record]:
        """The records of what was finished since the last call, after all is done or, before that, so many seconds.
        NextStepError for a batch that could not be drawn at all."""
        done, waiting = wait(self._runs, timeout)
        self._runs = [run for run in self._runs if run in waiting]
        for run in done:
            run.result()
        found = []
        try:
            while True:
                found.append(self._records.get_nowait())
        except Empty:
            return found

    @property
    def is_done(self) -> bool:
        """Whether all that was handed in is drawn."""
        return all(run.done() for run in self._runs)

    def shutdown(self) -> None:
        """Stop what is being drawn and let the workers go. What is finished stays; the same batch draws the rest."""
        self._stopping.set()
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._cluster.shutdown()

    def __enter__(self) -> Distributed:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _run(self, job: BatchJob, folder: Path, together: int) -> None:
        def report(state: BatchProgress) -> None:
            if state.record is not None:
                self._records.put(state.record)

        def check() -> None:
            if self._stopping.is_set():
                raise Stopped

        with suppress(Stopped):
            BatchRun(job, self._cluster, folder).run(together, report, check)

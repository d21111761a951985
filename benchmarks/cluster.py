"""What a Ray cluster of workers on CPUs brings, and what it costs.

    python -m benchmarks.cluster --jobs 2000 --pictures 48 --workers 2

First jobs of a stub that draws at once, each alone: what sending, receiving and writing take, beside a run in this
process. Then pictures of the embedded model by one process and by the workers, in turns; their rates as a ratio.
Starting the workers is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from nextstep_core.studio.batch import BatchRun
from nextstep_core.studio.cluster import Cluster, Where
from nextstep_core.studio.hands import Alone, Hands
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.model_choice import ModelChoice
from nextstep_core.studio.quality import scores_of
from tests.stress.artists import embedded, stub
from tests.stress.cluster import resident

ROUNDS = 3
CHOICE = ModelChoice("tiny", None, device="cpu", dtype="fp32").as_data()


def seconds(hands: Hands, pictures: int, together: int, size: int, steps: int) -> float:
    """Of a run that draws so many pictures, planning included."""
    stated = {"prompts": ["a red circle"], "seeds": {"first": 1, "count": pictures}}
    job = parse_job(json.dumps(stated | {"settings": {"size": size, "steps": steps}}), "job")
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        summary = BatchRun(job, hands, Path(folder)).run(together)
        assert summary.drawn == pictures
        return time.perf_counter() - started


def held(cluster: Cluster) -> str:
    """MB of memory of each worker."""
    return ", ".join(f"{resident(pid) or 0:.0f}" for _, pid in cluster.processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=2000)
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parents[1])
    torch.set_num_threads(1)  # as workers do
    where = Where(workers=options.workers)
    with Cluster(where, {}, maker=stub) as hands:
        alone = seconds(Alone(stub({}), scores_of), options.jobs, 1, 16, 3)
        seconds(hands, options.jobs // 4, 1, 16, 3)
        before, there = resident(os.getpid()), held(hands)
        away = seconds(hands, options.jobs, 1, 16, 3)
        print(
            f"memory in MB: this process {before:.0f} to {resident(os.getpid()):.0f}, workers {there} to {held(hands)}"
        )
    each = 1000 / options.jobs
    print(f"{options.jobs} jobs of a stub: {each * away:.2f} ms a job, {each * alone:.2f} ms in this process")
    with Cluster(where, CHOICE) as hands:
        here, ratios = Alone(embedded(CHOICE).load(), scores_of), []
        for _ in range(ROUNDS):
            alone, away = (seconds(each, options.pictures, 4, 64, 20) for each in (here, hands))
            ratios.append(alone / away)
            print(f"{options.pictures} pictures: {alone:.1f} s in one process, {away:.1f} s by the workers")
            print(f"  memory in MB: this process {resident(os.getpid()):.0f}, workers {held(hands)}")
    print(f"{options.workers} workers draw {median(ratios):.2f} times as fast as one process")


if __name__ == "__main__":
    main()

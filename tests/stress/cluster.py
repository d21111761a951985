"""Kill workers, a whole node and the driver of a run on a Ray cluster, and compare it with a run in one process.

    python -m tests.stress.cluster --pictures 200 --kills 6

The cluster is a real one on this machine: a head, and two nodes with two workers each. A kill is SIGKILL, of a worker
at a random moment; in the middle of the run a node's raylet is killed, and the driver, which is started again. One more
picture kills every worker that draws it. At the end every other picture must be there once and equal that of one
process bit for bit, and the one must be reported.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from statistics import median

from nextstep_core.studio.batch import BatchProgress, BatchRun
from nextstep_core.studio.cluster import Cluster, Where, import_ray
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.jobs import BatchJob
from nextstep_core.studio.model_choice import ModelChoice
from nextstep_core.studio.quality import scores_of
from tests.stress.artists import KILLS, embedded

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = ("a red circle on a blue background", "a green square on a white background", "a large yellow triangle")
TOGETHER, NODES, EACH = 4, 2, 2
CHOICE = ModelChoice("tiny", None, device="cpu", dtype="fp32").as_data()
WORKER, MB = b"ray::NextStepWorker", 2**20


def job_of(pictures: int, poisoned: bool) -> BatchJob:
    """So many pictures, and one more, in a batch of its own, that kills who draws it."""
    each = {"first": 1, "count": pictures // 2}
    rest = {"first": 1, "count": pictures - pictures // 2}
    jobs: list[dict[str, object]] = [{"prompt": PROMPTS[0], "seeds": each}, {"prompt": PROMPTS[1], "seeds": rest}]
    if poisoned:
        jobs.insert(1, {"prompt": KILLS, "seeds": [1], "settings": {"steps": 5}})
    return parse_job(json.dumps({"jobs": jobs, "settings": {"size": 64, "steps": 20}, "names": "{name}-{seed}"}), "job")


def drive(address: str, pictures: int, folder: Path) -> None:
    """The run on the cluster: what is killed and started again."""
    where = Where(address, workers=NODES * EACH)
    with Cluster(where, CHOICE, maker=embedded) as hands:

        def report(state: BatchProgress) -> None:
            if state.record is not None:
                print(state.in_words, flush=True)

        BatchRun(job_of(pictures, True), hands, folder).run(TOGETHER, report)


def workers() -> list[int]:
    """The processes of Ray's that draw, or are about to."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                if (entry / "cmdline").read_bytes().startswith(WORKER):
                    found.append(int(entry.name))
            except OSError:
                pass
    return found


def resident(pid: int) -> float | None:
    """MB; None for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / MB for line in lines if line.startswith("VmRSS"))
    except (OSError, StopIteration):
        return None


def count(folder: Path) -> int:
    return len(list(folder.glob("*.png")))


def faults(alone: Path, killed: Path) -> list[str]:
    """What is not as it must be."""
    wanted = {path.name: path.read_bytes() for path in alone.glob("*.png")}
    there = {path.name: path.read_bytes() for path in killed.glob("*.png")}
    found = [f"{name} is missing" for name in wanted.keys() - there.keys()]
    found += [f"{name} is too many" for name in there.keys() - wanted.keys()]
    found += [f"{name} is another picture" for name in wanted.keys() & there.keys() if wanted[name] != there[name]]
    records = [json.loads(line) for line in (killed / "manifest.jsonl").read_text().splitlines()]
    drawn = Counter(record["key"] for record in records if not record["error"])
    found += [f"{times} records of {key}" for key, times in drawn.items() if times > 1]
    if not any("workers were lost" in record["error"] for record in records if record["prompt"] == KILLS):
        found.append("the picture that kills is not reported")
    return found + [f"failed: {record['file']}" for record in records if record["error"] and record["prompt"] != KILLS]


class Watched:
    """The driver, and how much memory it and the workers hold, looked at five times a second."""

    def __init__(self, address: str, pictures: int, folder: Path) -> None:
        command = [sys.executable, "-m", __spec__.name, "--drive", address]
        command += ["--pictures", str(pictures), "--folder", str(folder)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        self.folder, self.memory = folder, defaultdict[int, list[float]](list)

    def until(self, pictures: int) -> bool:
        """Wait for so many pictures; False where the run has ended before."""
        while self.process.poll() is None:
            if count(self.folder) >= pictures:
                return True
            for pid in (self.process.pid, *workers()):
                if (size := resident(pid)) is not None:
                    self.memory[pid].append(size)
            time.sleep(0.2)
        return False

    def growth(self) -> dict[str, list[str]]:
        """Of processes that were looked at often: medians of the second and of the last quarter, in MB."""
        told: dict[str, list[str]] = {"driver": [], "workers": []}
        for pid, sizes in self.memory.items():
            if len(sizes) >= 20:
                quarter = len(sizes) // 4
                early, late = median(sizes[quarter : 2 * quarter]), median(sizes[-quarter:])
                told["driver" if pid == self.process.pid else "workers"].append(f"{early:.0f} to {late:.0f}")
        return told


def stress(pictures: int, kills: int, seed: int = 0) -> list[str]:
    """Everything above; what was wrong at the end."""
    import torch

    moments = random.Random(seed)
    os.environ["PYTHONPATH"] = str(ROOT)
    ray = import_ray()
    from ray.cluster_utils import Cluster as RayCluster

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.set_num_threads(1)
        started = time.monotonic()
        BatchRun(job_of(pictures, False), Alone(embedded(CHOICE).load(), scores_of), folder / "alone").run(TOGETHER)
        print(f"one process: {time.monotonic() - started:.0f} s", flush=True)
        cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0})
        nodes = [cluster.add_node(num_cpus=EACH) for _ in range(NODES)]
        try:
            out = folder / "cluster"
            driver = Watched(cluster.address, pictures, out)
            steps = sorted(moments.sample(range(5, pictures - 5), kills + 2))
            node_at, driver_at = moments.sample(range(1, len(steps) - 1), 2)
            for n, step in enumerate(steps):
                if not driver.until(step):
                    return [f"the run ended with {driver.process.returncode} before picture {step}"]
                if n == node_at:
                    raylet = nodes[-1].all_processes["raylet"][0].process
                    raylet.kill()
                    print(f"{count(out)} pictures: a node's raylet {raylet.pid} killed", flush=True)
                    cluster.add_node(num_cpus=EACH)
                elif n == driver_at:
                    driver.process.send_signal(signal.SIGKILL)
                    driver.process.wait()
                    print(f"{count(out)} pictures: the driver killed", flush=True)
                    driver = Watched(cluster.address, pictures, out)
                elif alive := workers():
                    victim = moments.choice(alive)
                    os.kill(victim, signal.SIGKILL)
                    print(f"{count(out)} pictures: worker {victim} killed", flush=True)
            driver.until(pictures + 1)
            print(f"memory in MB: {driver.growth()}", flush=True)
            found = faults(folder / "alone", out)
            return (
                found if driver.process.returncode == 0 else [*found, f"the run ended with {driver.process.returncode}"]
            )
        finally:
            ray.shutdown()
            cluster.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--kills", type=int, default=6, help="of workers")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--drive", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(options.drive, options.pictures, options.folder)
        return
    found = stress(options.pictures, options.kills, options.seed)
    killed = f"{options.kills} workers, a node and the driver killed"
    print(f"{options.pictures} pictures, {killed}; wrong: {found or 'nothing'}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()

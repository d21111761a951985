"""Batches on a cluster: a real one of Ray's on this machine, with workers on CPUs that draw with a stub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from nextstep_core import NextStepError
from nextstep_core.studio import cluster as cluster_module
from nextstep_core.studio.batch import BatchProgress, BatchRun, Summary
from nextstep_core.studio.cluster import Cluster, Where, import_ray, where_of
from nextstep_core.studio.distributed import Distributed
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.jobs import BatchJob
from nextstep_core.studio.model_choice import ModelChoice
from nextstep_core.studio.quality import scores_of
from tests.stress.artists import KILLS, TOGETHER, UNLUCKY, embedded, stub

ROOT = Path(__file__).resolve().parents[3]
JOB = {"prompts": ["a red circle", "a blue square", "a green cross"], "settings": {"size": 16}, "seeds": [1, 2]}


def job(**stated: object) -> BatchJob:
    return parse_job(json.dumps(JOB | stated), "jobs.json")


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.png")}


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ((None, None, None), None),
        (("all", None, None), Where()),
        (("2", None, None), Where(gpus=2)),
        ((None, 3, None), Where(workers=3)),
        ((None, None, "ray://host:10001"), Where("ray://host:10001")),
        (("4", None, "auto"), Where("auto", 4)),
        ((None, 4, "10.0.0.1:6379"), Where("10.0.0.1:6379", workers=4)),
    ],
)
def test_which_workers_are_asked_for(asked: tuple, found: Where | None) -> None:
    assert where_of(*asked) == found


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("some", None, None), "gpus is 'some'"),
        (("0", None, None), "gpus is 0"),
        (("9" * 20, None, None), "gpus is"),
        (("-1", None, None), "gpus is '-1'"),
        ((None, 0, None), "workers is 0"),
        ((None, True, None), "workers is True"),
        ((None, None, "http://host:1"), "cluster is"),
        ((None, None, "host"), "cluster is 'host'"),
        ((None, None, "ray://host:10001\n"), "cluster is"),
        ((None, None, "ray://us er@host:1"), "cluster is"),
        ((None, None, "x" * 9999 + ":1"), "cluster is"),
        ((None, None, "\udc80:1"), "cluster"),
        (("all", 2, None), "not both"),
        (("1", 2, None), "not both"),
    ],
)
def test_what_can_be_no_cluster(asked: tuple, said: str) -> None:
    with pytest.raises(NextStepError, match=said):
        where_of(*asked)


def test_without_ray_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(NextStepError, match="pip install"):
        import_ray()


@pytest.fixture(scope="module")
def ray() -> Iterator[object]:
    """Ray with room for four workers, as another program may have started it in this process."""
    found = pytest.importorskip("ray", reason="Ray is not installed")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    found.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield found
    found.shutdown()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def run(folder: Path, together: int = 2, workers: int = 2, report=lambda _: None, **stated: object) -> Summary:
    with Cluster(Where(workers=workers), {}, maker=stub) as hands:
        return BatchRun(job(**stated), hands, folder).run(together, report)


@pytest.mark.slow
def test_the_files_are_those_of_a_run_alone(ray: object, tmp_path: Path) -> None:
    summary = run(tmp_path / "cluster")
    assert (summary.drawn, summary.kept, summary.failed) == (6, 0, 0)
    BatchRun(job(), Alone(stub({})), tmp_path / "alone").run(2)
    assert pictures(tmp_path / "cluster") == pictures(tmp_path / "alone")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "cluster").iterdir()} == names
    assert run(tmp_path / "cluster").kept == 6


@pytest.mark.slow
def test_what_fails_and_what_kills_its_workers_is_reported_once_and_the_rest_is_drawn(
    ray: object, tmp_path: Path
) -> None:
    prompts = ["a", f"{KILLS}", "b", "it will fail", "c"]
    states: list[BatchProgress] = []
    summary = run(tmp_path, prompts=prompts, seeds=[1], report=states.append)
    assert (summary.drawn, summary.failed) == (3, 2)
    told = {record.prompt: record.error for record in summary.records}
    assert "2 workers were lost" in told[KILLS] and told["it will fail"] == "It does not work."
    assert not told["a"] and not told["b"] and not told["c"]
    assert len(pictures(tmp_path)) == 3
    assert sum(state.record is not None for state in states) == 5
    assert "2 failed" in states[-1].in_words


@pytest.mark.slow
def test_a_batch_that_lost_its_workers_by_no_fault_of_its_own_is_drawn_whole(ray: object, tmp_path: Path) -> None:
    prompts = [f"{TOGETHER}, {UNLUCKY}{tmp_path / 'counted'}"]
    summary = run(tmp_path / "cluster", prompts=prompts, seeds=[1, 2], together=2)
    assert (summary.drawn, summary.failed) == (2, 0) and (tmp_path / "counted").read_text() == "xx"
    BatchRun(job(prompts=prompts, seeds=[1, 2]), Alone(stub({})), tmp_path / "alone").run(2)
    assert pictures(tmp_path / "cluster") == pictures(tmp_path / "alone"), "not as they would be one by one"


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_pictures_are_drawn_elsewhere(ray: object, tmp_path: Path) -> None:
    with Cluster(Where(workers=2), {}, maker=stub) as hands:
        first = {pid for _, pid in hands.processes}
        killed: list[int] = []

        def kill(state: BatchProgress) -> None:
            if state.drawn == 2 and not killed:
                killed.append(hands.processes[0][1])
                os.kill(killed[0], signal.SIGKILL)

        summary = BatchRun(job(prompts=["slow"], seeds=list(range(12))), hands, tmp_path).run(1, kill)
        now = {pid for _, pid in hands.processes}
        assert killed and killed[0] in first and killed[0] not in now
    assert (summary.drawn, summary.failed, len(pictures(tmp_path))) == (12, 0, 12)
    lines = (tmp_path / "manifest.jsonl").read_text().splitlines()
    assert len({json.loads(line)["key"] for line in lines}) == len(lines) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ({"error": "tiny"}, "cannot take part: tiny is not here"),
        ({"each its own": True}, "other weights than the other workers"),
        ({"dies": True}, "before they have the model"),
    ],
)
def test_workers_that_are_not_fit_are_told_before_anything_is_drawn(ray: object, choice: dict, said: str) -> None:
    with pytest.raises(NextStepError, match=said):
        Cluster(Where(workers=2), choice, maker=stub)


@pytest.mark.slow
def test_other_versions_are_told_before_anything_is_sent(ray: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "versions", lambda: {"nextstep": "9.9", "torch": "9"})
    with pytest.raises(NextStepError, match="nextstep .*9.9"):
        Cluster(Where(workers=1), {}, maker=stub)


@pytest.mark.slow
def test_without_a_gpu_workers_on_cpus_are_offered(ray: object) -> None:
    if ray.cluster_resources().get("GPU"):  # type: ignore[attr-defined]
        pytest.skip("there is a GPU")
    with pytest.raises(NextStepError, match="--workers"):
        Cluster(Where(), {}, maker=stub)


@pytest.mark.slow
def test_what_cannot_be_drawn_is_refused_as_it_is_alone(ray: object, tmp_path: Path) -> None:
    with Cluster(Where(workers=1), {}, maker=stub) as hands, pytest.raises(NextStepError, match="It is impossible"):
        BatchRun(job(prompts=["impossible"]), hands, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on_later(ray: object, tmp_path: Path) -> None:
    def stop(state: BatchProgress) -> None:
        if state.drawn == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, together=1, prompts=["slow"], seeds=list(range(8)), report=stop)
    summary = run(tmp_path, together=1, prompts=["slow"], seeds=list(range(8)))
    assert (summary.kept, summary.drawn) == (3, 5)


@pytest.mark.slow
def test_batches_from_python(ray: object, tmp_path: Path) -> None:
    with Distributed(workers=2, maker=stub) as workers:
        workers.submit_batch(["slow a", "slow b"], tmp_path, {"size": 16}, seeds=[1, 2, 3], together=1)
        early = workers.collect_results(timeout=0.1)
        assert len(early) < 6
        assert len(early + workers.collect_results()) == 6 and workers.is_done
        workers.submit_batch(["slow c"], tmp_path, {"size": 16}, seeds=list(range(50)), together=1)
        with pytest.raises(NextStepError, match="steps is 0"):
            workers.submit_batch(["a"], tmp_path, {"steps": 0})
    drawn = len(pictures(tmp_path))
    assert 6 <= drawn < 50
    with pytest.raises(NextStepError, match="let go"):
        workers.submit_batch(["a"], tmp_path)


@pytest.mark.slow
def test_the_embedded_model_draws_and_edits_the_same_bits_as_alone(ray: object, tmp_path: Path) -> None:
    Image.new("RGB", (96, 96), "red").save(tmp_path / "cup.png")
    stated = {
        "jobs": [{"prompt": "a red circle"}, {"prompt": "Make it blue.", "images": ["cup.png"]}],
        "settings": {"size": 32, "steps": 3},
        "seeds": [1, 2, 3],
    }
    wanted = parse_job(json.dumps(stated), "j", folder=tmp_path)
    choice = ModelChoice("tiny", None, dtype="fp32").as_data()
    with Cluster(Where(workers=2), choice) as hands:
        assert BatchRun(wanted, hands, tmp_path / "cluster").run(2).drawn == 6
    torch.set_num_threads(1)  # as workers do: it changes the last bits
    BatchRun(wanted, Alone(embedded(choice).load(), scores_of), tmp_path / "alone").run(2)
    assert pictures(tmp_path / "cluster") == pictures(tmp_path / "alone")


@pytest.mark.slow
def test_the_command_line_on_workers_of_this_machine(tmp_path: Path) -> None:
    """In a process of its own, which starts Ray itself and sends the package to the workers."""
    pytest.importorskip("ray", reason="Ray is not installed")
    (tmp_path / "job.json").write_text(json.dumps(JOB | {"settings": {"size": 32, "steps": 2}}))
    command = [sys.executable, "-m", "nextstep_core", "batch", str(tmp_path / "job.json"), "-m", "tiny", "--json"]
    command += ["-o", str(tmp_path / "out"), "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["drawn"] == 6 and len(pictures(tmp_path / "out")) == 6

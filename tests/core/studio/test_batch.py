"""Batch runs: nothing twice, nothing lost, whatever happens in between; on a stub, and on the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.progress import Progress
from nextstep_core.images.rgb import to_pixels
from nextstep_core.runtime.interrupt import Check
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.studio.batch import BatchProgress, BatchRun, Summary
from nextstep_core.studio.drawing import PipelineArtist, Settled
from nextstep_core.studio.hands import Alone
from nextstep_core.studio.job_file import parse_job
from nextstep_core.studio.jobs import BatchJob, Order
from nextstep_core.studio.manifest import MANIFEST, Manifest
from nextstep_core.studio.planning import PLAN

PUBLISHED = GenerationSettings(sampler="flow-ode")
JOB = {"prompts": ["a red circle", "a blue square", "a green cross"], "settings": {"size": 16}, "seeds": [1, 2]}


class Stub:
    """Draws flat pictures whose color is made of the seed; fails for prompts that say so."""

    identity = "stub"

    def __init__(self) -> None:
        self.facts = {"Model": "stub", "Version": "0"}
        self.calls: list[list[str]] = []

    def settle(self, order: Order) -> Settled:
        settings = order.asked.over(PUBLISHED)
        return Settled(order, order.prompt, order.asked.width or 16, order.asked.height or 16, settings)

    def draw(self, orders: Sequence[Settled], report: Callable[[Progress], None], check: Check) -> Tensor:
        check()
        self.calls.append([f"{one.prompt} {one.order.seed}" for one in orders])
        if any("fail" in one.prompt for one in orders):
            raise NextStepError("It does not work.")
        return torch.stack([torch.full((one.height, one.width, 3), one.order.seed / 255) for one in orders])


def job(**stated: object) -> BatchJob:
    return parse_job(json.dumps(JOB | stated), "jobs.json")


def run(folder: Path, together: int = 4, artist: Stub | None = None, **stated: object) -> Summary:
    return BatchRun(job(**stated), Alone(artist or Stub()), folder).run(together)


def pictures(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_every_picture_has_a_file_a_sidecar_and_a_record(tmp_path: Path) -> None:
    summary = run(tmp_path)
    assert (summary.drawn, summary.kept, summary.failed) == (6, 0, 0)
    assert pictures(tmp_path)[0] == "001-a-red-circle-1.png"
    assert len(pictures(tmp_path)) == 6
    told = json.loads((tmp_path / "001-a-red-circle-1.png.json").read_text())
    assert (told["prompt"], told["seed"], told["settings"]["steps"]) == ("a red circle", 1, PUBLISHED.steps)
    with Image.open(tmp_path / "001-a-red-circle-1.png") as image:
        assert image.getpixel((3, 3)) == (1, 1, 1)
        assert "Seed: 1" in image.text["parameters"]  # type: ignore[attr-defined]


def test_the_second_run_draws_nothing_and_one_with_more_draws_what_is_new(tmp_path: Path) -> None:
    run(tmp_path)
    again = Stub()
    assert (run(tmp_path, artist=again).kept, again.calls) == (6, [])
    more = Stub()
    assert run(tmp_path, artist=more, seeds=[1, 2, 3]).kept == 6
    assert sum(more.calls, []) == ["a red circle 3", "a blue square 3", "a green cross 3"]


def test_a_picture_that_was_deleted_is_drawn_again_beside_those_that_it_was_drawn_with(tmp_path: Path) -> None:
    first = Stub()
    run(tmp_path, artist=first)
    (tmp_path / "002-a-red-circle-2.png").unlink()
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.png")}
    again = Stub()
    assert run(tmp_path, artist=again).drawn == 1
    assert again.calls == first.calls[:1]
    assert {path: path.stat().st_mtime_ns for path in made} == made
    assert len(pictures(tmp_path)) == 6


def test_batches_stay_as_they_were_cut_when_a_run_is_stopped_and_its_job_grows(tmp_path: Path) -> None:
    def stop(state: BatchProgress) -> None:
        if state.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        BatchRun(job(), Alone(Stub()), tmp_path).run(4, stop)
    again = Stub()
    run(tmp_path, artist=again, prompts=["new", *JOB["prompts"]])
    assert again.calls == [
        ["a red circle 1", "a red circle 2", "a blue square 1", "a blue square 2"],
        ["a green cross 1", "a green cross 2"],
        ["new 1", "new 2"],
    ]
    assert len(pictures(tmp_path)) == 8


@pytest.mark.parametrize("plan", ["[]", '{"together": 4, "batches": 3}', "{", '{"together": 4, "batches": [[1], "x"]}'])
def test_a_plan_that_makes_no_sense_is_made_anew(tmp_path: Path, plan: str) -> None:
    run(tmp_path)
    (tmp_path / PLAN).write_text(plan)
    (tmp_path / "002-a-red-circle-2.png").unlink()
    assert run(tmp_path).drawn == 1


def test_a_plan_may_not_put_together_what_cannot_be_drawn_so(tmp_path: Path) -> None:
    settings = [{"size": 16, "steps": 3}, {"size": 16, "steps": 4}]
    run(tmp_path, settings=settings)
    stated = json.loads((tmp_path / PLAN).read_text())
    keys = [key for batch in stated["batches"] for key in batch]
    stated["batches"] = [keys[::6], [keys[1], keys[1], *keys[2:4]], [keys[3]], [*keys[4:6], "gone"]]
    (tmp_path / PLAN).write_text(json.dumps(stated))
    for picture in tmp_path.glob("*.png"):
        picture.unlink()
    again = Stub()
    assert run(tmp_path, artist=again, settings=settings).drawn == 12
    assert sorted(sum(again.calls, [])) == sorted(2 * [f"{p} {seed}" for p in JOB["prompts"] for seed in (1, 2)])


def test_files_of_others_are_never_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "001-a-red-circle-1.png"
    mine.write_bytes(b"mine")
    run(tmp_path)
    assert mine.read_bytes() == b"mine"
    assert "001-a-red-circle-1-2.png" in pictures(tmp_path)
    run(tmp_path, settings={"size": 32})  # another picture of the same name
    assert len(pictures(tmp_path)) == 13


def test_the_same_picture_asked_for_twice_has_two_files(tmp_path: Path) -> None:
    assert run(tmp_path, prompts=["a", "a"], seeds=[1]).drawn == 2
    assert pictures(tmp_path) == ["001-a-1.png", "002-a-1.png"]
    assert run(tmp_path, prompts=["a", "a"], seeds=[1]).kept == 2


def test_pictures_of_one_kind_are_drawn_together(tmp_path: Path) -> None:
    artist = Stub()
    settings = [{"size": 16, "steps": 3}, {"size": 16, "steps": 4}]
    run(tmp_path, together=4, artist=artist, prompts=["a", "b", "c"], settings=settings)
    assert [len(call) for call in artist.calls] == [4, 2, 4, 2]
    assert artist.calls[0] == ["a 1", "a 2", "b 1", "b 2"]


def test_one_that_fails_does_not_take_the_others_with_it_and_is_tried_again(tmp_path: Path) -> None:
    summary = run(tmp_path, prompts=["a", "this will fail", "b"], seeds=[1])
    assert (summary.drawn, summary.failed) == (2, 1)
    assert [record.error for record in summary.records] == ["", "It does not work.", ""]
    again = Stub()
    assert run(tmp_path, artist=again, prompts=["a", "this will fail", "b"], seeds=[1]).failed == 1
    assert again.calls == [["a 1", "this will fail 1", "b 1"], ["this will fail 1"]]


@pytest.mark.parametrize(
    "torn", [b'{"key": "', b"\xff\xfe", b"[]\n", b'{"key": 3, "file": "x"}\n', b"[" * 9999 + b"\n"]
)
def test_a_manifest_that_was_cut_off_loses_its_last_line_alone(tmp_path: Path, torn: bytes) -> None:
    run(tmp_path)
    with (tmp_path / MANIFEST).open("ab") as file:
        file.write(torn)
    assert run(tmp_path).kept == 6
    assert run(tmp_path, seeds=[1, 2, 3]).kept == 6
    assert len(Manifest(tmp_path).records) == 9


def test_what_was_finished_but_not_written_down_is_kept(tmp_path: Path) -> None:
    run(tmp_path)
    lines = (tmp_path / MANIFEST).read_bytes().splitlines(keepends=True)
    (tmp_path / MANIFEST).write_bytes(b"".join(lines[:-1]))
    (tmp_path / "006-a-green-cross-2.png.part").write_bytes(b"half")
    again = Stub()
    assert (run(tmp_path, artist=again).kept, again.calls) == (6, [])


def test_a_run_that_is_stopped_keeps_what_it_has(tmp_path: Path) -> None:
    def stop(state: BatchProgress) -> None:
        if state.done == 3:
            raise KeyboardInterrupt

    running = BatchRun(job(), Alone(Stub()), tmp_path)
    with pytest.raises(KeyboardInterrupt):
        running.run(1, stop)
    assert len(running.records) == 3
    assert run(tmp_path).kept == 3


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    other = BatchRun(job(), Alone(Stub()), tmp_path)

    def start_another(state: BatchProgress) -> None:
        other.run()

    with pytest.raises(NextStepError, match="Another run"):
        BatchRun(job(), Alone(Stub()), tmp_path).run(1, start_another)


def test_progress_counts_all_pictures(tmp_path: Path) -> None:
    states: list[BatchProgress] = []
    BatchRun(job(), Alone(Stub()), tmp_path).run(4, states.append)
    assert [state.done for state in states] == [0, 1, 2, 3, 4, 5, 6]
    assert {state.total for state in states} == {6}
    assert states[0].seconds_left is None and states[-1].seconds_left == 0


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("x")
    with pytest.raises(NextStepError, match="out"):
        run(tmp_path / "out")


@pytest.fixture(scope="module")
def tiny() -> PipelineArtist:
    return PipelineArtist(NextStepPipeline.from_pretrained("tiny", dtype=torch.float32), {"Model": "tiny"}, "tiny")


def pixels(path: Path) -> Tensor:
    with Image.open(path) as image:
        return to_pixels(image) / 2 + 0.5


def test_pictures_drawn_together_equal_each_alone(tmp_path: Path, tiny: PipelineArtist) -> None:
    stated = {
        "prompts": ["a red circle on a blue background", "a green square", "a large yellow triangle"],
        "settings": {"size": 64, "steps": 6},
        "seeds": [1, 7],
    }
    for folder, together in (("alone", 1), ("together", 6)):
        BatchRun(parse_job(json.dumps(stated), "j"), Alone(tiny), tmp_path / folder).run(together)
    names = pictures(tmp_path / "alone")
    assert len(names) == 6 and names == pictures(tmp_path / "together")
    for name in names:
        apart = (pixels(tmp_path / "alone" / name) - pixels(tmp_path / "together" / name)).abs().max()
        assert apart <= 1.001 / 255
    assert len({(tmp_path / "alone" / name).read_bytes() for name in names}) == 6


def test_edits_of_several_pictures_in_one_job(tmp_path: Path, tiny: PipelineArtist) -> None:
    for color in ("red", "blue"):
        Image.new("RGB", (96, 96), color).save(tmp_path / f"{color}.png")
    jobs = [{"prompt": "Make the background green.", "images": [f"{color}.png"]} for color in ("red", "blue")]
    stated = {"jobs": jobs, "settings": {"size": 64, "steps": 4}}
    summary = BatchRun(parse_job(json.dumps(stated), "j", folder=tmp_path), Alone(tiny), tmp_path / "out").run()
    assert (summary.drawn, summary.failed) == (2, 0)


def test_what_the_checkpoint_cannot_draw_is_refused_before_the_first(tmp_path: Path, tiny: PipelineArtist) -> None:
    stated = {"prompts": ["a", "word " * 5000], "settings": {"size": 64}}
    with pytest.raises(NextStepError, match="tokens long"):
        BatchRun(parse_job(json.dumps(stated), "j"), Alone(tiny), tmp_path / "out")
    assert not (tmp_path / "out").exists()

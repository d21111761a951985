"""What is quantized once: the same numbers from the kept file, never one that is torn or of another source."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextstep_core import NextStepError
from nextstep_core.loading import kept, single_file
from nextstep_core.loading.build import ModelPlan, fill, make_ready, plan_model
from nextstep_core.loading.catalog import models, vae_of, vaes
from nextstep_core.runtime.quantization.layouts import LAYOUTS, cpu_layout

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
DTYPE = torch.float32


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)  # faster on models this small
    monkeypatch.setattr(kept, "SPARE", 0)


@pytest.fixture
def shelf(checkpoint: Path) -> Path:
    return kept.shelves("tiny-a", checkpoint, [checkpoint.parent])[0]


def planned(checkpoint: Path, recipe: str = "int4") -> ModelPlan:
    return plan_model(checkpoint, recipe).for_computing_on(CPU)


def read(plan: ModelPlan) -> dict[str, torch.Tensor]:
    return dict(plan.read_model("cpu", DTYPE))


def kept_file(plan: ModelPlan, shelf: Path) -> Path:
    """Carry a plan out and keep it."""
    assert kept.place(plan, DTYPE, [shelf]) == shelf
    tensors = dict(kept.keep(plan, DTYPE, shelf, plan.read_model("cpu", DTYPE)))
    assert all(torch.equal(tensors[name], tensor) for name, tensor in read(plan).items())
    path = kept.find(plan, DTYPE, [shelf])
    assert path is not None
    return path


@pytest.mark.parametrize("recipe", ["int4", "int4-g128", "int8", "fp8"])
def test_the_kept_file_holds_what_was_computed_bit_for_bit(checkpoint: Path, shelf: Path, recipe: str) -> None:
    plan = planned(checkpoint, recipe)
    assert kept.find(plan, DTYPE, [shelf]) is None
    path = kept_file(plan, shelf)
    again = plan_model(path)
    assert (again.recipe, again.layout, again.stored) == (plan.recipe, plan.layout, True)
    first, second = read(plan), read(again)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    embedding = [next(iter(p.load_text_embedding().state_dict().values())) for p in (plan, again)]
    assert embedding[0].dtype == embedding[1].dtype and torch.equal(*embedding)
    assert again.documents.name == plan.documents.name == "tiny-a"
    assert path.name == f"{recipe}-fp32.safetensors" and [p for p in shelf.iterdir() if p.is_file()] == [path]


def test_weights_that_lie_as_this_machine_wants_them_are_not_packed_again(checkpoint: Path, shelf: Path) -> None:
    if cpu_layout() is None:
        pytest.skip("PyTorch packs int4 in a way of its own here")
    plan = plan_model(kept_file(planned(checkpoint), shelf))
    model = plan.empty_model()
    fill(model, read(plan))
    lying = {name: weight.data_ptr() for name, weight in model.named_parameters()}
    make_ready(model, CPU, DTYPE)
    assert lying == {name: weight.data_ptr() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("name", [None, *LAYOUTS])
def test_weights_that_lie_as_another_machine_wants_them_give_the_same_numbers(
    checkpoint: Path, shelf: Path, name: str | None
) -> None:
    here = planned(checkpoint)
    there = replace(here, layout=None if name is None else LAYOUTS[name])
    states = []
    for plan in (here, plan_model(kept_file(there, shelf))):
        model = plan.empty_model()
        fill(model, read(plan))
        make_ready(model, CPU, DTYPE)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_a_changed_source_is_converted_again_and_replaces_the_file(checkpoint: Path, shelf: Path) -> None:
    path = kept_file(planned(checkpoint), shelf)
    before = path.stat().st_ino
    shard = next(checkpoint.glob("*.safetensors"))
    os.utime(shard, ns=(1, 1))
    assert kept.find(planned(checkpoint), DTYPE, [shelf]) is None
    assert kept_file(planned(checkpoint), shelf) == path and path.stat().st_ino != before
    (checkpoint / "config.json").write_text((checkpoint / "config.json").read_text() + " ")
    assert kept.find(planned(checkpoint), DTYPE, [shelf]) is None
    assert kept.find(planned(checkpoint), torch.bfloat16, [shelf]) is None


def test_a_torn_file_is_not_taken_for_whole(checkpoint: Path, shelf: Path) -> None:
    plan = planned(checkpoint)
    path = kept_file(plan, shelf)
    whole = path.read_bytes()
    for torn in (whole[:-1], whole[:1000], b""):
        path.write_bytes(torn)
        assert kept.find(plan, DTYPE, [shelf]) is None and not kept.by_recipe([shelf])
    kept_file(plan, shelf)
    assert path.read_bytes() == whole


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_file_and_the_next_one_makes_it(checkpoint: Path, shelf: Path) -> None:
    code = f"""
import sys, time, torch
from pathlib import Path
from nextstep_core.loading import kept
from nextstep_core.loading.build import plan_model
plan = plan_model(Path({str(checkpoint)!r}), "int4").for_computing_on(torch.device("cpu"))
shelf = Path({str(shelf)!r})
shelf.mkdir(parents=True)
for n, _ in enumerate(kept.keep(plan, torch.float32, shelf, plan.read_model("cpu", torch.float32))):
    if n == 20: print("written", flush=True); time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.kill()
    process.wait()
    left = [path.name for path in shelf.iterdir() if path.is_file()]
    assert sorted(Path(name).suffix for name in left) == [".lock", ".part"]
    assert kept.find(planned(checkpoint), DTYPE, [shelf]) is None and not kept.all_shelves([checkpoint.parent])
    path = kept_file(planned(checkpoint), shelf)
    assert [p for p in shelf.iterdir() if p.is_file()] == [path], "the torn one is gone"


def test_an_interrupt_leaves_nothing(checkpoint: Path, shelf: Path) -> None:
    plan = planned(checkpoint)

    def stop(done: int, _: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    shelf.mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt):
        dict(kept.keep(plan, DTYPE, shelf, plan.read_model("cpu", DTYPE, stop)))
    assert not [path for path in shelf.iterdir() if path.is_file()]


def test_a_disk_that_fails_ends_the_keeping_and_not_the_loading(checkpoint: Path, shelf: Path, monkeypatch) -> None:
    plan, write = planned(checkpoint), single_file.StreamedFile.write
    written = []

    def failing(self, name, *arguments) -> None:
        written.append(name)
        if len(written) == 7:
            raise OSError(28, "No space left on device")
        write(self, name, *arguments)

    monkeypatch.setattr(single_file.StreamedFile, "write", failing)
    shelf.mkdir(parents=True)
    tensors = dict(kept.keep(plan, DTYPE, shelf, plan.read_model("cpu", DTYPE)))
    assert tensors.keys() == read(plan).keys() and len(written) == 7
    assert not [path for path in shelf.iterdir() if path.is_file()]


def test_it_is_kept_where_there_is_room_and_one_may_write(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    plan, roots = planned(checkpoint), [tmp_path / "full", tmp_path / "file", tmp_path / "good"]
    (tmp_path / "file").touch()
    size = sum(t.nbytes for t in read(plan).values())
    room = {"full": size // 2, "good": 10 * size}
    monkeypatch.setattr(
        kept.shutil,
        "disk_usage",
        lambda path: namedtuple("usage", "free")(room[Path(path).relative_to(tmp_path).parts[0]]),
    )
    folders = kept.shelves("a/tiny-a", checkpoint, roots)
    assert kept.place(plan, DTYPE, folders) == tmp_path / "good" / ".quantized" / "a--tiny-a"
    monkeypatch.setattr(kept, "SPARE", 10 * size)
    assert kept.place(plan, DTYPE, folders) is None
    assert kept.shelves("x", checkpoint, [Path("/elsewhere"), tmp_path])[0] == tmp_path / ".quantized" / "x"


def test_what_is_kept_stands_for_a_checkpoint_that_was_deleted(checkpoint: Path, shelf: Path) -> None:
    root = checkpoint.parent
    own = read(planned(checkpoint))
    path = kept_file(planned(checkpoint), shelf)
    assert models([root]) == {"tiny-a": checkpoint} and set(vaes([root])) == {"tiny-a/vae"}, "listed once"
    assert not kept.lacks_weights(checkpoint)
    for shard in checkpoint.glob("*.safetensors"):
        shard.unlink()
    assert kept.lacks_weights(checkpoint)
    shutil.rmtree(checkpoint)
    for name in (b"half \xff", b"line\nbreak"):
        odd = Path(os.fsdecode(os.path.join(os.fsencode(shelf.parent), name)))
        odd.mkdir()
        (odd / path.name).symlink_to(path)
    assert kept.all_shelves([root]) == {"tiny-a": shelf} and kept.lacks_weights(shelf), "odd names are passed over"
    assert kept.by_recipe([shelf]) == {"int4": path}
    vae = vae_of(path, [])
    assert vae == shelf / "vae" and (vae / "checkpoint.pt").is_file()
    left = read(plan_model(path))
    assert all(torch.equal(left[name], own[name]) for name in own)


def test_files_that_know_no_layouts_are_read_as_before_and_others_are_refused_by_name(
    checkpoint: Path, shelf: Path, tmp_path: Path, monkeypatch
) -> None:
    plan = plan_model(checkpoint, "int4")
    single_file.save_model(plan, tmp_path / "x.safetensors", DTYPE)
    assert plan_model(tmp_path / "x.safetensors").layout is None
    monkeypatch.setattr(single_file, "marks_of", lambda plan, own=single_file.marks_of: {
        **own(plan), "nextstep.quantization": "int4 in cpu-7"
    })  # fmt: skip
    single_file.save_model(plan, tmp_path / "y.safetensors", DTYPE)
    with pytest.raises(NextStepError, match="cpu-7"):
        plan_model(tmp_path / "y.safetensors")


def test_what_was_fitted_in_another_way_is_made_anew(checkpoint: Path, shelf: Path, monkeypatch) -> None:
    """Kept files of int4 tell how scales were chosen; those of int8 need not."""
    found = {recipe: kept_file(planned(checkpoint, recipe), shelf) for recipe in ("int8", "int4")}
    monkeypatch.setattr(kept, "METHOD", "as it was before")
    again = {recipe: kept.find(planned(checkpoint, recipe), DTYPE, [shelf]) for recipe in found}
    assert again == {"int8": found["int8"], "int4": None}

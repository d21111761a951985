"""Files that we write: aligned, whole or not there, and readable by the library they are made for."""

from __future__ import annotations

import errno
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.loading import single_file
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.documents import CARRIED, NAME, Documents, find_documents, is_marked
from nextstep_core.loading.single_file import StreamedFile, save_model, save_vae
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime.quantization.products import WEIGHT_ALIGNMENT

ROOT = Path(__file__).resolve().parents[3]
TENSORS = {
    "odd": torch.arange(7, dtype=torch.int8),
    "a": torch.arange(6.0).view(2, 3),
    "half": torch.arange(5).bfloat16(),
    "b": torch.arange(3.0),
    "eight": torch.arange(4.0).to(torch.float8_e4m3fn),
    "raw": torch.arange(9, dtype=torch.uint8),
}


def written(path: Path, metadata: dict[str, str]) -> StreamedFile:
    with StreamedFile(path, TENSORS, metadata) as file:
        for name in reversed(TENSORS):
            file.write(name, TENSORS[name])
    return file


@pytest.mark.parametrize("mark", ["", "x", "x" * 16, "x" * 32, "x" * 48])
def test_tensors_come_back_and_begin_aligned(tmp_path: Path, mark: str) -> None:
    """Whatever the length of the header; the widest dtypes come first, so that each is aligned to itself."""
    path = tmp_path / "x.safetensors"
    file = written(path, {"mark": mark})
    read = load_file(path)
    assert set(read) == set(TENSORS) and not list(tmp_path.glob("*.part"))
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name].float(), tensor.float()), name
    with safe_open(path, framework="pt") as opened:
        assert opened.metadata() == {"mark": mark}
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + (size := int.from_bytes(data[:8], "little"))])
    assert (8 + size) % WEIGHT_ALIGNMENT == 0 and file.size == len(data)
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name in TENSORS}
    assert all(start % TENSORS[name].dtype.itemsize == 0 for name, start in starts.items())
    assert list(starts)[:3] == ["a", "b", "half"]


def test_a_tensor_of_another_size_is_refused(tmp_path: Path) -> None:
    refused = pytest.raises(ValueError, match="a has 20 bytes, 24 were announced")
    with refused, StreamedFile(tmp_path / "x.safetensors", {"a": TENSORS["a"]}, {}) as file:
        file.write("a", torch.zeros(5))
    assert not list(tmp_path.iterdir())


def test_a_tensor_that_never_came_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    refused = pytest.raises(ValueError, match="never written: b")
    with refused, StreamedFile(path, {"a": TENSORS["a"], "b": TENSORS["b"]}, {}) as file:
        file.write("a", TENSORS["a"])
    assert not path.exists()


def convert(path: Path, **options) -> int:
    return save_model(plan_model(ASSETS / "tiny"), path, torch.float16, **options)


def test_two_writers_do_not_share_a_part(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with StreamedFile(path, TENSORS, {}) as first, StreamedFile(path, TENSORS, {}) as second:
        for name, tensor in TENSORS.items():
            first.write(name, tensor)
            second.write(name, tensor)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and set(load_file(path)) == set(TENSORS)


def test_a_second_conversion_to_one_name_is_told_and_hurts_nothing(tmp_path: Path) -> None:
    path, told = tmp_path / "x.safetensors", []

    def meanwhile(done: int, total: int) -> None:
        if not told:
            with pytest.raises(NextStepError, match=path.name) as caught:
                convert(path)
            told.append(str(caught.value))

    assert convert(path, report=meanwhile) == path.stat().st_size and "Another run" in told[0]
    assert [p.name for p in tmp_path.iterdir()] == [path.name] and plan_model(path)


def test_what_a_killed_conversion_left_is_removed_by_the_next(tmp_path: Path) -> None:
    for name in ("x.safetensors.0a1b2c3d.part", ".x.safetensors.lock", "y.safetensors.0a1b2c3d.part"):
        (tmp_path / name).touch()
    convert(tmp_path / "x.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.safetensors", "y.safetensors.0a1b2c3d.part"]


class LimitedFile(io.BytesIO):
    """A file on a disk that takes so many bytes."""

    holds = 0

    def write(self, data) -> int:
        if self.tell() + len(data) > self.holds:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


@pytest.mark.parametrize("holds", [10, 100_000, 1_000_000])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch, holds: int) -> None:
    opened = Path.open
    monkeypatch.setattr(LimitedFile, "holds", holds)
    monkeypatch.setattr(
        Path, "open", lambda self, mode="r", **o: LimitedFile() if mode == "xb" else opened(self, mode, **o)
    )
    with pytest.raises(NextStepError, match=r"no room for .*x\.safetensors.* GB are needed, .* GB free"):
        convert(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(single_file.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(NextStepError, match="no room"):
        convert(tmp_path / "x.safetensors", report=lambda *_: pytest.fail("weights were read"))
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    (tmp_path / "a_folder").mkdir()
    places = [tmp_path / "a_file" / "x.safetensors", tmp_path / "a_folder", tmp_path / ("x" * 300 + ".safetensors")]
    for place in places:
        with pytest.raises(NextStepError, match="written"):
            convert(place, report=lambda *_: pytest.fail("weights were read"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a_file", "a_folder"]


def test_a_file_carries_all_documents_and_its_name(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.safetensors"
    size = save_model(plan_model(ASSETS / "tiny", "int8"), path, torch.float16)
    assert size == path.stat().st_size and is_marked(path)
    documents, folder = find_documents(path), find_documents(ASSETS / "tiny")
    for name in CARRIED:
        assert documents.has(name) == folder.has(name)
        assert not folder.has(name) or documents.read(name) == folder.read(name)
    assert documents.name == "tiny" and documents.quantization == "int8"
    with safe_open(path, framework="pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    kinds = {"weight": "I8", "weight_scale": "BF16"}
    assert all(dtypes[f"layers.0.mlp.down_proj.{part}"] == dtype for part, dtype in kinds.items())
    assert dtypes["norm.weight"] == dtypes["embed_tokens.weight"] == "F16"


def test_the_config_beside_a_file_that_carries_none(pipeline, checkpoint: Path) -> None:
    """A plain `.safetensors` beside its config is read with it; a file without either is one sentence."""
    tensors = {n: t for n in (1, 2) for n, t in load_file(checkpoint / f"model-0000{n}-of-00002.safetensors").items()}
    from safetensors.torch import save_file

    save_file(tensors, checkpoint / "plain.safetensors")
    assert plan_model(checkpoint / "plain.safetensors").config == pipeline.engine.config
    (checkpoint / "config.json").unlink()
    with pytest.raises(NextStepError, match="config.json"):
        plan_model(checkpoint / "plain.safetensors")


def test_a_vae_file_is_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "vae.safetensors"
    assert save_vae(ASSETS / "tiny" / "vae", path, torch.float32) == path.stat().st_size
    vaes = [NextStepPipeline.from_pretrained("tiny", vae=vae, dtype=torch.float32).vae for vae in (None, path)]
    a, b = (vae.state_dict() for vae in vaes)
    assert all(torch.equal(a[name], b[name]) for name in a) and vaes[0].config == vaes[1].config


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "nextstep_core", "convert", "tiny", "--device", "cpu"]
        return subprocess.run([*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)

    model, vae = tmp_path / "model.safetensors", tmp_path / "vae.safetensors"
    done = run(model, "--quantization", "int4", "--dtype", "fp16")
    assert done.returncode == 0 and str(model) in done.stdout, done.stderr
    assert find_documents(model).quantization == "int4"
    assert run(vae, "--vae").returncode == 0
    assert {t.dtype for t in load_file(vae).values()} == {torch.bfloat16}
    drawn = NextStepPipeline.from_pretrained(model, vae=vae, dtype=torch.float32)
    assert drawn.generate("a red circle", height=32, width=32, steps=2).images.shape == (1, 32, 32, 3)
    wrong = run(tmp_path / "model.bin")
    assert wrong.returncode != 0 and "model.bin" in wrong.stderr and "Traceback" not in wrong.stderr


@pytest.mark.parametrize("name", ["a\0b.safetensors", "\ud800.safetensors", ""], ids=ascii)
def test_what_can_be_no_name_is_one_sentence(tmp_path: Path, name: str) -> None:
    with pytest.raises(NextStepError, match="cannot be the name of a file"):
        convert(tmp_path / name if name else Path(), report=lambda *_: pytest.fail("weights were read"))
    assert not list(tmp_path.iterdir())


def test_a_carried_name_is_short_or_none(tmp_path: Path) -> None:
    """Every picture that is drawn tells it."""
    for name, told in (("Mine", "Mine"), ("x" * 255, "x" * 255), ("x" * 256, tmp_path.name)):
        assert Documents(tmp_path, {NAME: name}).name == told

"""What `nextstep status` tells of the machine and of the models on it."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from benchmarks.subjects import PUBLISHED_CONFIG, PUBLISHED_VAE_CONFIG, SHAPES
from nextstep_core.decoding.estimate import Estimate
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig
from nextstep_core.studio import machine
from nextstep_core.studio.machine import Format, best, described, disk_free, fits, status

CPU, CUDA, GB = torch.device("cpu"), torch.device("cuda", 0), 10**9


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cached_models", "cached_vaes"):
        monkeypatch.setattr(f"nextstep_core.loading.catalog.{name}", dict)


@pytest.fixture
def a_second_a_token(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    asked: list[tuple] = []

    def estimated(*arguments: object) -> Estimate:
        asked.append(arguments)
        return Estimate(16, prompt=1.0, token=1.0, streaming=0.0, vae=3.0)

    monkeypatch.setattr(machine, "estimate", estimated)
    return asked


def test_everything_about_this_machine_becomes_json(golden: Path, tmp_path: Path, a_second_a_token) -> None:
    root = tmp_path / "models"
    shutil.copytree(golden / "tiny-a", root / "NextStep-1-Large-Edit")
    found = status([root], device=CPU, size=(64, 64))
    told = json.loads(json.dumps(asdict(found)))
    assert told["torch"] == torch.__version__ and told["kind"] == "CPU" and told["disk_free"] > 0
    assert told["host"]["total"] >= told["host"]["free"] > 0
    edit, tiny = found.models
    assert (edit.name, edit.purpose, edit.problem) == ("NextStep-1-Large-Edit", "editing", None)
    assert edit.path == str(root / "NextStep-1-Large-Edit") and edit.vae == str(Path(edit.path) / "vae")
    assert edit.bytes_on_disk == sum(file.stat().st_size for file in Path(edit.path).glob("*.safetensors"))
    assert (tiny.name, tiny.chosen, tiny.seconds) == ("tiny", "none", 1.0 + 16 + 3)
    assert [format.quantization for format in tiny.formats] == ["none", "int8", "int4", "fp8"]
    plan = plan_model(ASSETS / "tiny")
    assert tiny.formats[1].weights == plan.weight_bytes("int8", torch.float32) < tiny.formats[1].needed
    assert found.vaes == ("NextStep-1-Large-Edit/vae", "tiny (embedded)")


def test_a_broken_model_is_told_with_what_is_wrong(checkpoint: Path) -> None:
    (checkpoint / "tokenizer_config.json").write_text("{}")
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "nextstep"}))
    _, tiny = status([checkpoint.parent], device=CPU, times=False).models
    (broken, _) = status([checkpoint.parent], device=CPU, times=False).models
    assert broken.problem is not None and "config.json" in broken.problem and broken.formats == ()
    assert tiny.problem is None and tiny.seconds is None, "without times nothing is timed"


def published(monkeypatch: pytest.MonkeyPatch, memory: float) -> list[Format]:
    """The formats of a checkpoint of the published shape on a card with so many gigabytes free."""
    monkeypatch.setattr(machine, "room_bytes", lambda device: int(memory * GB))
    monkeypatch.setattr("nextstep_core.decoding.budget.room_bytes", lambda device: int(memory * GB))
    plan = replace(plan_model(ASSETS / "tiny"), config=NextStepConfig.from_dict(PUBLISHED_CONFIG | SHAPES["14b"]))
    return list(map(Format.of, fits(plan, PUBLISHED_VAE_CONFIG, CUDA, torch.bfloat16, (512, 512))))


@pytest.mark.parametrize(
    ("memory", "said", "chosen"),
    [
        (80, ("whole", "whole", "whole", "whole"), "none"),
        (24, ("streamed", "whole", "whole", "whole"), "int8"),
        (12, ("streamed", "streamed", "whole", "streamed"), "int4"),
        (6, ("streamed", "streamed", "streamed", "streamed"), "int4"),
        (1, ("no", "no", "no", "no"), None),
    ],
)
def test_what_fits_on_a_card_by_the_published_sizes(monkeypatch, memory: float, said: tuple, chosen) -> None:
    """26.8 GB as it is, 13.5 as int8 and fp8, 7.6 as int4; a picture of 512x512 and the VAE take about 2 more."""
    formats = published(monkeypatch, memory)
    assert tuple(format.fits for format in formats) == said
    assert formats[0].needed / GB == pytest.approx(26.8 + 0.2 + 1.2, abs=0.3)
    taken = best(formats)
    assert (taken and taken.quantization) == chosen
    for format in formats:
        assert (format.streamed > 0) == (format.fits == "streamed") and format.streamed <= format.weights


def test_what_is_stored_already_is_the_only_choice(monkeypatch: pytest.MonkeyPatch, a_second_a_token) -> None:
    of_a_gguf = plan_model(ASSETS / "tiny", "int8")
    stored = replace(of_a_gguf, stored=True)
    monkeypatch.setattr(machine, "plan_model", lambda *_: stored)
    model = described("tiny (embedded)", ASSETS / "tiny", [], CPU, (64, 32), times=True)
    assert [format.quantization for format in model.formats] == ["int8"] and model.chosen == "int8"
    (asked,) = a_second_a_token
    assert asked[3:5] == (32, 64) and asked[5] == CPU and asked[7:] == ("int8", 0), "height, width, recipe, streamed"
    of_file = fits(of_a_gguf, PUBLISHED_VAE_CONFIG, CPU, torch.float32, (64, 64))
    assert [fit.recipe for fit in of_file] == ["int8", "int4"], "auto takes the smaller where there is no room"


def test_a_device_without_room_for_timing_tells_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(machine, "estimate", fails)
    assert described("tiny", ASSETS / "tiny", [], CPU, (64, 64), times=True).seconds is None

    def breaks(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(machine, "estimate", breaks)
    with pytest.raises(RuntimeError, match="a bug"):
        described("tiny", ASSETS / "tiny", [], CPU, (64, 64), times=True)


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    free = disk_free(tmp_path / "not" / "yet")
    assert free is not None and free == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)


def test_a_file_that_goes_away_meanwhile_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine.kept, "source_files", lambda plan: [tmp_path / "gone.safetensors"])
    told = described("tiny", ASSETS / "tiny", (), CPU, (64, 64), times=False)
    assert told.problem is not None and "changed meanwhile" in told.problem

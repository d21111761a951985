"""`nextstep test`: a set-up that works, and pictures that are none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.studio import trial as trials
from nextstep_core.studio.finding import OK, PROBLEM, Finding
from nextstep_core.studio.trial import check_picture, same_in_file, trial

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def well(monkeypatch: pytest.MonkeyPatch) -> list[Finding]:
    """The doctor finds nothing; what it finds is tested beside it."""
    findings = [Finding(OK, "well")]
    monkeypatch.setattr(trials, "doctor", lambda *_, **__: list(findings))
    return findings


def test_the_embedded_model_draws_a_picture(tmp_path: Path) -> None:
    found = trial([tmp_path], output=tmp_path, device=CPU)
    assert found.works and found.load > 0 and found.picture > 0
    assert [f.verdict for f in found.findings] == [OK, OK] and "drew 64x64" in found.findings[-1].what
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


def test_a_set_up_with_a_problem_does_not_work_though_it_draws(well: list[Finding], tmp_path: Path) -> None:
    well.append(Finding(PROBLEM, "ill"))
    found = trial([tmp_path], device=CPU)
    assert not found.works and found.picture is not None


def test_a_model_that_is_damaged_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise NextStepError("The weights are damaged.")

    monkeypatch.setattr(NextStepPipeline, "from_pretrained", fails)
    found = trial([tmp_path], device=CPU)
    assert not found.works and (found.load, found.picture) == (None, None)
    assert found.findings[-1].what == "The weights are damaged."


GOOD = torch.rand(64, 64, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("picture", [torch.full((64, 64, 3), 0.5), GOOD / 100, GOOD / 0 - GOOD / 0, GOOD / 0])
def test_a_picture_that_shows_nothing_is_none(picture: torch.Tensor) -> None:
    with pytest.raises(NextStepError, match="shows nothing"):
        check_picture(picture, None)


def test_what_the_file_gives_back_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_picture(GOOD, tmp_path)
    plain = trials.save_picture

    def changed(path: Path, picture: torch.Tensor, format: str) -> None:
        picture = picture.clone()
        picture[3, 4, 1] = (picture[3, 4, 1] + 0.5) % 1
        plain(path, picture, format)

    monkeypatch.setattr(trials, "save_picture", changed)
    with pytest.raises(NextStepError, match="does not hold the picture"):
        check_picture(GOOD, tmp_path)
    plain(tmp_path / "other.png", GOOD[:32], "png")
    assert not same_in_file(tmp_path / "other.png", GOOD)


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(trials.tempfile, "TemporaryDirectory", refused)
    with pytest.raises(NextStepError, match=r"cannot be written \(Permission denied\)"):
        check_picture(GOOD, tmp_path)

"""The frames of a drawing: tokens appear in order, in the places where they were drawn, and nothing else changes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from nextstep_core import NextStepError
from nextstep_core.images import frames as module
from nextstep_core.images.frames import drawing_frames

ALL, NONE = torch.ones(2, 2, dtype=torch.bool), torch.zeros(1, 2, 2, dtype=torch.bool)


def picture(height: int = 32, width: int = 32, value: float = 1.0) -> Tensor:
    return torch.full((1, height, width, 3), value)


def places(frame: Tensor, rows: int = 2, columns: int = 2) -> list[int]:
    """1 for each token of a white picture that is there, 0 for one that is all gray, -1 for anything between."""
    height, width = frame.shape[0] // rows, frame.shape[1] // columns
    tokens = [
        frame[r * height : (r + 1) * height, c * width : (c + 1) * width] for r in range(rows) for c in range(columns)
    ]
    return [1 if (token == 1).all() else 0 if (token == 0.5).all() else -1 for token in tokens]


def test_tokens_appear_row_by_row_and_the_last_frame_stays() -> None:
    shots = drawing_frames(picture(), ALL, NONE, frames=4, hold=2, longest_side=512)
    assert shots.shape == (6, 32, 32, 3) and shots.dtype == torch.float32
    assert [places(shot) for shot in shots] == [
        [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1],
    ]  # fmt: skip


@pytest.mark.parametrize(("count", "there"), [(2, [2, 4]), (3, [2, 3, 4]), (8, [1, 1, 2, 2, 3, 3, 4, 4])])
def test_any_number_of_frames_is_spread_over_the_tokens(count: int, there: list[int]) -> None:
    shots = drawing_frames(picture(), ALL, NONE, count, 0, 512)
    assert [sum(places(shot)) for shot in shots] == there


def test_what_was_kept_is_there_from_the_start() -> None:
    drawn = torch.tensor([[False, True], [False, True]])
    shots = drawing_frames(picture(), drawn, NONE, 2, 0, 512)
    assert [places(shot) for shot in shots] == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_an_interrupted_run_gives_the_frames_so_far() -> None:
    blank = torch.tensor([[[False, False], [True, True]]])
    shots = drawing_frames(picture(), ALL, blank, 2, 1, 512)
    assert [places(shot) for shot in shots] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]
    assert (drawing_frames(picture(), ALL, torch.ones(1, 2, 2, dtype=torch.bool), 2, 0, 512) == 0.5).all()


def test_the_pictures_of_a_batch_stand_side_by_side_each_as_far_as_it_came() -> None:
    blank = torch.zeros(3, 2, 2, dtype=torch.bool)
    blank[2] = True
    shots = drawing_frames(picture().repeat(3, 1, 1, 1), ALL, blank, 4, 0, 512)
    assert shots.shape == (4, 64, 64, 3)
    for shot in shots:
        assert torch.equal(shot[:32, :32], shot[:32, 32:]), "drawn together"
        assert (shot[32:] == 0.5).all(), "one is not begun, and one is none"


@pytest.mark.parametrize("size", [(48, 32), (512, 288), (992, 400), (2048, 16)])
def test_sides_are_even_and_at_most_as_long_as_asked(size: tuple[int, int]) -> None:
    height, width = drawing_frames(picture(*size), ALL, NONE, 2, 0, 200).shape[1:3]
    assert height % 2 == 0 == width % 2 and max(height, width) <= 200
    assert width == pytest.approx(size[1] * min(1, 200 / size[0]), abs=2)


def test_pixels_stay_what_they_are_where_nothing_is_reduced() -> None:
    photo = torch.rand(1, 32, 48, 3, generator=torch.Generator().manual_seed(0))
    shots = drawing_frames(photo, torch.ones(2, 3, dtype=torch.bool), torch.zeros(1, 2, 3, dtype=torch.bool), 6, 0, 64)
    assert torch.equal(shots[-1], photo[0])
    for earlier, later in pairwise(shots):
        there = earlier != 0.5
        assert torch.equal(earlier[there], later[there]), "what is there stays as it is"


def test_more_than_memory_holds_is_one_sentence(monkeypatch) -> None:
    needed = []
    monkeypatch.setattr(module, "check_room", lambda size, what: needed.append((size, str(what))))
    drawing_frames(picture(), ALL, NONE, 4, 1, 512)
    assert needed == [(2 * 5 * 32 * 32 * 3 * 4, "5 frames of 32x32 pixels")]


def test_it_can_be_stopped_between_frames() -> None:
    def stop() -> None:
        raise NextStepError("stopped")

    with pytest.raises(NextStepError, match="stopped"):
        drawing_frames(picture(), ALL, NONE, 2, 0, 512, stop)

"""The one exception type, and what counts as a lack of memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nextstep_core
from nextstep_core.errors import NextStepError, check_choice, damaged, is_out_of_memory


def test_a_choice_is_named_with_all_others() -> None:
    check_choice("size", 2, [1, 2])
    check_choice("size", "b", {"a": 1, "b": 2})
    with pytest.raises(NextStepError, match=r"^size is 'c'; choose one of a, b\.$"):
        check_choice("size", "c", (name for name in "ab"))
    for number in (0, 1, 1.0):  # equal to a choice, and not one
        with pytest.raises(NextStepError, match=r"choose one of True, False"):
            check_choice("cuda_graphs", number, (True, False))


def test_a_damaged_file_is_named_with_the_reason() -> None:
    error = damaged(Path("x.pt"), ValueError("too short"))
    assert isinstance(error, ValueError) and "x.pt" in str(error) and "too short" in str(error)


def test_lack_of_memory_is_told_by_type_or_by_word() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("whatever"))
    assert is_out_of_memory(RuntimeError("DefaultCPUAllocator: not enough memory"))
    assert not is_out_of_memory(RuntimeError("whatever"))


def test_public_names_are_there_and_no_others() -> None:
    assert nextstep_core.NextStepError is NextStepError
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = nextstep_core.Engine
    for name in nextstep_core.__all__:
        assert getattr(nextstep_core, name).__name__ == name

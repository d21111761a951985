"""What `scripts.clients` makes of what the tools say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from scripts.clients import ACCEPTED, small, unexpected
from scripts.workflows import ALL, read_workflow

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ("[SYNTAX] PASSED\n[warnings] a level says nothing", []),
        ("[warnings] weights -- weights outside the pack\n[hazards] cache-clear-in-loop -- free", []),
        ("[hazards] pickle-load -- weights\n[warnings] weights -- x\n", ["pickle-load"]),
        ("  Line 33: torch.load() ? use\n  Line 7: torch.hub.load() ? use", ["torch.hub.load()"]),
    ],
)  # fmt: skip
def test_a_remark_that_nobody_judged_is_a_finding(said: str, found: list[str]) -> None:
    assert unexpected(said) == found
    assert all(ACCEPTED.values()), "each with a reason"


def test_comfy_test_s_levels_end_with_drawing() -> None:
    stated = (ROOT / "comfy-test.toml").read_text().split("levels = [")[1].split("]")[0]
    levels = re.findall(r'"(\w+)"', stated)
    assert levels[-1] == "execution_light" and len(set(levels)) == len(levels)


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_a_template_is_made_small_in_its_own_form(path: Path) -> None:
    before, after = read_workflow(path), small(read_workflow(path))
    values = [node["widgets_values"] for node in after["nodes"] if node["type"].startswith("NextStep")]
    assert "tiny (embedded)" in str(values) and "downloads" not in str(values)
    changed = [old != new for old, new in zip(before["nodes"], after["nodes"], strict=True)]
    assert {node["type"] for node, new in zip(after["nodes"], changed) if new} <= {
        "NextStepModelLoader", "NextStepVAELoader", "NextStepSampler", "NextStepEmptyLatent", "NextStepAspectRatio",
        "NextStepEditEncode", "NextStepPreparePicture", "NextStepCompare",
    }  # fmt: skip

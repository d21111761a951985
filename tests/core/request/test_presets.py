"""Presets: the built-in ones by hand, and a user's file, right and wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from nextstep_core import NextStepError
from nextstep_core.request.presets import BUILT_IN, all_presets, find_preset, preset_names
from nextstep_core.sampling.settings import GenerationSettings

PUBLISHED = GenerationSettings(cfg=7.0, cfg_img=2.0, steps=33, shift=3.2)


def written(folder: Path, presets: Any) -> Path:
    file = folder / "nextstep_presets.json"
    file.write_text(presets if isinstance(presets, str) else json.dumps(presets))
    return file


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("draft", (512, 512, 20, 6.0, 2.0, 3.2)),
        ("standard", (768, 768, 28, 7.5, 2.0, 3.2)),
        ("premium", (1024, 1024, 40, 8.5, 2.0, 3.2)),
        ("published", (512, 512, 33, 7.0, 2.0, 3.2)),
        ("edit", (512, 512, 33, 7.0, 2.0, 3.2)),
    ],
)
def test_built_in_presets_leave_open_what_a_checkpoint_states(tmp_path: Path, name: str, expected: tuple) -> None:
    preset = find_preset(name, tmp_path / "none.json")
    chosen = preset.over(PUBLISHED)
    assert (preset.width, preset.height, chosen.steps, chosen.cfg, chosen.cfg_img, chosen.shift) == expected
    assert preset.editing == (name == "edit") == bool(preset.negative_prompt)
    assert bool(preset.note) == (preset.width > 512), "a size that is not recommended is told"


def test_a_file_adds_presets_and_changes_only_what_it_states(tmp_path: Path) -> None:
    file = written(tmp_path, {"wide": {"width": 672, "height": 384, "note": "mine"}, "draft": {"steps": 12}})
    presets = all_presets(file)
    assert list(presets) == [*BUILT_IN, "wide"]
    assert (presets["draft"].steps, presets["draft"].cfg) == (12, 6.0)
    assert (presets["wide"].width, presets["wide"].steps, presets["wide"].note) == (672, None, "mine")
    assert BUILT_IN["draft"].steps == 20


WRONG = {
    "not JSON": ("{", "not readable JSON"),
    "a list": ("[]", "JSON list, not an object"),
    "twice": ('{"a": {}, "a": {}}', "'a' appears twice"),
    "deep": ("[" * 100_000, "Mend it, or remove it"),
    "no object": ({"a": 3}, "'a' is 3; write an object"),
    "unknown key": ({"a": {"stps": 3}}, "a key is 'stps'; choose one of width, height, steps"),
    "range": ({"a": {"steps": 0}}, "'a': steps is 0; use a whole number from 1 to 1000"),
    "text for a number": ({"a": {"cfg": "7"}}, "cfg is '7'"),
    "true": ({"a": {"steps": True}}, "steps is True"),
    "not whole tokens": ({"a": {"width": 500}}, "width is 500; use a multiple of 16, such as 496"),
    "huge": ({"a": {"height": 10**9}}, "height is 1000000000"),
    "no width": ({"a": {"width": None}}, "width is None"),
    "number for a text": ({"a": {"negative_prompt": 5}}, "negative_prompt is 5; it must be text"),
    "no truth": ({"a": {"editing": 1}}, "editing is 1; write true or false"),
    "no name": ({"": {}}, "cannot be the name of a preset"),
    "long name": ({"x" * 61: {}}, "cannot be the name of a preset"),
    "lines": ({"a\nb": {}}, "cannot be the name of a preset"),
    "many": ({str(n): {} for n in range(101)}, "101 presets; at most 100"),
    "too large": (" " * (2 << 20), "at most 1,048,576"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_one_sentence_when_used_and_no_trouble_in_a_list(tmp_path: Path, name: str) -> None:
    presets, sentence = WRONG[name]
    file = written(tmp_path, presets)
    with pytest.raises(NextStepError) as caught:
        find_preset("draft", file)
    assert sentence in str(caught.value) and len(str(caught.value)) < 600
    assert preset_names(file) == list(BUILT_IN)


def test_what_is_no_file_is_no_trouble_either(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert preset_names(tmp_path / "pipe") == list(BUILT_IN)
    assert preset_names(tmp_path / "absent" / "x") == list(BUILT_IN)
    (tmp_path / "file").touch()
    assert preset_names(tmp_path / "file" / "below") == list(BUILT_IN)


def test_an_unknown_preset_names_the_known(tmp_path: Path) -> None:
    file = written(tmp_path, {"mine": {}})
    with pytest.raises(
        NextStepError, match="preset is 'x'; choose one of draft, standard, premium, published, edit, mine"
    ):
        find_preset("x", file)

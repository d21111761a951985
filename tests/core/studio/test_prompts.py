"""Sets of prompts: what a file says, templates counted before they are expanded, and what is wrong with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nextstep_core import NextStepError
from nextstep_core.studio.prompts import PROMPTS, Lists, Prompt, expand, fill, parse_lists, read_prompts


def file(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("p.txt", "a cat\n\n# not this\n  a dog \n", [Prompt("a cat", line=1), Prompt("a dog", line=4)]),
        ("p.txt", "\ufeffein Kätzchen\r\n고양이", [Prompt("ein Kätzchen", line=1), Prompt("고양이", line=2)]),
        (
            "p.csv",
            'prompt,name,negative_prompt\n"a cat, a hat",tom,\na dog,,blurry\n',
            [Prompt("a cat, a hat", None, "tom", 2), Prompt("a dog", "blurry", "", 3)],
        ),
        (
            "p.json",
            '{"prompts": ["a cat", {"prompt": "a dog", "name": "rex"}]}',
            [Prompt("a cat"), Prompt("a dog", None, "rex")],
        ),
    ],
)
def test_a_file_of_prompts(tmp_path: Path, name: str, text: str, expected: list[Prompt]) -> None:
    assert read_prompts(file(tmp_path, name, text)) == expected


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.txt", "# only this\n", "holds no prompt"),
        ("p.csv", "text\na cat\n", 'no column "prompt"'),
        ("p.csv", "prompt\na cat\n\n\na, dog\n", "line 5 has more columns"),
        ("p.csv", "prompt,seed\na cat,1\n", "'seed'"),
        ("p.csv", 'prompt\n"a cat\n', "not a readable table"),
        ("p.csv", "prompt,name\n ,tom\n", "line 2: the prompt is empty"),
        ("p.json", '{"prompts": "a cat"}', "write a list"),
        ("p.json", '{"prompts": ["a", 3]}', "prompt 2 is 3"),
        ("p.exe", "a", "'.exe'"),
    ],
)
def test_what_is_wrong_with_one(tmp_path: Path, name: str, text: str, said: str) -> None:
    with pytest.raises(NextStepError) as error:
        read_prompts(file(tmp_path, name, text))
    assert said in str(error.value)


def test_a_file_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(NextStepError, match="does not exist"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NextStepError, match="UTF-8"):
        read_prompts(tmp_path / "p.txt")


def test_a_grid_runs_its_last_list_fastest_and_a_zip_takes_them_side_by_side() -> None:
    values = {"color": ("red", "blue"), "thing": ("cup", "hat")}
    text = "a {color} {thing}"
    assert expand([text], Lists(values)) == ["a red cup", "a red hat", "a blue cup", "a blue hat"]
    assert expand([text], Lists(values, "zip")) == ["a red cup", "a blue hat"]
    assert expand(["a {color} one", "{thing}"], Lists(values)) == ["a red one", "a blue one", "cup", "hat"]


def test_a_value_with_braces_is_not_filled_again() -> None:
    assert fill("{a} {b}", {"a": "{b}", "b": "x"}) == "{b} x"


def test_too_many_are_refused_before_any_is_made() -> None:
    values = {name: tuple(map(str, range(1000))) for name in "abcd"}
    lists = Lists(values)
    assert lists.count("{a}{b}{c}{d}") == 10**12
    with pytest.raises(NextStepError, match=str(PROMPTS.maximum)):
        expand(["{a}{b}{c}{d}"], lists)


@pytest.mark.parametrize(
    ("text", "lists", "combine", "said"),
    [
        ("a {color}", {}, "grid", "{color}"),
        ("a", {"color": ("red",)}, "grid", "Write {color} in one"),
        ("{color}", {"color": ()}, "grid", "empty"),
        ("{a}{b}", {"a": ("1", "2"), "b": ("1",)}, "zip", "a 2, b 1"),
        ("{a}", {"a": ("1",)}, "mix", "mix"),
    ],
)
def test_lists_that_do_not_fit(text: str, lists: dict[str, tuple[str, ...]], combine: str, said: str) -> None:
    with pytest.raises(NextStepError) as error:
        expand([text], Lists(lists, combine))
    assert said in str(error.value)


def test_lists_as_people_write_them() -> None:
    lists = parse_lists("color: red | dark blue\n\nthing: cup", "zip")
    assert lists == Lists({"color": ("red", "dark blue"), "thing": ("cup",)}, "zip")
    for wrong in ("red | blue", "a b: red", "a: 1\na: 2"):
        with pytest.raises(NextStepError, match="line"):
            parse_lists(wrong, "grid")

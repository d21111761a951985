"""The changes that scripts.mutate makes, by hand."""

from __future__ import annotations

from pathlib import Path

from scripts.mutate import changes, function_at

SOURCE = '''"""Of 3 things."""

import os


def size(a: int, b: float = 2) -> int:
    """Not changed: 5."""
    if a < 1 and not b:
        raise ValueError(f"{a + 1} is 2 much, é")
    print(9)
    return max(a, -b) if a else a.float().sum(dim=0)
'''
CHANGED = [
    "size(a: int, b: float = 3)",
    "if (a < 1 or not b):",
    "if (a < 1):",
    "if (not b):",
    "if (a <= 1) and",
    "if a < 2 and",
    "and (b):",
    "        pass\n    print(9)",
    "return (a.float().sum(dim=0) if a else max(a, -b))",
    "(max(-b, a)) if a",
    "(min(a, -b)) if a",
    "max(a, (b)) if a",
    "(a.float().sum())",
    "(a).sum(dim=0)",
    "sum(dim=1)",
]


def test_every_change_by_hand(tmp_path: Path) -> None:
    """Messages, docstrings, annotations, imports and what only says something stay as they are."""
    path = tmp_path / "x.py"
    path.write_text(SOURCE, encoding="utf-8")
    made = [change.apply(SOURCE) for change in changes(path)]
    assert all(sum(text in source for source in made) == 1 for text in CHANGED)
    assert len(made) == len(CHANGED)
    for source in made:
        compile(source, "x.py", "exec")


def test_the_function_around_a_place() -> None:
    assert function_at(SOURCE, SOURCE.index("print")) == 6
    assert function_at(SOURCE, SOURCE.index("import os")) == 0

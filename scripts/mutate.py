"""Changes the engine at random, one small thing at a time, and tells which changes no test notices.

    python -m scripts.mutate --count 100 --seed 1 [--room loading]

Every change is made in a temporary copy and meets the tests of tests/core that reach the changed function, quick ones
first. A survivor is a missing test, or a change that makes no difference: read it and decide. Tests run in forked
processes that have the libraries loaded already, so this needs a system that forks.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from types import FrameType
from typing import TypeAlias

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGINE = "nextstep_core"
FORK = multiprocessing.get_context("fork")
Place: TypeAlias = tuple[str, int]  # a file of the engine, and the first line of a function in it
PATIENCE = 10  # a change may make a loop endless: so many times longer than without it, and not less than a minute
COPIED = (ENGINE, "nodes", "scripts", "tests", "training", "benchmarks", "pyproject.toml", "requirements.txt")
OTHER = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
CASTS = {"to", "float", "bfloat16", "int", "clone", "clamp", "clamp_min", "cpu", "view_as", "copy", "resolve", "lower"}
LIBRARIES = ("torch", "torch._dynamo", "numpy", "einops", "safetensors.torch", "PIL.Image", "tokenizers")
SILENT = ("log.", "print(", "parser.", "'", '"')  # statements that only say something, and docstrings


@dataclass(frozen=True)
class Change:
    """A piece of a file's source, and what stands there instead."""

    path: Path
    start: int
    stop: int
    text: str

    def apply(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.stop :]


def variants(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a node."""
    if isinstance(node, ast.Compare) and type(node.ops[0]) in OTHER:
        yield ast.Compare(node.left, [OTHER[type(node.ops[0])](), *node.ops[1:]], node.comparators)
    elif isinstance(node, ast.BoolOp):
        yield from (ast.BoolOp(OTHER[type(node.op)](), node.values), *node.values)
    elif isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        yield ast.BinOp(node.left, OTHER[type(node.op)](), node.right)
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.IfExp):
        yield ast.IfExp(node.test, node.orelse, node.body)
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield repr(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield repr(node.value + 1 if isinstance(node.value, int) else node.value * 1.5 or 1.0)
    elif isinstance(node, ast.Call):
        yield from calls(node)
    elif isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise)):
        yield "pass"


def calls(node: ast.Call) -> Iterator[ast.AST]:
    """What may stand in the place of a call: other arguments, another function, or what it converts."""
    name = getattr(node.func, "id", None)
    starred = any(isinstance(argument, ast.Starred) for argument in node.args[:2])
    if len(node.args) > 1 and not starred and name not in ("max", "min"):
        yield ast.Call(node.func, [node.args[1], node.args[0], *node.args[2:]], node.keywords)
    if node.keywords and node.keywords[-1].arg not in (None, "dtype", "device"):
        yield ast.Call(node.func, node.args, node.keywords[:-1])
    if isinstance(node.func, ast.Attribute) and node.func.attr in CASTS:
        yield node.func.value
    if name in ("max", "min"):
        yield ast.Call(ast.Name("min" if name == "max" else "max"), node.args, node.keywords)
    if name in ("float", "int", "round", "abs", "list"):
        yield node.args[0]


def changes(path: Path) -> Iterator[Change]:
    """Every single change of a file; messages, annotations and what only type checkers read stay as they are."""
    source = path.read_text(encoding="utf-8")
    starts = [0]
    for line in source.encode().split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)

    def place(line: int, column: int) -> int:
        return len(source.encode()[: starts[line - 1] + column].decode())

    def walk(node: ast.AST) -> Iterator[Change]:
        skipped = isinstance(node, (ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Assert))
        silent = isinstance(node, ast.Expr) and ast.unparse(node).startswith(SILENT)
        if skipped or silent or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            return
        for variant in variants(node):
            text = variant if isinstance(variant, str) else ast.unparse(variant)
            if text == ast.unparse(node):  # arguments that are the same
                continue
            text = f"({text})" if isinstance(node, ast.expr) and not isinstance(node, ast.Constant) else text
            start, stop = place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)
            yield Change(path, start, stop, text)
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list", "type_comment"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from walk(child)

    yield from walk(ast.parse(source))


class Reached:
    """A pytest plugin that records which functions of the engine each test reaches, and how long it takes."""

    def __init__(self, folder: Path) -> None:
        self.engine, self.current = f"{folder / ENGINE}/", set()
        self.tests: dict[str, tuple[float, set[Place]]] = {}
        self.shared: set[Place] = set()  # by fixtures of several tests

    def _call(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(self.engine):
            self.current.add((frame.f_code.co_filename.removeprefix(self.engine), frame.f_code.co_firstlineno))

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.current, started = set(), time.monotonic()
        sys.setprofile(self._call)
        yield
        sys.setprofile(None)
        self.tests[item.nodeid] = time.monotonic() - started, self.current

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef) -> Iterator[None]:
        before = self.current
        self.current = before if fixturedef.scope == "function" else self.shared
        yield
        self.current = before

    def order(self, place: Place) -> list[str]:
        """The tests that may notice a change at a place, the file that takes least first."""
        file, line = place
        everywhere = not line or place in self.shared
        seconds = {
            test: took
            for test, (took, reached) in self.tests.items()
            if everywhere
            or place in reached
            or (not reached and f"/{file.split('/')[0]}/" in test)  # in a process of its own
        }
        of_file: Counter[str] = Counter()
        for test, took in seconds.items():
            of_file[test.split("::")[0]] += took
        return sorted(seconds, key=lambda test: (of_file[test.split("::")[0]], test.split("::")[0]))


def function_at(source: str, offset: int) -> int:
    """The first line of the function around an offset; 0 for what is done when the module is imported."""
    line, found = source.count("\n", 0, offset) + 1, 0
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and node.body[0].lineno <= line <= node.end_lineno:
            found = max(found, min([node.lineno, *(d.lineno for d in node.decorator_list)]))
    return found


def _run(folder: Path, arguments: list[str], told: SimpleQueue | None) -> None:
    os.chdir(folder)
    sys.path[:] = [str(folder), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    if told is None:  # bytecode of a change would outlive it
        sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    plugin = Reached(folder)
    options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", *arguments]
    code = pytest.main(options, plugins=[] if told is None else [plugin])
    if told is not None:
        told.put(plugin)
    os._exit(code)


def notices(
    folder: Path, arguments: list[str], told: SimpleQueue | None = None, limit: float | None = None
) -> Reached | bool:
    """Whether pytest fails in `folder`, or does not end; `told` gets what the tests reach."""
    process = FORK.Process(target=_run, args=(folder, arguments, told))
    process.start()
    reached = None if told is None else told.get()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
    return reached if reached is not None and not process.exitcode else process.exitcode != 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--room", default="", help="a folder or file of the engine: loading, or runtime/graphs.py")
    parser.add_argument("--skip", nargs="*", default=[], help="folders or files to leave alone")
    parser.add_argument("--marks", default="fast or slow", help="which tests; all but the slow ones see nearly as much")
    options = parser.parse_args()
    for library in LIBRARIES:
        importlib.import_module(library)  # once, and not in every fork
    names = {path: path.relative_to(ROOT / ENGINE).as_posix() for path in sorted((ROOT / ENGINE).rglob("*.py"))}
    chosen = [p for p, n in names.items() if n.startswith(options.room) and not n.startswith(tuple(options.skip))]
    every = [change for path in chosen for change in changes(path)]
    sample = random.Random(options.seed).sample(every, min(options.count, len(every)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve() / "copy"
        folder.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        reached = notices(folder, ["tests/core", "-m", options.marks], FORK.SimpleQueue())
        if not isinstance(reached, Reached):
            sys.exit("The tests fail without any change.")
        noticed, started = 0, time.monotonic()
        print(f"{len(sample)} of {len(every)} changes", flush=True)
        for n, change in enumerate(sample, 1):
            source, path = change.path.read_text(encoding="utf-8"), folder / change.path.relative_to(ROOT)
            path.write_text(change.apply(source), encoding="utf-8")
            tests = reached.order((names[change.path], function_at(source, change.start)))
            limit = max(60.0, PATIENCE * sum(reached.tests[test][0] for test in tests))
            seen = bool(tests) and notices(folder, tests, limit=limit)
            shutil.copy2(change.path, path)  # with its time, so that its bytecode holds again
            noticed += seen
            if not seen:
                name = str(change.path.relative_to(ROOT))
                before, after = source.splitlines(), change.apply(source).splitlines()
                lines = difflib.unified_diff(before, after, "", name, n=0, lineterm="")
                print("\n".join(["", f"{len(tests)} tests reach this:", *list(lines)[1:]]), flush=True)
            if n % 10 == 0 or n == len(sample):
                print(f"{noticed} of {n} noticed ({noticed / n:.0%}), {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()

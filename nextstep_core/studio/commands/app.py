"""The application: its errors, its exit codes, its output as text or JSON."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

from ... import __version__
from ...errors import NextStepError

FAILED, INCOMPLETE, STOPPED = 1, 3, 130  # exit codes; 2 is that of a wrong command line
Result = TypeVar("Result")

app = typer.Typer(
    name="nextstep",
    help="Draw pictures with NextStep-1: one, a hundred, or a change to one of yours.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Try it at once with the small embedded model: nextstep generate 'a red circle' --model tiny",
)
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


@dataclass(frozen=True)
class Output:
    """Where results go: text for people, or one JSON object. Progress and remarks go to the other stream. What is
    `silent` leaves all of it to another process."""

    as_json: bool
    silent: bool = False

    @property
    def remarks(self) -> Console:
        """For what is no result."""
        return Console(stderr=True, highlight=False)

    def result(self, values: dict[str, Any], *lines: str) -> None:
        """The result, as JSON or as these lines."""
        if self.silent:
            return
        print(json.dumps(values, ensure_ascii=False, indent=2) if self.as_json else "\n".join(lines))

    def show(self, table: Any) -> None:
        """A result that is laid out for the terminal's width."""
        Console(highlight=False).print(table)

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[float, str], None]]:
        """A progress bar; call with the share that is done and a few words."""
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        console = self.remarks
        with Progress(
            *columns, console=console, transient=True, disable=self.silent or not console.is_terminal
        ) as progress:
            task = progress.add_task(what, total=1.0)

            def show(share: float, words: str) -> None:
                progress.update(task, completed=share, description=words)

            yield show


def command(name: str, *examples: str) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """Register a command with its examples. What is wrong becomes one sentence and an exit code."""

    def register(function: Callable[..., Result]) -> Callable[..., Result]:
        @wraps(function)
        def run(*args: Any, **options: Any) -> Result:
            as_json = bool(options.get("as_json"))
            try:
                return function(*args, **options)
            except NextStepError as error:
                fail(str(error), as_json)
            except KeyboardInterrupt:
                Output(as_json).remarks.print("Stopped.")
                raise typer.Exit(STOPPED) from None

        text = "\n\n".join(f"[dim]$[/dim] {example}" for example in examples)
        app.command(name, epilog=text, no_args_is_help=False)(run)
        return run

    return register


def fail(sentence: str, as_json: bool = False) -> NoReturn:
    """End with a sentence that says what is wrong."""
    if as_json:
        print(json.dumps({"error": sentence}, ensure_ascii=False))
    else:
        Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, style="red", markup=False)
    raise typer.Exit(FAILED)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"nextstep {__version__}")
        raise typer.Exit()


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what is logged.")] = False,
) -> None:
    logging.basicConfig(level=logging.INFO if verbose else logging.WARNING, stream=sys.stderr, format="%(message)s")

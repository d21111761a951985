"""The machine: what it has, what is wrong with the set-up, and how fast it draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from ...errors import NextStepError
from ...runtime.chosen import ledger_of, measured
from ...runtime.memory import format_bytes
from ..bench import bench as measure
from ..doctor import doctor as examine
from ..finding import OK, PROBLEM, Finding
from ..job_keys import SETTINGS
from ..machine import SIZE, Memory, Model
from ..machine import status as ask
from ..model_choice import PLAIN, ModelChoice, model_folders, pick_device
from ..quality import measure_quality
from ..trial import trial
from .app import FAILED, Json, Output, command
from .model import Device, Dtype, MaxMemory, ModelFolder, ModelName, Quantization

SIGNS = {OK: "[green]ok[/green]", PROBLEM: "[red]problem[/red]"}
HOW = {"whole": "fits", "streamed": "fits, streamed", "no": "too large"}
Folder = Annotated[Path | None, typer.Option("--output", "-o", help="A folder for pictures, to see whether it works.")]


def sides_of(size: str) -> tuple[int, int]:
    """(width, height) of what --size says; NextStepError for a ratio, which has no pixels here."""
    sides: tuple[int, int] | str = SETTINGS["size"].check("--size", size)
    if isinstance(sides, str):
        raise NextStepError("--size is {size}; write 512 or 768x512.", size=size)
    return sides


@command("status", "nextstep status", "nextstep status --size 1024 --json")
def status(
    models: ModelFolder = None,
    size: Annotated[
        str, typer.Option("--size", help="Of the picture whose time is estimated.")
    ] = f"{SIZE[0]}x{SIZE[1]}",
    quick: Annotated[bool, typer.Option("--quick", help="Leave out how long a picture takes.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Show the machine, the models, what fits in which format and how long a picture takes."""
    out, sides = Output(as_json), sides_of(size)
    folders = model_folders(models)
    with out.bar("Looking"):
        found = ask(folders, folders, device=pick_device(device), size=sides, times=not quick)
    if as_json:
        out.result(asdict(found))
        return
    facts = Table.grid(padding=(0, 2))
    for name, value in {
        "NextStep": found.nextstep,
        "Python": f"{found.python} on {found.system}",
        "PyTorch": found.torch,
        "Device": f"{found.device} ({found.kind})",
        "Memory": in_words(found.memory),
        "Computer": in_words(found.host),
        "Disk": f"{format_bytes(found.disk_free)} free in {found.folder}" if found.disk_free is not None else "unknown",
        "VAEs": ", ".join(found.vaes) or "none beside the models' own",
    }.items():
        facts.add_row(f"[bold]{name}[/bold]", escape(value))
    out.show(facts)
    table = Table("Model", "For", "Formats", f"A picture of {sides[0]}x{sides[1]}")
    for model in found.models:
        table.add_row(escape(model.name), model.purpose or "", formats_of(model), time_of(model))
    out.show(table)


def in_words(memory: Memory) -> str:
    """Free and in all, as far as the system tells."""
    parts = (("free", memory.free), ("in all", memory.total))
    return ", ".join(f"{format_bytes(size)} {name}" for name, size in parts if size is not None) or "unknown"


def formats_of(model: Model) -> str:
    """What of a model fits, or what is wrong with it."""
    if model.problem:
        return f"[red]{escape(model.problem)}[/red]"
    return "\n".join(
        f"{form.quantization}: {format_bytes(form.weights)}, {HOW[form.fits]}"
        + (" <-" if form.quantization == model.chosen else "")
        for form in model.formats
    )


def time_of(model: Model) -> str:
    """About how long a picture takes, in the format that would be chosen."""
    if model.seconds is None:
        return ""
    minutes, seconds = divmod(round(model.seconds), 60)
    return f"about {minutes} min {seconds} s" if minutes else f"about {model.seconds:.1f} s"


def show_findings(out: Output, findings: Sequence[Finding]) -> None:
    """One line each, and what to do about it."""
    table = Table.grid(padding=(0, 2))
    for finding in findings:
        sign = SIGNS.get(finding.verdict, f"[yellow]{finding.verdict}[/yellow]")
        table.add_row(
            sign, escape(finding.what) + (f"\n[bold]{escape(finding.remedy)}[/bold]" if finding.remedy else "")
        )
    out.show(table)


@command("doctor", "nextstep doctor", "nextstep doctor --models /data/models --output pictures")
def doctor(
    models: ModelFolder = None,
    output: Folder = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Look for the usual mistakes, and say what to do. Changes nothing."""
    out, folders = Output(as_json), model_folders(models)
    computing = pick_device(device)
    findings = examine(folders, folders, output=output, device=computing)
    outcomes = list(ledger_of(computing).outcomes.values())
    if as_json:
        products = [outcome.as_data() for outcome in outcomes]
        out.result({"findings": [asdict(finding) for finding in findings], "products": products})
    else:
        show_findings(out, findings)
        if outcomes:
            out.show(escape(measured(computing, outcomes)))
    if any(finding.verdict == PROBLEM for finding in findings):
        raise typer.Exit(FAILED)


@command("test", "nextstep test")
def test(
    models: ModelFolder = None,
    output: Folder = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Check the set-up and draw a picture with the small embedded model."""
    out, folders = Output(as_json), model_folders(models)
    with out.bar("Drawing a picture"):
        found = trial(folders, folders, output=output, device=pick_device(device))
    if as_json:
        out.result({"works": found.works, **asdict(found)})
    else:
        show_findings(
            out, [finding for finding in found.findings if finding.verdict != OK or finding is found.findings[-1]]
        )
        print("It works." if found.works else "It does not work yet.")
    if not found.works:
        raise typer.Exit(FAILED)


@command(
    "bench", "nextstep bench --model NextStep-1.1 --quantization int8", "nextstep bench --model tiny --size 64 --json"
)
def bench(
    model: ModelName = None,
    models: ModelFolder = None,
    size: Annotated[str, typer.Option("--size", help='512 or "768x512".')] = "512",
    runs: Annotated[int, typer.Option("--runs", help="Pictures that count.")] = 3,
    steps: Annotated[int | None, typer.Option("--steps", help="Sampling steps for each token.")] = None,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure how fast a model draws, and how near that is to what the memory allows."""
    out, sides = Output(as_json), sides_of(size)
    with out.bar("Loading the model") as show:
        started = time.perf_counter()
        artist = ModelChoice(model, models, quantization, max_memory, device, dtype).load()
        load = time.perf_counter() - started
        show(0.2, "Drawing")
        found = measure(
            artist.pipeline,
            artist.facts["Model"],
            width=sides[0],
            height=sides[1],
            runs=runs,
            steps=steps,
            load=load,
            quality=lambda picture: measure_quality(picture).total,
        )
    table = Table.grid(padding=(0, 2))
    for name, value in {
        "Model": f"{found.model} as {found.weights} on {found.device}",
        "Picture": f"{found.picture.median:.2f} s ({found.picture.lowest:.2f} to {found.picture.highest:.2f})",
        "Pictures a minute": f"{found.pictures_per_minute:.2f}",
        "Prompt": f"{found.prompt.median:.3f} s",
        "Token": f"{1000 * found.token.median:.2f} ms",
        "VAE": f"{found.vae.median:.2f} s",
        "Quality": f"{found.quality.median:.2f}" if found.quality is not None else "not measured",
        "Least by memory": f"{1000 * found.floor:.2f} ms a token; {found.share:.0%} of it reached",
    }.items():
        table.add_row(f"[bold]{name}[/bold]", escape(value))
    if as_json:
        out.result(asdict(found))
    else:
        out.show(table)

"""Calibration: what a model draws of a few prompts, kept so that its weights can be stored as int4 for it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...errors import NextStepError, check_choice, not_written
from ...loading.build import ModelPlan, plan_model
from ...loading.calibration import (
    PROMPTS,
    Drawn,
    calibration_path,
    load_calibration,
    save_calibration,
)
from ...loading.compensated import Compensated
from ...loading.kept import weights_hash
from ...runtime.quantization import RECIPES
from ...runtime.shortage import told
from ...sentences import Sentence
from ..model_choice import PLAIN, ModelChoice, find_model, pick_device
from ..prompts import read_prompts
from .app import Json, Output, command
from .machine import sides_of
from .model import Device, Dtype, MaxMemory, ModelFolder, Quantization

GENERAL = Path(__file__).parents[1] / "data" / "calibration.txt"
FITTED = [name for name, recipe in RECIPES.items() if recipe.has_layouts]  # the formats that calibration is for


@command(
    "calibrate",
    "nextstep calibrate NextStep-1.1",
    "nextstep calibrate NextStep-1.1 --prompts mine.txt --count 32 --quantization int8",
    "nextstep calibrate tiny --prompts mine.txt --size 64 --output tiny.calibration.safetensors",
)
def calibrate(
    model: Annotated[str, typer.Argument(help="A model as in --model of the other commands.")],
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="A file of prompts (.txt, .csv, .json). Without it: general ones.")
    ] = None,
    count: Annotated[int | None, typer.Option("--count", help="Take the first so many prompts.")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The file to write. Without it: beside the checkpoint.")
    ] = None,
    size: Annotated[str, typer.Option("--size", help='Of the pictures, 256 or "256x192".')] = "256",
    seed: Annotated[int, typer.Option("--seed", help="Of the first picture; the others follow.")] = 0,
    measure: Annotated[
        str | None,
        typer.Option("--measure", help=f"Then tell the error that {' or '.join(FITTED)} has without and with it."),
    ] = None,
    models: ModelFolder = None,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Draw a few prompts and keep what convert needs to store the weights as int4 with less error."""
    out, (width, height) = Output(as_json), sides_of(size)
    if measure is not None:
        check_choice("--measure", measure, FITTED)
    texts = [prompt.text for prompt in read_prompts(prompts or GENERAL)]
    texts = texts[: PROMPTS.check(len(texts) if count is None else count)]
    PROMPTS.check(len(texts))
    source, at = find_model(model, models), pick_device(device)
    plan = plan_original(source, at)
    path = output or calibration_path(source)
    if path.suffix != ".safetensors":
        raise NextStepError("The file to write is {file}; give it a name that ends in .safetensors.", file=path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise not_written(path, error) from None
    with out.bar("Loading the model") as show:
        artist = ModelChoice(str(source), models, quantization, max_memory, device, dtype).load()
        drawn = artist.pipeline.calibrate(
            texts,
            height=height,
            width=width,
            seed=seed,
            callback=lambda p: show(p.done / p.total, f"Token {p.done} of {p.total}"),
        )
        del artist
    digest = weights_hash(plan)
    save_calibration(path, drawn, digest)
    values: dict[str, object] = {"file": str(path), "prompts": drawn.pictures}
    lines = [f"{path}: {drawn.pictures} prompts"]
    if measure is not None:
        plan = plan_model(source, measure, at)
        plain, fitted = (error_of(Compensated(plan, drawn, at, fit), out) for fit in (False, True))
        values["error"] = {"without": plain, "with": fitted}
        lines.append(f"Error of the conditions with {measure}: {plain:.1%} without calibration, {fitted:.1%} with it")
    out.result(values, *lines)


def plan_original(source: Path, at: torch.device) -> ModelPlan:
    """The plan of a checkpoint whose weights are as published; NextStepError where they are quantized already."""
    plan = plan_model(source, None, at)
    if plan.recipe is not None:
        raise NextStepError(
            "{path} is already quantized to {format}, and cannot be stored better than it is. Calibrate the checkpoint "
            "that it was made from.",
            path=source,
            format=plan.recipe.name,
        )
    return plan


def error_of(compensated: Compensated, out: Output) -> float:
    """Store a model for nothing but the error of the transformer's conditions that it has then."""
    with told(Sentence("Converting"), compensated.device), out.bar("Measuring") as show:
        for _ in compensated.read(torch.bfloat16, lambda n, all: show(n / all, f"Layer {n + 1} of {all}")):
            pass
    assert compensated.error is not None, "it was read to its end"
    return compensated.error


def calibration_for(plan: ModelPlan, source: Path, named: str | None) -> tuple[Path, Drawn] | None:
    """The calibration to convert with: the one that is named, else the one beside the checkpoint, if there is one.
    None for a format that it is not for. NextStepError for one that does not belong to the model."""
    fits = plan.recipe is not None and plan.recipe.name in FITTED and not plan.stored
    if named is None or named == PLAIN:
        path = calibration_path(source)
        if named == PLAIN or not fits or not path.is_file():
            return None
    else:
        path = Path(named)
        if not fits:
            raise not_calibrated()
    return path, load_calibration(path, plan.config, weights_hash(plan))


def not_calibrated() -> NextStepError:
    """The error for a calibration that nothing would be done with."""
    return NextStepError(
        "--calibration is for checkpoints that --quantization stores as {formats}. Leave it out.",
        formats=" or ".join(FITTED),
    )

"""Files of models: fetching a published one, converting one to a single file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from ...errors import NextStepError, check_choice
from ...loading.build import plan_model
from ...loading.checkpoint import DTYPES
from ...loading.comfy_file import FORMATS, save_for_comfyui
from ...loading.compensated import Compensated
from ...loading.download import PUBLISHED_CHECKPOINTS, plan_download
from ...loading.download import download as fetch
from ...loading.meter import Meter
from ...loading.single_file import save_model, save_vae
from ...loading.store import vae_beside
from ...runtime.memory import format_bytes
from ...runtime.quantization import RECIPES
from ...runtime.shortage import told
from ...sentences import Sentence
from ..model_choice import PLAIN, find_model, model_folders, pick_device
from .app import Json, Output, command
from .calibrate import FITTED, calibration_for, not_calibrated
from .model import Device, ModelFolder


@command("download", "nextstep download NextStep-1.1", "nextstep download NextStep-1.1 --dry-run")
def download(
    name: Annotated[str, typer.Argument(help=f"A hub id, or one of {', '.join(PUBLISHED_CHECKPOINTS)}.")],
    models: ModelFolder = None,
    revision: Annotated[str, typer.Option("--revision", help="Branch, tag or commit.")] = "main",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be fetched, and stop.")] = False,
    as_json: Json = False,
) -> None:
    """Fetch a published checkpoint. What was stopped is resumed."""
    out = Output(as_json)
    folder = models or next(iter(model_folders(None)), Path("models/nextstep"))
    plan = plan_download(name, folder, revision)
    facts = {"folder": str(plan.folder), "bytes": plan.size, "files": len(plan.files)}
    if dry_run:
        out.result(facts, plan.describe())
        return
    if as_json:
        out.remarks.print(plan.describe(), markup=False, soft_wrap=True)
    else:
        print(plan.describe())
    meter = Meter()
    with out.bar("Downloading") as show:
        fetched = fetch(plan, lambda done, size: show(done / max(1, size), meter.text(done, size)))
    out.result(facts, str(fetched))


@command(
    "convert",
    "nextstep convert NextStep-1.1 nextstep-1.1-int8.safetensors --quantization int8",
    "nextstep convert NextStep-1.1 nextstep-1.1-int8.safetensors --quantization int8-convrot --comfyui",
    "nextstep convert NextStep-1.1 nextstep-1.1-int4.safetensors --quantization int4 --calibration mine.safetensors",
    "nextstep convert NextStep-1.1 nextstep-vae.safetensors --vae",
)
def convert(
    model: Annotated[str, typer.Argument(help="A model as in --model of the other commands, or a VAE with --vae.")],
    to: Annotated[Path, typer.Argument(help="The .safetensors file to write.")],
    models: ModelFolder = None,
    quantization: Annotated[str, typer.Option("--quantization", help=f"{PLAIN} or {', '.join(RECIPES)}.")] = PLAIN,
    dtype: Annotated[str, typer.Option("--dtype", help="Of everything that is not quantized.")] = "bf16",
    vae: Annotated[bool, typer.Option("--vae", help="Write the checkpoint's VAE instead.")] = False,
    comfyui: Annotated[
        bool,
        typer.Option(
            "--comfyui",
            help=f"In ComfyUI's own layout, which other nodes read too; --quantization: {', '.join(FORMATS)}.",
        ),
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            help=f"A file of [bold]nextstep calibrate[/bold], for {' and '.join(FITTED)}. Without it: the one "
            f"beside the checkpoint, if there is one; {PLAIN} leaves it out.",
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Write a checkpoint as a single file, quantized if you like."""
    out = Output(as_json)
    check_choice("--quantization", quantization, FORMATS if comfyui else (PLAIN, *RECIPES))
    check_choice("--dtype", dtype, DTYPES)
    if to.suffix != ".safetensors":
        raise NextStepError("The file to write is {file}; give it a name that ends in .safetensors.", file=to)
    if calibration is not None and (vae or comfyui):
        raise not_calibrated()
    source, at = find_model(model, models), pick_device(device)
    found, fitted = None, None
    with (
        torch.inference_mode(),
        told(Sentence("Converting"), at, advice=Sentence("Close other programs.")),
        out.bar("Converting") as show,
    ):

        def show_tensors(done: int, of: int) -> None:
            show(done / of, f"Tensor {done + 1} of {of}")

        if vae:
            is_vae = source.is_file() or not (source / "tokenizer.json").is_file()
            size = save_vae(source if is_vae else vae_beside(source, None), to, DTYPES[dtype])
        elif comfyui:
            plan = plan_model(source, None, at)
            size = save_for_comfyui(plan, to, quantization, DTYPES[dtype], at, show_tensors)
        else:
            plan = plan_model(source, None if quantization == PLAIN else quantization, at)
            found = calibration_for(plan, source, calibration)
            fitted = found and Compensated(plan, found[1], at)
            reading = fitted.read if fitted is not None else None
            size = save_model(plan, to, DTYPES[dtype], at, show_tensors, reading=reading)
    values: dict[str, object] = {"file": str(to), "bytes": size}
    lines = [f"{to}: {format_bytes(size)}"]
    if found is not None and fitted is not None and fitted.error is not None:
        values |= {"calibration": str(found[0]), "error": fitted.error}
        lines.append(f"Fitted to {found[0]}: the error of the conditions is {fitted.error:.1%}")
    out.result(values, *lines)

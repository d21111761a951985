"""Options that name a model and where it runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ...loading.checkpoint import DTYPES
from ...runtime.quantization import RECIPES
from ..model_choice import PLAIN

ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        envvar="NEXTSTEP_MODEL",
        help="A name from [bold]nextstep status[/bold], a folder, a .safetensors file, a hub id, or tiny. "
        "Without it: the first that is found.",
    ),
]
ModelFolder = Annotated[
    Path | None,
    typer.Option("--models", envvar="NEXTSTEP_MODELS", help="The folder that holds your models."),
]
Quantization = Annotated[
    str, typer.Option("--quantization", help=f"{PLAIN}, auto (what fits), or {', '.join(RECIPES)}.")
]
MaxMemory = Annotated[
    str | None, typer.Option("--max-memory", help="Device memory to take at most, such as 20GB. The rest is streamed.")
]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="FILE[:STRENGTH]", help="A LoRA and its strength, 1 if none is given; several add up."
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cuda, cuda:1, mps or cpu.")]
Dtype = Annotated[str, typer.Option("--dtype", help=f"auto or {', '.join(DTYPES)}.")]

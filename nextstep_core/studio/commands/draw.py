"""Drawing: one picture, an edited one, a batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from ...errors import NextStepError, check_choice
from ...images.saving import FORMATS, save_picture
from ...runtime.interrupt import go_on
from ...runtime.parallel import Ranks
from ...sampling.falling import STEPS_SCHEDULES
from ...sampling.solvers import SAMPLERS
from ...sentences import Sentence
from ..batch import TOGETHER, BatchRun
from ..cluster import Cluster, where_of
from ..drawing import parameters_of
from ..hands import Alone, Hands
from ..job_file import COMMAND, Wishes, check_picture, job_of_prompts, read_job
from ..jobs import Order
from ..model_choice import PLAIN, ModelChoice
from ..names import slug
from ..prompts import Prompt
from ..quality import scores_of
from ..report import write_report, write_sheet
from ..sets import SETS, set_path
from .app import INCOMPLETE, STOPPED, Json, Output, command
from .model import Device, Dtype, Loras, MaxMemory, ModelFolder, ModelName, Quantization
from .ranks import TensorParallel, together

Size = Annotated[str | None, typer.Option("--size", help='512, "768x512" or a ratio such as 16:9.')]
Steps = Annotated[int | None, typer.Option("--steps", help="Sampling steps for each token.")]
StepsSchedule = Annotated[
    str | None, typer.Option("--steps-schedule", help=f"Where flow steps are saved: {', '.join(STEPS_SCHEDULES)}.")
]
Cfg = Annotated[float | None, typer.Option("--cfg", "--guidance", help="Guidance by the prompt.")]
CfgImg = Annotated[float | None, typer.Option("--cfg-img", help="Guidance by the input picture.")]
Shift = Annotated[float | None, typer.Option("--shift", help="Timestep shift.")]
SamplerName = Annotated[str | None, typer.Option("--sampler", help=f"One of {', '.join(SAMPLERS)}.")]
PresetName = Annotated[str | None, typer.Option("--preset", help="Size and settings under one name, such as draft.")]
Negative = Annotated[str | None, typer.Option("--negative-prompt", "-n", help="What to avoid.")]
Seeds = Annotated[list[int] | None, typer.Option("--seed", "-s", help="A seed; give several for several pictures.")]
Format = Annotated[str | None, typer.Option("--format", help=f"{', '.join(FORMATS)}.")]


def stated(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


@command(
    "generate",
    'nextstep generate "a frosty mug on a wooden table" --preset standard --seed 1 --seed 2',
    'nextstep generate "a red circle on a blue background" 64 20 --model tiny',
    'nextstep generate "a red circle on a blue background" 64 --model tiny --lora night:0.8',
    'torchrun --nproc-per-node 2 -m nextstep_core generate "a frosty mug" --tensor-parallel',
)
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw, in plain sentences.")],
    size: Annotated[str | None, typer.Argument(help='As --size: 512, "768x512", 16:9.')] = None,
    steps: Annotated[int | None, typer.Argument(help="As --steps.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A file, or a folder for several.")] = Path("."),
    model: ModelName = None,
    models: ModelFolder = None,
    size_option: Size = None,
    steps_option: Steps = None,
    steps_schedule: StepsSchedule = None,
    cfg: Cfg = None,
    shift: Shift = None,
    sampler: SamplerName = None,
    preset: PresetName = None,
    negative_prompt: Negative = None,
    seed: Seeds = None,
    format: Format = None,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    lora: Loras = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tensor_parallel: TensorParallel = False,
    as_json: Json = False,
) -> None:
    """Draw a picture from text."""
    wishes = stated(
        size=size_option or size,
        steps=steps if steps_option is None else steps_option,
        steps_schedule=steps_schedule,
        cfg=cfg,
        shift=shift,
        sampler=sampler,
        preset=preset,
        negative_prompt=negative_prompt,
    )
    with together(tensor_parallel, device) as ranks:
        orders = job_of_prompts([Prompt(prompt)], COMMAND, Wishes(wishes, tuple(seed or (0,)))).orders
        choice = ModelChoice(model, models, quantization, max_memory, device, dtype, tuple(lora or ()))
        _draw(orders, choice, output, format, as_json, ranks)


@command(
    "edit",
    'nextstep edit dog.png "Add a pirate hat to the dog\'s head."',
    'nextstep edit cup.png "Make the cup red." --size 64 --model tiny',
)
def edit(
    picture: Annotated[Path, typer.Argument(help="The picture to edit.")],
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    image: Annotated[
        list[Path] | None, typer.Option("--image", help="One more picture, for <image> in the text.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A file, or a folder for several.")] = Path("."),
    model: ModelName = None,
    models: ModelFolder = None,
    size: Size = None,
    steps: Steps = None,
    steps_schedule: StepsSchedule = None,
    cfg: Cfg = None,
    cfg_img: CfgImg = None,
    shift: Shift = None,
    sampler: SamplerName = None,
    negative_prompt: Negative = None,
    seed: Seeds = None,
    format: Format = None,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    lora: Loras = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    tensor_parallel: TensorParallel = False,
    as_json: Json = False,
) -> None:
    """Change a picture as an instruction says."""
    wishes = stated(
        size=size,
        steps=steps,
        steps_schedule=steps_schedule,
        cfg=cfg,
        cfg_img=cfg_img,
        shift=shift,
        sampler=sampler,
        negative_prompt=negative_prompt,
    )
    with together(tensor_parallel, device) as ranks:
        pictures = [check_picture(path, COMMAND) for path in (picture, *(image or []))]
        orders = job_of_prompts(
            [Prompt(instruction)], COMMAND, Wishes(wishes, tuple(seed or (0,)), images=tuple(pictures))
        ).orders
        choice = ModelChoice(model, models, quantization, max_memory, device, dtype, tuple(lora or ()))
        _draw(orders, choice, output, format, as_json, ranks)


def _draw(
    orders: Sequence[Order], choice: ModelChoice, output: Path, format: str | None, as_json: bool, ranks: Ranks | None
) -> None:
    """Draw orders that differ in their seeds alone, and save each; the first alone of several `ranks` does so."""
    silent = ranks is not None and not ranks.is_first
    out = Output(as_json, silent)
    TOGETHER.check(len(orders))
    files = _files(orders, output, format)
    with out.bar("Loading the model") as show:
        artist = choice.load(ranks=ranks)
        settled = [artist.settle(order) for order in orders]
        started = time.monotonic()
        pictures = artist.draw(settled, lambda p: show(p.done / p.total, f"Token {p.done} of {p.total}"), go_on)
        seconds = time.monotonic() - started
    if silent:
        return
    kind = next(name for name, ending in FORMATS.items() if ending == files[0].suffix)
    for file, picture, one in zip(files, pictures, settled, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        save_picture(file, picture, kind, parameters=parameters_of(one, artist.facts))
    each = [
        {"file": str(file), "seed": one.order.seed, "width": one.width, "height": one.height}
        for file, one in zip(files, settled)
    ]
    out.result({"pictures": each, "seconds": round(seconds, 3), **artist.facts}, *(f"{file}" for file in files))


def _files(orders: Sequence[Order], output: Path, format: str | None) -> list[Path]:
    """Where the pictures go; NextStepError for an ending that is no picture's, and for many pictures in one file."""
    endings = {ending: name for name, ending in FORMATS.items()} | {".jpeg": "jpeg"}
    suffix = output.suffix.lower()
    if suffix and not output.is_dir():
        check_choice(Sentence("The ending of --output"), suffix, endings)
        if format is not None and endings[suffix] != format:
            raise NextStepError(
                "--output ends in {suffix}, and --format is {format}. Leave one out.", suffix=suffix, format=format
            )
        if len(orders) > 1:
            return [output.with_name(f"{output.stem}-{order.seed}{FORMATS[endings[suffix]]}") for order in orders]
        return [output.with_suffix(FORMATS[endings[suffix]])]
    check_choice("--format", format or "png", FORMATS)
    ending = FORMATS[format or "png"]
    return [_free(output / f"{slug(order.prompt) or 'picture'}-{order.seed}{ending}") for order in orders]


def _free(path: Path) -> Path:
    """The path, or one with a number where it is taken."""
    found, n = path, 1
    while found.exists():
        n += 1
        found = path.with_name(f"{path.stem}-{n}{path.suffix}")
    return found


@command(
    "batch",
    "nextstep batch jobs.json --output pictures",
    "nextstep batch prompts.txt --output pictures --preset draft --seed 1 --seed 2",
    'nextstep batch brand --output pictures --set "brand=Northwind Coffee | Harbor Tea" --count-only',
    "nextstep batch jobs.json --output pictures --gpus all",
    "nextstep batch jobs.json --output pictures --cluster ray://host:10001",
)
def batch(
    job: Annotated[str, typer.Argument(help=f"A job file (.json), prompts (.txt, .csv), or {', '.join(SETS)}.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder for the pictures.")] = None,
    model: ModelName = None,
    models: ModelFolder = None,
    lists: Annotated[
        list[str] | None, typer.Option("--set", help="Values of a list of the file: name=first | second.")
    ] = None,
    size: Size = None,
    steps: Steps = None,
    steps_schedule: StepsSchedule = None,
    cfg: Cfg = None,
    shift: Shift = None,
    sampler: SamplerName = None,
    preset: PresetName = None,
    negative_prompt: Negative = None,
    seed: Seeds = None,
    format: Format = None,
    names: Annotated[
        str | None, typer.Option("--names", help="Pattern of the files' names: {index}-{name}-{seed}.")
    ] = None,
    together: Annotated[int, typer.Option("--together", help="Pictures to draw at once, at most.")] = 8,
    gpus: Annotated[str | None, typer.Option("--gpus", help="all, or how many: a worker on each, by Ray.")] = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Workers on CPUs in their place.")] = None,
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="A Ray cluster, such as ray://host:10001. Its GPUs, or --gpus.")
    ] = None,
    count_only: Annotated[
        bool, typer.Option("--count-only", help="Check the job, say what it draws, and stop.")
    ] = False,
    quantization: Quantization = PLAIN,
    max_memory: MaxMemory = None,
    lora: Loras = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Draw every picture of a job. The same command resumes a run that was stopped."""
    out = Output(as_json)
    TOGETHER.check(together)
    where = where_of(gpus, workers, cluster)
    wishes = stated(
        size=size,
        steps=steps,
        steps_schedule=steps_schedule,
        cfg=cfg,
        shift=shift,
        sampler=sampler,
        preset=preset,
        negative_prompt=negative_prompt,
    )
    asked = Wishes(wishes, tuple(seed or ()), dict(map(_list, lists or [])), format, names)
    plan = read_job(set_path(job), asked)
    if count_only:
        counts = {"pictures": len(plan.orders), "settings": plan.labels, "title": plan.title}
        out.result(
            counts,
            f"{plan.title}: {len(plan.orders)} pictures"
            + (f" in settings {', '.join(plan.labels)}" if plan.labels else ""),
        )
        return
    if output is None:
        raise NextStepError("No folder for the pictures. Name one with --output.")
    choice = ModelChoice(model, models, quantization, max_memory, device, dtype, tuple(lora or ()))
    with out.bar("Loading the model" if where is None else "Starting workers") as show, ExitStack() as open_until:
        if where is None:
            hands: Hands = Alone(choice.load(plan.model), scores_of)
        else:
            hands = open_until.enter_context(Cluster(where, choice.as_data(plan.model)))
        run = BatchRun(plan, hands, output)
        try:
            summary = run.run(together, lambda state: show(state.share, state.in_words))
        except KeyboardInterrupt:
            out.remarks.print("Stopped. The same command resumes.")
            raise typer.Exit(STOPPED) from None
        finally:
            write_report(output, plan.title, run.records)
            write_sheet(output, run.records)
    result = {
        "drawn": summary.drawn,
        "kept": summary.kept,
        "failed": summary.failed,
        "seconds": round(summary.seconds, 3),
        "report": str(output / "report.html"),
    }
    kept = f", {summary.kept} were there" if summary.kept else ""
    out.result(result, f"{summary.drawn} pictures drawn{kept}. Look at {output / 'report.html'}")
    if summary.failed:
        for record in summary.records:
            if record.error:
                out.remarks.print(f"{record.file}: {record.error}", style="red", markup=False, soft_wrap=True)
        raise typer.Exit(INCOMPLETE)


def _list(text: str) -> tuple[str, tuple[str, ...]]:
    name, sign, values = text.partition("=")
    found = tuple(value.strip() for value in values.split("|") if value.strip())
    if not sign or not found:
        raise NextStepError("--set is {text!r}; write name=first | second.", text=text[:80])
    return name.strip(), found

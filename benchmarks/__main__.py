"""How long a picture takes and how near that is to what the memory allows: by part, beside the reference, over sizes.

python -m benchmarks --model tiny --json bench.json
python -m benchmarks --random 14b --dtype bf16 --size 512x512          # no file needed
python -m benchmarks --random medium --size 128x128 --threads 2 --reference CHECKOUT --reference-python PYTHON
python -m benchmarks --random medium --size 256x256 --tokens 8 --repeat 1 --warmup 0 --sweep docs/cost
python -m benchmarks --formats
python -m benchmarks --kernels --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.formats import format_errors, show_errors
from benchmarks.kernels import kernel_times, show_kernels
from benchmarks.reference import (
    check_comparable,
    compare,
    find_reference,
    save_published,
    show_comparison,
)
from benchmarks.report import benchmark, context, settings_of, show
from benchmarks.subjects import SHAPES, Subject, load_subject, random_subject, ready
from benchmarks.sweep import need_matplotlib, plot, sweep
from benchmarks.timing import Case
from nextstep_core.decoding.fused import OwnKernels
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.errors import NextStepError
from nextstep_core.images.latents import PUBLISHED_LATENTS
from nextstep_core.loading.checkpoint import DTYPES
from nextstep_core.runtime.quantization import RECIPES
from nextstep_core.sampling.settings import GenerationSettings
from nextstep_core.sampling.solvers import SAMPLERS


def size(text: str) -> tuple[int, int]:
    """(width, height) of "512x512"."""
    try:
        width, height = map(int, text.split("x"))
        PUBLISHED_LATENTS.grid(height, width)
    except NextStepError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not like 512x512") from None
    return width, height


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    model = parser.add_argument_group("the model").add_mutually_exclusive_group()
    model.add_argument("--model", default="tiny", help='a folder, a hub id or "tiny"')
    model.add_argument("--random", choices=SHAPES, help="random weights of this size instead")
    case = parser.add_argument_group("the case")
    case.add_argument("--size", type=size, default="64x64", help="width x height in pixels")
    case.add_argument("--batch", type=int, default=1, help="pictures drawn together")
    case.add_argument("--prompt-length", type=int, default=40, help="prompt ids, drawn at random")
    case.add_argument("--steps", type=int, help="default: the checkpoint's recommendation")
    case.add_argument("--cfg", type=float, help="default: the checkpoint's recommendation")
    case.add_argument("--sampler", choices=SAMPLERS, help="default: the checkpoint's recommendation")
    case.add_argument("--dtype", choices=DTYPES, default="fp32")
    case.add_argument("--quantization", choices=("none", *RECIPES), default="none")
    case.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    case.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    case.add_argument("--no-graphs", action="store_true", help="launch every kernel anew instead of CUDA graphs")
    how = parser.add_argument_group("how to measure")
    how.add_argument("--repeat", type=int, default=7, help="counted runs")
    how.add_argument("--warmup", type=int, default=1, help="runs before them that do not count")
    how.add_argument("--tokens", type=int, help="time only so many tokens of a picture, and scale up")
    how.add_argument("--json", type=Path, help="also write the numbers here")
    what = parser.add_argument_group("what else to measure")
    what.add_argument("--reference", type=Path, help="a checkout of the public 1.0 inference code, timed in turns")
    what.add_argument("--reference-python", default=sys.executable, help="interpreter with its requirements")
    what.add_argument(
        "--sweep", type=Path, metavar="PREFIX", help="instead: sizes and batches, to PREFIX.png and .json"
    )
    what.add_argument("--formats", action="store_true", help="instead: relative errors of the weight formats")
    what.add_argument("--kernels", action="store_true", help="instead: products for each way to store a matrix")
    options = parser.parse_args(arguments)
    least = {"batch": 1, "prompt_length": 1, "repeat": 1, "warmup": 0, "tokens": 1, "threads": 1}
    for name, lowest in least.items():
        value = getattr(options, name)
        if value is not None and value < lowest:
            parser.error(f"--{name.replace('_', '-')} is {value}; it must be at least {lowest}")
    options.quantization = None if options.quantization == "none" else options.quantization
    return options


def plain_subject(options: argparse.Namespace) -> Subject:
    """The model that the command line names, as it is loaded."""
    device, dtype = device_of(options), DTYPES[options.dtype]
    if options.random:
        stored = None if options.reference else options.quantization  # the reference reads floats
        return random_subject(options.random, device, dtype, stored)
    return load_subject(options.model, device, dtype, options.quantization)


def device_of(options: argparse.Namespace) -> torch.device:
    """The device with its index, as tensors on it will say."""
    return torch.empty(0, device=options.device).device


def settings_for(options: argparse.Namespace, subject: Subject) -> GenerationSettings:
    """The checkpoint's recommendation with what the command line says."""
    return subject.settings.override(steps=options.steps, cfg=options.cfg, sampler=options.sampler)


def case_of(options: argparse.Namespace, plain: Subject) -> Case:
    """The case that the command line describes; the plain subject is made ready in place."""
    device, dtype = device_of(options), DTYPES[options.dtype]
    subject = ready(plain, options.quantization, device, dtype)
    graphs = None if options.no_graphs else subject.engine.caches.graphs
    caches = StepCaches(graphs, prefilled=None, hasten=OwnKernels())  # every run reads its prompt
    settings = settings_for(options, subject)
    return Case(subject, *options.size, options.batch, settings, options.prompt_length, device, dtype, caches)


def run_case(options: argparse.Namespace) -> dict[str, Any]:
    """One case, and the reference beside it."""
    if options.reference:
        find_reference(options.reference, options.reference_python)
    plain = plain_subject(options)
    with TemporaryDirectory(prefix="nextstep-bench-") as folder:
        if options.reference:
            check_comparable(settings_for(options, plain), options.tokens)
            save_published(plain, Path(folder))
        case = case_of(options, plain)
        result = benchmark(case, options.quantization, options.repeat, options.warmup, options.tokens)
        show(result)
        if options.reference:
            beside = (options.reference, options.reference_python, options.repeat)
            result["reference"] = compare(case, Path(folder), *beside)
            show_comparison(result["reference"])
    return result


def run_sweep(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes and batches; the plot lies beside the numbers."""
    need_matplotlib()
    case = case_of(options, plain_subject(options))
    result = sweep(case, options.repeat, options.warmup, options.tokens, print)
    print(result["growth"])
    result = {"settings": settings_of(case, options.quantization), "scaled_from_tokens": options.tokens, **result}
    where = context(case.device)
    title = f"{case.subject.name}, {case.settings.steps} steps, {options.dtype}\n{where['machine']}"
    plot(result, title, options.sweep.with_suffix(".png"))
    write(where | result, options.sweep.with_suffix(".json"))
    return result


def run_formats(options: argparse.Namespace) -> dict[str, Any]:
    """Errors of the formats on the embedded model and on the random medium one."""
    device = device_of(options)
    errors = []
    for subject in (load_subject("tiny", device, torch.float32), random_subject("medium", device, torch.float32)):
        errors += format_errors(subject, device)
    show_errors(errors)
    return {"formats": [asdict(row) for row in errors]}


def run_kernels(options: argparse.Namespace) -> dict[str, Any]:
    """Every product that works on the device."""
    with torch.inference_mode():
        found = kernel_times(device_of(options), options.repeat)
    show_kernels(found)
    return {"kernels": [asdict(row) for row in found]}


def run_of(options: argparse.Namespace) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """What the command line asks to measure."""
    others = {run_sweep: options.sweep, run_formats: options.formats, run_kernels: options.kernels}
    return next((run for run, wanted in others.items() if wanted), run_case)


def write(result: dict[str, Any], path: Path) -> None:
    """As JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    sys.stdout.reconfigure(line_buffering=True)  # a long run tells what it has, also into a file
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    where = context(device_of(options))
    for name, text in where.items():
        print(f"{name:10} {text}")
    try:
        result = run_of(options)(options)
    except NextStepError as error:
        sys.exit(str(error))
    if options.json:
        write(where | result, options.json)
    if result.get("reference", {}).get("tokens_agree") is False:
        sys.exit("The tokens differ from the reference's.")


if __name__ == "__main__":
    main()

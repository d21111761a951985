"""A checkpoint converted to every format of ours and drawn from once, with time, memory and size of each.

    python -m benchmarks.checkpoint FOLDER      # random weights of the published shape, 30 GB
    python -m benchmarks.conversions FOLDER

Each conversion and each picture has a process of its own. What is done is written to FOLDER/conversions.json, and is
not done again by the same command; a converted file is deleted once a picture was drawn from it. Files are read from
the disk, not from the system's cache.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from nextstep_core import NextStepPipeline
from nextstep_core.errors import NextStepError
from nextstep_core.loading import kept
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.single_file import save_model
from nextstep_core.runtime.devices import device_name
from nextstep_core.runtime.quantization import RECIPES

from .loading import forget
from .tables import number, table

CPU = torch.device("cpu")
DONE = "conversions.json"
EVERY = 0.02  # seconds between looks at a process's memory
PROMPT = "a red circle on a blue background"


@dataclass
class Watched:
    """The most memory that a process held: without pages of mapped files, which the system can take back, and with."""

    own: int | None = None
    whole: int | None = None

    def look(self, process: int) -> None:
        """Look at a running process, where the system tells."""
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
        except OSError:
            return
        held = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
        kilobytes = {key: int(value[0]) for key, value in held.items() if value[1:] == ["kB"]}
        if "RssAnon" in kilobytes:
            own = 1024 * (kilobytes["RssAnon"] + kilobytes.get("RssShmem", 0))
            self.own = max(self.own or 0, own)
            self.whole = max(self.whole or 0, 1024 * kilobytes["VmHWM"])


def convert(folder: Path, recipe: str, path: Path) -> dict[str, Any]:
    """Convert the checkpoint in `folder` to a single file; what there is to say of it."""
    plan = plan_model(folder, recipe, CPU)
    forget(kept.source_files(plan))
    began = time.perf_counter()
    size = save_model(plan, path, torch.bfloat16)
    return {"seconds": time.perf_counter() - began, "bytes": size}


def draw(folder: Path, path: Path, side: int, steps: int | None) -> dict[str, Any]:
    """Draw one picture from a converted file with the VAE of its checkpoint."""
    forget([path])
    began = time.perf_counter()
    pipe = NextStepPipeline.from_pretrained(path, vae=folder / "vae", dtype=torch.bfloat16)
    loaded = time.perf_counter()
    out = pipe.generate(PROMPT, height=side, width=side, steps=steps, seed=0)
    drawn = time.perf_counter()
    return {
        "load_seconds": loaded - began,
        "seconds": drawn - loaded,
        "tokens": out.tokens.shape[1],
        "finite": bool(out.tokens.isfinite().all()),
    }


def in_a_process(arguments: Sequence[str]) -> dict[str, Any]:
    """What one of the above says in a process of its own, with the memory that it took."""
    command = [sys.executable, "-m", "benchmarks.conversions", *arguments]
    watched = Watched()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]) as process:
        while process.poll() is None:
            watched.look(process.pid)
            time.sleep(EVERY)
        assert process.stdout is not None
        said = process.stdout.read().strip().splitlines()
    # The system may have ended it, because of its memory, and then it says nothing.
    result: dict[str, Any] = json.loads(said[-1]) if said else {"problem": f"ended with {process.returncode}"}
    return result | {"peak": watched.own, "peak_with_files": watched.whole}


class Bookkeeping:
    """What is done, in a file that a later run reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path.exists() else {}

    def once(self, recipe: str, step: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `step` said when it was done for `recipe`; it is done now if it was not."""
        if step not in self.done.setdefault(recipe, {}):
            print(f"{recipe}: {step} ...", file=sys.stderr, flush=True)
            said = work()
            if "problem" in said:  # tried again by the next run
                return said
            self.done[recipe][step] = said
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(self.done, indent=1))
            part.replace(self.path)
        return self.done[recipe][step]


def run(options: argparse.Namespace) -> dict[str, dict[str, dict[str, Any]]]:
    """Convert and draw in all formats asked for, but for what is done already; what was said of each."""
    folder: Path = options.folder.resolve()
    work: Path = (options.work or options.folder).resolve()
    books = Bookkeeping(folder / DONE)
    results = {}
    for recipe in options.recipes:
        path = work / f"converted-{recipe}.safetensors"
        if not path.exists() and "drawn" not in books.done.get(recipe, {}):
            books.done.get(recipe, {}).pop("converted", None)  # its file went away before a picture was drawn
        steps = [] if options.steps is None else ["--steps", str(options.steps)]
        given = [str(folder), "--recipes", recipe]
        converting = partial(in_a_process, [*given, "--convert", str(path)])
        drawing = partial(in_a_process, [*given, "--draw", str(path), "--side", str(options.side), *steps])
        results[recipe] = {"converted": books.once(recipe, "converted", converting)}
        if "problem" in results[recipe]["converted"]:
            continue
        results[recipe]["drawn"] = books.once(recipe, "drawn", drawing)
        if "problem" not in results[recipe]["drawn"] and not options.keep:
            path.unlink(missing_ok=True)
    return results


def table_of(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row for each format."""
    titles = ["format", ">converted in", ">peak memory", ">with mapped files", ">file", ">loaded in", ">drawn in"]
    rows = []
    for recipe, said in results.items():
        converted, drawn = said["converted"], said.get("drawn", {})
        finite = {True: "finite", False: "NOT FINITE", None: "-"}[drawn.get("finite")]
        rows.append(
            [
                recipe,
                number(converted.get("seconds"), " s"),
                *(number(converted.get(peak), " GB", 1e-9) for peak in ("peak", "peak_with_files")),
                number(converted.get("bytes"), " GB", 1e-9),
                *(number(drawn.get(part), " s") for part in ("load_seconds", "seconds")),
                *(number(drawn.get(peak), " GB", 1e-9) for peak in ("peak", "peak_with_files")),
                converted.get("problem") or drawn.get("problem") or finite,
            ]
        )
    return table([*titles, ">peak memory", ">with mapped files", "tokens"], rows)


def main() -> None:
    """Parse the command line; convert, draw and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES), help="default: all")
    parser.add_argument("--side", type=int, default=64, help="pixels of the picture (default 64)")
    parser.add_argument("--steps", type=int, help="flow steps a token (default: the checkpoint's)")
    parser.add_argument("--work", type=Path, help="where converted files go (default: the folder)")
    parser.add_argument("--keep", action="store_true", help="keep the converted files")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert is None and options.draw is None:
        results = run(options)
        print(f"{device_name(CPU)}, torch {torch.__version__}\n\n{table_of(results)}")
        return
    try:
        if options.convert is not None:
            said = convert(options.folder, options.recipes[0], options.convert)
        else:
            said = draw(options.folder, options.draw, options.side, options.steps)
    except (NextStepError, MemoryError) as error:
        said = {"problem": str(error) or "out of memory"}
    print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()

"""Seconds that a quantized checkpoint takes to load: from its files, and from what was kept of that.

    python -m benchmarks.checkpoint FOLDER                 # a checkpoint of the published shape
    python -m benchmarks.loading FOLDER --quantization int4

Files are read from the disk, not from the system's cache. What is read by mapping a file counts as read once every page
of it was touched. The kept file is written below FOLDER and stays there.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from nextstep_core.loading import kept
from nextstep_core.loading.build import ModelPlan, fill, make_ready, plan_model
from nextstep_core.runtime.bandwidth import timed
from nextstep_core.runtime.devices import device_name
from nextstep_core.runtime.interrupt import go_on
from nextstep_core.runtime.quantization import RECIPES

CPU = torch.device("cpu")
BLOCK = 8 << 20
PAGE = 4096


def forget(files: list[Path]) -> None:
    """Have the system drop what it holds of these files, where it can be asked to."""
    os.sync()
    for path in files:
        if hasattr(os, "posix_fadvise"):
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_through(path: Path) -> None:
    """Read a file and keep nothing."""
    with path.open("rb", buffering=0) as file:
        while file.read(BLOCK):
            pass


def load(plan: ModelPlan, dtype: torch.dtype, shelf: Path | None = None) -> None:
    """Load a plan's model, ready to draw on the CPU; `shelf` is where to keep it."""
    read = plan.read_model(CPU, dtype)
    model = plan.empty_model()
    fill(model, dict(read if shelf is None else kept.keep(plan, dtype, shelf, read)))
    make_ready(model, CPU, dtype, go_on)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()


def main() -> None:
    """Parse the command line, measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization", choices=RECIPES, default="int4")
    parser.add_argument("--repeat", type=int, default=2, help="times that the kept file is loaded and read")
    arguments = parser.parse_args()
    dtype = torch.bfloat16
    plan = plan_model(arguments.folder, arguments.quantization, CPU).for_computing_on(CPU)
    shelf = arguments.folder / kept.FOLDER
    shelf.mkdir(exist_ok=True)
    print(f"{device_name(CPU)}, torch {torch.__version__}\n\n| | s |\n| --- | ---: |")

    def row(what: str, files: list[Path], work: Callable[[], None]) -> None:
        forget(files)
        seconds, _ = timed(CPU, work)
        print(f"| {what} | {seconds:.1f} |", flush=True)

    row("from its files, kept on the way", kept.source_files(plan), lambda: load(plan, dtype, shelf))
    found = kept.find(plan, dtype, [shelf])
    if found is None:
        raise SystemExit("Nothing was kept: see the log.")
    for _ in range(arguments.repeat):
        row(f"the kept file, {found.stat().st_size / 1e9:.2f} GB", [found], lambda: load(plan_model(found), dtype))
        row("reading that file alone", [found], lambda: read_through(found))


if __name__ == "__main__":
    main()

"""The usual mistakes of a set-up and what to do about each; nothing is changed, and no weight is read."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..errors import NextStepError
from ..runtime.chosen import SWITCH, Switch, ledger_of
from ..runtime.devices import best_device, device_name, host_bytes, kind_of
from ..runtime.memory import format_bytes
from .finding import OK, PROBLEM, WARNING, Finding
from .machine import SIZE, disk_free, models
from .model_files import checkpoints, files

PYTHON = (3, 10)
# As pyproject.toml says; a test compares them.
PACKAGES = {
    "torch": "2.7",
    "tokenizers": "0.21",
    "safetensors": "0.4.2",
    "huggingface_hub": "0.23",
    "filelock": "3.12",
    "pillow": "10",
    "numpy": "1.25",
    "einops": "0.7",
}
LITTLE_DISK = 2 * 10**9  # bytes, of which a few pictures and what Python wants for itself take most
LARGE_MODEL = 28 * 10**9  # bytes of the published weights as they are
NVIDIA = Path("/proc/driver/nvidia/version")
AMD = Path("/dev/kfd")


def doctor(
    roots: Sequence[Path],
    file_roots: Sequence[Path] = (),
    *,
    output: Path | None = None,
    device: torch.device | None = None,
) -> list[Finding]:
    """All findings, in the order in which they are best mended. Models are looked for below `roots`; `output` is the
    folder for pictures."""
    device = best_device() if device is None else device
    found = models(roots, file_roots, device, SIZE, times=False)
    broken = list(files(roots))
    told = {finding.where for finding in broken if finding.verdict == PROBLEM}
    return [
        *versions(),
        *processor(device),
        *fast_paths(device),
        *folders(roots, output),
        *broken,
        *checkpoints(found, told, device),
        *host_memory(),
    ]


def versions() -> Iterator[Finding]:
    """Python and the packages that the engine needs."""
    here = sys.version_info[:2]
    if here < PYTHON:
        yield Finding(
            PROBLEM,
            f"Python is {platform.python_version()}; {PYTHON[0]}.{PYTHON[1]} or newer is needed.",
            "Install a newer Python and make a new environment with it.",
        )
    else:
        yield Finding(OK, f"Python {platform.python_version()}")
    fine = []
    for name, least in PACKAGES.items():
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(PROBLEM, f"The package {name} is missing.", f'Run: pip install "{name}>={least}"')
            continue
        if _numbers(version) < _numbers(least):
            remedy = f'Run: pip install --upgrade "{name}>={least}"'
            yield Finding(PROBLEM, f"{name} is {version}; {least} or newer is needed.", remedy)
        else:
            fine.append(f"{name} {version}")
    if fine:
        yield Finding(OK, ", ".join(fine))


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version, as numbers that compare: "2.13.0+cpu" is 2, 13."""
    release = re.match(r"\d+(\.\d+)*", version)
    numbers = [int(number) for number in release[0].split(".")] if release else []
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers)


def processor(device: torch.device) -> Iterator[Finding]:
    """The device that computes, and a card that lies idle beside it."""
    there = f"Computes on {kind_of(device)}: {device_name(device)}"
    nvidia = shutil.which("nvidia-smi") is not None or NVIDIA.exists()
    if device.type != "cpu":
        yield Finding(OK, there)
    elif nvidia and torch.version.cuda is None:
        yield Finding(
            PROBLEM,
            f"There is an NVIDIA card, but PyTorch {torch.__version__} was built without CUDA, so the CPU computes.",
            "Install PyTorch with CUDA: https://pytorch.org/get-started/locally gives the command.",
        )
    elif nvidia:
        yield Finding(
            PROBLEM,
            f"There is an NVIDIA card, but PyTorch {torch.__version__} cannot use it (it was built for CUDA "
            f"{torch.version.cuda}).",
            "Update the card's driver, or install PyTorch for an older CUDA; in a container, pass the card in "
            "(--gpus all).",
        )
    elif AMD.exists() and torch.version.hip is None:
        yield Finding(
            WARNING,
            f"There is an AMD card, but PyTorch {torch.__version__} was built without ROCm, so the CPU computes.",
            "Install PyTorch with ROCm: https://pytorch.org/get-started/locally gives the command.",
        )
    elif (platform.system(), platform.machine()) == ("Darwin", "arm64"):
        yield Finding(
            WARNING,
            "This Mac has an Apple GPU that PyTorch cannot use, so the CPU computes.",
            "Install the arm64 build of Python and PyTorch, on macOS 14 or newer.",
        )
    else:
        yield Finding(WARNING, f"{there}. There is no card, so a large model takes many minutes for a picture.",
                      "Use a computer with a card of 12 GB or more for the published models.")  # fmt: skip


def fast_paths(device: torch.device) -> Iterator[Finding]:
    """What was measured of the products that a device may multiply with, and which of them is not to be tried."""
    try:
        Switch.set()
    except NextStepError as wrong:
        yield Finding(PROBLEM, str(wrong), f"Unset {SWITCH}, or set it to one of these.")
    ledger = ledger_of(device)
    for name in sorted(ledger.lost):
        yield Finding(
            WARNING,
            f"The fast path {name} took the process down when it was tried on this device, so it is not used.",
            f"Update the driver and PyTorch. To have it tried again, delete {ledger.path}.",
        )
    if ledger.outcomes:
        won = sum(outcome.winner is not None for outcome in ledger.outcomes.values())
        yield Finding(OK, f"Fast paths: taken for {won} of {len(ledger.outcomes)} products measured on this device")


def folders(roots: Sequence[Path], output: Path | None) -> Iterator[Finding]:
    """The models' folder and that of the pictures: there, writable, with room on the disk."""
    if not any(root.is_dir() for root in roots):
        where = roots[0] if roots else Path("models/nextstep")
        yield Finding(
            WARNING, f"The models' folder {where} is not there.", f"Make it, or download a model: it goes to {where}."
        )
    for folder in [root for root in roots if root.exists()] + ([] if output is None else [output]):
        yield from _writable(folder)
    for folder in [*roots[:1], *([] if output is None else [output])]:
        free = disk_free(folder)
        if free is not None and free < LITTLE_DISK:
            yield Finding(PROBLEM, f"The disk of {folder} has {format_bytes(free)} left.", "Make room on it.")


def _writable(folder: Path) -> Iterator[Finding]:
    there = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        yield Finding(
            PROBLEM,
            f"{folder} cannot be written to ({error.strerror or error}).",
            "Choose another folder, or make it yours (chown, or its properties).",
        )
    else:
        yield Finding(OK, f"{folder} can be written to")


def host_memory() -> Iterator[Finding]:
    """What a Linux inside Windows is given, of which few know that it is half."""
    total = host_bytes()
    if total is not None and "microsoft" in platform.release().lower() and total < LARGE_MODEL:
        yield Finding(
            WARNING,
            f"Windows gives this Linux (WSL) {format_bytes(total)} of memory; a large model passes through it.",
            "Write memory=32GB, or what you can spare, below [wsl2] in .wslconfig, a file of your Windows user folder, "
            "and run wsl --shutdown.",
        )

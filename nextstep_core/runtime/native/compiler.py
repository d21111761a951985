"""The C compiler of this machine: a source of this package becomes a library for the processor that it has.

A library lies in the cache folder under a name that hangs on the source, the compiler and the processor, so it is made
once. Nothing is downloaded or installed: without a compiler there is no library.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import torch

from ..ledger import cache_folder

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc")
FLAGS = ("-O3", "-march=native", "-fPIC", "-fopenmp")
PATIENCE = 120.0  # seconds for a compiler
CPU_INFO, MAPS = Path("/proc/cpuinfo"), Path("/proc/self/maps")
OPENMP = ("libgomp", "libiomp5", "libomp")  # as PyTorch has it from its own wheels, or from conda


def missing(device: torch.device) -> str | None:
    """What this machine lacks for a library; None where nothing."""
    if device.type != "cpu":
        return "for CPUs"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "for Linux on x86 processors"
    flags = cpu_flags()
    if not {"avx2", "fma"} <= flags or ("avx512bw" in flags and "avx512_vnni" not in flags):
        return "the processor has no AVX2, or AVX-512 without VNNI"
    return f"no C compiler is installed ({', '.join(COMPILERS)})" if compiler() is None else None


@cache
def cpu_flags() -> frozenset[str]:
    """What the processor can do, by Linux' names; empty where it does not say."""
    try:
        lines = CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def compiler() -> str | None:
    """The compiler that is found first."""
    return next((path for path in map(shutil.which, COMPILERS) if path is not None), None)


def version_of(source: Path) -> str:
    """Changes with a source and what it includes: what was found out about another version does not count."""
    texts = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    return hashlib.sha256(texts).hexdigest()[:16]


def missing_for(source: Path, device: torch.device) -> str | None:
    """What this machine lacks for the library of a source, which is made to find out."""
    lacks = missing(device)
    if lacks is not None:
        return lacks
    found = attempt(source)
    return str(found) if isinstance(found, RuntimeError) else None


def loaded(source: Path) -> ctypes.CDLL:
    """The library made of a source, once in a process; RuntimeError with what the compiler says."""
    found = attempt(source)
    if isinstance(found, RuntimeError):
        raise RuntimeError(str(found))
    return found


@cache
def attempt(source: Path) -> ctypes.CDLL | RuntimeError:
    """The library, or why there is none: a compiler that fails or hangs is not called again."""
    try:
        return library(source)
    except RuntimeError as reason:
        log.info("No library of %s: %s", source.name, reason)
        return reason.with_traceback(None)


def library(source: Path, flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL:
    """The library made of a C source, compiled if it is not there; RuntimeError with what the compiler says."""
    command = compiler()
    if command is None:
        raise RuntimeError("no C compiler")
    openmp = _loaded(OPENMP)  # whose name the library asks for when it is loaded
    told = _output([command, "--version"]) + " ".join([*sorted(cpu_flags()), openmp.name if openmp else ""])
    digest = hashlib.sha256(f"{version_of(source)} {command} {flags} {told}".encode()).hexdigest()[:16]
    folder = cache_folder() / "native"
    path = folder / f"{source.stem}-{digest}.so"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _refuse_others(folder)
        if not path.exists():
            with tempfile.TemporaryDirectory(dir=folder) as room:
                made = _compiled(command, flags, source, openmp, Path(room))
                made.replace(path)
        _refuse_others(path)
        return ctypes.CDLL(str(path))
    except OSError as reason:
        raise RuntimeError(f"{path} cannot be made ({reason})") from reason


def _refuse_others(path: Path) -> None:
    """RuntimeError where somebody else could have written what will run as a part of this process."""
    found = path.stat()
    if found.st_uid not in (os.getuid(), 0) or found.st_mode & 0o022:
        raise RuntimeError(f"others may write {path}")


def _compiled(command: str, flags: tuple[str, ...], source: Path, openmp: Path | None, room: Path) -> Path:
    # PyTorch brings OpenMP under a name of its own; a second one beside it would have threads of its own.
    object_file, made = room / "object.o", room / "library.so"
    _output([command, *flags, "-c", str(source), "-o", str(object_file)])
    linked = ["-shared", str(object_file), *([str(openmp)] if openmp else ["-fopenmp"]), "-lm", "-o", str(made)]
    _output([command, *linked])
    made.chmod(0o700)
    return made


def _loaded(names: tuple[str, ...]) -> Path | None:
    """The library of one of these names that the process has loaded already."""
    for line in MAPS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        path = Path(line.split(maxsplit=5)[5]) if line.count("/") else None
        if path is not None and path.name.startswith(names) and path.exists():
            return path
    return None


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=PATIENCE, check=False)
    except (OSError, subprocess.TimeoutExpired) as reason:
        raise RuntimeError(f"the C compiler did not run ({reason})") from reason
    if done.returncode:
        said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200])
        raise RuntimeError(f"the C compiler refused: {said}")
    return done.stdout

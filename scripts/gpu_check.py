"""Everything that only a GPU can show, as one command: the tests that need one, whole pictures, then part by part.

`python scripts/gpu_check.py` takes about half an hour, the most telling first, and adds to gpu.json as it goes. Each
step is a process of its own with a time limit, and none keeps the others from running. `--report gpu.json` prints the
tables of BENCHMARKS.md, `--dry-run` does the same on a CPU with the embedded model.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TAIL = 4000  # characters of a step's output that are kept
FORMATS = ("none", "int4", "int8", "fp8")
ALLOCATORS = ("native", "cudaMallocAsync")
PROBES = {
    "own": 400,
    "products": 600,
    "choice": 600,
    "attention": 180,
    "head": 180,
    "pair": 300,
    "streaming": 300,
    "window": 180,
}  # seconds


@dataclass(frozen=True)
class Step:
    """A Python module with its arguments; `writes` where it writes JSON when given --json."""

    name: str
    arguments: tuple[str, ...]
    limit: int
    writes: bool = True
    environment: dict[str, str] = field(default_factory=dict)


def steps(device: str, dry: bool) -> Iterator[Step]:
    """All of them for a device, the most telling first."""
    case: tuple[str, ...] = ("--random", "14b", "--dtype", "bf16", "--size", "512x512", "--device", device)
    two = ("--random", "medium", *case[2:])  # small enough for any card to hold it twice
    times, part, probe = ("--repeat", "2", "--warmup", "1"), ("--tokens", "32"), ("--repeat", "20")
    if dry:
        two = case = ("--model", "tiny", "--size", "32x32", "--device", device, "--steps", "2", "--threads", "1")
        times, part, probe = ("--repeat", "1", "--warmup", "0"), ("--tokens", "2"), ("--repeat", "1", "--quick")
    mps = device == "mps"
    if not mps:
        for allocator in ALLOCATORS:
            arguments = ("pytest", "-q", "-p", "no:cacheprovider", "tests/core/runtime/test_cuda.py")
            yield Step(f"tests, {allocator}", arguments, 300, writes=False, environment=using(allocator))
    formats = [name for name in FORMATS if not (mps and name == "fp8")]
    for name in formats:
        scaled = part if mps else ()  # a whole picture takes minutes there
        yield Step(f"picture, {name}", ("benchmarks", *case, *times, *scaled, "--quantization", name), 400)
    for name, limit in PROBES.items():
        if not (mps and name == "streaming"):
            yield Step(name, ("benchmarks.probes", name, *(case if name != "pair" else two), *probe), limit)
    if not mps:
        yield Step("picture, cudaMallocAsync", ("benchmarks", *case, *times), 400, environment=using("cudaMallocAsync"))
        for name in formats:
            plain = ("--quantization", name, "--no-graphs")
            yield Step(f"picture, {name}, no graphs", ("benchmarks", *case, *times, *part, *plain), 300)


def using(allocator: str) -> dict[str, str]:
    """The environment in which PyTorch takes this allocator for CUDA; ComfyUI prefers the second."""
    return {"PYTORCH_CUDA_ALLOC_CONF": f"backend:{allocator}"}


def run(step: Step, folder: Path) -> dict[str, Any]:
    """What a step said, however it ended."""
    out, said = folder / "result.json", folder / "output.txt"
    out.unlink(missing_ok=True)
    command = ["-m", *step.arguments, *(("--json", str(out)) if step.writes else ())]
    started = time.monotonic()
    # Into a file: a process that a step leaves behind would keep a pipe open.
    with said.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=os.environ | step.environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(step.limit)
            ended = "well" if code == 0 else f"with {code}"
        except subprocess.TimeoutExpired:
            ended = f"not within {step.limit} s"
        finally:
            stop(process)
    return {
        "name": step.name,
        "command": shlex.join([*(f"{k}={v}" for k, v in step.environment.items()), "python", "-m", *step.arguments]),
        "ended": ended,
        "seconds": time.monotonic() - started,
        "result": read(out),
        "output": said.read_text(encoding="utf-8", errors="replace")[-TAIL:],
    }


def read(path: Path) -> Any:
    """What a JSON file holds; None where there is none, or half of one."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process, if it still runs, with all that it has started."""
    if process.poll() is not None:
        return
    if os.name == "nt":
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process.pid)], capture_output=True)
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def check(wanted: list[Step], path: Path) -> bool:
    """Run every step, adding to the list in the JSON file at `path`; whether all ended well."""
    done: list[dict[str, Any]] = read(path) or []
    well = True
    with tempfile.TemporaryDirectory(prefix="nextstep-gpu-") as folder:
        for step in wanted:
            print(f"{step.name} ... ", end="", flush=True)
            done.append(run(step, Path(folder)))
            well = well and done[-1]["ended"] == "well"
            last = (done[-1]["output"].strip().splitlines() or [""])[-1] if done[-1]["ended"] != "well" else ""
            print(f"ended {done[-1]['ended']} after {done[-1]['seconds']:.0f} s  {last}", flush=True)
            part = path.with_suffix(".part")
            part.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
            part.replace(path)
    return well


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help='"cuda" or "mps"')
    parser.add_argument("--dry-run", action="store_true", help="the same on a CPU with the embedded model")
    parser.add_argument("--only", metavar="WORD", help="steps whose name holds this")
    parser.add_argument("--json", type=Path, default=Path("gpu.json"), help="where the results are added")
    parser.add_argument("--report", type=Path, metavar="FILE", help="instead: print the tables of such results")
    options = parser.parse_args()
    if options.report:
        sys.exit(
            subprocess.run([sys.executable, "-m", "benchmarks.tables", options.report.resolve()], cwd=ROOT).returncode
        )
    wanted = steps("cpu" if options.dry_run else options.device, options.dry_run)
    wanted = [step for step in wanted if options.only is None or options.only in step.name]
    sys.exit(0 if check(wanted, options.json.resolve()) else 1)


if __name__ == "__main__":
    main()

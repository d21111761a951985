"""How long a picture takes: seconds for the first token, each further token and the VAE, and the peak of memory.

python scripts/bench.py --model tiny --size 64x64 --json bench.json
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nextstep_core import NextStepPipeline  # noqa: E402

PROMPT = "a red circle on a blue background"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def processor() -> str:
    """The processor's own name where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measure(pipeline: NextStepPipeline, width: int, height: int, steps: int | None, batch: int, seed: int) -> dict:
    """Seconds of one run, by part. Each run has a prompt of its own, so that none finds its prefill in the cache."""
    marks = [time.perf_counter()]
    pipeline.generate(
        f"{PROMPT} {seed}",
        width=width,
        height=height,
        steps=steps,
        num_images_per_prompt=batch,
        seed=seed,
        callback=lambda _: marks.append(time.perf_counter()),
    )
    end = time.perf_counter()
    tokens = len(marks) - 1
    return {
        "first_token": marks[1] - marks[0],
        "token": (marks[-1] - marks[1]) / max(1, tokens - 1),
        "vae": end - marks[-1],
        "picture": (end - marks[0]) / batch,
        "tokens_per_second": tokens * batch / (marks[-1] - marks[0]),
    }


def peak_memory(device: torch.device) -> int:
    """Most bytes in use so far: of the process on a CPU, of the device elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help='a folder, a hub id or "tiny"')
    parser.add_argument("--size", default="64x64", help="width x height in pixels")
    parser.add_argument("--steps", type=int, help="default: the checkpoint's recommendation")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; default: as torch chooses")
    parser.add_argument("--repeat", type=int, default=7, help="counted runs, after one warm-up")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    width, height = map(int, options.size.split("x"))
    pipeline = NextStepPipeline.from_pretrained(options.model, device=options.device, dtype=DTYPES[options.dtype])
    runs = [measure(pipeline, width, height, options.steps, options.batch, seed) for seed in range(options.repeat + 1)][
        1:
    ]
    result = {
        "command": "python scripts/bench.py " + " ".join(sys.argv[1:]),
        "machine": f"{processor()}, {torch.get_num_threads()} threads" if options.device == "cpu" else options.device,
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "settings": f"{options.size}, {options.steps or pipeline.engine.recommended().steps} steps, "
        f"cfg {pipeline.engine.recommended().cfg:g}, batch {options.batch}, {options.dtype}",
        "median": {name: statistics.median(run[name] for run in runs) for name in runs[0]},
        "spread": {name: [min(run[name] for run in runs), max(run[name] for run in runs)] for name in runs[0]},
        "peak_memory_bytes": peak_memory(pipeline.device),
    }
    for name in ("command", "machine", "versions", "settings"):
        print(f"{name:10} {result[name]}")
    for name, value in result["median"].items():
        low, high = result["spread"][name]
        unit = "" if name.endswith("second") else " s"
        print(f"{name:18} {value:10.4f}{unit}  (from {low:.4f} to {high:.4f})")
    print(f"{'peak memory':18} {result['peak_memory_bytes'] / 2**20:10.0f} MiB")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()

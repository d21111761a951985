"""How few network calls per token each sampler needs: accuracy on held-out prompts over steps, on the embedded model.

python -m benchmarks.samplers --count 100 --output docs/samplers.md
python -m benchmarks.samplers --sampler flow-heun   # one row
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from nextstep_core import NextStepPipeline
from nextstep_core.sampling.solvers import SAMPLERS
from training.evaluate import measure_singles

STEPS = (2, 3, 4, 6, 8, 12, 20, 28)
REFERENCE_STEPS = 28
SLACK = 0.02


def measure(pipeline: NextStepPipeline, name: str, count: int) -> dict[int, float]:
    """Share of right pictures by steps."""
    possible = [steps for steps in STEPS if steps >= SAMPLERS[name].min_steps]
    return {s: measure_singles(pipeline, count, sampler=name, steps=s).share("all") for s in possible}


def fewest_calls(name: str, accuracy: dict[int, float]) -> int:
    """Network calls per token of the fewest steps that come within SLACK of the sampler's own REFERENCE_STEPS."""
    enough = min(s for s, share in accuracy.items() if share >= accuracy[REFERENCE_STEPS] - SLACK)
    return SAMPLERS[name].calls(enough)


def table(results: dict[str, dict[int, float]], count: int) -> str:
    """Markdown: a row per sampler, a column per number of steps."""
    lines = [
        f"Share of {count} held-out single-object prompts drawn right (background, color and shape), by steps per",
        "token, and the fewest network calls per token that stay within",
        f"{SLACK:.0%} of the same sampler's {REFERENCE_STEPS} steps.",
        "",
        "| sampler | " + " | ".join(f"{steps} steps" for steps in STEPS) + " | fewest calls |",
        "| --- |" + " ---: |" * (len(STEPS) + 1),
    ]
    for name, accuracy in results.items():
        cells = [f"{accuracy[s]:.0%}" if s in accuracy else "" for s in STEPS]
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {fewest_calls(name, accuracy)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=100, help="prompts per cell")
    parser.add_argument("--sampler", choices=SAMPLERS, help="measure this one alone")
    parser.add_argument("--output", type=Path, help="also write a Markdown page here")
    arguments = parser.parse_args()
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    names = [arguments.sampler] if arguments.sampler else list(SAMPLERS)
    text = table({name: measure(pipeline, name, arguments.count) for name in names}, arguments.count)
    print(text)
    if arguments.output:
        command = f"python -m benchmarks.samplers --count {arguments.count} --output {arguments.output}"
        versions = f"torch {torch.__version__}, float32 on the CPU"
        arguments.output.write_text(f"# Samplers on the embedded model\n\n{text}\n\nMade by `{command}`, {versions}.\n")


if __name__ == "__main__":
    main()

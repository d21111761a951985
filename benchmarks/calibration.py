"""int4 in every way: error of the weights and of the transformer's conditions on tokens that were drawn, by how scales
are chosen, by how many prompts it is fitted to, and by what is left in int8; and what fitting takes at true scale.

    python -m benchmarks.calibration                               # of the embedded model
    python -m benchmarks.calibration --captions captions.txt       # for nextstep calibrate tiny --size 64 --prompts
    python -m benchmarks.checkpoint FOLDER --layers 1              # 14.95 billion parameters but for their layers
    python -m benchmarks.calibration --scale FOLDER --prompts 8 --threads 2
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.report import context
from nextstep_core import NextStepPipeline
from nextstep_core.loading import compensated as compensated_module
from nextstep_core.loading.build import ModelPlan, empty_model, plan_model
from nextstep_core.loading.calibration import Drawn
from nextstep_core.loading.compensated import DOWN, GATE_UP, OUT, QKV, Compensated
from nextstep_core.loading.store import resolve_source
from nextstep_core.runtime.devices import forget_peak, peak_memory
from nextstep_core.runtime.quantization import Recipe, compensation, quantized_linears
from nextstep_core.runtime.quantization.formats import INT4, INT4_128, INT8, Format, Int4
from nextstep_core.runtime.quantization.layers import Storage
from nextstep_core.runtime.quantization.search import LEAST, MOST, TINY
from training.evaluate import held_out_singles
from training.scenes import SQUARE, caption, place_single, sample_pair, triples

COUNTS = (12, 24, 48, 96)  # prompts that int4 is fitted to
HELD_OUT = 24
SEED = 7  # of what is measured with; how int4 is fitted was settled with others
SIDE = 64
TYPES = (QKV, OUT, GATE_UP, DOWN)
PUBLISHED_LAYERS = 48


@dataclass(frozen=True)
class Between(Int4):
    """Steps from the least to the greatest value of a group."""

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        groups = matrix.float().view(len(matrix), -1, self.group)
        return self._of(groups, *self._ends(groups))

    def _ends(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(groups, dim=2, keepdim=True)
        scale = ((high - low) / (MOST - LEAST)).clamp_min(TINY).to(self.scale_dtype).float()
        return scale, (low - LEAST * scale).to(self.scale_dtype).float()

    def _of(self, groups: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        integers = ((groups - zero) / scale).round().clamp(LEAST, MOST)
        return self.stored((integers - LEAST).to(torch.uint8).flatten(1), scale[..., 0], zero[..., 0])


@dataclass(frozen=True)
class HalfQuadratic(Between):
    """HQQ (Badri and Shaji 2023) with its published settings: the zero for the least |error| ** 0.7, by turns."""

    def quantize(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        groups = matrix.float().view(len(matrix), -1, self.group)
        scale, zero = self._ends(groups)
        power, beta = 0.7, 10.0
        for _ in range(20):
            integers = ((groups - zero) / scale).round().clamp(LEAST, MOST)
            left = groups - (integers * scale + zero)
            size = left.abs().clamp_min(TINY)
            apart = left.sign() * (size - size ** (power - 1) / beta).clamp_min(0)
            zero = (groups - integers * scale - apart).mean(dim=2, keepdim=True)
            beta *= 1.01
        return self._of(groups, scale, zero.to(self.scale_dtype).float())


@dataclass(frozen=True)
class Mixed:
    """A recipe, but for the matrices of some types of layers in int8, or for all others in float."""

    recipe: Recipe
    int8: tuple[str, ...] = ()
    only: tuple[str, ...] = TYPES

    @property
    def name(self) -> str:
        return self.recipe.name

    @property
    def has_layouts(self) -> bool:
        return self.recipe.has_layouts

    def format_of(self, name: str, rows: int, columns: int) -> Format | None:
        if name.startswith("layers.") and not name.endswith(self.only):
            return None
        return INT8 if name.endswith(self.int8) else self.recipe.format_of(name, rows, columns)


@dataclass(frozen=True)
class Row:
    """A way to store the transformer, its bits a weight, and the relative errors that come of it."""

    name: str
    bits: float
    weights: float
    conditions: float
    seconds: float


def captions(count: int) -> list[str]:
    """Captions as the embedded model was trained on: one object and two, by turns."""
    rng, singles = random.Random("calibration"), triples(held_out=False)
    one = (caption(place_single(rng, rng.choice(singles)), name_size=rng.random() < 0.5) for _ in range(count))
    two = (caption(sample_pair(rng)) for _ in range(count))
    return [text for pair in zip(one, two) for text in pair][:count]


def unseen(count: int) -> list[str]:
    """Captions of triples that were never trained on."""
    rng, third = random.Random("calibration, held out"), count // 3
    singles = [text for text, _, _ in held_out_singles(count - third, SEED, SQUARE)]
    return singles + [caption(sample_pair(rng, held_out=True)) for _ in range(third)]


@dataclass(frozen=True)
class Split(Drawn):
    """What was drawn of `captions` and, after those, of `unseen`; the first `fitted` are fitted to."""

    fitted: int = 0

    @property
    def known(self) -> Drawn:
        return self.part(range(self.fitted))

    @property
    def held_out(self) -> Drawn:
        return self.part(range(self.pictures - HELD_OUT, self.pictures))


def draw() -> Split:
    """By the embedded model, in float32."""
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    drawn = pipeline.calibrate(captions(max(COUNTS)) + unseen(HELD_OUT), height=SIDE, width=SIDE)
    return Split(drawn.ids, drawn.valid, drawn.tokens, drawn.grid)


def measured(name: str, storage: Storage, drawn: Split, fitted: int = 0) -> Row:
    """Store the embedded model in this way, fitted to so many prompts or to none."""
    plan = replace(plan_model(resolve_source("tiny"), "int4"), recipe=storage)
    compensated = Compensated(plan, replace(drawn, fitted=max(1, fitted)), fit=fitted > 0)
    started = time.process_time()
    state = dict(compensated.read(torch.float32))
    seconds = time.process_time() - started
    assert compensated.error is not None
    return Row(name, *weights_of(plan, state), compensated.error, seconds)


def weights_of(plan: ModelPlan, state: dict[str, Tensor]) -> tuple[float, float]:
    """Bits a weight of the transformer's matrices, and their relative error."""
    exact = dict(replace(plan, recipe=None).read_model("cpu", torch.float32))
    formats = {name: layer.format for name, layer in quantized_linears(empty_model(plan.config, plan.recipe))}
    bits = lost = held = numbers = 0.0
    for name, matrix in exact.items():
        layer = name.removesuffix(".weight")
        if not name.startswith("layers.") or matrix.ndim != 2:
            continue
        numbers += matrix.numel()
        held += float(matrix.square().sum())
        if layer not in formats:
            bits += 16 * matrix.numel()
            continue
        parts = state[name], state[f"{name}_scale"]
        bits += 8 * sum(part.nbytes for part in parts)
        lost += float((formats[layer].dequantize(*parts, torch.float32) - matrix).square().sum())
    return bits / numbers, (lost / held) ** 0.5


def ways(drawn: Split) -> list[Row]:
    """How scales are chosen, and to how many prompts the matrices are fitted."""
    plain = {
        "from least to greatest": Between("int4", 64),
        "HQQ": HalfQuadratic("int4", 64),
        "drawn in, least squares": INT4,
        "the same, groups of 128": INT4_128,
    }
    rows = [measured(name, Recipe("int4", format, INT8), drawn) for name, format in plain.items()]
    rows += [measured(f"fitted to {count} prompts", Recipe("int4", INT4, INT8), drawn, count) for count in COUNTS]
    return rows


def parts(drawn: Split) -> list[Row]:
    """What each part of fitting does, with many prompts and with few: all of it, and all but one."""
    without: dict[str, tuple[ModuleType, dict[str, float]]] = {
        "all": (compensation, {}),
        "no pass after rounding": (compensation, {"PASSES": 0}),
        "three passes": (compensation, {"PASSES": 3}),
        "prompts count as tokens do": (compensated_module, {"PROMPT": 1.0}),
        "nothing mended": (compensated_module, {"MENDED": 0.0}),
        "damping of 0.03": (compensation, {"DAMPING": 0.03}),
    }
    rows = []
    for count in (max(COUNTS), min(COUNTS)):
        for name, (module, values) in without.items():
            with ExitStack() as stack:
                for constant, value in values.items():
                    stack.enter_context(patch.object(module, constant, value))
                rows.append(measured(f"{count} prompts, {name}", Recipe("int4", INT4, INT8), drawn, count))
    return rows


def types(drawn: Split) -> list[Row]:
    """What each type of matrix loses alone, and what is left where it stays in int8."""
    recipe, count = Recipe("int4", INT4, INT8), max(COUNTS)
    rows = [measured(f"{part} alone", Mixed(recipe, only=(part,)), drawn) for part in TYPES]
    for some in (*((part,) for part in TYPES), (OUT, DOWN)):
        for fitted in (0, count):
            name = f"{' and '.join(some)} in int8{', fitted' if fitted else ''}"
            rows.append(measured(name, Mixed(recipe, int8=some), drawn, fitted))
    return [*rows, measured("all in int8", Recipe("int8", INT8, INT8), drawn)]


def search_seconds(rows: int = 512, columns: int = 5120) -> float:
    """CPU seconds that scales and zeros of a billion weights take without data."""
    matrix = torch.randn(rows, columns)
    INT4.quantize(matrix[:64])
    started = time.process_time()
    INT4.quantize(matrix)
    return (time.process_time() - started) / matrix.numel() * 1e9


def at_scale(folder: Path, prompts: int, side: int) -> dict[str, Any]:
    """What fitting a checkpoint takes, with tokens of unit variance; a layer's share is told by itself."""
    plan = plan_model(folder, "int4")
    config, generator = plan.config, torch.Generator().manual_seed(0)
    grid = side // 16, side // 16
    ids = torch.randint(config.pad_token_id_added or config.vocab_size, (2 * prompts, 32), generator=generator)
    tokens = torch.randn(prompts, grid[0] * grid[1], config.token_dim, generator=generator)
    compensated = Compensated(plan, Drawn(ids, torch.ones_like(ids, dtype=torch.bool), tokens, grid))
    forget_peak(torch.device("cpu"))
    begun: list[tuple[float, float]] = []
    started = time.monotonic(), time.process_time()

    def layer(*_: int) -> None:
        begun.append((time.monotonic(), time.process_time()))

    for _ in compensated.read(torch.bfloat16, layer):
        pass
    ended, layers = (time.monotonic(), time.process_time()), len(begun)
    peak, of = peak_memory(torch.device("cpu"))
    each = [(ended[n] - begun[0][n]) / layers for n in (0, 1)]
    return {
        "prompts": prompts,
        "positions": len(ids) * (ids.shape[1] + tokens.shape[1] - 1),
        "layers": layers,
        "beside_layers": begun[0][0] - started[0],
        "seconds_a_layer": each[0],
        "cpu_seconds_a_layer": each[1],
        "hours_for_48_layers": PUBLISHED_LAYERS * each[0] / 3600,
        "cpu_hours_for_48_layers": PUBLISHED_LAYERS * each[1] / 3600,
        "peak_memory": peak,
        "of": of,
        "error": compensated.error,
    }


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = ["| | bits a weight | error of the weights | error of `c` |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {r.name} | {r.bits:.2f} | {r.weights:.2%} | {r.conditions:.2%} |" for r in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=Path, metavar="FOLDER", help="instead: what fitting this checkpoint takes")
    parser.add_argument("--prompts", type=int, default=8, help="with --scale: pictures to fit to")
    parser.add_argument("--size", type=int, default=256, help="with --scale: their side in pixels")
    parser.add_argument("--only", choices=("ways", "parts", "types"), help="one of the tables")
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="instead: write what the embedded model draws here"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if options.captions is not None:
        options.captions.write_text("".join(f"{text}\n" for text in captions(max(COUNTS))))
        return
    torch.set_num_threads(options.threads)
    where: dict[str, Any] = context(torch.device("cpu"))
    for name, text in where.items():
        print(f"{name:10} {text}")
    result: dict[str, Any] = {}
    if options.scale is not None:
        result["scale"] = at_scale(options.scale, options.prompts, options.size)
        print("\n".join(f"{name:26}{value}" for name, value in result["scale"].items()))
    else:
        result["search_seconds"] = search_seconds()
        print(f"\nwithout data: {result['search_seconds']:.0f} s of a CPU for a billion weights")
        drawn = draw()
        tables: dict[str, Callable[[Split], list[Row]]] = {"ways": ways, "parts": parts, "types": types}
        for name, rows_of in tables.items():
            if options.only in (None, name):
                rows = rows_of(drawn)
                print(f"\n{table(rows)}", flush=True)
                result[name] = [asdict(row) for row in rows]
    if options.json:
        options.json.write_text(json.dumps(where | result, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""One probe, by name; the model and the case are named as for `python -m benchmarks`.

python -m benchmarks.probes head --random 14b --dtype bf16 --size 512x512 --json head.json
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.__main__ import case_of, device_of, parse, plain_subject, write
from benchmarks.report import context
from benchmarks.subjects import PUBLISHED_CONFIG, SHAPES
from benchmarks.tables import table_of
from nextstep_core.loading.checkpoint import DTYPES
from nextstep_core.model.config import NextStepConfig

from .attention import attention_times
from .choice import choices
from .head import head_times
from .own import own_times
from .pair import pair_draws
from .products import product_times
from .streaming import streaming_times
from .window import window_times


@dataclass(frozen=True)
class Extent:
    """What the probes go through: steps of the head, keys that are seen, rows of a product, positions of a pass.

    Products read at least `cache_bytes`, which should be more than the device's cache; `tokens` are streamed for.
    """

    steps: tuple[int, ...] = (2, 4, 7, 14, 28, 50)
    visible: tuple[int, ...] = (256, 512, 768, 1024, 1280, 4352)
    rows: tuple[int, ...] = (1, 2, 3, 4, 8, 16, 32)
    positions: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    cache_bytes: int = 1 << 27
    tokens: int = 16


QUICK = Extent(steps=(2, 3), visible=(256,), rows=(2,), positions=(1, 2), cache_bytes=1 << 16, tokens=2)


def config_of(options: Namespace) -> NextStepConfig:
    """The shape of the model that the command line names."""
    if options.random:
        return NextStepConfig.from_dict(PUBLISHED_CONFIG | SHAPES[options.random])
    return plain_subject(options).config


def attention(options: Namespace, extent: Extent) -> Any:
    """Attention by backend and length."""
    where = device_of(options), DTYPES[options.dtype]
    return attention_times(config_of(options), extent.visible, *where, options.repeat)


def products(options: Namespace, extent: Extent) -> Any:
    """Products by shape and row count."""
    return product_times(config_of(options), extent.rows, extent.cache_bytes, device_of(options), options.repeat)


def choice(options: Namespace, extent: Extent) -> Any:
    """What the chooser takes."""
    return choices(config_of(options), device_of(options), DTYPES[options.dtype], extent.cache_bytes)


def head(options: Namespace, extent: Extent) -> Any:
    """The head by its steps."""
    return head_times(case_of(options, plain_subject(options)), extent.steps, options.repeat)


def own(options: Namespace, extent: Extent) -> Any:
    """Our kernels in their trials."""
    return own_times(case_of(options, plain_subject(options)), extent.positions)


def streaming(options: Namespace, extent: Extent) -> Any:
    """Half of the layers on the host."""
    return streaming_times(case_of(options, plain_subject(options)), extent.tokens)


def pair(options: Namespace, extent: Extent) -> Any:
    """Two models, one unloaded."""
    return pair_draws(lambda: case_of(options, plain_subject(options)))


def window(options: Namespace, extent: Extent) -> Any:
    """Several positions in a pass."""
    return window_times(case_of(options, plain_subject(options)), extent.positions, options.repeat)


PROBES: dict[str, Callable[[Namespace, Extent], Any]] = {
    run.__name__: run for run in (own, attention, products, choice, head, streaming, pair, window)
}


def main() -> None:
    """The probe that the first argument names; `--quick` does little of it, for trying it out."""
    name, *arguments = sys.argv[1:] or [""]
    if name not in PROBES:
        sys.exit(f"The first argument names the probe: {', '.join(PROBES)}. The rest is as for python -m benchmarks.")
    extent = QUICK if "--quick" in arguments else Extent()
    options = parse([argument for argument in arguments if argument != "--quick"])
    if options.threads:
        torch.set_num_threads(options.threads)
    result = PROBES[name](options, extent)
    print(table_of(name, result))
    if options.json:
        write(context(device_of(options)) | {name: result}, options.json)
    if name == "pair" and not result["same"]:
        sys.exit("The first model's tokens changed when the second was unloaded.")


if __name__ == "__main__":
    main()

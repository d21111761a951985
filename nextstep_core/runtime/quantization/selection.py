"""Which product a matrix is multiplied with, for how many rows: by trials on the device, with the model's own weights.

All products that are taken for a matrix read the same weight, which is held once. The usual product is what the others
are measured by, so that what is taken is never slower.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ...errors import NextStepError
from ..chosen import Chooser, Switch
from ..trials import MARGIN, SLOWER, WON, Arguments, Candidate, Outcome, Trial, difference
from .formats import Format
from .kernel import AS_STORED, PLAIN, TOLERANCE, Kernel, by_rows, plain
from .products import OWN, racing, usual

log = logging.getLogger(__name__)

Matrix: TypeAlias = Callable[[], tuple[Tensor, Tensor]]  # a weight and its scale as the format says, on the device

# Rows that are tried, and how much each counts: two are a picture with guidance, more a batch or a window.
ROWS = {2: 8, 3: 2, 4: 2, 8: 2, 16: 1, 32: 1}
COLD = 1 << 26  # bytes that a trial goes through, where the cache's size is not known: more than most caches hold
MOST_MATRICES = 64
PACKED = "torch-int4"
# What a product loses where weights do not lie as the format says: our kernels for whole layers and for the head read
# those alone, and save 2.5 launches for each, of 1.5 microseconds.
LOST = 4e-6
WIDE = 1 << 20  # numbers of a matrix; on a CPU, smaller ones have nothing to gain


def choose(
    format: Format, rows: int, columns: int, matrices: Sequence[Matrix], dtype: torch.dtype, chooser: Chooser
) -> Kernel:
    """The kernel for matrices (rows, columns) of a format, computing in `dtype`.

    NextStepError when not even the plain product, which all others are compared with, is finite.
    """
    weight, scale = matrices[0]()
    base = usual_kernel(format, columns, weight, scale, dtype, chooser.switch)
    if weight.device.type != "cuda" and rows * columns < WIDE:
        return base
    kernels = racing(format, base, weight)
    inputs = _Inputs(matrices, base, kernels, columns, dtype)
    outcomes: dict[int, Outcome] = {}
    for count in ROWS:
        able = [_candidate(kernel, base) for kernel in kernels if kernel.takes(count)]
        what = f"{format.name} {rows}x{columns}, {count} rows, {str(dtype).removeprefix('torch.')}"
        what += "" if base.name == PLAIN else f", beside {base.name}"
        found = chooser.outcome(what, able, partial(inputs.trial, what, count))
        if found is not None:
            outcomes[count] = found
    if not outcomes:
        x = _inputs(2, columns, weight.device, dtype)
        return _untried(format, base, kernels, x, weight, scale, chooser.switch)
    return best(base, kernels, outcomes)


def usual_kernel(
    format: Format, columns: int, weight: Tensor, scale: Tensor, dtype: torch.dtype, switch: Switch
) -> Kernel:
    """The first of the usual kernels that is right on the device of a weight."""
    x = _inputs(2, columns, weight.device, dtype)
    expected = plain(format).run(x, weight, scale).float()
    if not expected.isfinite().all():
        raise NextStepError(
            "A matrix of the {format} weights gives numbers that {dtype} cannot hold. Download or convert "
            "the file again, or choose another dtype.",
            format=format.name,
            dtype=str(dtype).removeprefix("torch."),
        )
    *packed, last = usual(format, weight.device.type)
    able = (kernel for kernel in packed if kernel.name in switch)
    return next((kernel for kernel in able if _is_right(kernel, format, x, weight, scale, expected)), last)


def _is_right(kernel: Kernel, format: Format, x: Tensor, weight: Tensor, scale: Tensor, expected: Tensor) -> bool:
    try:
        error = difference(kernel.run(x, kernel.packed(weight), kernel.packed_scale(scale)), expected)
        if not error <= TOLERANCE:
            raise RuntimeError(f"it is off by {error:.1%}")
    except Exception as reason:  # a device's own kinds of failure
        log.info("%s: no %s here (%s)", format.name, kernel.name, str(reason).splitlines()[:1])
        return False
    return True


def _untried(
    format: Format, base: Kernel, kernels: Sequence[Kernel], x: Tensor, weight: Tensor, scale: Tensor, switch: Switch
) -> Kernel:
    """What is taken where no trial was possible, as on a card that is full: a packed product that is right moves far
    less than the plain one on every card that has it."""
    expected = base.run(x, base.packed(weight), base.packed_scale(scale)).float()
    packed = (kernel for kernel in kernels if kernel.name == PACKED and kernel.name in switch)
    return next((kernel for kernel in packed if _is_right(kernel, format, x, weight, scale, expected)), base)


def best(base: Kernel, kernels: Sequence[Kernel], outcomes: Mapping[int, Outcome]) -> Kernel:
    """Of those that read the same weight, for each number of rows the fastest; of all that may be read, what is fastest
    over all numbers of rows, as far as they count, and where our kernels run, as far as it is worth their loss."""
    lying: dict[Hashable, list[Kernel]] = {base.lies: [base]}
    for kernel in kernels:
        lying.setdefault(kernel.lies, []).append(kernel)
    found: list[tuple[float, Kernel]] = []
    for same in lying.values():
        always = next((kernel for kernel in same if kernel.takes(max(ROWS) + 1)), None)
        speeds = {count: [(_speed(kernel, base, outcomes.get(count)), kernel) for kernel in same] for count in ROWS}
        taken = {count: max(some, key=lambda pair: pair[0]) for count, some in speeds.items()}
        if always is None or not all(speed for speed, _ in taken.values()):
            continue
        lost = {count: 0.0 if same[0].lies == AS_STORED else _lost(outcomes.get(count)) for count in ROWS}
        cost = sum(weight * (1 / taken[count][0] + lost[count]) for count, weight in ROWS.items())
        last = taken[max(ROWS)][1]
        few = {count: kernel for count, (_, kernel) in taken.items()}
        found.append((cost, by_rows(few, last if last.takes(max(ROWS) + 1) else always)))
    usual_cost, usual_one = found[0]
    cost, one = min(found, key=lambda pair: pair[0])
    return one if cost * (1 + MARGIN) < usual_cost else usual_one


def _lost(outcome: Outcome | None) -> float:
    """Of the usual one's time, what is lost with our kernels, if they run here."""
    if outcome is None or not any(v.name == OWN and v.verdict in (WON, SLOWER) for v in outcome.verdicts):
        return 0.0
    return LOST / max(outcome.plain, LOST)


def _speed(kernel: Kernel, base: Kernel, outcome: Outcome | None) -> float:
    """How fast a kernel is, of the usual one's speed; 0 where it is not to be taken."""
    if kernel is base:
        return 1.0
    verdicts = () if outcome is None else outcome.verdicts
    ratio = next((v.ratio for v in verdicts if v.name == kernel.name and v.verdict in (WON, SLOWER)), None)
    if ratio is None:
        return 0.0
    # What reads the same weight has to be faster by more than times waver; what reads another is weighed as a whole.
    return ratio if kernel.lies != base.lies or ratio >= 1 + MARGIN else 0.0


def _candidate(kernel: Kernel, base: Kernel) -> Candidate:
    def prepare(x: Tensor, usual_weight: Tensor, usual_scale: Tensor, weight: Tensor, scale: Tensor) -> Arguments:
        if kernel.lies == base.lies:
            return x, usual_weight, usual_scale
        return x, kernel.packed(weight), kernel.packed_scale(scale)

    return Candidate(kernel.name, kernel.version, lambda: kernel.run, kernel.missing, prepare)


def _inputs(rows: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device, dtype)


def cold_bytes(device: torch.device) -> int:
    """What a trial goes through at least, so that its weights are not in the cache any more when they come again."""
    if device.type != "cuda":
        return COLD
    return max(COLD, 2 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)))


class _Inputs:
    """Matrices for the trials of one shape, made when the first is held."""

    def __init__(
        self, matrices: Sequence[Matrix], base: Kernel, kernels: Sequence[Kernel], columns: int, dtype: torch.dtype
    ) -> None:
        self._matrices, self._base, self._columns, self._dtype = matrices, base, columns, dtype
        self._own = any(kernel.lies != base.lies for kernel in kernels)
        self._parts: list[tuple[Tensor, ...]] = []
        self._bytes = 0

    def trial(self, what: str, rows: int) -> Trial:
        """The trial for a number of rows."""
        if not self._parts:
            self._fill()
        device, run = self._parts[0][0].device, self._base.run
        x = _inputs(rows, self._columns, device, self._dtype)

        def usually(x: Tensor, weight: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
            return run(x, weight, scale)

        return Trial(what, usually, [(x, *part) for part in self._parts], TOLERANCE, device, self._bytes)

    def _fill(self) -> None:
        for matrix in self._matrices[:MOST_MATRICES]:
            weight, scale = matrix()
            packed, packed_scale = self._base.packed(weight), self._base.packed_scale(scale)
            own = (weight, scale) if self._own else (packed, packed_scale)
            self._parts.append((packed, packed_scale, *own))
            self._bytes += weight.nbytes + scale.nbytes
            if self._bytes >= cold_bytes(weight.device):
                break

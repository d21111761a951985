"""Scale and zero of every group of columns for the least squared error of what is stored, without looking at data.

Between the least and the greatest value of a group lie 16 steps; a few values at either end make them wide for all
others. So both ends are drawn in, one after the other, as far as that lowers the error of the group; then scale and
zero are fitted to the integers by least squares, and the integers to them. No step is taken that makes a group worse.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

METHOD = "least squares"  # what is kept tells how it was made; another name has it made anew
DRAWN_IN = (0.94, 0.88, 0.8)  # shares of an end that are tried in its place
REFITS = 2
LEAST, MOST = -8, 7  # the integers, less their middle
TINY = 1e-8  # stands in for the scale of groups that are all alike
AT_ONCE = 1 << 17  # numbers that a CPU works on together: they stay in its cache from one operation to the next


@dataclass
class _Fit:
    """Scale and zero (rows, groups, 1), rounded as they are stored, and the error that they leave in each group."""

    scale: Tensor
    zero: Tensor
    error: Tensor

    def take_better(self, other: _Fit) -> Tensor:
        """In the groups where `other` is better, become it; says where."""
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.zero = torch.where(better, other.zero, self.zero)
        self.error = torch.where(better, other.error, self.error)
        return better


class _Groups:
    """Groups (rows, groups, columns) float32 with memory to try scales and zeros in."""

    def __init__(self, values: Tensor, weights: Tensor | None, stored: torch.dtype) -> None:
        self.values, self.weights, self.stored = values, weights, stored
        self.steps, self.integers = torch.empty_like(values), torch.empty_like(values)

    def between(self, low: Tensor, high: Tensor) -> _Fit:
        """The fit whose 16 values go from `low` to `high`."""
        scale = self._rounded(((high - low) / (MOST - LEAST)).clamp_min(TINY))
        return self.fit(scale, self._rounded(low - LEAST * scale))

    def fit(self, scale: Tensor, zero: Tensor) -> _Fit:
        """What this scale and zero leave; `integers` are those that they give."""
        torch.sub(self.values, zero, out=self.steps).div_(scale)
        torch.round(self.steps, out=self.integers).clamp_(LEAST, MOST)
        self.steps.sub_(self.integers)
        return _Fit(scale, zero, self._sum(self.steps.square_()) * scale.square())

    def refitted(self, fit: _Fit) -> _Fit:
        """Scale and zero by least squares for the integers of `fit`, and the integers anew for these."""
        self.fit(fit.scale, fit.zero)
        count = self.values.shape[-1] if self.weights is None else self.weights.sum(dim=-1, keepdim=True)
        mean, middle = self._sum(self.integers) / count, self._sum(self.values) / count
        torch.mul(self.integers, self.values, out=self.steps)
        shared = self._sum(self.steps) / count - mean * middle
        spread = self._sum(torch.square(self.integers, out=self.steps)) / count - mean.square()
        # Where all integers are one, or run against the values, there is nothing to fit.
        scale = self._rounded(shared / spread)
        scale = torch.where((spread > 0) & (scale > TINY), scale, fit.scale)
        return self.fit(scale, self._rounded(middle - scale * mean))

    def _sum(self, values: Tensor) -> Tensor:
        weighted = values if self.weights is None else values * self.weights
        return weighted.sum(dim=-1, keepdim=True)

    def _rounded(self, values: Tensor) -> Tensor:
        return values.to(self.stored).float()


def search(groups: Tensor, stored: torch.dtype, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Scale and zero, both (rows, groups, 1) in the dtype `stored`, of groups (rows, groups, columns) float32.

    `weights`, which broadcast to the groups, say how much each column's squared error counts.
    """
    if groups.device.type != "cpu" or groups.numel() <= AT_ONCE:
        fit = _searched(groups, weights, stored)
        return fit.scale.to(stored), fit.zero.to(stored)
    rows = max(1, AT_ONCE // groups[0].numel())
    by_row = weights is not None and len(weights) == len(groups)
    parts = [
        search(piece, stored, weights if weights is None or not by_row else weights[n * rows : (n + 1) * rows])
        for n, piece in enumerate(groups.split(rows))
    ]
    scales, zeros = zip(*parts)
    return torch.cat(scales), torch.cat(zeros)


def _searched(values: Tensor, weights: Tensor | None, stored: torch.dtype) -> _Fit:
    groups = _Groups(values, weights, stored)
    low, high = values.amin(dim=-1, keepdim=True), values.amax(dim=-1, keepdim=True)
    best, drawn_in = groups.between(low, high), low
    for share in DRAWN_IN:
        better = best.take_better(groups.between(share * low, high))
        drawn_in = torch.where(better, share * low, drawn_in)
    for share in DRAWN_IN:
        best.take_better(groups.between(drawn_in, share * high))
    for _ in range(REFITS):
        best.take_better(groups.refitted(best))
    return best

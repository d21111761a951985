"""int4 for what a matrix is multiplied by: the error of its products, not of its numbers, is made small.

Of the inputs x only their Gram matrix, the sum of x x^T, is needed. First column after column is rounded, and what that
does to the products is taken up by the columns that follow (GPTQ, Frantar and others 2022). Then, in passes over
the groups, scale and zero are fitted anew by least squares, and every integer is set to the best that it can be while
all others stay. No pass makes a row's error greater.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..interrupt import Check, go_on
from .formats import Int4
from .search import LEAST, MOST, TINY, search

# Of the mean square of an input, added to all: what few prompts do not show is not to be paid for it.
DAMPING = 0.5
HARDER = 10.0  # times as much where rounding left no positive matrix
TRIES = 4
PASSES = 1
ROWS = 4096  # at once: a few numbers for each of their weights lie in memory


def compensated(format: Int4, matrix: Tensor, gram: Tensor, check: Check = go_on) -> tuple[Tensor, Tensor]:
    """Weight and scale as `format` stores them, of a matrix (rows, columns) whose inputs have the Gram matrix
    (columns, columns), both float32 on one device. `check` is called all the while and may raise to stop."""
    # Apple GPUs lack some of the factorizations.
    on = "cpu" if gram.device.type == "mps" else gram.device
    curvature, ahead = (factor.to(gram.device) for factor in _factors(gram.to(on)))
    weight, scale = format.empty(len(matrix), matrix.shape[1], matrix.device)
    for start in range(0, len(matrix), ROWS):
        rows = slice(start, start + ROWS)
        columns = _Columns(matrix[rows].float().T.contiguous(), curvature, format, check)
        columns.round_forward(ahead)
        for _ in range(PASSES):
            columns.improve()
        weight[rows], scale[:, rows] = columns.stored()
    return weight, scale


def product_error(matrix: Tensor, other: Tensor, gram: Tensor) -> Tensor:
    """Of each row, the squared error of its products when `other` takes the place of `matrix`."""
    difference = other.float() - matrix.float()
    return (difference @ gram * difference).sum(dim=1)


def _factors(gram: Tensor) -> tuple[Tensor, Tensor]:
    """The damped Gram matrix, and the upper Cholesky factor of its inverse: how an error in a column is best taken up
    by those behind it."""
    mean = gram.diagonal().mean()
    share = DAMPING
    for _ in range(TRIES):
        damped = gram.clone()
        damped.diagonal().add_(share * mean + TINY)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return damped, upper
        share *= HARDER
    plain = gram.diagonal() + share * mean + TINY  # inputs without end: each column for itself
    return torch.diag(plain), torch.diag(plain.rsqrt())


@dataclass
class _Group:
    """Scale and zero (rows,) of a group, as they are stored."""

    scale: Tensor
    zero: Tensor


class _Columns:
    """Some rows of a matrix, column by column: `wanted` and what is `stored` for it, (columns, rows) float32."""

    def __init__(self, wanted: Tensor, curvature: Tensor, format: Int4, check: Check) -> None:
        self.wanted, self.curvature, self.format, self.check = wanted, curvature, format, check
        self.integers, self.values = torch.empty_like(wanted), torch.empty_like(wanted)
        self.groups: list[_Group] = []

    def round_forward(self, ahead: Tensor) -> None:
        """Round column after column, each after what those before it did."""
        left, size = self.wanted.clone(), self.format.group
        for start in range(0, len(left), size):
            self.check()
            block, own = slice(start, start + size), ahead[start : start + size, start : start + size]
            part = left[block]
            # An error counts as much as the columns behind it cannot take up.
            counts = own.diagonal().square().reciprocal()
            group = self._searched(part, counts)
            errors = torch.empty_like(part)
            for n in range(size):
                place = start + n
                self._set(place, group, part[n])
                errors[n] = (part[n] - self.values[place]) / own[n, n]
                part[n + 1 :].addr_(own[n, n + 1 :], errors[n], alpha=-1)
            left[start + size :].addmm_(ahead[block, start + size :].T, errors, alpha=-1)

    def improve(self) -> None:
        """One pass over all groups: scale and zero, then integers, each the best while all others stay."""
        # Half the slope of the error: how fast it grows with each stored value.
        slope, size = self.curvature @ (self.values - self.wanted), self.format.group
        for number, start in enumerate(range(0, len(slope), size)):
            self.check()
            block = slice(start, start + size)
            own, part = self.curvature[block, block], self.values[block]
            before = part.clone()
            group = self.groups[number] = self._refitted(self.groups[number], block, own, slope[block])
            torch.addcmul(group.zero, self.integers[block], group.scale, out=part)
            here = slope[block] + own @ (part - before)
            for n in range(size):
                was = part[n].clone()
                self._set(start + n, group, was - here[n] / own[n, n])
                here.addr_(own[n], part[n] - was)
            slope.addmm_(self.curvature[:, block], part - before)

    def stored(self) -> tuple[Tensor, Tensor]:
        """Weight and scale of these rows, as the format stores them."""
        integers = (self.integers - LEAST).to(torch.uint8).T
        scales, zeros = (torch.stack(parts, dim=1) for parts in zip(*((g.scale, g.zero) for g in self.groups)))
        return self.format.stored(integers, scales, zeros)

    def _searched(self, part: Tensor, counts: Tensor) -> _Group:
        scale, zero = search(part.T[:, None].contiguous(), self.format.scale_dtype, counts[None, None])
        self.groups.append(_Group(scale.float()[:, 0, 0], zero.float()[:, 0, 0]))
        return self.groups[-1]

    def _set(self, place: int, group: _Group, to: Tensor) -> None:
        """The nearest that a column can be."""
        integers = torch.sub(to, group.zero, out=self.integers[place])
        integers.div_(group.scale).round_().clamp_(LEAST, MOST)
        torch.addcmul(group.zero, integers, group.scale, out=self.values[place])

    def _refitted(self, group: _Group, block: slice, own: Tensor, slope: Tensor) -> _Group:
        """Scale and zero by least squares for the integers as they are, rounded, in the rows that gain by them."""
        integers, before = self.integers[block], self.values[block]
        weighted, pull = own @ integers, own @ before - slope
        total, ones = own.sum(dim=0), own.sum()
        square, mixed = (weighted * integers).sum(dim=0), (total[:, None] * integers).sum(dim=0)
        along, level = (pull * integers).sum(dim=0), pull.sum(dim=0)
        scale = (along * ones - level * mixed) / (square * ones - mixed.square())
        scale = scale.to(self.format.scale_dtype).float()
        scale = torch.where(scale.isfinite() & (scale > TINY), scale, group.scale)
        zero = ((level - scale * mixed) / ones).to(self.format.scale_dtype).float()
        change = torch.addcmul(zero, integers, scale) - before
        better = ((own @ change + 2 * slope) * change).sum(dim=0) < 0
        return _Group(torch.where(better, scale, group.scale), torch.where(better, zero, group.zero))

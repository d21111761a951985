"""What a solver does, worked out before it runs: each state as a sum of tensors times numbers.

Every solver adds up states, velocities and noise with factors that the time grid alone decides. Followed once with
placeholders, it leaves these factors, so that a step takes one operation for each tensor that enters it, or one kernel
for all of them, however its formula is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeAlias

from torch import Tensor

from .solvers import ETA, Sampler, Velocity

Kind: TypeAlias = Literal["state", "velocity", "noise"]
# Told each state with its velocity and the number of its time, it may give the token at once.
Done: TypeAlias = Callable[[Tensor, Tensor, int], "Tensor | None"]


@dataclass(frozen=True)
class Term:
    """`factor` times a tensor: the state or the velocity of call number `index`, or that noise."""

    kind: Kind
    index: int
    factor: float


@dataclass(frozen=True)
class Call:
    """One evaluation of the velocity: at times[time], of the state that these terms add up to."""

    time: int
    state: tuple[Term, ...]


@dataclass(frozen=True)
class Updates:
    """A solver on its grid: the calls in their order, and what the token is in the end."""

    calls: tuple[Call, ...]
    token: tuple[Term, ...]

    @cached_property
    def after(self) -> tuple[tuple[float, tuple[Term, ...]], ...]:
        """What each call's state gives way to, the next state or at last the token: how much of this call's velocity
        enters it, and the other terms."""
        sums = [*(call.state for call in self.calls[1:]), self.token]
        found = []
        for number, terms in enumerate(sums):
            own = [term for term in terms if (term.kind, term.index) == ("velocity", number)]
            found.append((sum(term.factor for term in own), tuple(term for term in terms if term not in own)))
        return tuple(found)

    def run(self, velocity: Velocity, noise: Tensor, done: Done | None = None) -> Tensor:
        """The token, integrated out of `noise`, as the solver would; or the first that `done` gives."""
        states: list[Tensor] = []
        velocities: list[Tensor] = []
        held: dict[Kind, Sequence[Tensor]] = {"state": states, "velocity": velocities, "noise": noise.unbind()}

        def total(terms: tuple[Term, ...]) -> Tensor:
            first, *others = terms
            tensor = held[first.kind][first.index]
            out = tensor if first.factor == 1 else tensor * first.factor
            for term in others:
                out = out.add(held[term.kind][term.index], alpha=term.factor)
            return out

        for call in self.calls:
            states.append(total(call.state))
            velocities.append(velocity(states[-1], call.time))
            if done is not None and (token := done(states[-1], velocities[-1], call.time)) is not None:
                return token
        return total(self.token)


class _Sum:
    """A placeholder of a tensor that keeps account of what it is the sum of."""

    def __init__(self, terms: dict[tuple[Kind, int], float]) -> None:
        self.terms = terms

    def __add__(self, other: _Sum) -> _Sum:
        return _Sum({key: self.terms.get(key, 0.0) + other.terms.get(key, 0.0) for key in self.terms | other.terms})

    def __mul__(self, factor: float) -> _Sum:
        return _Sum({key: value * float(factor) for key, value in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> _Sum:
        return self * -1.0

    def __sub__(self, other: _Sum) -> _Sum:
        return self + -other

    def __truediv__(self, divisor: float) -> _Sum:
        return self * (1 / divisor)

    def listed(self) -> tuple[Term, ...]:
        """What it consists of, the latest state first."""
        order: dict[Kind, int] = {"state": 0, "velocity": 1, "noise": 2}
        kept = [Term(kind, index, factor) for (kind, index), factor in self.terms.items() if factor]
        return tuple(sorted(kept, key=lambda term: (order[term.kind], -term.index)))


class _Noise:
    def __getitem__(self, index: int) -> _Sum:
        return _Sum({("noise", index): 1.0})


def follow(sampler: Sampler, times: list[float], eta: float = ETA) -> Updates:
    """What `sampler` does on the grid `times`.

    TypeError or AttributeError from a solver that does more than adding up.
    """
    calls: list[Call] = []

    def velocity(x: _Sum, time: int) -> _Sum:
        number = len(calls)
        calls.append(Call(time, x.listed()))
        x.terms = {("state", number): 1.0}  # from here on, for the solver as well, one tensor instead of a long sum
        return _Sum({("velocity", number): 1.0})

    integrate: Any = sampler.integrate
    token = integrate(velocity, times, _Noise(), eta)
    return Updates(tuple(calls), token.listed())

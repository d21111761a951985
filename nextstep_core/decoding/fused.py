"""A token's work with our own kernels and C, where a trial on the device has shown them to be right and faster.

Whatever raises in them later is said once, and the plain steps go on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from ..errors import is_out_of_memory
from ..model.transformer import span_at
from ..runtime.chosen import Chooser, say
from ..runtime.graphs import Step
from ..runtime.interrupt import is_stop
from ..runtime.native import compiler
from ..runtime.native import head as native
from ..runtime.quantization import QuantizedLinear
from ..runtime.trials import Candidate, Trial
from ..runtime.triton import support
from ..sampling.guidance import guide
from ..sampling.updates import Updates
from .steps import FlowIntegration, Network, TransformerStep, WindowStep

log = logging.getLogger(__name__)

# Of a result's norm: what two ways of rounding make of it on the way through all layers, or through one flow step.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
LAYERS, HEAD, NATIVE = "triton-layers", "triton-head", "native-head"
WIDE = 1024  # of a head; a narrower one has nothing to gain that a trial would not cost


class FusedLayers:
    """The step of one token, or of a window, with the layers in our kernels."""

    def __init__(self, plain: TransformerStep | WindowStep, layers: Any) -> None:
        self._plain, self._layers, self.reads = plain, layers, plain.reads

    def __call__(self, tokens: Tensor, positions: Tensor, visible: int) -> Tensor:
        """As the plain step."""
        if not isinstance(self._plain, WindowStep):
            embeds = self._plain.project(tokens)
            return through(self._layers, self._plain, embeds, positions, visible)[:, -1]
        step = self._plain.step
        embeds = step.project(tokens)
        return through(self._layers, step, embeds, positions.repeat(len(embeds) // len(positions), 1), visible)


def through(layers: Any, step: TransformerStep, embeds: Tensor, positions: Tensor, visible: int) -> Tensor:
    """All hidden states (rows, T, hidden), over the cache of `step`."""
    hidden: Tensor = layers(embeds, positions, step.rotary, step.valid, step.cache.data, visible)
    return hidden


class FusedFlow:
    """A token's sampling with the head and the solver in our kernels."""

    def __init__(self, plain: FlowIntegration, weights: Any) -> None:
        self._plain, self._weights, self.reads = plain, weights, plain.reads

    def __call__(self, hidden: Tensor, noise: Tensor, guidance: Tensor, *, steps: int) -> Tensor:
        """As the plain step."""
        return self._plain.token(hidden, noise, guidance, steps, self._integrate)

    def _integrate(self, updates: Updates, modulations: Sequence[Tensor], noise: Tensor, guidance: Tensor) -> Tensor:
        from ..runtime.triton.head import guide_and_advance, velocities

        branches, dtype, guidance = self._plain.shape.branches, self._plain.shape.dtype, guidance.contiguous()
        known: dict[tuple[str, int], Tensor] = {("noise", i): one for i, one in enumerate(noise)}
        (first,) = updates.calls[0].state
        known["state", 0] = known[first.kind, first.index]
        x = known["state", 0]
        for number, (call, (own, others)) in enumerate(zip(updates.calls, updates.after)):
            raw = velocities(self._weights, x, [m[call.time] for m in modulations], dtype)
            pairs = [(known[term.kind, term.index], term.factor) for term in others]
            known["velocity", number], x = guide_and_advance(raw, branches, guidance, own, pairs)
            known["state", number + 1] = x
        return x


class NativeFlow:
    """A token's sampling with the head's network in C."""

    def __init__(self, plain: FlowIntegration, network: Network) -> None:
        self._plain, self._network, self.reads = plain, network, plain.reads

    def __call__(self, hidden: Tensor, noise: Tensor, guidance: Tensor, *, steps: int) -> Tensor:
        """As the plain step."""
        return self._plain.token(hidden, noise, guidance, steps, partial(self._plain.integrate, self._network))


def can_integrate(updates: Updates) -> bool:
    """Whether a kernel takes all tensors that enter a step of this solver at once."""
    from ..runtime.triton.head import MOST_TERMS

    first = updates.calls[0].state
    few = all(len(others) < MOST_TERMS for _, others in updates.after)
    return few and len(first) == 1 and first[0].factor == 1


class Guarded:
    """A fast step, and the plain one from the first time on that the fast one raises."""

    def __init__(self, fast: Step, plain: Step, name: str) -> None:
        self._fast: Step | None = fast
        self._plain, self._name, self.reads = plain, name, plain.reads

    def __call__(self, *inputs: Any, **variant: Any) -> Tensor:
        """As the plain step."""
        if self._fast is not None:
            try:
                return self._fast(*inputs, **variant)
            except Exception as reason:  # a compiler's or a device's own kinds of failure
                if is_stop(reason) or (isinstance(reason, RuntimeError) and is_out_of_memory(reason)):
                    raise
                said = (str(reason).splitlines() or [""])[0]
                log.warning("%s is off from here on (%s: %s)", self._name, type(reason).__name__, said[:200])
                self._fast = None
        return self._plain(*inputs, **variant)


@dataclass(frozen=True)
class OwnKernels:
    """Puts our kernels in the place of a step where a trial shows them to be right and faster; `chooser` decides."""

    chooser: Callable[[torch.device], Chooser] = Chooser

    def __call__(self, step: Step, count: int) -> Step:
        """`step`, or one that does the same faster: for `count` positions of each row, or, of the head, rows."""
        device = step.shape.device if isinstance(step, FlowIntegration) else _within(step).valid.device
        if support.missing(device) is not None:
            return self._native(step, count) if isinstance(step, FlowIntegration) else step
        try:
            return self._flow(step, count) if isinstance(step, FlowIntegration) else self._layers(step, count)
        except (ImportError, AttributeError, TypeError) as reason:  # a Triton that is broken, or another than we know
            log.warning("This Triton is of no use here (%s: %s)", type(reason).__name__, str(reason)[:200])
            return step

    def _layers(self, plain: Any, length: int) -> Step:
        from ..runtime.triton.layers import Layers

        step: TransformerStep = _within(plain)
        device, dtype, rows = step.valid.device, step.rotary.dtype, len(step.valid)
        layers = Layers.of(step.model, device, dtype)
        if layers is None or dtype not in TOLERANCES or not layers.takes(rows, length):
            return plain  # type: ignore[no-any-return]
        config = step.model.config
        what = (
            f"{config.num_hidden_layers} layers of {config.hidden_size} and {config.intermediate_size}, "
            f"{_formats(step.model.layers)}, {rows} rows of {length}, {step.valid.shape[1]} keys, {_name(dtype)}, "
            f"by {_kernels(step.model.layers)}"
        )
        candidate = _candidate(LAYERS, lambda: partial(through, layers, step))
        with _last_positions(step, length):
            won = self._decide(device, what, candidate, lambda: _layers_trial(what, step, length))
        return plain if not won else Guarded(FusedLayers(plain, layers), plain, LAYERS)

    def _flow(self, plain: FlowIntegration, rows: int) -> Step:
        from ..runtime.triton.head import HeadWeights

        device, dtype = plain.shape.device, plain.shape.dtype
        few = rows <= support.MOST_ROWS and dtype in TOLERANCES
        if not few or plain.shape.checked or not can_integrate(plain.updates):
            return plain
        weights = HeadWeights.of(plain.head, device, dtype)
        if weights is None:
            return plain
        what = _flow_name(plain, rows)
        candidate = _candidate(HEAD, lambda: partial(_fused_step, weights, plain))
        won = self._decide(device, what, candidate, lambda: _flow_trial(what, plain, rows))
        return plain if not won else Guarded(FusedFlow(plain, weights), plain, HEAD)

    def _native(self, plain: FlowIntegration, rows: int) -> Step:
        device, dtype = plain.shape.device, plain.shape.dtype
        if compiler.missing(device) is not None or plain.model.config.fm_head_dim < WIDE:
            return plain
        head = native.NativeHead.of(plain.head, dtype)
        if head is None:
            return plain
        what, network = _flow_name(plain, rows), head.velocity
        candidate = Candidate(NATIVE, native.VERSION, lambda: _flow_step(plain, network), native.missing)
        won = self._decide(device, what, candidate, lambda: _flow_trial(what, plain, rows))
        return plain if not won else Guarded(NativeFlow(plain, network), plain, NATIVE)

    def _decide(self, device: torch.device, what: str, candidate: Candidate, trial: Callable[[], Trial]) -> bool:
        chooser = self.chooser(device)
        won = chooser.decide(what, [candidate], trial)
        say(chooser)
        return won is not None


def _within(step: Any) -> TransformerStep:
    found: TransformerStep = step.step if isinstance(step, WindowStep) else step
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _formats(module: torch.nn.Module) -> str:
    found = {layer.format.name for layer in module.modules() if isinstance(layer, QuantizedLinear)}
    return "+".join(sorted(found)) or "floats"


def _flow_name(plain: FlowIntegration, rows: int) -> str:
    size, formats = plain.model.config.fm_head_dim, _formats(plain.head.res_blocks)
    return (
        f"head of {len(plain.head.res_blocks)} blocks of {size}, {formats}, "
        f"{rows} rows, {plain.shape.branches} branches, {_name(plain.shape.dtype)}, by {_kernels(plain.head)}"
    )


def _kernels(module: torch.nn.Module) -> str:
    """What the plain step multiplies with: it decides who is faster, and by how much the two differ."""
    layers = (layer for layer in module.modules() if isinstance(layer, QuantizedLinear))
    return "+".join(sorted({layer.kernel.name for layer in layers if layer.kernel is not None})) or "PyTorch"


def _candidate(name: str, make: Callable[[], Callable[..., Tensor]]) -> Candidate:
    return Candidate(name, f"{support.VERSION} triton {version('triton')}", make, support.missing)


@contextmanager
def _last_positions(step: TransformerStep, length: int) -> Iterator[None]:
    """The cache's last positions are afterwards what they were."""
    last = step.cache.data[..., -length:, :]
    kept = last.clone()
    try:
        yield
    finally:
        last.copy_(kept)


def _layers_trial(what: str, step: TransformerStep, length: int) -> Trial:
    rows, room = step.valid.shape
    size = step.model.config.hidden_size
    generator = torch.Generator().manual_seed(length)
    embeds = torch.randn(rows, length, size, generator=generator).to(step.valid.device, step.rotary.dtype)
    positions = torch.arange(room - length, room, device=step.valid.device)

    def plain(embeds: Tensor, positions: Tensor, visible: int) -> Tensor:
        span = span_at(positions, step.rotary, step.valid, visible)
        hidden: Tensor = step.model(embeds, span, step.cache)
        return hidden

    read = sum(tensor.nbytes for tensor in step.model.layers.state_dict().values())
    tolerance = TOLERANCES[step.rotary.dtype]
    return Trial(what, plain, [(embeds, positions, room)], tolerance, embeds.device, read)


def _fused_step(weights: Any, plain: FlowIntegration, x: Tensor, guidance: Tensor, *modulations: Tensor) -> Tensor:
    from ..runtime.triton.head import guide_and_advance, velocities

    raw = velocities(weights, x, modulations, plain.shape.dtype)
    return guide_and_advance(raw, plain.shape.branches, guidance, 1.0, [(x, 1.0)])[1]


def _flow_step(plain: FlowIntegration, network: Network) -> Callable[..., Tensor]:
    """A step of a solver that takes the velocity as it is."""
    shape = plain.shape

    def step(x: Tensor, guidance: Tensor, *modulations: Tensor) -> Tensor:
        velocity = network(x.to(shape.dtype).repeat(shape.branches, 1), list(modulations))
        return x + guide(velocity, shape.branches, *guidance)

    return step


def _flow_trial(what: str, plain: FlowIntegration, rows: int) -> Trial:
    shape, config = plain.shape, plain.model.config
    generator = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, config.hidden_size, generator=generator).to(shape.device, shape.dtype)
    x = torch.randn(rows // shape.branches, config.token_dim, generator=generator).to(shape.device)
    # Little guidance: much of it would make the difference of two roundings large.
    guidance = torch.tensor([1.5, 1.25], device=shape.device)
    modulations = plain.head.modulations(plain.time_codes[:1], plain.model.image_out_projector(hidden))
    step = _flow_step(plain, plain.head.velocity)
    read = sum(tensor.nbytes for tensor in plain.head.res_blocks.state_dict().values())
    arguments = (x, guidance, *(modulation[0] for modulation in modulations))
    return Trial(what, step, [arguments], TOLERANCES[shape.dtype], shape.device, read)

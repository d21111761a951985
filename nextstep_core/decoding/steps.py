"""The work of one image token in two halves: the transformer's step over its cache, and the flow head's sampling.

Both are functions of tensors whose shapes do not change from token to token, so that they may be captured and replayed.
Neither refers back to whoever calls it: dropping the caller frees the cache at once, without the garbage collector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

from ..model.kv_cache import KVCache, bucketed
from ..model.nextstep import NextStepModel
from ..model.positions import rotary_table
from ..model.transformer import span_at
from ..runtime.graphs import Step, StepGraphs
from ..runtime.lora import Attachments
from ..sampling.falling import CHECKED, merging, part_of
from ..sampling.guidance import guide
from ..sampling.settling import until_settled
from ..sampling.solvers import SAMPLERS, normalize_token
from ..sampling.updates import Updates, follow
from .job import Job
from .prefill import PrefillCache
from .window_choice import WindowChoice

# Long stretches run through the transformer in pieces of this many positions: it bounds the memory of masks and scores.
CHUNK = 1024

Wrap: TypeAlias = Callable[[Step], Step]
# Gets the number of positions of each row, or the head's number of rows, as well.
Hasten: TypeAlias = Callable[[Step, int], Step]
Made = TypeVar("Made")


def unwrapped(step: Step) -> Step:
    """The wrap that changes nothing."""
    return step


def unhurried(step: Step, count: int) -> Step:
    """Leaves a step as it is."""
    return step


@dataclass(frozen=True)
class StepShape:
    """All that the work of a token depends on besides its inputs: jobs of one shape can share captured steps.

    rows are those of the transformer's batch, in so many guidance branches, of up to `positions` positions each.
    `checked` finishes tokens as soon as they are settled.
    """

    rows: int
    branches: int
    positions: int
    sampler: str
    steps: int
    shift: float
    use_norm: bool
    device: torch.device
    dtype: torch.dtype
    checked: bool = False

    @classmethod
    def of_job(cls, job: Job, device: torch.device, dtype: torch.dtype, beyond: int = 0) -> StepShape:
        """The shape of a job's steps on a device, with room for so many positions `beyond` its end; guidance scales are
        inputs of every token and no part of it."""
        return cls(
            rows=job.batch,
            branches=job.rows.branches,
            positions=bucketed(job.length + beyond),
            sampler=job.settings.sampler,
            steps=job.settings.steps,
            shift=job.settings.shift,
            use_norm=job.settings.use_norm,
            device=device,
            dtype=dtype,
            checked=job.settings.steps_schedule == CHECKED,
        )


class TransformerStep:
    """One image token through the transformer: project it, write it to the cache, attend to what came before."""

    def __init__(self, model: NextStepModel, shape: StepShape) -> None:
        self.model, self.reads = model, (model.layers, model.norm, model.image_in_projector)
        self.cache = KVCache(model.config, shape.rows, shape.positions, shape.device, shape.dtype)
        self.rotary = rotary_table(model.config, shape.positions, shape.device, shape.dtype)
        self.valid = torch.ones(shape.rows, shape.positions, dtype=torch.bool, device=shape.device)

    def __call__(self, token: Tensor, position: Tensor, visible: int) -> Tensor:
        """Hidden states (rows, hidden) of a token (M, 1, token_dim) at `position` (1,), seeing the first `visible`."""
        return self.run(self.project(token), position, visible)

    def run(self, embeds: Tensor, positions: Tensor, visible: int) -> Tensor:
        """The last hidden state (rows, hidden) of embeds (rows, T, hidden) at positions (T,)."""
        span = span_at(positions, self.rotary, self.valid, visible)
        hidden: Tensor = self.model(embeds, span, self.cache)
        return hidden[:, -1]

    def project(self, tokens: Tensor) -> Tensor:
        """Image tokens (M, T, token_dim) to embeddings (rows, T, hidden): every branch is fed the same."""
        projected: Tensor = self.model.image_in_projector(tokens)
        return projected.repeat(len(self.valid) // len(tokens), 1, 1)


class OfSizes(dict[int, Made]):
    """What differs by a size or a count, each made when it is first asked for."""

    def __init__(self, make: Callable[[int], Made]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, size: int) -> Made:
        self[size] = self._make(size)
        return self[size]


class WindowStep:
    """Several image tokens of every picture through the transformer, each picture's at places of its own."""

    def __init__(self, step: TransformerStep) -> None:
        self.step, self.reads = step, step.reads

    def __call__(self, tokens: Tensor, positions: Tensor, visible: int) -> Tensor:
        """All hidden states (rows, T, hidden) of tokens (M, T, token_dim) at positions (M, T)."""
        embeds = self.step.project(tokens)
        positions = positions.repeat(len(embeds) // len(positions), 1)
        span = span_at(positions, self.step.rotary, self.step.valid, visible)
        hidden: Tensor = self.step.model(embeds, span, self.step.cache)
        return hidden


class TokenSequence:
    """The growing sequence of all rows: prompt, then image tokens, through the transformer and its cache.

    Its memory is made once for a shape and serves any number of runs. `hasten` and then `wrap` may replace the step of
    one token, or of a window, by one that does the same faster.
    """

    def __init__(
        self, model: NextStepModel, shape: StepShape, wrap: Wrap = unwrapped, hasten: Hasten = unhurried
    ) -> None:
        self.prompt_length = 0
        self.positions = torch.arange(shape.positions, device=shape.device)
        self._plain = plain = TransformerStep(model, shape)
        self._step = wrap(hasten(plain, 1))
        # a captured step has one shape, so each length of a window is a step of its own
        self._windows = OfSizes(lambda length: wrap(hasten(WindowStep(plain), length)))

    def prefill(
        self, embeds: Tensor, valid: Tensor, prefilled: PrefillCache | None, key: str, chunk: int = CHUNK
    ) -> Tensor:
        """Begin with the prompt embeds (rows, L, hidden), or take it from `prefilled`; the last hidden state (rows,
        hidden). `chunk` positions are read at a time.

        valid (rows, L) is False at left padding.
        """
        self.prompt_length = embeds.shape[1]
        self._plain.cache.data.zero_()  # an earlier run may have left NaN, which no mask hides
        self._plain.valid[:, : self.prompt_length] = valid
        self._plain.valid[:, self.prompt_length :] = True
        hidden = prefilled.restore(key, self._plain.cache) if prefilled is not None else None
        if hidden is not None:
            return hidden
        for start in range(0, self.prompt_length, chunk):
            hidden = self._run(embeds[:, start : start + chunk], start)
        assert hidden is not None, "a prompt ends with the begin-of-image id, so it is never empty"
        if prefilled is not None:
            prefilled.store(key, self._plain.cache, self.prompt_length, hidden)
        return hidden

    def feed(self, tokens: Tensor, place: int) -> Tensor:
        """Run image tokens (M, T, token_dim), which stand at place..place+T-1; the last hidden state (rows, hidden)."""
        start = self.prompt_length + place
        if tokens.shape[1] == 1:
            return self._step(tokens, self.positions[start : start + 1], visible=bucketed(start + 1))
        return self._run(self._plain.project(tokens), start)

    def feed_window(self, tokens: Tensor, places: Tensor, last: int) -> Tensor:
        """Run image tokens (M, T, token_dim) at places (M, T), of which `last` is the greatest; all hidden states
        (rows, T, hidden). What is fed at the same places later takes their place."""
        visible = bucketed(self.prompt_length + last + 1)
        return self._windows[tokens.shape[1]](tokens, places + self.prompt_length, visible=visible)

    def _run(self, embeds: Tensor, start: int) -> Tensor:
        end = start + embeds.shape[1]
        return self._plain.run(embeds, self.positions[start:end], bucketed(end))


# Of what the solver does, the modulations of all its times, noise and guidance, the tokens (M, token_dim) in float32.
Integrate: TypeAlias = Callable[[Updates, Sequence[Tensor], Tensor, Tensor], Tensor]
# The head's velocity of rows (M, token_dim), with the modulations of one time.
Network: TypeAlias = Callable[[Tensor, list[Tensor]], Tensor]


class FlowPath:
    """A token with fewer steps than the others: its times among all of them, its noise and what the solver does."""

    def __init__(self, shape: StepShape, steps: int) -> None:
        sampler = SAMPLERS[shape.sampler]
        times = sampler.grid(shape.steps, shape.shift)
        part = part_of(len(times), len(sampler.grid(steps, shape.shift)))
        self.updates = follow(sampler, [times[i] for i in part])
        self._at = torch.tensor(part, device=shape.device)
        self._merging = merging(times, part, sampler.noise_count(shape.steps)).to(shape.device)

    def codes(self, every: Tensor) -> Tensor:
        """Of the codes of all times (N, 1, dim), those of its own."""
        codes: Tensor = every[self._at]
        return codes

    def noise(self, every: Tensor) -> Tensor:
        """Its noise (n, M, token_dim), from that of all steps (noise_count, M, token_dim)."""
        noise: Tensor = torch.tensordot(self._merging, every, dims=1)
        return noise


class FlowIntegration:
    """One image token out of noise: the flow head's velocity, guided, integrated by the shape's sampler."""

    def __init__(self, model: NextStepModel, shape: StepShape) -> None:
        self.model, self.head, self.shape = model, model.head, shape
        self.reads = (model.head, model.image_out_projector)
        self.sampler = SAMPLERS[shape.sampler]
        self.times = self.sampler.grid(shape.steps, shape.shift)
        self.updates = follow(self.sampler, self.times)
        self.time_codes = self._embedded_times()
        self._paths = OfSizes(lambda steps: FlowPath(shape, steps))

    def _embedded_times(self) -> Tensor:
        times = torch.tensor(self.times, device=self.shape.device)
        codes: Tensor = self.head.time_embed(times, self.shape.dtype)
        return codes[:, None]  # (N, 1, dim), to go with all rows

    def refresh(self) -> None:
        """Compute anew, in its place, what is kept from run to run: what is added to the layers may have changed."""
        self.time_codes.copy_(self._embedded_times())

    def __call__(self, hidden: Tensor, noise: Tensor, guidance: Tensor, *, steps: int) -> Tensor:
        """Tokens (M, token_dim); arguments as in TokenSampler."""
        return self.token(hidden, noise, guidance, steps, partial(self.integrate, self.head.velocity))

    def token(self, hidden: Tensor, noise: Tensor, guidance: Tensor, steps: int, integrate: Integrate) -> Tensor:
        """The same with another way to integrate."""
        updates, codes = self.updates, self.time_codes
        if steps != self.shape.steps:
            path = self._paths[steps]
            updates, codes, noise = path.updates, path.codes(codes), path.noise(noise)
        # For all steps and branches at once, a tensor (N, branches * M, ...) for each block: no x enters them.
        modulations = self.head.modulations(codes, self.model.image_out_projector(hidden))
        token = integrate(updates, modulations, noise, guidance).to(self.shape.dtype)
        return normalize_token(token) if self.shape.use_norm else token

    def integrate(
        self, network: Network, updates: Updates, modulations: Sequence[Tensor], noise: Tensor, guidance: Tensor
    ) -> Tensor:
        """A token (M, token_dim) in float32, with `network` for the head's velocity of rows and their modulations."""

        def velocity(x: Tensor, i: int) -> Tensor:
            # x (M, token_dim) stays in float32 between the steps, as rounding it would add up over them; the network
            # sees it rounded, the same x in every branch.
            rows = x.to(self.shape.dtype).repeat(self.shape.branches, 1)
            return guide(network(rows, [m[i] for m in modulations]), self.shape.branches, *guidance)

        checked = self.shape.checked
        return until_settled(updates, velocity, noise, self.times) if checked else updates.run(velocity, noise)


class TokenSampler:
    """Samples one token per image from the flow head. `wrap` and `hasten` as in TokenSequence."""

    def __init__(
        self, model: NextStepModel, shape: StepShape, wrap: Wrap = unwrapped, hasten: Hasten = unhurried
    ) -> None:
        self.noise_count, self.steps = SAMPLERS[shape.sampler].noise_count(shape.steps), shape.steps
        self._plain = integration = FlowIntegration(model, shape)
        if shape.checked:  # how many steps there are is known only while they are made
            wrap = unwrapped
        self._step = wrap(hasten(integration, shape.rows))
        self._windows = OfSizes(lambda rows: wrap(hasten(integration, rows)))

    def refresh(self) -> None:
        """See `FlowIntegration`."""
        self._plain.refresh()

    def __call__(self, hidden: Tensor, noise: Tensor, guidance: Tensor, steps: int | None = None) -> Tensor:
        """Tokens (M, token_dim) for the hidden states (branches * M, hidden), noise (noise_count, M, token_dim) and the
        scales cfg and cfg_img as a tensor (2,), or (2, M, 1) where every token has scales of its own. They take the
        shape's steps, or fewer."""
        step = self._step if guidance.ndim == 1 else self._windows[len(hidden)]
        return step(hidden, noise, guidance, steps=steps or self.steps)


@dataclass(frozen=True)
class StepCaches:
    """What a model keeps from run to run: prompts that were read, captured steps with their memory, and what windows of
    each size cost and bring (`lookahead`).

    graphs None runs every step as it is; prefilled None reads every prompt anew. `adapters` are those of the run that
    is under way. `hasten` as in TokenSequence.
    """

    graphs: StepGraphs | None = None
    prefilled: PrefillCache | None = field(default_factory=PrefillCache)
    adapters: Attachments = field(default_factory=Attachments)
    windows: dict[tuple[StepShape, str], WindowChoice] = field(default_factory=dict)
    hasten: Hasten = unhurried

    def steps(self, model: NextStepModel, shape: StepShape) -> tuple[TokenSequence, TokenSampler]:
        """The two halves of a token's work, captured ones where there are."""

        def make(wrap: Wrap) -> tuple[TokenSequence, TokenSampler]:
            return TokenSequence(model, shape, wrap, self.hasten), TokenSampler(model, shape, wrap, self.hasten)

        if self.graphs is None or not self.graphs.supports(shape.device):
            return make(unwrapped)
        # What is captured reads the adapters' matrices; as a part of the key they live as long as it does.
        key = shape, self.adapters.in_use
        pair: tuple[TokenSequence, TokenSampler] = self.graphs.steps(key, shape.device, make)
        if self.adapters.in_use is not None:
            pair[1].refresh()
        return pair

    def prompt_key(self, job: Job, dtype: torch.dtype) -> str:
        """Tells apart what the transformer makes of prompts."""
        return job.prompt_key(dtype) + self.adapters.key

    def release(self) -> None:
        """Free the device memory that is kept for the next run."""
        if self.graphs is not None:
            self.graphs.clear()
        self.adapters.clear()

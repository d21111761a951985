"""A checkpoint stored as int4 for what it multiplies: layer by layer, for the inputs that calibration tells.

Two streams of hidden states go through the layers: the exact ones, and those that come out of what is stored so far.
Each matrix is fitted so that what it makes of the second comes near to what the exact one makes of the first, so that
it also mends what was lost before it. One layer at a time is in memory, beside the hidden states.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..model.nextstep import NextStepModel
from ..model.transformer import DecoderLayer, Span
from ..runtime.interrupt import Check, go_on
from ..runtime.quantization.compensation import compensated
from ..runtime.quantization.formats import Format, Int4, quantize_in_pieces
from ..runtime.quantization.search import TINY
from .build import GRID_CODES, ModelPlan, fill
from .calibration import Drawn, projected, relative_error
from .checkpoint import check_finite, read_tensors
from .single_file import Report

QKV, OUT, GATE_UP, DOWN = "self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"
LAYERS = "layers."
AT_ONCE = 4  # pictures that go through a layer together
PROMPT = 0.5  # how much the positions of a prompt count, squared, beside those of tokens: none of them is drawn from
MENDED = 0.5  # of what was lost before a matrix, the share that it tries to mend
SLACK = 0.1  # of the mean square of an input: how hard it tries


class Compensated:
    """Reads a plan's model as `ModelPlan.read_model` does, with the int4 matrices of its layers fitted to `drawn`.

    With `fit` False they are stored as without calibration. Everything is computed in float32 on `work_on`. Afterwards
    `error` tells, of the pictures that nothing was fitted to, by how much the transformer's conditions are off.
    """

    def __init__(self, plan: ModelPlan, drawn: Drawn, work_on: torch.device | str = "cpu", fit: bool = True) -> None:
        self.plan, self.drawn, self.fit = plan, drawn, fit
        self.device = torch.device(work_on)
        self.error: float | None = None
        self._like = NextStepModel(plan.config, device="meta")

    @torch.no_grad()
    def read(
        self, dtype: torch.dtype, report: Report | None = None, check: Check = go_on
    ) -> Iterator[tuple[str, Tensor]]:
        """The tensors on the CPU, everything that is not quantized in `dtype`. `report` gets (done, of how many) before
        each layer and may raise to stop; `check` may too, and is called all the while."""
        names = self.plan.model_names
        rest = replace(self.plan, model_names=tuple(name for name in names if not name.startswith(LAYERS)))
        yield from rest.read_model("cpu", dtype, None, self.device, check)
        batches = self._begun()
        for number in range(self.plan.config.num_hidden_layers):
            if report is not None:
                report(number, self.plan.config.num_hidden_layers)
            yield from self._layer(number, batches, dtype, check)
        self.error = self._measured(batches)

    def _begun(self) -> list[_Batch]:
        text_embedding, projector = self.plan.load_text_embedding(), self.module("image_in_projector")
        batches = []
        for drawn, counts in ((self.drawn.known, True), (self.drawn.held_out, False)):
            for start in range(0, drawn.pictures, AT_ONCE):
                part = drawn.part(range(start, min(start + AT_ONCE, drawn.pictures)))
                embeds = part.embeds(text_embedding, projector, self.device, torch.float32)
                batches.append(_Batch(part, embeds, part.span(self.plan.config, self.device, torch.float32), counts))
        return batches

    def module(self, name: str) -> nn.Module:
        """A part of the exact model, on the device in float32."""
        module = copy.deepcopy(self._like.get_submodule(name))
        names = [f"{name}.{part}" for part in module.state_dict()]
        held = dict(read_tensors(self.plan.files, names, self.device, torch.float32))
        fill(module, {part.removeprefix(f"{name}."): tensor for part, tensor in held.items()})
        return module

    def _layer(
        self, number: int, batches: list[_Batch], dtype: torch.dtype, check: Check
    ) -> Iterator[tuple[str, Tensor]]:
        prefix = f"{LAYERS}{number}"
        exact, stored = self.module(prefix), DecoderLayer(self.plan.config, number, device="meta")
        assert isinstance(exact, DecoderLayer)
        fill(stored, exact.state_dict())
        for part in (QKV, OUT, GATE_UP, DOWN):
            for batch in batches:
                check()
                batch.inputs = [_inputs(layer, part, x, batch.span) for layer, x in zip((exact, stored), batch.hidden)]
            name, linear = f"{prefix}.{part}", exact.get_submodule(part)
            assert isinstance(linear, nn.Linear)
            format = None if self.plan.recipe is None else self.plan.recipe.format_of(name, *linear.weight.shape)
            if format is not None:
                weight, scale = self._stored(format, linear.weight, batches, check)
                check_finite(f"{name}.weight", scale, self.plan.files.path_of(f"{name}.weight"))
                now = format.dequantize(weight, scale, torch.float32)
                stored.get_submodule(part).weight = nn.Parameter(now, requires_grad=False)
                if self.plan.layout is not None and isinstance(format, Int4):
                    weight = self.plan.layout.pack(weight)
                yield f"{name}.weight", weight.cpu()
                yield f"{name}.weight_scale", scale.cpu()
                del weight, scale, now
            else:
                yield f"{name}.weight", linear.weight.to("cpu", dtype)
            for batch in batches:
                batch.take_up((exact, stored), part)
        kept = {name: t for name, t in exact.state_dict().items() if not name.endswith("proj.weight")}
        yield from ((f"{prefix}.{name}", tensor.to("cpu", dtype)) for name, tensor in kept.items())

    def _stored(self, format: Format, matrix: Tensor, batches: list[_Batch], check: Check) -> tuple[Tensor, Tensor]:
        if not self.fit or not isinstance(format, Int4):
            return quantize_in_pieces(format, matrix, check)
        gram, lost = (torch.zeros(matrix.shape[1], matrix.shape[1], device=self.device) for _ in range(2))
        for batch in batches:
            if batch.counts:
                check()
                exact, stored = (batch.weighted(x) for x in batch.inputs)
                gram.addmm_(stored.T, stored)
                lost.addmm_((exact - stored).T, stored)
        return compensated(format, _mended(matrix, gram, lost), gram, check)

    def _measured(self, batches: list[_Batch]) -> float:
        norm, out = self.module("norm"), self.module("image_out_projector")
        if self.plan.config.use_gen_pos_embed:
            held = dict(replace(self.plan, model_names=(GRID_CODES,)).read_model(self.device, torch.float32))
            self._like.gen_pos_embed = held[GRID_CODES]
        made: list[list[Tensor]] = [[], []]
        for batch in batches:
            if not batch.counts:
                for of_stream, hidden in zip(made, batch.hidden):
                    places = batch.drawn.places(norm(hidden))
                    of_stream.append(
                        projected(out, self._like.position_codes(batch.drawn.grid, places), places).flatten()
                    )
        exact, stored = map(torch.cat, made)
        return relative_error(stored, exact)


class _Batch:
    """A few pictures on their way through the layers: exact and stored hidden states, and what a part of a layer gets
    of each. Only those that `counts` are fitted to."""

    def __init__(self, drawn: Drawn, embeds: Tensor, span: Span, counts: bool) -> None:
        self.drawn, self.span, self.counts = drawn, span, counts
        self.hidden = [embeds, embeds]
        self.inputs: list[Tensor] = []
        fed = torch.ones(len(embeds), embeds.shape[1] - drawn.ids.shape[1])
        self._weights = torch.cat([PROMPT * drawn.valid, fed], dim=1).to(embeds.device)[..., None]

    def weighted(self, inputs: Tensor) -> Tensor:
        """Inputs (rows, positions, columns) as they count: (rows * positions, columns), nothing of padding."""
        return (inputs * self._weights).flatten(0, 1)

    def take_up(self, layers: tuple[DecoderLayer, DecoderLayer], part: str) -> None:
        """Let the hidden states go past what is added to them."""
        if part in (OUT, DOWN):
            pairs = zip(layers, self.hidden, self.inputs)
            self.hidden = [hidden + layer.get_submodule(part)(x) for layer, hidden, x in pairs]
        self.inputs = []


def _inputs(layer: DecoderLayer, part: str, hidden: Tensor, span: Span) -> Tensor:
    """What a part of a layer multiplies, given the hidden states before the block that it is in."""
    if part in (QKV, OUT):
        inputs: Tensor = layer.input_layernorm(hidden)
        if part == OUT:
            with _left_out(layer.self_attn, "o_proj"):
                inputs = layer.self_attn(inputs, span, None)
        return inputs
    inputs = layer.post_attention_layernorm(hidden)
    if part == DOWN:
        with _left_out(layer.mlp, "down_proj"):
            inputs = layer.mlp(inputs)
    return inputs


@contextmanager
def _left_out(module: nn.Module, name: str) -> Iterator[None]:
    """Inside, the last matrix of a block hands on what it gets."""
    held = module.get_submodule(name)
    module.set_submodule(name, nn.Identity())
    try:
        yield
    finally:
        module.set_submodule(name, held)


def _mended(matrix: Tensor, gram: Tensor, lost: Tensor) -> Tensor:
    """The matrix that makes of the stored stream's inputs what comes nearest to its products with the exact ones, in
    part. `lost` is the sum of (exact - stored) stored^T."""
    damped = gram.to("cpu" if gram.device.type == "mps" else gram.device, copy=True)
    damped.diagonal().add_(SLACK * damped.diagonal().mean() + TINY)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed:
        return matrix
    wanted = torch.cholesky_solve((matrix @ lost).T.to(lower.device), lower).T.to(matrix.device)
    return torch.add(matrix, wanted, alpha=MENDED)

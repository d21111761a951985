"""What one of several processes reads of a checkpoint: of every matrix that is shared, its part and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..errors import NextStepError
from ..runtime.parallel import COLUMNS, ROWS, Cut, Share
from ..runtime.quantization import quantized_linears
from ..runtime.quantization.formats import FP8, INT8, Format, Int4
from . import gguf_file
from .build import ModelPlan, empty_model
from .checkpoint import Derived, Place, Slice, Source, places_of, shapes_of
from .fusion import parts_of

WEIGHT, SCALE, BIAS = "weight", "weight_scale", "bias"


def shared(plan: ModelPlan, share: Share) -> ModelPlan:
    """The plan of a share of a checkpoint. NextStepError, before anything is read, where it cannot be shared by so many
    or its files hold matrices that cannot be cut."""
    config = share.of(plan.config)
    like = empty_model(config, plan.recipe if plan.stored else None)
    formats = {name: layer.format for name, layer in quantized_linears(empty_model(plan.config, plan.recipe))}
    formats = formats if plan.stored else {}
    _check_stored(plan, formats, {name: layer.format for name, layer in quantized_linears(like)})
    cuts = share.cuts(plan.config)
    shapes = shapes_of(like)
    files = plan.files
    locations = dict(files.locations)
    for name in plan.model_names:
        if name in locations:
            locations[name] = tuple(_sources(plan, name, cuts, formats, share.rank == 0))
    shapes = files.shapes | {name: shape for name, shape in shapes.items() if name in files.shapes}
    return replace(plan, config=config, files=replace(files, locations=locations, shapes=shapes))


def _check_stored(plan: ModelPlan, whole: dict[str, Format], share: dict[str, Format]) -> None:
    """NextStepError for files whose matrices cannot be cut."""
    own = all(isinstance(source, tuple) for name in plan.model_names for source in plan.files.locations.get(name, ()))
    gguf = any(path.suffix == gguf_file.SUFFIX for path in plan.files.paths)
    known = all(isinstance(format, Int4) or format in (INT8, FP8) for format in whole.values())
    if gguf or not own or not known or (plan.stored and (plan.layout is not None or whole != share)):
        raise NextStepError(
            "{where} holds matrices in a form that several processes cannot share. Use the original checkpoint, "
            "with --quantization int8 if it is to be smaller.",
            where=plan.files.where,
        )


def _sources(
    plan: ModelPlan, name: str, cuts: dict[str, Cut], formats: dict[str, Format], first: bool
) -> Iterator[Source]:
    """Where a share's tensor comes from: the parts of what the whole model's comes from."""
    layer, _, kind = name.rpartition(".")
    places = list(places_of(plan.files.locations[name]))
    rows = parts_of(name, plan.config) or {name: 0}
    if not name.startswith("layers.") or _short(next(iter(rows))) not in cuts:
        yield from places
        return
    before = 0
    for n, (part, count) in enumerate(rows.items()):
        cut = cuts[_short(part)]
        if len(places) == 1 and len(rows) > 1:  # the parts lie in the file as one
            cut = Cut(cut.axis, before + cut.start, before + cut.stop)
            before += count
        yield _slice(places[n % len(places)], cut, kind, formats.get(layer), first)


def _slice(place: Place, cut: Cut, kind: str, format: Format | None, first: bool) -> Source:
    """A cut of a matrix, as it is one of its weight, its scale or its bias."""
    start, stop = cut.start, cut.stop
    if kind == BIAS:
        if cut.axis == ROWS:
            return Slice(place, 0, start, stop)
        return place if first else Derived((place,), torch.zeros_like)  # the parts are added up
    if isinstance(format, Int4):
        if kind == SCALE:
            group = 1 if cut.axis == ROWS else format.group
            return Slice(place, 1 - cut.axis, start // group, stop // group)
        pair = 1 if cut.axis == ROWS else 2  # two columns in a byte
        return Slice(place, cut.axis, start // pair, stop // pair)
    if kind == SCALE and cut.axis == COLUMNS:
        return place  # of whole rows
    return Slice(place, cut.axis, start, stop)


def _short(name: str) -> str:
    """What a layer is called within its block, of a tensor's name."""
    return name.rpartition(".")[0].rpartition(".")[2]

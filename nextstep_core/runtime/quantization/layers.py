"""Which matrices of the model are stored in which format, and the layer that stands in for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from ...errors import NextStepError, check_choice
from ..chosen import Chooser, say
from ..interrupt import Check, go_on
from .formats import FP8, INT4, INT4_32, INT4_128, INT8, Device, Format, Int4, quantize_in_pieces
from .kernel import Kernel
from .layouts import Layout
from .selection import choose


class Storage(Protocol):
    """How a model's matrices are stored: a recipe, or what a file holds."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def has_layouts(self) -> bool:
        """Whether some of its matrices are stored in a format that CPUs want to lie in another way."""

    def format_of(self, name: str, rows: int, columns: int) -> Format | None:
        """The format for the linear layer called `name`, or None where it stays as it is."""


@dataclass(frozen=True)
class Recipe:
    """A named choice of formats: one for the transformer's layers, one for the flow head's wide matrices.

    A matrix of the transformer whose shape does not fit its format takes the head's. Everything else (norms, biases,
    the small projections around the head) keeps its dtype.
    """

    name: str
    transformer: Format
    head: Format

    @property
    def has_layouts(self) -> bool:
        return isinstance(self.transformer, Int4)

    def format_of(self, name: str, rows: int, columns: int) -> Format | None:
        if name.startswith("layers."):
            return self.transformer if self.transformer.fits(rows, columns) else self.head
        return self.head if ".res_blocks." in name or name == "image_out_projector" else None


@dataclass(frozen=True)
class Held:
    """What a file of another program holds: the format of each linear layer by name."""

    name: str
    formats: Mapping[str, Format] = field(hash=False)

    @property
    def has_layouts(self) -> bool:
        return False  # its matrices are brought into a CPU's layout when they are loaded

    def format_of(self, name: str, rows: int, columns: int) -> Format | None:
        return self.formats.get(name)


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("int8", INT8, INT8),
        Recipe("int4", INT4, INT8),
        Recipe("int4-g128", INT4_128, INT8),
        Recipe("fp8", FP8, FP8),
        Recipe("int4-g32", INT4_32, INT8),
    )
}


def find_recipe(name: str, device: torch.device) -> Recipe:
    """The recipe called `name`; NextStepError when there is none or `device` cannot hold its numbers."""
    check_choice("quantization", name, RECIPES)
    if name == "fp8" and device.type == "mps":
        raise NextStepError("quantization is fp8, which Apple GPUs do not support. Use int8 or int4.")
    return RECIPES[name]


class QuantizedLinear(nn.Module):
    """A linear layer whose matrix is stored in a `Format`. The weights may lie on another device than the input."""

    def __init__(self, format: Format, rows: int, columns: int, bias: bool, device: Device = None) -> None:
        super().__init__()
        weight, scale = format.empty(rows, columns, device)
        self.format, self.rows, self.columns = format, rows, columns
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.weight_scale = nn.Parameter(scale, requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, device=device), requires_grad=False) if bias else None
        self.kernel: Kernel | None = None  # until `choose_kernels` has chosen one
        self.layout: Layout | None = None  # how the weight lies, where it is not as the format says

    def own_weight(self, device: torch.device) -> Tensor:
        """The weight as the format says, on `device`."""
        weight = self.weight.to(device)
        return weight if self.layout is None else self.layout.unpack(weight)

    def matrix(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Weight and scale as the format says, on `device`."""
        return self.own_weight(device), self.weight_scale.to(device)

    def pack(self, kernel: Kernel, device: torch.device) -> None:
        """Bring the weight into the layout of `kernel`, which runs on `device`; it stays where it lies."""
        self.kernel = kernel
        lies_so = self.layout is not None and self.layout == kernel.layout
        if not lies_so and (self.layout is not None or kernel.pack is not None):
            packed = kernel.packed(self.own_weight(device)).to(self.weight.device)
            self.weight = nn.Parameter(packed, requires_grad=False)
        if kernel.pack_scale is not None:
            packed = kernel.packed_scale(self.weight_scale.to(device)).to(self.weight_scale.device)
            self.weight_scale = nn.Parameter(packed, requires_grad=False)
        self.layout = kernel.layout

    def forward(self, x: Tensor) -> Tensor:
        assert self.kernel is not None, "a quantized model is prepared before it runs"
        weight = self.weight.to(x.device, non_blocking=True)
        scale = self.weight_scale.to(x.device, non_blocking=True)
        out = self.kernel.run(x.reshape(-1, self.columns), weight, scale)
        if self.bias is not None:
            out = out + self.bias.to(x.device, x.dtype, non_blocking=True)
        return out.view(*x.shape[:-1], self.rows)

    def extra_repr(self) -> str:
        return f"{self.format.name}, {self.columns} to {self.rows}"


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """The quantized layers of a model, by name."""
    return ((name, layer) for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear))


def _stored_linears(
    model: nn.Module, recipe: Storage, layer: type[QuantizedLinear]
) -> Iterator[tuple[str, nn.Linear, QuantizedLinear]]:
    """The linear layers that `recipe` stores in a format, each with an empty meta-device layer to take its place."""
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            shape = linear.out_features, linear.in_features
            format = recipe.format_of(name, *shape)
            if format is not None:
                yield name, linear, layer(format, *shape, linear.bias is not None, "meta")


def replace_linears(model: nn.Module, like: nn.Module, recipe: Storage, layer: type[QuantizedLinear]) -> None:
    """Put empty layers of the class `layer` in the place of a meta-device model's linear layers.

    `like` is the same model from PyTorch's own layers: only they are sure to tell their shape and whether they have a
    bias.
    """
    for name, _, quantized in _stored_linears(like, recipe, layer):
        model.set_submodule(name, quantized)


def quantize_model(model: nn.Module, name: str, device: torch.device) -> None:
    """Quantize a filled model in place, one matrix at a time, computing on `device`; `make_ready` must follow."""
    for path, linear, quantized in _stored_linears(model, find_recipe(name, device), QuantizedLinear):
        weight, scale = quantize_in_pieces(quantized.format, linear.weight.to(device))
        quantized.weight = nn.Parameter(weight.to(linear.weight.device), requires_grad=False)
        quantized.weight_scale = nn.Parameter(scale.to(linear.weight.device), requires_grad=False)
        quantized.bias = linear.bias
        model.set_submodule(path, quantized)


def choose_kernels(model: nn.Module, device: torch.device, dtype: torch.dtype, check: Check = go_on) -> None:
    """Choose kernels for computing on `device` in `dtype` and pack the weights for them; call once, when filled.

    `check` is called before each layer and may raise to stop.
    """
    alike: dict[tuple[Format, int, int], list[QuantizedLinear]] = {}
    for _, layer in quantized_linears(model):
        alike.setdefault((layer.format, layer.rows, layer.columns), []).append(layer)
    if not alike:
        return
    chooser = Chooser(device, check)
    for (format, rows, columns), layers in alike.items():
        check()
        kernel = choose(format, rows, columns, [partial(layer.matrix, device) for layer in layers], dtype, chooser)
        for layer in layers:
            check()
            layer.pack(kernel, device)
    say(chooser)

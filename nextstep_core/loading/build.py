"""Compose config, meta-device modules and weights.

A module is built without memory on the meta device, checked against the files, then filled tensor by tensor: peak host
memory is the model itself plus the one tensor in flight (in the file's dtype on the CPU not even that: the tensors are
views of the mapped file).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import NextStepError
from ..model.config import NextStepConfig, VAEConfig
from ..model.nextstep import NextStepModel, TextEmbedding
from ..model.operations import DEFAULT, Operations
from ..model.positions import grid_codes, grid_side
from ..model.vae import AutoencoderKL
from ..runtime.chosen import Switch
from ..runtime.cpu import pack_linears
from ..runtime.interrupt import Check, go_on
from ..runtime.quantization import (
    RECIPES,
    QuantizedLinear,
    Storage,
    choose_kernels,
    find_recipe,
    quantized_linears,
    replace_linears,
)
from ..runtime.quantization.formats import Int4, quantize_in_pieces
from ..runtime.quantization.layouts import RowBlocks, cpu_layout, find_layout
from . import comfy_quant, gptq
from .checkpoint import (
    TensorFiles,
    check_complete,
    check_finite,
    find_model_files,
    find_tensors,
    read_tensors,
    reader_of,
    shapes_of,
)
from .documents import CONFIG, Documents, find_documents
from .files import is_file
from .fusion import fuse_locations, parts_of, published_shapes
from .gguf_int4 import with_own_scales
from .stored import bring_in

GRID_CODES = "gen_pos_embed"
OPTIONAL = ("lm_head.weight", GRID_CODES)  # not needed for images; computable
VAE_WEIGHT_NAMES = ("checkpoint.pt", "model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class ModelPlan:
    """A checkpoint whose files were found complete and fitting; nothing of its weights is read yet.

    `recipe` is how the weights will be stored once loaded; where `stored` they lie so in the files already. `layout` is
    how int4 weights lie in the files or, where they are quantized while loading, are to lie.
    """

    documents: Documents
    config: NextStepConfig
    files: TensorFiles
    model_names: tuple[str, ...]
    text_embedding_names: tuple[str, ...]
    recipe: Storage | None = None
    stored: bool = False
    layout: RowBlocks | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the image model has."""
        return sum(math.prod(self.files.shapes[name]) for name in self.model_names if name in self.files.shapes)

    def empty_model(
        self, operations: Operations = DEFAULT, quantized_layer: type[QuantizedLinear] = QuantizedLinear
    ) -> NextStepModel:
        """The image model without memory, on the meta device, from these families of layers."""
        model = empty_model(self.config, self.recipe, operations, quantized_layer)
        for _, layer in quantized_linears(model):
            layer.layout = self.layout if isinstance(layer.format, Int4) else None
        return model

    def for_computing_on(self, device: torch.device) -> ModelPlan:
        """The plan with int4 weights laid out for `device` right when they are quantized, where that is possible."""
        laid_out = not self.stored and self.recipe is not None and self.recipe.has_layouts and device.type == "cpu"
        return replace(self, layout=cpu_layout()) if laid_out else self

    def read_model(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None,
        on_tensor: Callable[[int, int], None] | None = None,
        work_on: torch.device | str | None = None,
        check: Check = go_on,
    ) -> Iterator[tuple[str, Tensor]]:
        """The image model's tensors on `device`, one at a time; what the checkpoint may leave out is computed.

        Quantizing happens on `work_on` (default `device`), so that a GPU can do it for weights that stay on the host.
        `on_tensor` gets (done, of how many) before each tensor and may raise to stop; `check` may too, and is called
        between the pieces of a tensor.
        """
        quantized = {} if self.recipe is None else dict(quantized_linears(self.empty_model()))
        files = self.files if self.stored else with_own_scales(self.files, quantized)
        formats = {f"{name}.weight": layer.format for name, layer in quantized.items()}
        to_quantize = {name: format for name, format in formats.items() if f"{name}_scale" not in files.locations}
        stored = {part for name in formats.keys() - to_quantize for part in (name, f"{name}_scale")}
        parts = dict.fromkeys(part for name in self.model_names for part in (name, f"{name}_scale"))
        present = [part for part in parts if part in files.locations]
        # What is only read goes where it stays; a trip over another device would cost time and fresh host memory.
        where = dict.fromkeys(to_quantize, work_on or device)
        read = read_tensors(files, present, device, dtype, stored, where, check)
        for done, (name, tensor) in enumerate(read):
            if on_tensor is not None:
                on_tensor(done, len(present))
            laid_out = self.layout if isinstance(formats.get(name), Int4) and not self.stored else None
            if name not in to_quantize:
                yield name, tensor if laid_out is None else laid_out.pack(tensor)
                continue
            weight, scale = quantize_in_pieces(to_quantize[name], tensor, check)
            check_finite(name, scale, self.files.path_of(name))  # what a row has of NaN, its scale has
            del tensor  # one in flight: while the pieces are taken up, it is not needed any more
            yield name, (weight if laid_out is None else laid_out.pack(weight)).to(device)
            yield f"{name}_scale", scale.to(device)
        if GRID_CODES in self.model_names and GRID_CODES not in present:
            yield GRID_CODES, grid_codes(self.config.hidden_size, grid_side(self.config))[None].to(device)

    def weight_bytes(self, recipe: str | None, dtype: torch.dtype) -> int:
        """Bytes that the image model's weights would take, stored by a recipe of this name (None: as they are)."""
        return sum(self.tensor_bytes(recipe, dtype).values())

    def tensor_bytes(self, recipe: str | None, dtype: torch.dtype) -> dict[str, int]:
        """The same, tensor by tensor."""
        held = self.recipe if self.recipe is not None and recipe == self.recipe.name else None
        model = empty_model(self.config, None if recipe is None else held or RECIPES[recipe])
        own = {f"{name}.{part}" for name, _ in quantized_linears(model) for part in ("weight", "weight_scale")}
        state = model.state_dict()
        return {name: t.nbytes if name in own else t.numel() * dtype.itemsize for name, t in state.items()}

    def load_model(
        self,
        device: torch.device | str,
        dtype: torch.dtype | None,
        check: Check = go_on,
        lie_on: torch.device | str | None = None,
    ) -> NextStepModel:
        """The image model ready to run on `device` in `dtype` (None keeps the file's); `check` may raise to stop.

        Its weights lie on `lie_on`, if that is another device; what is computed for them is computed on `device`.
        """
        plan = self.for_computing_on(torch.device(device))
        model = plan.empty_model()
        read = plan.read_model(device if lie_on is None else lie_on, dtype, lambda *_: check(), device, check)
        fill(model, dict(read))
        make_ready(model, torch.device(device), model.norm.weight.dtype, check)
        return model

    def load_text_embedding(self) -> TextEmbedding:
        """The text embedding on the host, in the checkpoint's own dtype."""
        text_embedding = TextEmbedding(self.config, device="meta").eval()
        fill(text_embedding, dict(read_tensors(self.files, self.text_embedding_names)))
        return text_embedding


def plan_model(path: Path, quantization: str | None = None, device: torch.device | str = "cpu") -> ModelPlan:
    """Read the config, find the files and check every tensor, before any weight is loaded.

    `path` is a checkpoint folder, a single file that carries its config, or a `.safetensors` or `.gguf` file with its
    config beside it. `quantization` names a recipe to store the weights in for computing on `device` (a GGUF file picks
    one by itself); NextStepError when they lie in another one already.
    """
    Switch.set()  # what it says of fast paths may be wrong, too
    documents = find_documents(path)
    if quantization is None and is_file(path):
        quantization = reader_of(path).recipe(path)
    recipe: Storage | None = None if quantization is None else find_recipe(quantization, torch.device(device))
    described = documents.read(CONFIG)
    config = NextStepConfig.from_dict(described, documents.where(CONFIG))
    files, held = _held_by(find_model_files(path), documents, described, config, device)
    if held is not None and recipe not in (None, held):
        raise NextStepError(
            "{path} is already quantized to {format}. Choose no quantization, or quantize the original.",
            path=path,
            format=held.name,
        )
    stored, recipe = held is not None, held or recipe
    layout = None if documents.layout is None else find_layout(documents.layout)
    empty = empty_model(config, recipe if stored else None)
    model, text_embedding = shapes_of(empty), shapes_of(TextEmbedding(config, device="meta"))
    expected = published_shapes(model | text_embedding, files.shapes, config)
    quantized = {
        part: layer.weight.dtype
        for name, layer in quantized_linears(empty)
        for part in (f"{name}.weight", *parts_of(f"{name}.weight", config))
    }
    check_complete(files, expected, OPTIONAL, quantized)
    files = fuse_locations(files, model, config)
    return ModelPlan(documents, config, files, tuple(model), tuple(text_embedding), recipe, stored, layout)


def _held_by(
    files: TensorFiles,
    documents: Documents,
    described: dict[str, Any],
    config: NextStepConfig,
    device: torch.device | str,
) -> tuple[TensorFiles, Storage | None]:
    """The files with what other programs have quantized in formats of ours, and how quantized weights lie in them."""
    if documents.quantization is not None:
        return files, find_recipe(documents.quantization, torch.device(device))
    packed = gptq.find(files, described, documents.where(CONFIG))
    others, beside = comfy_quant.find(files)
    if not packed and not others:
        return files, None
    name = gptq.name_of(described) if packed else comfy_quant.name_of(others)
    plain = NextStepModel(config, device="meta")
    linears = [name for name, module in plain.named_modules() if isinstance(module, nn.Linear)]
    return bring_in(files, packed | others, beside, linears, config, name)


def empty_model(
    config: NextStepConfig,
    recipe: Storage | None = None,
    operations: Operations = DEFAULT,
    quantized_layer: type[QuantizedLinear] = QuantizedLinear,
) -> NextStepModel:
    """The image model without memory, on the meta device; quantized layers where `recipe` has a format for them."""
    model = NextStepModel(config, device="meta", operations=operations).eval()
    if recipe is not None:
        # A host's layers may have no weights yet, so what they will be is read off PyTorch's own.
        replace_linears(model, NextStepModel(config, device="meta"), recipe, quantized_layer)
    return model


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a meta-device module its tensors; they are taken as they are, not copied."""
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def make_ready(model: nn.Module, device: torch.device, dtype: torch.dtype, check: Check = go_on) -> None:
    """What is done to a filled model once, so that it computes fast on `device` in `dtype`; `check` may stop it."""
    choose_kernels(model, device, dtype, check)
    if device.type == "cpu" and dtype == torch.float32:
        pack_linears(model, check)


def find_vae(path: Path) -> tuple[Path, Documents]:
    """(weights file, documents) of a VAE given as a folder, a `.pt` or a `.safetensors` file."""
    if is_file(path):
        return path, find_documents(path)
    for name in VAE_WEIGHT_NAMES:
        if is_file(path / name):
            return path / name, Documents(path)
    raise NextStepError(
        "{path} holds no VAE: expected config.json and checkpoint.pt there. The published one is "
        "stepfun-ai/NextStep-1-f8ch16-Tokenizer.",
        path=path,
    )


def load_vae_state(path: Path, dtype: torch.dtype | None = None) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Config and complete, checked state dict (on the CPU) of a VAE folder or file."""
    weights, documents = find_vae(path)
    config = VAEConfig.from_dict(documents.read(CONFIG), documents.where(CONFIG))
    files = find_tensors(weights)
    expected = shapes_of(AutoencoderKL(config, device="meta"))
    check_complete(files, expected, optional=())
    return config, dict(read_tensors(files, expected, "cpu", dtype))


def load_vae(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> AutoencoderKL:
    """The autoencoder on `device` in `dtype` (None keeps the file's)."""
    config, state = load_vae_state(path)
    vae = AutoencoderKL(config, device="meta").eval()
    fill(vae, {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()})
    return vae

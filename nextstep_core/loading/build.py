"""Compose config, meta-device modules and weights.

A module is built without memory on the meta device, checked against the files, then filled tensor by tensor: peak host
memory is the model itself plus the one tensor in flight (in the file's dtype on the CPU not even that: the tensors are
views of the mapped file).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import NextStepConfig, VAEConfig
from ..errors import NextStepError
from ..model.nextstep import NextStepModel, TextEmbedding
from ..model.positions import grid_codes, grid_side
from ..model.vae import AutoencoderKL
from .checkpoint import TensorFiles, check_complete, find_model_files, find_vae_files, read_tensors, shapes_of
from .fusion import fuse_locations, published_shapes

GRID_CODES = "gen_pos_embed"
OPTIONAL = ("lm_head.weight", GRID_CODES)  # not needed for images; computable
VAE_WEIGHT_NAMES = ("checkpoint.pt", "model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class ModelPlan:
    """A checkpoint whose files were found complete and fitting; nothing of its weights is read yet."""

    folder: Path
    config: NextStepConfig
    files: TensorFiles
    model_names: tuple[str, ...]
    text_embedding_names: tuple[str, ...]

    @property
    def parameters(self) -> int:
        """How many numbers the image model has."""
        return sum(math.prod(self.files.shapes[name]) for name in self.model_names if name in self.files.shapes)

    def read_model(
        self, device: torch.device | str, dtype: torch.dtype | None, on_shard: Callable[[Path], None] | None = None
    ) -> dict[str, Tensor]:
        """State dict of the image model on its device; what the checkpoint may leave out is computed."""
        present = [name for name in self.model_names if name in self.files.locations]
        tensors = dict(read_tensors(self.files, present, device, dtype, on_shard))
        if GRID_CODES in self.model_names and GRID_CODES not in tensors:
            tensors[GRID_CODES] = grid_codes(self.config.hidden_size, grid_side(self.config))[None].to(device)
        return tensors

    def load_model(self, device: torch.device | str, dtype: torch.dtype | None) -> NextStepModel:
        """The image model on `device` in `dtype` (None keeps the file's)."""
        model = NextStepModel(self.config, device="meta").eval()
        fill(model, self.read_model(device, dtype))
        return model

    def load_text_embedding(self) -> TextEmbedding:
        """The text embedding on the host, in the checkpoint's own dtype."""
        text_embedding = TextEmbedding(self.config, device="meta").eval()
        fill(text_embedding, dict(read_tensors(self.files, self.text_embedding_names)))
        return text_embedding


def plan_model(path: Path) -> ModelPlan:
    """Read the config, find the files and check every tensor, before any weight is loaded.

    `path` is a checkpoint folder or a `.safetensors` file with its `config.json` beside it.
    """
    folder = path if path.is_dir() else path.parent
    config = NextStepConfig.from_file(folder / "config.json")
    files = find_model_files(path)
    model = shapes_of(NextStepModel(config, device="meta"))
    text_embedding = shapes_of(TextEmbedding(config, device="meta"))
    check_complete(files, published_shapes(model | text_embedding, files.shapes, config), optional=OPTIONAL)
    return ModelPlan(folder, config, fuse_locations(files, model, config), tuple(model), tuple(text_embedding))


def fill(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give a meta-device module its tensors; they are taken as they are, not copied."""
    module.load_state_dict(state, strict=True, assign=True)
    module.requires_grad_(False)


def find_vae(path: Path) -> tuple[Path, Path]:
    """(weights file, config file) of a VAE given as a folder, a `.pt` or a `.safetensors` file."""
    if path.is_file():
        return path, path.parent / "config.json"
    for name in VAE_WEIGHT_NAMES:
        if (path / name).is_file():
            return path / name, path / "config.json"
    raise NextStepError(
        f"{path} holds no VAE: expected config.json and checkpoint.pt there. "
        "The published one is stepfun-ai/NextStep-1-f8ch16-Tokenizer."
    )


def load_vae_state(path: Path, dtype: torch.dtype | None = None) -> tuple[VAEConfig, dict[str, Tensor]]:
    """Config and complete, checked state dict (on the CPU) of a VAE folder or file."""
    weights, config_path = find_vae(path)
    config = VAEConfig.from_file(config_path)
    files = find_vae_files(weights)
    expected = shapes_of(AutoencoderKL(config, device="meta"))
    check_complete(files, expected, optional=())
    return config, dict(read_tensors(files, expected, "cpu", dtype))


def load_vae(path: Path, device: torch.device | str, dtype: torch.dtype | None) -> AutoencoderKL:
    """The autoencoder on `device` in `dtype` (None keeps the file's)."""
    config, state = load_vae_state(path)
    vae = AutoencoderKL(config, device="meta").eval()
    fill(vae, {name: tensor.to(device=device, dtype=dtype) for name, tensor in state.items()})
    return vae

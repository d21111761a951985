"""Models to measure: a checkpoint, or one of a published shape with random weights, which needs no file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from nextstep_core.decoding.engine import NextStepEngine
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.images.latents import LatentSpace
from nextstep_core.loading.build import fill, load_vae, make_ready, plan_model
from nextstep_core.loading.documents import CONFIG
from nextstep_core.loading.published import EDIT_1_0, TEXT_TO_IMAGE_PRETRAIN, Published
from nextstep_core.loading.store import resolve_source, vae_beside
from nextstep_core.model.config import NextStepConfig, VAEConfig
from nextstep_core.model.nextstep import NextStepModel, TextEmbedding
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.request.tokenizer import NextStepTokenizer
from nextstep_core.runtime.graphs import StepGraphs
from nextstep_core.runtime.quantization import (
    QuantizedLinear,
    find_recipe,
    quantize_model,
    quantized_linears,
    replace_linears,
)
from nextstep_core.runtime.quantization.formats import PIECE
from nextstep_core.sampling.settings import GenerationSettings

BIAS_STD = 0.02
# Of the standard deviation that keeps the variance of what goes through a layer. With 1, and guidance of 7.5, rounding
# errors grow a thousandfold over 16 tokens; with this, tokens have unit variance as real ones do and errors stay small.
GAIN = 0.5

# The published transformer and head, but for the vocabulary: its embedding is not read while a picture is drawn.
PUBLISHED_CONFIG = {
    "architectures": ["NextStep"],
    "model_type": "nextstep",
    "attention_bias": True,
    "o_attention_bias": False,
    "mlp_bias": False,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "rope_scaling": None,
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "vocab_size": 1024,
    "pad_token_id": 1020,
    "pad_token_id_added": 1020,
    "boi": 1021,
    "eoi": 1022,
    "image_placeholder_id": 1023,
    "latent_size": 32,
    "latent_channels": 16,
    "latent_patch_size": 2,
    "fm_head_dim": 1536,
    "fm_head_layers": 12,
    "use_gen_pos_embed": False,
}
SHAPES = {
    "14b": {
        "hidden_size": 5120,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 13824,
    },
    "medium": {
        "hidden_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 2816,
    },
}
PUBLISHED_VAE_CONFIG = VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16)


@dataclass(frozen=True)
class Subject:
    """A model to be timed. `description` is what its config.json says; `tensor_bytes` tells each tensor's size, and is
    empty until `ready`, which may lay the weights out anew. One that `reads` no text is given ids."""

    name: str
    description: dict[str, Any]
    engine: NextStepEngine
    vae: AutoencoderKL
    tensor_bytes: dict[str, int] = field(default_factory=dict)
    reads: bool = True

    @property
    def config(self) -> NextStepConfig:
        """The model's shape."""
        return self.engine.config

    @property
    def model(self) -> NextStepModel:
        """The network."""
        return self.engine.model

    @property
    def settings(self) -> GenerationSettings:
        """What the checkpoint recommends for making an image."""
        return self.engine.recommended()


def load_subject(source: str, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> Subject:
    """The checkpoint at `source` (folder, file, hub id or "tiny"); NextStepError as the pipeline raises it."""
    path = resolve_source(source)
    plan = plan_model(path, quantization, device)
    vae = load_vae(vae_beside(path, plan.config.vae_name_or_path), device, dtype)

    def load() -> NextStepModel:
        model = plan.empty_model()
        fill(model, dict(plan.read_model(device, dtype)))
        return model

    engine = NextStepEngine.assemble(plan, LatentSpace.from_configs(plan.config, vae.config), load)
    return Subject(source, plan.documents.read(CONFIG), engine, vae)


def random_subject(shape: str, device: torch.device, dtype: torch.dtype, quantization: str | None = None) -> Subject:
    """A model of `SHAPES[shape]` with random weights, made where they stay, as they are stored."""
    description = PUBLISHED_CONFIG | SHAPES[shape]
    config = NextStepConfig.from_dict(description)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = NextStepModel(config, dtype=dtype, device="meta")
        if quantization is not None:
            like = NextStepModel(config, dtype=dtype, device="meta")
            replace_linears(model, like, find_recipe(quantization, device), QuantizedLinear)
        randomized(model, device)
        text_embedding = randomized(TextEmbedding(config, dtype=dtype, device="meta"), torch.device("cpu"))
        vae = randomized(AutoencoderKL(PUBLISHED_VAE_CONFIG, dtype=dtype, device="meta"), device)
    latents = LatentSpace.from_configs(config, PUBLISHED_VAE_CONFIG)
    says = Published(False, TEXT_TO_IMAGE_PRETRAIN, EDIT_1_0)
    reads_nothing = NextStepTokenizer(None, None, config)  # its prompts are made of ids
    caches = StepCaches(StepGraphs(model))
    engine = NextStepEngine(config, latents, says, reads_nothing, text_embedding, model, caches)
    return Subject(f"random {shape}", description, engine, vae, reads=False)


def randomized(module: nn.Module, device: torch.device) -> nn.Module:
    """A meta-device module with memory on `device` and normal weights of GAIN / sqrt(inputs)."""
    module = module.to_empty(device=device).eval().requires_grad_(False)
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d, QuantizedLinear)):
            if isinstance(layer, QuantizedLinear):
                _fill(layer)
            else:
                layer.weight.normal_(std=GAIN * layer.weight[0].numel() ** -0.5)
            if layer.bias is not None:
                layer.bias.normal_(std=BIAS_STD)
        elif hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return module


def _fill(layer: QuantizedLinear) -> None:
    """Random weights without the floats, for which a whole model has no room: the rows of a piece again and again."""
    device = layer.weight.device
    piece = torch.randn(min(PIECE, layer.rows), layer.columns, device=device) * GAIN * layer.columns**-0.5
    weight, scale = layer.format.quantize(piece)
    taken = torch.randint(len(piece), (layer.rows,), device=device)
    layer.weight.copy_(weight[taken])
    layer.weight_scale.copy_(scale[taken] if scale.ndim == 1 else scale[:, taken])


def ready(subject: Subject, quantization: str | None, device: torch.device, dtype: torch.dtype) -> Subject:
    """The subject with its weights quantized, where they are not yet, and laid out for computing, in place."""
    if quantization is not None and not any(quantized_linears(subject.model)):
        quantize_model(subject.model, quantization, device)
    tensor_bytes = {name: tensor.nbytes for name, tensor in subject.model.state_dict().items()}
    make_ready(subject.model, device, dtype)
    return replace(subject, tensor_bytes=tensor_bytes)

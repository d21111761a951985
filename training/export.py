"""Write a checkpoint folder in NextStep's on-disk layout, so that the ordinary loader opens it with no special case."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from nextstep_core.model.config import NextStepConfig
from nextstep_core.model.vae import AutoencoderKL

from .tokenizer import BEGIN_OF_IMAGE, END_OF_IMAGE, END_OF_TEXT, IMAGE_PLACEHOLDER, PAD, save_tokenizer

# Tuned on held-out prompts; training/evaluate.py measures with them.
RECOMMENDED = {
    "cfg": 3.0,
    "cfg_img": 1.0,
    "cfg_schedule": "constant",
    "num_sampling_steps": 20,
    "timesteps_shift": 1.0,
    "sampler": "score-sde-1.0",
    "use_norm": False,
    "height": 64,
    "width": 64,
}


def model_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """`config.json` of the tiny checkpoint, every field as published checkpoints have it."""
    return {
        "architectures": ["NextStep"],
        "model_type": "nextstep",
        "attention_bias": True,
        "attention_dropout": 0.0,
        "boi": tokenizer.token_to_id(BEGIN_OF_IMAGE),
        "bos_token_id": None,
        "eoi": tokenizer.token_to_id(END_OF_IMAGE),
        "eos_token_id": tokenizer.token_to_id(END_OF_TEXT),
        "fm_head_batch_mul": 4,
        "fm_head_dim": 192,
        "fm_head_layers": 3,
        "head_dim": 48,
        "hidden_act": "silu",
        "hidden_size": 192,
        "im_loss_weight": 1.0,
        "image_placeholder_id": tokenizer.token_to_id(IMAGE_PLACEHOLDER),
        "initializer_range": 0.02,
        "intermediate_size": 512,
        "latent_channels": 16,
        "latent_patch_size": 2,
        "latent_size": 32,
        "lm_loss_weight": 0.01,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "num_attention_heads": 4,
        "num_hidden_layers": 7,
        "num_key_value_heads": 2,
        "o_attention_bias": False,
        "pad_token_id": tokenizer.token_to_id(PAD),
        "pad_token_id_added": tokenizer.token_to_id(PAD),
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000.0,  # rows are short: slower rotations would never turn
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_gen_pos_embed": False,
        "vae_name_or_path": "vae/",
        "vocab_size": tokenizer.get_vocab_size(),
    }


def export_checkpoint(folder: Path, tensors: dict[str, Tensor], vae: AutoencoderKL, tokenizer: Tokenizer) -> None:
    """Write transformer, VAE, tokenizer, configs and recommended settings; weights as float16."""
    config = model_config(tokenizer)
    NextStepConfig.from_dict(config)  # what the engine would refuse is not written
    (folder / "vae").mkdir(parents=True, exist_ok=True)
    save_tokenizer(tokenizer, folder)
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", RECOMMENDED)
    _write_json(folder / "vae" / "config.json", {"resolution": 64, **asdict(vae.config)})
    halves = {name: tensor.detach().half().contiguous().cpu() for name, tensor in sorted(tensors.items())}
    shard = "model-00001-of-00001.safetensors"
    save_file(halves, folder / shard, metadata={"format": "pt"})
    (folder / shard).chmod(0o644)  # the writer makes it private
    size = sum(tensor.nbytes for tensor in halves.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict.fromkeys(halves, shard)}
    _write_json(folder / "model.safetensors.index.json", index)
    vae_halves = {name: tensor.half().cpu() for name, tensor in vae.state_dict().items()}
    torch.save(vae_halves, folder / "vae" / "checkpoint.pt")


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")

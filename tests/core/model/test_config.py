"""What a config may say, and what is refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nextstep_core import NextStepError
from nextstep_core.model.config import NextStepConfig, VAEConfig

GOLDEN = Path(__file__).resolve().parents[2] / "data" / "golden" / "tiny-a"
MODEL: dict[str, Any] = json.loads((GOLDEN / "config.json").read_text())
VAE: dict[str, Any] = json.loads((GOLDEN / "vae" / "config.json").read_text())

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear"}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling"),
    ({"base_image_grid_size": "8"}, "base_image_grid_size"),
    ({"base_image_grid_size": True}, "base_image_grid_size"),
    ({"max_position_embeddings": 40.5}, "max_position_embeddings"),
    ({"hidden_size": 96.0}, "hidden_size"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
    ({"rms_norm_eps": True}, "rms_norm_eps"),
    ({"attention_bias": 1}, "attention_bias"),
    ({"use_gen_pos_embed": "yes"}, "use_gen_pos_embed"),
    ({"head_dim": 15}, "head_dim"),
    ({"head_dim": 0}, "head_dim"),
    ({"head_dim": None, "num_attention_heads": 0}, "num_attention_heads"),
    ({"head_dim": None, "num_attention_heads": 7}, "num_attention_heads"),
    ({"head_dim": None, "num_attention_heads": "6"}, "num_attention_heads"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"boi": -1}, "boi"),
    ({"image_placeholder_id": 640}, "image_placeholder_id"),
    ({"fm_head_layers": 0}, "fm_head_layers"),
    ({"attention_bias": None}, "attention_bias"),
    ({"latent_channels": None}, "latent_channels"),
    ({"rope_theta": None}, "rope_theta"),
    ({"rope_theta": 0}, "rope_theta"),
    ({"rope_theta": float("nan")}, "rope_theta"),
    ({"rope_theta": float("inf")}, "rope_theta"),
    ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "rope_scaling"),
    ({"rope_scaling": {"type": "linear", "factor": True}}, "rope_scaling"),
    ({"rope_scaling": [1]}, "rope_scaling"),
    ({"rope_parameters": "linear"}, "rope_parameters"),
    ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    ({"rms_norm_eps": 1}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"hidden_size": 65_537}, "hidden_size"),
    ({"intermediate_size": 0}, "intermediate_size"),
    ({"num_hidden_layers": 10**100}, "num_hidden_layers"),
    ({"num_hidden_layers": 513}, "num_hidden_layers"),
    ({"num_attention_heads": 2**63, "head_dim": None}, "num_attention_heads"),
    ({"vocab_size": 2**31}, "vocab_size"),
    ({"latent_patch_size": 16, "latent_channels": 65}, "latent_patch_size"),
    ({"fm_head_layers": 129}, "fm_head_layers"),
    ({"base_image_grid_size": 0}, "base_image_grid_size"),
    ({"use_gen_pos_embed": True, "hidden_size": 65_536, "base_image_grid_size": 65}, "base_image_grid_size"),
    ({"use_gen_pos_embed": True, "hidden_size": 98}, "hidden_size"),
    ({"max_position_embeddings": 0}, "max_position_embeddings"),
    ({"vae_name_or_path": 2}, "vae_name_or_path"),
    ({"boi": 10**100}, "boi"),
]


@pytest.mark.parametrize(("change", "key"), WRONG, ids=lambda value: str(value)[:50])
def test_a_wrong_model_config_names_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(NextStepError, match=f"^there.*`{key}`"):
        NextStepConfig.from_dict(MODEL | change, "there")


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"ch_mult": []}, "ch_mult"),
        ({"ch_mult": 4}, "ch_mult"),
        ({"ch_mult": [1, 0]}, "ch_mult"),
        ({"ch_mult": [1, 2.5]}, "ch_mult"),
        ({"ch": 48}, "ch"),
        ({"ch": None}, "ch"),
        ({"z_channels": "16"}, "z_channels"),
        ({"psz": "1"}, "psz"),
        ({"scaling_factor": 0}, "scaling_factor"),
        ({"scaling_factor": float("nan")}, "scaling_factor"),
        ({"scaling_factor": 1e-30}, "scaling_factor"),
        ({"shift_factor": float("-inf")}, "shift_factor"),
        ({"ch": 2**40}, "ch"),
        ({"ch_mult": [1, 2, 2**40]}, "ch_mult"),
        ({"ch_mult": [1] * 7}, "ch_mult"),
        ({"ch_mult": [True]}, "ch_mult"),
        ({"ch": 1024, "ch_mult": [1, 9]}, "ch_mult"),
        ({"num_res_blocks": 10**9}, "num_res_blocks"),
        ({"in_channels": 4}, "in_channels"),
        ({"psz": 0}, "psz"),
        ({"deterministic": 0}, "deterministic"),
    ],
    ids=str,
)
def test_a_wrong_vae_config_names_its_key(change: dict[str, Any], key: str) -> None:
    with pytest.raises(NextStepError, match=f"^there.*`{key}`"):
        VAEConfig.from_dict(VAE | change, "there")


def test_published_sizes_may_grow_eightfold() -> None:
    sizes = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 48, "num_attention_heads": 40}
    sizes |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 152_064, "fm_head_dim": 1536}
    grown = {name: 8 * size for name, size in sizes.items()} | {"fm_head_layers": 96, "latent_channels": 128}
    assert NextStepConfig.from_dict(MODEL | grown).hidden_size == 40_960
    assert VAEConfig.from_dict(VAE | {"ch": 1024, "ch_mult": [1, 2, 4, 8], "z_channels": 128}).ch == 1024


def test_position_codes_alone_limit_the_hidden_size() -> None:
    """Without them a size that they could not have is as good as any."""
    for change in ({"hidden_size": 98}, {"hidden_size": 65_536, "base_image_grid_size": 65}):
        assert (
            NextStepConfig.from_dict(MODEL | change | {"use_gen_pos_embed": False}).hidden_size == change["hidden_size"]
        )


def test_every_missing_key_is_named() -> None:
    optional = {"use_gen_pos_embed", "base_image_grid_size", "max_position_embeddings", "vae_name_or_path", "mlp_bias"}
    optional |= {"num_key_value_heads", "head_dim", "o_attention_bias", "rope_factor"}
    for key in set(NextStepConfig.__dataclass_fields__) - optional:
        with pytest.raises(NextStepError, match=f"`{key}`"):
            NextStepConfig.from_dict({k: v for k, v in MODEL.items() if k != key})
    least = NextStepConfig.from_dict({k: v for k, v in MODEL.items() if k not in optional})
    assert (least.head_dim, least.num_key_value_heads, least.o_attention_bias, least.mlp_bias) == (16, 6, True, False)
    assert (least.rope_factor, least.use_gen_pos_embed, least.base_image_grid_size) == (1.0, False, None)
    assert least.max_position_embeddings is least.vae_name_or_path is None


def test_what_is_stated_is_taken() -> None:
    config = NextStepConfig.from_dict(MODEL | {"mlp_bias": True, "base_image_grid_size": 8, "rope_theta": 5})
    assert (config.mlp_bias, config.base_image_grid_size, config.rope_theta) == (True, 8, 5)
    assert (config.num_key_value_heads, config.o_attention_bias, config.token_dim) == (2, False, 64)
    assert NextStepConfig.from_dict(MODEL | {"boi": 0, "eoi": 639}).eoi == 639, "both ends of the vocabulary"
    one = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None}
    assert NextStepConfig.from_dict(MODEL | one).head_dim == 96


@pytest.mark.parametrize(
    ("stated", "theta", "factor"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 2}}, 1e6, 2.0),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0.5}}, 1e6, 0.5),
        ({"rope_scaling": {"rope_type": "default", "factor": 9}}, 1e6, 1.0),
        (
            {"rope_theta": "<none>", "rope_parameters": {"rope_theta": 3.0, "rope_type": "linear", "factor": 4}},
            3.0,
            4.0,
        ),
        ({"rope_parameters": {"rope_theta": 3.0}}, 1e6, 1.0),
    ],
    ids=str,
)
def test_both_spellings_of_rope_are_read(stated: dict[str, Any], theta: float, factor: float) -> None:
    config = NextStepConfig.from_dict({k: v for k, v in (MODEL | stated).items() if v != "<none>"})
    assert (config.rope_theta, config.rope_factor) == (theta, factor)


def test_a_vae_config_says_its_scale() -> None:
    config = VAEConfig.from_dict(VAE | {"ch_mult": [1, 2, 4, 4], "scaling_factor": 2, "psz": None})
    assert (config.downscale, config.scaling_factor, config.psz, config.ch_mult) == (8, 2, None, (1, 2, 4, 4))
    least = VAEConfig.from_dict({k: VAE[k] for k in ("ch", "ch_mult", "num_res_blocks", "z_channels")})
    assert (least.in_channels, least.out_ch, least.deterministic, least.encoder_norm) == (3, 3, False, False)
    assert (least.scaling_factor, least.shift_factor) == (0.3611, 0.1159), "FLUX's, where nothing is stated"

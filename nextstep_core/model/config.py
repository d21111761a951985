"""Typed configuration, read from a checkpoint's own JSON files.

Knows no torch and no weights. Every number comes from the file; what is missing or contradictory is an error that
names the key and the file.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import NextStepError

MODEL_TYPES = ("nextstep", "stepx_llama")


def _check_types(cls: type, values: dict[str, Any], source: str) -> None:
    """Reject values whose JSON type is not the field's: an int field takes no string, a float field takes an int."""
    checks = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        "bool": lambda v: isinstance(v, bool),
    }
    for field in fields(cls):
        kind = str(field.type).removesuffix(" | None")
        if field.name not in values or kind not in checks:
            continue
        value = values[field.name]
        if value is None and str(field.type).endswith("| None"):
            continue
        if not checks[kind](value):
            raise NextStepError(f"{source}: `{field.name}` is {value!r}, expected {kind}.")


def _require(values: dict[str, Any], names: tuple[str, ...], source: str) -> None:
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise NextStepError(f"{source} lacks {', '.join(f'`{name}`' for name in missing)}; the model needs it.")


@dataclass(frozen=True)
class NextStepConfig:
    """Shape of the transformer and its flow-matching head, as `config.json` states it."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float  # positions are divided by this ("linear" rope scaling; 1.0 is none)
    attention_bias: bool
    o_attention_bias: bool
    mlp_bias: bool
    latent_patch_size: int
    latent_channels: int
    boi: int
    eoi: int
    image_placeholder_id: int
    pad_token_id_added: int
    fm_head_dim: int
    fm_head_layers: int
    use_gen_pos_embed: bool = False
    base_image_grid_size: int | None = None
    max_position_embeddings: int | None = None
    vae_name_or_path: str | None = None

    @property
    def token_dim(self) -> int:
        """Numbers in one image token: channels times the patch's area."""
        return self.latent_channels * self.latent_patch_size**2

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> NextStepConfig:
        """From the parsed `config.json`; unknown keys are ignored.

        NextStepError names `source` and the key that is missing, of a wrong type or contradictory.
        """
        model_type = data.get("model_type")
        if model_type not in MODEL_TYPES:
            raise NextStepError(
                f"{source} describes a model of type {model_type!r}, not a NextStep model "
                f"(expected model_type {' or '.join(map(repr, MODEL_TYPES))})."
            )
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        rope = data.get("rope_parameters") or {}
        scaling = data.get("rope_scaling") or {key: rope[key] for key in ("rope_type", "factor") if key in rope}
        values.setdefault("rope_theta", rope.get("rope_theta"))
        values["rope_factor"] = _linear_rope_factor(scaling, source)
        _require(values, ("hidden_size", "num_attention_heads", "attention_bias"), source)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        if values.get("head_dim") is None:
            values["head_dim"] = _divide(values, "hidden_size", "num_attention_heads", source)
        if values.get("o_attention_bias") is None:
            values["o_attention_bias"] = values["attention_bias"]
        values.setdefault("mlp_bias", False)
        _require(
            values, tuple(f.name for f in fields(cls) if "None" not in str(f.type) and f.default is not False), source
        )
        _check_types(cls, values, source)
        config = cls(**values)
        config._check_consistency(source)
        return config

    def _check_consistency(self, source: str) -> None:
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "latent_patch_size",
            "latent_channels",
            "fm_head_dim",
            "fm_head_layers",
        ):
            if getattr(self, name) < 1:
                raise NextStepError(f"{source}: `{name}` is {getattr(self, name)}, expected at least 1.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise NextStepError(
                f"{source}: `num_attention_heads` ({self.num_attention_heads}) is not a multiple of "
                f"`num_key_value_heads` ({self.num_key_value_heads})."
            )
        if self.head_dim % 2:
            raise NextStepError(f"{source}: `head_dim` is {self.head_dim}; rotary embedding needs an even number.")
        for name in ("boi", "eoi", "image_placeholder_id", "pad_token_id_added"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise NextStepError(
                    f"{source}: `{name}` is {getattr(self, name)}, outside the vocabulary of {self.vocab_size} tokens."
                )


def _divide(values: dict[str, Any], above: str, below: str, source: str) -> int:
    _check_types(NextStepConfig, {name: values[name] for name in (above, below)}, source)
    if values[below] < 1 or values[above] % values[below]:
        raise NextStepError(f"{source}: `{above}` ({values[above]}) is not a multiple of `{below}` ({values[below]}).")
    return int(values[above] // values[below])


def _linear_rope_factor(scaling: dict[str, Any], source: str) -> float:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return 1.0
    factor = scaling.get("factor")
    if kind == "linear" and isinstance(factor, (int, float)) and factor > 0:
        return float(factor)
    raise NextStepError(f"{source}: `rope_scaling` {scaling!r} is not supported (only none, or linear with a factor).")


@dataclass(frozen=True)
class VAEConfig:
    """Shape and normalization of the f8 autoencoder, as `vae/config.json` states it."""

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int
    z_channels: int
    in_channels: int = 3
    out_ch: int = 3
    scaling_factor: float = 0.3611
    shift_factor: float = 0.1159
    deterministic: bool = False
    encoder_norm: bool = False
    psz: int | None = None

    @property
    def downscale(self) -> int:
        """Pixels per latent position along one side."""
        return int(2 ** (len(self.ch_mult) - 1))

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "vae/config.json") -> VAEConfig:
        """From the VAE's parsed `config.json`; NextStepError names a missing or wrong key."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        _require(values, ("ch", "ch_mult", "num_res_blocks", "z_channels"), source)
        _check_types(cls, values, source)
        mult = values["ch_mult"]
        if not isinstance(mult, (list, tuple)) or not mult or not all(isinstance(m, int) and m > 0 for m in mult):
            raise NextStepError(f"{source}: `ch_mult` is {mult!r}, expected a list of whole numbers.")
        values["ch_mult"] = tuple(mult)
        if values["ch"] % 32:
            raise NextStepError(f"{source}: `ch` is {values['ch']}; group norm with 32 groups needs a multiple of 32.")
        if values.get("scaling_factor") == 0:
            raise NextStepError(f"{source}: `scaling_factor` is 0, which would erase every latent.")
        return cls(**values)

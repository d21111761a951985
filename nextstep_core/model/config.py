"""Typed configuration, read from a checkpoint's own JSON files.

Knows no torch and no weights. Every number comes from the file; what is missing or contradictory is an error that
names the key and the file.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from ..errors import NextStepError, shown
from ..sentences import Sentence, Words, any_of

MODEL_TYPES = ("nextstep", "stepx_llama")

# Least and greatest of every number that a config states. A config is a small file with a huge effect: its sizes decide
# how much memory and time is asked for before anything else is known. The published 14B model is noted beside each; its
# size may grow some eightfold before a limit has to.
LIMITS: dict[str, tuple[float, float]] = {
    "hidden_size": (1, 65_536),  # 5,120
    "intermediate_size": (1, 262_144),  # 13,824
    "num_hidden_layers": (1, 512),  # 48; each takes time even where it takes no memory
    "num_attention_heads": (1, 1_024),  # 40
    "num_key_value_heads": (1, 1_024),  # 8
    "head_dim": (2, 1_024),  # 128
    "vocab_size": (1, 2_097_152),  # 152,064
    "rms_norm_eps": (1e-12, 0.1),  # 1e-6; none lets a row of zeros become NaN
    "rope_theta": (1, 1e12),  # 1e6; below 1 far positions would turn faster than near ones
    "rope_factor": (1e-3, 1e4),  # 1
    "latent_patch_size": (1, 16),  # 2
    "latent_channels": (1, 1_024),  # 16
    "fm_head_dim": (1, 32_768),  # 1,536
    "fm_head_layers": (1, 128),  # 12
    "base_image_grid_size": (1, 512),  # 32
    "max_position_embeddings": (1, 16_777_216),  # 131,072
}
MAX_TOKEN_DIM = 16_384  # 64; channels times the patch's area
MAX_CODES = 2**28  # numbers in the table of generation codes, 5.2 million; 1 GB in float32

VAE_LIMITS: dict[str, tuple[float, float]] = {
    "ch": (32, 1_024),  # 128
    "num_res_blocks": (1, 16),  # 2
    "z_channels": (1, 1_024),  # 16
    "in_channels": (3, 3),  # pictures are red, green and blue
    "out_ch": (3, 3),
    "scaling_factor": (1e-3, 1e3),  # 1 and 0.36; latents are divided by it
    "shift_factor": (-1e3, 1e3),  # 0 and 0.12
    "psz": (1, 16),  # 1
}
MAX_LEVELS, MAX_MULTIPLIER = 6, 32  # 4 and 4
MAX_WIDTH = 8_192  # 512; channels of a level, ch times its multiplier


def _check_types(cls: type, values: dict[str, Any], source: Words) -> None:
    """Reject values whose JSON type is not the field's: an int field takes no string, a float field takes an int."""
    checks = {
        "int": lambda v: isinstance(v, int) and not isinstance(v, bool),
        "float": lambda v: isinstance(v, (int, float)) and not isinstance(v, bool),
        "bool": lambda v: isinstance(v, bool),
        "str": lambda v: isinstance(v, str),
    }
    for field in fields(cls):
        kind = str(field.type).removesuffix(" | None")
        if field.name not in values or kind not in checks:
            continue
        value = values[field.name]
        if value is None and str(field.type).endswith("| None"):
            continue
        if not checks[kind](value):
            raise NextStepError(
                "{source}: `{name}` is {value}, expected {kind}.",
                source=source,
                name=field.name,
                value=shown(value),
                kind=kind,
            )


def _check_limits(values: dict[str, Any], limits: dict[str, tuple[float, float]], source: Words) -> None:
    """Reject numbers outside their limits. What is None is left to its default."""
    for name, (least, most) in limits.items():
        value = values.get(name)
        if value is not None and not least <= value <= most:  # NaN is neither
            wanted = f"{least:,}" if least == most else Sentence("{least:,} to {most:,}", least=least, most=most)
            raise NextStepError(
                "{source}: `{name}` is {value}, expected {wanted}.",
                source=source,
                name=name,
                value=shown(value),
                wanted=wanted,
            )


def _require(values: dict[str, Any], names: tuple[str, ...], source: Words) -> None:
    missing = [name for name in names if values.get(name) is None]
    if missing:
        raise NextStepError(
            "{source} lacks {names}; the model needs it.",
            source=source,
            names=", ".join(f"`{name}`" for name in missing),
        )


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
    def from_dict(cls, data: dict[str, Any], source: Words = "config.json") -> NextStepConfig:
        """From the parsed `config.json`; unknown keys are ignored.

        NextStepError names `source` and the key that is missing, of a wrong type or contradictory.
        """
        model_type = data.get("model_type")
        if not isinstance(model_type, str) or model_type not in MODEL_TYPES:
            raise NextStepError(
                "{source} describes a model of type {model_type}, not a NextStep model (expected model_type {known}).",
                source=source,
                model_type=shown(model_type),
                known=any_of(map(repr, MODEL_TYPES)),
            )
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        rope = _table(data, "rope_parameters", source)
        nested: dict[str, Any] = {key: rope[key] for key in ("rope_type", "factor") if key in rope}
        scaling = _table(data, "rope_scaling", source) or nested
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
        _check_limits(values, LIMITS, source)
        config = cls(**values)
        config._check_consistency(source)
        return config

    def _check_consistency(self, source: Words) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise NextStepError(
                "{source}: `num_attention_heads` ({heads}) is not a multiple of `num_key_value_heads` "
                "({key_value_heads}).",
                source=source,
                heads=self.num_attention_heads,
                key_value_heads=self.num_key_value_heads,
            )
        if self.head_dim % 2:
            raise NextStepError(
                "{source}: `head_dim` is {value}; rotary embedding needs an even number.",
                source=source,
                value=self.head_dim,
            )
        if self.token_dim > MAX_TOKEN_DIM:
            raise NextStepError(
                "{source}: a token of `latent_channels` ({channels}) times the area of a patch of "
                "`latent_patch_size` ({patch}) has {count:,} numbers, expected at most {most:,}.",
                source=source,
                channels=self.latent_channels,
                patch=self.latent_patch_size,
                count=self.token_dim,
                most=MAX_TOKEN_DIM,
            )
        codes = (self.base_image_grid_size or 0) ** 2 * self.hidden_size  # the default grid is never too much
        if self.use_gen_pos_embed and (self.hidden_size % 4 or codes > MAX_CODES):
            raise NextStepError(
                "{source}: `use_gen_pos_embed` needs a `hidden_size` ({hidden}) that is a multiple of 4, and at "
                "most {most:,} when multiplied by the area of the `base_image_grid_size` ({grid}).",
                source=source,
                hidden=self.hidden_size,
                most=MAX_CODES,
                grid=self.base_image_grid_size,
            )
        for name in ("boi", "eoi", "image_placeholder_id", "pad_token_id_added"):
            value = getattr(self, name)
            if not 0 <= value < self.vocab_size:
                raise NextStepError(
                    "{source}: `{name}` is {value}, outside the vocabulary of {count} tokens.",
                    source=source,
                    name=name,
                    value=shown(value),
                    count=self.vocab_size,
                )


def _table(data: dict[str, Any], name: str, source: Words) -> dict[str, Any]:
    """A JSON object that may be absent, empty then."""
    value = data.get(name)
    if value is not None and not isinstance(value, dict):
        raise NextStepError(
            "{source}: `{name}` is {value}, expected an object.", source=source, name=name, value=shown(value)
        )
    return value or {}


def _divide(values: dict[str, Any], above: str, below: str, source: Words) -> int:
    stated = {name: values[name] for name in (above, below)}
    _check_types(NextStepConfig, stated, source)
    _check_limits(stated, LIMITS, source)
    if values[above] % values[below]:
        raise NextStepError(
            "{source}: `{above}` ({above_value}) is not a multiple of `{below}` ({below_value}).",
            source=source,
            above=above,
            above_value=values[above],
            below=below,
            below_value=values[below],
        )
    return int(values[above] // values[below])


def _linear_rope_factor(scaling: dict[str, Any], source: Words) -> float:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return 1.0
    factor = scaling.get("factor")
    if kind == "linear" and isinstance(factor, (int, float)) and not isinstance(factor, bool):
        least, most = LIMITS["rope_factor"]
        if least <= factor <= most:
            return float(factor)
    raise NextStepError(
        "{source}: `rope_scaling` of the type {kind} with the factor {factor} is not supported (only "
        "none, or linear with a factor).",
        source=source,
        kind=shown(kind),
        factor=shown(factor),
    )


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
    def from_dict(cls, data: dict[str, Any], source: Words = "vae/config.json") -> VAEConfig:
        """From the VAE's parsed `config.json`; NextStepError names a missing or wrong key."""
        values = {f.name: data[f.name] for f in fields(cls) if f.name in data}
        _require(values, ("ch", "ch_mult", "num_res_blocks", "z_channels"), source)
        _check_types(cls, values, source)
        _check_limits(values, VAE_LIMITS, source)
        mult = values["ch_mult"]
        if (
            not isinstance(mult, (list, tuple))
            or not 1 <= len(mult) <= MAX_LEVELS
            or not all(map(_is_multiplier, mult))
        ):
            raise NextStepError(
                "{source}: `ch_mult` is {value}, expected up to {levels} whole numbers from 1 to {most}.",
                source=source,
                value=shown(mult),
                levels=MAX_LEVELS,
                most=MAX_MULTIPLIER,
            )
        values["ch_mult"] = tuple(mult)
        if values["ch"] % 32:
            raise NextStepError(
                "{source}: `ch` is {value}; group norm with 32 groups needs a multiple of 32.",
                source=source,
                value=values["ch"],
            )
        if values["ch"] * max(mult) > MAX_WIDTH:
            raise NextStepError(
                "{source}: `ch` ({value}) times the largest of `ch_mult` ({largest}) is more than the {most:,} "
                "channels that a level may have.",
                source=source,
                value=values["ch"],
                largest=max(mult),
                most=MAX_WIDTH,
            )
        return cls(**values)


def _is_multiplier(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_MULTIPLIER

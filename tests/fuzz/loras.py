"""A good checkpoint with LoRA files that are not: their bytes, their tensors and names, and what lies beside them."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from nextstep_core import NextStepPipeline
from tests.hostile_files import HEADERS
from tests.lora_files import kohya, matrices, peft

from . import good
from .case import Case
from .json_mutation import mutated
from .settings import NONE

DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
VALUES = (float("nan"), float("inf"), 3e38, 1e30, 1e-45, 0.0)
ENDINGS = ("", ".weight", ".lora_A", ".alpha", ".default", ".lora_up.weight", "\0", "x" * 300, "_", "..")
CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "alpha_pattern": {"q_proj": 8}, "rank_pattern": {}}
STRENGTHS = (1.0, 0.5, 0.0, -1.0, 100.0, -100.0)


@lru_cache
def pipeline() -> NextStepPipeline:
    return NextStepPipeline.from_pretrained(good.CHECKPOINT, dtype=torch.float32)


def warm_up() -> None:
    good.draw(good.CHECKPOINT)
    pipeline()


def case(rng: Random) -> Case:
    config, named, seed = pipeline().engine.config, rng.choice((peft, kohya)), rng.randrange(2**31)
    every = matrices(config, rank=2, seed=seed)
    tensors: dict[str, Tensor] = {}
    for layer in rng.sample(sorted(every), rng.choice((1, 2, 5, len(every)))):
        tensors[named(layer, "A")], tensors[named(layer, "B")] = every[layer]
        if named is kohya and rng.random() < 0.5:
            tensors[named(layer, "alpha")] = torch.tensor(1.0)
    done = [rng.choice(CHANGES)(tensors, rng) for _ in range(rng.choice((0, 1, 1, 2)))]
    data, beside = save({name: tensor.contiguous().clone() for name, tensor in tensors.items()}), ""
    if rng.random() < 0.3:
        what, data = _bytes(data, rng)
        done.append(what)
    if rng.random() < 0.4:
        what, beside = mutated(json.dumps(CONFIG), rng) if rng.random() < 0.8 else ("a config", json.dumps(CONFIG))
        done.append(f"beside it {what}")
    strength: Any = rng.choice((*STRENGTHS, rng.choice(NONE)))
    named_so = rng.choice(NONE) if rng.random() < 0.05 else None
    hostile = rng.choice(sorted(HEADERS)) if rng.random() < 0.05 else None

    def attempt(folder: Path) -> Tensor:
        path = folder / "adapter_model.safetensors"
        if hostile is not None:
            HEADERS[hostile](path)
        else:
            path.write_bytes(data)
        if beside:
            good.put(folder / "adapter_config.json", beside)
        pipe = NextStepPipeline(pipeline().engine, pipeline().vae, torch.device("cpu"), torch.float32)
        pipe.load_lora(path if named_so is None else named_so, strength)
        _, height, width, _ = good.SHAPE
        return pipe.generate("A red apple.", height=height, width=width, steps=2, cfg=2.0, sampler="flow-ode").images

    return Case(
        f"{named.__name__} of {len(tensors)} tensors: {'; '.join(done) or hostile or 'as it is'}", attempt, good.SHAPE
    )


def _bytes(data: bytes, rng: Random) -> tuple[str, bytes]:
    if rng.random() < 0.5:
        place = rng.randrange(len(data))
        return f"cut at {place}", data[:place]
    changed = bytearray(data)
    for _ in range(rng.choice((1, 3, 50))):
        changed[rng.randrange(rng.choice((16, 600, len(data))) if len(data) > 600 else len(data))] = rng.randrange(256)
    return "other bytes", bytes(changed)


def _reshaped(tensors: dict[str, Tensor], rng: Random) -> str:
    name = rng.choice(sorted(tensors))
    other = rng.choice(((0,), (), (2,), (2, 0), (1, 1), (3, 96), (96, 2), (2, 96, 1, 1), (5000, 2)))
    tensors[name] = torch.ones(other)
    return f"{name[-30:]} is {other}"


def _retyped(tensors: dict[str, Tensor], rng: Random) -> str:
    name, dtype = rng.choice(sorted(tensors)), rng.choice(DTYPES)
    tensors[name] = tensors[name].to(dtype)
    return f"{name[-30:]} is {dtype}"


def _valued(tensors: dict[str, Tensor], rng: Random) -> str:
    name, value = rng.choice(sorted(tensors)), rng.choice(VALUES)
    tensors[name] = torch.full_like(tensors[name], value, dtype=torch.float32)
    return f"{name[-30:]} is {value}"


def _renamed(tensors: dict[str, Tensor], rng: Random) -> str:
    name = rng.choice(sorted(tensors))
    cut = rng.randrange(len(name))
    other = rng.choice(
        (name[:cut], name[cut:], name[:cut] + rng.choice(ENDINGS) + name[cut:], name + rng.choice(ENDINGS))
    )
    tensors[other] = tensors.pop(name)
    return f"{name[-30:]} is called {other[-40:]!r}"


def _copied(tensors: dict[str, Tensor], rng: Random) -> str:
    name, other = rng.choice(sorted(tensors)), rng.choice(sorted(tensors))
    tensors[other] = tensors[name].clone()
    return f"{other[-30:]} is {name[-30:]}"


def _dropped(tensors: dict[str, Tensor], rng: Random) -> str:
    name = rng.choice(sorted(tensors))
    del tensors[name]
    return f"no {name[-30:]}"


CHANGES = (_reshaped, _retyped, _valued, _renamed, _copied, _dropped)

"""Training a LoRA: what is trained is what the engine adds, and the shipped one draws scenes at night."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from nextstep_core import NextStepPipeline
from nextstep_core.loading.lora_file import EMBEDDED_LORAS, find_lora
from nextstep_core.model.transformer import whole_span
from training.lora import ALPHA, RANK, STRENGTHS, at_night, main, measured, trained
from training.model_training import Trainee
from training.scenes import Scene, SceneObject
from training.start import SHIPPED

LARGEST = 400_000  # bytes


def arguments(**changed: object) -> Namespace:
    return Namespace(**{"checkpoint": SHIPPED, "steps": 2, "batch": 2, "singles": 4, "pairs": 2, "seed": 1} | changed)


def test_what_is_trained_is_what_the_engine_adds(tmp_path: Path) -> None:
    pairs = trained(arguments())
    assert any(up.abs().max() > 0 for up in pairs.up), "it was trained at all"
    with torch.no_grad():
        for parameter in pairs.parameters():  # as the file holds them
            parameter.copy_(parameter.half())
    pairs.save(tmp_path, base="tiny")
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    trainee = Trainee(pipe.engine.config)
    trainee.model.load_state_dict(pipe.engine.model.state_dict())
    pairs.attach(trainee.model)
    pipe.load_lora(tmp_path)
    embeds, span = (
        torch.randn(2, 7, 192),
        whole_span(pipe.engine.config, torch.ones(2, 7, dtype=torch.bool), torch.float32),
    )
    engine = pipe.engine
    with torch.inference_mode():
        plain = engine.model(embeds, span)
        with engine.caches.adapters.applied(engine.model, engine.loras, pipe.device, pipe.dtype):
            changed = engine.model(embeds, span)
        wanted = trainee.model(embeds, span)
    assert (changed - wanted).abs().max() < 1e-4 < (changed - plain).abs().max()
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (RANK, ALPHA)


def test_the_same_command_makes_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--steps", "2", "--batch", "2", "--singles", "4", "--pairs", "2", "--count", "0", "--output"]
    for name in ("a", "b"):
        monkeypatch.setattr("sys.argv", ["lora", *small, str(tmp_path / name)])
        main()
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_night_by_hand() -> None:
    things = (SceneObject("circle", "red", 14, 16, 32), SceneObject("star", "black", 14, 48, 32))
    night = at_night(Scene("blue", things))
    assert night.background == "black" and [thing.color for thing in night.objects] == ["red", "white"]


def test_the_shipped_one_draws_at_night() -> None:
    """And at strength 0 as the prompt says. It belongs to the weights: with others, train it again."""
    folder = EMBEDDED_LORAS["night"]
    assert sum(path.stat().st_size for path in folder.iterdir()) < LARGEST
    assert not find_lora(folder).others
    told, sheet = measured(folder, SHIPPED, 10, STRENGTHS)
    shares = [[int(word.rstrip("%")) for word in line.split() if word.endswith("%")] for line in told]
    assert shares[0][0] >= 70 and shares[2][1] >= 70 and shares[0][1] < 40 and shares[2][0] < 40, told
    assert sheet.shape == (3 * 64, 10 * 64, 3)

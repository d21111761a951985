"""The random checkpoint has the published layout: it plans, loads and draws."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import checkpoint
from benchmarks.subjects import SHAPES
from nextstep_core import NextStepPipeline
from nextstep_core.loading.build import plan_model
from nextstep_core.model.config import NextStepConfig

SMALL = {**SHAPES["medium"], "num_hidden_layers": 1, "fm_head_layers": 1, "fm_head_dim": 64, "vocab_size": 1024}


def test_a_random_checkpoint_is_a_checkpoint(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 10_000_000)
    monkeypatch.setattr(checkpoint, "POOL", 1 << 16)
    parameters = checkpoint.write_checkpoint(tmp_path, SMALL)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    pipe = NextStepPipeline.from_pretrained(tmp_path, dtype=torch.float32)
    embedding, language_head = 1024 * 1024, 1024 * 1024
    assert parameters == plan_model(tmp_path).parameters + embedding + language_head
    assert pipe.generate("a red circle", height=32, width=32, steps=2).images.isfinite().all()


def test_the_published_shape_has_its_published_size() -> None:
    shapes = checkpoint.tensors_of(NextStepConfig.from_dict(checkpoint.description_of(SHAPES["14b"])))
    assert round(sum(torch.Size(shape).numel() for shape in shapes.values()) / 1e9, 2) == 14.95

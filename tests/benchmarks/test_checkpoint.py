"""The random checkpoint has the published layout: it plans, loads and draws."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks import checkpoint, loading
from benchmarks.subjects import SHAPES
from nextstep_core import NextStepPipeline
from nextstep_core.loading import kept
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


def test_the_kept_file_is_what_is_timed(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(checkpoint, "POOL", 1 << 16)
    checkpoint.write_checkpoint(tmp_path, SMALL)
    loaded = []
    load = loading.load
    monkeypatch.setattr(loading, "load", lambda plan, *rest: loaded.append(plan) or load(plan, *rest))
    monkeypatch.setattr(sys, "argv", ["loading", str(tmp_path), "--quantization", "int8", "--repeat", "1"])
    loading.main()
    converted, found = loaded
    assert converted.recipe.name == found.recipe.name == "int8" and found.stored and not converted.stored
    assert kept.find(plan_model(tmp_path, "int8").for_computing_on("cpu"), torch.bfloat16, [tmp_path / kept.FOLDER])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == 3 and "kept on the way" in rows[0] and "the kept file" in rows[1] and "alone" in rows[2]

"""Quantized once: what a loader converted is read the next time, and draws the same picture bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from comfy_graph import ComfyGraph, text_to_image


@pytest.fixture
def models(graph: ComfyGraph, golden: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder with one checkpoint under a published name."""
    for roots in ("model_roots", "single_file_roots", "vae_roots"):
        monkeypatch.setattr(graph.pack("nodes.host"), roots, lambda: [tmp_path])
    monkeypatch.setattr(graph.pack("nextstep_core.loading.kept"), "SPARE", 0)
    shutil.copytree(golden / "tiny-a", tmp_path / "NextStep-1.1")
    yield tmp_path
    graph.pack("nodes.loaders")._loaded.clear()


def drawn(graph: ComfyGraph, keeping: str, quantization: str = "int4") -> torch.Tensor:
    """The picture, from a model that is loaded anew."""
    graph.free()
    graph.pack("nodes.loaders")._loaded.clear()
    prompt = text_to_image()
    prompt["model"]["inputs"] |= {"model_name": "NextStep-1.1 (downloads 29 GB)", "quantization": quantization}
    prompt["model"]["inputs"]["keep_quantized"] = keeping
    return graph.value(prompt, "decode")


def test_the_second_start_converts_nothing_and_draws_the_same(graph: ComfyGraph, models: Path, monkeypatch) -> None:
    without = drawn(graph, "off")
    assert not (models / ".quantized").exists()
    first = drawn(graph, "auto")
    (file,) = (models / ".quantized" / "NextStep-1.1").glob("*.safetensors")
    build = graph.pack("nextstep_core.loading.build")
    quantize = build.quantize_in_pieces
    monkeypatch.setattr(build, "quantize_in_pieces", lambda *_: pytest.fail("converted again"))
    second = drawn(graph, "auto")
    assert torch.equal(without, first) and torch.equal(first, second)
    assert graph.pack("nodes.catalog").models().keys() == {"NextStep-1.1", "tiny (embedded)"}, "listed once"
    monkeypatch.setattr(build, "quantize_in_pieces", quantize)
    before = file.stat().st_ino
    (models / "NextStep-1.1" / "config.json").touch()
    assert torch.equal(drawn(graph, "auto"), first) and file.stat().st_ino != before, "its source has changed"


def test_the_user_is_told_what_may_be_deleted_and_then_draws_without_it(
    graph: ComfyGraph, models: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = drawn(graph, "keep originals")
    assert f"you may delete {models / 'NextStep-1.1'}, 0.0 GB" in caplog.text
    for shard in (models / "NextStep-1.1").glob("*.safetensors"):
        shard.unlink()
    assert torch.equal(drawn(graph, "keep originals"), first), "without the weights"
    shutil.rmtree(models / "NextStep-1.1")
    assert torch.equal(drawn(graph, "auto"), first), "without the folder, its VAE included"
    assert torch.equal(drawn(graph, "auto", "auto"), first)
    assert "NextStep-1.1 (kept quantized)" in graph.pack("nodes.catalog").models()
    with pytest.raises(AssertionError, match="kept only as int4"):
        drawn(graph, "auto", "int8")


def test_what_is_not_quantized_or_embedded_is_not_kept(graph: ComfyGraph, models: Path) -> None:
    drawn(graph, "auto", "none")
    prompt = text_to_image()
    prompt["model"]["inputs"] |= {"model_name": "tiny (embedded)", "quantization": "int8", "keep_quantized": "auto"}
    graph.value(prompt, "decode")
    assert not (models / ".quantized").exists()

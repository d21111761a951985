"""Long work of every kind asks often whether it is to stop, and stops where it asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.steps import StepCaches
from nextstep_core.loading import checkpoint as reading
from nextstep_core.loading import single_file
from nextstep_core.loading.build import make_ready, plan_model
from nextstep_core.loading.locks import held
from nextstep_core.loading.single_file import save_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.interrupt import Check, checked, leaves
from nextstep_core.runtime.quantization import formats
from nextstep_core.runtime.quantization.formats import INT8, quantize_in_pieces
from nextstep_core.sentences import Sentence

SMALL = {"height": 16, "width": 32, "steps": 1, "cfg": 1.0, "sampler": "flow-ode"}
CPU = torch.device("cpu")


class Stopped(Exception):
    pass


class Asked:
    """A check that counts, and stops the work when it has been asked so often."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.times, self.stop_at = 0, stop_at

    def __call__(self) -> None:
        self.times += 1
        if self.times == self.stop_at:
            raise Stopped


def layers_of(network: nn.Module) -> int:
    return len(list(leaves(network)))


def encode(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    pipe.encode_image(torch.zeros(16, 32, 3), check=check)
    return layers_of(pipe.vae.encoder)


def draw(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    """One row in two loops, the transformer's layers for the prompt and for one of two tokens, and the decoder."""
    engine = replace(pipe.engine, caches=StepCaches(prefilled=None))
    NextStepPipeline(engine, pipe.vae, CPU, torch.float32).generate("A red apple.", **SMALL, check=check)
    return 2 + 2 * len(pipe.engine.model.layers) + layers_of(pipe.vae.decoder)


def lay_out(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    settings = pipe.engine.recommended().override(cfg=2.0)
    pipe.engine.make_job([Caption("A")] * 500, (1, 1), settings, seed=1, check=check)
    return 2 * 2 * 500


def quantize(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    quantize_in_pieces(INT8, torch.ones(1000, 4), check)
    return -(-1000 // formats.PIECE)


def load(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    plan = plan_model(ASSETS / "tiny")
    dict(plan.read_model("cpu", torch.float64, check=check))
    return len(plan.model_names)


def pack(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    model = plan_model(ASSETS / "tiny", "int8").load_model(CPU, torch.float32)
    make_ready(model, CPU, torch.float32, check)
    return len(list(model.modules()))


def convert(pipe: NextStepPipeline, check: Check, folder: Path) -> int:
    plan = plan_model(ASSETS / "tiny")
    save_model(plan, folder / "x.safetensors", torch.float32, check=check)
    return 2 * len(plan.model_names)


STAGES = [encode, draw, lay_out, quantize, load, pack, convert]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_long_stage_asks_often_and_stops_where_it_is_told_to(pipeline, tmp_path: Path, stage: Callable) -> None:
    asked = Asked()
    least = stage(pipeline, asked, tmp_path)
    assert asked.times >= least
    for stop_at in (1, least):
        told = Asked(stop_at)
        with pytest.raises(Stopped):
            stage(pipeline, told, tmp_path)
        assert told.times == stop_at, "nobody asks again"


def test_a_stopped_conversion_leaves_nothing(pipeline, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        convert(pipeline, Asked(50), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("constant", "module"), [("PIECE", reading), ("BLOCK", single_file)])
def test_a_large_tensor_is_read_and_written_in_pieces(tmp_path, monkeypatch, constant: str, module) -> None:
    """The largest is 3 GB in the published checkpoint."""
    asked = []
    for size in (1 << 30, 1 << 10):
        monkeypatch.setattr(module, constant, size)
        asked.append(Asked())
        save_model(plan_model(ASSETS / "tiny"), tmp_path / f"{size}.safetensors", torch.float32, check=asked[-1])
    assert asked[1].times > 10 * asked[0].times
    assert (tmp_path / f"{1 << 30}.safetensors").read_bytes() == (tmp_path / f"{1 << 10}.safetensors").read_bytes()


def test_waiting_for_a_lock_asks(tmp_path: Path) -> None:
    with held(tmp_path / "x.lock", Sentence("held")):
        asked = Asked(3)
        with pytest.raises(Stopped), held(tmp_path / "x.lock", asked):
            pass
    assert not list(tmp_path.iterdir())


def test_a_check_is_gone_afterwards_and_costs_nothing_where_there_is_none(pipeline) -> None:
    layers = list(leaves(pipeline.vae.decoder))
    with pytest.raises(Stopped), checked(layers, Asked()):
        assert all(layer._forward_pre_hooks for layer in layers)
        raise Stopped
    assert not any(layer._forward_pre_hooks for layer in layers)


def test_a_capture_is_not_disturbed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt in the middle would be taken for a capture that failed, and be lost."""
    layer, asked = nn.Linear(2, 2), Asked()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for capturing, times in ((True, 0), (False, 1)):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=capturing: now)
        with checked([layer], asked):
            layer(torch.zeros(2))
        assert asked.times == times

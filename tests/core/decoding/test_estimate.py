"""What a picture will take, from one layer: every part counts as often as it comes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from nextstep_core.decoding import estimate as estimates
from nextstep_core.decoding.estimate import Estimate, estimate
from nextstep_core.decoding.steps import FlowIntegration, TransformerStep
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.sampling.settings import GenerationSettings

CPU = torch.device("cpu")


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every call of a network takes so many seconds: 2 for a layer's prompt, 1 for its token, 10 of the head, 100 of
    the VAE; the names of what was called."""
    called: list[str] = []
    costs = {"prompt": 2.0, "token": 1.0, "head": 10.0, "vae": 100.0}

    def name(kind: str, plain: Callable) -> Callable:
        def counted(self, x, *rest, **options):
            called.append("prompt" if kind == "layer" and x.shape[1] > 1 else "token" if kind == "layer" else kind)
            return plain(self, x, *rest, **options)

        return counted

    for kind, owner, method in (
        ("layer", TransformerStep, "run"),
        ("head", FlowIntegration, "__call__"),
        ("vae", AutoencoderKL, "decode"),
    ):
        monkeypatch.setattr(owner, method, name(kind, getattr(owner, method)))

    def timed(device: torch.device, work: Callable[[], object]) -> tuple[float, object]:
        before = len(called)
        result = work()
        return sum(costs[part] for part in called[before:]), result

    monkeypatch.setattr(estimates, "timed", timed)
    yield called


def test_a_picture_is_the_sum_of_its_parts_by_hand(pipeline, seconds: list[str]) -> None:
    """32x48 pixels are 6 tokens; the VAE works on all of it at once."""
    config, vae = pipeline.engine.config, pipeline.vae.config
    found = estimate(config, vae, GenerationSettings(steps=3), 32, 48, CPU, torch.float32)
    layers = config.num_hidden_layers
    assert layers > 1
    assert found == Estimate(6, prompt=2.0 * layers, token=1.0 * layers + 10.0, streaming=0.0, vae=100.0)
    assert found.picture == 2.0 * layers + 6 * (layers + 10.0) + 100.0
    wide = estimate(config, vae, GenerationSettings(steps=3), 256, 512, CPU, torch.float32, "int8")
    assert wide.tokens == 16 * 32 and wide.vae == 100.0 * 2 * 4, "from a piece of 128x128"
    assert estimate(config, None, GenerationSettings(steps=3), 32, 48, CPU, torch.float32).vae == 0


def test_what_is_streamed_comes_while_the_layers_compute(pipeline, seconds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimates, "copy_rate", lambda device: 1000.0)
    config = pipeline.engine.config
    token = config.num_hidden_layers + 10.0
    for streamed, each in ((1000, token), (10**6, 1000.0)):
        found = estimate(config, None, GenerationSettings(steps=3), 32, 48, CPU, torch.float32, None, streamed)
        assert found.streaming == streamed / 1000 and found.picture == found.prompt + 6 * each


def test_the_head_runs_as_often_as_it_is_asked_to(pipeline) -> None:
    """Not in seconds, which a test cannot promise: in calls of the network."""
    calls: list[int] = []
    velocity = type(pipeline.engine.model.head).velocity

    def counted(self, rows, *rest):
        calls.append(len(rows))
        return velocity(self, rows, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline.engine.model.head), "velocity", counted)
        for cfg, rows in ((1.0, 1), (7.5, 2)):
            calls.clear()
            settings = GenerationSettings(steps=4, cfg=cfg, sampler="flow-ode")
            estimate(pipeline.engine.config, None, settings, 32, 32, CPU, torch.float32)
            assert set(calls) == {rows} and len(calls) % 4 == 0

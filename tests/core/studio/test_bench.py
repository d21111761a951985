"""The benchmark's numbers by a clock that the test winds, and its floor by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict

import pytest
import torch
from simulated_memory import WeighedMPS
from simulated_mps import MPS

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.budget import model_bytes, tensor_bytes
from nextstep_core.decoding.floor import part_of
from nextstep_core.decoding.steps import FlowIntegration, TokenSequence, TransformerStep
from nextstep_core.loading.build import make_ready, plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.vae import AutoencoderKL
from nextstep_core.runtime import cpu
from nextstep_core.runtime.bandwidth import Bandwidth
from nextstep_core.studio import bench as benches
from nextstep_core.studio.bench import Spread, bench

SMALL = {"width": 48, "height": 32, "steps": 2}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Time passes only in the networks: 7 s for a prompt, 2 for a token in the transformer, 3 in the head, 11 in the
    VAE; and 1000 bytes pass in a second. How often each was called."""
    now, calls = [0.0], {"prompt": 0, "feed": 0, "head": 0, "vae": 0}

    def takes(owner: type, method: str, name: str, seconds: float) -> None:
        plain = getattr(owner, method)

        def passing(self, *arguments, **options):
            now[0] += seconds
            calls[name] += 1
            return plain(self, *arguments, **options)

        monkeypatch.setattr(owner, method, passing)

    takes(TransformerStep, "__call__", "feed", 2.0)
    takes(FlowIntegration, "__call__", "head", 3.0)
    takes(AutoencoderKL, "decode", "vae", 11.0)
    prefill = TokenSequence.prefill

    def prompt(self, embeds, valid, prefilled, key, chunk=1024):
        if prefilled is None or key not in prefilled._entries:
            now[0] += 7.0
            calls["prompt"] += 1
        return prefill(self, embeds, valid, prefilled, key, chunk)

    monkeypatch.setattr(TokenSequence, "prefill", prompt)
    monkeypatch.setattr(benches.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benches, "bandwidth", lambda device, size: Bandwidth(1000.0, "by hand"))
    yield calls


def test_every_part_is_timed_by_itself(pipeline, clock: dict[str, int]) -> None:
    """Six tokens: the first is sampled after the prompt, the others after one more pass of the transformer."""
    found = bench(pipeline, "tiny-a", prompts=["A"], runs=2, warm_up=1, load=5.0, **SMALL)
    assert found.tokens == 6 and clock == {"prompt": 3, "feed": 15, "head": 18, "vae": 3}, "prompts are read anew"
    assert found.token == Spread(5.0, 5.0, 5.0) and found.vae.median == 11.0 and found.load == 5.0
    assert found.prompt.median == 7.0 + 3.0 - 5.0, "until the first token, less one token's time"
    assert found.picture.median == 7 + 5 * 2 + 6 * 3 + 11
    assert found.pictures_per_minute == 60 / 46 and found.tokens_per_second == 1 / 5
    assert found.floor == found.token_bytes / 1000 and found.share == found.floor / 5.0
    assert json.loads(json.dumps(asdict(found)))["picture"]["lowest"] == 46
    assert (found.weights, found.steps, found.width, found.quality, found.streamed) == ("float32", 2, 48, None, 0)


def test_one_token_is_a_picture_too(pipeline, clock) -> None:
    found = bench(pipeline, "tiny-a", runs=1, warm_up=0, width=16, height=16, steps=2)
    assert found.tokens == 1 and found.token.median == 10.0 and found.prompt.median == 0.0


def test_quality_is_what_the_function_says_of_the_counted_pictures(pipeline, clock) -> None:
    seen = []

    def judge(picture: torch.Tensor) -> float:
        seen.append(picture)
        return float(len(seen))

    found = bench(pipeline, "tiny-a", runs=3, warm_up=2, quality=judge, **SMALL)
    assert found.quality == Spread(2.0, 1.0, 3.0)
    assert {tuple(picture.shape) for picture in seen} == {(32, 48, 3)}
    assert not torch.equal(seen[0], seen[1]), "each has a prompt and a seed of its own"


def test_the_floor_reads_every_weight_of_a_token_once_and_the_head_at_every_call(pipeline, clock) -> None:
    sizes = {name: t.nbytes for name, t in pipeline.engine.model.state_dict().items()}
    assert tensor_bytes(pipeline.engine.model) == sizes
    parts = [(part_of(name), size) for name, size in sizes.items()]
    once = sum(size for part, size in parts if part in ("transformer", "head_once"))
    call = sum(size for part, size in parts if part == "head_call")
    found = [bench(pipeline, "tiny-a", runs=1, warm_up=0, width=48, height=32, steps=n).token_bytes for n in (2, 3)]
    assert found[1] - found[0] == call
    assert found[0] > once + 2 * call, "and the keys and values"


def test_layers_that_a_cpu_has_laid_out_anew_count_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "WIDE", 1)
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    packed = sum(isinstance(layer, cpu.PackedLinear) for layer in pipe.engine.model.modules())
    assert packed or not torch.backends.mkldnn.is_available()
    make_ready(pipe.engine.model, torch.device("cpu"), torch.float32)
    assert tensor_bytes(pipe.engine.model) == plan_model(ASSETS / "tiny").tensor_bytes(None, torch.float32)


def test_what_is_streamed_and_stored_is_told(clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benches, "wait", lambda device: None)  # the simulated card is never behind
    with WeighedMPS():
        pipe = NextStepPipeline.from_pretrained(
            "tiny", device=MPS, dtype=torch.float32, quantization="int8", max_memory=15 * 10**6
        )
        found = bench(pipe, "tiny", runs=1, warm_up=0, **SMALL)
    assert found.weights == "int8" and found.max_memory == 15 * 10**6 and found.kind == "MPS"
    assert 0 < found.streamed <= model_bytes(pipe.engine.model)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"runs": 0}, "runs is 0"),
        ({"runs": 1001}, "runs is 1001"),
        ({"warm_up": -1}, "warm_up is -1"),
        ({"prompts": ()}, "nothing to draw"),
        ({"width": 40}, "40x512"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_what_cannot_be_is_refused_before_it_is_drawn(pipeline, monkeypatch, wrong: dict, said: str) -> None:
    monkeypatch.setattr(type(pipeline), "generate", lambda *_, **__: pytest.fail("it was drawn"))
    with pytest.raises(NextStepError, match=said):
        bench(pipeline, "tiny-a", **wrong)


def test_it_can_be_stopped(pipeline) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench(pipeline, "tiny-a", check=stop, **SMALL)

"""Whole steps in our kernels: the recorded pictures, and what takes their place where they cannot be used."""

from __future__ import annotations

import json
import logging
import os
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.multiprocessing.reductions import StorageWeakRef
from unasked import Unasked

from nextstep_core import NextStepPipeline
from nextstep_core.decoding.fused import FusedFlow, FusedLayers, Guarded, OwnKernels
from nextstep_core.decoding.steps import (
    FlowIntegration,
    StepCaches,
    StepShape,
    TokenSampler,
    TokenSequence,
    TransformerStep,
)
from nextstep_core.request.layout import Caption
from nextstep_core.runtime.quantization import quantized_linears
from nextstep_core.runtime.quantization.kernel import plain
from nextstep_core.runtime.trials import SLOWER, WON, Candidate, Outcome, Trial, run
from nextstep_core.sampling.solvers import SAMPLERS

GOLDEN = Path(__file__).resolve().parents[1] / "data" / "golden"
RECORDS = json.loads((GOLDEN / "cases.json").read_text())
# Of each recorded picture: the interpreter takes seconds for one. NEXTSTEP_TOKENS=64 draws them whole, in half an hour.
TOKENS = int(os.environ.get("NEXTSTEP_TOKENS", "2"))
CPU = torch.device("cpu")


@pytest.mark.parametrize("case", RECORDS["cases"], ids=lambda case: case["name"])
def test_the_recorded_tokens(pipeline: NextStepPipeline, case: dict) -> None:
    params, asked = case["params"], Unasked()
    engine = replace(pipeline.engine, caches=StepCaches(hasten=asked.kernels))
    images = tuple(pipeline.encode_image(Image.open(GOLDEN / path)) for path in params["images"] or ())
    settings = engine.recommended().override(
        cfg=params["cfg"],
        cfg_img=params["cfg_img"],
        cfg_schedule=params["cfg_schedule"],
        steps=params["num_sampling_steps"],
        shift=params["timesteps_shift"],
        sampler="score-sde-1.0",
        use_norm=params["use_norm"],
    )
    job = engine.make_job(
        [Caption(params["captions"], images)],
        engine.grid(*params["hw"]),
        settings,
        seed=params["seed"],
        negative_prompt=params["negative_prompt"] or "",
        positive_prompt=params["positive_prompt"] or "",
        images_per_caption=params["num_images_per_caption"],
    )
    *_, last = islice(engine.decode(job, CPU, torch.float32), TOKENS)
    assert asked.names == ["triton-layers", "triton-head"]
    recorded = load_file(GOLDEN / case["file"])["tokens"]
    assert (last.tokens[:, :TOKENS] - recorded[:, :TOKENS]).abs().max() <= 1e-4


@pytest.mark.parametrize("recipe", ["int8", "fp8"])
def test_quantized_weights(recipe: str) -> None:
    """Both formats lie on a CPU as they are stored, which our kernels read."""
    pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=recipe)
    for _, layer in quantized_linears(pipe.engine.model):
        layer.kernel = plain(layer.format)
    asked, found = Unasked(), []
    for caches in (StepCaches(), StepCaches(hasten=asked.kernels)):
        engine = replace(pipe.engine, caches=caches)
        settings = engine.recommended().override(steps=2)
        job = engine.make_job([Caption("a red circle on a blue background")], engine.grid(64, 64), settings, seed=5)
        *_, last = islice(engine.decode(job, CPU, torch.float32), TOKENS)
        found.append(last.tokens[:, :TOKENS])
    assert asked.names == ["triton-layers", "triton-head"]
    assert (found[0] - found[1]).abs().max() <= 1e-4


def shape(sampler: str = "score-sde-1.1", rows: int = 2) -> StepShape:
    return StepShape(rows, 2, 256, sampler, 3, 1.0, False, CPU, torch.float32)


@pytest.mark.parametrize("sampler", ["flow-heun", "flow-multistep", "flow-cps"])
def test_solvers_that_look_back(pipeline: NextStepPipeline, sampler: str) -> None:
    model, generator = pipeline.engine.model, torch.Generator().manual_seed(0)
    plain, fused = (TokenSampler(model, shape(sampler), **o) for o in ({}, {"hasten": Unasked().kernels}))
    hidden = torch.randn(2, model.config.hidden_size, generator=generator)
    noise = torch.randn(plain.noise_count, 1, model.config.token_dim, generator=generator)
    guidance = torch.tensor([3.0, 1.0])
    torch.testing.assert_close(fused(hidden, noise, guidance), plain(hidden, noise, guidance), rtol=1e-5, atol=1e-5)


def test_a_window(pipeline: NextStepPipeline) -> None:
    """Each row at places of its own, as lookahead feeds them."""
    model, generator = pipeline.engine.model, torch.Generator().manual_seed(0)
    plain, fused = (TokenSequence(model, shape(rows=4), **o) for o in ({}, {"hasten": Unasked().kernels}))
    prompt, valid = torch.randn(4, 20, model.config.hidden_size, generator=generator), torch.ones(4, 20).bool()
    valid[1, :7] = False
    tokens, places = (
        torch.randn(2, 3, model.config.token_dim, generator=generator),
        torch.tensor([[0, 1, 2], [4, 5, 6]]),
    )
    found = []
    for sequence in (plain, fused):
        sequence.prefill(prompt, valid, None, "")
        found.append(sequence.feed_window(tokens, places, 6))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


class Timeless:
    """A chooser that keeps trials instead of running them."""

    tried = ()

    def __init__(self) -> None:
        self.made: list[tuple[str, Candidate, Trial]] = []

    def __call__(self, device: torch.device) -> Timeless:
        return self

    def decide(self, what: str, candidates: Any, trial: Any) -> None:
        self.made.append((what, candidates[0], trial()))


def test_their_own_trials_find_them_right(pipeline: NextStepPipeline) -> None:
    chooser, model = Timeless(), pipeline.engine.model
    sequence = TokenSequence(model, shape(), hasten=OwnKernels(chooser))
    TokenSampler(model, shape(), hasten=OwnKernels(chooser))
    outcomes: list[Outcome] = []
    for _, candidate, trial in chooser.made:
        outcomes.append(run(trial, [candidate], stopwatch=lambda calls, device: lambda: (1.0, calls[-1]())))
    assert [outcome.verdicts[0].name for outcome in outcomes] == ["triton-layers", "triton-head"]
    for outcome in outcomes:
        verdict = outcome.verdicts[0]
        assert verdict.verdict in (WON, SLOWER), verdict
        assert verdict.error is not None and verdict.error <= 1e-5
    assert sequence.prompt_length == 0


def test_a_trial_leaves_the_cache_as_it_was(pipeline: NextStepPipeline) -> None:
    class Tries(Timeless):
        def decide(self, what: str, candidates: Any, trial: Any) -> None:
            made = trial()
            made.plain(*made.inputs[0])

    sequence = TokenSequence(pipeline.engine.model, shape(), hasten=OwnKernels(Tries()))
    assert not sequence._plain.cache.data.any()


def test_layers_with_something_hooked_to_them_are_left_alone(pipeline: NextStepPipeline) -> None:
    asked, model = Unasked(), pipeline.engine.model
    handles = [
        layer.register_forward_hook(lambda layer, inputs, out: out)
        for layer in (model.layers[1].mlp.down_proj, model.head.res_blocks[0].mlp[0])
    ]
    try:
        TokenSequence(model, shape(), hasten=asked.kernels)
        TokenSampler(model, shape(), hasten=asked.kernels)
    finally:
        for handle in handles:
            handle.remove()
    assert asked.names == []


@pytest.mark.parametrize("recipe", [None, "fp8"])
def test_what_a_host_sends_away_is_not_held(recipe: str | None) -> None:
    """ComfyUI moves a part of the layers to make room for other models, and tells nobody."""
    pipe = NextStepPipeline.from_pretrained("tiny", quantization=recipe, dtype=torch.float32)
    asked, model = Unasked(), pipe.engine.model
    made = TokenSequence(model, shape(), hasten=asked.kernels), TokenSampler(model, shape(), hasten=asked.kernels)
    assert asked.names == ["triton-layers", "triton-head"] and made
    gone = []
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            gone.append(StorageWeakRef(parameter.untyped_storage()))
            parameter.data = torch.empty(0, dtype=parameter.dtype)
    assert all(storage.expired() for storage in gone)


def test_one_that_raises_gives_way_with_one_line(pipeline: NextStepPipeline, caplog, monkeypatch) -> None:
    from nextstep_core.runtime.triton import head

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("an illegal instruction was encountered")

    monkeypatch.setattr(head, "launch", broken)
    model, generator = pipeline.engine.model, torch.Generator().manual_seed(0)
    plain, fused = (TokenSampler(model, shape(), **o) for o in ({}, {"hasten": Unasked().kernels}))
    arguments = (
        torch.randn(2, model.config.hidden_size, generator=generator),
        torch.randn(SAMPLERS["score-sde-1.1"].noise_count(3), 1, model.config.token_dim, generator=generator),
        torch.tensor([3.0, 1.0]),
    )
    with caplog.at_level(logging.WARNING):
        results = [fused(*arguments) for _ in range(2)]
    assert all(torch.equal(result, plain(*arguments)) for result in results)
    assert len(caplog.records) == 1 and "illegal instruction" in caplog.text


def test_a_triton_that_is_broken_is_left_alone(pipeline: NextStepPipeline, caplog, monkeypatch) -> None:
    for name in ("layers", "head"):
        monkeypatch.setitem(sys.modules, f"nextstep_core.runtime.triton.{name}", None)
    taken: list[Any] = []
    with caplog.at_level(logging.WARNING):
        for made in (TokenSequence, TokenSampler):
            wrap = lambda step: taken.append(step) or step  # noqa: E731
            made(pipeline.engine.model, shape(), wrap=wrap, hasten=OwnKernels())
    assert [type(step) for step in taken] == [TransformerStep, FlowIntegration]
    assert len(caplog.records) == 2


def test_want_of_memory_is_the_engines_to_handle() -> None:
    def short(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    short.reads = ()  # type: ignore[attr-defined]
    with pytest.raises(torch.OutOfMemoryError):
        Guarded(short, short, "x")()  # type: ignore[arg-type]


def test_what_is_taken_is_a_step_of_ours(pipeline: NextStepPipeline) -> None:
    taken: list[Any] = []
    for made in (TokenSequence, TokenSampler):
        made(pipeline.engine.model, shape(), wrap=lambda step: taken.append(step) or step, hasten=Unasked().kernels)
    assert [type(step._fast) for step in taken] == [FusedLayers, FusedFlow]

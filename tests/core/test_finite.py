"""What is not a number is never a picture: the error says at which stage it began."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.steps import StepCaches, StepShape, TokenSampler, TokenSequence
from nextstep_core.sampling.settings import GenerationSettings

SMALL = {"height": 32, "width": 48, "steps": 2, "cfg": 2.0, "sampler": "flow-ode"}
PICTURE = torch.rand(32, 48, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def broken(pipeline: NextStepPipeline, monkeypatch: pytest.MonkeyPatch) -> Iterator:
    """A function that puts a value into a module's weight until the test is over.

    Prompts that other tests have read are forgotten so long, and those of the test afterwards.
    """
    monkeypatch.setattr(pipeline, "engine", replace(pipeline.engine, caches=StepCaches()))
    kept: list[tuple[Tensor, Tensor]] = []

    def damage(module: nn.Module, value: float = float("nan")) -> None:
        weight = module.weight.detach()
        kept.append((weight, weight.clone()))
        weight.view(-1)[0] = value

    yield damage
    for weight, original in kept:
        weight.copy_(original)


def test_the_prompt(pipeline: NextStepPipeline, broken) -> None:
    broken(pipeline.engine.model.layers[1].mlp.down_proj)
    with pytest.raises(NextStepError, match="^What the model reads from the prompt holds NaN"):
        pipeline.generate("A", **SMALL)


def test_the_text_embedding(pipeline: NextStepPipeline, broken) -> None:
    (first,) = pipeline.engine.tokenizer.encode("A")[:1]
    embedding = pipeline.engine.text_embedding.embed_tokens
    row = nn.Module()
    row.weight = embedding.weight[first]
    broken(row)
    with pytest.raises(NextStepError, match="^What the model reads from the prompt"):
        pipeline.generate("A", **SMALL)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_token(pipeline: NextStepPipeline, broken, value: float) -> None:
    broken(pipeline.engine.model.head.final_layer.linear, value)
    with pytest.raises(NextStepError, match="^Token 1 of 6 holds NaN"):
        pipeline.generate("A", **SMALL)


def test_a_later_token_of_one_picture(pipeline: NextStepPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sample, sampled = TokenSampler.__call__, []

    def once(self: TokenSampler, *arguments: Tensor) -> Tensor:
        token = sample(self, *arguments).clone()
        sampled.append(token)
        if len(sampled) == 4:
            token[1, 5] = float("nan")
        return token

    monkeypatch.setattr(TokenSampler, "__call__", once)
    with pytest.raises(NextStepError, match="^Token 4 of 6 holds NaN"):
        pipeline.generate(["A", "B"], **SMALL)
    assert len(sampled) == 6, "asked once, at the end"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_vae(pipeline: NextStepPipeline, broken, value: float) -> None:
    broken(pipeline.vae.decoder.conv_out, value)
    with pytest.raises(NextStepError, match="^The picture that the VAE decoded"):
        pipeline.generate("A", **SMALL)


def test_an_input_image(pipeline: NextStepPipeline, broken) -> None:
    broken(pipeline.vae.encoder.conv_in)
    with pytest.raises(NextStepError, match="^An input image that the VAE encoded"):
        pipeline.generate("<image>A", images=PICTURE, **SMALL)


@torch.inference_mode()
def test_what_one_run_left_in_the_cache_does_not_reach_the_next(pipeline: NextStepPipeline) -> None:
    model, cpu = pipeline.engine.model, torch.device("cpu")
    settings = GenerationSettings()
    shape = StepShape(1, 1, 256, settings.sampler, settings.steps, 1.0, True, cpu, torch.float32)
    sequence = TokenSequence(model, shape)
    prompt, valid = torch.ones(1, 4, 96), torch.ones(1, 4, dtype=torch.bool)
    expected = sequence.prefill(prompt, valid, None, "")
    sequence.prefill(torch.full((1, 9, 96), float("nan")), torch.ones(1, 9, dtype=torch.bool), None, "")
    assert torch.equal(sequence.prefill(prompt, valid, None, ""), expected)

"""A flow step in our kernels, against the head's plain math."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nextstep_core.model.flow_head import FlowHead
from nextstep_core.runtime.quantization import QuantizedLinear
from nextstep_core.runtime.quantization.formats import FP8, INT4_32, INT8, Format
from nextstep_core.runtime.triton.head import HeadWeights, guide_and_advance, velocities
from nextstep_core.sampling.guidance import guide

CPU = torch.device("cpu")
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 4e-2}


def make(dim: int, dtype: torch.dtype, format: Format | None = None) -> FlowHead:
    torch.manual_seed(dim)
    head = FlowHead(64, 96, dim, 2).to(dtype)
    for parameter in head.parameters():
        parameter.normal_(0, 0.15)
    for block in head.res_blocks if format is not None else ():
        for place in (0, 2):
            linear = block.mlp[place]
            quantized = QuantizedLinear(format, dim, dim, True)
            weight, scale = format.quantize(linear.weight.float())
            quantized.weight, quantized.weight_scale = (nn.Parameter(t, requires_grad=False) for t in (weight, scale))
            quantized.bias = linear.bias
            block.mlp[place] = quantized
    return head


def off_by(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize(("dim", "pictures", "branches"), [(64, 1, 2), (72, 2, 3), (192, 1, 1)])
def test_the_velocity(dim: int, pictures: int, branches: int, dtype: torch.dtype) -> None:
    head, rows = make(dim, dtype), pictures * branches
    weights = HeadWeights.of(head, CPU, dtype)
    assert weights is not None
    modulations = [torch.randn(rows, n * dim).to(dtype) for n in (3, 3, 2)]
    x = torch.randn(pictures, 64)
    plain = head.velocity(x.to(dtype).repeat(branches, 1), modulations)
    ours = velocities(weights, x, modulations, dtype)
    assert ours.dtype == dtype
    assert off_by(ours, plain) <= ROUNDING[dtype]
    if dtype == torch.float32:
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", [INT8, FP8], ids=lambda format: format.name)
def test_the_velocity_of_quantized_blocks(format: Format) -> None:
    head = make(64, torch.float32, format)
    weights = HeadWeights.of(head, CPU, torch.float32)
    assert weights is not None
    modulations, x = [torch.randn(2, n * 64) for n in (3, 3, 2)], torch.randn(1, 64)
    for block in head.res_blocks:
        for place in (0, 2):
            quantized, plain = block.mlp[place], nn.Linear(64, 64)
            meant = format.dequantize(quantized.weight, quantized.weight_scale, torch.float32)
            plain.weight, plain.bias = nn.Parameter(meant), quantized.bias
            block.mlp[place] = plain
    expected = head.velocity(x.repeat(2, 1), modulations)
    torch.testing.assert_close(velocities(weights, x, modulations, torch.float32), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_reaches_the_next_state(wrong: float) -> None:
    """So that it is an error, as from the plain step, and no picture."""
    head = make(64, torch.float32)
    weights = HeadWeights.of(head, CPU, torch.float32)
    modulations, x = [torch.randn(2, n * 64) for n in (3, 3, 2)], torch.randn(1, 64)
    x[0, 5] = wrong
    velocity = velocities(weights, x, modulations, torch.float32)
    assert not velocity.isfinite().any()
    guided, state = guide_and_advance(velocity, 2, torch.tensor([3.0, 1.0]), -0.25, [(torch.randn(1, 64), 1.0)])
    assert not guided.isfinite().any() and not state.isfinite().any()


def test_what_the_kernels_cannot_stand_in_for() -> None:
    hooked, other, int4 = make(64, torch.float32), make(64, torch.float32), make(64, torch.float32, INT4_32)
    hooked.res_blocks[1].mlp[2].register_forward_hook(lambda layer, inputs, out: out + 1)  # as a LoRA does
    other.res_blocks[0].mlp[0].double()
    for head in (hooked, other, int4):
        assert HeadWeights.of(head, CPU, torch.float32) is None


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize(("branches", "others"), [(1, 0), (2, 1), (3, 3)])
def test_guidance_and_the_next_state(branches: int, others: int, each: bool) -> None:
    torch.manual_seed(branches)
    velocity = torch.randn(branches * 3, 64, dtype=torch.float16)
    guidance = 4 * torch.rand(2, 3, 1) if each else torch.tensor([7.5, 1.5])
    terms = [(torch.randn(3, 64), 0.5 + n) for n in range(others)]
    guided, state = guide_and_advance(velocity, branches, guidance, -0.25, terms)
    expected = guide(velocity, branches, *guidance)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-5)
    total = -0.25 * expected + sum(tensor * factor for tensor, factor in terms)
    torch.testing.assert_close(state, total, rtol=1e-5, atol=1e-5)

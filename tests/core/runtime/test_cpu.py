"""What is done for CPUs: a packed layout for wide matrices, a dtype by measurement."""

from __future__ import annotations

import torch

from nextstep_core import NextStepPipeline
from nextstep_core.loading.build import make_ready
from nextstep_core.model.flow_head import FlowHead
from nextstep_core.runtime.cpu import PackedLinear, fastest_dtype

CPU = torch.device("cpu")


@torch.inference_mode()
def test_packed_matrices_give_the_same_velocity() -> None:
    torch.manual_seed(0)
    head = FlowHead(token_dim=64, condition_dim=256, dim=1024, layers=2)
    codes = head.time_embed(torch.linspace(0, 0.9, 5), torch.float32)[:, None]
    condition, x = torch.randn(3, 256), torch.randn(3, 64)

    def velocities() -> torch.Tensor:
        modulations = head.modulations(codes, condition)
        return torch.stack([head.velocity(x, [m[i] for m in modulations]) for i in range(5)])

    plain = velocities()
    make_ready(head, CPU, torch.float32)
    packed = [module for module in head.modules() if isinstance(module, PackedLinear)]
    assert len(packed) == 8, "the block's two matrices and its modulation, the last modulation and the time code"
    assert (velocities() - plain).abs().max() <= 2e-5
    assert not any(isinstance(block.mlp[0], torch.nn.Linear) for block in head.res_blocks), "held once, not twice"


def test_small_models_and_other_dtypes_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        pipe = NextStepPipeline.from_pretrained("tiny", dtype=dtype)
        assert not any(isinstance(module, PackedLinear) for module in pipe.engine.model.modules())
    head = FlowHead(token_dim=64, condition_dim=256, dim=1024, layers=1).bfloat16()
    make_ready(head, CPU, torch.bfloat16)
    assert not any(isinstance(module, PackedLinear) for module in head.modules())


def test_the_dtype_for_a_cpu_is_one_of_two_and_stays_the_same() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
    assert fastest_dtype() is fastest_dtype()

"""What is done for CPUs: a packed layout for wide matrices, a dtype by measurement."""

from __future__ import annotations

import pytest
import torch

from nextstep_core import NextStepPipeline
from nextstep_core.loading.build import make_ready
from nextstep_core.model.flow_head import FlowHead
from nextstep_core.runtime import cpu
from nextstep_core.runtime.cpu import PackedLinear, cpu_dtype, fastest_dtype

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


@pytest.mark.parametrize("faster", [torch.float32, torch.bfloat16], ids=str)
def test_the_faster_dtype_is_taken(monkeypatch: pytest.MonkeyPatch, faster: torch.dtype) -> None:
    monkeypatch.setattr(cpu, "_seconds", lambda dtype: 1.0 if dtype == faster else 2.0)
    assert fastest_dtype.__wrapped__() == faster


def test_the_fastest_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of passes over all matrices, by a clock that says how long each took."""
    ticks = iter([0.0, 5.0, 10.0, 13.0, 20.0, 27.0, 30.0, 34.0, 40.0, 46.0])
    calls = []
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: next(ticks))
    monkeypatch.setattr(cpu.F, "linear", lambda x, matrix: calls.append((x.shape, x.dtype, matrix.dtype)))
    monkeypatch.setattr(cpu, "SIDE", 8)
    assert cpu._seconds(torch.bfloat16) == 3.0
    assert calls == [((2, 8), torch.bfloat16, torch.bfloat16)] * (cpu.CALLS * cpu.MATRICES)


def test_which_layers_are_packed() -> None:
    model = torch.nn.ModuleDict(
        {
            "wide": torch.nn.Linear(1024, 1024, bias=False),
            "small": torch.nn.Linear(1024, 1023),
            "bf16": torch.nn.Linear(1024, 1024).bfloat16(),
        }
    )
    wide, x = model["wide"], torch.randn(3, 2, 1024)
    expected = wide(x)
    cpu.pack_linears(model)
    assert {name for name, m in model.named_modules() if isinstance(m, PackedLinear)} == {"wide"}
    packed = model["wide"]
    assert (packed.in_features, packed.out_features, packed.bias) == (1024, 1024, None)
    assert (packed(x) - expected).abs().max() <= 1e-4


def test_the_dtype_for_a_cpu_is_one_of_two_and_stays_the_same() -> None:
    assert fastest_dtype() in (torch.float32, torch.bfloat16)
    assert fastest_dtype() is fastest_dtype()


def test_the_dtype_for_a_model_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones in float32, large ones in what is faster, and bfloat16 where float32 does not fit."""
    monkeypatch.setattr(cpu, "fastest_dtype", lambda: torch.float16)
    assert cpu_dtype(10**8, 4 * 10**8) == torch.float32
    assert cpu_dtype(10**8, 4 * 10**8 - 1) == torch.bfloat16
    assert cpu_dtype(10**8 + 1, 10**12) == torch.float16, "whichever is faster"

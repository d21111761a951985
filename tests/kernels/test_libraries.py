"""gemlite's products in Triton's interpreter: that its package reads our matrices as we mean them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nextstep_core.runtime.quantization import libraries
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT4_32, INT8, Format

CARD = SimpleNamespace(name="a card", major=8, minor=9, multi_processor_count=128, shared_memory_per_block_optin=101376)


class OnCpu(TorchFunctionMode):
    """What is made on a card is made on the CPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Driver:
    """What its kernels ask of a card's driver to find their settings: the first to be timed is as good as another."""

    utils = SimpleNamespace(get_device_properties=lambda index: {"max_shared_mem": CARD.shared_memory_per_block_optin})

    def get_current_target(self) -> SimpleNamespace:
        return SimpleNamespace(backend="cuda", arch=89, warp_size=32)

    def get_current_device(self) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def timed(function: Callable[[], object], **_: object) -> list[float]:
            start = time.perf_counter()
            function()
            return [time.perf_counter() - start] * 3

        return timed


@pytest.fixture
def gemlite(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package, which asks for a card when it is imported."""
    from triton.runtime import driver

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: CARD)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(driver, "_active", Driver())
    with OnCpu():
        yield


@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize("format", [INT4, INT4_32, INT8, FP8], ids=lambda format: format.name)
def test_its_products_are_the_product(format: Format, rows: int, gemlite: None) -> None:
    """In float32: the interpreter does not add up bfloat16 in memory."""
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(rows))
    weight, scale = format.quantize(matrix)
    (kernel,) = libraries.gemlite(format)
    x = torch.randn(rows, 128, dtype=torch.bfloat16)
    found = kernel.run(x, kernel.packed(weight), kernel.packed_scale(scale).float())
    expected = x.float() @ format.dequantize(weight, scale, torch.float32).T
    assert found.dtype == x.dtype
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()

"""gemlite's products in Triton's interpreter: that its package reads our matrices as we mean them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from nextstep_core.runtime.quantization import gemlite
from nextstep_core.runtime.quantization.formats import FP8, INT4, INT4_32, INT4_128, INT8, Format
from nextstep_core.runtime.quantization.gemlite import MOST_ROWS, products

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
def package(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The package, which asks for a card when it is imported."""
    from triton.runtime import driver

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: CARD)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(driver, "_active", Driver())
    with OnCpu():
        yield gemlite._gemlite(torch.device("cpu"))


@pytest.mark.parametrize("rows", [1, 2, 5, 16, 33])
@pytest.mark.parametrize("format", [INT4, INT4_32, INT4_128, INT8, FP8], ids=lambda format: format.name)
def test_its_products_are_the_product(format: Format, rows: int, package: Any) -> None:
    """In float32: the interpreter has no arithmetic of bfloat16."""
    (kernel,) = products(format)
    if not kernel.takes(rows):
        assert rows > MOST_ROWS and kernel.pack is None, "what packs weights multiplies by them for all rows"
        return
    matrix = torch.randn(64, 128, generator=torch.Generator().manual_seed(rows))
    weight, scale = format.quantize(matrix)
    x = torch.randn(rows, 128, dtype=torch.bfloat16)
    found = kernel.run(x, kernel.packed(weight), kernel.packed_scale(scale).float())
    expected = x.float() @ format.dequantize(weight, scale, torch.float32).T
    assert found.dtype == x.dtype
    assert (found.float() - expected).norm() <= 0.01 * expected.norm()


def test_sums_are_of_float32_whatever_is_computed_in(package: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a sum are added in memory: of bfloat16, hundreds of them would lose percents on newer cards."""
    summed = []
    real = package.forward_functional

    def spy(*arguments: Any) -> torch.Tensor:
        summed.append(real(*arguments))
        return summed[-1]

    monkeypatch.setattr(package, "forward_functional", spy)
    for format in (INT4, INT8):
        weight, scale = format.quantize(torch.randn(64, 128))
        (kernel,) = products(format)
        found = kernel.run(torch.randn(2, 128), kernel.packed(weight), kernel.packed_scale(scale).half())
        assert found.isfinite().all()
    assert [one.dtype for one in summed] == [torch.float32] * 2


def test_what_it_found_is_there_at_the_next_start(
    package: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("NEXTSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gemlite, "_keep_settings", functools.cache(gemlite._keep_settings.__wrapped__))
    monkeypatch.setattr(package, "GEMLITE_TRITON_CONFIG_CACHE", {})
    weight, scale = INT4.quantize(torch.randn(96, 128))
    (kernel,) = products(INT4)
    kernel.run(torch.randn(2, 128), kernel.packed(weight), kernel.packed_scale(scale).float())
    (kept,) = (tmp_path / "cache").iterdir()
    gemlite._gemlite.__wrapped__(torch.device("cpu"))
    known = package.GEMLITE_TRITON_CONFIG_CACHE["GEMV_REVSPLITK"]
    assert kept.suffix == ".json" and any("96, 128" in key for key in known)

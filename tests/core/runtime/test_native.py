"""The products in C: their numbers for every kind of processor that this one can stand for, and when there are none."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nextstep_core import NextStepPipeline
from nextstep_core.model.flow_head import FlowHead
from nextstep_core.runtime import chosen, ledger
from nextstep_core.runtime.chosen import Chooser
from nextstep_core.runtime.native import compiler, rows
from nextstep_core.runtime.native.head import NativeHead
from nextstep_core.runtime.quantization import QuantizedLinear, quantized_linears, selection
from nextstep_core.runtime.quantization.formats import INT4, INT4_32, INT4_128, INT8, Format
from nextstep_core.runtime.quantization.layouts import LAYOUTS
from nextstep_core.runtime.quantization.products import in_c, usual
from nextstep_core.runtime.trials import WON, Candidate, Outcome, Verdict, difference

CPU = torch.device("cpu")
# Kinds of processors by the compiler's names, and what Linux says that they can do beyond AVX2.
KINDS = {
    "haswell": set(),
    "alderlake": {"avx_vnni"},
    "cascadelake": {"avx512bw", "avx512_vnni"},
    "icelake-server": {"avx512bw", "avx512_vnni", "avx512vbmi"},
}
FORMATS = (INT8, INT4, INT4_32, INT4_128)
needs_compiler = pytest.mark.skipif(compiler.missing(CPU) is not None, reason=str(compiler.missing(CPU)))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(ledger.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(chosen.SWITCH, raising=False)
    monkeypatch.setattr(chosen, "_ledgers", {})
    for once in (rows.library, compiler.attempt):
        once.cache_clear()
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kinds")


@pytest.fixture(params=KINDS)
def built(request: pytest.FixtureRequest, kept: Path, monkeypatch: pytest.MonkeyPatch) -> rows.Library:
    """The library as a kind of processor would have it, compiled once for all tests."""
    monkeypatch.setenv(ledger.CACHE, str(kept))
    if not KINDS[request.param] <= compiler.cpu_flags():
        pytest.skip("this processor cannot stand for it")
    return rows.Library(compiler.library(rows.SOURCE, tuple(
        flag if flag != "-march=native" else f"-march={request.param}" for flag in compiler.FLAGS
    )))  # fmt: skip


def product(library: rows.Library, format: Format, x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    if format is INT8:
        return library.int8(x, weight, scale)
    layout = next(layout for layout in LAYOUTS.values() if layout.rows == library.block)
    return library.int4(x, layout.pack(weight), scale, format.group)


@needs_compiler
def test_they_are_the_product(built: rows.Library) -> None:
    """Over random shapes, numbers of rows and sizes of what goes in, a massive activation and an empty row among it."""
    rng = random.Random(0)
    for turn in range(40):
        format = FORMATS[turn % len(FORMATS)]
        count, columns = rng.choice((1, 2, 3, 4, 5, 8, 17)), 128 * rng.randint(1, 9)
        height = 4 * rng.randint(1, 40) if format is INT8 else built.block * rng.randint(1, 5)
        torch.manual_seed(turn)
        weight, scale = format.quantize(torch.randn(height, columns) * 10 ** rng.uniform(-3, 1))
        x = (torch.randn(count, columns) + rng.choice((0, 0.5))) * 10 ** rng.uniform(-4, 3)
        x[:, rng.randrange(columns)] *= rng.choice((1, 100))
        x[rng.randrange(count)] *= rng.choice((0, 1, 1))
        x = x.to(rng.choice((torch.float32, torch.bfloat16)))
        expected = x.float() @ format.dequantize(weight, scale, torch.float32).T
        found = product(built, format, x, weight, scale)
        assert found.dtype == x.dtype and found.shape == (count, height)
        rounding = 1e-3 if x.dtype == torch.float32 else 4e-3
        assert (found.float() - expected).norm() <= rounding * expected.norm(), (format.name, count, columns, height)
        assert not found[~x.any(dim=1)].any(), "an empty row gives nothing"


@needs_compiler
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_stays_none(built: rows.Library, wrong: float) -> None:
    """A fault before it is found where results are looked at, and does not become a gray picture."""
    for format in FORMATS:
        weight, scale = format.quantize(torch.randn(128, 256))
        x = torch.randn(3, 256)
        x[1, 200] = wrong
        found = product(built, format, x, weight, scale)
        assert not found[1].isfinite().any() and found[[0, 2]].isfinite().all(), format.name


@needs_compiler
def test_many_rows_go_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(format, *format.quantize(torch.randn(128, 256))) for format in (INT8, INT4)]
    for x in (torch.randn(7, 256), torch.randn(7, 256).bfloat16(), torch.randn(0, 256)):
        found = []
        for at_once in (1, 3, 7, 32):
            monkeypatch.setattr(rows, "AT_ONCE", at_once)
            found.append([product(rows.library(), format, x, weight, scale) for format, weight, scale in pairs])
        assert all(torch.equal(*pair) for other in found for pair in zip(found[0], other))


@needs_compiler
def test_threads_change_nothing() -> None:
    weight, scale = INT8.quantize(torch.randn(96, 256))
    x, before, found = torch.randn(5, 256), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(rows.library().int8(x, weight, scale))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@needs_compiler
def test_bfloat16_is_the_float_result_rounded() -> None:
    weight, scale = INT8.quantize(torch.randn(64, 256))
    x = torch.randn(300, 256).bfloat16()
    assert torch.equal(rows.library().int8(x, weight, scale), rows.library().int8(x.float(), weight, scale).bfloat16())


def random_head(dim: int, dtype: torch.dtype) -> FlowHead:
    """A head of the published kind with int8 matrices, whose norms, gates and biases are not idle."""
    torch.manual_seed(dim)
    head = FlowHead(64, 32, dim, 3).requires_grad_(False)
    for parameter in head.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, layer in list(head.named_modules()):
        if isinstance(layer, nn.Linear) and ".mlp." in name and "res_blocks" in name:
            stored = QuantizedLinear(INT8, dim, dim, True)
            stored.weight.data, stored.weight_scale.data = INT8.quantize(layer.weight)
            stored.bias.data = layer.bias
            stored.pack(usual(INT8, "cpu")[-1], CPU)
            head.set_submodule(name, stored)
    for parameter in head.parameters():
        if parameter.dtype == torch.float32:
            parameter.data = parameter.data.to(dtype)
    return head


@needs_compiler
@pytest.mark.parametrize("count", [1, 2, 3, 8])
@pytest.mark.parametrize("dim", [64, 192, 320])
def test_a_flow_step_in_c_is_the_flow_step(count: int, dim: int) -> None:
    plain = random_head(dim, torch.float32)
    x, condition = torch.randn(count, 64), torch.randn(count, 32)
    modulations = [
        one[0] for one in plain.modulations(plain.time_embed(torch.tensor([0.3]), x.dtype)[:, None], condition)
    ]
    expected = plain.velocity(x, modulations)
    found = NativeHead.of(plain, x.dtype).velocity(x, modulations)
    assert (found - expected).norm() <= 2e-3 * expected.norm()
    halves = random_head(dim, torch.bfloat16)
    narrow = [one.bfloat16() for one in modulations]
    found = NativeHead.of(halves, torch.bfloat16).velocity(x.bfloat16(), narrow)
    assert found.dtype == torch.bfloat16 and (found.float() - expected).norm() <= 0.02 * expected.norm()


@needs_compiler
def test_a_flow_step_that_is_no_number_stays_none() -> None:
    head = random_head(64, torch.float32)
    x = torch.randn(3, 64)
    x[1, 5] = float("nan")
    modulations = [one[0] for one in head.modulations(torch.zeros(1, 1, 64), torch.randn(3, 32))]
    found = NativeHead.of(head, x.dtype).velocity(x, modulations)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()
    with pytest.raises(ValueError, match="no flow step in C"):
        NativeHead.of(head, x.dtype).velocity(x, modulations[:-1])
    with pytest.raises(ValueError, match="no flow step in C"):
        NativeHead.of(head, x.dtype).velocity(x, [one.bfloat16() for one in modulations])


def test_heads_that_c_cannot_stand_in_for() -> None:
    """Whatever changes a layer, as an adapter or a host does, is not in the weights that C reads."""
    head = random_head(64, torch.float32)
    assert NativeHead.of(head, torch.float16) is None
    head.res_blocks[1].mlp[0].register_forward_hook(lambda *_: None)
    assert NativeHead.of(head, torch.float32) is None
    assert NativeHead.of(FlowHead(64, 32, 64, 2), torch.float32) is None, "floats are multiplied by PyTorch"


@needs_compiler
def test_nothing_but_what_it_was_written_for_gets_to_c() -> None:
    """It would read beyond the end of a tensor."""
    library = rows.library()
    weight, scale = INT8.quantize(torch.randn(64, 256))
    packed, pairs = INT4.quantize(torch.randn(64, 256))
    x = torch.randn(2, 256)
    wrong = [
        partial(library.int8, torch.randn(2, 128), weight, scale),
        partial(library.int8, x, weight[:63], scale[:63]),
        partial(library.int8, x, weight, scale[:32]),
        partial(library.int8, x, weight, scale.float()),
        partial(library.int8, x, weight.t().contiguous().t(), scale),
        partial(library.int8, x, packed, scale),
        partial(library.int8, x.to("meta"), weight, scale),
        partial(library.int8, x, weight.to("meta"), scale),
        partial(library.int8, x, weight, scale.to("meta")),
        partial(library.int4, torch.randn(2, 512), packed, pairs, 64),
        partial(library.int4, x, packed[:32], pairs[:, :32], 64),
        partial(library.int4, x, packed, pairs[:2], 64),
        partial(library.int4, x, packed, pairs, 32),
        partial(library.int4, x, packed, pairs.float(), 64),
    ]
    for call in wrong:
        with pytest.raises(ValueError, match="no product in C"):
            call()


def test_a_long_prompt_is_read_by_the_usual_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are so many rows that floats made of the weights once are multiplied as fast."""
    weight, scale = INT8.quantize(torch.randn(64, 256))
    (own,) = in_c(INT8, usual(INT8, "cpu")[0], weight)
    monkeypatch.setattr(rows, "library", lambda: pytest.fail("not in C"))
    assert own.run(torch.randn(257, 256), weight, scale).shape == (257, 64)


def test_matrices_that_it_is_not_for_are_left_to_others() -> None:
    odd, _ = INT8.quantize(torch.randn(64, 250))
    assert in_c(INT8, usual(INT8, "cpu")[0], odd) == []
    few, _ = INT4.quantize(torch.randn(16, 256))
    assert in_c(INT4, usual(INT4, "cpu")[0], few) == []
    weight, _ = INT4.quantize(torch.randn(64, 256))
    assert in_c(INT4, usual(INT4, "cpu")[-1], weight) == [], "no layout known"
    base = usual(INT4, "cpu")[0]
    found = {name: in_c(INT4, replace(base, layout=layout), weight) for name, layout in LAYOUTS.items()}
    assert found["cpu-32-pairs"] == []
    versions = {kernel.version for own in found.values() for kernel in own}
    assert len(versions) == 2, "what was right with one layout is tried again with another"


@needs_compiler
def test_it_is_compiled_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.library(rows.SOURCE)
    (made,) = (cache / "native").iterdir()
    assert made.stat().st_mode & 0o077 == 0, "it runs as a part of this process, so nobody else may write it"
    monkeypatch.setattr(compiler, "_compiled", lambda *_: pytest.fail("again"))
    compiler.library(rows.SOURCE)
    made.chmod(0o777)
    with pytest.raises(RuntimeError, match="others may write"):
        compiler.library(rows.SOURCE)


@needs_compiler
def test_nothing_is_loaded_from_where_others_may_write(cache: Path) -> None:
    """Not even what was compiled just now: somebody could have put another file in its place."""
    folder = cache / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(RuntimeError, match="others may write"):
        compiler.library(rows.SOURCE)
    assert not any(folder.iterdir())


@needs_compiler
def test_a_library_that_cannot_be_loaded_is_said_to_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache folder's disk runs no programs, or another OpenMP is there than the compiler's."""

    def fails(path: str) -> None:
        raise OSError("failed to map segment")

    monkeypatch.setattr(compiler.ctypes, "CDLL", fails)
    with pytest.raises(RuntimeError, match="failed to map"):
        compiler.library(rows.SOURCE)


@needs_compiler
def test_another_source_or_compiler_is_another_library(cache: Path, tmp_path: Path) -> None:
    compiler.library(rows.SOURCE)
    folder = shutil.copytree(rows.SOURCE.parent, tmp_path / "native")
    with (folder / "integers.h").open("a", encoding="utf-8") as header:
        header.write("/* another */\n")
    compiler.library(folder / rows.SOURCE.name)
    compiler.library(folder / rows.SOURCE.name, (*compiler.FLAGS, "-DOTHER"))
    assert len(list((cache / "native").iterdir())) == 3


@needs_compiler
def test_another_openmp_is_another_library(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A library asks for it by name when it is loaded, and the next PyTorch may bring it under another."""
    compiler.library(rows.SOURCE)
    monkeypatch.setattr(compiler, "_loaded", lambda names: None)
    compiler.library(rows.SOURCE)
    assert len(list((cache / "native").iterdir())) == 2


def test_one_thread_pool() -> None:
    """A second OpenMP beside PyTorch's would fight with it for the processors."""
    code = (
        "import torch; from pathlib import Path; from nextstep_core.runtime.native import rows;"
        "weight, scale = torch.ones(64, 64, dtype=torch.int8), torch.ones(64).bfloat16();"
        "torch.randn(512, 512) @ torch.randn(512, 512); rows.library().int8(torch.ones(2, 64), weight, scale);"
        "maps = Path('/proc/self/maps').read_text().splitlines();"
        "print(len({line.split()[5] for line in maps if 'libgomp' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.strip() == "1"


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compiler.missing(torch.device("cuda")) == "for CPUs"
    monkeypatch.setattr(compiler.sys, "platform", "win32")
    assert compiler.missing(CPU) == "for Linux on x86 processors"
    monkeypatch.setattr(compiler.sys, "platform", "linux")
    monkeypatch.setattr(compiler.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"sse4_2"}))
    assert "AVX2" in str(compiler.missing(CPU))
    monkeypatch.setattr(compiler, "cpu_flags", lambda: frozenset({"avx2", "fma"}))
    monkeypatch.setattr(compiler.shutil, "which", lambda name: None)
    assert compiler.missing(CPU) == "no C compiler is installed (cc, gcc)"


@needs_compiler
@pytest.mark.parametrize("does", ["exit 1", "[ $1 = --version ] || exit 1", "exit 0"])
def test_a_compiler_that_fails_costs_only_the_candidate(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken"
    broken.write_text(f"#!/bin/sh\n{does}\n", encoding="utf-8")
    broken.chmod(0o755)
    monkeypatch.setattr(compiler, "COMPILERS", (str(broken),))
    real = compiler.library
    with pytest.raises(RuntimeError, match="compiler|cannot be made"):
        compiler.library(rows.SOURCE)
    monkeypatch.setattr(selection, "WIDE", 0)
    pair, asked = INT8.quantize(torch.randn(64, 128)), []
    monkeypatch.setattr(compiler, "library", lambda *given: asked.append(given) or real(*given))
    found = selection.choose(INT8, 64, 128, [lambda: pair], torch.float32, Chooser(CPU))
    assert "native-rows" not in found.name
    assert len(asked) == 1, "one that hangs would be waited for with every matrix"


@needs_compiler
def test_a_winner_whose_library_is_gone_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was right and faster once; the compiler is another now, and refuses."""
    pair = INT8.quantize(torch.randn(64, 128))
    (own,) = in_c(INT8, usual(INT8, "cpu")[0], pair[0])
    candidate = Candidate(own.name, own.version, lambda: own.run, own.missing)
    won = Outcome("x", 2.0, 1.0, (Verdict(own.name, WON, 1.0, 2.0, 0.0),))
    monkeypatch.setattr(chosen, "run", lambda *_, **__: won)
    assert Chooser(CPU).decide("x", [candidate], lambda: None) is candidate
    compiler.attempt.cache_clear()
    monkeypatch.setattr(compiler, "library", _refuses)
    assert Chooser(CPU).decide("x", [candidate], lambda: None) is None


def _refuses(*_: object) -> None:
    raise RuntimeError("the C compiler refused")


@needs_compiler
def test_pictures_are_those_of_the_plain_product() -> None:
    """Forced on, in all of the embedded model's matrices that it is for: closer than the usual packed product."""
    for quantization in ("int8", "int4"):
        pictures = {}
        for name in ("plain", "usual", "native"):
            pipe = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32, quantization=quantization)
            forced = 0
            for _, layer in quantized_linears(pipe.engine.model):
                plain = usual(layer.format, "cpu")[-1]
                own = in_c(layer.format, layer.kernel, layer.own_weight(CPU)) if name == "native" else []
                if name == "plain":
                    layer.weight.data, layer.layout = layer.own_weight(CPU), None
                    layer.kernel = plain
                elif own:
                    layer.kernel, forced = own[0], forced + 1
            assert forced >= 20 or name != "native"
            images = pipe.generate("a red circle on a blue background", height=64, width=64, steps=4, seed=5).images
            pictures[name] = images
        plain = pictures["plain"]
        assert difference(pictures["native"], plain) <= difference(pictures["usual"], plain), quantization
        assert (pictures["native"] - plain).abs().mean() <= 1e-3, quantization

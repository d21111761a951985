"""Which product is taken for which rows: by hand from outcomes, and by whole choices with a clock that lies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nextstep_core import NextStepError
from nextstep_core.loading.build import plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime import chosen, ledger
from nextstep_core.runtime.chosen import Chooser
from nextstep_core.runtime.quantization import QuantizedLinear, choose_kernels, quantized_linears, selection
from nextstep_core.runtime.quantization.formats import INT8
from nextstep_core.runtime.quantization.kernel import Kernel, plain
from nextstep_core.runtime.quantization.selection import ROWS, best, choose
from nextstep_core.runtime.trials import RAISED, SLOWER, WON, WRONG, Outcome, Verdict

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ledger.CACHE, str(tmp_path / "cache"))
    monkeypatch.delenv(chosen.SWITCH, raising=False)
    monkeypatch.setattr(chosen, "_ledgers", {})


def kernel(name: str, most: int | None = None, pack: Callable[[Tensor], Tensor] | None = None) -> Kernel:
    return Kernel(name, lambda x, weight, scale: name, pack=pack, most_rows=most)


def outcomes(**speeds: dict[int, float]) -> dict[int, Outcome]:
    """Verdicts by name: how many times the usual one's speed for how many rows; 0 is wrong."""
    found = {}
    for rows in ROWS:
        verdicts = [
            Verdict(name, (WON if own[rows] > 1 else SLOWER) if own[rows] else WRONG, 1.0, own[rows] or None)
            for name, own in speeds.items()
            if rows in own
        ]
        found[rows] = Outcome("x", 1.0, 1.0, tuple(verdicts))
    return found


def taken(chosen: Kernel) -> dict[int, str]:
    return {rows: chosen.run(torch.empty(rows, 1), None, None) for rows in (1, *ROWS, 33)}


def same(weight: Tensor) -> Tensor:
    return weight


def always(speed: float) -> dict[int, float]:
    return dict.fromkeys(ROWS, speed)


def test_each_number_of_rows_has_its_own() -> None:
    base, four, six = kernel("base"), kernel("four", 3), kernel("six", 5)
    found = best(base, [four, six], outcomes(four={2: 1.5, 3: 1.01}, six={2: 1.2, 3: 1.3, 4: 0.9}))
    expected = {1: "four", 2: "four", 3: "six", 4: "base", 8: "base", 16: "base", 32: "base", 33: "base"}
    assert taken(found) == expected, "1.01 is no gain"


def test_without_outcomes_it_is_the_usual_one() -> None:
    base = kernel("base")
    assert best(base, [kernel("four", 3)], {}) is base
    assert best(base, [], {}) is base


def test_one_layout_is_taken_for_all_rows() -> None:
    """A matrix is held once: what is read for two rows is read for 32."""
    base, fast, slow = kernel("base"), kernel("fast", pack=same), kernel("own", 16)
    speeds = outcomes(fast=always(3.0) | {32: 0.2}, own={2: 2.0, 3: 2.0, 4: 2.0, 8: 2.0, 16: 2.0})
    assert set(taken(best(base, [fast, slow], speeds)).values()) == {"own", "base"}, (
        "32 rows would be five times slower"
    )
    many = kernel("many", pack=same)
    speeds = outcomes(fast=always(3.0) | {32: 0.2}, many=always(0.1) | {32: 1.0}, own=always(2.0))
    found = taken(best(base, [fast, many, slow], speeds))
    assert found == dict.fromkeys((1, 2, 3, 4, 8, 16), "fast") | {32: "many", 33: "many"}


def test_a_layout_that_some_number_of_rows_cannot_be_had_from_is_not_taken() -> None:
    base, few = kernel("base"), kernel("few", 16, same)
    assert best(base, [few], outcomes(few=dict.fromkeys((2, 3, 4, 8, 16), 9.0))) is base
    wrong = kernel("wrong", None, same)
    assert best(base, [wrong], outcomes(wrong=always(9.0) | {8: 0})) is base, "wrong for eight rows"


def test_another_layout_has_to_be_worth_it() -> None:
    base, other = kernel("base"), kernel("other", pack=same)
    assert best(base, [other], outcomes(other=always(1.02))) is base
    assert best(base, [other], outcomes(other=always(1.2))).name == "other"


def test_another_layout_costs_our_kernels_for_whole_layers() -> None:
    """Which read weights as they are stored: of a short product their launches are more than its gain."""
    base, own, packed = kernel("base"), kernel("triton-rows", 16), kernel("packed", pack=same)
    for seconds, name in ((20e-6, "triton-rows"), (1e-3, "packed")):
        found = outcomes(packed=always(2.0), **{"triton-rows": dict.fromkeys((2, 3, 4, 8, 16), 1.8)})
        found = {rows: replace(one, plain=seconds) for rows, one in found.items()}
        assert taken(best(base, [own, packed], found))[2] == name, seconds
    absent = {rows: replace(one, plain=20e-6) for rows, one in outcomes(packed=always(1.2)).items()}
    assert best(base, [packed], absent).name == "packed", "there is nothing to lose"


def test_a_trial_counts_beside_what_it_was_run_against(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WIDE", 0)
    asked: list[str] = []
    monkeypatch.setattr(Chooser, "outcome", lambda self, what, *_: asked.append(what))
    for text, beside in (("", True), ("-torch-int8", False)):
        monkeypatch.setenv(chosen.SWITCH, text)
        asked.clear()
        choose(INT8, 64, 128, matrices(1), torch.float32, Chooser(CPU))
        assert [what.endswith(", beside torch-int8") for what in asked] == [beside] * len(ROWS)


def test_what_raised_is_not_taken() -> None:
    base, bad = kernel("base"), kernel("bad", 16)
    found = {2: Outcome("x", 1.0, 1.0, (Verdict("bad", RAISED, reason="no"),))}
    assert best(base, [bad], found) is base


class LyingClock:
    """Says what each kernel takes, by name; all else takes a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
        self.now, self.asked = 1.0, []
        made = selection._candidate

        def candidate(kernel: Kernel, base: Kernel):
            found = made(kernel, base)

            def run(*arguments: Tensor) -> Tensor:
                self.now = seconds.get(kernel.name, 2.0)
                self.asked.append((kernel.name, len(arguments[0])))
                return kernel.run(*arguments)

            return chosen.Candidate(found.name, found.version, lambda: run, found.missing, found.prepare)

        monkeypatch.setattr(selection, "_candidate", candidate)

    def __call__(self, calls: Sequence[Callable[[], Tensor]], device: torch.device) -> Callable[[], tuple]:
        def lap() -> tuple[float, Tensor]:
            self.now = 1.0
            result = [call() for call in calls][-1]
            return self.now, result

        return lap


def matrices(count: int) -> list[Callable[[], tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    made = [INT8.quantize(torch.randn(64, 128)) for _ in range(count)]
    return [partial(lambda pair: pair, pair) for pair in made]


def test_a_whole_choice_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WIDE", 0)
    clock = LyingClock(monkeypatch, {"padded-to-4": 0.4})
    some = matrices(3)
    found = choose(INT8, 64, 128, some, torch.float32, Chooser(CPU, stopwatch=clock))
    assert found.name == "padded-to-4 up to 2 rows, padded-to-4 up to 3 rows, torch-int8"
    padded = {rows for name, rows in clock.asked if name.startswith("padded")}
    assert padded == {2, 3, 4}, "more than six have nothing to be padded to"
    weight, scale = some[0]()
    x = torch.randn(2, 128)
    matrix = INT8.dequantize(weight, scale, x.dtype)
    assert (found.run(x, found.packed(weight), scale) - x @ matrix.T).norm() <= 0.01 * (x @ matrix.T).norm()
    clock.asked.clear()
    again = choose(INT8, 64, 128, some, torch.float32, Chooser(CPU, stopwatch=clock))
    assert again.name == found.name and not clock.asked, "it is remembered"
    other = choose(INT8, 64, 128, some, torch.bfloat16, Chooser(CPU, stopwatch=clock))
    assert other.name == found.name and clock.asked, "for this dtype"


def test_the_switch_reaches_the_usual_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "WIDE", 0)
    for text, name in (("plain", "plain"), ("-torch-int8", "plain"), ("torch-int8", "torch-int8")):
        monkeypatch.setenv(chosen.SWITCH, text)
        found = choose(INT8, 64, 128, matrices(1), torch.float32, Chooser(CPU, stopwatch=LyingClock(monkeypatch, {})))
        assert found.name == name, text


def test_small_matrices_have_no_trial_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedded model loads in a second, and draws the same on every machine."""
    monkeypatch.setattr(selection, "racing", lambda *_: pytest.fail("there was a race"))
    assert choose(INT8, 64, 128, matrices(1), torch.float32, Chooser(CPU)).name == "torch-int8"


def test_a_trial_goes_through_more_matrices_than_a_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    base = plain(INT8)
    some = matrices(5)
    size = sum(part.nbytes for part in some[0]())
    for cold, most, used in ((3 * size - 1, 64, 3), (1, 64, 1), (1 << 40, 64, 5), (1 << 40, 2, 2)):
        monkeypatch.setattr(selection, "COLD", cold)
        monkeypatch.setattr(selection, "MOST_MATRICES", most)
        inputs = selection._Inputs(some, base, [], 128, torch.float32)
        trial = inputs.trial("x", 4)
        assert len(trial.inputs) == used and trial.bytes == used * size and trial.inputs[0][0].shape == (4, 128)


def test_a_scale_of_its_own_layout_is_packed_with_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = QuantizedLinear(INT8, 64, 128, bias=False)
    weight, scale = INT8.quantize(torch.randn(64, 128))
    layer.weight.data, layer.weight_scale.data = weight, scale
    own = Kernel("own", lambda x, w, s: plain(INT8).run(x, w, s / 2), pack_scale=lambda s: s * 2)
    layer.pack(own, CPU)
    x = torch.randn(2, 128)
    assert (layer(x) - x @ INT8.dequantize(weight, scale, x.dtype).T).abs().max() <= 1e-4


def test_layers_of_one_shape_are_tried_together(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple] = []

    def choose(format, rows, columns, matrices, dtype, chooser):
        asked.append((format.name, rows, columns, len(matrices)))
        return plain(format)

    monkeypatch.setattr("nextstep_core.runtime.quantization.layers.choose", choose)
    model = torch.nn.ModuleList()
    for rows, columns in ((32, 64), (64, 32), (32, 64)):
        layer = QuantizedLinear(INT8, rows, columns, bias=False)
        layer.weight.data, layer.weight_scale.data = INT8.quantize(torch.randn(rows, columns))
        model.append(layer)
    choose_kernels(model, CPU, torch.float32)
    assert asked == [("int8", 32, 64, 2), ("int8", 64, 32, 1)]
    assert all(layer.kernel is not None for _, layer in quantized_linears(model))


def test_where_nothing_can_be_tried_a_packed_product_is_taken_if_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card may be full while a model is loaded; the plain product would take several times as long from then on."""

    def full(calls: object, device: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(selection, "WIDE", 0)
    monkeypatch.setattr(selection, "usual", lambda *_: [plain(INT8)])
    for factor, name in ((1.0, "torch-int4"), (1.5, "plain")):
        packed = Kernel("torch-int4", lambda x, w, s, factor=factor: factor * plain(INT8).run(x, w, s), same)
        monkeypatch.setattr(selection, "racing", lambda *_, packed=packed: [kernel("kitchen-int4", None, same), packed])
        assert choose(INT8, 64, 128, matrices(1), torch.float32, Chooser(CPU, stopwatch=full)).name == name


def test_a_wrong_switch_is_told_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(chosen.SWITCH, "fastest")
    with pytest.raises(NextStepError, match="NEXTSTEP_PRODUCTS is 'fastest'"):
        plan_model(ASSETS / "tiny")

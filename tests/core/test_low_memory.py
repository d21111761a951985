"""A pipeline that is told how much memory it may take: the same pictures, within it, and nothing kept afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch
from simulated_memory import WeighedMPS
from simulated_mps import MPS
from taped_graphs import CPUGraphs, Recorder

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding import budget as budgets
from nextstep_core.decoding.budget import Budget, model_bytes
from nextstep_core.decoding.steps import StepCaches, TransformerStep
from nextstep_core.images.tiling import pixel_bytes, run_in_tiles
from nextstep_core.loading.build import ModelPlan, plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import VAEConfig
from nextstep_core.model.kv_cache import KVCache
from nextstep_core.runtime import devices
from nextstep_core.runtime.placement import held_bytes, place
from nextstep_core.runtime.streaming import passing_bytes, streamed_bytes

CPU, MB = torch.device("cpu"), 10**6
load = partial(NextStepPipeline.from_pretrained, "tiny", dtype=torch.float32)
DRAWN = {"height": 64, "width": 64, "steps": 2, "cfg": 2.0, "seed": 1, "sampler": "flow-ode"}
PIXEL = 1 / 255
PICTURE = torch.rand(64, 48, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def test_the_picture_is_the_same_and_never_takes_more_than_was_allowed() -> None:
    """Beside 5.9 MB of VAE and 14.7 MB of weights; the last leaves nearly all of these to the host."""
    plain = load().generate("a red circle", **DRAWN).images
    held = []
    for limit in (34 * MB, 23 * MB, 18 * MB):
        with WeighedMPS() as card:
            pipe = load(device=MPS, max_memory=limit)
            drawn = pipe.generate("a red circle", **DRAWN).images
            held.append(held_bytes(pipe.engine.model, MPS))
        assert card.peak <= limit and not card.problems
        assert (drawn - plain).abs().max() <= 1e-5
    assert held[0] == model_bytes(pipe.engine.model) > held[1] > held[2]


def test_without_a_limit_a_card_that_tells_what_is_free_is_not_overfilled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card of 20 MB, some of which others hold."""
    plain = load().generate("a red circle", **DRAWN).images
    with WeighedMPS() as card:
        monkeypatch.setattr(budgets, "room_bytes", lambda device: 20 * MB - card.bytes)
        pipe = load(device=MPS)
        for _ in range(2):
            drawn = pipe.generate("a red circle", **DRAWN).images
        assert 0 < held_bytes(pipe.engine.model, MPS) < model_bytes(pipe.engine.model)
    assert card.peak <= 20 * MB and (drawn - plain).abs().max() <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("limit", [34 * MB, 19 * MB])
def test_batches_edits_and_stored_weights_keep_to_it_too(limit: int) -> None:
    def draw(pipe: NextStepPipeline) -> list[torch.Tensor]:
        prompts = ["a red circle on a blue background", "a blue square on a white background"]
        # pictures that no rounding turns into others; with two steps some do
        batch = pipe.generate(prompts, num_images_per_prompt=3, **DRAWN | {"seed": 6})
        edit = pipe.generate("<image>make the circle green", images=PICTURE, **DRAWN, cfg_img=1.5)
        return [batch.images, edit.images]

    for recipe in (None, "int8"):
        with WeighedMPS():
            expected = draw(load(device=MPS, quantization=recipe))
        with WeighedMPS() as card:
            drawn = draw(load(device=MPS, max_memory=limit, quantization=recipe))
        assert card.peak <= limit and not card.problems
        apart = [(ours - theirs).abs() for ours, theirs in zip(drawn, expected, strict=True)]
        # A batch of another size rounds otherwise, int8 in bfloat16, and the embedded model makes more of it.
        assert all((one.max() if recipe is None else one.mean()) <= PIXEL for one in apart)


def test_what_fits_is_loaded_where_it_stays() -> None:
    with WeighedMPS() as card:
        pipe = load(device=MPS, max_memory=1000 * MB)
        assert card.bytes >= model_bytes(pipe.engine.model)
        small = load(device=MPS, max_memory=20 * MB)
        assert held_bytes(small.engine.model, MPS) == 0


def test_weights_come_and_go_as_there_is_room() -> None:
    with WeighedMPS():
        model = load().engine.model
        others = sum(p.nbytes for name, p in model.named_parameters() if not name.startswith("layers."))
        layer = sum(p.nbytes for p in model.layers[0].parameters())
        assert place(model, MPS, others + 2 * layer + 1) == others + 2 * layer == held_bytes(model, MPS)
        assert next(model.head.parameters()).device == MPS, "every flow step reads it"
        assert place(model, MPS, others - 1) == (others - 1) // layer * layer == held_bytes(model, MPS)
        assert place(model, MPS, 10**12) == model_bytes(model) == held_bytes(model, MPS)
        assert place(model, MPS, 0) == 0 == held_bytes(model, MPS)
        assert place(model, CPU, 0) == model_bytes(model), "a CPU has nowhere to send them"


@pytest.fixture
def caches(monkeypatch: pytest.MonkeyPatch) -> weakref.WeakSet[KVCache]:
    """The KV caches that are alive."""
    made: weakref.WeakSet[KVCache] = weakref.WeakSet()
    plain = KVCache.__init__

    def recording(self: KVCache, *arguments: object) -> None:
        made.add(self)
        plain(self, *arguments)

    monkeypatch.setattr(KVCache, "__init__", recording)
    return made


class RunsOnce(Recorder):
    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        function()
        return lambda: None


def capturing(max_memory: int | None) -> NextStepPipeline:
    """A pipeline that keeps captured steps, with their KV cache, from run to run."""
    pipe = load(max_memory=max_memory)
    pipe.engine = replace(pipe.engine, caches=StepCaches(CPUGraphs(pipe.engine.model, RunsOnce)))
    return pipe


def test_after_a_picture_nothing_is_kept(caches) -> None:
    pipe = capturing(None)
    pipe.generate("a red circle", **DRAWN)
    assert caches and pipe.engine.caches.prefilled.nbytes, "without a limit it is, for the next"
    pipe.release()
    assert not caches and not pipe.engine.caches.prefilled.nbytes
    limited = capturing(100 * MB)
    limited.generate("a red circle", **DRAWN)
    assert not caches and not limited.engine.caches.prefilled.nbytes


def fails_while_drawing(pipe: NextStepPipeline, patch: pytest.MonkeyPatch) -> None:
    run, calls = TransformerStep.run, iter(range(100))

    def fail(step: TransformerStep, *arguments: object) -> torch.Tensor:
        if next(calls) == 1:
            raise ValueError("broken")
        return run(step, *arguments)

    patch.setattr(TransformerStep, "run", fail)
    pipe.generate("a red circle", **DRAWN)


def fails_in_the_vae(pipe: NextStepPipeline, patch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ValueError("broken")

    patch.setattr(type(pipe.vae), "decode", fail)
    pipe.generate("a red circle", **DRAWN)


def is_cancelled(pipe: NextStepPipeline, patch: pytest.MonkeyPatch) -> None:
    def stop(progress: object) -> None:
        raise KeyboardInterrupt

    pipe.generate("a red circle", **DRAWN, callback=stop)


@pytest.mark.parametrize("failing", [fails_while_drawing, fails_in_the_vae, is_cancelled])
def test_after_a_failure_nothing_is_kept_either(caches, monkeypatch: pytest.MonkeyPatch, failing: Callable) -> None:
    given_back: list[torch.device] = []
    monkeypatch.setattr("nextstep_core.pipeline.give_back", given_back.append)
    pipe = capturing(100 * MB)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        failing(pipe, monkeypatch)
    assert given_back[-1:] == [CPU]
    assert not caches and not pipe.engine.caches.prefilled.nbytes


def test_auto_takes_the_first_format_that_fits_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def stored(limit: int | None) -> str | None:
        recipe = load(quantization="auto", max_memory=limit).engine.model.layers[0].mlp.gate_up_proj
        return recipe.format.name if hasattr(recipe, "format") else None

    plan = plan_model(ASSETS / "tiny")
    own = Budget.of(CPU, None, torch.float32, load().vae)
    monkeypatch.setattr(budgets, "working_bytes", lambda *_: 2 * MB)
    monkeypatch.setattr("nextstep_core.decoding.memory.working_bytes", lambda *_: 2 * MB)
    beside = 2 * MB + own.vae_weights + own.vae_bytes(512, 512)
    whole, eighth = (beside + plan.weight_bytes(name, torch.float32) for name in (None, "int8"))
    assert [stored(limit) for limit in (None, whole, whole - 1, eighth, eighth - 1)] == [
        *(None, None),
        *("int8", "int8"),
        "int4",
    ]


def test_auto_asks_a_card_for_its_memory_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for what is free, so that one machine draws one picture."""
    plan = plan_model(ASSETS / "tiny")
    monkeypatch.setattr(budgets, "total_bytes", lambda device: 10**12 if device.type == "cuda" else 0)
    budget = Budget(torch.device("cuda"), None, torch.float32, VAEConfig(128, (1, 2, 4, 4), 2, 16), 0)
    assert budget.with_recipe(plan).recipe is None
    monkeypatch.setattr(budgets, "total_bytes", lambda device: 1)
    assert budget.with_recipe(plan).recipe.name == "int4"
    assert replace(budget, device=CPU).with_recipe(plan).recipe is None


@pytest.mark.parametrize("value", [0, 20, 999_999, 10**18, 2.5e9, "8 GB", True])
def test_a_limit_that_is_none_is_refused(value: object) -> None:
    with pytest.raises(NextStepError, match=r"max_memory is .*bytes"):
        load(max_memory=value)


@pytest.mark.parametrize("device", [CPU, MPS], ids=str)
def test_what_cannot_fit_is_refused_before_the_weights_are_read(device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ModelPlan, "read_model", lambda *_: pytest.fail("weights were read"))
    with WeighedMPS(), pytest.raises(NextStepError, match=r"max_memory leaves 1\.1 MB.*(int4|int8)"):
        load(device=device, max_memory=7 * MB)


def test_what_cannot_fit_is_refused_before_it_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load(max_memory=24 * MB)
    monkeypatch.setattr(TransformerStep, "__init__", lambda *_: pytest.fail("it was drawn"))
    with pytest.raises(NextStepError, match=r"On a CPU .*cannot be streamed.*smaller size"):
        pipe.generate("a red circle", height=512, width=512)


def test_a_cpu_draws_fewer_at_once_within_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def together(limit: int | None) -> int:
        most = 0

        def seen(progress) -> None:
            nonlocal most
            most = max(most, progress.stop - progress.start)

        load(max_memory=limit).generate("a red circle", num_images_per_prompt=4, callback=seen, **DRAWN)
        return most

    assert together(None) == 4 > together(26 * MB) >= 1


VAE = VAEConfig(ch=128, ch_mult=(1, 2, 4, 4), num_res_blocks=2, z_channels=16)


def test_the_vae_gets_what_the_weights_leave_by_hand() -> None:
    """Nine layers of 256 channels in two bytes, for each pixel; results are 3 channels of 2 + 2 + 4 bytes."""
    each = pixel_bytes(VAE, torch.bfloat16)
    assert each == 9 * 256 * 2
    budget = Budget(MPS, 2 * 10**9, torch.bfloat16, VAE, vae_weights=10**8)
    assert budget.room() == 19 * 10**8
    assert budget.vae_bytes(512, 256) == each * 512 * 256 + 512 * 256 * 24
    assert budget.vae_bytes(2048, 1024, 2) == each * 512 * 512 + 2 * 2048 * 1024 * 24, "larger ones go in tiles"
    assert budget.pixels_at_once(10**9, 1024, 1024) == (9 * 10**8 - 1024 * 1024 * 24) // each
    assert budget.pixels_at_once(10**12, 64, 64) == 0
    assert replace(budget, limit=None).pixels_at_once(0, 64, 64) is None, "memory that runs out will tell"


def test_the_vae_takes_less_at_a_time_than_it_is_allowed() -> None:
    seen: list[int] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x) * x.shape[-1] * x.shape[-2])
        return x

    x = torch.rand(3, 3, 320, 600)
    for at_once in (None, 3 * 320 * 600, 3 * 320 * 600 - 1, 320 * 600 - 1, 320 * 512 - 1, 256 * 256 - 1, 0):
        seen.clear()
        assert torch.allclose(run_in_tiles(network, x, 1, 1, at_once=at_once), x, atol=1e-6)
        smallest = 128 * 128
        assert max(seen) <= max(smallest, 3 * 320 * 600 if at_once is None else at_once)


def test_sizes_on_paper_are_those_of_the_model() -> None:
    for recipe in (None, "int8", "int4"):
        plan = plan_model(ASSETS / "tiny", recipe, MPS)
        with WeighedMPS():
            model = plan.load_model(MPS, torch.float32)
        sizes = plan.tensor_bytes(recipe, torch.float32)
        assert passing_bytes(sizes) == streamed_bytes(model)
        assert sum(sizes.values()) == model_bytes(model)


class FakeCuda:
    """What is asked of a card with 1000 bytes, of which PyTorch holds 300 and we 100 of these."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.share, self.emptied = 0.9, 0
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 260)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (600, 1000))
        patch.setattr(torch.cuda, "get_device_properties", lambda device: type("P", (), {"total_memory": 1000}))
        patch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: self.set(share))
        patch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: self.share, raising=False)
        patch.setattr(torch.cuda, "empty_cache", self.empty)

    def set(self, share: float) -> None:
        self.share = share

    def empty(self) -> None:
        self.emptied += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    return FakeCuda(monkeypatch)


def test_a_cuda_device_refuses_what_goes_beyond_the_limit(cuda: FakeCuda) -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(KeyboardInterrupt), devices.capped(device, 400, held=100):
        assert cuda.share == pytest.approx((300 - 100 + 400) / 1000), "what others hold does not count"
        raise KeyboardInterrupt
    assert cuda.share == 0.9, "as it was"
    with devices.capped(device, None, held=100):
        assert cuda.share == 0.9
    with devices.capped(device, 10**6, held=100):
        assert cuda.share == 1.0
    assert devices.room_bytes(device) == 600 + 300 - 260, "what PyTorch keeps for itself can be used"
    before = cuda.emptied
    devices.give_back(device)
    assert cuda.emptied == before + 1

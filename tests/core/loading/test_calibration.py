"""What a model drew, kept and used: the conditions are those that tokens were drawn from, files of others are refused,
and int4 that is fitted to it loses less."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoint_files import edit_json
from safetensors.torch import load_file, save_file
from torch import Tensor

from nextstep_core import NextStepError, NextStepPipeline
from nextstep_core.decoding.steps import TokenSampler
from nextstep_core.loading import calibration, kept
from nextstep_core.loading.build import ModelPlan, fill, make_ready, plan_model
from nextstep_core.loading.calibration import (
    Drawn,
    calibration_path,
    conditions,
    load_calibration,
    relative_error,
    save_calibration,
)
from nextstep_core.loading.catalog import models
from nextstep_core.loading.compensated import Compensated
from nextstep_core.loading.kept import lacks_weights, weights_hash
from nextstep_core.loading.single_file import save_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime.quantization import quantized_linears

TEXTS = ["A red apple.", "Two cats on a chair, and a dog beside it.", "A house.", "A blue car on a bridge."]
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)  # faster on models this small


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "with position codes"])
def case(
    request: pytest.FixtureRequest, golden: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ModelPlan, NextStepPipeline, Drawn]:
    folder = shutil.copytree(golden / "tiny-a", tmp_path_factory.mktemp("case") / "tiny-a")
    edit_json(folder / "config.json", use_gen_pos_embed=request.param)
    pipeline = NextStepPipeline.from_pretrained(folder, dtype=torch.float32)
    return plan_model(folder, "int4"), pipeline, pipeline.calibrate(TEXTS, **SIZE)


@pytest.fixture(scope="module")
def drawn(golden: Path) -> Drawn:
    return NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.float32).calibrate(TEXTS, **SIZE)


@torch.inference_mode()
def test_conditions_are_what_the_tokens_were_drawn_from(
    case: tuple[ModelPlan, NextStepPipeline, Drawn], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, pipeline, drawn = case
    seen: list[Tensor] = []
    sample = TokenSampler.__call__

    def recorded(self: TokenSampler, hidden: Tensor, noise: Tensor, guidance: Tensor, steps: int) -> Tensor:
        seen.append(hidden.clone())
        return sample(self, hidden, noise, guidance, steps)

    monkeypatch.setattr(TokenSampler, "__call__", recorded)
    again = pipeline.calibrate(TEXTS, **SIZE)
    assert torch.equal(again.tokens, drawn.tokens)
    found = conditions(pipeline.engine.model, pipeline.engine.text_embedding, drawn, torch.float32)
    expected = pipeline.engine.model.image_out_projector(torch.stack(seen, dim=1))
    assert found.shape == expected.shape and relative_error(found, expected) <= 1e-5


def test_every_picture_has_a_seed_of_its_own_and_the_settings_of_the_checkpoint(golden: Path, drawn: Drawn) -> None:
    pipeline = NextStepPipeline.from_pretrained(golden / "tiny-a", dtype=torch.float32)
    alone = pipeline.generate(TEXTS[2], seed=2, **SIZE).tokens
    assert (alone[0] - drawn.tokens[2]).abs().max() <= 1e-4


def test_one_of_eight_is_held_out_and_the_last() -> None:
    def numbers(part: Drawn) -> list[int]:
        assert part.ids[:, 0].tolist() == [*part.tokens[:, 0, 0].tolist(), *(part.tokens[:, 0, 0] + 100).tolist()]
        return part.tokens[:, 0, 0].int().tolist()

    for count, out in ((2, [1]), (8, [7]), (9, [7, 8]), (16, [7, 15])):
        tokens = torch.arange(count).float().view(-1, 1, 1)
        ids = torch.cat([tokens[:, 0], tokens[:, 0] + 100]).int()
        every = Drawn(ids, ids > -1, tokens, (1, 1))
        assert numbers(every.held_out) == out
        assert numbers(every.known) == [n for n in range(count) if n not in out]


# --- fitting


@torch.inference_mode()
def test_without_fitting_the_tensors_are_those_of_the_plan(case: tuple[ModelPlan, NextStepPipeline, Drawn]) -> None:
    plan, _, drawn = case
    for dtype in (torch.float32, torch.bfloat16):
        expected = dict(plan.read_model("cpu", dtype))
        found = dict(Compensated(plan, drawn, fit=False).read(dtype))
        assert found.keys() == expected.keys()
        assert all(found[name].dtype == expected[name].dtype for name in expected)
        # Matrices are fitted to what the file holds, here float32, and not to what is left of that in bfloat16.
        same = [
            name for name in expected if dtype == torch.float32 or f"{name.removesuffix('_scale')}_scale" not in found
        ]
        assert len(same) > 10 and all(torch.equal(found[name], expected[name]) for name in same)


@torch.inference_mode()
@pytest.mark.parametrize("fit", [False, True], ids=["plain", "fitted"])
def test_the_error_is_that_of_the_whole_model(case: tuple[ModelPlan, NextStepPipeline, Drawn], fit: bool) -> None:
    """Layer by layer, in batches, as in one pass over all: held-out pictures through a model with the stored values."""
    plan, pipeline, drawn = case
    compensated = Compensated(plan, drawn, fit=fit)
    state = dict(compensated.read(torch.float32))
    exact = plan_model(plan.documents.folder).load_model("cpu", torch.float32)
    stored = plan_model(plan.documents.folder)
    floats = dict(stored.read_model("cpu", torch.float32))
    for name, layer in quantized_linears(plan.empty_model()):
        if name.startswith("layers."):
            parts = state[f"{name}.weight"], state[f"{name}.weight_scale"]
            floats[f"{name}.weight"] = layer.format.dequantize(*parts, torch.float32)
    model = stored.empty_model()
    fill(model, floats)
    made = [conditions(m, pipeline.engine.text_embedding, drawn.held_out, torch.float32) for m in (model, exact)]
    assert compensated.error == pytest.approx(relative_error(*made), rel=1e-3)


@pytest.fixture(scope="module")
def embedded() -> tuple[ModelPlan, Drawn]:
    colors, shapes = ("red", "green", "blue", "yellow", "purple", "black"), ("circle", "square", "triangle", "star")
    texts = [f"a {colors[n % 6]} {shapes[n % 4]} on a {colors[(n * 5 + 1) % 6]} background" for n in range(16)]
    pipeline = NextStepPipeline.from_pretrained("tiny", dtype=torch.float32)
    return plan_model(ASSETS / "tiny", "int4"), pipeline.calibrate(texts, height=64, width=64)


@pytest.mark.slow
def test_the_embedded_model_loses_less_when_it_is_fitted(embedded: tuple[ModelPlan, Drawn]) -> None:
    plan, drawn = embedded
    found: dict[bool, float] = {}
    for fit in (False, True):
        compensated = Compensated(plan, drawn, fit=fit)
        state = dict(compensated.read(torch.float32))
        assert compensated.error is not None
        found[fit] = compensated.error
    assert found[True] <= 0.9 * found[False]
    model = plan.empty_model()
    fill(model, state)
    make_ready(model, torch.device("cpu"), torch.float32)


def test_a_converted_file_holds_what_was_fitted(golden: Path, drawn: Drawn, tmp_path: Path) -> None:
    plan = plan_model(golden / "tiny-a", "int4")
    compensated = Compensated(plan, drawn)
    save_model(plan, tmp_path / "a.safetensors", torch.float32, reading=compensated.read)
    assert compensated.error is not None and 0 < compensated.error < 0.5
    again = dict(plan_model(tmp_path / "a.safetensors").read_model("cpu", torch.float32))
    expected = dict(Compensated(plan, drawn).read(torch.float32))
    assert all(torch.equal(again[name], expected[name]) for name in expected)
    plain = dict(plan.read_model("cpu", torch.float32))
    changed = {name for name in expected if not torch.equal(expected[name], plain[name])}
    assert changed and all(name.startswith("layers.") and ".weight" in name for name in changed)


def test_fitting_stops_when_it_is_told_to(golden: Path, drawn: Drawn) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    plan = plan_model(golden / "tiny-a", "int4")
    with pytest.raises(KeyboardInterrupt):
        list(Compensated(plan, drawn).read(torch.float32, check=stop))
    with pytest.raises(KeyboardInterrupt):
        list(Compensated(plan, drawn).read(torch.float32, lambda *_: stop()))


# --- files


def test_what_is_written_is_read_back(golden: Path, drawn: Drawn, tmp_path: Path) -> None:
    plan, path = plan_model(golden / "tiny-a"), tmp_path / "c.safetensors"
    assert save_calibration(path, drawn, "0123456789") == path.stat().st_size
    again = load_calibration(path, plan.config, "0123456789")
    for name in ("ids", "valid", "tokens"):
        assert torch.equal(getattr(again, name), getattr(drawn, name)), name
    assert again.grid == drawn.grid == (2, 3)


def test_it_lies_beside_its_checkpoint_and_is_no_model(checkpoint: Path, drawn: Drawn) -> None:
    before = models([checkpoint.parent])
    path = calibration_path(checkpoint)
    save_calibration(path, drawn, "x")
    assert path.parent == checkpoint and models([checkpoint.parent]) == before
    for weights in checkpoint.glob("model*"):
        weights.unlink()
    assert path.is_file() and lacks_weights(checkpoint)
    assert path not in models([checkpoint.parent]).values()
    assert calibration_path(checkpoint.parent / "x.safetensors").name == "x.calibration.safetensors"


Change = Callable[[dict[str, Tensor], dict[str, str]], object]
WRONG: dict[str, tuple[Change, str]] = {
    "other weights": (lambda t, m: m.update(weights="else"), "other weights"),
    "no mark": (lambda t, m: m.pop(calibration.MARK), "no calibration of this version"),
    "a later version": (lambda t, m: m.update({calibration.MARK: "2"}), "no calibration of this version"),
    "no grid": (lambda t, m: m.pop("grid"), "does not fit"),
    "another grid": (lambda t, m: m.update(grid="3x3"), "does not fit"),
    "a grid of words": (lambda t, m: m.update(grid="twoxthree"), "does not fit"),
    "an endless grid": (lambda t, m: m.update(grid="9" * 5000 + "x1"), "does not fit"),
    "a missing part": (lambda t, m: t.pop("valid"), "does not fit"),
    "a surprise": (lambda t, m: t.update(more=torch.zeros(1)), "does not fit"),
    "ids beyond the vocabulary": (lambda t, m: t["ids"].fill_(640), "does not fit"),
    "negative ids": (lambda t, m: t["ids"].fill_(-1), "does not fit"),
    "tokens that are no numbers": (lambda t, m: t["tokens"].fill_(torch.nan), "does not fit"),
    "tokens that no model draws": (lambda t, m: t["tokens"].fill_(1e30), "does not fit"),
    "narrow tokens": (lambda t, m: t.update(tokens=t["tokens"][..., :32].contiguous()), "does not fit"),
    "one picture": (lambda t, m: t.update(tokens=t["tokens"][:1]), "does not fit"),
    "three rows": (lambda t, m: t.update(ids=t["ids"][:3], valid=t["valid"][:3]), "does not fit"),
    "holes": (lambda t, m: t["valid"][:, 1:2].zero_(), "does not fit"),
    "nothing but padding": (lambda t, m: t["valid"].zero_(), "does not fit"),
    "a valid of two": (lambda t, m: t["valid"].fill_(2), "does not fit"),
    "nothing": (lambda t, m: t.update(ids=t["ids"][:, :0], valid=t["valid"][:, :0]), "does not fit"),
    "long prompts": (
        lambda t, m: t.update(ids=t["ids"][:, :1].repeat(1, 4096), valid=torch.ones(8, 4096, dtype=torch.uint8)),
        "does not fit",
    ),
    "floats for ids": (lambda t, m: t.update(ids=t["ids"].float()), "does not fit"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_belong_is_refused(wrong: str, golden: Path, drawn: Drawn, tmp_path: Path) -> None:
    plan, path = plan_model(golden / "tiny-a"), tmp_path / "c.safetensors"
    save_calibration(path, drawn, "x")
    tensors = load_file(path)
    marks = {calibration.MARK: calibration.VERSION, "weights": "x", "grid": "2x3"}
    change, said = WRONG[wrong]
    change(tensors, marks)
    save_file(tensors, path, marks)
    with pytest.raises(NextStepError, match=said):
        load_calibration(path, plan.config, "x")


@pytest.mark.parametrize("data", [b"", b"x" * 100, struct.pack("<Q", 2**62), b"\2\0\0\0\0\0\0\0{}"], ids=range(4))
def test_a_file_that_is_none_is_refused(data: bytes, golden: Path, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    path.write_bytes(data)
    with pytest.raises(NextStepError, match="damaged|no calibration"):
        load_calibration(path, plan_model(golden / "tiny-a").config, "x")
    with pytest.raises(NextStepError, match="does not exist"):
        load_calibration(tmp_path / "none", plan_model(golden / "tiny-a").config, "x")
    with pytest.raises(NextStepError, match="regular file"):
        load_calibration(tmp_path, plan_model(golden / "tiny-a").config, "x")


def test_a_file_of_a_size_that_no_calibration_has_is_not_read(golden: Path, tmp_path: Path, drawn: Drawn) -> None:
    path = tmp_path / "c.safetensors"
    save_calibration(path, drawn, "x")
    with path.open("r+b") as file:
        file.truncate(calibration.LARGEST + 1)
    with pytest.raises(NextStepError, match="at most"):
        load_calibration(path, plan_model(golden / "tiny-a").config, "x")


def test_other_weights_have_another_hash(checkpoint: Path) -> None:
    before = weights_hash(plan_model(checkpoint))
    assert weights_hash(plan_model(checkpoint, "int4")) == before, "in whatever they are stored"
    (path, *_) = kept.source_files(plan_model(checkpoint))
    tensors = load_file(path)
    next(iter(tensors.values())).add_(1)
    save_file(tensors, path)
    assert weights_hash(plan_model(checkpoint)) != before


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"prompts": ["one"]}, "prompts to calibrate with is 1"),
        ({"prompts": "a text"}, "prompts to calibrate with is 1"),
        ({"prompts": ["x"] * 200}, "is 200"),
        ({"prompts": [1, 2]}, "prompt"),
        ({"prompts": ["<image>a", "b"]}, "slot"),
        ({"prompts": TEXTS, "height": 40}, "multiple"),
        ({"prompts": TEXTS, "seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(asked: dict, said: str, pipeline: NextStepPipeline) -> None:
    with pytest.raises(NextStepError, match=said):
        pipeline.calibrate(**({"height": 32, "width": 48} | asked))

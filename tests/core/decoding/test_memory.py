"""The memory of a run by hand, and the weight format that it leaves room for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks.subjects import PUBLISHED_CONFIG, SHAPES
from nextstep_core.decoding.memory import (
    PICTURE_512,
    VAE_BYTES,
    RunSize,
    fitting_recipe,
    with_fitting_recipe,
    working_bytes,
)
from nextstep_core.loading.build import ModelPlan, plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.model.config import NextStepConfig
from nextstep_core.runtime.quantization import RECIPES

GB = 10**9
CONFIG = NextStepConfig.from_dict(PUBLISHED_CONFIG | SHAPES["14b"])


@pytest.fixture(scope="module")
def plan() -> ModelPlan:
    """A checkpoint of the published shape; its files are never looked at."""
    return replace(plan_model(ASSETS / "tiny"), config=CONFIG)


def test_working_memory_by_hand() -> None:
    """512x512, 2 rows: 0.5 GB of keys and values (0.2 MB a position and row, in whole buckets) and little else."""
    kv = 2 * 48 * 8 * 128 * 2 * 1280 * 2
    one_call = 2 * 256 * (8 * 5120 + 3 * 13824) + 2 * 40 * 256 * 1280
    modulations = 2 * 51 * 38 * 1536
    assert working_bytes(CONFIG, PICTURE_512, torch.bfloat16) == kv + 2 * (one_call + modulations)
    once_more = working_bytes(CONFIG, replace(PICTURE_512, rows=4), torch.bfloat16)
    assert once_more == 2 * working_bytes(CONFIG, PICTURE_512, torch.bfloat16), "every part counts rows"
    assert working_bytes(CONFIG, RunSize(1, 1, 0, 0), torch.float32) >= 2 * 48 * 8 * 128 * 256 * 4, "a whole bucket"


def test_weights_of_the_published_shape(plan: ModelPlan) -> None:
    sizes = [plan.weight_bytes(name, torch.bfloat16) / GB for name in (None, "int8", "fp8", "int4", "int4-g32")]
    assert sizes == pytest.approx([26.8, 13.5, 13.5, 7.6, 8.4], abs=0.1)
    assert plan.weight_bytes(None, torch.float32) == 2 * plan.weight_bytes(None, torch.bfloat16)


@pytest.mark.parametrize(
    ("card", "recipe"), [(80, None), (32, None), (24, "int8"), (16.9, "int8"), (14, "int4"), (12, "int4"), (6, "int4")]
)
def test_the_first_format_that_leaves_room(plan: ModelPlan, card: float, recipe: str | None) -> None:
    assert fitting_recipe(plan, torch.bfloat16, torch.bfloat16, int(card * GB)) == recipe


@pytest.mark.parametrize(
    ("nearest", "card", "recipe"),
    [("int8", 80, "int8"), ("int8", 17, "int8"), ("int8", 14, "int4"), ("int4-g32", 12, "int4-g32")]
    + [("int4-g32", 10.5, "int4"), ("int4", 80, "int4")],
)
def test_weights_of_a_gguf_file_are_stored_as_near_to_it_as_there_is_room(
    plan: ModelPlan, nearest: str, card: float, recipe: str
) -> None:
    """Nothing is won by more bits than it has."""
    of_file = replace(plan, recipe=RECIPES[nearest])
    chosen = with_fitting_recipe(of_file, torch.bfloat16, torch.bfloat16, int(card * GB))
    assert chosen.recipe is RECIPES[recipe]
    stored = replace(of_file, stored=True)
    assert with_fitting_recipe(stored, torch.bfloat16, torch.bfloat16, 1) is stored


def test_weights_count_as_stored_and_activations_as_computed(plan: ModelPlan) -> None:
    """On a card without bfloat16 units: 26.8 GB of weights, not 53.6, and twice the KV cache and activations."""
    beside = working_bytes(CONFIG, PICTURE_512, torch.float32) + VAE_BYTES
    enough = plan.weight_bytes(None, torch.bfloat16) + beside
    assert fitting_recipe(plan, torch.bfloat16, torch.float32, enough) is None
    assert fitting_recipe(plan, torch.bfloat16, torch.float32, enough - 1) == "int8"


def test_what_is_not_quantized_makes_no_trip_over_another_device() -> None:
    """Such a trip would end on the meta device, from which nothing comes back."""
    tensors = dict(plan_model(ASSETS / "tiny").read_model("cpu", None, work_on="meta"))
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}

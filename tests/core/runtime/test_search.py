"""Scales and zeros of int4: never worse than from least to greatest, better on trained weights, the same in pieces."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextstep_core.loading.build import plan_model
from nextstep_core.loading.store import ASSETS
from nextstep_core.runtime.quantization import search as module
from nextstep_core.runtime.quantization.search import search

BF16 = torch.bfloat16
KINDS = {
    "normal": lambda g: torch.randn(24, 3, 64, generator=g),
    "an outlier in each": lambda g: torch.randn(24, 3, 64, generator=g).index_fill_(2, torch.tensor([5]), 9.0),
    "positive": lambda g: torch.rand(24, 3, 64, generator=g) + 0.5,
    "a few values": lambda g: torch.randint(-2, 3, (24, 3, 64), generator=g).float(),
    "all alike": lambda g: torch.full((24, 3, 64), 0.7),
    "nothing": lambda g: torch.zeros(24, 3, 64),
    "tiny": lambda g: 1e-12 * torch.randn(24, 3, 64, generator=g),
    "huge": lambda g: 1e30 * torch.randn(24, 3, 64, generator=g),
}


def made(kind: str) -> Tensor:
    return KINDS[kind](torch.Generator().manual_seed(0))


def between_ends(groups: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero by the 16 values from the least to the greatest."""
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp_min(1e-8).to(BF16)
    return scale, (low + 8 * scale.float()).to(BF16)


def errors(groups: Tensor, scale: Tensor, zero: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Weighted squared error of each group, (rows, groups), in float64."""
    groups, scale, zero = groups.double(), scale.double(), zero.double()
    steps = ((groups - zero) / scale).round().clamp(-8, 7)
    return ((steps * scale + zero - groups).square() * weights).sum(2)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_group_is_worse_than_between_its_ends(kind: str, weighted: bool) -> None:
    groups = made(kind)
    weights = torch.rand(1, 3, 64, generator=torch.Generator().manual_seed(1)) if weighted else None
    counted = 1.0 if weights is None else weights
    found = errors(groups, *search(groups, BF16, weights), counted)
    plain = errors(groups, *between_ends(groups), counted)
    assert found.isfinite().all() and (found <= plain * (1 + 1e-5) + 1e-12 * groups.double().square().sum(2)).all()


def test_normal_groups_lose_a_seventh_of_their_squared_error() -> None:
    groups = torch.randn(256, 4, 64, generator=torch.Generator().manual_seed(0))
    found, plain = errors(groups, *search(groups, BF16)).sum(), errors(groups, *between_ends(groups)).sum()
    assert found <= plain * 6 / 7


def test_an_outlier_that_counts_for_nothing_widens_no_steps() -> None:
    groups = made("an outlier in each")
    weights = torch.ones(1, 1, 64)
    weights[..., 5] = 1e-6
    found = errors(groups, *search(groups, BF16, weights), weights).sum()
    assert found <= 0.8 * errors(groups, *search(groups, BF16), weights).sum()


@pytest.mark.parametrize("each", [None, 1, 24], ids=["plain", "weights of columns", "weights of all"])
def test_pieces_give_what_the_whole_gives(each: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = made("normal")
    weights = None if each is None else torch.rand(each, 3, 64, generator=torch.Generator().manual_seed(1))
    whole = search(groups, BF16, weights)
    monkeypatch.setattr(module, "AT_ONCE", 5 * 3 * 64)
    assert all(torch.equal(a, b) for a, b in zip(search(groups, BF16, weights), whole))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_no_number_stays_seen(value: float) -> None:
    groups = made("normal")
    groups[3, 1, 7] = value
    scale, zero = search(groups, BF16)
    bad = (scale.isfinite() & zero.isfinite()).logical_not().squeeze(2).nonzero().tolist()
    assert bad == [[3, 1]]


def test_trained_weights_are_stored_with_less_error() -> None:
    plan = plan_model(ASSETS / "tiny")
    found = plain = 0.0
    for name, tensor in plan.read_model("cpu", torch.float32):
        if name.startswith("layers.") and tensor.ndim == 2:
            groups = tensor.view(len(tensor), -1, 64)
            found += float(errors(groups, *search(groups, BF16)).sum())
            plain += float(errors(groups, *between_ends(groups)).sum())
    assert found <= plain * 7 / 8

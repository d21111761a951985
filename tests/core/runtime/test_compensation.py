"""int4 fitted to inputs: less error of the products than nearest rounding leaves, and nothing worse in any row."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nextstep_core.runtime.quantization import compensation
from nextstep_core.runtime.quantization.compensation import compensated, product_error
from nextstep_core.runtime.quantization.formats import INT4, INT4_128, Int4


def correlated(columns: int, count: int, seed: int = 0) -> Tensor:
    """Inputs of which a few directions hold most, as hidden states do."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -2, columns)[:, None]
    return torch.randn(count, columns, generator=generator) @ directions


def matrix(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))


def errors(format: Int4, weights: Tensor, stored: tuple[Tensor, Tensor], gram: Tensor) -> Tensor:
    return product_error(weights, format.dequantize(*stored, torch.float32), gram)


def test_the_error_of_products_by_hand() -> None:
    inputs = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    plain, other = torch.tensor([[1.0, 1.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert product_error(plain, other, inputs.T @ inputs).tolist() == [2.0**2 + 1.0**2, 0.0]


@pytest.mark.parametrize("format", [INT4, INT4_128], ids=lambda f: f.name)
def test_products_lose_less_than_with_nearest_values(format: Int4) -> None:
    inputs, weights = correlated(256, 1024), matrix(48, 256)
    gram = inputs.T @ inputs
    found = errors(format, weights, compensated(format, weights, gram), gram)
    nearest = errors(format, weights, format.quantize(weights), gram)
    assert found.sum() <= nearest.sum() / 3
    others = correlated(256, 512)  # of the same kind, never seen
    unseen = others.T @ others
    found = errors(format, weights, compensated(format, weights, gram), unseen)
    assert found.sum() <= errors(format, weights, format.quantize(weights), unseen).sum() / 2


@pytest.mark.parametrize("where", ["in a group", "in the next group"])
def test_an_error_is_taken_up_by_the_columns_behind_it(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding alone, where every second column nearly repeats one before it: their sum is what counts."""
    monkeypatch.setattr(compensation, "PASSES", 0)
    generator = torch.Generator().manual_seed(0)
    once, noise = (torch.randn(512, 64, generator=generator) for _ in range(2))
    pair = once, once + 0.1 * noise
    inputs = torch.stack(pair, dim=2).flatten(1) if where == "in a group" else torch.cat(pair, dim=1)
    weights, gram = matrix(32, 128), inputs.T @ inputs
    found = errors(INT4, weights, compensated(INT4, weights, gram), gram).sum()
    assert found <= 0.7 * errors(INT4, weights, INT4.quantize(weights), gram).sum()


def test_no_pass_makes_a_row_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = correlated(128, 512), matrix(32, 128)
    gram = inputs.T @ inputs
    damped = gram + torch.eye(128) * compensation.DAMPING * gram.diagonal().mean()
    made = []
    for passes in (0, 1, 2, 6):
        monkeypatch.setattr(compensation, "PASSES", passes)
        made.append(errors(INT4, weights, compensated(INT4, weights, gram), damped))
    assert all((later <= earlier * (1 + 1e-4)).all() for earlier, later in zip(made, made[1:]))
    assert made[-1].sum() < 0.92 * made[0].sum(), "integers alone would come to 0.93"


def test_pieces_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, weights = correlated(128, 512), matrix(48, 128)
    whole = compensated(INT4, weights, inputs.T @ inputs)
    monkeypatch.setattr(compensation, "ROWS", 16)
    pieces = compensated(INT4, weights, inputs.T @ inputs)
    same = (INT4.values(whole[0]) == INT4.values(pieces[0])).double().mean()
    assert same >= 0.999, "products of another size round otherwise, which may tip a value"
    empty = INT4.empty(48, 128, "meta")
    assert [(t.shape, t.dtype) for t in pieces] == [(t.shape, t.dtype) for t in empty]


@pytest.mark.parametrize(
    "inputs",
    [
        torch.zeros(4, 128),
        torch.ones(4, 128),
        1e-12 * torch.ones(4, 128),
        1e12 * correlated(128, 3),
        torch.eye(128)[:3],
    ],
    ids=["none", "one direction", "tiny", "huge and few", "a few columns"],
)
def test_whatever_the_inputs_are_the_matrix_is_stored(inputs: Tensor) -> None:
    weights = matrix(32, 128)
    stored = INT4.dequantize(*compensated(INT4, weights, inputs.T @ inputs), torch.float32)
    assert (stored - weights).norm() <= 0.3 * weights.norm()


def test_inputs_without_correlation_leave_what_is_best_for_each_column() -> None:
    weights = matrix(64, 128)
    stored = INT4.dequantize(*compensated(INT4, weights, torch.eye(128)), torch.float32)
    nearest = INT4.dequantize(*INT4.quantize(weights), torch.float32)
    assert (stored - weights).norm() <= (nearest - weights).norm()


def test_it_can_be_stopped_on_the_way() -> None:
    calls = 0

    def check() -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compensated(INT4, matrix(32, 256), torch.eye(256), check)

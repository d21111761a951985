"""Attention split over the keys, against the model's own."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch

from nextstep_core.model.kv_cache import KVCache, bucketed
from nextstep_core.model.positions import apply_rotary, rotary_table
from nextstep_core.model.transformer import grouped_attention, span_at
from nextstep_core.runtime.triton import attention as kernels

CPU = torch.device("cpu")
DIMS = [16, 48, 64, 128]
ROUNDING = {torch.float32: 1e-5, torch.float16: 5e-3}


@pytest.mark.parametrize("seed", range(8))
def test_any_shape(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, _ = random.Random(seed), torch.manual_seed(seed)
    dim, kv_heads, groups = DIMS[seed % len(DIMS)], draw.choice([1, 2]), draw.choice([1, 2, 3, 5])
    rows, length, dtype = draw.choice([1, 2, 3]), draw.choice([1, 1, 4, 8]), draw.choice(list(ROUNDING))
    heads, own_places = kv_heads * groups, draw.random() < 0.5
    monkeypatch.setattr(kernels, "PROGRAMS", draw.choice([1, 8, 64]))  # one part of the keys, or several
    config = SimpleNamespace(
        num_hidden_layers=2, num_key_value_heads=kv_heads, head_dim=dim, rope_theta=1e4, rope_factor=1.0
    )
    room, start, padding = 1024, draw.randint(1, 600), draw.randint(0, 40)
    cache = KVCache(config, rows, room, CPU, dtype)
    cache.data.normal_()
    ours = cache.data.clone()
    table, valid = rotary_table(config, room, CPU, dtype), torch.ones(rows, room, dtype=torch.bool)
    valid[-1, :padding] = False
    positions = torch.arange(start, start + length)
    if own_places:
        positions = torch.stack([positions + 17 * row for row in range(rows)])
    visible = bucketed(int(positions.max()) + 1)
    qkv = torch.randn(rows, length, (heads + 2 * kv_heads) * dim).to(dtype)

    span = span_at(positions, table, valid, visible)
    qk, v = qkv.view(rows, length, -1, dim).transpose(1, 2).split([heads + kv_heads, kv_heads], dim=1)
    q, k = apply_rotary(qk, span.rotary).split([heads, kv_heads], dim=1)
    seen = cache.write(1, positions, k, v, visible)
    expected = grouped_attention(q, *seen, span.mask).transpose(1, 2).reshape(rows * length, -1)

    result = kernels.attention(qkv, heads, table, positions, valid, ours[1], visible)
    rounding = ROUNDING[dtype]
    torch.testing.assert_close(result, expected, rtol=rounding, atol=rounding)
    torch.testing.assert_close(ours, cache.data, rtol=rounding, atol=rounding)


def test_not_a_number_reaches_its_row_alone() -> None:
    torch.manual_seed(0)
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=16, rope_theta=1e4, rope_factor=1.0)
    cache = torch.randn(2, 2, 1, 256, 16)
    table, valid = rotary_table(config, 256, CPU, torch.float32), torch.ones(2, 256, dtype=torch.bool)
    qkv = torch.randn(2, 1, 3 * 16)
    qkv[1, 0, 0] = float("nan")
    result = kernels.attention(qkv, 1, table, torch.tensor([200]), valid, cache, 256)
    assert result[0].isfinite().all()
    assert result[1].isnan().all()


def test_what_lies_beyond_is_never_read() -> None:
    """Places that are not filled yet, and padding, may hold anything that is a number."""
    torch.manual_seed(0)
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, head_dim=16, rope_theta=1e4, rope_factor=1.0)
    table, valid = rotary_table(config, 256, CPU, torch.float32), torch.ones(1, 256, dtype=torch.bool)
    valid[0, :9] = False
    qkv, cache = torch.randn(1, 1, 3 * 16), torch.randn(2, 1, 1, 256, 16)
    other = cache.clone()
    other[..., :9, :], other[..., 101:, :] = 1e4, -1e4
    results = [kernels.attention(qkv, 1, table, torch.tensor([100]), valid, each, 256) for each in (cache, other)]
    assert torch.equal(*results)

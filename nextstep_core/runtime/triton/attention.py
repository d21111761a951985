"""Attention of a few positions over a long cache, split over the keys, so that a whole device reads them.

Three kernels: one rotates queries and keys and writes keys and values where they belong, one lets every part of the
keys give its share, one adds the shares up. Method: Dao et al., "Flash-Decoding" (2023). What a query may see follows
from its position and the marks of left padding; no mask is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .support import launch, power_of_two

KEYS = 64  # that a program reads at a time
PROGRAMS = 128  # about as many as a device has processors
MOST_QUERIES = 128  # of one head of the keys


@triton.jit
def rotate_and_write(
    qkv, table, positions, queries, cache, T, step, H, HKV, LENGTH, TABLE, DIM: tl.constexpr, DP: tl.constexpr
):
    """One head of one row of qkv (rows, H + 2 HKV, DIM): queries (rows, H, DIM) get it rotated, the cache
    (2, batch, HKV, LENGTH, DIM) what is a key, rotated, or a value.

    Row r is of batch r // T, at positions[batch * step + r % T]; table (2, TABLE, DIM) is that of `rotary_table`.
    """
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch = row // T
    place = tl.load(positions + batch * step + row % T)
    d = tl.arange(0, DP)
    partner = tl.where(d < DIM // 2, d + DIM // 2, d - DIM // 2)
    held = d < DIM
    source = qkv + (row * (H + 2 * HKV) + head) * DIM
    x = tl.load(source + d, mask=held, other=0.0).to(tl.float32)
    if head < H + HKV:
        other = tl.load(source + partner, mask=held, other=0.0).to(tl.float32)
        cos = tl.load(table + place * DIM + d, mask=held, other=0.0).to(tl.float32)
        sin = tl.load(table + (TABLE + place) * DIM + d, mask=held, other=0.0).to(tl.float32)
        x = x * cos + other * sin
    if head < H:
        tl.store(queries + (row * H + head) * DIM + d, x.to(queries.dtype.element_ty), mask=held)
    else:
        part = (head - H) // HKV
        batches = tl.num_programs(0) // T
        slot = (part * batches + batch) * HKV + (head - H) % HKV
        tl.store(cache + (slot * LENGTH + place) * DIM + d, x.to(cache.dtype.element_ty), mask=held)


@triton.jit
def attend(
    queries,
    cache,
    valid,
    positions,
    shares,
    weights,
    T,
    step,
    HKV,
    LENGTH,
    MARKS,
    CHUNK,
    factor,
    visible,
    G: tl.constexpr,
    QP: tl.constexpr,
    DIM: tl.constexpr,
    DP: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The share of one part of the keys, for all queries of one head of the keys of one batch.

    A query sees a key that valid (batch, MARKS) does not mark False and that is no later than itself, and itself.
    shares (batch * HKV, parts, QP, DIM) and weights (2, batch * HKV, parts, QP): the greatest score and the sum.
    """
    pair, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    batch, group = pair // HKV, pair % HKV
    query = tl.arange(0, QP)
    real = query < G * T
    place = tl.load(positions + batch * step + query // G, mask=real, other=0)
    d = tl.arange(0, DP)
    held = d < DIM
    source = queries + ((batch * T + query // G) * HKV + group) * G * DIM + query % G * DIM
    q = tl.load(source[:, None] + d[None, :], mask=real[:, None] & held[None, :], other=0.0)
    base = cache + pair * LENGTH * DIM
    values = base + tl.num_programs(0).to(tl.int64) * LENGTH * DIM
    top = tl.full([QP], float("-inf"), tl.float32)
    total = tl.zeros([QP], tl.float32)
    out = tl.zeros([QP, DP], tl.float32)
    end = tl.minimum(tl.minimum((part + 1) * CHUNK, visible), tl.max(place, 0).to(tl.int32) + 1)
    for start in tl.range(part * CHUNK, end, KEYS, num_stages=2):
        key = start + tl.arange(0, KEYS)
        there = key < end
        k = tl.load(base + key[None, :] * DIM + d[:, None], mask=there[None, :] & held[:, None], other=0.0)
        scores = tl.dot(q, k, input_precision="ieee") * factor
        seen = tl.load(valid + batch * MARKS + key, mask=there, other=0) != 0
        allowed = ((key[None, :] <= place[:, None]) & seen[None, :] | (key[None, :] == place[:, None])) & there[None, :]
        scores = tl.where(allowed, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        shrunk = tl.exp(top - safe)
        share = tl.exp(scores - safe[:, None])
        total = total * shrunk + tl.sum(share, 1)
        v = tl.load(values + key[:, None] * DIM + d[None, :], mask=there[:, None] & held[None, :], other=0.0)
        out = out * shrunk[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        top = higher
    slot = (pair * tl.num_programs(1) + part) * QP
    tl.store(shares + (slot + query)[:, None] * DIM + d[None, :], out, mask=held[None, :])
    tl.store(weights + slot + query, top)
    tl.store(weights + tl.num_programs(0).to(tl.int64) * tl.num_programs(1) * QP + slot + query, total)


@triton.jit
def add_up(
    shares,
    weights,
    out,
    T,
    HKV,
    PARTS,
    PAIRS,
    G: tl.constexpr,
    QP: tl.constexpr,
    PP: tl.constexpr,
    DIM: tl.constexpr,
    DP: tl.constexpr,
):
    """out (rows, heads, DIM) of one row and head, from what `attend` gave."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = row // T * HKV + head // G
    part, d = tl.arange(0, PP), tl.arange(0, DP)
    held = d < DIM
    slot = (pair * PARTS + part) * QP + row % T * G + head % G
    top = tl.load(weights + slot, mask=part < PARTS, other=float("-inf"))
    total = tl.load(weights + PAIRS * PARTS * QP + slot, mask=part < PARTS, other=0.0)
    # A query sees itself, so that one part at least has a score; a NaN among them must reach the result.
    factor = tl.where(total == 0, 0.0, tl.exp(top - tl.max(top, 0)))
    share = tl.load(shares + slot[:, None] * DIM + d[None, :], mask=(part < PARTS)[:, None] & held[None, :], other=0.0)
    result = tl.sum(share * factor[:, None], 0) / tl.sum(total * factor, 0)
    tl.store(out + (row * HKV * G + head) * DIM + d, result.to(out.dtype.element_ty), mask=held)


def attention(
    qkv: Tensor, heads: int, table: Tensor, positions: Tensor, valid: Tensor, cache: Tensor, visible: int
) -> Tensor:
    """What `model.transformer.Attention` does between its projections, for qkv (batch, T, (heads + 2 kv) * dim):
    (batch * T, heads * dim).

    table (2, length, dim) is a `rotary_table`, positions (T,) or (batch, T), valid (batch, >= visible) False at left
    padding, and cache (2, batch, kv, length, dim) that of one layer, to which keys and values are written.
    """
    batch, length, _ = qkv.shape
    _, _, kv_heads, room, dim = cache.shape
    rows, groups, wide = batch * length, heads // kv_heads, max(16, power_of_two(dim))
    step = length if positions.ndim == 2 else 0
    queries = qkv.new_empty(rows, heads, dim)
    launch(
        rotate_and_write,
        (rows, heads + 2 * kv_heads),
        qkv,
        table,
        positions,
        queries,
        cache,
        length,
        step,
        heads,
        kv_heads,
        room,
        table.shape[1],
        DIM=dim,
        DP=wide,
        num_warps=1,
    )
    pairs, blocks = batch * kv_heads, -(-visible // KEYS)
    chunk = KEYS * -(-blocks // max(1, PROGRAMS // pairs))
    parts, padded = -(-visible // chunk), max(16, power_of_two(groups * length))
    shares = torch.empty(pairs, parts, padded, dim, device=qkv.device, dtype=torch.float32)
    weights = torch.empty(2, pairs, parts, padded, device=qkv.device, dtype=torch.float32)
    launch(
        attend,
        (pairs, parts),
        queries,
        cache,
        valid,
        positions,
        shares,
        weights,
        length,
        step,
        kv_heads,
        room,
        valid.stride(0),
        chunk,
        dim**-0.5,
        visible,
        G=groups,
        QP=padded,
        DIM=dim,
        DP=wide,
        KEYS=KEYS,
        num_warps=4,
    )
    out = qkv.new_empty(rows, heads * dim)
    launch(
        add_up,
        (rows, heads),
        shares,
        weights,
        out,
        length,
        kv_heads,
        parts,
        pairs,
        G=groups,
        QP=padded,
        PP=power_of_two(parts),
        DIM=dim,
        DP=wide,
        num_warps=1,
    )
    return out

"""Triton kernels of attention to rows that lists name, and of indexers (DeepSeek-V3.2 and V4).

A list is cut into parts of SHARE rows, whose sums are added up in order.  So a result depends on
the token's own list alone, and is the same whether a program takes all parts or each has a program;
to be compiled without contraction into multiply-adds, which could differ between the two.  Shapes:
T tokens, H heads, R width of a value, which a row begins with, P of what follows, L length of the
lists, S keys, J heads of an indexer, A width of its keys.
"""

import triton
import triton.language as tl

from slotmoe.quant.kernels.triton.mla import LOG2E, ROWS, added, scaled_queries

SHARE = tl.constexpr(128)
KEYS = tl.constexpr(64)  # keys that a program scores at a time


@triton.jit
def _part(
    latent, rope, factor, rows_ptr, more_ptr, held, list_ptr, first, L, R, P, ALIGNED: tl.constexpr
):  # fmt: skip
    """Best scores, total weights and sums over the SHARE rows from entry ``first`` of a list on."""
    best = tl.full([latent.shape[0]], float("-inf"), tl.float32)
    total = tl.full([latent.shape[0]], 0, tl.float32)
    sums = tl.full(latent.shape, 0, tl.float32)
    for start in range(first, tl.minimum(first + SHARE, L), ROWS):
        entry = start + tl.arange(0, ROWS)
        row = tl.load(list_ptr + entry, mask=entry < L, other=-1).to(tl.int64)
        row_ptr = rows_ptr + row * (R + P)
        if more_ptr is not None:
            others_ptr = more_ptr - held.to(tl.int64) * (R + P)
            row_ptr = tl.where(row < held, rows_ptr, others_ptr) + row * (R + P)
            row_ptr = tl.multiple_of(row_ptr, ALIGNED)  # which Triton forgets where it chooses
        best, total, sums = added(
            latent, rope, factor, row_ptr, row >= 0, (row >= 0)[None, :], R, P, best, total, sums
        )
    return best, total, sums


@triton.jit
def joined(best, total, sums, next_best, next_total, next_sums):
    """A part with the next one; either may have had no row."""
    better = tl.maximum(best, next_best)
    base = tl.where(better > float("-inf"), better, 0.0)
    decay, share = tl.exp2(best - base), tl.exp2(next_best - base)
    sums = sums * decay[:, None] + next_sums * share[:, None]
    return better, total * decay + next_total * share, sums


@triton.jit
def _finished(best, total, sums, sinks_ptr, head, H):
    """What all parts amount to, with the heads' sinks as rows of no value."""
    if sinks_ptr is not None:
        sinks = tl.load(sinks_ptr + head, mask=head < H, other=0.0) * LOG2E
        best, total, sums = joined(best, total, sums, sinks, 1.0, 0.0)
    return sums / total[:, None]


@triton.jit(do_not_specialize=["held", "L"])
def attend(
    q_ptr, rows_ptr, more_ptr, held, lists_ptr, L, scale, sinks_ptr, y_ptr, best_ptr, total_ptr, H,
    R, P, WHOLE: tl.constexpr, ALIGNED: tl.constexpr, HEADS: tl.constexpr, LATENT: tl.constexpr,
    ROPE: tl.constexpr,
):  # fmt: skip
    """HEADS heads of one token over rows of fp16: y [T, H, R] of q [T, H, R + P] if WHOLE.  Else of
    one part: y [T, H, parts, R], best score and total weight.

    Entries of ``lists`` [T, L] from ``held`` on are rows of ``more``; -1 is none.  Rows begin at
    multiples of ALIGNED bytes.
    """
    part, t, parts = tl.program_id(0), tl.program_id(2).to(tl.int64), (L + SHARE - 1) // SHARE
    head, r = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, LATENT)
    latent, rope, size = scaled_queries(q_ptr, t * H + head, head < H, R, P, LATENT, ROPE)
    factor, list_ptr = size * scale * LOG2E, lists_ptr + t * L
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.full([HEADS], 0, tl.float32)
    sums = tl.full([HEADS, LATENT], 0, tl.float32)
    for first in range(part * SHARE, L if WHOLE else (part + 1) * SHARE, SHARE):
        next_best, next_total, next_sums = _part(
            latent, rope, factor, rows_ptr, more_ptr, held, list_ptr, first, L, R, P, ALIGNED
        )
        best, total, sums = joined(best, total, sums, next_best, next_total, next_sums)
    at, valid = t * H + head, (head < H)[:, None] & (r < R)[None, :]
    if WHOLE:
        sums = _finished(best, total, sums, sinks_ptr, head, H)
    else:
        at = at * parts + part
        tl.store(best_ptr + at, best, mask=head < H)
        tl.store(total_ptr + at, total, mask=head < H)
    tl.store(y_ptr + at[:, None] * R + r[None, :], sums, mask=valid)


@triton.jit(do_not_specialize=["parts"])
def combine(
    part_ptr, best_ptr, total_ptr, parts, sinks_ptr, y_ptr, H, R,
    HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [T, H, R] of each token's parts."""
    t, head = tl.program_id(2).to(tl.int64), tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    r = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at, is_head = t * H + head, head < H
    valid = is_head[:, None] & (r < R)[None, :]
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.full([HEADS], 0, tl.float32)
    sums = tl.full([HEADS, COLUMNS], 0, tl.float32)
    for part in range(parts):
        row = at * parts + part
        best, total, sums = joined(
            best, total, sums,
            tl.load(best_ptr + row, mask=is_head, other=0.0),
            tl.load(total_ptr + row, mask=is_head, other=1.0),
            tl.load(part_ptr + row[:, None] * R + r[None, :], mask=valid, other=0.0),
        )  # fmt: skip
    y = _finished(best, total, sums, sinks_ptr, head, H)
    tl.store(y_ptr + at[:, None] * R + r[None, :], y, mask=valid)


@triton.jit(do_not_specialize=["S", "share"])
def scores(
    q_ptr, weights_ptr, keys_ptr, counts_ptr, y_ptr, S, share, J, A,
    HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y [T, S]: sums over the heads of weight [T, J] times query [T, J, A] times key where that is
    positive, for ``share`` fp16 keys a program; -inf from the token's count of keys on."""
    t, j, a = tl.program_id(1).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, WIDTH)
    q, _, size = scaled_queries(q_ptr, t * J + j, j < J, A, 0, WIDTH, 16)
    weights = tl.load(weights_ptr + t * J + j, mask=j < J, other=0.0) * size
    count, first = tl.load(counts_ptr + t), tl.program_id(0) * share
    for start in range(first, tl.minimum(first + share, S), KEYS):
        s = start + tl.arange(0, KEYS)
        key_ptr = keys_ptr + s.to(tl.int64)[:, None] * A + a[None, :]
        k = tl.load(key_ptr, mask=(s < count)[:, None] & (a < A)[None, :], other=0.0)
        products = tl.maximum(tl.dot(q, tl.trans(k)), 0.0)
        y = tl.sum(products * weights[:, None], 0)
        tl.store(y_ptr + t * S + s, tl.where(s < count, y, float("-inf")), mask=s < S)

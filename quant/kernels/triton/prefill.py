"""Triton kernels of absorbed Multi-head Latent Attention, several tokens over a latent cache.

Attention takes ROWS rows of the queries [T * H, R + P], the heads of one token after those of
another, over the fp16 latent rows, KEYS of them at a time.  Each is loaded once: it is a key, and
its first R columns are a value (flash attention, arXiv 2205.14135).  These products are of fp16,
those with kv_b of bfloat16; sums are float32.

Where there are few tiles of rows, programs share a context.  A result depends on T, H and S beside
its own operands, never on what finishes first.  Shapes as in ``mla``; kv_b is [H * (N + V), R].
"""

import triton
import triton.language as tl

from slotmoe.quant.kernels.triton.lists import joined
from slotmoe.quant.kernels.triton.mla import LOG2E, added, scaled_queries
from slotmoe.quant.kernels.triton.tiles import product, rounded

ROWS = tl.constexpr(32)
KEYS = tl.constexpr(32)


@triton.jit(do_not_specialize=["T"])
def absorb_query(
    q_ptr, pitch, w_ptr, scale_ptr, y_ptr, T, H, N, X, R,
    SCALED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y [T, H, R] = each head's q times its first N of X rows of kv_b; of q, heads are ``pitch``
    apart and tokens H of these."""
    r, head = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    t = tl.program_id(2) * BM + tl.arange(0, BM)
    row, total = t.to(tl.int64) * H + head, tl.full([BM, BN], 0, tl.float32)
    for start in range(0, N, 32):
        n = start + tl.arange(0, 32)
        at = head * X + n
        valid = (t < T)[:, None] & (n < N)[None, :]
        q = tl.load(q_ptr + (row * pitch)[:, None] + n[None, :], mask=valid, other=0.0)
        if SCALED:
            q *= tl.load(scale_ptr + at, mask=n < N, other=0.0)[None, :]
        valid = (n < N)[:, None] & (r < R)[None, :]
        w = tl.load(w_ptr + at[:, None] * R + r[None, :], mask=valid, other=0).to(tl.float32)
        total += tl.dot(rounded(q, WIDEN), rounded(w, WIDEN))
    valid = (t < T)[:, None] & (r < R)[None, :]
    tl.store(y_ptr + (row * R)[:, None] + r[None, :], total, mask=valid)


@triton.jit(do_not_specialize=["T"])
def absorb_value(
    o_ptr, w_ptr, scale_ptr, y_ptr, T, H, N, V, R,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y [T, H, V] = each head's o [T, H, R] through its last V rows of kv_b."""
    v, head = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1)
    t = tl.program_id(2) * BM + tl.arange(0, BM)
    row, n = t.to(tl.int64) * H + head, head * (N + V) + N + v
    y = product(o_ptr, row, t < T, w_ptr, scale_ptr, None, n, H * (N + V), R, KIND, WIDEN)
    valid = (t < T)[:, None] & (v < V)[None, :]
    tl.store(y_ptr + (row * V)[:, None] + v[None, :], y, mask=valid)


@triton.jit
def _store(y_ptr, row, valid, R, total, sums, WIDEN: tl.constexpr):
    """Rows of y, bfloat16, as ``absorb_value`` rounds them."""
    r = tl.arange(0, sums.shape[1])
    y = rounded(sums / total[:, None], WIDEN).to(tl.bfloat16)
    tl.store(y_ptr + (row * R)[:, None] + r[None, :], y, mask=valid[:, None] & (r < R)[None, :])


@triton.jit(do_not_specialize=["S", "T"])
def attend(
    q_ptr, rows_ptr, S, scale, part_ptr, best_ptr, total_ptr, finished_ptr, y_ptr, T, H, R,
    P, LATENT: tl.constexpr, ROPE: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y bfloat16 [T, H, R]: causal attention of the last T of S positions.  Programs that share a
    context leave parts [T, H, splits, R], best scores and total weights; the one of a tile that
    finishes last adds them up in order.  ``finished`` [tiles] is 0 before and after."""
    split, tile, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    row = tile * ROWS + tl.arange(0, ROWS)
    valid, last, row = row < T * H, S - T + row // H, row.to(tl.int64)
    latent, rope, size = scaled_queries(q_ptr, row, valid, R, P, LATENT, ROPE)
    factor = size * scale * LOG2E
    best = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0, tl.float32)
    sums = tl.full([ROWS, LATENT], 0, tl.float32)
    share = (S + splits * KEYS - 1) // (splits * KEYS) * KEYS
    stop = tl.minimum(S, S - T + (tile * ROWS + ROWS - 1) // H + 1)  # of what the tile sees
    stop = tl.minimum(stop, (split + 1) * share)
    for first in tl.range(split * share, stop, KEYS, num_stages=2):
        s = first + tl.arange(0, KEYS)
        row_ptr, seen = rows_ptr + s.to(tl.int64) * (R + P), s[None, :] <= last[:, None]
        best, total, sums = added(
            latent, rope, factor, row_ptr, s < stop, seen, R, P, best, total, sums
        )
    if splits == 1:
        _store(y_ptr, row, valid, R, total, sums, WIDEN)
    else:
        at, r = row * splits, tl.arange(0, LATENT)
        columns = valid[:, None] & (r < R)[None, :]
        tl.store(part_ptr + ((at + split) * R)[:, None] + r[None, :], sums, mask=columns)
        tl.store(best_ptr + at + split, best, mask=valid)
        tl.store(total_ptr + at + split, total, mask=valid)
        tl.debug_barrier()  # all threads have stored before one of them says so
        if tl.atomic_add(finished_ptr + tile, 1, sem="acq_rel") == splits - 1:
            tl.store(finished_ptr + tile, 0)
            best = tl.full([ROWS], float("-inf"), tl.float32)
            total = tl.full([ROWS], 0, tl.float32)
            sums = tl.full([ROWS, LATENT], 0, tl.float32)
            for part in range(splits):
                best, total, sums = joined(
                    best, total, sums,
                    tl.load(best_ptr + at + part, mask=valid, other=0.0),
                    tl.load(total_ptr + at + part, mask=valid, other=1.0),
                    tl.load(part_ptr + ((at + part) * R)[:, None] + r, mask=columns, other=0.0),
                )  # fmt: skip
            _store(y_ptr, row, valid, R, total, sums, WIDEN)

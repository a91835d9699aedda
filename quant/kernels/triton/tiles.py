"""Triton kernels for many tokens: matrix products on tensor cores, weights decoded in registers.

A program makes BM rows by BN columns of a product, 64 weights of a row at a time: bfloat16
operands, float32 sums.  A row's result does not depend on the rows beside it.  Grouped products
take rows of many groups at once, each group with a weight of its own.  WIDEN: round to bfloat16 but
hold and multiply as float32, which is the same; Triton's interpreter multiplies no bfloat16 and
cuts off what should be rounded.
"""

import triton
import triton.language as tl

from slotmoe.quant.kernels.triton.mla import LOG2E, added, scaled_queries
from slotmoe.quant.kernels.triton.rows import (
    DENSE,
    INT8,
    LUT3,
    LUT4,
    code_shift,
    code_words,
    row_factors,
    scale_numbers,
    stored_scales,
    swiglu,
)
from slotmoe.quant.kernels.triton.v4 import joined


@triton.jit
def rounded(x, WIDEN: tl.constexpr):
    """To bfloat16, to the nearest, and of equals to the even one."""
    if WIDEN:
        bits = x.to(tl.float32).to(tl.int32, bitcast=True)
        y = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.bfloat16)
    return y


@triton.jit
def _weights(w_ptr, scale_ptr, levels_ptr, n, start, N, K, KIND: tl.constexpr, BN: tl.constexpr):
    """Columns ``start`` to ``start + 63`` of rows n, float32 [BN, 64], without their factors."""
    if (KIND != INT8) & (KIND != DENSE):
        MASK: tl.constexpr = 7 if KIND == LUT3 else 15
        blocks, block, eight = (K + 63) // 64, start // 64, tl.arange(0, 8)
        # A scale for each word: fewer scales than threads would be loaded by every thread that
        # needs some of them, into more registers than there are.
        n, word = tl.broadcast(n[:, None], eight[None, :])
        tile, lane, valid = n // 16, n % 16, n >= 0
        words = code_words(w_ptr, (tile * blocks + block) * 8 + word, lane, valid, KIND)
        codes = (words[:, :, None] >> code_shift(eight, KIND)[None, None, :]) & MASK
        scales = stored_scales(scale_ptr, tile, block, word // 4, blocks, lane, valid, KIND)
        w = tl.load(levels_ptr + codes) * scale_numbers(scales, KIND)[:, :, None]
        w = tl.reshape(w, [BN, 64])
    else:
        k = start + tl.arange(0, 64)
        inside = (n < N)[:, None] & (k < K)[None, :]
        w = tl.load(w_ptr + n[:, None] * K + k[None, :], mask=inside, other=0).to(tl.float32)
    return w


@triton.jit
def product(
    x_ptr, row, valid, w_ptr, scale_ptr, levels_ptr, n, N, K,
    KIND: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """Rows ``row`` of x [., K] where ``valid``, times rows n of the weight: float32 [BM, BN]."""
    BM: tl.constexpr = row.shape[0]
    BN: tl.constexpr = n.shape[0]
    CODED: tl.constexpr = (KIND != INT8) & (KIND != DENSE)
    if CODED:  # past their tiles any weights will do
        n = tl.minimum(n, (N + 15) // 16 * 16 - 1)
    total = tl.full([BM, BN], 0, tl.float32)
    x_ptr += row.to(tl.int64)[:, None] * K
    # Loads ahead would go through shared memory, single levels too: for codes the other programs of
    # a processor hide the wait.
    STAGES: tl.constexpr = 1 if CODED else 3
    for start in tl.range(0, K, 64, num_stages=STAGES):
        k = start + tl.arange(0, 64)
        x = tl.load(x_ptr + k[None, :], mask=valid[:, None] & (k < K)[None, :], other=0.0)
        w = _weights(w_ptr, scale_ptr, levels_ptr, n, start, N, K, KIND, BN)
        total += tl.dot(rounded(x, WIDEN), tl.trans(rounded(w, WIDEN)))
    if KIND == INT8:
        total *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[None, :]
    elif (KIND == LUT3) | (KIND == LUT4):
        total *= row_factors(scale_ptr, n // 16, (K + 63) // 64, n % 16, KIND)[None, :]
    return total


@triton.jit
def _gate_up(
    x_ptr, row, valid, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, levels_ptr, n, N, K,
    KIND: tl.constexpr, LIMIT: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    gate = product(x_ptr, row, valid, gate_ptr, gate_scale_ptr, levels_ptr, n, N, K, KIND, WIDEN)
    up = product(x_ptr, row, valid, up_ptr, up_scale_ptr, levels_ptr, n, N, K, KIND, WIDEN)
    return rounded(swiglu(gate, up, LIMIT), WIDEN).to(tl.bfloat16)


@triton.jit
def _store(y_ptr, row, valid, n, N, y):
    """Into columns n of rows ``row`` of y [., N], where ``valid``."""
    y_ptr += row.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y_ptr, y, mask=valid[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["T"])
def linear(
    x_ptr, w_ptr, scale_ptr, levels_ptr, y_ptr, T, N, K,
    KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y [T, N] = x [T, K] times the weight."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    y = product(x_ptr, t, t < T, w_ptr, scale_ptr, levels_ptr, n, N, K, KIND, WIDEN)
    _store(y_ptr, t, t < T, n, N, y)


@triton.jit(do_not_specialize=["T"])
def gate_up(
    x_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, levels_ptr, y_ptr, T, N, K,
    KIND: tl.constexpr, LIMIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y bfloat16 [T, N] = silu(gate x) * (up x)."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    t = tl.program_id(1) * BM + tl.arange(0, BM)
    y = _gate_up(
        x_ptr, t, t < T, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, levels_ptr, n, N, K,
        KIND, LIMIT, WIDEN,
    )  # fmt: skip
    _store(y_ptr, t, t < T, n, N, y)


@triton.jit
def _group_of(starts_ptr, tile, G, GROUPS: tl.constexpr, BM: tl.constexpr):
    """The group of the ``tile``-th tile of BM rows (G: none), its first row, the group's end."""
    g = tl.arange(0, GROUPS)
    start = tl.load(starts_ptr + g, mask=g < G, other=0)
    size = tl.load(starts_ptr + 1 + g, mask=g < G, other=0) - start
    tiles = (size + BM - 1) // BM
    group = tl.sum(tl.where((tl.cumsum(tiles, 0) <= tile) & (g < G), 1, 0), 0)
    before = tl.sum(tl.where(g < group, tiles, 0), 0)
    first = tl.sum(tl.where(g == group, start, 0), 0) + (tile - before) * BM
    stop = tl.sum(tl.where(g == group, start + size, 0), 0)
    return group, first, stop


@triton.jit(do_not_specialize=["G"])
def experts_gate_up(
    x_ptr, order_ptr, TOP_K, starts_ptr, slots_ptr, G, slab_ptr, levels_ptr, y_ptr, N, K,
    record_bytes, up_at, gate_scales_at, up_scales_at, KIND: tl.constexpr, LIMIT: tl.constexpr,
    GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y bfloat16 [T * TOP_K, N] = silu(gate x) * (up x), in groups of uses of one expert.

    Row i is use ``order[i]``, which is token * TOP_K + rank.  Group g's rows begin at ``starts[g]``
    and its expert's record is row ``slots[g]`` of the slab; a group whose slot is -1 is left out.
    """
    group, first, stop = _group_of(starts_ptr, tl.program_id(1), G, GROUPS, BM)
    slot = tl.load(slots_ptr + group, mask=group < G, other=-1)
    if slot >= 0:
        gate_ptr = slab_ptr + slot.to(tl.int64) * record_bytes
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = first + tl.arange(0, BM)
        valid = row < stop
        token = tl.load(order_ptr + row, mask=valid, other=0) // TOP_K
        y = _gate_up(
            x_ptr, token, valid, gate_ptr, gate_ptr + gate_scales_at, gate_ptr + up_at,
            gate_ptr + up_scales_at, levels_ptr, n, N, K, KIND, LIMIT, WIDEN,
        )  # fmt: skip
        _store(y_ptr, row, valid, n, N, y)


@triton.jit(do_not_specialize=["G"])
def experts_down(
    x_ptr, order_ptr, starts_ptr, slots_ptr, G, slab_ptr, levels_ptr, y_ptr, N, K,
    record_bytes, down_at, down_scales_at, KIND: tl.constexpr,
    GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WIDEN: tl.constexpr,
):  # fmt: skip
    """y [T * TOP_K, N] = down x, in the same groups: row i of x gives row ``order[i]`` of y."""
    group, first, stop = _group_of(starts_ptr, tl.program_id(1), G, GROUPS, BM)
    slot = tl.load(slots_ptr + group, mask=group < G, other=-1)
    if slot >= 0:
        record_ptr = slab_ptr + slot.to(tl.int64) * record_bytes
        codes_ptr, scales_ptr = record_ptr + down_at, record_ptr + down_scales_at
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        row = first + tl.arange(0, BM)
        valid = row < stop
        y = product(x_ptr, row, valid, codes_ptr, scales_ptr, levels_ptr, n, N, K, KIND, WIDEN)
        _store(y_ptr, tl.load(order_ptr + row, mask=valid, other=0), valid, n, N, y)


# Absorbed Multi-head Latent Attention, several tokens over a latent cache.
#
# Attention takes ROWS rows of the queries [T * H, R + P], the heads of one token after those of
# another, over the fp16 latent rows, KEYS of them at a time.  Each is loaded once: it is a key, and
# its first R columns are a value (flash attention, arXiv 2205.14135).  These products are of fp16,
# those with kv_b of bfloat16; sums are float32.
#
# Where there are few tiles of rows, programs share a context.  A result depends on T, H and S
# beside its own operands, never on what finishes first.  Shapes as in ``mla``; kv_b is
# [H * (N + V), R].

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
def _store_latents(y_ptr, row, valid, R, total, sums, WIDEN: tl.constexpr):
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
        _store_latents(y_ptr, row, valid, R, total, sums, WIDEN)
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
            _store_latents(y_ptr, row, valid, R, total, sums, WIDEN)

"""Triton kernels of DeepSeek-V3.2 and V4: attention to rows that lists name, and indexers; of V4
also hyper-connections, Q residual streams of D values a token, and compressed rows, in float32,
each row the same alone or among others.

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
SLICE = tl.constexpr(512)  # of Q * D values, which a program takes
TOKENS = tl.constexpr(4)  # that read the same weights


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


@triton.jit
def _summed(part_ptr, pieces, pitch, valid):
    """The sum over pieces, past the first-level cache: other programs have written them."""
    total = tl.load(part_ptr, mask=valid, other=0.0, cache_modifier=".cg")
    for i in range(1, pieces):
        total += tl.load(part_ptr + i * pitch, mask=valid, other=0.0, cache_modifier=".cg")
    return total


@triton.jit(do_not_specialize=["T"])
def mix(
    h_ptr, fn_ptr, scale_ptr, base_ptr, part_ptr, finished_ptr, x_ptr, post_ptr, comb_ptr, T, D, Q,
    N, iterations, eps, small, STREAMS: tl.constexpr, OUTS: tl.constexpr,
):  # fmt: skip
    """x [T, D], what a block or (without ``post``) the head reads of the streams h [T, Q, D]; post
    [T, Q] and comb [T, Q, Q], how they take in what it gives.

    A program makes, for TOKENS tokens, one piece of the products with fn [N, Q * D] and of the
    squares' sum: ``part`` [T, pieces, N + 1].  The one of them that finishes last adds them up and
    mixes the streams.  ``finished`` [tokens / TOKENS] is 0 before and after.
    """
    piece, block, pieces, K = tl.program_id(0), tl.program_id(1), tl.num_programs(0), Q * D
    token, n, i = tl.arange(0, TOKENS), tl.arange(0, OUTS), tl.arange(0, STREAMS)
    t = (block * TOKENS + token).to(tl.int64)
    is_token, is_out, is_stream = (t < T)[:, None], (n < N)[:, None], (i < Q)[None, :]
    total = tl.full([TOKENS, OUTS, 64], 0, tl.float32)
    squares = tl.full([TOKENS, 64], 0, tl.float32)
    for start in range(piece * SLICE, tl.minimum((piece + 1) * SLICE, K), 64):
        k = (start + tl.arange(0, 64))[None, :]
        x = tl.load(h_ptr + (t * K)[:, None] + k, mask=is_token & (k < K), other=0.0)
        w = tl.load(fn_ptr + n[:, None] * K + k, mask=is_out & (k < K), other=0.0)
        total += x[:, None, :] * w[None, :, :]
        squares += x * x
    row_ptr, pitch = (part_ptr + t * pieces * (N + 1))[:, None], N + 1
    own_ptr = row_ptr + piece * pitch
    tl.store(own_ptr + n[None, :], tl.sum(total, 2), mask=is_token & (n < N)[None, :])
    tl.store(own_ptr + N, tl.sum(squares, 1, keep_dims=True), mask=is_token)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(finished_ptr + block, 1, sem="acq_rel") == pieces - 1:
        tl.store(finished_ptr + block, 0)
        factor = 1 / tl.sqrt(_summed(row_ptr + N, pieces, pitch, is_token) / K + eps)
        valid, pre_ptr, i_ptr = is_token & is_stream, row_ptr + i[None, :], base_ptr + i[None, :]
        pre = _summed(pre_ptr, pieces, pitch, valid) * factor * tl.load(scale_ptr)
        pre = tl.sigmoid(pre + tl.load(i_ptr, mask=is_stream, other=0.0)) + small
        if post_ptr is not None:
            post = _summed(pre_ptr + Q, pieces, pitch, valid) * factor * tl.load(scale_ptr + 1)
            post = 2 * tl.sigmoid(post + tl.load(i_ptr + Q, mask=is_stream, other=0.0))
            tl.store(post_ptr + (t * Q)[:, None] + i[None, :], post, mask=valid)
            # What is beyond Q streams becomes 0, and stays so, as ``small`` is not.
            at, is_pair = (i * Q)[None, :, None] + i[None, None, :], valid[:, :, None] & (i < Q)
            pair_ptr = (part_ptr + t * pieces * pitch)[:, None, None] + 2 * Q + at
            comb = _summed(pair_ptr, pieces, pitch, is_pair) * factor[:, :, None]
            comb = comb * tl.load(scale_ptr + 2)
            comb += tl.load(base_ptr + 2 * Q + at, mask=is_stream[:, :, None] & (i < Q), other=0.0)
            comb = tl.where(i < Q, comb, float("-inf"))
            comb = tl.exp(comb - tl.max(comb, 2, keep_dims=True))
            comb = tl.where(is_pair, comb / tl.sum(comb, 2, keep_dims=True) + small, 0.0)
            comb = comb / (tl.sum(comb, 1, keep_dims=True) + small)
            for _ in range(1, iterations):
                comb = comb / (tl.sum(comb, 2, keep_dims=True) + small)
                comb = comb / (tl.sum(comb, 1, keep_dims=True) + small)
            tl.store(comb_ptr + (t * Q * Q)[:, None, None] + at, comb, mask=is_pair)
        for which in range(tl.minimum(TOKENS, T - block * TOKENS)):
            shares = tl.sum(tl.where((token == which)[:, None], pre, 0.0), 0)[:, None]
            one = (block * TOKENS + which).to(tl.int64)
            for start in range(0, D, 1024):
                d = start + tl.arange(0, 1024)
                h_at, held = (i * D)[:, None] + d[None, :], (i < Q)[:, None] & (d < D)[None, :]
                h = tl.load(h_ptr + one * K + h_at, mask=held, other=0.0)
                tl.store(x_ptr + one * D + d, tl.sum(h * shares, 0), mask=d < D)


@triton.jit
def add_mixed(
    y_ptr, h_ptr, post_ptr, comb_ptr, out_ptr, D, Q, STREAMS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """out [T, Q, D]: comb [T, Q, Q], transposed, times h [T, Q, D], and post [T, Q] times y."""
    t, i = tl.program_id(1).to(tl.int64), tl.arange(0, STREAMS)
    d, is_stream = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), (i < Q)[:, None]
    place, valid = t * Q * D + (i * D)[:, None] + d[None, :], is_stream & (d < D)[None, :]
    h = tl.load(h_ptr + place, mask=valid, other=0.0)
    pair_ptr = comb_ptr + t * Q * Q + (i * Q)[:, None] + i[None, :]
    comb = tl.load(pair_ptr, mask=is_stream & (i < Q)[None, :], other=0.0)
    post = tl.load(post_ptr + t * Q + i, mask=i < Q, other=0.0)
    y = tl.load(y_ptr + t * D + d, mask=d < D, other=0.0)
    out = tl.sum(comb[:, :, None] * h[:, None, :], 0) + post[:, None] * y[None, :]
    tl.store(out_ptr + place, out, mask=valid)


@triton.jit
def compress(
    kv_ptr, kv_pitch, kv_row, gate_ptr, gate_pitch, gate_row, bias_ptr, y_ptr, S, Y,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y [B, Y]: means of kv [B, S, Y], weighted by each column's softmax of gate + bias [S, Y]."""
    b, s = tl.program_id(1).to(tl.int64), tl.arange(0, ROWS)[:, None]
    y = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    valid = (s < S) & (y < Y)
    gate = tl.load(gate_ptr + b * gate_pitch + s * gate_row + y, mask=valid, other=0.0)
    gate += tl.load(bias_ptr + s * Y + y, mask=valid, other=0.0)
    gate = tl.where(s < S, gate, float("-inf"))
    kv = tl.load(kv_ptr + b * kv_pitch + s * kv_row + y, mask=valid, other=0.0)
    weights = tl.exp(gate - tl.max(gate, 0, keep_dims=True))
    mean = tl.sum(weights * kv, 0, keep_dims=True) / tl.sum(weights, 0, keep_dims=True)
    tl.store(y_ptr + b * Y + y, mean, mask=y < Y)

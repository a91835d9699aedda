"""Triton kernels of hyper-connections (Q residual streams of D values a token) and of compressed
rows (DeepSeek-V4), in float32.  Each row's result is the same alone or among others."""

import triton
import triton.language as tl

SLICE = tl.constexpr(512)  # of Q * D values, which a program takes
TOKENS = tl.constexpr(4)  # that read the same weights


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

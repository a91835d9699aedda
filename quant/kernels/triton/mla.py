"""Triton kernels of absorbed Multi-head Latent Attention, a few tokens over a long latent cache.

The context is split over programs (flash decoding).  The split depends on the context's length
alone, so a result does not change with anything else.  Keys and values are the fp16 latent rows
themselves.  Where a kernel takes ``location`` (int64 [3, TOKENS] on the device: each token's
position, the address of its sequence's latent cache, and the bytes of a ``layer`` in that), one
captured graph serves every position, sequence and size of cache.  Shapes: T tokens, H
heads, N and V width of a head's unrotated query and value, P of its rotated part, R latent,
X = N + V.
"""

import triton
import triton.language as tl

from slotmoe.quant import shapes
from slotmoe.quant.shapes import FEW_ROWS

TOKENS = tl.constexpr(FEW_ROWS)  # a decoder's at most
SPLITS = tl.constexpr(shapes.SPLITS)  # at most so many programs share a context
ROWS = tl.constexpr(32)  # latent rows that a program takes at a time
LOG2E = tl.constexpr(1.4426950408889634)  # weights are powers of two


@triton.jit
def _split(length):
    """Rows that one program takes, a multiple of ROWS, and how many programs have any."""
    rows = (length + SPLITS * ROWS - 1) // (SPLITS * ROWS) * ROWS
    return rows, (length + rows - 1) // rows


@triton.jit
def _located(location_ptr, t, layer):
    """A token's position, and the first row of a layer in its sequence's cache."""
    location_ptr += t
    address = tl.load(location_ptr + TOKENS) + layer * tl.load(location_ptr + 2 * TOKENS)
    rows_ptr = tl.multiple_of(address.to(tl.pointer_type(tl.float16)), 16)
    return tl.load(location_ptr), rows_ptr


@triton.jit
def _pairs(P, HALVES: tl.constexpr, PAIRS: tl.constexpr):
    """Where the two values of each rotated pair stand: side by side, or in two halves."""
    i = tl.arange(0, PAIRS)
    if HALVES:
        return i, i + P // 2
    return 2 * i, 2 * i + 1


@triton.jit
def _rotated(x_ptr, factor, rope_ptr, P, HALVES: tl.constexpr, PAIRS: tl.constexpr):
    """Both values of each pair of factor * x, times the complex table [P / 2]."""
    i = tl.arange(0, PAIRS)
    valid = i < P // 2
    first, second = _pairs(P, HALVES, PAIRS)
    real = tl.load(x_ptr + first, mask=valid, other=0.0) * factor
    imaginary = tl.load(x_ptr + second, mask=valid, other=0.0) * factor
    c = tl.load(rope_ptr + 2 * i, mask=valid, other=0.0)
    s = tl.load(rope_ptr + 2 * i + 1, mask=valid, other=0.0)
    return real * c - imaginary * s, real * s + imaginary * c


@triton.jit
def _saturated(x):
    """To float16, the largest instead of infinity."""
    return tl.clamp(x, -65504.0, 65504.0).to(tl.float16)


@triton.jit
def _absorbed(
    q_ptr, factor, w_ptr, scale_ptr, first, r, N, R, SCALED: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Columns r of the sum over n of factor * q[n] * kv_b[first + n]."""
    n = tl.arange(0, WIDTH)
    q = tl.load(q_ptr + n, mask=n < N, other=0.0) * factor
    if SCALED:
        q *= tl.load(scale_ptr + first + n, mask=n < N, other=0.0)
    valid = (n < N)[:, None] & (r < R)[None, :]
    w = tl.load(w_ptr + (first + n)[:, None] * R + r[None, :], mask=valid, other=0)
    return tl.sum(w.to(tl.float32) * q[:, None], 0)


@triton.jit(do_not_specialize=["layer"])
def queries(
    q_ptr, Q, c_ptr, C, rope_ptr, factor_ptr, norm_ptr, eps, w_ptr, scale_ptr, location_ptr, layer,
    y_ptr, H, N, P, R, X,
    SCALED: tl.constexpr, HALVES: tl.constexpr, WIDTH: tl.constexpr, BR: tl.constexpr,
    LATENT: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """From each token's projections q [H * (N + P)], times factor [T], and c [R + P], which stand Q
    and C values behind those of the token before: each head's absorbed query and rotated part into
    y [T, H, R + P]; the last head's program norms the latent, rotates the key and writes both into
    the cache."""
    t, block, head = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    W = R + P
    q_ptr += t * Q
    c_ptr += t * C
    rope_ptr += t * P
    y_ptr += t * H * W
    pair = tl.arange(0, PAIRS) < P // 2
    real, imaginary = _pairs(P, HALVES, PAIRS)
    if head < H:
        factor = tl.load(factor_ptr + t)
        r = block * BR + tl.arange(0, BR)
        q_ptr += head * (N + P)
        y = _absorbed(q_ptr, factor, w_ptr, scale_ptr, head * X, r, N, R, SCALED, WIDTH)
        tl.store(y_ptr + head * W + r, y, mask=r < R)
        if block == 0:
            first, second = _rotated(q_ptr + N, factor, rope_ptr, P, HALVES, PAIRS)
            y_ptr += head * W + R
            tl.store(y_ptr + real, first, mask=pair)
            tl.store(y_ptr + imaginary, second, mask=pair)
    elif block == 0:
        position, rows_ptr = _located(location_ptr, t, layer)
        row_ptr = rows_ptr + position * W
        r = tl.arange(0, LATENT)
        c = tl.load(c_ptr + r, mask=r < R, other=0.0)
        c = c / tl.sqrt(tl.sum(c * c, 0) / R + eps) * tl.load(norm_ptr + r, mask=r < R, other=0.0)
        first, second = _rotated(c_ptr + R, 1.0, rope_ptr, P, HALVES, PAIRS)
        tl.store(row_ptr + r, _saturated(c), mask=r < R)
        tl.store(row_ptr + R + real, _saturated(first), mask=pair)
        tl.store(row_ptr + R + imaginary, _saturated(second), mask=pair)


@triton.jit
def scaled_queries(q_ptr, at, valid, R, P, LATENT: tl.constexpr, ROPE: tl.constexpr):
    """Rows ``at`` of q [., R + P] where ``valid``, their first R and last P values, and what both
    are to be multiplied by: they are scaled to at most 1, so that no size overflows fp16."""
    r, p = tl.arange(0, LATENT), tl.arange(0, ROPE)
    row_ptr = q_ptr + at[:, None] * (R + P)
    valid = valid[:, None]
    latent = tl.load(row_ptr + r[None, :], mask=valid & (r < R)[None, :], other=0.0)
    rope = tl.load(row_ptr + R + p[None, :], mask=valid & (p < P)[None, :], other=0.0)
    size = tl.maximum(tl.max(tl.abs(latent), 1), tl.max(tl.abs(rope), 1))
    size = tl.where(size > 0, size, 1.0)
    latent = (latent / size[:, None]).to(tl.float16)
    return latent, (rope / size[:, None]).to(tl.float16), size


@triton.jit
def added(latent, rope, factor, row_ptr, valid, seen, R, P, best, total, sums):
    """A softmax's best score, total weight and sums with the ``valid`` rows added that a query has
    ``seen`` [., rows]; there may be none."""
    r, p = tl.arange(0, latent.shape[1]), tl.arange(0, rope.shape[1])
    row_ptr = row_ptr[:, None]
    c = tl.load(row_ptr + r[None, :], mask=valid[:, None] & (r < R)[None, :], other=0.0)
    k = tl.load(row_ptr + R + p[None, :], mask=valid[:, None] & (p < P)[None, :], other=0.0)
    scores = (tl.dot(latent, tl.trans(c)) + tl.dot(rope, tl.trans(k))) * factor[:, None]
    scores = tl.where(valid[None, :] & seen, scores, float("-inf"))
    better = tl.maximum(best, tl.max(scores, 1))
    base = tl.where(better > float("-inf"), better, 0.0)
    decay, weights = tl.exp2(best - base), tl.exp2(scores - base[:, None])
    total = total * decay + tl.sum(weights, 1)
    sums = sums * decay[:, None] + tl.dot(weights.to(tl.float16), c)
    return better, total, sums


@triton.jit(do_not_specialize=["layer"])
def attend(
    q_ptr, location_ptr, layer, scale, part_ptr, best_ptr, total_ptr, H, R, P,
    HEADS: tl.constexpr, LATENT: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """One split of the context for HEADS heads of one token: unnormalised sums [T, H, SPLITS, R],
    best score and total weight."""
    split, t = tl.program_id(0), tl.program_id(2)
    position, rows_ptr = _located(location_ptr, t, layer)
    length = (position + 1).to(tl.int32)
    share, splits = _split(length)
    if split < splits:
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
        r = tl.arange(0, LATENT)
        latent, rope, size = scaled_queries(q_ptr, t * H + head, head < H, R, P, LATENT, ROPE)
        factor = size * scale * LOG2E
        best = tl.full([HEADS], float("-inf"), tl.float32)
        total = tl.full([HEADS], 0, tl.float32)
        sums = tl.full([HEADS, LATENT], 0, tl.float32)
        stop = tl.minimum(length, (split + 1) * share)
        for first in range(split * share, stop, ROWS):
            s = first + tl.arange(0, ROWS)
            row_ptr = rows_ptr + s.to(tl.int64) * (R + P)
            valid = s < stop
            best, total, sums = added(
                latent, rope, factor, row_ptr, valid, valid[None, :], R, P, best, total, sums
            )
        at = (t * H + head) * SPLITS + split
        valid = (head < H)[:, None] & (r < R)[None, :]
        tl.store(part_ptr + at[:, None] * R + r[None, :], sums, mask=valid)
        tl.store(best_ptr + at, best, mask=head < H)
        tl.store(total_ptr + at, total, mask=head < H)


@triton.jit
def _combined(part_ptr, best_ptr, total_ptr, at, splits, r, R):
    """What the splits from row ``at`` on amount to: columns r of the latent output."""
    i = tl.arange(0, SPLITS)
    best = tl.load(best_ptr + at + i, mask=i < splits, other=float("-inf"))
    greatest = tl.max(best, 0)
    totals = tl.load(total_ptr + at + i, mask=i < splits, other=0.0)
    total = tl.sum(totals * tl.exp2(best - greatest), 0)
    out = r.to(tl.float32) * 0
    for first in range(0, splits, 8):
        j = first + tl.arange(0, 8)
        bests = tl.load(best_ptr + at + j, mask=j < splits, other=float("-inf"))
        valid = (j < splits)[:, None] & (r < R)[None, :]
        part = tl.load(part_ptr + (at + j)[:, None] * R + r[None, :], mask=valid, other=0.0)
        out += tl.sum(part * tl.exp2(bests - greatest)[:, None], 0)
    return out / total


@triton.jit
def values(
    part_ptr, best_ptr, total_ptr, location_ptr, w_ptr, scale_ptr, y_ptr, H, N, V, R,
    SCALED: tl.constexpr, LATENT: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y [T, H, V] = each head's latent output, of the splits of a token's context, through its last
    V rows of kv_b."""
    t, head = tl.program_id(0), tl.program_id(2)
    r = tl.arange(0, LATENT)
    _, splits = _split((tl.load(location_ptr + t) + 1).to(tl.int32))
    o = _combined(part_ptr, best_ptr, total_ptr, (t * H + head) * SPLITS, splits, r, R)
    o = tl.where(r < R, o, 0.0)
    v = tl.program_id(1) * BV + tl.arange(0, BV)
    n = head * (N + V) + N + v
    valid = (v < V)[:, None] & (r < R)[None, :]
    w = tl.load(w_ptr + n[:, None] * R + r[None, :], mask=valid, other=0).to(tl.float32)
    y = tl.sum(w * o[None, :], 1)
    if SCALED:
        y *= tl.load(scale_ptr + n, mask=v < V, other=0.0)
    tl.store(y_ptr + (t * H + head) * V + v, y, mask=v < V)

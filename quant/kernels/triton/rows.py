"""Triton kernels for a few tokens: weights times a row of activations, bound by the weights' read.

A program makes 16 values of one token's product, in float32 throughout, so a token's bits are those
that it has alone.  Tokens are the grid's fastest axis: what one has read of the weights, the next
finds in the GPU's cache.  Weights are read as they are stored; a code becomes a number in a
register.  ``slotmoe.quant.backends.triton_few`` launches these and knows what the arguments mean.
Codes are ``tiles16`` of ``quant/codecs/codec.py``, read as 32-bit words: of 4 bits, word 16 t +
lane of a block holds columns 8 t to 8 t + 7 of row ``lane``.

Shapes: K columns, N rows of a weight; T tokens, D hidden_size; E experts, of which a token uses
TOP_K.
"""

import triton
import triton.language as tl

# Kinds of weights, as ``slotmoe.quant.codecs.codec`` numbers coded ones.
INT8 = tl.constexpr(0)  # row-major, a float32 scale a row
NF4 = tl.constexpr(1)
LUT4 = tl.constexpr(2)
LUT3 = tl.constexpr(3)
INT4 = tl.constexpr(4)
MXFP4 = tl.constexpr(5)
DENSE = tl.constexpr(9)  # row-major float32 or bfloat16
NONE = tl.constexpr(-1)  # no weights
BLOCKS = tl.constexpr(8)  # blocks of 64 columns that a program takes at a time of codes


@triton.jit
def swiglu(gate, up, LIMIT: tl.constexpr):
    """silu(gate) * up; a LIMIT that is not 0 is the most of both, its negative the least of up."""
    if LIMIT > 0:  # NaN stays
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
    e = tl.exp(-tl.abs(gate))  # which does not overflow
    return gate * tl.where(gate >= 0, 1.0, e) / (1 + e) * up


@triton.jit
def code_words(codes_ptr, at, lane, valid, KIND: tl.constexpr):
    """32-bit words with the codes of eight neighbouring columns of a row: ``at`` counts these
    eights over blocks and tiles.  ``code_shift`` says where a code is."""
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + lane
    if KIND == LUT3:  # four eights are in three words, the last in the two highest bits of bytes
        words_ptr += at // 4 * 48
        split = valid & (at % 4 == 3)
        words = tl.load(words_ptr + at % 4 * 16, mask=valid & (at % 4 != 3), other=0)
        words |= (tl.load(words_ptr, mask=split, other=0) >> 6) & 0x03030303
        words |= (tl.load(words_ptr + 16, mask=split, other=0) >> 4) & 0x0C0C0C0C
        words |= (tl.load(words_ptr + 32, mask=split, other=0) >> 2) & 0x30303030
    else:
        words = tl.load(words_ptr + at * 16, mask=valid, other=0)
    return words


@triton.jit
def code_shift(j, KIND: tl.constexpr):
    """By how many bits the j-th of the eight codes stands above the bottom of its word."""
    return 8 * (j % 4) + (3 * (j // 4) if KIND == LUT3 else 4 - 4 * (j // 4))


@triton.jit
def _levels(bytes_ptr, words, j: tl.constexpr, KIND: tl.constexpr):
    """The level of the j-th of the eight codes of each word, float32.  A code is masked as an
    offset in bytes, so that its address takes one addition.  The shift is ``code_shift``'s, as a
    constant, which no call returns."""
    MASK: tl.constexpr = 28 if KIND == LUT3 else 60
    shift: tl.constexpr = 8 * (j % 4) + (3 * (j // 4) if KIND == LUT3 else 4 - 4 * (j // 4))
    offsets = (words >> (shift - 2) if shift >= 2 else words << (2 - shift)) & MASK
    # Not true, but so a thread keeps the rows of its words: Triton before 3.7 else deals out levels
    # through shared memory.  Two levels in one load would need offsets that are multiples of 8.
    offsets = tl.max_contiguous(offsets, [1, 2])
    return tl.load((bytes_ptr + offsets).to(tl.pointer_type(tl.float32)))


@triton.jit
def row_factors(scales_ptr, tile, blocks, lane, KIND: tl.constexpr):
    """What all scales of a tile's rows are multiplied by, float32."""
    if (KIND != LUT4) & (KIND != LUT3):
        factors = 1.0
    else:
        tile_ptr = scales_ptr.to(tl.pointer_type(tl.float32)) + tile * (blocks + 2) * 8
        factors = tl.load(tile_ptr + lane)
    return factors


@triton.jit
def stored_scales(scales_ptr, tile, block, half, blocks, lane, valid, KIND: tl.constexpr):
    """Stored scales of the first (``half`` 0) or last 32 columns of blocks of tiles."""
    if KIND == NF4:
        absmax_ptr = scales_ptr.to(tl.pointer_type(tl.float16)) + (tile * blocks + block) * 16
        scales = tl.load(absmax_ptr + lane, mask=valid, other=0.0)
    elif KIND == INT4:
        tile_ptr = scales_ptr.to(tl.pointer_type(tl.float16)) + (tile * blocks + block) * 32
        scales = tl.load(tile_ptr + half * 16 + lane, mask=valid, other=0.0)
    elif KIND == MXFP4:
        tile_ptr = scales_ptr.to(tl.pointer_type(tl.uint8)) + (tile * blocks + block) * 32
        scales = tl.load(tile_ptr + half * 16 + lane, mask=valid, other=0)
    else:
        tile_ptr = scales_ptr.to(tl.pointer_type(tl.int8)) + tile * (blocks + 2) * 32
        scales = tl.load(tile_ptr + 64 + block * 32 + half * 16 + lane, mask=valid, other=0)
    return scales


@triton.jit
def scale_numbers(stored, KIND: tl.constexpr):
    """Float32 of ``stored_scales``; a program waits for these here, not where it loads them."""
    if KIND == MXFP4:  # the byte is a float's exponent; the first of them is denormal
        bits = tl.maximum(stored.to(tl.int32) << 23, 1 << 22)
        numbers = bits.to(tl.float32, bitcast=True)
    else:
        numbers = stored.to(tl.float32)
    return numbers


@triton.jit
def _coded_step(codes_ptr, scales_ptr, tile, at, lane, blocks, KIND: tl.constexpr):
    """Words ``at`` of a tile's rows ``lane``, and their scales as they are stored."""
    valid = (at < blocks * 8)[:, None]
    words = code_words(codes_ptr, (tile * blocks * 8 + at)[:, None], lane, valid, KIND)
    block, half = (at // 8)[:, None], (at // 4 % 2)[:, None]
    return words, stored_scales(scales_ptr, tile, block, half, blocks, lane, valid, KIND)


@triton.jit
def _coded_rows(
    x_ptr, g_ptr, codes_ptr, scales_ptr, levels_ptr, tile, K, KIND: tl.constexpr, NORM: tl.constexpr
):  # fmt: skip
    """One tile of 16 rows: their products with x (times g), and the sum of x's squares if NORM."""
    blocks = (K + 63) // 64
    lane = tl.arange(0, 16)[None, :]
    group = tl.arange(0, BLOCKS * 8)  # eight neighbouring columns
    total = tl.full([BLOCKS * 8, 16], 0, tl.float32)
    squares = tl.full([BLOCKS * 8], 0, tl.float32)
    rows = row_factors(scales_ptr, tile, blocks, lane, KIND)
    bytes_ptr = levels_ptr.to(tl.pointer_type(tl.int8))
    words, scale = _coded_step(codes_ptr, scales_ptr, tile, group, lane, blocks, KIND)
    for first in range(0, blocks, BLOCKS):
        at = first * 8 + group
        # What the next step needs is on its way while this one computes.
        ahead = _coded_step(codes_ptr, scales_ptr, tile, at + BLOCKS * 8, lane, blocks, KIND)
        part = tl.full([BLOCKS * 8, 16], 0, tl.float32)
        for j in tl.static_range(8):
            column = at * 8 + j
            x = tl.load(x_ptr + column, mask=column < K, other=0.0)
            if NORM:
                squares += x * x
                x *= tl.load(g_ptr + column, mask=column < K, other=0.0)
            part = tl.fma(_levels(bytes_ptr, words, j, KIND), x[:, None], part)
        total = tl.fma(part, scale_numbers(scale, KIND) * rows, total)
        words, scale = ahead
    return tl.sum(total, 0), tl.sum(squares, 0)


@triton.jit
def _plain_step(w_ptr, n, k, N, K):
    """Columns k of rows n."""
    valid = (n < N)[:, None] & (k < K)[None, :]
    return tl.load(w_ptr + n[:, None] * K + k[None, :], mask=valid, other=0)


@triton.jit
def plain_rows(
    x_ptr, g_ptr, w_ptr, scale_ptr, tile, N, K,
    KIND: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr = 16,
):  # fmt: skip
    """The same of ROWS rows of a row-major matrix."""
    n = tile * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    total = tl.full([ROWS, COLUMNS], 0, tl.float32)
    squares = tl.full([COLUMNS], 0, tl.float32)
    w = _plain_step(w_ptr, n, column, N, K)
    for first in range(0, K, COLUMNS):
        k = first + column
        ahead = _plain_step(w_ptr, n, k + COLUMNS, N, K)
        x = tl.load(x_ptr + k, mask=k < K, other=0.0)
        if NORM:
            squares += x * x
            x *= tl.load(g_ptr + k, mask=k < K, other=0.0)
        total = tl.fma(w.to(tl.float32), x[None, :], total)
        w = ahead
    y = tl.sum(total, 1)
    if KIND == INT8:
        y *= tl.load(scale_ptr + n, mask=n < N, other=0.0)
    return y, tl.sum(squares, 0)


@triton.jit
def _rows(
    x_ptr, g_ptr, w_ptr, scale_ptr, levels_ptr, tile, N, K,
    KIND: tl.constexpr, NORM: tl.constexpr, COLUMNS: tl.constexpr = 512,
):  # fmt: skip
    """COLUMNS are those that a program takes at a time of what is not coded."""
    if (KIND == INT8) | (KIND == DENSE):
        y, squares = plain_rows(x_ptr, g_ptr, w_ptr, scale_ptr, tile, N, K, KIND, NORM, COLUMNS)
    else:
        y, squares = _coded_rows(x_ptr, g_ptr, w_ptr, scale_ptr, levels_ptr, tile, K, KIND, NORM)
    return y, squares


@triton.jit
def linear(
    x_ptr, X, g_ptr, eps, w_ptr, scale_ptr, levels_ptr, N, w2_ptr, scale2_ptr, levels2_ptr, N2,
    r_ptr, y_ptr, K,
    KIND: tl.constexpr, KIND2: tl.constexpr, NORM: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """y [T, N + N2] = both weights times x, the first K of X values of a token, normed with g first
    if NORM, plus r [T, N + N2] if RESIDUAL."""
    t, tile = tl.program_id(0), tl.program_id(1)
    x_ptr += t * X
    tiles = (N + 15) // 16
    if tile < tiles:
        y, squares = _rows(x_ptr, g_ptr, w_ptr, scale_ptr, levels_ptr, tile, N, K, KIND, NORM)
        n = tile * 16 + tl.arange(0, 16)
        valid = n < N
    else:
        tile -= tiles
        y, squares = _rows(x_ptr, g_ptr, w2_ptr, scale2_ptr, levels2_ptr, tile, N2, K, KIND2, NORM)
        n = tile * 16 + tl.arange(0, 16)
        valid = n < N2
        n += N
    if NORM:
        factor = 1 / tl.sqrt(squares / K + eps)
        y *= factor
    n += t * (N + N2)
    if RESIDUAL:
        y = tl.load(r_ptr + n, mask=valid) + y
    tl.store(y_ptr + n, y, mask=valid)


@triton.jit
def gate_up(
    x_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, levels_ptr, y_ptr, tile, N, K,
    KIND: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr = 512,
):  # fmt: skip
    """One tile of y [N] = silu(gate x) * (up x); where it is None, that of the program, which is of
    one token of y [T, N] and x [T, K]."""
    if tile is None:
        tile = tl.program_id(1)
        x_ptr += tl.program_id(0) * K
        y_ptr += tl.program_id(0) * N
    gate, _ = _rows(
        x_ptr, x_ptr, gate_ptr, gate_scale_ptr, levels_ptr, tile, N, K, KIND, False, COLUMNS
    )
    up, _ = _rows(x_ptr, x_ptr, up_ptr, up_scale_ptr, levels_ptr, tile, N, K, KIND, False, COLUMNS)
    n = tile * 16 + tl.arange(0, 16)
    tl.store(y_ptr + n, swiglu(gate, up, LIMIT), mask=n < N)


# The experts of each token, in two launches: the shared expert's programs come first, then those of
# each routed one.  Where experts are missing, the same kernels are launched for some of their
# programs, from ``first`` on.  What differs between such launches must not be specialized: kernels
# that are compiled apart may round apart.


@triton.jit(do_not_specialize=["slots_ptr", "indices_ptr", "first"])
def experts_gate_up(
    x_ptr, slab_ptr, slots_ptr, indices_ptr, levels_ptr, y_ptr, D, N,
    record_bytes, up_at, gate_scales_at, up_scales_at,
    gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, shared_levels_ptr, shared_y_ptr, SHARED_N,
    first,
    KIND: tl.constexpr, SHARED: tl.constexpr, LIMIT: tl.constexpr, COLUMNS: tl.constexpr,
    TOP_K: tl.constexpr,
):  # fmt: skip
    """shared_y [T, SHARED_N] and, of the experts that have a slot, y [T, TOP_K, N]: each silu(gate
    x) * (up x) of x [T, D].  ``indices`` [T, TOP_K] are the experts, ``slots`` [E] the rows of
    their records; SHARED is the kind of the shared expert's weights, NONE without one."""
    shared_tiles, tiles = (SHARED_N + 15) // 16, (N + 15) // 16
    t, program = tl.program_id(0), tl.program_id(1) + first
    x_ptr += t * D
    if program < shared_tiles:
        if SHARED != NONE:
            gate_up(
                x_ptr, gate_ptr, gate_scale_ptr, up_ptr, up_scale_ptr, shared_levels_ptr,
                shared_y_ptr + t * SHARED_N, program, SHARED_N, D, SHARED, LIMIT, COLUMNS,
            )  # fmt: skip
    else:
        use = t * TOP_K + (program - shared_tiles) // tiles
        tile = (program - shared_tiles) % tiles
        slot = tl.load(slots_ptr + tl.load(indices_ptr + use))
        if slot >= 0:
            record_ptr = slab_ptr + slot.to(tl.int64) * record_bytes
            gate_up(
                x_ptr, record_ptr, record_ptr + gate_scales_at, record_ptr + up_at,
                record_ptr + up_scales_at, levels_ptr, y_ptr + use * N, tile, N, D, KIND, LIMIT,
            )  # fmt: skip


@triton.jit(
    do_not_specialize=["slots_ptr", "indices_ptr", "weights_ptr", "finished_ptr", "first", "parts"]
)
def experts_down(
    x_ptr, slab_ptr, slots_ptr, indices_ptr, levels_ptr, y_ptr, D, K,
    record_bytes, down_at, down_scales_at,
    shared_x_ptr, down_ptr, down_scale_ptr, shared_levels_ptr, shared_y_ptr, SHARED_K,
    finished_ptr, weights_ptr, h_ptr, out_ptr, first, parts,
    KIND: tl.constexpr, SHARED: tl.constexpr, COLUMNS: tl.constexpr, TOP_K: tl.constexpr,
):  # fmt: skip
    """The same experts: y [T, TOP_K, D] = down x, x being [T, TOP_K, K], and shared_y [T, D].

    A token's tile of 16 rows has ``parts`` programs in a launch that ends the layer, else 0.  The
    one of them that finishes last adds up: out = h + (y by their weights, in the gate's order, +
    shared_y).  ``finished`` [T, tiles] is 0 before and after.  To be compiled without contraction
    into multiply-adds, so that the sum is ``weighted_sum``'s."""
    tiles = (D + 15) // 16
    shared_tiles = tiles if SHARED != NONE else 0
    t, program = tl.program_id(0), tl.program_id(1) + first
    tile = program % tiles
    n = tile * 16 + tl.arange(0, 16)
    valid = n < D
    if program < shared_tiles:
        if SHARED != NONE:
            row_ptr = shared_x_ptr + t * SHARED_K
            y, _ = _rows(
                row_ptr, row_ptr, down_ptr, down_scale_ptr, shared_levels_ptr, tile, D,
                SHARED_K, SHARED, False, COLUMNS,
            )  # fmt: skip
            tl.store(shared_y_ptr + t * D + n, y, mask=valid)
    else:
        use = t * TOP_K + (program - shared_tiles) // tiles
        slot = tl.load(slots_ptr + tl.load(indices_ptr + use))
        if slot >= 0:
            record_ptr = slab_ptr + slot.to(tl.int64) * record_bytes
            row_ptr = x_ptr + use * K
            y, _ = _rows(
                row_ptr, row_ptr, record_ptr + down_at, record_ptr + down_scales_at, levels_ptr,
                tile, D, K, KIND, False,
            )  # fmt: skip
            tl.store(y_ptr + use * D + n, y, mask=valid)
    if parts > 0:
        tl.debug_barrier()  # all threads have stored before one of them says so
        finished_ptr += t * tiles + tile
        if tl.atomic_add(finished_ptr, 1, sem="acq_rel") == parts - 1:
            tl.store(finished_ptr, 0)
            use, at = t * TOP_K, t * D + n
            # Past the first-level cache: other programs of the same launch may have written them.
            y = tl.load(y_ptr + use * D + n, mask=valid, cache_modifier=".cg")
            total = y * tl.load(weights_ptr + use)
            for k in tl.static_range(1, TOP_K):
                y = tl.load(y_ptr + (use + k) * D + n, mask=valid, cache_modifier=".cg")
                total += y * tl.load(weights_ptr + use + k)
            if SHARED != NONE:
                total += tl.load(shared_y_ptr + at, mask=valid, cache_modifier=".cg")
            tl.store(out_ptr + at, tl.load(h_ptr + at, mask=valid) + total, mask=valid)


@triton.jit
def weighted_sum(y_ptr, weights_ptr, out_ptr, TOP_K, D, BLOCK: tl.constexpr):
    """out [T, D] = sum of weight times output in the gate's order; to be compiled without
    contraction into multiply-adds."""
    t = tl.program_id(1)
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = d < D
    y_ptr += t * TOP_K * D
    total = tl.load(y_ptr + d, mask=valid) * tl.load(weights_ptr + t * TOP_K)
    for k in range(1, TOP_K):
        total += tl.load(y_ptr + k * D + d, mask=valid) * tl.load(weights_ptr + t * TOP_K + k)
    tl.store(out_ptr + t * D + d, total, mask=valid)


@triton.jit
def finish(routed_ptr, shared_ptr, h_ptr, out_ptr, count, BLOCK: tl.constexpr):
    """out = h + (routed + shared), of ``count`` values each, without what is None."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < count
    total = tl.load(routed_ptr + i, mask=valid)
    if shared_ptr is not None:
        total += tl.load(shared_ptr + i, mask=valid)
    tl.store(out_ptr + i, tl.load(h_ptr + i, mask=valid) + total, mask=valid)

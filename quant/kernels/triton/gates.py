"""Triton kernels of the router: a few tokens' logits, and the choice of experts by them.

Shapes: T tokens, K columns, E experts, of which a token uses TOP_K.
"""

import triton
import triton.language as tl

from slotmoe.quant.kernels.triton.rows import DENSE, plain_rows


@triton.jit
def _scored(logits, SCORING: tl.constexpr):
    """All logits of a token to scores."""
    if SCORING == "sqrtsoftplus":
        part = tl.exp(-tl.abs(logits))
        whole = 1.0 + part  # whose logarithm lacks what this sum has rounded off
        log = tl.log(whole) + (part - (whole - 1.0)) / whole
        scores = tl.sqrt(tl.maximum(logits, 0.0) + log)
    elif SCORING == "sigmoid":
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(logits, 0))
        scores = scores / tl.sum(scores, 0)
    return scores


@triton.jit
def route(
    logits_ptr, bias_ptr, chosen_ptr, weights_ptr, indices_ptr, E, TOP_K, GROUPS, KEPT, factor,
    SCORING: tl.constexpr, BIASED: tl.constexpr, GROUP_BEST: tl.constexpr, RENORM: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
):  # fmt: skip
    """A row of logits [E], that of the grid's first axis, to weights and indices of the best TOP_K
    experts, the lowest index of equals first; or with ``chosen`` [T, TOP_K] to weights of those.

    ``bias`` [E] is added to what is compared alone.  GROUPS > 1 leaves out all but the KEPT groups
    with the best expert, or with the best sum of two (GROUP_BEST).
    """
    t, e = tl.program_id(0), tl.arange(0, BLOCK)
    # Past the first-level cache: other programs of the same launch may have written them.
    logits = tl.load(logits_ptr + t * E + e, mask=e < E, other=float("-inf"), cache_modifier=".cg")
    scores = _scored(logits, SCORING)
    choice = scores
    if BIASED:
        choice += tl.load(bias_ptr + e, mask=e < E, other=0.0)
    choice = tl.where(choice >= -3.0e38, choice, -3.0e38)  # NaN too
    choice = tl.where(e < E, choice, float("-inf"))
    if GROUPS > 1:
        group = tl.arange(0, GROUP_BLOCK)
        inside = (e // (E // GROUPS))[None, :] == group[:, None]
        choices = tl.where(inside, choice[None, :], float("-inf"))
        best = tl.max(choices, 1)
        if GROUP_BEST == 2:
            first_of = tl.min(tl.where(choices == best[:, None], e[None, :], BLOCK), 1)
            rest = tl.where(e[None, :] == first_of[:, None], float("-inf"), choices)
            best += tl.max(rest, 1)
        keep = tl.full([GROUP_BLOCK], 0, tl.int32)
        for _ in range(KEPT):
            first = tl.min(tl.where(best == tl.max(best, 0), group, GROUP_BLOCK), 0)
            keep = tl.where(group == first, 1, keep)
            best = tl.where(group == first, float("-inf"), best)
        kept = tl.max(tl.where(inside, keep[:, None], 0), 0) > 0
        choice = tl.where(kept, choice, float("-inf"))
    k = tl.arange(0, K_BLOCK)
    weights = tl.full([K_BLOCK], 0, tl.float32)
    indices = tl.full([K_BLOCK], 0, tl.int32)
    for rank in range(TOP_K):
        if chosen_ptr is None:
            first = tl.min(tl.where(choice == tl.max(choice, 0), e, BLOCK), 0)
        else:
            first = tl.load(chosen_ptr + t * TOP_K + rank).to(tl.int32)
        weights = tl.where(k == rank, tl.sum(tl.where(e == first, scores, 0.0), 0), weights)
        indices = tl.where(k == rank, first, indices)
        choice = tl.where(e == first, float("-inf"), choice)
    if RENORM:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    weights *= factor
    tl.store(weights_ptr + t * TOP_K + k, weights, mask=k < TOP_K)
    tl.store(indices_ptr + t * TOP_K + k, indices.to(tl.int64), mask=k < TOP_K)


@triton.jit
def gate(
    x_ptr, g_ptr, eps, normed_ptr, w_ptr, K, finished_ptr, logits_ptr, bias_ptr, weights_ptr,
    indices_ptr, E, TOP_K, GROUPS, KEPT, factor,
    SCORING: tl.constexpr, BIASED: tl.constexpr, GROUP_BEST: tl.constexpr, RENORM: tl.constexpr,
    BLOCK: tl.constexpr, GROUP_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """x [T, K], normed with g into ``normed``, to logits [T, E] = w x; a token's program that
    finishes last makes the choice of them.  ``finished`` [T] is 0 before and after."""
    t, tile = tl.program_id(0), tl.program_id(1)
    x_ptr += t * K
    y, squares = plain_rows(x_ptr, g_ptr, w_ptr, w_ptr, tile, E, K, DENSE, True, 512, ROWS)
    factor_of_x = 1 / tl.sqrt(squares / K + eps)
    n = tile * ROWS + tl.arange(0, ROWS)
    tl.store(logits_ptr + t * E + n, y * factor_of_x, mask=n < E)
    if tile == 0:
        normed_ptr += t * K
        for first in range(0, K, 512):
            k = first + tl.arange(0, 512)
            x = tl.load(x_ptr + k, mask=k < K) * factor_of_x * tl.load(g_ptr + k, mask=k < K)
            tl.store(normed_ptr + k, x, mask=k < K)
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(finished_ptr + t, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        tl.store(finished_ptr + t, 0)
        route(
            logits_ptr, bias_ptr, None, weights_ptr, indices_ptr, E, TOP_K, GROUPS, KEPT, factor,
            SCORING, BIASED, GROUP_BEST, RENORM, BLOCK, GROUP_BLOCK, K_BLOCK,
        )  # fmt: skip

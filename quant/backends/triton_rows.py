"""Launches of the kernels for one token, ``slotmoe.quant.kernels.triton.rows``.

Shapes: N rows out, K columns in or experts a token, D hidden_size, I the shared expert's width, E
experts.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from slotmoe.border import Mlp, Router
from slotmoe.quant.backends.base import Prepared, Records, unbound
from slotmoe.quant.codecs.codec import KINDS, TILE
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.triton import rows

INT8, DENSE = rows.INT8.value, rows.DENSE.value
# Warps of a program of one token's product.  With two for codes a thread has registers enough for
# the codes and scales of the step after its own.
WARPS = {INT8: 4, DENSE: 8, **dict.fromkeys(KINDS.values(), 2)}
# Rows of the router's weight that a program takes: few, since it is small and many may read it.
_GATE_ROWS = 4


class Operand(NamedTuple):
    """A weight as the kernels take it; all None without one."""

    kind: int
    data: Tensor | None
    scale: Tensor | None
    levels: Tensor | None


def operand(weight: Prepared) -> Operand:
    """Raises ``TypeError`` for a weight that was prepared for another backend."""
    if isinstance(weight, Int8Weight):
        return Operand(INT8, weight.q, weight.scale, None)
    if isinstance(weight, CodedWeight):
        scales, is_byte = weight.scales, weight.scales.dtype.itemsize == 1
        scales = scales.view(torch.uint8) if is_byte else scales
        return Operand(weight.kind, weight.codes, scales, weight.levels)
    plain = unbound(weight)
    assert isinstance(plain, Tensor)
    return Operand(DENSE, plain, None, None)


def power(n: int) -> int:
    """The least power of two that holds ``n`` and 16, as Triton wants its blocks."""
    return max(16, 1 << (n - 1).bit_length())


class Routed(NamedTuple):
    """One token's routed experts of a layer: their input, records, and choice, and where their
    outputs go.  Without ``slots`` they were computed before: ``y`` is their sum, [1, 1, D]."""

    x_1D: Tensor
    records: Records
    slots_E: Tensor | None
    indices_1K: Tensor
    y_1KD: Tensor


class Ending(NamedTuple):
    """What is behind a layer's experts: ``out = h + (routed + shared)``, the routed ones by
    ``weights``.  ``finished``, int32, counts for each tile of ``out`` and is 0 before and after."""

    finished: Tensor
    weights_1K: Tensor
    h_1D: Tensor
    out_1D: Tensor


class Shared(NamedTuple):
    """A layer's shared expert and its width; the first two weights are of one kind."""

    width: int
    gate: Operand
    up: Operand
    down: Operand

    @classmethod
    def of(cls, mlp: Mlp[Prepared]) -> "Shared":
        weights = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        return cls(mlp.gate_proj.shape[0], *map(operand, weights))


_NO_SHARED = Shared(0, *[Operand(rows.NONE.value, None, None, None)] * 3)


def row(
    x_1K: Tensor,
    weight: Prepared,
    out: Tensor,
    second: Prepared | None = None,
    norm: tuple[Tensor, float] | None = None,
    add: Tensor | None = None,
) -> Tensor:
    """One row through one weight or two in one launch: ``out`` is float32 of N or N + N2 values.
    ``norm`` is a weight and an epsilon: the row is normed first.  ``add`` is added."""
    kind, data, scale, levels = operand(weight)
    kind2, data2, scale2, levels2 = operand(weight if second is None else second)
    N, K = weight.shape
    N2 = 0 if second is None else second.shape[0]
    gain, eps = (None, 0.0) if norm is None else norm
    rows.linear[(triton.cdiv(N, TILE) + triton.cdiv(N2, TILE),)](
        x_1K, gain, eps, data, scale, levels, N, data2, scale2, levels2, N2,
        add, out, K,
        KIND=kind, KIND2=kind2, NORM=norm is not None, RESIDUAL=add is not None,
        num_warps=WARPS[kind],
    )  # fmt: skip
    return out


def row_gate_up(x_1D: Tensor, gate: Operand, up: Operand, out_1I: Tensor, limit: float) -> Tensor:
    """``silu(gate(x)) * up(x)`` of one row, within ``limit``; both weights of one kind."""
    N, K = out_1I.shape[1], x_1D.shape[1]
    rows.gate_up[(triton.cdiv(N, TILE),)](
        x_1D, gate.data, gate.scale, up.data, up.scale, gate.levels, out_1I, None, N, K,
        KIND=gate.kind, LIMIT=limit, COLUMNS=512, num_warps=WARPS[gate.kind],
    )  # fmt: skip
    return out_1I


def route(
    logits_TE: Tensor, router: Router, bias_E: Tensor | None, chosen_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and indices of the chosen experts."""
    T, E = logits_TE.shape
    choice, sizes, constants = _chooser(T, E, router, bias_E, logits_TE.device)
    rows.route[(1, T)](logits_TE.contiguous(), bias_E, chosen_TK, *choice, *sizes, **constants)
    return choice


def gate(
    x_1D: Tensor,
    norm: tuple[Tensor, float],
    normed_1D: Tensor,
    weight_ED: Tensor,
    router: Router,
    bias_E: Tensor | None,
    logits_1E: Tensor,
    finished_1: Tensor,
) -> tuple[Tensor, Tensor]:
    """Norm, logits and ``route`` of a row in a launch; ``finished_1``, int32, is 0 around it."""
    E, D = weight_ED.shape
    choice, sizes, constants = _chooser(1, E, router, bias_E, x_1D.device)
    rows.gate[(triton.cdiv(E, _GATE_ROWS),)](
        x_1D, *norm, normed_1D, weight_ED, D, finished_1, logits_1E, bias_E, *choice, *sizes,
        ROWS=_GATE_ROWS, **constants,
    )  # fmt: skip
    return choice


def _chooser(
    T: int, E: int, router: Router, bias_E: Tensor | None, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[int, int, int, int, float], dict[str, int | str]]:
    """What the router's kernels take behind their tensors; first, where the choice will be."""
    groups, kept, top_k, factor, normalized, group_best, scoring = router
    weights_TK = torch.empty(T, top_k, device=device)
    indices_TK = torch.empty(T, top_k, dtype=torch.int64, device=device)
    kind: dict[str, int | str] = {"SCORING": scoring, "BIASED": bias_E is not None}
    kind |= {"GROUP_BEST": group_best, "RENORM": normalized, "BLOCK": power(E)}
    sizes = E, top_k, groups, kept, factor
    kind |= {"GROUP_BLOCK": power(groups), "K_BLOCK": power(top_k)}
    return (weights_TK, indices_TK), sizes, kind


def experts(routed: Routed, shared: Shared | None, ending: Ending | None, limit: float) -> None:
    """One token's routed experts where there are ``slots``, and with ``ending`` the shared one and
    what comes behind them.  The bits are the same whether the routed ones are computed here or were
    before.  For what a launch does not use stands something of its type: all are of one kernel."""
    x_1D, records, slots_E, indices_1K, y_1KD = routed
    layout, K, (in_levels, out_levels) = records.layout, indices_1K.shape[1], records.levels
    D, width, codecs = layout.hidden_size, layout.moe_intermediate_size, layout.codecs
    J, gate, up, down = shared or _NO_SHARED
    finished, *sums = ending or (slots_E, y_1KD, y_1KD, y_1KD)
    table, given = (finished, 0) if slots_E is None else (slots_E, K)
    with_shared = shared is not None and ending is not None
    h_KI = h_J = y_D = torch.empty(K * width, device=x_1D.device)
    if with_shared:
        h_J, y_D = (torch.empty(size, device=x_1D.device) for size in (J, D))
    tiles, shared_tiles = triton.cdiv(width, TILE), triton.cdiv(J, TILE)
    first = 0 if ending is not None else shared_tiles
    programs = given * tiles + with_shared * shared_tiles
    rows.experts_gate_up[(programs,)](
        x_1D, records.slab, table, indices_1K, in_levels, h_KI, D, width,
        layout.record_bytes, *layout.gate_up_places, gate.data, gate.scale, up.data, up.scale,
        gate.levels, h_J, J, first, LIMIT=limit, **_options(codecs.gate_up.kind, gate.kind),
    )  # fmt: skip
    tiles, parts = triton.cdiv(D, TILE), given + with_shared
    first = tiles if shared is not None and ending is None else 0
    # Multiplied and added apart, as in ``weighted_sum``.
    rows.experts_down[(parts * tiles,)](
        h_KI, records.slab, table, indices_1K, out_levels, y_1KD, D, width,
        layout.record_bytes, *layout.down_places, h_J, down.data, down.scale, down.levels,
        y_D, J, finished, *sums, first, parts if ending is not None else 0, y_1KD.shape[1],
        TOP_K=K, enable_fp_fusion=False, **_options(codecs.down.kind, down.kind),
    )  # fmt: skip


def _options(kind: int, shared: int) -> dict[str, int]:
    """Of a kernel for routed experts of a kind and a shared one, with the same share of what is not
    coded for a thread as that would have alone."""
    columns = 512 * WARPS[kind] // WARPS.get(shared, 4)
    return {"KIND": kind, "SHARED": shared, "COLUMNS": columns, "num_warps": WARPS[kind]}

"""Launches of the kernels for a few tokens, ``slotmoe.quant.kernels.triton.rows``, and the routed
experts of these, a layer's in one call or in several.

A layer at which a decoder has stopped has its input, its choice and its outputs in buffers that
stay, so each call for it is a captured graph.  The first call computes its shared expert too: on a
GPU it is behind the choice, beside which the host then gets what is missing.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, I the shared expert's
width, E experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from slotmoe.network.layer_types import Mlp, Pending, Router
from slotmoe.quant.backends.base import Prepared, Records, unbound
from slotmoe.quant.backends.graphs import Captured, Capturing, CudaGraphs
from slotmoe.quant.codecs.codec import KINDS, TILE
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels.triton import gates, mla, rows

ROWS = mla.TOKENS.value  # at most: with more, tensor cores are faster
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
    """A layer's routed experts: their input, records, slots, choice, and where outputs go."""

    x_TD: Tensor
    records: Records
    slots_E: Tensor
    indices_TK: Tensor
    y_TKD: Tensor


class Ending(NamedTuple):
    """What is behind a layer's experts: ``out = h + (routed + shared)``, the routed ones by
    ``weights``.  ``finished``, int32, counts for each tile of ``out`` and is 0 before and after."""

    finished: Tensor
    weights_TK: Tensor
    h_TD: Tensor
    out_TD: Tensor


class Shared(NamedTuple):
    """A layer's shared expert and its width; the first two weights are of one kind.  ``outputs``,
    [T, I] and [T, D], are for what it has between its products and what it gives."""

    width: int
    gate: Operand
    up: Operand
    down: Operand
    outputs: tuple[Tensor, Tensor] | None = None

    @classmethod
    def of(cls, mlp: Mlp[Prepared]) -> "Shared":
        gate, up, down = map(operand, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        return cls(mlp.gate_proj.shape[0], gate, up, down)


_NONE = Operand(rows.NONE.value, None, None, None)
_NO_SHARED = Shared(0, _NONE, _NONE, _NONE)


def linear(
    x_TK: Tensor,
    weight: Prepared,
    out_TN: Tensor,
    second: Prepared | None = None,
    norm: tuple[Tensor, float] | None = None,
    add_TN: Tensor | None = None,
) -> Tensor:
    """Each token through one weight or two in one launch: ``out`` is float32 of N or N + N2
    columns.  ``x`` may have more columns than the weights.  ``norm`` is a weight and an epsilon:
    tokens are normed first.  ``add`` is added."""
    kind, data, scale, levels = operand(weight)
    kind2, data2, scale2, levels2 = operand(weight if second is None else second)
    N, K = weight.shape
    N2 = 0 if second is None else second.shape[0]
    gain, eps = (None, 0.0) if norm is None else norm
    rows.linear[(len(x_TK), triton.cdiv(N, TILE) + triton.cdiv(N2, TILE))](
        x_TK, x_TK.stride(0), gain, eps, data, scale, levels, N, data2, scale2, levels2, N2,
        add_TN, out_TN, K,
        KIND=kind, KIND2=kind2, NORM=norm is not None, RESIDUAL=add_TN is not None,
        num_warps=WARPS[kind],
    )  # fmt: skip
    return out_TN


def gate_up(x_TD: Tensor, gate: Operand, up: Operand, out_TI: Tensor, limit: float) -> Tensor:
    """``silu(gate(x)) * up(x)`` of each token, within ``limit``; both weights of one kind."""
    N, (T, K) = out_TI.shape[1], x_TD.shape
    rows.gate_up[(T, triton.cdiv(N, TILE))](
        x_TD, gate.data, gate.scale, up.data, up.scale, gate.levels, out_TI, None, N, K,
        KIND=gate.kind, LIMIT=limit, COLUMNS=512, num_warps=WARPS[gate.kind],
    )  # fmt: skip
    return out_TI


def route(
    logits_TE: Tensor, router: Router, bias_E: Tensor | None, chosen_TK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Weights and indices of the chosen experts."""
    (T, E), device = logits_TE.shape, logits_TE.device
    weights_TK = torch.empty(T, router.top_k, device=device)
    choice = weights_TK, torch.empty_like(weights_TK, dtype=torch.int64)
    sizes, constants = _chooser(E, router, bias_E)
    gates.route[(T,)](logits_TE.contiguous(), bias_E, chosen_TK, *choice, *sizes, **constants)
    return choice


def gate(
    x_TD: Tensor,
    norm: tuple[Tensor, float],
    normed_TD: Tensor,
    weight_ED: Tensor,
    router: Router,
    bias_E: Tensor | None,
    logits_TE: Tensor,
    finished: Tensor,
    choice: tuple[Tensor, Tensor],
) -> None:
    """Norm, logits and ``route`` into ``choice`` in a launch; ``finished``, int32 of T or more, is
    0 around it."""
    E, D = weight_ED.shape
    sizes, constants = _chooser(E, router, bias_E)
    gates.gate[(len(x_TD), triton.cdiv(E, _GATE_ROWS))](
        x_TD, *norm, normed_TD, weight_ED, D, finished, logits_TE, bias_E, *choice, *sizes,
        ROWS=_GATE_ROWS, **constants,
    )  # fmt: skip


def _chooser(
    E: int, router: Router, bias_E: Tensor | None
) -> tuple[tuple[int, int, int, int, float], dict[str, int | str]]:
    """What the router's kernels take behind their tensors."""
    groups, kept, top_k, factor, normalized, group_best, scoring = router
    kind: dict[str, int | str] = {"SCORING": scoring, "BIASED": bias_E is not None}
    kind |= {"GROUP_BEST": group_best, "RENORM": normalized, "BLOCK": power(E)}
    kind |= {"GROUP_BLOCK": power(groups), "K_BLOCK": power(top_k)}
    return (E, top_k, groups, kept, factor), kind


def experts(routed: Routed, shared: Shared | None, ending: Ending | None, limit: float) -> None:
    """The routed experts that have slots; the shared one too where its outputs have a place; with
    ``ending`` what comes behind them.  The bits are the same in one call or several.  For what a
    launch does not use stands something of its type: all are of one kernel."""
    x_TD, records, slots_E, indices_TK, y_TKD = routed
    layout, (T, K), (in_levels, out_levels) = records.layout, indices_TK.shape, records.levels
    D, width, codecs = layout.hidden_size, layout.moe_intermediate_size, layout.codecs
    J, gate, up, down, outputs = shared or _NO_SHARED
    with_shared = outputs is not None
    h_TKI = torch.empty(T, K, width, device=x_TD.device)
    h_TJ, shared_TD = outputs or (h_TKI, y_TKD)
    tiles, shared_tiles = triton.cdiv(width, TILE), triton.cdiv(J, TILE)
    first, programs = (0, shared_tiles) if with_shared else (shared_tiles, 0)
    rows.experts_gate_up[(T, programs + K * tiles)](
        x_TD, records.slab, slots_E, indices_TK, in_levels, h_TKI, D, width,
        layout.record_bytes, *layout.gate_up_places, gate.data, gate.scale, up.data, up.scale,
        gate.levels, h_TJ, J, first,
        LIMIT=limit, TOP_K=K, **_options(codecs.gate_up.kind, gate.kind),
    )  # fmt: skip
    tiles, parts = triton.cdiv(D, TILE), K + with_shared
    first = tiles if shared is not None and not with_shared else 0
    # Multiplied and added apart, as in ``weighted_sum``.
    rows.experts_down[(T, parts * tiles)](
        h_TKI, records.slab, slots_E, indices_TK, out_levels, y_TKD, D, width,
        layout.record_bytes, *layout.down_places, h_TJ, down.data, down.scale, down.levels,
        shared_TD, J, *(ending or (slots_E, y_TKD, y_TKD, y_TKD)), first, parts if ending else 0,
        TOP_K=K, enable_fp_fusion=False, **_options(codecs.down.kind, down.kind),
    )  # fmt: skip


def weighted_sum(y_TKD: Tensor, weights_TK: Tensor, out_TD: Tensor) -> Tensor:
    """The sum of each token's outputs in the gate's order."""
    (T, K, D), block = y_TKD.shape, 256
    # Multiplied and added apart, as torch does, so that both give the same bits.
    rows.weighted_sum[(triton.cdiv(D, block), T)](
        y_TKD.contiguous(), weights_TK.contiguous(), out_TD, K, D,
        BLOCK=block, enable_fp_fusion=False,
    )  # fmt: skip
    return out_TD


def finish(routed_TD: Tensor, shared_TD: Tensor | None, h_TD: Tensor, out_TD: Tensor) -> Tensor:
    """``out = h + (routed + shared)``."""
    size, block = out_TD.numel(), 512
    rows.finish[(triton.cdiv(size, block),)](routed_TD, shared_TD, h_TD, out_TD, size, BLOCK=block)
    return out_TD


def _options(kind: int, shared: int) -> dict[str, int]:
    """Of a kernel for routed experts of a kind and a shared one, with the same share of what is not
    coded for a thread as that would have alone."""
    columns = 512 * WARPS[kind] // WARPS.get(shared, 4)
    return {"KIND": kind, "SHARED": shared, "COLUMNS": columns, "num_warps": WARPS[kind]}


class Buffers:
    """Memory for a few tokens that stays where it is, so that graphs find it; zeros at first."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[tuple[str, int, tuple[int, ...]], Tensor] = {}

    def __call__(self, key: str, T: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """[T, *shape], the same memory for each T."""
        if (key, T, shape) not in self._kept:
            if T < ROWS:
                made = self(key, ROWS, *shape, dtype=dtype)[:T]
            else:
                made = torch.zeros(T, *shape, dtype=dtype, device=self._device)
            self._kept[key, T, shape] = made
        return self._kept[key, T, shape]


class FewExperts:
    """``graph`` captures the graphs of a decode step; with None its kernels are launched singly.
    ``awaited`` is a layer that waits for its routed experts, and its shared one, without outputs
    when it has been launched; ``shared`` that of any layer, whose kinds of weights are alike."""

    def __init__(self, device: torch.device):
        self.buffers = Buffers(device)
        self.graph: Capturing | None = CudaGraphs() if device.type == "cuda" else None
        self.shared: Shared | None = None
        self.awaited: tuple[Pending, Shared | None] | None = None
        self._graphs: dict[tuple[int, ...], Captured[None]] = {}

    def __call__(self, routed: Routed, limit: float) -> None:
        """See ``TorchBackend.experts``."""
        x_TD, _, slots_E, indices_TK, y_TKD = routed
        shared, lasting = self.shared, False
        if self.awaited is not None and _same(self.awaited[0].x_TD, x_TD):
            choice, shared = self.awaited
            self.awaited = choice, shared and shared._replace(outputs=None)
            lasting = _same(choice.indices_TK, indices_TK)
        first = shared is not None and shared.outputs is not None

        def function(x_TD: Tensor) -> None:
            experts(routed, shared, None, limit)

        key = slots_E.data_ptr(), x_TD.data_ptr(), y_TKD.data_ptr(), len(x_TD), first
        self._run(key, function, x_TD, lasting)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        """See ``TorchBackend.weighted_sum``; it lasts until the next."""
        T, _, D = y_TKD.shape
        out_TD, waits = self.buffers("sum", T, D), self.awaited
        lasting = waits is not None and _same(waits[0].weights_TK, weights_TK)

        def function(y_TKD: Tensor) -> None:
            weighted_sum(y_TKD, weights_TK, out_TD)

        self._run((y_TKD.data_ptr(), T), function, y_TKD, lasting)
        return out_TD

    def _run(
        self, key: tuple[int, ...], function: Callable[[Tensor], None], given: Tensor, lasting: bool
    ) -> None:
        """Call ``function``, of ``lasting`` tensors as a captured graph if ``graph`` makes one."""
        if self.graph is None or not lasting:
            return function(given)
        if key not in self._graphs:
            self._graphs[key] = Captured(given, self.graph)
        self._graphs[key](function, given)


def _same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr()

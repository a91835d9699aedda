"""``TritonBackend``: a CUDA device with the kernels of ``slotmoe.quant.kernels.triton``.

Kernels for one token are bound by reading the weights and compute in float32.  Kernels for many
tokens use tensor cores in bfloat16.  Both read weights as they are stored.  With
``TRITON_INTERPRET=1`` the same kernels run on a CPU, for tests.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, E experts.
"""

from collections.abc import Sequence
from os import environ
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from slotmoe.border import Geometry, Layer, Mlp, Router
from slotmoe.quant.backends.base import Prepared, Records, TorchBackend
from slotmoe.quant.backends.graphs import Capturing, CudaGraphs
from slotmoe.quant.backends.triton_decoder import (
    DENSE,
    INT8,
    Ending,
    Operand,
    Routed,
    TritonDecoder,
    operand,
    power,
)
from slotmoe.quant.codecs.codec import KINDS, TILE
from slotmoe.quant.kernels.triton import mla, rows, tiles

# Triton 3.9 warns that its default will change; this is the present one.
environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
# A tile of many tokens.  Experts always use it: its size changes a row's last bits.
_BM, _BN = 64, 64
# Warps of a program of one token's product.  With two for codes a thread has registers enough for
# the codes and scales of the step after its own.
WARPS = {INT8: 4, DENSE: 8, **dict.fromkeys(KINDS.values(), 2)}
# Rows of the router's weight that a program takes: few, since it is small and many may read it.
_GATE_ROWS = 4
# So many tokens attend one by one over the latent cache; more use blockwise attention.
_FEW = 16


class Shared(NamedTuple):
    """A layer's shared expert and its width; the first two weights are of one kind."""

    width: int
    gate: Operand
    up: Operand
    down: Operand

    @classmethod
    def of(cls, mlp: Mlp[Prepared]) -> "Shared":
        return cls(
            mlp.gate_proj.shape[0], *map(operand, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        )


_NOTHING: Any = None
_NO_SHARED = Shared(0, *[Operand(rows.NONE.value, _NOTHING, None, None)] * 3)


class TritonBackend(TorchBackend):
    """See the module.  ``graph`` captures the graphs of a decode step; with None its kernels are
    launched one by one."""

    kind = "triton"

    def __init__(self, device: torch.device):
        super().__init__(torch.bfloat16)
        self.interpreted = isinstance(rows.linear, InterpretedFunction)
        self.name = "triton, interpreted" if self.interpreted else "triton"
        self._sums: dict[int, Tensor] = {}
        self._shared: Shared | None = None
        self.graph: Capturing | None = CudaGraphs() if device.type == "cuda" else None

    # One token.

    def row(
        self,
        x_1K: Tensor,
        weight: Prepared,
        out: Tensor,
        second: Prepared | None = None,
        norm: tuple[Tensor, float] | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """One row through one weight or two in one launch: ``out`` is float32 of N or N + N2
        values.

        ``norm`` is a weight and an epsilon: the row is normed first.  ``add`` is added.
        """
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

    def row_gate_up(
        self, x_1D: Tensor, gate_proj: Prepared, up_proj: Prepared, out_1I: Tensor
    ) -> Tensor:
        """``silu(gate(x)) * up(x)`` of one row; both weights of one kind."""
        gate, up = operand(gate_proj), operand(up_proj)
        N, K = gate_proj.shape
        rows.gate_up[(triton.cdiv(N, TILE),)](
            x_1D, gate.data, gate.scale, up.data, up.scale, gate.levels, out_1I, N, K,
            KIND=gate.kind, num_warps=WARPS[gate.kind],
        )  # fmt: skip
        return out_1I

    # Any number of tokens.

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        kind, data, scale, levels = operand(weight)
        T, (N, K) = len(x_TK), weight.shape
        if kind == DENSE and T != 1:
            return F.linear(x_TK.to(data.dtype), data).float()
        x_TK, y_TN = x_TK.contiguous(), torch.empty(T, N, device=x_TK.device)
        if T == 1:
            return self.row(x_TK.float(), weight, y_TN)
        tile = self._tile(T)
        tiles.linear[(triton.cdiv(N, _BN), triton.cdiv(T, tile["BM"]))](
            x_TK, data, scale, levels, y_TN, T, N, K, KIND=kind, **tile
        )
        return y_TN

    def mlp(
        self, x_TD: Tensor, gate_proj: Prepared, up_proj: Prepared, down_proj: Prepared
    ) -> Tensor:
        gate, up = operand(gate_proj), operand(up_proj)
        T, (N, K) = len(x_TD), gate_proj.shape
        if gate.kind != up.kind or (gate.kind == DENSE and T != 1):
            return super().mlp(x_TD, gate_proj, up_proj, down_proj)
        x_TD = x_TD.contiguous()
        if T == 1:
            h_1N = torch.empty(1, N, device=x_TD.device)
            return self.linear(self.row_gate_up(x_TD, gate_proj, up_proj, h_1N), down_proj)
        h_TN = torch.empty(T, N, dtype=torch.bfloat16, device=x_TD.device)
        tile = self._tile(T)
        tiles.gate_up[(triton.cdiv(N, _BN), triton.cdiv(T, tile["BM"]))](
            x_TD, gate.data, gate.scale, up.data, up.scale, gate.levels, h_TN, T, N, K,
            KIND=gate.kind, **tile,
        )  # fmt: skip
        return self.linear(h_TN, down_proj)

    def _tile(self, T: int) -> dict[str, int]:
        """Options of a kernel for ``T`` tokens."""
        BM = 16 if T <= 16 else _BM
        return {"BM": BM, "BN": _BN, "WIDEN": self.interpreted, "num_warps": max(4, BM // 8)}

    def expand(self, latent_BR: Tensor, kv_b: Prepared) -> Tensor:
        return self.linear(latent_BR, kv_b)

    # Attention.

    def absorb_query(self, q_THN: Tensor, kv_b: Prepared) -> Tensor:
        T, H, N = q_THN.shape
        _, data, scale, _ = operand(kv_b)
        R, BR = kv_b.shape[1], 64
        y_THR = torch.empty(T, H, R, device=q_THN.device)
        mla.absorb_query[(triton.cdiv(R, BR), H, T)](
            q_THN.contiguous(), data, scale, y_THR, H, N, kv_b.shape[0] // H, R,
            SCALED=scale is not None, WIDTH=power(N), BR=BR,
        )  # fmt: skip
        return y_THR

    def absorb_value(self, o_THR: Tensor, kv_b: Prepared, N: int) -> Tensor:
        T, H, R = o_THR.shape
        _, data, scale, _ = operand(kv_b)
        V, BV = kv_b.shape[0] // H - N, 16
        y_THV = torch.empty(T, H, V, device=o_THR.device)
        mla.values[(triton.cdiv(V, BV), H, T)](
            o_THR.contiguous(), None, None, None, data, scale, y_THV, H, N, V, R,
            PARTS=False, SCALED=scale is not None, LATENT=power(R), BV=BV,
        )  # fmt: skip
        return y_THV

    def mla(self, q_THW: Tensor, rows_SW: Tensor, R: int, scale: float) -> Tensor | None:
        T, H, W = q_THW.shape
        if T > _FEW or rows_SW.dtype != torch.float16:
            return None
        splits, (S, P) = mla.SPLITS.value, (len(rows_SW), W - R)
        part, best, total = (
            torch.empty(T, H, splits, width, device=q_THW.device) for width in (R, 1, 1)
        )
        y_THR = torch.empty(T, H, R, device=q_THW.device)
        mla.attend[(splits, triton.cdiv(H, 16), T)](
            q_THW.contiguous(), rows_SW, None, 0, S, scale, part, best, total, T, H, R, P,
            LOCATED=False, HEADS=16, LATENT=power(R), ROPE=power(P),
        )  # fmt: skip
        mla.combine[(H, T)](part, best, total, S, y_THR, T, H, R, LATENT=power(R))
        return y_THR

    def decoder(self, geometry: Geometry, layers: Sequence[Layer[Prepared]]) -> TritonDecoder:
        """From now on
        ``experts`` launches for one token the kernels that the decoder launches for these layers,
        whose shared experts are of one kind."""
        mlps = [layer.mlp for layer in layers if layer.gate is not None and layer.mlp is not None]
        self._shared = Shared.of(mlps[0]) if mlps else None
        return TritonDecoder(self, geometry, layers)

    # Routed experts.

    def route(
        self, logits_TE: Tensor, router: Router, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        T, E = logits_TE.shape
        choice = _choice(T, router.top_k, logits_TE.device)
        sizes, constants = _router(router, E, bias_E)
        rows.route[(T,)](logits_TE.contiguous(), bias_E, *choice, *sizes, **constants)
        return choice

    def gate(
        self,
        x_1D: Tensor,
        norm: tuple[Tensor, float],
        normed_1D: Tensor,
        weight_ED: Tensor,
        router: Router,
        bias_E: Tensor | None,
        logits_1E: Tensor,
        finished_1: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Norm, logits and ``route`` of one row in one launch; ``finished_1``, int32, is 0 before
        and after."""
        E, D = weight_ED.shape
        choice = _choice(1, router.top_k, x_1D.device)
        sizes, constants = _router(router, E, bias_E)
        rows.gate[(triton.cdiv(E, _GATE_ROWS),)](
            x_1D, *norm, normed_1D, weight_ED, D, finished_1, logits_1E, bias_E, *choice, *sizes,
            ROWS=_GATE_ROWS, **constants,
        )  # fmt: skip
        return choice

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        given = x_TD.contiguous(), records, slots_E, indices_TK.contiguous(), y_TKD
        if len(x_TD) == 1:  # each use reads its expert's record, in float32
            self._launch_experts(Routed(*given), self._shared, None)
        else:
            self._experts_by_groups(*given)

    def end_layer(self, routed: Routed, mlp: Mlp[Prepared] | None, ending: Ending) -> None:
        """One token's experts of a layer, and what comes behind them.  The bits are the same
        whether the routed ones are computed here or were before."""
        self._launch_experts(routed, None if mlp is None else Shared.of(mlp), ending)

    def _launch_experts(self, routed: Routed, shared: Shared | None, ending: Ending | None) -> None:
        """The routed experts where there are ``slots``, and with ``ending`` the shared one.  For
        what a launch does not use stands something of its type, so that each is of one kernel."""
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
            layout.record_bytes, *layout.gate_up_places(), gate.data, gate.scale, up.data, up.scale,
            gate.levels, h_J, J, first, **_options(codecs.gate_up.kind, gate.kind),
        )  # fmt: skip
        tiles, parts = triton.cdiv(D, TILE), given + with_shared
        first = tiles if shared is not None and ending is None else 0
        # Multiplied and added apart, as in ``weighted_sum``.
        rows.experts_down[(parts * tiles,)](
            h_KI, records.slab, table, indices_1K, out_levels, y_1KD, D, width,
            layout.record_bytes, *layout.down_places(), h_J, down.data, down.scale, down.levels,
            y_D, J, finished, *sums, first, parts if ending is not None else 0, y_1KD.shape[1],
            TOP_K=K, enable_fp_fusion=False, **_options(codecs.down.kind, down.kind),
        )  # fmt: skip

    def _experts_by_groups(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        """All uses of an expert together, on tensor cores in bfloat16.  Experts without a slot are
        sorted too, so an output doesn't depend on which experts a call computes."""
        layout, uses, K = records.layout, indices_TK.numel(), indices_TK.shape[1]
        D, width = layout.hidden_size, layout.moe_intermediate_size
        E, (in_levels, out_levels) = len(slots_E), records.levels
        sorted_uses, order = indices_TK.flatten().sort(stable=True)
        experts = torch.arange(E + 1, device=x_TD.device)
        starts = torch.searchsorted(sorted_uses, experts, out_int32=True)
        h = torch.empty(uses, width, dtype=torch.bfloat16, device=x_TD.device)
        # Whole tiles, and one more for each expert whose uses end in a part of a tile.
        programs = uses // _BM + min(uses, E)
        sizes = {"GROUPS": power(E), **self._tile(_BM)}
        tiles.experts_gate_up[(triton.cdiv(width, _BN), programs)](
            x_TD, order, K, starts, slots_E, E, records.slab, in_levels, h, width, D,
            layout.record_bytes, *layout.gate_up_places(), KIND=layout.codecs.gate_up.kind,
            **sizes,
        )  # fmt: skip
        tiles.experts_down[(triton.cdiv(D, _BN), programs)](
            h, order, starts, slots_E, E, records.slab, out_levels, y_TKD, D, width,
            layout.record_bytes, *layout.down_places(), KIND=layout.codecs.down.kind, **sizes,
        )  # fmt: skip

    def sum_1D(self, D: int, device: torch.device) -> Tensor:
        """Where ``weighted_sum`` leaves the sum of one token, so that graphs find it there; it
        lasts until the next."""
        if D not in self._sums:
            self._sums[D] = torch.empty(1, D, device=device)
        return self._sums[D]

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        T, K, D = y_TKD.shape
        one, block = T == 1, 256
        out_TD = self.sum_1D(D, y_TKD.device) if one else torch.empty(T, D, device=y_TKD.device)
        # Multiplied and added apart, as torch does, so that both give the same bits.
        rows.weighted_sum[(triton.cdiv(D, block), T)](
            y_TKD.contiguous(), weights_TK.contiguous(), out_TD, K, D,
            BLOCK=block, enable_fp_fusion=False,
        )  # fmt: skip
        return out_TD


def _choice(T: int, K: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where a router's kernel leaves weights and indices."""
    return torch.empty(T, K, device=device), torch.empty(T, K, dtype=torch.int64, device=device)


def _router(
    router: Router, E: int, bias_E: Tensor | None
) -> tuple[tuple[int, int, int, int, float], dict[str, int]]:
    """What the router's kernels take behind their tensors."""
    groups, kept, top_k, factor, normalized, group_best, sigmoid = router
    kind = {"SIGMOID": sigmoid, "BIASED": bias_E is not None, "GROUP_BEST": group_best}
    blocks = {"BLOCK": power(E), "GROUP_BLOCK": power(groups), "K_BLOCK": power(top_k)}
    return (E, top_k, groups, kept, factor), {**kind, "RENORM": normalized, **blocks}


def _options(kind: int, shared: int) -> dict[str, int]:
    """Of a kernel for routed experts of a kind and a shared one, with the same share of what is not
    coded for a thread as that would have alone."""
    columns = 512 * WARPS[kind] // WARPS.get(shared, 4)
    kinds = {"KIND": kind, "SHARED": shared, "COLUMNS": columns}
    return kinds | {"num_warps": WARPS[kind]}

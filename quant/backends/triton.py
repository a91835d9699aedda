"""``TritonBackend``: a CUDA device with the kernels of ``slotmoe.quant.kernels.triton``.

Kernels for one token are bound by reading the weights and compute in float32.  Kernels for many
tokens use tensor cores in bfloat16.  Both read weights as they are stored.  With
``TRITON_INTERPRET=1`` the same kernels run on a CPU, for tests.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, E experts; of lists, indexers, residual streams and compressed rows as in
``slotmoe.network.layer_types``.
"""

from collections.abc import Sequence
from os import environ

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from slotmoe.network.layer_types import (
    Ends,
    Geometry,
    HyperGeometry,
    Layer,
    ListedRows,
    Mixed,
    Mixing,
    Mla,
    Mlp,
)
from slotmoe.network.shapes import SWIGLU, Activation
from slotmoe.quant.backends import triton_few
from slotmoe.quant.backends.attention import first_best
from slotmoe.quant.backends.base import COMPILES, Prepared, Records, TorchBackend
from slotmoe.quant.backends.triton_decoder import TritonDecoder
from slotmoe.quant.backends.triton_few import ROWS, FewExperts, operand, power
from slotmoe.quant.kernels.triton import tiles, v4
from slotmoe.quant.shapes import PART_ROWS, SPLITS

# Triton 3.9 warns that its default will change; this is the present one.
environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if knobs := getattr(triton, "knobs", None):  # since Triton 3.4
    knobs.runtime.jit_cache_hook = COMPILES.begin
    knobs.runtime.jit_post_compile_hook = COMPILES.end
# A tile of many tokens.  Experts always use it: its size changes a row's last bits.
_BM, _BN = 64, 64
_FEW = 16  # so many tokens share the work over lists with more programs
_SHARE = 128  # positions at least of a program's part of a context
_SCORES = 1 << 24  # of an indexer in memory at once
_SCORED = 512  # keys that a program of many tokens scores


class TritonBackend(TorchBackend):
    kind, absorbs = "triton", True

    def __init__(self, device: torch.device, activation: Activation = SWIGLU):
        super().__init__(torch.bfloat16, activation)
        # What the kernels compute; of other activations and biases they only multiply.
        self._is_swiglu = activation == Activation(activation.limit)
        self.interpreted = isinstance(tiles.linear, InterpretedFunction)
        self.name = "triton, interpreted" if self.interpreted else "triton"
        self.few = FewExperts(device)
        self._finished = torch.zeros(0, dtype=torch.int32)

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        kind, data, scale, levels = operand(weight)
        T, (N, K) = len(x_TK), weight.shape
        if isinstance(weight, Tensor) and T > ROWS:
            return F.linear(x_TK.to(weight.dtype), weight).float()
        x_TK, y_TN = x_TK.contiguous(), torch.empty(T, N, device=x_TK.device)
        if T <= ROWS:
            return triton_few.linear(x_TK.float(), weight, y_TN)
        tile = self._tile(T)
        tiles.linear[(triton.cdiv(N, _BN), triton.cdiv(T, tile["BM"]))](
            x_TK, data, scale, levels, y_TN, T, N, K, KIND=kind, **tile
        )
        return y_TN

    def mlp(self, x_TD: Tensor, weights: Mlp[Prepared]) -> Tensor:
        gate, up = operand(weights.gate_proj), operand(weights.up_proj)
        T, (N, K) = len(x_TD), weights.gate_proj.shape
        has_more = weights.biases is not None or weights.output_gate is not None
        is_plain = self._is_swiglu and not has_more
        if not is_plain or gate.kind != up.kind or (gate.kind == triton_few.DENSE and T > ROWS):
            return super().mlp(x_TD, weights)
        x_TD = x_TD.contiguous()
        if T <= ROWS:
            h_TN = torch.empty(T, N, device=x_TD.device)
            triton_few.gate_up(x_TD, gate, up, h_TN, self.activation.limit)
            return self.linear(h_TN, weights.down_proj)
        h_TN = torch.empty(T, N, dtype=torch.bfloat16, device=x_TD.device)
        tile = self._tile(T)
        tiles.gate_up[(triton.cdiv(N, _BN), triton.cdiv(T, tile["BM"]))](
            x_TD, gate.data, gate.scale, up.data, up.scale, gate.levels, h_TN, T, N, K,
            KIND=gate.kind, LIMIT=self.activation.limit, **tile,
        )  # fmt: skip
        return self.linear(h_TN, weights.down_proj)

    def _tile(self, T: int) -> dict[str, int]:
        """Options of a kernel for ``T`` tokens."""
        BM = 16 if T <= 16 else _BM
        return {"BM": BM, "BN": _BN, "WIDEN": self.interpreted, "num_warps": max(4, BM // 8)}

    # Attention.

    def absorb_query(self, q_THN: Tensor, kv_b: Prepared) -> Tensor:
        (T, H, N), pitch = q_THN.shape, q_THN.stride(1)
        assert q_THN.stride() == (H * pitch, pitch, 1)
        _, data, scale, _ = operand(kv_b)
        (rows, R), tile = kv_b.shape, self._tile(T)
        y_THR = torch.empty(T, H, R, device=q_THN.device)
        tiles.absorb_query[(triton.cdiv(R, _BN), H, triton.cdiv(T, tile["BM"]))](
            q_THN, pitch, data, scale, y_THR, T, H, N, rows // H, R,
            SCALED=scale is not None, **tile,
        )  # fmt: skip
        return y_THR

    def absorb_value(self, o_THR: Tensor, kv_b: Prepared, N: int) -> Tensor:
        T, H, R = o_THR.shape
        kind, data, scale, _ = operand(kv_b)
        V, tile = kv_b.shape[0] // H - N, self._tile(T)
        y_THV = torch.empty(T, H, V, device=o_THR.device)
        tiles.absorb_value[(triton.cdiv(V, _BN), H, triton.cdiv(T, tile["BM"]))](
            o_THR.contiguous(), data, scale, y_THV, T, H, N, V, R, KIND=kind, **tile
        )
        return y_THV

    def mla(self, q_THW: Tensor, rows_SW: Tensor, R: int, scale: float) -> Tensor:
        """In bfloat16, to which ``absorb_value`` rounds it."""
        (T, H, W), S, device = q_THW.shape, len(rows_SW), q_THW.device
        assert q_THW.is_contiguous() and rows_SW.dtype == torch.float16
        blocks = triton.cdiv(T * H, tiles.ROWS.value)
        splits = max(1, min(SPLITS, PART_ROWS // tiles.ROWS.value // blocks, S // _SHARE))
        parts = splits if splits > 1 else 0
        part, best, total = (torch.empty(T, H, parts, n, device=device) for n in (R, 1, 1))
        y_THR = torch.empty(T, H, R, dtype=torch.bfloat16, device=device)
        tiles.attend[(splits, blocks)](
            q_THW, rows_SW, S, scale, part, best, total, self._counts(blocks, device), y_THR,
            T, H, R, W - R, LATENT=power(R), ROPE=power(W - R), WIDEN=self.interpreted,
            num_warps=8,
        )  # fmt: skip
        return y_THR

    def _counts(self, tiles: int, device: torch.device) -> Tensor:
        """Zeros, as kernels leave them that count what programs of a tile have finished."""
        if len(self._finished) < tiles:
            self._finished = torch.zeros(tiles, dtype=torch.int32, device=device)
        return self._finished

    def attend(self, q_THW: Tensor, listed: ListedRows, R: int, scale: float) -> Tensor:
        rows_SX, more_SX, lists_TL, sinks_H = listed
        (T, H, W), L, device = q_THW.shape, lists_TL.shape[1], q_THW.device
        parts = 1 if T > _FEW else triton.cdiv(L, v4.SHARE.value)
        y_THR, blocks = torch.empty(T, H, R, device=device), triton.cdiv(H, 16)
        part, best, total = y_THR, None, None
        if parts > 1:
            part, best, total = (torch.empty(T, H, parts, n, device=device) for n in (R, 1, 1))
        v4.attend[(parts, blocks, T)](
            q_THW.contiguous(), rows_SX, more_SX, len(rows_SX), lists_TL.contiguous(), L, scale,
            sinks_H, part, best, total, H, R, W - R,
            WHOLE=parts == 1, ALIGNED=2 if W % 8 else 16, HEADS=16, LATENT=power(R),
            ROPE=power(W - R), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
        if parts > 1:
            v4.combine[(triton.cdiv(R, 64), blocks, T)](
                part, best, total, parts, sinks_H, y_THR, H, R,
                HEADS=16, COLUMNS=64, enable_fp_fusion=False,
            )  # fmt: skip
        return y_THR

    def index(
        self, q_TJA: Tensor, weights_TJ: Tensor, keys_SX: Tensor, counts_T: Tensor, k: int
    ) -> Tensor:
        (T, J, A), S = q_TJA.shape, len(keys_SX)
        share, few = _SCORED if T > _FEW else v4.KEYS.value, max(1, _SCORES // max(1, S))
        parts = list[Tensor]()
        for start in range(0, T, few):
            given = (x[start : start + few].contiguous() for x in (q_TJA, weights_TJ, counts_T))
            q_BJA, weights_BJ, counts_B = given
            scores_BS = torch.empty(len(q_BJA), S, device=q_TJA.device)
            v4.scores[(triton.cdiv(S, share), len(q_BJA))](
                q_BJA, weights_BJ, keys_SX, counts_B, scores_BS, S, share, J, A,
                HEADS=power(J), WIDTH=power(A),
            )  # fmt: skip
            parts.append(first_best(scores_BS, k))
        return torch.cat(parts)

    def compress(self, both_BS2Y: Tensor, bias_SY: Tensor, norm_Y: Tensor, eps: float) -> Tensor:
        kv_BSY, gate_BSY = both_BS2Y.unbind(2)
        (B, S, Y), block = kv_BSY.shape, 32
        assert kv_BSY.stride(2) == gate_BSY.stride(2) == 1
        y_BY = torch.empty(B, Y, device=kv_BSY.device)
        v4.compress[(triton.cdiv(Y, block), B)](
            kv_BSY, *kv_BSY.stride()[:2], gate_BSY, *gate_BSY.stride()[:2], bias_SY.contiguous(),
            y_BY, S, Y, ROWS=power(S), COLUMNS=block,
        )  # fmt: skip
        return self.rms_norm(y_BY, norm_Y, eps)

    # Residual streams.

    def mix(self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry) -> tuple[Tensor, Mixed]:
        T, Q, device = len(h_TD), hyper.Q, h_TD.device
        mixed = Mixed(torch.empty(T, Q, device=device), torch.empty(T, Q, Q, device=device))
        return self.collapse(h_TD, mixing, hyper, mixed), mixed

    def collapse(
        self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry, mixed: Mixed | None = None
    ) -> Tensor:
        """Also how the streams take in what a block gives, into ``mixed``."""
        (T, K), (Q, iterations, small, eps) = h_TD.shape, hyper
        D, N, device = K // Q, len(mixing.base), h_TD.device
        slices, blocks = triton.cdiv(K, v4.SLICE.value), triton.cdiv(T, v4.TOKENS.value)
        x_TD, part = torch.empty(T, D, device=device), torch.empty(T, slices, N + 1, device=device)
        finished = self._counts(blocks, device)
        v4.mix[(slices, blocks)](
            h_TD.contiguous(), mixing.fn, mixing.scale, mixing.base, part, finished, x_TD,
            *(mixed or (None, None)), T, D, Q, N, iterations, eps, small,
            STREAMS=triton.next_power_of_2(Q), OUTS=power(N),
        )  # fmt: skip
        return x_TD

    def add_mixed(self, y_TD: Tensor, h_TD: Tensor, mixed: Mixed) -> Tensor:
        (T, D), block, out_TX = y_TD.shape, 256, torch.empty_like(h_TD)
        Q = h_TD.shape[1] // D
        v4.add_mixed[(triton.cdiv(D, block), T)](
            y_TD.contiguous(), h_TD.contiguous(), *mixed, out_TX, D, Q,
            STREAMS=triton.next_power_of_2(Q), BLOCK=block,
        )  # fmt: skip
        return out_TX

    def decoder(
        self, geometry: Geometry, layers: Sequence[Layer[Prepared]], ends: Ends[Prepared]
    ) -> TritonDecoder | None:
        """From now on ``experts`` launches for a few tokens the kernels that the decoder launches
        for these layers, whose shared experts are of one kind.  None but for MLA to all positions.
        """
        for layer in layers:
            if not isinstance(layer.attention, Mla) or layer.attention.indexer is not None:
                return None
        mlps = [layer.mlp for layer in layers if layer.gate is not None and layer.mlp is not None]
        self.few.shared = triton_few.Shared.of(mlps[0]) if mlps else None
        return TritonDecoder(geometry, layers, self.few, self.activation.limit)

    # Routed experts.

    route = staticmethod(triton_few.route)

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        """Of many tokens all uses of an expert together, on tensor cores in bfloat16.  Experts
        without a slot are sorted too, so an output doesn't depend on which a call computes.  Those
        with biases or another activation than SwiGLU go through ``mlp`` one by one."""
        if records.layout.bias_shapes or not self._is_swiglu:
            return super().experts(x_TD, records, slots_E, indices_TK, y_TKD)
        x_TD, indices_TK = x_TD.contiguous(), indices_TK.contiguous()
        if len(x_TD) <= ROWS:  # each use reads its expert's record, in float32
            routed = triton_few.Routed(x_TD, records, slots_E, indices_TK, y_TKD)
            return self.few(routed, self.activation.limit)
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
            layout.record_bytes, *layout.gate_up_places, KIND=layout.codecs.gate_up.kind,
            LIMIT=self.activation.limit, **sizes,
        )  # fmt: skip
        tiles.experts_down[(triton.cdiv(D, _BN), programs)](
            h, order, starts, slots_E, E, records.slab, out_levels, y_TKD, D, width,
            layout.record_bytes, *layout.down_places, KIND=layout.codecs.down.kind, **sizes,
        )  # fmt: skip

    def outputs(self, x_TD: Tensor, indices_TK: Tensor) -> Tensor:
        (T, D), K = x_TD.shape, indices_TK.shape[1]
        if T <= ROWS:
            return self.few.buffers("outputs", T, K, D)
        return super().outputs(x_TD, indices_TK)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        T, _, D = y_TKD.shape
        if T <= ROWS:
            return self.few.weighted_sum(y_TKD, weights_TK)
        return triton_few.weighted_sum(y_TKD, weights_TK, torch.empty(T, D, device=y_TKD.device))

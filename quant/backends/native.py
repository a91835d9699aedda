"""``NativeBackend``: a CPU with the kernels of ``slotmoe.quant.kernels.cpu``.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, P qk_rope_head_dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from slotmoe.network import layer_types
from slotmoe.network.layer_types import HyperGeometry, Mixed, Mixing
from slotmoe.network.shapes import SWIGLU, Activation, latent_bytes
from slotmoe.quant.backends.base import Empty, Prepared, Records, TorchBackend, new
from slotmoe.quant.backends.native_decoder import NativeDecoder, bind_records
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, Weight
from slotmoe.quant.kernels.cpu.bindings import Kernels, address, latent_rows, layer_rows
from slotmoe.quant.kernels.cpu.weights import Absorbed, BoundLayers, BoundMlp, Matrix, bind_router
from slotmoe.system import Placement


class NativeBackend(TorchBackend):
    """Activations are quantized to int8 in blocks of 16 with a float32 scale each.  Those of
    ``kv_b_proj``, and with ``amx`` of layers of 1,024 columns, have 15 bits and one scale a row.

    A row's result never depends on the other rows, the threads or the cache, so decode and prefill
    agree.  torch's own threads stay idle in decode.
    """

    kind, absorbs, embeds, decodes_all = "native", True, True, True

    def __init__(self, native: Kernels, activation: Activation = SWIGLU):
        super().__init__(torch.float32, activation)
        self._native = native
        self.name = f"native {native.isa}"

    @property
    def threads(self) -> int:
        return self._native.threads

    def run_on(self, placement: Placement) -> None:
        self._native.set_threads(placement.threads)
        self._native.set_cpus(placement.cpus)

    def prepare(
        self, role: str, weight: Weight, empty: Empty = new, head: tuple[int, int] = (0, 0)
    ) -> Prepared:
        """int8 and codes are bound for native calls; an ``embedding`` stays as it is."""
        if isinstance(weight, Int8Weight) and role == "absorbed":
            return self._native.tile_absorbed(weight, head, empty)
        if isinstance(weight, Tensor) and role == "absorbed":
            return _absorbed_floats(weight, head, empty)
        if isinstance(weight, Int8Weight) and role != "embedding":
            return self._native.tile_int8(weight, empty)
        copied = super().prepare(role, weight, empty)
        return Matrix.of(copied) if isinstance(copied, CodedWeight) else copied

    def _read(self, memory: Tensor) -> None:
        self._native.read(memory)

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        return self._native.linear(Matrix.of(weight), x_TK.contiguous())

    def normed_linear(self, x_TK: Tensor, norm_K: Tensor, eps: float, weight: Prepared) -> Tensor:
        matrix = Matrix.of(weight)
        (N, K), T, f32, x_TK = matrix.shape, len(x_TK), torch.float32, x_TK.contiguous()
        y_TN, inputs = torch.empty(T, N), (address(x_TK, f32, T, K), address(norm_K, f32, K))
        self._native.call("linear", matrix.address, *inputs, eps, T, 1, y_TN.data_ptr())
        return y_TN

    def grouped_linear(self, x_TGK: Tensor, weight: Prepared) -> Tensor:
        matrix, G = Matrix.of(weight), x_TGK.shape[1]
        if matrix.shape[0] % (G * TILE) == 0:
            return self._native.linear(matrix, x_TGK.contiguous())
        # Groups share tiles, which no real model's do: each multiplies all of them.
        parts = [self.linear(x_TGK[:, g], matrix).unflatten(1, (G, -1))[:, g] for g in range(G)]
        return torch.stack(parts, dim=1)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor | None, eps: float) -> Tensor:
        return self._native.rms_norm(x_TD.contiguous(), weight_D, eps)

    def layer_norm(self, x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
        return self._native.layer_norm(x_TD.contiguous(), weight_D, bias_D, eps)

    def mix(self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry) -> tuple[Tensor, Mixed]:
        Q, iterations, small, eps = hyper
        h_TQD, fn = h_TD.unflatten(-1, (Q, -1)), mixing.fn.unflatten(-1, (Q, -1))
        weights = fn, mixing.base, mixing.scale
        x_TD, *mixed = self._native.hyper_in.results(h_TQD, *weights, eps, iterations, small)
        return x_TD, Mixed(*mixed)

    def add_mixed(self, y_TD: Tensor, h_TD: Tensor, mixed: Mixed) -> Tensor:
        h_TQD = h_TD.unflatten(-1, (mixed.post_TQ.shape[-1], -1))
        return self._native.hyper_out(y_TD.contiguous(), h_TQD, *mixed).flatten(1)

    def collapse(self, h_TD: Tensor, mixing: Mixing, hyper: HyperGeometry) -> Tensor:
        Q, _, small, eps = hyper
        h_TQD, fn = h_TD.unflatten(-1, (Q, -1)), mixing.fn.unflatten(-1, (Q, -1))
        return self._native.hyper_head(h_TQD, fn, mixing.base, mixing.scale, eps, small)

    def compress(self, both_BS2Y: Tensor, bias_SY: Tensor, norm_Y: Tensor, eps: float) -> Tensor:
        kv_BSY, gate_BSY = (part.contiguous() for part in both_BS2Y.unbind(2))
        return self._native.compress(kv_BSY, gate_BSY, bias_SY, norm_Y, eps)

    def mlp(self, x_TD: Tensor, weights: layer_types.Mlp[Prepared]) -> Tensor:
        return self._native.mlp(self._mlp(weights), x_TD.contiguous())

    def rotate(self, x_THP: Tensor, table_TC: Tensor, halves: bool) -> Tensor:
        return self._native.rotate(x_THP.contiguous(), table_TC, halves)

    def absorb_query(self, q_THN: Tensor, kv_b: Prepared) -> Tensor:
        if isinstance(kv_b, Absorbed):
            return self._native.absorb_query(kv_b, q_THN.contiguous())
        return super().absorb_query(q_THN, kv_b)

    def absorb_value(self, o_THR: Tensor, kv_b: Prepared, N: int) -> Tensor:
        if isinstance(kv_b, Absorbed):
            return self._native.absorb_value(kv_b, o_THR)
        return super().absorb_value(o_THR, kv_b, N)

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        return latent_bytes(R, P), torch.uint8

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        """Latent and rope columns are each rotated by an orthogonal matrix and rounded to 8 bits
        with one float32 scale (attention.h), NaN if one is not finite."""
        assert len(rows_TX) == len(latent_TW)
        P = latent_TW.shape[-1] - R
        values = latent_TW.contiguous(), *latent_rows(rows_TX, R, P)
        self._native.store_latents.results(*values, R=R, P=P)

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        P, S = q_THW.shape[-1] - R, len(rows_SX)
        assert len(q_THW) <= S
        values = q_THW.contiguous(), *latent_rows(rows_SX, R, P), scale
        return self._native.mla(*values, C=S, R=R, P=P)

    def attend(self, q_THW: Tensor, listed: layer_types.ListedRows, R: int, scale: float) -> Tensor:
        rows_SX, more_SX, lists_TL, sinks_H = listed
        P, more_SX = q_THW.shape[-1] - R, rows_SX[:0] if more_SX is None else more_SX
        values = q_THW.contiguous(), *latent_rows(rows_SX, R, P), *latent_rows(more_SX, R, P)
        sizes = {"C": len(rows_SX), "D": len(more_SX), "R": R, "P": P}
        return self._native.attend(*values, lists_TL.contiguous(), scale, sinks_H, **sizes)

    def grouped(self, q_THZ: Tensor, cached: layer_types.GroupedRows, scale: float) -> Tensor:
        rows_GSX, first, window, sinks_H = cached
        (G, S, _), Z = rows_GSX.shape, q_THZ.shape[-1]
        group, row, _ = layer_rows([rows_GSX], G, latent_bytes(Z, Z))
        values = q_THZ.contiguous(), rows_GSX.data_ptr(), group, row, first, scale, window, sinks_H
        return self._native.grouped(*values, G=G, S=S)

    def gated(self, x_TX: Tensor, gate_TX: Tensor) -> Tensor:
        return self._native.gated(x_TX.contiguous(), gate_TX)

    def delta(
        self,
        cached: layer_types.DeltaRows,
        z_TY: Tensor,
        weights: layer_types.Delta[Prepared],
        sizes: layer_types.DeltaGeometry,
        eps: float,
    ) -> Tensor:
        w, z_TAV = weights, z_TY.unflatten(-1, (sizes.value_heads, sizes.V))
        rows, past, before, after, folded = cached
        values = rows, z_TAV, w.conv, w.a_log, w.dt_bias, w.value_norm, before, after
        how = past, folded, sizes.by_channel, eps
        return self._native.delta(*values, *how, G=sizes.key_heads).flatten(1)

    def index(
        self, q_TJA: Tensor, weights_TJ: Tensor, keys_SX: Tensor, counts_T: Tensor, k: int
    ) -> Tensor:
        """Of equals the lower index comes first, and NaN is the lowest."""
        rows = latent_rows(keys_SX, q_TJA.shape[-1], 0)
        values = q_TJA.contiguous(), weights_TJ.contiguous(), *rows, counts_T
        return self._native.index(*values, S=len(keys_SX), K=k)

    def route(
        self,
        logits_TE: Tensor,
        router: layer_types.Router,
        bias_E: Tensor | None,
        chosen_TK: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        values = bind_router(router), logits_TE.contiguous(), bias_E, chosen_TK
        weights_TK, indices_TK = self._native.route.results(*values)
        return weights_TK, indices_TK

    def decoder(
        self,
        geometry: layer_types.Geometry,
        layers: Sequence[layer_types.Layer[Prepared]],
        ends: layer_types.Ends[Prepared],
    ) -> NativeDecoder:
        mlps = [None if layer.mlp is None else self._mlp(layer.mlp) for layer in layers]
        bound = BoundLayers(geometry, layers, ends, mlps)
        return NativeDecoder(self._native, bound, self.activation)

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        slab = bind_records(records, self.activation)
        x_TD, indices_TK = x_TD.contiguous(), indices_TK.contiguous()
        T, K = indices_TK.shape
        E, D = len(slots_E), slab.sizes["H"]
        inputs = address(x_TD, torch.float32, T, D), T, K, address(indices_TK, torch.int64, T, K)
        where = address(slots_E, torch.int32, E), E, slab.slab, slab.sizes["S"], slab.sizes["B"]
        outputs = address(y_TKD, torch.float32, T, K, D)
        self._native.call("experts_by_slot", slab.address, *inputs, *where, outputs)

    def outputs(self, x_TD: Tensor, indices_TK: Tensor) -> Tensor:
        return torch.empty(*indices_TK.shape, x_TD.shape[1])

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        weights_TK, (T, K, D) = weights_TK.contiguous(), y_TKD.shape
        y_TD = torch.empty(T, D)
        inputs = address(y_TKD, torch.float32, T, K, D), address(weights_TK, torch.float32, T, K)
        self._native.call("weighted_sum", *inputs, T, K, D, y_TD.data_ptr())
        return y_TD

    def _mlp(self, weights: layer_types.Mlp[Prepared]) -> BoundMlp:
        """The weights bound for native calls."""
        assert weights.biases is None
        parts = weights.gate_proj, weights.up_proj, weights.down_proj
        gate, up, down = map(Matrix.of, parts)
        return BoundMlp(gate, up, down, self.activation, weights.output_gate)


def _absorbed_floats(weight: Tensor, head: tuple[int, int], empty: Empty) -> Absorbed:
    """``kv_b_proj`` [H (N + V), R] of floats; N rows of a head are its query's, V its values'."""
    n, v = head
    R = weight.shape[1]
    heads_HXR = weight.view(-1, n + v, R)
    query_HRN, value_HVR = heads_HXR[:, :n].transpose(1, 2), heads_HXR[:, n:]
    parts = [empty(tuple(x.shape), x.dtype).copy_(x) for x in (query_HRN, value_HVR)]
    return Absorbed(head, R, *parts)

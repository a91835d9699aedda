"""``NativeOps``: the operations of a CPU with the kernels of
``slotmoe.quant.kernels.cpu.bindings.cpu``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from slotmoe.quant.backends.base import Empty, TiledInt8Weight, TorchOps, Weight, new
from slotmoe.quant.export.layout import RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.bindings import Decoded, Kernels
from slotmoe.quant.kernels.cpu.weights import AttentionLayer, Decoder, Matrix, Mlp, Router
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import latent_bytes


def _matrix(weight: Weight) -> Matrix | None:
    """The weight bound for native calls; None if it is row-major int8, which only the absorbed
    products and ``embed`` take."""
    if isinstance(weight, TiledInt8Weight):
        return Matrix.int8(weight.tiles, weight.scale)
    if isinstance(weight, Nf4Weight):
        return Matrix.nf4(weight.codes, weight.absmax, weight.levels, *weight.shape)
    return Matrix.dense(weight) if isinstance(weight, Tensor) else None


def _mlp(*weights: Weight) -> Mlp | None:
    """Gate, up and down bound for native calls; None unless all are tiled int8 or all NF4."""
    if all(isinstance(one, TiledInt8Weight) for one in weights) or all(
        isinstance(one, Nf4Weight) for one in weights
    ):
        gate, up, down = (_matrix(one) for one in weights)
        assert gate is not None and up is not None and down is not None
        return Mlp(gate, up, down)
    return None


class FusedLayer:
    """One token of each sequence through a layer in few native calls, ``attention`` and ``mlp``
    being its weights, checked and bound.

    Between two calls of a decode step lie Python, cold caches and a wake-up of the threads, so
    fewer and larger calls are faster.  Each gives bitwise what the single ops give.
    """

    together = True

    def __init__(self, native: Kernels, attention: AttentionLayer, mlp: Mlp | None):
        self._native, self.attention, self.mlp = native, attention, mlp

    def begin(
        self, h_TD: Tensor, table_TC: Tensor, rows: Sequence[Tensor], positions: Sequence[int]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``slotmoe.model.network.FusedLayer``."""
        return self._native.attention(self.attention, h_TD, table_TC, rows, positions)

    def end(self, h_TD: Tensor, x_TD: Tensor, y_TD: Tensor | None) -> Tensor:
        """See ``slotmoe.model.network.FusedLayer``."""
        if self.mlp is not None:
            return self._native.mlp(x_TD, self.mlp, h_TD, y_TD)
        return h_TD if y_TD is None else h_TD + y_TD


class NativeOps(TorchOps):
    """The kernels of ``slotmoe.quant.kernels.cpu.bindings``: activations are quantized to int8 in
    blocks of 16 with a float32 scale each.

    A row's result never depends on the other rows, the threads or the cache, so decode and prefill
    agree.  torch's own threads stay idle in decode; what it still computes (softmax and top-k of
    the gate) is too small to share.
    """

    absorbs = True

    def __init__(self, native: Kernels):
        super().__init__(torch.float32)
        self._native = native
        self.name = f"native {native.isa}"

    @property
    def threads(self) -> int:
        return self._native.threads

    def timing(self) -> AbstractContextManager[dict[str, float]]:
        return self._native.timing()

    def prepare(self, role: str, weight: Weight, empty: Empty = new) -> Weight:
        """int8 matrices are tiled once; those of role ``embedding`` or ``absorbed`` stay
        row-major."""
        if isinstance(weight, Int8Weight) and role not in ("embedding", "absorbed"):
            scale = empty(tuple(weight.scale.shape), torch.float32).copy_(weight.scale)
            return TiledInt8Weight(self._native.pack_int8(weight.q, empty), scale)
        return super().prepare(role, weight, empty)

    def _read(self, memory: Tensor) -> None:
        self._native.read(memory)

    def linear(self, x_TK: Tensor, weight: Weight) -> Tensor:
        if isinstance(weight, TiledInt8Weight):
            return self._native.linear_int8(x_TK.contiguous(), weight.tiles, weight.scale)
        if isinstance(weight, Nf4Weight):
            return self._native.linear_nf4(
                x_TK.contiguous(), weight.codes, weight.absmax, weight.levels, weight.shape[0]
            )
        if isinstance(weight, Tensor):
            return self._native.linear_dense(x_TK.contiguous(), weight)
        return super().linear(x_TK, weight)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._native.rms_norm(x_TD.contiguous(), weight_D, eps)

    def mlp(self, x_TD: Tensor, gate_proj: Weight, up_proj: Weight, down_proj: Weight) -> Tensor:
        mlp = _mlp(gate_proj, up_proj, down_proj)
        return (
            super().mlp(x_TD, gate_proj, up_proj, down_proj)
            if mlp is None
            else self._native.mlp(x_TD.contiguous(), mlp)
        )

    def rotate(self, x_THP: Tensor, table_TC: Tensor) -> Tensor:
        return self._native.rotate(x_THP.contiguous(), table_TC)

    def absorb_query(self, q_THN: Tensor, kv_b: Weight) -> Tensor:
        if isinstance(kv_b, Int8Weight):
            return self._native.absorb_query(q_THN.contiguous(), kv_b.q, kv_b.scale)
        return super().absorb_query(q_THN, kv_b)

    def absorb_value(self, o_THR: Tensor, kv_b: Weight, N: int) -> Tensor:
        if isinstance(kv_b, Int8Weight):
            return self._native.absorb_value(o_THR, kv_b.q, kv_b.scale, N)
        return super().absorb_value(o_THR, kv_b, N)

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        return latent_bytes(R, P), torch.uint8

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        self._native.store_latents(latent_TW.contiguous(), R, rows_TX)

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        return self._native.mla(q_THW.contiguous(), rows_SX, len(rows_SX), R, scale)

    def fuse(
        self,
        layer: Any,
        sizes: tuple[int, int, int, int, int],
        eps: float,
        latent_eps: float,
        scale: float,
    ) -> FusedLayer | None:
        """``layer`` (``slotmoe.model.network.Layer``) bound for one token at a time; ``sizes`` are
        H, N, P, R, V of its attention.

        None where a weight is of a kind that the fused calls don't compute as the single ops do:
        bf16 ``kv_b_proj`` or MLP.
        """
        query = _matrix(layer.q_proj if layer.q_a_proj is None else layer.q_a_proj)
        query_b = None if layer.q_b_proj is None else _matrix(layer.q_b_proj)
        latent, out = _matrix(layer.kv_a_proj), _matrix(layer.o_proj)
        mlp = None if layer.mlp is None else _mlp(*layer.mlp)
        if (
            query is None
            or latent is None
            or out is None
            or not isinstance(layer.kv_b_proj, Int8Weight)
        ):
            return None
        if (query_b is None) != (layer.q_b_proj is None) or (mlp is None) != (layer.mlp is None):
            return None
        attention = AttentionLayer(
            sizes,
            layer.input_layernorm,
            query,
            layer.q_a_layernorm,
            query_b,
            latent,
            layer.kv_a_layernorm,
            layer.kv_b_proj.q,
            layer.kv_b_proj.scale,
            out,
            layer.post_attention_layernorm,
            None if layer.gate is None else Matrix.dense(layer.gate),
            eps=eps,
            latent_eps=latent_eps,
            scale=scale,
        )
        return FusedLayer(self._native, attention, mlp)

    def route(
        self, logits_TE: Tensor, groups: int, kept: int, top_k: int, factor: float | None
    ) -> tuple[Tensor, Tensor]:
        return self._native.route(logits_TE.contiguous(), Router(groups, kept, top_k, factor))

    def decoder(
        self,
        fused: Sequence[FusedLayer],
        groups: int,
        kept: int,
        top_k: int,
        factor: float | None,
        intermediate: int,
    ) -> Callable[..., Decoded]:
        layers = [(layer.attention, layer.mlp) for layer in fused]
        return partial(
            self._native.decode, Decoder(layers, Router(groups, kept, top_k, factor), intermediate)
        )

    def experts(
        self,
        x_D: Tensor,
        records: list[Tensor],
        weights_K: Tensor,
        layout: RecordLayout,
        levels: Tensor,
    ) -> Tensor:
        y_KD = self.experts_each(x_D, records, layout, levels)
        return self._native.weighted_sum(y_KD[None], weights_K[None])[0]

    def experts_each(
        self, x_D: Tensor, records: list[Tensor], layout: RecordLayout, levels: Tensor
    ) -> Tensor:
        return self._native.experts_each(
            x_D.contiguous(), records, layout.moe_intermediate_size, levels
        )

    def expert(self, x_TD: Tensor, record: Tensor, layout: RecordLayout, levels: Tensor) -> Tensor:
        y_T1D = x_TD.new_empty(len(x_TD), 1, x_TD.shape[1])
        self.experts_by_slot(
            x_TD, record[None], torch.zeros(len(x_TD), 1, dtype=torch.int32), layout, levels, y_T1D
        )
        return y_T1D[:, 0]

    def experts_by_slot(
        self,
        x_TD: Tensor,
        slab: Tensor,
        slots_TK: Tensor,
        layout: RecordLayout,
        levels: Tensor,
        y_TKD: Tensor,
    ) -> None:
        self._native.experts_by_slot(
            x_TD.contiguous(),
            slab,
            slots_TK.contiguous(),
            layout.moe_intermediate_size,
            levels,
            y_TKD,
        )

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return self._native.weighted_sum(y_TKD, weights_TK.contiguous())

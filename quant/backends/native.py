"""``NativeOps``: a CPU with the kernels of ``slotmoe.quant.kernels.cpu``.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, P qk_rope_head_dim.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slotmoe.quant.backends.base import Empty, Records, TorchOps, new
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.bindings import Kernels
from slotmoe.quant.kernels.cpu.weights import (
    AttentionLayer,
    Decoder,
    Matrix,
    Mlp,
    PackedInt8,
    Router,
)
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import latent_bytes

# Whose seconds a native decode call reports.
_STAGES = ("attention", "gate", "experts", "shared experts and dense layers")


@dataclass(frozen=True)
class TiledInt8Weight:
    """An int8 matrix in the order that the native kernels read, with its row scales, float32
    [N]."""

    tiles: PackedInt8
    scale: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.tiles.n, self.tiles.k


class NativeDecoder:
    """Runs layers for one token of each sequence, in one native call up to the first layer that
    lacks an expert.  The interface is that of ``slotmoe.model.network.Runner``.

    Between two calls lie Python, cold caches and a wake-up of the threads, so fewer and larger
    calls are faster.  Each gives bitwise what the single operations give.
    """

    sequences = 1 << 30

    def __init__(self, native: Kernels, decoder: Decoder, layers: int):
        self._native, self._decoder, self._layers = native, decoder, layers

    def run_layers(self, step: Any, experts: Any) -> tuple[int, Tensor, Tensor, Tensor] | None:
        """See ``slotmoe.model.network.Runner``."""
        table = experts.slot_table()
        for cache in step.caches:
            cache.extend(step.layer, 1)
        first = step.layer + (step.x_TD is not None)
        now = time.perf_counter()
        step.timer.mark("cache and prefetch", now)
        done = self._native.decode(
            self._decoder,
            step.layer,
            step.h_TD,
            step.rope_TC,
            [cache.layers for cache in step.caches],
            [cache.length for cache in step.caches],
            table.records.slab,
            table.slots_ME,
            table.records.levels,
            step.x_TD,
            step.routed_TD,
        )
        for stage, seconds in zip(_STAGES, done.seconds, strict=True):
            now += seconds
            step.timer.mark(stage, now)
        step.layer, step.h_TD = done.layer, done.h
        waits = done.layer < self._layers
        passed = done.indices[:-1] if waits else done.indices
        if len(passed):
            experts.passed(first, passed)
        if not waits:
            return None
        step.x_TD = done.x
        return done.layer, done.x, done.weights, done.indices[-1]


class NativeOps(TorchOps):
    """Activations are quantized to int8 in blocks of 16 with a float32 scale each.

    A row's result never depends on the other rows, the threads or the cache, so decode and prefill
    agree.  torch's own threads stay idle in decode.
    """

    kind, absorbs = "native", True

    def __init__(self, native: Kernels):
        super().__init__(torch.float32)
        self._native = native
        self.name = f"native {native.isa}"

    @property
    def threads(self) -> int:
        return self._native.threads

    def timing(self) -> AbstractContextManager[dict[str, float]]:
        return self._native.timing()

    def prepare(self, role: str, weight: Any, empty: Empty = new) -> Any:
        """int8 matrices are tiled once; those of role ``embedding`` or ``absorbed`` stay
        row-major."""
        if isinstance(weight, Int8Weight) and role not in ("embedding", "absorbed"):
            scale = empty(tuple(weight.scale.shape), torch.float32).copy_(weight.scale)
            return TiledInt8Weight(self._native.pack_int8(weight.q, empty), scale)
        return super().prepare(role, weight, empty)

    def _read(self, memory: Tensor) -> None:
        self._native.read(memory)

    def linear(self, x_TK: Tensor, weight: Any) -> Tensor:
        if isinstance(weight, TiledInt8Weight):
            return self._native.linear_int8(x_TK.contiguous(), weight.tiles, weight.scale)
        if isinstance(weight, Nf4Weight):
            coded = weight.codes, weight.absmax, weight.levels, weight.shape[0]
            return self._native.linear_nf4(x_TK.contiguous(), *coded)
        if isinstance(weight, Tensor):
            return self._native.linear_dense(x_TK.contiguous(), weight)
        return super().linear(x_TK, weight)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return self._native.rms_norm(x_TD.contiguous(), weight_D, eps)

    def mlp(self, x_TD: Tensor, gate_proj: Any, up_proj: Any, down_proj: Any) -> Tensor:
        mlp = _mlp(gate_proj, up_proj, down_proj)
        if mlp is None:
            return super().mlp(x_TD, gate_proj, up_proj, down_proj)
        return self._native.mlp(x_TD.contiguous(), mlp)

    def rotate(self, x_THP: Tensor, table_TC: Tensor) -> Tensor:
        return self._native.rotate(x_THP.contiguous(), table_TC)

    def absorb_query(self, q_THN: Tensor, kv_b: Any) -> Tensor:
        if isinstance(kv_b, Int8Weight):
            return self._native.absorb_query(q_THN.contiguous(), kv_b.q, kv_b.scale)
        return super().absorb_query(q_THN, kv_b)

    def absorb_value(self, o_THR: Tensor, kv_b: Any, N: int) -> Tensor:
        if isinstance(kv_b, Int8Weight):
            return self._native.absorb_value(o_THR, kv_b.q, kv_b.scale, N)
        return super().absorb_value(o_THR, kv_b, N)

    def latent_row(self, R: int, P: int) -> tuple[int, torch.dtype]:
        return latent_bytes(R, P), torch.uint8

    def store_latents(self, latent_TW: Tensor, R: int, rows_TX: Tensor) -> None:
        self._native.store_latents(latent_TW.contiguous(), R, rows_TX)

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        return self._native.mla(q_THW.contiguous(), rows_SX, len(rows_SX), R, scale)

    def route(self, logits_TE: Tensor, router: Any) -> tuple[Tensor, Tensor]:
        return self._native.route(logits_TE.contiguous(), Router(*router))

    def decoder(self, geometry: Any, layers: Sequence[Any]) -> NativeDecoder | None:
        """``geometry`` and ``layers`` are those of ``slotmoe.model.layers``.  None where a weight is
        of a kind that the native call does not compute as the single operations do: ``kv_b_proj``
        or an MLP in bf16."""
        bound = [_bind(geometry, layer) for layer in layers]
        complete = [layer for layer in bound if layer is not None]
        if len(complete) < len(layers):
            return None
        router = Router(*geometry.router)
        decoder = Decoder(complete, router, geometry.moe_intermediate_size)
        return NativeDecoder(self._native, decoder, len(layers))

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        width, slots_TK = records.layout.moe_intermediate_size, slots_E[indices_TK]
        x_TD = x_TD.contiguous()
        self._native.experts_by_slot(x_TD, records.slab, slots_TK, width, records.levels, y_TKD)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return self._native.weighted_sum(y_TKD, weights_TK.contiguous())


def _matrix(weight: Any) -> Matrix | None:
    """The weight bound for native calls; None if it is row-major int8, which only the absorbed
    products and ``embed`` take."""
    if isinstance(weight, TiledInt8Weight):
        return Matrix.int8(weight.tiles, weight.scale)
    if isinstance(weight, Nf4Weight):
        return Matrix.nf4(weight.codes, weight.absmax, weight.levels, *weight.shape)
    return Matrix.dense(weight) if isinstance(weight, Tensor) else None


def _mlp(*weights: Any) -> Mlp | None:
    """Gate, up and down bound for native calls; None unless all are tiled int8 or all NF4."""
    for kind in (TiledInt8Weight, Nf4Weight):
        if all(isinstance(weight, kind) for weight in weights):
            gate, up, down = (_matrix(weight) for weight in weights)
            assert gate is not None and up is not None and down is not None
            return Mlp(gate, up, down)
    return None


def _bind(geometry: Any, layer: Any) -> tuple[AttentionLayer, Mlp | None] | None:
    """A layer's weights bound for native calls, or None: see ``NativeOps.decoder``."""
    query = _matrix(layer.q_proj if layer.q_a_proj is None else layer.q_a_proj)
    query_b = None if layer.q_b_proj is None else _matrix(layer.q_b_proj)
    latent, out = _matrix(layer.kv_a_proj), _matrix(layer.o_proj)
    mlp = None if layer.mlp is None else _mlp(*layer.mlp)
    if query is None or latent is None or out is None:
        return None
    if (query_b is None) != (layer.q_b_proj is None) or (mlp is None) != (layer.mlp is None):
        return None
    if not isinstance(layer.kv_b_proj, Int8Weight):
        return None
    attention = AttentionLayer(
        geometry[:5],
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
        eps=geometry.eps,
        latent_eps=geometry.latent_eps,
        scale=geometry.softmax_scale,
    )
    return attention, mlp

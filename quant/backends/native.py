"""``NativeBackend``: a CPU with the kernels of ``slotmoe.quant.kernels.cpu``.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, P qk_rope_head_dim.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from slotmoe import border
from slotmoe.border import Chunk, Geometry, HyperGeometry, ListedRows, Mixed, Mixing, Mla, Router
from slotmoe.quant.backends.base import Empty, Prepared, Records, RoutedExperts, TorchBackend, new
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.bindings import Kernels
from slotmoe.quant.kernels.cpu.layers import Decoder
from slotmoe.quant.kernels.cpu.tokens import Tokens
from slotmoe.quant.kernels.cpu.weights import Absorbed, ExpertRecord, Matrix, Mlp, bind_router
from slotmoe.quant.shapes import latent_bytes
from slotmoe.quant.weights import Weight
from slotmoe.state import CompressedCache, Group, LatentCache, SequenceState
from slotmoe.system import Placement

# Whose seconds a native decode call reports.
_STAGES = ("attention", "gate", "experts", "shared experts and dense layers")


@dataclass(frozen=True)
class NativeDecoder:
    """Runs layers for a few tokens of each sequence, in one native call up to the first layer that
    lacks an expert.  See ``slotmoe.quant.backends.base.Runner``.

    Between two calls lie Python, cold caches and a wake-up of the threads, so fewer and larger
    calls are faster.  Each gives bitwise what the single operations give.
    """

    native: Kernels
    decoder: Decoder
    record: Callable[[Records], ExpertRecord]
    rows: ClassVar[int] = 1 << 30

    def run_layers(self, chunk: Chunk, experts: RoutedExperts) -> border.Pending | None:
        """See ``slotmoe.quant.backends.base.Runner``."""
        table = experts.slot_table()
        owners = [*zip(chunk.caches, chunk.counts, strict=True)]
        states = [state for state, count in owners for _ in range(count)]
        first = chunk.layer + (chunk.x_TD is not None)
        began = time.perf_counter()
        # A call stores all latents of a layer before any token attends to them.
        positions = [state.length + index for state, count in owners for index in range(count)]
        records = table.records.slab, table.slots_ME, self.record(table.records)
        kind = self._compressed if self.decoder.window else self._latent
        stream = chunk.layer, chunk.h_TD, kind(chunk, states, positions)
        done = self.native.decode(self.decoder, *stream, *records, chunk.x_TD, chunk.routed_TD)
        if chunk.timer is not None:
            ends = accumulate(done.seconds, initial=began)
            for stage, now in zip(("cache and prefetch", *_STAGES), ends, strict=True):
                chunk.timer.mark(stage, now)
        chunk.layer, chunk.h_TD = done.layer, done.h
        if done.layer == len(self.decoder.routed):
            if len(done.indices):
                experts.passed(first, done.indices, done.x)
            return None
        if len(done.indices) > 1:
            experts.passed(first, done.indices[:-1], done.x[:-1])
        chunk.x_TD = done.x[-1]
        return border.Pending(done.layer, done.x[-1], done.weights, done.indices[-1])

    def _latent(
        self, chunk: Chunk, states: Sequence[SequenceState], positions: Sequence[int]
    ) -> Tokens:
        """With each token's latent cache, and what indexers keep and have chosen."""
        caches = cast(Sequence[LatentCache], states)
        for cache, position in zip(caches, positions, strict=True):
            cache.extend(chunk.layer, position + 1 - cache.length)
        if self.decoder.topk and chunk.lists_TL is None:
            chunk.lists_TL = torch.empty(len(caches), self.decoder.topk, dtype=torch.int32)
        keys, rows = [cache.index_keys for cache in caches], [cache.layers for cache in caches]
        return Tokens(chunk.rope_TC, rows, positions, chunk.query_scale_T, keys, chunk.lists_TL)

    def _compressed(
        self, chunk: Chunk, states: Sequence[SequenceState], positions: Sequence[int]
    ) -> Tokens:
        """With each token's rows of the window, and compressed ones."""
        caches = cast(Sequence[CompressedCache], states)
        Q, T = self.decoder.streams, len(states)
        if chunk.mixed is None:
            chunk.mixed = Mixed(torch.empty(T, Q), torch.empty(T, Q, Q))
        assert chunk.compressed_C is not None and chunk.compressed_rope_TC is not None
        groups = list[tuple[list[Group], Tensor]]()
        positions_T = torch.tensor(positions)
        for ratio, index in ((shape.ratio, shape.index) for shape in self.decoder.groups):
            starts_T = (positions_T // ratio * ratio).float()
            parts = [cache.index if index else cache.groups[ratio] for cache in caches]
            held = [part for part in parts if part is not None]
            groups.append((held, self.native.rotations(starts_T, chunk.compressed_C, 1.0)))
        windows, kept = [cache.window for cache in caches], (chunk.compressed_rope_TC, groups)
        rows, first = [window.rows for window in windows], [window.first for window in windows]
        place = chunk.rope_TC, rows, positions, chunk.query_scale_T
        return Tokens(*place, (), None, first, chunk.ids_T, *kept, *chunk.mixed)


class NativeBackend(TorchBackend):
    """Activations are quantized to int8 in blocks of 16 with a float32 scale each.  Those of
    ``kv_b_proj``, and all with the instruction set ``amx``, have 15 bits and one scale a row.

    A row's result never depends on the other rows, the threads or the cache, so decode and prefill
    agree.  torch's own threads stay idle in decode.
    """

    kind, absorbs = "native", True

    def __init__(self, native: Kernels, swiglu_limit: float = 0.0):
        super().__init__(torch.float32, swiglu_limit)
        self._native = native
        self._bound = WeakKeyDictionary[Records, ExpertRecord]()
        self.name = f"native {native.isa}"

    @property
    def threads(self) -> int:
        return self._native.threads

    def run_on(self, placement: Placement) -> None:
        self._native.set_threads(placement.threads)
        self._native.set_cpus(placement.cpus)

    def seconds(self) -> dict[str, float]:
        return self._native.seconds()

    def prepare(
        self, role: str, weight: Weight, empty: Empty = new, head: tuple[int, int] = (0, 0)
    ) -> Prepared:
        """int8 and codes are bound for native calls; an ``embedding`` stays as it is."""
        if isinstance(weight, Int8Weight) and role == "absorbed":
            return self._native.tile_absorbed(weight, head, empty)
        if isinstance(weight, Int8Weight) and role != "embedding":
            return self._native.tile_int8(weight, empty)
        copied = super().prepare(role, weight, empty)
        return Matrix.of(copied) if isinstance(copied, CodedWeight) else copied

    def _read(self, memory: Tensor) -> None:
        self._native.read(memory)

    def linear(self, x_TK: Tensor, weight: Prepared) -> Tensor:
        if isinstance(weight, Int8Weight):  # row-major: an embedding table that is the head too
            return super().linear(x_TK, weight)
        return self._native.linear(Matrix.of(weight), x_TK.contiguous())

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
        x_TD, *mixed = self._native.hyper_in(h_TQD, *weights, eps, iterations, small)
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

    def mlp(self, x_TD: Tensor, weights: border.Mlp[Prepared]) -> Tensor:
        if (mlp := self._mlp(weights)) is None:
            return super().mlp(x_TD, weights)
        return self._native.mlp(mlp, x_TD.contiguous())

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
        self._native.store_latents(latent_TW.contiguous(), R, rows_TX)

    def mla(self, q_THW: Tensor, rows_SX: Tensor, R: int, scale: float) -> Tensor | None:
        return self._native.mla(q_THW.contiguous(), rows_SX, len(rows_SX), R, scale)

    def attend(self, q_THW: Tensor, listed: ListedRows, R: int, scale: float) -> Tensor:
        listed = listed._replace(lists_TL=listed.lists_TL.contiguous())
        return self._native.attend(q_THW.contiguous(), listed, R, scale)

    def index(
        self, q_TJA: Tensor, weights_TJ: Tensor, keys_SX: Tensor, counts_T: Tensor, k: int
    ) -> Tensor:
        return self._native.index(q_TJA.contiguous(), weights_TJ.contiguous(), keys_SX, counts_T, k)

    def route(
        self, logits_TE: Tensor, router: Router, bias_E: Tensor | None, chosen_TK: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        values = bind_router(router), logits_TE.contiguous(), bias_E, chosen_TK
        weights_TK, indices_TK = self._native.route(*values)
        return weights_TK, indices_TK

    def decoder(
        self, geometry: Geometry, layers: Sequence[border.Layer[Prepared]]
    ) -> NativeDecoder | None:
        """None where the native call does not compute as the single operations do: ``kv_b_proj`` or
        an MLP in bf16, groups of an output projection that share tiles, or V4 with one stream."""
        mlps = list[Mlp | None]()
        for layer in layers:
            mlp = None if layer.mlp is None else self._mlp(layer.mlp)
            if isinstance(attention := layer.attention, Mla):
                is_native = isinstance(attention.kv_b_proj, Absorbed)
            else:
                assert geometry.compressed is not None
                rest = Matrix.of(attention.o_a_proj).shape[0] % (geometry.compressed.groups * TILE)
                is_native = rest == 0 and geometry.hyper is not None
            if (mlp is None) != (layer.mlp is None) or not is_native:
                return None
            mlps.append(mlp)
        return NativeDecoder(self._native, Decoder(geometry, layers, mlps), self._record)

    def _record(self, records: Records) -> ExpertRecord:
        """How the records are coded, bound for native calls."""
        if records not in self._bound:
            layout = records.layout
            sizes, limit = (layout.hidden_size, layout.moe_intermediate_size), self.swiglu_limit
            self._bound[records] = ExpertRecord(*sizes, layout.codecs, records.levels, limit)
        return self._bound[records]

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        inputs, record = (x_TD.contiguous(), indices_TK.contiguous()), self._record(records)
        self._native.experts_by_slot(record, *inputs, slots_E, record.slab(records.slab), y_TKD)

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return self._native.weighted_sum(y_TKD, weights_TK.contiguous())

    def _mlp(self, weights: border.Mlp[Prepared]) -> Mlp | None:
        """The weights bound for native calls; None unless all are tiled int8, or of one codec."""
        parts = weights.gate_proj, weights.up_proj, weights.down_proj
        matrices = [Matrix.of(weight) for weight in parts if not isinstance(weight, Int8Weight)]
        if len(matrices) < 3 or not matrices[0].coded or not all(map(matrices[0].like, matrices)):
            return None
        gate, up, down = matrices
        return Mlp(gate, up, down, self.swiglu_limit)

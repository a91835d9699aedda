"""``NativeBackend``: a CPU with the kernels of ``slotmoe.quant.kernels.cpu``.

Shapes: T tokens, N rows out, K columns in or experts a token, D hidden_size, H heads, R
kv_lora_rank, P qk_rope_head_dim.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from operator import attrgetter
from typing import ClassVar, cast

import torch
from torch import Tensor

from slotmoe.network import layer_types
from slotmoe.network.layer_types import Chunk, HyperGeometry, Mixed, Mixing, Pending
from slotmoe.network.recurrent_state import Tail
from slotmoe.network.shapes import CONVOLVED, SWIGLU, Activation, latent_bytes
from slotmoe.network.state import CompressedCache, GroupedCache, LatentCache, SequenceState
from slotmoe.quant.backends.base import Empty, Prepared, Records, RoutedExperts, TorchBackend, new
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, Weight
from slotmoe.quant.kernels.cpu.bindings import (
    NO_DELTA,
    NO_STORE,
    STAGES,
    TOKENS,
    ExpertSlab,
    Kernels,
    Store,
    address,
    compressed_rows,
    int64s,
    latent_rows,
    layer_rows,
)
from slotmoe.quant.kernels.cpu.weights import Absorbed, BoundLayers, BoundMlp, Matrix, bind_router
from slotmoe.system import Placement

_ENDED = 32  # rows whose logits a pass gives


def _tokens_of(chunk: Chunk) -> tuple[list[SequenceState], list[int]]:
    """The state and the position of each token of ``chunk``."""
    caches, positions = list[SequenceState](), list[int]()
    for cache, before, count in zip(chunk.caches, chunk.before, chunk.counts, strict=True):
        position = cache.length + before
        caches += [cache] * count
        positions += range(position, position + count)
    return caches, positions


class NativeDecoder:
    """Runs layers in one native call up to the first layer that lacks an expert, or if the chunk
    waits, to the next layer that has some.  See ``slotmoe.quant.backends.base.Runner``.

    Between two calls lie Python, cold caches and a wake-up of the threads, so fewer and larger
    calls are faster.  Each gives bitwise what the single operations give.  Weights, records and
    sequences' rows are checked when they are bound, and here what changes from call to call.
    """

    rows: ClassVar[int] = 1 << 30

    def __init__(
        self, native: Kernels, layers: BoundLayers, bind: Callable[[Records], ExpertSlab]
    ) -> None:
        self._native, self._layers, self._bind = native, layers, bind
        self._count = len(layers.routers_from) - 1
        self._rows, self._keys = Store(*layers.rows), Store(*layers.keys)
        self._inputs, self._states = Store(*layers.inputs), Store(*layers.states)
        # Of one token's call that asks so many routers; no two of a pass ask equally many.
        self._results = dict[int, tuple[list[Tensor], list[int]]]()
        self._slots_ME: Tensor | None = None  # that were checked last
        shape = layers.sizes["M"], layers.sizes.get("E", 0)
        self._no_slots_ME = torch.full(shape, -1, dtype=torch.int32)
        # Of the last call, checked.
        self._positions, self._given = int64s([]), tuple[object, ...]()
        self._ids: tuple[Tensor | None, int | None] = None, None
        self._reached, self._spent = ctypes.c_int64(), (ctypes.c_double * len(STAGES))()
        kinds = {layer_types.Mla: self._latent, layer_types.Compressed: self._compressed}
        kinds |= {layer_types.Grouped: self._grouped}
        self._tokens = kinds[layers.attention]

    def run_layers(
        self, chunk: Chunk, experts: RoutedExperts, stop: int | None = None
    ) -> Pending | None:
        """See ``slotmoe.quant.backends.base.Runner``.  ``AssertionError`` for a tensor of another
        shape, kind or place than the layers', ``ValueError`` for a slab or window too small."""
        layers, first, x_TD = self._layers, chunk.layer, chunk.x_TD
        stop = self._count if stop is None else stop
        table = experts.slot_table()
        resumed = x_TD is not None
        assert 0 <= first < stop <= self._count
        assert resumed == (chunk.routed_TD is not None)
        asked = layers.routers_from[first] - layers.routers_from[stop] - resumed
        assert asked >= layers.routers_from[first + 1] - layers.routers_from[stop]
        began, slots_ME, sizes = time.perf_counter(), table.slots_ME, layers.sizes
        if chunk.waits:
            slots_ME, asked = self._no_slots_ME, min(asked, 1)
        # A call stores all latents of a layer before any token attends to them.
        caches, positions = _tokens_of(chunk)
        T = len(positions)
        if chunk.ids_T is not self._ids[0]:
            self._ids = chunk.ids_T, address(chunk.ids_T, torch.int64, T)
        tokens, slab = self._tokens(chunk, caches, positions), self._bind(table.records)
        if slots_ME is not self._slots_ME:
            address(slots_ME, torch.int32, sizes["M"], sizes["E"])
            self._slots_ME = slots_ME
        gives = layers.streams == 1 and T <= _ENDED and not chunk.waits
        results, places = self._memory(asked, T, gives)
        y_TX, norms, weights_TK, logits_TV, indices, inputs = results
        f32, H, Q = torch.float32, sizes["H"], sizes["Q"]
        h = address(chunk.h_TD, f32, T, sizes["X"]) if len(chunk.h_TD) else None
        if h is not None:  # the stream goes on in its place
            y_TX = chunk.h_TD
        x, routed, post, comb = None, None, None, None
        if resumed:
            x, routed = address(x_TD, f32, T, H), address(chunk.routed_TD, f32, T, H)
        if mixed := chunk.mixed:
            post, comb = address(mixed[0], f32, T, Q), address(mixed[1], f32, T, Q, Q)
        self._native.call(
            *("decode", layers.address, first, stop, T, h, ctypes.byref(tokens)),
            *(slots_ME.data_ptr(), slab.slab, slab.sizes["S"], slab.sizes["B"], slab.address),
            *(x, routed, post, comb, h or places[0], *places[1:3], places[4]),
            *(ctypes.byref(self._reached), places[3] or None, self._spent),
        )
        if chunk.timer is not None:
            ends = accumulate(self._spent, initial=began)
            for stage, now in zip(("cache and prefetch", *STAGES), ends, strict=True):
                chunk.timer.mark(stage, now)
        at, behind = self._reached.value, first + resumed
        chunk.layer, chunk.h_TD, chunk.x_TD, chunk.routed_TD = at, y_TX, None, None
        if at == stop:
            chunk.logits_TV = logits_TV if gives and at == self._count else None
            if asked:
                experts.passed(behind, indices, inputs)
            return None
        asked = layers.routers_from[behind] - layers.routers_from[at + 1]
        if asked > 1:
            experts.passed(behind, indices[: asked - 1], norms[: asked - 1])
        chunk.x_TD = norms[asked - 1]
        return Pending(at, norms[asked - 1], weights_TK, indices[asked - 1])

    def _memory(self, asked: int, T: int, gives: bool) -> tuple[list[Tensor], list[int]]:
        """What a call that asks so many routers gives: streams, inputs of routers, weights, logits,
        choices, and the inputs without what is behind the last router; and the addresses of the
        first five."""
        if T == 1 and (results := self._results.get(asked)) is not None:
            return results
        sizes = self._layers.sizes
        norms = (asked + 1, T, sizes["H"])
        shapes = (T, sizes["X"]), norms, (T, sizes["K"]), (gives * T, sizes["V"])
        memory = [*map(torch.empty, shapes), torch.empty(asked, *shapes[2], dtype=torch.int64)]
        results = [*memory, memory[1][:asked]], [tensor.data_ptr() for tensor in memory]
        if T == 1:
            self._results[asked] = results
        return results

    def _latent(
        self, chunk: Chunk, states: Sequence[SequenceState], positions: list[int]
    ) -> ctypes.Structure:
        """With each token's latent cache, and what indexers keep and have chosen."""
        caches, T = cast(Sequence[LatentCache], states), len(positions)
        rows = self._rows.bound([*map(attrgetter("layers"), caches)], positions)
        keys, lists = NO_STORE, None
        if topk := self._layers.topk:
            if chunk.lists_TL is None:
                chunk.lists_TL = torch.empty(T, topk, dtype=torch.int32)
            keys = self._keys.bound([cache.index_keys for cache in caches], positions)
            lists = address(chunk.lists_TL, torch.int32, T, topk)
        scale = chunk.query_scale_T
        scaled = None if scale is None else address(scale, torch.float32, T)
        delta = self._delta(states, positions) if self._layers.inputs[0] else NO_DELTA
        return self._bound(positions, scaled, *rows, *keys, lists, self._ids[1], None, *delta)

    def _bound(self, positions: list[int], *given: object) -> ctypes.Structure:
        """The tokens at their positions, as they were where the rest is."""
        if len(positions) != len(self._positions):
            self._positions = int64s(positions)
        self._positions[:] = positions  # type: ignore[assignment]
        if (given := (self._positions, None, *given)) != self._given:
            self._given, self._structure = given, TOKENS[len(self._layers.groups)](*given)
        return self._structure

    def _compressed(
        self, chunk: Chunk, states: Sequence[SequenceState], positions: list[int]
    ) -> ctypes.Structure:
        """With each token's rows of the window, and compressed ones."""
        caches, layers = cast(Sequence[CompressedCache], states), self._layers
        T, C, Q, c64 = len(positions), layers.sizes["C"], layers.streams, torch.complex64
        if chunk.mixed is None:
            chunk.mixed = Mixed(torch.empty(T, Q), torch.empty(T, Q, Q))
        assert chunk.compressed_C is not None
        groups, self._tables = list[object](), list[Tensor]()  # which the call reads
        for shape in layers.groups:
            starts_T = (torch.tensor(positions) // shape.ratio * shape.ratio).float()
            table_TC = self._native.rotations(starts_T, chunk.compressed_C, 1.0)
            parts = [c.index if shape.index else c.groups[shape.ratio] for c in caches]
            rows = compressed_rows([part for part in parts if part is not None], positions, shape)
            groups += *rows, address(table_TC, c64, T, C)
            self._tables.append(table_TC)
        last = self._last(self._rows, [cache.window for cache in caches], positions)
        scaled = address(chunk.query_scale_T, torch.float32, T)
        turned = address(chunk.compressed_rope_TC, c64, T, C)
        given = scaled, *last, *NO_STORE, None, self._ids[1], turned
        return self._bound(positions, *given, *NO_DELTA, *groups)

    def _grouped(
        self, chunk: Chunk, states: Sequence[SequenceState], positions: list[int]
    ) -> ctypes.Structure:
        """With each token's keys and values, of all tokens and of the window."""
        caches = cast(Sequence[GroupedCache], states)
        rows = keys = NO_STORE
        if self._layers.rows[0]:
            rows = self._rows.bound([cache.rows for cache in caches], positions)
        if self._layers.keys[0]:
            tails = [cache.window for cache in caches if cache.window is not None]
            keys = self._last(self._keys, tails, positions)
        delta = self._delta(states, positions) if self._layers.inputs[0] else NO_DELTA
        return self._bound(positions, None, *rows, *keys, None, self._ids[1], None, *delta)

    def _delta(self, states: Sequence[SequenceState], positions: list[int]) -> tuple[object, ...]:
        """Each token's inputs of delta rules, and their states.  Raises `ValueError`."""
        caches = [state.deltas for state in states if state.deltas is not None]
        tails, own = [cache.inputs for cache in caches], [cache.states for cache in caches]
        firsts = [tail.first for tail in tails]
        for state, first in zip(own, firsts, strict=True):
            if state.at - min(state.at, CONVOLVED - 1) < first:
                raise ValueError(f"inputs begin at {first}, but the state is of {state.at} tokens")
        reads = [state.read for state in own]
        inputs = self._inputs.bound([tail.rows for tail in tails], positions, firsts)
        folds = chain.from_iterable((state.at, state.read, state.folds) for state in own)
        held = self._states.bound([state.rows for state in own], reads)
        return *inputs, *held, int64s([*folds])

    def _last(
        self, store: Store, windows: Sequence[Tail], positions: list[int]
    ) -> tuple[object, ...]:
        """Each token's rows of the window.  Raises `ValueError`."""
        wanted = self._layers.window
        for at, window in zip(positions, windows, strict=True):
            if max(0, at + 1 - wanted) < window.first:
                raise ValueError(f"the window begins at {window.first}, expected {wanted} rows")
        firsts = [window.first for window in windows]
        return store.bound([window.rows for window in windows], positions, firsts)


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
    ) -> NativeDecoder | None:
        """None where the native call does not compute as the single operations do: ``kv_b_proj`` or
        an MLP in bf16, groups of an output projection that share tiles, V4 with one stream, or
        whole rows normed behind their rotation."""
        mlps = list[BoundMlp | None]()
        for layer in layers:
            mlp = None if layer.mlp is None else self._mlp(layer.mlp)
            if isinstance(attention := layer.attention, layer_types.Mla):
                is_native = isinstance(attention.kv_b_proj, Absorbed)
            elif isinstance(attention, layer_types.Grouped):
                assert geometry.grouped is not None
                norms = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
                alike = all(len(norm) == geometry.grouped.Z for norm in norms)
                is_native = alike or not geometry.grouped.norm_last
            elif isinstance(attention, layer_types.Delta):
                is_native = True
            else:
                assert geometry.compressed is not None
                rest = Matrix.of(attention.o_a_proj).shape[0] % (geometry.compressed.groups * TILE)
                is_native = rest == 0 and geometry.hyper is not None
            if (mlp is None) != (layer.mlp is None) or not is_native:
                return None
            mlps.append(mlp)
        return NativeDecoder(self._native, BoundLayers(geometry, layers, ends, mlps), self._bind)

    def _bind(self, records: Records) -> ExpertSlab:
        """The records bound for native calls."""
        if records.bound is None:
            layout = records.layout
            sizes, biases = (layout.hidden_size, layout.moe_intermediate_size), layout.bias_shapes
            how = *sizes, layout.codecs, records.levels, self.activation, bool(biases)
            records.bound = ExpertSlab(records.slab, *how)
        return records.bound

    def experts(
        self, x_TD: Tensor, records: Records, slots_E: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> None:
        slab, inputs = self._bind(records), (x_TD.contiguous(), indices_TK.contiguous())
        self._native.experts_by_slot.results(slab, *inputs, slots_E, slab.slab, y_TKD)

    def outputs(self, x_TD: Tensor, indices_TK: Tensor) -> Tensor:
        return torch.empty(*indices_TK.shape, x_TD.shape[1])

    def weighted_sum(self, y_TKD: Tensor, weights_TK: Tensor) -> Tensor:
        return self._native.weighted_sum(y_TKD, weights_TK.contiguous())

    def _mlp(self, weights: layer_types.Mlp[Prepared]) -> BoundMlp | None:
        """The weights bound for native calls; None unless all are tiled int8, or of one codec, and
        without biases."""
        parts = weights.gate_proj, weights.up_proj, weights.down_proj
        matrices = [Matrix.of(weight) for weight in parts if not isinstance(weight, Int8Weight)]
        alike = len(matrices) == 3 and all(map(matrices[0].like, matrices))
        if not alike or not matrices[0].coded or weights.biases is not None:
            return None
        gate, up, down = matrices
        return BoundMlp(gate, up, down, self.activation, weights.output_gate)

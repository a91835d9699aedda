"""``NativeDecoder``: passes by the kernels of ``slotmoe.quant.kernels.cpu``.

Shapes: T tokens, M MoE layers, E routed experts, X all columns of a residual stream.
"""

import ctypes
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import attrgetter, sub
from typing import ClassVar, cast

import torch
from torch import Tensor

from slotmoe.network import layer_types
from slotmoe.network.layer_types import Chunk, Mixed, Pending, Timer
from slotmoe.network.recurrent_state import Tail
from slotmoe.network.shapes import CONVOLVED, Activation
from slotmoe.network.state import CompressedCache, GroupedCache, LatentCache, SequenceState
from slotmoe.quant.backends.base import Records, RoutedExperts
from slotmoe.quant.backends.staged_rows import StagedRows
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
    open_rows,
)
from slotmoe.quant.kernels.cpu.weights import BoundLayers

_ENDED = 32  # rows whose logits a pass gives


def _tokens_of(chunk: Chunk) -> tuple[list[SequenceState], list[int]]:
    """The state and the position of each token of ``chunk``."""
    caches, positions = list[SequenceState](), list[int]()
    for cache, before, count in zip(chunk.caches, chunk.before, chunk.counts, strict=True):
        position = cache.length + before
        caches += [cache] * count
        positions += range(position, position + count)
    return caches, positions


def _ends_of(chunk: Chunk) -> list[int]:
    """The position behind each sequence's tokens in ``chunk``."""
    parts = zip(chunk.caches, chunk.before, chunk.counts, strict=True)
    return [cache.length + before + count for cache, before, count in parts]


def _bind(staged: Mapping[str, StagedRows], name: str) -> tuple[object, ...]:
    """The staged rows of that name, if the layer has some."""
    return staged[name].bind() if name in staged else NO_STORE


def bind_records(records: Records, activation: Activation) -> ExpertSlab:
    """Return the records bound for native calls, which they are once."""
    if records.bound is None:
        layout = records.layout
        records.bound = ExpertSlab(
            records.slab,
            hidden=layout.hidden_size,
            intermediate=layout.moe_intermediate_size,
            codecs=layout.codecs,
            levels=records.levels,
            activation=activation,
            biases=bool(layout.bias_shapes),
        )
    return records.bound


class NativeDecoder:
    """Runs layers in one native call up to the first layer that lacks an expert, or if the chunk
    waits, to the next layer that has some.  See ``slotmoe.quant.backends.base.Runner``.

    Between two calls lie Python, cold caches and a wake-up of the threads, so fewer and larger
    calls are faster.  Each gives bitwise what the single operations give.  Weights, records and
    sequences' rows are checked when they are bound, and here what changes from call to call.
    """

    rows: ClassVar[int] = 1 << 30

    def __init__(self, native: Kernels, layers: BoundLayers, activation: Activation) -> None:
        self._native, self._layers, self._activation = native, layers, activation
        self._count = len(layers.routers_from) - 1
        self._rows, self._keys = Store(*layers.rows), Store(*layers.keys)
        self._inputs, self._states = Store(*layers.inputs), Store(*layers.states)
        # Of one token's call that asks so many routers; no two of a pass ask equally many.
        self._results = dict[tuple[int, int], tuple[list[Tensor], list[int]]]()
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
        stop = self._count if stop is None else stop
        if not chunk.waits or not any(cache.rolls for cache in chunk.caches):
            return self._run(chunk, experts, stop)
        assert chunk.layer < stop
        while chunk.layer < stop:  # one by one: the windows of a layer are staged
            layer = chunk.layer
            staged = self._stage(chunk) if chunk.x_TD is None else {}
            pending = self._run(chunk, experts, chunk.layer + 1, staged)
            for rows in staged.values():
                rows.take_over()
            if staged:
                for cache, end in zip(chunk.caches, _ends_of(chunk), strict=True):
                    cache.through(layer, end)
            if pending is not None:
                return pending
        return None

    def _stage(self, chunk: Chunk) -> Mapping[str, StagedRows]:
        """The windows of the chunk's layer, with room for its tokens."""
        windows = [cache.windows(chunk.layer) for cache in chunk.caches]
        begins = [*map(sub, _ends_of(chunk), chunk.counts)]
        staged = dict[str, StagedRows]()
        for name, (_, layers) in windows[0].items():
            of_sequences = [window[name][0] for window in windows]
            staged[name] = StagedRows(of_sequences, layers, begins, chunk.counts)
        return staged

    def _run(
        self,
        chunk: Chunk,
        experts: RoutedExperts,
        stop: int,
        staged: Mapping[str, StagedRows] | None = None,
    ) -> Pending | None:
        """``run_layers`` in one native call, of a layer whose windows are ``staged`` if given."""
        layers, first, x_TD = self._layers, chunk.layer, chunk.x_TD
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
        tokens = self._tokens(chunk, caches, positions, staged)
        slab = bind_records(table.records, self._activation)
        if slots_ME is not self._slots_ME:
            address(slots_ME, torch.int32, sizes["M"], sizes["E"])
            self._slots_ME = slots_ME
        gives = layers.streams == 1 and T <= _ENDED and not chunk.waits
        results, places = self._memory(asked, 1 if chunk.waits else asked + 1, T, gives)
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
            self._mark(chunk.timer, began)
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

    def _mark(self, timer: Timer, began: float) -> None:
        """Say what the last call, which began then, has spent its time on."""
        ends = accumulate(self._spent, initial=began)
        for stage, now in zip(("cache and prefetch", *STAGES), ends, strict=True):
            timer.mark(stage, now)

    def _memory(
        self, asked: int, norms_count: int, T: int, gives: bool
    ) -> tuple[list[Tensor], list[int]]:
        """What a call that asks so many routers gives: streams, norms before so many routers and
        behind the last one, weights, logits, choices, and the norms before the routers; and the
        addresses of the first five."""
        if T == 1 and (results := self._results.get((asked, norms_count))) is not None:
            return results
        sizes = self._layers.sizes
        norms = (norms_count, T, sizes["H"])
        shapes = (T, sizes["X"]), norms, (T, sizes["K"]), (gives * T, sizes["V"])
        memory = [*map(torch.empty, shapes), torch.empty(asked, *shapes[2], dtype=torch.int64)]
        results = [*memory, memory[1][:asked]], [tensor.data_ptr() for tensor in memory]
        if T == 1:
            self._results[asked, norms_count] = results
        return results

    def _latent(
        self,
        chunk: Chunk,
        states: Sequence[SequenceState],
        positions: list[int],
        staged: Mapping[str, StagedRows] | None,
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
        delta = self._delta(chunk, states, positions, staged)
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
        self,
        chunk: Chunk,
        states: Sequence[SequenceState],
        positions: list[int],
        staged: Mapping[str, StagedRows] | None,
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
            own = [part for part in parts if part is not None]
            if staged is None:
                opened = open_rows(own, positions, shape)
            else:
                opened = _bind(staged, "open index" if shape.index else f"open {shape.ratio}")
            groups += *compressed_rows(own, positions, shape), *opened, address(table_TC, c64, T, C)
            self._tables.append(table_TC)
        windows = [cache.window for cache in caches]
        if staged is None:
            last = self._last(self._rows, windows, positions)
        else:
            last = _bind(staged, "rows")
        scaled = address(chunk.query_scale_T, torch.float32, T)
        turned = address(chunk.compressed_rope_TC, c64, T, C)
        given = scaled, *last, *NO_STORE, None, self._ids[1], turned
        return self._bound(positions, *given, *NO_DELTA, *groups)

    def _grouped(
        self,
        chunk: Chunk,
        states: Sequence[SequenceState],
        positions: list[int],
        staged: Mapping[str, StagedRows] | None,
    ) -> ctypes.Structure:
        """With each token's keys and values, of all tokens and of the window."""
        caches = cast(Sequence[GroupedCache], states)
        rows = keys = NO_STORE
        if self._layers.rows[0]:
            rows = self._rows.bound([cache.rows for cache in caches], positions)
        if staged is not None:
            keys = _bind(staged, "keys")
        elif self._layers.keys[0]:
            tails = [cache.window for cache in caches if cache.window is not None]
            keys = self._last(self._keys, tails, positions)
        delta = self._delta(chunk, states, positions, staged)
        return self._bound(positions, None, *rows, *keys, None, self._ids[1], None, *delta)

    def _delta(
        self,
        chunk: Chunk,
        states: Sequence[SequenceState],
        positions: list[int],
        staged: Mapping[str, StagedRows] | None,
    ) -> tuple[object, ...]:
        """Each token's inputs of delta rules, if there are some, and their states.  Raises
        `ValueError`."""
        if not self._layers.inputs[0]:
            return NO_DELTA
        caches = [state.deltas for state in states if state.deltas is not None]
        tails, own = [cache.inputs for cache in caches], [cache.states for cache in caches]
        firsts = [tail.first for tail in tails]
        folds = list[int]()
        for cache, end, count in zip(chunk.caches, _ends_of(chunk), chunk.counts, strict=True):
            assert cache.deltas is not None
            folds += [*cache.deltas.states.fold(end - count, end)] * count
        reads = folds[1::4]
        held = self._states.bound([state.rows for state in own], reads)
        if staged is not None:
            return *_bind(staged, "inputs"), *held, int64s(folds)
        for state, first in zip(own, firsts, strict=True):
            if state.at - min(state.at, CONVOLVED - 1) < first:
                raise ValueError(f"inputs begin at {first}, but the state is of {state.at} tokens")
        inputs = self._inputs.bound([tail.rows for tail in tails], positions, firsts)
        return *inputs, *held, int64s(folds)

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

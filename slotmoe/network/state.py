"""What a sequence leaves behind in attention for its next tokens, and how far it can be cut.

Latents, the compressed KV cache of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434,
section 2.1): a token costs ``kv_lora_rank`` + ``qk_rope_head_dim`` values a layer, 31 KB in V2-Lite
and 69 KB in V2 at 16 bits, where expanded keys and values would take V2 4.9 MB; with an indexer
also ``index_head_dim`` values.

DeepSeek-V4: a row of ``head_dim`` values is the one key of a token, which is its value too.  Each
layer keeps those of the last ``sliding_window`` tokens.  Layers with a ratio m make one row more of
every m tokens, which stays for good: out of what ``kv_proj`` and ``gate_proj`` gave of them, and in
layers with an indexer, of the m tokens before too.  Until then these projections are kept, in
float32.  V4-Flash adds 3.6 KB a token with 8-bit rows, and 40 MB whatever the context is.

The backend says what a row is made of (``latent_row`` of ``slotmoe.quant.backends.base``): the
native kernels keep 8 bits a value.

Shapes: L layers, S positions or rows, X elements of a row, Y columns of a compressor, T tokens.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.network.recurrent_state import Deltas, Tail
from slotmoe.network.recurrent_state import Empty as Empty
from slotmoe.network.shapes import Marks

NewRows = Callable[[int, int, int, int], Tensor]
"""Memory [L, S, X] of so many layers and rows, of a backend's rows of latent and rope values."""
Store = Callable[[Tensor, int, Tensor], None]
"""``store_latents`` of the backend."""


class Room(NamedTuple):
    """Of a sequence: ``context`` tokens, in ``new`` rows and memory that is ``empty``; which
    ``marks`` it has, and what delta rules keep."""

    context: int
    new: NewRows
    empty: Empty
    marks: Marks
    deltas: Deltas | None


@dataclass
class Rows:
    """Rows that stay for good, one of every ``ratio`` tokens: ``rows`` [L, S, X], each of so many
    latent and rope values (``widths``)."""

    rows: Tensor
    widths: tuple[int, int]
    ratio: int = 1

    def count(self, start: int, end: int) -> int:
        """How many rows the tokens from ``start`` to ``end`` have completed."""
        return end // self.ratio - start // self.ratio

    def between(self, start: int, end: int) -> Tensor:
        """Those rows."""
        return self.rows[:, start // self.ratio : end // self.ratio]

    def put(self, start: int, end: int, rows: Tensor) -> None:
        """They are the first of ``rows`` from now on."""
        places = slice(start // self.ratio, end // self.ratio)
        self.rows[:, places] = rows[:, : self.count(start, end)]

    @property
    def nbytes(self) -> int:
        """Bytes of one row of each layer."""
        return self.rows.shape[0] * self.rows.shape[2] * self.rows.itemsize


class Group(Rows):
    """Compressed rows of some layers, and the ``open`` tokens', [L, tokens, 2, Y]: what ``kv_proj``
    and ``gate_proj`` gave.  With ``overlaps`` a row is of the ``ratio`` tokens before, too."""

    def __init__(self, rows: Tensor, opened: Tensor, width: int, ratio: int, overlaps: bool):
        super().__init__(rows, (width, 0), ratio)
        self.overlaps = overlaps
        self.open = Tail(opened, lambda length: length - max(0, length // ratio - overlaps) * ratio)


class SequenceState:
    """What the tokens of a sequence leave behind for those that come: ``length`` of them are
    appended, and ``context`` have room.  It is in ``kept`` rows, and in ``tails``, which remember
    marks: lengths to which the sequence can be cut; ``deltas`` have two.

    A pass says ``begin`` before its first layer and ``done`` behind its last one.  One that does
    not get there leaves the state as it was.  The last 16 tokens can be cut off, any without tails.
    """

    def __init__(self, room: Room, kept: Sequence[Rows], tails: Sequence[Tail] = ()):
        self.context, _, _, self._places, self.deltas = room
        self.length, self._kept, deltas = 0, kept, room.deltas
        self._tails = [*tails, *([deltas.inputs, deltas.states] if deltas else [])]
        self._written = 0  # positions that some pass has reached
        self._ends = list[int]()  # where texts have ended last

    @property
    def rolls(self) -> bool:
        """Whether some of its rows make room for those of later tokens."""
        return bool(self._tails)

    def windows(self, layer: int) -> Mapping[str, tuple[Tail, slice]]:
        """Return the layer's windows by what their rows are of, each with its layers in it."""
        return {} if self.deltas is None else self.deltas.windows(layer)

    def cuts(self, count: int) -> range:
        """Positions behind which a chunk of a pass over ``count`` tokens ends at the latest, so
        that a state can be marked there."""
        if self.deltas is None:
            return range(0)
        return self._places.between(self.length, self.length + count)

    def through(self, layer: int, end: int) -> None:
        """The pass's tokens up to position ``end``, where a chunk ends, have been through a layer,
        attention at least."""
        if self.deltas is not None:
            self.deltas.through(layer, end)

    @property
    def used_bytes(self) -> int:
        """Bytes of its memory that have been written so far."""
        marks = sum(self.snapshot_bytes(at) for at in self.marks)
        tails = sum(tail.rows.nbytes for tail in self._tails)
        return tails + self.saved_bytes(0, self._written) + marks

    def begin(self, count: int) -> None:
        """A pass will append ``count`` tokens."""
        if self._tails:
            self._keep_marks(self._best_marks())
        self._written = max(self._written, self.length + count)
        for tail in self._tails:
            tail.begin(self.length, count, self._places.between(self.length, self.length + count))

    def done(self, count: int) -> None:
        """A pass has appended ``count`` tokens."""
        self.length += count
        for tail in self._tails:
            tail.done()

    @property
    def marks(self) -> list[int]:
        """Lengths to which it can be cut that are remembered."""
        marks = (tail.marks.keys() for tail in self._tails)
        return sorted(set.intersection(*map(set, marks))) if self._tails else []

    def reach(self, length: int) -> int:
        """The longest length up to ``length`` to which it can be cut."""
        length = min(length, self.length)
        exact = [length, *(at for tail in self._tails for at in tail.exact)]
        exact = [at for at in exact if all(tail.has(at) for tail in self._tails)]
        return max((at for at in (*self.marks, *exact) if 0 <= at <= length), default=0)

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens, which ``reach`` has said can be."""
        for tail in self._tails:
            tail.cut(length)
        self.length = length
        if self._tails:
            self._keep_marks(self.marks)

    def copy(self, source: "SequenceState", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which it can be cut to."""
        for kept, others in zip(self._kept, source._kept, strict=True):
            kept.put(0, length, others.between(0, length))
        for tail, other in zip(self._tails, source._tails, strict=True):
            tail.load(length, other.last(length))
            tail.marks = {**other.marks}
        self.length, self._written, self._ends = length, max(self._written, length), source._ends
        self._keep_marks(self.marks)

    def mark(self, length: int) -> None:
        """A text ends there, at a length that it can be cut to: it can be later too, as long as
        that is among those that are remembered."""
        if length:
            self._ends = [*(at for at in self._ends if at != length), length]
            self._ends = self._ends[-self._places.ends :]
            for tail in self._tails:
                tail.mark(length)
            self._keep_marks([at for at in self.marks if self._may_stay(at)])

    def _may_stay(self, mark: int) -> bool:
        return mark in self._places.between(mark - 1, mark) or mark in self._ends

    def _keep_marks(self, lengths: Collection[int]) -> None:
        """Forget all marks but these, and those of tokens that are not there."""
        for tail in self._tails:
            tail.marks = {at: tail.marks[at] for at in lengths if at <= self.length}
        self._ends = [at for at in self._ends if at <= self.length]

    def _best_marks(self) -> list[int]:
        """Those where texts have ended last, and others, with the longest gaps between them."""
        marks = [at for at in self.marks if self._may_stay(at)]
        while len(marks) > self._places.most:
            triples = zip(marks, marks[1:], marks[2:], strict=False)
            gaps = {at: after - before for before, at, after in triples if at not in self._ends}
            marks.remove(min(gaps, key=gaps.__getitem__))
        return marks

    def fill(self, depth: int, store: Store) -> None:
        """Become ``depth`` tokens with random rows: for measurements."""
        generator = torch.Generator().manual_seed(0)
        for kept in self._kept:
            _fill(rows := kept.between(0, depth), kept.widths, store, generator)
            kept.put(0, depth, rows)
        for tail in self._tails:
            if tail.widths is None:
                tail.rows.normal_()
            else:
                _fill(tail.rows, tail.widths, store, torch.Generator().manual_seed(1))
            tail.load(depth, tail.rows[:, : tail.needed(depth)].clone())
        self.length = self._written = depth
        self._keep_marks(())

    # On disk

    def saved_bytes(self, start: int, end: int) -> int:
        """Bytes of ``saved``."""
        return sum(kept.count(start, end) * kept.nbytes for kept in self._kept)

    def saved(self, start: int, end: int) -> Tensor:
        """What the tokens from ``start`` to ``end`` have added for good, uint8 in RAM."""
        return _flat_bytes(kept.between(start, end) for kept in self._kept)

    def put(self, start: int, end: int, data: Tensor, stop: int) -> None:
        """Take over from ``data``, which ``saved`` gave of those positions, what the tokens before
        ``stop`` have added.  ``resume`` makes them count."""
        parts = _split_bytes(data, ((kept.rows, kept.count(start, end)) for kept in self._kept))
        for kept, part in zip(self._kept, parts, strict=True):
            kept.put(start, stop, part)
        self._written = max(self._written, stop)

    def snapshot_bytes(self, length: int) -> int:
        """Bytes of ``snapshot``."""
        return sum(tail.needed(length) * tail.rows[:, 0].nbytes for tail in self._tails)

    def snapshot(self, length: int) -> Tensor | None:
        """What else the next token behind ``length`` needs, uint8 in RAM; None where it is gone."""
        if self.reach(length) != length:
            return None
        return _flat_bytes(tail.last(length) for tail in self._tails)

    def resume(self, length: int, snapshot: Tensor) -> None:
        """Become ``length`` tokens, which go on from those that it has: what they added was
        ``put``, and this was their snapshot."""
        parts = _split_bytes(snapshot, ((tail.rows, tail.needed(length)) for tail in self._tails))
        for tail, last in zip(self._tails, parts, strict=True):
            tail.load(length, last)
        self.length = length


class LatentCache(SequenceState):
    """Latents of one sequence: ``layers`` is [L, S, X] and ``index_keys`` those of the layers with
    an indexer, of which the first ``length`` rows of each layer are valid; layers of ``deltas``
    have none.

    A row of X elements is the normed latent and the rotated key part that all heads share, of these
    ``widths``.  ``indexed`` says of each layer whether it has ``keys`` of so many values.
    """

    def __init__(self, room: Room, widths: tuple[int, int], indexed: Sequence[bool], keys: int):
        context, new, _, _, deltas = room
        self._rules = deltas.of if deltas else [0] * len(indexed)  # before each layer
        count = len(indexed) - (len(deltas.inputs.rows) if deltas else 0)
        self.layers = new(count, context, *widths)
        self.index_keys, kept = torch.empty(0), [Rows(self.layers, widths)]
        if any(indexed):
            self._index_rows = [sum(indexed[:layer]) for layer in range(len(indexed))]
            self.index_keys = new(sum(indexed), context, keys, 0)
            kept.append(Rows(self.index_keys, (keys, 0)))
        super().__init__(room, kept)

    def extend(self, layer: int, count: int) -> Tensor:
        """The layer's rows with ``count`` more, which the caller writes: [length + count, X]."""
        return self.layers[layer - self._rules[layer], : self.length + count]

    def extend_index(self, layer: int, count: int) -> Tensor:
        """The same of the layer's index keys."""
        return self.index_keys[self._index_rows[layer], : self.length + count]


class CompressedCache(SequenceState):
    """``window``, and a ``Group`` for each kind of compressed rows: ``groups`` by ratio, and
    ``index``, the keys of the layers with an indexer.  ``row_of`` is a layer's row in its group.

    ``layers`` has of each its ratio, and whether it has an indexer; ``widths`` are the values of a
    row and of a key."""

    def __init__(
        self, room: Room, window: int, widths: tuple[int, int], layers: Sequence[tuple[int, bool]]
    ):
        (width, keys), most, ratios = widths, window - 1, [ratio for ratio, _ in layers]

        def group(ratio: int, width: int, overlaps: bool) -> Group:
            count, spans = ratios.count(ratio), 1 + overlaps
            rows = room.new(count, max(1, room.context // ratio), width, 0)
            shape = count, Tail.room(spans * ratio - 1), 2, spans * width
            return Group(rows, room.empty(shape, torch.float32), width, ratio, overlaps)

        rows = room.new(len(ratios), Tail.room(most), width, 0)
        self.window = Tail(rows, lambda length: min(length, most), (width, 0))
        self.row_of = [ratios[:layer].count(ratio) for layer, ratio in enumerate(ratios)]
        self.groups, self.index = dict[int, Group](), None
        for ratio, overlaps in sorted({*layers} - {(0, False)}):
            self.groups[ratio] = group(ratio, width, overlaps)
            if overlaps:
                self.index = group(ratio, keys, True)
        groups = [*self.groups.values(), *([self.index] if self.index else [])]
        super().__init__(room, groups, [self.window, *(group.open for group in groups)])
        self._ratios = ratios

    def windows(self, layer: int) -> Mapping[str, tuple[Tail, slice]]:
        windows = {"rows": (self.window, slice(layer, layer + 1))}
        if ratio := self._ratios[layer]:
            row = self.row_of[layer]
            group = self.groups[ratio]
            windows[f"open {ratio}"] = group.open, slice(row, row + 1)
            if group.overlaps and self.index is not None:
                windows["open index"] = self.index.open, slice(row, row + 1)
        return windows


class GroupedCache(SequenceState):
    """Keys and values of grouped-query attention: for each group of each layer a row of a token, of
    ``width`` values and ``width`` of the key.  ``windows`` says of each layer how many tokens see
    each other there: 0 for all, whose rows stay in ``rows``; others are in ``window``; layers of -1
    keep nothing here, but in ``deltas``."""

    def __init__(self, room: Room, groups: int, width: int, windows: Sequence[int]):
        self._windows, self._groups = windows, groups
        self._row_of = [
            groups * sum(other >= 0 and (other > 0) == (own > 0) for other in windows[:layer])
            for layer, own in enumerate(windows)
        ]
        kept, tails = list[Rows](), list[Tail]()
        full, most = windows.count(0), max(windows) - 1
        if full:
            kept = [Rows(room.new(groups * full, room.context, width, width), (width, width))]
        if count := sum(window > 0 for window in windows):
            rows = room.new(groups * count, Tail.room(most), width, width)
            tails = [Tail(rows, lambda length: min(length, most), (width, width))]
        self.window = tails[0] if tails else None
        self.rows = kept[0].rows if kept else room.new(1, 1, width, width)[:0]
        super().__init__(room, kept, tails)

    def windows(self, layer: int) -> Mapping[str, tuple[Tail, slice]]:
        if self._windows[layer] <= 0:
            return super().windows(layer)
        assert self.window is not None
        row = self._row_of[layer]
        return {"keys": (self.window, slice(row, row + self._groups))}

    def extend(self, layer: int, position: int, new_GTX: Tensor) -> tuple[Tensor, int]:
        """The rows of the layer's groups, [G, S, X], up to those of some tokens of the pass from
        ``position`` on, which are ``new``, and the position of the first of them."""
        row = self._row_of[layer]
        if self._windows[layer]:
            assert self.window is not None
            return self.window.extend(row, position, new_GTX)
        rows_GSX = self.rows[row : row + self._groups, : position + new_GTX.shape[1]]
        rows_GSX[:, position:] = new_GTX
        return rows_GSX, 0


def plain_row(latent: int, rope: int) -> tuple[int, torch.dtype]:
    """Rows of the reference path: every value in float32."""
    return latent + rope, torch.float32


def _fill(rows_LSX: Tensor, widths: tuple[int, int], store: Store, source: torch.Generator) -> None:
    """Store random rows."""
    random_SW = torch.randn(rows_LSX.shape[1], sum(widths), generator=source).to(rows_LSX.device)
    for rows_SX in rows_LSX:
        store(random_SW, widths[0], rows_SX)


def _flat_bytes(parts: Iterable[Tensor]) -> Tensor:
    """The bytes of tensors one behind the other, uint8 in RAM."""
    none = torch.empty(0, dtype=torch.uint8)
    return torch.cat([none, *(part.cpu().flatten().view(torch.uint8) for part in parts)])


def _split_bytes(data: Tensor, like: Iterable[tuple[Tensor, int]]) -> Iterable[Tensor]:
    """What ``_flat_bytes`` has made of so many rows of each of these [L, S, ...], in RAM."""
    start = 0
    for tensor, count in like:
        layers, _, *row = tensor.shape
        end = start + layers * count * math.prod(row) * tensor.itemsize
        yield data[start:end].clone().view(tensor.dtype).view(layers, count, *row)
        start = end

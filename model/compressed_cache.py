"""The state of a sequence of DeepSeek-V4: a window of rows, and compressed rows of all tokens.

A row of ``head_dim`` values is the one key of a token, which is its value too.  Each layer keeps
those of the last ``sliding_window`` tokens.  Layers with a ratio m make one row more of every m
tokens, which stays for good: out of what ``kv_proj`` and ``gate_proj`` gave of them, and in layers
with an indexer, of the m tokens before too.  Until then these projections are kept, in float32.
V4-Flash adds 3.8 KB a token with 8-bit rows, and 45 MB whatever the context is.

Shapes: L layers, S positions or compressed rows, X elements of a row, Y columns of a compressor, T
tokens.
"""

from collections.abc import Callable, Sequence
from itertools import chain

import torch
from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.kv_cache import Empty, Row, SequenceState, Store, flat_bytes, split_bytes

SPARE = 16  # tokens that can be cut off at any time
MARK_TOKENS = 256  # between two lengths that a long text can be cut to
MOST_MARKS = 8  # such lengths that a sequence remembers
_MOST_ENDS = 4  # of them, those where texts have ended last


class Tail:
    """The last rows of the sequence in some layers: [L, 2 * keep, ...], of which a sequence of
    ``length`` tokens needs the last ``needed(length)``.

    A pass over few tokens appends its rows.  A longer one writes its last rows behind those that
    were there, so that both are there until it is done.
    """

    def __init__(
        self,
        layers: int,
        row: Sequence[int],
        dtype: torch.dtype,
        empty: Empty,
        most: int,
        needed: Callable[[int], int],
    ):
        self.keep, self.needed = most + SPARE, needed
        self.rows = empty((layers, 2 * self.keep, *row), dtype)
        self.first = 0  # the position of the first row
        self._valid = 0  # that of the first one that is right
        self.marks: dict[int, Tensor] = {}  # the rows that a sequence of that length needs
        self._length = self._next = 0
        self._before = self.rows[:0]

    def begin(self, length: int, count: int) -> None:
        """A pass will append ``count`` rows behind position ``length``."""
        end, held = length + count, length - self.first
        if end - self.first > self.rows.shape[1] and held > self.keep:
            self.rows[:, : self.keep] = self.rows[:, held - self.keep : held].clone()
            self.first = self._valid = length - self.keep
        self._length, self._next = length, max(self.first, end - self.rows.shape[1])
        self.marks = {at: mark for at, mark in self.marks.items() if at <= length}

    def extend(self, layer: int, position: int, new_TX: Tensor) -> tuple[Tensor, int]:
        """The layer's rows up to those of some tokens of the pass from ``position`` on, which are
        ``new``, and the position of the first of them."""
        start, end = position - self.first, position + len(new_TX)
        if self._next == self.first:
            rows, first = self.rows[layer, : end - self.first], self.first
            rows[start:] = new_TX
        else:
            before = self.rows[layer, :start] if position == self._length else self._before
            rows = torch.cat([before[-self.keep :], new_TX])
            first, stop = end - len(rows), end - self._next
            stays = min(len(new_TX), max(0, stop - self.keep))
            self.rows[layer, stop - stays : stop] = new_TX[len(new_TX) - stays :]
            self._before = rows[-self.keep :].clone()
        for at in range((position // MARK_TOKENS + 1) * MARK_TOKENS, end + 1, MARK_TOKENS):
            self._mark(at)[layer] = rows[at - first - self.needed(at) : at - first]
        return rows, first

    def done(self) -> None:
        """The pass has gone through all layers."""
        if self._next > self.first:
            self.first, self._valid = self._next, self._next + self.keep

    def has(self, length: int) -> bool:
        """Whether what a sequence of ``length`` tokens needs is there."""
        return length - self.needed(length) >= self._valid

    def mark(self, length: int) -> None:
        """Remember what a sequence of ``length`` tokens needs."""
        if length not in self.marks:
            self._mark(length).copy_(self.last(length))

    def _mark(self, length: int) -> Tensor:
        """The mark at ``length``, made if there is none."""
        if length not in self.marks:
            layers, _, *row = self.rows.shape
            self.marks[length] = self.rows.new_empty((layers, self.needed(length), *row))
        return self.marks[length]

    def last(self, length: int) -> Tensor:
        """What a sequence of ``length`` tokens needs, [L, needed, ...]."""
        if not self.has(length):
            return self.marks[length]
        return self.rows[:, length - self.needed(length) - self.first : length - self.first]

    def cut(self, length: int) -> None:
        """Become the tail of a sequence of ``length`` tokens."""
        if not self.has(length):
            self.load(length, self.marks[length] if length else self.rows[:, :0])

    def load(self, length: int, last: Tensor) -> None:
        """Become what ``last`` gave of a sequence of that length."""
        self.rows[:, : self.needed(length)] = last
        self.first = self._valid = length - self.needed(length)


class Group:
    """Compressed rows of the layers with one ratio: ``rows`` [L, S, X], and the ``open`` tokens',
    [L, tokens, 2, Y]: what ``kv_proj`` and ``gate_proj`` gave."""

    def __init__(
        self,
        ratio: int,
        layers: int,
        context: int,
        width: int,
        overlaps: bool,
        row: Row,
        empty: Empty,
    ):
        def needed(length: int) -> int:
            return length - max(0, (length // ratio - overlaps) * ratio)

        self.ratio, self.overlaps = ratio, overlaps
        columns, dtype = row(width, 0)
        self.rows = empty((layers, max(1, context // ratio), columns), dtype)
        open_row, most = (2, (1 + overlaps) * width), (1 + overlaps) * ratio
        self.open = Tail(layers, open_row, torch.float32, empty, most, needed)

    def read_bytes(self, length: int) -> int:
        """Bytes that one token behind so many reads of it."""
        open_rows = self.open.rows[:, : self.open.needed(length)].nbytes
        return open_rows // self.ratio + self.between(0, length).nbytes

    def between(self, start: int, end: int) -> Tensor:
        """The rows that the tokens from ``start`` to ``end`` have completed."""
        return self.rows[:, start // self.ratio : end // self.ratio]


class CompressedCache:
    """``window``, and a ``Group`` for each kind of compressed rows: ``groups`` by ratio, and
    ``index``, the keys of the layers with an indexer.  ``row_of`` is a layer's row in its group.
    See ``slotmoe.model.kv_cache.SequenceState``."""

    def __init__(self, config: Config, context: int, row: Row, empty: Empty):
        assert config.compressed is not None and config.indexer is not None
        c, ratios, full = config.compressed, config.compressed.ratios, config.indexer.full
        self.context, self.length = context, 0
        self._width, self._ends = c.head_dim, list[int]()
        columns, dtype = row(c.head_dim, 0)
        span = c.sliding_window
        self.window = Tail(
            len(ratios), (columns,), dtype, empty, span, lambda length: min(length, span - 1)
        )
        self.row_of = [ratios[:layer].count(ratio) for layer, ratio in enumerate(ratios)]
        self.groups, self.index = dict[int, Group](), None
        for ratio in sorted({*ratios} - {0}):
            overlaps, count = full[ratios.index(ratio)], ratios.count(ratio)
            self.groups[ratio] = Group(ratio, count, context, c.head_dim, overlaps, row, empty)
            if overlaps:
                width = config.indexer.head_dim
                self.index = Group(ratio, count, context, width, True, row, empty)

    @property
    def _groups(self) -> list[Group]:
        return [*self.groups.values(), *([self.index] if self.index else [])]

    @property
    def _tails(self) -> list[Tail]:
        return [self.window, *(group.open for group in self._groups)]

    @property
    def nbytes(self) -> int:
        return sum(tail.rows.nbytes for tail in self._tails) + self.saved_bytes(0, self.context)

    @property
    def used_bytes(self) -> int:
        marks = chain.from_iterable(tail.marks.values() for tail in self._tails)
        return self.nbytes + sum(mark.nbytes for mark in marks)

    def read_bytes(self, length: int) -> int:
        size = self.window.last(length).nbytes + sum(
            group.open.last(length).nbytes for group in self._groups
        )
        return size

    def begin(self, count: int) -> None:
        for tail in self._tails:
            tail.begin(self.length, count)

    def done(self, count: int) -> None:
        start, self.length = self.length, self.length + count
        for at in range((start // MARK_TOKENS + 1) * MARK_TOKENS, self.length + 1, MARK_TOKENS):
            for tail in self._tails:  # a decoder has appended the rows by itself
                tail.mark(at)
        for tail in self._tails:
            tail.done()
        self._forget()

    def reach(self, length: int) -> int:
        if length >= self.length or all(tail.has(length) for tail in self._tails):
            return min(length, self.length)
        return max((at for at in self.window.marks if at <= length), default=0)

    def cut(self, length: int) -> None:
        for tail in self._tails:
            tail.cut(length)
            tail.marks = {at: mark for at, mark in tail.marks.items() if at <= length}
        self.length = length

    def copy(self, source: SequenceState, length: int) -> None:
        assert isinstance(source, CompressedCache)
        for group, others in zip(self._groups, source._groups, strict=True):
            group.between(0, length)[:] = others.between(0, length)
        for tail, other in zip(self._tails, source._tails, strict=True):
            tail.load(length, other.last(length))
            tail.marks = {at: mark for at, mark in other.marks.items() if at <= length}
        self.length = length

    def mark(self) -> None:
        self._ends = [*self._ends, self.length][-_MOST_ENDS:]
        for tail in self._tails:
            tail.mark(self.length)
        self._forget()

    def _forget(self) -> None:
        """Of more marks than are remembered, forget those that leave the smallest gap, and no
        text's end."""
        while len(marks := sorted(self.window.marks)) > MOST_MARKS:
            triples = zip(marks, marks[1:], marks[2:], strict=False)
            gaps = {at: after - before for before, at, after in triples if at not in self._ends}
            for tail in self._tails:
                del tail.marks[min(gaps, key=gaps.__getitem__)]

    def fill(self, depth: int, store: Store) -> None:
        generator = torch.Generator().manual_seed(0)
        for group in self._groups:
            for rows_SX in group.between(0, depth):
                width = group.open.rows.shape[-1] // (1 + group.overlaps)
                random_SX = torch.randn(len(rows_SX), width, generator=generator)
                store(random_SX.to(rows_SX.device), width, rows_SX)
            group.open.rows.normal_()
        for rows_SX in self.window.rows:
            random_SX = torch.randn(len(rows_SX), self._width, generator=generator)
            store(random_SX.to(rows_SX.device), self._width, rows_SX)
        for tail in self._tails:
            tail.load(depth, tail.rows[:, : tail.needed(depth)].clone())
            tail.marks = {}
        self.length = depth

    def saved_bytes(self, start: int, end: int) -> int:
        return sum(group.between(start, end).nbytes for group in self._groups)

    def saved(self, start: int, end: int) -> Tensor:
        return flat_bytes(group.between(start, end) for group in self._groups)

    def put(self, start: int, end: int, data: Tensor, stop: int) -> None:
        parts = [group.between(start, end) for group in self._groups]
        for group, saved in zip(self._groups, split_bytes(data, parts), strict=True):
            rows = group.between(start, stop)
            rows[:] = saved[:, : rows.shape[1]]

    def snapshot_bytes(self, length: int) -> int:
        sizes = ((tail, tail.rows[:, 0].nbytes) for tail in self._tails)
        return sum(tail.needed(length) * size for tail, size in sizes)

    def snapshot(self, length: int) -> Tensor | None:
        if self.reach(length) != length:
            return None
        return flat_bytes(tail.last(length) for tail in self._tails)

    def resume(self, length: int, snapshot: Tensor) -> None:
        shapes = [tail.rows[:, : tail.needed(length)] for tail in self._tails]
        for tail, last in zip(self._tails, split_bytes(snapshot, shapes), strict=True):
            tail.load(length, last.to(tail.rows.device))
        self.length = length

"""The state of a sequence of DeepSeek-V4: a window of rows, and compressed rows of all tokens.

A row of ``head_dim`` values is the one key of a token, which is its value too.  Each layer keeps
those of the last ``sliding_window`` tokens.  Layers with a ratio m make one row more of every m
tokens, which stays for good: out of what ``kv_proj`` and ``gate_proj`` gave of them, and in layers
with an indexer, of the m tokens before too.  Until then these projections are kept, in float32.
V4-Flash adds 3.8 KB a token with 8-bit rows, and 45 MB whatever the context is.

Shapes: L layers, S positions or compressed rows, X elements of a row, Y columns of a compressor, T
tokens.
"""

from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from slotmoe.model.config import Config
from slotmoe.model.kv_cache import Empty, Row, SequenceState, Store, flat_bytes, split_bytes
from slotmoe.model.marks import MARK_TOKENS, MOST_ENDS, MOST_MARKS, SPARE


class Tail:
    """The last rows of the sequence in some layers: [L, 2 * keep, ...], of which a sequence of
    ``length`` tokens needs the last ``needed(length)``, at most ``most``.

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
        self.most, self.needed = most, needed
        self._keep = most + 1 + SPARE
        self.rows = empty((layers, 2 * self._keep, *row), dtype)
        self.row_bytes = self.rows[:, 0].nbytes  # of a token, in all layers
        self.first = 0  # the position of the first row
        self._valid = 0  # that of the first one that is right
        self.marks: dict[int, Tensor] = {}  # the rows that a sequence of that length needs
        self._length = self._next = 0
        self._before = self.rows[:0]  # the pass's rows so far of the layer that it is in

    def begin(self, length: int, count: int) -> None:
        """A pass will append ``count`` rows behind position ``length``."""
        end, held = length + count, length - self.first
        if end - self.first > self.rows.shape[1] and held > self._keep:
            self.rows[:, : self._keep] = self.rows[:, held - self._keep : held].clone()
            self.first = length - self._keep
            self._valid = max(self._valid, self.first)
        self._length, self._next = length, max(self.first, end - self.rows.shape[1])

    def extend(self, layer: int, position: int, new_TX: Tensor) -> tuple[Tensor, int]:
        """The layer's rows up to those of some tokens of the pass from ``position`` on, which are
        ``new``, and the position of the first of them."""
        start, end = position - self.first, position + len(new_TX)
        if self._next == self.first:
            rows, first = self.rows[layer, : end - self.first], self.first
            rows[start:] = new_TX
        else:
            before = self.rows[layer, :start] if position == self._length else self._before
            rows = torch.cat([before[-self._keep :], new_TX])
            first, stop = end - len(rows), end - self._next
            stays = min(len(new_TX), max(0, stop - self._keep))
            self.rows[layer, stop - stays : stop] = new_TX[len(new_TX) - stays :]
            self._before = rows[-self._keep :].clone()
        for at in range((position // MARK_TOKENS + 1) * MARK_TOKENS, end + 1, MARK_TOKENS):
            self._mark(at)[layer] = rows[at - first - self.needed(at) : at - first]
        return rows, first

    def done(self) -> None:
        """The pass has gone through all layers."""
        if self._next > self.first:
            self.first, self._valid = self._next, self._next + self._keep

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
        needed = self.needed(length)
        if self.has(length):
            return self.rows[:, length - needed - self.first : length - self.first]
        return self.marks[length] if length else self.rows[:, :0]

    def cut(self, length: int) -> None:
        """Become the tail of a sequence of ``length`` tokens."""
        if not self.has(length):
            self.load(length, self.last(length))

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
        self.row_bytes = self.rows[:, 0].nbytes  # in all layers
        open_row, most = (2, (1 + overlaps) * width), (1 + overlaps) * ratio - 1
        self.open = Tail(layers, open_row, torch.float32, empty, most, needed)

    def count(self, start: int, end: int) -> int:
        """How many rows the tokens from ``start`` to ``end`` have completed."""
        return end // self.ratio - start // self.ratio

    def between(self, start: int, end: int) -> Tensor:
        """Those rows."""
        return self.rows[:, start // self.ratio : end // self.ratio]


class CompressedCache:
    """``window``, and a ``Group`` for each kind of compressed rows: ``groups`` by ratio, and
    ``index``, the keys of the layers with an indexer.  ``row_of`` is a layer's row in its group.
    See ``slotmoe.model.kv_cache.SequenceState``."""

    def __init__(self, config: Config, context: int, row: Row, empty: Empty):
        assert config.compressed is not None and config.indexer is not None
        c, ratios, full = config.compressed, config.compressed.ratios, config.indexer.full
        self.context, self.length = context, 0
        self._written = 0  # positions that some pass has reached
        self._width, self._topk = c.head_dim, config.indexer.topk
        self._ends = list[int]()  # where texts have ended last
        columns, dtype = row(c.head_dim, 0)
        most = c.sliding_window - 1
        self.window = Tail(
            len(ratios), (columns,), dtype, empty, most, lambda length: min(length, most)
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
        """With the marks that there may be, but for those of the pass under way."""
        end = sum(tail.most * tail.row_bytes for tail in self._tails)
        far = MARK_TOKENS * (1 + self.window.most)  # a multiple, behind a full window
        marks = MOST_ENDS * end + MOST_MARKS * self.snapshot_bytes(far)
        rows = sum(group.rows.nbytes for group in self._groups)
        return self._tail_bytes + rows + marks

    @property
    def used_bytes(self) -> int:
        marks = sum(self.snapshot_bytes(at) for at in self.marks)
        return self._tail_bytes + self.saved_bytes(0, self._written) + marks

    @property
    def _tail_bytes(self) -> int:
        return sum(tail.rows.nbytes for tail in self._tails)

    def read_bytes(self, length: int) -> int:
        size = self.window.needed(length) * self.window.row_bytes
        for group in self._groups:
            rows = length // group.ratio
            size += (1 + group.overlaps) * group.open.row_bytes
            if group.overlaps and group is not self.index:
                rows = min(rows, self._topk)
            size += rows * group.row_bytes
        return size

    def begin(self, count: int) -> None:
        self._keep_marks(self._best_marks())
        self._written = max(self._written, self.length + count)
        for tail in self._tails:
            tail.begin(self.length, count)

    def done(self, count: int) -> None:
        start, self.length = self.length, self.length + count
        for at in range((start // MARK_TOKENS + 1) * MARK_TOKENS, self.length + 1, MARK_TOKENS):
            for tail in self._tails:  # a decoder has appended the rows by itself
                tail.mark(at)
        for tail in self._tails:
            tail.done()

    @property
    def marks(self) -> list[int]:
        return sorted(self.window.marks)

    def reach(self, length: int) -> int:
        if length >= self.length or all(tail.has(length) for tail in self._tails):
            return min(length, self.length)
        return max((at for at in self.window.marks if at <= length), default=0)

    def cut(self, length: int) -> None:
        for tail in self._tails:
            tail.cut(length)
        self.length = length
        self._keep_marks(self.marks)

    def copy(self, source: SequenceState, length: int) -> None:
        assert isinstance(source, CompressedCache)
        for group, others in zip(self._groups, source._groups, strict=True):
            group.between(0, length)[:] = others.between(0, length)
        for tail, other in zip(self._tails, source._tails, strict=True):
            tail.load(length, other.last(length))
            tail.marks = {**other.marks}
        self.length, self._written, self._ends = length, max(self._written, length), source._ends
        self._keep_marks(self.marks)

    def mark(self, length: int) -> None:
        if length:
            self._ends = [*(at for at in self._ends if at != length), length][-MOST_ENDS:]
            for tail in self._tails:
                tail.mark(length)
            self._keep_marks([at for at in self.marks if self._may_stay(at)])

    def _may_stay(self, mark: int) -> bool:
        return mark % MARK_TOKENS == 0 or mark in self._ends

    def _keep_marks(self, lengths: Collection[int]) -> None:
        """Forget all marks but these, and those of tokens that are not there."""
        for tail in self._tails:
            kept = (at for at in lengths if at <= self.length)
            tail.marks = {at: tail.marks[at] for at in kept}
        self._ends = [at for at in self._ends if at <= self.length]

    def _best_marks(self) -> list[int]:
        """Those where texts have ended last, and others, with gaps between them that are as long as
        can be."""
        marks = [at for at in self.marks if self._may_stay(at)]
        while len(marks) > MOST_MARKS:
            triples = zip(marks, marks[1:], marks[2:], strict=False)
            gaps = {at: after - before for before, at, after in triples if at not in self._ends}
            marks.remove(min(gaps, key=gaps.__getitem__))
        return marks

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
        self.length = self._written = depth
        self._keep_marks(())

    def saved_bytes(self, start: int, end: int) -> int:
        return sum(group.count(start, end) * group.row_bytes for group in self._groups)

    def saved(self, start: int, end: int) -> Tensor:
        return flat_bytes(group.between(start, end) for group in self._groups)

    def put(self, start: int, end: int, data: Tensor, stop: int) -> None:
        parts = split_bytes(data, ((one.rows, one.count(start, end)) for one in self._groups))
        for group, part in zip(self._groups, parts, strict=True):
            group.between(start, stop)[:] = part[:, : group.count(start, stop)]
        self._written = max(self._written, stop)

    def snapshot_bytes(self, length: int) -> int:
        return sum(tail.needed(length) * tail.row_bytes for tail in self._tails)

    def snapshot(self, length: int) -> Tensor | None:
        if self.reach(length) != length:
            return None
        return flat_bytes(tail.last(length) for tail in self._tails)

    def resume(self, length: int, snapshot: Tensor) -> None:
        parts = split_bytes(snapshot, ((tail.rows, tail.needed(length)) for tail in self._tails))
        for tail, last in zip(self._tails, parts, strict=True):
            tail.load(length, last)
        self.length = length

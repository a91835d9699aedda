"""What a sequence keeps of its last tokens, or of all of them together: what
cannot be cut anywhere.

A gated delta rule folds all tokens into one matrix a head, which none can be taken out of again.

Shapes: L layers, S rows, T tokens, X elements of a row; of a delta rule, H heads of values, K and V
values of a key and of a value.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.network.shapes import CONVOLVED, SPARE

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Memory of a shape and dtype."""


class Tail:
    """The last rows of the sequence in some layers: [L, ``room(most)``, ...], of which a sequence
    of ``length`` tokens needs the last ``needed(length)``, at most ``most``.

    A pass over few tokens appends its rows.  A longer one writes its last rows behind those that
    were there, so that both are there until it is done.
    """

    def __init__(
        self, rows: Tensor, needed: Callable[[int], int], widths: tuple[int, int] | None = None
    ):
        self.rows, self.needed, self._keep = rows, needed, rows.shape[1] // 2
        self.widths = widths  # latent and rope values of a row of the backend's, None of float32
        self.first = 0  # the position of the first row
        self._valid = 0  # that of the first one that is right
        self.marks: dict[int, Tensor] = {}  # the rows that a sequence of that length needs
        self._length = self._next = self._end = 0
        self._before = dict[int, Tensor]()  # the pass's last rows so far of layers that it is in
        self._marked = range(0)  # lengths that the pass marks
        self.exact = list[int]()  # lengths to which it can be cut, where they are but a few

    @staticmethod
    def room(most: int) -> int:
        """How many rows there are of a layer."""
        return 2 * (most + 1 + SPARE)

    def begin(self, length: int, count: int, marked: range) -> None:
        """A pass will append ``count`` rows behind position ``length``, and mark some lengths."""
        self._marked = marked
        end, held = length + count, length - self.first
        if end - self.first > self.rows.shape[1] and held > self._keep:
            self.rows[:, : self._keep] = self.rows[:, held - self._keep : held].clone()
            self.first = length - self._keep
            self._valid = max(self._valid, self.first)
        self._length, self._next = length, max(self.first, end - self.rows.shape[1])
        self._end, self._before = end, {}

    def extend(self, layer: int, position: int, new_LTX: Tensor) -> tuple[Tensor, int]:
        """The rows of the L layers from ``layer`` on, [L, S, ...], up to those of some tokens of
        the pass from ``position`` on, which are ``new``, and the position of the first of them."""
        layers, count = slice(layer, layer + len(new_LTX)), new_LTX.shape[1]
        rows_LSX = torch.cat([self.before(layers, position), new_LTX], dim=1)
        self.append(layers, position + count, count, rows_LSX)
        return rows_LSX, position + count - rows_LSX.shape[1]

    def before(self, layers: slice, position: int) -> Tensor:
        """The last rows of these layers before ``position`` of the pass, [L, S, ...]."""
        if self._rolls and position > self._length:
            return self._before.pop(layers.start)
        rows_LSX = self.rows[layers, : position - self.first]
        return rows_LSX[:, -self._keep :] if self._rolls else rows_LSX

    def append(self, layers: slice, end: int, count: int, rows_LSX: Tensor) -> None:
        """Take over ``count`` tokens of the pass, up to position ``end``: ``rows`` of these layers
        are what ``before`` gave, and theirs."""
        first, places_first = end - rows_LSX.shape[1], self.first
        stays = count
        if self._rolls:  # behind the rows that were there before the pass
            places_first = self._next
            stays = min(count, max(0, end - self._next - self._keep))
            if end < self._end:
                self._before[layers.start] = rows_LSX[:, -self._keep :].clone()
        places = slice(end - stays - places_first, end - places_first)
        self.rows[layers, places] = rows_LSX[:, rows_LSX.shape[1] - stays :]
        for mark in self._marked:
            if end - count < mark <= end:
                needed = self.needed(mark)
                self._mark(mark)[layers] = rows_LSX[:, mark - needed - first : mark - first]

    @property
    def _rolls(self) -> bool:
        """Whether the pass has more rows than there is room for behind those before it."""
        return self._next > self.first

    def done(self) -> None:
        """The pass has gone through all layers."""
        for at in self._marked:  # a decoder has appended the rows by itself
            self.mark(at)
        if self._rolls:
            self.first, self._valid = self._next, self._next + self._keep

    def has(self, length: int) -> bool:
        """Whether what a sequence of ``length`` tokens needs is there."""
        return length - self.needed(length) >= self._valid

    def mark(self, length: int) -> None:
        """Remember what a sequence of ``length`` tokens needs."""
        if length not in self.marks:
            last = self.last(length)
            self._mark(length).copy_(last)

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
        """Become a sequence of ``length`` tokens."""
        if not self.has(length):
            self.load(length, self.last(length))

    def load(self, length: int, last: Tensor) -> None:
        """Become what ``last`` gave of a sequence of that length."""
        self.rows[:, : self.needed(length)] = last
        self.first = self._valid = length - self.needed(length)


class Fold(NamedTuple):
    """Of a layer's two states ``read`` has the first ``at`` tokens; ``write``, which may be the
    same, becomes that of the first ``end``."""

    at: int
    read: int
    write: int
    end: int


class Folded(Tail):
    """What some layers have made of all tokens together: [L, 2, ...], which a sequence has whole or
    not at all.  A pass reads one of the two, which it leaves as it is, and writes the other.

    The tokens behind the state that is read, of which ``inputs`` has rows, are folded again.  A
    pass leaves its last one out, so that a prompt can be cut there, and drafts are taken back
    without a copy: the next pass folds what was accepted.  Of a method without a word ``Tail`` says
    what it does.
    """

    def __init__(self, rows: Tensor, inputs: Tail):
        super().__init__(rows, lambda length: min(length, 1))
        self.inputs, self.exact, self.read = inputs, [0, -1], 0
        self.folds = 0  # the length whose state the pass leaves

    @property
    def at(self) -> int:
        """How many tokens are in the state that the pass reads."""
        return self.exact[self.read]

    def begin(self, length: int, count: int, marked: range) -> None:
        self.read = self.exact.index(self._from(length))
        if self.at == 0:
            self.rows[:, self.read].zero_()
        self.exact[1 - self.read] = -1
        self._length, self._marked = length, marked
        self.folds = max(length + 1, length + count - 1)

    def _from(self, length: int) -> int:
        """The longest state of which ``length`` tokens can be made; -1 if there is none."""
        usable = [at for at in self.exact if 0 <= at <= length and self.inputs.has(at)]
        return max(usable, default=-1)

    def fold(self, position: int, end: int) -> Fold:
        """How the pass's tokens from ``position`` to ``end`` are folded; no mark is among them."""
        fold_end = min(end, self.folds)
        if position > self._length:  # behind the tokens of the pass that are folded already
            return Fold(position, 1 - self.read, 1 - self.read, fold_end)
        return Fold(self.at, self.read, 1 - self.read, fold_end)

    def through(self, layer: int, end: int) -> None:
        """The pass's tokens up to ``end`` have been through a layer."""
        if end in self._marked and end <= self.folds:
            self._mark(end)[layer] = self.rows[layer, 1 - self.read]

    def done(self) -> None:
        self.exact[1 - self.read] = self.folds
        for at in self._marked:
            if at == self.folds:
                self.mark(at)

    def has(self, length: int) -> bool:
        return length in self.exact

    def last(self, length: int) -> Tensor:
        if length in self.marks:
            return self.marks[length]
        return self.rows[:, self.exact.index(length)][:, None] if length else self.rows[:, :0]

    def cut(self, length: int) -> None:
        if self._from(length) < 0:
            self.load(length, self.last(length))

    def load(self, length: int, last: Tensor) -> None:
        self.rows[:, : self.needed(length)] = last
        self.exact = [length, -1]


class Deltas:
    """What layers with a delta rule keep, those of -1 in ``windows``, each as its number in ``of``
    says: ``states`` [L, 2, H, K, V], float32, and ``inputs``, the ``columns`` that it made of the
    last tokens, float32."""

    def __init__(
        self, windows: Sequence[int], heads: tuple[int, int, int], columns: int, empty: Empty
    ):
        layers, most = windows.count(-1), CONVOLVED - 1
        rows = empty((layers, Tail.room(most), columns), torch.float32)
        self.inputs = Tail(rows, lambda length: min(length, most))
        self.states = Folded(empty((layers, 2, *heads), torch.float32), self.inputs)
        self.of = [windows[:layer].count(-1) for layer in range(len(windows))]
        self._layers = {layer for layer, window in enumerate(windows) if window == -1}

    def windows(self, layer: int) -> Mapping[str, tuple[Tail, slice]]:
        """``SequenceState.windows``."""
        row = self.of[layer]
        return {"inputs": (self.inputs, slice(row, row + 1))} if layer in self._layers else {}

    def through(self, layer: int, end: int) -> None:
        """``SequenceState.through``."""
        if layer in self._layers:
            self.states.through(self.of[layer], end)

"""Rows of windows beside the tokens of a chunk, for native calls over more tokens than a window
has room for.

Shapes: L layers of a window, or groups of heads in one, S rows.
"""

import ctypes
from collections.abc import Sequence

from slotmoe.network.recurrent_state import Tail
from slotmoe.quant.kernels.cpu.bindings import int64s


class StagedRows:
    """The last rows of one layer's windows, a window for each sequence of a chunk, and behind them
    room for the chunk's tokens.

    Args:
        windows: The window of each sequence; all are alike.
        layers: The layer's rows in each window.
        begins: The position of each sequence's first token in the chunk.
        counts: The tokens of each sequence in the chunk.
    """

    def __init__(
        self, windows: Sequence[Tail], layers: slice, begins: Sequence[int], counts: Sequence[int]
    ):
        self._windows, self._layers = windows, layers
        self._begins, self._counts = begins, counts
        before = [
            window.before(layers, begin) for window, begin in zip(windows, begins, strict=True)
        ]
        held = [rows_LSX.shape[1] for rows_LSX in before]
        size = max(map(sum, zip(held, counts, strict=True)))
        count, *row = before[0].shape[0], *before[0].shape[2:]
        self._rows = before[0].new_empty(len(windows), count, size, *row)
        for rows_LSX, before_LSX in zip(self._rows, before, strict=True):
            rows_LSX[:, : before_LSX.shape[1]] = before_LSX
        self.firsts = [begin - rows for begin, rows in zip(begins, held, strict=True)]

    def bind(self) -> tuple[object, ...]:
        """A ``Store`` of api.h: of each token its sequence's rows, and the position of the first;
        bytes from a layer to the next, and from a row to the next."""
        _, layer_bytes, row_bytes, *_ = (
            stride * self._rows.itemsize for stride in self._rows.stride()
        )
        starts, firsts = list[int](), list[int]()
        for rows_LSX, first, count in zip(self._rows, self.firsts, self._counts, strict=True):
            # The native side counts all layers of the window.
            start = rows_LSX.data_ptr() - self._layers.start * layer_bytes
            starts += [start] * count
            firsts += [first] * count
        pointers = (ctypes.c_void_p * len(starts))(*starts)
        return pointers, int64s(firsts), layer_bytes, row_bytes

    def take_over(self) -> None:
        """Give the windows what the chunk's tokens have added."""
        for window, rows_LSX, first, begin, count in zip(
            self._windows, self._rows, self.firsts, self._begins, self._counts, strict=True
        ):
            end = begin + count
            window.append(self._layers, end, count, rows_LSX[:, : end - first])

"""The compressed latent KV cache of Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434,
section 2.1), and what every sequence's state can do.

Shapes: L layers, F layers with an indexer, S context positions, X elements of a row, Y of an index
key.  A token costs ``kv_lora_rank`` + ``qk_rope_head_dim`` values a layer: 31 KB in V2-Lite and 69
KB in V2 at 16 bits, where expanded keys and values would take V2 4.9 MB; with an indexer also
``index_head_dim`` values.  The backend says what a row is made of (``latent_row`` of
``slotmoe.quant.backends.base``): the native kernels keep 8 bits a value.
"""

import math
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import torch
from torch import Tensor

from slotmoe.model.config import Config

Row = Callable[[int, int], tuple[int, torch.dtype]]
"""Elements and dtype of a row of so many latent and rope values."""
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
"""Memory of a shape and dtype."""
Store = Callable[[Tensor, int, Tensor], None]
"""``store_latents`` of the backend."""


class SequenceState(Protocol):
    """What the tokens of a sequence leave behind for those that come: ``length`` of them are
    appended, and ``context`` have room.

    A pass says ``begin`` before its first layer and ``done`` behind its last one.  One that does
    not get there leaves the state as it was.  The last 16 tokens can be cut off, and more where the
    kind of attention lets them.
    """

    length: int
    context: int

    @property
    def nbytes(self) -> int:
        """Bytes of its memory."""

    @property
    def used_bytes(self) -> int:
        """Those that have been written so far."""

    def read_bytes(self, length: int) -> int:
        """Bytes that one token behind so many reads."""

    def begin(self, count: int) -> None:
        """A pass will append ``count`` tokens."""

    def done(self, count: int) -> None:
        """A pass has appended ``count`` tokens."""

    @property
    def marks(self) -> Collection[int]:
        """Lengths to which it can be cut that are remembered."""

    def reach(self, length: int) -> int:
        """The longest length up to ``length`` to which it can be cut."""

    def cut(self, length: int) -> None:
        """Keep the first ``length`` tokens, which ``reach`` has said can be."""

    def copy(self, source: "SequenceState", length: int) -> None:
        """Become the first ``length`` tokens of ``source``, which it can be cut to."""

    def mark(self, length: int) -> None:
        """A text ends there, at a length that it can be cut to: it can be later too, as long as
        that is among those that are remembered."""

    def fill(self, depth: int, store: Store) -> None:
        """Become ``depth`` tokens with random rows: for measurements."""

    # On disk

    def saved_bytes(self, start: int, end: int) -> int:
        """Bytes of ``saved``."""

    def saved(self, start: int, end: int) -> Tensor:
        """What the tokens from ``start`` to ``end`` have added for good, uint8 in RAM."""

    def put(self, start: int, end: int, data: Tensor, stop: int) -> None:
        """Take over from ``data``, which ``saved`` gave of those positions, what the tokens before
        ``stop`` have added.  ``resume`` makes them count."""

    def snapshot_bytes(self, length: int) -> int:
        """Bytes of ``snapshot``."""

    def snapshot(self, length: int) -> Tensor | None:
        """What else the next token behind ``length`` needs, uint8 in RAM; None where it is not
        there any more."""

    def resume(self, length: int, snapshot: Tensor) -> None:
        """Become ``length`` tokens, which go on from those that it has: what they added was
        ``put``, and this was their snapshot."""


class LatentCache:
    """Latents of one sequence: ``layers`` is [L, S, X] and ``index_keys`` [F, S, Y], of which the
    first ``length`` rows of each layer are valid.  See ``SequenceState``.

    A row of X elements is the normed latent and the rotated key part that all heads share.
    """

    def __init__(self, config: Config, context: int, row: Row, empty: Empty):
        self.context, self.length = context, 0
        self._written = 0  # positions that some layer has written; a pass may still be on its way
        self._config = config
        columns, dtype = row(config.kv_lora_rank, config.qk_rope_head_dim)
        self.layers = empty((config.num_hidden_layers, context, columns), dtype)
        full = config.indexer.full[: config.num_hidden_layers] if config.indexer else ()
        self._index_rows = [sum(full[:layer]) for layer in range(config.num_hidden_layers)]
        self.index_keys = torch.empty((0, context, 0), dtype=dtype)
        if config.indexer is not None:
            columns, dtype = row(config.indexer.head_dim, 0)
            self.index_keys = empty((sum(full), context, columns), dtype)

    def extend(self, layer: int, count: int) -> Tensor:
        """The layer's rows with ``count`` more, which the caller writes: [length + count, X]."""
        self._written = max(self._written, self.length + count)
        return self.layers[layer, : self.length + count]

    def extend_index(self, layer: int, count: int) -> Tensor:
        """The same of the layer's index keys: [length + count, Y]."""
        return self.index_keys[self._index_rows[layer], : self.length + count]

    @property
    def nbytes(self) -> int:
        return self.layers.nbytes + self.index_keys.nbytes

    @property
    def used_bytes(self) -> int:
        return self.nbytes // self.context * self._written

    def read_bytes(self, length: int) -> int:
        indexer = self._config.indexer
        seen = length if indexer is None else min(length, indexer.topk)
        return (self.layers.nbytes * seen + self.index_keys.nbytes * length) // self.context

    def begin(self, count: int) -> None:
        pass

    def done(self, count: int) -> None:
        self.length += count

    @property
    def marks(self) -> Collection[int]:
        return ()

    def reach(self, length: int) -> int:
        return min(length, self.length)

    def cut(self, length: int) -> None:
        self.length = length

    def copy(self, source: SequenceState, length: int) -> None:
        assert isinstance(source, LatentCache)
        for own, others in zip(self._tensors, source._tensors, strict=True):
            own[:, :length] = others[:, :length]
        self._written, self.length = max(self._written, length), length

    def mark(self, length: int) -> None:
        pass

    def fill(self, depth: int, store: Store) -> None:
        c, generator = self._config, torch.Generator().manual_seed(0)
        widths = c.latent_width, c.indexer.head_dim if c.indexer else 0
        for tensor, width, R in zip(
            self._tensors, widths, (c.kv_lora_rank, widths[1]), strict=True
        ):
            random_SW = torch.randn(depth, width, generator=generator).to(tensor.device)
            for rows_SX in tensor:
                store(random_SW, R, rows_SX[:depth])
        self.length = depth

    @property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        return self.layers, self.index_keys

    def saved_bytes(self, start: int, end: int) -> int:
        return self.nbytes // self.context * (end - start)

    def saved(self, start: int, end: int) -> Tensor:
        return flat_bytes(tensor[:, start:end] for tensor in self._tensors)

    def put(self, start: int, end: int, data: Tensor, stop: int) -> None:
        parts = split_bytes(data, ((tensor, end - start) for tensor in self._tensors))
        for tensor, part in zip(self._tensors, parts, strict=True):
            tensor[:, start:stop] = part[:, : stop - start]
        self._written = max(self._written, stop)

    def snapshot_bytes(self, length: int) -> int:
        return 0

    def snapshot(self, length: int) -> Tensor | None:
        return torch.empty(0, dtype=torch.uint8)

    def resume(self, length: int, snapshot: Tensor) -> None:
        self.length = length


def flat_bytes(parts: Iterable[Tensor]) -> Tensor:
    """The bytes of tensors one behind the other, uint8 in RAM."""
    return torch.cat([part.cpu().flatten().view(torch.uint8) for part in parts])


def split_bytes(data: Tensor, like: Iterable[tuple[Tensor, int]]) -> Iterable[Tensor]:
    """What ``flat_bytes`` has made of so many rows of each of these [L, S, ...], in RAM."""
    start = 0
    for tensor, count in like:
        layers, _, *row = tensor.shape
        end = start + layers * count * math.prod(row) * tensor.itemsize
        yield data[start:end].clone().view(tensor.dtype).view(layers, count, *row)
        start = end

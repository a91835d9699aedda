"""Where tokens stand and what their sequences keep: the structures of quant/kernels/cpu/api.h."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.quant.kernels.cpu.layers import Decoder, GroupShape
from slotmoe.quant.kernels.cpu.signatures import Bound
from slotmoe.quant.kernels.cpu.weights import Structure
from slotmoe.quant.shapes import latent_bytes
from slotmoe.state import Group

_STORE = " start:pointer first:pointer layer_bytes row_bytes"
_GROUP = _STORE + _STORE + " table:c64[T,C]"
_TOKENS = "positions:pointer table:c64[T,C] query_scale?:f32[T]" + _STORE + _STORE
_TOKENS += " lists?:i32[T,L] ids?:i64[T] compressed_table?:c64[T,C]"
_STRUCTURES = [Structure(_TOKENS + count * _GROUP) for count in range(4)]  # others aren't read
_NO_STORE: tuple[object, ...] = (None, None, 0, 0)


def _store(
    tensors: Sequence[Tensor],
    positions: Sequence[int],
    layers: int,
    width: int,
    first: Sequence[int] | None = None,
) -> tuple[object, ...]:
    """Each token's sequence's rows, as native calls find them: uint8 [layers, capacity, width],
    alike in all, one may stand for several tokens; they begin at positions `first`, or 0."""
    layer_bytes, row_bytes, capacity = layer_rows(tensors, layers, width)
    first = first or [0] * len(positions)
    for _, position, begin in zip(tensors, positions, first, strict=True):
        assert begin <= position < begin + capacity
    return addresses(tensors), int64s(first), layer_bytes, row_bytes


def _group(
    groups: Sequence[Group], table: Tensor, positions: Sequence[int], shape: GroupShape
) -> tuple[object, ...]:
    """Compressed rows of tokens' sequences and their open tokens', float32 [layers, tokens, 2,
    columns]; `table`, complex64 [T, C], rotates the row that a token completes.  `ValueError`."""
    tails, ratio, windows = [group.open for group in groups], shape.ratio, 1 + shape.overlaps
    begins = [tail.first for tail in tails]
    needed = [ratio * windows if (at + 1) % ratio == 0 else 1 for at in positions]
    for at, count, first in zip(positions, needed, begins, strict=True):
        if max(0, at + 1 - count) < first:
            raise ValueError(f"open rows begin at {first}, but position {at} needs {count}")
    last = [max(0, (at + 1) // ratio - 1) for at in positions]
    held = [group.rows for group in groups]
    rows = _store(held, last, shape.layers, latent_bytes(shape.width, 0))
    open_bytes = 8 * shape.width * windows
    flat = [tail.rows.flatten(2).view(torch.uint8) for tail in tails]
    pairs = address(table, torch.complex64, len(positions), table.shape[1])
    return *rows, *_store(flat, positions, shape.layers, open_bytes, begins), pairs


class Tokens(NamedTuple):
    """T tokens of one or several sequences, and what these keep.

    A token's pairs are rotated by `table`, complex64 [T, C], and its queries multiplied by
    `query_scale`, float32 [T].  Its latent row is written at its position of its sequence's cache,
    uint8 [layers, capacity, latent_bytes(R, P)], alike in all; one may stand for several tokens, a
    position after the other.  With indexers, `keys` are their rows, uint8 [indexers, capacity,
    latent_bytes(A, 0)], of each token's sequence, and `lists`, int32 [T, topk], what the last one
    before the first layer has chosen for tokens behind more than topk; they are overwritten.

    Of DeepSeek-V4 the caches are rows of the window, the first of which stand at the positions
    `first`, and there are the tokens' `ids`, int64 [T], the table of layers with a compressor, each
    token's rows of each of the decoder's `groups`, with the table that rotates the row that it
    completes, and how a layer that waits for its experts mixes them in, `post` [T, streams] and
    `comb` [T, streams, streams], which are overwritten."""

    table: Tensor
    caches: Sequence[Tensor]
    positions: Sequence[int]
    query_scale: Tensor | None = None
    keys: Sequence[Tensor] = ()
    lists: Tensor | None = None
    first: Sequence[int] = ()
    ids: Tensor | None = None
    compressed_table: Tensor | None = None
    groups: Sequence[tuple[Sequence[Group], Tensor]] = ()
    post: Tensor | None = None
    comb: Tensor | None = None

    def bound(self, decoder: Decoder) -> Bound:
        """For native calls.  Raises `ValueError`."""
        positions, layers = self.positions, len(decoder.routed)
        rows = _store(self.caches, positions, layers, decoder.row_bytes, self.first)
        for at, begin in zip(positions, self.first, strict=False):
            if max(0, at + 1 - decoder.window) < begin:
                raise ValueError(f"the window begins at {begin}, expected {decoder.window} rows")
        keys, lists = _NO_STORE, None
        if decoder.indexers:
            keys = _store(self.keys, positions, decoder.indexers, decoder.key_bytes)
            lists = self.lists
        shapes = zip(self.groups, decoder.groups, strict=True)
        groups = [value for group, shape in shapes for value in _group(*group, positions, shape)]
        t, pairs, complex64 = len(positions), decoder.sizes["C"], torch.complex64
        # Not by `Structure.bind`: its checks would cost a small model's token some percent.
        given = (
            int64s(positions),
            address(self.table, complex64, t, pairs),
            address(self.query_scale, torch.float32, t),
            *rows,
            *keys,
            address(lists, torch.int32, t, decoder.topk),
            address(self.ids, torch.int64, t),
            address(self.compressed_table, complex64, t, pairs),
            *groups,
        )
        parts = (ctypes.addressof(one) if isinstance(one, ctypes.Array) else one for one in given)
        return Bound(_STRUCTURES[len(self.groups)].type(*parts), {}, self, given)


def address(tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The tensor's address, None of None; asserting is quicker than the table's checks."""
    if tensor is None:
        return None
    assert (tensor.shape, tensor.dtype) == (shape, dtype)
    assert tensor.is_cpu and tensor.is_contiguous() and not tensor.is_conj()
    return tensor.data_ptr()


def layer_rows(caches: Sequence[Tensor], layers: int, width: int) -> tuple[int, int, int]:
    """Of caches that are alike, uint8 [layers, capacity, width]: the bytes from one layer to the
    next and from one row to the next, and the capacity."""
    shape, strides = caches[0].shape, caches[0].stride()
    for rows in caches:
        assert rows.dtype == torch.uint8 and rows.is_cpu
        assert (rows.shape, rows.stride()) == (shape, strides)
    apart = strides[1] if shape[1] > 1 else width
    assert (shape[0], shape[2], strides[2]) == (layers, width, 1) and apart >= width
    return strides[0], apart, shape[1]


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

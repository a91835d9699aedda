"""Where tokens stand and what their sequences keep, as native calls take it: the structures of
quant/kernels/cpu/api.h."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.quant.kernels.cpu.layers import Decoder, GroupShape
from slotmoe.quant.kernels.cpu.signatures import Bound
from slotmoe.quant.kernels.cpu.weights import Structure
from slotmoe.quant.shapes import latent_bytes

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
    alike in all, one of which may stand for several tokens; the first of them are those of the
    positions `first`, or 0.  Raises `ValueError` unless there is a row for each position."""
    layer_bytes, row_bytes, capacity = layer_rows(tensors, layers, width)
    if len(positions) != len(tensors):
        count = f"{len(positions)} positions"
        raise ValueError(f"{count}, expected one for each of {len(tensors)} caches")
    first = first or [0] * len(positions)
    for position, begin in zip(positions, first, strict=True):
        if not begin <= position < begin + capacity:
            rows = f"one of the cache's {capacity} rows"
            raise ValueError(f"position is {position}, expected {rows} from {begin} on")
    return addresses(tensors), int64s(first), layer_bytes, row_bytes


class GroupRows(NamedTuple):
    """Of each token's sequence, compressed `rows` of some layers, uint8 [layers, capacity, width],
    and what its compressor gave of the last tokens, float32 [layers, tokens, 2, columns], the first
    of which stand at the positions `first`.  `table`, complex64 [T, C], rotates the row that a
    token completes."""

    rows: Sequence[Tensor]
    open: Sequence[Tensor]
    first: Sequence[int]
    table: Tensor

    def values(self, positions: Sequence[int], shape: GroupShape) -> tuple[object, ...]:
        """For native calls.  Raises `ValueError`."""
        ratio, columns = shape.ratio, shape.width * (1 + shape.overlaps)
        needed = [ratio * (1 + shape.overlaps) if (at + 1) % ratio == 0 else 1 for at in positions]
        for at, count, first in zip(positions, needed, self.first, strict=True):
            if max(0, at + 1 - count) < first:
                raise ValueError(f"open rows begin at {first}, but position {at} needs {count}")
        last = [max(0, (at + 1) // ratio - 1) for at in positions]
        rows = _store(self.rows, last, shape.layers, latent_bytes(shape.width, 0))
        flat = [part.flatten(2).view(torch.uint8) for part in self.open]
        return *rows, *_store(flat, positions, shape.layers, 8 * columns, self.first), self.table


class DecodeRows(NamedTuple):
    """What sequences keep beside `caches`.  With indexers, `keys` are their rows, uint8 [indexers,
    capacity, latent_bytes(A, 0)], of each token's sequence, and `lists`, int32 [T, topk], what the
    last one before the first layer has chosen for tokens behind more than topk; they are
    overwritten.

    Of DeepSeek-V4 the caches are rows of the window, the first of which stand at the positions
    `first`, and there are the tokens' `ids`, int64 [T], the `table` of layers with a compressor,
    rows of each of the decoder's `groups`, and how a layer that waits for its experts mixes them
    in, `post` [T, streams] and `comb` [T, streams, streams], which are overwritten."""

    keys: Sequence[Tensor] = ()
    lists: Tensor | None = None
    first: Sequence[int] = ()
    ids: Tensor | None = None
    table: Tensor | None = None
    groups: Sequence[GroupRows] = ()
    post: Tensor | None = None
    comb: Tensor | None = None


NO_ROWS = DecodeRows()


def tokens_of(
    decoder: Decoder,
    table: Tensor,
    caches: Sequence[Tensor],
    positions: Sequence[int],
    query_scale: Tensor | None,
    of: DecodeRows,
) -> Bound:
    """What `decode` is given of its tokens, bound.  Raises `ValueError`."""
    rows = _store(caches, positions, len(decoder.routed), decoder.row_bytes, of.first)
    for at, begin in zip(positions, of.first, strict=False):
        if max(0, at + 1 - decoder.window) < begin:
            raise ValueError(f"the window begins at {begin}, expected {decoder.window} rows")
    keys, lists = _NO_STORE, None
    if decoder.indexers:
        keys = _store(of.keys, positions, decoder.indexers, decoder.key_bytes)
        lists = of.lists
    shapes = zip(of.groups, decoder.groups, strict=True)
    held = [value for group, shape in shapes for value in group.values(positions, shape)]
    sizes = {"T": len(caches), "C": decoder.sizes["C"], "L": decoder.topk}
    tokens = int64s(positions), table, query_scale, *rows, *keys, lists, of.ids, of.table, *held
    return _STRUCTURES[len(of.groups)].bind(sizes, *tokens)


def address(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> int | None:
    """The tensor's address, checked as the table's are, and quicker; None of None."""
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype != dtype:
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {given}, expected {dtype} {shape}")
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj():
        raise ValueError(f"{name} must be a contiguous CPU tensor, and not conjugated lazily")
    return tensor.data_ptr()


def layer_rows(caches: Sequence[Tensor], layers: int, width: int) -> tuple[int, int, int]:
    """Of caches that are alike, uint8 [layers, capacity, width]: the bytes from one layer to the
    next and from one row to the next, and the capacity."""
    if not caches:
        raise ValueError("there are no caches, expected one for each token")
    shape, strides = caches[0].shape, caches[0].stride()
    for rows in caches:
        if rows.dtype != torch.uint8 or not rows.is_cpu or rows.dim() != 3:
            raise ValueError(f"cache is {rows.dtype} on {rows.device}, expected uint8 on the CPU")
        if rows.shape != shape or rows.stride() != strides:
            raise ValueError(f"caches {tuple(shape)} and {tuple(rows.shape)} must be alike")
    if shape[0] != layers or shape[2] != width:
        raise ValueError(f"cache is {tuple(shape)}, expected [{layers}, capacity, {width}]")
    apart = strides[1] if shape[1] > 1 else width
    if strides[2] != 1 or apart < width:
        raise ValueError(f"cache has strides {strides}, expected rows of {width} adjacent bytes")
    return strides[0], apart, shape[1]


def int64s(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(values))(*values)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])

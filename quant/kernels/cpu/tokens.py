"""Where tokens stand and what their sequences keep, as native calls take it: the structures of
quant/kernels/cpu/api.h."""

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slotmoe.quant.kernels.cpu.layers import GroupShape
from slotmoe.quant.kernels.cpu.signatures import Bound, tensor_spec
from slotmoe.quant.shapes import latent_bytes


class _Store(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("start", "first")),
        *((name, ctypes.c_int64) for name in ("layer_bytes", "row_bytes")),
    ]


class _Group(ctypes.Structure):
    _fields_ = [*((name, _Store) for name in ("rows", "open")), ("table", ctypes.c_void_p)]


class _Tokens(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("positions", "table", "query_scale")),
        *((name, _Store) for name in ("rows", "keys")),
        *((name, ctypes.c_void_p) for name in ("lists", "ids", "compressed_table")),
        ("groups", _Group * 3),
    ]


class Rows:
    """Each token's sequence's rows of some layers, uint8 [layers, capacity, width], alike in all,
    one of which may stand for several tokens; the first of them are those of the positions
    `first`, or 0."""

    def __init__(self, tensors: Sequence[Tensor], first: Sequence[int] | None = None):
        self.tensors, self.first = tensors, first

    def bound(self, positions: Sequence[int], layers: int, width: int) -> tuple[_Store, object]:
        """For native calls, and what they point to.  Raises `ValueError` unless there is a row for
        each position."""
        layer_bytes, row_bytes, capacity = layer_rows(self.tensors, layers, width)
        if len(positions) != len(self.tensors):
            count = f"{len(positions)} positions"
            raise ValueError(f"{count}, expected one for each of {len(self.tensors)} caches")
        first = self.first or [0] * len(positions)
        for position, begin in zip(positions, first, strict=True):
            if not begin <= position < begin + capacity:
                rows = f"one of the cache's {capacity} rows"
                raise ValueError(f"position is {position}, expected {rows} from {begin} on")
        start, firsts = addresses(self.tensors), int64s(first)
        places = (ctypes.addressof(values) for values in (start, firsts))
        return _Store(*places, layer_bytes, row_bytes), (start, firsts)


class GroupRows(NamedTuple):
    """Of each token's sequence, compressed `rows` of some layers, uint8 [layers, capacity, width],
    and what its compressor gave of the last tokens, float32 [layers, tokens, 2, columns], the first
    of which stand at the positions `first`.  `table`, complex64 [T, C], rotates the row that a
    token completes."""

    rows: Sequence[Tensor]
    open: Sequence[Tensor]
    first: Sequence[int]
    table: Tensor

    def bound(self, positions: Sequence[int], shape: GroupShape) -> tuple[_Group, object]:
        """For native calls, and what it points to.  Raises `ValueError`."""
        ratio, columns = shape.ratio, shape.width * (1 + shape.overlaps)
        needed = [ratio * (1 + shape.overlaps) if (at + 1) % ratio == 0 else 1 for at in positions]
        for at, count, first in zip(positions, needed, self.first, strict=True):
            if max(0, at + 1 - count) < first:
                raise ValueError(f"open rows begin at {first}, but position {at} needs {count}")
        last = [max(0, (at + 1) // ratio - 1) for at in positions]
        rows, memory = Rows(self.rows).bound(last, shape.layers, latent_bytes(shape.width, 0))
        flat = [part.flatten(2).view(torch.uint8) for part in self.open]
        opened, more = Rows(flat, self.first).bound(positions, shape.layers, 8 * columns)
        table = tensor_spec("table:c64[T,C]").check(self.table, {"T": len(positions)})
        return _Group(rows, opened, table), (memory, more, self)


class Tokens(Bound):
    """A token stands at one of `positions`; addresses as in api.h.  Raises `ValueError`."""

    def __init__(
        self,
        positions: Sequence[int],
        table: int | None,
        query_scale: int | None,
        rows: tuple[_Store, object],
        keys: tuple[_Store, object] | None = None,
        lists: int | None = None,
        ids: int | None = None,
        compressed_table: int | None = None,
        groups: Sequence[tuple[_Group, object]] = (),
    ):
        places, none = int64s(positions), (_Store(), None)
        (own, memory), (others, more) = rows, keys or none
        given = ctypes.addressof(places), table, query_scale
        native = _Tokens(*given, own, others, lists, ids, compressed_table)
        for at, (group, _) in enumerate(groups):
            native.groups[at] = group
        super().__init__(native, {}, places, memory, more, groups)


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

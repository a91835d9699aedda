"""Checks of arguments that the table of `slotmoe.quant.kernels.cpu.signatures` cannot describe:
rows that are strided, several caches, slabs, and what runs once a token.  All raise
`ValueError`."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def row_stride(cache: Tensor, width: int) -> int:
    """Bytes from one row to the next of a latent cache, uint8 [capacity, width]."""
    if cache.dim() != 2:
        raise ValueError(f"cache has {cache.dim()} dimensions, expected [capacity, {width}]")
    return layer_rows([cache[None]], 1, width)[1]


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


def position_array(positions: Sequence[int], count: int, capacity: int) -> Any:
    if len(positions) != count:
        raise ValueError(f"{len(positions)} positions, expected one for each of {count} caches")
    for position in positions:
        if not 0 <= position < capacity:
            raise ValueError(f"position is {position}, expected one of the cache's {capacity} rows")
    return (ctypes.c_int64 * count)(*positions)


def addresses(tensors: Sequence[Tensor]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def columns(x: Tensor) -> int:
    if x.dim() == 0:
        raise ValueError("a tensor has no dimensions, expected rows and columns")
    return x.shape[-1]


def rope_columns(x: Tensor, r: int) -> int:
    if not 1 <= r <= columns(x):
        raise ValueError(f"R is {r}, expected one of the tensor's {x.shape[-1]} columns")
    return x.shape[-1] - r


def rows_per_head(x: Tensor, kv_b: Tensor, n: int) -> int:
    """Rows of `kv_b` for each head of x [T, A, ...], of which `n` are the query's."""
    if x.dim() != 3 or kv_b.dim() != 2:
        raise ValueError(f"expected [T, A, ...] and [M, R], given {x.dim()}-d and {kv_b.dim()}-d")
    heads, rows = x.shape[1], len(kv_b)
    if heads < 1 or rows % heads or not 0 <= n <= rows // heads:
        raise ValueError(f"kv_b has {rows} rows: {heads} heads with {n} for the query can't share")
    return rows // heads


def address(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """The tensor's address, checked as the table's are, and quicker."""
    if tensor.shape != shape or tensor.dtype != dtype:
        given = f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{name} is {given}, expected {dtype} {shape}")
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_conj():
        raise ValueError(f"{name} must be a contiguous CPU tensor, and not conjugated lazily")
    return tensor.data_ptr()


def optional_address(
    name: str, tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]
) -> int | None:
    """The same, and None of None."""
    return None if tensor is None else address(name, tensor, dtype, shape)


def slab_of(slab: Tensor, size: int) -> tuple[int, int, int]:
    """Address, number of records and stride of a slab, uint8 [S, >= size]."""
    if slab.dim() != 2:
        raise ValueError(f"slab has {slab.dim()} dimensions, expected 2")
    count, stride = slab.shape
    if count and stride < size:
        raise ValueError(f"a record of {stride} bytes, expected at least {size}")
    start = address("slab", slab, torch.uint8, (count, stride))
    if stride % 64 or start % 64:
        raise ValueError(f"records stand {stride} bytes apart, expected a multiple of 64 bytes")
    return start, count, stride

"""Checks of arguments that the table of `slotmoe.quant.kernels.cpu.signatures` cannot describe:
rows that are strided, several caches, heads that share rows.  All raise `ValueError`."""

import ctypes
from collections.abc import Sequence

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


def cache_rows(
    caches: Sequence[Tensor], positions: Sequence[int], layers: int, width: int
) -> tuple[ctypes.Array[ctypes.c_void_p], int, int, ctypes.Array[ctypes.c_int64]]:
    """The addresses of such caches, how far layers and rows are apart, and a position in each."""
    layer_stride, stride, capacity = layer_rows(caches, layers, width)
    if len(positions) != len(caches):
        raise ValueError(
            f"{len(positions)} positions, expected one for each of {len(caches)} caches"
        )
    for position in positions:
        if not 0 <= position < capacity:
            raise ValueError(f"position is {position}, expected one of the cache's {capacity} rows")
    return addresses(caches), layer_stride, stride, (ctypes.c_int64 * len(positions))(*positions)


def addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])


def rows_per_head(x: Tensor, kv_b: Tensor, n: int) -> int:
    """Rows of `kv_b` for each head of x [T, A, ...], of which `n` are the query's."""
    heads, rows = x.shape[1] if x.dim() == 3 else 0, len(kv_b)
    if heads < 1 or rows % heads or not 0 <= n <= rows // heads:
        raise ValueError(
            f"{rows} rows of kv_b, {n} of each head's for the query, don't fit [T, A,"
            f" ...] of {tuple(x.shape)}"
        )
    return rows // heads

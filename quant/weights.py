"""Weights of every kind: quantize them, take rows of them, dequantize them exactly.

A weight [N, K] is a float tensor, an ``Int8Weight`` or an ``CodedWeight``; a backend may prepare a
kind of its own from one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from slotmoe.quant import int8
from slotmoe.quant.codecs import nf4
from slotmoe.quant.codecs.codec import TILE
from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu import bindings

Weight = Tensor | Int8Weight | CodedWeight
_CACHED = 1 << 16  # weights whose temporaries stay in the processor's cache


def map_tensors(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """The same weight with ``change`` applied to each of its tensors."""
    if isinstance(weight, Tensor):
        return change(weight)
    parts = {name: part for name, part in vars(weight).items() if isinstance(part, Tensor)}
    changed: dict[str, Any] = {name: change(part) for name, part in parts.items()}
    return replace(weight, **changed)


def quantize_nf4(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``nf4.quantize``, by the native kernel where there is one; the same bytes and errors."""
    native = bindings.load()
    if native is None:
        return nf4.quantize(weight_NK)
    try:
        return native.quantize_nf4(weight_NK)
    except ValueError:
        raise nf4.NotFiniteError from None


def quantize_int8(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """``int8.quantize``, by the native kernel where there is one; the same bytes."""
    native = bindings.load()
    return int8.quantize(weight_NK) if native is None else native.quantize_int8(weight_NK)


def squared_error(source_NK: Tensor, weight: Int8Weight | CodedWeight) -> tuple[float, float]:
    """Sum of squared differences between a matrix and its quantized weight, and sum of the matrix's
    squares, in float64.  Native kernels and torch agree to its last digits."""
    if (native := bindings.load()) is not None:
        return native.squared_error(source_NK, weight)
    N, K = source_NK.shape
    step = max(TILE, _CACHED // K // TILE * TILE)
    errors, squares = [], []
    for start in range(0, N, step):
        source = source_NK[start : start + step].double().flatten()
        error = source - weight.rows(start, min(start + step, N)).dequantize().flatten()
        errors.append(error.dot(error).item())
        squares.append(source.dot(source).item())
    return math.fsum(errors), math.fsum(squares)


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` (a multiple of 16) to ``stop`` of a weight, as a view."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def dequantize(weight: Weight) -> Tensor:
    """The exact matrix, float32 [N, K], on the weight's device."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()

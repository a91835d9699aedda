"""A weight [N, K] of any kind: a float tensor, an ``Int8Weight`` or a ``CodedWeight``.  A backend
may prepare a kind of its own from one."""

from collections.abc import Callable

from torch import Tensor

from slotmoe.quant.codecs.weight import CodedWeight
from slotmoe.quant.int8 import Int8Weight

Weight = Tensor | Int8Weight | CodedWeight


def map_tensors(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """The same weight with ``change`` applied to each of its tensors."""
    if isinstance(weight, Tensor):
        return change(weight)
    if isinstance(weight, Int8Weight):
        return Int8Weight(change(weight.q), change(weight.scale))
    codes, scales, levels = map(change, (weight.codes, weight.scales, weight.levels))
    return CodedWeight(codes, scales, levels, weight.shape)


def rows(weight: Weight, start: int, stop: int) -> Weight:
    """Rows ``start`` (a multiple of 16) to ``stop`` of a weight, as a view."""
    return weight[start:stop] if isinstance(weight, Tensor) else weight.rows(start, stop)


def dequantize(weight: Weight) -> Tensor:
    """The exact matrix, float32 [N, K], on the weight's device."""
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize()

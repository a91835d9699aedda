"""Weights coded by a table of learned levels: the best codes and scales, of either sign, with a
Hessian of the matrix's inputs or without, in the layout ``tiles16`` of ``slotmoe.quant.nf4``.

Shape legend: N rows out, K columns in, X blocks of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant import encode, feedback
from slotmoe.quant.feedback import Hessian, Rounding
from slotmoe.quant.nf4 import NotFiniteError, pack
from slotmoe.quant.shapes import BLOCK, TILE

# Of least squared error on weights that are nearly normal; a model's own are learned from these.
LEVELS = tuple(
    level / 127
    for level in (-118, -90, -70, -54, -39, -27, -15, -3, 9, 20, 32, 45, 60, 76, 96, 127)
)


def quantize(
    weight_NK: Tensor, levels_L: Tensor, hessian: Hessian | None = None
) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Codes, scales, and with a Hessian the sums of squares of the error and of the weights in its
    measure, of a bf16, fp16 or fp32 matrix.  Raises ``NotFiniteError``."""
    N, K = weight_NK.shape
    squares = None
    if hessian is None:
        scales_NX = _rounding(encode.fit_scales(weight_NK, torch.ones(K), levels_L, BLOCK))
        codes_NK = encode.assign(weight_NK, scales_NX, levels_L, BLOCK)
    else:
        made = feedback.encode(weight_NK, hessian, levels_L, BLOCK, lambda scales_NX: _rounding)
        codes_NK, scales_NX = made.codes_NK, made.scales_NX
        squares = made.error, made.square
    if not bool(scales_NX.isfinite().all()):
        raise NotFiniteError
    rows = (0, 0, 0, -N % TILE)
    scales = F.pad(scales_NX, rows).half().view(-1, TILE, scales_NX.shape[1]).transpose(1, 2)
    return pack(F.pad(codes_NK, rows)), scales.contiguous(), squares


def _rounding(scales: Tensor) -> Tensor:
    """To float16."""
    return scales.half().float()

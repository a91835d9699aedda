"""Weights coded by a table of levels (``LUT4`` and ``LUT3`` of ``codec``): the best
codes and scales, of either sign, with a Hessian of the matrix's inputs or without.

Shape legend: N rows out and K columns in, both filled up to tiles; X blocks of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant.codecs import encode, feedback
from slotmoe.quant.codecs.codec import BLOCK, SCALES, TILE, Codec
from slotmoe.quant.codecs.encode import ByteScales
from slotmoe.quant.codecs.feedback import Hessian
from slotmoe.quant.codecs.nf4 import NotFiniteError
from slotmoe.quant.codecs.weight import pack


def quantize(
    weight_NK: Tensor, codec: Codec, hessian: Hessian | None = None
) -> tuple[Tensor, Tensor, tuple[float, float] | None]:
    """Codes, scales, and with a Hessian the sums of squares of the error and of the weights in its
    measure, of a bf16, fp16 or fp32 matrix.  Raises ``NotFiniteError``."""
    block, levels_L = SCALES[codec.scales].block, torch.tensor(codec.levels, dtype=torch.float32)
    squares = None
    if hessian is None:
        N, K = weight_NK.shape
        scales_NX = encode.fit_scales(weight_NK, torch.ones(K), levels_L, block)
        if not bool(scales_NX.isfinite().all()):
            raise NotFiniteError
        rows, X = (0, -N % TILE), scales_NX.shape[1]
        scales_NX = F.pad(scales_NX, (0, -X % (BLOCK // block), *rows))
        coding = ByteScales(scales_NX)
        scales_NX = coding.round(scales_NX)
        codes_NK = encode.assign(weight_NK, scales_NX[:N, :X].contiguous(), levels_L, block)
        codes_NK = F.pad(codes_NK, (0, -X * block % BLOCK, *rows))
    else:
        made = feedback.encode(weight_NK, hessian, levels_L, block)
        codes_NK, scales_NX, coding = made.codes_NK, made.scales_NX, made.coding
        squares = made.error, made.square
    if not bool(scales_NX.isfinite().all()):
        raise NotFiniteError
    codes = pack(codes_NK.view(-1, TILE, codes_NK.shape[1]), codec.bits)
    return codes, coding.stored(scales_NX).cpu(), squares

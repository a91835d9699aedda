"""Weights coded by a table of levels (``LUT4`` and ``LUT3`` of ``slotmoe.quant.codec``): the best
codes and scales, of either sign, with a Hessian of the matrix's inputs or without.

Shape legend: N rows out and K columns in, both filled up to tiles; X blocks of a row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from slotmoe.quant import encode, feedback
from slotmoe.quant.codec import BLOCK, SCALES, TILE, Codec
from slotmoe.quant.coded import pack
from slotmoe.quant.feedback import Hessian, ScaleCoding
from slotmoe.quant.nf4 import NotFiniteError


class Halves:
    """Scales in float16."""

    def __init__(self, scales_NX: Tensor):
        """``scales`` are the best ones, whatever can be stored."""

    def round(self, scales: Tensor) -> Tensor:
        """The nearest that can be stored: of one block [N], or of all, [N, X]."""
        return scales.half().float()

    def stored(self, scales_NX: Tensor) -> Tensor:
        """The scale tensor."""
        return scales_NX.half().view(-1, TILE, scales_NX.shape[1]).transpose(1, 2).contiguous()


class Bytes:
    """Scales as signed bytes under a float32 factor of the row."""

    def __init__(self, scales_NX: Tensor):
        """The largest of ``scales`` gets the largest byte."""
        self._factor_N = scales_NX.abs().amax(-1) / 127
        self._divisor_N = torch.where(self._factor_N > 0, self._factor_N, 1.0)

    def _whole(self, scales: Tensor) -> Tensor:
        divisor = self._divisor_N if scales.dim() == 1 else self._divisor_N[:, None]
        return (scales / divisor).round().clamp(-127, 127)

    def round(self, scales: Tensor) -> Tensor:
        """As ``Halves.round``."""
        factor = self._factor_N if scales.dim() == 1 else self._factor_N[:, None]
        return self._whole(scales) * factor

    def stored(self, scales_NX: Tensor) -> Tensor:
        """As ``Halves.stored``."""
        whole = self._whole(scales_NX).to(torch.int8)
        blocks = whole.view(-1, TILE, whole.shape[1]).transpose(1, 2).contiguous()
        parts = self._factor_N.view(-1, TILE).view(torch.uint8), blocks.view(torch.uint8)
        return torch.cat([part.view(len(blocks), -1, 2 * TILE) for part in parts], dim=1)


_CODINGS: dict[str, type[ScaleCoding]] = {"f16": Halves, "i8": Bytes}


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
        coding = _CODINGS[codec.scales](scales_NX)
        scales_NX = coding.round(scales_NX)
        codes_NK = encode.assign(weight_NK, scales_NX[:N, :X].contiguous(), levels_L, block)
        codes_NK = F.pad(codes_NK, (0, -X * block % BLOCK, *rows))
    else:
        made = feedback.encode(weight_NK, hessian, levels_L, block, _CODINGS[codec.scales])
        codes_NK, scales_NX, coding = made.codes_NK, made.scales_NX, made.coding
        squares = made.error, made.square
    if not bool(scales_NX.isfinite().all()):
        raise NotFiniteError
    codes = pack(codes_NK.view(-1, TILE, codes_NK.shape[1]), codec.bits)
    return codes, coding.stored(scales_NX).cpu(), squares

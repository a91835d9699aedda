"""Weights coded by a table of levels with 8-bit scales (``LUT4`` and ``LUT3`` of
``slotmoe.quant.codec``): each block takes, of a few scales of either sign, the one of least squared
error.

Shape legend: N rows out, K columns in.
"""

import torch
from torch import Tensor

from slotmoe.quant.codec import BLOCK, SCALES, TILE, Codec
from slotmoe.quant.coded import levels_of, pack
from slotmoe.quant.nf4 import NotFiniteError

_CHUNK = 1 << 19  # weights coded at once
_FACTORS = torch.linspace(0.75, 1.2, 10)  # of the scale with which no weight is beyond the levels


def quantize(weight_NK: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Codes and scales of a bf16, fp16 or fp32 matrix.  Raises ``NotFiniteError``."""
    N, K = weight_NK.shape
    codes = torch.zeros(codec.codes_shape(N, K), dtype=torch.uint8)
    scales = torch.zeros(codec.scales_shape(N, K), dtype=torch.uint8)
    columns = codes.shape[1] * BLOCK
    step = max(1, _CHUNK // (columns * TILE))
    for start in range(0, len(codes), step):
        rows = weight_NK[start * TILE : (start + step) * TILE]
        padded = torch.zeros(-(-len(rows) // TILE) * TILE, columns)
        padded[: len(rows), :K] = rows
        tiles = slice(start, start + len(padded) // TILE)
        codes[tiles], scales[tiles] = _quantize_rows(padded, codec)
    return codes, scales


def _quantize_rows(w: Tensor, codec: Codec) -> tuple[Tensor, Tensor]:
    """Codes and scales of float32 [16 tiles, columns]."""
    rows, columns = w.shape
    if not bool(w.isfinite().all()):
        raise NotFiniteError
    levels = levels_of(codec)[: len(codec.levels)]
    blocks = w.view(rows, -1, SCALES[codec.scales].block)
    largest = blocks.abs().amax(-1)
    scale, least = torch.zeros_like(largest), blocks.square().sum(-1)
    for end in (levels[0], levels[-1]):
        for factor in _FACTORS:
            for sign in (1, -1):
                tried = sign * factor * largest / end.abs()
                values = levels[_nearest(blocks, tried, levels)]
                refit = (blocks * values).sum(-1) / values.square().sum(-1)
                error = (blocks - refit[..., None] * values).square().sum(-1)
                better = error < least
                scale, least = torch.where(better, refit, scale), torch.where(better, error, least)
    factor_R1 = scale.abs().amax(-1, keepdim=True) / 127
    divisor = torch.where(factor_R1 > 0, factor_R1, 1.0)
    q = torch.round(scale / divisor).clamp(-127, 127)
    codes = _nearest(blocks, q * factor_R1, levels).to(torch.uint8).view(-1, TILE, columns)
    of_blocks = q.to(torch.int8).view(len(codes), TILE, -1).transpose(1, 2).contiguous()
    of_rows = factor_R1.view(len(codes), TILE)
    parts = of_rows.view(torch.uint8), of_blocks.view(torch.uint8)
    scales = torch.cat([part.view(len(codes), -1, 2 * TILE) for part in parts], dim=1)
    return pack(codes, codec.bits), scales


def _nearest(blocks: Tensor, scale: Tensor, levels: Tensor) -> Tensor:
    """The levels next to the weights of each block; of a block without a scale the first."""
    inverse = torch.where(scale == 0, 0.0, 1 / scale)
    return torch.bucketize(blocks * inverse[..., None], (levels[1:] + levels[:-1]) / 2)

"""NF4 (QLoRA, arXiv 2305.14314): 4-bit codes over 16 levels, one fp16 scale for each 64 weights of
a row.

Codes are those of ``bitsandbytes.functional.quantize_4bit(w, blocksize=64, quant_type="nf4")``.
They are stored in the layout ``tiles16``, which lets a kernel form 16 rows' dot products before it
converts or scales anything:

    W [N, K], zero-padded to N = 16 * n_tiles rows and K = 64 * n_blocks columns
    codes   U8  [n_tiles, n_blocks, 512]
            byte 64 * t + 4 * lane + i (t < 8, lane < 16, i < 4) of (tile, block) belongs to row 16
            * tile + lane; its high nibble is the code of column 64 * block + 8 * t + i, its low
            nibble that of the column 4 further
    absmax  F16 [n_tiles, n_blocks, 16], scale of row 16 * tile + lane in that block

    weight = levels[code] * absmax

Readers take the levels as data and accept scales of any sign.  Shape legend: N rows out, K columns
in.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slotmoe.quant.shapes import BLOCK, TILE, absmax_shape, codes_shape

_CHUNK = 1 << 17  # weights quantized at once
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
MIDPOINTS = (np.array(LEVELS[:-1], np.float32) + np.array(LEVELS[1:], np.float32)) / 2


@dataclass(frozen=True)
class Nf4Weight:
    """A [N, K] matrix in ``tiles16``; codes uint8, absmax float16, levels float32 [16]."""

    codes: Tensor
    absmax: Tensor
    levels: Tensor
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.absmax.nbytes + self.levels.nbytes

    def rows(self, start: int, stop: int) -> "Nf4Weight":
        """Rows ``start`` (a multiple of 16) to ``stop``, as a view."""
        tiles = slice(start // TILE, -(-stop // TILE))
        shape = stop - start, self.shape[1]
        return Nf4Weight(self.codes[tiles], self.absmax[tiles], self.levels, shape)

    def dequantize(self) -> Tensor:
        """The exact matrix, float32 [N, K], on the weight's device."""
        N, K = self.shape
        tiles, blocks, _ = self.codes.shape
        codes = self.codes.view(tiles, blocks, 8, TILE, 4)  # tile, block, t, lane, i
        nibbles = torch.stack([codes >> 4, codes & 15], dim=4)  # tile, block, t, lane, half, i
        values = self.levels[nibbles.int()]
        values = values * self.absmax.float().view(tiles, blocks, 1, TILE, 1, 1)
        return values.permute(0, 3, 1, 2, 4, 5).reshape(tiles * TILE, blocks * BLOCK)[:N, :K]


class NotFiniteError(ValueError):
    """The weights hold NaN or infinity, or a block's largest value does not fit fp16."""


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a bf16, fp16 or fp32 matrix, in ``tiles16``.  Raises ``NotFiniteError``.
    A code is the number of levels' midpoints below ``w * (1 / absmax)``, all in float32."""
    N, K = weight_NK.shape
    tiles, blocks, _ = codes_shape(N, K)
    codes = torch.empty(codes_shape(N, K), dtype=torch.uint8)
    absmax = torch.empty(absmax_shape(N, K), dtype=torch.float16)
    step = max(1, _CHUNK // (blocks * BLOCK * TILE))
    for start in range(0, tiles, step):  # a chunk's temporaries stay in the cache
        stop = min(start + step, tiles)
        rows = weight_NK[start * TILE : stop * TILE]
        padded = torch.zeros((stop - start) * TILE, blocks * BLOCK)
        padded[: len(rows), :K] = rows
        chunk = padded.view(stop - start, TILE, blocks, BLOCK)
        codes[start:stop], absmax[start:stop] = _quantize_tiles(chunk)
    return codes, absmax


def _quantize_tiles(w: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [tiles, blocks, 512] and absmax of float32 [tiles, lanes, blocks, 64]."""
    tiles, _, blocks, _ = w.shape
    absmax = w.abs().amax(dim=-1)
    if not bool((absmax <= 65504.0).all()):
        raise NotFiniteError
    scaled = w.mul_((1.0 / absmax.clamp(min=1e-38))[..., None]).numpy()
    codes, below = np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, bool)
    for midpoint in MIDPOINTS:  # numpy compares 8 times as fast as torch does
        np.greater(scaled, midpoint, out=below)
        np.add(codes, below.view(np.uint8), out=codes)
    packed = pack(torch.from_numpy(codes).view(tiles * TILE, blocks * BLOCK))
    return packed, absmax.half().transpose(1, 2)


def pack(codes_NK: Tensor) -> Tensor:
    """The code tensor of one code a byte, uint8; N a multiple of 16 and K of 64."""
    tiles, blocks = len(codes_NK) // TILE, codes_NK.shape[1] // BLOCK
    # Four neighbouring columns move as one 32-bit word; codes are below 16, so no bit crosses a
    # byte when shifted.
    words = codes_NK.view(torch.int32).view(tiles, TILE, blocks, 8, 2).permute(4, 0, 2, 3, 1)
    packed = (words[0] << 4 | words[1]).contiguous().view(torch.uint8)  # tile, block, t, lane, i
    return packed.view(tiles, blocks, TILE * BLOCK // 2)

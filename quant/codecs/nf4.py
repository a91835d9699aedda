"""NF4 (QLoRA, arXiv 2305.14314): the codes of ``bitsandbytes.functional.quantize_4bit(w,
blocksize=64, quant_type="nf4")``, and its absmax rounded to fp16, as ``codec`` stores
them.

Shape legend: N rows out, K columns in.
"""

import numpy as np
import torch
from torch import Tensor

from slotmoe.quant.codecs.codec import BLOCK, NF4, TILE
from slotmoe.quant.codecs.weight import pack

_CHUNK = 1 << 17  # weights quantized at once
LEVELS = NF4.levels
MIDPOINTS = (np.array(LEVELS[:-1], np.float32) + np.array(LEVELS[1:], np.float32)) / 2


class NotFiniteError(ValueError):
    """The weights hold NaN or infinity, or a block's largest value does not fit fp16."""


def quantize(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and absmax of a bf16, fp16 or fp32 matrix, in ``tiles16``.  Raises ``NotFiniteError``.
    A code is the number of levels' midpoints below ``w * (1 / absmax)``, all in float32."""
    N, K = weight_NK.shape
    tiles, blocks, _ = NF4.codes_shape(N, K)
    codes = torch.empty(NF4.codes_shape(N, K), dtype=torch.uint8)
    absmax = torch.empty(NF4.scales_shape(N, K), dtype=torch.float16)
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
    absmax = w.abs().amax(dim=-1)
    if not bool((absmax <= 65504.0).all()):
        raise NotFiniteError
    scaled = w.mul_((1.0 / absmax.clamp(min=1e-38))[..., None]).numpy()
    codes, below = np.zeros(scaled.shape, np.uint8), np.empty(scaled.shape, bool)
    for midpoint in MIDPOINTS:  # numpy compares 8 times as fast as torch does
        np.greater(scaled, midpoint, out=below)
        np.add(codes, below.view(np.uint8), out=codes)
    return pack(torch.from_numpy(codes).flatten(2), 4), absmax.half().transpose(1, 2)

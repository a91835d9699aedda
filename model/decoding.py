"""Quantized weights of checkpoints, decoded a few rows at a time.

Codes times scales are computed in float32 and rounded once, to what the reference of each format
gives: bfloat16 for fp8 (``weight_dequant`` of DeepSeek-V3, https://github.com/deepseek-ai/
DeepSeek-V3/blob/main/inference/kernel.py, whose caller stores bfloat16), the dtype of the scales
for int4 (``pack-quantized`` of https://github.com/vllm-project/compressed-tensors).

Shape legend: R rows that are wanted, C columns of the matrix, G and B blocks of rows and columns.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from slotmoe.model.encoding import Encoding

CODES = {"fp8": torch.float8_e4m3fn, "int4": torch.int32}
"""dtype of the codes' tensor."""
PER_CODE = {"fp8": 1, "int4": 8}
"""Weights in one element of it, along a row."""
SCALES = (torch.float32, torch.bfloat16, torch.float16)


def decoded_dtype(encoding: Encoding, scales: torch.dtype) -> torch.dtype:
    """What the weights are decoded to."""
    return torch.bfloat16 if encoding.method == "fp8" else scales


def decode(codes_RC: Tensor, scales_GB: Tensor, encoding: Encoding, start: int) -> Tensor:
    """Weights ``[R, C]`` of the rows from ``start`` on; ``scales_GB`` are those of their blocks."""
    values_RC = _VALUES[encoding.method](codes_RC)
    rows, columns = values_RC.shape
    if encoding.rows:
        block_R = torch.arange(start, start + rows) // encoding.rows
        scales_GB = scales_GB[block_R - start // encoding.rows]
    scales_RC = scales_GB.float().repeat_interleave(encoding.columns or columns, 1)[:, :columns]
    values_RC *= scales_RC
    return values_RC.to(decoded_dtype(encoding, scales_GB.dtype))


def _int4(codes_RC: Tensor) -> Tensor:
    """Eight weights an element, the first in its lowest bits, each 8 more than its value."""
    bytes_RC = codes_RC.view(torch.uint8)  # little-endian
    return torch.stack((bytes_RC & 15, bytes_RC >> 4), 2).flatten(1).float() - 8


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {"fp8": Tensor.float, "int4": _int4}

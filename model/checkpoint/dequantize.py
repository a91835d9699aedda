"""Quantized weights of checkpoints, decoded a few rows at a time.

Codes times scales are computed in float32 and rounded once, to what the reference of each format
gives: bfloat16 for fp8 (``weight_dequant`` of DeepSeek-V3, https://github.com/deepseek-ai/
DeepSeek-V3/blob/main/inference/kernel.py, whose caller stores bfloat16), the dtype of the scales
for int4 (``pack-quantized`` of https://github.com/vllm-project/compressed-tensors), the dtype that
the weight had for bitsandbytes (``dequantize_4bit``).

Shape legend: R rows that are wanted, C columns of the matrix, G and B blocks of rows and columns.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from slotmoe.jsonfile import check, number, one_of, parse_json
from slotmoe.model.checkpoint.encodings import Encoding

CODES = {
    "fp8": torch.float8_e4m3fn,
    "int4": torch.int32,
    **dict.fromkeys(("nf4", "fp4"), torch.uint8),
}
"""dtype of the codes' tensor."""
PER_CODE = {"fp8": 1, "int4": 8, "nf4": 2, "fp4": 2}
"""Weights in one element of it, along a row."""
SCALES = (torch.float32, torch.bfloat16, torch.float16)
NESTED, NESTED_BLOCK = torch.uint8, 256  # bitsandbytes' scales that are codes, with a scale each
_NESTED = {
    "nested_blocksize": one_of(NESTED_BLOCK),
    "nested_dtype": one_of("float32"),
    "nested_offset": number(-1e30, 1e30),
}
_DTYPES = {dtype: getattr(torch, dtype) for dtype in ("bfloat16", "float16", "float32")}
_INT4 = torch.arange(-8.0, 8.0)


@dataclass(frozen=True)
class Codes:
    """Weights of 4 bits as they are stored: ``levels[code] * scale``, levels float32 [16], codes
    uint8 [R, C], scales float32 [R, B], one for ``block`` columns."""

    levels: Tensor
    codes: Tensor
    scales: Tensor
    block: int

    def values(self) -> Tensor:
        """Float32 [R, C], not rounded to what the checkpoint's reference gives."""
        scales_RC = self.scales.repeat_interleave(self.block, 1)
        return self.levels[self.codes.int()] * scales_RC


def decoded_dtype(encoding: Encoding, scales: torch.dtype) -> torch.dtype:
    """What the weights are decoded to."""
    return scales if encoding.method == "int4" else _DTYPES[encoding.dtype]


def decode_fp8(codes_RC: Tensor, scales_GB: Tensor, encoding: Encoding, start: int) -> Tensor:
    """Weights ``[R, C]`` of the rows from ``start`` on; ``scales_GB`` are those of their blocks."""
    values_RC = codes_RC.float()
    rows, columns = values_RC.shape
    if encoding.rows:
        block_R = torch.arange(start, start + rows) // encoding.rows
        scales_GB = scales_GB[block_R - start // encoding.rows]
    scales_RC = scales_GB.float().repeat_interleave(encoding.columns or columns, 1)[:, :columns]
    values_RC *= scales_RC
    return values_RC.to(torch.bfloat16)


def int4_codes(words_RC: Tensor, scales_RB: Tensor, encoding: Encoding) -> Codes:
    """Eight weights an element, the first in its lowest bits, each 8 more than its value."""
    return Codes(_INT4, _pairs(words_RC, 0), scales_RB.float(), encoding.columns)


def bitsandbytes_codes(
    bytes_RC: Tensor, scales_RB: Tensor, encoding: Encoding, first: int, beside: dict[str, Tensor]
) -> Codes:
    """Two weights a byte, the first in its high bits.  ``scales`` are those from ``first`` on;
    ``beside`` has the other tensors of the weight.  Raises ``ValueError`` where these say what is
    not decoded here."""
    state = parse_json(beside["quant_state"].numpy().tobytes(), Path("quant_state"))
    check(state, {"blocksize": one_of(encoding.columns), "dtype": one_of(encoding.dtype)})
    if scales_RB.dtype == NESTED:
        check(state, _NESTED)
        block_RB = (first + torch.arange(scales_RB.numel())) // NESTED_BLOCK
        levels, absmax = beside["nested_quant_map"], beside["nested_absmax"]
        numbers = levels[scales_RB.flatten().int()] * absmax[block_RB]
        scales_RB = (numbers + state["nested_offset"]).view(scales_RB.shape)
    return Codes(beside["quant_map"], _pairs(bytes_RC, 4), scales_RB, encoding.columns)


def _pairs(codes: Tensor, first: int) -> Tensor:
    """Codes of 4 bits, uint8 [R, C]; the first of each byte's two stands above ``first`` bits."""
    bytes_ = codes.view(torch.uint8)
    return torch.stack((bytes_ >> first & 15, bytes_ >> 4 - first & 15), 2).flatten(1)

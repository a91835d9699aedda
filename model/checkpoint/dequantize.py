"""Quantized weights of checkpoints, decoded a few rows at a time.

Codes times scales are computed in float32 and rounded once, to what the reference of each format
gives: bfloat16 for fp8 (``weight_dequant`` of DeepSeek-V3, https://github.com/deepseek-ai/
DeepSeek-V3/blob/main/inference/kernel.py, whose caller stores bfloat16), the dtype of the scales
for int4 (``pack-quantized`` of https://github.com/vllm-project/compressed-tensors), the dtype that
the weight had for bitsandbytes (``dequantize_4bit``).  bfloat16 holds all that mxfp4 gives, which
is DeepSeek-V4's fp4: a byte's low half is the first of its two e2m1 codes (``Fp8Dequantize`` of
transformers 5.24, integrations/finegrained_fp8.py, and ``cast_e2m1fn_to_e4m3fn`` of
https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash/blob/main/inference/convert.py, whose table
lacks the sign of -0).

Shape legend: R rows that are wanted, C columns of the matrix, G and B blocks of rows and columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta, Struct
from torch import Tensor

from slotmoe.errors import CheckpointError
from slotmoe.jsonfile import parse_json
from slotmoe.model.checkpoint.encodings import Encoding
from slotmoe.model.checkpoint.shards import Read, TensorInfo

SCALES = (torch.float8_e8m0fnu, torch.float32, torch.bfloat16, torch.float16)  # mxfp4: the first
NESTED, NESTED_BLOCK = torch.uint8, 256  # bitsandbytes' scales that are codes, with a scale each
_INT4 = torch.arange(-8.0, 8.0)
# In ascending order; and which of them each e2m1 code is, whose bit 3 is the sign.
_MXFP4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, -0.0, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
_OF_E2M1 = torch.tensor([*range(8, 16), *range(7, -1, -1)], dtype=torch.uint8)


class _State(Struct):
    """What bitsandbytes notes of a weight."""

    blocksize: int
    dtype: str


class _NestedState(_State):
    nested_blocksize: Literal[256]  # NESTED_BLOCK
    nested_dtype: Literal["float32"]
    nested_offset: Annotated[float, Meta(ge=-1e30, le=1e30)]


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
        return self.levels[self.codes.int()] * self.scales.repeat_interleave(self.block, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedTensor(TensorInfo):
    """A matrix, or several, as ``codes`` and ``scales``.  ``beside`` are the other tensors of a
    weight of bitsandbytes', by name."""

    encoding: Encoding
    codes: TensorInfo
    scales: TensorInfo
    beside: Mapping[str, TensorInfo]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.scales, *self.beside.values())

    def rows(self, read: Read, start: int, stop: int) -> Tensor:
        if self.encoding.name != "fp8":
            return self.four_bits(read, start, stop).values().to(self.dtype)
        start, count, height = self.first + start, stop - start, self.codes.shape[-2]
        block = self.encoding.rows or height
        matrix, row = divmod(start, height)
        first = matrix * -(-height // block)  # of the matrix's rows of scales
        scales_GB = read(self.scales, first + row // block, first - (-(row + count) // block))
        self._check_finite(scales_GB.float())
        codes_RC = read(self.codes, start, start + count).float()
        scales_RB = scales_GB[torch.arange(row, row + count) // block - row // block].float()
        width = self.shape[-1]
        codes_RC *= scales_RB.repeat_interleave(self.encoding.columns or width, 1)[:, :width]
        return codes_RC.to(self.dtype)

    def four_bits(self, read: Read, start: int, stop: int) -> Codes:
        """Rows of a weight that is stored in 4 bits, as they are.  Raises like ``rows``."""
        start, stop = self.first + start, self.first + stop
        scales_RB, codes = read(self.scales, start, stop), read(self.codes, start, stop)
        levels, above = _INT4, 0  # eight weights an element, each 8 more than its value
        if self.encoding.flat:
            beside = {part: read(info, 0, info.shape[0]) for part, info in self.beside.items()}
            scales_RB = self._numbers(scales_RB, start * scales_RB.shape[1], beside)
            levels, above = beside["quant_map"], 4
        scales_RB, bytes_ = scales_RB.float(), codes.view(torch.uint8)
        self._check_finite(scales_RB)
        # The first of a byte's two codes stands above so many bits.
        codes_RC = torch.stack((bytes_ >> above & 15, bytes_ >> 4 - above & 15), 2).flatten(1)
        if self.encoding.name == "mxfp4":
            levels, codes_RC = _MXFP4, _OF_E2M1[codes_RC.int()]
        return Codes(levels, codes_RC, scales_RB, self.encoding.columns)

    def _numbers(self, scales_RB: Tensor, first: int, beside: Mapping[str, Tensor]) -> Tensor:
        """The scales of bitsandbytes from number ``first`` on, of which those that are codes have
        scales too.  Raises ``CheckpointError`` where its notes say what is not decoded here."""
        try:
            of = _NestedState if scales_RB.dtype == NESTED else _State
            state = parse_json(beside["quant_state"].numpy().tobytes(), Path("quant_state"), of)
            expected = {"blocksize": self.encoding.columns, "dtype": self.encoding.dtype}
            for key, wanted in expected.items():
                if (found := getattr(state, key)) != wanted:
                    raise ValueError(f"{key} is {found!r:.40}, expected {wanted}")
        except ValueError as problem:
            path = self.beside["quant_state"].path
            raise CheckpointError(f"{path}: {self.name}: {problem}") from None
        if not isinstance(state, _NestedState):
            return scales_RB
        block_RB = (first + torch.arange(scales_RB.numel())) // NESTED_BLOCK
        levels, absmax = beside["nested_quant_map"], beside["nested_absmax"]
        numbers = levels[scales_RB.flatten().int()] * absmax[block_RB]
        return (numbers + state.nested_offset).view(scales_RB.shape)

    def _check_finite(self, scales: Tensor) -> None:
        if not torch.isfinite(scales).all():
            problem = f"the scales of {self.name} are NaN or infinite; the file is damaged"
            raise CheckpointError(f"{self.scales.path}: {problem}")

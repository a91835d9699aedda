"""Where a checkpoint has each weight: in a tensor of its own or among a layer's fused experts, as
numbers or encoded.  The names of its tensors decide.  Encoded weights are decoded a few rows at a
time.

Codes times scales are computed in float32 and rounded once, to what the reference of each format
gives: bfloat16 for fp8 (``weight_dequant`` of DeepSeek-V3, https://github.com/deepseek-ai/
DeepSeek-V3/blob/main/inference/kernel.py, whose caller stores bfloat16), the dtype of the scales
for int4 (``pack-quantized`` of https://github.com/vllm-project/compressed-tensors), the dtype that
the weight had for bitsandbytes (``dequantize_4bit``).  bfloat16 holds all that mxfp4 gives, which
is DeepSeek-V4's fp4: a byte's low half is the first of its two e2m1 codes (``Fp8Dequantize`` of
transformers 5.24, integrations/finegrained_fp8.py, and ``cast_e2m1fn_to_e4m3fn`` of
https://huggingface.co/deepseek-ai/DeepSeek-V4-Flash/blob/main/inference/convert.py, whose table
lacks the sign of -0), and gpt-oss' (``convert_moe_packed_tensors``, integrations/mxfp4.py).

Shape legend: R rows that are wanted, C columns of the matrix, G and B blocks of rows and columns.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import torch
from msgspec import Meta, Struct
from torch import Tensor

from slotmoe.errors import CheckpointError
from slotmoe.jsonfile import parse_json
from slotmoe.model.checkpoint.encodings import METHODS, Encoding
from slotmoe.model.checkpoint.shards import DTYPES, Read, TensorInfo
from slotmoe.model.config import Config
from slotmoe.model.names import FUSED, layer_tensor, role_of, split_expert, stored_as, stored_rows

SCALES = (torch.float8_e8m0fnu, torch.float32, torch.bfloat16, torch.float16)  # mxfp4: the first
NESTED, NESTED_BLOCK = torch.uint8, 256  # bitsandbytes' scales that are codes, with a scale each
_INT4 = torch.arange(-8.0, 8.0)
# In ascending order; and which of them each e2m1 code is, whose bit 3 is the sign.
MXFP4 = torch.tensor([-6, -4, -3, -2, -1.5, -1, -0.5, -0.0, 0, 0.5, 1, 1.5, 2, 3, 4, 6])
OF_E2M1 = torch.tensor([*range(8, 16), *range(7, -1, -1)], dtype=torch.uint8)
Shape = tuple[int, ...]
Rows = Callable[[int, int], Tensor]
Make = Callable[[Rows, int, int], Tensor]
Source = tuple[str, Shape, Make | None]
"""Name and shape of what is stored, and what makes rows of a weight of its rows."""
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int64, torch.int32)
_MAX_STATE_BYTES = 4096  # bitsandbytes writes 200


class _Notes(Struct):
    """What bitsandbytes notes of a weight."""

    blocksize: int
    dtype: str


class _NestedNotes(_Notes):
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
    weight of bitsandbytes', by name.  In 4 bits its rows may be each ``step``-th of these."""

    encoding: Encoding
    codes: TensorInfo
    scales: TensorInfo
    beside: Mapping[str, TensorInfo]
    step: int = 1

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
        start, stop = self.first + self.step * start, self.first + self.step * (stop - 1) + 1
        stored = read(self.scales, start, stop), read(self.codes, start, stop)
        scales_RB, codes = (part[:: self.step] for part in stored)
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
            levels, codes_RC = MXFP4, OF_E2M1[codes_RC.int()]
        return Codes(levels, codes_RC, scales_RB, self.encoding.columns)

    def _numbers(self, scales_RB: Tensor, first: int, beside: Mapping[str, Tensor]) -> Tensor:
        """The scales of bitsandbytes from number ``first`` on, of which those that are codes have
        scales too.  Raises ``CheckpointError`` where its notes say what is not decoded here."""
        try:
            of = _NestedNotes if scales_RB.dtype == NESTED else _Notes
            state = parse_json(beside["quant_state"].numpy().tobytes(), Path("quant_state"), of)
            expected = {"blocksize": self.encoding.columns, "dtype": self.encoding.dtype}
            for key, wanted in expected.items():
                if (found := getattr(state, key)) != wanted:
                    raise ValueError(f"{key} is {found!r:.40}, expected {wanted}")
        except ValueError as problem:
            path = self.beside["quant_state"].path
            raise CheckpointError(f"{path}: {self.name}: {problem}") from None
        if not isinstance(state, _NestedNotes):
            return scales_RB
        block_RB = (first + torch.arange(scales_RB.numel())) // NESTED_BLOCK
        levels, absmax = beside["nested_quant_map"], beside["nested_absmax"]
        numbers = levels[scales_RB.flatten().int()] * absmax[block_RB]
        return (numbers + state.nested_offset).view(scales_RB.shape)

    def _check_finite(self, scales: Tensor) -> None:
        if not torch.isfinite(scales).all():
            problem = f"the scales of {self.name} are NaN or infinite; the file is damaged"
            raise CheckpointError(f"{self.scales.path}: {problem}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Made(TensorInfo):
    """What ``make(rows, start, stop)`` makes of rows of ``stored``, which ``rows(start, stop)``
    gives, in this dtype."""

    stored: TensorInfo
    make: Make

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return (self.stored, *self.stored.parts)

    def rows(self, read: Read, start: int, stop: int) -> torch.Tensor:
        return self.make(partial(self.stored.rows, read), start, stop).to(self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Joined(TensorInfo):
    """The rows of tensors that are alike, one behind the other."""

    stored: tuple[TensorInfo, ...]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        return tuple(part for info in self.stored for part in (info, *info.parts))

    def rows(self, read: Read, start: int, stop: int) -> torch.Tensor:
        count, pieces = self.stored[0].shape[0], list[Tensor]()
        for first, info in zip(range(0, self.shape[0], count), self.stored, strict=True):
            begin, end = max(start - first, 0), min(stop - first, count)
            if begin < end:
                pieces.append(info.rows(read, begin, end))
        return torch.cat(pieces)


def picked(rows: Rows, start: int, stop: int, order: list[int]) -> Tensor:
    """Rows ``start`` to ``stop`` of those that ``order`` names."""
    wanted = order[start:stop]
    first, last = min(wanted), max(wanted)
    return rows(first, last + 1)[[row - first for row in wanted]]


def _transposed(rows: Rows, start: int, stop: int, count: int) -> Tensor:
    """Taps of a convolution, of which ``count`` channels have each a row."""
    return rows(0, count).t()[start:stop].contiguous()


def _ids(rows: Rows, start: int, stop: int, experts: int, name: str) -> Tensor:
    """Expert ids, each less than ``experts``.  Refuses others by the tensor's ``name``."""
    ids_RN = rows(start, stop)
    if ids_RN.numel() and not 0 <= int(ids_RN.min()) <= int(ids_RN.max()) < experts:
        problem = f"names an expert outside 0 to {experts - 1}; the file is damaged"
        raise CheckpointError(f"{name} {problem}")
    return ids_RN


def _column(
    rows: Rows, start: int, stop: int, expert: int, first: int, step: int, shape: Shape
) -> Tensor:
    """What an ``expert`` has of [E, N] or, turned, of [E, K, N] fused rows: of the last dimension
    each ``step``-th value from ``first`` on, for a weight of this ``shape``."""
    count, stop = math.prod(shape[1:]), first + step * (stop - 1) + 1
    whole_KN = rows(expert * count, (expert + 1) * count)
    rows_RK = whole_KN[:, first + step * start : stop : step].t()
    return rows_RK.reshape(-1, *shape[1:]).contiguous()


def _one_more(rows: Rows, start: int, stop: int) -> Tensor:
    """A norm, float32, that is stored as what it is more than 1."""
    return rows(start, stop).float() + 1


def source_of(name: str, shape: Shape, config: Config) -> Source:
    """Of the weight ``name``, as its publishers store it."""
    if (joined := stored_rows(name, config)) is not None:
        stored, count, ranges = joined
        return stored, (count, *shape[1:]), partial(picked, order=[*chain(*ranges)])
    if name.endswith("linear_attn.conv1d.weight"):
        return name, (shape[1], 1, shape[0]), partial(_transposed, count=shape[1])
    is_less = config.family.norms_less_one and role_of(name) == "norm"
    return name, shape, _one_more if is_less else None


@dataclass
class Places:
    """Finds weights among the tensors of the checkpoint at ``where``, ``stored`` by the network's
    names; ``used`` are those that the weights found are in.  ``source`` is what asks for them,
    ``spelled`` gives the name that the files have for one, ``label`` stands before it, and
    ``source_of`` says what it is made of."""

    where: Path
    stored: Mapping[str, TensorInfo]
    config: Config
    source: str = "config.json"
    spelled: Callable[[str], str] = str
    label: str = ""
    source_of: Callable[[str, Shape, Config], Source] = source_of
    used: set[TensorInfo] = field(default_factory=set)

    def find(self, name: str, shape: Shape) -> TensorInfo:
        """The weight ``name``.  Raises ``CheckpointError`` unless it is there with this shape."""
        stored, whole, make = self.source_of(name, shape, self.config)
        info = self._find(stored, whole)
        if make is None:
            return info
        dtype = torch.float32 if make is _one_more else info.dtype
        return Made(name, info.path, dtype, shape, info.offset, stored=info, make=make)

    def _find(self, name: str, shape: Shape) -> TensorInfo:
        """A weight as it is stored."""
        if several := stored_as(name, self.config):
            count = shape[0] // len(several), *shape[1:]
            infos = tuple(self._find(part, count) for part in several)
            one = infos[0]
            return Joined(name, one.path, one.dtype, shape, one.offset, stored=infos)
        tensor, whole, first, encoding = name, shape, 0, self.config.encoding
        expert = split_expert(name)
        if expert is not None and self.config.family.interleaved:
            return self._interleaved(name, shape, *expert)
        if encoding is not None and expert is not None:
            encoding = encoding.of_experts or encoding
        if expert is not None and name not in self.stored:
            layer, number, projection = expert
            single = f"mlp.experts.{projection}", 0, 1
            for fused, part, parts in (FUSED.get(projection, single), single):
                if layer_tensor(layer, fused) in self.stored:
                    tensor = layer_tensor(layer, fused)
                    first = (number * parts + part) * shape[0]
                    whole = (self.config.n_routed_experts, parts * shape[0], *shape[1:])
        is_fused = tensor != name
        if encoding is not None and len(shape) == 2 and not (is_fused and encoding.flat):
            codes, scales = tensor + encoding.method.codes, tensor + encoding.method.scales
            of_v4 = tensor.removesuffix("weight") + "scale"  # as DeepSeek-V4's own files have it
            if (scales := of_v4 if of_v4 in self.stored else scales) in self.stored:
                encoded = self._encoded(codes, scales, whole, encoding)
                return replace(encoded, name=name, shape=shape, first=first)
        if role_of(name) == "table":
            info = self._tensor(name, shape, _IDS)
            make = partial(_ids, experts=self.config.n_routed_experts, name=f"{info.path}: {name}")
            place = name, info.path, torch.int32, shape, info.offset
            return Made(*place, stored=info, make=make)
        info = self._tensor(tensor, whole, _PLAIN)
        return replace(info, name=name, shape=shape, first=first)

    def _interleaved(
        self, name: str, shape: Shape, layer: int, expert: int, part: str
    ) -> TensorInfo:
        """A weight or bias among a layer's fused experts where rows of gate and up take turns, and
        a matrix that is not encoded stands turned (gpt-oss)."""
        projection, dot, _ = part.partition(".")
        fused, first, step = FUSED[projection]
        tensor, encoding = layer_tensor(layer, fused), self.config.encoding
        whole = self.config.n_routed_experts, step * shape[0], *shape[1:]
        if dot:
            info, dtype = self._tensor(tensor + "_bias", whole, _PLAIN), torch.float32
        elif encoding is not None and tensor + encoding.method.scales in self.stored:
            names = tensor + encoding.method.codes, tensor + encoding.method.scales
            encoded = self._encoded(*names, whole, encoding)
            first += expert * whole[1]
            return replace(encoded, name=name, shape=shape, first=first, step=step)
        else:
            info = self._tensor(tensor, (whole[0], *whole[:0:-1]), _PLAIN)
            dtype = info.dtype
        make = partial(_column, expert=expert, first=first, step=step, shape=shape)
        return Made(name, info.path, dtype, shape, info.offset, stored=info, make=make)

    def _encoded(self, codes: str, scales: str, shape: Shape, encoding: Encoding) -> EncodedTensor:
        """Matrices of ``shape``.  Raises ``CheckpointError``."""
        info, per_code = self.stored[scales], encoding.method.weights
        self.used.add(info)
        if encoding.blocks and info.dtype == torch.uint8:
            info = replace(info, dtype=SCALES[0])
        where, count = f"{info.path}: {scales}", math.prod(info.shape)
        if encoding.flat:
            encoding = replace(encoding, columns=math.prod(shape) // max(1, count))
            if encoding.columns == 0 or shape[-1] % encoding.columns:
                problem = f"has {count} scales for {list(shape)} weights"
                raise CheckpointError(f"{where} {problem}, expected whole blocks in a row")
        rows, columns = encoding.rows or shape[-2], encoding.columns or shape[-1]
        grid = (*shape[:-2], -(-shape[-2] // rows), -(-shape[-1] // columns))
        if (zero_point := codes.removesuffix("_packed") + "_zero_point") in self.stored:
            problem = f"{zero_point} is there too, expected codes that are symmetric around 0"
            raise CheckpointError(f"{where}: {problem}; give the original checkpoint")
        if shape[-1] % per_code:
            problem = f"is of rows with {shape[-1]} weights, expected a multiple of {per_code}"
            raise CheckpointError(f"{where} {problem}")
        if (encoding.rows == 0 or encoding.flat) and count == math.prod(grid):
            info = replace(info, shape=grid)  # of a whole matrix: written with any dimensions
        if info.shape != grid:
            expected = f"{list(grid)}, one for {rows} x {columns} of {list(shape)} weights"
            raise CheckpointError(f"{where} has shape {list(info.shape)}, expected {expected}")
        beside = self._beside(codes, info, encoding) if encoding.flat else {}
        nested, is_mxfp4 = "nested_absmax" in beside, encoding.name == "mxfp4"
        _check_dtype(info, (NESTED,) if nested else SCALES[:1] if is_mxfp4 else SCALES)
        packed = (*shape[:-1], shape[-1] // per_code)
        written = (math.prod(packed), 1) if encoding.flat else packed
        if encoding.blocks:
            written = (*grid, encoding.columns // per_code)
        found = self._tensor(codes, written, (DTYPES[encoding.method.dtype],))
        dtype = info.dtype if encoding.name == "int4" else getattr(torch, encoding.dtype)
        found = replace(found, shape=packed)
        place = codes, found.path, dtype, shape, found.offset
        return EncodedTensor(*place, encoding=encoding, codes=found, scales=info, beside=beside)

    def _beside(self, name: str, scales: TensorInfo, encoding: Encoding) -> dict[str, TensorInfo]:
        """The tensors that bitsandbytes writes beside a weight's codes and their ``scales``."""
        state = f"{name}.quant_state.bitsandbytes__{encoding.name}"
        size = min(self.stored[state].nbytes, _MAX_STATE_BYTES) if state in self.stored else 0
        beside = {"quant_state": self._tensor(state, (size,), (torch.uint8,))}
        shapes = {"quant_map": 16}
        if scales.dtype == NESTED:
            count = -(-math.prod(scales.shape) // NESTED_BLOCK)
            shapes |= {"nested_absmax": count, "nested_quant_map": 256}
        for part, count in shapes.items():
            beside[part] = self._tensor(f"{name}.{part}", (count,), (torch.float32,))
        return beside

    def _tensor(self, name: str, shape: Shape, dtypes: tuple[torch.dtype, ...]) -> TensorInfo:
        if name not in self.stored:
            problem = f"tensor {self.spelled(name)} is missing; {self.source} asks for it"
            raise CheckpointError(f"{self.where}: {problem}")
        info = self.stored[name]
        self.used.add(info)
        sizes, wanted = ([size for size in of if size != 1] for of in (info.shape, shape))
        if sizes == wanted:  # Ernie's bias, GGUF's gate, a delta rule's A_log
            info = replace(info, shape=shape)
        if info.shape != shape:
            shapes = f"{list(info.shape)}, {self.source} asks for {list(shape)}"
            raise CheckpointError(f"{info.path}: {self.label}{info.name} has shape {shapes}")
        _check_dtype(info, dtypes)
        return info


def _check_dtype(info: TensorInfo, dtypes: tuple[torch.dtype, ...]) -> None:
    if info.dtype not in dtypes:
        expected = " or ".join(_SPELLED[dtype] for dtype in dtypes)
        problem = f"has dtype {_SPELLED[info.dtype]}, expected {expected}"
        if _SPELLED[info.dtype] in {method.dtype for method in METHODS.values()}:
            problem += " where quantization_config and the names of tensors tell of no scales"
        raise CheckpointError(f"{info.path}: {info.name} {problem}")

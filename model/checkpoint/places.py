"""Where a checkpoint has each weight: in a tensor of its own or among a layer's fused experts, as
numbers or encoded.  The names of its tensors decide."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slotmoe.errors import CheckpointError
from slotmoe.model.checkpoint.dequantize import (
    CODES,
    NESTED,
    NESTED_BLOCK,
    PER_CODE,
    SCALES,
    decoded_dtype,
)
from slotmoe.model.checkpoint.encodings import Encoding
from slotmoe.model.checkpoint.shards import DTYPES, TensorInfo
from slotmoe.model.names import ENCODED, FUSED, QUANT_STATE, ZERO_POINT, fused_experts, split_expert

_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_MAX_STATE_BYTES = 4096  # bitsandbytes writes 200


@dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix whose rows are those of ``codes`` from ``first`` on; ``scales`` belong to all rows
    of ``codes``.  ``beside`` are the other tensors of a weight of bitsandbytes', by name."""

    encoding: Encoding
    codes: TensorInfo
    scales: TensorInfo
    first: int
    beside: Mapping[str, TensorInfo]


class Weights:
    """The tensors that a folder's files hold, ``stored``, and the weights found in them: ``infos``
    says where the data of each begins and its dtype when read, ``encoded`` how it is decoded if it
    is.  ``used`` are the tensors that they are in, ``apart`` those with scales that are in another
    file than their codes."""

    def __init__(
        self,
        folder: Path,
        stored: Mapping[str, TensorInfo],
        encoding: Encoding | None,
        experts: int,
    ):
        self.stored = stored
        self.infos: dict[str, TensorInfo] = {}
        self.encoded: dict[str, Encoded] = {}
        self.used: dict[str, TensorInfo] = {}
        self.apart: set[TensorInfo] = set()
        self._folder, self._encoding, self._experts = folder, encoding, experts

    def find(self, name: str, shape: tuple[int, ...]) -> None:
        """Find the weight ``name``.  Raises ``CheckpointError`` unless it is there with this
        ``shape``."""
        tensor, whole, first, index = name, shape, 0, None
        if (expert := split_expert(name)) is not None and name not in self.stored:
            layer, number, projection = expert
            fused, part, parts = FUSED[projection]
            if (fused := fused_experts(layer, fused)) in self.stored:
                tensor, index, first = fused, number, part * shape[0]
                whole = (self._experts, parts * shape[0], shape[1])
        encoding, encoded = self._encoding, None
        if encoding is not None and len(shape) == 2:
            of_codes, of_scales = ENCODED[encoding.method]
            separate = index is None or not encoding.flat  # such matrices are not fused
            if separate and tensor + of_scales in self.stored:
                encoded = self._encoded(tensor + of_codes, tensor + of_scales, whole, encoding)
        if encoded is None:
            info = self._tensor(tensor, whole, _PLAIN)
            info = info if index is None else _matrix(info, index)
            offset = info.offset + first * info.row_bytes
            self.infos[name] = replace(info, shape=shape, offset=offset)
            return
        if index is not None:
            codes, scales = (_matrix(info, index) for info in (encoded.codes, encoded.scales))
            encoded = replace(encoded, codes=codes, scales=scales, first=first)
        self.encoded[name] = encoded
        dtype = decoded_dtype(encoded.encoding, encoded.scales.dtype)
        self.infos[name] = replace(encoded.codes, shape=shape, dtype=dtype)

    def _encoded(
        self, codes: str, scales: str, shape: tuple[int, ...], encoding: Encoding
    ) -> Encoded:
        """Matrices of ``shape``.  Raises ``CheckpointError``."""
        info, per_code = self.stored[scales], PER_CODE[encoding.method]
        where, count = f"{self._folder / info.file}: {scales}", math.prod(info.shape)
        if encoding.flat:
            encoding = replace(encoding, columns=math.prod(shape) // max(1, count))
            if encoding.columns == 0 or shape[-1] % encoding.columns:
                problem = f"has {count} scales for {list(shape)} weights"
                raise CheckpointError(f"{where} {problem}, expected whole blocks in a row")
        grid = (*shape[:-2], *encoding.grid(shape[-2:]))
        if (zero_point := codes.removesuffix("_packed") + ZERO_POINT) in self.stored:
            problem = f"{zero_point} is there too, expected codes that are symmetric around 0"
            raise CheckpointError(f"{where}: {problem}; give the original checkpoint")
        if shape[-1] % per_code:
            problem = f"is of rows with {shape[-1]} weights, expected a multiple of {per_code}"
            raise CheckpointError(f"{where} {problem}")
        if (encoding.rows == 0 or encoding.flat) and count == math.prod(grid):
            info = replace(info, shape=grid)  # of a whole matrix: written with any dimensions
        if info.shape != grid:
            block = f"{encoding.rows or shape[-2]} x {encoding.columns or shape[-1]}"
            expected = f"{list(grid)}, one for {block} of {list(shape)} weights"
            raise CheckpointError(f"{where} has shape {list(info.shape)}, expected {expected}")
        beside = self._beside(codes, info, encoding) if encoding.flat else {}
        self._check_dtype(scales, info, (NESTED,) if "nested_absmax" in beside else SCALES)
        self.used[scales] = self.stored[scales]
        stored_shape = (*shape[:-1], shape[-1] // per_code)
        written = (math.prod(stored_shape), 1) if encoding.flat else stored_shape
        found = self._tensor(codes, written, (CODES[encoding.method],))
        for tensor in (self.stored[scales], *beside.values()):
            if tensor.file != found.file:
                self.apart.add(tensor)
        return Encoded(encoding, replace(found, shape=stored_shape), info, 0, beside)

    def _beside(self, name: str, scales: TensorInfo, encoding: Encoding) -> dict[str, TensorInfo]:
        """The tensors that bitsandbytes writes beside a weight's codes and their ``scales``."""
        state = name + QUANT_STATE + encoding.method
        size = min(self.stored[state].nbytes, _MAX_STATE_BYTES) if state in self.stored else 0
        beside = {"quant_state": self._tensor(state, (size,), (torch.uint8,))}
        shapes = {"quant_map": 16}
        if scales.dtype == NESTED:
            count = -(-math.prod(scales.shape) // NESTED_BLOCK)
            shapes |= {"nested_absmax": count, "nested_quant_map": 256}
        for part, count in shapes.items():
            beside[part] = self._tensor(f"{name}.{part}", (count,), (torch.float32,))
        return beside

    def _tensor(
        self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]
    ) -> TensorInfo:
        if name not in self.stored:
            problem = f"tensor {name} is missing; config.json asks for it"
            raise CheckpointError(f"{self._folder}: {problem}")
        self.used[name] = info = self.stored[name]
        if info.shape != shape:
            shapes = f"{list(info.shape)}, config.json asks for {list(shape)}"
            raise CheckpointError(f"{self._folder / info.file}: {name} has shape {shapes}")
        self._check_dtype(name, info, dtypes)
        return info

    def _check_dtype(self, name: str, info: TensorInfo, dtypes: tuple[torch.dtype, ...]) -> None:
        if info.dtype not in dtypes:
            expected = " or ".join(_SPELLED[dtype] for dtype in dtypes)
            problem = f"has dtype {_SPELLED[info.dtype]}, expected {expected}"
            if info.dtype in CODES.values():
                problem += " where quantization_config and the names of tensors tell of no scales"
            raise CheckpointError(f"{self._folder / info.file}: {name} {problem}")


def _matrix(info: TensorInfo, index: int) -> TensorInfo:
    """The matrix ``index`` of several."""
    offset = info.offset + index * info.row_bytes
    return replace(info, shape=info.shape[1:], offset=offset)

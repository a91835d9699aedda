"""Where a checkpoint has each weight: in a tensor of its own or among a layer's fused experts, as
numbers or encoded.  The names of its tensors decide."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slotmoe.errors import CheckpointError
from slotmoe.model.decoding import CODES, PER_CODE, SCALES, decoded_dtype
from slotmoe.model.encoding import Encoding
from slotmoe.model.names import ENCODED, FUSED, ZERO_POINT, fused_experts, split_expert
from slotmoe.model.shards import DTYPES, TensorInfo

_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class Encoded:
    """A matrix whose rows are those of ``codes`` from ``first`` on; ``scales`` belong to all rows
    of ``codes``."""

    encoding: Encoding
    codes: TensorInfo
    scales: TensorInfo
    first: int


class Weights:
    """The tensors that a folder's files hold, ``stored``, and the weights found in them: ``infos``
    says where the data of each begins and its dtype when read, ``encoded`` how it is decoded if it
    is.  ``used`` are the tensors that they are in, ``apart`` the scales that are in another file
    than their codes."""

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
            if tensor + of_scales in self.stored:
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
        grid = (*shape[:-2], *encoding.grid(shape[-2:]))
        where = f"{self._folder / info.file}: {scales}"
        if (zero_point := scales.replace("_scale", ZERO_POINT)) in self.stored:
            problem = f"{zero_point} is there too, expected codes that are symmetric around 0"
            raise CheckpointError(f"{where}: {problem}; give the original checkpoint")
        if shape[-1] % per_code:
            problem = f"is of rows with {shape[-1]} weights, expected a multiple of {per_code}"
            raise CheckpointError(f"{where} {problem}")
        if encoding.rows == 0 and math.prod(info.shape) == math.prod(grid):
            info = replace(info, shape=grid)  # of a whole matrix: written with any dimensions
        if info.shape != grid:
            block = f"{encoding.rows or shape[-2]} x {encoding.columns or shape[-1]}"
            expected = f"{list(grid)}, one for {block} of {list(shape)} weights"
            raise CheckpointError(f"{where} has shape {list(info.shape)}, expected {expected}")
        self._check_dtype(scales, info, SCALES)
        self.used[scales] = self.stored[scales]
        stored_shape = (*shape[:-1], shape[-1] // per_code)
        found = self._tensor(codes, stored_shape, (CODES[encoding.method],))
        if info.file != found.file:
            self.apart.add(self.stored[scales])
        return Encoded(encoding, found, info, 0)

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

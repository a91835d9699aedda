"""Where a checkpoint has each weight: in a tensor of its own or among a layer's fused experts, as
numbers or encoded.  The names of its tensors decide."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from slotmoe.errors import CheckpointError
from slotmoe.model.checkpoint.dequantize import NESTED, NESTED_BLOCK, SCALES, EncodedTensor
from slotmoe.model.checkpoint.encodings import METHODS, Encoding
from slotmoe.model.checkpoint.shards import DTYPES, Read, TensorInfo
from slotmoe.model.config import Config
from slotmoe.model.names import FUSED, layer_tensor, role_of, split_expert

Shape = tuple[int, ...]
_SPELLED = {dtype: name for name, dtype in DTYPES.items()}
_PLAIN = (torch.bfloat16, torch.float16, torch.float32)
_IDS = (torch.int64, torch.int32)
_MAX_STATE_BYTES = 4096  # bitsandbytes writes 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Table(TensorInfo):
    """Expert ids, int32, of ``stored``, each less than ``experts``."""

    stored: TensorInfo
    experts: int

    def rows(self, read: Read, start: int, stop: int) -> torch.Tensor:
        """See ``TensorInfo``.  Refuses ids of no expert, naming the tensor."""
        ids = self.stored.rows(read, start, stop)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.experts:
            problem = f"names an expert outside 0 to {self.experts - 1}"
            raise CheckpointError(f"{self.path}: {self.name} {problem}; the file is damaged")
        return ids.int()


@dataclass
class Places:
    """Finds weights among the tensors of the checkpoint at ``where``, ``stored`` by the network's
    names; ``used`` are those that the weights found are in.  ``source`` is what asks for them,
    ``spelled`` gives the name that the files have for one, and ``label`` stands before it."""

    where: Path
    stored: Mapping[str, TensorInfo]
    config: Config
    source: str = "config.json"
    spelled: Callable[[str], str] = str
    label: str = ""
    used: set[TensorInfo] = field(default_factory=set)

    def find(self, name: str, shape: Shape) -> TensorInfo:
        """The weight ``name``.  Raises ``CheckpointError`` unless it is there with this shape."""
        tensor, whole, first, encoding = name, shape, 0, self.config.encoding
        expert = split_expert(name)
        if encoding is not None and expert is not None:
            encoding = encoding.of_experts or encoding
        if expert is not None and name not in self.stored:
            layer, number, projection = expert
            for fused, part, parts in (FUSED[projection], (f"mlp.experts.{projection}", 0, 1)):
                if layer_tensor(layer, fused) in self.stored:
                    tensor = layer_tensor(layer, fused)
                    first = (number * parts + part) * shape[0]
                    whole = (self.config.n_routed_experts, parts * shape[0], shape[1])
        is_fused = tensor != name
        if encoding is not None and len(shape) == 2 and not (is_fused and encoding.flat):
            codes, scales = tensor + encoding.method.codes, tensor + encoding.method.scales
            of_v4 = tensor.removesuffix("weight") + "scale"  # as DeepSeek-V4's own files have it
            if (scales := of_v4 if of_v4 in self.stored else scales) in self.stored:
                encoded = self._encoded(codes, scales, whole, encoding)
                return replace(encoded, name=name, shape=shape, first=first)
        if role_of(name) == "table":
            info = self._tensor(name, shape, _IDS)
            place = name, info.path, torch.int32, shape, info.offset
            return Table(*place, stored=info, experts=self.config.n_routed_experts)
        info = self._tensor(tensor, whole, _PLAIN)
        return replace(info, name=name, shape=shape, first=first)

    def _encoded(self, codes: str, scales: str, shape: Shape, encoding: Encoding) -> EncodedTensor:
        """Matrices of ``shape``.  Raises ``CheckpointError``."""
        info, per_code = self.stored[scales], encoding.method.weights
        self.used.add(info)
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

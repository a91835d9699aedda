"""The safetensors files of a checkpoint: which tensor lies where, checked before any is read.

Files come from strangers: names stay inside the folder, headers are validated by the safetensors
library before anything is allocated, and pickles are refused.
"""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from safetensors import SafetensorError, safe_open

from slotmoe.errors import CheckpointError, reading
from slotmoe.jsonfile import inside, read_json
from slotmoe.model.names import text_name

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 32 << 20  # Kimi K2's, with scales, has 22 MB
MAX_HEADER_BYTES = 48 << 20  # of all shards together; Kimi K2's are about 32 MB
MAX_TENSORS = 250_000  # Kimi K2 has 210,000 with scales and shapes
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
DTYPES |= {"F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8, "BOOL": torch.bool}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}

Read = Callable[["TensorInfo", int, int], torch.Tensor]
"""``read(info, start, stop)``: rows of a tensor as they are in its file, over all its matrices."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor ``offset`` bytes from the start of the file ``path``, or a weight whose rows are
    those of such a tensor from ``first`` on, and its ``dtype`` when it is read.  ``parts`` are
    other tensors that reading it needs."""

    name: str
    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    first: int = 0

    @property
    def file(self) -> str:
        return self.path.name

    @property
    def parts(self) -> tuple["TensorInfo", ...]:
        return ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one row, which for a vector is one value."""
        return self.dtype.itemsize * math.prod(self.shape[1:][-1:])

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def rows(self, read: Read, start: int, stop: int) -> torch.Tensor:
        """Values of rows ``start`` to ``stop``.  Raises ``CheckpointError``, naming the file."""
        return read(self, self.first + start, self.first + stop)


def read_header(path: Path, limit: int = MAX_HEADER_BYTES) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of one safetensors file by the name that the text part of a model has for them, and
    its header's length, at most ``limit`` bytes.

    Raises ``CheckpointError`` if the file is not a whole one.
    """
    infos: dict[str, TensorInfo] = {}
    with reading(path, CheckpointError):
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > limit:
                sizes = f"header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
                raise CheckpointError(f"{path}: {sizes} in the checkpoint; not a real one")
            if file.read(header_bytes).count(b"{") > MAX_TENSORS:
                problem = f"more than {MAX_TENSORS} tensors; not a real checkpoint"
                raise CheckpointError(f"{path}: {problem}")
        try:
            str(path).encode()  # raises for bytes that are no text
            # The library checks bounds, overlaps, holes and the file's size, so offsets follow from
            # the order.  For "pt" torch would open the file again, with errors that are no OSError.
            offset = 8 + header_bytes
            with safe_open(path, framework="np") as opened:
                for name in opened.offset_keys():
                    part = opened.get_slice(name)
                    dtype, shape = part.get_dtype(), tuple(part.get_shape())
                    info = TensorInfo(text_name(name), path, DTYPES[dtype], shape, offset)
                    infos[info.name], offset = info, offset + info.nbytes
        except KeyError:
            problem = f"has dtype {dtype}, expected one of {', '.join(DTYPES)}"
            raise CheckpointError(f"{path}: {name:.120} {problem}") from None
        except UnicodeError:
            reason = "the name is not UTF-8, and the safetensors library opens no other"
            raise CheckpointError(f"{path}: {reason}; rename the folder") from None
        except (SafetensorError, ValueError) as damage:
            reason = f"damaged or truncated ({str(damage)[:160]}); download this file again"
            if "(os error " in str(damage):  # the library's way to say what the system said
                reason = f"can't be read ({str(damage)[:160]})"
            raise CheckpointError(f"{path}: {reason}") from None
    return infos, header_bytes


_Index = TypedDict("_Index", {"weight_map": dict[str, str]})


def weight_files(folder: Path) -> dict[str, str] | None:
    """File of each tensor by the folder's index, names checked, or None.  ``CheckpointError``."""
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    found = read_json(index, MAX_INDEX_BYTES, _Index, CheckpointError)["weight_map"]
    if not found:
        raise CheckpointError(f"{index}: weight_map is empty")
    weight_map = {text_name(name): file for name, file in found.items()}
    for file in dict.fromkeys(weight_map.values()):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", file):
            problem = "is not a plain .safetensors file name inside the folder"
            raise CheckpointError(f"{index}: {file!r:.80} {problem}")
    return weight_map


def tensors_in(folder: Path) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    """All tensors of the folder, from its index or from its single file, and how many bytes each
    file has before its data.  Raises ``CheckpointError``."""
    weight_map = weight_files(folder)
    if weight_map is None and not os.path.lexists(folder / SINGLE_NAME):
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
            problem = "holds pickled weights, which can run code and are never opened"
            raise CheckpointError(f"{folder}: {problem}; convert them to safetensors")
        raise CheckpointError(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}")
    headers: dict[str, dict[str, TensorInfo]] = {}
    starts, left = {}, MAX_HEADER_BYTES
    for file in dict.fromkeys((weight_map or {"": SINGLE_NAME}).values()):
        headers[file], used = read_header(inside(folder, file), left)
        starts[file], left = 8 + used, left - used
    if weight_map is None:
        return headers[SINGLE_NAME], starts
    for name, file in weight_map.items():
        if name not in headers[file]:
            problem = f"says that {name:.120} is in {file:.120}, but it is not there"
            raise CheckpointError(f"{folder / INDEX_NAME}: {problem}")
    return {name: headers[file][name] for name, file in weight_map.items()}, starts

"""What a GGUF file says before its data: metadata, and where its tensors lie.  Without torch.

The format is llama.cpp's (``docs/gguf.md`` there).  A file comes from a stranger: each length and
count is compared with what the bounds leave before anything of that size is read.  The ``gguf``
package's own reader trusts them, so it is not used.
"""

import json
import math
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from slotmoe import model
from slotmoe.errors import CheckpointError, reading
from slotmoe.jsonfile import Json, inside

T = TypeVar("T")

MAX_HEADER_BYTES = 32 << 20  # DeepSeek-V2's has 5 MB, most of it the tokenizer
MAX_VALUES = 1_000_000  # of all arrays together; its tokenizer has 400,000
MAX_KEYS, MAX_TENSORS, MAX_SHARDS = 10_000, 100_000, 1_000
MAX_NAME_BYTES, MAX_DIMENSIONS = 256, 4
_SCALARS = dict(zip((*range(8), *range(10, 13)), "BbHhIif?Qqd", strict=True))
_FLOAT32, _TEXT, _ARRAY = 6, 8, 9
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GgmlType(NamedTuple):
    """How ggml stores numbers: ``block`` of a row in so many ``bytes``."""

    name: str
    block: int
    bytes: int


TABLES: Json = json.loads(Path(model.__file__).with_name("gguf.json").read_bytes())
GGML_TYPES = {int(number): GgmlType(*row) for number, row in TABLES["types"].items()}
"""By ggml's number of the type.  Where a row is no multiple of 256, llama.cpp takes a type of 32 in
place of the one that was asked for, so a Q4_K file of V2-Lite holds Q5_0 and Q8_0 too."""


@dataclass(frozen=True)
class GgufTensor:
    """A tensor ``offset`` bytes into the file ``path``; ``shape`` is ggml's backwards."""

    name: str
    path: Path
    encoding: GgmlType
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class GgufHeader:
    """Of one file: the bytes before its data, its metadata by key, its tensors by name."""

    path: Path
    length: int
    metadata: Json
    tensors: dict[str, GgufTensor]


class _Reader:
    """Takes values from the start of a file, within the bounds."""

    def __init__(self, file: BinaryIO, limit: int):
        self._file, self._limit = file, limit
        self._data, self.position, self._values = bytearray(), 0, 0

    def take(self, count: int, what: str) -> bytearray:
        end = self.position + count
        if end > self._limit:
            raise ValueError(f"{what} takes the header beyond {MAX_HEADER_BYTES} bytes; not real")
        if end > len(self._data):
            self._data += self._file.read(max(end - len(self._data), 1 << 20))
        if end > len(self._data):
            raise ValueError(f"ends inside {what}; the file is truncated, download it again")
        start, self.position = self.position, end
        return self._data[start:end]

    def numbers(self, kinds: str, what: str) -> list[Any]:
        """Numbers as ``struct`` names their ``kinds``."""
        form = f"<{kinds}"
        return list(struct.unpack(form, self.take(struct.calcsize(form), what)))

    def count(self, size: int, what: str) -> int:
        """A whole number of ``size`` bytes."""
        return int.from_bytes(self.take(size, what), "little")

    def text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.count(8, what)
        if length > limit:
            raise ValueError(f"{what} has {length} bytes, more than {limit}")
        try:
            return self.take(length, what).decode()
        except UnicodeError:
            raise ValueError(f"{what} is not UTF-8 text") from None

    def value(self, key: str) -> object:
        kind = self.count(4, key)
        if kind == _TEXT:
            return self.text(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise ValueError(f"{key} has type {kind}, which GGUF does not have")
        (value,) = self.numbers(_SCALARS[kind], key)
        if kind == _FLOAT32:  # with the fewest digits: 1e-06, not 9.999999974752427e-07
            from numpy import float32

            return float(str(float32(value)))
        return value

    def _array(self, key: str) -> Sequence[object]:
        kind, count = self.count(4, key), self.count(8, key)
        self._values += count
        if self._values > MAX_VALUES:
            raise ValueError(f"{key} has {count} values; more than {MAX_VALUES} are not real")
        if kind == _TEXT:
            return [self.text(key) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"{key} is an array of type {kind}, which is not supported")
        return self.numbers(f"{count}{_SCALARS[kind]}", key)


def is_gguf(path: Path) -> bool:
    """Whether ``path`` is meant to be a GGUF file: a model that is no folder is one."""
    return not path.is_dir() and (path.suffix == ".gguf" or path.is_file())


def shard_paths(path: Path) -> list[Path]:
    """All files of the model whose first or only one is ``path``, by their names.  Raises
    ``CheckpointError`` if ``path`` is another one."""
    match = _SHARD.fullmatch(path.name)
    if match is None:
        return [path]
    prefix, index, count = match[1], int(match[2]), int(match[3])
    names = [f"{prefix}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    if not 1 <= index <= count <= MAX_SHARDS:
        raise CheckpointError(f"{path}: is no part that a split GGUF file of {count} parts has")
    if index != 1:
        raise CheckpointError(f"{path}: is part {index} of a split file; give {names[0]}")
    return [path.with_name(name) for name in names]


def read_header(path: Path, limit: int = MAX_HEADER_BYTES) -> GgufHeader:
    """The header of one GGUF file, checked, of at most ``limit`` bytes.  Raises
    ``CheckpointError``, which names the file and the key or tensor."""
    with reading(path, CheckpointError):
        try:
            if path.exists() and not path.is_file():  # a pipe would block
                raise ValueError("is not a regular file")
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                return _parse(path, size, _Reader(file, limit))
        except ValueError as problem:
            raise CheckpointError(f"{path}: {problem}") from None


def read_headers(path: Path) -> list[GgufHeader]:
    """The headers of all parts, which must be of one model.  Raises ``CheckpointError``."""
    headers: list[GgufHeader] = []
    paths, left = shard_paths(path), MAX_HEADER_BYTES
    for index, part in enumerate(paths):
        header = read_header(inside(path.parent, part.name) if index else path, left)
        left -= header.length
        number, count = (header.metadata.get(f"split.{key}", 0) for key in ("no", "count"))
        if (number, count or 1) != (index, len(paths)):  # 0 parts: they have been put together
            says = f"split.no is {number!r:.40} and split.count {count!r:.40}"
            named = f"{index} and {len(paths)}, as the name says (PREFIX-00001-of-00003.gguf)"
            raise CheckpointError(f"{part}: {says}, expected {named}")
        headers.append(header)
    counted = sum(len(header.tensors) for header in headers)
    names = {name for header in headers for name in header.tensors}
    for header in headers:
        stated = header.metadata.get("split.tensors.count", counted)
        if not stated == counted == len(names):
            counts = f"split.tensors.count is {stated!r:.40}, the parts have {len(names)} tensors"
            raise CheckpointError(f"{header.path}: {counts}; they are not of one model")
    return headers


def _parse(path: Path, size: int, reader: _Reader) -> GgufHeader:
    if reader.take(min(size, 4), "its magic number") != b"GGUF":
        raise ValueError("is not a GGUF file; SRC is one, a checkpoint folder or a hub id")
    version = reader.count(4, "its version")
    if version not in (2, 3):
        raise ValueError(f"has GGUF version {version}, expected 2 or 3 (little-endian)")
    counts = {"tensors": MAX_TENSORS, "metadata keys": MAX_KEYS}
    for what, most in counts.items():
        counts[what] = reader.count(8, f"the number of {what}")
        if counts[what] > most:
            raise ValueError(f"names {counts[what]} {what}; more than {most} are not real")
    metadata = _named(reader, counts["metadata keys"], "key", reader.value)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r:.40}, expected 1 to {1 << 20}")
    tensors = _named(reader, counts["tensors"], "tensor", partial(_tensor, reader, path))
    start = -(-reader.position // alignment) * alignment
    for name, tensor in tensors.items():
        block, bytes_ = tensor.encoding.block, tensor.encoding.bytes
        tensors[name] = tensor = replace(tensor, offset=start + tensor.offset)
        if (end := tensor.offset + math.prod(tensor.shape) // block * bytes_) > size:
            lies = f"tensor {name:.120} ends at byte {end}, and the file has {size}"
            raise ValueError(f"{lies}; it is truncated, download it again")
    return GgufHeader(path, reader.position, metadata, tensors)


def _named(reader: _Reader, count: int, what: str, read: Callable[[str], T]) -> dict[str, T]:
    """``count`` names, each with what ``read`` finds behind it."""
    values: dict[str, T] = {}
    for number in range(1, count + 1):
        name = reader.text(f"the name of {what} {number} of {count}", MAX_NAME_BYTES)
        if name in values:
            raise ValueError(f"{what} {name:.120} occurs twice")
        values[name] = read(name)
    return values


def _tensor(reader: _Reader, path: Path, name: str) -> GgufTensor:
    """What the header says of tensor ``name``; its offset is from the start of the data."""
    what = f"tensor {name:.120}"
    dimensions = reader.count(4, what)
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{what} has {dimensions} dimensions, expected 1 to {MAX_DIMENSIONS}")
    shape = tuple(reader.count(8, what) for _ in range(dimensions))[::-1]
    kind, offset = reader.count(4, what), reader.count(8, what)
    if min(shape) < 1 or math.prod(shape) > 1 << 48:
        raise ValueError(f"{what} has shape {list(shape)}, which no real tensor has")
    if kind not in GGML_TYPES:
        known = ", ".join(encoding.name for encoding in GGML_TYPES.values())
        raise ValueError(f"{what} is stored as ggml's type {kind}; only these are read: {known}")
    encoding = GGML_TYPES[kind]
    if shape[-1] % encoding.block or (len(shape) == 1 and encoding.block > 1):
        raise ValueError(f"{what} has rows of {shape[-1]}, which {encoding.name} can't hold")
    return GgufTensor(name, path, encoding, shape, offset)

"""Reads a Hugging Face DeepSeek-V2 checkpoint, one tensor (or a range of its rows) at a time.

Files come from strangers: names stay inside the folder, headers are validated by the safetensors
library before anything is allocated, every tensor's shape and dtype is compared with what the
config promises, and pickles are refused.  Data is read with ``pread`` into fresh buffers; a memory
map would count the whole shard as resident.
"""

import math
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from slotmoe.errors import CheckpointError, reading
from slotmoe.jsonfile import read_file, read_json
from slotmoe.model.config import Config, config_among
from slotmoe.model.files import files_in
from slotmoe.model.names import expert_name, expert_shapes, resident_shapes

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_INDEX_BYTES = 8 << 20  # DeepSeek-V2's own is 3.5 MB
MAX_HEADER_BYTES = 8 << 20  # of all shards together; DeepSeek-V2's are 4 MB
MAX_TENSORS = 100_000
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor: ``file`` in the folder, ``offset`` from its start in bytes."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def row_bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        return self.row_bytes * self.shape[0]


def inside(folder: Path, name: str) -> Path:
    """Path of a regular file in ``folder``; links may lead only to the hub cache's own blobs."""
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent not in (home, blobs):
        problem = "is a link that leads out of the folder; copy the file itself here"
    elif not path.is_file():
        problem = "is missing or not a regular file; download the checkpoint again"
    else:
        return path
    raise CheckpointError(f"{path}: {problem}")


def read_header(path: Path, limit: int = MAX_HEADER_BYTES) -> tuple[dict[str, TensorInfo], int]:
    """Tensors of one safetensors file by name, and its header's length, at most ``limit`` bytes.

    Raises ``CheckpointError`` if the file is not a whole one.
    """
    try:
        str(path).encode()  # raises for bytes that are no text
        with open(path, "rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if header_bytes > limit:
                sizes = f"header of {header_bytes} bytes, more than {MAX_HEADER_BYTES}"
                raise CheckpointError(f"{path}: {sizes} in the checkpoint; not a real one")
            if file.read(header_bytes).count(b"{") > MAX_TENSORS:
                problem = f"more than {MAX_TENSORS} tensors; not a real checkpoint"
                raise CheckpointError(f"{path}: {problem}")
        # The library checks bounds, overlaps, holes and the file's size against the header, so
        # offsets follow from the order.
        infos, offset = {}, 8 + header_bytes
        with safe_open(path, framework="pt") as opened:
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in _DTYPES or not shape:
                    expected = "BF16, F16 or F32 and at least one dimension"
                    problem = f"has dtype {dtype} and shape {list(shape)}, expected {expected}"
                    raise CheckpointError(f"{path}: {name:.120} {problem}")
                infos[name] = TensorInfo(path.name, _DTYPES[dtype], shape, offset)
                offset += infos[name].nbytes
        return infos, header_bytes
    except CheckpointError:
        raise
    except OSError as problem:
        raise CheckpointError(f"{path}: can't be read ({problem.strerror or problem})") from None
    except UnicodeError:
        reason = "the name is not UTF-8, and the safetensors library opens no other"
        raise CheckpointError(f"{path}: {reason}; rename the folder") from None
    except (SafetensorError, ValueError) as problem:
        if "(os error " in str(problem):  # the library's way to say what the system said
            raise CheckpointError(f"{path}: can't be read ({str(problem)[:160]})") from None
        reason = f"damaged or truncated ({str(problem)[:160]})"
        raise CheckpointError(f"{path}: {reason}; download this file again") from None


class Checkpoint:
    """An open checkpoint folder, a context manager.  Reading is thread-safe."""

    def __init__(self, folder: Path, config: Config, infos: dict[str, TensorInfo]):
        self.folder, self.config, self.infos = folder, config, infos
        self.name = folder.resolve().name
        self._files: dict[str, int] = {}
        try:
            for name in {info.file for info in infos.values()}:
                with reading(folder / name, CheckpointError):
                    self._files[name] = os.open(folder / name, os.O_RDONLY)
        except CheckpointError:
            self.close()
            raise

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Open ``folder`` and check that every tensor of its config is there with the right shape.

        Raises ``ConfigError`` or ``CheckpointError``; no tensor data has been read by then.
        """
        config = config_among(files_in(folder), folder)
        infos = _locate(folder)
        wanted: dict[str, TensorInfo] = {}
        for name, shape in tensor_shapes(config):
            if name not in infos:
                problem = f"tensor {name} is missing; config.json asks for it"
                raise CheckpointError(f"{folder}: {problem}")
            wanted[name] = info = infos[name]
            if info.shape != shape:
                shapes = f"{list(info.shape)}, config.json asks for {list(shape)}"
                raise CheckpointError(f"{folder / info.file}: {name} has shape {shapes}")
        return cls(folder, config, wanted)

    @contextmanager
    def read_from(self, file: str, path: Path) -> Iterator[None]:
        """Read ``file`` from ``path`` for a while; ``CheckpointError`` if the header changed."""
        header = {name: replace(info, file=file) for name, info in read_header(path)[0].items()}
        known = [(name, info) for name, info in self.infos.items() if info.file == file]
        if any(header.get(name) != info for name, info in known):
            problem = f"its header is not the one that {file} had before"
            raise CheckpointError(f"{path}: {problem}; download this file again")
        usual, self._files[file] = self._files[file], os.open(path, os.O_RDONLY)
        try:
            yield
        finally:
            os.close(self._files[file])
            self._files[file] = usual

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the network uses."""
        return sum(info.nbytes for info in self.infos.values())

    def small_file(self, name: str, limit: int) -> bytes | None:
        """``config.json`` or another small file, see ``slotmoe.model.files``.  Raises
        ``CheckpointError`` or ``ConfigError``."""
        if not (self.folder / name).is_file():
            return None
        return read_file(inside(self.folder, name), limit, CheckpointError)

    def headers(self) -> Iterator[tuple[str, int, bytes]]:
        """Each weight file, its size, and what it holds before the data."""
        for name, handle in sorted(self._files.items()):
            start = bytearray(8)
            self._fill(memoryview(start), name, 0, "its header")
            header = bytearray(8 + int.from_bytes(start, "little"))  # checked when it was opened
            self._fill(memoryview(header), name, 0, "its header")
            yield name, os.fstat(handle).st_size, bytes(header)

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of tensor ``name``, in the source's dtype.

        Raises ``CheckpointError`` if the file ends early.
        """
        info = self.infos[name]
        data = torch.empty((stop - start, *info.shape[1:]), dtype=info.dtype)
        view = data.view(-1).view(torch.uint8).numpy().data
        self._fill(view, info.file, info.offset + start * info.row_bytes, name)
        return data

    def _fill(self, view: memoryview, file: str, offset: int, name: str) -> None:
        """Fill ``view`` from ``offset`` of ``file`` on, where tensor ``name`` lies."""
        while view:
            with reading(self.folder / file, CheckpointError):
                count = os.preadv(self._files[file], [view], offset)
            if count == 0:
                problem = f"ends inside {name}; it was truncated while being read"
                raise CheckpointError(f"{self.folder / file}: {problem}")
            view, offset = view[count:], offset + count

    def tensor(self, name: str) -> torch.Tensor:
        """The whole tensor ``name``, in the source's dtype, checked to be finite."""
        data = self.rows(name, 0, self.infos[name].shape[0])
        self.check_finite(name, data)
        return data

    def check_finite(self, name: str, data: torch.Tensor) -> None:
        """Raise ``CheckpointError`` if ``data`` of tensor ``name`` holds NaN or infinity."""
        if not torch.isfinite(data).all():
            problem = f"{name} holds NaN or infinite weights; the file is damaged"
            raise CheckpointError(f"{self.folder / self.infos[name].file}: {problem}")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> "Checkpoint":
        return self

    def __exit__(self, *_problem: object) -> None:
        self.close()


def tensor_shapes(config: Config) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that ``config`` asks for; one by one, since a hostile one asks
    for far too many."""
    yield from resident_shapes(config).items()
    for layer in config.moe_layers:
        for projection, shape in expert_shapes(config).items():
            for expert in range(config.n_routed_experts):
                yield expert_name(layer, expert, projection), shape


def weight_files(folder: Path) -> dict[str, str] | None:
    """File of each tensor by the folder's index, names checked, or None.  ``CheckpointError``."""
    index = folder / INDEX_NAME
    if not index.exists():
        return None
    weight_map = read_json(index, MAX_INDEX_BYTES, CheckpointError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map object")
    weight_map = {name: str(file) for name, file in weight_map.items()}
    for file in dict.fromkeys(weight_map.values()):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors", file):
            problem = "is not a plain .safetensors file name inside the folder"
            raise CheckpointError(f"{index}: {file!r:.80} {problem}")
    return weight_map


def _locate(folder: Path) -> dict[str, TensorInfo]:
    """All tensors of the folder, from its index or from its single file."""
    weight_map = weight_files(folder)
    if weight_map is not None:
        headers: dict[str, dict[str, TensorInfo]] = {}
        left = MAX_HEADER_BYTES
        for file in dict.fromkeys(weight_map.values()):
            headers[file], used = read_header(inside(folder, file), left)
            left -= used
        for name, file in weight_map.items():
            if name not in headers[file]:
                problem = f"says that {name:.120} is in {file:.120}, but it is not there"
                raise CheckpointError(f"{folder / INDEX_NAME}: {problem}")
        return {name: headers[file][name] for name, file in weight_map.items()}
    if (folder / SINGLE_NAME).exists() or (folder / SINGLE_NAME).is_symlink():
        return read_header(inside(folder, SINGLE_NAME))[0]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        problem = "holds pickled weights, which can run code and are never opened"
        raise CheckpointError(f"{folder}: {problem}; convert them to safetensors")
    raise CheckpointError(f"{folder}: has neither {INDEX_NAME} nor {SINGLE_NAME}")

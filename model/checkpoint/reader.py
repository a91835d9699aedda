"""Opens a checkpoint, a folder of Hugging Face's or a GGUF file, and reads one tensor, or a range
of its rows, at a time.

What its files hold is checked against what the config promises before any data is read
(the other modules of this folder).  Data is read with ``pread`` into fresh buffers; a memory
map would count the whole shard as resident.
"""

import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import xxhash

from slotmoe import system
from slotmoe.errors import CheckpointError, ConfigError, reading
from slotmoe.jsonfile import Json, ReadFile, files_in, inside, parse_json, read_file
from slotmoe.model import names, tiktoken
from slotmoe.model.checkpoint.gguf import Mxfp4Tensor, gguf_tensors
from slotmoe.model.checkpoint.gguf_header import is_gguf, read_headers
from slotmoe.model.checkpoint.gguf_metadata import metadata_files
from slotmoe.model.checkpoint.places import Codes, EncodedTensor, Places
from slotmoe.model.checkpoint.shards import TensorInfo, read_header, tensors_in
from slotmoe.model.config import Config, config_among
from slotmoe.model.tokenizer import MAX_SETTINGS_BYTES

_PIECE, _READERS = 8 << 20, 4


class Seen:
    """Checksums of what is read of a tensor, from its first row to its last, in whatever pieces and
    however often."""

    def __init__(self) -> None:
        self._ranges: dict[TensorInfo, tuple[int, xxhash.xxh3_64]] = {}

    def add(self, info: TensorInfo, start: int, stop: int, data: memoryview) -> None:
        """``data`` are rows ``start`` to ``stop`` of ``info``."""
        begun = start, xxhash.xxh3_64(seed=info.offset + start * info.row_bytes)
        end, digest = self._ranges.get(info, begun)
        digest.update(data[max(end - start, 0) * info.row_bytes :])
        self._ranges[info] = max(end, stop), digest

    def sums(self) -> dict[str, int]:
        """By file, the sum of the xxh3-64 of its ranges that were read, seeded by their offset."""
        sums = Counter[str]()
        for info, (_, digest) in self._ranges.items():
            sums[info.file] += digest.intdigest()
        return sums


def weights_read(read: Iterable[Mapping[str, int]]) -> dict[str, str]:
    """What names all that was ``read`` of each file: ``Seen.sums`` of its tensors together."""
    sums = Counter[str]()
    for of_tensor in read:
        sums.update(of_tensor)
    return {file: f"{total % (1 << 64):016x}" for file, total in sorted(sums.items())}


class Checkpoint(AbstractContextManager["Checkpoint"]):
    """An open checkpoint, a context manager.  Reading is thread-safe.

    ``infos`` are the tensors that the network uses, and ``stored`` those of the files that they are
    in.  ``headers`` are the files that it has, each with how many bytes it has before its data.
    ``small_file`` reads ``config.json`` or another small one, see ``slotmoe.jsonfile``.
    """

    def __init__(
        self,
        place: Path,
        config: Config,
        infos: Mapping[str, TensorInfo],
        stored: Collection[TensorInfo],
        headers: Mapping[str, int],
        small_file: ReadFile,
    ):
        self.folder = place if place.is_dir() else place.parent
        self.name = place.resolve().name if place.is_dir() else place.name
        self.config, self.infos, self.small_file = config, infos, small_file
        self._stored, self._headers = stored, headers
        self._files: dict[str, int] = {}
        try:
            for file in headers:
                with reading(self.folder / file, CheckpointError):
                    self._files[file] = system.open_file(self.folder / file, os.O_RDONLY)
        except CheckpointError:
            self.close()
            raise

    @contextmanager
    def read_from(self, file: str, path: Path) -> Iterator[None]:
        """Read ``file`` from ``path`` for a while; ``CheckpointError`` if the header changed."""
        header = {replace(info, path=self.folder / file) for info in read_header(path)[0].values()}
        if any(info not in header for info in self._stored if info.file == file):
            problem = f"its header is not the one that {file} had before"
            raise CheckpointError(f"{path}: {problem}; download this file again")
        usual, self._files[file] = self._files[file], system.open_file(path, os.O_RDONLY)
        try:
            yield
        finally:
            os.close(self._files[file])
            self._files[file] = usual

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that the network uses."""
        return sum(info.nbytes for info in self.infos.values())

    def headers(self) -> Iterator[tuple[str, int, bytes]]:
        """Each file, its size, and what it holds before the data."""
        for file, count in sorted(self._headers.items()):
            header = bytearray(count)
            self._fill(memoryview(header), file, 0, "its header")
            yield file, os.fstat(self._files[file]).st_size, bytes(header)

    def files_of(self, names: Iterable[str]) -> set[str]:
        """The weight files that have parts of these tensors."""
        infos = [self.infos[name] for name in names]
        return {part.file for info in infos for part in (info, *info.parts)}

    def stamps(self) -> dict[str, str]:
        """What tells without reading whether a file is still the same, by file."""
        states = {file: os.fstat(handle) for file, handle in sorted(self._files.items())}
        return {
            file: f"inode {state.st_ino}, times {state.st_mtime_ns} {state.st_ctime_ns}"
            for file, state in states.items()
        }

    def rows(self, name: str, start: int, stop: int, seen: Seen | None = None) -> torch.Tensor:
        """Rows ``start`` to ``stop`` of tensor ``name``, in its dtype of ``infos``; ``seen`` notes
        what is read for that.

        Raises ``CheckpointError`` if the file ends early or holds scales that are not finite.
        """
        return self.infos[name].rows(partial(self._stored_rows, name, seen), start, stop)

    def weights(self, reading: Callable[[int, int], None]) -> dict[str, str]:
        """``weights_read`` of all tensors, read by threads; ``reading`` gets bytes done and their
        total.  Raises like ``rows``."""

        def read(info: TensorInfo) -> dict[str, int]:
            seen, step = Seen(), max(1, _PIECE // info.row_bytes)
            for start in range(0, info.shape[0], step):
                self.rows(info.name, start, min(start + step, info.shape[0]), seen)
            return seen.sums()

        infos, sums, done = self.infos.values(), list[dict[str, int]](), 0
        with ThreadPoolExecutor(_READERS) as pool:
            for info, found in zip(infos, pool.map(read, infos), strict=True):
                sums.append(found)
                done += info.nbytes
                reading(done, self.nbytes)
        return weights_read(sums)

    def in_4_bits(self, name: str) -> bool:
        """Whether tensor ``name`` is stored in codes of 4 bits that ``codes`` gives."""
        info = self.infos[name]
        kept = isinstance(info, EncodedTensor) and info.encoding.name != "fp8"
        return kept or isinstance(info, Mxfp4Tensor)

    def codes(self, name: str, start: int, stop: int, seen: Seen | None = None) -> Codes:
        """Rows of a weight that is stored in 4 bits, as they are.  Like ``rows``."""
        info = self.infos[name]
        assert isinstance(info, EncodedTensor | Mxfp4Tensor)
        return info.four_bits(partial(self._stored_rows, name, seen), start, stop)

    def _stored_rows(
        self, name: str, seen: Seen | None, info: TensorInfo, start: int, stop: int
    ) -> torch.Tensor:
        """Rows of a tensor as they are in its file, for the tensor ``name``."""
        data = torch.empty((stop - start, *info.shape[1:][-1:]), dtype=info.dtype)
        view = data.view(-1).view(torch.uint8).numpy().data
        self._fill(view, info.file, info.offset + start * info.row_bytes, name)
        if seen is not None:
            seen.add(info, start, stop, view)
        return data

    def _fill(self, view: memoryview, file: str, offset: int, name: str) -> None:
        """Fill ``view`` from ``offset`` of ``file`` on, where tensor ``name`` lies."""
        while view:
            with reading(self.folder / file, CheckpointError):
                count = system.read_at(self._files[file], view, offset)
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
        if not torch.stack(data.aminmax()).isfinite().all():  # a tenth of the time for each
            problem = f"{name} holds NaN or infinite weights; the file is damaged"
            raise CheckpointError(f"{self.infos[name].path}: {problem}")

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __exit__(self, *_problem: object) -> None:
        self.close()


def open_checkpoint(path: Path, keep_mtp: bool = False) -> Checkpoint:
    """The checkpoint folder ``path``, with ``keep_mtp`` also the head that predicts one token more,
    or the GGUF file, the first where there are several.  Every tensor that its config asks for is
    there with the right shape; no tensor data has been read.

    Raises ``ConfigError`` or ``CheckpointError``, also where the ``gguf`` package is missing.
    """
    if is_gguf(path):
        if keep_mtp:
            problem = "the head that predicts one token more is not read from GGUF files"
            advice = "leave --keep-mtp out, or give the original checkpoint"
            raise ConfigError(f"{path}: {problem}; {advice}")
        headers = read_headers(path)
        read = metadata_files(headers)
        config = config_among(read, path)
        infos, used = gguf_tensors(path, config, headers)
        starts = {header.path.name: header.length for header in headers}
        return Checkpoint(path, config, infos, used, starts, read)
    config = config_among(files_in(path), path)
    found, starts = tensors_in(path)
    stored = {names.in_layers(name, config): info for name, info in found.items()}
    if keep_mtp:
        config = config.with_mtp(path / "config.json", "--keep-mtp")
        first = names.layer_tensor(config.num_hidden_layers, names.MTP_PARTS["enorm"].name)
        if first not in stored:
            problem = f"{first} is missing, though num_nextn_predict_layers names its layer"
            advice = "leave --keep-mtp out, or get all weights"
            raise CheckpointError(f"{path}: {problem}; {advice}")
    places = Places(path, stored, config, spelled=partial(names.spelled, config=config))
    infos = {name: places.find(name, shape) for name, shape in names.tensor_shapes(config)}
    starts = {file: starts[file] for file in starts.keys() & {info.file for info in places.used}}
    return Checkpoint(path, config, infos, places.used, starts, small_files(path))


def small_files(folder: Path) -> ReadFile:
    """The small files of a checkpoint folder.  ``tokenizer.json`` may be made of a
    ``tiktoken.model``.  Raises ``CheckpointError`` or ``ConfigError``."""

    @cache
    def converted() -> bytes:
        path = inside(folder, tiktoken.FILE_NAME)
        model = read_file(path, tiktoken.MAX_BYTES, CheckpointError)
        settings = read("tokenizer_config.json", MAX_SETTINGS_BYTES) or b"{}"
        parsed = parse_json(settings, folder / "tokenizer_config.json", Json)
        return tiktoken.made_by_child(model, parsed, path)

    def read(name: str, limit: int) -> bytes | None:
        if (folder / name).is_file():
            return read_file(inside(folder, name), limit, CheckpointError)
        is_made = name == "tokenizer.json" and (folder / tiktoken.FILE_NAME).is_file()
        return converted() if is_made else None

    return read

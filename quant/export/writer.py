"""Files of an export, written under a temporary name and renamed when whole and durable."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import xxhash
from torch import Tensor, uint8, zeros

from slotmoe import system
from slotmoe.errors import ExportError, naming
from slotmoe.jsonfile import Json
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import Part, checksum, describe_tensors
from slotmoe.quant.export.verify import span_checksums


class ExportFile:
    """The file ``path`` put together tensor by tensor: in any order, by several threads, over
    several runs.

    ``checksums`` are the xxh3-128 of the tensors that are whole, by name.  Saved after ``sync`` and
    passed to the next run's ``ExportFile``, they make that run go on from here.
    """

    def __init__(self, path: Path, parts: dict[str, Part], checksums: dict[str, str] | None = None):
        self.path, self.parts, self.checksums = path, parts, dict(checksums or {})
        self._header = layout.safetensors_header(parts.items())
        self._unfinished: dict[str, tuple[xxhash.xxh3_128, int]] = {}
        path.parent.mkdir(exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | system.NO_LINK, 0o666)
        try:
            with naming(path):
                os.ftruncate(self._handle, self.nbytes)
            self._pwrite(memoryview(self._header), 0)
            for name, part in parts.items():
                if name.endswith(".pad"):
                    self.write(name, zeros(part.shape, dtype=part.dtype))
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        return max(part.span(len(self._header))[1] for part in self.parts.values())

    def write(self, name: str, piece: Tensor) -> None:
        """Append ``piece`` to tensor ``name``; a tensor's pieces come from one thread, in order."""
        part, data = self.parts[name], piece.contiguous().view(-1).view(uint8).numpy().data
        digest, written = self._unfinished.pop(name, (xxhash.xxh3_128(), 0))
        assert piece.dtype == part.dtype and written + len(data) <= part.nbytes
        digest.update(data)
        self._pwrite(data, len(self._header) + part.offset + written)
        written += len(data)
        if written == part.nbytes:
            self.checksums[name] = digest.hexdigest()
        else:
            self._unfinished[name] = digest, written

    def _pwrite(self, data: memoryview, offset: int) -> None:
        with naming(self.path):
            system.write_at(self._handle, data, offset)

    def sync(self) -> None:
        """Make what was written durable."""
        with naming(self.path):
            os.fsync(self._handle)

    def check(
        self, record_bytes: int | None = None, advance: Callable[[int], None] | None = None
    ) -> tuple[Json, list[str]]:
        """The manifest entry of the file as it lies on disk, durable now, with checksums of its
        tensors or of its records of ``record_bytes``; and the tensors that are not what
        ``checksums`` says.  ``advance`` is called with the position after each read."""
        self.sync()
        start, end, step = len(self._header), self.nbytes, record_bytes or self.nbytes
        spans = [part.span(start) for part in self.parts.values()]
        records = [(at, at + step) for at in range(start, end, step) if record_bytes]
        whole, digests = span_checksums(self.path, [*spans, *records], advance)
        found = dict(zip(self.parts, digests, strict=False))
        wrong = [name for name, digest in found.items() if self.checksums.get(name) != digest]
        entry: Json = {"bytes": end, "header_bytes": start}
        entry |= {"header_checksum": checksum(self._header), "checksum": whole}
        if record_bytes:
            return {**entry, "records": digests[len(spans) :]}, wrong
        return {**entry, "tensors": describe_tensors(self.parts, found)}, wrong

    def finish(self, record_bytes: int | None = None) -> Json:
        """The entry of ``check``.  Raises ``ExportError`` if anything is wrong: days may lie
        between a file's first tensor and its last, and a checksum must not bless a damage."""
        entry, wrong = self.check(record_bytes)
        if wrong:
            what = f"{wrong[0]} was damaged after it had been written"
            raise ExportError(f"{self.path}: {what}; run the same command to make it anew")
        return entry

    def close(self) -> None:
        os.close(self._handle)


def temporary_name(path: Path) -> Path:
    """What the file ``path`` is called until it is whole."""
    return path.with_name(path.name + ".tmp")


def publish_file(path: Path) -> None:
    """Give a finished file its name, durably."""
    system.move(temporary_name(path), path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make moves inside ``folder`` durable."""
    with naming(folder):
        system.sync_folder(folder)


def write_json(path: Path, values: Json, indent: int | None = 1) -> None:
    """Replace ``path`` by the JSON of ``values``.  Indented, Python writes it ten times slower."""
    replace_file(path, json.dumps(values, indent=indent).encode())


def replace_file(
    path: Path, *parts: bytes | memoryview, opener: Callable[[str, int], int] | None = None
) -> None:
    """Replace ``path`` by the ``parts`` after each other, durably and never half."""
    fresh = temporary_name(path)
    try:
        with naming(path), open(fresh, "wb", opener=opener) as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
        publish_file(path)
    except BaseException:
        with suppress(OSError):
            system.patiently(fresh.unlink, True)
        raise

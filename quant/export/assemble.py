"""A file of the export that is put together tensor by tensor: in any order, by several threads,
over several runs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import xxhash
from torch import Tensor, uint8

from slotmoe.errors import ExportError
from slotmoe.quant.export.layout import (
    Part,
    RecordLayout,
    checksum,
    describe_tensors,
    safetensors_header,
)
from slotmoe.quant.export.verify import Span, span_checksums
from slotmoe.quant.export.writer import sync_folder


class Assembly:
    """The file ``path`` in the making, under the name ``….tmp`` until ``publish_file``.

    ``checksums`` names every tensor that is whole and the xxh3-128 of its bytes.  Saved after
    ``sync`` and passed to the next run's ``Assembly``, it makes that run go on from here; what it
    does not name is written again.
    """

    def __init__(self, path: Path, parts: dict[str, Part], checksums: dict[str, str]):
        self.path, self.parts, self.checksums = path, parts, dict(checksums)
        self._temporary = temporary_name(path)
        self._header = safetensors_header(parts.items())
        self._going: dict[str, tuple[xxhash.xxh3_128, int]] = {}
        path.parent.mkdir(exist_ok=True)
        self._handle = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            os.ftruncate(self._handle, self.nbytes)
            self._pwrite(memoryview(self._header), 0)
        except BaseException:
            self.close()
            raise

    @property
    def nbytes(self) -> int:
        """Size of the finished file."""
        return len(self._header) + max(part.offset + part.nbytes for part in self.parts.values())

    def write(self, name: str, piece: Tensor) -> None:
        """Append ``piece`` to tensor ``name``; a tensor's pieces come from one thread, in order."""
        part, data = self.parts[name], piece.contiguous().view(-1).view(uint8).numpy().data
        digest, written = self._going.pop(name, (xxhash.xxh3_128(), 0))
        assert piece.dtype == part.dtype and written + len(data) <= part.nbytes
        digest.update(data)
        self._pwrite(data, len(self._header) + part.offset + written)
        written += len(data)
        if written == part.nbytes:
            self.checksums[name] = digest.hexdigest()
        else:
            self._going[name] = digest, written

    def _pwrite(self, data: memoryview, offset: int) -> None:
        while data:
            count = os.pwrite(self._handle, data, offset)
            data, offset = data[count:], offset + count

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._handle)

    def finish_tensors(self) -> dict[str, Any]:
        """Check the whole file of tensors as it lies on disk and return its manifest entry.  Raises
        ``ExportError``."""
        whole, _ = self._read_back([])
        return {**self._entry(whole), "tensors": describe_tensors(self.parts, self.checksums)}

    def finish_records(self, experts: int, layout: RecordLayout) -> dict[str, Any]:
        """Check the whole file of ``experts`` records as it lies on disk and return its manifest
        entry.  Raises ``ExportError``."""
        size, start = layout.record_bytes, len(self._header)
        whole, records = self._read_back(
            [(start + expert * size, start + (expert + 1) * size) for expert in range(experts)]
        )
        return {**self._entry(whole), "records": records}

    def _read_back(self, spans: list[Span]) -> tuple[str, list[str]]:
        """Checksums of the file and of ``spans``.  Days may lie between its first tensor and its
        last, so each is compared with what was written: a checksum must not bless a damage."""
        self.sync()
        start = len(self._header)
        known = {
            name: (start + part.offset, start + part.offset + part.nbytes)
            for name, part in self.parts.items()
        }
        names = [
            name for name in known if not name.endswith(".pad")
        ]  # nobody writes padding: the new file is zeros
        whole, found = span_checksums(self._temporary, [*spans, *(known[name] for name in names)])
        for name, digest in zip(names, found[len(spans) :], strict=True):
            if digest != self.checksums[name]:
                self._temporary.unlink()
                raise ExportError(
                    f"{self._temporary}: {name} was damaged after it had been written; run the same command to make it anew"
                )
        return whole, found[: len(spans)]

    def _entry(self, whole: str) -> dict[str, Any]:
        header = {"header_bytes": len(self._header), "header_checksum": checksum(self._header)}
        return {"bytes": self.nbytes, **header, "checksum": whole}

    def close(self) -> None:
        os.close(self._handle)


def temporary_name(path: Path) -> Path:
    """What the file ``path`` is called until it is whole."""
    return path.with_name(path.name + ".tmp")


def publish_file(path: Path) -> None:
    """Give a finished file its name, durably; nothing happens if it has it already."""
    if temporary_name(path).exists():
        os.rename(temporary_name(path), path)
        sync_folder(path.parent)

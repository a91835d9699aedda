"""Files of an export: written under a temporary name and renamed when whole and durable; and every
checksum, of each file, its header, its tensors and its expert records."""

import json
import mmap
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import xxhash
from torch import Tensor, uint8, zeros

from slotmoe import system
from slotmoe.errors import ExportError, naming
from slotmoe.jsonfile import Json
from slotmoe.quant.codecs.weight import possible_scales
from slotmoe.quant.export import layout
from slotmoe.quant.export.manifest import manifest_layout, regular_file
from slotmoe.system import open_file

Span = tuple[int, int]
_PIECE = 4 << 20


def span_checksums(
    path: Path, spans: Sequence[Span], advance: Callable[[int], None] | None = None
) -> tuple[str, list[str]]:
    """Checksum of the whole file and of each span (start, stop) of its bytes, in one pass; spans
    may nest or overlap.  ``advance`` is called with the position after each read."""
    whole, digests, position = xxhash.xxh3_128(), [xxhash.xxh3_128() for _ in spans], 0
    starts, stops = np.array(spans, np.int64).reshape(-1, 2).T
    with naming(path), open(path, "rb", buffering=0, opener=open_file) as file:
        while piece := file.read(_PIECE):
            data, end = memoryview(piece), position + len(piece)
            whole.update(data)
            for index in np.flatnonzero((starts < end) & (stops > position)).tolist():
                start, stop = spans[index]
                digests[index].update(data[max(start - position, 0) : stop - position])
            position = end
            if advance is not None:
                advance(position)
    return whole.hexdigest(), [digest.hexdigest() for digest in digests]


def damaged_files(
    folder: Path, manifest: Json, progress: Callable[[int, int], None]
) -> dict[str, str]:
    """What is wrong with each file of the export in ``folder`` that is not as its ``manifest``
    says.  ``progress(done, total)`` is called in bytes of the export."""
    total, done = sum(entry["bytes"] for entry in manifest["files"].values()), 0
    damaged: dict[str, str] = {}
    for name, entry in manifest["files"].items():

        def advance(position: int, start: int = done) -> None:
            progress(min(start + position, total), total)

        if (problem := _damage(folder, name, manifest, advance)) is not None:
            damaged[name] = problem
        done += entry["bytes"]
        progress(done, total)
    return damaged


def _damage(folder: Path, name: str, manifest: Json, advance: Callable[[int], None]) -> str | None:
    entry = manifest["files"][name]
    try:
        path = regular_file(folder, name)
        if not path.exists():
            return "is missing"
        if (size := path.stat().st_size) != entry["bytes"]:
            return f"has {size} bytes instead of {entry['bytes']}"
        expected = _expected_spans(name, manifest)
        whole, digests = span_checksums(path, [span for span, _ in expected.values()], advance)
    except ExportError:
        return "is no regular file inside the export"
    except OSError as problem:
        return f"can't be read ({problem.strerror})"
    parts = zip(expected.items(), digests, strict=True)
    wrong = [what for (what, (_, wanted)), digest in parts if digest != wanted]
    if not wrong and whole != entry["checksum"]:
        return "is damaged"
    if not wrong:
        return _impossible_scales(path, name, manifest)
    more = f" and {len(wrong) - 1} more of {len(expected)} parts" if len(wrong) > 1 else ""
    return f"is damaged in {wrong[0]}{more}"


def _impossible_scales(path: Path, name: str, manifest: Json) -> str | None:
    """Which expert of a layer's file has scales that no encoder makes, whatever their checksum."""
    if not name.startswith(layout.EXPERTS):
        return None
    records, entry = manifest_layout(manifest), manifest["files"][name]
    levels = records.levels()
    with naming(path), open(path, "rb", opener=open_file) as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    data = torch.frombuffer(memory, dtype=torch.uint8, offset=entry["header_bytes"])
    for expert, record in enumerate(data.view(-1, records.record_bytes)):
        for projection in layout.PROJECTIONS:
            if not possible_scales(records.weight(record, projection, levels).scales):
                return f"has scales in {projection} of expert {expert} that no weights have"
    return None


def _expected_spans(name: str, manifest: Json) -> dict[str, tuple[Span, str]]:
    """The parts of a file by name: where each lies and the checksum that it should have."""
    entry = manifest["files"][name]
    if name in layout.COPIED:
        return {}
    start = entry["header_bytes"]
    spans = {"its header": ((0, start), entry["header_checksum"])}
    if name.startswith(layout.EXPERTS):
        size = manifest_layout(manifest).record_bytes
        for expert, checksum in enumerate(entry["records"]):
            first = start + expert * size
            spans[f"expert {expert}"] = (first, first + size), checksum
    else:
        for tensor, part in layout.tensor_parts(entry).items():
            spans[tensor] = part.span(start), entry["tensors"][tensor]["checksum"]
    return spans


class ExportFile:
    """The file ``path`` put together tensor by tensor: in any order, by several threads, over
    several runs.

    ``checksums`` are the xxh3-128 of the tensors that are whole, by name.  Saved after ``sync`` and
    passed to the next run's ``ExportFile``, they make that run go on from here.
    """

    def __init__(
        self, path: Path, parts: dict[str, layout.Part], checksums: dict[str, str] | None = None
    ):
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
        entry |= {"header_checksum": layout.checksum(self._header), "checksum": whole}
        if record_bytes:
            return {**entry, "records": digests[len(spans) :]}, wrong
        parts = self.parts.items()
        tensors = {name: part.describe() | {"checksum": found[name]} for name, part in parts}
        return {**entry, "tensors": tensors}, wrong

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
        system.move(fresh, path)
        sync_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            system.patiently(fresh.unlink, True)
        raise

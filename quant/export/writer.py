"""Files of an export, written under a temporary name and renamed when they are whole and
durable."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from slotmoe.quant.export.layout import (
    _DTYPE_NAMES,
    MANIFEST,
    RESIDENT,
    Part,
    RecordLayout,
    checksum,
    describe_tensors,
    is_predictor,
    layer_file,
    layer_header,
    place,
    safetensors_header,
)
from slotmoe.quant.export.validate import _check_predictor, manifest_checksum, read_manifest


class _Writer:
    """A new file under a temporary name; ``commit`` makes it durable and gives it its name."""

    def __init__(self, path: Path, header: bytes):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._temporary = path, path.with_name(path.name + ".tmp")
        self._file = open(self._temporary, "wb")
        self._header = header
        try:
            self._file.write(header)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def _commit(self, entry: dict[str, Any]) -> dict[str, Any]:
        self._file.flush()
        size = self._file.seek(0, os.SEEK_END)
        os.fsync(self._file.fileno())
        self._file.close()
        os.rename(self._temporary, self._path)
        sync_folder(self._path.parent)
        return {
            "bytes": size,
            "header_bytes": len(self._header),
            "header_checksum": checksum(self._header),
            **entry,
        }

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._file.close()  # flushes, which fails again on a full disk
        finally:
            self._temporary.unlink(missing_ok=True)


class LayerWriter(_Writer):
    """Writes one layer's records in order of expert; a context manager that removes what was not
    committed."""

    def __init__(self, folder: Path, layer: int, experts: int, layout: RecordLayout):
        super().__init__(folder / layer_file(layer), layer_header(layer, experts, layout))
        self._hash, self._records, self._experts = xxhash.xxh3_128(self._header), [], experts  # type: ignore[var-annotated]

    def write(self, record: Tensor) -> None:
        """Append the next expert's record, uint8 [record_bytes]."""
        data = record.numpy().data
        self._records.append(checksum(data))
        self._hash.update(data)
        self._file.write(data)

    def commit(self) -> dict[str, Any]:
        """Finish the file; returns its entry for the manifest."""
        assert len(self._records) == self._experts
        return self._commit({"checksum": self._hash.hexdigest(), "records": self._records})


class ResidentWriter(_Writer):
    """Writes the resident file's tensors (or the predictor's), each in pieces from its start, in
    any order of tensors."""

    def __init__(self, folder: Path, parts: dict[str, Part], name: str = RESIDENT):
        super().__init__(folder / name, safetensors_header(parts.items()))
        self._parts = parts
        self._written = dict.fromkeys(parts, 0)
        self._hashes = {name: xxhash.xxh3_128() for name in parts}

    def write(self, name: str, piece: Tensor) -> None:
        """Append ``piece`` to tensor ``name``."""
        part, data = self._parts[name], piece.contiguous().view(-1).view(torch.uint8).numpy().data
        assert piece.dtype == part.dtype and self._written[name] + len(data) <= part.nbytes
        self._hashes[name].update(data)
        self._file.seek(len(self._header) + part.offset + self._written[name])
        self._file.write(data)
        self._written[name] += len(data)

    def commit(self) -> dict[str, Any]:
        """Finish the file; returns its entry for the manifest."""
        assert all(self._written[name] == part.nbytes for name, part in self._parts.items())
        self._file.flush()
        checksums = {name: digest.hexdigest() for name, digest in self._hashes.items()}
        return self._commit(
            {
                "checksum": file_checksum(self._temporary),
                "tensors": describe_tensors(self._parts, checksums),
            }
        )


def file_checksum(path: Path) -> str:
    """xxh3-128 of a whole file, read in pieces of 4 MiB."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(4 << 20):
            digest.update(piece)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Replace ``path`` by the JSON of ``values``, durably and never half."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.rename(temporary, path)
    sync_folder(path.parent)


def write_predictor(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Give the export in ``folder`` a predictor with the ``tensors`` of ``predictor_parts`` and
    return its new manifest.

    The new file has a name of its own, so the rename of the manifest is the one moment in which it
    replaces the old one.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two at once must not remove each other's file
        manifest = read_manifest(folder)
        parts = place(
            {name: Part(tensor.dtype, tuple(tensor.shape), 0) for name, tensor in tensors.items()}
        )
        described = {
            name: {"dtype": _DTYPE_NAMES[part.dtype], "shape": list(part.shape), "checksum": ""}
            for name, part in parts.items()
        }
        _check_predictor(described, manifest["experts"])
        name = f"predictor-{checksum(b''.join(tensors[part].numpy().tobytes() for part in parts))[:16]}.safetensors"
        with ResidentWriter(folder, parts, name) as writer:
            for part in parts:
                writer.write(part, tensors[part])
            entry = writer.commit()
        files = {
            old: entry for old, entry in manifest["files"].items() if not is_predictor(old)
        } | {name: entry}
        manifest["files"] = dict(sorted(files.items()))
        manifest["checksum"] = manifest_checksum(manifest)
        write_json(folder / MANIFEST, manifest)
        for path in folder.iterdir():
            if is_predictor(path.name.removesuffix(".tmp")) and path.name != name:
                path.unlink()
    finally:
        os.close(handle)
    return manifest

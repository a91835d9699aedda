"""Every checksum of an export: of each file, its header, its tensors and its expert records."""

import mmap
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import xxhash

from slotmoe.errors import ExportError, naming
from slotmoe.jsonfile import Json
from slotmoe.quant.codecs.weight import possible_scales
from slotmoe.quant.export.layout import COPIED, EXPERTS, PROJECTIONS, tensor_parts
from slotmoe.quant.export.validate import manifest_layout, regular_file
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
    wrong = [what for (what, (_, checksum)), digest in parts if digest != checksum]
    if not wrong and whole != entry["checksum"]:
        return "is damaged"
    if not wrong:
        return _impossible_scales(path, name, manifest)
    more = f" and {len(wrong) - 1} more of {len(expected)} parts" if len(wrong) > 1 else ""
    return f"is damaged in {wrong[0]}{more}"


def _impossible_scales(path: Path, name: str, manifest: Json) -> str | None:
    """Which expert of a layer's file has scales that no encoder makes, whatever their checksum."""
    if not name.startswith(EXPERTS):
        return None
    layout, entry = manifest_layout(manifest), manifest["files"][name]
    levels = layout.levels()
    with naming(path), open(path, "rb", opener=open_file) as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    records = torch.frombuffer(memory, dtype=torch.uint8, offset=entry["header_bytes"])
    for expert, record in enumerate(records.view(-1, layout.record_bytes)):
        for projection in PROJECTIONS:
            if not possible_scales(layout.weight(record, projection, levels).scales):
                return f"has scales in {projection} of expert {expert} that no weights have"
    return None


def _expected_spans(name: str, manifest: Json) -> dict[str, tuple[Span, str]]:
    """The parts of a file by name: where each lies and the checksum that it should have."""
    entry = manifest["files"][name]
    if name in COPIED:
        return {}
    start = entry["header_bytes"]
    spans = {"its header": ((0, start), entry["header_checksum"])}
    if name.startswith(EXPERTS):
        size = manifest_layout(manifest).record_bytes
        for expert, checksum in enumerate(entry["records"]):
            first = start + expert * size
            spans[f"expert {expert}"] = (first, first + size), checksum
    else:
        for tensor, part in tensor_parts(entry).items():
            spans[tensor] = part.span(start), entry["tensors"][tensor]["checksum"]
    return spans

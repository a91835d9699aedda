"""``Export``: an open export, whose tensors and records are verified whenever they are read."""

import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slotmoe import system
from slotmoe.errors import ExportError
from slotmoe.quant.coded import CodedWeight, levels_of, possible_scales
from slotmoe.quant.export.codecs import manifest_codecs
from slotmoe.quant.export.layout import (
    COPIED,
    PROJECTIONS,
    RESIDENT,
    Part,
    RecordLayout,
    checksum,
    is_predictor,
    layer_file,
    layer_parts,
    safetensors_header,
    tensor_parts,
)
from slotmoe.quant.export.validate import (
    MAX_COPIED_BYTES,
    manifest_layout,
    read_manifest,
    refuse_unlisted,
    regular_file,
)
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.shapes import ALIGNMENT

Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-aligned memory, as direct reads need it."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Export:
    """An open export.  Reads are thread-safe; close it or use it as a context manager."""

    def __init__(self, folder: Path, manifest: dict[str, Any], layout: RecordLayout):
        self.folder, self.manifest, self.layout = folder, manifest, layout
        self.experts: int = manifest["experts"]["n_routed_experts"]
        self.layers: tuple[int, ...] = tuple(manifest["experts"]["layers"])
        self._codecs = manifest_codecs(manifest)
        self._levels = {name: levels_of(codec) for name, codec in self._codecs.items()}
        self._handles: dict[str, int] = {}
        self._predictor = next(filter(is_predictor, manifest["files"]), None)
        self._parts = {
            name: tensor_parts(entry)
            for name, entry in manifest["files"].items()
            if name in (RESIDENT, self._predictor)
        }
        sizes = {
            name: sum(part.nbytes for part in parts.values()) for name, parts in self._parts.items()
        }
        self.resident_bytes = sizes[RESIDENT]  # of all resident tensors
        self.predictor_bytes = sizes.get(self._predictor, 0)  # of all the predictor's tensors
        # ``slotmoe synth`` made it: such an export has no source files.
        self.random_weights = not manifest["source"]["files"]
        self._direct = False

    @classmethod
    def open(cls, path: str | Path) -> "Export":
        """Open the export in folder ``path``; raises ``ExportError`` naming a file that is damaged
        or does not belong there."""
        folder = Path(path)
        manifest = read_manifest(folder)
        refuse_unlisted(folder, manifest)
        export = cls(folder, manifest, manifest_layout(manifest))
        try:
            export._verify_files()
        except BaseException:
            export.close()
            raise
        return export

    def _verify_files(self) -> None:
        files, linked = self.manifest["files"], self.manifest["experts"]["linked_layers"]
        for name in filter(files.__contains__, COPIED):
            self._open_file(name)
            self.small_file(name, MAX_COPIED_BYTES)
        for layer in self.layers:
            self._open_file(layer_file(layer))  # its size bounds the work that the header takes
            origin = linked.get(str(layer), layer)  # a hard link keeps its origin's names
            self._verify_header(layer_file(layer), layer_parts(origin, self.experts, self.layout))
        for name, parts in self._parts.items():
            self._open_file(name)
            self._verify_header(name, parts)

    def _error(self, name: str, what: str) -> ExportError:
        return ExportError(f"{self.folder / name}: {what}")

    def _open_file(self, name: str) -> None:
        """Open a file inside the folder and check its size."""
        try:
            handle = os.open(regular_file(self.folder, name), os.O_RDONLY)
        except OSError as problem:
            missing = isinstance(problem, FileNotFoundError)
            what = f"can't be opened ({problem.strerror})"
            raise self._error(name, what + "; the export is incomplete" * missing) from None
        self._handles[name] = handle
        size, expected = os.fstat(handle).st_size, self.manifest["files"][name]["bytes"]
        if size != expected:
            what = f"has {size} bytes, the manifest says {expected}"
            raise self._error(name, f"{what}; the file is truncated or not this export's")

    def _verify_header(self, name: str, parts: dict[str, Part]) -> None:
        """The header must be, byte for byte, what the format prescribes for this geometry."""
        header = safetensors_header(parts.items())
        entry = self.manifest["files"][name]
        start = bytearray(min(len(header), entry["bytes"]))
        self._read(name, 0, memoryview(start), "its header")
        if entry["header_bytes"] != len(header) or start != header:
            what = "its header is not the one that the manifest describes; quantize again"
            raise self._error(name, what)

    def _read(
        self, name: str, offset: int, data: memoryview, what: str, needed: int | None = None
    ) -> None:
        """Fill ``data``, or at least its first ``needed`` bytes, from one range of a file."""
        done, needed = 0, len(data) if needed is None else needed
        while done < needed:
            try:
                count = os.preadv(self._handles[name], [data[done:]], offset + done)
            except OSError as problem:
                failed = f"reading {what} failed ({problem.strerror})"
                raise self._error(name, failed) from None
            if self._direct and done + count < needed:
                count -= count % ALIGNMENT  # the next direct read has to be aligned again
            if count == 0:
                ends = f"ends inside {what}; the file was truncated while in use"
                raise self._error(name, ends)
            done += count

    def _verify(self, name: str, data: memoryview, expected: str, what: str) -> None:
        if checksum(data) != expected:
            wrong = f"checksum of {what} is wrong; the file is damaged, quantize it again"
            raise self._error(name, wrong)

    def small_file(self, name: str, limit: int) -> bytes | None:
        """The content of ``config.json`` or another file that was copied from the source, verified;
        None if the export has none.  Raises ``ExportError``, also for more than ``limit`` bytes."""
        if (entry := self.manifest["files"].get(name)) is None:
            return None
        if (size := entry["bytes"]) > limit:
            raise self._error(name, f"has {size} bytes, more than {limit}; not a real model's file")
        data = bytearray(size)
        self._read(name, 0, memoryview(data), "the file")
        if checksum(data) != entry["checksum"]:
            what = "its checksum is not the manifest's; the file was changed or damaged"
            raise self._error(name, what)
        return bytes(data)

    def bypass_page_cache(self) -> bool:
        """Read records and resident tensors past the page cache from now on, into aligned memory;
        False if that is refused.  The cache would take memory from the slots."""
        handles = [self._handles[name] for name in (RESIDENT, *map(layer_file, self.layers))]
        self._direct = all(system.bypass_page_cache(handle, ALIGNMENT) for handle in handles)
        if not self._direct:
            for handle in handles:
                system.use_page_cache(handle)
        return self._direct

    def read_range(self, layer: int, expert: int, start: int, out: memoryview) -> None:
        """Fill ``out`` from byte ``start`` of a record on, unverified.  Raises ``ExportError``."""
        name = layer_file(layer)
        offset = self.manifest["files"][name]["header_bytes"] + start
        offset += expert * self.layout.record_bytes
        self._read(name, offset, out, f"layer {layer} expert {expert}")

    def verify_record(self, layer: int, expert: int, record: memoryview) -> None:
        """Raises ``ExportError`` unless ``record`` has the checksum that the manifest names."""
        name, what = layer_file(layer), f"layer {layer} expert {expert}"
        self._verify(name, record, self.manifest["files"][name]["records"][expert], what)

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Exactly dequantized weights of one routed expert: ``gate_proj`` and ``up_proj`` float32
        [I, H], ``down_proj`` float32 [H, I].  Raises ``ExportError`` if the export has no such
        expert or its record is damaged."""
        if layer not in self.layers or not 0 <= expert < self.experts:
            raise ExportError(f"{self.folder}: has no layer {layer} expert {expert}")
        record = _empty((self.layout.record_bytes,), torch.uint8)
        self.read_range(layer, expert, 0, record.numpy().data)
        self.verify_record(layer, expert, record.numpy().data)
        levels = self.layout.levels()
        weights = {name: self.layout.weight(record, name, levels) for name in PROJECTIONS}
        for name, weight in weights.items():
            self._check_scales(layer_file(layer), f"layer {layer} expert {expert} {name}", weight)
        return {name: weight.dequantize() for name, weight in weights.items()}

    def resident(self, name: str, empty: Empty = _empty) -> Tensor | Int8Weight | CodedWeight:
        """The verified weight ``name``, in memory from ``empty``.  Raises ``ExportError``."""
        parts = self._parts[RESIDENT]
        if name not in parts:
            what = f"has no tensor {name}; the export does not fit its config.json"
            raise self._error(RESIDENT, what)
        weight = self._tensor(RESIDENT, name, empty)
        coded = self.manifest["quantization"]["resident_codecs"].get(name)
        if coded is not None:
            codec, (N, K) = self._codecs[coded["codec"]], coded["shape"]
            _, scales_name = codec.tensors(name, N, K)
            scales = self._tensor(RESIDENT, scales_name, empty)
            coded_weight = CodedWeight(weight, scales, self._levels[codec.name], (N, K))
            self._check_scales(RESIDENT, name, coded_weight)
            return coded_weight
        if name + ".scale" in parts:
            return Int8Weight(weight, self._tensor(RESIDENT, name + ".scale", empty))
        return weight

    def _check_scales(self, file: str, what: str, weight: CodedWeight) -> None:
        if not possible_scales(weight.scales):
            problem = "has scales that are not finite, or zero where they can't be"
            raise self._error(file, f"{what} {problem}; quantize again")

    def _tensor(self, file: str, name: str, empty: Empty) -> Tensor:
        part, entry = self._parts[file][name], self.manifest["files"][file]
        start = entry["header_bytes"] + part.offset
        before = start % ALIGNMENT  # direct reads begin and end at multiples of 4096, tensors don't
        raw = empty((-(-(before + part.nbytes) // ALIGNMENT) * ALIGNMENT,), torch.uint8)
        self._read(file, start - before, raw.numpy().data, name, before + part.nbytes)
        out = raw[before : before + part.nbytes]
        self._verify(file, out.numpy().data, entry["tensors"][name]["checksum"], name)
        return out.view(part.dtype).view(part.shape)

    def predictor(self) -> dict[str, Tensor] | None:
        """The verified tensors of ``predictor_parts``, or None.  Raises ``ExportError``."""
        if self._predictor is None:
            return None
        tensors = {}
        for name in self._parts[self._predictor]:
            tensors[name] = self._tensor(self._predictor, name, _empty)
            if not tensors[name].isfinite().all():
                raise self._error(self._predictor, f"{name} is not finite; calibrate again")
        return tensors

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __enter__(self) -> "Export":
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

"""``Export``: an open export, whose tensors and records are verified whenever they are read."""

import math
import mmap
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from slotmoe import system
from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json
from slotmoe.network.state import Empty
from slotmoe.quant.codecs.codec import manifest_codecs
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, levels_of, possible_scales
from slotmoe.quant.export import layout
from slotmoe.quant.export import manifest as manifests
from slotmoe.quant.export.manifest import regular_file
from slotmoe.quant.shapes import ALIGNMENT, padded


class Folder:
    """Files of an export in folder ``path``: the export's own, or a copy of its folder ``inside``.
    ``entries`` are the manifest's, by name.  Raises ``ExportError`` naming the file."""

    def __init__(self, path: Path, entries: Mapping[str, Json], inside: str = ""):
        self.path, self._entries, self._inside = path, entries, inside
        self._handles: dict[str, int] = {}
        self._direct = False

    def path_of(self, name: str) -> Path:
        return self.path / name.removeprefix(self._inside)

    def error(self, name: str, what: str) -> ExportError:
        return ExportError(f"{self.path_of(name)}: {what}")

    def open_file(self, name: str) -> None:
        """Open a file inside the folder and check its size."""
        try:
            path = regular_file(self.path, name.removeprefix(self._inside))
            handle = system.open_file(path, os.O_RDONLY)
            system.use_page_cache(handle)
        except OSError as problem:
            what = f"can't be opened ({problem.strerror})"
            if isinstance(problem, FileNotFoundError):
                copied = f"--experts-dir takes a copy of the export's {self._inside}"
                what += f"; {copied if self._inside else 'the export is incomplete'}"
            raise self.error(name, what) from None
        self._handles[name] = handle
        size, expected = os.fstat(handle).st_size, self._entries[name]["bytes"]
        if size != expected:
            what = f"has {size} bytes, the manifest says {expected}"
            raise self.error(name, f"{what}; the file is truncated or not this export's")

    def verify_header(self, name: str, parts: dict[str, layout.Part]) -> None:
        """The header must be, byte for byte, what the format prescribes for this geometry."""
        header = layout.safetensors_header(parts.items())
        entry = self._entries[name]
        start = bytearray(min(len(header), entry["bytes"]))
        self.read(name, 0, memoryview(start), "its header")
        if entry["header_bytes"] != len(header) or start != header:
            what = "its header is not the one that the manifest describes; quantize again"
            raise self.error(name, what)

    def read(
        self, name: str, offset: int, data: memoryview, what: str, needed: int | None = None
    ) -> None:
        """Fill ``data``, or at least its first ``needed`` bytes, from one range of a file."""
        done, needed = 0, len(data) if needed is None else needed
        while done < needed:
            try:
                count = system.read_at(self._handles[name], data[done:], offset + done)
            except OSError as problem:
                raise self.error(name, f"reading {what} failed ({problem.strerror})") from None
            if self._direct and done + count < needed:
                count -= count % ALIGNMENT  # the next direct read has to be aligned again
            if count == 0:
                raise self.error(name, f"ends inside {what}; the file was truncated while in use")
            done += count

    def bypass_page_cache(self, names: Iterable[str]) -> bool:
        """Read these files past the page cache from now on; False if that is refused."""
        handles = [self._handles[name] for name in names if name in self._handles]
        self._direct = all(system.bypass_page_cache(handle, ALIGNMENT) for handle in handles)
        if not self._direct:
            for handle in handles:
                system.use_page_cache(handle)
        return self._direct

    def close(self) -> None:
        while self._handles:
            os.close(self._handles.popitem()[1])


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-aligned memory, as direct reads need it."""
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class Export(AbstractContextManager["Export"]):
    """An open export.  Reads are thread-safe; close it or use it as a context manager.  ``folders``
    hold the experts' files: the export's own first, then copies."""

    def __init__(self, folder: Path, manifest: Json, experts_dirs: Sequence[Path]):
        files, inside = manifest["files"], f"{layout.EXPERTS}/"
        self._own = Folder(folder, files)
        self.folders = [self._own, *(Folder(path, files, inside) for path in experts_dirs)]
        self.folder, self.manifest = folder, manifest
        self.layout = manifests.manifest_layout(manifest)
        self.experts: int = manifest["experts"]["n_routed_experts"]
        self.layers: tuple[int, ...] = tuple(manifest["experts"]["layers"])
        self.mtp_layer: int | None = manifest["experts"].get("mtp_layer")  # the last, if kept
        self._codecs = manifest_codecs(manifest)
        self._levels = {name: levels_of(codec) for name, codec in self._codecs.items()}
        self._parts = layout.tensor_parts(files[layout.RESIDENT])
        # ``slotmoe synth`` made it: such an export has no source files.
        self.random_weights = not manifest["source"]["files"]

    @classmethod
    def open(cls, path: str | Path, experts_dirs: Sequence[Path] = ()) -> "Export":
        """Open the export in folder ``path``, and ``experts_dirs``, copies of its ``experts`` on
        other drives.  ``ExportError`` names a file that is damaged or foreign."""
        folder = Path(path)
        manifest = manifests.read_manifest(folder)
        manifests.refuse_unlisted(folder, manifest)
        export = cls(folder, manifest, experts_dirs)
        try:
            export._verify_files()
        except BaseException:
            export.close()
            raise
        return export

    def _verify_files(self) -> None:
        files, linked = self.manifest["files"], self.manifest["experts"]["linked_layers"]
        for name in filter(files.__contains__, layout.COPIED):
            self._own.open_file(name)
            self.small_file(name, manifests.MAX_COPIED_BYTES)
        for layer in self.layers:
            name, origin = layout.layer_file(layer), linked.get(str(layer), layer)
            for folder in self.folders:
                folder.open_file(name)  # its size bounds the work that the header takes
                # A hard link keeps its origin's names.
                folder.verify_header(name, layout.layer_parts(origin, self.experts, self.layout))
        self._own.open_file(layout.RESIDENT)
        self._own.verify_header(layout.RESIDENT, self._parts)

    def _verify(self, name: str, data: memoryview, expected: str, what: str) -> None:
        if layout.checksum(data) != expected:
            wrong = f"checksum of {what} is wrong; the file is damaged, quantize it again"
            raise self._own.error(name, wrong)

    def small_file(self, name: str, limit: int) -> bytes | None:
        """The content of ``config.json`` or another file that was copied from the source, verified;
        None if the export has none.  Raises ``ExportError``, also for more than ``limit`` bytes."""
        if (entry := self.manifest["files"].get(name)) is None:
            return None
        if (size := entry["bytes"]) > limit:
            what = f"has {size} bytes, more than {limit}; not a real model's file"
            raise self._own.error(name, what)
        data = bytearray(size)
        self._own.read(name, 0, memoryview(data), "the file")
        if layout.checksum(data) != entry["checksum"]:
            what = "its checksum is not the manifest's; the file was changed or damaged"
            raise self._own.error(name, what)
        return bytes(data)

    def bypass_page_cache(self) -> bool:
        """Read records and resident tensors past the page cache from now on, into aligned memory;
        False if a folder refuses that.  The cache would take memory from the slots."""
        names = (layout.RESIDENT, *map(layout.layer_file, self.layers))
        refused = [folder for folder in self.folders if not folder.bypass_page_cache(names)]
        return not refused

    def read_range(
        self, layer: int, expert: int, start: int, out: memoryview, folder: int = 0
    ) -> None:
        """Fill ``out`` from byte ``start`` of a record on, unverified.  Raises ``ExportError``."""
        name = layout.layer_file(layer)
        offset = self.manifest["files"][name]["header_bytes"] + start
        offset += expert * self.layout.record_bytes
        self.folders[folder].read(name, offset, out, f"layer {layer} expert {expert}")

    def verify_record(self, layer: int, expert: int, record: memoryview) -> None:
        """Raises ``ExportError`` unless ``record`` has the checksum that the manifest names."""
        name, what = layout.layer_file(layer), f"layer {layer} expert {expert}"
        self._verify(name, record, self.manifest["files"][name]["records"][expert], what)

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Exactly dequantized weights of one routed expert: ``gate_proj`` and ``up_proj`` float32
        [I, H], ``down_proj`` float32 [H, I], and ``gate_proj.bias`` and so on where there are
        biases.  Raises ``ExportError`` if the export has no such expert or its record is damaged.
        """
        if layer not in self.layers or not 0 <= expert < self.experts:
            raise ExportError(f"{self.folder}: has no layer {layer} expert {expert}")
        record = _empty((self.layout.record_bytes,), torch.uint8)
        self.read_range(layer, expert, 0, record.numpy().data)
        self.verify_record(layer, expert, record.numpy().data)
        levels, view = self.layout.levels(), self.layout.weight
        weights = {name: view(record, name, levels) for name in layout.PROJECTIONS}
        for name, weight in weights.items():
            what = f"layer {layer} expert {expert} {name}"
            self._check_scales(layout.layer_file(layer), what, weight.scales)
        biases = {name: self.layout.part(record, name) for name in self.layout.bias_shapes}
        return {name: weight.dequantize() for name, weight in weights.items()} | biases

    def resident(self, name: str, empty: Empty = _empty) -> Tensor | Int8Weight | CodedWeight:
        """The verified weight ``name``, in memory from ``empty``.  Raises ``ExportError``."""
        if name not in self._parts:
            what = f"has no tensor {name}; the export does not fit its config.json"
            raise self._own.error(layout.RESIDENT, what)
        weight = self._tensor(name, empty)
        if coded := self.manifest["quantization"]["resident_codecs"].get(name):
            codec, (N, K) = self._codecs[coded["codec"]], coded["shape"]
            _, scales_name = codec.tensors(name, N, K)
            scales = self._tensor(scales_name, empty)
            self._check_scales(layout.RESIDENT, name, scales)
            return CodedWeight(weight, scales, self._levels[codec.name], (N, K))
        if name + ".scale" in self._parts:
            return Int8Weight(weight, self._tensor(name + ".scale", empty))
        return weight

    def _check_scales(self, file: str, what: str, scales: Tensor) -> None:
        if not possible_scales(scales):
            problem = "has scales that are not finite, or zero where they can't be"
            raise self._own.error(file, f"{what} {problem}; quantize again")

    def _tensor(self, name: str, empty: Empty) -> Tensor:
        part, entry = self._parts[name], self.manifest["files"][layout.RESIDENT]
        start = entry["header_bytes"] + part.offset
        before = start % ALIGNMENT  # direct reads begin and end at multiples of 4096, tensors don't
        raw = empty((padded(before + part.nbytes),), torch.uint8)
        self._own.read(
            layout.RESIDENT, start - before, raw.numpy().data, name, before + part.nbytes
        )
        out = raw[before : before + part.nbytes]
        self._verify(layout.RESIDENT, out.numpy().data, entry["tensors"][name]["checksum"], name)
        return out.view(part.dtype).view(part.shape)

    def close(self) -> None:
        for folder in self.folders:
            folder.close()

    def __exit__(self, *problem: object) -> None:
        self.close()

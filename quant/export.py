"""The export: an artifact that loads fast, because one expert is one aligned byte range with a checksum of its own.

    DST/
      config.json, tokenizer.json, ...       copied from the source
      slotmoe.json                           the manifest: everything below, and a checksum over itself
      resident.safetensors                   all but the routed experts, under the source's tensor names
      experts/layer-00001.safetensors ...    one per MoE layer, one record per expert
      predictor-0123456789abcdef.safetensors optional: trained guesses of experts, 16 digits of its checksum in the name

A record is, byte for byte (matrices in the ``tiles16`` layout of ``quant.nf4``; gate and up are [I, H], down is [H, I]):

    gate_proj.weight codes, up_proj.weight codes, down_proj.weight codes        U8
    gate_proj.weight.absmax, up_proj.weight.absmax, down_proj.weight.absmax     F16
    pad, zeros up to the next multiple of 4096                                  U8

The predictor (``offload.predictor`` computes with it; L MoE layers in order, E experts, R and Q widths of its choice) has
these tensors; the two ``.weight`` of a horizon are int8 with a float32 scale per row, ``w[..., n, k] = q * scale[..., n]``:

    token.in.weight I8 [R, 2 H]      token.in.weight.scale F32 [R]       token.in.bias F32 [R]
    token.out.weight I8 [L E, R]     token.out.weight.scale F32 [L E]    token.out.bias F32 [L E]
    layer.in.weight I8 [L-1, Q, H]   layer.in.weight.scale F32 [L-1, Q]  layer.in.bias F32 [L-1, Q]
    layer.out.weight I8 [L-1, E, Q]  layer.out.weight.scale F32 [L-1, E] layer.out.bias F32 [L-1, E]
    layer.mix F32 [L-1, 3]           popularity F32 [L E], uses of an expert per token

With one MoE layer there is no ``layer`` tensor.  Data starts at a multiple of 4096, F32 tensors first, each group in the
order above (weight, scale, bias from left to right, line by line), without holes.  The manifest, replaced by one rename,
names the file that counts; another of that pattern is a leftover of a killed run.

``quantization.report`` in the manifest is optional and for people: what quantization cost, by tensor family, as
``offload.report`` defines it.  An object of ``weights`` (count), ``bits_per_weight`` (of all, with padding) and ``families``,
a list of ``family``, ``stored`` (nf4, int8, bf16, fp16 or fp32), ``weights``, ``bits_per_weight``, ``relative_rms_error``,
``by_layer`` (layer -> the same error; empty if exact or in no layer) and ``worst_layer`` (a layer or null).

Records follow each other from the end of the header, which is padded with spaces to a multiple of 4096.  Sizes, headers
and small files are verified at open; a resident tensor's and a record's checksum (xxh3-128) whenever it is read.
Shape legend: I moe_intermediate_size, H hidden_size, N rows out, K columns in.
"""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import xxhash
from torch import Tensor

from quant.int8 import Int8Weight
from quant.nf4 import Nf4Weight, dequantize
from quant.sizes import ALIGNMENT, BLOCK, absmax_shape, codes_shape
from slotmoe import ExportError, read_json

FORMAT_VERSION = 1
MANIFEST, RESIDENT = "slotmoe.json", "resident.safetensors"
COPIED = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
MAX_PREDICTOR_WIDTH = 1 << 14
_PREDICTOR = re.compile(r"predictor-[0-9a-f]{16}\.safetensors")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
MAX_MANIFEST_BYTES = 8 << 20
MAX_COPIED_BYTES = 16 << 20  # DeepSeek-V2's tokenizer.json has 4.6 MB
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
Empty = Callable[[tuple[int, ...], torch.dtype], Tensor]
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Page-aligned memory, as direct reads need it."""
    return torch.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).view(shape)


def layer_file(layer: int) -> str:
    """Name inside the export of one layer's experts."""
    return f"experts/layer-{layer:05d}.safetensors"


def checksum(data: Any) -> str:
    """xxh3-128 of a buffer, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class Part:
    """One tensor of a record or of the resident file: its place (bytes from the record's or data's start)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        total = self.dtype.itemsize
        for size in self.shape:
            total *= size
        return total


class RecordLayout:
    """Where the parts of an expert's record are, for ``hidden_size`` H and ``moe_intermediate_size`` I."""

    def __init__(self, hidden_size: int, moe_intermediate_size: int):
        self.hidden_size, self.moe_intermediate_size = hidden_size, moe_intermediate_size
        width, hidden = moe_intermediate_size, hidden_size
        self.shapes = {"gate_proj": (width, hidden), "up_proj": (width, hidden), "down_proj": (hidden, width)}
        self.parts: dict[str, Part] = {}
        offset = 0
        for name, shape in self.shapes.items():
            self.parts[name + ".weight"] = part = Part(torch.uint8, codes_shape(*shape), offset)
            offset += part.nbytes
        for name, shape in self.shapes.items():
            self.parts[name + ".weight.absmax"] = part = Part(torch.float16, absmax_shape(*shape), offset)
            offset += part.nbytes
        self.payload_bytes = offset
        self.record_bytes = -(-offset // ALIGNMENT) * ALIGNMENT
        if self.record_bytes > offset:
            self.parts["pad"] = Part(torch.uint8, (self.record_bytes - offset,), offset)

    def describe(self) -> dict[str, Any]:
        """The parts as the manifest holds them."""
        return {name: {"offset": part.offset, "bytes": part.nbytes, "shape": list(part.shape)} for name, part in self.parts.items()}

    def part(self, record: Tensor, name: str) -> Tensor:
        """View of part ``name`` in a record (uint8 [record_bytes], on any device)."""
        part = self.parts[name]
        return record[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)

    def weight(self, record: Tensor, projection: str, levels: Tensor) -> Nf4Weight:
        """One projection of the expert in ``record``, as a view."""
        codes, absmax = self.part(record, f"{projection}.weight"), self.part(record, f"{projection}.weight.absmax")
        return Nf4Weight(codes, absmax, levels, self.shapes[projection])


def resident_parts(name: str, shape: tuple[int, ...], quantization: str, dtype: torch.dtype) -> dict[str, Part]:
    """Tensors of the resident file that hold the weight ``name``; offsets are not assigned yet (0).

    ``quantization`` is ``none`` (as in the source, ``dtype``), ``int8`` or ``nf4``; the last two need a matrix.
    """
    if quantization == "int8":
        return {name: Part(torch.int8, shape, 0), name + ".scale": Part(torch.float32, shape[:1], 0)}
    if quantization == "nf4":
        N, K = shape
        return {
            name: Part(torch.uint8, codes_shape(N, K), 0),
            name + ".absmax": Part(torch.float16, absmax_shape(N, K), 0),
        }
    return {name: Part(dtype, shape, 0)}


def predictor_parts(D: int, L: int, E: int, R: int, Q: int) -> dict[str, Part]:
    """Tensors of the predictor's file for hidden size ``D``, ``L`` MoE layers of ``E`` experts and widths ``R`` and ``Q``."""
    parts: dict[str, Part] = {}
    shapes = {"token.in": (R, 2 * D), "token.out": (L * E, R), "layer.in": (L - 1, Q, D), "layer.out": (L - 1, E, Q)}
    for name, shape in shapes.items():
        parts[name + ".weight"] = Part(torch.int8, shape, 0)
        parts[name + ".weight.scale"] = parts[name + ".bias"] = Part(torch.float32, shape[:-1], 0)
    parts["layer.mix"] = Part(torch.float32, (L - 1, 3), 0)
    parts["popularity"] = Part(torch.float32, (L * E,), 0)
    return {name: part for name, part in parts.items() if part.nbytes}


def is_predictor(name: str) -> bool:
    """Whether a file of the export's folder is a predictor, in use or left over."""
    return _PREDICTOR.fullmatch(name) is not None


def place(parts: dict[str, Part]) -> dict[str, Part]:
    """Assign offsets without holes, widest dtype first, so that every tensor is aligned to its own element size."""
    placed, offset = {}, 0
    for name, part in sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize):
        placed[name] = Part(part.dtype, part.shape, offset)
        offset += part.nbytes
    return placed


def safetensors_header(parts: Iterable[tuple[str, Part]]) -> bytes:
    """Length prefix and JSON header of a safetensors file, padded with spaces to a multiple of 4096 bytes."""
    entries = {
        name: {
            "dtype": _DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [part.offset, part.offset + part.nbytes],
        }
        for name, part in parts
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def layer_parts(layer: int, experts: int, layout: RecordLayout) -> dict[str, Part]:
    """Tensors of the file that holds the records of ``layer``, in the order of the file; offsets from the data's start."""
    parts = {}
    for expert in range(experts):
        start = expert * layout.record_bytes
        for name, part in layout.parts.items():
            parts[f"model.layers.{layer}.mlp.experts.{expert}.{name}"] = Part(part.dtype, part.shape, start + part.offset)
    return parts


def layer_header(layer: int, experts: int, layout: RecordLayout) -> bytes:
    """Header of the file that holds the records of ``layer``."""
    return safetensors_header(layer_parts(layer, experts, layout).items())


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
        return {"bytes": size, "header_bytes": len(self._header), "header_checksum": checksum(self._header), **entry}

    def __enter__(self) -> Any:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        try:
            self._file.close()  # flushes, which fails again on a full disk
        finally:
            self._temporary.unlink(missing_ok=True)


class LayerWriter(_Writer):
    """Writes one layer's records in order of expert; a context manager that removes what was not committed."""

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
    """Writes the resident file's tensors (or the predictor's), each in pieces from its start, in any order of tensors."""

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
        return self._commit({"checksum": file_checksum(self._temporary), "tensors": describe_tensors(self._parts, checksums)})


def describe_tensors(parts: dict[str, Part], checksums: dict[str, str]) -> dict[str, Any]:
    """The tensors of a file as the manifest holds them."""
    return {
        name: {"dtype": _DTYPE_NAMES[part.dtype], "shape": list(part.shape), "checksum": checksums[name]} for name, part in parts.items()
    }


def tensor_parts(entry: dict[str, Any]) -> dict[str, Part]:
    """The tensors of a file's manifest entry and their places, from the data's start."""
    return place({name: Part(_DTYPES[item["dtype"]], tuple(item["shape"]), 0) for name, item in entry["tensors"].items()})


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


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Checksum over every value of the manifest but the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def write_predictor(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Give the export in ``folder`` a predictor with the ``tensors`` of ``predictor_parts`` and return its new manifest.

    The new file has a name of its own, so the rename of the manifest is the one moment in which it replaces the old one.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)  # two at once must not remove each other's file
        manifest = read_manifest(folder)
        parts = place({name: Part(tensor.dtype, tuple(tensor.shape), 0) for name, tensor in tensors.items()})
        described = {name: {"dtype": _DTYPE_NAMES[part.dtype], "shape": list(part.shape), "checksum": ""} for name, part in parts.items()}
        _check_predictor(described, manifest["experts"])
        name = f"predictor-{checksum(b''.join(tensors[part].numpy().tobytes() for part in parts))[:16]}.safetensors"
        with ResidentWriter(folder, parts, name) as writer:
            for part in parts:
                writer.write(part, tensors[part])
            entry = writer.commit()
        files = {old: entry for old, entry in manifest["files"].items() if not is_predictor(old)} | {name: entry}
        manifest["files"] = dict(sorted(files.items()))
        manifest["checksum"] = manifest_checksum(manifest)
        write_json(folder / MANIFEST, manifest)
        for path in folder.iterdir():
            if is_predictor(path.name.removesuffix(".tmp")) and path.name != name:
                path.unlink()
    finally:
        os.close(handle)
    return manifest


class Export:
    """An open export.  Reads are thread-safe; close it or use it as a context manager."""

    def __init__(self, folder: Path, manifest: dict[str, Any], layout: RecordLayout):
        self.folder, self.manifest, self.layout = folder, manifest, layout
        self.experts: int = manifest["experts"]["n_routed_experts"]
        self.layers: tuple[int, ...] = tuple(manifest["experts"]["layers"])
        self.levels = torch.tensor(manifest["quantization"]["levels"], dtype=torch.float32)
        self._files: dict[str, int] = {}
        self._resident_parts = tensor_parts(manifest["files"][RESIDENT])
        self._resident_start, self._direct = 0, False
        self._predictor = next(filter(is_predictor, manifest["files"]), None)

    @classmethod
    def open(cls, path: str | Path) -> Export:
        """Open the export in folder ``path``; raises ``ExportError`` naming the file that is damaged or missing."""
        folder = Path(path)
        manifest = read_manifest(folder)
        export = cls(folder, manifest, manifest_layout(manifest))
        try:
            export._verify_files()
        except BaseException:
            export.close()
            raise
        return export

    def _verify_files(self) -> None:
        for name in COPIED:
            path, entry = self.folder / name, self.manifest["files"].get(name)
            if entry is None:
                continue
            self._open_file(name)
            if file_checksum(path) != entry["checksum"]:
                raise ExportError(f"{path}: its checksum is not the manifest's; the file was changed or damaged")
        for layer in self.layers:
            self._open_file(layer_file(layer))  # its size bounds the work that the header takes
            named = self.manifest["experts"]["linked_layers"].get(str(layer), layer)  # a hard link keeps its origin's names
            header = layer_header(named, self.experts, self.layout)
            self._verify_header(layer_file(layer), header)
        self._open_file(RESIDENT)
        header = safetensors_header(self._resident_parts.items())
        self._verify_header(RESIDENT, header)
        self._resident_start = len(header)
        if self._predictor is not None:
            self._open_file(self._predictor)
            self._verify_header(self._predictor, safetensors_header(self._predictor_parts().items()))

    def _open_file(self, name: str) -> None:
        """Open one of the format's own files, inside the folder and of the size that the manifest names."""
        path = regular_file(self.folder, name)
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError as problem:
            raise ExportError(f"{path}: can't be opened ({problem.strerror}); the export is incomplete") from None
        self._files[name] = handle
        found, wanted = os.fstat(handle).st_size, self.manifest["files"][name]["bytes"]
        if found != wanted:
            raise ExportError(f"{path}: has {found} bytes, the manifest says {wanted}; the file is truncated or not this export's")

    def _verify_header(self, name: str, header: bytes) -> None:
        """The header must be, byte for byte, what the format prescribes for this geometry."""
        if self.manifest["files"][name]["header_bytes"] != len(header) or os.pread(self._files[name], len(header), 0) != header:
            raise ExportError(f"{self.folder / name}: its header is not the one that the manifest describes; quantize again")

    def _read(self, name: str, offset: int, data: memoryview, what: str, needed: int | None = None) -> None:
        """Fill ``data``, or at least its first ``needed`` bytes, from one range of a file.  Raises ``ExportError``."""
        done, needed = 0, len(data) if needed is None else needed
        while done < needed:
            try:
                count = os.preadv(self._files[name], [data[done:]], offset + done)
            except OSError as problem:
                raise ExportError(f"{self.folder / name}: reading {what} failed ({problem.strerror})") from None
            if self._direct and done + count < needed:
                count -= count % ALIGNMENT  # the next direct read has to be aligned again
            if count == 0:
                raise ExportError(f"{self.folder / name}: ends inside {what}; the file was truncated while in use")
            done += count

    def _verify(self, name: str, data: memoryview, wanted: str, what: str) -> None:
        if checksum(data) != wanted:
            raise ExportError(f"{self.folder / name}: checksum of {what} is wrong; the file is damaged, quantize it again")

    def bypass_page_cache(self) -> bool:
        """Read records and resident tensors with ``O_DIRECT`` from now on, into page-aligned memory; False if that is refused.

        A model larger than memory gains nothing from the page cache, which would take memory from the slots.
        """
        handles = [self._files[name] for name in (RESIDENT, *map(layer_file, self.layers))]
        flag, probe = getattr(os, "O_DIRECT", 0), mmap.mmap(-1, ALIGNMENT)
        try:
            for handle in handles:
                fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) | flag)
                os.preadv(handle, [probe], 0)
            self._direct = flag != 0
        except OSError:
            for handle in handles:
                fcntl.fcntl(handle, fcntl.F_SETFL, fcntl.fcntl(handle, fcntl.F_GETFL) & ~flag)
        return self._direct

    def read_range(self, layer: int, expert: int, start: int, out: memoryview) -> None:
        """Fill ``out`` from byte ``start`` on of one expert's record.  Raises ``ExportError``; verifies nothing."""
        name = layer_file(layer)
        offset = self.manifest["files"][name]["header_bytes"] + expert * self.layout.record_bytes + start
        self._read(name, offset, out, f"layer {layer} expert {expert}")

    def verify_record(self, layer: int, expert: int, record: memoryview) -> None:
        """Raises ``ExportError`` unless ``record`` has the checksum that the manifest names."""
        name = layer_file(layer)
        self._verify(name, record, self.manifest["files"][name]["records"][expert], f"layer {layer} expert {expert}")

    def expert(self, layer: int, expert: int) -> dict[str, Tensor]:
        """Exactly dequantized weights of one routed expert: ``gate_proj`` and ``up_proj`` float32 [I, H], ``down_proj``
        float32 [H, I].  Raises ``ExportError`` if the export has no such expert or its record is damaged."""
        if layer not in self.layers or not 0 <= expert < self.experts:
            raise ExportError(f"{self.folder}: has no layer {layer} expert {expert}")
        record = torch.frombuffer(mmap.mmap(-1, self.layout.record_bytes), dtype=torch.uint8)
        self.read_range(layer, expert, 0, record.numpy().data)
        self.verify_record(layer, expert, record.numpy().data)
        return {name: dequantize(self.layout.weight(record, name, self.levels)) for name in PROJECTIONS}

    def resident(self, name: str, empty: Empty = _empty) -> Tensor | Int8Weight | Nf4Weight:
        """The resident weight ``name`` (the source's tensor name), read into page-aligned memory from ``empty`` and verified."""
        if name + ".scale" in self._resident_parts:
            return Int8Weight(self._tensor(name, empty), self._tensor(name + ".scale", empty))
        if name + ".absmax" in self._resident_parts:
            N, K = self.manifest["quantization"]["resident_shapes"][name]
            return Nf4Weight(self._tensor(name, empty), self._tensor(name + ".absmax", empty), self.levels, (N, K))
        return self._tensor(name, empty)

    def _tensor(self, name: str, empty: Empty) -> Tensor:
        if name not in self._resident_parts:
            raise ExportError(f"{self.folder / RESIDENT}: has no tensor {name}; the export does not fit its config.json")
        part = self._resident_parts[name]
        start = self._resident_start + part.offset
        before = start % ALIGNMENT  # direct reads begin and end at multiples of 4096, tensors don't
        raw = empty((-(-(before + part.nbytes) // ALIGNMENT) * ALIGNMENT,), torch.uint8)
        self._read(RESIDENT, start - before, raw.numpy().data, name, before + part.nbytes)
        out = raw[before : before + part.nbytes]
        self._verify(RESIDENT, out.numpy().data, self.manifest["files"][RESIDENT]["tensors"][name]["checksum"], name)
        return out.view(part.dtype).view(part.shape)

    def _predictor_parts(self) -> dict[str, Part]:
        assert self._predictor is not None
        return tensor_parts(self.manifest["files"][self._predictor])

    def predictor(self) -> dict[str, Tensor] | None:
        """The tensors of ``predictor_parts``, read and verified, or None.  Raises ``ExportError`` naming a damaged file."""
        if self._predictor is None:
            return None
        entry, found = self.manifest["files"][self._predictor], {}
        for name, part in self._predictor_parts().items():
            found[name] = out = torch.empty(part.shape, dtype=part.dtype)
            data = out.view(-1).view(torch.uint8).numpy().data
            self._read(self._predictor, entry["header_bytes"] + part.offset, data, name)
            self._verify(self._predictor, data, entry["tensors"][name]["checksum"], name)
            if not out.isfinite().all():
                raise ExportError(f"{self.folder / self._predictor}: {name} is not finite; calibrate again")
        return found

    @property
    def predictor_bytes(self) -> int:
        """Bytes of all the predictor's tensors, 0 if there is none."""
        return 0 if self._predictor is None else sum(part.nbytes for part in self._predictor_parts().values())

    @property
    def resident_bytes(self) -> int:
        """Bytes of all resident tensors."""
        return sum(part.nbytes for part in self._resident_parts.values())

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __enter__(self) -> Export:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def regular_file(folder: Path, name: str) -> Path:
    """Path of ``name`` in ``folder``; raises ``ExportError`` for a link that leads elsewhere and for what is no file."""
    path = folder / name
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name):
        raise ExportError(f"{path}: is a link that leads elsewhere; copy the file itself here")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: is not a regular file; the export is damaged")
    return path


def manifest_layout(manifest: dict[str, Any]) -> RecordLayout:
    """Layout of the records that ``manifest`` describes."""
    return RecordLayout(manifest["experts"]["hidden_size"], manifest["experts"]["moe_intermediate_size"])


def _part(item: dict[str, Any]) -> Part:
    return Part(_DTYPES[item["dtype"]], tuple(item["shape"]), 0)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``, its values checked for type and range before anything uses them."""
    path = regular_file(folder, MANIFEST)
    if not path.exists():
        raise ExportError(f"{path}: is missing; {folder} is no finished export (slotmoe quantize SRC DST makes one)")
    manifest = read_json(path, MAX_MANIFEST_BYTES, ExportError)
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ExportError(f"{path}: format_version is {version!r:.40}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ExportError(f"{path}: format_version {version} is newer than this slotmoe reads ({FORMAT_VERSION}); upgrade slotmoe")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ExportError(f"{path}: its checksum is wrong; the manifest was changed or damaged, quantize again")
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ExportError(f"{path}: {problem.__class__.__name__} {str(problem)[:120]}; not a manifest that slotmoe wrote") from None
    return manifest


def _integer(value: Any, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{value!r:.40} is not an integer from {low} to {high}")
    return value


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _is_list(value: Any, kind: Any, length: int) -> bool:
    return isinstance(value, list) and len(value) == length and all(isinstance(item, kind) for item in value)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ``ValueError``, ``KeyError`` or ``TypeError`` unless the manifest has the structure that readers rely on."""
    quantization, experts, files = manifest["quantization"], manifest["experts"], manifest["files"]
    _require(quantization["layout"] == "tiles16", f"unknown layout {quantization['layout']!r:.40}")
    _require(quantization["block"] == BLOCK, f"unknown block {quantization['block']!r:.40}")
    levels = quantization["levels"]
    _require(_is_list(levels, int | float, 16) and all(abs(level) < 1e30 for level in levels), "levels are not 16 numbers")
    if "report" in quantization:
        _check_report(quantization["report"])
    for key, high in (("hidden_size", 1 << 20), ("moe_intermediate_size", 1 << 20), ("n_routed_experts", 4096)):
        _integer(experts[key], 1, high)
    layout = manifest_layout(manifest)
    _require(experts["record_bytes"] == layout.record_bytes and experts["record"] == layout.describe(), "the record layout is unknown")
    layers = experts["layers"]
    _require(_is_list(layers, int, len(layers)) and 0 < len(layers) <= 1000, "layers is not a list of layers")
    _require(all(_integer(layer, 0, 99999) >= 0 for layer in layers) and layers == sorted(set(layers)), "layers are not in order")
    for layer, origin in experts["linked_layers"].items():
        _require(layer.isdecimal() and origin in layers, "linked_layers names an unknown layer")
    allowed = {*COPIED, RESIDENT, *map(layer_file, layers)}
    predictors = [name for name in files if is_predictor(name)]
    _require(len(predictors) <= 1, "more than one predictor")
    _require(set(files) <= {*allowed, *predictors} and "config.json" in files, "files names something that is not part of the format")
    for name, entry in files.items():
        _integer(entry["bytes"], 0, MAX_COPIED_BYTES if name in COPIED else 1 << 50)
        _require(isinstance(entry["checksum"], str), "a checksum is not a string")
    for layer in layers:
        entry = files[layer_file(layer)]
        _require(_is_list(entry["records"], str, experts["n_routed_experts"]), "records are not one checksum an expert")
        _check_size(entry, experts["n_routed_experts"] * layout.record_bytes)
    _check_resident(files[RESIDENT]["tensors"], quantization["resident_shapes"])
    _check_size(files[RESIDENT], sum(_part(item).nbytes for item in files[RESIDENT]["tensors"].values()))
    for name in predictors:
        _check_size(files[name], _check_predictor(files[name]["tensors"], experts))


def _check_report(report: dict[str, Any]) -> None:
    """What quantization cost must have the documented keys and possible figures."""
    _require(set(report) == {"weights", "bits_per_weight", "families"}, "the report has other keys than its format")
    _integer(report["weights"], 1, 1 << 50)
    _number(report["bits_per_weight"], 256)
    keys = {"family", "stored", "weights", "bits_per_weight", "relative_rms_error", "worst_layer", "by_layer"}
    _require(_is_list(report["families"], dict, len(report["families"])), "the report's families are no list")
    for row in report["families"]:
        _require(set(row) == keys and isinstance(row["family"], str), "a family of the report has other keys than its format")
        _require(row["stored"] in ("nf4", "int8", "bf16", "fp16", "fp32"), f"unknown storage {row['stored']!r:.40} in the report")
        _integer(row["weights"], 1, 1 << 50)
        for figure, high in ((row["bits_per_weight"], 1 << 20), (row["relative_rms_error"], 1000)):
            _number(figure, high)
        for layer, error in row["by_layer"].items():
            _integer(int(layer), 0, 99999)
            _number(error, 1000)
        worst = row["worst_layer"]
        _require(not row["by_layer"] if worst is None else str(_integer(worst, 0, 99999)) in row["by_layer"], "worst_layer is no layer")


def _number(value: Any, high: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= high:
        raise ValueError(f"{value!r:.40} is not a number from 0 to {high}")


def _check_size(entry: dict[str, Any], data_bytes: int) -> None:
    header_bytes = _integer(entry["header_bytes"], ALIGNMENT, 1 << 30)
    _require(entry["bytes"] == header_bytes + data_bytes, f"{entry['bytes']!r:.40} bytes do not hold what a file should")


def _check_predictor(tensors: dict[str, Any], experts: dict[str, Any]) -> int:
    """Its tensors must have the dtypes and shapes that the model's geometry and two widths prescribe; returns their bytes."""
    L = len(experts["layers"])
    R = _integer(tensors["token.in.weight"]["shape"][0], 1, MAX_PREDICTOR_WIDTH)
    Q = _integer(tensors["layer.in.weight"]["shape"][1], 1, MAX_PREDICTOR_WIDTH) if L > 1 else 1
    expected = predictor_parts(experts["hidden_size"], L, experts["n_routed_experts"], R, Q)
    _require(set(tensors) == set(expected), "the predictor has other tensors than its format")
    for name, part in expected.items():
        item = tensors[name]
        _require(_is_list(item["shape"], int, len(part.shape)) and part == _part(item), f"{name} of the predictor has another shape")
        _require(isinstance(item["checksum"], str), f"{name} of the predictor has no checksum")
    return sum(part.nbytes for part in expected.values())


def _check_resident(tensors: dict[str, Any], nf4_shapes: dict[str, Any]) -> None:
    """Every weight must have the tensors, dtypes and shapes that its quantization prescribes: kernels trust them."""
    expected: dict[str, Part] = {}
    for name, item in tensors.items():
        shape, dtype = item["shape"], _DTYPES[item["dtype"]]
        _require(_is_list(shape, int, len(shape)) and 0 < len(shape) <= 3, f"{name:.80} has no shape")
        _require(all(_integer(size, 1, 1 << 31) for size in shape) and isinstance(item["checksum"], str), f"{name:.80} has no checksum")
        if name + ".scale" in tensors:
            _require(len(shape) == 2, f"{name:.80} is no matrix")
            expected |= resident_parts(name, tuple(shape), "int8", dtype)
        elif name + ".absmax" in tensors:
            N, K = nf4_shapes[name]
            expected |= resident_parts(name, (_integer(N, 1, 1 << 31), _integer(K, 1, 1 << 31)), "nf4", dtype)
        elif name not in expected:
            _require(dtype in (torch.bfloat16, torch.float16, torch.float32), f"{name:.80} has dtype {dtype}")
            expected |= resident_parts(name, tuple(shape), "none", dtype)
    for name, part in expected.items():
        _require(name in tensors and part == _part(tensors[name]), f"{name:.80} is not stored as its quantization prescribes")

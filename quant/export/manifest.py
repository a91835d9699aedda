"""The manifest of an export (docs/export-format.md), as types: read from a stranger, checked before
anything uses it."""

import json
import math
import os
from array import array
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct

from slotmoe.errors import ExportError
from slotmoe.jsonfile import Json, read_json, typed
from slotmoe.quant.codecs.codec import KINDS, SCALES, ExpertCodecs, manifest_codecs
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import COPIED, RESIDENT, Part, checksum, layer_file
from slotmoe.quant.shapes import FITTED_MODE, TABLE_NAME

_Size = Annotated[int, Meta(ge=1, le=1 << 31)]
_Width = Annotated[int, Meta(ge=1, le=1 << 20)]
_Layer = Annotated[int, Meta(ge=0, le=99999)]
_Weights = Annotated[int, Meta(ge=1, le=1 << 50)]
_Error = Annotated[float, Meta(ge=0, le=1000)]
_Matrix = Annotated[list[_Size], Meta(min_length=2, max_length=2)]
_Shape = Annotated[list[_Size], Meta(min_length=1, max_length=3)]
_Dtype = Literal["U8", "I8", "F8_E8M0", "I32", "F16", "BF16", "F32"]
_Level = Annotated[float, Meta(ge=-1e30, le=1e30)]
_Levels = Annotated[list[_Level], Meta(min_length=4, max_length=64)]
_Codec = TypedDict("_Codec", {"bits": int, "block": int, "scales": str, "levels": _Levels})
_Coded = TypedDict("_Coded", {"codec": str, "shape": _Matrix})
_Projections = TypedDict("_Projections", {"gate_up": str, "down": str})
_Tensor = TypedDict("_Tensor", {"dtype": _Dtype, "shape": _Shape, "checksum": str})


class _Source(Struct):
    files: Json
    stamps: dict[str, str] = {}
    weights: dict[str, str] = {}


class _Family(Struct, forbid_unknown_fields=True):
    family: str
    stored: str
    weights: _Weights
    bits_per_weight: Annotated[float, Meta(ge=0, le=1 << 20)]
    relative_rms_error: _Error
    worst_layer: _Layer | None
    by_layer: dict[str, _Error]
    relative_output_error: _Error = 0.0  # of calibrated weights alone


class _Report(Struct, frozen=True, forbid_unknown_fields=True):
    weights: _Weights = 1
    bits_per_weight: Annotated[float, Meta(ge=0, le=256)] = 0.0
    families: Annotated[list[_Family], Meta(min_length=0, max_length=1000)] = []


class Quantization(Struct):
    layout: Literal["tiles16"]
    codecs: dict[str, _Codec]
    experts: _Projections
    resident: Annotated[str, Meta(max_length=1 << 16, pattern=FITTED_MODE)]
    resident_codecs: dict[str, _Coded]
    report: _Report = _Report()
    calibration: str = ""
    calibration_threads: Annotated[int, Meta(ge=1, le=4096)] = 1


class ExpertsEntry(Struct):
    hidden_size: _Width
    moe_intermediate_size: _Width
    n_routed_experts: Annotated[int, Meta(ge=1, le=4096)]
    layers: Annotated[list[_Layer], Meta(min_length=1, max_length=1000)]
    linked_layers: dict[str, _Layer]
    record_bytes: int
    record: Json
    mtp_layer: _Layer = -1  # none


class File(Struct):
    bytes: Annotated[int, Meta(ge=0, le=1 << 50)]
    checksum: str
    header_bytes: Annotated[int, Meta(ge=4096, le=1 << 30)] = 4096
    header_checksum: str = ""
    records: list[str] = []
    tensors: dict[str, _Tensor] = {}


class Manifest(Struct):
    format_version: Literal[2]
    source: _Source
    quantization: Quantization
    experts: ExpertsEntry
    files: dict[str, File]


def typed_manifest(manifest: Json) -> Manifest:
    """A ``manifest`` that is as ``Manifest`` says, with codecs that readers know.  Raises
    ``ValueError``."""
    given = typed(manifest, Manifest)
    _check_codecs(given.quantization)
    return given


def _check_codecs(quantization: Quantization) -> None:
    """Every codec must be one that readers know, and every name of a codec one of these."""
    codecs, experts = quantization.codecs, quantization.experts
    for name, codec in codecs.items():
        what, bits, block = f"codec {name!r:.40}", codec["bits"], codec["block"]
        scales, levels = codec["scales"], codec["levels"]
        known = (bits, scales) in KINDS and block == SCALES[scales].block
        coding = f"{bits} bits with {scales:.20} scales for {block} columns"
        require(known, f"{what}: {coding} are unknown")
        require(len(levels) == 1 << bits, f"{what} has {len(levels)} levels for {bits} bits")
        numbers = [(level, math.copysign(1, level)) for level in array("f", levels)]
        ordered = all(low < high for low, high in pairwise(numbers))  # -0 before 0
        require(ordered, f"the levels of {what} are not in ascending order, each once")
        whole = bits <= 4 or levels == list(range(-1 << bits - 1, 1 << bits - 1))
        require(whole, f"the levels of {what} are not the whole numbers of {bits} bits")
    coded = {name: item["codec"] for name, item in quantization.resident_codecs.items()}
    for name, own in coded.items():  # kernels compute both in one go
        same = coded.get(name.replace("gate_proj", "up_proj"), own) == own
        require(same, f"{name:.80} and the up_proj beside it have different codecs")
    for name in [experts["gate_up"], experts["down"], *coded.values()]:
        require(name in codecs, f"codec {name!r:.40} is not in codecs")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


MAX_MANIFEST_BYTES = 8 << 20
MAX_COPIED_BYTES = 32 << 20  # the tokenizer.json of GLM-4.7 has 20 MB
UNLISTED = "is not in the manifest, so nothing vouches for it"
_PLAIN = ("int8", "bf16", "fp16", "fp32", "int32")


def manifest_checksum(manifest: Json) -> str:
    """Checksum over every value of the manifest but the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def regular_file(folder: Path, name: str) -> Path:
    """Path of ``name`` in ``folder``.  Raises ``ExportError`` for a link out of it or no file."""
    path = folder / name
    if Path(os.path.realpath(path)) != Path(os.path.realpath(folder), name):
        raise ExportError(f"{path}: is a link that leads elsewhere; copy the file itself here")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: is not a regular file; the export is damaged")
    return path


def manifest_layout(manifest: Json) -> layout.RecordLayout:
    """Layout of the records that ``manifest`` describes."""
    experts, codecs = manifest["experts"], ExpertCodecs.of_manifest(manifest)
    sizes = experts["hidden_size"], experts["moe_intermediate_size"]
    return layout.RecordLayout(*sizes, codecs, "down_proj.bias" in experts["record"])


def unlisted_files(folder: Path, manifest: Json) -> list[str]:
    """Names in the export that its manifest does not list, so that nothing vouches for them.

    Hidden files are none of ours, and kills leave temporary names.
    """
    paths = [*folder.iterdir(), *(folder / "experts").glob("*")]
    names = (path.relative_to(folder).as_posix() for path in paths if path.name != "experts")
    foreign = {*names} - {layout.MANIFEST, *manifest["files"]}
    return sorted(
        name for name in foreign if not name.endswith(".tmp") and not name.startswith(".")
    )


def refuse_unlisted(folder: Path, manifest: Json) -> None:
    """Raise ``ExportError`` for the first of ``unlisted_files``."""
    for name in unlisted_files(folder, manifest):
        raise ExportError(f"{folder / name}: {UNLISTED}; move it away")


def refuse_other_version(path: Path, manifest: Json) -> None:
    """Raise ``ExportError`` unless the ``manifest`` in the file ``path`` is of this version."""
    version = manifest.get("format_version")
    if version != layout.FORMAT_VERSION:
        expected = f"expected {layout.FORMAT_VERSION}"
        advice = "quantize the model again with this slotmoe, or use the slotmoe that made it"
        raise ExportError(f"{path}: has format_version {version!r:.40}, {expected}; {advice}")


def read_manifest(folder: Path) -> Json:
    """The manifest of ``folder``, checked for types and ranges.  Raises ``ExportError``."""
    path = regular_file(folder, layout.MANIFEST)
    if not path.exists():
        way_out = "slotmoe quantize SRC DST makes one"
        raise ExportError(f"{path}: is missing; {folder} is no finished export ({way_out})")
    manifest = read_json(path, MAX_MANIFEST_BYTES, Json, ExportError)
    refuse_other_version(path, manifest)
    if manifest.get("checksum") != manifest_checksum(manifest):
        what = "its checksum is wrong; the manifest was changed or damaged, quantize again"
        raise ExportError(f"{path}: {what}")
    try:
        _check_manifest(manifest, typed_manifest(manifest))
    except ValueError as problem:
        raise ExportError(f"{path}: {problem!s:.200}; not a manifest that slotmoe wrote") from None
    return manifest


def _check_manifest(manifest: Json, given: Manifest) -> None:
    """Raise unless the manifest, which ``given`` types, has what readers rely on."""
    _check_report(given.quantization)
    _check_experts(given.experts, record := manifest_layout(manifest))
    E, files = given.experts.n_routed_experts, manifest["files"]
    layer_files = list(map(layer_file, given.experts.layers))
    known = {*COPIED, RESIDENT, *layer_files}
    require(files.keys() <= known, "files names something that is not part of the format")
    for name in ("config.json", RESIDENT, *layer_files):
        require(name in files, f"files.{name} is missing")
    for name in files.keys() - COPIED:
        parts = "records" if name in layer_files else "tensors"
        for key in ("header_bytes", "header_checksum", parts):
            require(key in files[name], f"files.{name}.{key} is missing")
    for name in layer_files:
        count = len(files[name]["records"])
        require(count == E, f"files.{name} has {count} records for {E} experts")
    sizes = dict.fromkeys(layer_files, E * record.record_bytes)
    sizes[RESIDENT] = _check_resident(files[RESIDENT]["tensors"], manifest)
    for name, size in sizes.items():
        stated, whole = files[name]["bytes"], files[name]["header_bytes"] + size
        require(stated == whole, f"the {stated} bytes of {name} do not hold what it should")


def _check_experts(experts: ExpertsEntry, record: layout.RecordLayout) -> None:
    layers, described = experts.layers, (experts.record_bytes, experts.record)
    require(described == (record.record_bytes, record.describe()), "the record layout is unknown")
    require(layers == sorted(set(layers)), "layers are not in order")
    last = experts.mtp_layer < 0 or (len(layers) > 1 and experts.mtp_layer == layers[-1])
    require(last, "mtp_layer is not the last of several layers")
    for layer, origin in experts.linked_layers.items():
        require(layer.isdecimal() and origin in layers, "linked_layers names an unknown layer")


def _check_report(quantization: Quantization) -> None:
    for row in quantization.report.families:
        known = row.stored in (*_PLAIN, *quantization.codecs)
        require(known, f"unknown storage {row.stored!r:.40} in the report")
        require(all(map(str.isdecimal, row.by_layer)), "by_layer has what is no layer")
        worst = row.worst_layer
        is_worst = not row.by_layer if worst is None else str(worst) in row.by_layer
        require(is_worst, "worst_layer is no layer")


def _check_resident(tensors: Json, manifest: Json) -> int:
    """Every weight must have the tensors, dtypes and shapes that its quantization prescribes:
    kernels trust them.  Returns their bytes."""
    expected: dict[str, Part] = {}
    codecs, coded = manifest_codecs(manifest), manifest["quantization"]["resident_codecs"]
    for name, item in tensors.items():
        part = layout.part_of(item)
        if name in coded:
            shape, own = tuple(coded[name]["shape"]), codecs[coded[name]["codec"]]
            expected |= layout.resident_parts(name, shape, own, part.dtype)
        elif name + ".scale" in tensors:
            require(len(part.shape) == 2, f"{name:.80} is no matrix")
            expected |= layout.resident_parts(name, part.shape, "int8", part.dtype)
        elif name not in expected:
            fits = part.dtype.is_floating_point and part.dtype.itemsize > 1
            if name.endswith(TABLE_NAME):
                fits = part.dtype == layout.DTYPES["I32"]
            require(fits, f"{name:.80} has dtype {part.dtype}")
            expected |= layout.resident_parts(name, part.shape, "none", part.dtype)
    for name, part in expected.items():
        same = name in tensors and part == layout.part_of(tensors[name])
        require(same, f"{name:.80} of {RESIDENT} is not stored as the format prescribes")
    return sum(part.nbytes for part in expected.values())

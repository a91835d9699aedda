"""The manifest of an export: read from a stranger, checked before anything uses it."""

import json
import os
from itertools import pairwise
from pathlib import Path

import numpy as np

from slotmoe import jsonfile
from slotmoe.errors import ExportError
from slotmoe.jsonfile import TEXT, Json, ListOf, ObjectOf, check, integer, number, one_of
from slotmoe.quant.codecs import codec
from slotmoe.quant.codecs.codec import KINDS, SCALES, ExpertCodecs, manifest_codecs, to_version_2
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import COPIED, RESIDENT, Part, checksum, is_predictor, layer_file
from slotmoe.quant.shapes import ALIGNMENT, TABLE_NAME

MAX_MANIFEST_BYTES = 8 << 20
MAX_COPIED_BYTES = 32 << 20  # the tokenizer.json of GLM-4.7 has 20 MB
UNLISTED = "is not in the manifest, so nothing vouches for it"
_SIZE = integer(1, 1 << 31)
_LAYER = integer(0, 99999)
_ERROR = number(0, 1000)
_PLAIN = ("int8", "bf16", "fp16", "fp32", "int32")
_SHAPE = ListOf(_SIZE, 2, 2)
_LEVELS = ListOf(number(-1e30, 1e30), 8, 16)
_CODEC = {
    "bits": one_of(*sorted({bits for bits, _ in KINDS})),
    "block": integer(1, 1 << 20),
    "scales": one_of(*SCALES),
    "levels": _LEVELS,
}
_VERSION_1 = {"block": one_of(codec.BLOCK), "levels": _LEVELS, "resident_shapes": ObjectOf(_SHAPE)}
_MANIFEST = {
    "source": {"files": {}},
    "quantization": {
        "layout": one_of(codec.LAYOUT),
        "codecs": ObjectOf(_CODEC),
        "experts": {"gate_up": TEXT, "down": TEXT},
        "resident_codecs": ObjectOf({"codec": TEXT, "shape": _SHAPE}),
    },
    "experts": {
        "hidden_size": integer(1, 1 << 20),
        "moe_intermediate_size": integer(1, 1 << 20),
        "n_routed_experts": integer(1, 4096),
        "layers": ListOf(_LAYER, 1, 1000),
        "linked_layers": ObjectOf(_LAYER),
    },
    "files": {"config.json": {}, RESIDENT: {}},
}
_COPIED = {"bytes": integer(0, MAX_COPIED_BYTES), "checksum": TEXT}
_WEIGHTS = {
    "bytes": integer(0, 1 << 50),
    "checksum": TEXT,
    "header_bytes": integer(ALIGNMENT, 1 << 30),
    "header_checksum": TEXT,
}
_TENSOR = {"dtype": one_of(*layout.DTYPES), "shape": ListOf(_SIZE, 1, 3), "checksum": TEXT}
_TENSORS = {**_WEIGHTS, "tensors": ObjectOf(_TENSOR)}
_FAMILY = {
    "family": TEXT,
    "stored": TEXT,
    "weights": integer(1, 1 << 50),
    "bits_per_weight": number(0, 1 << 20),
    "relative_rms_error": _ERROR,
    "worst_layer": jsonfile.or_null(_LAYER),
    "by_layer": ObjectOf(_ERROR),
}
_REPORT = {
    "weights": integer(1, 1 << 50),
    "bits_per_weight": number(0, 256),
    "families": ListOf(_FAMILY, 0, 1000),
}


def manifest_checksum(manifest: Json) -> str:
    """Checksum over every value of the manifest but the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def regular_file(folder: Path, name: str) -> Path:
    """Path of ``name`` in ``folder``.  Raises ``ExportError`` for a link out of it or no file."""
    path = folder / name
    if os.path.realpath(path) != os.path.join(os.path.realpath(folder), name):
        raise ExportError(f"{path}: is a link that leads elsewhere; copy the file itself here")
    if path.exists() and not path.is_file():
        raise ExportError(f"{path}: is not a regular file; the export is damaged")
    return path


def manifest_layout(manifest: Json) -> layout.RecordLayout:
    """Layout of the records that ``manifest`` describes."""
    experts, codecs = manifest["experts"], ExpertCodecs.of_manifest(manifest)
    return layout.RecordLayout(experts["hidden_size"], experts["moe_intermediate_size"], codecs)


def unlisted_files(folder: Path, manifest: Json) -> list[str]:
    """Names in the export that its manifest does not list, so that nothing vouches for them.

    Hidden files are none of ours.  A killed ``quantize --calibrate`` leaves temporary names and a
    predictor that the manifest does not list (yet, or any more), which nobody reads.
    """
    paths = [*folder.iterdir(), *(folder / "experts").glob("*")]
    names = (str(path.relative_to(folder)) for path in paths if path.name != "experts")
    ours = {layout.MANIFEST, *manifest["files"]}
    return sorted(
        name
        for name in names
        if name not in ours
        and not name.startswith(".")
        and not name.endswith(".tmp")
        and not is_predictor(name)
    )


def refuse_unlisted(folder: Path, manifest: Json) -> None:
    """Raise ``ExportError`` for the first of ``unlisted_files``."""
    for name in unlisted_files(folder, manifest):
        raise ExportError(f"{folder / name}: {UNLISTED}; move it away")


def read_manifest(folder: Path) -> Json:
    """The manifest of ``folder``, checked for types and ranges.  Raises ``ExportError``."""
    path = regular_file(folder, layout.MANIFEST)
    if not path.exists():
        way_out = "slotmoe quantize SRC DST makes one"
        raise ExportError(f"{path}: is missing; {folder} is no finished export ({way_out})")
    manifest = jsonfile.read_json(path, MAX_MANIFEST_BYTES, ExportError)
    version, ours = manifest.get("format_version"), layout.FORMAT_VERSION
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ExportError(f"{path}: format_version is {version!r:.40}, expected {ours}")
    if version > ours:
        newer = f"format_version {version} is newer than this slotmoe reads ({ours})"
        raise ExportError(f"{path}: {newer}; upgrade slotmoe")
    if manifest.get("checksum") != manifest_checksum(manifest):
        what = "its checksum is wrong; the manifest was changed or damaged, quantize again"
        raise ExportError(f"{path}: {what}")
    try:
        if version == 1:
            check(manifest, {"quantization": _VERSION_1})
            to_version_2(manifest)
        _check_manifest(manifest)
    except (LookupError, TypeError, AttributeError, ValueError) as problem:
        lacks = "something is missing: " if isinstance(problem, LookupError) else ""
        what = f"{lacks}{str(problem)[:200]}"
        raise ExportError(f"{path}: {what}; not a manifest that slotmoe wrote") from None
    return manifest


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_codecs(quantization: Json) -> None:
    """Every codec must be one that readers know, and every name of a codec one of these."""
    for name, item in quantization["codecs"].items():
        bits, block, scales, levels = (item[key] for key in _CODEC)
        what = f"codec {name!r:.40}"
        known = (bits, scales) in KINDS and block == SCALES[scales].block
        _require(known, f"{what}: {bits} bits with {scales} scales for {block} columns are unknown")
        _require(len(levels) == 1 << bits, f"{what} has {len(levels)} levels for {bits} bits")
        numbers = [(number, not np.signbit(number)) for number in map(np.float32, levels)]
        ordered = all(low < high for low, high in pairwise(numbers))  # -0 before 0
        _require(ordered, f"the levels of {what} are not in ascending order, each once")
    coded = {name: item["codec"] for name, item in quantization["resident_codecs"].items()}
    for name, own in coded.items():  # kernels compute both in one go
        same = coded.get(name.replace("gate_proj", "up_proj"), own) == own
        _require(same, f"{name:.80} and the up_proj beside it have different codecs")
    for name in [*quantization["experts"].values(), *coded.values()]:
        _require(name in quantization["codecs"], f"codec {name!r:.40} is not in codecs")


def _check_manifest(manifest: Json) -> None:
    """Raise unless the manifest has the structure that readers rely on."""
    check(manifest, _MANIFEST)
    quantization, experts, files = manifest["quantization"], manifest["experts"], manifest["files"]
    _check_codecs(quantization)
    if "report" in quantization:
        _check_report(quantization["report"], {*_PLAIN, *quantization["codecs"]})
    _check_experts(manifest)
    record, E = manifest_layout(manifest), experts["n_routed_experts"]
    layer_files = list(map(layer_file, experts["layers"]))
    predictors = list(filter(is_predictor, files))
    _require(len(predictors) <= 1, "more than one predictor")
    known = {*COPIED, RESIDENT, *predictors, *layer_files}
    _require(set(files) <= known, "files names something that is not part of the format")
    in_layer = {**_WEIGHTS, "records": ListOf(TEXT, E, E)}
    kinds = dict.fromkeys(layer_files, in_layer)
    kinds |= dict.fromkeys([RESIDENT, *predictors], _TENSORS)
    check(files, kinds | {name: _COPIED for name in files if name in COPIED}, "files")
    sizes = dict.fromkeys(layer_files, E * record.record_bytes)
    sizes[RESIDENT] = _check_resident(files[RESIDENT]["tensors"], manifest)
    for name in predictors:
        sizes[name] = check_predictor(files[name]["tensors"], experts)
    for name, size in sizes.items():
        stated, whole = files[name]["bytes"], files[name]["header_bytes"] + size
        _require(stated == whole, f"the {stated} bytes of {name} do not hold what it should")


def _check_experts(manifest: Json) -> None:
    experts, record = manifest["experts"], manifest_layout(manifest)
    layers = experts["layers"]
    described = experts["record_bytes"], experts["record"]
    _require(described == (record.record_bytes, record.describe()), "the record layout is unknown")
    _require(layers == sorted(set(layers)), "layers are not in order")
    if "mtp_layer" in experts:
        check(experts, {"mtp_layer": _LAYER}, "experts")
        last = len(layers) > 1 and experts["mtp_layer"] == layers[-1]
        _require(last, "mtp_layer is not the last of several layers")
    for layer, origin in experts["linked_layers"].items():
        _require(layer.isdecimal() and origin in layers, "linked_layers names an unknown layer")


def _check_report(report: Json, known: set[str]) -> None:
    """A report must have the documented keys and possible figures; ``known``: ways to store."""
    check(report, _REPORT, "quantization.report")
    _require(report.keys() == _REPORT.keys(), "the report has other keys than its format")
    for row in report["families"]:
        keys = row.keys() - {"relative_output_error"}  # of calibrated weights alone
        _require(keys == _FAMILY.keys(), "a family of the report has other keys")
        _require(row["stored"] in known, f"unknown storage {row['stored']!r:.40} in the report")
        worst, by_layer = row["worst_layer"], row["by_layer"]
        _require(all(map(str.isdecimal, by_layer)), "by_layer has what is no layer")
        is_worst = not by_layer if worst is None else str(worst) in by_layer
        _require(is_worst, "worst_layer is no layer")


def check_predictor(tensors: Json, experts: Json) -> int:
    """Its tensors must have the dtypes and shapes that the model's geometry and two widths
    prescribe; returns their bytes."""
    L = len(experts["layers"]) - ("mtp_layer" in experts)
    R = tensors["token.in.weight"]["shape"][0]
    Q = tensors["layer.in.weight"]["shape"][1] if L > 1 else 1
    most = layout.MAX_PREDICTOR_WIDTH
    _require(max(R, Q) <= most, f"the predictor is wider than {most}")
    expected = layout.predictor_parts(experts["hidden_size"], L, experts["n_routed_experts"], R, Q)
    if layout.SWAP_PRICES not in tensors:
        del expected[layout.SWAP_PRICES]
    _require(set(tensors) == set(expected), "the predictor has other tensors than its format")
    return _check_tensors("the predictor", tensors, expected)


def _check_tensors(of: str, tensors: Json, expected: dict[str, Part]) -> int:
    """Returns the bytes of ``tensors``, which must be as ``expected``."""
    for name, part in expected.items():
        same = name in tensors and part == layout.part_of(tensors[name])
        _require(same, f"{name:.80} of {of} is not stored as the format prescribes")
    return sum(part.nbytes for part in expected.values())


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
            _require(len(part.shape) == 2, f"{name:.80} is no matrix")
            expected |= layout.resident_parts(name, part.shape, "int8", part.dtype)
        elif name not in expected:
            fits = part.dtype.is_floating_point and part.dtype.itemsize > 1
            if name.endswith(TABLE_NAME):
                fits = part.dtype == layout.DTYPES["I32"]
            _require(fits, f"{name:.80} has dtype {part.dtype}")
            expected |= layout.resident_parts(name, part.shape, "none", part.dtype)
    return _check_tensors(RESIDENT, tensors, expected)

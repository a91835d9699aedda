"""The manifest of an export: read from a stranger, checked before anything uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from slotmoe.errors import ExportError
from slotmoe.jsonfile import read_json
from slotmoe.quant.export.layout import (
    COPIED,
    DTYPES,
    FORMAT_VERSION,
    MANIFEST,
    MAX_PREDICTOR_WIDTH,
    RESIDENT,
    Part,
    RecordLayout,
    checksum,
    is_predictor,
    layer_file,
    part_of,
    predictor_parts,
    resident_parts,
)
from slotmoe.quant.shapes import ALIGNMENT, BLOCK

MAX_MANIFEST_BYTES = 8 << 20
MAX_COPIED_BYTES = 16 << 20  # DeepSeek-V2's tokenizer.json has 4.6 MB
_EXPERTS = {"hidden_size": 1 << 20, "moe_intermediate_size": 1 << 20, "n_routed_experts": 4096}
_REPORT_KEYS = {"weights", "bits_per_weight", "families"}
_FAMILY_KEYS = {"family", "stored", "weights", "bits_per_weight", "relative_rms_error"}
_FAMILY_KEYS |= {"worst_layer", "by_layer"}
_STORED = ("nf4", "int8", "bf16", "fp16", "fp32")


def manifest_checksum(manifest: dict[str, Any]) -> str:
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


def manifest_layout(manifest: dict[str, Any]) -> RecordLayout:
    """Layout of the records that ``manifest`` describes."""
    experts = manifest["experts"]
    return RecordLayout(experts["hidden_size"], experts["moe_intermediate_size"])


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of ``folder``, checked for types and ranges.  Raises ``ExportError``."""
    path = regular_file(folder, MANIFEST)
    if not path.exists():
        way_out = "slotmoe quantize SRC DST makes one"
        raise ExportError(f"{path}: is missing; {folder} is no finished export ({way_out})")
    manifest = read_json(path, MAX_MANIFEST_BYTES, ExportError)
    version, ours = manifest.get("format_version"), FORMAT_VERSION
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ExportError(f"{path}: format_version is {version!r:.40}, expected {ours}")
    if version > ours:
        newer = f"format_version {version} is newer than this slotmoe reads ({ours})"
        raise ExportError(f"{path}: {newer}; upgrade slotmoe")
    if manifest.get("checksum") != manifest_checksum(manifest):
        what = "its checksum is wrong; the manifest was changed or damaged, quantize again"
        raise ExportError(f"{path}: {what}")
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        what = f"{problem.__class__.__name__} {str(problem)[:120]}"
        raise ExportError(f"{path}: {what}; not a manifest that slotmoe wrote") from None
    return manifest


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _number(value: Any, low: float, high: float, kind: Any = int) -> Any:
    valid = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high
    noun = "an integer" if kind is int else "a number"
    _require(valid, f"{value!r:.40} is not {noun} from {low} to {high}")
    return value


def _is_list(value: Any, kind: Any, length: int) -> bool:
    is_list = isinstance(value, list) and len(value) == length
    return is_list and all(isinstance(item, kind) for item in value)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise unless the manifest has the structure that readers rely on."""
    quantization, experts, files = manifest["quantization"], manifest["experts"], manifest["files"]
    for key, known in (("layout", "tiles16"), ("block", BLOCK)):
        _require(quantization[key] == known, f"unknown {key} {quantization[key]!r:.40}")
    levels = quantization["levels"]
    are_numbers = _is_list(levels, int | float, 16) and all(abs(level) < 1e30 for level in levels)
    _require(are_numbers, "levels are not 16 numbers")
    if "report" in quantization:
        _check_report(quantization["report"])
    sizes = _check_experts(experts)  # bytes of data, by file
    sizes[RESIDENT] = _check_resident(files[RESIDENT]["tensors"], quantization["resident_shapes"])
    predictors = list(filter(is_predictor, files))
    _require(len(predictors) <= 1, "more than one predictor")
    for name in predictors:
        sizes[name] = check_predictor(files[name]["tensors"], experts)
    known_files = set(files) <= {*COPIED, *sizes} and "config.json" in files
    _require(known_files, "files names something that is not part of the format")
    for layer in experts["layers"]:
        records = files[layer_file(layer)]["records"]
        _require(_is_list(records, str, experts["n_routed_experts"]), "records lack a checksum")
    for name, entry in files.items():
        size = _number(entry["bytes"], 0, MAX_COPIED_BYTES if name in COPIED else 1 << 50)
        _require(isinstance(entry["checksum"], str), "a checksum is not a string")
        if name not in COPIED:
            expected = sizes[name] + _number(entry["header_bytes"], ALIGNMENT, 1 << 30)
            _require(size == expected, f"{size} bytes do not hold what a file should")


def _check_experts(experts: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes of each layer's records, by file."""
    for key, high in _EXPERTS.items():
        _number(experts[key], 1, high)
    layout, layers = manifest_layout({"experts": experts}), experts["layers"]
    described = experts["record_bytes"], experts["record"]
    _require(described == (layout.record_bytes, layout.describe()), "the record layout is unknown")
    are_layers = _is_list(layers, int, len(layers)) and 0 < len(layers) <= 1000
    _require(are_layers, "layers is not a list of layers")
    for layer in layers:
        _number(layer, 0, 99999)
    _require(layers == sorted(set(layers)), "layers are not in order")
    for layer, origin in experts["linked_layers"].items():
        _require(layer.isdecimal() and origin in layers, "linked_layers names an unknown layer")
    data_bytes = experts["n_routed_experts"] * layout.record_bytes
    return dict.fromkeys(map(layer_file, layers), data_bytes)


def _check_report(report: dict[str, Any]) -> None:
    """What quantization cost must have the documented keys and possible figures."""
    families = report["families"]
    _require(set(report) == _REPORT_KEYS, "the report has other keys than its format")
    _require(_is_list(families, dict, len(families)), "the report's families are no list")
    for row in (report, *families):
        _number(row["weights"], 1, 1 << 50)
        _number(row["bits_per_weight"], 0, 256 if row is report else 1 << 20, int | float)
    for row in families:
        same_keys = set(row) == _FAMILY_KEYS and isinstance(row["family"], str)
        _require(same_keys, "a family of the report has other keys than its format")
        _require(row["stored"] in _STORED, f"unknown storage {row['stored']!r:.40} in the report")
        worst, by_layer = row["worst_layer"], row["by_layer"]
        for error in (row["relative_rms_error"], *by_layer.values()):
            _number(error, 0, 1000, int | float)
        for layer in by_layer:
            _number(int(layer), 0, 99999)
        is_worst = not by_layer if worst is None else str(_number(worst, 0, 99999)) in by_layer
        _require(is_worst, "worst_layer is no layer")


def check_predictor(tensors: dict[str, Any], experts: dict[str, Any]) -> int:
    """Its tensors must have the dtypes and shapes that the model's geometry and two widths
    prescribe; returns their bytes."""
    L = len(experts["layers"])
    R = _number(tensors["token.in.weight"]["shape"][0], 1, MAX_PREDICTOR_WIDTH)
    Q = _number(tensors["layer.in.weight"]["shape"][1], 1, MAX_PREDICTOR_WIDTH) if L > 1 else 1
    expected = predictor_parts(experts["hidden_size"], L, experts["n_routed_experts"], R, Q)
    _require(set(tensors) == set(expected), "the predictor has other tensors than its format")
    return _check_tensors("the predictor", tensors, expected)


def _check_tensors(of: str, tensors: dict[str, Any], expected: dict[str, Part]) -> int:
    """Returns the bytes of ``tensors``, which must be as ``expected``."""
    for name, part in expected.items():
        item = tensors[name]
        same = _is_list(item["shape"], int, len(part.shape)) and part == part_of(item)
        _require(same, f"{name:.80} of {of} is not stored as the format prescribes")
        _require(isinstance(item["checksum"], str), f"{name:.80} of {of} has no checksum")
    return sum(part.nbytes for part in expected.values())


def _check_resident(tensors: dict[str, Any], nf4_shapes: dict[str, Any]) -> int:
    """Every weight must have the tensors, dtypes and shapes that its quantization prescribes:
    kernels trust them.  Returns their bytes."""
    expected: dict[str, Part] = {}
    for name, item in tensors.items():
        shape, dtype = item["shape"], DTYPES[item["dtype"]]
        is_shape = _is_list(shape, int, len(shape)) and 0 < len(shape) <= 3
        _require(is_shape, f"{name:.80} has no shape")
        for size in shape:
            _number(size, 1, 1 << 31)
        if name + ".scale" in tensors:
            _require(len(shape) == 2, f"{name:.80} is no matrix")
            expected |= resident_parts(name, tuple(shape), "int8", dtype)
        elif name + ".absmax" in tensors:
            N, K = (_number(size, 1, 1 << 31) for size in nf4_shapes[name])
            expected |= resident_parts(name, (N, K), "nf4", dtype)
        elif name not in expected:
            _require(dtype.is_floating_point, f"{name:.80} has dtype {dtype}")
            expected |= resident_parts(name, tuple(shape), "none", dtype)
    return _check_tensors(RESIDENT, tensors, expected)

"""The manifest of an export: read from a stranger, checked before anything uses it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

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
_REPORT_KEYS = {"weights", "bits_per_weight", "families"}
_FAMILY_KEYS = {"family", "stored", "weights", "bits_per_weight", "relative_rms_error"}
_FAMILY_KEYS |= {"worst_layer", "by_layer"}
_STORED = ("nf4", "int8", "bf16", "fp16", "fp32")


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Checksum over every value of the manifest but the checksum itself."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return checksum(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode())


def regular_file(folder: Path, name: str) -> Path:
    """Path of ``name`` in ``folder``; raises ``ExportError`` for a link that leads elsewhere and
    for what is no file."""
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
    """The manifest of ``folder``, its values checked for type and range before anything uses
    them."""
    path = regular_file(folder, MANIFEST)
    if not path.exists():
        raise ExportError(
            f"{path}: is missing; {folder} is no finished export (slotmoe quantize SRC DST makes "
            "one)"
        )
    manifest = read_json(path, MAX_MANIFEST_BYTES, ExportError)
    version = manifest.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise ExportError(f"{path}: format_version is {version!r:.40}, expected {FORMAT_VERSION}")
    if version > FORMAT_VERSION:
        raise ExportError(
            f"{path}: format_version {version} is newer than this slotmoe reads "
            f"({FORMAT_VERSION}); upgrade slotmoe"
        )
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise ExportError(
            f"{path}: its checksum is wrong; the manifest was changed or damaged, quantize again"
        )
    try:
        _check_manifest(manifest)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise ExportError(
            f"{path}: {problem.__class__.__name__} {str(problem)[:120]}; not a manifest that "
            "slotmoe wrote"
        ) from None
    return manifest


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _integer(value: Any, low: int, high: int) -> int:
    valid = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
    _require(valid, f"{value!r:.40} is not an integer from {low} to {high}")
    return int(value)


def _number(value: Any, high: float) -> None:
    valid = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= high
    _require(valid, f"{value!r:.40} is not a number from 0 to {high}")


def _is_list(value: Any, kind: Any, length: int) -> bool:
    is_list = isinstance(value, list) and len(value) == length
    return is_list and all(isinstance(item, kind) for item in value)


def _check_manifest(manifest: dict[str, Any]) -> None:
    """Raise ``ValueError``, ``KeyError`` or ``TypeError`` unless the manifest has the structure
    that readers rely on."""
    quantization, experts, files = manifest["quantization"], manifest["experts"], manifest["files"]
    _require(quantization["layout"] == "tiles16", f"unknown layout {quantization['layout']!r:.40}")
    _require(quantization["block"] == BLOCK, f"unknown block {quantization['block']!r:.40}")
    levels = quantization["levels"]
    _require(_is_list(levels, int | float, 16), "levels are not 16 numbers")
    _require(all(abs(level) < 1e30 for level in levels), "levels are not 16 numbers")
    if "report" in quantization:
        _check_report(quantization["report"])
    data_bytes = _check_experts(experts)
    data_bytes[RESIDENT] = _check_resident(
        files[RESIDENT]["tensors"], quantization["resident_shapes"]
    )
    predictors = [name for name in files if is_predictor(name)]
    _require(len(predictors) <= 1, "more than one predictor")
    for name in predictors:
        data_bytes[name] = check_predictor(files[name]["tensors"], experts)
    _require(
        set(files) <= {*COPIED, *data_bytes} and "config.json" in files,
        "files names something that is not part of the format",
    )
    for name, entry in files.items():
        _integer(entry["bytes"], 0, MAX_COPIED_BYTES if name in COPIED else 1 << 50)
        _require(isinstance(entry["checksum"], str), "a checksum is not a string")
    for layer in experts["layers"]:
        records = files[layer_file(layer)]["records"]
        _require(
            _is_list(records, str, experts["n_routed_experts"]),
            "records are not one checksum an expert",
        )
    for name, size in data_bytes.items():
        header_bytes = _integer(files[name]["header_bytes"], ALIGNMENT, 1 << 30)
        _require(
            files[name]["bytes"] == header_bytes + size,
            f"{files[name]['bytes']!r:.40} bytes do not hold what a file should",
        )


def _check_experts(experts: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes of each layer's records, by file."""
    for key, high in (("hidden_size", 1 << 20), ("moe_intermediate_size", 1 << 20)):
        _integer(experts[key], 1, high)
    count = _integer(experts["n_routed_experts"], 1, 4096)
    layout, layers = manifest_layout({"experts": experts}), experts["layers"]
    _require(
        experts["record_bytes"] == layout.record_bytes and experts["record"] == layout.describe(),
        "the record layout is unknown",
    )
    _require(
        _is_list(layers, int, len(layers)) and 0 < len(layers) <= 1000,
        "layers is not a list of layers",
    )
    for layer in layers:
        _integer(layer, 0, 99999)
    _require(layers == sorted(set(layers)), "layers are not in order")
    for layer, origin in experts["linked_layers"].items():
        _require(layer.isdecimal() and origin in layers, "linked_layers names an unknown layer")
    return {layer_file(layer): count * layout.record_bytes for layer in layers}


def _check_report(report: dict[str, Any]) -> None:
    """What quantization cost must have the documented keys and possible figures."""
    _require(set(report) == _REPORT_KEYS, "the report has other keys than its format")
    _integer(report["weights"], 1, 1 << 50)
    _number(report["bits_per_weight"], 256)
    families = report["families"]
    _require(_is_list(families, dict, len(families)), "the report's families are no list")
    for row in families:
        _require(
            set(row) == _FAMILY_KEYS and isinstance(row["family"], str),
            "a family of the report has other keys than its format",
        )
        stored = row["stored"]
        _require(stored in _STORED, f"unknown storage {stored!r:.40} in the report")
        _integer(row["weights"], 1, 1 << 50)
        _number(row["bits_per_weight"], 1 << 20)
        _number(row["relative_rms_error"], 1000)
        for layer, error in row["by_layer"].items():
            _integer(int(layer), 0, 99999)
            _number(error, 1000)
        if row["worst_layer"] is None:
            _require(not row["by_layer"], "worst_layer is no layer")
        else:
            worst = str(_integer(row["worst_layer"], 0, 99999))
            _require(worst in row["by_layer"], "worst_layer is no layer")


def check_predictor(tensors: dict[str, Any], experts: dict[str, Any]) -> int:
    """Its tensors must have the dtypes and shapes that the model's geometry and two widths
    prescribe; returns their bytes."""
    L = len(experts["layers"])
    R = _integer(tensors["token.in.weight"]["shape"][0], 1, MAX_PREDICTOR_WIDTH)
    Q = _integer(tensors["layer.in.weight"]["shape"][1], 1, MAX_PREDICTOR_WIDTH) if L > 1 else 1
    expected = predictor_parts(experts["hidden_size"], L, experts["n_routed_experts"], R, Q)
    _require(set(tensors) == set(expected), "the predictor has other tensors than its format")
    for name, part in expected.items():
        item = tensors[name]
        _require(
            _is_list(item["shape"], int, len(part.shape)) and part == part_of(item),
            f"{name} of the predictor has another shape",
        )
        _require(isinstance(item["checksum"], str), f"{name} of the predictor has no checksum")
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
            _integer(size, 1, 1 << 31)
        _require(isinstance(item["checksum"], str), f"{name:.80} has no checksum")
        if name + ".scale" in tensors:
            _require(len(shape) == 2, f"{name:.80} is no matrix")
            expected |= resident_parts(name, tuple(shape), "int8", dtype)
        elif name + ".absmax" in tensors:
            N, K = (_integer(size, 1, 1 << 31) for size in nf4_shapes[name])
            expected |= resident_parts(name, (N, K), "nf4", dtype)
        elif name not in expected:
            floating = dtype in (torch.bfloat16, torch.float16, torch.float32)
            _require(floating, f"{name:.80} has dtype {dtype}")
            expected |= resident_parts(name, tuple(shape), "none", dtype)
    for name, part in expected.items():
        _require(
            name in tensors and part == part_of(tensors[name]),
            f"{name:.80} is not stored as its quantization prescribes",
        )
    return sum(part_of(item).nbytes for item in tensors.values())

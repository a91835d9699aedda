"""What quantization cost by tensor family, bits a weight and relative RMS error, for the manifest.

A family is a tensor's place in a layer, whichever layer (and expert) it is in.  Its relative RMS
error is ``sqrt(sum (w - w')^2 / sum w^2)`` over all its weights, w' being what readers dequantize;
the worst layer is the one where the same figure is largest.  Figures are rounded to 6 digits: sums
of float64 then give the same bytes on every machine.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from slotmoe.jsonfile import Json
from slotmoe.model.names import split_name
from slotmoe.offload.ingest.manifest import Contents, Stored
from slotmoe.quant.codecs.codec import Codec

Squares = Sequence[float]
"""Sum of squared errors and sum of squared weights."""
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PLAIN |= {torch.int32: "int32"}


def quantization_report(contents: Contents, sums: Mapping[str, Sequence[float]]) -> Json:
    """The report for an export.  ``sums`` maps a weight's name to its ``squared_error`` and that in
    its Hessian's measure, zeros if it was not calibrated."""
    files = map(contents.parts, contents.files)
    parts = {name: part for file in files for name, part in file.items()}
    families: dict[str, dict[str, Stored]] = {}
    for name, tensor in contents.tensors.items():
        key = split_name(name)[1]
        key = "norms" if key.endswith("norm") else re.sub(r"\.experts\.\d+\.", ".experts.", key)
        families.setdefault(key, {})[name] = tensor
    rows, sizes = list[Json](), dict[str, int]()
    for key, tensors in families.items():
        kind, of_tensors = next(iter(tensors.values())).kind, tensors.values()
        places = [parts[part] for tensor in of_tensors for part in tensor.parts]
        stored = _PLAIN[places[0].dtype] if kind == "none" else kind
        by_layer: dict[int | None, list[Squares]] = {}
        for name, tensor in tensors.items():
            if tensor.kind != "none":
                by_layer.setdefault(split_name(name)[0], []).append(sums[name][:2])
        of_layers = {layer: _summed(squares) for layer, squares in by_layer.items()}
        layers = sorted(layer for layer in of_layers if layer is not None)
        worst = {layer: _relative(of_layers[layer]) for layer in layers}
        calibrated = [sums[name][2:] for name in tensors if sums[name][3]]
        weights = sum(math.prod(tensor.shape) for tensor in of_tensors)
        sizes[key] = sum(part.nbytes for part in places)
        row = {
            "family": key,
            "stored": stored.name if isinstance(stored, Codec) else stored,
            "weights": weights,
            "bits_per_weight": _bits(sizes[key], weights),
            "relative_rms_error": _relative(_summed(of_layers.values())),
            "worst_layer": max(worst, key=worst.__getitem__, default=None),
            "by_layer": {str(layer): error for layer, error in worst.items()},
        }
        if calibrated:
            row["relative_output_error"] = _relative(_summed(calibrated))
        rows.append(row)
    weights = sum(row["weights"] for row in rows)
    size = sum(part.nbytes for part in parts.values())  # with padding
    return {
        "weights": weights,
        "bits_per_weight": _bits(size, weights),
        "families": sorted(rows, key=lambda row: (-sizes[row["family"]], row["family"])),
    }


def _summed(errors: Iterable[Squares]) -> Squares:
    """Exactly rounded sums, so that they don't depend on the order of the work."""
    return [math.fsum(column) for column in zip(*errors, strict=True)] or [0.0, 0.0]


def _relative(squares: Squares) -> float:
    error, weight = squares
    return float(f"{math.sqrt(error / weight):.6g}") if weight else 0.0


def _bits(size: int, weights: int) -> float:
    return float(f"{8 * size / weights:.6g}")

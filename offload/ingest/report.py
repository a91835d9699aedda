"""What quantization cost, by tensor family: bits a weight and relative RMS error, kept in the
export's manifest.

A family is a tensor's place in a layer, whichever layer (and expert) it is in.  Its relative RMS
error is ``sqrt(sum (w - w')^2 / sum w^2)`` over all its weights, w' being what readers dequantize;
the worst layer is the one where the same figure is largest.  Figures are rounded to 6 digits: sums
of float64 then give the same bytes on every machine.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from slotmoe.jsonfile import Json
from slotmoe.model.names import split_name
from slotmoe.offload.ingest.manifest import Contents
from slotmoe.quant.codecs.codec import Codec

Squares = Sequence[float]
"""Sum of squared errors and sum of squared weights."""
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class _Family:
    """``errors`` are those of each layer, None standing for weights that are in no layer."""

    stored: str
    weights: int = 0
    bytes: int = 0
    errors: dict[int | None, list[Squares]] = field(default_factory=lambda: defaultdict(list))
    weighted: list[Squares] = field(default_factory=list)

    def row(self, name: str) -> Json:
        sums = {layer: _summed(self.errors[layer]) for layer in self.errors}
        by_layer = {layer: _relative(sums[layer]) for layer in sums if layer is not None}
        calibrated = {"relative_output_error": _relative(_summed(self.weighted))}
        return {
            "family": name,
            "stored": self.stored,
            "weights": self.weights,
            "bits_per_weight": _bits(self.bytes, self.weights),
            "relative_rms_error": _relative(_summed(sums.values())),
            "worst_layer": max(by_layer, key=by_layer.__getitem__, default=None),
            "by_layer": {str(layer): error for layer, error in sorted(by_layer.items())},
            **(calibrated if self.weighted else {}),
        }


def quantization_report(
    contents: Contents, errors: Mapping[str, Squares], weighted: Mapping[str, Squares]
) -> Json:
    """The report for an export.  ``errors`` maps the names of quantized weights to their
    ``squared_error``; others are exact.  ``weighted`` are those of calibrated weights in the
    measure of their Hessians."""
    families: dict[str, _Family] = {}
    files = map(contents.parts, contents.files)
    parts = {name: part for file in files for name, part in file.items()}
    for name, tensor in contents.tensors.items():
        layer, key = split_name(name)
        key = "norms" if key.endswith("norm") else re.sub(r"\.experts\.\d+\.", ".experts.", key)
        plain = tensor.kind == "none"
        stored = tensor.kind.name if isinstance(tensor.kind, Codec) else tensor.kind
        if plain:
            stored = _PLAIN[parts[name].dtype]
        family = families.setdefault(key, _Family(stored))
        family.weights += math.prod(tensor.shape)
        family.bytes += sum(parts[part].nbytes for part in tensor.parts)
        if not plain:
            family.errors[layer].append(errors[name])
        if name in weighted:
            family.weighted.append(weighted[name])
    weights = sum(family.weights for family in families.values())
    size = sum(part.nbytes for part in parts.values())  # with padding
    ordered = sorted(families.items(), key=lambda item: (-item[1].bytes, item[0]))
    return {
        "weights": weights,
        "bits_per_weight": _bits(size, weights),
        "families": [family.row(name) for name, family in ordered],
    }


def _summed(errors: Iterable[Squares]) -> Squares:
    """Exactly rounded sums, so that they don't depend on the order of the work."""
    return [math.fsum(column) for column in zip(*errors, strict=True)] or [0.0, 0.0]


def _relative(squares: Squares) -> float:
    error, weight = squares
    return float(f"{math.sqrt(error / weight):.6g}") if weight else 0.0


def _bits(size: int, weights: int) -> float:
    return float(f"{8 * size / weights:.6g}")

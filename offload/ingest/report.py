"""What quantization cost, by tensor family: bits a weight and relative RMS error, kept in the
export's manifest.

A family is a tensor's place in a layer, whichever layer (and expert) it is in.  Its relative RMS
error is ``sqrt(sum (w - w')^2 / sum w^2)`` over all its weights, w' being what readers dequantize;
the worst layer is the one where the same figure is largest.  Figures are rounded to 6 digits: sums
of float64 then give the same bytes on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from slotmoe.model.names import experts_name, split_name
from slotmoe.offload.ingest.contents import Contents
from slotmoe.quant.shapes import nf4_bytes

Squares = Sequence[float]
"""Sum of squared errors and sum of squared weights."""
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass
class _Family:
    """``errors`` are the sums of each layer, None standing for weights that are in no layer."""

    stored: str
    weights: int = 0
    bytes: int = 0
    errors: dict[int | None, Squares] = field(default_factory=dict)

    def row(self, name: str) -> dict[str, Any]:
        errors = self.errors
        by_layer = {layer: _relative(errors[layer]) for layer in errors if layer is not None}
        totals = [math.fsum(squares[i] for squares in errors.values()) for i in (0, 1)]
        return {
            "family": name,
            "stored": self.stored,
            "weights": self.weights,
            "bits_per_weight": _bits(self.bytes, self.weights),
            "relative_rms_error": _relative(totals),
            "worst_layer": max(by_layer, key=by_layer.__getitem__, default=None),
            "by_layer": {str(layer): error for layer, error in sorted(by_layer.items())},
        }


def quantization_report(contents: Contents, errors: Mapping[str, Squares]) -> dict[str, Any]:
    """The report for an export.  ``errors`` maps the names of quantized weights (``experts_name``
    for the routed ones) to their sums; others are exact."""
    families: dict[str, _Family] = {}

    def add(name: str, stored: str, weights: int, size: int) -> None:
        layer, key = split_name(name)
        family = families.setdefault("norms" if key.endswith("norm") else key, _Family(stored))
        family.weights += weights
        family.bytes += size
        if name in errors:
            family.errors[layer] = errors[name]

    layers, experts = contents.config.moe_layers, contents.config.n_routed_experts
    for layer in layers:
        for projection, matrix in contents.layout.shapes.items():
            weights, size = experts * math.prod(matrix), experts * nf4_bytes(*matrix)
            add(experts_name(layer, projection), "nf4", weights, size)
    parts = contents.resident
    for name, shape in contents.shapes.items():
        kind = contents.kind(name)
        size = sum(parts[part].nbytes for part in contents.part_names(name))
        add(name, _PLAIN[parts[name].dtype] if kind == "none" else kind, math.prod(shape), size)
    weights = sum(family.weights for family in families.values())
    size = len(layers) * experts * contents.layout.record_bytes  # with padding
    size += sum(part.nbytes for part in parts.values())
    ordered = sorted(families.items(), key=lambda item: (-item[1].bytes, item[0]))
    return {
        "weights": weights,
        "bits_per_weight": _bits(size, weights),
        "families": [family.row(name) for name, family in ordered],
    }


def _relative(squares: Squares) -> float:
    error, weight = squares
    return float(f"{math.sqrt(error / weight):.6g}") if weight else 0.0


def _bits(size: int, weights: int) -> float:
    return float(f"{8 * size / weights:.6g}")

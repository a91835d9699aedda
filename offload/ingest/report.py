"""What quantization cost, by tensor family: bits a weight and relative RMS error, kept in the
export's manifest.

A family is a tensor's place in a layer, whichever layer (and expert) it is in.  Its relative RMS
error is ``sqrt(sum (w - w')^2 / sum w^2)`` over all its weights, w' being what readers dequantize;
the worst layer is the one where the same figure is largest.  Figures are rounded to 6 digits: sums
of float64 then give the same bytes on every machine.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from slotmoe.quant.export.layout import Part, RecordLayout

Squares = Sequence[float]
"""Sum of squared errors and sum of squared weights."""
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_LAYER = re.compile(r"layers\.(\d+)\.")


def experts_name(layer: int, projection: str) -> str:
    """What stands for one projection of all routed experts of a layer."""
    return f"model.layers.{layer}.mlp.experts.{projection}.weight"


def family(name: str) -> str:
    """``model.layers.3.self_attn.o_proj.weight`` -> ``self_attn.o_proj``; all norms are one
    family."""
    stem = _LAYER.sub("", name).removeprefix("model.").removesuffix(".weight")
    return "norms" if stem.endswith("norm") else stem


def quantization_report(
    layers: Sequence[int],
    experts: int,
    layout: RecordLayout,
    shapes: Mapping[str, tuple[int, ...]],
    quantization: Mapping[str, str],
    parts: Mapping[str, Part],
    errors: Mapping[str, Squares],
) -> dict[str, Any]:
    """The report for MoE layers ``layers`` of ``experts`` experts and the resident weights
    ``shapes``, stored in ``parts``.

    ``errors`` maps the names of quantized weights (``experts_name`` for the routed ones) to their
    sums; others are exact.
    """
    families: dict[str, dict[str, Any]] = {}

    def add(name: str, stored: str, weights: int, size: int) -> None:
        empty = {"stored": stored, "weights": 0, "bytes": 0, "errors": {}}
        entry = families.setdefault(family(name), empty)
        entry["weights"] += weights
        entry["bytes"] += size
        layer = _LAYER.search(name)
        if name in errors:
            entry["errors"][int(layer[1]) if layer else None] = errors[name]

    for layer in layers:
        for projection, matrix in layout.shapes.items():
            size = sum(
                layout.parts[f"{projection}.weight{part}"].nbytes for part in ("", ".absmax")
            )
            add(experts_name(layer, projection), "nf4", experts * math.prod(matrix), experts * size)
    for name, shape in shapes.items():
        size = sum(
            parts[full].nbytes
            for full in (name, name + ".scale", name + ".absmax")
            if full in parts
        )
        stored = _PLAIN[parts[name].dtype] if quantization[name] == "none" else quantization[name]
        add(name, stored, math.prod(shape), size)
    weights = sum(entry["weights"] for entry in families.values())
    size = len(layers) * experts * layout.record_bytes + sum(
        part.nbytes for part in parts.values()
    )  # with padding
    ordered = sorted(families.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    return {
        "weights": weights,
        "bits_per_weight": _bits(size, weights),
        "families": [_row(name, entry) for name, entry in ordered],
    }


def _row(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    by_layer = {layer: _relative(squares) for layer, squares in entry["errors"].items()}
    totals = [math.fsum(squares[i] for squares in entry["errors"].values()) for i in (0, 1)]
    worst = max(
        (layer for layer in by_layer if layer is not None), key=by_layer.__getitem__, default=None
    )
    return {
        "family": name,
        "stored": entry["stored"],
        "weights": entry["weights"],
        "bits_per_weight": _bits(entry["bytes"], entry["weights"]),
        "relative_rms_error": _relative(totals),
        "worst_layer": worst,
        "by_layer": {
            str(layer): error for layer, error in sorted(by_layer.items()) if layer is not None
        }
        if worst is not None
        else {},
    }


def _relative(squares: Squares) -> float:
    error, weight = squares
    return float(f"{math.sqrt(error / weight):.6g}") if weight else 0.0


def _bits(size: int, weights: int) -> float:
    return float(f"{8 * size / weights:.6g}")

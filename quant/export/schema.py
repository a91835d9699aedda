"""What the manifest of an export holds (docs/export-format.md), as types.  Without torch."""

import math
from array import array
from itertools import pairwise
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct

from slotmoe.jsonfile import Json, typed
from slotmoe.quant.codecs.codec import KINDS, SCALES, to_version_2

_Size = Annotated[int, Meta(ge=1, le=1 << 31)]
_Width = Annotated[int, Meta(ge=1, le=1 << 20)]
_Layer = Annotated[int, Meta(ge=0, le=99999)]
_Weights = Annotated[int, Meta(ge=1, le=1 << 50)]
_Error = Annotated[float, Meta(ge=0, le=1000)]
_Matrix = Annotated[list[_Size], Meta(min_length=2, max_length=2)]
_Shape = Annotated[list[_Size], Meta(min_length=1, max_length=3)]
_Dtype = Literal["U8", "I8", "F8_E8M0", "I32", "F16", "BF16", "F32"]
_Level = Annotated[float, Meta(ge=-1e30, le=1e30)]
_Levels = Annotated[list[_Level], Meta(min_length=8, max_length=16)]
_Codec = TypedDict("_Codec", {"bits": int, "block": int, "scales": str, "levels": _Levels})
_Coded = TypedDict("_Coded", {"codec": str, "shape": _Matrix})
_Projections = TypedDict("_Projections", {"gate_up": str, "down": str})
_Tensor = TypedDict("_Tensor", {"dtype": _Dtype, "shape": _Shape, "checksum": str})
_Source = TypedDict("_Source", {"files": Json})
_Shapes = dict[str, _Matrix]
_OldQuantization = TypedDict(
    "_OldQuantization", {"block": Literal[64], "levels": _Levels, "resident_shapes": _Shapes}
)


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
    resident: Literal["bf16", "int8", "mixed", "nf4"]
    resident_codecs: dict[str, _Coded]
    report: _Report = _Report()
    calibration: str = ""


class Experts(Struct):
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
    experts: Experts
    files: dict[str, File]


def typed_manifest(manifest: Json) -> Manifest:
    """A ``manifest`` that is as ``Manifest`` says, with codecs that readers know.  One of version 1
    becomes one of version 2.  Raises ``ValueError``."""
    if (version := manifest.get("format_version")) == 1 and version is not True:
        typed(manifest.get("quantization"), _OldQuantization, "quantization")
        to_version_2(manifest)
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
    coded = {name: item["codec"] for name, item in quantization.resident_codecs.items()}
    for name, own in coded.items():  # kernels compute both in one go
        same = coded.get(name.replace("gate_proj", "up_proj"), own) == own
        require(same, f"{name:.80} and the up_proj beside it have different codecs")
    for name in [experts["gate_up"], experts["down"], *coded.values()]:
        require(name in codecs, f"codec {name!r:.40} is not in codecs")


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)

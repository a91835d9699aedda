"""What the manifest of an export holds (docs/export-format.md), as types.  Without torch."""

import math
from array import array
from itertools import pairwise
from typing import Annotated, Literal

from msgspec import Meta, Struct, field

from slotmoe.jsonfile import Json, typed
from slotmoe.quant.codecs.codec import KINDS, SCALES, to_version_2

MAX_COPIED_BYTES = 32 << 20  # the tokenizer.json of GLM-4.7 has 20 MB
_Size = Annotated[int, Meta(ge=1, le=1 << 31)]
_Width = Annotated[int, Meta(ge=1, le=1 << 20)]
_Layer = Annotated[int, Meta(ge=0, le=99999)]
_Weights = Annotated[int, Meta(ge=1, le=1 << 50)]
_Error = Annotated[float, Meta(ge=0, le=1000)]
_Shape = Annotated[list[_Size], Meta(min_length=2, max_length=2)]
_Level = Annotated[float, Meta(ge=-1e30, le=1e30)]
_Levels = Annotated[list[_Level], Meta(min_length=8, max_length=16)]


class Codec(Struct):
    bits: int
    block: int
    scales: str
    levels: _Levels


class Coded(Struct):
    codec: str
    shape: _Shape


class Family(Struct, forbid_unknown_fields=True):
    family: str
    stored: str
    weights: _Weights
    bits_per_weight: Annotated[float, Meta(ge=0, le=1 << 20)]
    relative_rms_error: _Error
    worst_layer: _Layer | None
    by_layer: dict[str, _Error]
    relative_output_error: _Error = 0.0  # of calibrated weights alone


class Report(Struct, forbid_unknown_fields=True):
    weights: _Weights
    bits_per_weight: Annotated[float, Meta(ge=0, le=256)]
    families: Annotated[list[Family], Meta(min_length=0, max_length=1000)]


class ExpertNames(Struct):
    gate_up: str
    down: str


class Quantization(Struct):
    layout: Literal["tiles16"]
    codecs: dict[str, Codec]
    experts: ExpertNames
    resident: Literal["bf16", "int8", "mixed", "nf4"]
    resident_codecs: dict[str, Coded]
    report: Report = field(default_factory=lambda: Report(0, 0.0, []))
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


class Source(Struct):
    files: Json
    name: str = ""


class _OldQuantization(Struct):
    block: Literal[64]
    levels: _Levels
    resident_shapes: dict[str, _Shape]


class Version1(Struct):
    format_version: Literal[1]
    quantization: _OldQuantization


class File(Struct):
    """An entry of ``files``."""

    bytes: Annotated[int, Meta(ge=0, le=1 << 50)]
    checksum: str


class Manifest(Struct):
    format_version: Literal[2]
    source: Source
    quantization: Quantization
    experts: Experts
    files: dict[str, File]


class Copied(File):
    """Of a file as in the source."""

    bytes: Annotated[int, Meta(ge=0, le=MAX_COPIED_BYTES)]


class _Safetensors(File):
    header_bytes: Annotated[int, Meta(ge=4096, le=1 << 30)]
    header_checksum: str


class Records(_Safetensors):
    """Of a layer's experts."""

    records: list[str]


class Tensor(Struct):
    dtype: Literal["U8", "I8", "F8_E8M0", "I32", "F16", "BF16", "F32"]
    shape: Annotated[list[_Size], Meta(min_length=1, max_length=3)]
    checksum: str


class Tensors(_Safetensors):
    """Of resident weights or a predictor."""

    tensors: dict[str, Tensor]


def typed_manifest(manifest: Json) -> Manifest:
    """A ``manifest`` that is as ``Manifest`` says, with codecs that readers know.  One of version 1
    becomes one of version 2.  Raises ``ValueError``."""
    if manifest.get("format_version") == 1:
        typed(manifest, Version1)
        to_version_2(manifest)
    given = typed(manifest, Manifest)
    _check_codecs(given.quantization)
    return given


def require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _check_codecs(quantization: Quantization) -> None:
    """Every codec must be one that readers know, and every name of a codec one of these."""
    codecs, experts = quantization.codecs, quantization.experts
    for name, codec in codecs.items():
        what, bits, scales = f"codec {name!r:.40}", codec.bits, codec.scales
        known = (bits, scales) in KINDS and codec.block == SCALES[scales].block
        coding = f"{bits} bits with {scales:.20} scales for {codec.block} columns"
        require(known, f"{what}: {coding} are unknown")
        count = len(codec.levels)
        require(count == 1 << bits, f"{what} has {count} levels for {bits} bits")
        numbers = [(level, math.copysign(1, level)) for level in array("f", codec.levels)]
        ordered = all(low < high for low, high in pairwise(numbers))  # -0 before 0
        require(ordered, f"the levels of {what} are not in ascending order, each once")
    coded = {name: item.codec for name, item in quantization.resident_codecs.items()}
    for name, own in coded.items():  # kernels compute both in one go
        same = coded.get(name.replace("gate_proj", "up_proj"), own) == own
        require(same, f"{name:.80} and the up_proj beside it have different codecs")
    for name in [experts.gate_up, experts.down, *coded.values()]:
        require(name in codecs, f"codec {name!r:.40} is not in codecs")

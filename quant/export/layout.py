"""The export: an artifact that loads fast, because one expert is one aligned byte range with a
checksum of its own.

    DST/
      config.json, tokenizer.json, ...       copied from the source
      slotmoe.json                           the manifest: everything below, and a checksum over itself
      resident.safetensors                   all but the routed experts, under the source's tensor names
      experts/layer-00001.safetensors ...    one per MoE layer, one record per expert
      predictor-0123456789abcdef.safetensors optional: trained guesses of experts, 16 digits of its
      checksum in the name

A record is, byte for byte (matrices in the ``tiles16`` layout of ``slotmoe.quant.nf4``; gate and up
are [I, H], down is [H, I]):

    gate_proj.weight codes, up_proj.weight codes, down_proj.weight codes        U8
    gate_proj.weight.absmax, up_proj.weight.absmax, down_proj.weight.absmax     F16
    pad, zeros up to the next multiple of 4096                                  U8

The predictor (``slotmoe.offload.predictor`` computes with it; L MoE layers in order, E experts, R
and Q widths of its choice) has these tensors; the two ``.weight`` of a horizon are int8 with a
float32 scale per row, ``w[..., n, k] = q * scale[..., n]``:

    token.in.weight I8 [R, 2 H]      token.in.weight.scale F32 [R]       token.in.bias F32 [R]
    token.out.weight I8 [L E, R]     token.out.weight.scale F32 [L E]    token.out.bias F32 [L E]
    layer.in.weight I8 [L-1, Q, H]   layer.in.weight.scale F32 [L-1, Q]  layer.in.bias F32 [L-1, Q]
    layer.out.weight I8 [L-1, E, Q]  layer.out.weight.scale F32 [L-1, E] layer.out.bias F32 [L-1, E]
    layer.mix F32 [L-1, 3]           popularity F32 [L E], uses of an expert per token

With one MoE layer there is no ``layer`` tensor.  Data starts at a multiple of 4096, F32 tensors
first, each group in the order above (weight, scale, bias from left to right, line by line), without
holes.  The manifest, replaced by one rename, names the file that counts; another of that pattern is
a leftover of a killed run.

``quantization.report`` in the manifest is optional and for people: what quantization cost, by
tensor family, as ``slotmoe.offload.ingest.report`` defines it.  An object of ``weights`` (count),
``bits_per_weight`` (of all, with padding) and ``families``, a list of ``family``, ``stored`` (nf4,
int8, bf16, fp16 or fp32), ``weights``, ``bits_per_weight``, ``relative_rms_error``, ``by_layer``
(layer -> the same error; empty if exact or in no layer) and ``worst_layer`` (a layer or null).

Records follow each other from the end of the header, which is padded with spaces to a multiple of
4096.  Sizes, headers and small files are verified at open; a resident tensor's and a record's
checksum (xxh3-128) whenever it is read. Shape legend: I moe_intermediate_size, H hidden_size, N
rows out, K columns in.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor

from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import ALIGNMENT, absmax_shape, codes_shape

FORMAT_VERSION = 1
MANIFEST, RESIDENT = "slotmoe.json", "resident.safetensors"
COPIED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
MAX_PREDICTOR_WIDTH = 1 << 14
_PREDICTOR = re.compile(r"predictor-[0-9a-f]{16}\.safetensors")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_DTYPES = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def layer_file(layer: int) -> str:
    """Name inside the export of one layer's experts."""
    return f"experts/layer-{layer:05d}.safetensors"


def checksum(data: Any) -> str:
    """xxh3-128 of a buffer, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class Part:
    """One tensor of a record or of the resident file: its place (bytes from the record's or data's
    start)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        total = self.dtype.itemsize
        for size in self.shape:
            total *= size
        return total


class RecordLayout:
    """Where the parts of an expert's record are, for ``hidden_size`` H and
    ``moe_intermediate_size`` I."""

    def __init__(self, hidden_size: int, moe_intermediate_size: int):
        self.hidden_size, self.moe_intermediate_size = hidden_size, moe_intermediate_size
        width, hidden = moe_intermediate_size, hidden_size
        self.shapes = {
            "gate_proj": (width, hidden),
            "up_proj": (width, hidden),
            "down_proj": (hidden, width),
        }
        self.parts: dict[str, Part] = {}
        offset = 0
        for name, shape in self.shapes.items():
            self.parts[name + ".weight"] = part = Part(torch.uint8, codes_shape(*shape), offset)
            offset += part.nbytes
        for name, shape in self.shapes.items():
            self.parts[name + ".weight.absmax"] = part = Part(
                torch.float16, absmax_shape(*shape), offset
            )
            offset += part.nbytes
        self.payload_bytes = offset
        self.record_bytes = -(-offset // ALIGNMENT) * ALIGNMENT
        if self.record_bytes > offset:
            self.parts["pad"] = Part(torch.uint8, (self.record_bytes - offset,), offset)

    def describe(self) -> dict[str, Any]:
        """The parts as the manifest holds them."""
        return {
            name: {"offset": part.offset, "bytes": part.nbytes, "shape": list(part.shape)}
            for name, part in self.parts.items()
        }

    def part(self, record: Tensor, name: str) -> Tensor:
        """View of part ``name`` in a record (uint8 [record_bytes], on any device)."""
        part = self.parts[name]
        return record[part.offset : part.offset + part.nbytes].view(part.dtype).view(part.shape)

    def weight(self, record: Tensor, projection: str, levels: Tensor) -> Nf4Weight:
        """One projection of the expert in ``record``, as a view."""
        codes, absmax = (
            self.part(record, f"{projection}.weight"),
            self.part(record, f"{projection}.weight.absmax"),
        )
        return Nf4Weight(codes, absmax, levels, self.shapes[projection])


def resident_parts(
    name: str, shape: tuple[int, ...], quantization: str, dtype: torch.dtype
) -> dict[str, Part]:
    """Tensors of the resident file that hold the weight ``name``; offsets are not assigned yet (0).

    ``quantization`` is ``none`` (as in the source, ``dtype``), ``int8`` or ``nf4``; the last two
    need a matrix.
    """
    if quantization == "int8":
        return {
            name: Part(torch.int8, shape, 0),
            name + ".scale": Part(torch.float32, shape[:1], 0),
        }
    if quantization == "nf4":
        N, K = shape
        return {
            name: Part(torch.uint8, codes_shape(N, K), 0),
            name + ".absmax": Part(torch.float16, absmax_shape(N, K), 0),
        }
    return {name: Part(dtype, shape, 0)}


def predictor_parts(D: int, L: int, E: int, R: int, Q: int) -> dict[str, Part]:
    """Tensors of the predictor's file for hidden size ``D``, ``L`` MoE layers of ``E`` experts and
    widths ``R`` and ``Q``."""
    parts: dict[str, Part] = {}
    shapes = {
        "token.in": (R, 2 * D),
        "token.out": (L * E, R),
        "layer.in": (L - 1, Q, D),
        "layer.out": (L - 1, E, Q),
    }
    for name, shape in shapes.items():
        parts[name + ".weight"] = Part(torch.int8, shape, 0)
        parts[name + ".weight.scale"] = parts[name + ".bias"] = Part(torch.float32, shape[:-1], 0)
    parts["layer.mix"] = Part(torch.float32, (L - 1, 3), 0)
    parts["popularity"] = Part(torch.float32, (L * E,), 0)
    return {name: part for name, part in parts.items() if part.nbytes}


def is_predictor(name: str) -> bool:
    """Whether a file of the export's folder is a predictor, in use or left over."""
    return _PREDICTOR.fullmatch(name) is not None


def place(parts: dict[str, Part]) -> dict[str, Part]:
    """Assign offsets without holes, widest dtype first, so that every tensor is aligned to its own
    element size."""
    placed, offset = {}, 0
    for name, part in sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize):
        placed[name] = Part(part.dtype, part.shape, offset)
        offset += part.nbytes
    return placed


def safetensors_header(parts: Iterable[tuple[str, Part]]) -> bytes:
    """Length prefix and JSON header of a safetensors file, padded with spaces to a multiple of 4096
    bytes."""
    entries = {
        name: {
            "dtype": _DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "data_offsets": [part.offset, part.offset + part.nbytes],
        }
        for name, part in parts
    }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def layer_parts(layer: int, experts: int, layout: RecordLayout) -> dict[str, Part]:
    """Tensors of the file that holds the records of ``layer``, in the order of the file; offsets
    from the data's start."""
    parts = {}
    for expert in range(experts):
        start = expert * layout.record_bytes
        for name, part in layout.parts.items():
            parts[f"model.layers.{layer}.mlp.experts.{expert}.{name}"] = Part(
                part.dtype, part.shape, start + part.offset
            )
    return parts


def layer_header(layer: int, experts: int, layout: RecordLayout) -> bytes:
    """Header of the file that holds the records of ``layer``."""
    return safetensors_header(layer_parts(layer, experts, layout).items())


def describe_tensors(parts: dict[str, Part], checksums: dict[str, str]) -> dict[str, Any]:
    """The tensors of a file as the manifest holds them."""
    return {
        name: {
            "dtype": _DTYPE_NAMES[part.dtype],
            "shape": list(part.shape),
            "checksum": checksums[name],
        }
        for name, part in parts.items()
    }


def tensor_parts(entry: dict[str, Any]) -> dict[str, Part]:
    """The tensors of a file's manifest entry and their places, from the data's start."""
    return place(
        {
            name: Part(_DTYPES[item["dtype"]], tuple(item["shape"]), 0)
            for name, item in entry["tensors"].items()
        }
    )

"""The export's files, records and tensors: their names, shapes and places.

docs/export-format.md describes the format byte by byte.  Shape legend: I moe_intermediate_size, H
hidden_size, N rows out, K columns in.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain

import torch
import xxhash
from torch import Tensor

from slotmoe.jsonfile import Json
from slotmoe.network.layer_types import Biases
from slotmoe.quant.codecs.codec import Codec, ExpertCodecs
from slotmoe.quant.codecs.weight import CodedWeight, levels_of
from slotmoe.quant.shapes import ALIGNMENT, padded, record_bytes

FORMAT_VERSION = 2
EXPERTS = "experts"  # the folder of the experts' files
MANIFEST, RESIDENT = "slotmoe.json", "resident.safetensors"
COPIED: tuple[str, ...] = ("config.json", "tokenizer.json", "tokenizer_config.json")
COPIED += ("generation_config.json", "chat_template.jinja")
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
DTYPES = {"U8": torch.uint8, "I8": torch.int8, "I32": torch.int32}
DTYPES |= {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
DTYPES["F8_E8M0"] = torch.float8_e8m0fnu  # of scales alone
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def layer_file(layer: int) -> str:
    """Name inside the export of one layer's experts."""
    return f"{EXPERTS}/layer-{layer:05d}.safetensors"


def checksum(data: bytes | bytearray | memoryview) -> str:
    """xxh3-128 of a buffer, in hexadecimal."""
    return xxhash.xxh3_128_hexdigest(data)


@dataclass(frozen=True)
class Part:
    """A tensor of a record or file, ``offset`` bytes from the record's or the data's start."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int = 0  # until `place` assigns it

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)

    def span(self, start: int = 0) -> tuple[int, int]:
        """Its first byte and the one after its last, of a record or data at ``start``."""
        return start + self.offset, start + self.offset + self.nbytes

    def describe(self) -> Json:
        """Its dtype and shape, as JSON holds them."""
        return {"dtype": DTYPE_NAMES[self.dtype], "shape": list(self.shape)}


class RecordLayout:
    """Where the parts of an expert's record are, for hidden size H and width I; with ``biases``
    each projection has one, float32."""

    def __init__(self, hidden_size: int, width: int, codecs: ExpertCodecs, biases: bool = False):
        self.hidden_size, self.moe_intermediate_size, self.codecs = hidden_size, width, codecs
        into, back = (width, hidden_size), (hidden_size, width)
        self.shapes = dict(zip(PROJECTIONS, (into, into, back), strict=True))
        weights = {
            name: resident_parts(f"{name}.weight", shape, codecs.of(name), torch.uint8)
            for name, shape in self.shapes.items()
        }
        self._names = {name: tuple(parts) for name, parts in weights.items()}
        all_codes_all_scales = zip(*(parts.items() for parts in weights.values()), strict=True)
        parts = dict(chain.from_iterable(all_codes_all_scales))
        self.bias_shapes = {
            f"{name}.bias": shape[:1] for name, shape in self.shapes.items() if biases
        }
        parts |= {name: Part(torch.float32, shape) for name, shape in self.bias_shapes.items()}
        self.record_bytes = padded(record_bytes(hidden_size, width, codecs, biases))
        if pad := self.record_bytes - sum(part.nbytes for part in parts.values()):
            parts["pad"] = Part(torch.uint8, (pad,))
        self.parts = _in_a_row(parts)
        (_, gate_scales), (up, up_scales), down = self._names.values()
        # Where up's codes and the scales of gate and of up begin; gate's codes begin at 0.
        self.gate_up_places = [self.parts[name].offset for name in (up, gate_scales, up_scales)]
        self.down_places = [self.parts[name].offset for name in down]  # codes and scales

    def describe(self) -> Json:
        """The parts as the manifest holds them."""
        return {
            name: {"offset": part.offset, "bytes": part.nbytes, "shape": list(part.shape)}
            for name, part in self.parts.items()
        }

    def part(self, record: Tensor, name: str) -> Tensor:
        """View of part ``name`` in a record (uint8 [record_bytes], on any device)."""
        part = self.parts[name]
        return record[slice(*part.span())].view(part.dtype).view(part.shape)

    def levels(self) -> Tensor:
        """The levels of gate and up, then of down, float32 [2, 16]: see ``CodedWeight``."""
        return torch.stack([levels_of(codec) for codec in self.codecs])

    def weight(self, record: Tensor, projection: str, levels: Tensor) -> CodedWeight:
        """One projection of the expert in ``record``, as a view; ``levels`` as above."""
        codes, scales = (self.part(record, name) for name in self._names[projection])
        row = PROJECTIONS.index(projection) // 2
        return CodedWeight(codes, scales, levels[row], self.shapes[projection])

    def biases(self, record: Tensor) -> Biases | None:
        """Views of the biases of gate, up and down in ``record``, if it has any."""
        if not self.bias_shapes:
            return None
        gate, up, down = (self.part(record, name) for name in self.bias_shapes)
        return gate, up, down


def resident_parts(
    name: str, shape: tuple[int, ...], quantization: str | Codec, dtype: torch.dtype
) -> dict[str, Part]:
    """Tensors of the resident file that hold weight ``name``, stored as ``none`` (in ``dtype``),
    ``int8`` or by a codec; the last two need a matrix."""
    if isinstance(quantization, Codec):
        N, K = shape
        tensors = quantization.tensors(name, N, K).items()
        return {part: Part(DTYPES[dtype], size) for part, (dtype, size) in tensors}
    if quantization == "int8":
        return {name: Part(torch.int8, shape), f"{name}.scale": Part(torch.float32, shape[:1])}
    return {name: Part(dtype, shape)}


def place(parts: dict[str, Part]) -> dict[str, Part]:
    """Assign offsets without holes, widest dtype first, so that every tensor is aligned."""
    return _in_a_row(dict(sorted(parts.items(), key=lambda item: -item[1].dtype.itemsize)))


def _in_a_row(parts: dict[str, Part]) -> dict[str, Part]:
    placed, offset = {}, 0
    for name, part in parts.items():
        placed[name] = replace(part, offset=offset)
        offset += part.nbytes
    return placed


def safetensors_header(parts: Iterable[tuple[str, Part]]) -> bytes:
    """Length prefix and JSON header of a safetensors file, padded to a multiple of 4096."""
    entries = {name: part.describe() | {"data_offsets": part.span()} for name, part in parts}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def layer_parts(layer: int, experts: int, layout: RecordLayout) -> dict[str, Part]:
    """Tensors of the file that holds the records of ``layer``, in order."""
    parts = {}
    for expert in range(experts):
        for name, part in layout.parts.items():
            offset = expert * layout.record_bytes + part.offset
            tensor = f"model.layers.{layer}.mlp.experts.{expert}.{name}"
            parts[tensor] = replace(part, offset=offset)
    return parts


def part_of(item: Json) -> Part:
    return Part(DTYPES[item["dtype"]], tuple(item["shape"]))


def tensor_parts(entry: Json) -> dict[str, Part]:
    """The tensors of a file's manifest entry and their places, from the data's start."""
    return place({name: part_of(item) for name, item in entry["tensors"].items()})

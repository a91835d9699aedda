"""An export's contents: tensors by file, their precision, and the manifest that describes them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.model.names import expert_name, resident_shapes, role_of, split_name
from slotmoe.quant.codecs.codec import LAYOUT, Codec, ExpertCodecs
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import RESIDENT, Part, RecordLayout, checksum, layer_file
from slotmoe.quant.export.manifest import manifest_checksum
from slotmoe.quant.export.writer import replace_file
from slotmoe.quant.shapes import resident_quantization

Squares = Sequence[float]
"""Sum of squared errors and sum of squared weights."""
_PLAIN = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PLAIN |= {torch.int32: "int32"}


@dataclass(frozen=True)
class Stored:
    """How the export holds a tensor of the source: in ``file``, quantized as ``kind`` (``none``,
    ``int8`` or by a codec), under the names ``parts``."""

    file: str
    kind: str | Codec
    shape: tuple[int, ...]
    parts: tuple[str, ...]


class Contents:
    """The files of an export with resident weights of ``mode`` (``RESIDENT_MODES``) and experts of
    ``codecs``; ``dtypes`` and ``tensors`` are the source's, the latter by file of the export."""

    def __init__(
        self, config: Config, mode: str, codecs: ExpertCodecs, dtypes: Mapping[str, torch.dtype]
    ):
        self.config, self.mode = config, mode
        sizes = config.hidden_size, config.moe_intermediate_size
        self.layout = RecordLayout(*sizes, codecs, config.family.expert_biases)
        self.tensors: dict[str, Stored] = {}
        resident: dict[str, Part] = {}
        for name, shape in resident_shapes(config).items():
            kind = resident_quantization(role_of(name), mode, name)
            parts = layout.resident_parts(name, shape, kind, dtypes[name])
            self.tensors[name] = Stored(RESIDENT, kind, shape, tuple(parts))
            resident |= parts
        self._resident = layout.place(resident)
        self._layers = {layer_file(layer): layer for layer in config.moe_layers}
        self.files = [RESIDENT, *self._layers]
        for file, layer in self._layers.items():
            for expert in range(config.n_routed_experts):
                for projection, shape in self.layout.shapes.items():
                    name = expert_name(layer, expert, projection)
                    codec = codecs.of(projection)
                    names = tuple(layout.resident_parts(name, shape, codec, torch.uint8))
                    self.tensors[name] = Stored(file, codec, shape, names)
                for part, shape in self.layout.bias_shapes.items():
                    name = expert_name(layer, expert, part)
                    self.tensors[name] = Stored(file, "none", shape, (name,))

    def parts(self, file: str) -> dict[str, Part]:
        """Tensors of ``file`` itself and their places."""
        if file == RESIDENT:
            return self._resident
        return layout.layer_parts(self._layers[file], self.config.n_routed_experts, self.layout)

    def nbytes(self, file: str) -> int:
        parts = self.parts(file)
        start = len(layout.safetensors_header(parts.items()))
        return max(part.span(start)[1] for part in parts.values())

    def record_bytes(self, file: str) -> int | None:
        """Size of a record, if ``file`` holds experts."""
        return None if file == RESIDENT else self.layout.record_bytes

    def manifest(
        self,
        source: Json,
        files: Json,
        levels: Mapping[str, Sequence[float]],
        linked_layers: dict[str, int] | None = None,
        made: Json | None = None,
    ) -> Json:
        """The manifest of the export, signed.  ``files`` are its entries by file; ``levels`` those
        of codecs, by name, that are not the codec's own; ``linked_layers`` maps a layer to the one
        whose file it is a hard link to; ``made`` says how weights were quantized and what that cost
        (``quantization_report``)."""
        config, codecs = self.config, self.layout.codecs
        coded = {
            name: (tensor.kind, tensor.shape)
            for name, tensor in self.tensors.items()
            if tensor.file == RESIDENT and isinstance(tensor.kind, Codec)
        }
        table = {
            codec.name: replace(codec, levels=tuple(levels.get(codec.name, codec.levels)))
            for codec in (*codecs, *(codec for codec, _ in coded.values()))
        }
        quantization = {
            "layout": LAYOUT,
            "codecs": {name: table[name].describe() for name in sorted(table)},
            "experts": codecs.names(),
            "resident": self.mode,
            "resident_codecs": {
                name: {"codec": codec.name, "shape": list(shape)}
                for name, (codec, shape) in coded.items()
            },
        }
        manifest = {
            "format_version": layout.FORMAT_VERSION,
            "source": source,
            "quantization": quantization | (made or {}),
            "experts": {
                "layers": list(config.moe_layers),
                **({"mtp_layer": config.num_hidden_layers} if config.mtp else {}),
                "linked_layers": linked_layers or {},
                "n_routed_experts": config.n_routed_experts,
                "hidden_size": config.hidden_size,
                "moe_intermediate_size": config.moe_intermediate_size,
                "record_bytes": self.layout.record_bytes,
                "record": self.layout.describe(),
            },
            "files": dict(sorted(files.items())),
        }
        return {**manifest, "checksum": manifest_checksum(manifest)}


def write_files(contents: Mapping[str, bytes], folder: Path) -> Json:
    """Write files that the export holds as they are; returns their manifest entries, by name."""
    entries = {}
    for name, data in contents.items():
        replace_file(folder / name, data)
        entries[name] = {"bytes": len(data), "checksum": checksum(data)}
    return entries


def quantization_report(contents: Contents, sums: Mapping[str, Sequence[float]]) -> Json:
    """What quantization cost by tensor family, for the manifest.  ``sums`` maps a weight's name to
    its ``squared_error`` and that in its Hessian's measure, zeros if it was not calibrated.

    A family is a tensor's place in a layer, whichever layer (and expert) it is in.  Its relative
    RMS error is ``sqrt(sum (w - w')^2 / sum w^2)`` over all its weights, w' being what readers
    dequantize; the worst layer is the one where the same figure is largest.  Figures are rounded to
    6 digits: sums of float64 then give the same bytes on every machine.
    """
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
            "bits_per_weight": float(f"{8 * sizes[key] / weights:.6g}"),
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
        "bits_per_weight": float(f"{8 * size / weights:.6g}"),
        "families": sorted(rows, key=lambda row: (-sizes[row["family"]], row["family"])),
    }


def _summed(errors: Iterable[Squares]) -> Squares:
    """Exactly rounded sums, so that they don't depend on the order of the work."""
    return [math.fsum(column) for column in zip(*errors, strict=True)] or [0.0, 0.0]


def _relative(squares: Squares) -> float:
    error, weight = squares
    # A manifest holds at most 1000, and a state may say anything of what a killed run wrote.
    return float(f"{min(math.sqrt(error / weight), 1000):.6g}") if weight else 0.0

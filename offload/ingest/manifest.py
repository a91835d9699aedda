"""An export's contents: tensors by file, their precision, and the manifest that describes them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from slotmoe.jsonfile import Json
from slotmoe.model.config import Config
from slotmoe.model.names import expert_name, resident_shapes, role_of
from slotmoe.quant.codecs.codec import LAYOUT, Codec, ExpertCodecs
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import RESIDENT, Part, RecordLayout, checksum, layer_file
from slotmoe.quant.export.manifest import manifest_checksum
from slotmoe.quant.export.writer import replace_file
from slotmoe.quant.shapes import resident_quantization


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
        self.layout = RecordLayout(config.hidden_size, config.moe_intermediate_size, codecs)
        self.tensors: dict[str, Stored] = {}
        resident: dict[str, Part] = {}
        for name, shape in resident_shapes(config).items():
            kind = resident_quantization(role_of(name), mode)
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
        (``report``, see ``slotmoe.offload.ingest.report``)."""
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

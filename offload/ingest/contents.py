"""An export's contents: tensors by file, their precision, and the manifest that describes them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from slotmoe.model.config import Config
from slotmoe.model.names import expert_name, resident_shapes, role_of, split_name
from slotmoe.quant import nf4
from slotmoe.quant.export import layout
from slotmoe.quant.export.layout import PROJECTIONS, RESIDENT, Part, RecordLayout, layer_file
from slotmoe.quant.export.validate import manifest_checksum
from slotmoe.quant.export.verify import file_checksum
from slotmoe.quant.shapes import BLOCK, resident_quantization

_SUFFIXES = {"none": ("",), "int8": ("", ".scale"), "nf4": ("", ".absmax")}


class Contents:
    """The files of one export whose resident weights are ``mode`` (``bf16``, ``int8`` or ``nf4``);
    ``dtypes`` are the source's, by tensor."""

    def __init__(self, config: Config, mode: str, dtypes: Mapping[str, torch.dtype]):
        self.config, self.mode = config, mode
        self.layout = RecordLayout(config.hidden_size, config.moe_intermediate_size)
        self.shapes = resident_shapes(config)
        self._kinds = {name: resident_quantization(role_of(name), mode) for name in self.shapes}
        parts: dict[str, Part] = {}
        for name, shape in self.shapes.items():
            parts |= layout.resident_parts(name, shape, self._kinds[name], dtypes[name])
        self.resident = layout.place(parts)
        self._layers = {layer_file(layer): layer for layer in config.moe_layers}
        self.files = [RESIDENT, *self._layers]

    def tensors(self, file: str) -> list[str]:
        """Source tensors that go into ``file``, an expert's three together."""
        if file == RESIDENT:
            return list(self.shapes)
        layer, experts = self._layers[file], range(self.config.n_routed_experts)
        return [expert_name(layer, expert, name) for expert in experts for name in PROJECTIONS]

    def layer(self, file: str) -> int | None:
        """The layer whose routed experts ``file`` holds; None for the resident weights."""
        return self._layers.get(file)

    def file_of(self, name: str) -> str:
        """The file that the source's tensor ``name`` goes into."""
        layer = split_name(name)[0]
        return RESIDENT if name in self.shapes or layer is None else layer_file(layer)

    def parts(self, file: str) -> dict[str, Part]:
        """Tensors of ``file`` itself and their places."""
        if file == RESIDENT:
            return self.resident
        return layout.layer_parts(self._layers[file], self.config.n_routed_experts, self.layout)

    def kind(self, name: str) -> str:
        """How the source's tensor ``name`` is stored: ``none``, ``int8`` or ``nf4``."""
        return self._kinds.get(name, "nf4")

    def part_names(self, name: str) -> tuple[str, ...]:
        """Tensors of the export that hold the source's tensor ``name``."""
        return tuple(name + suffix for suffix in _SUFFIXES[self.kind(name)])

    def nbytes(self, file: str) -> int:
        """Size of ``file``."""
        parts = self.parts(file)
        end = max(part.offset + part.nbytes for part in parts.values())
        return len(layout.safetensors_header(parts.items())) + end

    def manifest(
        self,
        source: dict[str, Any],
        files: dict[str, Any],
        linked_layers: dict[str, int] | None = None,
        report: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The manifest of the export, signed.  ``files`` are its entries by file; ``linked_layers``
        maps a layer to the one whose file it is a hard link to; ``report`` says what quantization
        cost, where weights were quantized (``slotmoe.offload.ingest.report``)."""
        config, shapes = self.config, self.shapes
        quantization = {
            "experts": "nf4",
            "block": BLOCK,
            "layout": "tiles16",
            "levels": list(nf4.LEVELS),
            "resident": self.mode,
            "resident_shapes": {n: list(shapes[n]) for n in shapes if self.kind(n) == "nf4"},
        }
        manifest = {
            "format_version": layout.FORMAT_VERSION,
            "source": source,
            "quantization": quantization | ({} if report is None else {"report": report}),
            "experts": {
                "layers": list(config.moe_layers),
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


def copied_entries(folder: Path, names: Iterable[str]) -> dict[str, Any]:
    """Manifest entries of files in ``folder`` that were copied from the source, made durable."""
    entries = {}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        entries[name] = {"bytes": size, "checksum": file_checksum(folder / name)}
    return entries

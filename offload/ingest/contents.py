"""What the files of an export are made of: which tensors of the checkpoint go where, and in which
precision."""

from __future__ import annotations

import torch

from slotmoe.model.config import Config
from slotmoe.model.names import expert_name, resident_shapes, role_of, split_name
from slotmoe.quant.export.layout import (
    PROJECTIONS,
    RESIDENT,
    Part,
    RecordLayout,
    layer_file,
    layer_parts,
    place,
    resident_parts,
    safetensors_header,
)
from slotmoe.quant.shapes import resident_quantization

_SUFFIXES = {"none": ("",), "int8": ("", ".scale"), "nf4": ("", ".absmax")}


class Contents:
    """The weight files of one export; ``dtypes`` are the source's, by tensor."""

    def __init__(self, config: Config, mode: str, dtypes: dict[str, torch.dtype]):
        self.config, self.layout = (
            config,
            RecordLayout(config.hidden_size, config.moe_intermediate_size),
        )
        self.resident_shapes = resident_shapes(config)
        self.quantization = {
            name: resident_quantization(role_of(name), mode) for name in self.resident_shapes
        }
        parts: dict[str, Part] = {}
        for name, shape in self.resident_shapes.items():
            parts |= resident_parts(name, shape, self.quantization[name], dtypes[name])
        self._resident_parts = place(parts)
        self._layers = {layer_file(layer): layer for layer in config.moe_layers}
        self.files = [RESIDENT, *self._layers]

    def tensors(self, file: str) -> list[str]:
        """Source tensors that go into ``file``, an expert's three together."""
        if file == RESIDENT:
            return list(self.resident_shapes)
        layer, experts = self._layers[file], range(self.config.n_routed_experts)
        return [
            expert_name(layer, expert, projection)
            for expert in experts
            for projection in PROJECTIONS
        ]

    def layer(self, file: str) -> int | None:
        """The layer whose routed experts ``file`` holds; None for the resident weights."""
        return self._layers.get(file)

    def file_of(self, name: str) -> str:
        """The file that the source's tensor ``name`` goes into."""
        return RESIDENT if name in self.resident_shapes else layer_file(int(name.split(".")[2]))

    def parts(self, file: str) -> dict[str, Part]:
        """Tensors of ``file`` itself and their places."""
        if file == RESIDENT:
            return self._resident_parts
        return layer_parts(self._layers[file], self.config.n_routed_experts, self.layout)

    def kind(self, name: str) -> str:
        """How the source's tensor ``name`` is stored: ``none``, ``int8`` or ``nf4``, as every
        routed expert is."""
        return self.quantization.get(name, "nf4")

    def part_names(self, name: str) -> tuple[str, ...]:
        """Tensors of the export that hold the source's tensor ``name``."""
        return tuple(name + suffix for suffix in _SUFFIXES[self.kind(name)])

    def nbytes(self, file: str) -> int:
        """Size of ``file``."""
        parts = self.parts(file)
        return len(safetensors_header(parts.items())) + max(
            part.offset + part.nbytes for part in parts.values()
        )

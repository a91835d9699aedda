"""Records which experts a run used, for replay under other cache sizes and policies.

A trace file is one line of JSON, ``{"format": "slotmoe-trace", "version": 1, "layers": [...], "n_routed_experts": E,
"num_experts_per_tok": K}``, then one block for each forward step, little-endian: a u32 token count T (more than 1 in
prefill), then u16 expert indices [T, number of layers, K] in gate order.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from slotmoe import ConfigError


class TraceWriter:
    """Writes a trace step by step; a step that fails half-way leaves nothing in the file."""

    def __init__(self, path: Path, layers: tuple[int, ...], n_routed_experts: int, num_experts_per_tok: int):
        try:
            self._file = path.open("wb")
        except OSError as problem:
            raise ConfigError(f"{path}: can't write the trace there ({problem.strerror})") from None
        header = {"format": "slotmoe-trace", "version": 1, "layers": list(layers)}
        header |= {"n_routed_experts": n_routed_experts, "num_experts_per_tok": num_experts_per_tok}
        self._file.write(json.dumps(header).encode() + b"\n")
        self._layers = layers
        self._step: dict[int, np.ndarray] = {}

    def add(self, layer: int, indices: list[list[int]]) -> None:
        """Indices [T, K] of one layer of the present step; a layer met again starts a new step."""
        if layer in self._step:
            self._step.clear()
        self._step[layer] = np.array(indices, "<u2")
        if len(self._step) == len(self._layers):
            block = np.stack([self._step[one] for one in self._layers], axis=1)
            self._file.write(np.uint32(len(block)).astype("<u4").tobytes() + block.tobytes())
            self._step.clear()

    def close(self) -> None:
        self._file.close()


def read_trace(path: Path) -> tuple[dict[str, object], list[np.ndarray]]:
    """Header and steps (uint16 [T, layers, K] each) of a trace file.  Raises ``ConfigError``."""
    data = path.read_bytes()
    line, _, body = data.partition(b"\n")
    try:
        header = json.loads(line)
        width = len(header["layers"]) * header["num_experts_per_tok"]
        shape = (-1, len(header["layers"]), header["num_experts_per_tok"])
        known = header["format"] == "slotmoe-trace" and header["version"] == 1
    except (ValueError, KeyError, TypeError):
        known = False
    if not known:
        raise ConfigError(f"{path}: not a slotmoe trace of version 1")
    steps: list[np.ndarray] = []
    offset = 0
    while offset < len(body):
        size = 2 * width * int.from_bytes(body[offset : offset + 4], "little")
        if size == 0 or offset + 4 + size > len(body):
            raise ConfigError(f"{path}: ends inside step {len(steps)}; the recording was cut off")
        steps.append(np.frombuffer(body, "<u2", size // 2, offset + 4).reshape(shape))
        offset += 4 + size
    return header, steps

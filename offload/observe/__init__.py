"""What a run did: its routing as a file, its times (``profiler``), its bandwidths (``measure``)."""

import json
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slotmoe.errors import ConfigError, naming, refused
from slotmoe.offload.policy.cache import Array, fold


class TraceStep(NamedTuple):
    """A forward step: ``indices`` uint16 [T, layers, K], ``features`` float16 [T, layers, F]."""

    indices: Array
    features: Array


class TraceWriter:
    """Writes which experts a run used, for ``python -m bench replay``; a step that fails half-way
    leaves nothing in the file.

    A trace is one line of JSON, ``{"format": "slotmoe-trace", "version": 2, "layers": [...],
    "n_routed_experts": E, "num_experts_per_tok": K}``, then little-endian blocks, one a step: u32
    token count T (more than 1 in prefill), u16 expert indices [T, layers, K] in gate order, f16
    [T, layers, F], what gates saw, folded.
    """

    def __init__(self, path: Path, layers: tuple[int, ...], n_routed_experts: int, top_k: int):
        with refused(path, ConfigError, "can't write the trace there"):
            self._path, self._file = path, path.open("wb")
        header = {"format": "slotmoe-trace", "version": 2, "layers": layers}
        header |= {"n_routed_experts": n_routed_experts, "num_experts_per_tok": top_k}
        self._write(json.dumps(header).encode() + b"\n")
        self._layers = layers
        self._step: dict[int, TraceStep] = {}  # [T, K] and [T, F] of each layer so far

    def add(self, layer: int, indices: list[list[int]], x_TD: Array, behind: int = 0) -> None:
        """Indices [T, K] and inputs of one layer of the present step, of which ``behind`` tokens of
        that layer came before; a layer met again starts a new step."""
        new = TraceStep(np.array(indices, "<u2"), fold(x_TD).astype("<f2"))
        if behind and layer in self._step:
            new = TraceStep(*map(np.concatenate, zip(self._step[layer], new, strict=True)))
        elif layer in self._step:
            self._step.clear()
        self._step[layer] = new
        whole = len(self._step) == len(self._layers)
        tokens = len(new.indices)
        if whole and tokens == len(self._step[self._layers[0]].indices):
            layers = zip(*(self._step[layer] for layer in self._layers), strict=True)
            parts = [np.uint32(tokens).astype("<u4"), *(np.stack(part, 1) for part in layers)]
            self._write(b"".join(part.tobytes() for part in parts))
            self._step.clear()

    def _write(self, data: bytes) -> None:
        try:
            with naming(self._path):
                self._file.write(data)
                self._file.flush()  # a child that is forked would write what is kept once more
        except OSError:
            with suppress(OSError):
                self._file.close()
            raise

    def close(self) -> None:
        self._file.close()

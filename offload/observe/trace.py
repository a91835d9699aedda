"""Records which experts a run used, for replay under other cache sizes and policies.

A trace file is one line of JSON, ``{"format": "slotmoe-trace", "version": 2, "layers": [...],
"n_routed_experts": E, "num_experts_per_tok": K}``, then little-endian blocks, one a forward step:
u32 token count T (more than 1 in prefill), u16 expert indices [T, layers, K] in gate order, f16 [T,
layers, 256], what gates saw, folded (``slotmoe.offload.policy.forecast``).
"""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from slotmoe.errors import ConfigError, naming, reading, refused
from slotmoe.jsonfile import Json
from slotmoe.offload.policy.forecast import FEATURES, Array, fold

_LONGEST_HEADER = 1 << 16
_KEYS = ("layers", "n_routed_experts", "num_experts_per_tok")
_RECORD = "slotmoe run MODEL PROMPT --trace FILE"


class Step(NamedTuple):
    """A forward step: ``indices`` uint16 [T, layers, K], ``features`` float16 [T, layers, F]."""

    indices: Array
    features: Array


class TraceWriter:
    """Writes a trace step by step; a step that fails half-way leaves nothing in the file."""

    def __init__(self, path: Path, layers: tuple[int, ...], n_routed_experts: int, top_k: int):
        with refused(path, ConfigError, "can't write the trace there"):
            self._path, self._file = path, path.open("wb")
        facts = zip(_KEYS, (layers, n_routed_experts, top_k), strict=True)
        header = {"format": "slotmoe-trace", "version": 2, **dict(facts)}
        self._write(json.dumps(header).encode() + b"\n")
        self._layers = layers
        self._step: dict[int, Step] = {}  # [T, K] and [T, F] of each layer so far

    def add(self, layer: int, indices: list[list[int]], x_TD: Array, behind: int = 0) -> None:
        """Indices [T, K] and inputs of one layer of the present step, of which ``behind`` tokens of
        that layer came before; a layer met again starts a new step."""
        new = Step(np.array(indices, "<u2"), fold(x_TD).astype("<f2"))
        if behind and layer in self._step:
            new = Step(*map(np.concatenate, zip(self._step[layer], new, strict=True)))
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
        with naming(self._path):
            self._file.write(data)
            self._file.flush()  # a child that is forked would write what is kept once more

    def close(self) -> None:
        self._file.close()


def read_trace(path: Path) -> tuple[Json, list[Step]]:
    """Header and steps of a trace file.  Raises ``ConfigError``.

    Everything is checked against the bytes: counts, and each gate's K different experts below E.
    """
    with reading(path, ConfigError), path.open("rb") as file:
        header = _parse_header(path, file.readline(_LONGEST_HEADER))
        body = file.read()
    shape = len(header["layers"]), header["num_experts_per_tok"]
    steps, offset = list[Step](), 0
    while offset < len(body):
        tokens = int.from_bytes(body[offset : offset + 4], "little")
        count = tokens * shape[0]  # of gates' choices
        size, left = 2 * count * (shape[1] + FEATURES), max(len(body) - offset - 4, 0)
        if tokens == 0 or size > left:
            sizes = f"{tokens} tokens, {size} bytes, and {left} bytes are left"
            advice = f"the recording was cut off or damaged; record it again with {_RECORD}"
            raise ConfigError(f"{path}: step {len(steps)} counts {sizes}: {advice}")
        indices = np.frombuffer(body, "<u2", count * shape[1], offset + 4)
        offset += 4 + size
        features = np.frombuffer(body, "<f2", count * FEATURES, offset - 2 * count * FEATURES)
        steps.append(Step(indices.reshape(tokens, *shape), features.reshape(tokens, shape[0], -1)))
    if not steps:
        return header, steps
    # All at once: steps of decode have one token each, and there may be many.
    chosen, experts = np.concatenate([step.indices for step in steps]), header["n_routed_experts"]
    ranked = np.sort(chosen, axis=2)
    repeated = (ranked[:, :, 1:] == ranked[:, :, :-1]).any(axis=2)
    wrong = (ranked[:, :, -1] >= experts) | repeated
    if wrong.any():
        token, row = np.argwhere(wrong)[0]
        what = f"{chosen[token, row].tolist()} in layer {header['layers'][row]}"
        expected = f"expected {chosen.shape[2]} different ones below {experts}"
        problem = f"token {token} chose experts {what}, {expected}"
        raise ConfigError(f"{path}: {problem}; the file is damaged, record it again")
    return header, steps


def _parse_header(path: Path, line: bytes) -> Json:
    try:
        header = json.loads(line)
        layers, experts, top_k = (header[key] for key in _KEYS)
        known = header["format"] == "slotmoe-trace" and header["version"] == 2
        known &= all(type(number) is int for number in (*layers, experts, top_k))
        known &= len(layers) > 0 and layers == sorted(set(layers)) and layers[0] >= 0
        if known and 1 <= top_k <= experts <= 1 << 16:
            return dict(header)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    line_1 = f"JSON with format, version, {', '.join(_KEYS)}"
    problem = f"not a slotmoe trace of version 2, whose first line is {line_1}"
    raise ConfigError(f"{path}: {problem}; record one with {_RECORD}")

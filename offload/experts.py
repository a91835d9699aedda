"""The step above the cache: which experts a layer's tokens need, where they are, and the weighted sum in gate order.

Shape legend: T tokens, D hidden_size, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import expert_name
from offload.cache import LruCache
from offload.store import Slots
from offload.trace import TraceWriter
from quant.export import PROJECTIONS, Export
from quant.matmul import TorchOps, gate_order_sum


def by_expert(x_TD: Tensor, indices: list[list[int]], compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """``compute(expert, x_rows) -> y_rows`` once for each needed expert, over all its tokens: float32 [T, K, D]."""
    y_TKD = torch.empty(len(indices), len(indices[0]), x_TD.shape[1], device=x_TD.device)
    users: dict[int, list[tuple[int, int]]] = {}
    for token, chosen in enumerate(indices):
        for k, expert in enumerate(chosen):
            users.setdefault(expert, []).append((token, k))
    for expert in sorted(users):
        tokens, ks = (torch.tensor(part, device=x_TD.device) for part in zip(*users[expert], strict=True))
        y_TKD[tokens, ks] = compute(expert, x_TD[tokens])
    return y_TKD


class OffloadedExperts:
    """Routed experts behind a cache of slots.  Callable as the network's ``experts``."""

    def __init__(self, export: Export, cache: LruCache, slots: Slots, ops: TorchOps, levels: Tensor):
        self._export, self._layout, self._levels = export, export.layout, levels
        self._cache, self._slots, self._ops = cache, slots, ops
        self.trace: TraceWriter | None = None

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        indices = indices_TK.tolist()
        if self.trace is not None:
            self.trace.add(layer, indices)
        if len(indices) == 1:  # decode: all k experts stay until the step is done
            keys = [self._key(layer, expert) for expert in indices[0]]
            records = [self._record(layer, expert, keep=keys) for expert in indices[0]]
            return self._ops.experts(x_TD[0], records, weights_TK[0], self._layout, self._levels)[None]
        return gate_order_sum(by_expert(x_TD, indices, lambda expert, x: self._one(layer, expert, x)), weights_TK)

    def _one(self, layer: int, expert: int, x_TD: Tensor) -> Tensor:
        return self._ops.expert(x_TD, self._record(layer, expert), self._layout, self._levels)

    def _key(self, layer: int, expert: int) -> int:
        return layer * self._export.experts + expert

    def _record(self, layer: int, expert: int, keep: list[int] | None = None) -> Tensor:
        """The expert's record in its slot, read from disk first if it is not there; ``keep`` are not evicted for it."""
        slot = self._cache.lookup(self._key(layer, expert))
        return self._slots[self._read(layer, expert, keep) if slot is None else slot]

    def _read(self, layer: int, expert: int, keep: list[int] | None = None) -> int:
        key = self._key(layer, expert)
        slot = self._cache.admit(key, keep or ())
        try:
            self._slots.fill(slot, layer, expert)
        except BaseException:  # also Ctrl-C: a half-filled slot must never count as present
            self._cache.drop(key)
            raise
        return slot

    def warm(self, progress: Callable[[int, int], None]) -> None:
        """Read experts in order of layer until no slot is free; ``progress(done, total)`` in bytes."""
        size, total = self._layout.record_bytes, self._cache.slots * self._layout.record_bytes
        for layer in self._export.layers:
            for expert in range(self._export.experts):
                if len(self._cache) == self._cache.slots:
                    return
                if self._key(layer, expert) not in self._cache:
                    self._read(layer, expert)
                    progress(len(self._cache) * size, total)

    def stats(self) -> dict[str, Any]:
        """Counters: ``cache`` (hits, misses, hit_rate, evictions, slots) and ``io`` (bytes and seconds by tier)."""
        cache, looked = self._cache, self._cache.hits + self._cache.misses
        counts = {"hits": cache.hits, "misses": cache.misses, "hit_rate": cache.hits / looked if looked else None}
        counts |= {"evictions": cache.evictions, "slots": cache.slots}
        return {"cache": counts, "io": {"disk": {"bytes": self._slots.bytes_read, "seconds": self._slots.read_seconds}}}

    def close(self) -> None:
        if self.trace is not None:
            self.trace.close()


class ResidentExperts:
    """Routed experts of an unquantized checkpoint, all in memory: the reference path."""

    def __init__(self, weights: dict[str, Tensor], ops: TorchOps):
        self._weights, self._ops = weights, ops

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        def compute(expert: int, x_TD: Tensor) -> Tensor:
            return self._ops.mlp(x_TD, *(self._weights[expert_name(layer, expert, name)] for name in PROJECTIONS))

        return gate_order_sum(by_expert(x_TD, indices_TK.tolist(), compute), weights_TK)

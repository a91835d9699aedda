"""The step above the cache: which experts a layer's tokens need, where they are, and the weighted
sum in gate order.

Shape legend: T tokens, D hidden_size, E routed experts, K experts a token, R rows (MoE layers).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from slotmoe.model.names import expert_name
from slotmoe.model.network import Lap, unwatched
from slotmoe.offload.observe.trace import TraceWriter
from slotmoe.offload.policy.prefetch import Accuracy, Prefetcher, total
from slotmoe.offload.tiers.disk import WARM, Read
from slotmoe.offload.tiers.slots import Slots
from slotmoe.quant.backends.base import TorchOps, gate_order_sum
from slotmoe.quant.export.layout import PROJECTIONS
from slotmoe.quant.export.reader import Export

if TYPE_CHECKING:
    from slotmoe.offload.observe.profiler import Profiler


class Guesser(Protocol):
    """Scores of experts before their gate has spoken; the higher the likelier.  See
    ``slotmoe.offload.predictor``."""

    def token_scores(self, embedding_D: Tensor, hidden_D: Tensor) -> Tensor:
        """The experts of all MoE layers, or the first ones, from a token's embedding and the last
        hidden state before it: float32 [at most L, E]."""

    def layer_scores(self, row: int, x: Tensor, token_scores: Tensor | None = None) -> Tensor:
        """Experts of MoE layer ``row + 1``, from the input of layer ``row``, [D] or [T, D], and
        what ``token_scores`` said about that layer, if anything: float32 [E] or [T, E]."""

    def likely(self, scores_RE: Tensor) -> list[list[int]]:
        """Each row's experts worth guessing, the best first."""


_TOKENS_AT_ONCE = (
    128  # of several experts in one call, so that what has arrived meanwhile is soon looked at
)


class OffloadedExperts:
    """Routed experts behind slots.  Callable as the network's ``experts``.

    A layer's step: demand what is missing, guess what the next layer will use and read that too,
    compute the experts that are here, then each of the others as it arrives.  Without a
    ``prefetcher`` it reads on demand only.  ``warm`` are keys worth having, the best first: they
    fill free slots while the first tokens are made.
    """

    def __init__(
        self,
        export: Export,
        slots: Slots,
        ops: TorchOps,
        levels: Tensor,
        prefetcher: Prefetcher | None,
        guesser: Guesser,
        warm: Sequence[int] = (),
    ):
        self._layout, self._experts, self._levels, self._ops = (
            export.layout,
            export.experts,
            levels,
            ops,
        )
        self._slots, self._cache, self._prefetcher, self._guesser = (
            slots,
            slots.cache,
            prefetcher,
            guesser,
        )
        self._layers, self._rows = (
            export.layers,
            {layer: row for row, layer in enumerate(export.layers)},
        )
        self._warm = list(reversed(warm))
        self._token_scores_LE: Tensor | None = None
        self._met = 0  # missing experts whose read had begun when the gate asked
        self._interrupted = False  # while a step is under way, and after one that did not end
        self.trace: TraceWriter | None = None
        self.profiler: Profiler | None = None
        self.lap: Lap = unwatched

    @property
    def guesses_tokens(self) -> bool:
        """Whether ``begin`` has a use now for the token's embedding and the last hidden state."""
        return self._prefetcher is not None and self._prefetcher.pays()

    def begin(self, tokens: int, embedding_D: Tensor | None, hidden_D: Tensor | None) -> None:
        """A forward step over ``tokens`` tokens starts.  For one token, its embedding and the last
        hidden state before it (float32 [D]) let the guesser name the experts of all layers at
        once."""
        if self._interrupted:
            self._slots.rebuild()
        self._interrupted = True
        self._slots.advance(tokens)
        prefetcher = self._prefetcher
        if prefetcher is None:
            return
        prefetcher.reset()
        self._token_scores_LE = None
        if embedding_D is not None and hidden_D is not None:
            started = time.perf_counter()
            self._token_scores_LE = self._guesser.token_scores(embedding_D, hidden_D)
            likely = self._guesser.likely(self._token_scores_LE)
            for row, experts in enumerate(likely):
                prefetcher.guess(row, self._keys(row, experts), "token")
            prefetcher.cost((time.perf_counter() - started) / len(likely))
            prefetcher.pump(-1)
        self.lap("cache and prefetch")

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        indices, row = indices_TK.tolist(), self._rows[layer]
        if self.trace is not None:
            self.trace.add(layer, indices)
        if self.profiler is not None:
            self.profiler.chose(row, indices)
        if len(indices) == 1:
            y_TD = self._decode(row, x_TD[0], weights_TK[0], self._keys(row, indices[0]))[None]
        else:
            y_TD = self._ops.weighted_sum(self._prefill(row, x_TD, indices_TK, indices), weights_TK)
        if self._warm:
            self._read_warm()
        if self._prefetcher is not None:
            self._prefetcher.computing()
        self._done(row)
        self.lap("cache and prefetch")
        return y_TD

    def here(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Where the experts are, for a call that goes through several layers of one token: the
        slab, the slots int32 [R, E] (negative: not cached) and the levels.  None where something is
        to be read ahead between two."""
        if self._prefetcher is not None or self._warm:
            return None
        return self._slots.slab, self._slots.table_LE, self._levels

    def used(self, layer: int, indices_NK: Tensor) -> None:
        """Such a call has used experts of N MoE layers from ``layer`` on, all of them cached."""
        first = sum(one < layer for one in self._rows)
        for row, experts in enumerate(indices_NK.tolist(), first):
            if self.trace is not None:
                self.trace.add(self._layers[row], [experts])
            if self.profiler is not None:
                self.profiler.chose(row, [experts])
                self.profiler.looked(row, len(experts), 0, 0)
            for key in self._keys(row, experts):
                self._cache.use(key)
        self._done(first + len(indices_NK) - 1)
        self.lap("cache and prefetch")

    def _done(self, row: int) -> None:
        if row == len(self._rows) - 1:
            self._interrupted = False

    def _decode(self, row: int, x_D: Tensor, weights_K: Tensor, keys: list[int]) -> Tensor:
        """One token's weighted sum, float32 [D].  All its experts keep their slots until the sum is
        done."""
        slots, cache = self._slots, self._cache
        missing = [key for key in keys if not cache.use(key)]
        self._settle_guesses(row, keys, missing)
        if not missing:
            self._guess(row, x_D)
            self.lap("cache and prefetch")
            y_D = self._ops.experts(
                x_D, [slots.record(key) for key in keys], weights_K, self._layout, self._levels
            )
            self.lap("experts")
            return y_D
        reads = slots.demand(missing, keep=keys)
        self._guess(row, x_D)
        y_KD = torch.empty(len(keys), len(x_D), device=x_D.device)
        ready = [key for key in keys if key not in missing]
        self.lap("cache and prefetch")
        while ready or reads:
            if ready:
                records = [slots.record(key) for key in ready]
                y_KD[[keys.index(key) for key in ready]] = self._ops.experts_each(
                    x_D, records, self._layout, self._levels
                )
                self.lap("experts")
            finished = self._wait(reads) if reads else []
            ready, reads = (
                [read.key for read in finished],
                [read for read in reads if read not in finished],
            )
        for key in missing:
            slots.settle(key, keep=keys)
        return gate_order_sum(y_KD[None], weights_K[None])[0]

    def _prefill(
        self, row: int, x_TD: Tensor, indices_TK: Tensor, indices: list[list[int]]
    ) -> Tensor:
        """Expert by expert over many tokens, of one sequence or of several, each brought once,
        while others compute: unweighted, float32 [T, K, D]."""
        slots, cache = self._slots, self._cache
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        tokens = {
            row * self._experts + expert: count
            for expert, count in sorted(Counter(chain.from_iterable(indices)).items())
        }
        here, missing = (
            [key for key in tokens if key in cache],
            [key for key in tokens if key not in cache],
        )
        cache.use_chunk(row, indices)
        self._settle_guesses(row, tokens, missing)
        missing.sort(
            key=lambda key: key not in slots
        )  # first those that a prefetch has begun to read
        reads = slots.demand(missing[: slots.transit], keep=missing[: slots.transit])
        coming = missing[len(reads) :]
        self._guess(row, x_TD)
        self.lap("cache and prefetch")
        while here or reads:
            if here and not any(read.done for read in reads):
                totals = accumulate(tokens[key] for key in here)
                several = max(1, sum(total <= _TOKENS_AT_ONCE for total in totals))
                ready, here = here[:several], here[several:]
            else:
                arrived = self._wait(reads)
                ready, reads = (
                    [read.key for read in arrived],
                    [read for read in reads if read not in arrived],
                )
            table = [-1] * self._experts
            for key in ready:
                table[key - row * self._experts] = slots.slot(key)
            slots_TK = torch.tensor(table, dtype=torch.int32, device=x_TD.device)[indices_TK]
            self._ops.experts_by_slot(x_TD, slots.slab, slots_TK, self._layout, self._levels, y_TKD)
            self.lap("experts")
            for key in ready:
                if key not in cache:
                    slots.settle(key, keep=here)
                if coming and len(reads) < slots.transit:
                    reads += slots.demand(
                        [coming.pop(0)], keep=[*ready, *(read.key for read in reads)]
                    )
                elif not coming and self._prefetcher is not None:
                    self._prefetcher.pump(row)
        return y_TKD

    def _wait(self, reads: list[Read]) -> list[Read]:
        """Those of ``reads`` that are done, at least one."""
        finished = self._slots.wait(reads)
        self.lap("waiting for disk")
        return finished

    def _settle_guesses(self, row: int, keys: Collection[int], missing: list[int]) -> None:
        """Tell the prefetcher what the gate has chosen; reads that this proves wrong are given
        up."""
        coming = sum(key in self._slots for key in missing)
        self._met += coming
        if self.profiler is not None:
            self.profiler.looked(row, len(keys) - len(missing), len(missing), coming)
        if self._prefetcher is not None:
            self._prefetcher.asked(row, keys, len(missing))

    def _guess(self, row: int, x: Tensor) -> None:
        """Guess the next MoE layer's experts from this one's input, [D] or [T, D], and read
        ahead."""
        prefetcher = self._prefetcher
        if prefetcher is None:
            return
        if row + 1 < len(self._rows) and prefetcher.pays():
            started = time.perf_counter()
            if x.dim() == 1:
                scores_LE = self._token_scores_LE
                known = (
                    scores_LE[row + 1]
                    if scores_LE is not None and row + 1 < len(scores_LE)
                    else None
                )
                experts = self._guesser.likely(self._guesser.layer_scores(row, x, known)[None])[0]
                prefetcher.cost(time.perf_counter() - started)
            else:  # whatever any token is likely to use, most tokens first
                uses = Counter(
                    chain.from_iterable(self._guesser.likely(self._guesser.layer_scores(row, x)))
                )
                experts = [expert for expert, _ in uses.most_common()]
            prefetcher.guess(row + 1, self._keys(row + 1, experts), "layer")
        prefetcher.pump(row)

    def _keys(self, row: int, experts: list[int]) -> list[int]:
        return [row * self._experts + expert for expert in experts]

    def _read_warm(self) -> None:
        """Keep one read of a popular expert going until the cache has no free room; demands
        overtake it."""
        self._slots.adopt()
        while self._warm and self._warm[-1] in self._slots:
            self._warm.pop()
        if self._slots.full:
            self._warm.clear()
        elif self._warm and self._slots.room() and self._slots.prefetch(self._warm[-1], WARM):
            self._warm.pop()

    def fill(self, progress: Callable[[int, int], None]) -> None:
        """Read experts in order of layer until no slot is free; ``progress(done, total)`` in
        bytes."""
        size, total = self._layout.record_bytes, self._slots.planned * self._layout.record_bytes
        self._slots.fill(
            range(len(self._rows) * self._experts), lambda: progress(len(self._cache) * size, total)
        )

    def memory(self) -> Tensor:
        """The memory of the slots, uint8, with all its pages."""
        return self._slots.memory()

    def stats(self) -> dict[str, Any]:
        """Counters: ``cache``, and ``prefetch`` by horizon (see
        ``slotmoe.offload.policy.prefetch.Accuracy``)."""
        cache, looked = self._cache, self._cache.hits + self._cache.misses
        counts = {
            "hits": cache.hits,
            "misses": cache.misses,
            "hit_rate": cache.hits / looked if looked else None,
        }
        counts |= {
            "already_coming": self._met,
            "evictions": cache.evictions,
            "bypassed": cache.bypassed,
            "slots": self._slots.planned,
        }
        found: dict[str, Any] = {"cache": counts, "wait_seconds": self._slots.wait_seconds}
        if self._prefetcher is not None:
            found["prefetch"] = {
                horizon: asdict(accuracy) for horizon, accuracy in self._prefetcher.accuracy.items()
            }
        return found

    def present(self) -> tuple[int, int]:
        """Bytes of cached records, and bytes of all slots that have been written or made ready."""
        return self._slots.present()

    def prefetch_by_layer(self) -> list[Accuracy]:
        """What became of the guesses for each MoE layer, of both horizons together; empty without a
        prefetcher."""
        if self._prefetcher is None:
            return []
        return [total(both) for both in zip(*self._prefetcher.by_row.values(), strict=True)]

    def close(self) -> None:
        self._slots.close()
        if self.trace is not None:
            self.trace.close()


class ResidentExperts:
    """Routed experts of an unquantized checkpoint, all in memory: the reference path."""

    def __init__(self, weights: dict[str, Tensor], ops: TorchOps):
        self._weights, self._ops = weights, ops

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        for expert in indices_TK.unique().tolist():
            weights = (self._weights[expert_name(layer, expert, name)] for name in PROJECTIONS)
            uses = (indices_TK == expert).nonzero(as_tuple=True)
            y_TKD[uses] = self._ops.mlp(x_TD[uses[0]], *weights)
        return gate_order_sum(y_TKD, weights_TK)

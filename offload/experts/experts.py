"""The experts' step: bring those that a layer needs, compute them there, sum in gate order.

Shapes: T tokens, D hidden_size, M MoE layers, E routed experts, K experts a token.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from slotmoe.border import Timer
from slotmoe.jsonfile import Json
from slotmoe.offload.devices.device import Device
from slotmoe.offload.experts.ahead import Lookahead
from slotmoe.offload.experts.hybrid import HostCompute
from slotmoe.offload.experts.layer_work import Pass, Work
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import STALE
from slotmoe.offload.policy.forecast import FOLLOWED
from slotmoe.offload.policy.hybrid import Split
from slotmoe.quant.backends.base import Records, SlotTable, TorchBackend

# Uses computed in one call on a CPU, so that what has arrived meanwhile soon gives its slot back.
_USES_AT_ONCE = 128
_FETCH = Split()


@dataclass(frozen=True)
class Route:
    """A gate's choice: ``indices`` [T][K] of MoE layer ``row``, and how many of its distinct
    experts were cached, missing, and of these on their way.  ``x_TD`` is their input, None where
    the backend went through several layers at once.  ``behind`` tokens of the pass came before."""

    row: int
    indices: list[list[int]]
    hits: int
    misses: int
    coming: int
    x_TD: Tensor | None
    behind: int = 0


OnLayer = Callable[[Route], None]


class Experts:
    """Routed experts behind slots, on a CPU or a GPU; the network's ``experts``.

    What is cached is computed first, then what arrives, in groups; the sum is in gate order, so the
    result is bitwise the same for every budget, policy and timing.  (What the CPU computes beside a
    GPU is within its kernels' rounding.)  ``lookahead`` reads ahead.
    ``hybrid`` and ``split`` are the CPU's part beside a GPU.

    A layer refers to what it uses, and gives that back at its end, whatever that is.  ``look`` is
    called there and while reads are waited for: it may raise what ends the pass.

    ``layers`` are those of the network and, where ``has_head``, behind them that of the head that
    predicts one token more, which is a pass of its own, a part of the one before (``go_on``).
    """

    def __init__(
        self,
        layers: Sequence[int],
        records: Records,
        slots: Slots,
        backend: TorchBackend,
        device: Device,
        lookahead: Lookahead | None = None,
        hybrid: HostCompute | None = None,
        split: Split = _FETCH,
        has_head: bool = False,
    ):
        self._backend, self._device, self.slots, self._cache = backend, device, slots, slots.cache
        self._layers, self._rows = [*layers], {layer: row for row, layer in enumerate(layers)}
        self.records, self._store = records, slots.store
        self._count = len(layers) - has_head  # of the network's
        # Where graphs find the slots of experts that have arrived.
        self._group_E = device.empty((slots.cache.experts,), torch.int32)
        self._none_ME = torch.full((self._count, slots.cache.experts), -1, dtype=torch.int32)
        self.lookahead = lookahead
        self.hybrid, self.split = hybrid, split
        self.look: Callable[[], None] = lambda: None
        self._apart = False  # whether the pass's tokens are of several sequences
        self._pass = Pass()
        self._met = 0  # missing experts whose read had begun when the gate chose them
        self._listeners: list[tuple[OnLayer, bool]] = []
        self._fetched = self._computed = 0
        self.timer: Timer | None = None

    def on_layer(self, listener: OnLayer, inputs: bool = False) -> Callable[[], None]:
        """Call ``listener`` with each gate's choice from now on, until the returned function is
        called.  With ``inputs`` every ``Route`` has its ``x_TD``."""
        entry = listener, inputs
        self._listeners.append(entry)
        return lambda: self._listeners.remove(entry)

    @property
    def reached(self) -> int:
        """Tokens of the pass, by the share of layers reached.  Another thread may ask."""
        now = self._pass
        if now.row >= self._count:  # the head's pass: the network's has read them
            return 0
        return (max(0, now.row) * now.tokens + now.seen) // self._count

    # The network's side

    def slot_table(self) -> SlotTable:
        """Where experts are; empty while the backend is to stop after each gate."""
        stops = self.lookahead is not None and self.lookahead.active
        stops = stops or any(inputs for _, inputs in self._listeners)
        complete = self.slots.complete and not stops
        slots_ME = self._none_ME if stops else self.slots.slots_ME[: self._count]
        return SlotTable(self.records, slots_ME, complete)

    def begin(self, tokens: int, sequences: int = 1) -> bool:
        """A pass begins, without what the last one left in staging; is ``guess_token`` worth it?"""
        if not self.slots.complete:
            self.slots.advance(tokens)
        self._apart = sequences > 1
        self.go_on(tokens)
        if self.lookahead is None:
            return False
        self.lookahead.begin()
        return self.lookahead.active and tokens == 1

    def go_on(self, tokens: int) -> None:
        """``tokens`` tokens go through the network's layers or, behind a pass, the head's."""
        self._pass = Pass(tokens)

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        """See ``slotmoe.model.network.Experts``."""
        first = bisect_left(self._layers, layer)
        self._pass.reach(first + len(indices_MTK) - 1, indices_MTK.shape[1])
        if self.slots.complete and not self._listeners:  # nothing is ever evicted: only count
            self._cache.hits += indices_MTK.numel()
        else:
            inputs = [] if x_MTD is None or not self._learns else [x_MTD[:, -FOLLOWED:]]
            chosen = self._device.download(indices_MTK, *inputs)
            for row, indices in enumerate(chosen.get().tolist(), first):
                self._tell(Route(row, indices, len(set(chain.from_iterable(indices))), 0, 0, None))
                seen_TD = chosen.others()[0][row - first].numpy() if inputs else None
                self._cache.use_chunk(row, indices, x_TD=seen_TD)
                if self.lookahead is not None:
                    self.lookahead.chosen(row, self._uses(row, indices), 0)
        self._end_of_layer(first + len(indices_MTK) - 1)

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        row = self._rows[layer]
        self._pass.reach(row, len(x_TD))
        y_TKD = self._backend.outputs(x_TD, indices_TK)
        try:
            for slots_E in self._bring(row, x_TD, indices_TK, y_TKD):
                self._backend.experts(x_TD, self.records, slots_E, indices_TK, y_TKD)
                if self.timer is not None:
                    self.timer.mark("experts")
        finally:
            self.slots.release()
            if self.hybrid is not None:
                self.hybrid.end()
        y_TD = self._backend.weighted_sum(y_TKD, weights_TK)
        self._end_of_layer(row)
        return y_TD

    # What a layer needs

    def _bring(self, row: int, x_TD: Tensor, indices_TK: Tensor, y_TKD: Tensor) -> Iterator[Tensor]:
        """Slots of a layer's experts in groups, as ``TorchBackend.experts`` takes them: first what
        is cached, then what arrives.  What the CPU computes goes to ``y_TKD`` meanwhile."""
        slots, store, device, hybrid = self.slots, self._store, self._device, self.hybrid
        if device.queues and slots.complete and not self._listeners:
            self._cache.hits += indices_TK.numel()  # the host need not know the choice
            yield slots.slots_ME[row]
            return
        learns, computes = self._learns, self.split.computes
        inputs = [x_TD if computes else x_TD[-FOLLOWED:]] if computes or learns else []
        download = device.download(indices_TK, *inputs)
        if device.queues:  # by the slot table, before the host knows the choice
            yield slots.slots_ME[row]
        chosen = download.get()
        # Nothing that a copy need not wait for comes before ``demand``: the link idles until then.
        indices = chosen.tolist()
        uses, cached = self._uses(row, indices), self._cache.cached
        coming, left = list[int](), list[int]()
        missing = [id for id in uses if id not in cached]
        for expert_id in missing:
            if (slot := store.of.get(expert_id)) is not None:
                (left if slot.state is STALE else coming).append(expert_id)
        if self.lookahead is not None:
            self.lookahead.chosen(row, uses, len(missing))  # gives wrong guesses' slots back
        computed: list[int] = []
        if computes:
            computed = self._choose_for_cpu(len(indices), uses, missing, coming, left)
        fetched = self._in_order(missing, computed, coming + left)
        reads = slots.demand(fetched[: slots.staging])
        self._met += len(coming)
        self._fetched += len(missing) - len(left) - len(computed)
        self._computed += len(computed)
        newest = {row * self._cache.experts + expert for expert in indices[-1]}
        work = Work(row, uses, newest, self._kept(row, len(indices)))
        work.reads, work.later = reads, fetched[slots.staging :]
        work.cached = [] if device.queues else [id for id in uses if id in cached]
        if missing or (work.many and not slots.complete):
            store.held_N[list(newest)] = True
            if work.many:
                store.held_N[work.cached] = True
                store.held_N[work.kept.start : work.kept.stop] = True
        if hybrid is not None and computes:
            hybrid.begin(download.others()[0], chosen, computed)
        if self._listeners:
            hits, behind = len(uses) - len(missing), self._pass.seen - len(indices)
            self._tell(Route(row, indices, hits, len(missing), len(coming), x_TD, behind))
        if self.lookahead is not None:
            self.lookahead.guess_layer(row, self._count, x_TD)
        seen_TD = download.others()[0][-FOLLOWED:].numpy() if learns else None
        self._cache.use_chunk(row, indices, self._pass.later, seen_TD)  # the disk is at work by now
        if self.timer is not None:
            self.timer.mark("cache and prefetch")
        yield from self._arrivals(work, y_TKD)
        for expert_id in missing:  # in gate order, so that timing changes nothing
            if expert_id in work.used:
                slots.admit(expert_id)
        if missing:
            store.rank()  # now, so that the next layer's demands need not

    def _arrivals(self, work: Work, y_TKD: Tensor) -> Iterator[Tensor]:
        """What has arrived, at most half of the staging slots at once, so that a GPU computes them
        while the others are filled, with what is cached; else what the CPU computes; else wait."""
        slots, hybrid = self.slots, self.hybrid
        self._note_idle(work)
        while True:
            acquired = [*hybrid.host.acquired] if hybrid is not None else []
            if not (work.cached or work.reads or acquired):
                return
            done = [read for read in work.reads if read.done][: max(1, slots.staging // 2)]
            if done or work.cached:
                work.copies += [read.copy for read in done if read.copy is not None]
                slots.take(done)
                if self.timer is not None:
                    self.timer.mark("waiting for disk" if hybrid is None else "waiting for RAM")
                work.reads = [read for read in work.reads if read not in done]
                self._note_idle(work)
                used = [read.expert_id for read in done]
                ready, work.cached = _first(work.cached, work.uses)
                yield self._group(work.row, used + ready)
                self._make_room(work, used, ready)
            elif arrived := [read for read in acquired if read.done]:
                assert hybrid is not None
                ready, _ = _first([read.expert_id for read in arrived], work.uses)
                hybrid.compute(arrived[: len(ready)], work.row, y_TKD)
                if self.timer is not None:
                    self.timer.mark("experts")
            else:
                self.look()  # a layer may have many experts to wait for
                slots.wait([*work.reads, *acquired])
                if self.timer is not None:
                    self.timer.mark("waiting for disk")

    def _note_idle(self, work: Work) -> None:
        """From when all demands are met until the next gate, only guesses are to be read."""
        if self.lookahead is not None and not (work.reads or work.later):
            self.lookahead.idle(work.copies)

    def _make_room(self, work: Work, used: list[int], ready: list[int]) -> None:
        """Experts have been used, in staging and ``ready`` ones that are cached.  The cache admits
        or rejects one token's at the layer's end, in gate order; of many tokens' at once, so that
        demands and then prefetches take their staging slots."""
        if not work.many:
            work.used += used
            return
        if ready and not work.kept:  # what is kept stays held
            self._store.held_N[[id for id in ready if id not in work.newest]] = False
        for expert_id in used:
            self.slots.admit(expert_id, must=expert_id in work.kept)
        if work.kept:
            self.slots.admit_guesses()
        if work.later:
            now, work.later = work.later[: len(used)], work.later[len(used) :]
            work.reads += self.slots.demand(now)
        elif self.lookahead is not None:
            self.lookahead.more(work.row)

    @property
    def _learns(self) -> bool:
        """Whether the cache policy learns from the inputs of this pass's layers."""
        return self._cache.learns and not (self._apart or self.slots.complete)

    def _kept(self, row: int, tokens: int) -> range:
        """Of a pass in several steps this layer's experts stay until its last step, where there is
        room for two layers, and so does what later layers will use.  New experts replace those of
        layers that are done; the first two layers' what the cache likes least but theirs."""
        experts, end = self._cache.experts, len(self._rows) if row >= 2 else row + 2
        if tokens == self._pass.tokens or 2 * experts > self._cache.slots:
            return range(0)
        return range(row * experts, min(end, len(self._rows)) * experts)

    def _group(self, row: int, expert_ids: Sequence[int]) -> Tensor:
        experts = self._cache.experts
        slots_E = np.full(experts, -1, np.int32)
        for expert_id in expert_ids:
            slots_E[expert_id - row * experts] = self._store.of[expert_id].index
        return self._device.upload(torch.from_numpy(slots_E), self._group_E)

    def _uses(self, row: int, indices: list[list[int]]) -> dict[int, int]:
        """Distinct expert ids of a layer in gate order, and how many tokens use each."""
        first = row * self._cache.experts
        if len(indices) == 1:
            return dict.fromkeys([first + expert for expert in indices[0]], 1)
        counts = Counter(chain.from_iterable(indices))
        return {first + expert: count for expert, count in sorted(counts.items())}

    def _in_order(self, missing: list[int], computed: list[int], there: list[int]) -> list[int]:
        """What is missing and not ``computed``, first what is ``there``, then what is in RAM."""
        fetched = [id for id in missing if id not in computed] if computed else missing
        if len(fetched) < 2:
            return fetched
        in_ram = self.hybrid.host.cache.cached if self.hybrid is not None else frozenset()
        ordered = [id for id in fetched if id in there]
        absent = [id for id in fetched if id not in ordered] if ordered else fetched
        ordered += [id for id in absent if id in in_ram]
        return ordered + [id for id in absent if id not in in_ram]

    def _choose_for_cpu(
        self,
        tokens: int,
        uses: Mapping[int, int],
        missing: Sequence[int],
        coming: Collection[int],
        left: Collection[int],
    ) -> list[int]:
        """Which missing experts the CPU computes, but for what is on its way or in a free slot:
        those that the fewest tokens use, and of one token's those that the gate weighs least.  One
        token's are all fetched while slots are free, or nothing would ever fill them."""
        if self.hybrid is None or (tokens == 1 and self.slots.room() > 0):
            return []
        absent = [id for id in reversed(missing) if id not in coming and id not in left]
        absent.sort(key=lambda id: uses[id])
        count = self.split.for_cpu(tokens, [uses[id] for id in absent], len(missing) - len(left))
        in_ram = self.hybrid.host.cache.cached  # these first
        return sorted(absent[:count], key=lambda id: id not in in_ram)

    def _tell(self, route: Route) -> None:
        if route.row < self._count:  # who listens knows of no head
            for listener, _ in self._listeners:
                listener(route)

    def _end_of_layer(self, row: int) -> None:
        if row >= self._count - 1 and self._pass.later == 0:
            self._pass = Pass()
        self.look()
        if self.timer is not None:
            self.timer.mark("cache and prefetch")

    # The runtime's side

    def fill(self, progress: Callable[[int, int], None]) -> None:
        """Read experts in order of layer until no slot is free, and below a GPU until the RAM is
        full; ``progress(done, total)`` in bytes of slots."""
        size, ids = self.slots.slab.shape[1], range(len(self._rows) * self._cache.experts)
        total = self.slots.planned * size

        def done() -> None:
            self.look()
            progress(len(self._cache) * size, total)

        self.slots.fill(ids, done)
        if self.hybrid is not None:
            self.hybrid.host.fill(ids, self.look)

    def stats(self) -> Json:
        """Counters: ``cache``, ``prefetch`` by horizon, and below a GPU ``misses``: how they are
        computed, how many were fetched and how many the CPU computed, in how many seconds."""
        cache, slots = self._cache, self.slots
        lookups = cache.hits + cache.misses
        counts: Json = {"hits": cache.hits, "misses": cache.misses}
        counts |= {"hit_rate": cache.hits / lookups if lookups else None}
        counts |= {"already_coming": self._met, "evictions": cache.evictions}
        counts |= {"bypassed": cache.bypassed, "reclaimed": slots.reclaimed, "slots": slots.planned}
        stats: Json = {"cache": counts, "wait_seconds": slots.wait_seconds}
        if self.lookahead is not None:
            stats["prefetch"] = self.lookahead.stats()
        if self.hybrid is not None:
            misses = {"mode": self.split.mode, "fetched": self._fetched}
            stats["misses"] = misses | {"computed": self._computed, "seconds": self.hybrid.seconds}
        return stats


def _first(expert_ids: list[int], uses: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Expert ids for one call, at least one, and the others."""
    count, total = 0, 0
    while count < len(expert_ids) and (total := total + uses[expert_ids[count]]) <= _USES_AT_ONCE:
        count += 1
    return expert_ids[: max(1, count)], expert_ids[max(1, count) :]

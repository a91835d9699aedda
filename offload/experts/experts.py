"""The experts' step: bring those that a layer needs, compute them there, sum in gate order.

Shapes: T tokens, D hidden_size, M MoE layers, E routed experts, K experts a token.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from slotmoe.errors import informs
from slotmoe.jsonfile import Json
from slotmoe.network.layer_types import Timer
from slotmoe.offload.devices.device import Device, Event
from slotmoe.offload.experts.ahead import Lookahead
from slotmoe.offload.experts.misses import HostCompute
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import STALE, Read
from slotmoe.offload.policy.cache import FOLLOWED
from slotmoe.quant.backends.base import Records, SlotTable, TorchBackend

# Uses computed in one call on a CPU, so that what has arrived meanwhile soon gives its slot back.
_USES_AT_ONCE = 128


@dataclass(frozen=True)
class Route:
    """A gate's choice: ``indices`` [T][K] of MoE layer ``moe_layer``, and how many of its distinct
    experts were cached, missing, and of these on their way.  ``x_TD`` is their input, None where
    the backend went through several layers at once.  ``behind`` tokens of the pass came before."""

    moe_layer: int
    indices: list[list[int]]
    hits: int
    misses: int
    coming: int
    x_TD: Tensor | None
    behind: int = 0


OnLayer = Callable[[Route], None]


@dataclass
class Progress:
    """Of a pass over ``tokens`` tokens: ``seen`` of them have been through ``moe_layer``."""

    tokens: int = 0
    moe_layer: int = -1
    seen: int = 0

    def reach(self, moe_layer: int, tokens: int) -> None:
        """A step's tokens are at a layer."""
        self.seen = (self.seen if moe_layer == self.moe_layer else 0) + tokens
        self.moe_layer = moe_layer

    @property
    def later(self) -> int:
        """Tokens that this step's layer has still to see."""
        return self.tokens - self.seen


@dataclass
class LayerWork:
    """What is left of a layer: ``uses`` counts each expert's tokens, ``newest`` are the newest
    token's experts, ``kept`` the ids that stay for the pass's next step or layer; ids ``cached``,
    to be read ``later``, or ``used`` in staging; reads on their way, and copies of those taken."""

    moe_layer: int
    uses: Mapping[int, int]
    newest: set[int]
    kept: range
    cached: list[int] = field(default_factory=list)
    later: list[int] = field(default_factory=list)
    used: list[int] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    copies: list[Event] = field(default_factory=list)

    @property
    def many(self) -> bool:
        """Whether other tokens use other experts than the newest."""
        return len(self.uses) > len(self.newest)


class Experts:
    """Routed experts behind slots, on a CPU or a GPU; the network's ``experts``.

    What is cached is computed first, then what arrives, in groups; the sum is in gate order, so the
    result is bitwise the same for every budget, policy and timing.  (What the CPU computes beside a
    GPU is within its kernels' rounding.)  ``lookahead`` reads ahead,
    ``hybrid`` is the CPU's part beside a GPU.

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
        has_head: bool = False,
    ):
        self._backend, self._device, self.slots, self._cache = backend, device, slots, slots.cache
        self._layers = layers  # in their order
        self.records, self._store = records, slots.store
        self._count = len(layers) - has_head  # of the network's
        self._firsts_M11 = slots.cache.experts * np.arange(len(layers))[:, None, None]  # ids
        # Where graphs find the slots of experts that have arrived.
        self._group_E = device.empty((slots.cache.experts,), torch.int32)
        self._none_ME = torch.full((self._count, slots.cache.experts), -1, dtype=torch.int32)
        self.lookahead, self.hybrid = lookahead, hybrid
        self.look: Callable[[], None] = lambda: None
        self._apart = False  # whether the pass's tokens are of several sequences
        self._pass = Progress()
        self._missed_N = np.empty(0, np.int64)  # what the last pass computed without a slot
        self._met = 0  # missing experts whose read had begun when the gate chose them
        self._listeners: list[tuple[OnLayer, bool]] = []
        self._fetched = 0
        self.timer: Timer | None = None

    def on_layer(self, listener: OnLayer, inputs: bool = False) -> Callable[[], None]:
        """Call ``listener`` with each gate's choice from now on, until the returned function is
        called.  With ``inputs`` every ``Route`` has its ``x_TD``."""
        entry = informs(listener), inputs
        self._listeners.append(entry)
        return lambda: self._listeners.remove(entry)

    @property
    def reached(self) -> int:
        """Tokens of the pass, by the share of layers reached.  Another thread may ask."""
        now = self._pass
        if now.moe_layer >= self._count:  # the head's pass: the network's has read them
            return 0
        return (max(0, now.moe_layer) * now.tokens + now.seen) // self._count

    @property
    def misses(self) -> str:
        """How a missing expert is computed, as ``Split`` says."""
        return "fetch" if self.hybrid is None else self.hybrid.split.mode

    @torch.inference_mode()
    def load_kernels(self, hidden_size: int, top_k: int) -> None:
        """Compute a token's absent experts, before any record is copied: for a kernel that is not
        loaded the GPU might wait until all copies have ended."""
        device, backend = self._device, self._backend
        shapes = (1, hidden_size), (1, top_k, hidden_size)
        x_TD, y_TKD = (device.empty(shape, torch.float32).zero_() for shape in shapes)
        indices_TK = device.empty((1, top_k), torch.int64).zero_()
        slots_E = device.upload(self._none_ME[0])
        backend.experts(x_TD, self.records, slots_E, indices_TK, y_TKD)
        backend.weighted_sum(y_TKD, y_TKD[..., 0].clone())
        device.download(indices_TK, x_TD).get()

    # The network's side

    def slot_table(self) -> SlotTable:
        """Where experts are; empty while the backend is to stop after each gate."""
        stops = self.lookahead is not None and self.lookahead.active
        if self._listeners:
            stops = stops or any(inputs for _, inputs in self._listeners)
        complete = self.slots.complete and not stops
        slots_ME = self._none_ME if stops else self.slots.slots_ME
        if self._count < len(self._layers):
            slots_ME = slots_ME[: self._count]
        return SlotTable(self.records, slots_ME, complete)

    def begin(self, tokens: int, sequences: int = 1) -> None:
        """A pass begins, without what the last one left in staging."""
        if not self.slots.complete:
            self.slots.advance(tokens)
            if self.hybrid is not None:
                self.hybrid.host.advance(tokens)
            self.slots.fill_behind()
        self._apart, self._pass = sequences > 1, Progress(tokens)
        if self.lookahead is not None:
            self.lookahead.begin()

    def go_on(self, tokens: int) -> None:
        """``tokens`` tokens go through the network's layers or, behind a pass, the head's."""
        self._pass = Progress(tokens)

    def passed(self, layer: int, indices_MTK: Tensor, x_MTD: Tensor | None) -> None:
        """See ``slotmoe.model.network.Experts``."""
        first = bisect_left(self._layers, layer)
        end = first + len(indices_MTK)
        self._pass.reach(end - 1, indices_MTK.size(1))
        if self.slots.complete and not self._listeners:  # nothing is ever evicted: only count
            self._cache.hits += indices_MTK.numel()
        else:
            inputs = [] if x_MTD is None or not self._learns else [x_MTD[:, -FOLLOWED:]]
            chosen = self._device.download(indices_MTK, *inputs)
            seen_MTD = chosen.others()[0].numpy() if inputs else None
            ids_MTK = chosen.get().numpy() + self._firsts_M11[first:end]
            self._missed_N = self._cache.use(ids_MTK, 0, seen_MTD)
            heard = chosen.get().tolist() if self._listeners or self.lookahead is not None else []
            for moe_layer, indices in enumerate(heard, first):
                uses = self._uses(moe_layer, indices)
                missing = len(uses.keys() - self._cache.cached)
                self._tell(Route(moe_layer, indices, len(uses) - missing, missing, 0, None))
                if self.lookahead is not None:
                    self.lookahead.chosen(moe_layer, uses, 0)
        self._end_of_layer()

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        moe_layer = bisect_left(self._layers, layer)
        self._pass.reach(moe_layer, len(x_TD))
        y_TKD = self._backend.outputs(x_TD, indices_TK)
        try:
            for slots_E in self._bring(moe_layer, x_TD, indices_TK, y_TKD):
                self._backend.experts(x_TD, self.records, slots_E, indices_TK, y_TKD)
                if self.timer is not None:
                    self.timer.mark("experts")
        finally:
            self.slots.release()
            if self.hybrid is not None:
                self.hybrid.end()
        y_TD = self._backend.weighted_sum(y_TKD, weights_TK)
        self._end_of_layer()
        return y_TD

    # What a layer needs

    def _bring(
        self, moe_layer: int, x_TD: Tensor, indices_TK: Tensor, y_TKD: Tensor
    ) -> Iterator[Tensor]:
        """Slots of a layer's experts in groups, as ``TorchBackend.experts`` takes them: first what
        is cached, then what arrives.  What the CPU computes goes to ``y_TKD`` meanwhile."""
        slots, store, device, hybrid = self.slots, self._store, self._device, self.hybrid
        if device.queues and slots.complete and not self._listeners:
            self._cache.hits += indices_TK.numel()  # the host need not know the choice
            yield slots.slots_ME[moe_layer]
            return
        learns = self._learns
        computes = self.misses != "fetch"
        inputs = [x_TD if computes else x_TD[-FOLLOWED:]] if computes or learns else []
        download = device.download(indices_TK, *inputs)
        if device.queues:  # by the slot table, before the host knows the choice
            yield slots.slots_ME[moe_layer]
        chosen = download.get()
        # Nothing that a copy need not wait for comes before ``demand``: the link idles until then.
        indices = chosen.tolist()
        uses, cached = self._uses(moe_layer, indices), self._cache.cached
        missing = [id for id in uses if id not in cached]
        there = [slot for id in missing if (slot := store.of.get(id)) is not None]
        coming = len(there) - (left := sum(slot.state is STALE for slot in there))
        if self.lookahead is not None:
            self.lookahead.chosen(moe_layer, uses, len(missing))  # gives wrong guesses' slots back
        fetched, computed = self._divided(len(indices), uses, missing, len(missing) - left)
        reads = slots.demand(fetched[: slots.staging])
        if hybrid is not None and computes:
            hybrid.begin(download.others()[0], chosen, computed)
        self._met += coming
        self._fetched += len(fetched) - left
        newest = {moe_layer * self._cache.experts + expert for expert in indices[-1]}
        work = LayerWork(moe_layer, uses, newest, self._kept(moe_layer, len(indices)))
        work.reads, work.later = reads, fetched[slots.staging :]
        work.cached = [] if device.queues else [id for id in uses if id in cached]
        if computes and not work.many:  # CPU and link are at work now; all else can wait for that
            self._compute(work, y_TKD)
        if missing or (work.many and not slots.complete):
            store.held_N[list(newest)] = True
            if work.many:
                store.held_N[work.cached] = True
                store.held_N[work.kept.start : work.kept.stop] = True
        if self._listeners:
            hits, behind = len(uses) - len(missing), self._pass.seen - len(indices)
            self._tell(Route(moe_layer, indices, hits, len(missing), coming, x_TD, behind))
        if self.lookahead is not None:
            self.lookahead.guess_layer(moe_layer, x_TD)
        seen_1TD = download.others()[0][None, -FOLLOWED:].numpy() if learns else None
        ids_1TK = chosen.numpy()[None] + self._firsts_M11[moe_layer]
        self._cache.use(ids_1TK, self._pass.later, seen_1TD)  # disk or link are at work by now
        if self.timer is not None:
            self.timer.mark("cache and prefetch")
        yield from self._arrivals(work, y_TKD)
        for expert_id in missing:  # in gate order, so that timing changes nothing
            if expert_id in work.used:
                slots.admit(expert_id)
        if missing:
            store.rank()  # now, so that the next layer's demands need not

    def _divided(
        self, tokens: int, uses: Mapping[int, int], missing: list[int], absent: int
    ) -> tuple[list[int], list[int]]:
        """Which of a layer's missing experts are fetched, first what is on its way or in a free
        slot, then what is in RAM; and which the CPU computes, of those in no slot.  ``absent``
        counts what no free slot holds.  One token's are all fetched while slots of the cache are
        free, or nothing would ever fill them."""
        of, hybrid = self._store.of, self.hybrid
        if hybrid is None:
            return sorted(missing, key=lambda id: id not in of), []
        computed = list[int]()
        if self.misses != "fetch" and (tokens > 1 or self.slots.room() == 0):
            computed = hybrid.choose(tokens, uses, [id for id in missing if id not in of], absent)
        in_ram, fetched = hybrid.host.cache.cached, [id for id in missing if id not in computed]
        return sorted(fetched, key=lambda id: 0 if id in of else 1 if id in in_ram else 2), computed

    def _arrivals(self, work: LayerWork, y_TKD: Tensor) -> Iterator[Tensor]:
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
                yield self._group(work.moe_layer, used + ready)
                self._make_room(work, used, ready)
            elif not self._compute(work, y_TKD):
                self.look()  # a layer may have many experts to wait for
                slots.wait([*work.reads, *acquired])
                if self.timer is not None:
                    self.timer.mark("waiting for disk")

    def _compute(self, work: LayerWork, y_TKD: Tensor) -> bool:
        """Let the CPU compute what has arrived of its part; whether there was anything."""
        hybrid = self.hybrid
        if hybrid is None or not (arrived := [read for read in hybrid.host.acquired if read.done]):
            return False
        ready, _ = _first([read.expert_id for read in arrived], work.uses)
        hybrid.compute(arrived[: len(ready)], work.moe_layer, y_TKD)
        if self.timer is not None:
            self.timer.mark("experts")
        return True

    def _note_idle(self, work: LayerWork) -> None:
        """From when all demands are met until the next gate, only guesses are to be read."""
        if self.lookahead is not None and not (work.reads or work.later):
            self.lookahead.idle(work.copies)

    def _make_room(self, work: LayerWork, used: list[int], ready: list[int]) -> None:
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
            self.lookahead.more(work.moe_layer)

    @property
    def _learns(self) -> bool:
        """Whether the cache policy learns from the inputs of this pass's layers."""
        return self._cache.learns and not (self._apart or self.slots.complete)

    def _kept(self, moe_layer: int, tokens: int) -> range:
        """Of a pass in several steps this layer's experts stay until its last step, where there is
        room for two layers, and so does what later layers will use.  New experts replace those of
        layers that are done; the first two layers' what the cache likes least but theirs."""
        experts, count = self._cache.experts, len(self._layers)
        if tokens == self._pass.tokens or 2 * experts > self._cache.slots:
            return range(0)
        end = count if moe_layer >= 2 else min(moe_layer + 2, count)
        return range(moe_layer * experts, end * experts)

    def _group(self, moe_layer: int, expert_ids: Sequence[int]) -> Tensor:
        experts = self._cache.experts
        slots_E = np.full(experts, -1, np.int32)
        for expert_id in expert_ids:
            slots_E[expert_id - moe_layer * experts] = self._store.of[expert_id].index
        return self._device.upload(torch.from_numpy(slots_E), self._group_E)

    def _uses(self, moe_layer: int, indices: list[list[int]]) -> dict[int, int]:
        """Distinct expert ids of a layer in gate order, and how many tokens use each."""
        first = moe_layer * self._cache.experts
        if len(indices) == 1:
            return dict.fromkeys([first + expert for expert in indices[0]], 1)
        counts = Counter(chain.from_iterable(indices))
        return {first + expert: count for expert, count in sorted(counts.items())}

    def _tell(self, route: Route) -> None:
        if route.moe_layer < self._count:  # who listens knows of no head
            for listener, _ in self._listeners:
                listener(route)

    def _end_of_layer(self) -> None:
        self.look()
        if self.timer is not None:
            self.timer.mark("cache and prefetch")

    # The runtime's side

    def fill(self, progress: Callable[[int, int], None]) -> None:
        """Fill free slots and wait for that; ``progress(done, total)`` in bytes of slots."""
        size = self.slots.record_bytes

        def done() -> None:
            self.look()
            progress(len(self._cache) * size, self.slots.planned * size)

        self.slots.fill(done)

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
            misses = {"mode": self.misses, "fetched": self._fetched}
            misses |= {"computed": self.hybrid.computed, "seconds": self.hybrid.seconds}
            stats["misses"] = misses
        return stats


def _first(expert_ids: list[int], uses: Mapping[int, int]) -> tuple[list[int], list[int]]:
    """Expert ids for one call, at least one, and the others."""
    count, total = 0, 0
    while count < len(expert_ids) and (total := total + uses[expert_ids[count]]) <= _USES_AT_ONCE:
        count += 1
    return expert_ids[: max(1, count)], expert_ids[max(1, count) :]

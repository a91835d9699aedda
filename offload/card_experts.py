"""The step above the cache where slots are on a card: kernels are queued, records follow on a
stream of their own, and the CPU computes what would take longer to bring.

Decode, one layer: what is in a slot is computed by a table on the card before the host knows what
the gate chose.  Then the host learns it, queues the copies of what it fetches and behind them the
kernel that uses them, and computes the others itself from the host tier.  It waits for nothing but
the gate's choice and records that come from disk.  With every expert in a slot it does not wait at
all.

Shape legend: T tokens, D hidden_size, E routed experts, K experts a token, N = T * K uses, G
experts of one call.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from slotmoe.offload.experts import Guesser, OffloadedExperts
from slotmoe.offload.plan.memory import LENT
from slotmoe.offload.policy.cache import Cache
from slotmoe.offload.policy.hybrid import Costs, for_cpu
from slotmoe.offload.policy.prefetch import Prefetcher
from slotmoe.offload.tiers.device import Card, full
from slotmoe.offload.tiers.disk import Read
from slotmoe.offload.tiers.host import HostTier
from slotmoe.offload.tiers.slots import Slots
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.export.reader import Export


def users_of(indices_TK: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Expert -> (its tokens, its rows of the outputs [T * K, D]), experts ascending; int64."""
    chosen = indices_TK.flatten()
    order = chosen.argsort(stable=True)
    experts, counts = chosen[order].unique_consecutive(return_counts=True)
    sizes = counts.tolist()
    return dict(
        zip(
            experts.tolist(),
            zip((order // indices_TK.shape[1]).split(sizes), order.split(sizes), strict=True),
            strict=True,
        )
    )


class CardSlots(Slots):
    """Slots on a card, and a table there of who is cached where: int32 [layers, E], -1 for what is
    not.

    Entries change by kernels that carry their value, never by copies, which would wait for the
    records' own."""

    def __init__(
        self,
        source: HostTier,
        cache: Cache,
        transit: int,
        reserve: int,
        record_bytes: int,
        card: Card,
    ):
        super().__init__(source, cache, transit, reserve, record_bytes, card)
        self.card = card
        self.table_LE = full(card, (cache.layers, cache.experts), -1)
        self._entries = self.table_LE.view(-1)

    @property
    def slab(self) -> Tensor:
        """All slots, uint8 [S, record_bytes]."""
        return self._table.slab

    def slot(self, key: int) -> int:
        """Where ``key``, which is cached or on its way, is."""
        return self._table.slot_of[key]

    @property
    def complete(self) -> bool:
        """Whether every expert is cached."""
        return len(self.cache) == self._entries.numel()

    def spare(self) -> list[Tensor]:
        """Slots that nothing is in: uint8 [record_bytes] each."""
        return [self.slab[slot] for slot in self._table.free]

    def _entered(self, key: int, leaving: int | None) -> None:
        if leaving is not None:
            self._entries[leaving].fill_(-1)
        self._entries[key].fill_(self._table.slot_of[key])

    def rebuild(self) -> None:
        """Make the table what it has to be: a step that was interrupted may have changed only one
        of the two."""
        slots = [
            self._table.slot_of[key] if key in self.cache else -1
            for key in range(self._entries.numel())
        ]
        self._entries.copy_(self.card.upload(torch.tensor(slots, dtype=torch.int32)))


@dataclass(frozen=True)
class Misses:
    """How missing experts are computed: ``mode`` is ``fetch``, ``cpu`` or ``hybrid``, ``ops`` and
    ``levels`` are the CPU's."""

    mode: str
    costs: Costs
    ops: TorchOps
    levels: Tensor


class CardExperts(OffloadedExperts):
    """Routed experts behind slots on a card, with the host tier ``host`` below.  Callable as the
    network's ``experts``.

    With ``fetch`` every expert is computed on the card and results are bitwise the same for every
    budget; what the CPU computes (``cpu``, ``hybrid``) is within its kernels' rounding.
    """

    def __init__(
        self,
        export: Export,
        slots: CardSlots,
        ops: TorchOps,
        levels: Tensor,
        prefetcher: Prefetcher | None,
        guesser: Guesser,
        warm: Sequence[int],
        card: Card,
        host: HostTier,
        misses: Misses,
        top_k: int,
    ):
        super().__init__(export, slots, ops, levels, prefetcher, guesser, warm)
        self._placed, self._card, self._host, self.misses = slots, card, host, misses
        self._top_k, self._fetched, self._computed = top_k, 0, 0
        self._compute_seconds = 0.0

    @property
    def on_device(self) -> bool:
        """Whether one token needs nothing of the host: every expert is in a slot and nobody
        watches.  Then a call may be recorded, and repeated without being made
        (``slotmoe.model.network.Experts``)."""
        return self._placed.complete and self.trace is None and self.profiler is None

    def begin(self, tokens: int, embedding_D: Tensor | None, hidden_D: Tensor | None) -> None:
        super().begin(tokens, embedding_D, hidden_D)
        alone = tokens == 1 and self.on_device
        self._cache.hits += alone * len(self._rows) * self._top_k
        self._interrupted = not alone  # what is not called changes nothing either

    def __call__(self, layer: int, x_TD: Tensor, weights_TK: Tensor, indices_TK: Tensor) -> Tensor:
        row = self._rows[layer]
        y_TKD = torch.empty(*indices_TK.shape, x_TD.shape[1], device=x_TD.device)
        if len(x_TD) == 1:
            self._one(layer, row, x_TD, indices_TK, y_TKD)
        else:
            self._many(layer, row, x_TD, indices_TK, y_TKD)
        y_TD = self._ops.weighted_sum(y_TKD, weights_TK)
        if self._warm:
            self._read_warm()
        if self._prefetcher is not None:
            self._prefetcher.computing()
        self._done(row)
        self.lap("cache and prefetch")
        return y_TD

    def _by_slot(self, x_TD: Tensor, slots_TK: Tensor, y_TKD: Tensor) -> None:
        self._ops.experts_by_slot(
            x_TD, self._placed.slab, slots_TK, self._layout, self._levels, y_TKD
        )

    def _watch(self, layer: int, row: int, indices: list[list[int]]) -> None:
        if self.trace is not None:
            self.trace.add(layer, indices)
        if self.profiler is not None:
            self.profiler.chose(row, indices)

    def _one(self, layer: int, row: int, x_1D: Tensor, indices_1K: Tensor, y_1KD: Tensor) -> None:
        """One token: what is here first, by the table, then what is missing."""
        slots, cache, card = self._placed, self._cache, self._card
        if self.on_device:
            self._by_slot(x_1D, slots.table_LE[row][indices_1K], y_1KD)
            return
        chosen = card.download(indices_1K)
        token = card.download(x_1D) if self.misses.mode != "fetch" else None
        self._by_slot(x_1D, slots.table_LE[row][indices_1K], y_1KD)
        indices = chosen.get().tolist()
        self._watch(layer, row, indices)
        keys = self._keys(row, indices[0])
        missing = [key for key in keys if not cache.use(key)]
        self._settle_guesses(row, keys, missing)
        computed = self._decide(missing)
        fetched = [key for key in missing if key not in computed]
        reads = slots.demand(fetched, keep=keys)
        lent = [self._host.lend(key) for key in missing if key in computed]
        self._host.submit(lent)
        self._count(len(fetched), len(lent))
        self._guess(row, x_1D[0])
        self.lap("cache and prefetch")

        def arrived(ready: list[int]) -> None:
            late_1K = full(card, (1, len(keys)), -1)
            for key in ready:
                late_1K[0, keys.index(key)].fill_(slots.slot(key))
            self._by_slot(x_1D, late_1K, y_1KD)

        def compute(ready: list[Read]) -> None:
            assert token is not None
            records = [self._host.record(read) for read in ready]
            y_RD = card.upload(
                self.misses.ops.experts_each(
                    token.get()[0], records, self._layout, self.misses.levels
                )
            )
            for read, y_D in zip(ready, y_RD, strict=True):
                y_1KD[0, keys.index(read.key)] = y_D

        self._bring(reads, lent, arrived, compute)
        for key in fetched:
            slots.settle(key, keep=keys)

    def _bring(
        self,
        reads: list[Read],
        lent: list[Read],
        arrived: Callable[[list[int]], None],
        compute: Callable[[list[Read]], None],
    ) -> None:
        """``arrived(keys)`` for reads whose copies are queued, as soon as they are, before
        ``compute(reads)`` for what is lent and in RAM; waits only where there is neither."""
        while reads or lent:
            if finished := [read for read in reads if read.done]:
                self._placed.wait(finished)
                self.lap("waiting for RAM")
                arrived([read.key for read in finished])
                self.lap("experts")
                reads = [read for read in reads if read not in finished]
            elif ready := [read for read in lent if read.done]:
                self._compute_lent(ready, compute)
                lent = [read for read in lent if read not in ready]
            else:
                self._await([*reads, *lent])

    def _count(self, fetched: int, computed: int) -> None:
        self._fetched += fetched
        self._computed += computed

    def _await(self, reads: list[Read]) -> None:
        """Block until one of ``reads`` has come from disk."""
        started = time.perf_counter()
        self._host.wait(reads)
        self._placed.wait_seconds += time.perf_counter() - started
        self.lap("waiting for disk")

    def _compute_lent(self, ready: list[Read], compute: Callable[[list[Read]], None]) -> None:
        for read in ready:
            if read.error is not None:
                raise read.error
        started = time.perf_counter()
        compute(ready)
        self._compute_seconds += time.perf_counter() - started
        for read in ready:
            self._host.give_back(read)
        self.lap("experts")

    def _decide(self, missing: list[int]) -> set[int]:
        """Which of one token's missing experts the CPU computes: those that the gate weighs least.
        As long as slots are free all are fetched, or nothing would ever fill them; what is on its
        way already is not computed again."""
        if self.misses.mode == "fetch" or self._placed.room() > 0:
            return set()
        absent = [key for key in missing if key not in self._placed]
        if self.misses.mode == "cpu":
            return set(absent)
        count = min(len(absent), for_cpu([1] * len(missing), self.misses.costs))
        return set(absent[len(absent) - count :])

    def _many(self, layer: int, row: int, x_TD: Tensor, indices_TK: Tensor, y_TKD: Tensor) -> None:
        """Many tokens, expert by expert: those that are here in one call, then group after group of
        those that are brought, while the next group is on its way and the CPU computes what few
        tokens want."""
        slots, cache, card = self._placed, self._cache, self._card
        chosen_TK = card.download(indices_TK).get()
        indices = chosen_TK.tolist()
        self._watch(layer, row, indices)
        users = {row * self._experts + expert: use for expert, use in users_of(chosen_TK).items()}
        here, missing = (
            [key for key in users if key in cache],
            [key for key in users if key not in cache],
        )
        cache.use_chunk(row, indices)
        self._settle_guesses(row, users, missing)
        computed = self._decide_many(users, missing)
        self._count(len(missing) - len(computed), len(computed))
        # First what is on its way, then what is in RAM, so that the disk has its time.
        fetched = sorted(
            set(missing).difference(computed),
            key=lambda key: (key not in slots, key not in self._host),
        )
        size = max(1, slots.transit // 2)
        groups = [fetched[start : start + size] for start in range(0, len(fetched), size)]
        uses = _Uses(
            card, [users[key] for key in [*here, *fetched]], [slots.slot(key) for key in here]
        )
        y_ND, done = y_TKD.flatten(0, 1), 0

        def run(count: int, slots_G: Tensor) -> None:
            nonlocal done
            tokens_N, rows_N, starts_G1 = uses.part(done, count)
            y = self._ops.experts_grouped(
                x_TD, tokens_N, starts_G1, slots_G, slots.slab, self._layout, self._levels
            )
            y_ND.index_copy_(0, rows_N, y)
            done += count
            self.lap("experts")

        reads = slots.demand(groups[0], keep=groups[0]) if groups else []
        by_cpu = _ByCpu(self, computed, users, x_TD, y_ND)
        self._guess(row, x_TD)
        self.lap("cache and prefetch")
        if here:
            run(len(here), uses.here_G)
        for number, group in enumerate(groups):
            later = groups[number + 1] if number + 1 < len(groups) else []
            ahead = slots.demand(later, keep=[*group, *later])
            while waiting := [read for read in reads if not read.done]:
                if not by_cpu.step():
                    self._await(waiting + by_cpu.lent)
            slots.wait(reads)
            self.lap("waiting for RAM")
            slots_G = full(card, (len(group),), 0)
            for place, key in enumerate(group):
                slots_G[place].fill_(slots.slot(key))
            run(len(group), slots_G)
            for key in group:
                slots.settle(key, keep=())
            reads = ahead
        if self._prefetcher is not None:
            self._prefetcher.pump(row)
        while by_cpu.lent:
            if not by_cpu.step():
                self._await(by_cpu.lent)

    def _decide_many(self, users: dict[int, Any], missing: list[int]) -> list[int]:
        """Which of a pass's missing experts the CPU computes: those that the fewest tokens want."""
        if self.misses.mode == "fetch":
            return []
        absent = sorted(
            (key for key in missing if key not in self._placed), key=lambda key: len(users[key][0])
        )
        return absent[: for_cpu([len(users[key][0]) for key in absent], self.misses.costs)]

    def fill(self, progress: Callable[[int, int], None]) -> None:
        """Read experts until no slot is free, and then until the RAM below is full;
        ``progress(done, total)`` in bytes of slots."""
        super().fill(progress)
        self._host.fill(range(len(self._rows) * self._experts))

    def memory(self) -> Tensor:
        """The memory of the slots, uint8, on the card."""
        return self._placed.slab.view(-1)

    def spare(self, count: int) -> list[Tensor]:
        """``count`` places on the card for a record each, free slots as far as there are: to
        measure copies with."""
        free = self._placed.spare()[:count]
        return free + list(
            self._card.empty((count - len(free), self._layout.record_bytes), torch.uint8)
        )

    def stats(self) -> dict[str, Any]:
        """Also ``misses``: how they are computed, how many were fetched and how many the CPU
        computed, in how many seconds."""
        counts = {
            "mode": self.misses.mode,
            "fetched": self._fetched,
            "computed": self._computed,
            "seconds": self._compute_seconds,
        }
        return {**super().stats(), "misses": counts}


class _Uses:
    """Which tokens use which experts of a pass, on the card, expert after expert in the order of
    their calls.

    One transfer at the pass's start: later ones would wait for the records' copies."""

    def __init__(self, card: Card, users: list[tuple[Tensor, Tensor]], here: list[int]):
        self._bounds = list(accumulate((len(tokens) for tokens, _ in users), initial=0))
        bounds, slots = (torch.tensor(one, dtype=torch.int64) for one in (self._bounds, here))
        empty = [torch.empty(0, dtype=torch.int64)]
        parts = [
            torch.cat([*(tokens for tokens, _ in users), *empty]),
            torch.cat([*(rows for _, rows in users), *empty]),
            bounds,
            slots,
        ]
        self._tokens_N, self._rows_N, self._bounds_G1, here_G = card.upload(torch.cat(parts)).split(
            [len(part) for part in parts]
        )
        self.here_G = here_G.int()

    def part(self, first: int, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of ``count`` experts from number ``first`` on: tokens and rows of the outputs, int64 [N],
        and starts, int32 [count + 1]."""
        start, stop = self._bounds[first], self._bounds[first + count]
        starts_G1 = (self._bounds_G1[first : first + count + 1] - start).int()
        return self._tokens_N[start:stop], self._rows_N[start:stop], starts_G1


class _ByCpu:
    """The experts of a pass that the CPU computes: a few at a time are borrowed from the host
    tier."""

    def __init__(
        self,
        experts: CardExperts,
        keys: list[int],
        users: dict[int, tuple[Tensor, Tensor]],
        x_TD: Tensor,
        y_ND: Tensor,
    ):
        self._experts, self._users, self._y_ND = experts, users, y_ND
        self._waiting = sorted(
            keys, key=lambda key: key not in experts._host, reverse=True
        )  # taken from the end: those in RAM first
        self._x_TD = experts._card.download(x_TD) if keys else None
        self.lent: list[Read] = []
        self._borrow()

    def _borrow(self) -> None:
        while self._waiting and len(self.lent) < LENT:
            self.lent.append(self._experts._host.lend(self._waiting.pop()))
            self._experts._host.submit(self.lent[-1:])

    def step(self) -> bool:
        """Compute one expert that is in RAM; False if none is."""
        if (ready := next((read for read in self.lent if read.done), None)) is None:
            return False
        self.lent.remove(ready)
        self._experts._compute_lent([ready], self._compute)
        self._borrow()
        return True

    def _compute(self, ready: list[Read]) -> None:
        assert self._x_TD is not None
        card, misses = self._experts._card, self._experts.misses
        for read in ready:
            tokens, rows = self._users[read.key]
            record, layout = self._experts._host.record(read), self._experts._layout
            y = misses.ops.expert(self._x_TD.get()[tokens], record, layout, misses.levels)
            self._y_ND.index_copy_(0, card.upload(rows), card.upload(y))

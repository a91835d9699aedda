"""Which experts keep a slot: policies over expert ids, without torch.

An expert id is ``row * experts + expert``, where row counts the MoE layers from 0.  A policy gives
each expert a worth.  The cached expert of least worth, and of equals the one of lowest id, is
evicted for a new one.  With bypass the new one gets a slot only if it is worth more: layers are
visited in a cycle, so a cache smaller than what one token uses never hits if it admits everything.
What copies the bytes stands elsewhere.

A forward pass of T tokens is ``advance(T)``, then layer by layer ``use_chunk``, and ``offer`` for
what was missing, once its bytes are in memory.

Shapes: T tokens, D hidden_size, K experts a token, M MoE layers, E experts, N expert ids.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import numpy as np

from slotmoe.offload.policy.forecast import Array, Forecast


class Cache(ABC):
    """What is cached, and the counters; a policy keeps ``_worth_N`` up to date."""

    _worth_N: Array
    learns = False  # whether ``use_chunk`` wants the layer's inputs

    def __init__(
        self,
        slots: int,
        layers: int,
        experts: int,
        popularity: Sequence[float] | None = None,
        bypass: bool = False,
    ):
        """``popularity`` is the expected uses of each expert a token: what a policy believes before
        it has seen any."""
        assert popularity is None or len(popularity) == layers * experts
        self.slots, self.layers, self.experts, self.bypass = slots, layers, experts, bypass
        self.hits = self.misses = self.evictions = self.bypassed = 0
        self.cached: set[int] = set()
        self._absent_N = np.full(layers * experts, np.inf)  # 0 where it is cached
        self._now = 0  # tokens so far
        self._popularity_N = np.zeros(layers * experts)
        if popularity is not None:
            self._popularity_N[:] = popularity
        self._start()

    def advance(self, tokens: int = 1) -> None:
        """A forward pass over ``tokens`` more tokens of the sequence begins."""
        self._now += tokens

    def use(self, expert_id: int) -> bool:
        """The newest token's gate chose ``expert_id``, cached or not; True if it is cached."""
        row, expert = divmod(expert_id, self.experts)
        self.use_chunk(row, [[expert]])
        return expert_id in self.cached

    def use_chunk(
        self, row: int, indices: Sequence[Sequence[int]], later: int = 0, x_TD: Array | None = None
    ) -> None:
        """The gate of layer ``row`` chose ``indices`` [T, K] for T of the pass's tokens, with
        ``later`` more behind them: as many uses, but each distinct expert is one hit or one miss,
        since a chunk brings it once.  ``x_TD`` are the newest tokens' inputs of the layer, None
        where they do not follow each other."""
        ids_TK = np.array(indices) + row * self.experts
        self._now -= later
        self._touch(row, ids_TK)
        self._now += later
        distinct = set(ids_TK.ravel().tolist())
        hits = len(distinct & self.cached)
        self.hits += hits
        self.misses += len(distinct) - hits

    def offer(self, expert_id: int, pinned: Collection[int] = (), must: bool = False) -> int | None:
        """``expert_id`` was used, is not cached, and its bytes are in memory: what is evicted?

        None if there was room, a cached expert outside ``pinned`` that ``expert_id`` replaces, or
        ``expert_id`` itself if it gets no slot, which with ``must`` it gets unless all are pinned.
        """
        if len(self.cached) < self.slots:
            self.add(expert_id)
            return None
        worth_N = self._worth_now()
        limit = worth_N[expert_id] if self.bypass and not must else np.inf
        worth_N = worth_N + self._absent_N
        if isinstance(pinned, range):  # it may be long
            worth_N[pinned.start : pinned.stop] = np.inf
        else:
            worth_N[list(pinned)] = np.inf
        victim = int(worth_N.argmin())
        if worth_N[victim] >= limit:
            self.bypassed += 1
            return expert_id
        self.remove(victim)
        self.add(expert_id)
        self.evictions += 1
        return victim

    def by_worth(self, expert_ids: Collection[int]) -> list[int]:
        """``expert_ids``, cached or not, the one of least worth last, of equals the first."""
        ids = np.array([*expert_ids][::-1])
        order = (-self._worth_now()[ids]).argsort(kind="stable")
        return [int(id) for id in ids[order]]

    def add(self, expert_id: int) -> None:
        """Put the absent ``expert_id`` into free room."""
        assert expert_id not in self.cached and len(self.cached) < self.slots
        self.cached.add(expert_id)
        self._absent_N[expert_id] = 0.0

    def remove(self, expert_id: int) -> None:
        """Forget the cached ``expert_id``."""
        self.cached.remove(expert_id)
        self._absent_N[expert_id] = np.inf

    def restore(self, expert_ids: Collection[int]) -> None:
        """Have exactly ``expert_ids`` cached, whatever a step that was interrupted has left."""
        self.cached = set(expert_ids)
        self._absent_N[:] = np.inf
        self._absent_N[list(expert_ids)] = 0.0

    def __contains__(self, expert_id: int) -> bool:
        return expert_id in self.cached

    def __len__(self) -> int:
        return len(self.cached)

    @abstractmethod
    def _start(self) -> None:
        """Make ``_worth_N``, float64 [N], and what else the policy remembers."""

    @abstractmethod
    def _touch(self, row: int, ids_TK: Array) -> None:
        """The pass's T tokens, the newest of them ``_now``, used ``ids_TK`` of layer ``row``."""

    def _worth_now(self) -> Array:
        """The worths as they count for an eviction now."""
        return self._worth_N


class Lru(Cache):
    """The least recently used expert is evicted."""

    _uses = 0

    def _start(self) -> None:
        self._worth_N = np.full(self.layers * self.experts, -1.0)

    def _touch(self, row: int, ids_TK: Array) -> None:
        self._worth_N[ids_TK.flat] = np.arange(self._uses, self._uses + ids_TK.size)
        self._uses += ids_TK.size


class Lrfu(Cache):
    """Frequency and recency in one: a use counts 1 and then ``DECAY`` times less with every token.

    The worth is the logarithm of that sum, on a scale that grows with time instead of shrinking all
    sums.
    """

    # On the sample's texts 0.97 and 0.99 hit 0.3 to 0.5 points more, 0.9 about 1 less.
    DECAY = 0.95

    def _start(self) -> None:
        smallest = np.finfo(float).tiny  # there is no logarithm of 0
        self._worth_N = np.log(np.maximum(self._popularity_N / (1 - self.DECAY), smallest))

    def _touch(self, row: int, ids_TK: Array) -> None:
        tokens_T = np.arange(self._now - len(ids_TK), self._now) + 1
        np.logaddexp.at(self._worth_N, ids_TK, -np.log(self.DECAY) * tokens_T[:, None])


class LayerAware(Cache):
    """The lowest chance of use over time until the next chance leaves.

    The chance that a token uses an expert is estimated from three memories: the newest token, about
    10 tokens, and about 100, which begins with ``popularity``.  A layer's turn comes once a token,
    so an expert whose layer is next gets its chance a whole token sooner than a newcomer, whose
    layer was just visited: chance / distance in layers is what a slot earns until then.

    A layer's chances are estimated when a pass visits it, and a newcomer's when it is offered.
    """

    SHORT, LONG = 0.9, 0.99  # decay a token of the two averages
    # Near a least-squares fit to the sample's routing; one point of hits less without the first.
    WEIGHTS = (0.1, 0.3, 0.6)
    RESCALE = 1000  # tokens; far from where SHORT**-n overflows

    def _start(self) -> None:
        # Averages times decay**-(now - epoch): time changes one factor instead of every average.
        self._short_N, self._long_N = np.zeros_like(self._popularity_N), self._popularity_N.copy()
        self._epoch, self._row = 0, 0  # the latest rescaling; the layer visited last
        self._visited_M = [-1] * self.layers  # the pass that visited a layer last
        self._last_N = np.full(len(self._short_N), -1)  # the pass whose newest token used it
        rows_M = np.arange(self.layers)
        near_MM = 1 / ((rows_M - rows_M[:, None] - 1) % self.layers + 1)
        self._near_MN = np.repeat(near_MM, self.experts, axis=1)
        self._worth_N = np.zeros_like(self._popularity_N)

    def advance(self, tokens: int = 1) -> None:
        super().advance(tokens)
        passed = self._now - self._epoch
        if passed > self.RESCALE:
            self._short_N *= self.SHORT**passed
            self._long_N *= self.LONG**passed
            self._epoch = self._now

    def offer(self, expert_id: int, pinned: Collection[int] = (), must: bool = False) -> int | None:
        self._refresh(expert_id)
        return super().offer(expert_id, pinned, must)

    def add(self, expert_id: int) -> None:
        self._refresh(expert_id)
        super().add(expert_id)

    def _refresh(self, expert_id: int) -> None:
        """Estimate a newcomer's chance, unless this pass has visited its layer."""
        if self._visited_M[expert_id // self.experts] != self._now:
            self._estimate(expert_id)

    def _touch(self, row: int, ids_TK: Array) -> None:
        last = self._epoch - self._now
        for sums_N, decay in ((self._short_N, self.SHORT), (self._long_N, self.LONG)):
            ages = range(last + len(ids_TK) - 1, last - 1, -1)
            gains_T = np.array([(1 - decay) * decay**age for age in ages])
            np.add.at(sums_N, ids_TK, gains_T[:, None])
        self._last_N[ids_TK[-1]] = self._now
        self._row, self._visited_M[row] = row, self._now
        self._estimate(slice(row * self.experts, (row + 1) * self.experts))

    def _estimate(self, expert_ids: int | slice) -> None:
        passed, (newest, a, b) = self._now - self._epoch, self.WEIGHTS
        short, long = a * self.SHORT**passed, b * self.LONG**passed
        self._worth_N[expert_ids] = (
            short * self._short_N[expert_ids]
            + long * self._long_N[expert_ids]
            + newest * (self._last_N[expert_ids] == self._now)
        )

    def _worth_now(self) -> Array:
        worth_N: Array = self._worth_N * self._near_MN[self._row]
        return worth_N


class Learned(LayerAware):
    """``LayerAware`` with a forecast of the next token, and a second way to earn: a slot is worth
    the more of two rates, the next chance over the time until it, and one hit over the time until
    the next use, which later tokens bring as often as about 100 before did."""

    learns = True
    _next_E: Array | None = None  # of the layer that is visited
    _now_N: Array | None = None

    def _start(self) -> None:
        super()._start()
        self._forecast = Forecast(self.layers, self.experts, self._popularity_N)
        self._far_MN = 1 / self._near_MN
        self._wait_N = np.full_like(self._popularity_N, np.inf)  # layers, beyond the next turn

    def use_chunk(
        self, row: int, indices: Sequence[Sequence[int]], later: int = 0, x_TD: Array | None = None
    ) -> None:
        self._next_E = None if x_TD is None else self._forecast.learn(row, indices, x_TD)
        super().use_chunk(row, indices, later)

    def _estimate(self, expert_ids: int | slice) -> None:
        super()._estimate(expert_ids)
        if self._next_E is not None and isinstance(expert_ids, slice):
            self._worth_N[expert_ids] = self._next_E.clip(0, 1)
        later = self.LONG ** (self._now - self._epoch) * self._long_N[expert_ids]
        turns = (1 - self._worth_N[expert_ids]) / np.maximum(later, 1e-9)
        self._wait_N[expert_ids] = turns * self.layers
        self._now_N = None

    def _worth_now(self) -> Array:
        if self._now_N is None:  # else nothing was estimated since, as between a layer's offers
            uses_N = 1 / (self._far_MN[self._row] + self._wait_N)
            self._now_N = np.maximum(super()._worth_now(), uses_N)
        return self._now_N


_CLASSES: dict[str, type[Cache]] = {
    "lru": Lru,
    "lrfu": Lrfu,
    "layer-aware": LayerAware,
    "learned": Learned,
}


def make_cache(
    policy: str, slots: int, layers: int, experts: int, popularity: Sequence[float] | None = None
) -> Cache:
    """An empty cache under one of ``slotmoe.offload.policy.POLICIES``."""
    name, _, bypass = policy.partition("+")
    return _CLASSES[name](slots, layers, experts, popularity, bypass=bool(bypass))

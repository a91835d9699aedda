"""Which experts keep a slot: policies over expert ids, without torch.

An expert id is ``moe_layer * experts + expert``, where ``moe_layer`` counts the MoE layers from 0.
A policy is a child of ``Cache`` that gives each expert a worth: ``Lru`` and ``LfuDecay`` write it
down at each use, and ``Learned`` computes it when it is asked for.  The cached expert of least
worth, and of equals the one of lowest id, is evicted for a new one.  With bypass the new one gets a
slot only if it is worth more: layers are visited in a cycle, so a cache smaller than what one token
uses never hits if it admits everything.

A pass of T tokens: ``advance(T)``, then by layer ``use``, and ``victim`` for what was read.

Shapes: T tokens, D hidden_size, K experts a token, M MoE layers, E experts, N expert ids, F
features.
"""

from collections.abc import Collection, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from slotmoe.quant.kernels.cpu.bindings import Kernels

Array = np.ndarray[Any, np.dtype[Any]]
Choices = Sequence[Sequence[int]]  # of a gate: indices [T, K]
FEATURES = 256
_COPIES = 2.0  # least bytes over a link at 1 to 3, on the sample with 25% and 50% in slots
HALVED = 48  # tokens after which a use counts half: the most hits of 4 to 64, bench replay
FOLLOWED = 256  # newest tokens of a pass that are learned from


class Cache:
    """What is cached, and the counters.  A child says in ``_touch`` what uses are worth."""

    policy: str
    learns = False  # whether ``use`` wants the layers' inputs
    bypass = False  # whether a new expert of no more worth than those cached gets no slot

    def __init__(self, slots: int, layers: int, experts: int):
        self.slots, self.layers, self.experts = slots, layers, experts
        self.hits = self.misses = self.evictions = self.bypassed = 0
        self.cached: set[int] = set()
        # Bool [N]: the same, and what may not be evicted now, which others say.
        self._cached_N, self.held_N = np.zeros((2, layers * experts), np.bool_)
        self._now = 0  # tokens so far
        self._worth_N = np.full(layers * experts, -np.inf)  # of what was never used

    def advance(self, tokens: int = 1) -> None:
        """A forward pass over ``tokens`` more tokens of the sequence begins."""
        self._now += tokens

    def use(self, ids_MTK: Array, later: int = 0, x_MTD: Array | None = None) -> Array:
        """Gates chose expert ids, int64, of a layer each M for T of the pass's tokens, with
        ``later`` more behind them: as many uses, but each distinct expert is one hit or one miss,
        since a chunk brings it once.  ``x_MTD`` are the newest tokens' inputs of the layers, None
        where they do not follow each other.  Returns the distinct ids that are missing."""
        distinct_N = np.unique(ids_MTK) if ids_MTK.shape[1] > 1 else ids_MTK.ravel()
        missing: Array = distinct_N[~self._cached_N[distinct_N]]
        self.hits += len(distinct_N) - len(missing)
        self.misses += len(missing)
        if len(self.cached) < len(self._cached_N):  # else nothing is ever evicted
            self._touch(ids_MTK, self._now - later, x_MTD)
        return missing

    def victim(self, expert_id: int, must: bool = False) -> int | None:
        """What is to be evicted for ``expert_id``, which was used: None if there is room, a cached
        expert that is not held, or itself if it gets no slot; with ``must``, if all are held."""
        if len(self.cached) < self.slots:
            return None
        victim, worth, least = self._least(expert_id)
        if victim < 0 or (self.bypass and not must and worth >= least):
            self.bypassed += 1
            return expert_id
        self.evictions += 1
        return victim

    def pairs(self, ids_N: Array, most: int) -> tuple[Array, Array]:
        """Of absent experts in use, which get another order, those that a copy to a slot pays for,
        the best first, and what leaves its slot for each."""
        cached = np.flatnonzero(self._cached_N > self.held_N).tolist()
        pairs = zip(self.by_worth(ids_N.tolist())[:most], self.by_worth(cached)[::-1], strict=False)
        worth = self._worth_N.item
        paying = [pair for pair in pairs if worth(pair[0]) > worth(pair[1])]
        new_N, gone_N = np.array(paying, np.int64).reshape(-1, 2).T
        return new_N, gone_N

    def exchange(self, new_N: Array, gone_N: Array) -> None:
        """The absent ``new_N`` are cached in place of those ``gone_N``."""
        self.cached.difference_update(gone_N.tolist())
        self.cached.update(new_N.tolist())
        self._cached_N[gone_N], self._cached_N[new_N] = False, True
        self.evictions += len(gone_N)

    def by_worth(self, expert_ids: Collection[int]) -> list[int]:
        """Those ``expert_ids``, cached or not, that of least worth last, of equals that of lowest
        id."""
        ranked = sorted(zip(self._worths(expert_ids), expert_ids, strict=True), reverse=True)
        return [expert_id for _, expert_id in ranked]

    def add(self, expert_id: int) -> None:
        """Put the absent ``expert_id`` into free room."""
        assert expert_id not in self.cached and len(self.cached) < self.slots
        self.cached.add(expert_id)
        self._cached_N[expert_id] = True

    def remove(self, expert_id: int) -> None:
        """Forget the cached ``expert_id``."""
        self.cached.remove(expert_id)
        self._cached_N[expert_id] = False

    def __len__(self) -> int:
        return len(self.cached)

    def _touch(self, ids_MTK: Array, now: int, x_MTD: Array | None) -> None:
        """The pass's T tokens, the newest of them ``now``, used ids of a layer each."""
        raise NotImplementedError

    def _worths(self, expert_ids: Collection[int]) -> list[float]:
        """Experts' worths as they count for an eviction now."""
        worths: list[float] = self._worth_N[[*expert_ids]].tolist()
        return worths

    def _least(self, expert_id: int) -> tuple[int, float, float]:
        """Of what is cached and not held that of least worth, of equals the lowest id, -1 if there
        is none; its worth, and that of the newcomer ``expert_id``."""
        ids = np.flatnonzero(self._cached_N > self.held_N)
        if not len(ids):
            return -1, 0.0, 0.0
        least = int(ids[self._worth_N[ids].argmin()])
        return least, self._worth_N.item(least), self._worth_N.item(expert_id)


class Lru(Cache):
    """The least recently used expert is worth least."""

    policy = "lru"
    _uses = 0

    def _touch(self, ids_MTK: Array, now: int, x_MTD: Array | None) -> None:
        self._worth_N[ids_MTK.ravel()] = np.arange(self._uses, self._uses + ids_MTK.size)
        self._uses += ids_MTK.size


class LfuDecay(Cache):
    """An expert is worth its uses, of which each counts half as much after ``HALVED`` tokens.

    All counts fade alike, so their order stays while nothing is used.  The worth is the logarithm
    of what a count would be if later uses counted more instead: nothing has to be faded.
    """

    policy, bypass = "lfu-decay", True

    def _touch(self, ids_MTK: Array, now: int, x_MTD: Array | None) -> None:
        tokens = ids_MTK.shape[1]
        times_T1 = np.arange(now - tokens + 1, now + 1)[:, None] / HALVED
        np.logaddexp2.at(self._worth_N, ids_MTK, times_T1)


def fold(x_TD: Array) -> Array:
    """Inputs as features of mean square 1, float32 [T, F]: the sum of pieces of F columns, with
    random signs from the second on, so that what was folded stays as it is."""
    tokens, columns = x_TD.shape
    pieces = -(-columns // FEATURES)
    padded_TD = np.zeros((tokens, pieces * FEATURES), np.float32)
    padded_TD[:, :columns] = x_TD
    with np.errstate(over="ignore", invalid="ignore"):
        x_TF: Array = (padded_TD.reshape(tokens, pieces, FEATURES) * _signs(pieces)).sum(1)
        x_TF /= np.sqrt(np.square(x_TF).mean(1, keepdims=True) + 1e-12)
    return x_TF


@cache
def _signs(pieces: int) -> Array:
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), (pieces, FEATURES))
    signs[0] = 1
    return signs


class Learned(Cache):
    """The lowest return of a slot leaves, and a newcomer that returns less gets none.

    A slot's return is the more of two rates: the next chance of use over the time until it, and
    one hit over the time until the next use.  Later uses come as often as about 100 tokens had
    them.  Time is counted in layers: a layer's turn comes once a token, so an expert whose layer is
    next gets its chance a whole token sooner than a newcomer, whose layer was just visited.

    The next chance is linear in what the present token's gate saw: the layer's input, folded to
    ``FEATURES`` columns, and a constant.  Least mean squares (Widrow and Hoff, 1960) fits it to
    what the gates choose, token by token, so no text has to be read before.  Without inputs it is
    estimated from three memories: the newest token, about 10 tokens, and about 100.

    A layer's chances are estimated when a pass visits it, and a newcomer's when it comes, all of it
    by ``native`` kernels (choices.cpp) in this object's memory.
    """

    policy, learns, bypass = "learned", True, True

    def __init__(self, slots: int, layers: int, experts: int, native: "Kernels"):
        super().__init__(slots, layers, experts)
        self._native, count = native, layers * experts
        self._memory = memory = [
            *np.zeros((3, count)), np.full(count, np.inf),  # two averages; chances, waits
            *(np.full(size, -1, np.int64) for size in (count, layers)),  # newest uses, visits
            np.zeros(layers), np.full(layers, np.inf), np.zeros(layers),  # bounds of what is cached
            np.zeros((layers, (FEATURES + 16) * (experts + 1) + experts), np.float32),
            self._cached_N, self.held_N,
        ]  # fmt: skip
        self._chance_N, self._wait_N, (self._lowest_M, self._longest_M) = *memory[2:4], memory[6:8]
        # The third is the layer visited last, or -1.
        self._state = np.array([layers, experts, 0, *map(_address, memory)], np.int64)
        self._found, self._pairs_2N = np.empty(3), np.empty((2, count), np.int64)
        kept = self._state, self._found, *self._pairs_2N
        self._at, self._found_at, *self._pairs_at = map(_address, kept)

    def add(self, expert_id: int) -> None:
        super().add(expert_id)
        layer = expert_id // self.experts
        self._lowest_M[layer], self._longest_M[layer] = 0.0, np.inf

    def pairs(self, ids_N: Array, most: int) -> tuple[Array, Array]:
        """One use where it lies costs as much: each is worth ``_COPIES`` of what leaves.  They are
        there until the next call."""
        (new_N, gone_N), (new, gone) = self._pairs_2N, self._pairs_at
        new_N[: len(ids_N)] = ids_N
        given = new, len(ids_N), _COPIES, most, gone
        self._native.call("exchange", self._at, *given, self._found_at)
        count = self._found.view(np.int64).item(0)
        return new_N[:count], gone_N[:count]

    def _touch(self, ids_MTK: Array, now: int, x_MTD: Array | None) -> None:
        inputs: tuple[int | None, ...] = None, 0, 0, None
        if x_MTD is not None:
            x_MTD = np.ascontiguousarray(x_MTD, np.float32)
            inputs = _address(x_MTD), *x_MTD.shape[1:], _signs_at(-(-x_MTD.shape[2] // FEATURES))
        ids_MTK = np.ascontiguousarray(ids_MTK)
        used = _address(ids_MTK), *ids_MTK.shape
        self._native.call("judge", self._at, *used, now, *inputs)

    def _worths(self, expert_ids: Collection[int]) -> list[float]:
        ids = np.array([*expert_ids], np.int64)
        layer, far_N = self._state[2], np.full(len(ids), self.layers)
        if layer >= 0:
            far_N = (ids // self.experts - layer - 1) % self.layers + 1
        soon_N, later_N = self._chance_N[ids] / far_N, 1 / (far_N + self._wait_N[ids])
        worths: list[float] = np.maximum(soon_N, later_N).tolist()
        return worths

    def _least(self, expert_id: int) -> tuple[int, float, float]:
        self._native.call("least", self._at, expert_id, self._now, self._found_at)
        least, worth, own = self._found.tolist()
        return int(least), worth, own


def _address(array: Array) -> int:
    return array.ctypes.data


@cache
def _signs_at(pieces: int) -> int:  # to ask for an address takes longer than to look it up
    return _address(_signs(pieces))


def make_cache(
    policy: str, slots: int, layers: int, experts: int, native: "Kernels | None" = None
) -> Cache:
    """An empty cache under one of ``slotmoe.offload.policy.POLICIES``; those of ``BY_KERNELS`` need
    ``native`` ones."""
    if policy == Learned.policy:
        assert native is not None
        return Learned(slots, layers, experts, native)
    kind = {Lru.policy: Lru, LfuDecay.policy: LfuDecay}[policy]
    return kind(slots, layers, experts)


def offer(cache: Cache, expert_id: int, pinned: Collection[int], must: bool = False) -> int | None:
    """The absent ``expert_id`` was used: what is evicted for it, which is not ``pinned``, if
    anything; itself if it gets no slot, which with ``must`` only is where all are pinned."""
    cache.held_N[:] = False
    cache.held_N[[*pinned]] = True
    evicted = cache.victim(expert_id, must)
    if evicted != expert_id:
        if evicted is not None:
            cache.remove(evicted)
        cache.add(expert_id)
    return evicted


def replay(
    cache: Cache, steps: Iterable[Sequence[Choices]], inputs: Sequence[Array] | None = None
) -> float:
    """The share of hits of an empty ``cache`` in ``steps``, each of all layers; ``inputs`` of them,
    if there are, [M, D], where each is a token."""
    for number, layers in enumerate(steps):
        cache.advance(len(layers[0]))
        for moe_layer, indices in enumerate(layers):
            ids_TK = np.array(indices, np.int64) + moe_layer * cache.experts
            x_1TD = None if inputs is None else inputs[number][moe_layer, None, None]
            for expert_id in cache.use(ids_TK[None], 0, x_1TD).tolist():
                offer(cache, expert_id, ids_TK.ravel())
    return cache.hits / max(1, cache.hits + cache.misses)

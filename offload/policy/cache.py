"""Which experts keep a slot: policies over expert ids, without torch.

An expert id is ``moe_layer * experts + expert``, where ``moe_layer`` counts the MoE layers from 0.
A policy gives each expert a worth.  The cached expert of least worth, and of equals the one of
lowest id, is evicted for a new one.  With bypass the new one gets a slot only if it is worth more:
layers are visited in a cycle, so a cache smaller than what one token uses never hits if it admits
everything.

A pass of T tokens: ``advance(T)``, then by layer ``use_chunk``, and ``victim`` for what was read.

Shapes: T tokens, D hidden_size, K experts a token, M MoE layers, E experts, N expert ids, F
features.
"""

from bisect import insort
from collections.abc import Collection, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Optional

import numpy as np

if TYPE_CHECKING:
    from slotmoe.quant.kernels.cpu.bindings import Kernels

Array = np.ndarray[Any, np.dtype[Any]]
Choices = Sequence[Sequence[int]]  # of a gate: indices [T, K]
FEATURES = 256
FOLLOWED = 256  # newest tokens of a pass that are learned from
_CONSTANT = 3.0  # it learns faster than a feature, whose mean square is 1
_RATE = 0.05 / FEATURES  # 0.03 and 0.05 hit the same within 0.3 points, 0.15 a point less
_BLOCK = 16  # tokens learned from at once
_LINED_UP = 8  # of what is cached, that are looked for at once: more than a token uses of a layer


class Cache:
    """What is cached, and the counters.  The least recently used expert is worth least.

    ``native`` kernels do in microseconds what numpy does else, with the same bits.
    """

    learns = False  # whether ``use_chunk`` wants the layer's inputs
    bypass = False  # whether a new expert of no more worth than those cached gets no slot

    def __init__(self, slots: int, layers: int, experts: int, native: Optional["Kernels"] = None):
        self.slots, self.layers, self.experts, self._native = slots, layers, experts, native
        self.hits = self.misses = self.evictions = self.bypassed = 0
        self.cached: set[int] = set()
        self._absent_N = np.full(layers * experts, np.inf)  # 0 where it is cached
        self._now = 0  # tokens so far
        # (worth, expert id) of what is cached, or was, that of least worth first; empty: not known.
        self._line: list[tuple[float, int]] = []
        self._worth_N, self._uses = np.full(layers * experts, -1.0), 0

    def advance(self, tokens: int = 1) -> None:
        """A forward pass over ``tokens`` more tokens of the sequence begins."""
        self._now += tokens

    def use(self, expert_id: int) -> None:
        """The newest token's gate chose ``expert_id``, cached or not."""
        moe_layer, expert = divmod(expert_id, self.experts)
        self.use_chunk(moe_layer, [[expert]])

    def use_chunk(
        self, moe_layer: int, indices: Choices, later: int = 0, x_TD: Array | None = None
    ) -> None:
        """The gate of layer ``moe_layer`` chose ``indices`` [T, K] for T of the pass's tokens, with
        ``later`` more behind them: as many uses, but each distinct expert is one hit or one miss,
        since a chunk brings it once.  ``x_TD`` are the newest tokens' inputs of the layer, None
        where they do not follow each other."""
        ids_TK = np.array(indices, np.int64) + moe_layer * self.experts
        self._now -= later
        self._touch(moe_layer, ids_TK)
        self._now += later
        distinct = set(ids_TK.ravel().tolist())
        hits = len(distinct & self.cached)
        self.hits += hits
        self.misses += len(distinct) - hits

    def victim(self, expert_id: int, held_N: Array, must: bool = False) -> int | None:
        """What is to be evicted for ``expert_id``, which was used: None if there is room, a cached
        expert that is not held, or itself if it gets no slot; with ``must``, if all are held."""
        if len(self.cached) < self.slots:
            return None
        self._refresh(expert_id)
        limit = self._worth(expert_id) if self.bypass and not must else np.inf
        found = self._first(held_N)
        if found is None:
            self._line = self._least()
            found = self._first(held_N)
        if found is None:  # all of these are held
            worth_N = self._worth_now() + self._absent_N
            np.copyto(worth_N, np.inf, where=held_N)
            victim = int(worth_N.argmin())
            found = float(worth_N[victim]), victim
        worth, victim = found
        if worth >= limit:
            self.bypassed += 1
            return expert_id
        self.evictions += 1
        return victim

    def _first(self, held_N: Array) -> tuple[float, int] | None:
        """The first of the line that may leave."""
        for ranked in self._line:
            if ranked[1] in self.cached and not held_N[ranked[1]]:
                return ranked
        return None

    def by_worth(self, expert_ids: Collection[int]) -> list[int]:
        """``expert_ids``, cached or not, that of least worth last, of equals that of lowest id."""
        ranked = sorted(((self._worth(id), id) for id in expert_ids), reverse=True)
        return [expert_id for _, expert_id in ranked]

    def add(self, expert_id: int) -> None:
        """Put the absent ``expert_id`` into free room."""
        assert expert_id not in self.cached and len(self.cached) < self.slots
        self._refresh(expert_id)
        self.cached.add(expert_id)
        self._absent_N[expert_id] = 0.0
        if self._line and (ranked := (self._worth(expert_id), expert_id)) < self._line[-1]:
            insort(self._line, ranked)

    def remove(self, expert_id: int) -> None:
        """Forget the cached ``expert_id``."""
        self.cached.remove(expert_id)
        self._absent_N[expert_id] = np.inf

    def __contains__(self, expert_id: int) -> bool:
        return expert_id in self.cached

    def __len__(self) -> int:
        return len(self.cached)

    def _refresh(self, expert_id: int) -> None:
        """A newcomer's worth is asked for."""

    def _touch(self, moe_layer: int, ids_TK: Array) -> None:
        """The pass's T tokens, the newest of them ``_now``, used ``ids_TK`` of ``moe_layer``."""
        self._worth_N[ids_TK.flat] = np.arange(self._uses, self._uses + ids_TK.size)
        self._uses += ids_TK.size
        self._line = []

    def _worth(self, expert_id: int) -> float:
        """An expert's worth as it counts for an eviction now."""
        return float(self._worth_N[expert_id])

    def _worth_now(self) -> Array:
        """That of each expert, float64 [N]."""
        return self._worth_N

    def _least(self) -> list[tuple[float, int]]:
        """What a line begins with."""
        worth_N, line = self._worth_now() + self._absent_N, list[tuple[float, int]]()
        for _ in range(min(_LINED_UP, len(self.cached))):
            expert_id = int(worth_N.argmin())
            line.append((float(worth_N[expert_id]), expert_id))
            worth_N[expert_id] = np.inf
        return line


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


class Forecast:
    """Which experts the next token will use in a layer, learned while the model runs.

    The chances are linear in what the present token's gate saw: the layer's input, folded to
    ``FEATURES`` columns, and a constant.  Least mean squares (Widrow and Hoff, 1960) fits them to
    what the gates choose, token by token, so no text has to be read before.
    """

    def __init__(self, layers: int, experts: int, native: Optional["Kernels"] = None):
        self._weights_MFE = np.zeros((layers, FEATURES + 1, experts), np.float32)
        self._last_MF = np.zeros((layers, FEATURES + 1), np.float32)  # of the token before
        self._chance_ME = np.zeros((layers, experts), np.float32)  # what follows from both
        self._native = native
        layers_of = self._weights_MFE, self._last_MF, self._chance_ME
        self._of_layer = [*zip(*layers_of, strict=True)]
        self._state = np.array([experts, *_addresses(*layers_of)], np.int64)
        self._learned, self._x_D = np.zeros(1, np.int64), np.zeros(0, np.float32)

    def learn(self, moe_layer: int, indices: Choices, x_TD: Array) -> Array | None:
        """The gate of ``moe_layer`` chose ``indices`` [T, K] for tokens that follow each other, of
        which ``x_TD`` are the newest ones' inputs: each expert's chance that the next token uses
        it, [E], about 0 to 1; None where inputs are not finite."""
        x_TF = fold(x_TD)
        if not np.isfinite(x_TF).all():
            return None
        weights_FE, count = self._weights_MFE[moe_layer], len(x_TF)
        x_TF = np.concatenate([x_TF, np.full((count, 1), _CONSTANT, np.float32)], axis=1)
        before_TF = np.concatenate([self._last_MF[moe_layer, None], x_TF[:-1]])
        used_TE = np.zeros((count, weights_FE.shape[1]), np.float32)
        used_TE[np.arange(count)[:, None], indices[-count:]] = 1.0
        for start in range(0, count, _BLOCK):
            x_BF = before_TF[start : start + _BLOCK]
            error_BE = used_TE[start : start + _BLOCK] - x_BF @ weights_FE
            weights_FE += x_BF.T @ (_RATE * error_BE)
        self._last_MF[moe_layer] = x_TF[-1]
        chance_E: Array = self._chance_ME[moe_layer]
        return np.matmul(x_TF[-1], weights_FE, out=chance_E)

    def learn_one(
        self, native: "Kernels", moe_layer: int, used_at: int, top_k: int, x_D: Array
    ) -> Array | None:
        """``learn`` of one token that used ``top_k`` experts, int64 at an address: what the weights
        made of the token before is known."""
        if len(x_D) != len(self._x_D):
            self._x_D = np.empty(len(x_D), np.float32)
            pieces = -(-len(x_D) // FEATURES)
            self._at = _addresses(self._state, self._x_D, _signs(pieces), self._learned)
        self._x_D[:] = x_D
        state, x, signs, learned = self._at
        native.learn.run(
            state, moe_layer, x, len(x_D), signs, used_at, top_k, _RATE, _CONSTANT, learned
        )
        if not self._learned[0]:
            return None
        weights_FE, last_F, chance_E = self._of_layer[moe_layer]
        return np.matmul(last_F, weights_FE, out=chance_E)


def _addresses(*arrays: Array) -> list[int]:
    return [array.ctypes.data for array in arrays]


class Learned(Cache):
    """The lowest return of a slot leaves, and a newcomer that returns less gets none.

    A slot's return is the more of two rates: the next chance of use over the time until it, and
    one hit over the time until the next use.  The next chance is the ``Forecast``'s; without one
    it is estimated from three memories: the newest token, about 10 tokens, and about 100.
    Later uses come as often as about 100 tokens had them.  Time is
    counted in layers: a layer's turn comes once a token, so an expert whose layer is next gets its
    chance a whole token sooner than a newcomer, whose layer was just visited.

    A layer's chances are estimated when a pass visits it, and a newcomer's when it comes.
    """

    learns = bypass = True
    SHORT, LONG = 0.9, 0.99  # decay a token of the two averages
    # Near a least-squares fit to the sample's routing; one point of hits less without the first.
    WEIGHTS = (0.1, 0.3, 0.6)
    RESCALE = 1000  # tokens; far from where SHORT**-n overflows
    _next_E: Array | None = None  # the forecast of the layer that is visited

    def __init__(self, slots: int, layers: int, experts: int, native: Optional["Kernels"] = None):
        super().__init__(slots, layers, experts, native)
        # Averages times decay**-(now - epoch): time changes one factor instead of every average.
        self._short_N, self._long_N, self._chance_N = np.zeros((3, self.layers * self.experts))
        self._epoch, self._moe_layer = 0, 0  # the latest rescaling; the layer visited last
        self._visited_M = [-1] * self.layers  # the pass that visited a layer last
        # The pass whose newest token used it.
        self._last_N = np.full(len(self._short_N), -1, np.int64)
        # Layers until an expert's turn behind the last layer; behind another it begins later.
        self._turns_N = np.tile(np.repeat(np.arange(layers) + 1.0, experts), 2)
        self._far_N = self._turns_N[(layers - 1) * experts :][: layers * experts]
        self._forecast = Forecast(self.layers, self.experts, native)
        # ``_chance_N`` is of use at the layer's next turn; else it waits so many layers more.
        self._wait_N = np.full(self.layers * self.experts, np.inf)
        # Of what is cached in each layer, the least chance and the longest wait, or less and more.
        self._lowest_M, self._longest_M = np.full(layers, np.inf), np.zeros(layers)
        self._found, self._worths = np.empty(_LINED_UP, np.int64), np.empty(_LINED_UP + experts)
        self._known: dict[int, float] = {}  # worths of the newest token's experts of that layer
        self._shares, self._used, self._rates = (
            np.array(self.WEIGHTS),
            np.empty(experts, np.int64),
            np.empty(4),
        )
        kept = self._short_N, self._long_N, self._chance_N, self._wait_N, self._last_N
        bounds = self._absent_N, self._turns_N, self._shares, self._lowest_M, self._longest_M
        self._state = np.array([layers, experts, *_addresses(*kept, *bounds)], np.int64)
        given = self._state, self._found, self._worths, self._used, self._rates
        self._at = _addresses(*given)

    def advance(self, tokens: int = 1) -> None:
        super().advance(tokens)
        passed = self._now - self._epoch
        if passed > self.RESCALE:
            self._short_N *= self.SHORT**passed
            self._long_N *= self.LONG**passed
            self._epoch = self._now

    def use_chunk(
        self, moe_layer: int, indices: Choices, later: int = 0, x_TD: Array | None = None
    ) -> None:
        if self._native is not None and len(indices) == 1 and not later:
            x_D = None if x_TD is None else x_TD[0]
            return self._use_one(self._native, moe_layer, indices[0], x_D)
        self._next_E = None if x_TD is None else self._forecast.learn(moe_layer, indices, x_TD)
        return super().use_chunk(moe_layer, indices, later)

    def _use_one(
        self, native: "Kernels", moe_layer: int, chosen: Sequence[int], x_D: Array | None
    ) -> None:
        """``use_chunk`` of a token."""
        top_k, first = len(chosen), moe_layer * self.experts
        state, found, worths, used, rates = self._at
        self._used[:top_k] = chosen
        chance_E = None
        if x_D is not None:
            chance_E = self._forecast.learn_one(native, moe_layer, used, top_k, x_D)
        passed, decays = self._now - self._epoch, (self.SHORT, self.LONG)
        self._rates[:] = [
            *((1 - decay) * decay**-passed for decay in decays),
            *(decay**passed for decay in decays),
        ]
        self._reach(moe_layer)
        ids = [first + expert for expert in chosen]
        distinct = {*ids}
        hits = len(distinct & self.cached)
        self.hits += hits
        self.misses += len(distinct) - hits
        count = _LINED_UP if hits < len(distinct) and len(self.cached) == self.slots else 0
        next_at = None if chance_E is None else chance_E.ctypes.data
        native.judge.run(
            state, moe_layer, used, top_k, self._now, rates, next_at, count, found, worths
        )
        judged = self._worths[: count + top_k].tolist()
        self._known = dict(zip(ids, judged[count:], strict=True))
        line = zip(judged[:count], self._found.tolist(), strict=False)
        self._line = [ranked for ranked in line if ranked[1] >= 0]

    def _reach(self, moe_layer: int) -> None:
        """A pass is at a layer."""
        self._moe_layer, self._visited_M[moe_layer] = moe_layer, self._now
        self._line, self._known = [], {}
        behind = (self.layers - 1 - moe_layer) * self.experts
        self._far_N = self._turns_N[behind : behind + len(self._last_N)]

    def add(self, expert_id: int) -> None:
        super().add(expert_id)
        if (layer := expert_id // self.experts) != self._moe_layer:  # which is gone through anyway
            self._lowest_M[layer], self._longest_M[layer] = 0.0, np.inf

    def _refresh(self, expert_id: int) -> None:
        """Estimate a newcomer's chance, unless this pass has visited its layer."""
        if self._visited_M[expert_id // self.experts] != self._now:
            self._estimate(expert_id)
            self._line = [ranked for ranked in self._line if ranked[1] != expert_id]
            self._known.pop(expert_id, None)

    def _touch(self, moe_layer: int, ids_TK: Array) -> None:
        last, first = self._epoch - self._now, moe_layer * self.experts
        for sums_N, decay in ((self._short_N, self.SHORT), (self._long_N, self.LONG)):
            ages = range(last + len(ids_TK) - 1, last - 1, -1)
            gains_T = np.array([(1 - decay) * decay**age for age in ages])
            np.add.at(sums_N, ids_TK, gains_T[:, None])
        self._last_N[ids_TK[-1]] = self._now
        self._reach(moe_layer)
        self._estimate(slice(first, first + self.experts))
        self._lowest_M[moe_layer], self._longest_M[moe_layer] = 0.0, np.inf

    def _estimate(self, expert_ids: int | slice) -> None:
        passed, (newest, a, b) = self._now - self._epoch, self.WEIGHTS
        short = self.SHORT**passed * self._short_N[expert_ids]
        long = self.LONG**passed * self._long_N[expert_ids]
        if self._next_E is not None and isinstance(expert_ids, slice):
            self._chance_N[expert_ids] = self._next_E.clip(0, 1)
        else:
            used = self._last_N[expert_ids] == self._now
            self._chance_N[expert_ids] = a * short + b * long + newest * used
        turns = (1 - self._chance_N[expert_ids]) / np.maximum(long, 1e-9)
        self._wait_N[expert_ids] = turns * self.layers

    def _worth(self, expert_id: int) -> float:
        if (known := self._known.get(expert_id)) is not None:
            return known
        far, chance = self._far_N.item(expert_id), self._chance_N.item(expert_id)
        return float(max(chance / far, 1 / (far + self._wait_N.item(expert_id))))

    def _worth_now(self) -> Array:
        worth_N: Array = 1 / (self._far_N + self._wait_N)
        np.maximum(self._chance_N / self._far_N, worth_N, out=worth_N)
        return worth_N


def make_cache(
    policy: str, slots: int, layers: int, experts: int, native: Optional["Kernels"] = None
) -> Cache:
    """An empty cache under one of ``slotmoe.offload.policy.POLICIES``."""
    return {"lru": Cache, "learned": Learned}[policy](slots, layers, experts, native)

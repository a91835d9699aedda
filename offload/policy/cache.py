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

import json
from collections.abc import Collection, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from slotmoe.errors import ConfigError, naming, refused

Array = np.ndarray[Any, np.dtype[Any]]
Choices = Sequence[Sequence[int]]  # of a gate: indices [T, K]
FEATURES = 256
FOLLOWED = 256  # newest tokens of a pass that are learned from
_CONSTANT = 3.0  # it learns faster than a feature, whose mean square is 1
_RATE = 0.05 / FEATURES  # 0.03 and 0.05 hit the same within 0.3 points, 0.15 a point less
_TRACED = ("layers", "n_routed_experts", "num_experts_per_tok")
_BLOCK = 16  # tokens learned from at once


class Cache:
    """What is cached, and the counters.  The least recently used expert is worth least."""

    learns = False  # whether ``use_chunk`` wants the layer's inputs
    bypass = False  # whether a new expert of no more worth than those cached gets no slot

    def __init__(self, slots: int, layers: int, experts: int):
        self.slots, self.layers, self.experts = slots, layers, experts
        self.hits = self.misses = self.evictions = self.bypassed = 0
        self.cached: set[int] = set()
        self._absent_N = np.full(layers * experts, np.inf)  # 0 where it is cached
        self._now = 0  # tokens so far
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
        ids_TK = np.array(indices) + moe_layer * self.experts
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
        worth_N = self._worth_now()
        limit = worth_N[expert_id] if self.bypass and not must else np.inf
        worth_N = worth_N + self._absent_N
        np.copyto(worth_N, np.inf, where=held_N)
        victim = int(worth_N.argmin())
        if worth_N[victim] >= limit:
            self.bypassed += 1
            return expert_id
        self.evictions += 1
        return victim

    def by_worth(self, expert_ids: Collection[int]) -> list[int]:
        """``expert_ids``, cached or not, that of least worth last, of equals that of lowest id."""
        ids = np.array(sorted(expert_ids, reverse=True))
        ordered: list[int] = ids[(-self._worth_now()[ids]).argsort(kind="stable")].tolist()
        return ordered

    def add(self, expert_id: int) -> None:
        """Put the absent ``expert_id`` into free room."""
        assert expert_id not in self.cached and len(self.cached) < self.slots
        self.cached.add(expert_id)
        self._absent_N[expert_id] = 0.0

    def remove(self, expert_id: int) -> None:
        """Forget the cached ``expert_id``."""
        self.cached.remove(expert_id)
        self._absent_N[expert_id] = np.inf

    def __contains__(self, expert_id: int) -> bool:
        return expert_id in self.cached

    def __len__(self) -> int:
        return len(self.cached)

    def _touch(self, moe_layer: int, ids_TK: Array) -> None:
        """The pass's T tokens, the newest of them ``_now``, used ``ids_TK`` of ``moe_layer``."""
        self._worth_N[ids_TK.flat] = np.arange(self._uses, self._uses + ids_TK.size)
        self._uses += ids_TK.size

    def _worth_now(self) -> Array:
        """Each expert's worth as it counts for an eviction now, float64 [N]."""
        return self._worth_N


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

    def __init__(self, layers: int, experts: int):
        self._weights_MFE = np.zeros((layers, FEATURES + 1, experts), np.float32)
        self._last_MF = np.zeros((layers, FEATURES + 1), np.float32)  # of the token before

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
        chance_E: Array = x_TF[-1] @ weights_FE
        return chance_E


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
    _now_N: Array | None = None

    def __init__(self, slots: int, layers: int, experts: int):
        super().__init__(slots, layers, experts)
        # Averages times decay**-(now - epoch): time changes one factor instead of every average.
        self._short_N, self._long_N, self._chance_N = np.zeros((3, self.layers * self.experts))
        self._epoch, self._moe_layer = 0, 0  # the latest rescaling; the layer visited last
        self._visited_M = [-1] * self.layers  # the pass that visited a layer last
        self._last_N = np.full(len(self._short_N), -1)  # the pass whose newest token used it
        layers_M = np.arange(self.layers)
        far_MM = (layers_M - layers_M[:, None] - 1) % self.layers + 1.0
        self._far_MN = np.repeat(far_MM, self.experts, axis=1)  # layers until a layer's turn
        self._forecast = Forecast(self.layers, self.experts)
        # ``_chance_N`` is of use at the layer's next turn; else it waits so many layers more.
        self._wait_N = np.full(self.layers * self.experts, np.inf)

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
        self._next_E = None if x_TD is None else self._forecast.learn(moe_layer, indices, x_TD)
        super().use_chunk(moe_layer, indices, later)

    def victim(self, expert_id: int, held_N: Array, must: bool = False) -> int | None:
        self._refresh(expert_id)
        return super().victim(expert_id, held_N, must)

    def add(self, expert_id: int) -> None:
        self._refresh(expert_id)
        super().add(expert_id)

    def _refresh(self, expert_id: int) -> None:
        """Estimate a newcomer's chance, unless this pass has visited its layer."""
        if self._visited_M[expert_id // self.experts] != self._now:
            self._estimate(expert_id)

    def _touch(self, moe_layer: int, ids_TK: Array) -> None:
        last = self._epoch - self._now
        for sums_N, decay in ((self._short_N, self.SHORT), (self._long_N, self.LONG)):
            ages = range(last + len(ids_TK) - 1, last - 1, -1)
            gains_T = np.array([(1 - decay) * decay**age for age in ages])
            np.add.at(sums_N, ids_TK, gains_T[:, None])
        self._last_N[ids_TK[-1]] = self._now
        self._moe_layer, self._visited_M[moe_layer] = moe_layer, self._now
        self._estimate(slice(moe_layer * self.experts, (moe_layer + 1) * self.experts))

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
        self._now_N = None

    def _worth_now(self) -> Array:
        if self._now_N is None:  # else nothing was estimated since, as between a layer's newcomers
            far_N = self._far_MN[self._moe_layer]
            self._now_N = np.maximum(self._chance_N / far_N, 1 / (far_N + self._wait_N))
        return self._now_N


def make_cache(policy: str, slots: int, layers: int, experts: int) -> Cache:
    """An empty cache under one of ``slotmoe.offload.policy.POLICIES``."""
    return {"lru": Cache, "learned": Learned}[policy](slots, layers, experts)


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
        facts = zip(_TRACED, (layers, n_routed_experts, top_k), strict=True)
        header = {"format": "slotmoe-trace", "version": 2, **dict(facts)}
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

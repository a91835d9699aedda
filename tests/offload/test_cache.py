"""Cache policies beside plain Python: in any order of events, and on recorded routing."""

from itertools import chain, combinations, takewhile

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from bench.replay import read_trace
from slotmoe.offload.policy import available
from slotmoe.offload.policy.cache import (
    FEATURES,
    HALVED,
    Learned,
    LfuDecay,
    fold,
    make_cache,
    offer,
)
from slotmoe.offload.runtime import Runtime
from tests.support import states
from tests.support.engine import PROMPT
from tests.support.kernels import native, needs_native

LAYERS, EXPERTS, TOP = 3, 4, 2
IDS = st.integers(0, LAYERS * EXPERTS - 1)
GATES = st.sampled_from(list(combinations(range(EXPERTS), TOP)))
PASS = st.lists(st.tuples(*[GATES] * LAYERS), min_size=1, max_size=4)
DECAYS_21 = np.array([[0.9], [0.99]])


class Plain:
    """``learned`` by numpy, token by token."""

    def __init__(self, *size):
        self.visited_M, self.layer = np.full(size[0], -1), 0
        self.weights_MFE = np.zeros((size[0], FEATURES + 1, size[1]))
        self.last_MF, self.often_2ME = self.weights_MFE[..., 0].copy(), np.zeros((2, *size))
        self.chance_ME, self.wait_ME = np.zeros(size), np.full(size, np.inf)
        self.used_ME = np.full(size, -1)

    def visit(self, layer, tokens, now, x_TD=None):
        """A gate chose experts of ``tokens``, the newest of them ``now``."""
        often_2E, next_E = self.often_2ME[:, layer], None
        often_2E *= DECAYS_21 ** (now - len(tokens) - self.visited_M[layer])
        weights_FE, last_F = self.weights_MFE[layer], self.last_MF[layer]
        for token, chosen in enumerate(tokens):
            used_E = np.isin(range(often_2E.shape[1]), chosen)
            often_2E += (1 - DECAYS_21) * (used_E - often_2E)
            if x_TD is not None and np.isfinite(x_F := fold(x_TD[token, None])[0]).all():
                weights_FE += np.outer(0.05 / FEATURES * last_F, used_E - last_F @ weights_FE)
                last_F[:] = [*x_F, 3.0]
                next_E = last_F @ weights_FE
        self.layer, self.visited_M[layer], self.used_ME[layer, tokens[-1]] = layer, now, now
        self.estimate(layer, slice(None), now, next_E)

    def estimate(self, layer, experts, now, next_E=None):
        faded_21 = DECAYS_21 ** (now - self.visited_M[layer])
        short_E, long_E = faded_21 * self.often_2ME[:, layer, experts]
        newest_E = self.used_ME[layer, experts] == now
        chance_E = 0.1 * newest_E + 0.3 * short_E + 0.6 * long_E
        chance_E = chance_E if next_E is None else next_E.clip(0, 1)
        self.chance_ME[layer, experts] = chance_E
        turns_E = (1 - chance_E) / np.maximum(long_E, 1e-9)
        self.wait_ME[layer, experts] = turns_E * len(self.visited_M)

    def worths(self):
        until_M = np.full(count := len(self.visited_M), count)
        if self.layer is not None:
            until_M = (np.arange(count) - self.layer - 1) % count + 1
        until_M1 = until_M[:, None]
        return np.maximum(self.chance_ME / until_M1, 1 / (until_M1 + self.wait_ME)).ravel()


class Policy(RuleBasedStateMachine):
    """A cache beside ``Plain``, the number of each expert's latest use, or its faded uses."""

    @initialize(policy=st.sampled_from(available(native is not None)), slots=st.integers(1, 7))
    def start(self, policy, slots):
        self.cache = make_cache(policy, slots, LAYERS, EXPERTS, native)
        self.learned, self.used_N = Plain(LAYERS, EXPERTS), np.full(LAYERS * EXPERTS, -np.inf)
        self.now, self.count, self.faded_N = 0, 0, np.zeros(LAYERS * EXPERTS)
        self.cached, self.counts = set(), dict.fromkeys(("hits", "misses", "evictions"), 0)
        self.counts["bypassed"] = 0

    @rule(tokens=PASS, first=st.integers(1, 4))
    def read(self, tokens, first):
        """A pass, each layer in one or two pieces; what was missing may then get a slot."""
        self.cache.advance(len(tokens))
        self.now += len(tokens)
        for layer in range(LAYERS):
            ids = [[layer * EXPERTS + expert for expert in token[layer]] for token in tokens]
            for start, stop in ((0, first), (first, len(tokens))):
                if piece := ids[start:stop]:
                    self.use(layer, piece, len(tokens) - min(stop, len(tokens)))
            for id in sorted({*chain(*ids)} - self.cached):
                self.offer(id, pinned={*ids[-1]}, must=False)

    @rule(tokens=PASS, most=st.integers(1, 5))
    def read_at_once(self, tokens, most):
        """A pass through all layers, wherever experts lie; the best that were missing then get the
        slots of the worst, if that pays."""
        self.cache.advance(len(tokens))
        self.now += len(tokens)
        indices_MTK, cached = np.array(tokens).swapaxes(0, 1), {*self.cached}
        ids = indices_MTK + EXPERTS * np.arange(LAYERS)[:, None, None]
        missing = self.cache.use(ids)
        assert len(missing) == len({*missing}) and {*missing} == {*ids.flat} - cached
        for layer in range(LAYERS):
            self.use(layer, ids[layer].tolist(), 0, told=True)
        self.learned.layer = None  # no layer's turn is nearer than another's
        self.cache.held_N[:] = False
        if len(self.cached) == self.cache.slots:
            worths, factor = self.worths(), 2 if isinstance(self.cache, Learned) else 1
            best, *worst = (sorted(of, key=lambda id: (worths[id], id)) for of in (missing, cached))
            pairs = zip(best[: -most - 1 : -1], *worst, strict=False)
            paying = takewhile(lambda pair: worths[pair[0]] > factor * worths[pair[1]], pairs)
            new, gone = np.array([*paying], int).reshape(-1, 2).T.tolist()
            found = self.cache.pairs(missing, most)
            assert [new, gone] == [ids_N.tolist() for ids_N in found]
            self.cache.exchange(*found)
            self.cached = self.cached.difference(gone) | {*new}
            self.counts["evictions"] += len(gone)

    def use(self, layer, ids, later, told=False):
        tokens, used = [[id % EXPERTS for id in token] for token in ids], {*chain(*ids)}
        if not told:
            self.cache.use(np.array([ids]), later)
        self.learned.visit(layer, tokens, self.now - later)
        for age, token in enumerate(reversed(ids), later):
            for id in token:
                self.faded_N[id] += 2 ** ((self.now - age) / HALVED)
        for id in chain(*ids):
            self.used_N[id] = self.count
            self.count += 1
        self.counts["hits"] += len(used & self.cached)
        self.counts["misses"] += len(used - self.cached)

    @rule(id=IDS, pinned=st.sets(IDS), must=st.booleans())
    def offer(self, id, pinned, must):
        if id in self.cached:
            return
        full, (layer, expert) = len(self.cached) == self.cache.slots, divmod(id, EXPERTS)
        if full and self.learned.visited_M[layer] != self.now:
            self.learned.estimate(layer, slice(expert, expert + 1), self.now)
        evicted, worths = offer(self.cache, id, pinned, must), self.worths()
        leaves = min(self.cached - pinned, key=lambda id: (worths[id], id), default=id)
        if self.cache.bypass and not must and worths[leaves] >= worths[id]:
            leaves = id
        assert evicted == (leaves if full else None)
        self.counts["bypassed"] += full and leaves == id
        self.counts["evictions"] += full and leaves != id
        if not full or leaves != id:
            self.cached = self.cached - {leaves} | {id} if full else self.cached | {id}

    def worths(self):
        return self.cache._worths(range(LAYERS * EXPERTS))

    @invariant()
    def same(self):
        cache, ids, worths = self.cache, range(LAYERS * EXPERTS), self.worths()
        expected = self.learned.worths() if isinstance(cache, Learned) else self.used_N
        if isinstance(cache, LfuDecay):
            with np.errstate(divide="ignore"):
                expected = np.log2(self.faded_N)
        np.testing.assert_allclose(worths, expected, rtol=1e-9)
        assert cache.cached == self.cached and len(cache) <= cache.slots
        assert {name: getattr(cache, name) for name in self.counts} == self.counts
        ranked = [(worths[id], id) for id in cache.by_worth(ids)]
        assert ranked == sorted(zip(worths, ids, strict=True), reverse=True)


@states.SIZES
def test_orders_of_events(examples, steps, part):
    states.run(Policy, examples, steps)


@needs_native
def test_decisions_on_recorded_routing(heavy, sample_export, tmp_path):
    """Each that the passes of a run lead to, with inputs that at times are no numbers; and there
    are more hits than ``lfu-decay`` has, which has more than ``lru``."""
    with Runtime.open(sample_export, context=128, draft="off") as runtime:
        runtime.trace(tmp_path / "trace")
        runtime.generate(PROMPT, 60).read()
    header, steps = read_trace(tmp_path / "trace")
    size = len(header["layers"]), header["n_routed_experts"]
    for slots in (25, 60):
        caches = [make_cache(policy, slots, *size, native) for policy in available(True)]
        plain, now = Plain(*size), 0
        for number, (indices, features) in enumerate(steps):
            now += len(indices)
            for cache in caches:
                cache.advance(len(indices))
            for layer, x_TD in enumerate(features.astype("f").swapaxes(0, 1)):
                x_TD[-1, 7] *= {17: np.nan, 23: np.inf}.get(number + layer, 1)
                ids_TK = indices[:, layer].astype(int) + layer * size[1]
                plain.visit(layer, indices[:, layer], now, x_TD)
                worths = plain.worths()
                for cache in caches:
                    missing = sorted({*ids_TK.ravel().tolist()} - cache.cached)
                    cache.use(ids_TK[None], x_MTD=x_TD[None])
                    for id in missing:
                        free = cache.cached - {*ids_TK[-1]}
                        leaves = min(free, key=lambda id: (worths[id], id), default=id)
                        leaves = id if worths[leaves] >= worths[id] else leaves
                        leaves = leaves if len(cache) == slots else None
                        assert offer(cache, id, ids_TK[-1]) == leaves or not cache.learns
        hits = [cache.hits for cache in caches]
        assert hits == sorted(hits) and len({*hits}) == 3

"""Cache policies against a slow reference, and the optimum against brute force."""

import random
from functools import cache as memoize
from functools import partial
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.replay import optimum, replay
from slotmoe.offload.policy import DEFAULT_POLICY, POLICIES
from slotmoe.offload.policy.cache import FEATURES, Learned, make_cache

ROWS, EXPERTS, TOP = 3, 4, 2
IDS = range(ROWS * EXPERTS)
GATES = st.sampled_from(list(combinations(range(EXPERTS), TOP)))
quickly = settings(max_examples=60, deadline=None, derandomize=True)


def returns(uses, id, row, judged):
    """What a slot with expert ``id`` returns by the learned policy, straight from all uses (token,
    id), when layer ``row`` was visited last and the expert's own with token ``judged``."""
    tokens = [token for token, used in uses if used == id]
    short = sum((1 - Learned.SHORT) * Learned.SHORT ** (judged - token) for token in tokens)
    long = sum((1 - Learned.LONG) * Learned.LONG ** (judged - token) for token in tokens)
    newest, a, b = Learned.WEIGHTS
    chance = newest * (judged in tokens) + a * short + b * long  # without a forecast
    layers_until = (id // EXPERTS - row - 1) % ROWS + 1
    wait = (1 - chance) * ROWS / max(long, 1e-9)
    return max(chance / layers_until, 1 / (layers_until + wait))


def test_the_lowest_return_leaves():
    chance, uses = random.Random(2), []
    cache = make_cache("learned", 5, ROWS, EXPERTS)
    for token, row in product(range(1, 60), range(ROWS)):
        if row == 0:
            cache.advance()
        ids = [row * EXPERTS + expert for expert in chance.sample(range(EXPERTS), TOP)]
        hits = [cache.use(id) for id in ids]
        assert hits == [id in cache for id in ids]
        uses += [(token, id) for id in ids]
        worth_N = cache._worth_now()
        if token > 1:  # all layers were visited
            wanted = [returns(uses, id, row, token - (id // EXPERTS > row)) for id in IDS]
            np.testing.assert_allclose(worth_N, wanted)
        for id in [id for id in ids if id not in cache]:
            others = cache.cached - {*ids}
            least = min(others, key=lambda id: (worth_N[id], id), default=None)
            full = len(cache) == 5
            rejected = least is None or worth_N[least] >= worth_N[id]
            assert cache.offer(id, ids) == ((id if rejected else least) if full else None)
    assert cache.evictions > 3 and cache.bypassed > 20


@pytest.mark.parametrize("policy", POLICIES)
def test_pinned_experts_stay_and_what_must_be_admitted_is_unless_all_are_pinned(policy):
    cache = make_cache(policy, 2, ROWS, EXPERTS)
    cache.advance()
    for key in (0, 1, 2):
        cache.use(key)
    assert [cache.offer(key, pinned={0, 1}) for key in (0, 1, 2)] == [None, None, 2]
    assert cache.cached == {0, 1}
    assert cache.offer(9, pinned=(0, 9), must=True) == 1
    assert cache.offer(8, pinned=range(12), must=True) == 8
    assert cache.cached == {0, 9}


@pytest.mark.parametrize("policy", POLICIES)
@quickly
@given(st.lists(st.tuples(*[GATES] * ROWS), min_size=1, max_size=12), st.sets(st.sampled_from(IDS)))
def test_chunk_equals_token_by_token(policy, tokens, inside):
    """Afterwards the same keys leave; LRU orders by visit, so it is compared in one layer."""
    rows = 1 if policy == "lru" else ROWS
    tokens = [token[:rows] for token in tokens]
    inside = {0, *(id for id in inside if id < rows * EXPERTS)}
    made = partial(make_cache, policy, len(inside), rows, EXPERTS)
    whole, single = made(), made()
    for cache, key in product((whole, single), inside):
        cache.add(key)
    whole.advance(len(tokens))
    for row in range(rows):
        whole.use_chunk(row, [token[row] for token in tokens])
    used = set()
    for keys in as_choices(tokens):
        single.advance()
        for key in chain(*keys):
            single.use(key)
            used.add(key)
    assert (whole.hits, whole.misses) == (len(used & inside), len(used - inside))
    offers = sorted(used - inside)
    assert [whole.offer(key) for key in offers] == [single.offer(key) for key in offers]


def test_averages_survive_their_rescaling(monkeypatch):
    """A run far longer than ``RESCALE`` decides as one that never rescales."""
    shuffle = random.Random(5)
    gates = [[shuffle.sample(range(EXPERTS), TOP) for _ in range(ROWS)] for _ in range(400)]
    arguments = as_choices(gates), blind(400, ROWS), DEFAULT_POLICY, 5, EXPERTS
    usual = replay(*arguments)
    monkeypatch.setattr(Learned, "RESCALE", 7)
    assert replay(*arguments) == usual


def best_by_trying_all(uses, slots):
    @memoize
    def best(time, inside):
        if time == len(uses):
            return 0
        key = uses[time]
        if key in inside:
            return 1 + best(time + 1, inside)
        leaving = inside if len(inside) == slots else [None]
        admitted = [best(time + 1, inside - {other} | {key}) for other in leaving]
        return max(best(time + 1, inside), *admitted)

    return best(0, frozenset())


def blind(tokens, rows):
    """No features, for policies that do not learn."""
    return np.zeros((tokens, rows, FEATURES))


def as_choices(tokens):
    return [
        [[row * EXPERTS + expert for expert in chosen] for row, chosen in enumerate(token)]
        for token in tokens
    ]


@quickly
@given(st.lists(st.tuples(GATES, GATES), min_size=1, max_size=6), st.integers(1, 4))
def test_optimum_equals_brute_force(tokens, slots):
    choices = as_choices(tokens)
    uses = [key for token in choices for key in chain(*token)]
    assert optimum(choices, slots) == best_by_trying_all(uses, slots)


def test_forecast_learns_what_inputs_say():
    """The next token's experts follow from a token's input alone, and history says nothing: a cache
    with room for a third of the experts then holds what comes."""
    chance = np.random.default_rng(0)
    signs = chance.choice([-1.0, 1.0], (EXPERTS, 300)).astype(np.float32)
    coming = chance.integers(0, EXPERTS, 2001)
    hits = {}
    for learns in (False, True):
        cache = make_cache("learned", 2, 2, EXPERTS)
        for token in range(2000):
            cache.advance()
            for row in range(2):
                key = row * EXPERTS + int(coming[token])
                missing = key not in cache
                x_TD = signs[coming[token + 1], None] if learns else None
                cache.use_chunk(row, [[int(coming[token])]], x_TD=x_TD)
                if missing:
                    cache.offer(key, [key])
            if token == 1000:
                before = cache.hits
        hits[learns] = (cache.hits - before) / 1998
    # Half of all hits are the most that one slot a layer allows where what is used next is known
    # but was not used last; guessing gives a quarter.
    assert hits[True] > hits[False] + 0.1, hits


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_no_numbers_teach_nothing(value):
    cache, plain = (make_cache("learned", 2, ROWS, EXPERTS) for _ in range(2))
    for token in range(3):
        for policy, x_TD in ((cache, np.full((1, 7), value, np.float32)), (plain, None)):
            policy.advance()
            policy.use_chunk(0, [[token]], x_TD=x_TD)
            policy.offer(token)
    assert cache.cached == plain.cached

"""Cache policies against slow references, the optimum against brute force, and ``slotmoe replay``
from traces to charts."""

import json
import random
import re
import tracemalloc
from functools import cache as memoize
from functools import partial
from itertools import chain, combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slotmoe.errors import ConfigError
from slotmoe.offload.observe.trace import TraceWriter, read_trace
from slotmoe.offload.policy import DEFAULT_POLICY, POLICIES
from slotmoe.offload.policy.cache import Learned, make_cache
from slotmoe.offload.policy.forecast import FEATURES, Forecast, fold
from slotmoe.offload.study.replay import gate_choices, optimum, replay

ROWS, EXPERTS, TOP = 3, 4, 2
KEYS = range(ROWS * EXPERTS)
POPULARITY = [0.1, 0.9, 0.3, 0.7] * ROWS
GATES = st.sampled_from(list(combinations(range(EXPERTS), TOP)))
TOKENS = st.lists(st.tuples(*[GATES] * ROWS), min_size=1, max_size=40)
SLOTS = st.integers(1, len(KEYS) - 1)
quickly = settings(max_examples=60, deadline=None, derandomize=True)


class Reference:
    """What each policy's worth of a key is, straight from the list of all (token, key) uses; the
    lowest leaves."""

    def __init__(self, policy, popularity):
        self.policy, self.popularity = policy, popularity
        self.uses, self.now, self.row = [], 0, 0
        self.judged = dict.fromkeys(KEYS, 0)  # when the learned policy last looked at a key

    def visit(self, row, chosen):
        self.row = row
        self.uses += [(self.now, key) for key in chosen]
        self.judged.update(dict.fromkeys(range(row * EXPERTS, row * EXPERTS + EXPERTS), self.now))

    def worth(self, key):
        tokens = [token for token, used in self.uses if used == key]
        if self.policy == "lru":
            places = [place for place, (_, used) in enumerate(self.uses) if used == key]
            return max(places, default=-1)
        then = self.judged[key]
        short = sum((1 - Learned.SHORT) * Learned.SHORT ** (then - token) for token in tokens)
        long = sum((1 - Learned.LONG) * Learned.LONG ** (then - token) for token in tokens)
        long += self.popularity[key] * Learned.LONG**then
        seen = then in tokens, short, long
        chance = sum(w * x for w, x in zip(Learned.WEIGHTS, seen, strict=True))
        layers_until = (key // EXPERTS - self.row - 1) % ROWS + 1
        wait = (1 - chance) * ROWS / max(long, 1e-9)
        return max(chance / layers_until, 1 / (layers_until + wait))  # without a forecast


@pytest.mark.parametrize("policy", POLICIES)
@settings(quickly, max_examples=120)
@given(TOKENS, SLOTS, st.lists(st.sampled_from(KEYS)), st.randoms(), st.booleans())
def test_policy_does_what_its_reference_says(policy, tokens, slots, disturbed, chance, popular):
    """With keys added and removed from outside, keys kept, with and without a prior; equal worths
    may leave in any order."""
    popularity = [chance.random() for _ in KEYS] if popular else None
    cache = make_cache(policy, slots, ROWS, EXPERTS, popularity)
    reference = Reference(policy, popularity or [0.0] * len(KEYS))
    inside, counts = set(), dict.fromkeys(("hits", "misses", "evictions", "bypassed"), 0)
    for token in tokens:
        cache.advance()
        reference.now += 1
        if disturbed:
            key = disturbed.pop()
            if key in inside:
                cache.remove(key)
                inside.remove(key)
            elif len(inside) < slots:
                cache.add(key)
                inside.add(key)
                reference.judged[key] = reference.now
        for row, experts in enumerate(token):
            keys = [row * EXPERTS + expert for expert in experts]
            hits = [cache.use(key) for key in keys]
            assert hits == [key in inside for key in keys]
            counts["hits"] += sum(hits)
            counts["misses"] += TOP - sum(hits)
            reference.visit(row, keys)
            keep = {*keys, chance.choice(KEYS)}
            for key in [key for key in keys if key not in inside]:
                leaving = cache.offer(key, keep)
                others = {other: reference.worth(other) for other in inside - keep}
                least, mine = min(others.values(), default=np.inf), reference.worth(key)
                if len(inside) < slots:
                    assert leaving is None
                    inside.add(key)
                elif leaving == key:
                    assert not others or (cache.bypass and least >= mine - 1e-9)
                    counts["bypassed"] += 1
                else:
                    assert others[leaving] <= least + 1e-9
                    assert not cache.bypass or least < mine + 1e-9
                    inside = inside - {leaving} | {key}
                    counts["evictions"] += 1
                assert {key for key in KEYS if key in cache} == inside
                assert len(cache) == len(inside)
    assert {name: getattr(cache, name) for name in counts} == counts


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
@given(st.data())
def test_chunk_equals_token_by_token(policy, data):
    """Afterwards the same keys leave; LRU orders by visit, so it is compared in one layer."""
    rows = 1 if policy == "lru" else ROWS
    tokens = data.draw(st.lists(st.tuples(*[GATES] * rows), min_size=1, max_size=12))
    inside = data.draw(st.sets(st.sampled_from(range(rows * EXPERTS)), min_size=1))
    made = partial(make_cache, policy, len(inside), rows, EXPERTS, POPULARITY[: rows * EXPERTS])
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


@pytest.mark.parametrize("policy", POLICIES)
def test_a_pass_in_steps_is_worth_what_it_is_in_one(policy):
    rng = np.random.default_rng(1)
    chosen = [rng.integers(0, EXPERTS, (1200, TOP)).tolist() for _ in range(ROWS)]
    worths = []
    for size in (1200, 500):
        cache = make_cache(policy, 5, ROWS, EXPERTS, POPULARITY)
        cache.advance(1200)
        for row, indices in enumerate(chosen):
            for start in range(0, 1200, size):
                cache.use_chunk(row, indices[start : start + size], max(0, 1200 - start - size))
        worths.append(cache._worth_now())
    np.testing.assert_allclose(*worths, rtol=1e-9)


def test_averages_survive_their_rescaling(monkeypatch):
    """A run far longer than ``RESCALE`` decides as one that never rescales; SHORT**-9000 would
    overflow."""
    shuffle = random.Random(5)
    gates = [[shuffle.sample(range(EXPERTS), TOP) for _ in range(ROWS)] for _ in range(400)]
    arguments = as_choices(gates), blind(400, ROWS), DEFAULT_POLICY, 5, EXPERTS
    usual = replay(*arguments)
    monkeypatch.setattr(Learned, "RESCALE", 7)
    assert replay(*arguments) == usual
    monkeypatch.undo()
    cache = make_cache(DEFAULT_POLICY, 5, ROWS, EXPERTS)
    for _ in range(9000):
        cache.advance()
        cache.use(1)


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


def test_replay_by_hand():
    tokens = [[[0, 1]], [[0, 1]], [[2, 3]], [[2, 3]]]
    assert replay(tokens, blind(4, 1), "lru", 2, EXPERTS) == 4


@quickly
@given(TOKENS, SLOTS)
def test_no_policy_beats_the_optimum(tokens, slots):
    choices = as_choices(tokens)
    best = optimum(choices, slots)
    seen = np.random.default_rng(slots).normal(size=(len(tokens), ROWS, FEATURES))
    assert all(replay(choices, seen, policy, slots, EXPERTS) <= best for policy in POLICIES)


def test_forecast_learns_what_inputs_say():
    """The next token's experts follow from a token's input alone, and history says nothing: a cache
    with room for a third of the experts then holds what comes.  A chunk teaches what its tokens
    teach one by one."""
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
    indices = [[int(expert)] for expert in coming[:600]]
    whole, single = (Forecast(1, EXPERTS, np.full(EXPERTS, 0.25)) for _ in range(2))
    for start in range(0, 600, 200):
        x_TD = signs[coming[start + 1 : start + 201]]
        chunk = whole.learn(0, indices[start : start + 200], x_TD)
        for at in range(200):
            last = single.learn(0, indices[start + at : start + at + 1], x_TD[at, None])
    assert chunk.argmax() == last.argmax() == coming[600]
    np.testing.assert_allclose(chunk, last, atol=0.1)


def test_folding_keeps_the_scale_and_what_is_folded():
    for columns in (5, FEATURES, 300, 2048):
        x_TD = 100 * np.random.default_rng(0).normal(size=(3, columns)).astype(np.float32)
        x_TF = fold(x_TD)
        assert x_TF.shape == (3, FEATURES)
        np.testing.assert_allclose(np.square(x_TF).mean(1), 1, rtol=1e-5)
        np.testing.assert_allclose(fold(x_TF), x_TF, rtol=1e-5)


def test_inputs_that_are_no_numbers_teach_nothing():
    caches = {}
    for value in (None, np.nan, np.inf):
        cache = caches[value] = make_cache("learned", 2, ROWS, EXPERTS)
        for token in range(3):
            cache.advance()
            x_TD = None if value is None else np.full((1, 7), value, np.float32)
            cache.use_chunk(0, [[token]], x_TD=x_TD)
            cache.offer(token)
    assert caches[np.nan].cached == caches[np.inf].cached == caches[None].cached


def write_trace(path, tokens=60, seed=0, layers=(1, 2, 5), experts=8, top=3):
    """Routing with favourites, half of it prefill and half decode."""
    chance = np.random.default_rng(seed)
    favour = chance.random((len(layers), experts)) ** 3 + 0.01
    writer = TraceWriter(path, layers, experts, top)
    for step in (tokens - tokens // 2, *[1] * (tokens // 2)):
        for row, layer in enumerate(layers):
            p = favour[row] / favour[row].sum()
            writer.add(
                layer,
                [chance.choice(experts, top, replace=False, p=p).tolist() for _ in range(step)],
                chance.normal(size=(step, 40)),
            )
    writer.close()
    return path


def test_replay_command(slotmoe, tmp_path, heavy):
    traces = [write_trace(tmp_path / f"{seed}.trace", seed=seed) for seed in (0, 1)]
    chart = tmp_path / "chart.png"
    code, out, err = slotmoe("replay", *traces, "--json", "-o", chart)
    assert (code, err) == (0, "")
    report = json.loads(out)
    assert [trace["tokens"] for trace in report["traces"]] == [60, 60]
    found = {(result["policy"], result["slots"]): result for result in report["results"]}
    # 5, 10, ... % of 24, but at least one layer's K
    assert set(found) == {*product((*POLICIES, "optimum"), (3, 4, 6, 8, 12, 18, 24))}
    per_trace = [gate_choices(read_trace(path)[1], 8) for path in traces]
    for (policy, size), result in found.items():
        best = [optimum(trace[0], size) for trace in per_trace]
        hits = best
        if policy != "optimum":
            hits = [replay(*trace, policy, size, 8) for trace in per_trace]
        assert result["by_trace"]["hit_rate"] == [count / (60 * 3 * 3) for count in hits]
        assert result["hit_rate"] == pytest.approx(sum(hits) / 2 / 540)
        assert result["of_optimum"] == pytest.approx(np.mean(np.divide(hits, best)))
    assert chart.read_bytes().startswith(b"\x89PNG")
    assert chart.stat().st_size > 10_000
    code, out, _ = slotmoe("replay", traces[0], "--slots", "6", "--policy", "lru")
    rate = replay(*per_trace[0], "lru", 6, 8) / 540
    words = out[out.index("lru") :].split()
    assert (code, words[:2]) == (0, ["lru", f"{100 * rate:.1f}"])
    assert out.index("lru") < out.index("optimum")
    trace = write_trace(tmp_path / "short.trace", tokens=1)
    code, out, _ = slotmoe("replay", trace, "--slots", 3, "--json")
    results = json.loads(out)["results"]  # an optimum without hits counts as whole
    assert {(result["hit_rate"], result["of_optimum"]) for result in results} == {(0.0, 1.0)}


HEADER = {
    "format": "slotmoe-trace",
    "version": 2,
    "layers": [1, 2],
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}


def _header(**changes):
    return json.dumps({**HEADER, **changes}).encode() + b"\n"


def _step(count, *indices):
    features = bytes(2 * FEATURES * (len(indices) // 2))
    return np.uint32(count).tobytes() + np.array(indices, "<u2").tobytes() + features


GOOD, NONE = _step(1, 0, 1, 2, 3), "not a slotmoe trace"
WRONG = [
    {"version": 1},
    {"format": "x"},
    *({"layers": layers} for layers in ([], [2, 2], "12", [1.5])),
    *({"n_routed_experts": count} for count in (0, 1 << 40)),
    *({"num_experts_per_tok": count} for count in (5, True)),
]
BAD_TRACES = [
    *((NONE, data) for data in (b"", bytes(range(256)) * 9, b"[" * 3_000_000, b"[1]\n")),
    *((NONE, _header(**changes)) for changes in WRONG),
    ("holds no tokens", _header()),
    ("step 1 counts 1 tokens, 1032 bytes, and 1031 bytes are left", _header() + GOOD + GOOD[:-1]),
    ("step 1 counts 1 tokens, 1032 bytes, and 0 bytes are left", _header() + GOOD + b"\1"),
    ("step 1 counts 4294967295 tokens", _header() + GOOD + _step(0xFFFFFFFF, 1, 2)),
    ("step 1 counts 0 tokens", _header() + GOOD + _step(0)),
    (r"chose experts \[2, 4\] in layer 2", _header() + GOOD + _step(1, 0, 1, 2, 4)),
    (r"token 1 chose experts \[3, 3\] in layer 1", _header() + GOOD + _step(1, 3, 3, 1, 2)),
]


@pytest.mark.parametrize(("message", "data"), BAD_TRACES)
def test_bad_trace_is_refused(slotmoe, tmp_path, message, data):
    """In one line that says which file and what is wrong, without allocating what the file only
    claims to hold."""
    path = tmp_path / "bad.trace"
    path.write_bytes(data)
    tracemalloc.start()
    if data != _header():
        with pytest.raises(ConfigError, match=message):
            read_trace(path)
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()
    code, out, err = slotmoe("replay", path)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert re.match(f"slotmoe: {path}: .*{message}", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.trace"], "nowhere.trace"),
        ([], "TRACE"),
        (["GOOD", "--slots", "0"], "--slots"),
        (["GOOD", "--slots", "25"], "24 experts"),
        (["GOOD", "--policy", "magic"], "learned"),
        (["GOOD", "-o", "chart.pdf"], ".png"),
        (["GOOD", "-o", "nowhere/chart.png"], "folder"),
        (["GOOD", "OTHER"], "another model"),
    ],
    ids=str,
)
def test_impossible_replays_are_refused(slotmoe, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    write_trace(tmp_path / "GOOD")
    write_trace(tmp_path / "OTHER", experts=9)
    code, out, err = slotmoe("replay", *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert not list(tmp_path.glob("chart*"))


def test_a_chart_without_matplotlib_is_refused_before_the_work(slotmoe, tmp_path, monkeypatch):
    monkeypatch.setattr("slotmoe.tools.options.find_spec", lambda name: None)
    chart = tmp_path / "chart.png"
    code, out, err = slotmoe("replay", write_trace(tmp_path / "good"), "-o", chart)
    assert (code, out, err.count("\n"), chart.exists()) == (2, "", 1, False)
    assert "matplotlib" in err and "pip install 'slotmoe[plots]'" in err

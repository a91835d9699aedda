"""Attention to the rows that a list names, and the indexer that makes lists, against plain numpy in
float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.border import ListedRows
from tests.support.kernels import (
    ISAS,
    by_each_set,
    latent_cache,
    native,
    one_of,
    quick,
    relative,
    seeds,
    torch_of,
)


def attention(q, rows, r, scale, sinks):
    """q [A, R + P] over rows [S, R + P]."""
    s = np.concatenate([scale * (q @ rows.T), sinks[:, None]], -1)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True))[:, :-1] @ rows[:, :r]


class Lists:
    """Rows in two places, and lists of them that end early."""

    def __init__(self, kernels, rng, tokens, heads, longest, r, p):
        self.r, self.kernels, self.scale = r, kernels, 1 / math.sqrt(r + p)
        self.rows = rng.standard_normal((int(rng.integers(1, 300)), r + p))
        split = int(rng.integers(0, len(self.rows) + 1))
        self.places = [latent_cache(kernels, part, r, 5) for part in np.split(self.rows, [split])]
        lists = rng.integers(0, len(self.rows), (tokens, longest))
        self.lengths = rng.integers(0, longest + 1, tokens)
        lists[np.arange(longest) >= self.lengths[:, None]] = -1
        self.lists = torch.from_numpy(lists.astype(np.int32))
        self.q = torch_of(rng.standard_normal((tokens, heads, r + p)))
        self.sinks = torch_of(rng.standard_normal(heads) * 3)

    def attend(self, chosen=slice(None), lists=None):
        lists = self.lists if lists is None else lists
        listed = ListedRows(*self.places, lists[chosen].contiguous(), self.sinks)
        return self.kernels.attend(self.q[chosen], listed, self.r, self.scale)


@quick
@given(
    st.integers(1, 6), st.integers(1, 40), one_of(1, 60, 200, 700), one_of(5, 64, 130),
    st.integers(0, 40), seeds,
)  # fmt: skip
def test_attend(kernels, tokens, heads, longest, r, p, seed):
    case = Lists(kernels, np.random.default_rng(seed), tokens, heads, longest, r, p)
    got = case.attend()
    for token, length in enumerate(case.lengths):
        rows = case.rows[case.lists.numpy()[token, :length]]
        want = attention(case.q[token].numpy(), rows, r, case.scale, case.sinks.numpy())
        # a step is what rounding to 8 bits does to a Gaussian value: see test_kernels_attention.py
        step = 2 * math.sqrt(2 * math.log(2 * max(r, p)) + 1) / 127 / math.sqrt(12)
        bound = 8 * step * np.abs(rows[:, :r]).max(initial=0)
        assert np.abs(got[token].numpy() - want).max() <= bound
    assert not got[torch.from_numpy(case.lengths == 0)].any()


@pytest.mark.parametrize(("r", "p"), [(64, 8), (512, 0), (30, 6)])
def test_attend_to_all_rows_is_mla(kernels, r, p):
    rng = np.random.default_rng(5)
    rows, q = rng.standard_normal((1100, r + p)), torch_of(rng.standard_normal((3, 20, r + p)))
    cache = latent_cache(kernels, rows, r)
    lists = torch.arange(1100, dtype=torch.int32).repeat(3, 1)
    lists[0, 1098:], lists[1, 1099:] = -1, -1
    want = kernels.mla(q, cache, 1100, r, 0.1)
    for places in ((cache, None), (cache[:70], cache[70:])):
        assert torch.equal(kernels.attend(q, ListedRows(*places, lists), r, 0.1), want)


def test_attend_reads_what_lists_name_alone(kernels):
    rng = np.random.default_rng(6)
    rows, q = rng.standard_normal((200, 64)), torch_of(rng.standard_normal((2, 5, 64)))
    poisoned = rows.copy()
    poisoned[::2] = np.nan
    lists = torch.arange(1, 200, 2, dtype=torch.int32).repeat(2, 1)

    def attend(rows, sinks=None):
        listed = ListedRows(latent_cache(kernels, rows, 64), None, lists, sinks)
        return kernels.attend(q, listed, 64, 0.1)

    want = attend(rows, torch.zeros(5))
    assert torch.equal(attend(poisoned, torch.zeros(5)), want)
    assert not attend(rows, torch.full((5,), 300.0)).any()
    assert relative(want, attend(rows)) > 1e-3


def test_attend_refuses(kernels):
    cache, q = latent_cache(kernels, np.ones((4, 8)), 8), torch.ones(1, 2, 8)
    good = ListedRows(cache, cache[:2], torch.tensor([[0, 5, -1]], dtype=torch.int32))
    kernels.attend(q, good, 8, 1.0)
    bad = {
        "lists_TL": [good.lists_TL + 1, good.lists_TL.long(), good.lists_TL[0]],
        "more_SX": [None, cache[:, :9], cache.float(), cache[:1]],
        "rows_SX": [cache[:3], cache[:, 1:]],
        "sinks_H": [torch.ones(3), torch.ones(2).double()],
    }
    refused = [good._replace(**{name: value}) for name in bad for value in bad[name]]
    for listed, latent in [*((listed, 8) for listed in refused), (good, 7)]:
        with pytest.raises((ValueError, AssertionError)):
            kernels.attend(q, listed, latent, 1.0)


def chosen(scores, k):
    """The best, of equals the first, ascending, then -1."""
    best = np.sort(np.argsort(-scores, kind="stable")[:k])
    return np.pad(best, (0, k - len(best)), constant_values=-1)


def index(kernels, q, weights, cache, counts, k):
    return kernels.index(q, weights, cache, torch.tensor(counts, dtype=torch.int32), k).numpy()


@quick
@given(one_of(1, 3, 40, 1000, 2999), one_of(0, 1, 700), st.booleans(), seeds)
def test_index_chooses_exactly(kernels, k, nans, falling, seed):
    """Keys that are multiples of one have scores as exact as floats; half of them are 0."""
    rng = np.random.default_rng(seed)
    sizes = rng.permutation(np.arange(-1500, 1500)) * 0.01
    keys = sizes[:, None] * rng.standard_normal(32)
    q = torch_of(np.sign(keys[sizes > 0][:1, None] * np.ones((2, 3, 1))))
    weights = torch.full((2, 3), -1.0 if falling else 1.0)
    keys[rng.permutation(3000)[:nans]] = np.nan
    scores = np.maximum(sizes, 0) * weights[0, 0].item()
    scores[np.isnan(keys[:, 0])] = -np.inf
    got = index(kernels, q, weights, latent_cache(kernels, keys, 32), [3000, 1234], k)
    assert (got[0] == chosen(scores, k)).all()
    assert (got[1] == chosen(scores[:1234], k)).all()


def test_index_refuses(kernels):
    cache = latent_cache(kernels, np.ones((4, 8)), 8)
    good = {"q": torch.ones(1, 2, 8), "weights": torch.ones(1, 2), "keys": cache, "k": 2}
    good["counts"] = torch.tensor([4], dtype=torch.int32)
    kernels.index(**good)
    bad = {
        "q": [torch.ones(1, 2, 9), torch.ones(1, 3, 8)],
        "weights": [torch.ones(2, 2), torch.ones(1, 2).double()],
        "keys": [cache[:, 1:], cache.float()],
        "counts": [good["counts"] + 1, good["counts"] - 5, good["counts"].long()],
        "k": [0],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, AssertionError)):
                kernels.index(**good | {name: value})


WIDE = [isa for isa in ISAS if isa.startswith(("amx", "avx512"))]


@pytest.mark.skipif(len(WIDE) < 2, reason="no AVX-512 here")
@quick
@given(
    one_of(1, 16, 20, 128),
    one_of((512, 64), (128, 0), (64, 3), (70, 10), (130, 66)),
    one_of(1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 200, 2000),
    one_of(0, 3, 48),
    seeds,
)
def test_tiles_give_the_bits_of_other_instructions(heads, width, context, extra, seed):
    """Rows in a row, apart, and in any order; attention, and what an indexer chooses."""
    rng, (r, p) = np.random.default_rng(seed), width
    rows = rng.standard_normal((context, r + p))
    rows[context // 3] *= 30
    tokens = min(context, 3 if heads * context < 10000 else 1)
    q = torch_of(rng.standard_normal((tokens, heads, r + p)))
    weights = torch_of(rng.standard_normal((tokens, heads)))
    lists = torch.from_numpy(rng.integers(0, context, (tokens, min(context, 200))).astype(np.int32))

    def run():
        cache = latent_cache(native, rows, r, extra)
        split, parts = context // 2, [native.mla(q, cache, context, r, 0.1)]
        listed = ListedRows(cache[:split], cache[split:], lists)
        parts.append(native.attend(q, listed, r, 0.1))
        if not p:
            counts = torch.full((tokens,), context, dtype=torch.int32)
            parts.append(native.index(q, weights, cache, counts, -(-context // 2)))
        return parts

    first, *others = by_each_set(run)[: len(WIDE)]
    for other in others:
        assert all(map(torch.equal, first, other))

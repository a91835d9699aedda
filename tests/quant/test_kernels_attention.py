"""Latent attention of the native kernels, to all rows or to those of a list, and the indexer that
makes lists, beside plain numpy in float64."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.border import ListedRows
from slotmoe.quant.shapes import latent_bytes
from tests.support.kernels import (
    ISAS,
    by_each_set,
    latent_cache,
    native,
    one_of,
    quick,
    relative,
    seeds,
    sizes,
    torch_of,
)


def attention(q, rows, r, scale, sinks=None):
    """q [A, R + P] over rows [S, R + P], whose first R columns are values."""
    s = scale * (q @ rows.T)
    if sinks is not None:
        s = np.concatenate([s, sinks[:, None]], -1)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True))[:, : len(rows)] @ rows[:, :r]


def mla(kernels, q, rows, r, scale):
    """Of the last token behind all rows."""
    return kernels.mla(torch_of(q)[None], latent_cache(kernels, rows, r), len(rows), r, scale)[0]


# Twice what one rounding to 8 bits of a Gaussian part, whose largest of n values is about sqrt(2
# log 2n), does to it.
def steps(n):
    return 2 * math.sqrt(2 * math.log(2 * n) + 1) / 127 / math.sqrt(12)


@quick
@given(sizes(40, 300, 150), st.integers(0, 40), st.integers(0, 5), seeds, one_of(0.1, 1.0))
def test_mla_one_token(kernels, size, p, extra, seed, spread):
    (heads, context, r), rng = size, np.random.default_rng(seed)
    rows, q = rng.standard_normal((context + 3, r + p)), rng.standard_normal((heads, r + p))
    cache = latent_cache(kernels, rows, r, extra)
    cache[context:] = 0xFF  # rows past the context have no finite scale
    scale = spread / math.sqrt(r + p)
    got = kernels.mla(torch_of(q)[None], cache, context, r, scale)[0]
    want = attention(q, rows[:context], r, scale)
    # A score is off by some `steps` of its deviation, hence a weight by that share of itself, and
    # each value by steps too.
    bound = 4 * steps(max(r, p)) * (1 + spread) * np.abs(rows[:context, :r]).max()
    assert np.abs(got.numpy() - want).max() < bound


@pytest.mark.parametrize(
    ("course", "context"),
    [("level", 2500), ("rising", 1025), ("falling", 2500), ("one peak", 1025)],
)
def test_mla_over_a_long_context(kernels, context, course):
    """Several chunks in a span, whose scores go their own ways: each chunk beyond what float32
    holds of the one before."""
    rng = np.random.default_rng(19)
    rows, q = rng.standard_normal((context, 40)), np.zeros((3, 40))
    q[:, 32] = (1.0, 1.5, 2.0)  # the heads' scores are the 33rd column, up to a factor
    chunk = np.arange(context) // 64
    rows[:, 32:] = 0
    courses = {"level": rng.standard_normal(context), "one peak": 200 * (chunk == 9)}
    courses |= {"rising": 100 * chunk, "falling": -100 * chunk}
    rows[:, 32] = courses[course]
    got = mla(kernels, q, rows, 32, 1.0)
    assert relative(got, attention(q, rows, 32, 1.0)) < 0.03
    rows[-1, 0] = np.nan
    assert mla(kernels, q, rows, 32, 1.0).isnan().all()


def test_mla_shows_nan(kernels):
    rows, q = np.random.default_rng(17).standard_normal((100, 72)), torch.randn(5, 72)
    cache = latent_cache(kernels, rows, 64)
    assert kernels.mla(q[None], cache, 100, 64, 0.1).isfinite().all()
    for column, bad in ((3, np.nan), (70, np.inf)):
        damaged = rows.copy()
        damaged[70, column] = bad
        cache = latent_cache(kernels, damaged, 64)
        assert kernels.mla(q[None], cache, 100, 64, 0.1).isnan().all()
        assert kernels.mla(q[None], cache, 70, 64, 0.1).isfinite().all()
    q[2, 70] = float("inf")
    lost = kernels.mla(q[None], cache, 70, 64, 0.1)[0].isnan()
    assert lost[2].all()
    assert not lost[[0, 1, 3, 4]].any()


def test_no_piece_of_a_range_goes_past_its_end(kernels):
    rows = torch.randn(1999, 12)
    for threads in (1, 2, 3, 7):
        kernels.set_threads(threads)
        for count in (1000, 1001, 1500, 1999):
            cache = torch.full((2100, latent_bytes(8, 4)), 0xFF, dtype=torch.uint8)
            kernels.store_latents(rows[:count], 8, cache[:count])
            assert (cache[count:] == 0xFF).all()
            last = latent_cache(kernels, rows[count - 1 : count].numpy(), 8)
            assert torch.equal(cache[count - 1 : count], last)


def test_latents_of_nothing(kernels):
    """Rows of zeros, and of numbers so small that their inverse is no float, are rows of zeros."""
    rows = np.zeros((70, 72))
    rows[::2] = 1e-40
    rows[3, 64:], rows[5, :64] = 1.0, 1.0
    q = np.ones((3, 72))
    got = mla(kernels, q, rows, 64, 0.1)
    rows[::2] = 0
    assert relative(got, attention(q, rows, 64, 0.1)) < 0.01
    assert not mla(kernels, q, 0 * rows, 64, 0.1).any()


def test_many_small_weights_beside_a_large_one(kernels):
    """63 rows that share a tenth of the weight: each by itself is less than half a 255th of the
    largest."""
    rng = np.random.default_rng(18)
    rows, q = np.zeros((64, 576)), np.zeros((16, 576))
    rows[:, :512] = rng.standard_normal(512) + 0.1 * rng.standard_normal((64, 512))
    rows[20, :512], rows[20, 512], q[:, 512] = 0.1 * rng.standard_normal(512), math.log(9 * 63), 1.0
    assert relative(mla(kernels, q, rows, 512, 1.0), attention(q, rows, 512, 1.0)) < 0.02


@quick
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 20), st.booleans(), seeds)
def test_rotate(kernels, t, heads, pairs, halves, seed):
    """Pairs side by side, and those of two halves, which are others in another order."""
    rng = np.random.default_rng(seed)
    x = torch_of(rng.standard_normal((t, heads, 2 * pairs)))
    table = torch.polar(torch.full((t, pairs), 0.8), torch_of(rng.uniform(-9, 9, (t, pairs))))
    got = kernels.rotate(x, table, halves)
    places = np.arange(2 * pairs).reshape((2, pairs) if halves else (pairs, 2))
    first, second = places if halves else places.T
    turned = torch.complex(x[..., first], x[..., second]) * table[:, None]
    want = torch.zeros_like(x)
    want[..., first], want[..., second] = turned.real, turned.imag
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


def test_rotations_are_these_bits_on_every_system(kernels):
    """By the C library they would be each system's own; these are also glibc's, up to 2.41."""
    positions, by = torch.arange(0, 1 << 20, 257).float(), 1.0 / torch.arange(1, 65).float()
    got = kernels.rotations(positions, by, 1.25)
    angles = (positions[:, None] * by).double()
    assert (got - torch.polar(torch.full_like(angles, 1.25), angles)).abs().max() < 2**-23
    digest = hashlib.sha256(got.numpy().tobytes()).hexdigest()
    assert digest.startswith("5e3b0b5729ca78e2")


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
        bound = 8 * steps(max(r, p)) * np.abs(rows[:, :r]).max(initial=0)
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

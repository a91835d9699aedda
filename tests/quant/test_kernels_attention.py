"""Latent attention of the native kernels against plain numpy in float64, and a whole layer of
attention against its parts."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.quant.shapes import latent_bytes
from tests.support.kernels import latent_cache, one_of, quick, relative, seeds, sizes, torch_of


def attention(q, rows, r, scale):
    s = scale * (q @ rows.T)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)) @ rows[:, :r]


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

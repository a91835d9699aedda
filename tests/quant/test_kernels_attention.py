"""Latent attention of the native kernels, to all rows or to those of a list, and the indexer that
makes lists, beside plain numpy in float64."""

import hashlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.network.layer_types import GroupedRows, ListedRows
from tests.support.kernels import BACKEND, latent_cache, one_of, quick, seeds, torch_of


def attention(q, rows, r, scale, sinks=None):
    """q [A, R + P] over rows [S, R + P], whose first R columns are values."""
    s = scale * (q @ rows.T)
    if sinks is not None:
        s = np.concatenate([s, sinks[:, None]], -1)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True))[:, : len(rows)] @ rows[:, :r]


# Twice what one rounding to 8 bits of a Gaussian part, whose largest of n values is about sqrt(2
# log 2n), does to it.
def steps(n):
    return 2 * math.sqrt(2 * math.log(2 * n) + 1) / 127 / math.sqrt(12)


def test_mla_shows_nan(kernels):
    rows, q = np.random.default_rng(17).standard_normal((100, 72)), torch.randn(5, 72)
    cache = latent_cache(rows, 64)
    assert BACKEND.mla(q[None], cache[:100], 64, 0.1).isfinite().all()
    for column, bad in ((3, np.nan), (70, np.inf)):
        damaged = rows.copy()
        damaged[70, column] = bad
        cache = latent_cache(damaged, 64)
        assert BACKEND.mla(q[None], cache[:100], 64, 0.1).isnan().all()
        assert BACKEND.mla(q[None], cache[:70], 64, 0.1).isfinite().all()
    q[2, 70] = float("inf")
    lost = BACKEND.mla(q[None], cache[:70], 64, 0.1)[0].isnan()
    assert lost[2].all()
    assert not lost[[0, 1, 3, 4]].any()


def test_rotations_are_these_bits_on_every_system(kernels):
    """By the C library they would be each system's own; these are also glibc's, up to 2.41."""
    positions, by = torch.arange(0, 1 << 20, 257).float(), 1.0 / torch.arange(1, 65).float()
    got = kernels.rotations(positions, by, 1.25)
    angles = (positions[:, None] * by).double()
    assert (got - torch.polar(torch.full_like(angles, 1.25), angles)).abs().max() < 2**-23
    digest = hashlib.sha256(got.numpy().tobytes()).hexdigest()
    assert digest.startswith("5e3b0b5729ca78e2")


@quick
@given(
    st.integers(1, 6), st.integers(1, 40), one_of(1, 60, 200, 700), one_of(5, 64, 130),
    st.integers(0, 40), seeds,
)  # fmt: skip
def test_attend(kernels, tokens, heads, longest, r, p, seed):
    """Rows in two places, and lists of them that end early."""
    rng, scale = np.random.default_rng(seed), 1 / math.sqrt(r + p)
    rows = rng.standard_normal((int(rng.integers(1, 300)), r + p))
    split = int(rng.integers(0, len(rows) + 1))
    places = [latent_cache(part, r, 5) for part in np.split(rows, [split])]
    lists = rng.integers(0, len(rows), (tokens, longest))
    lengths = rng.integers(0, longest + 1, tokens)
    lists[np.arange(longest) >= lengths[:, None]] = -1
    q, sinks = rng.standard_normal((tokens, heads, r + p)), rng.standard_normal(heads) * 3
    listed = ListedRows(*places, torch.from_numpy(lists.astype(np.int32)), torch_of(sinks))
    got = BACKEND.attend(torch_of(q), listed, r, scale)
    for token, length in enumerate(lengths):
        named = rows[lists[token, :length]]
        want = attention(q[token], named, r, scale, sinks)
        bound = 8 * steps(max(r, p)) * np.abs(named[:, :r]).max(initial=0)
        assert np.abs(got[token].numpy() - want).max() <= bound
    assert not got[torch.from_numpy(lengths == 0)].any()


@quick
@given(
    st.integers(1, 5), one_of(1, 2, 3), st.integers(1, 20), one_of(1, 63, 64, 300, 1100),
    one_of(4, 30, 64, 80, 128), one_of(0, 1, 7, 64, 100), st.booleans(), seeds,
)  # fmt: skip
def test_grouped(kernels, tokens, groups, heads, before, z, window, sunk, seed):
    """Rows before the first window are not there, and a row's neighbours are poison."""
    rng, scale, first = np.random.default_rng(seed), 2 / math.sqrt(z), 0
    rows = rng.standard_normal((groups, before + tokens, 2 * z))
    rows[0, [-1, -2]] = rows[0, 0]  # alike, and outweigh others
    rows[0, [-1, -2], :z] *= 30
    if window:
        first = max(0, before + 1 - window)
    q, sinks = rng.standard_normal((tokens, groups * heads, z)), rng.standard_normal(groups * heads)
    cache = latent_cache(rows[:, first:].reshape(-1, 2 * z), z, 5)
    places = cache.unflatten(0, (groups, -1)), first, window
    cached = GroupedRows(*places, torch_of(sinks) if sunk else None)
    got = BACKEND.grouped(torch_of(q), cached, scale).numpy().reshape(tokens, groups, heads, z)
    padded = np.pad(q, ((0, 0), (0, 0), (z, 0))).reshape(tokens, groups, heads, 2 * z)
    for token, group in np.ndindex(tokens, groups):
        end = before + token + 1
        seen = rows[group, max(0, end - window) if window else 0 : end]
        own = sinks.reshape(groups, heads)[group] if sunk else None
        want = attention(padded[token, group], seen, z, scale, own)
        bound = 16 * steps(z) * np.abs(seen[:, :z]).max()
        assert np.abs(got[token, group] - want).max() <= bound


def test_grouped_shows_nan_and_refuses(kernels):
    rows, q = np.random.default_rng(3).standard_normal((200, 64)), torch.randn(1, 6, 32)
    whole = latent_cache(rows, 32).view(2, 100, -1)
    assert BACKEND.grouped(q, GroupedRows(whole, 0), 0.1).isfinite().all()
    for column, bad in ((3, np.nan), (40, np.inf)):
        damaged = rows.copy()
        damaged[70, column] = bad
        cache = latent_cache(damaged, 32).view(2, 100, -1)
        lost = BACKEND.grouped(q, GroupedRows(cache, 0), 0.1)[0].isnan()
        assert lost[:3].all() and not lost[3:].any()
        assert BACKEND.grouped(q, GroupedRows(cache, 0, 29), 0.1).isfinite().all()
    for values in (
        *((q[:, :5], whole, 0, 0), (q, whole, 5, 0), (q, whole, -1, 9), (q, whole[:, :0], 0, 0)),
        *((q[..., :28], whole, 0, 0), (q.double(), whole, 0, 0), (q, whole[:, 50:], 50, 51)),
    ):
        queries, held, start, window = values
        with pytest.raises((ValueError, AssertionError)):
            BACKEND.grouped(queries.contiguous(), GroupedRows(held, start, window), 0.1)


@pytest.mark.parametrize(("r", "p"), [(64, 8), (512, 0), (30, 6)])
def test_attend_to_all_rows_is_mla(kernels, r, p):
    rng = np.random.default_rng(5)
    rows, q = rng.standard_normal((1100, r + p)), torch_of(rng.standard_normal((3, 20, r + p)))
    cache = latent_cache(rows, r)
    lists = torch.arange(1100, dtype=torch.int32).repeat(3, 1)
    lists[0, 1098:], lists[1, 1099:] = -1, -1
    want = BACKEND.mla(q, cache[:1100], r, 0.1)
    for places in ((cache, None), (cache[:70], cache[70:])):
        assert torch.equal(BACKEND.attend(q, ListedRows(*places, lists), r, 0.1), want)


def chosen(scores, k):
    """The best, of equals the first, ascending, then -1."""
    best = np.sort(np.argsort(-scores, kind="stable")[:k])
    return np.pad(best, (0, k - len(best)), constant_values=-1)


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
    counts, cache = torch.tensor([3000, 1234]).int(), latent_cache(keys, 32)
    got = BACKEND.index(q, weights, cache, counts, k).numpy()
    assert (got[0] == chosen(scores, k)).all()
    assert (got[1] == chosen(scores[:1234], k)).all()


def test_lists_and_keys_of_another_shape_or_type_are_refused(kernels):
    cache, q = latent_cache(np.ones((4, 8)), 8), torch.ones(1, 2, 8)
    listed = ListedRows(cache, cache[:2], torch.tensor([[0, 5, -1]], dtype=torch.int32))
    counts = torch.tensor([4], dtype=torch.int32)
    keys = {"q_TJA": q, "weights_TJ": torch.ones(1, 2), "keys_SX": cache}
    keys |= {"counts_T": counts, "k": 2}
    bad = {
        "lists_TL": [listed.lists_TL + 1, listed.lists_TL.long(), listed.lists_TL[0]],
        "more_SX": [None, cache[:, :9], cache.float(), cache[:1]],
        "rows_SX": [cache[:3], cache[:, 1:]],
        "sinks_H": [torch.ones(3), torch.ones(2).double()],
        "q_TJA": [torch.ones(1, 2, 9), torch.ones(1, 3, 8)],
        "weights_TJ": [torch.ones(2, 2), torch.ones(1, 2).double()],
        "keys_SX": [cache[:, 1:], cache.float()],
        "counts_T": [counts + 1, counts - 5, counts.long()],
        "k": [0],
    }

    def run(name="k", value=2):
        BACKEND.index(**keys | ({name: value} if name in keys else {}))
        if name not in keys:
            BACKEND.attend(q, listed._replace(**{name: value}), 8, 1.0)

    run()
    run("rows_SX", cache)
    for name, values in bad.items():
        for value in values:
            with pytest.raises((ValueError, AssertionError)):
                run(name, value)


def delta_columns(states):
    """States [A, K, V] with each head's columns in their blocks, as the kernels keep them."""
    A, K, V = states.shape
    parts = [states[..., at : at + 32].reshape(A, -1) for at in range(0, V, 32)]
    return torch.cat(parts, dim=1).view(A, K, V)


def by_rule(inputs, z, weights, state, G, past, eps, by_channel):
    """The gated delta rule in float64, and the state behind each row."""
    convolution, decay, bias, norm = (part.double().numpy() for part in weights)
    A, K, V = state.shape
    keys, columns, outs, states = G * K, convolution.shape[1], [], []
    z = np.pad(z, ((len(inputs) - past - len(z), 0), (0, 0), (0, 0)))
    for at in range(past, len(inputs)):
        seen = inputs[max(0, at - 3) : at + 1, :columns]
        x = (seen * convolution[4 - len(seen) :]).sum(0)
        x = x / (1 + np.exp(-x))
        q, k, v = x[:keys].reshape(G, K), x[keys : 2 * keys].reshape(G, K), x[2 * keys :]
        q, k = (y / np.sqrt((y * y).sum(-1, keepdims=True) + 1e-6) for y in (q, k))
        q, k = (np.repeat(y, A // G, 0)[:, :, None] for y in (q / math.sqrt(K), k))
        b, a = inputs[at, columns:][:A].reshape(A, 1, 1), inputs[at, columns:][A:] + bias
        state = state * np.exp(-np.exp(decay)[:, None, None] * np.logaddexp(0, a.reshape(A, -1, 1)))
        change = (v.reshape(A, 1, V) - (k * state).sum(1, keepdims=True)) / (1 + np.exp(-b))
        state = state + k * change
        o, gate = (q * state).sum(1), z[at - past]
        o = o / np.sqrt((o * o).mean(-1, keepdims=True) + eps) * norm / (1 + np.exp(-gate))
        o = o if by_channel else o * gate
        outs.append(o), states.append(state)
    return np.array(outs), states


def delta_case(rng, G, each, K, V, rows, tokens):
    """With 0 heads of values to ``each`` of keys, which is one, decays are by channel."""
    A = G * max(each, 1)
    columns, decays = 2 * G * K + A * V, A if each else A * K
    sizes = (4, columns), A, decays, V
    weights = [torch_of(rng.standard_normal(size)) for size in sizes]
    weights[1] = weights[1] * 2 - 2  # some heads forget at once, some hardly ever
    inputs, z = (
        rng.standard_normal(size) for size in ((rows, columns + A + decays), (tokens, A, V))
    )
    return inputs, z, weights, rng.standard_normal((A, K, V))


@quick
@given(
    one_of(1, 2, 3, 30, 70, 140), one_of(1, 2), one_of(0, 1, 2), one_of(3, 24, 128),
    one_of(1, 16, 32, 40, 128), st.integers(0, 3), st.integers(0, 5), st.booleans(), seeds,
)  # fmt: skip
def test_delta(kernels, tokens, G, each, K, V, past, silent, last, seed):
    """Rows before the first one, some whose results nobody asks for, and some that stay out of the
    state.  With one column the norm's epsilon bounds what rounding does to a result near 0."""
    rng = np.random.default_rng(seed)
    rows = past + silent + tokens
    inputs, z, weights, state = delta_case(rng, G, each, K, V, rows, tokens)
    inputs, z, state = (np.float32(x).astype(np.float64) for x in (inputs, z, state))
    folded, before = rows - past - last, delta_columns(torch_of(state))
    after, eps = torch.zeros(state.shape), 1e-6 if V > 1 else 1e-3
    given = torch_of(inputs), torch_of(z), *weights, before, after, past, folded, not each, eps
    got = kernels.delta(*given, G=G).numpy()
    outs, states = by_rule(inputs, z, weights, state, G, past, eps, not each)
    want = outs[silent:]
    assert np.abs(got - want).max() <= 2e-5 * max(1, np.abs(want).max())
    kept = delta_columns(torch_of([np.zeros_like(state), *states][folded]))
    assert (after - kept).abs().max() <= 1e-5 * max(1, kept.abs().max())
    assert torch.equal(before, delta_columns(torch_of(state)))


@pytest.mark.parametrize("each", [2, 0])
def test_delta_is_the_same_by_any_threads_and_cut_anywhere(kernels, each):
    """One token after the other, and pieces that replay rows, or fold all but the last."""
    G, K, V, rows = 2, 40, 72, 150
    inputs, z, weights, state = delta_case(np.random.default_rng(8), G, each, K, V, rows, rows)
    inputs, z, start = torch_of(inputs), torch_of(z), torch_of(state)

    def run(first, stop, silent, states, after, folded=0):
        past = min(3, first)
        own = inputs[first - past : stop], z[first + silent : stop]
        how = past, folded or stop - first, not each, 1e-6
        return kernels.delta(*own, *weights, states, after, *how, G=G)

    want_state = start.clone()
    want = run(0, rows, 0, want_state, want_state)  # in its own place
    assert not torch.equal(want_state, start)
    for threads in (1, 2, 5):
        kernels.set_threads(threads)
        for sizes in ([1] * rows, [2, 64, 1, 1, 65, 17], [rows - 1, 1]):
            own, outs, at = start.clone(), [], 0
            for size in sizes:
                outs.append(run(at, at + size, 0, own, own))
                at += size
            assert torch.equal(torch.cat(outs), want) and torch.equal(own, want_state)
    less, more = start.clone(), start.clone()
    assert torch.equal(run(0, rows, 0, start, less, rows - 6), want)
    for silent, size in ((1, 4), (4, 6), (0, 6)):  # tokens that were drafted, and some kept
        again = run(rows - 6, rows - 6 + size, silent, less, more)
        assert torch.equal(again, want[rows - 6 + silent : rows - 6 + size])
    assert torch.equal(more, want_state)
    x, gate = torch.randn(2, 3, 70).unbind()
    assert torch.equal(kernels.gated(x, gate)[2:], kernels.gated(x[2:], gate[2:]))
    assert (kernels.gated(x, gate) - x * gate.sigmoid()).abs().max() < 1e-6


def test_a_delta_rule_of_other_sizes_is_refused(kernels):
    inputs, z, weights, state = delta_case(np.random.default_rng(1), 1, 2, 8, 16, 4, 2)
    good = [
        torch_of(inputs),
        torch_of(z),
        *weights,
        torch_of(state),
        torch_of(state),
        1,
        3,
        0,
        1e-6,
    ]
    kernels.delta(*good, G=1)
    wrong = {0: good[0][:, 1:], 2: good[2][:, 1:], 6: good[6][1:], 8: 3, 9: 4}
    for index, value in [*wrong.items(), (8, 4), (8, -1), (9, -1), (10, 1), (1, good[1][:, :1])]:
        values = [*good]
        values[index] = value.contiguous() if isinstance(value, torch.Tensor) else value
        with pytest.raises(ValueError, match=r"expected|refused"):
            kernels.delta(*values, G=1)
    for heads in (0, 2, 3):
        with pytest.raises(ValueError, match="refused"):
            kernels.delta(*good, G=heads)

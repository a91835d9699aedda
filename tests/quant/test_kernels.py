"""The native kernels against plain numpy in float64, on every instruction set that this machine
runs.

Shapes: T tokens; W [N, K]; H hidden; I intermediate; k experts; NF4 tiles of 16 rows and blocks of
64 columns.
"""

import math
import os
import threading

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from slotmoe.quant import nf4
from slotmoe.quant.backends.native import NativeOps
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import (
    AttentionLayer,
    Decoder,
    Matrix,
    Mlp,
    PackedInt8,
    Router,
)
from slotmoe.quant.shapes import latent_bytes, record_bytes

native = qk.load()
pytestmark = pytest.mark.skipif(native is None, reason="the native kernels are not built")
ISAS = native.isas if native else ()
LEVELS = np.array(nf4.LEVELS, dtype=np.float32)

# Hypothesis runs inside parametrized tests; the fixtures that it complains about only choose the
# instruction set.
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=ISAS)
def kernels(request):
    before = native.isa, native.threads
    native.set_isa(request.param)
    native.set_threads(2)
    yield native
    native.set_isa(before[0])
    native.set_threads(before[1])


# --- references: the formats rebuilt from their documentation, one element at a time where speed
# allows


def tile_codes(codes: np.ndarray) -> np.ndarray:
    """codes [Np, Kp] -> uint8 [Np/16, Kp/64, 512]."""
    n, k = codes.shape
    t = codes.reshape(n // 16, 16, k // 64, 8, 2, 4)  # tile, lane, block, t, high or low nibble, i
    t = t.transpose(0, 2, 3, 1, 5, 4).astype(np.uint8)  # tile, block, t, lane, i, nibble
    return (t[..., 0] << 4 | t[..., 1]).reshape(n // 16, k // 64, 512)


def untile_codes(tiles: np.ndarray, n: int, k: int) -> np.ndarray:
    out = np.empty((tiles.shape[0] * 16, tiles.shape[1] * 64), dtype=np.uint8)
    for (tile, block, byte), value in np.ndenumerate(tiles):
        t, lane, i = byte // 64, byte % 64 // 4, byte % 4
        out[16 * tile + lane, 64 * block + 8 * t + i] = value >> 4
        out[16 * tile + lane, 64 * block + 8 * t + 4 + i] = value & 15
    return out[:n, :k]


def random_nf4(rng, n, k, scale=1.0, levels=LEVELS, negative=False):
    """A random NF4 matrix with documented padding -> (dequantized float64 [n, k], codes,
    absmax)."""
    n_pad, k_pad = -(-n // 16) * 16, -(-k // 64) * 64
    codes = np.full((n_pad, k_pad), 7, dtype=np.uint8)
    codes[:n, :k] = rng.integers(0, 16, (n, k))
    absmax = np.zeros((n_pad, k_pad // 64), dtype=np.float16)
    absmax[:n] = (rng.uniform(0.5, 1.5, (n, k_pad // 64)) * scale).astype(np.float16)
    if negative:
        absmax *= rng.choice([-1, 1], absmax.shape).astype(np.float16)
    with np.errstate(under="ignore"):
        w = levels.astype(np.float64)[codes] * np.repeat(absmax.astype(np.float64), 64, axis=1)
    tiles = absmax.reshape(n_pad // 16, 16, k_pad // 64).transpose(0, 2, 1)
    return (
        w[:n, :k],
        torch.from_numpy(tile_codes(codes)),
        torch.from_numpy(np.ascontiguousarray(tiles)),
    )


def silu(g):
    return g / (1 + np.exp(-np.clip(g, -700, None)))


def relative(got, want):
    """RMS of the difference over RMS of the truth."""
    got, want = np.asarray(got, dtype=np.float64), np.asarray(want, dtype=np.float64)
    size = np.linalg.norm(want)
    return np.linalg.norm(got - want) / size if size else np.linalg.norm(got)


def aligned(data: np.ndarray, tail: int = 0) -> torch.Tensor:
    """uint8 tensor at a multiple of 64 bytes, followed by `tail` poisoned bytes that belong to
    it."""
    buffer = torch.full((data.size + tail + 64,), 0xFF, dtype=torch.uint8)
    offset = -buffer.data_ptr() % 64
    buffer[offset : offset + data.size] = torch.from_numpy(data)
    return buffer[offset : offset + data.size + tail]


def random_expert(rng, h, i, levels=LEVELS, scale=None):
    """-> (gate, up, down) float64 and the record with a poisoned tail."""
    scale = scale or 2 / math.sqrt(h)
    parts = [random_nf4(rng, *shape, scale, levels, True) for shape in ((i, h), (i, h), (h, i))]
    data = [p[1].numpy().tobytes() for p in parts] + [p[2].numpy().tobytes() for p in parts]
    return [p[0] for p in parts], aligned(np.frombuffer(b"".join(data), dtype=np.uint8).copy(), 100)


def expert(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


def q8(x):
    """llama.cpp's Q8_0 of activations: blocks of 32, scale = max / 127 in fp16."""
    blocks = x.reshape(*x.shape[:-1], -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / 127
    q = np.round(np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0))
    return (q * d.astype(np.float16).astype(np.float64)).reshape(x.shape)


def torch_of(x):
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


levels_tensor = torch.from_numpy(LEVELS)
dims = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300))  # T, N, K
seeds = st.integers(0, 2**32 - 1)


# --- linear layers


def half_steps(x):
    """The most that 8 bits a block of 16 columns can be off. x [T, K] -> [T, K]."""
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % 16)))
    steps = padded.reshape(len(x), -1, 16).max(-1) / 127
    return np.repeat(steps, 16, axis=1)[:, : x.shape[1]] * 0.5001


def scales_of(absmax, n, k):
    rows = absmax.numpy().astype(np.float64).transpose(0, 2, 1)
    return np.repeat(rows.reshape(-1, rows.shape[-1]), 64, axis=1)[:n, :k]


@quick
@given(
    dims,
    seeds,
    st.sampled_from([6e-8, 1e-4, 1.0, 30000.0]),
    st.sampled_from([1e-42, 1e-20, 1.0, 1e30]),
)
def test_linear_nf4(kernels, shape, seed, w_scale, x_scale):
    t, n, k = shape
    rng = np.random.default_rng(seed)
    w, codes, absmax = random_nf4(rng, n, k, w_scale, negative=True)
    x = torch_of(rng.standard_normal((t, k)) * x_scale)
    x64 = x.numpy().astype(np.float64)
    want = x64 @ w.T
    assume(np.abs(want).max() < 1e38)
    got = kernels.linear_nf4(x, codes, absmax, levels_tensor, n).numpy().astype(np.float64)
    # Off by half an activation step on each weight, and half a level step (at most 1 / 95) on each
    # activation.
    steps, scales = half_steps(x64), np.abs(scales_of(absmax, n, k))
    bound = steps @ np.abs(w).T + (np.abs(x64) + steps) @ scales.T * 0.5 / 95
    assert (np.abs(got - want) <= bound + 1e-6 * np.abs(x64) @ np.abs(w).T + 2e-45).all()


@quick
@given(dims, seeds, st.sampled_from([1e-30, 1.0, 1e30]))
def test_linear_int8(kernels, shape, seed, scale):
    t, n, k = shape
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (n, k), dtype=np.int8)
    s = (rng.uniform(0.5, 2, n) * scale).astype(np.float32)
    x = torch_of(rng.standard_normal((t, k)) / scale)
    w = q * s.astype(np.float64)[:, None]
    x64 = x.numpy().astype(np.float64)
    got = (
        kernels.linear_int8(x, kernels.pack_int8(torch.from_numpy(q)), torch.from_numpy(s))
        .numpy()
        .astype(np.float64)
    )
    bound = half_steps(x64) @ np.abs(w).T + 1e-6 * np.abs(x64) @ np.abs(w).T
    assert (np.abs(got - x64 @ w.T) <= bound).all()


def test_exact_where_integers_suffice(kernels):
    """Levels and activations that 8 bits hold exactly give the exact result: no saturation, no lost
    correction."""
    rng = np.random.default_rng(0)
    levels = np.array(
        [-127, -126, -100, -64, -33, -5, -1, 0, 1, 2, 31, 64, 99, 120, 126, 127], dtype=np.float32
    )
    w, codes, absmax = random_nf4(rng, 40, 200, 1.0, levels)
    absmax[:] = torch.where(absmax != 0, 0.5, 0.0)
    w = np.sign(w) * 0 + levels.astype(np.float64)[untile_codes(codes.numpy(), 40, 200)] * 0.5
    x = rng.choice([-127.0, 127.0], (3, 200))
    x[:, ::16] = 127
    got = kernels.linear_nf4(torch_of(x), codes, absmax, torch.from_numpy(levels), 40)
    assert relative(got, x @ w.T) < 1e-6
    q = rng.choice(np.array([-127, 127], dtype=np.int8), (40, 200))
    got = kernels.linear_int8(torch_of(x), kernels.pack_int8(torch.from_numpy(q)), torch.ones(40))
    assert relative(got, x @ q.T.astype(np.float64)) < 1e-6


@pytest.mark.parametrize(
    "name", ["ascending", "shuffled", "positive", "huge", "tiny", "one", "zeros"]
)
def test_levels_are_data(kernels, name):
    rng = np.random.default_rng(1)
    table = {
        "ascending": np.sort(rng.uniform(-1, 1, 16)),
        "shuffled": rng.permutation(LEVELS),
        "positive": rng.uniform(0, 5, 16),
        "huge": rng.uniform(-1e30, 1e30, 16),
        "tiny": rng.uniform(-1e-30, 1e-30, 16),
        "one": np.full(16, 0.7),
        "zeros": np.zeros(16),
    }[name].astype(np.float32)
    w, codes, absmax = random_nf4(rng, 48, 256, 0.5, table, True)
    x = torch_of(rng.standard_normal((2, 256)))
    got = kernels.linear_nf4(x, codes, absmax, torch.from_numpy(table), 48)
    assert relative(got, x.numpy().astype(np.float64) @ w.T) < 0.015


def activations(kind, rng, shape):
    if kind == "gaussian":
        return rng.standard_normal(shape)
    if kind == "outliers":
        x = rng.standard_normal(shape)
        x[:, rng.choice(shape[1], shape[1] // 100, replace=False)] *= 50
        return x
    return rng.standard_t({"t2": 2, "t3": 3}[kind], shape)


@pytest.mark.parametrize("kind", ["gaussian", "t2", "t3", "outliers"])
def test_error_beside_q8(kernels, kind):
    """Within 1.5% for Gaussian activations, and never worse than llama.cpp's activations with exact
    weights."""
    rng = np.random.default_rng(3)
    x = torch_of(activations(kind, rng, (8, 2048)))
    x64 = x.numpy().astype(np.float64)
    raw = rng.standard_normal((256, 2048))
    codes, absmax = kernels.quantize_nf4(torch_of(raw))
    blocks = absmax.numpy().astype(np.float64).transpose(0, 2, 1).reshape(256, 32)
    w = LEVELS.astype(np.float64)[untile_codes(codes.numpy(), 256, 2048)] * np.repeat(
        blocks, 64, axis=1
    )
    q, s = kernels.quantize_int8(torch_of(raw))
    w8 = q.numpy() * s.numpy().astype(np.float64)[:, None]
    for got, exact in [
        (kernels.linear_nf4(x, codes, absmax, levels_tensor, 256), w),
        (kernels.linear_int8(x, kernels.pack_int8(q), s), w8),
    ]:
        want = x64 @ exact.T
        error, baseline = relative(got, want), relative(q8(x64) @ exact.T, want)
        if kind == "gaussian":
            assert error < 0.015
        else:
            assert error <= baseline, f"{error:.4f} against {baseline:.4f}"


def test_many_rows_equal_one_row(kernels):
    rng = np.random.default_rng(4)
    _, codes, absmax = random_nf4(rng, 90, 200)
    packed = kernels.pack_int8(torch.from_numpy(rng.integers(-127, 128, (90, 200), dtype=np.int8)))
    scale = torch.rand(90) + 0.1
    x = torch_of(rng.standard_normal((600, 200)))  # over the token chunk (128) and the pass (512)
    many = (
        kernels.linear_nf4(x, codes, absmax, levels_tensor, 90),
        kernels.linear_int8(x, packed, scale),
    )
    for row in (0, 1, 127, 128, 511, 512, 599):
        one = x[row : row + 1]
        assert torch.equal(
            kernels.linear_nf4(one, codes, absmax, levels_tensor, 90)[0], many[0][row]
        )
        assert torch.equal(kernels.linear_int8(one, packed, scale)[0], many[1][row])


def test_zeros_and_not_finite(kernels):
    rng = np.random.default_rng(5)
    _, codes, absmax = random_nf4(rng, 20, 100)
    x = torch.zeros(4, 100)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), torch.rand(100)
    y = kernels.linear_nf4(x, codes, absmax, levels_tensor, 20)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()
    assert kernels.linear_nf4(torch.empty(0, 100), codes, absmax, levels_tensor, 20).shape == (
        0,
        20,
    )


def test_flushing_denormals_changes_nothing(kernels):
    rng = np.random.default_rng(6)
    _, codes, absmax = random_nf4(rng, 40, 128)
    x = torch_of(rng.standard_normal((1, 128)) * 1e-41)
    want = kernels.linear_nf4(x, codes, absmax, levels_tensor, 40)
    torch.set_flush_denormal(True)
    try:
        got = kernels.linear_nf4(x, codes, absmax, levels_tensor, 40)
        still = torch.full((1,), 1e-41) * 0.5
    finally:
        torch.set_flush_denormal(False)
    assert want.count_nonzero() > 0 and torch.equal(got, want)
    assert still.item() == 0  # the caller's mode is as it was


# --- experts


@quick
@given(st.integers(1, 100), st.integers(1, 150), st.integers(1, 5), seeds)
def test_experts(kernels, i, h, k, seed):
    rng = np.random.default_rng(seed)
    experts = [random_expert(rng, h, i) for _ in range(k)]
    x = torch_of(rng.standard_normal((3, h)))
    weights = torch_of(rng.uniform(0.1, 1, k))
    x64 = x.numpy().astype(np.float64)
    each = np.stack([expert(x64, *w) for w, _ in experts])  # [k, 3, H]
    for row in range(3):
        records = [r for _, r in experts]
        outs = kernels.experts_each(x[row], records, i, levels_tensor)
        got = kernels.weighted_sum(outs[None], weights[None])[0]
        if min(h, i) >= 16:  # with fewer weights one rounded level is large beside the result
            assert relative(outs, each[:, row]) < 0.06
        # Hits first, misses later, in any split: bitwise the same sum.
        split = torch.cat([kernels.experts_each(x[row], [r], i, levels_tensor) for r in records])
        assert torch.equal(split, outs)
        assert torch.equal(kernels.weighted_sum(split[None], weights[None])[0], got)
        total = torch.zeros(h)
        for w, out in zip(weights, split, strict=True):
            total = total + w * out
        assert torch.equal(total, got)
    slab = slab_of([record for _, record in experts])
    slots = torch.from_numpy(rng.integers(-1, k, (3, 4), dtype=np.int32))
    y = torch.full((3, 4, h), 7.0)
    kernels.experts_by_slot(x, slab, slots, i, levels_tensor, y)
    for row, entry in np.ndindex(3, 4):
        slot = int(slots[row, entry])
        want = (
            torch.full((h,), 7.0)
            if slot < 0
            else kernels.experts_each(x[row], [experts[slot][1]], i, levels_tensor)[0]
        )
        assert torch.equal(y[row, entry], want)


def slab_of(records):
    """Records as slots, each at a multiple of 64 bytes, in poisoned memory: uint8 [S, stride]."""
    slab = torch.full((len(records), -(-len(records[0]) // 64) * 64 + 64), 255, dtype=torch.uint8)
    for slot, record in zip(slab, records, strict=True):
        slot[: len(record)] = record
    return slab


def through_one(kernels, x, record, intermediate):
    """All of x through one expert, [T, H]."""
    y = torch.empty(len(x), 1, x.shape[1])
    kernels.experts_by_slot(
        x,
        slab_of([record]),
        torch.zeros(len(x), 1, dtype=torch.int32),
        intermediate,
        levels_tensor,
        y,
    )
    return y[:, 0]


def test_expert_error_at_a_real_size(kernels):
    rng = np.random.default_rng(7)
    weights, record = random_expert(rng, 512, 352)
    x = torch_of(rng.standard_normal((4, 512)))
    want = expert(x.numpy().astype(np.float64), *weights)
    # Three quantized matrices: gate, up and down each add an error of at most 1.5%.
    assert relative(through_one(kernels, x, record, 352), want) < 0.015 * math.sqrt(3)


def test_more_uses_than_one_pass_takes(kernels):
    """Each output is that of a call of its own, wherever the passes of 512 cut an expert's
    tokens."""
    rng = np.random.default_rng(12)
    slab = slab_of([random_expert(rng, 64, 32)[1] for _ in range(3)])
    x, slots = (
        torch_of(rng.standard_normal((400, 64))),
        torch.from_numpy(rng.integers(0, 3, (400, 3), dtype=np.int32)),
    )
    y = torch.full((400, 3, 64), torch.nan)
    kernels.experts_by_slot(x, slab, slots, 32, levels_tensor, y)
    for row, uses in enumerate(slots.tolist()):
        assert torch.equal(
            y[row], kernels.experts_each(x[row], [slab[slot] for slot in uses], 32, levels_tensor)
        )


def test_experts_with_extreme_activations(kernels):
    rng = np.random.default_rng(8)
    _, record = random_expert(rng, 128, 64)
    for scale in (0.0, 1e-42, 1e-20, 1e15):
        y = kernels.experts_each(
            torch_of(rng.standard_normal(128) * scale), [record], 64, levels_tensor
        )
        assert y.isfinite().all()
        assert scale or (y == 0).all()
    assert kernels.experts_each(torch.ones(128), [], 64, levels_tensor).shape == (0, 128)
    assert not kernels.weighted_sum(torch.empty(1, 0, 128), torch.empty(1, 0)).any()


def test_threads_change_nothing(kernels):
    rng = np.random.default_rng(9)
    experts = [random_expert(rng, 320, 176)[1] for _ in range(3)]
    x, rows = torch_of(rng.standard_normal((70, 320))), rng.standard_normal((10, 7))
    _, codes, absmax = random_nf4(rng, 333, 320)
    packed = kernels.pack_int8(torch.from_numpy(rng.integers(-127, 128, (333, 320), dtype=np.int8)))
    q, cache = (
        torch_of(rng.standard_normal((16, 72))),
        latent_cache(kernels, rng.standard_normal((500, 72)), 64),
    )
    results = []
    for threads in (1, 2, 3, 7):
        kernels.set_threads(threads)
        results.append(
            [
                kernels.linear_nf4(x, codes, absmax, levels_tensor, 333),
                kernels.linear_int8(x, packed, torch.ones(333)),
                kernels.experts_each(x[0], experts, 176, levels_tensor),
                kernels.weighted_sum(x.view(10, 7, 320), torch_of(rows)),
                through_one(kernels, x, experts[0], 176),
                kernels.mla(q[None], cache, 500, 64, 0.2),
                *kernels.quantize_nf4(x),
                *kernels.quantize_int8(x),
            ]
        )
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_calls_from_several_threads(kernels):
    rng = np.random.default_rng(10)
    record = random_expert(rng, 256, 128)[1]
    x = torch_of(rng.standard_normal((8, 256)))
    want = [kernels.experts_each(row, [record], 128, levels_tensor) for row in x]
    wrong = []

    def work(row):
        for _ in range(20):
            if not torch.equal(
                kernels.experts_each(x[row], [record], 128, levels_tensor), want[row]
            ):
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(row,)) for row in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings(
    "ignore:This process:DeprecationWarning"
)  # python 3.12 on forking with threads
def test_a_forked_child_does_not_hang(kernels):
    x, w = torch.randn(1, 64), kernels.pack_int8(torch.ones(64, 64, dtype=torch.int8))
    want = kernels.linear_int8(x, w, torch.ones(64))
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(kernels.linear_int8(x, w, torch.ones(64)), want) else 1)
    for _ in range(1000):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        threading.Event().wait(0.01)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
        pytest.fail("the child hung")
    assert status == 0


# --- attention


def attention(q, rows, r, scale):
    s = scale * (q @ rows.T)
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True)) @ rows[:, :r]


def latent_cache(kernels, rows, r, extra=0):
    """Rows [S, R + P] as the kernels keep them, ``extra`` bytes apart, the last as long as any."""
    size = latent_bytes(r, rows.shape[1] - r)
    cache = torch.full((len(rows), size + extra), 0xFF, dtype=torch.uint8)[:, :size]
    kernels.store_latents(torch_of(rows), r, cache)
    return cache


def sharpness(q, rows, spread):
    """The scale that gives scores this standard deviation; 1 is what 1 / sqrt(R + P) gives Gaussian
    ones."""
    return spread / np.std(q @ rows.T)


# Twice what one rounding to 8 bits of a Gaussian part, whose largest of n values is about sqrt(2
# log 2n), does to it.
def steps(n):
    return 2 * math.sqrt(2 * math.log(2 * n) + 1) / 127 / math.sqrt(12)


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 150),
    st.integers(0, 40),
    st.integers(0, 5),
    seeds,
    st.sampled_from([0.1, 1.0]),
)
def test_mla_one_token(kernels, heads, context, r, p, extra, seed, spread):
    rng = np.random.default_rng(seed)
    rows, q = rng.standard_normal((context + 3, r + p)), rng.standard_normal((heads, r + p))
    cache = latent_cache(kernels, rows, r, extra)
    cache[context:] = 0xFF  # rows past the context have no finite scale
    scale = spread / math.sqrt(r + p)
    got = kernels.mla(torch_of(q)[None], cache, context, r, scale)[0]
    want = attention(q, rows[:context], r, scale)
    # A score is off by some `steps` of its deviation, hence a weight by that share of itself, and
    # each value by steps too.
    assert (
        np.abs(got.numpy() - want).max()
        < 4 * steps(max(r, p)) * (1 + spread) * np.abs(rows[:context, :r]).max()
    )


@quick
@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 200), seeds)
def test_mla_of_many_tokens_is_bitwise_that_of_each(kernels, tokens, heads, before, seed):
    rng = np.random.default_rng(seed)
    context = before + tokens
    rows = rng.standard_normal((context + 2, 40))
    cache = latent_cache(kernels, rows, 32)
    one_by_one = torch.cat([latent_cache(kernels, row[None], 32) for row in rows])
    assert torch.equal(cache, one_by_one)
    cache[context:] = 0xFF
    q = torch_of(rng.standard_normal((tokens, heads, 40)))
    got = kernels.mla(q, cache, context, 32, 0.2)
    for t in range(tokens):
        assert torch.equal(got[t], kernels.mla(q[t : t + 1], cache, before + t + 1, 32, 0.2)[0])


@pytest.mark.parametrize("context", [1025, 2500])
@pytest.mark.parametrize("course", ["level", "rising", "falling", "one peak"])
def test_mla_over_a_long_context(kernels, context, course):
    """Several chunks in a span, whose scores go their own ways: each chunk beyond what float32
    holds of the one before."""
    rng = np.random.default_rng(19)
    rows, q = rng.standard_normal((context, 40)), np.zeros((3, 40))
    q[:, 32] = (1.0, 1.5, 2.0)  # the heads' scores are the 33rd column, up to a factor
    chunk = np.arange(context) // 64
    rows[:, 32:] = 0
    rows[:, 32] = {
        "level": 0 * chunk,
        "rising": 100 * chunk,
        "falling": -100 * chunk,
        "one peak": 200 * (chunk == 9),
    }[course]
    rows[:, 32] += rng.standard_normal(context) if course == "level" else 0
    cache = latent_cache(kernels, rows, 32)
    got = kernels.mla(torch_of(q)[None], cache, context, 32, 1.0)[0]
    assert relative(got, attention(q, rows, 32, 1.0)) < 0.03
    rows[-1, 0] = np.nan
    assert (
        kernels.mla(torch_of(q)[None], latent_cache(kernels, rows, 32), context, 32, 1.0)
        .isnan()
        .all()
    )


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
            assert torch.equal(
                cache[count - 1 : count], latent_cache(kernels, rows[count - 1 : count].numpy(), 8)
            )


def test_latents_of_nothing(kernels):
    """Rows of zeros, and of numbers so small that their inverse is no float, are rows of zeros."""
    rows = np.zeros((70, 72))
    rows[::2] = 1e-40
    rows[3, 64:], rows[5, :64] = 1.0, 1.0
    got = kernels.mla(torch.ones(1, 3, 72), latent_cache(kernels, rows, 64), 70, 64, 0.1)[0]
    rows[::2] = 0
    assert relative(got, attention(np.ones((3, 72)), rows, 64, 0.1)) < 0.01
    assert not kernels.mla(
        torch.ones(1, 3, 72), latent_cache(kernels, 0 * rows, 64), 70, 64, 0.1
    ).any()


HEAVY = ["columns", "student", "student queries"]


def distribution(rng, kind, context):
    """-> rows [S, 576] and queries [16, 576]."""
    rows, q = rng.standard_normal((context, 576)), rng.standard_normal((16, 576))
    if kind == "large":
        rows *= 1e5
    if kind == "zeros":
        rows[::2] = 0
        rows[::3, :512] = 0
    if kind == "rope":  # rotary keys far larger than the latent
        rows[:, 512:] *= 1000
    if kind == "columns":
        rows[:, :6] *= 20
        rows[::50] *= 5
    if kind.startswith("student"):
        rows = rng.standard_t(3, rows.shape)
    if kind == "student queries":
        q = rng.standard_t(3, q.shape)
    if kind == "mean":  # what rows have in common adds up where their own parts cancel
        rows += rng.standard_normal(576)
    return rows, q


@pytest.mark.parametrize("kind", ["gaussian", "large", "zeros", "rope", "mean", *HEAVY])
def test_mla_error_at_a_real_size(kernels, kind):
    """Within 1.5% on Gaussian rows.  Beside queries and rows of 8 bits in blocks of 32, exactly
    computed: no worse where tails are heavy, and where they aren't, at most half more, which is
    what one scale for a whole part costs."""
    rng = np.random.default_rng(11)
    errors = []
    for _ in range(3):
        rows, q = distribution(rng, kind, 700)
        cache = latent_cache(kernels, rows, 512)
        for spread in (1.0, 2.0):
            scale = sharpness(q, rows, spread)
            want = attention(q, rows, 512, scale)
            plain = relative(attention(q8(q), q8(rows), 512, scale), want)
            errors.append(
                (
                    spread,
                    relative(kernels.mla(torch_of(q)[None], cache, 700, 512, scale)[0], want),
                    plain,
                )
            )
    for spread in (1.0, 2.0):
        ours, plain = (
            math.sqrt(np.mean([error[i] ** 2 for error in errors if error[0] == spread]))
            for i in (1, 2)
        )
        assert ours < plain * (1.0 if kind in HEAVY else 1.5)
        if kind in ("gaussian", "large"):
            assert ours < (0.015 if spread == 1.0 else 0.02)


def test_many_small_weights_beside_a_large_one(kernels):
    """63 rows that share a tenth of the weight: each by itself is less than half a 255th of the
    largest."""
    rng = np.random.default_rng(18)
    rows, q = np.zeros((64, 576)), np.zeros((16, 576))
    rows[:, :512] = rng.standard_normal(512) + 0.1 * rng.standard_normal((64, 512))
    rows[20, :512], rows[20, 512], q[:, 512] = 0.1 * rng.standard_normal(512), math.log(9 * 63), 1.0
    got = kernels.mla(torch_of(q)[None], latent_cache(kernels, rows, 512), 64, 512, 1.0)[0]
    assert relative(got, attention(q, rows, 512, 1.0)) < 0.02


# --- making weights


def numpy_nf4(x):
    """bitsandbytes' arithmetic, value by value. x float32 [N, K] -> codes [N, Kp], absmax float32
    [N, Kp/64]."""
    n, k = x.shape
    x = np.pad(x, ((0, 0), (0, -k % 64)))
    middle = ((LEVELS[:-1] + LEVELS[1:]) / np.float32(2)).astype(np.float32)
    blocks = x.reshape(n, -1, 64)
    absmax = np.abs(blocks).max(-1)
    inverse = np.float32(1) / np.maximum(absmax, np.float32(1e-38))
    scaled = np.clip(blocks * inverse[..., None], np.float32(-1), np.float32(1))
    return (scaled[..., None] > middle).sum(-1).reshape(x.shape).astype(np.uint8), absmax


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    seeds,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1e-41, 1e-7, 1.0, 1000.0]),
)
def test_quantize_nf4(kernels, n, k, seed, dtype, scale):
    rng = np.random.default_rng(seed)
    source = torch_of(rng.standard_normal((n, k)) * scale)
    source[rng.integers(n)] = 0
    source = source.to(dtype)
    codes, absmax = kernels.quantize_nf4(source)
    want_codes, want_absmax = numpy_nf4(source.float().numpy())
    n_pad, k_pad = -(-n // 16) * 16, -(-k // 64) * 64
    full = untile_codes(codes.numpy(), n_pad, k_pad)
    assert (full[:n] == want_codes).all() and (full[n:] == 7).all()
    scales = absmax.numpy().transpose(0, 2, 1).reshape(n_pad, -1)
    with np.errstate(under="ignore"):
        assert (scales[:n] == want_absmax.astype(np.float16)).all() and (scales[n:] == 0).all()
    assert (codes.numpy() == tile_codes(full)).all()


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, at import
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantize_nf4_equals_bitsandbytes(kernels, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    torch.manual_seed(0)
    w = (torch.randn(64, 256) * 0.02).to(dtype)
    w[3, :64] = 0
    w[5] *= 1e-3
    packed, state = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")
    flat = packed.flatten().numpy()
    theirs = np.stack([flat >> 4, flat & 15], -1).reshape(64, 256)
    codes, absmax = kernels.quantize_nf4(w)
    assert (untile_codes(codes.numpy(), 64, 256) == theirs).all()
    ours = absmax.numpy().transpose(0, 2, 1).reshape(64, 4)
    assert (ours == state.absmax.numpy().reshape(64, 4).astype(np.float16)).all()


@quick
@given(
    st.integers(1, 20),
    st.integers(1, 200),
    seeds,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.sampled_from([1e-44, 1e-30, 1.0, 1e4]),
)
def test_quantize_int8(kernels, n, k, seed, dtype, scale):
    rng = np.random.default_rng(seed)
    source = torch_of(rng.standard_normal((n, k)) * scale)
    source[rng.integers(n)] = 0
    source = source.to(dtype)
    q, got = kernels.quantize_int8(source)
    x = source.float()
    want = x.abs().amax(1) / 127
    assert torch.equal(got, want)
    rows = want > 0
    assert torch.equal(q[rows].float(), torch.round(x[rows] / want[rows, None]).clamp(-127, 127))
    assert (q[~rows] == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_quantizers_refuse_what_is_not_finite(kernels, bad, dtype):
    w = torch.ones(33, 70, dtype=dtype)
    w[32, 69] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernels.quantize_nf4(w)
    with pytest.raises(ValueError, match="NaN or infinity"):
        kernels.quantize_int8(w)


def test_quantize_nf4_refuses_a_scale_beyond_fp16(kernels):
    kernels.quantize_nf4(torch.full((1, 64), 65519.0))
    with pytest.raises(ValueError, match="float16"):
        kernels.quantize_nf4(torch.full((1, 64), 65520.0))


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 200),
    seeds,
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_errors_of_quantized_weights(kernels, n, k, seed, dtype):
    """In any order of additions but to the last digits of float64, from codes that no quantizer
    made."""
    rng = np.random.default_rng(seed)
    w, codes, absmax = random_nf4(rng, n, k, 0.3, LEVELS, True)
    q, scale = rng.integers(-127, 128, (n, k)), rng.uniform(0, 0.1, n).astype(np.float32)
    source = torch_of(rng.standard_normal((n, k))).to(dtype)
    x = source.double().numpy()
    for found, made in (
        (kernels.nf4_error(source, codes, absmax, levels_tensor), w.astype(np.float32)),
        (
            kernels.int8_error(
                source, torch.from_numpy(q.astype(np.int8)), torch.from_numpy(scale)
            ),
            q.astype(np.float32) * scale[:, None],
        ),
    ):
        assert found == pytest.approx((((x - made) ** 2).sum(), (x**2).sum()), rel=1e-12)


def test_errors_are_the_same_bits_for_every_instruction_set_and_number_of_threads():
    torch.manual_seed(0)
    source = torch.randn(150, 333)
    codes, absmax = native.quantize_nf4(source)
    q, scale = native.quantize_int8(source)
    before, found = (native.isa, native.threads), set()
    try:
        for isa in native.isas:
            for threads in (1, 2, 5):
                native.set_isa(isa)
                native.set_threads(threads)
                found.add(
                    (
                        native.nf4_error(source, codes, absmax, levels_tensor),
                        native.int8_error(source, q, scale),
                    )
                )
    finally:
        native.set_isa(before[0])
        native.set_threads(before[1])
    assert len(found) == 1


# --- the binding


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(12)
    _, codes, absmax = random_nf4(rng, 32, 128)
    x = torch.randn(2, 128)
    _, record = random_expert(rng, 64, 32)
    size = record_bytes(64, 32)
    packed = native.pack_int8(torch.ones(32, 128, dtype=torch.int8))
    x64, slots = torch.randn(2, 64), torch.zeros(2, 1, dtype=torch.int32)
    cache, rows = torch.zeros(10, 88, dtype=torch.uint8), torch.ones(10, 72)
    cases = [
        lambda: native.linear_nf4(x.double(), codes, absmax, levels_tensor, 32),
        lambda: native.linear_nf4(x[:, :64], codes, absmax, levels_tensor, 32),
        lambda: native.linear_nf4(x.t(), codes, absmax, levels_tensor, 32),
        lambda: native.linear_nf4(x, codes, absmax, levels_tensor, 33),
        lambda: native.linear_nf4(x, codes, absmax, levels_tensor, 0),
        lambda: native.linear_nf4(x, codes[:1], absmax, levels_tensor, 32),
        lambda: native.linear_nf4(x, codes, absmax.float(), levels_tensor, 32),
        lambda: native.linear_nf4(x, codes, absmax, levels_tensor[:15], 32),
        lambda: native.linear_nf4(x, codes, absmax, levels_tensor * float("inf"), 32),
        lambda: native.linear_nf4(x.to("meta"), codes, absmax, levels_tensor, 32),
        lambda: native.linear_int8(x[:, :100].contiguous(), packed, torch.ones(32)),
        lambda: native.linear_int8(x, packed, torch.ones(31)),
        lambda: native.linear_int8(x, PackedInt8(packed.data, 48, 128), torch.ones(48)),
        lambda: native.experts_each(torch.ones(64), [record[: size - 1]], 32, levels_tensor),
        lambda: native.experts_each(torch.ones(64), [record[1:]], 32, levels_tensor),
        lambda: native.experts_each(torch.ones(64), [record], 33, levels_tensor),
        lambda: native.experts_each(torch.ones(0), [record], 32, levels_tensor),
        lambda: native.weighted_sum(torch.ones(1, 1, 64), torch.ones(1, 2)),
        lambda: native.experts_by_slot(
            torch.ones(64), record[None], slots, 32, levels_tensor, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, record[None], slots, 32, levels_tensor, torch.empty(2, 2, 64)
        ),
        lambda: native.experts_by_slot(
            x64, record[None], slots + 1, 32, levels_tensor, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, record[None, :-64], slots, 32, levels_tensor, torch.empty(2, 1, 64)
        ),
        lambda: native.experts_by_slot(
            x64, record[None], slots.long(), 32, levels_tensor, torch.empty(2, 1, 64)
        ),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 11, 64, 1.0),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 0, 64, 1.0),
        lambda: native.mla(torch.ones(2, 72)[None], cache, 5, 73, 1.0),
        lambda: native.mla(torch.ones(2, 68)[None], cache, 5, 64, 1.0),
        lambda: native.mla(
            torch.ones(2, 72)[None], torch.zeros(88, 10, dtype=torch.uint8).t(), 5, 64, 1.0
        ),
        lambda: native.mla(torch.ones(2, 72)[None], cache.half(), 5, 64, 1.0),
        lambda: native.store_latents(rows, 64, cache[1:]),
        lambda: native.store_latents(rows, 64, cache[:, 1:]),
        lambda: native.store_latents(rows, 64, cache.half()),
        lambda: native.store_latents(rows, 73, cache),
        lambda: native.store_latents(rows, 0, cache),
        lambda: native.store_latents(rows.double(), 64, cache),
        lambda: native.quantize_nf4(torch.ones(4, 64, dtype=torch.int32)),
        lambda: native.quantize_nf4(torch.ones(64)),
        lambda: native.quantize_nf4(torch.ones(4, 64), levels_tensor.flip(0)),
        lambda: native.quantize_int8(torch.ones(0, 64)),
        lambda: native.nf4_error(torch.ones(33, 128), codes, absmax, levels_tensor),
        lambda: native.nf4_error(torch.ones(32, 128), codes, absmax, levels_tensor[:15]),
        lambda: native.int8_error(
            torch.ones(4, 64), torch.ones(4, 65, dtype=torch.int8), torch.ones(4)
        ),
        lambda: native.int8_error(
            torch.ones(4, 64), torch.ones(4, 64, dtype=torch.int8), torch.ones(3)
        ),
        lambda: native.set_isa("quantum"),
        lambda: native.set_threads(0),
    ]
    for case in cases:
        with pytest.raises(
            ValueError, match=r"expected|must|rows|columns|record|refused|instruction"
        ):
            case()


def test_unaligned_activations(kernels):
    rng = np.random.default_rng(13)
    _, codes, absmax = random_nf4(rng, 32, 130)
    raw = torch.zeros(2 * 130 * 4 + 3, dtype=torch.uint8)
    x = torch.randn(2, 130)
    raw[: 2 * 130 * 4] = x.view(torch.uint8).flatten()
    shifted = (
        torch.randn(2 * 130 + 1)[1:].view(2, 130).copy_(x)
    )  # off by one float from its allocation
    assert torch.equal(
        kernels.linear_nf4(shifted, codes, absmax, levels_tensor, 32),
        kernels.linear_nf4(x, codes, absmax, levels_tensor, 32),
    )


def test_a_missing_or_broken_binary_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(qk, "__file__", str(tmp_path / "__init__.py"))
    assert qk.load.__wrapped__() is None
    suffix = qk.importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    assert qk.load.__wrapped__() is None


def test_read_bandwidth_and_settings():
    assert NativeOps(native).read_bandwidth(torch.ones(1 << 22, dtype=torch.uint8)) > 1e8
    assert native.isa in native.isas and native.isas[-1] == "portable"
    assert native.threads >= 1


# --- absorbed kv_b_proj


@quick
@given(
    st.integers(1, 4),
    st.integers(1, 5),
    st.integers(0, 19),
    st.integers(1, 19),
    st.integers(1, 300),
    seeds,
)
def test_absorbed_products_are_exact_to_float32(kernels, t, heads, n, v, r, seed):
    rng = np.random.default_rng(seed)
    w = rng.integers(-127, 128, (heads * (n + v), r)).astype(np.int8)
    scale = np.exp(rng.normal(0, 2, heads * (n + v))).astype(np.float32)
    exact = (w * scale[:, None].astype(np.float64)).reshape(heads, n + v, r)
    q, latent = (
        rng.normal(size=(t, heads, n)).astype(np.float32),
        rng.normal(size=(t, heads, r)).astype(np.float32),
    )
    tensors = torch.from_numpy(w), torch.from_numpy(scale)
    absorbed = kernels.absorb_query(torch.from_numpy(q), *tensors)
    limit = np.einsum("thn,hnr->thr", np.abs(q), np.abs(exact[:, :n])) + 1e-30
    assert np.all(
        np.abs(absorbed.numpy() - np.einsum("thn,hnr->thr", q, exact[:, :n])) <= 1e-5 * limit
    )
    values = kernels.absorb_value(torch.from_numpy(latent), *tensors, n)
    limit = np.einsum("thr,hvr->thv", np.abs(latent), np.abs(exact[:, n:])) + 1e-30
    assert np.all(
        np.abs(values.numpy() - np.einsum("thr,hvr->thv", latent, exact[:, n:])) <= 1e-5 * limit
    )
    assert torch.equal(kernels.absorb_query(torch.from_numpy(q[-1:]), *tensors), absorbed[-1:])
    assert torch.equal(
        kernels.absorb_value(torch.from_numpy(latent[-1:]), *tensors, n), values[-1:]
    )


@quick
@given(
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 200),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seeds,
)
def test_dense_products_are_exact_to_float32(kernels, t, n, k, dtype, seed):
    rng = np.random.default_rng(seed)
    x, w = torch_of(rng.standard_normal((t, k))), torch_of(rng.standard_normal((n, k))).to(dtype)
    got = kernels.linear_dense(x, w)
    limit = x.abs().double() @ w.abs().double().T
    assert bool(((got.double() - x.double() @ w.double().T).abs() <= 1e-6 * limit).all())
    assert torch.equal(kernels.linear_dense(x[-1:], w), got[-1:])


@quick
@given(st.integers(1, 4), st.integers(1, 300), seeds)
def test_rms_norm(kernels, t, n, seed):
    rng = np.random.default_rng(seed)
    x, weight = torch_of(rng.standard_normal((t, n))), torch_of(rng.standard_normal(n))
    want = torch.nn.functional.rms_norm(x.double(), (n,), weight.double(), 1e-6)
    torch.testing.assert_close(
        kernels.rms_norm(x, weight, 1e-6).double(), want, rtol=1e-5, atol=1e-6
    )


@quick
@given(st.integers(1, 6), st.integers(1, 100), st.integers(1, 100), seeds)
def test_mlp_is_its_three_products(kernels, t, h, i, seed):
    """Within the rounding of SiLU and of the requantized activations, and bitwise the same for a
    row alone."""
    rng = np.random.default_rng(seed)
    x, shapes = torch_of(rng.standard_normal((t, h))), ((i, h), (i, h), (h, i))
    packed = [
        kernels.pack_int8(torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8)))
        for shape in shapes
    ]
    scales = [torch.full((shape[0],), 0.01) for shape in shapes]
    coded = [random_nf4(rng, *shape) for shape in shapes]
    codes, absmax = [one[1] for one in coded], [one[2] for one in coded]
    for linear, matrices in (
        (
            lambda x, m: kernels.linear_int8(x, packed[m], scales[m]),
            [Matrix.int8(packed[m], scales[m]) for m in range(3)],
        ),
        (
            lambda x, m: kernels.linear_nf4(x, codes[m], absmax[m], levels_tensor, shapes[m][0]),
            [Matrix.nf4(codes[m], absmax[m], levels_tensor, *shapes[m]) for m in range(3)],
        ),
    ):
        mlp = Mlp(*matrices)
        got, gate, up = kernels.mlp(x, mlp), linear(x, 0), linear(x, 1)
        want = linear(torch.nn.functional.silu(gate) * up, 2)
        assert (got - want).norm() <= 0.02 * want.norm() + 1e-6
        assert torch.equal(kernels.mlp(x[-1:], mlp), got[-1:])
        residual, others = (
            torch_of(rng.standard_normal((t, h))),
            torch_of(rng.standard_normal((t, h)) * 1e-3),
        )
        assert torch.equal(kernels.mlp(x, mlp, residual), residual + got)
        assert torch.equal(kernels.mlp(x, mlp, residual, others), residual + (others + got))


# --- a layer's attention in one call


@quick
@given(st.integers(0, 4), st.integers(1, 5), st.integers(0, 20), seeds)
def test_rotate(kernels, t, heads, pairs, seed):
    rng = np.random.default_rng(seed)
    x = torch_of(rng.standard_normal((t, heads, 2 * pairs)))
    table = torch.polar(torch.full((t, pairs), 0.8), torch_of(rng.uniform(-9, 9, (t, pairs))))
    got = kernels.rotate(x, table)
    want = torch.view_as_complex(x.double().view(t, heads, pairs, 2)) * table[:, None].to(
        torch.complex128
    )
    torch.testing.assert_close(
        got.double(), torch.view_as_real(want).flatten(-2), rtol=0, atol=1e-6
    )
    if t:
        assert torch.equal(kernels.rotate(x[-1:], table[-1:]), got[-1:])


class AnyMatrix:
    """A random matrix of one kind, for the single call and as the fused calls take it."""

    def __init__(self, kernels, rng, kind, n, k):
        if kind == "int8":
            packed = kernels.pack_int8(
                torch.from_numpy(rng.integers(-127, 128, (n, k), dtype=np.int8))
            )
            scale = torch_of(rng.uniform(0.5, 2, n) / 80 / math.sqrt(k))
            self.fused, self.times = (
                Matrix.int8(packed, scale),
                lambda x: kernels.linear_int8(x, packed, scale),
            )
        elif kind == "nf4":
            _, codes, absmax = random_nf4(rng, n, k, 1 / math.sqrt(k), negative=True)
            self.fused = Matrix.nf4(codes, absmax, levels_tensor, n, k)
            self.times = lambda x: kernels.linear_nf4(x, codes, absmax, levels_tensor, n)
        else:
            w = torch_of(rng.standard_normal((n, k)) / math.sqrt(k)).to(getattr(torch, kind))
            self.fused, self.times = Matrix.dense(w), lambda x: kernels.linear_dense(x, w)


class RandomLayer:
    """A layer of random weights whose attention is computed by one call, or by the single calls."""

    def __init__(self, kernels, rng, kinds, hidden, heads, n, p, r, v, q_rank, experts):
        self.kernels, self.sizes, self.q_rank = kernels, (heads, n, p, r, v), q_rank
        make = lambda rows, columns: AnyMatrix(
            kernels, rng, kinds[int(rng.integers(len(kinds)))], rows, columns
        )
        norm = lambda size: torch_of(1 + 0.1 * rng.standard_normal(size))
        self.query = make(q_rank or heads * (n + p), hidden)
        self.query_b = make(heads * (n + p), q_rank) if q_rank else None
        self.latent, self.out = make(r + p, hidden), make(hidden, heads * v)
        self.gate = AnyMatrix(kernels, rng, "float32", experts, hidden) if experts else None
        self.input_norm, self.next_norm, self.latent_norm = norm(hidden), norm(hidden), norm(r)
        self.query_norm = norm(q_rank) if q_rank else None
        self.kv_b = torch.from_numpy(rng.integers(-127, 128, (heads * (n + v), r), dtype=np.int8))
        self.kv_b_scale = torch_of(rng.uniform(0.5, 2, heads * (n + v)) / 80 / math.sqrt(r))
        self.scale = 1.5 / math.sqrt(n + p)

    def arguments(self):
        optional = (
            self.query_b.fused if self.query_b else None,
            self.gate.fused if self.gate else None,
        )
        first = (
            self.sizes,
            self.input_norm,
            self.query.fused,
            self.query_norm,
            optional[0],
            self.latent.fused,
            self.latent_norm,
        )
        return [*first, self.kv_b, self.kv_b_scale, self.out.fused, self.next_norm, optional[1]]

    def prepared(self):
        return AttentionLayer(*self.arguments(), eps=1e-5, latent_eps=1e-6, scale=self.scale)

    def one_by_one(self, h, table, cache, position):
        heads, n, p, r, v = self.sizes
        k = self.kernels
        x = k.rms_norm(h, self.input_norm, 1e-5)
        q = self.query.times(x)
        if self.q_rank:
            q = self.query_b.times(k.rms_norm(q, self.query_norm, 1e-6))
        q = q.view(1, heads, n + p)
        latent = self.latent.times(x)
        row = torch.cat(
            [
                k.rms_norm(latent[:, :r].contiguous(), self.latent_norm, 1e-6),
                k.rotate(latent[:, None, r:].contiguous(), table)[0],
            ],
            -1,
        )
        k.store_latents(row, r, cache[position : position + 1])
        absorbed = k.absorb_query(q[..., :n].contiguous(), self.kv_b, self.kv_b_scale)
        full = torch.cat([absorbed, k.rotate(q[..., n:].contiguous(), table)], -1)
        out = k.mla(full, cache, position + 1, r, self.scale)
        h = h + self.out.times(
            k.absorb_value(out, self.kv_b, self.kv_b_scale, n).reshape(1, heads * v)
        )
        x = k.rms_norm(h, self.next_norm, 1e-5)
        return h, x, self.gate.times(x) if self.gate else None


def same(got, want):
    return all(
        a is None if b is None else torch.equal(a, b) for a, b in zip(got, want, strict=True)
    )


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from([["int8"], ["nf4"], ["bfloat16"], ["int8", "nf4", "float16", "float32"]]),
    st.tuples(
        *(st.integers(1, top) for top in (140, 5)),
        st.integers(0, 20),
        st.integers(0, 8),
        st.integers(1, 80),
        st.integers(1, 20),
    ),
    st.sampled_from([0, 1, 30]),
    st.sampled_from([0, 7]),
    st.lists(st.sampled_from(["first", "middle", "last"]), min_size=1, max_size=7),
    st.sampled_from([1.0, 1e4]),
    st.integers(1, 3),
    seeds,
)
def test_attention_is_bitwise_its_parts(
    kernels, kinds, shape, q_rank, experts, where, size, threads, seed
):
    """One token of each of a few sequences, in one call, is what the single ops give each of them
    alone."""
    rng = np.random.default_rng(seed)
    hidden, heads, n, pairs, r, v = shape
    if n + pairs == 0:
        n = 1
    p = 2 * pairs
    kernels.set_threads(threads)
    layer = RandomLayer(kernels, rng, kinds, hidden, heads, n, p, r, v, q_rank, experts)
    layer.latent_norm *= size  # 1e4: past what fp16 holds
    capacities = [int(rng.integers(1, 200)) for _ in where]
    positions = [
        {"first": 0, "middle": c // 2, "last": c - 1}[one]
        for one, c in zip(where, capacities, strict=True)
    ]
    size, caches, others = latent_bytes(r, p), [], []
    for capacity, position in zip(capacities, positions, strict=True):
        buffer = torch.full((max(capacity, 2), size + 3), 0xFF, dtype=torch.uint8)
        kernels.store_latents(
            torch_of(rng.standard_normal((position, r + p))), r, buffer[:position, :size]
        )
        caches.append(buffer.clone()[:, :size])
        others.append(buffer.clone()[:, :size])
    t = len(where)
    h = torch_of(rng.standard_normal((t, hidden)))
    table = torch.polar(torch.full((t, pairs), 0.9), torch_of(rng.uniform(-9, 9, (t, pairs))))
    got = kernels.attention(layer.prepared(), h, table, caches, positions)
    for i, position in enumerate(positions):
        want = layer.one_by_one(h[i : i + 1], table[i : i + 1], others[i], position)
        assert same([None if one is None else one[i : i + 1] for one in got], want)
        assert torch.equal(caches[i][: position + 1], others[i][: position + 1])
        assert (caches[i][position + 1 :] == 0xFF).all()
        assert (caches[i]._base[:, size:] == 0xFF).all()
    assert got[0].isfinite().all()


def test_threads_change_nothing_in_a_fused_layer(kernels):
    rng = np.random.default_rng(14)
    layer = RandomLayer(kernels, rng, ["int8", "nf4"], 320, 6, 20, 12, 130, 24, 70, 50)
    rows, h = (
        latent_cache(kernels, rng.standard_normal((900, 142)), 130),
        torch_of(rng.standard_normal((1, 320))),
    )
    table, results = torch.polar(torch.ones(1, 6), torch.rand(1, 6)), []
    for threads in (1, 2, 3, 7):
        kernels.set_threads(threads)
        cache = rows.clone()
        results.append([*kernels.attention(layer.prepared(), h, table, [cache], [850]), cache])
    assert all(same(other, results[0]) for other in results[1:])


def test_a_layer_holds_its_memory(kernels):
    """Nothing but the prepared layer refers to the weights."""
    rng = np.random.default_rng(15)
    layer = RandomLayer(kernels, rng, ["int8", "nf4", "bfloat16"], 64, 2, 8, 4, 32, 8, 24, 9)
    prepared = layer.prepared()
    h, table = torch.randn(1, 64), torch.polar(torch.ones(1, 2), torch.rand(1, 2))
    want = kernels.attention(prepared, h, table, [torch.zeros(3, 52, dtype=torch.uint8)], [0])
    del layer
    for size in (8, 64, 2048, 16384):  # would be given the freed memory
        torch.full((size,), float("nan"))
    assert same(
        kernels.attention(prepared, h, table, [torch.zeros(3, 52, dtype=torch.uint8)], [0]), want
    )


def test_bad_layers_are_refused(kernels):
    rng = np.random.default_rng(16)
    layer = RandomLayer(kernels, rng, ["int8"], 64, 2, 8, 4, 32, 10, 24, 9)
    good = layer.arguments()
    scales = {"eps": 1e-5, "latent_eps": 1e-6, "scale": 0.1}
    other = AnyMatrix(kernels, rng, "nf4", 63, 65).fused
    changes = [
        {0: (3, 8, 4, 32, 10)},
        {0: (2, 8, 3, 32, 10)},
        {0: (2, 8, 4, 32, 0)},
        {1: torch.ones(63)},
        {1: torch.ones(64).double()},
        {1: torch.ones(64, device="meta")},
        {3: None},
        {3: torch.ones(23)},
        {4: None},
        {6: torch.ones(31)},
        {7: layer.kv_b.float()},
        {7: layer.kv_b[:-1]},
        {7: layer.kv_b.t().contiguous().t()},
        {8: layer.kv_b_scale[:-1]},
        {10: torch.ones(65)},
        *({place: other} for place in (2, 4, 5, 9, 11)),
    ]
    for change in changes:
        with pytest.raises(ValueError, match=r"expected|must"):
            AttentionLayer(*[change.get(i, one) for i, one in enumerate(good)], **scales)
    prepared, h, table = (
        layer.prepared(),
        torch.randn(1, 64),
        torch.ones(1, 2, dtype=torch.complex64),
    )
    cache, wider = (torch.zeros(5, width, dtype=torch.uint8) for width in (52, 58))
    kernels.attention(prepared, h, table, [cache], [4])
    pack = kernels.pack_int8(torch.ones(16, 16, dtype=torch.int8))
    int8, codes = (
        Matrix.int8(pack, torch.ones(16)),
        (torch.zeros(1, 1, 512, dtype=torch.uint8), torch.zeros(1, 1, 16).half()),
    )
    nf4s = [
        Matrix.nf4(*codes, levels, 16, 16)
        for levels in (levels_tensor, levels_tensor * 2, levels_tensor * float("inf"))
    ]
    mlp = Mlp(int8, int8, int8)
    cases = [
        lambda: kernels.attention(prepared, h[0], table, [cache], [0]),
        lambda: kernels.attention(prepared, h.repeat(2, 1), table, [cache], [0]),
        lambda: kernels.attention(prepared, h.double(), table, [cache], [0]),
        lambda: kernels.attention(prepared, h.to("meta"), table, [cache], [0]),
        lambda: kernels.attention(prepared, h, table[:, :1], [cache], [0]),
        lambda: kernels.attention(prepared, h, table.real, [cache], [0]),
        lambda: kernels.attention(prepared, h, table.conj(), [cache], [0]),
        lambda: kernels.attention(prepared, h, table, [cache], [5]),
        lambda: kernels.attention(prepared, h, table, [cache], [-1]),
        lambda: kernels.attention(prepared, h, table, [cache], [0, 1]),
        lambda: kernels.attention(prepared, h, table, [], []),
        lambda: kernels.attention(
            prepared, h.repeat(2, 1), table.repeat(2, 1), [cache, wider[:, :52]], [0, 0]
        ),
        lambda: kernels.attention(prepared, h, table, [cache.float()], [0]),
        lambda: kernels.attention(prepared, h, table, [cache[:, :51]], [0]),
        lambda: kernels.attention(
            prepared, h, table, [torch.zeros(52, 5, dtype=torch.uint8).t()], [0]
        ),
        lambda: kernels.attention(prepared, h, table, [cache[:1].expand(5, 52)], [0]),
        lambda: kernels.rotate(torch.ones(2, 3, 5), torch.ones(2, 2, dtype=torch.complex64)),
        lambda: kernels.rotate(torch.ones(2, 3, 4), torch.ones(1, 2, dtype=torch.complex64)),
        lambda: kernels.rotate(torch.ones(2, 3, 4), torch.ones(2, 2, dtype=torch.complex64).conj()),
        lambda: kernels.mlp(torch.ones(2, 15), mlp),
        lambda: kernels.mlp(torch.ones(2, 16), mlp, torch.ones(1, 16)),
        lambda: kernels.mlp(torch.ones(2, 16), mlp, None, torch.ones(2, 16)),
        lambda: kernels.mlp(torch.ones(2, 16), Mlp(*[nf4s[2]] * 3)),
        lambda: Mlp(int8, int8, nf4s[0]),
        lambda: Mlp(nf4s[0], nf4s[0], nf4s[1]),
        lambda: Mlp(
            int8,
            int8,
            Matrix.int8(kernels.pack_int8(torch.ones(16, 15, dtype=torch.int8)), torch.ones(16)),
        ),
        lambda: Mlp(*[Matrix.dense(torch.ones(16, 16))] * 3),
        lambda: Matrix.int8(PackedInt8(pack.data, 17, 16), torch.ones(17)),
        lambda: Matrix.int8(pack, torch.ones(15)),
        lambda: Matrix.nf4(*codes, levels_tensor, 17, 16),
        lambda: Matrix.nf4(*codes, levels_tensor[:15], 16, 16),
        lambda: Matrix.dense(torch.ones(16, 16).double()),
        lambda: Matrix.dense(torch.ones(16, 16)[:, :8]),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"expected|must|rows|columns|refused"):
            case()


# --- a router, and all layers in one call


@quick
@given(
    st.integers(0, 5),
    st.sampled_from([(1, 1), (3, 1), (4, 2), (8, 3), (8, 8)]),
    st.integers(1, 20),
    st.booleans(),
    st.data(),
)
def test_route(kernels, t, groups, each, renormalize, data):
    """The network's own gate is the oracle where no scores are equal; among equals the lower index
    comes first."""
    (count, kept), rng = groups, np.random.default_rng(data.draw(seeds))
    experts, top_k = count * each, data.draw(st.integers(1, kept * each))
    logits = torch_of(
        np.round(rng.standard_normal((t, experts)) * data.draw(st.sampled_from([1, 4, 4000])))
    )
    logits *= data.draw(st.sampled_from([1, 1e-3]))
    weights, indices = kernels.route(
        logits, Router(count, kept, top_k, None if renormalize else 1.5)
    )
    scores = logits.double().softmax(-1).float()
    best = scores.view(t, count, each).amax(-1).sort(descending=True, stable=True).indices[:, :kept]
    mask = (
        torch.zeros(t, count, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(each, 1)
    )
    want, order = scores.masked_fill(~mask, 0).sort(descending=True, stable=True)
    want, order = want[:, :top_k], order[:, :top_k]
    torch.testing.assert_close(
        weights,
        (want / want.double().sum(-1, keepdim=True) if renormalize else want * 1.5).float(),
        rtol=1e-6,
        atol=1e-30,
    )
    assert torch.equal(indices, order)


def test_route_of_what_is_not_finite(kernels):
    logits = torch.randn(3, 12)
    logits[0, 7], logits[1, 0] = float("nan"), float("inf")
    for router in (Router(1, 1, 5, 1.0), Router(4, 2, 5, None)):
        weights, indices = kernels.route(logits, router)
        assert weights[:2].isnan().all() and weights[2].isfinite().all()
        assert all(
            len(set(row)) == 5 and min(row) >= 0 and max(row) < 12 for row in indices.tolist()
        )
    for bad in (
        Router(5, 1, 2, 1.0),
        Router(4, 5, 2, 1.0),
        Router(4, 0, 2, 1.0),
        Router(1, 1, 13, 1.0),
        Router(1, 1, 0, 1.0),
    ):
        with pytest.raises(ValueError, match="don't fit"):
            kernels.route(logits, bad)


class RandomModel:
    """A few layers, dense, with experts, with shared ones or without, to go through in one call or
    in several."""

    def __init__(self, kernels, rng, hidden, width, experts, top_k):
        self.kernels, self.width = kernels, width
        self.router, self.layers = Router(2, 1, top_k, 1.3), []
        kinds = [(0, True), (experts, True), (experts, False), (0, False), (experts, True)]
        for count, has_mlp in (kinds[index] for index in rng.permutation(5)):
            layer = RandomLayer(kernels, rng, ["int8", "nf4"], hidden, 3, 8, 4, 20, 6, 0, count)
            kind = ["int8", "nf4"][int(rng.integers(2))]
            parts = [
                AnyMatrix(kernels, rng, kind, *shape).fused
                for shape in [(width, hidden), (width, hidden), (hidden, width)]
            ]
            self.layers.append((layer.prepared(), Mlp(*parts) if has_mlp else None))
        self.slab = slab_of([random_expert(rng, hidden, width)[1] for _ in range(3 * experts)])
        self.slots = torch.from_numpy(rng.permutation(3 * experts).astype(np.int32)).view(
            3, experts
        )
        self.decoder = Decoder(self.layers, self.router, width)

    def start(self, rng, positions):
        """The tokens' residual streams and rotations, and caches with `positions` rows, each in a
        larger buffer."""
        size, t = latent_bytes(20, 4), len(positions)
        buffer = torch.full((t, 5, 90, size + 5), 0xFF, dtype=torch.uint8)
        caches = list(buffer[..., :size])
        for cache, position in zip(caches, positions, strict=True):
            for rows in cache:
                latents = torch_of(rng.standard_normal((position, 24)))
                self.kernels.store_latents(latents, 20, rows[:position])
        table = torch.polar(torch.ones(t, 2), torch_of(rng.uniform(-9, 9, (t, 2))))
        return torch_of(rng.standard_normal((t, self.decoder.hidden))), table, caches

    def before_experts(self, index, h, table, caches, positions):
        rows = [cache[index] for cache in caches]
        h, x, logits = self.kernels.attention(self.layers[index][0], h, table, rows, positions)
        return h, x, *((None, None) if logits is None else self.kernels.route(logits, self.router))

    def experts(self, moe_layer, x, weights, indices):
        slots = self.slots[moe_layer][indices]
        outputs = torch.empty(*slots.shape, x.shape[1])
        self.kernels.experts_by_slot(x, self.slab, slots, self.width, levels_tensor, outputs)
        y = self.kernels.weighted_sum(outputs, weights)
        for token, row in enumerate(slots.tolist()):
            records = [self.slab[slot] for slot in row]
            alone = self.kernels.experts_each(x[token], records, self.width, levels_tensor)
            assert torch.equal(alone, outputs[token])
        return y

    def finish(self, index, h, x, y):
        mlp = self.layers[index][1]
        if mlp is not None:
            return self.kernels.mlp(x, mlp, h, y)
        return h if y is None else h + y


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.integers(1, 100),
    st.integers(1, 60),
    st.integers(1, 3),
    st.one_of(st.just(0.0), st.floats(0, 1), st.just(1.0)),
    st.one_of(st.lists(st.integers(0, 80), min_size=n, max_size=n) for n in (1, 3)),
    st.integers(1, 3),
    st.booleans(),
    seeds,
)
def test_decode_is_bitwise_its_parts(
    kernels, hidden, width, top_k, present, positions, threads, resumes, seed
):
    """Also where it has to stop at experts that have no slot, which is every router's where none
    has one, and goes on from what another computed of them, or behind that layer."""
    rng = np.random.default_rng(seed)
    kernels.set_threads(threads)
    model = RandomModel(kernels, rng, hidden, width, 6, top_k)
    h, table, caches = model.start(rng, positions)
    others = list(caches[0]._base.clone()[..., : caches[0].shape[2]])
    want, routed = h, model.decoder.routed
    moe_layers = [sum(routed[:index]) for index in range(5)]
    slots = model.slots.masked_fill(torch.from_numpy(rng.random((3, 6)) >= present), -1)
    at, resumed, asked, stops = 0, (), 0, 0
    while at < 5:
        got = kernels.decode(
            model.decoder,
            at,
            h,
            table,
            caches,
            positions,
            model.slab,
            slots,
            levels_tensor,
            *resumed,
        )
        asked += len(got.indices)
        choices = []
        for index in range(at + bool(resumed), 5):
            want, x, weights, indices = model.before_experts(index, want, table, others, positions)
            choices += [] if indices is None else [indices.tolist()]
            if index == got.layer:
                break
            assert weights is None or (slots[moe_layers[index]][indices] >= 0).all()
            y = None if weights is None else model.experts(moe_layers[index], x, weights, indices)
            want = model.finish(index, want, x, y)
        assert torch.equal(got.h, want) and got.indices.tolist() == choices
        assert got.indices.shape[1:] == (len(positions), top_k)
        h, at, resumed = got.h, got.layer, ()
        if got.layer < 5:
            stops += 1
            assert (slots[moe_layers[index]][indices] < 0).any()
            assert same([got.x, got.weights], [x, weights])
            y = model.experts(moe_layers[index], x, weights, indices)
            want = model.finish(index, want, x, y)
            if resumes:
                resumed = got.x, y
            else:
                h, at = want, got.layer + 1
    assert asked == 3 and (stops == 3 or present > 0)
    assert torch.equal(h, want)
    assert torch.equal(caches[0]._base, others[0]._base)


def test_decode_refuses(kernels):
    rng = np.random.default_rng(17)
    model = RandomModel(kernels, rng, 64, 32, 6, 2)
    moe, dense = model.decoder.routed.index(True), model.decoder.routed.index(False)
    h, table, caches = model.start(rng, [3, 0])
    names = "decoder first h table caches positions slab slots levels x experts".split()
    good = [model.decoder, moe, h, table, caches, [3, 0], model.slab, model.slots, levels_tensor]
    good = dict(zip(names, [*good, h, h], strict=True))
    kernels.decode(**good)
    kernels.decode(**good | {"x": None, "experts": None})
    odd = torch.zeros(model.slab.numel() + 1, dtype=torch.uint8)[1:].view(model.slab.shape)
    wide = torch.zeros(len(model.slab), model.slab.shape[1] + 8, dtype=torch.uint8)
    bad = {
        "first": [5, -1, dense],
        "h": [h[:, 1:], h[:1], h.double(), h.to("meta"), h.t().contiguous().t()],
        "table": [table[:, 1:], table[:1], table.real, table.conj()],
        "caches": [
            [],
            caches[:1],
            [caches[0], caches[1].float()],
            [caches[0], caches[1][1:]],
            [caches[0], caches[1].contiguous()],
            [caches[0], caches[1][:, :80]],
            [cache[1:] for cache in caches],
            [cache[0] for cache in caches],
            [cache[..., 1:] for cache in caches],
            [cache.to("meta") for cache in caches],
            [torch.zeros(5, cache.shape[2], 90, dtype=torch.uint8).mT for cache in caches],
            [cache[:, :1].expand(5, 90, -1) for cache in caches],
        ],
        "positions": [[3], [3, 0, 0], [3, -1], [90, 0]],
        "slab": [model.slab[:, :64].contiguous(), odd, wide, model.slab.float()],
        "slots": [model.slots[1:], model.slots.long(), model.slots + 18],
        "levels": [levels_tensor[1:], levels_tensor * float("nan")],
        "x": [None, h[:1], h.double()],
        "experts": [None, h[:, 1:].contiguous(), h.to("meta")],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=r"expected|must|apart|at least|refused"):
                kernels.decode(**good | {name: value})
    layer, mlp = next(entry for entry in model.layers if entry[0].experts and entry[1])
    smaller = RandomLayer(kernels, rng, ["int8"], 32, 3, 8, 4, 20, 6, 0, 6).prepared()
    for layers in ([], [(layer, mlp), (smaller, None)], [(smaller, mlp)]):
        with pytest.raises(ValueError, match=r"no layers|different"):
            Decoder(layers, model.router, 32)
    with pytest.raises(ValueError, match="don't fit"):
        Decoder([(layer, mlp)], Router(1, 1, 7, 1.0), 32)

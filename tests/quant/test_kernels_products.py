"""Linear layers, norms and MLPs of the native kernels against plain numpy in float64."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.kernels.cpu.weights import Matrix, Mlp
from tests.support.kernels import (
    LEVELS,
    int8_matrix,
    levels_tensor,
    linear_nf4,
    needs_native,
    nf4_matrix,
    q8,
    quick,
    random_nf4,
    relative,
    seeds,
    torch_of,
    untile_codes,
)

pytestmark = needs_native


dims = st.tuples(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300))  # T, N, K


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
    got = linear_nf4(kernels, x, codes, absmax, levels_tensor, n).numpy().astype(np.float64)
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
        kernels.linear(int8_matrix(kernels, torch.from_numpy(q), torch.from_numpy(s)), x)
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
    got = linear_nf4(kernels, torch_of(x), codes, absmax, torch.from_numpy(levels), 40)
    assert relative(got, x @ w.T) < 1e-6
    q = rng.choice(np.array([-127, 127], dtype=np.int8), (40, 200))
    got = kernels.linear(int8_matrix(kernels, torch.from_numpy(q), torch.ones(40)), torch_of(x))
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
    got = linear_nf4(kernels, x, codes, absmax, torch.from_numpy(table), 48)
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
        (linear_nf4(kernels, x, codes, absmax, levels_tensor, 256), w),
        (kernels.linear(int8_matrix(kernels, q, s), x), w8),
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
    q = torch.from_numpy(rng.integers(-127, 128, (90, 200), dtype=np.int8))
    int8 = int8_matrix(kernels, q, torch.rand(90) + 0.1)
    x = torch_of(rng.standard_normal((600, 200)))  # over the token chunk (128) and the pass (512)
    many = (linear_nf4(kernels, x, codes, absmax, levels_tensor, 90), kernels.linear(int8, x))
    for row in (0, 1, 127, 128, 511, 512, 599):
        alone = x[row : row + 1]
        assert torch.equal(
            linear_nf4(kernels, alone, codes, absmax, levels_tensor, 90)[0], many[0][row]
        )
        assert torch.equal(kernels.linear(int8, alone)[0], many[1][row])


def test_zeros_and_not_finite(kernels):
    rng = np.random.default_rng(5)
    _, codes, absmax = random_nf4(rng, 20, 100)
    x = torch.zeros(4, 100)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), torch.rand(100)
    y = linear_nf4(kernels, x, codes, absmax, levels_tensor, 20)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()
    assert linear_nf4(kernels, torch.empty(0, 100), codes, absmax, levels_tensor, 20).shape == (
        0,
        20,
    )


def test_flushing_denormals_changes_nothing(kernels):
    rng = np.random.default_rng(6)
    _, codes, absmax = random_nf4(rng, 40, 128)
    x = torch_of(rng.standard_normal((1, 128)) * 1e-41)
    want = linear_nf4(kernels, x, codes, absmax, levels_tensor, 40)
    torch.set_flush_denormal(True)
    try:
        got = linear_nf4(kernels, x, codes, absmax, levels_tensor, 40)
        still = torch.full((1,), 1e-41) * 0.5
    finally:
        torch.set_flush_denormal(False)
    assert want.count_nonzero() > 0 and torch.equal(got, want)
    assert still.item() == 0  # the caller's mode is as it was


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
        linear_nf4(kernels, shifted, codes, absmax, levels_tensor, 32),
        linear_nf4(kernels, x, codes, absmax, levels_tensor, 32),
    )


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
    kv_b = Int8Weight(torch.from_numpy(w), torch.from_numpy(scale))
    absorbed = kernels.absorb_query(torch.from_numpy(q), kv_b)
    limit = np.einsum("thn,hnr->thr", np.abs(q), np.abs(exact[:, :n])) + 1e-30
    assert np.all(
        np.abs(absorbed.numpy() - np.einsum("thn,hnr->thr", q, exact[:, :n])) <= 1e-5 * limit
    )
    values = kernels.absorb_value(torch.from_numpy(latent), kv_b, n)
    limit = np.einsum("thr,hvr->thv", np.abs(latent), np.abs(exact[:, n:])) + 1e-30
    assert np.all(
        np.abs(values.numpy() - np.einsum("thr,hvr->thv", latent, exact[:, n:])) <= 1e-5 * limit
    )
    assert torch.equal(kernels.absorb_query(torch.from_numpy(q[-1:]), kv_b), absorbed[-1:])
    assert torch.equal(kernels.absorb_value(torch.from_numpy(latent[-1:]), kv_b, n), values[-1:])


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
    matrix = Matrix.dense(w)
    got = kernels.linear(matrix, x)
    limit = x.abs().double() @ w.abs().double().T
    assert bool(((got.double() - x.double() @ w.double().T).abs() <= 1e-6 * limit).all())
    assert torch.equal(kernels.linear(matrix, x[-1:]), got[-1:])


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
    int8, coded = [], []
    for shape in shapes:
        q = torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8))
        int8.append(int8_matrix(kernels, q, torch.full((shape[0],), 0.01)))
        coded.append(nf4_matrix(*random_nf4(rng, *shape)[1:], levels_tensor, *shape))
    for gate, up, down in (int8, coded):
        mlp = Mlp(gate, up, down)
        got = kernels.mlp(mlp, x)
        acted = torch.nn.functional.silu(kernels.linear(gate, x)) * kernels.linear(up, x)
        want = kernels.linear(down, acted)
        assert (got - want).norm() <= 0.02 * want.norm() + 1e-6
        assert torch.equal(kernels.mlp(mlp, x[-1:]), got[-1:])
        residual, others = (
            torch_of(rng.standard_normal((t, h))),
            torch_of(rng.standard_normal((t, h)) * 1e-3),
        )
        assert torch.equal(kernels.mlp(mlp, x, residual), residual + got)
        assert torch.equal(kernels.mlp(mlp, x, residual, others), residual + (others + got))

"""Linear layers, norms, MLPs and quantizers of the native kernels against plain numpy in float64,
and bitsandbytes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.quant.backends.base import new
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import MXFP4, ExpertCodecs
from slotmoe.quant.codecs.encode import squared_error
from slotmoe.quant.codecs.weight import Int8Weight
from slotmoe.quant.kernels.cpu.weights import BoundMlp, Matrix
from tests.support.codes import random_codes
from tests.support.kernels import (
    CODECS,
    LEVELS,
    any_matrix,
    coded_matrix,
    expert_slab,
    int8_matrix,
    one_of,
    quick,
    random_expert,
    relative,
    seeds,
    sizes,
    slab_of,
    through_experts,
    torch_of,
)
from tests.support.oracle import untile


def half_steps(x):
    """The most that 8 bits a block of 16 columns can be off. x [T, K] -> [T, K]."""
    padded = np.pad(np.abs(x), ((0, 0), (0, -x.shape[1] % 16)))
    steps = padded.reshape(len(x), -1, 16).max(-1) / 127
    return np.repeat(steps, 16, axis=1)[:, : x.shape[1]] * 0.5001


@quick
@given(one_of((5, 20, 9000), (2, 70, 300), (9, 33, 65), (1, 1, 1)), seeds, one_of(1e-30, 1.0, 1e30))
def test_linear_int8(kernels, shape, seed, scale):
    t, n, k = shape
    rng = np.random.default_rng(seed)
    q = rng.integers(-127, 128, (n, k), dtype=np.int8)
    s = (rng.uniform(0.5, 2, n) * scale).astype(np.float32)
    x = torch_of(rng.standard_normal((t, k)) / scale)
    w = q * s.astype(np.float64)[:, None]
    x64 = x.numpy().astype(np.float64)
    got = kernels.linear(int8_matrix(kernels, torch.from_numpy(q), torch.from_numpy(s)), x)
    bound = half_steps(x64) @ np.abs(w).T + 1e-6 * np.abs(x64) @ np.abs(w).T
    assert (np.abs(got.double().numpy() - x64 @ w.T) <= bound).all()


def test_zeros_and_not_finite(kernels):
    rng = np.random.default_rng(5)
    nf4 = coded_matrix(rng, 20, 100)
    x = torch.zeros(4, 100)
    x[1, 3], x[2, 5], x[3] = float("nan"), float("inf"), torch.rand(100)
    y = kernels.linear(nf4, x)
    assert (y[0] == 0).all() and y[1].isnan().all() and y[2].isnan().all() and y[3].isfinite().all()
    nothing = kernels.linear(nf4, torch.empty(0, 100))
    assert nothing.shape == (0, 20)


@quick
@given(sizes(4, 5, 40, 150), one_of("int8", "nf4", "float32", "bfloat16"), st.integers(1, 3), seeds)
def test_groups_of_rows_multiply_their_own(kernels, shape, kind, threads, seed):
    """Each group's share has the bits of a product with the whole matrix; whole tiles or not."""
    (t, groups, rows, k), rng = shape, np.random.default_rng(seed)
    rows = rows * 16 if seed % 2 else rows
    kernels.set_threads(threads)
    matrix = any_matrix(kernels, rng, kind, groups * rows, k)
    x = torch_of(rng.standard_normal((t, groups, k)))
    got = NativeBackend(kernels).grouped_linear(x, matrix)
    for group in range(groups):
        want = kernels.linear(matrix, x[:, group].contiguous()).view(t, groups, rows)[:, group]
        assert torch.equal(got[:, group], want)


@quick
@given(one_of(1, 3, 33, 70), one_of(1, 5), sizes(200, 40, 300), st.integers(1, 3), seeds)
def test_absorbed_products_are_exact_but_for_the_rounding_of_rows(
    kernels, t, heads, shape, threads, seed
):
    """To 15 bits, of queries times the scales of what they are multiplied with."""
    (n, v, r), rng = shape, np.random.default_rng(seed)
    kernels.set_threads(threads)
    w = rng.integers(-127, 128, (heads, n + v, r)).astype(np.int8)
    scale = np.exp(rng.normal(0, 2, (heads, n + v))).astype(np.float32)
    weight = Int8Weight(torch.from_numpy(w.reshape(-1, r)), torch.from_numpy(scale.reshape(-1)))
    kv_b = kernels.tile_absorbed(weight, (n, v), new)
    q, latent = (torch_of(rng.normal(size=(t, heads, width))) for width in (n, r))
    values = w[:, n:] * scale[:, n:, None].astype(np.float64)
    for times, x, rows, part in (
        (kernels.absorb_query, q, q.numpy() * scale[:, :n], w[:, :n].transpose(0, 2, 1)),
        (kernels.absorb_value, latent, latent.numpy(), values),
    ):
        got, want = times(kv_b, x), np.einsum("thk,hnk->thn", rows.astype(np.float64), part)
        half = np.abs(rows).max(-1, keepdims=True) / 16256 * 0.5001
        limit = half * np.abs(part.astype(np.float64)).sum(-1) + 1e-6 * np.abs(want)
        assert np.all(np.abs(got.numpy() - want) <= limit)


@quick
@given(sizes(5, 40, 200), one_of(torch.float32, torch.float16, torch.bfloat16), seeds)
def test_dense_products_are_exact_to_float32(kernels, shape, dtype, seed):
    (t, n, k), rng = shape, np.random.default_rng(seed)
    x, w = torch_of(rng.standard_normal((t, k))), torch_of(rng.standard_normal((n, k))).to(dtype)
    matrix = Matrix.of(w)
    got = kernels.linear(matrix, x)
    limit = x.abs().double() @ w.abs().double().T
    assert bool(((got.double() - x.double() @ w.double().T).abs() <= 1e-6 * limit).all())


@quick
@given(st.integers(1, 4), st.integers(1, 300), seeds)
def test_norms(kernels, t, n, seed):
    rng = np.random.default_rng(seed)
    x, weight, bias = (torch_of(rng.standard_normal(shape) + 3) for shape in ((t, n), n, n))
    wide = x.double(), (n,), weight.double()
    got, want = kernels.rms_norm(x, weight, 1e-3), F.rms_norm(*wide, 1e-3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    plain = kernels.rms_norm(x, None, 1e-3)
    assert torch.equal(plain, kernels.rms_norm(x, torch.ones(n), 1e-3))
    centred, want = (
        kernels.layer_norm(x, weight, bias, 1e-3),
        F.layer_norm(*wide, bias.double(), 1e-3),
    )
    torch.testing.assert_close(centred.double(), want, rtol=1e-5, atol=1e-4)


@quick
@given(sizes(6, 100, 100), seeds, one_of(None, *CODECS))
def test_mlp_is_its_three_products(kernels, size, seed, codec):
    """Within the rounding of SiLU and of the requantized activations.  Without a codec of int8."""
    (t, h, i), rng = size, np.random.default_rng(seed)
    x, parts = torch_of(rng.standard_normal((t, h))), []
    for shape in ((i, h), (i, h), (h, i)):
        if codec is None:
            q = torch.from_numpy(rng.integers(-127, 128, shape).astype(np.int8))
            parts.append(int8_matrix(kernels, q, torch.full((shape[0],), 0.01)))
        else:
            parts.append(coded_matrix(rng, *shape, codec))
    mlp, (gate, up, down) = BoundMlp(*parts), parts
    got = kernels.mlp(mlp, x)
    acted = F.silu(kernels.linear(gate, x)) * kernels.linear(up, x)
    want = kernels.linear(down, acted)
    assert (got - want).norm() <= 0.02 * want.norm() + 1e-6
    residual, others = (torch_of(rng.standard_normal((t, h)) * by) for by in (1, 1e-3))
    assert torch.equal(kernels.mlp(mlp, x, residual), residual + got)
    assert torch.equal(kernels.mlp(mlp, x, residual, others), residual + (others + got))


@pytest.mark.parametrize("codec", [None, MXFP4])
@pytest.mark.parametrize("t", [1, 2, 9])
def test_gates_and_ups_have_a_limit(kernels, codec, t):
    """In an MLP and in experts; NaN stays NaN, and a limit that nothing reaches changes no bit."""
    rng, (h, i), choice = np.random.default_rng(t), (160, 72), ExpertCodecs(MXFP4, MXFP4)
    exact, record = random_expert(rng, h, i, choice)
    slab, x = slab_of([record]), torch_of(rng.standard_normal((t, h)))
    if codec is None:
        scale, shapes = torch.full((max(h, i),), 0.01), ((i, h), (i, h), (h, i))
        q = [torch.from_numpy(rng.integers(-127, 128, s).astype(np.int8)) for s in shapes]
        parts = [int8_matrix(kernels, w, scale[: len(w)]) for w in q]
        exact = [w.double().numpy() * 0.01 for w in q]

    def run(limit, x=x):
        if codec is None:
            return kernels.mlp(BoundMlp(*parts, limit), x)
        y, chosen = torch.empty(len(x), 1, h), torch.zeros(len(x), 1, dtype=torch.int64)
        coded = expert_slab(slab, h, i, choice, limit=limit)
        return through_experts(kernels, x, chosen, chosen[0].int(), coded, y)[:, 0]

    gate, up, down = (torch.from_numpy(weight) for weight in exact)
    g, u = x.double() @ gate.T, x.double() @ up.T
    limit = float(u.abs().median())
    assert (g > limit).any() and (u < -limit).any()
    acted = F.silu(g.clamp(max=limit)) * u.clamp(-limit, limit)
    assert relative(run(limit), acted @ down.T) < 0.02 < relative(run(0.0), acted @ down.T)
    assert torch.equal(run(0.0), run(1e30))
    x[-1, 3] = torch.nan
    assert run(limit)[-1].isnan().all()


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


def random_source(seed, shape, dtype, scale):
    """A matrix that has a row of zeros."""
    rng = np.random.default_rng(seed)
    source = torch_of(rng.standard_normal(shape) * scale)
    source[rng.integers(len(source))] = 0
    return source.to(dtype)


DTYPES = torch.float32, torch.float16, torch.bfloat16


@quick
@given(sizes(40, 200), seeds, one_of(*DTYPES), one_of(1e-41, 1e-7, 1.0, 1000.0))
def test_quantize_nf4(kernels, shape, seed, dtype, scale):
    n, source = shape[0], random_source(seed, shape, dtype, scale)
    codes, absmax = kernels.quantize_nf4(source)
    want_codes, want_absmax = numpy_nf4(source.float().numpy())
    n_pad = -(-n // 16) * 16
    full = untile(codes.numpy())
    assert (full[:n] == want_codes).all() and (full[n:] == 7).all()
    scales = absmax.numpy().transpose(0, 2, 1).reshape(n_pad, -1)
    with np.errstate(under="ignore"):
        assert (scales[:n] == want_absmax.astype(np.float16)).all() and (scales[n:] == 0).all()


@pytest.mark.filterwarnings("ignore")  # bitsandbytes' own, at import
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_of_nf4_are_those_of_bitsandbytes(heavy, kernels, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    w = (torch.randn(64, 256) * 0.02).to(dtype)
    w[3, :64] = 0
    w[5] *= 1e-3
    packed = functional.quantize_4bit(w, blocksize=64, quant_type="nf4")[0].flatten().numpy()
    theirs = np.stack([packed >> 4, packed & 15], -1).reshape(64, 256)
    assert (untile(kernels.quantize_nf4(w)[0].numpy()) == theirs).all()


@quick
@given(sizes(20, 200), seeds, one_of(*DTYPES), one_of(1e-44, 1e-30, 1.0, 1e4))
def test_quantize_int8(kernels, shape, seed, dtype, scale):
    source = random_source(seed, shape, dtype, scale)
    q, got = kernels.quantize_int8.results(source)
    x = source.float()
    want = x.abs().amax(1) / 127
    assert torch.equal(got, want)
    rows = want > 0
    assert torch.equal(q[rows].float(), torch.round(x[rows] / want[rows, None]).clamp(-127, 127))
    assert (q[~rows] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantizers_refuse_what_is_not_finite(kernels, dtype):
    """And NF4's a scale beyond float16."""
    w = torch.ones(33, 70, dtype=dtype)
    for bad in (math.nan, math.inf, -math.inf):
        w[32, 69] = bad
        for quantized in (kernels.quantize_nf4, kernels.quantize_int8.results):
            with pytest.raises(ValueError, match="NaN or infinity"):
                quantized(w)
    kernels.quantize_nf4(torch.full((1, 64), 65519.0))
    with pytest.raises(ValueError, match="float16"):
        kernels.quantize_nf4(torch.full((1, 64), 65520.0))


@quick
@given(sizes(40, 200), seeds, one_of(*DTYPES), one_of(None, *CODECS))
def test_errors_of_quantized_weights(kernels, shape, seed, dtype, codec):
    """In any order of additions but to the last digits of float64, from codes that no quantizer
    made.  Without a codec of int8."""
    rng = np.random.default_rng(seed)
    source = torch_of(rng.standard_normal(shape)).to(dtype)
    if codec is None:
        q, scale = rng.integers(-127, 128, shape), rng.uniform(0, 0.1, shape[0]).astype(np.float32)
        weight = Int8Weight(torch.from_numpy(q.astype(np.int8)), torch.from_numpy(scale))
        exact = q.astype(np.float32) * scale[:, None]
    else:
        weight, exact = random_codes(rng, codec, *shape)
    x = source.double().numpy()
    wanted = ((x - exact) ** 2).sum(), (x**2).sum()
    assert squared_error(source, weight) == pytest.approx(wanted, rel=1e-12)

"""Codecs: their bytes and encoders; products, norms, MLPs, experts and quantizers of the native
kernels: beside plain numpy in float64, and bitsandbytes."""

import json
import math
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.network.shapes import SWIGLU
from slotmoe.quant.backends.base import new
from slotmoe.quant.codecs.codec import EXPERT_CODECS, INT4, KEPT_CODECS, MXFP4, NF4
from slotmoe.quant.codecs.encode import NotFiniteError, nf4_by_torch, squared_error
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, levels_of, pack, unpack
from slotmoe.quant.kernels.cpu import bindings
from slotmoe.quant.kernels.cpu.weights import Matrix
from tests.support.codes import parts_of, quantize_coded, random_codes
from tests.support.kernels import (
    CLAMPED,
    CODECS,
    FAST,
    ISAS,
    LEVELS,
    TWO_DIGITS,
    by_each_set,
    expert_slab,
    int8_matrix,
    native,
    needs_native,
    one_of,
    quick,
    random_expert,
    seeds,
    silu,
    sizes,
    slab_of,
    through_experts,
    torch_of,
)
from tests.support.oracle import relative
from tests.support.params import nth

CHOICES = EXPERT_CODECS | {("kept", name): codecs for name, codecs in KEPT_CODECS.items()}
by_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


def test_formats_that_exports_have_stay():
    described = json.dumps([codec.describe() for codec in CODECS]).encode()
    assert xxhash.xxh3_64_hexdigest(described) == "c8160d428a0788b7"


@by_codec
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 200), (70, 31)])
def test_dequantized_is_what_the_documented_bytes_say(codec, n, k):
    weight, exact = random_codes(np.random.default_rng(n), codec, n, k)
    assert np.array_equal(weight.dequantize().numpy(), exact.astype(np.float32))
    assert torch.equal(pack(unpack(weight.codes), codec.bits), weight.codes)
    some = weight.rows(0, min(n, 16)).dequantize()
    assert torch.equal(some, weight.dequantize()[:16])
    assert weight.codes.nbytes + weight.scales.nbytes == codec.nbytes(n, k)


@pytest.mark.parametrize(
    "codec", [codec for codec in CODECS if codec not in (INT4, MXFP4)], ids=lambda codec: codec.name
)
def test_an_encoder_finds_what_a_codec_holds_exactly(codec, monkeypatch):
    weight, _ = random_codes(np.random.default_rng(3), codec, 50, 128)
    wanted = weight.dequantize()
    made = CodedWeight(*quantize_coded(wanted, codec), levels_of(codec), (50, 128))
    assert relative(made.dequantize(), wanted) < 0.1
    nothing = quantize_coded(torch.zeros(3, 70), codec)
    assert not CodedWeight(*nothing, levels_of(codec), (3, 70)).dequantize().any()
    for bad, found in product((math.nan, math.inf, -math.inf), (native, None)):
        wanted[-1, -1] = bad
        monkeypatch.setattr(bindings, "load", lambda found=found: found)
        with pytest.raises(NotFiniteError):
            quantize_coded(wanted, codec)


@by_codec
@quick
@given(sizes(9, 70, 300), seeds)
def test_linear(kernels, codec, shape, seed):
    """Off by what 8-bit activations and levels cost."""
    (t, n, k), rng = shape, np.random.default_rng(seed)
    weight, exact = random_codes(rng, codec, n, k)
    x = torch_of(rng.standard_normal((t, k)))
    matrix, x64 = Matrix.of(weight), x.numpy().astype(np.float64)
    got = kernels.linear(matrix, x)
    steps = np.abs(x64).max() / 127 * 0.5001
    bound = steps * np.abs(exact).sum(1) + (np.abs(x64).sum(1, keepdims=True) + steps * k) / 190
    assert (np.abs(got.numpy() - x64 @ exact.T) <= bound + 1e-5).all()


def test_integer_levels_lose_nothing(kernels):
    """Activations that 8 bits hold give the exact product: no saturation, no lost correction, and
    8-bit levels are kept as they are."""
    rng = np.random.default_rng(0)
    q = rng.choice(np.array([-127, 127], dtype=np.int8), (40, 200))
    made = [(int8_matrix(kernels, torch.from_numpy(q), torch.ones(40)), q.astype(np.float64))]
    for codec in CODECS[1:]:
        weight, exact = random_codes(rng, codec, 40, 200)
        made.append((Matrix.of(weight), exact))
    for x in (rng.integers(-127, 128, (3, 200)), rng.choice([-127, 127], (3, 200))):
        x[:, ::16] = 127
        for matrix, exact in made:
            assert relative(kernels.linear(matrix, torch_of(x)), x @ exact.T) < 1e-6


@needs_native
@by_codec
@pytest.mark.parametrize("columns", [1023, 1024])  # `amx` has two digits from these on
def test_instruction_sets_agree(codec, columns):
    """Bitwise where activations are the same and where they multiply and add in one rounding, which
    plain C++ does in two."""
    rng = np.random.default_rng(1)
    weight, _ = random_codes(rng, codec, 90, columns)
    matrix, x = Matrix.of(weight), torch_of(rng.standard_normal((40, columns)))
    every = dict(zip(ISAS, by_each_set(lambda: native.linear(matrix, x)), strict=True))
    fine = [every.pop(isa) for isa in TWO_DIGITS if isa == "amx_plain" or columns == 1024]
    results = [*every.values()]
    assert all(torch.equal(got, results[0]) for got in results[:-1])
    assert relative(results[-1], results[0]) < 1e-6
    assert all(torch.equal(got, fine[0]) and 0 < relative(got, results[0]) < 0.02 for got in fine)
    source = torch_of(rng.standard_normal((90, columns)))
    int8 = Int8Weight(*native.quantize_int8.results(source))
    kv_b = native.tile_absorbed(int8, (20, 25), new)
    q = torch_of(rng.standard_normal((40, 2, 20)))
    first, *others = by_each_set(lambda: native.absorb_query(kv_b, q))
    assert all(torch.equal(other, first) for other in others)
    for made in (weight, int8):
        assert len({*by_each_set(lambda made=made: squared_error(source, made))}) == 1


def expert(how, x, gate, up, down, *biases):
    of_gate, of_up, of_down = biases or (0, 0, 0)
    gate, up, most = x @ gate.T + of_gate, x @ up.T + of_up, how.limit or math.inf
    gate, up = np.minimum(gate, most), np.clip(up, -most, most)
    return (silu(how.alpha * gate) / how.alpha * (up + how.offset)) @ down.T + of_down


@pytest.mark.parametrize(
    ("kernels", "choice", "sizes", "how"),
    nth(5, product(ISAS, CHOICES, [(256, 192), (100, 33)], [SWIGLU, CLAMPED]), FAST),
    indirect=["kernels"],
)
def test_experts(kernels, choice, sizes, how):
    """Those with another activation have biases."""
    (h, i), codecs, rng, biases = sizes, CHOICES[choice], np.random.default_rng(2), how == CLAMPED
    made = [random_expert(rng, h, i, codecs, biases) for _ in range(3)]
    slab, slots = slab_of([record for _, record in made]), torch.tensor([2, 0, -1, 1]).int()
    x = torch_of(rng.standard_normal((40, h)))
    coded = expert_slab(slab, h, i, codecs, activation=how, biases=biases)
    indices = torch.from_numpy(rng.integers(0, 4, (40, 2)))
    y = through_experts(kernels, x, indices, slots, coded, torch.full((40, 2, h), 7.0))
    for slot, (weights, _) in enumerate(made):
        uses = (slots[indices] == slot).nonzero(as_tuple=True)
        want = expert(how, x[uses[0]].double().numpy(), *weights)
        assert relative(y[uses], want) < 0.015 * math.sqrt(3)
    assert (y[slots[indices] < 0] == 7).all()


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
    weight = Int8Weight(torch.from_numpy(q), torch.from_numpy(s))
    got = kernels.linear(kernels.tile_int8(weight, new), x)
    bound = (half_steps(x64) + 1e-6 * np.abs(x64)) @ np.abs(w).T
    assert (np.abs(got.double().numpy() - x64 @ w.T) <= bound).all()


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
    got, want = kernels.layer_norm(x, weight, bias, 1e-3), F.layer_norm(*wide, bias.double(), 1e-3)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)


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
    padded = 16 * codes.shape[0], 64 * codes.shape[1]
    full, scales, _ = parts_of(NF4.describe(), codes.numpy(), absmax.numpy(), *padded)
    assert (full[:n] == want_codes).all() and (full[n:] == 7).all()
    scales = scales[:, ::64]
    with np.errstate(under="ignore"):
        assert (scales[:n] == want_absmax.astype(np.float16)).all() and (scales[n:] == 0).all()
    assert all(map(torch.equal, nf4_by_torch(source), (codes, absmax)))


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

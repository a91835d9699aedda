"""Codecs: their bytes, their encoders, and the native kernels' products, beside plain numpy."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given

from slotmoe.quant.codecs.codec import EXPERT_CODECS, INT4, KEPT_CODECS, LUT3, LUT4, MXFP4, NF4
from slotmoe.quant.codecs.encode import NotFiniteError, squared_error
from slotmoe.quant.codecs.weight import (
    CodedWeight,
    Int8Weight,
    levels_of,
    pack,
    possible_scales,
    unpack,
)
from slotmoe.quant.kernels.cpu.weights import Matrix
from tests.support.codes import quantize_coded, random_codes, values
from tests.support.kernels import (
    CODECS,
    ISAS,
    TWO_DIGITS,
    by_each_set,
    expert_slab,
    int8_matrix,
    native,
    needs_native,
    quick,
    random_expert,
    relative,
    seeds,
    silu,
    sizes,
    slab_of,
    through_experts,
    torch_of,
)
from tests.support.params import nth

CHOICES = EXPERT_CODECS | {("kept", name): codecs for name, codecs in KEPT_CODECS.items()}
by_codec = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)


@by_codec
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (37, 200), (70, 31)])
def test_dequantized_is_what_the_documented_bytes_say(codec, n, k):
    weight, exact = random_codes(np.random.default_rng(n), codec, n, k)
    assert np.array_equal(weight.dequantize().numpy(), exact.astype(np.float32))
    assert torch.equal(pack(unpack(weight.codes), codec.bits), weight.codes)
    some = weight.rows(0, min(n, 16)).dequantize()
    assert torch.equal(some, weight.dequantize()[:16])
    assert weight.codes.nbytes + weight.scales.nbytes == codec.nbytes(n, k)


@pytest.mark.parametrize("codec", [NF4, LUT4, LUT3], ids=["nf4", "lut4", "lut3"])
def test_an_encoder_finds_what_a_codec_holds_exactly(codec):
    weight, _ = random_codes(np.random.default_rng(3), codec, 50, 128)
    wanted = weight.dequantize()
    made = CodedWeight(*quantize_coded(wanted, codec), levels_of(codec), (50, 128))
    assert relative(made.dequantize(), wanted) < 0.1
    nothing = quantize_coded(torch.zeros(3, 70), codec)
    assert not CodedWeight(*nothing, levels_of(codec), (3, 70)).dequantize().any()
    for bad in (math.nan, math.inf, -math.inf):
        wanted[-1, -1] = bad
        with pytest.raises(NotFiniteError):
            quantize_coded(wanted, codec)


@pytest.mark.parametrize(
    ("codec", "gaussian", "student"),
    [(NF4, 0.093, 0.11), (LUT4, 0.073, 0.084), (LUT3, 0.153, 0.177)],
    ids=lambda value: getattr(value, "name", None),
)
def test_error_of_an_encoder(codec, gaussian, student):
    """Of a model's levels: those learned on Student's t itself would reach 0.080 there."""
    of_five = torch.distributions.StudentT(5.0).sample((64, 2048))
    for w, bound in ((torch.randn(64, 2048), gaussian), (of_five, student)):
        weight = CodedWeight(*quantize_coded(w, codec), levels_of(codec), (64, 2048))
        error, whole = squared_error(w, weight)
        assert math.sqrt(error / whole) <= bound


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
    for codec in (LUT4, LUT3, INT4, MXFP4):
        weight, exact = random_codes(rng, codec, 40, 200)
        made.append((Matrix.of(weight), exact))
    for x in (rng.integers(-127, 128, (3, 200)), rng.choice([-127, 127], (3, 200))):
        x[:, ::16] = 127
        for matrix, exact in made:
            assert relative(kernels.linear(matrix, torch_of(x)), x @ exact.T) < 1e-6


def test_powers_of_two_lose_nothing(kernels):
    """Neither in products, where activations fit 8 bits and sums 24, nor far from 1."""
    rng, shape = np.random.default_rng(4), (40, 192)
    codes = torch.from_numpy(rng.integers(0, 256, MXFP4.codes_shape(*shape), dtype=np.uint8))
    x = rng.integers(-7, 8, (5, 192))
    x[:, ::16] = 127
    for middle in (2, 127, 229):
        powers = torch.full(MXFP4.scales_shape(*shape), middle, dtype=torch.uint8)
        powers += torch.from_numpy(rng.integers(-2, 3, powers.shape, dtype=np.int8)).view(
            torch.uint8
        )
        scales = powers.view(torch.float8_e8m0fnu)
        weight = CodedWeight(codes, scales, levels_of(MXFP4), shape)
        exact = values(MXFP4.describe(), codes.numpy(), powers.numpy(), *shape).astype(np.float64)
        got = kernels.linear(Matrix.of(weight), torch_of(x)).double().numpy()
        assert np.array_equal(got, (x @ exact.T).astype(np.float32))
        assert possible_scales(scales)
    powers[0, 0, 3] = 232
    assert not possible_scales(scales)


@needs_native
@by_codec
def test_instruction_sets_agree(codec):
    """Bitwise where activations are the same and where they multiply and add in one rounding, which
    plain C++ does in two."""
    rng = np.random.default_rng(1)
    weight, _ = random_codes(rng, codec, 90, 700)
    matrix, x = Matrix.of(weight), torch_of(rng.standard_normal((40, 700)))
    every = by_each_set(lambda: native.linear(matrix, x))
    results, fine = every[len(TWO_DIGITS) :], every[: len(TWO_DIGITS)]
    source = torch_of(rng.standard_normal((90, 700)))
    assert all(torch.equal(got, results[0]) for got in results[:-1])
    assert relative(results[-1], results[0]) < 1e-6
    assert all(torch.equal(got, fine[0]) and relative(got, results[0]) < 0.02 for got in fine)
    for made in (weight, Int8Weight(*native.quantize_int8.results(source))):
        assert len({*by_each_set(lambda made=made: squared_error(source, made))}) == 1


def expert(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize(
    ("kernels", "choice", "sizes"),
    nth(3, product(ISAS, CHOICES, [(256, 192), (100, 33)])),
    indirect=["kernels"],
)
def test_experts(kernels, choice, sizes):
    (h, i), codecs, rng = sizes, CHOICES[choice], np.random.default_rng(2)
    made = [random_expert(rng, h, i, codecs) for _ in range(3)]
    slab, slots = slab_of([record for _, record in made]), torch.tensor([2, 0, -1, 1]).int()
    x, coded = torch_of(rng.standard_normal((40, h))), expert_slab(slab, h, i, codecs)
    indices = torch.from_numpy(rng.integers(0, 4, (40, 2)))
    y = through_experts(kernels, x, indices, slots, coded, torch.full((40, 2, h), 7.0))
    for slot, (weights, _) in enumerate(made):
        uses = (slots[indices] == slot).nonzero(as_tuple=True)
        want = expert(x[uses[0]].double().numpy(), *weights)
        assert relative(y[uses], want) < 0.015 * math.sqrt(3)
    assert (y[slots[indices] < 0] == 7).all()


@quick
@given(sizes(4, 5, 150), seeds)
def test_outputs_are_summed_in_the_gates_order(kernels, size, seed):
    (t, k, h), rng = size, np.random.default_rng(seed)
    outs, weights = torch_of(rng.standard_normal((t, k, h))), torch_of(rng.uniform(0.1, 1, (t, k)))
    total = torch.zeros(t, h)
    for choice in range(k):
        total = total + weights[:, choice, None] * outs[:, choice]
    assert torch.equal(kernels.weighted_sum(outs, weights), total)


def test_bad_records_are_refused(kernels):
    codecs, wider = EXPERT_CODECS["lut", "3.5"], EXPERT_CODECS["lut", "4"]
    slab = slab_of([random_expert(np.random.default_rng(6), 64, 32, codecs)[1]])
    for levels in (torch.zeros(16), torch.zeros(2, 8), torch.zeros(2, 16).double()):
        with pytest.raises(ValueError, match="levels"):
            expert_slab(slab, 64, 32, codecs, levels)
    with pytest.raises(ValueError, match="record of"):
        expert_slab(slab[:, :-192].contiguous(), 64, 32, wider)
    one, x, y = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 64), torch.empty(1, 1, 64)
    with pytest.raises(ValueError, match="refused"):
        through_experts(kernels, x, one, one[0].int(), expert_slab(slab, 64, 0, codecs), y)

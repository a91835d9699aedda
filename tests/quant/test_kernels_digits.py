"""Products whose activations have two digits (fine.h), against whole numbers and float64: int8 on
every instruction set, and all that is quantized on those with tiles (fine_amx.h)."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given

from slotmoe.quant.backends.base import new
from slotmoe.quant.codecs.weight import Int8Weight, levels_of
from slotmoe.quant.kernels.cpu.weights import Matrix
from tests.support.codes import parts_of, random_codes
from tests.support.kernels import (
    CODECS,
    TWO_DIGITS,
    needs_native,
    one_of,
    quick,
    relative,
    seeds,
    sizes,
    torch_of,
)

pytestmark = needs_native
dims = sizes(40, 70, 300)  # T, N, K


def fine_integers(x):
    """Rows in 15 bits, by the kernels' steps in float32: x float32 [T, K] -> int64 [T, K] and the
    value of one, float64 [T, 1]."""
    top = np.abs(x).max(1, keepdims=True)
    one, exponent = top.astype(np.float64) / 16256, top.view(np.int32) >> 23
    first = np.ldexp(np.float32(1), ((127 - exponent) / 2).astype(np.int32))
    with np.errstate(divide="ignore", invalid="ignore"):
        second = np.where(top > 0, 1 / one / first, 0).astype(np.float32)
    return np.rint(x * first * second).astype(np.int64), one


@quick
@given(dims, seeds, one_of(1e-42, 1e-30, 1.0, 3e37), one_of("normal", "t"))
def test_two_digits_are_exact_but_for_the_rounding_of_rows(kernels, shape, seed, scale, law):
    """Bit by bit on every instruction set, and closer than rows of 8 bits."""
    (t, n, k), rng = shape, np.random.default_rng(seed)
    x = rng.standard_normal((t, k)) if law == "normal" else rng.standard_t(3, (t, k)).clip(-9, 9)
    x = (x * scale).astype(np.float32)
    x[seed % t, seed % k :] = 0
    q = rng.integers(-128, 128, (n, k), dtype=np.int8)
    s = rng.uniform(0.5, 2, n).astype(np.float32) / 1024
    weight = Int8Weight(torch.from_numpy(q), torch.from_numpy(s))
    got = kernels.linear(kernels.tile_int8(weight, new, fine=True), torch_of(x)).numpy()
    integers, one = fine_integers(x)
    assert np.abs(integers).max() <= 16256
    wide = q.astype(np.int64)
    assert (got == (integers @ wide.T * (s * one)).astype(np.float32)).all()
    exact = x.astype(np.float64) @ (wide * s.astype(np.float64)[:, None]).T
    bound = one * 0.5001 * (np.abs(wide).sum(1) * s) + 1e-6 * np.abs(exact) + 1e-45
    assert (np.abs(got - exact) <= bound).all()
    coarse = kernels.linear(kernels.tile_int8(weight, new), torch_of(x)).numpy()
    if kernels.isa in TWO_DIGITS:
        assert (got == coarse).all()
    elif scale > 1e-40 and min(t * n, k) >= 64:
        assert relative(got, exact) <= 0.1 * relative(coarse, exact)


def test_two_digits_take_long_and_bad_rows(kernels):
    """Sums at the bound of 32 bits, NaN and infinity; more columns are refused."""
    k = 131072
    weight = Int8Weight(torch.full((3, k), -128).char(), torch.ones(3))
    tiled = kernels.tile_int8(weight, new, fine=True)
    x = torch.ones(9, k)
    x[1:4], x[4, 7], x[5, -1], x[6] = -1, math.nan, -math.inf, 0
    y = kernels.linear(tiled, x)
    assert (y[[0, 7, 8]] == -128.0 * k).all() and (y[1:4] == 128.0 * k).all()
    assert y[4:6].isnan().all() and (y[6] == 0).all()
    weight = Int8Weight(torch.zeros(1, k + 1).char(), torch.ones(1))
    with pytest.raises(ValueError, match="refused"):
        kernels.linear(kernels.tile_int8(weight, new, fine=True), torch.ones(1, k + 1))


def fitted(levels):
    """Whole numbers and their step of least squared error for 16 levels, as the kernels try."""
    top, best, least = max(map(abs, levels)), None, math.inf
    for count in 95 + 0.05 * np.arange(641):
        exact = [level / top * count for level in levels]
        whole, error = [round(v) for v in exact], 0.0
        for v, r in zip(exact, whole, strict=True):
            error += (r - v) * (r - v) / (count * count)
        if error < least:
            best, least = (np.array(whole), top / count), error
    return best


FITTED = {codec: fitted(levels_of(codec).tolist()) for codec in CODECS}


@pytest.mark.parametrize("kernels", TWO_DIGITS, indirect=True)
@quick
@given(dims, seeds, one_of(1e-42, 1e-30, 1.0, 1e30), one_of(*CODECS))
def test_codes_with_two_digits_are_exact_but_for_one_order_of_floats(
    kernels, shape, seed, scale, codec
):
    """Bit by bit: whole sums under each scale, then one float operation a scale in turn."""
    (t, n, k), rng = shape, np.random.default_rng(seed)
    x = (rng.standard_normal((t, k)) * scale).astype(np.float32)
    weight = random_codes(rng, codec, n, k)[0]
    got = kernels.linear(Matrix.of(weight), torch_of(x)).numpy()
    integers, one = fine_integers(x)
    code, of_block, of_row = parts_of(
        vars(codec), weight.codes.numpy(), weight.scales.view(torch.uint8).numpy(), n, k
    )
    whole, step = FITTED[codec]
    total, each = np.zeros((t, n), np.float32), 64 if codec.scales == "f16" else 32
    for first in range(0, k, each):
        sums = integers[:, first : first + each] @ whole[code[:, first : first + each]].T
        product = sums.astype(np.float32).astype(np.float64) * of_block[:, first]
        total = (product + total).astype(np.float32)
    rows = of_row[:, 0].astype(np.float64) if np.ndim(of_row) else 1.0
    assert (got == (total * (rows * (one * step))).astype(np.float32)).all()

"""The native quantizers, and the errors of what they make, against numpy and bitsandbytes."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.int8 import Int8Weight
from tests.support.kernels import (
    LEVELS,
    levels_tensor,
    native,
    needs_native,
    quick,
    random_nf4,
    seeds,
    tile_codes,
    torch_of,
    untile_codes,
)

pytestmark = needs_native


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
    int8 = Int8Weight(torch.from_numpy(q.astype(np.int8)), torch.from_numpy(scale))
    for weight, made in (
        (CodedWeight(codes, absmax, levels_tensor, (n, k)), w.astype(np.float32)),
        (int8, q.astype(np.float32) * scale[:, None]),
    ):
        errors = kernels.squared_error(source, weight)
        assert errors == pytest.approx((((x - made) ** 2).sum(), (x**2).sum()), rel=1e-12)


def test_errors_are_the_same_bits_for_every_instruction_set_and_number_of_threads():
    torch.manual_seed(0)
    source = torch.randn(150, 333)
    nf4 = CodedWeight(*native.quantize_nf4(source), levels_tensor, (150, 333))
    int8 = Int8Weight(*native.quantize_int8(source))
    before, results = (native.isa, native.threads), set()
    try:
        for isa in native.isas:
            for threads in (1, 2, 5):
                native.set_isa(isa)
                native.set_threads(threads)
                results.add(tuple(native.squared_error(source, weight) for weight in (nf4, int8)))
    finally:
        native.set_isa(before[0])
        native.set_threads(before[1])
    assert len(results) == 1

"""Codecs: their bytes, their encoders, and the native kernels' products, beside plain numpy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.quant.codec import EXPERT_CODECS, INT4, LUT3, LUT4, NF4, ExpertCodecs
from slotmoe.quant.coded import CodedWeight, levels_of, pack, unpack
from slotmoe.quant.kernels.cpu.weights import Matrix, Mlp
from slotmoe.quant.nf4 import NotFiniteError
from slotmoe.quant.weights import squared_error
from tests.support.codes import quantize_coded, random_codes, values
from tests.support.kernels import (
    aligned,
    expert_record,
    native,
    needs_native,
    quick,
    relative,
    seeds,
    silu,
    slab_of,
    torch_of,
)

CODECS = {codec.name: codec for codec in (NF4, LUT4, LUT3, INT4)}
CHOICES = {**EXPERT_CODECS, ("kept", "int4"): ExpertCodecs(INT4, INT4)}
by_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
by_choice = pytest.mark.parametrize("codecs", CHOICES.values(), ids=map("-".join, CHOICES))


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
    wanted[7, 9] = math.nan
    with pytest.raises(NotFiniteError):
        quantize_coded(wanted, codec)


@pytest.mark.parametrize(
    ("codec", "gaussian", "student"),
    [(NF4, 0.093, 0.11), (LUT4, 0.073, 0.084), (LUT3, 0.153, 0.177)],
    ids=lambda value: getattr(value, "name", None),
)
def test_error_of_an_encoder(codec, gaussian, student):
    """Of a model's levels: those learned on Student's t itself would reach 0.080 there."""
    torch.manual_seed(0)
    of_five = torch.distributions.StudentT(5.0).sample((64, 2048))
    for w, bound in ((torch.randn(64, 2048), gaussian), (of_five, student)):
        weight = CodedWeight(*quantize_coded(w, codec), levels_of(codec), (64, 2048))
        error, whole = squared_error(w, weight)
        assert math.sqrt(error / whole) <= bound


@needs_native
@by_codec
@quick
@given(st.integers(1, 9), st.integers(1, 70), st.integers(1, 300), seeds)
def test_linear(kernels, codec, t, n, k, seed):
    """Off by what 8-bit activations and levels cost; a row is bitwise that row alone."""
    rng = np.random.default_rng(seed)
    weight, exact = random_codes(rng, codec, n, k)
    x = torch_of(rng.standard_normal((t, k)))
    matrix, x64 = Matrix.of_codes(weight), x.numpy().astype(np.float64)
    got = kernels.linear(matrix, x)
    steps = np.abs(x64).max() / 127 * 0.5001
    bound = (
        steps * np.abs(exact).sum(1) + (np.abs(x64).sum(1, keepdims=True) + steps * k) * 0.5 / 95
    )
    assert (np.abs(got.numpy() - x64 @ exact.T) <= bound + 1e-5).all()
    for row in range(t):
        assert torch.equal(kernels.linear(matrix, x[row : row + 1])[0], got[row])


@needs_native
@pytest.mark.parametrize("codec", [LUT4, LUT3, INT4], ids=["lut4", "lut3", "int4"])
def test_integer_levels_lose_nothing(kernels, codec):
    """Activations that 8 bits hold give the exact product: 8-bit levels are kept as they are."""
    rng = np.random.default_rng(0)
    weight, exact = random_codes(rng, codec, 40, 200)
    x = rng.integers(-127, 128, (3, 200)).astype(np.float64)
    x[:, ::16] = 127
    got = kernels.linear(Matrix.of_codes(weight), torch_of(x))
    assert relative(got, x @ exact.T) < 1e-6


@needs_native
@by_codec
def test_instruction_sets_agree(codec):
    """Bitwise where they multiply and add in one rounding, which plain C++ does in two."""
    rng = np.random.default_rng(1)
    weight, _ = random_codes(rng, codec, 90, 700)
    matrix, x, before, results = Matrix.of_codes(weight), torch.randn(40, 700), native.isa, []
    try:
        for isa in native.isas:
            native.set_isa(isa)
            results.append(native.linear(matrix, x))
    finally:
        native.set_isa(before)
    assert all(torch.equal(got, results[0]) for got in results[:-1])
    assert relative(results[-1], results[0]) < 1e-6


def random_record(rng, codecs, h, i):
    """Values of gate, up and down, and a record with a poisoned tail."""
    shapes = {"gate_proj": (i, h), "up_proj": (i, h), "down_proj": (h, i)}
    parts = [
        random_codes(rng, codecs.of(name), *shape, 4 / math.sqrt(h))
        for name, shape in shapes.items()
    ]
    tensors = [weight.codes for weight, _ in parts] + [weight.scales for weight, _ in parts]
    data = b"".join(tensor.numpy().tobytes() for tensor in tensors)
    return [exact for _, exact in parts], aligned(np.frombuffer(data, np.uint8).copy(), 100)


@needs_native
@by_choice
@pytest.mark.parametrize(("h", "i"), [(256, 192), (100, 33)])
def test_experts(kernels, codecs, h, i):
    rng = np.random.default_rng(2)
    made = [random_record(rng, codecs, h, i) for _ in range(3)]
    slab, slots = slab_of([record for _, record in made]), torch.tensor([2, 0, -1, 1]).int()
    x, record = torch_of(rng.standard_normal((40, h))), expert_record(h, i, codecs)
    indices = torch.from_numpy(rng.integers(0, 4, (40, 2)))
    y = torch.full((40, 2, h), 7.0)
    kernels.experts_by_slot(x, indices, slab, slots, record, y)
    for slot, (weights, _) in enumerate(made):
        uses = (slots[indices] == slot).nonzero(as_tuple=True)
        x64, (gate, up, down) = x[uses[0]].double().numpy(), weights
        want = (silu(x64 @ gate.T) * (x64 @ up.T)) @ down.T
        assert relative(y[uses], want) < 0.015 * math.sqrt(3)
    assert (y[slots[indices] < 0] == 7).all()
    for row in range(0, 40, 7):
        alone = torch.full((1, 2, h), 7.0)
        kernels.experts_by_slot(
            x[row : row + 1], indices[row : row + 1], slab, slots, record, alone
        )
        assert torch.equal(alone[0], y[row])


@needs_native
@by_codec
def test_mlp(kernels, codec):
    rng = np.random.default_rng(4)
    made = [random_codes(rng, codec, *shape, 0.5) for shape in ((50, 90), (50, 90), (90, 50))]
    gate, up, down = (exact for _, exact in made)
    matrices = [Matrix.of_codes(weight) for weight, _ in made]
    x = torch_of(rng.standard_normal((5, 90)))
    got, x64 = kernels.mlp(Mlp(*matrices), x), x.double().numpy()
    assert relative(got, (silu(x64 @ gate.T) * (x64 @ up.T)) @ down.T) < 0.015 * math.sqrt(3)
    assert torch.equal(kernels.mlp(Mlp(*matrices), x[3:4])[0], got[3])
    other = random_codes(rng, NF4 if codec is LUT4 else LUT4, 90, 50)[0]
    with pytest.raises(ValueError, match="one codec"):
        Mlp(*matrices[:2], Matrix.of_codes(other))


@needs_native
@by_codec
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_values(kernels, codec, dtype):
    rng = np.random.default_rng(5)
    weight, exact = random_codes(rng, codec, 37, 200)
    source = torch_of(rng.standard_normal((37, 200))).to(dtype)
    x = source.double().numpy()
    wanted = ((x - exact) ** 2).sum(), (x**2).sum()
    assert kernels.squared_error(source, weight) == pytest.approx(wanted, rel=1e-12)


@needs_native
def test_bad_records_are_refused(kernels):
    codecs = EXPERT_CODECS["lut", "3.5"]
    for levels in (torch.zeros(16), torch.zeros(2, 8), torch.zeros(2, 16).double()):
        with pytest.raises(ValueError, match="levels"):
            expert_record(64, 32, codecs, levels)
    with pytest.raises(ValueError, match="at least 1"):
        expert_record(64, 0, codecs)
    _, record = random_record(np.random.default_rng(6), codecs, 64, 32)
    one, x, y = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 64), torch.empty(1, 1, 64)
    wider = expert_record(64, 32, EXPERT_CODECS["lut", "4"])  # its record is longer
    with pytest.raises(ValueError, match="record of"):
        kernels.experts_by_slot(x, one, record[None, :-100], one[0].int(), wider, y)
    weight, _ = random_codes(np.random.default_rng(7), LUT3, 32, 64)
    for part in ("codes", "scales"):
        cut = {"codes": weight.codes, "scales": weight.scales}
        cut[part] = cut[part][:1].contiguous()
        with pytest.raises(ValueError, match=part):
            Matrix.of_codes(CodedWeight(cut["codes"], cut["scales"], weight.levels, (32, 64)))


def test_the_oracle_tells_bits_apart():
    """A code that is changed changes its weight alone."""
    rng = np.random.default_rng(8)
    for codec in (LUT4, LUT3):
        weight, _ = random_codes(rng, codec, 16, 64)
        codes = unpack(weight.codes)
        before = values(codec.describe(), weight.codes.numpy(), weight.scales.numpy(), 16, 64)
        codes[0, 5, 61] = (codes[0, 5, 61] + 1) % (1 << codec.bits)
        changed = pack(codes, codec.bits).numpy()
        after = values(codec.describe(), changed, weight.scales.numpy(), 16, 64)
        assert np.argwhere(before != after).tolist() in ([[5, 61]], [])

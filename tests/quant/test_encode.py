"""The encoder: scales, codes and levels of least squared error, and of least error in a Hessian's
measure."""

from itertools import product

import pytest
import torch
from hypothesis import given

from slotmoe.quant.codecs import encode
from slotmoe.quant.codecs.codec import INT5, INT6, LUT2, LUT3, LUT4
from slotmoe.quant.codecs.encode import Hessian, NotPositiveError
from slotmoe.quant.codecs.weight import CodedWeight, levels_of
from slotmoe.quant.kernels.cpu import bindings
from tests.support.kernels import by_each_set, needs_native, one_of, quick, seeds, sizes

CODECS = (LUT4, LUT3, LUT2, INT5, INT6)


def levels_tensor(codec):
    return torch.tensor(codec.levels, dtype=torch.float32)


def values(weight, codec, hessian=None):
    codes, scales, _ = encode.quantize_lut(weight, codec, hessian)
    return CodedWeight(codes, scales, levels_of(codec), tuple(weight.shape)).dequantize()


@needs_native
@quick
@given(
    sizes(40, 150),
    seeds,
    one_of(torch.float32, torch.float16, torch.bfloat16),
    one_of(32, 64),
    one_of(*CODECS),
    one_of(1e-35, 1e-3, 300.0),
)
def test_every_instruction_set_and_torch_give_the_same_bytes(
    heavy, shape, seed, dtype, block, codec, scale
):
    (N, K), generator = shape, torch.Generator().manual_seed(seed)
    weight = (torch.randn(N, K, generator=generator) * scale).to(dtype)
    weight[0] = 0
    importance, levels = torch.rand(K, generator=generator), levels_tensor(codec)

    def made():
        scales = encode.fit_scales(weight, importance, levels, block)
        return scales, encode.assign(weight, scales, levels, block)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bindings, "load", lambda: None)
        wanted = made()
    for got in by_each_set(made):
        assert all(map(torch.equal, got, wanted))


def correlated(N, K, seed=0):
    """A weight and the Hessian of inputs that hang together."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) * 0.3 + torch.eye(K)
    x = torch.randn(4 * K, K, generator=generator) @ mix
    weight = torch.randn(N, K, generator=generator) * 0.02
    return weight, Hessian(x.t() @ x / len(x))


def output_error(weight, made, hessian):
    """Of the rows that are measured."""
    weight, made = weight[:: encode.MEASURED], made[:: encode.MEASURED]
    rest, H = weight - made, hessian.damped[: weight.shape[1], : weight.shape[1]]
    return ((rest @ H) * rest).sum().item(), ((weight @ H) * weight).sum().item()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_feedback_and_descent_lower_the_error_of_outputs(heavy, codec, monkeypatch):
    weight, hessian = correlated(40, 200)
    plain, found, taken, made = values(weight, codec), [], [], []
    for rounds, native in product((0, 1, 3), (bindings.load(), None)):
        monkeypatch.setattr(bindings, "load", lambda native=native: native)
        monkeypatch.setattr(encode, "ROUNDS", rounds)
        *coded, squares = encode.quantize_lut(weight, codec, hessian)
        made.append(CodedWeight(*coded, levels_of(codec), (40, 200)).dequantize())
        assert squares == pytest.approx(output_error(weight, made[-1], hessian), rel=1e-2)
        found.append(squares[0]), taken.append(coded[1])
    least = 0.7 * output_error(weight, plain, hessian)[0]
    assert max(found[:2]) < least and found[4] < found[2] < found[0]
    assert not taken[0].equal(taken[2])  # feedback's scales, and better ones by descent
    assert (torch.stack(made[::2]) == torch.stack(made[1::2])).float().mean() > 0.95  # alike


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_a_hessian_that_is_none_is_refused(value):
    with pytest.raises(NotPositiveError):
        encode.quantize_lut(torch.ones(16, 64), LUT4, Hessian(torch.full((64, 64), value)))


@pytest.mark.parametrize("codec", CODECS[:3], ids=lambda codec: codec.name)
def test_learned_levels_cost_less_on_what_they_are_learned_of(codec):
    weight, given, errors = correlated(64, 256)[0] ** 3, levels_tensor(codec), []
    learned = encode.learn_levels([weight, 1e3 * weight.flip(0)], given, 32)
    for levels in (given, learned):
        scales = encode.fit_scales(weight, torch.ones(256), levels, 32)
        codes = encode.assign(weight, scales, levels, 32)
        errors.append((levels[codes.int()] * scales.repeat_interleave(32, 1) - weight).norm())
    assert learned.equal(learned.round()) and learned.abs().max() == 127
    assert errors[1] < 0.9 * errors[0], errors

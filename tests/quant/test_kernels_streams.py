"""Hyper-connections and compressors of DeepSeek-V4 as native kernels, against plain torch in
float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernels import one_of, quick, seeds, torch_of


def unit(x, eps):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def hyper_in(h, fn, base, scale, eps, iterations, hc_eps):
    """The streams [T, M, D] -> x, post, comb."""
    h, fn, base, scale = (tensor.double() for tensor in (h, fn, base, scale))
    m = h.shape[1]
    mixed = unit(h.flatten(1), eps) @ fn.flatten(1).T
    factors = scale.repeat_interleave(torch.tensor([m, m, m * m][: len(scale)]))
    pre, post, comb = (mixed * factors + base).tensor_split([m, 2 * m], -1)
    x = ((pre.sigmoid() + hc_eps)[..., None] * h).sum(1)
    if len(scale) == 1:
        return x
    comb = comb.unflatten(-1, (m, m)).softmax(-1) + hc_eps
    for turn in range(2 * iterations - 1):
        comb = comb / (comb.sum(-1 if turn % 2 else -2, keepdim=True) + hc_eps)
    return x, 2 * post.sigmoid(), comb


class Streams:
    """Streams and the weights of a hyper-connection."""

    def __init__(self, rng, tokens, m, d, size):
        rows = (2 + m) * m
        self.h = torch_of(rng.standard_normal((tokens, m, d)) * size)
        self.fn = torch_of(rng.standard_normal((rows, m, d)) / math.sqrt(m * d))
        self.base, self.scale = (
            torch_of(rng.standard_normal(rows)),
            torch_of(rng.standard_normal(3)),
        )
        self.y = torch_of(rng.standard_normal((tokens, d)))

    def through(self, kernels, chosen=slice(None)):
        """All that a connection gives, and the head's."""
        h, m = self.h[chosen].contiguous(), self.h.shape[1]
        parts = kernels.hyper_in.results(h, self.fn, self.base, self.scale, 1e-6, 20, 1e-6)
        head = self.fn[:m].contiguous(), self.base[:m].contiguous(), self.scale[:1].contiguous()
        out = kernels.hyper_out(self.y[chosen].contiguous(), h, *parts[1:])
        return *parts, out, kernels.hyper_head(h, *head, 1e-6, 1e-6)


@quick
@given(
    st.integers(0, 5), one_of(1, 2, 4, 5), one_of(1, 15, 64, 300), one_of(1e-3, 1.0, 50.0),
    one_of(1, 2, 20), one_of(1e-6, 1e-2), seeds,
)  # fmt: skip
def test_hyper_connection(kernels, tokens, m, d, size, iterations, eps, seed):
    case = Streams(np.random.default_rng(seed), tokens, m, d, size)
    weights = case.fn, case.base, case.scale
    got = kernels.hyper_in.results(case.h, *weights, eps, iterations, eps)
    want = hyper_in(case.h, *weights, eps, iterations, eps)
    near = {"rtol": 2e-5, "atol": 2e-5 * size}
    for part, exact in zip(got, want, strict=True):
        torch.testing.assert_close(part.double(), exact, **near)
    _, post, comb = got
    out = kernels.hyper_out(case.y, case.h, post, comb).double()
    mixed = torch.einsum("tjk,tjd->tkd", comb.double(), case.h.double())
    exact = post.double()[..., None] * case.y.double()[:, None] + mixed
    torch.testing.assert_close(out, exact, **near)
    head = case.fn[:m].contiguous(), case.base[:m].contiguous(), case.scale[:1].contiguous()
    collapsed = kernels.hyper_head(case.h, *head, eps, eps).double()
    torch.testing.assert_close(collapsed, hyper_in(case.h, *head, eps, 1, eps), **near)


@quick
@given(st.integers(0, 4), one_of(1, 8, 128), one_of(1, 16, 70), one_of(0.5, 60.0), seeds)
def test_compress(kernels, windows, rows, width, spread, seed):
    """Rows whose gates are -infinity may hold anything."""
    rng = np.random.default_rng(seed)
    kv, gate = torch_of(rng.standard_normal((2, windows, rows, width)))
    bias, norm = torch_of(rng.standard_normal((rows, width))), torch_of(rng.uniform(0.5, 2, width))
    gate *= spread
    masked = torch.from_numpy(rng.random((windows, rows)) < 0.5)
    masked[:, -1] = False
    gate[masked] = -math.inf
    exact = ((gate + bias).double().softmax(1) * kv.double()).sum(1)
    kv[masked] = math.nan
    got = kernels.compress(kv, gate, bias, norm, 1e-6)
    # float32 sums of exp(), whose arguments it rounds too
    near = {"rtol": 1e-5 * max(1, spread), "atol": 1e-5}
    torch.testing.assert_close(got.double(), unit(exact, 1e-6) * norm, **near)


def test_streams_show_nan(kernels):
    case = Streams(np.random.default_rng(3), 3, 4, 40, 1.0)
    case.h[1, 2, 3] = math.nan
    for part in case.through(kernels):
        assert part[1].isnan().any()
        assert part[[0, 2]].isfinite().all()
    kv, gate = torch.randn(2, 1, 8, 20)
    gate[0, 5, 7] = math.nan
    lost = kernels.compress(kv, gate, torch.zeros(8, 20), torch.ones(20), 1e-6)
    assert lost.isnan().all()


def test_streams_refuse(kernels):
    case = Streams(np.random.default_rng(4), 2, 4, 40, 1.0)
    good = [case.h, case.fn, case.base, case.scale, 1e-6, 20, 1e-6]
    kernels.hyper_in.results(*good)
    bad = [(1, case.fn[:23].contiguous()), (1, case.fn.flatten(1)), (2, case.base[:23])]
    bad += [(3, case.scale[:1]), (0, case.h[:, :3].contiguous()), (0, case.h.double()), (5, 0)]
    for place, value in bad:
        with pytest.raises(ValueError, match=r"expected|refused"):
            kernels.hyper_in.results(*good[:place], value, *good[place + 1 :])
    short = case.fn[:23].contiguous(), case.base[:23]
    with pytest.raises(ValueError, match="refused"):
        kernels.hyper_in.results(case.h, *short, *good[3:])

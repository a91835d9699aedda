"""Attention of several tokens over the latent cache on a GPU, in small shapes, against float64.

Without a CUDA device the kernels are interpreted.
"""

from itertools import product

import pytest
import torch

from slotmoe.quant.backends import pick_backend
from slotmoe.quant.codecs.weight import dequantize
from tests.quant.test_triton import DEVICE, attention, error, make_weight, nth_interpreted, randn

pytestmark = pytest.mark.usefixtures("interpreter")

interpreter = pytest.importorskip(
    "triton.runtime.interpreter", reason="needs Triton, which is for Linux"
)
R, W, SCALE = 40, 48, 0.2  # neither a power of two


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def triton_ops():
    return pick_backend(DEVICE, "triton")


def cached(S, W=W):
    """Rows of S positions, and behind them poison."""
    rows_SW = torch.full((S + 40, W), torch.nan, dtype=torch.float16, device=DEVICE)
    rows_SW[:S] = randn(S, W)
    return rows_SW[:S]


def rounding(exact):
    """The error of what could not be better, as outputs are bfloat16."""
    return error(exact.bfloat16(), exact)


# Tiles have 32 rows of queries, of T * H, and 32 positions; programs share from 256 positions on.
SIZES = [(2, 2, 1), (17, 17, 5), (2, 33, 4), (70, 200, 3), (17, 300, 2), (2, 1001, 4), (64, 65, 3)]
SIZES += [(33, 520, 5), (300, 512, 1), (5, 5000, 16)]


@pytest.mark.parametrize(("T", "S", "H"), nth_interpreted(2, SIZES))
def test_several_tokens_attend_to_what_is_before_them(triton_ops, T, S, H):
    q_THW, rows_SW = randn(T, H, W) * 3, cached(S)
    found, exact = triton_ops.mla(q_THW, rows_SW, R, SCALE), attention(q_THW, rows_SW, R, SCALE)
    assert found.shape == (T, H, R) and found.dtype == torch.bfloat16
    # The weights' 11 bits are an eighth of what rounding adds.
    assert error(found, exact) <= 1.1 * rounding(exact)
    each = ((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max().item()
    assert each <= 2 * 2**-9  # also of the first and last token and head


def test_bits_depend_on_the_token_and_on_how_many_there_are(triton_ops):
    """Not on other tokens, later rows, other calls before, or which program finishes last."""
    T, S, H = 6, 700, 5
    q_THW, rows_SW = randn(T, H, W), cached(S)
    found = triton_ops.mla(q_THW, rows_SW, R, SCALE)
    others = randn(T, H, W)
    others[3] = q_THW[3]
    later_SW = rows_SW.clone()
    later_SW[-2:] = randn(2, W)
    assert torch.equal(triton_ops.mla(others, later_SW, R, SCALE)[3], found[3])
    assert not triton_ops._finished.any()
    for _ in range(3):  # the interpreter's programs run in any order
        assert torch.equal(triton_ops.mla(q_THW, rows_SW, R, SCALE), found)


KINDS = ["int8", torch.bfloat16, torch.float32]


@pytest.mark.parametrize(("T", "kind", "head"), nth_interpreted(5, product(
    [2, 16, 70], KINDS, [(24, 37), (70, 64)]
)))  # fmt: skip
def test_products_with_kv_b_are_no_worse_than_bfloat16(triton_ops, T, kind, head):
    """The queries are columns of a wider tensor."""
    H, (N, V) = 3, head
    weight = make_weight(kind, H * (N + V), R, wild=False)
    exact_HXR = dequantize(weight).double().view(H, N + V, R)
    q_THN, o_THR = randn(T, H, N + 8)[..., :N], randn(T, H, R)
    plain_HXR = exact_HXR.to(torch.bfloat16)
    values = o_THR, "thr,hvr->thv", slice(N, None)
    for found, (x, equation, part) in (
        (triton_ops.absorb_query(q_THN, weight), (q_THN, "thn,hnr->thr", slice(N))),
        (triton_ops.absorb_value(o_THR, weight, N), values),
        (triton_ops.absorb_value(o_THR.bfloat16(), weight, N), values),
    ):
        exact = torch.einsum(equation, x.double(), exact_HXR[:, part])
        rounded = torch.einsum(equation, x.bfloat16().double(), plain_HXR[:, part].double())
        assert found.dtype == torch.float32 and error(found, exact) <= 1.1 * error(rounded, exact)

"""One table of a GPU's operations but experts', some of them also of the native kernels, in small
shapes, beside plain torch in float64; and each row has the same bits alone and among others, where
the operation says so.

Where there is no CUDA device the Triton kernels run on the CPU under Triton's interpreter.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import pytest
import torch

from slotmoe.model.layers import route
from slotmoe.network.layer_types import HyperGeometry, ListedRows, Mixed, Mixing, Mlp, Router
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import INT4, LUT3, LUT4, MXFP4, NF4
from slotmoe.quant.codecs.weight import Int8Weight, dequantize, int8_by_torch, map_tensors
from tests.support.codes import random_codes
from tests.support.kernels import needs_native
from tests.support.oracle import relative
from tests.support.params import nth

pytestmark = pytest.mark.usefixtures("interpreter")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN, FEW = TorchBackend(), 8
ROUNDING = 2**-9  # of bfloat16


def nth_interpreted(step, parameters):
    """As ``nth`` where kernels are interpreted, which takes long; on a GPU all."""
    return nth(step if DEVICE.type == "cpu" else 1, parameters)


def randn(*shape):
    return torch.randn(shape, device=DEVICE)


_MLP = (48, 70), (48, 70), (70, 48)
CODECS = {codec.name: codec for codec in (NF4, LUT4, LUT3, INT4, MXFP4)}


def make_weight(kind, N, K):
    """A [N, K] matrix of a kind."""
    rng = np.random.default_rng(0)
    if kind in CODECS:
        weight = random_codes(rng, CODECS[kind], N, K, 4 * K**-0.5)[0]
        return map_tensors(weight, lambda tensor: tensor.to(DEVICE))
    w_NK = torch.from_numpy(rng.standard_normal((N, K), dtype=np.float32)) * K**-0.5
    if kind == "int8":
        return map_tensors(Int8Weight(*int8_by_torch(w_NK)), lambda tensor: tensor.to(DEVICE))
    return w_NK.to(kind).to(DEVICE)


class Case(NamedTuple):
    """``run(ops, rows)`` gives results of some rows, a slice; ``exact`` are those of all, in
    float64, from which they are at most ``bound`` away; ``alone``: with the bits of any rows."""

    run: object
    exact: tuple
    bound: float
    alone: bool = True


def linear(kind, T, N, K):
    weight, x_TK = make_weight(kind, N, K), randn(T, K)
    exact = x_TK.double() @ dequantize(weight).double().T
    plain = relative(TorchBackend(torch.bfloat16).linear(x_TK, weight), exact)
    bound = 1e-6 if T <= FEW else 1.1 * plain
    return Case(lambda ops, rows: (ops.linear(x_TK[rows], weight),), (exact,), bound, T <= FEW)


def grouped(T):
    weight, x_TGK = make_weight("int8", 60, 70), randn(T, 3, 70)
    exact = torch.einsum(
        "tgk,gok->tgo", x_TGK.double(), dequantize(weight).double().view(3, 20, 70)
    )
    bound = 1e-6 if T <= FEW else 2 * ROUNDING
    return Case(lambda ops, rows: (ops.grouped_linear(x_TGK[rows], weight),), (exact,), bound)


def gated(T):
    """An MLP whose output has a gate."""
    weights, gate, x_TD = [make_weight("nf4", *shape) for shape in _MLP], randn(1, 70), randn(T, 70)
    gate_proj, up_proj, down_proj = (dequantize(weight).double() for weight in weights)
    x = x_TD.double()
    h_TI = torch.nn.functional.silu(x @ gate_proj.T) * (x @ up_proj.T)
    exact = h_TI @ down_proj.T * (x @ gate.double().T).sigmoid()
    mlp = Mlp(*weights, output_gate=gate)
    return Case(lambda ops, rows: (ops.mlp(x_TD[rows], mlp),), (exact,), 1e-6)


def absorbed(T, kind, N, V):
    """Queries are columns of a wider tensor."""
    H, R = 3, 40
    weight, q_THN, o_THR = make_weight(kind, H * (N + V), R), randn(T, H, N + 8), randn(T, H, R)
    q_THN = q_THN[..., :N]
    heads_HXR = dequantize(weight).double().view(H, N + V, R)
    exact = torch.einsum("thn,hnr->thr", q_THN.double(), heads_HXR[:, :N])
    values = torch.einsum("thr,hvr->thv", o_THR.double(), heads_HXR[:, N:])

    def run(ops, rows):
        return ops.absorb_query(q_THN[rows], weight), ops.absorb_value(o_THR[rows], weight, N)

    return Case(run, (exact, values), 2 * ROUNDING, alone=False)


def attention(T, S, H, size=1.0):
    """Rows behind the last position are poison; queries of any size, and latents that saturate."""
    R, W = 40, 48
    rows_SW = torch.full((S + 40, W), torch.nan, dtype=torch.float16, device=DEVICE)
    rows_SW[:S], q_THW = randn(S, W), randn(T, H, W) * 3
    if size != 1.0:
        q_THW[:, 0], q_THW[:, -1] = q_THW[:, 0] * size, q_THW[:, -1] / size
        q_THW[T // 2, 1] = 0
    scores = torch.einsum("thw,sw->ths", q_THW.double(), rows_SW[:S].double()) * 0.2
    future = torch.arange(S, device=DEVICE) > torch.arange(S - T, S, device=DEVICE)[:, None]
    shares = scores.masked_fill(future[:, None], -torch.inf).softmax(-1)
    exact = torch.einsum("ths,sr->thr", shares, rows_SW[:S, :R].double())

    def run(ops, rows):
        return (ops.mla(q_THW, rows_SW[:S], R, 0.2)[rows],)

    return Case(run, (exact,), 2e-3)


def lists(counts, H, R, P, beyond, sunk):
    """Rows in two stores; what no list names is poison."""
    held, L, T = 200, max(counts) + 3, len(counts)
    lists_TL = torch.full((T, L), -1, dtype=torch.int32, device=DEVICE)
    for list_L, count in zip(lists_TL, counts, strict=True):
        chosen_L = torch.randperm(held + beyond)[:count]
        if beyond and count > 5:
            chosen_L[:2] = torch.tensor([held - 1, held])
        list_L[:count] = chosen_L.sort().values
    both_SW = randn(held + beyond, R + P).half()
    unused = torch.ones(held + beyond, dtype=torch.bool, device=DEVICE)
    unused[lists_TL[lists_TL >= 0].long()] = False
    both_SW[unused] = torch.nan
    q_THW = randn(T, H, R + P) * torch.logspace(-3, 3, T, device=DEVICE)[:, None, None]
    sinks_H, exact = randn(H) * 2 if sunk else None, []
    for q_HW, list_L, count in zip(q_THW.double(), lists_TL, counts, strict=True):
        seen_LW = both_SW.double()[list_L[:count].long()]
        scores_HL = q_HW @ seen_LW.T * 0.2
        if sinks_H is not None:
            scores_HL = torch.cat([scores_HL, sinks_H.double()[:, None]], dim=1)
        exact.append(scores_HL.softmax(dim=1)[:, :count] @ seen_LW[:, :R])
    more_SW = both_SW[held:].clone() if beyond else None

    def run(ops, rows):
        listed = ListedRows(both_SW[:held].clone(), more_SW, lists_TL[rows], sinks_H)
        return (ops.attend(q_THW[rows], listed, R, 0.2),)

    return Case(run, (torch.stack(exact),), 2e-3)


def compressed(B, S, Y):
    both_BS2Y, bias_SY, norm_Y = randn(B, S, 2, Y) * 3, randn(S, Y), torch.rand(Y, device=DEVICE)
    both_BS2Y[0, : S // 2, 1] = -torch.inf  # as before the first row
    exact = PLAIN.compress(both_BS2Y.double(), bias_SY.double(), norm_Y.double(), 1e-3)
    return Case(
        lambda ops, rows: (ops.compress(both_BS2Y[rows], bias_SY, norm_Y, 1e-3),), (exact,), 1e-6
    )


def streams(T, Q, D):
    """Residual streams are mixed, take in what a block gives, and are read by the head."""
    hyper, h_TD, y_TD = HyperGeometry(Q, 20, 1e-6, 1e-4), randn(T, Q * D) * 4, randn(T, D)
    N, size = (2 + Q) * Q, (Q * D) ** -0.5
    mixing = Mixing(randn(N, Q * D) * size, randn(N), 1 + randn(3))
    head = Mixing(randn(Q, Q * D) * size, randn(Q), 1 + randn(1))
    wide, wide_head = (Mixing(*(p.double() for p in vars(m).values())) for m in (mixing, head))
    x, mixed = PLAIN.mix(h_TD.double(), wide, hyper)
    added = PLAIN.add_mixed(y_TD.double(), h_TD.double(), Mixed(*mixed))
    exact = x, *mixed, added, PLAIN.collapse(h_TD.double(), wide_head, hyper)

    def run(ops, rows):
        x, mixed = ops.mix(h_TD[rows], mixing, hyper)
        added = ops.add_mixed(y_TD[rows], h_TD[rows], mixed)
        return x, *mixed, added, ops.collapse(h_TD[rows], head, hyper)

    return Case(run, exact, 1e-5)


def gate(scoring, groups, group_best, biased, normalized, given):
    router = Router(*groups, 3, 1.5, normalized, group_best, scoring)
    logits_TE, bias_E = randn(7, 20) * 4, randn(20) if biased else None
    logits_TE[0] -= 30  # small scores are as exact as large ones
    chosen_TK = torch.stack([torch.randperm(20)[:3] for _ in range(7)]).to(DEVICE)
    exact = route(logits_TE.double(), router, bias_E, chosen_TK if given else None)

    def run(ops, rows):
        return ops.route(logits_TE[rows], router, bias_E, chosen_TK[rows] if given else None)

    return Case(run, exact, 1e-6)


KINDS = ["int8", *CODECS, torch.bfloat16, torch.float32]
SHAPES, BOTH = [(16, 64), (37, 130), (70, 576)], [False, True]
SCORINGS = ["softmax", "sigmoid", "sqrtsoftplus"]
LISTS = [([7, 300, 130, 128], 17, 37, 2, 150), ([257], 3, 512, 0, 90), ([1], 4, 40, 8, 0)]
LISTS += [([33] * 16 + [140], 2, 16, 64, 0)]
# Tiles have 32 rows of queries, of T * H, and 32 positions; programs share from 256 positions on.
SIZES = [(1, 1, 4), (1, 33, 17), (1, 2100, 2), (2, 2, 2), (17, 17, 5), (2, 33, 4), (17, 300, 2)]
SIZES += [(33, 520, 5), (300, 512, 2), (5, 5000, 16), (9, 300, 4, 1e6), (1, 50, 4, 1e6)]
ROUTERS = product(SCORINGS, [(1, 1), (5, 2)], [1, 2], BOTH, BOTH, BOTH)
CASES = [(linear, (kind, T, *shape)) for T, shape, kind in product((1, 2, 16, 67), SHAPES, KINDS)]
CASES += product([absorbed], product((2, 16, 70), KINDS[::6], (24, 70), (37, 64)))
CASES += [*product([attention], SIZES), *product([gate], ROUTERS)]
OTHERS = [(lists, (*which, sunk)) for which, sunk in product(LISTS, BOTH)]
OTHERS += product([streams], [(1, 4, 300), (9, 3, 21), (3, 2, 1030), (2, 1, 16)])
OTHERS += product([compressed], [(1, 8, 512), (3, 5, 33), (2, 128, 40)])
OTHERS += product([grouped, gated], [(1,), (3,)])


@pytest.fixture(scope="module")
def ops():
    pytest.importorskip("triton", reason="needs Triton, which is for Linux")
    return pick_backend(DEVICE, "triton")


def check(ops, case):
    every = slice(0, len(case.exact[0]))
    results = case.run(ops, every)
    for found, exact in zip(results, case.exact, strict=True):
        assert found.shape == exact.shape
        if found.is_floating_point():
            assert relative(found, exact) <= case.bound
        else:
            assert found.dtype == exact.dtype and torch.equal(found, exact)
    if DEVICE.type == "cuda" or not case.alone:  # whichever program finishes last
        assert all(map(torch.equal, results, case.run(ops, every)))
    if case.alone:
        last = case.run(ops, slice(len(results[0]) - 1, len(results[0])))
        assert all(torch.equal(part, whole[-1:]) for part, whole in zip(last, results, strict=True))


@pytest.mark.parametrize(
    ("make", "how"),
    [*nth_interpreted(7, CASES), *nth_interpreted(2, OTHERS)],
    ids=lambda it: getattr(it, "__name__", str(it)),
)
def test_an_operation_beside_float64(ops, make, how):
    torch.manual_seed(0)
    check(ops, make(*how))
    assert not ops._finished.any()


@needs_native
@pytest.mark.skipif(DEVICE.type != "cpu", reason="the table is on the GPU")
@pytest.mark.parametrize("make", [gate, streams, compressed, gated])
def test_a_native_operation_beside_float64(kernels, make):
    for each, how in [*CASES, *OTHERS]:
        if each is make:
            torch.manual_seed(0)
            bound = 0.02 if make is gated else 1e-5  # activations of 8 bits
            check(NativeBackend(kernels), make(*how)._replace(bound=bound))


@pytest.mark.parametrize(("T", "S", "J", "A"), [(1, 70, 5, 24), (3, 129, 64, 128), (17, 530, 2, 8)])
def test_an_indexer_chooses_the_best_keys_and_the_first_of_equals(ops, monkeypatch, T, S, J, A):
    """Small whole numbers multiply exactly, and many scores are equal."""
    torch.manual_seed(0)
    q_TJA, weights_TJ = torch.randint(-2, 3, (T, J, A)), torch.randint(-1, 3, (T, J))
    q_TJA, weights_TJ, keys_SA = q_TJA.float(), weights_TJ.float(), torch.randint(-1, 2, (S, A))
    counts_T = torch.randint(S // 2, S + 1, (T,), dtype=torch.int32)
    counts_T[1:2] = 0
    scores_TS = (weights_TJ[:, None] @ (q_TJA @ keys_SA.float().T).relu())[:, 0]
    given = [x.to(DEVICE) for x in (q_TJA, weights_TJ, keys_SA.half(), counts_T)]
    given[2][int(counts_T.max()) :] = torch.nan
    monkeypatch.setattr("slotmoe.quant.backends.triton._SCORES", 2 * S + 1)
    for k in (16, S // 2 + 3, S + 7) if S < 200 else (30,):
        lists_TK = ops.index(*given, k)
        assert lists_TK.shape == (T, k) and lists_TK.dtype == torch.int32
        for list_K, scores_S, count in zip(lists_TK.tolist(), scores_TS, counts_T, strict=True):
            order = scores_S[:count].sort(descending=True, stable=True).indices
            best = sorted(order[:k].tolist())
            assert list_K == best + [-1] * (k - len(best))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_gate_takes_the_first_of_equals_and_of_no_numbers_still_names_experts(ops):
    logits_TE = torch.zeros(1, 20, device=DEVICE)
    weights_TK, indices_TK = ops.route(logits_TE, Router(5, 2, 3), None, None)
    assert indices_TK.tolist() == [[0, 1, 2]]
    assert relative(weights_TK, torch.full((1, 3), 0.05)) < 1e-6
    logits_TE.fill_(torch.nan)
    _, indices_TK = ops.route(logits_TE, Router(1, 1, 3), logits_TE[0], None)
    assert int(indices_TK.min()) >= 0 and int(indices_TK.max()) < 20

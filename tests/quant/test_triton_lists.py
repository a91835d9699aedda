"""What a GPU computes of DeepSeek-V3.2's and V4's attention, in small shapes: each op against plain
torch, in float64 where it may.

Where there is no CUDA device the Triton kernels run on the CPU under Triton's interpreter.
"""

from itertools import product

import pytest
import torch

from slotmoe.border import HyperGeometry, ListedRows, Mixed, Mixing, Router
from slotmoe.model.layers import route
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.codecs.weight import Int8Weight, int8_by_torch
from tests.quant.test_triton import DEVICE, error, nth_interpreted, randn

pytestmark = pytest.mark.usefixtures("interpreter")
PLAIN = TorchBackend()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def ops():
    return pick_backend(DEVICE, "triton")


def lists_of(counts, L, held, beyond):
    """Of each token so many rows of two stores, in order, -1 behind the last; long lists have the
    rows where the stores meet."""
    lists_TL = torch.full((len(counts), L), -1, dtype=torch.int32)
    for list_L, count in zip(lists_TL, counts, strict=True):
        chosen_L = torch.randperm(held + beyond)[:count]
        if beyond and count > 5:
            chosen_L[:2] = torch.tensor([held - 1, held])
        list_L[:count] = chosen_L.sort().values
    return lists_TL.to(DEVICE)


def stores(held, beyond, W, used_TL):
    """Rows of both stores; what no list names is poison."""
    rows_SW = randn(held + beyond, W).half()
    unused = torch.ones(held + beyond, dtype=torch.bool, device=DEVICE)
    unused[used_TL[used_TL >= 0].long()] = False
    rows_SW[unused] = torch.nan
    return rows_SW[:held].clone(), rows_SW[held:].clone()


# Tokens' counts, heads, R, P, rows of the second store; the second list has several parts.
LISTS = [
    ([1], 4, 40, 8, 0),
    ([7, 300, 130, 128], 17, 37, 2, 150),
    ([257], 3, 512, 0, 90),
    ([33] * 16 + [140], 2, 16, 64, 0),
]


@pytest.mark.parametrize(("counts", "H", "R", "P", "beyond"), nth_interpreted(1, LISTS), ids=str)
@pytest.mark.parametrize("sunk", [False, True])
def test_attention_over_lists(ops, counts, H, R, P, beyond, sunk):
    held, L = 200, max(counts) + 3
    lists_TL = lists_of(counts, L, held, beyond)
    rows_SW, more_SW = stores(held, beyond, R + P, lists_TL)
    q_THW = randn(len(counts), H, R + P) * 3
    q_THW *= torch.logspace(-3, 3, len(counts), device=DEVICE)[:, None, None]
    sinks_H = randn(H) * 2 if sunk else None
    listed = ListedRows(rows_SW, more_SW if beyond else None, lists_TL, sinks_H)
    y_THR = ops.attend(q_THW, listed, R, 0.2)
    assert y_THR.shape == (len(counts), H, R) and y_THR.dtype == torch.float32
    both_SW = torch.cat([rows_SW, more_SW]).double()
    for y_HR, q_HW, list_L, count in zip(y_THR, q_THW.double(), lists_TL, counts, strict=True):
        seen_LW = both_SW[list_L[:count].long()]
        scores_HL = q_HW @ seen_LW.T * 0.2
        if sinks_H is not None:
            scores_HL = torch.cat([scores_HL, sinks_H.double()[:, None]], dim=1)
        exact_HR = scores_HL.softmax(dim=1)[:, :count] @ seen_LW[:, :R]
        assert error(y_HR, exact_HR) < 2e-3


def test_a_tokens_attention_is_the_same_alone_and_among_others(ops):
    """With one program for all parts of a list or several, and however long others' lists are."""
    counts = [300, 5, 129, *[200] * 14]
    lists_TL, sinks_H = lists_of(counts, 310, 100, 250), randn(20)
    rows_SW, more_SW = stores(100, 250, 48, lists_TL)
    q_THW = randn(17, 20, 48)
    listed = ListedRows(rows_SW, more_SW, lists_TL, sinks_H)
    whole_THR = ops.attend(q_THW, listed, 40, 0.2)
    for t in range(4):
        alone = listed._replace(lists_TL=lists_TL[t : t + 1, : counts[t]])
        assert torch.equal(ops.attend(q_THW[t : t + 1], alone, 40, 0.2)[0], whole_THR[t])
    some_THR = ops.attend(q_THW[1:4], listed._replace(lists_TL=lists_TL[1:4]), 40, 0.2)
    assert torch.equal(some_THR, whole_THR[1:4])


@pytest.mark.parametrize(("T", "S", "J", "A"), [(1, 70, 5, 24), (3, 129, 64, 128), (17, 530, 2, 8)])
def test_an_indexer_chooses_the_best_keys_and_the_first_of_equals(ops, monkeypatch, T, S, J, A):
    """Small whole numbers multiply exactly, and many scores are equal."""
    q_TJA, weights_TJ = (
        torch.randint(-2, 3, (T, J, A)).float(),
        torch.randint(-1, 3, (T, J)).float(),
    )
    keys_SA = torch.randint(-1, 2, (S, A)).half()
    counts_T = torch.randint(S // 2, S + 1, (T,), dtype=torch.int32)
    counts_T[1:2] = 0
    scores_TS = (weights_TJ[:, None] @ (q_TJA @ keys_SA.float().T).relu())[:, 0]
    given = [x.to(DEVICE) for x in (q_TJA, weights_TJ, keys_SA, counts_T)]
    given[2][int(counts_T.max()) :] = torch.nan
    monkeypatch.setattr("slotmoe.quant.backends.triton._SCORES", 2 * S + 1)
    for k in (16, S // 2 + 3, S + 7) if S < 200 else (30,):
        lists_TK = ops.index(*given, k)
        assert lists_TK.shape == (T, k) and lists_TK.dtype == torch.int32
        for list_K, scores_S, count in zip(lists_TK.tolist(), scores_TS, counts_T, strict=True):
            order = scores_S[:count].sort(descending=True, stable=True).indices
            best = sorted(order[:k].tolist())
            assert list_K == best + [-1] * (k - len(best))


def scores(ops, q_TJA, weights_TJ, keys_SA, monkeypatch):
    """What an indexer's choice is made of."""
    found, counts_T = [], torch.full((len(q_TJA),), len(keys_SA), dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(
        "slotmoe.quant.backends.triton.first_best",
        lambda scores_TS, k: found.append(scores_TS) or counts_T[:, None],
    )
    ops.index(q_TJA, weights_TJ, keys_SA, counts_T, 4)
    return torch.cat(found)


def test_an_indexers_scores_bear_queries_of_any_size_and_are_the_same_among_others(
    ops, monkeypatch
):
    q_TJA, weights_TJ, keys_SA = randn(18, 7, 40), randn(18, 7), randn(150, 40).half()
    q_TJA *= torch.logspace(-6, 6, 18, device=DEVICE)[:, None, None]
    found_TS = scores(ops, q_TJA, weights_TJ, keys_SA, monkeypatch)
    products_TJS = (q_TJA.double() @ keys_SA.double().T).relu()
    exact_TS = (weights_TJ.double()[:, None] @ products_TJS)[:, 0]
    for found_S, exact_S in zip(found_TS, exact_TS, strict=True):
        assert error(found_S, exact_S) < 2e-3
    some_TS = scores(ops, q_TJA[3:5], weights_TJ[3:5], keys_SA[:100], monkeypatch)
    assert torch.equal(some_TS, found_TS[3:5, :100])


@pytest.mark.parametrize(("B", "S", "Y"), [(1, 8, 512), (3, 5, 33), (2, 128, 40)])
def test_compressed_rows(ops, B, S, Y):
    both_BS2Y = randn(B, S, 2, Y) * 3
    both_BS2Y[0, : S // 2, 1] = -torch.inf  # as before the first row
    given = both_BS2Y, randn(S, Y), torch.rand(Y, device=DEVICE)
    y_BY = ops.compress(*given, 1e-3)
    assert error(y_BY, PLAIN.compress(*(x.double() for x in given), 1e-3)) < 1e-6
    assert torch.equal(ops.compress(both_BS2Y[-1:], *given[1:], 1e-3), y_BY[-1:])


def mixing_of(Q, D, head):
    N = Q if head else (2 + Q) * Q
    return Mixing(randn(N, Q * D) * (Q * D) ** -0.5, randn(N), 1 + randn(1 if head else 3))


def in_float64(mixing):
    return Mixing(mixing.fn.double(), mixing.base.double(), mixing.scale.double())


STREAMS = [(1, 4, 300), (6, 3, 21), (9, 2, 1030), (2, 1, 16)]


@pytest.mark.parametrize(("T", "Q", "D"), STREAMS)
def test_residual_streams_are_mixed_and_take_in_what_a_block_gives(ops, T, Q, D):
    """The count of the programs that have finished is as it was."""
    hyper, mixing = HyperGeometry(Q, 20, 1e-6, 1e-4), mixing_of(Q, D, head=False)
    h_TD, y_TD = randn(T, Q * D) * 4, randn(T, D)
    for _ in range(2):
        x_TD, mixed = ops.mix(h_TD, mixing, hyper)
        exact = PLAIN.mix(h_TD.double(), in_float64(mixing), hyper)
        exact_TD, exact_mixed = exact
        assert error(x_TD, exact_TD) < 1e-6
        for part, expected in zip(mixed, exact_mixed, strict=True):
            assert part.shape == expected.shape and error(part, expected) < 1e-5
        added_TD = ops.add_mixed(y_TD, h_TD, mixed)
        exact_mixed = Mixed(*(part.double() for part in mixed))
        expected = PLAIN.add_mixed(y_TD.double(), h_TD.double(), exact_mixed)
        assert error(added_TD, expected) < 1e-6
        alone_1D, of_one = ops.mix(h_TD[-1:], mixing, hyper)
        assert torch.equal(alone_1D, x_TD[-1:])
        assert all(torch.equal(part, all_[-1:]) for part, all_ in zip(of_one, mixed, strict=True))
        assert torch.equal(ops.add_mixed(y_TD[-1:], h_TD[-1:], of_one), added_TD[-1:])
        h_TD = h_TD * -0.5


@pytest.mark.parametrize(("T", "Q", "D"), STREAMS)
def test_the_head_reads_all_residual_streams(ops, T, Q, D):
    hyper, mixing = HyperGeometry(Q, 20, 1e-6, 1e-4), mixing_of(Q, D, head=True)
    h_TD = randn(T, Q * D)
    x_TD = ops.collapse(h_TD, mixing, hyper)
    exact_TD = PLAIN.collapse(h_TD.double(), in_float64(mixing), hyper)
    assert x_TD.shape == (T, D) and error(x_TD, exact_TD) < 1e-6
    assert torch.equal(ops.collapse(h_TD[-1:], mixing, hyper), x_TD[-1:])


ROUTERS = product(
    ["softmax", "sigmoid", "sqrtsoftplus"], [(1, 1), (5, 2)], [1, 2], *[[False, True]] * 3
)


@pytest.mark.parametrize(
    ("scoring", "groups", "group_best", "biased", "normalized", "given"),
    nth_interpreted(5, ROUTERS),
    ids=str,
)
def test_gates(ops, scoring, groups, group_best, biased, normalized, given):
    router = Router(*groups, 3, 1.5, normalized, group_best, scoring)
    logits_TE, bias_E = randn(7, 20) * 4, randn(20) if biased else None
    logits_TE[0] -= 30  # small scores are as exact as large ones
    if scoring == "sqrtsoftplus":  # others have a largest score
        logits_TE[1] += 30
    chosen_TK = torch.stack([torch.randperm(20)[:3] for _ in range(7)]) if given else None
    chosen_TK = None if chosen_TK is None else chosen_TK.to(DEVICE)
    weights_TK, indices_TK = ops.route(logits_TE, router, bias_E, chosen_TK)
    expected_TK, expected = route(logits_TE.double(), router, bias_E, chosen_TK)
    assert indices_TK.dtype == torch.int64 and torch.equal(indices_TK, expected)
    for row_K, expected_K in zip(weights_TK, expected_TK, strict=True):
        assert error(row_K, expected_K) < 1e-6


@pytest.mark.parametrize("T", [1, 3])
def test_groups_are_multiplied_by_their_own_rows(ops, T):
    q_NK, scale_N = int8_by_torch(torch.randn(3 * 20, 70))
    x_TGK = randn(T, 3, 70)
    weight = Int8Weight(q_NK.to(DEVICE), scale_N.to(DEVICE))
    y_TGO = ops.grouped_linear(x_TGK, weight)
    exact_TGO = torch.einsum(
        "tgk,gok->tgo", x_TGK.double(), weight.dequantize().double().view(3, 20, 70)
    )
    assert y_TGO.shape == (T, 3, 20)
    reference = error(TorchBackend(torch.bfloat16).grouped_linear(x_TGK, weight), exact_TGO)
    assert error(y_TGO, exact_TGO) <= (1e-6 if T == 1 else 1.1 * reference)

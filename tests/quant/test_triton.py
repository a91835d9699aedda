"""What a GPU computes, in small shapes: every op against plain torch, and against what its contract
promises.

Where there is no CUDA device the Triton kernels run on the CPU under Triton's interpreter.
"""

import importlib
from itertools import product

import numpy as np
import pytest
import torch

from slotmoe.model.layers import Router
from slotmoe.network.layer_types import Mlp, Pending
from slotmoe.network.shapes import SWIGLU, Activation
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import Records, TorchBackend
from slotmoe.quant.codecs.codec import EXPERT_CODECS, MXFP4, TILE, TRITON_KINDS, ExpertCodecs
from slotmoe.quant.codecs.weight import dequantize
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from tests.quant.test_ops import DEVICE, make_weight, nth_interpreted, randn
from tests.support.codes import random_codes
from tests.support.kernels import CLAMPED
from tests.support.oracle import relative
from tests.support.slab import NF4S, write_record

pytestmark = pytest.mark.usefixtures("interpreter")

pytest.importorskip("triton", reason="needs Triton, which is for Linux")
launch = importlib.import_module("slotmoe.quant.backends.triton_few")


def make_records(S, D, width, codecs=NF4S, biases=False):
    """Random records, of NaN where there are no bytes."""
    layout, rng = RecordLayout(D, width, codecs, biases), np.random.default_rng(0)
    slab = torch.full((S, layout.record_bytes), 0xFF, dtype=torch.uint8)
    for record in slab:
        for name in PROJECTIONS:
            weight, _ = random_codes(rng, codecs.of(name), *layout.shapes[name], 4 * D**-0.5)
            write_record(record, layout, name, weight.codes, weight.scales)
        for bias in layout.biases(record) or ():
            bias.copy_(torch.randn(bias.shape))
    return Records(slab.to(DEVICE), layout, layout.levels().to(DEVICE))


def mlp_in_float64(x_TD, gate, up, down, limit=torch.inf):
    gate, up, down = (dequantize(weight).double() for weight in (gate, up, down))
    x_TD = x_TD.double()
    gate_TI, up_TI = (x_TD @ gate.T).clamp(max=limit), (x_TD @ up.T).clamp(-limit, limit)
    return (torch.nn.functional.silu(gate_TI) * up_TI) @ down.T


def expert_of(records, slot, x_TD, limit=torch.inf):
    """One expert in float64, from dequantized weights."""
    mlp = records.mlp(slot)
    return mlp_in_float64(x_TD, mlp.gate_proj, mlp.up_proj, mlp.down_proj, limit=limit)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "triton"])
def ops(request):
    return TorchBackend() if request.param == "torch" else pick_backend(DEVICE, "triton")


SLOTS = [2, -1, 0, 3, -1, 1]  # of six experts
TOKENS = [1, 4, 9, 80]


def slots_of(*slots):
    return torch.tensor(slots, dtype=torch.int32, device=DEVICE)


def choice(T):
    """Three different experts of six for each token.  All use expert 2, which is more than a tile
    of tokens if these are many; expert 5 has few uses, expert 1 often none."""
    orders = [[5, 2, 3] if t == 3 else [[2, 0, 4], [3, 2, 0], [4, 3, 2]][t % 3] for t in range(T)]
    return torch.tensor(orders, device=DEVICE)


def outputs(ops, x_TD, records, slots_E, indices_TK):
    """What ``experts`` writes into a tensor of -7."""
    y_TKD = torch.full((*indices_TK.shape, x_TD.shape[1]), -7.0, device=DEVICE)
    ops.experts(x_TD, records, slots_E, indices_TK, y_TKD)
    return y_TKD


HAS = TRITON_KINDS.issuperset
CODINGS = {bits: it for bits, it in EXPERT_CODECS.items() if HAS(codec.kind for codec in it)}
CODINGS |= {"kept": ExpertCodecs(MXFP4, MXFP4)}


@pytest.mark.parametrize(("T", "coding"), nth_interpreted(7, product(TOKENS, CODINGS)), ids=str)
def test_experts_are_those_experts_and_leave_the_others(ops, T, coding):
    records, indices_TK = make_records(4, 80, 32, CODINGS[coding]), choice(T)
    x_TD = randn(T, 80)
    y_TKD = outputs(ops, x_TD, records, slots_of(*SLOTS), indices_TK)
    computed = []
    for expert, slot in enumerate(SLOTS):
        uses = (indices_TK == expert).nonzero(as_tuple=True)
        if slot < 0:
            assert bool((y_TKD[uses] == -7).all())
        elif len(uses[0]):
            computed.append(expert)
            # A few tokens are computed in float32.  Else bfloat16 rounds by up to 2**-9 the input
            # and a weight twice, for gate and up, then their product and a weight.
            rounding = 1e-6 if T <= launch.ROWS else 6 * 2**-9
            assert relative(y_TKD[uses], expert_of(records, slot, x_TD[uses[0]])) <= rounding
    assert len(computed) == min(T + 1, 4)


@pytest.mark.parametrize(
    ("T", "how", "biases"), [(2, CLAMPED, True), (9, CLAMPED, False), (2, SWIGLU, True)]
)
def test_kernels_only_multiply_for_other_activations_and_biases(T, how, biases):
    records, x_TD = make_records(4, 32, 16, biases=biases), randn(T, 32)
    given = x_TD, records, slots_of(*SLOTS), choice(T)
    triton_ops, plain = pick_backend(DEVICE, "triton", how), TorchBackend(activation=how)
    rounding = 1e-6 if T <= launch.ROWS else 6 * 2**-9
    assert relative(outputs(triton_ops, *given), outputs(plain, *given)) <= rounding


@pytest.mark.parametrize("T", nth_interpreted(3, TOKENS))
def test_an_experts_output_depends_on_its_token_alone(ops, T):
    """Bitwise the same in several calls, in any order, from other slots; a call without any expert
    changes nothing.  And it is the same among other tokens."""
    records, indices_TK, x_TD = make_records(4, 32, 32), choice(T), randn(T, 32)
    whole = outputs(ops, x_TD, records, slots_of(*SLOTS), indices_TK)
    parts = torch.full_like(whole, -7.0)
    moved = Records(records.slab[[3, 1, 2, 0]], records.layout, records.levels)
    for some in ({3: 0, 5: 1}, {}, {0: 2}, {2: 3}):
        table = slots_of(*(some.get(expert, -1) for expert in range(6)))
        ops.experts(x_TD, moved, table, indices_TK, parts)
    assert torch.equal(whole, parts)
    some = T if T // 2 < launch.ROWS < T else T // 2 + 1  # of the kernels that all go through
    order = torch.randperm(T, device=DEVICE)[:some]
    some = outputs(ops, x_TD[order], records, slots_of(*SLOTS), indices_TK[order])
    # numpy's product, which the interpreter uses, and torch's sum a row differently by where it
    # stands.
    exact = type(ops) is not TorchBackend and (T <= launch.ROWS or DEVICE.type == "cuda")
    assert torch.equal(some, whole[order]) if exact else relative(some, whole[order]) < 1e-6


@pytest.mark.parametrize(("T", "shared"), [(1, "nf4"), (2, "int8")])
def test_a_layer_in_two_launches_is_bitwise_the_layer_in_several(T, shared):
    """All experts, the shared one and the sums together; or experts as they come, the shared one
    with the first of them, their sum, and all that added; and each token alone.  What counts the
    programs of a tile is as it was."""
    D, width, indices_TK = 32, 16, choice(T)
    records, x, h, weights = make_records(4, D, width), randn(T, D), randn(T, D), randn(T, 3).abs()
    matrices = [make_weight(shared, *shape) for shape in ((24, D), (24, D), (D, 24))]
    y_TKD, between, shared_y = (
        torch.empty(T, *shape, device=DEVICE) for shape in ((3, D), (24,), (D,))
    )
    triton_ops = pick_backend(DEVICE, "triton", activation=Activation(0.5))
    few, of_shared = triton_ops.few, launch.Shared.of(Mlp(*matrices))
    few.shared = of_shared
    finished = torch.zeros(T, D // TILE, dtype=torch.int32, device=DEVICE)
    whole, parts, slots_E = torch.empty_like(h), torch.empty_like(h), slots_of(2, 1, 0, 3, 0, 1)

    def at_once(*rows, out):
        x, h, weights, indices, y, *outputs = rows
        routed = launch.Routed(x, records, slots_E, indices, y)
        with_shared = of_shared._replace(outputs=outputs)
        launch.experts(routed, with_shared, launch.Ending(finished, weights, h, out), 0.5)
        return out

    given = x, h, weights, indices_TK, y_TKD, between, shared_y
    at_once(*given, out=whole)
    assert not finished.any()
    for token in range(T):
        rows = [tensor[token : token + 1].clone() for tensor in given]
        assert torch.equal(at_once(*rows, out=torch.empty_like(rows[1]))[0], whole[token])
    for stale in (y_TKD, between, shared_y):
        stale.fill_(torch.nan)
    with_shared = of_shared._replace(outputs=(between, shared_y))
    few.awaited = Pending(0, x, weights, indices_TK), with_shared
    for table in ([-1, -1, 0, -1, -1, -1], [2, 1, -1, 3, 0, 1]):
        triton_ops.experts(x, records, slots_of(*table), indices_TK, y_TKD)
        assert few.awaited[1].outputs is None and not shared_y.isnan().any()
    launch.finish(triton_ops.weighted_sum(y_TKD, weights), shared_y, h, parts)
    assert torch.equal(whole, parts)
    exact = h + mlp_in_float64(x, *matrices, limit=0.5)
    for token, row in enumerate(indices_TK):
        for weight, index in zip(weights[token].double(), row, strict=True):
            exact[token] += (
                weight * expert_of(records, slots_E[index], x[token : token + 1], limit=0.5)[0]
            )
    assert relative(whole, exact) < 1e-6


def test_weighted_sum_goes_in_the_gates_order_and_no_token_has_no_experts(ops):
    y_TKD, weights_TK = randn(3, 6, 80), torch.rand(3, 6, device=DEVICE)
    expected = TorchBackend().weighted_sum(y_TKD, weights_TK)
    assert torch.equal(ops.weighted_sum(y_TKD, weights_TK), expected)
    none_TK = torch.empty(0, 3, dtype=torch.int64, device=DEVICE)
    y_TKD = outputs(ops, randn(0, 64), make_records(4, 64, 32), slots_of(*SLOTS), none_TK)
    assert y_TKD.shape == (0, 3, 64)


@pytest.fixture(scope="module")
def triton_ops():
    return pick_backend(DEVICE, "triton")


@pytest.mark.parametrize("E", nth_interpreted(2, [20, 64]))
def test_norm_logits_and_choice_in_one_launch(triton_ops, E):
    """Whichever program finishes last chooses; the count of them is as it was."""
    x, gain, weight, bias = randn(3, 600), torch.rand(600, device=DEVICE), randn(E, 600), randn(E)
    router = Router(4, 2, 3, 2.0, normalized=True, group_best=2, scoring="sigmoid")
    normed, logits = torch.empty_like(x), torch.empty(3, E, device=DEVICE)
    finished = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    choice = torch.empty(3, 3, device=DEVICE), torch.empty(3, 3, dtype=torch.int64, device=DEVICE)
    for _ in range(2):
        launch.gate(x, (gain, 1e-3), normed, weight, router, bias, logits, finished, choice)
        expected = torch.nn.functional.rms_norm(x.double(), (600,), gain.double(), 1e-3)
        assert relative(normed, expected) < 1e-6
        assert relative(logits, expected @ weight.double().T) < 1e-6
        assert all(map(torch.equal, choice, triton_ops.route(logits, router, bias, None)))
        assert not finished.any()
        x *= -1


@pytest.mark.parametrize("T", [1, 9])
def test_experts_far_into_a_slab_larger_than_2_gib_are_addressed(triton_ops, T):
    """Row times record bytes outgrows 32 bits; the pages between are never touched."""
    small = make_records(1, 64, 32)
    size = small.layout.record_bytes
    slab = torch.empty(2**31 // size + 2, size, dtype=torch.uint8, device=DEVICE)
    slab[-1] = small.slab[0]
    far = Records(slab, small.layout, small.levels)
    x_TD, indices_TK = randn(T, 64), torch.zeros(T, 1, dtype=torch.int64)
    y_TKD = outputs(triton_ops, x_TD, far, slots_of(len(slab) - 1), indices_TK.to(DEVICE))
    assert relative(y_TKD[:, 0], expert_of(small, 0, x_TD)) < (1e-5 if T == 1 else 1e-2)

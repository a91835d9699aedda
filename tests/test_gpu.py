"""What a GPU computes, in small shapes: every op against plain torch, and against what its contract promises.

Where there is no CUDA device the Triton kernels run on the CPU under Triton's interpreter.
"""

import pytest
import torch

from quant import nf4
from quant.export import PROJECTIONS, RecordLayout
from quant.matmul import TorchOps, gate_order_sum, pick_ops

LEVELS = torch.tensor(nf4.LEVELS)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make_slab(S, D, width, seed=0):
    """Random records [S, record_bytes] with scales of both signs, zeros, tiny and large ones; padding bytes are poison."""
    layout, generator = RecordLayout(D, width), torch.Generator().manual_seed(seed)
    slab = torch.full((S, layout.record_bytes), 0xFF, dtype=torch.uint8)  # NaN, read as scales
    for record in slab:
        for name in PROJECTIONS:
            N, K = layout.shapes[name]
            codes, absmax = nf4.quantize(torch.randn(N, K, generator=generator) * K**-0.5)
            absmax *= torch.tensor([1.0, -1.0, 0.0, 1e-4, 8.0]).half()[torch.randint(5, absmax.shape, generator=generator)]
            layout.part(record, f"{name}.weight").copy_(codes)
            layout.part(record, f"{name}.weight.absmax").copy_(absmax)
    return slab.to(DEVICE), layout


def expert_of(slab, slot, layout, x_TD):
    """One expert in float64, from dequantized weights."""
    gate, up, down = (nf4.dequantize(layout.weight(slab[slot], name, LEVELS.to(DEVICE))).double() for name in PROJECTIONS)
    x_TD = x_TD.double()
    return (torch.nn.functional.silu(x_TD @ gate.T) * (x_TD @ up.T)) @ down.T


def error(found, expected):
    """Relative RMS difference."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture(params=["torch", "triton"])
def ops(request):
    return TorchOps() if request.param == "torch" else pick_ops(DEVICE, "triton")


def test_experts_by_slot_are_those_experts_and_leave_the_others(ops):
    slab, layout = make_slab(4, 128, 48)
    x_TD = torch.randn(2, 128, device=DEVICE)
    slots_TK = torch.tensor([[3, -1, 0], [-1, 1, 3]], dtype=torch.int32, device=DEVICE)
    y_TKD = torch.full((2, 3, 128), -7.0, device=DEVICE)
    ops.experts_by_slot(x_TD, slab, slots_TK, layout, LEVELS.to(DEVICE), y_TKD)
    for t, slots in enumerate(slots_TK.tolist()):
        for k, slot in enumerate(slots):
            if slot < 0:
                assert bool((y_TKD[t, k] == -7).all())
            else:
                assert error(y_TKD[t, k], expert_of(slab, slot, layout, x_TD[t : t + 1])[0]) < 2e-3


def test_experts_by_slot_do_not_depend_on_each_other(ops):
    slab, layout = make_slab(3, 64, 32)
    x_TD = torch.randn(1, 64, device=DEVICE)
    whole = torch.empty(1, 3, 64, device=DEVICE)
    ops.experts_by_slot(x_TD, slab, torch.tensor([[0, 2, 1]], dtype=torch.int32, device=DEVICE), layout, LEVELS.to(DEVICE), whole)
    parts = torch.empty(1, 3, 64, device=DEVICE)
    for slots in ([-1, 2, -1], [0, -1, 1]):
        ops.experts_by_slot(x_TD, slab, torch.tensor([slots], dtype=torch.int32, device=DEVICE), layout, LEVELS.to(DEVICE), parts)
    assert torch.equal(whole, parts)


@pytest.mark.parametrize("sizes", [[3, 0, 70, 1], [0, 0], [1]])
def test_grouped_experts_are_those_experts(ops, sizes):
    slab, layout = make_slab(4, 128, 48)
    N = sum(sizes)
    x_TD = torch.randn(40, 128, device=DEVICE)
    tokens_N = torch.randint(40, (N,), device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([2, 0, 3, 1][: len(sizes)], dtype=torch.int32, device=DEVICE)
    y_ND = ops.experts_grouped(x_TD, tokens_N, starts, slots, slab, layout, LEVELS.to(DEVICE))
    assert y_ND.shape == (N, 128) and y_ND.dtype == torch.float32
    for g, (start, size) in enumerate(zip(starts.tolist(), sizes, strict=False)):
        if size:
            expected = expert_of(slab, int(slots[g]), layout, x_TD[tokens_N[start : start + size]])
            assert error(y_ND[start : start + size], expected) < 1e-2


def test_grouped_rows_do_not_depend_on_each_other(ops):
    slab, layout = make_slab(2, 64, 32)
    x_TD, levels = torch.randn(9, 64, device=DEVICE), LEVELS.to(DEVICE)
    tokens_N = torch.tensor([0, 3, 8, 3, 5], device=DEVICE)
    starts = torch.tensor([0, 3, 5], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([1, 0], dtype=torch.int32, device=DEVICE)
    whole = ops.experts_grouped(x_TD, tokens_N, starts, slots, slab, layout, levels)
    second = ops.experts_grouped(x_TD, tokens_N[3:], starts[1:] - 3, slots[1:], slab, layout, levels)
    assert error(second, whole[3:]) < 1e-6 if type(ops) is TorchOps else torch.equal(second, whole[3:])


def test_weighted_sum_goes_in_the_gates_order(ops):
    y_TKD, weights_TK = torch.randn(3, 6, 80, device=DEVICE), torch.rand(3, 6, device=DEVICE)
    assert torch.equal(ops.weighted_sum(y_TKD, weights_TK), gate_order_sum(y_TKD, weights_TK))

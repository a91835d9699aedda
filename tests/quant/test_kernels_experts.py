"""Routed experts of the native kernels against plain numpy in float64."""

import math

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.kernels import (
    alone,
    expert_record,
    needs_native,
    quick,
    random_expert,
    relative,
    seeds,
    silu,
    slab_of,
    through_expert,
    torch_of,
)

pytestmark = needs_native


def expert(x, gate, up, down):
    return (silu(x @ gate.T) * (x @ up.T)) @ down.T


@quick
@given(st.integers(1, 100), st.integers(1, 150), st.integers(1, 5), seeds)
def test_experts(kernels, i, h, k, seed):
    rng = np.random.default_rng(seed)
    experts = [random_expert(rng, h, i) for _ in range(k)]
    x = torch_of(rng.standard_normal((3, h)))
    weights = torch_of(rng.uniform(0.1, 1, k))
    x64 = x.numpy().astype(np.float64)
    outputs = np.stack([expert(x64, *w) for w, _ in experts])  # [k, 3, H]
    for row in range(3):
        records = [r for _, r in experts]
        outs = alone(kernels, x[row], records, i)
        got = kernels.weighted_sum(outs[None], weights[None])[0]
        if min(h, i) >= 16:  # with fewer weights one rounded level is large beside the result
            assert relative(outs, outputs[:, row]) < 0.06
        total = torch.zeros(h)
        for w, out in zip(weights, outs, strict=True):
            total = total + w * out
        assert torch.equal(total, got)
    slab = slab_of([record for _, record in experts])
    slots = torch.from_numpy(rng.integers(-1, k, 7, dtype=np.int32))
    indices = torch.from_numpy(rng.integers(0, 7, (3, 4)))
    y = torch.full((3, 4, h), 7.0)
    kernels.experts_by_slot(x, indices, slab, slots, expert_record(h, i), y)
    for row, entry in np.ndindex(3, 4):
        slot = int(slots[indices[row, entry]])
        want = (
            torch.full((h,), 7.0) if slot < 0 else alone(kernels, x[row], [experts[slot][1]], i)[0]
        )
        assert torch.equal(y[row, entry], want)


def test_expert_error_at_a_real_size(kernels):
    rng = np.random.default_rng(7)
    weights, record = random_expert(rng, 512, 352)
    x = torch_of(rng.standard_normal((4, 512)))
    want = expert(x.numpy().astype(np.float64), *weights)
    # Three quantized matrices: gate, up and down each add an error of at most 1.5%.
    assert relative(through_expert(kernels, x, record, 352), want) < 0.015 * math.sqrt(3)


def test_more_uses_than_one_pass_takes(kernels):
    """Each output is that of a call of its own, wherever the passes of 512 cut an expert's
    tokens."""
    rng = np.random.default_rng(12)
    slab = slab_of([random_expert(rng, 64, 32)[1] for _ in range(3)])
    x, indices = torch_of(rng.standard_normal((400, 64))), rng.integers(0, 3, (400, 3))
    y = torch.full((400, 3, 64), torch.nan)
    slots = torch.tensor([2, 0, 1], dtype=torch.int32)
    kernels.experts_by_slot(x, torch.from_numpy(indices), slab, slots, expert_record(64, 32), y)
    for row, uses in enumerate(slots.numpy()[indices].tolist()):
        assert torch.equal(y[row], alone(kernels, x[row], [slab[slot] for slot in uses], 32))


def test_experts_with_extreme_activations(kernels):
    rng = np.random.default_rng(8)
    _, record = random_expert(rng, 128, 64)
    for scale in (0.0, 1e-42, 1e-20, 1e15):
        y = alone(kernels, torch_of(rng.standard_normal(128) * scale), [record], 64)
        assert y.isfinite().all()
        assert scale or (y == 0).all()
    nothing = torch.empty(1, 0, 128)
    no_choice, slots = nothing[..., 0].long(), torch.zeros(1, dtype=torch.int32)
    values = slab_of([record]), slots, expert_record(128, 64), nothing
    kernels.experts_by_slot(torch.ones(1, 128), no_choice, *values)
    assert not kernels.weighted_sum(torch.empty(1, 0, 128), torch.empty(1, 0)).any()

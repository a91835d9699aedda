"""The native router, and what the decode call refuses.  That it gives the bits of its parts is held
by tests/model/test_network.py."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.border import Router
from slotmoe.quant.kernels.cpu.layers import Decoder
from slotmoe.quant.kernels.cpu.tokens import Tokens
from slotmoe.quant.kernels.cpu.weights import Mlp, bind_router
from slotmoe.quant.shapes import latent_bytes
from tests.support.kernels import (
    RandomLayer,
    any_matrix,
    expert_record,
    one_of,
    quick,
    random_expert,
    seeds,
    slab_of,
    torch_of,
)

SCORES = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": lambda logits: logits.sigmoid(),
    "sqrtsoftplus": lambda logits: torch.logaddexp(logits, torch.zeros(1).double()).sqrt(),
}


@quick
@given(
    st.integers(0, 5),
    one_of((1, 1), (3, 1), (4, 2), (8, 3), (8, 8)),
    st.integers(2, 20),
    st.tuples(st.booleans(), one_of(1, 2), one_of(*SCORES)),
    one_of(None, 0.0, 0.1, 30.0),
    st.data(),
)
def test_route(kernels, t, groups, size, kind, bias, data):
    """The network's own gate is the oracle where no scores are equal; among equals the lower index
    comes first."""
    (count, kept), rng = groups, np.random.default_rng(data.draw(seeds))
    experts, top_k = count * size, data.draw(st.integers(1, kept * size))
    (renormalize, group_best, scoring), width = kind, data.draw(one_of(1, 4, 4000))
    logits = torch_of(np.round(rng.standard_normal((t, experts)) * width))
    logits *= data.draw(one_of(1, 1e-3))
    if bias is not None:
        bias = torch_of(np.round(rng.standard_normal(experts), 1) * bias)
    router = Router(count, kept, top_k, 1.5, renormalize, group_best, scoring)
    weights, indices = kernels.route(bind_router(router), logits, bias)
    scores = SCORES[scoring](logits.double()).float()
    choice = scores if bias is None else scores + bias
    in_groups = choice.view(t, count, size).topk(group_best, -1).values.sum(-1)
    best = in_groups.sort(descending=True, stable=True).indices[:, :kept]
    kept_groups = torch.zeros(t, count, dtype=torch.bool).scatter_(1, best, True)
    mask = kept_groups.repeat_interleave(size, 1)
    order = choice.masked_fill(~mask, -math.inf).sort(descending=True, stable=True).indices
    order = order[:, :top_k]
    want = scores.gather(1, order).double()
    want = want / (want.sum(-1, keepdim=True) + 1e-20) if renormalize else want
    torch.testing.assert_close(weights, (want * 1.5).float(), rtol=1e-6, atol=1e-30)
    assert torch.equal(indices, order)
    given_weights, kept = kernels.route(bind_router(router), logits, bias, order.flip(1))
    assert torch.equal(kept, order.flip(1))
    torch.testing.assert_close(given_weights, weights.flip(1), rtol=1e-6, atol=1e-30)


def test_route_of_what_is_not_finite(kernels):
    logits = torch.randn(3, 12)
    logits[0, 7], logits[1, 0] = float("nan"), float("inf")
    routers = Router(1, 1, 5), Router(4, 2, 5, 1.0, True), Router(4, 2, 5, 1.0, True, 2, "sigmoid")
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0] * 2)
    for router in routers:
        weights, indices = kernels.route(bind_router(router), logits)
        assert router.scoring == "sigmoid" or weights[:2].isnan().all()
        assert weights[2].isfinite().all()
        biased = kernels.route(bind_router(router), logits, bias)[1]
        for row in (*indices.tolist(), *biased.tolist()):
            assert len(set(row)) == 5 and min(row) >= 0 and max(row) < 12
    shapes = (5, 1, 2), (4, 5, 2), (1, 1, 13), (4, 1, 4)
    for bad in (*(Router(*shape) for shape in shapes), Router(12, 3, 2, group_best=2)):
        with pytest.raises(ValueError, match="refused"):
            kernels.route(bind_router(bad), logits)
    for expert in (-1, 12):
        with pytest.raises(ValueError, match="refused"):
            kernels.route(bind_router(Router(1, 1, 1)), logits, None, torch.full((3, 1), expert))


def test_decode_refuses(kernels):
    rng = np.random.default_rng(17)

    def attention(kinds, *sizes):
        return RandomLayer(kernels, rng, kinds, sizes[0], 3, 8, 4, 20, 6, 0, sizes[1]).layer()

    shapes = (32, 64), (32, 64), (64, 32)
    mlp = Mlp(*(any_matrix(kernels, rng, "nf4", *shape) for shape in shapes))
    made = [attention(["int8", "nf4"], 64, experts) for experts in (6, 0, 6)]
    geometry, layers = made[0][0]._replace(router=Router(2, 1, 2)), [layer for _, layer in made]
    mlps = [mlp] * len(layers)
    slab = slab_of([random_expert(rng, 64, 32)[1] for _ in range(6)])
    slots = torch.arange(6, dtype=torch.int32).repeat(2, 1)
    a, b = torch.full((2, 3, 90, latent_bytes(20, 4)), 0xFF, dtype=torch.uint8)
    a[:, :3] = 0
    h, table = torch.randn(2, 64), torch.ones(2, 2, dtype=torch.complex64)
    good = {"decoder": Decoder(geometry, layers, mlps), "first": 0, "h": h}
    good |= {"tokens": Tokens(table, [a, b], [3, 0]), "slab": slab, "slots": slots}
    good |= {"record": expert_record(64, 32), "x": h, "experts": h}
    kernels.decode(**good)
    kernels.decode(**good | {"x": None, "experts": None})
    bad = {
        "h": [h[:, 1:], h[:1], h.double(), h.to("meta"), h.t().contiguous().t()],
        "table": [table[:, 1:], table[:1], table.real],
        "caches": [[a], *([a, other] for other in (b.float(), b[1:], b[:, :80]))],
        "positions": [[3], [3, 0, 0], [3, -1], [90, 0]],
        "slab": [slab[:, :64].contiguous(), slab.float()],
        "slots": [slots[1:], slots.long(), slots + 18],
        "record": [expert_record(65, 32)],
        "x": [h[:1], h.double()],
        "experts": [h[:, 1:].contiguous(), h.to("meta")],
        "query_scale": [torch.ones(3), torch.ones(2, 1), torch.ones(2).double()],
    }
    for name, values in bad.items():
        for value in values:
            changed = {name: value}
            if name in Tokens._fields:
                changed = {"tokens": good["tokens"]._replace(**changed)}
            with pytest.raises((ValueError, AssertionError)):
                kernels.decode(**good | changed)
    _, smaller = attention(["int8"], 32, 6)
    _, fewer = attention(["int8"], 64, 5)
    narrow = Mlp(*[any_matrix(kernels, rng, "int8", 32, 32)] * 3)
    for other, mlp_of in ((smaller, None), (fewer, None), (layers[0], narrow)):
        with pytest.raises(ValueError, match="expected"):
            Decoder(geometry, [layers[0], other], [None, mlp_of])
    beyond = Decoder(geometry._replace(router=Router(1, 1, 7, 1.0)), layers, mlps)
    with pytest.raises(ValueError, match="refused"):
        kernels.decode(**good | {"decoder": beyond})

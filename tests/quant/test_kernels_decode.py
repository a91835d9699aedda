"""The native router and the decode call, which goes through layers, against their parts."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.quant.kernels.cpu.weights import Decoder, Mlp, Router
from slotmoe.quant.shapes import latent_bytes
from tests.support.kernels import (
    AnyMatrix,
    RandomLayer,
    alone,
    attention_layer,
    expert_record,
    one_of,
    quick,
    random_expert,
    same,
    seeds,
    sizes,
    slab_of,
    torch_of,
)


@quick
@given(
    st.integers(0, 5),
    one_of((1, 1), (3, 1), (4, 2), (8, 3), (8, 8)),
    st.integers(2, 20),
    st.tuples(st.booleans(), one_of(1, 2), st.booleans()),
    one_of(None, 0.0, 0.1, 30.0),
    st.data(),
)
def test_route(kernels, t, groups, size, kind, bias, data):
    """The network's own gate is the oracle where no scores are equal; among equals the lower index
    comes first."""
    (count, kept), rng = groups, np.random.default_rng(data.draw(seeds))
    experts, top_k = count * size, data.draw(st.integers(1, kept * size))
    (renormalize, group_best, sigmoid), width = kind, data.draw(one_of(1, 4, 4000))
    logits = torch_of(np.round(rng.standard_normal((t, experts)) * width))
    logits *= data.draw(one_of(1, 1e-3))
    if bias is not None:
        bias = torch_of(np.round(rng.standard_normal(experts), 1) * bias)
    router = Router(count, kept, top_k, 1.5, renormalize, group_best, sigmoid)
    weights, indices = kernels.route(logits, router, bias)
    wide = logits.double()
    scores = (wide.sigmoid() if sigmoid else wide.softmax(-1)).float()
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


def test_route_of_what_is_not_finite(kernels):
    logits = torch.randn(3, 12)
    logits[0, 7], logits[1, 0] = float("nan"), float("inf")
    routers = Router(1, 1, 5), Router(4, 2, 5, 1.0, True), Router(4, 2, 5, 1.0, True, 2, True)
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0] * 2)
    for router in routers:
        weights, indices = kernels.route(logits, router)
        assert router.sigmoid or weights[:2].isnan().all()
        assert weights[2].isfinite().all()
        biased = kernels.route(logits, router, bias)[1]
        for row in (*indices.tolist(), *biased.tolist()):
            assert len(set(row)) == 5 and min(row) >= 0 and max(row) < 12
    shapes = (5, 1, 2), (4, 5, 2), (4, 0, 2), (1, 1, 13), (1, 1, 0), (4, 1, 4)
    best = Router(12, 3, 2, group_best=2), Router(4, 2, 2, group_best=3)
    for bad in (*(Router(*shape) for shape in shapes), *best):
        with pytest.raises(ValueError, match="don't fit"):
            kernels.route(logits, bad)


class RandomModel:
    """A few layers, dense, with experts, with shared ones or without, to go through in one call or
    in several."""

    def __init__(self, kernels, rng, hidden, width, experts, top_k):
        self.kernels, self.width = kernels, width
        normalized, sigmoid = (bool(rng.integers(2)) for _ in range(2))
        self.router = Router(2, 1, top_k, 1.3, normalized, int(rng.integers(1, 3)), sigmoid)
        self.layers, halves = [], bool(rng.integers(2))
        kinds = [(0, True), (experts, True), (experts, False), (0, False), (experts, True)]
        for count, has_mlp in (kinds[index] for index in rng.permutation(5)):
            layer = RandomLayer(kernels, rng, ["int8", "nf4"], hidden, 3, 8, 4, 20, 6, 0, count)
            layer.halves = halves
            kind = ["int8", "nf4"][int(rng.integers(2))]
            shapes = (width, hidden), (width, hidden), (hidden, width)
            parts = [AnyMatrix(kernels, rng, kind, *shape).fused for shape in shapes]
            self.layers.append((layer.prepared(), Mlp(*parts) if has_mlp else None))
        self.slab = slab_of([random_expert(rng, hidden, width)[1] for _ in range(3 * experts)])
        order = rng.permutation(3 * experts).astype(np.int32)
        self.slots = torch.from_numpy(order).view(3, experts)
        self.decoder = Decoder(self.layers, self.router)
        self.record = expert_record(hidden, width)

    def start(self, rng, positions):
        """The tokens' residual streams and rotations, and caches with `positions` rows, each in a
        larger buffer."""
        size, t = latent_bytes(20, 4), len(positions)
        buffer = torch.full((t, 5, 90, size + 5), 0xFF, dtype=torch.uint8)
        caches = list(buffer[..., :size])
        for cache, position in zip(caches, positions, strict=True):
            for rows in cache:
                latents = torch_of(rng.standard_normal((position, 24)))
                self.kernels.store_latents(latents, 20, rows[:position])
        table = torch.polar(torch.ones(t, 2), torch_of(rng.uniform(-9, 9, (t, 2))))
        return torch_of(rng.standard_normal((t, self.decoder.hidden))), table, caches

    def before_experts(self, index, h, table, caches, positions, query_scale):
        rows, layer = [cache[index] for cache in caches], self.layers[index][0]
        h, x, logits = attention_layer(self.kernels, layer, h, table, rows, positions, query_scale)
        if logits is None:
            return h, x, None, None
        return h, x, *self.kernels.route(logits, self.router, layer.gate_bias)

    def experts(self, moe_layer, x, weights, indices):
        slots = self.slots[moe_layer]
        outputs = torch.empty(*indices.shape, x.shape[1])
        values = self.slab, slots, self.record, outputs
        self.kernels.experts_by_slot(x, indices, *values)
        y = self.kernels.weighted_sum(outputs, weights)
        for token, row in enumerate(slots[indices].tolist()):
            records = [self.slab[slot] for slot in row]
            assert torch.equal(alone(self.kernels, x[token], records, self.width), outputs[token])
        return y

    def finish(self, index, h, x, y):
        mlp = self.layers[index][1]
        if mlp is not None:
            return self.kernels.mlp(mlp, x, h, y)
        return h if y is None else h + y


@quick
@given(
    sizes(100, 60, 3, 3),
    st.one_of(st.just(0.0), st.floats(0, 1), st.just(1.0)),
    st.one_of(st.lists(st.integers(0, 80), min_size=n, max_size=n) for n in (1, 3)),
    st.booleans(),
    seeds,
)
def test_decode_is_bitwise_its_parts(kernels, size, present, positions, resumes, seed):
    """Also where it has to stop at experts that have no slot, which is every router's where none
    has one, and goes on from what another computed of them, or behind that layer."""
    (hidden, width, top_k, threads), rng = size, np.random.default_rng(seed)
    kernels.set_threads(threads)
    model = RandomModel(kernels, rng, hidden, width, 6, top_k)
    h, table, caches = model.start(rng, positions)
    others = list(caches[0]._base.clone()[..., : caches[0].shape[2]])
    query_scale = torch_of(rng.uniform(0.5, 2, len(positions))) if rng.integers(2) else None
    want, routed = h, model.decoder.routed
    moe_layers = [sum(routed[:index]) for index in range(5)]
    slots = model.slots.masked_fill(torch.from_numpy(rng.random((3, 6)) >= present), -1)
    at, resumed, asked, stops = 0, (), 0, 0
    while at < 5:
        state = at, h, table, caches, positions, model.slab, slots, model.record
        resumed_from = resumed or (None, None)
        got = kernels.decode(model.decoder, *state, *resumed_from, query_scale)
        asked += len(got.indices)
        choices, inputs = [], []
        for index in range(at + bool(resumed), 5):
            rest = others, positions, query_scale
            want, x, weights, indices = model.before_experts(index, want, table, *rest)
            choices += [] if indices is None else [indices.tolist()]
            inputs += [] if indices is None else [x]
            if index == got.layer:
                break
            assert weights is None or (slots[moe_layers[index]][indices] >= 0).all()
            y = None if weights is None else model.experts(moe_layers[index], x, weights, indices)
            want = model.finish(index, want, x, y)
        assert torch.equal(got.h, want) and got.indices.tolist() == choices
        assert got.indices.shape[1:] == (len(positions), top_k)
        assert same(got.x, inputs)
        h, at, resumed = got.h, got.layer, ()
        if got.layer < 5:
            stops += 1
            assert (slots[moe_layers[index]][indices] < 0).any()
            assert same([got.x[-1], got.weights], [x, weights])
            y = model.experts(moe_layers[index], x, weights, indices)
            want = model.finish(index, want, x, y)
            if resumes:
                resumed = got.x[-1], y
            else:
                h, at = want, got.layer + 1
    assert asked == 3 and (stops == 3 or present > 0)
    assert torch.equal(h, want)
    assert torch.equal(caches[0]._base, others[0]._base)


def test_decode_refuses(kernels):
    rng = np.random.default_rng(17)
    model = RandomModel(kernels, rng, 64, 32, 6, 2)
    moe, dense = model.decoder.routed.index(True), model.decoder.routed.index(False)
    h, table, caches = model.start(rng, [3, 0])
    names = "decoder first h table caches positions slab slots record x experts".split()
    good = [model.decoder, moe, h, table, caches, [3, 0], model.slab, model.slots, model.record]
    good = dict(zip(names, [*good, h, h], strict=True))
    kernels.decode(**good)
    kernels.decode(**good | {"x": None, "experts": None})
    odd = torch.zeros(model.slab.numel() + 1, dtype=torch.uint8)[1:].view(model.slab.shape)
    nothing = torch.full((2, 16), math.nan)
    wide = torch.zeros(len(model.slab), model.slab.shape[1] + 8, dtype=torch.uint8)
    a, b = caches
    bad = {
        "first": [5, -1, dense],
        "h": [h[:, 1:], h[:1], h.double(), h.to("meta"), h.t().contiguous().t()],
        "table": [table[:, 1:], table[:1], table.real, table.conj()],
        "caches": [
            *([], caches[:1]),
            *([caches[0], bad] for bad in (b.float(), b[1:], b.contiguous(), b[:, :80])),
            *([a[1:], b[1:]], [a[0], b[0]], [a[..., 1:], b[..., 1:]], [a.to("meta"), b.to("meta")]),
            [torch.zeros(5, cache.shape[2], 90, dtype=torch.uint8).mT for cache in caches],
            [cache[:, :1].expand(5, 90, -1) for cache in caches],
        ],
        "positions": [[3], [3, 0, 0], [3, -1], [90, 0]],
        "slab": [model.slab[:, :64].contiguous(), odd, wide, model.slab.float()],
        "slots": [model.slots[1:], model.slots.long(), model.slots + 18],
        "record": [expert_record(65, 32), expert_record(64, 32, levels=nothing)],
        "x": [None, h[:1], h.double()],
        "experts": [None, h[:, 1:].contiguous(), h.to("meta")],
        "query_scale": [torch.ones(3), torch.ones(2, 1), torch.ones(2).double()],
    }
    for name, values in bad.items():
        for value in values:
            with pytest.raises(ValueError, match=r"expected|must|apart|at least|refused"):
                kernels.decode(**good | {name: value})
    layer, mlp = next(entry for entry in model.layers if entry[0].sizes["E"] and entry[1])
    smaller = RandomLayer(kernels, rng, ["int8"], 32, 3, 8, 4, 20, 6, 0, 6).prepared()
    for layers in ([], [(layer, mlp), (smaller, None)], [(smaller, mlp)]):
        with pytest.raises(ValueError, match=r"no layers|different"):
            Decoder(layers, model.router)
    with pytest.raises(ValueError, match="don't fit"):
        Decoder([(layer, mlp)], Router(1, 1, 7, 1.0))

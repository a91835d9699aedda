"""What all native kernels share: threads, how the binary is loaded, what is refused; the router.

That ``decode`` gives the bits of its parts is held by tests/model/test_network.py.
"""

import importlib.machinery
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slotmoe.border import Chunk, Mlp, Router
from slotmoe.errors import ConfigError
from slotmoe.quant.backends.base import Records, new
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import LUT4, NF4
from slotmoe.quant.codecs.encode import squared_error
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu.weights import BoundMlp, Matrix, bind_router
from slotmoe.quant.shapes import record_bytes
from tests.support.codes import random_codes
from tests.support.kernels import (
    NF4S,
    alone,
    coded_matrix,
    expert_slab,
    int8_matrix,
    native,
    needs_native,
    one_of,
    quick,
    random_expert,
    seeds,
    slab_of,
    through_experts,
    torch_of,
)
from tests.support.native import feed, native_cache, network_of
from tests.support.tiny import CONFIG

pytestmark = needs_native


def test_calls_from_several_threads(kernels):
    rng = np.random.default_rng(10)
    record = random_expert(rng, 256, 128)[1]
    x = torch_of(rng.standard_normal((8, 256)))
    want = [alone(kernels, row, [record], 128) for row in x]

    def work(row):
        got = [alone(kernels, x[row], [record], 128) for _ in range(20)]
        return all(torch.equal(y, want[row]) for y in got)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))


@pytest.mark.usefixtures("processes")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # forks with threads
def test_a_forked_child_does_not_hang(kernels):
    x = torch.ones(1, 64)
    w = int8_matrix(kernels, torch.ones(64, 64, dtype=torch.int8), torch.ones(64))
    want = kernels.linear(w, x)
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # which kills it
        os._exit(0 if torch.equal(kernels.linear(w, x), want) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_bad_arguments_are_refused():
    rng = np.random.default_rng(12)
    good = random_codes(rng, NF4, 32, 128)[0]
    _, record = random_expert(rng, 64, 32)
    ones = torch.ones(32, 128, dtype=torch.int8)
    slab = slab_of([record])
    cuts = record[: record_bytes(64, 32, NF4S) - 1], record[1:], record[:-64]
    int8 = int8_matrix(native, ones, torch.ones(32))
    x, x64, y = torch.randn(2, 128), torch.randn(2, 64), torch.empty(2, 1, 64)
    slots, chosen = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 1, dtype=torch.int64)
    cache, rows = torch.zeros(10, 88, dtype=torch.uint8), torch.ones(10, 72)
    kv_b = native.tile_absorbed(Int8Weight(ones, torch.ones(32)), (6, 10), new)

    def linear(x=x, codes=good.codes, n=32):
        weight = CodedWeight(codes, good.scales, good.levels, (n, x.shape[1]))
        return lambda: native.linear(Matrix.of(weight), x)

    def experts(x=x64, chosen=chosen, records=slab, slots=slots, i=32, y=y):
        return lambda: through_experts(native, x, chosen, slots, expert_slab(records, 64, i), y)

    def mla(width=72, cache=cache, context=5, r=64):
        return lambda: native.mla(torch.ones(1, 2, width), cache, context, r, 1.0)

    scalar, turns = torch.tensor(1.0), torch.ones(1, 1, dtype=torch.complex64)
    cases = [
        *(linear(x=bad) for bad in (x.double(), x[:, :64], x.t(), x.to("meta"))),
        *(linear(n=33), linear(codes=good.codes[:1])),
        lambda: native.linear(int8, x[:, :100].contiguous()),
        *(experts(chosen=bad) for bad in (chosen + 1, chosen - 1, chosen.int())),
        *(experts(records=cut[None]) for cut in cuts),
        *(experts(x=torch.ones(2, 0)), experts(slots=slots + 1), experts(slots=slots.long())),
        *(experts(i=40), experts(y=torch.empty(2, 2, 64))),
        lambda: native.weighted_sum(torch.ones(1, 1, 64), torch.ones(1, 2)),
        lambda: native.rotate(scalar, turns),
        lambda: native.absorb_query(kv_b, torch.ones(1, 2, 7)),
        lambda: native.absorb_query(kv_b, torch.ones(1, 3, 6)),
        lambda: native.absorb_value(kv_b, torch.ones(1, 2, 127)),
        lambda: native.quantize_nf4(torch.ones(4, 64, dtype=torch.int32)),
        lambda: native.quantize_int8(torch.ones(0, 64)),
        lambda: squared_error(torch.ones(32, 33), good),
        lambda: native.set_isa("quantum"),
        lambda: native.set_threads(0),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"expected|must|rows|columns|record|refused|instruc"):
            case()
    asserted = [
        *(mla(context=11), mla(context=0), mla(r=73), mla(width=68), mla(cache=cache.half())),
        lambda: native.store_latents(rows, 64, cache[1:]),
    ]
    for case in asserted:
        with pytest.raises(AssertionError):
            case()


def test_a_missing_or_broken_binary_is_none(tmp_path, monkeypatch):
    monkeypatch.setattr(qk, "__file__", str(tmp_path / "__init__.py"))
    assert qk.load.__wrapped__() is None
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (tmp_path / f"_native{suffix}").write_bytes(b"not a library")
    assert qk.load.__wrapped__() is None


def test_an_instruction_set_can_be_asked_for(kernels, monkeypatch):
    monkeypatch.setenv(qk.INSTRUCTIONS, "portable")
    loaded = qk.load.__wrapped__()
    assert loaded.isa == "portable"
    monkeypatch.setenv(qk.INSTRUCTIONS, "quantum")
    with pytest.raises(ConfigError, match=r"'quantum' is not one of this machine's: .*, portable"):
        qk.load.__wrapped__()


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
    weights, indices = kernels.route.results(bind_router(router), logits, bias)
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
    given_weights, kept = kernels.route.results(bind_router(router), logits, bias, order.flip(1))
    assert torch.equal(kept, order.flip(1))
    torch.testing.assert_close(given_weights, weights.flip(1), rtol=1e-6, atol=1e-30)


def test_route_of_what_is_not_finite(kernels):
    logits = torch.randn(3, 12)
    logits[0, 7], logits[1, 0] = float("nan"), float("inf")
    routers = Router(1, 1, 5), Router(4, 2, 5, 1.0, True), Router(4, 2, 5, 1.0, True, 2, "sigmoid")
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0] * 2)
    for router in routers:
        weights, indices = kernels.route.results(bind_router(router), logits)
        assert router.scoring == "sigmoid" or weights[:2].isnan().all()
        assert weights[2].isfinite().all()
        biased = kernels.route.results(bind_router(router), logits, bias)[1]
        for row in (*indices.tolist(), *biased.tolist()):
            assert len(set(row)) == 5 and min(row) >= 0 and max(row) < 12
    shapes = (5, 1, 2), (4, 5, 2), (1, 1, 13), (4, 1, 4)
    for bad in (*(Router(*shape) for shape in shapes), Router(12, 3, 2, group_best=2)):
        with pytest.raises(ValueError, match="refused"):
            kernels.route.results(bind_router(bad), logits)
    for expert in (-1, 12):
        with pytest.raises(ValueError, match="refused"):
            kernels.route.results(
                bind_router(Router(1, 1, 1)), logits, None, torch.full((3, 1), expert)
            )


class Shown:
    """A slot table for a decoder to see."""

    def __init__(self, table):
        self.table = table

    def slot_table(self):
        return self.table


NETWORK = {**CONFIG, "num_hidden_layers": 4, "num_key_value_heads": CONFIG["num_attention_heads"]}


def test_a_decoder_refuses():
    """Whatever comes with a call, of another shape, dtype, device or order than its layers have."""
    network = network_of(NETWORK, "int8", NativeBackend(native))
    states, c = [native_cache(network, 40), native_cache(network, 40)], network.config
    feed(network, states[0], [5, 6, 7], [3])
    network.experts.complete = True
    h, table = torch.randn(2, c.hidden_size), network.experts.slot_table()
    rope = torch.ones(2, c.qk_rope_head_dim // 2, dtype=torch.complex64)
    moe_layer, slab = c.moe_layers[0], table.records.slab
    decoder = network.backend.decoder(network._geometry, network.layers)

    def run(
        layer=0,
        h_TD=h,
        rope_TC=rope,
        caches=states,
        counts=(1, 1),
        scale=None,
        x=None,
        routed=None,
        slots=table.slots_ME,
        records=table.records,
    ):
        chunk = Chunk(h_TD, rope_TC, scale, caches, (0, 0), counts, None, None, layer, x, routed)
        shown = Shown(table._replace(slots_ME=slots, records=records))
        shown.passed = lambda *given: None
        return decoder.run_layers(chunk, shown)

    def other(change):
        cache = native_cache(network, 40)
        cache.layers = change(cache.layers)
        return [states[0], cache]

    def full(length):
        states = [native_cache(network, 40), native_cache(network, 40)]
        states[1].length = length
        return states

    assert run() is None and run(moe_layer, x=h, routed=h) is None and run() is None
    layout, levels = table.records.layout, table.records.levels
    smaller = Records(slab[:, : layout.record_bytes - 4096].contiguous(), layout, levels)
    bad = {
        "layer": [-1, c.num_hidden_layers],
        "h_TD": [h[:, 1:], h[:1], h.double(), h.to("meta"), h.t().contiguous().t()],
        "rope_TC": [rope[:, 1:], rope[:1], rope.real],
        "caches": [
            *(
                other(change)
                for change in (
                    lambda rows: rows.float(),
                    lambda rows: rows[1:],
                    lambda rows: rows[:, :30],
                    lambda rows: rows[:, :, 1:],
                    lambda rows: rows.to("meta"),
                )
            ),
            full(40),
            full(-1),
        ],
        "records": [smaller, Records(slab.float(), layout, levels)],
        "slots": [table.slots_ME[1:], table.slots_ME.long(), table.slots_ME + len(slab)],
        "scale": [torch.ones(3), torch.ones(2, 1), torch.ones(2).double()],
    }
    cases = [{name: value} for name, values in bad.items() for value in values]
    cases += [{"x": h}, {"routed": h}, {"layer": 0, "x": h, "routed": h}]
    cases += [{"layer": moe_layer, "x": x, "routed": h} for x in (h[:1], h.double())]
    meta = h[:, 1:].contiguous(), h.to("meta")
    cases += [{"layer": moe_layer, "x": h, "routed": routed} for routed in meta]
    for case in cases:
        with pytest.raises((ValueError, AssertionError)):
            run(**case)
    assert run() is None


def test_layers_that_do_not_fit_are_refused():
    """Among each other, or with what their geometry says."""
    network = network_of(NETWORK, "int8", NativeBackend(native))
    geometry, layers = network._geometry, network.layers
    layer, decoder = layers[-1], network.backend.decoder

    def with_attention(**changes):
        return replace(layer, attention=replace(layer.attention, **changes))

    narrow = int8_matrix(native, torch.ones(63, 65).char(), torch.ones(63))
    norms = torch.ones(len(layer.input_layernorm) + 1), layer.input_layernorm.double()
    bad = [replace(layer, input_layernorm=norm) for norm in norms]
    bad += [
        replace(layer, gate=layer.gate[1:]),
        replace(layer, gate=layer.gate[:, 1:].contiguous()),
    ]
    matrices = "q_a_proj", "q_b_proj", "kv_a_proj", "o_proj"
    bad += [with_attention(**{name: narrow}) for name in matrices]
    bad += [with_attention(kv_a_layernorm=torch.ones(3)), replace(layer, gate_bias=torch.ones(3))]
    q = torch.ones(36, 32).char()
    other = native.tile_absorbed(Int8Weight(q, torch.ones(36)), (8, 10), new)
    bad += [with_attention(kv_b_proj=other), replace(layer, mlp=Mlp(narrow, narrow, narrow))]
    for changed in bad:
        with pytest.raises(ValueError, match=r"expected|must"):
            decoder(geometry, [*layers[:-1], changed])
    with pytest.raises(ValueError, match="expected"):
        decoder(geometry._replace(H=geometry.H + 1), layers)
    ones, rng = torch.ones(16, 16, dtype=torch.int8), np.random.default_rng(16)
    int8, nf4 = int8_matrix(native, ones, torch.ones(16)), coded_matrix(rng, 16, 16)
    cut = int8_matrix(native, ones[:, :15].contiguous(), torch.ones(16))
    cases = [
        lambda: native.mlp(BoundMlp(int8, int8, int8), torch.ones(2, 15)),
        lambda: BoundMlp(int8, int8, nf4),
        lambda: BoundMlp(nf4, nf4, coded_matrix(rng, 16, 16, LUT4)),
        lambda: BoundMlp(int8, int8, cut),
        lambda: BoundMlp(*[Matrix.of(torch.ones(16, 16))] * 3),
        lambda: Matrix.int8(torch.ones(1, 1, 1024).char(), torch.ones(17), (17, 16)),
        lambda: Matrix.of(torch.ones(16, 16)[:, :8]),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"expected|must|rows|columns|refused|one codec"):
            case()

"""What all native kernels share: threads, how the binary is loaded, what is refused; the router.

That ``decode`` gives the bits of its parts is held by test_kernels_network.py.
"""

import math
import os
import shutil
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch

from slotmoe.errors import ConfigError
from slotmoe.network.layer_types import Chunk, Ends, Mlp, Router
from slotmoe.quant.backends.base import Records, new
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.codecs.codec import NF4
from slotmoe.quant.codecs.encode import squared_error
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight
from slotmoe.quant.kernels.cpu import bindings as qk
from slotmoe.quant.kernels.cpu import weights
from slotmoe.quant.kernels.cpu.weights import STRUCTURES, BoundMlp, Matrix, Structure, bind_router
from slotmoe.quant.shapes import record_bytes
from tests.support.codes import random_codes
from tests.support.kernels import (
    BACKEND,
    NF4S,
    coded_matrix,
    expert_slab,
    int8_matrix,
    native,
    needs_native,
    random_expert,
    slab_of,
    through_experts,
)
from tests.support.native import feed, native_cache, network_of
from tests.support.tiny import CONFIG

pytestmark = needs_native


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


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("CHECKSUM", qk.CHECKSUM + 1),
        ("_RECORD", Structure("one_more hidden")),
        ("TOKENS", [Structure("positions:int64s").type]),
        ("STRUCTURES", [*STRUCTURES[:-1], Structure("one_more:float").type]),
        ("STRUCTURES", STRUCTURES[::-1]),
    ],
)
def test_a_library_of_other_declarations_is_refused(monkeypatch, name, changed):
    monkeypatch.setattr(qk, name, changed)
    with pytest.raises(ConfigError, match=r"_native.*: built from other .*; build again"):
        qk.load.__wrapped__()


def test_what_python_declares_is_in_the_layout():
    declared = [*vars(weights).values(), *vars(qk).values()]
    structures = {one.type for one in declared if isinstance(one, Structure)}
    assert structures < {*STRUCTURES, qk._RECORD.type}


def test_a_library_that_knows_no_layout_is_refused_and_one_that_does_not_load_is_none(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(qk, "__file__", str(tmp_path / "bindings.py"))
    assert qk.load.__wrapped__() is None
    library = tmp_path / Path(native.library._name).name
    library.write_bytes(b"of another machine")
    assert qk.load.__wrapped__() is None
    shutil.copy(safetensors._safetensors_rust.__file__, library)
    with pytest.raises(ConfigError, match="layout None, expected"):
        qk.load.__wrapped__()


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
        return lambda: BACKEND.mla(torch.ones(1, 2, width), cache[:context], r, 1.0)

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
        *(mla(context=0), mla(r=73), mla(width=68), mla(cache=cache.half())),
        lambda: BACKEND.store_latents(rows, 64, cache[1:]),
    ]
    for case in asserted:
        with pytest.raises(AssertionError):
            case()


def test_an_instruction_set_can_be_asked_for(kernels, monkeypatch):
    monkeypatch.setenv(qk.INSTRUCTIONS, "portable")
    loaded = qk.load.__wrapped__()
    assert loaded.isa == "portable"
    monkeypatch.setenv(qk.INSTRUCTIONS, "quantum")
    with pytest.raises(ConfigError, match=r"'quantum' is not one of this machine's: .*, portable"):
        qk.load.__wrapped__()


def test_route_of_what_is_not_finite(kernels):
    logits = torch.randn(3, 12)
    logits[0, 7], logits[1, 0] = float("nan"), float("inf")
    bias = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 0.0] * 2)
    for router in Router(1, 1, 5), Router(4, 2, 5, 1.0, True, 2, "sigmoid"):
        for given in (None, bias):
            weights, indices = kernels.route.results(bind_router(router), logits, given)
            assert weights[2].isfinite().all()
            for row in indices.tolist():
                assert len(set(row)) == 5 and min(row) >= 0 and max(row) < 12
    for bad in (Router(5, 1, 2), Router(4, 5, 2), Router(1, 1, 13), Router(4, 1, 4)):
        with pytest.raises(ValueError, match="refused"):
            kernels.route.results(bind_router(bad), logits)
    for expert in (-1, 12):
        chosen = torch.full((3, 1), expert)
        with pytest.raises(ValueError, match="refused"):
            kernels.route.results(bind_router(Router(1, 1, 1)), logits, None, chosen)


def test_streams_refuse(kernels):
    h, fn, base, scale = torch.ones(2, 4, 40), torch.ones(24, 4, 40), torch.ones(24), torch.ones(3)
    good = [h, fn, base, scale, 1e-6, 20, 1e-6]
    kernels.hyper_in.results(*good)
    bad = [(1, fn[:23].contiguous()), (1, fn.flatten(1)), (2, base[:23])]
    bad += [(3, scale[:1]), (0, h[:, :3].contiguous()), (0, h.double()), (5, 0)]
    for place, value in bad:
        with pytest.raises(ValueError, match=r"expected|refused"):
            kernels.hyper_in.results(*good[:place], value, *good[place + 1 :])


NETWORK = {**CONFIG, "num_hidden_layers": 4, "num_key_value_heads": CONFIG["num_attention_heads"]}


def ends_of(network):
    weights = network.embed_tokens, network.norm, network.lm_head
    return Ends(*weights, network._positions.frequencies_C, 1.0)


def test_a_decoder_refuses():
    """Whatever comes with a call, of another shape, dtype, device or order than its layers have."""
    network = network_of(NETWORK, "int8", NativeBackend(native))
    states, c = [native_cache(network, 40), native_cache(network, 40)], network.config
    feed(network, states[0], [5, 6, 7], [3])
    network.experts.complete = True
    h, table = torch.randn(2, c.hidden_size), network.experts.slot_table()
    ids = torch.tensor([5, c.vocab_size - 1])
    decoder = network.backend.decoder(network._geometry, network.layers, ends_of(network))

    def run(layer=0, h=h, ids=ids, caches=states, scale=None, x=None, routed=None, **changed):
        more = None, ids, layer, x, routed
        chunk = Chunk(h, h, scale, caches, (0, 0), (1, 1), *more)
        shown = SimpleNamespace(slot_table=lambda: table._replace(**changed))
        shown.passed = lambda *given: None
        return decoder.run_layers(chunk, shown)

    def other(change, length=0):
        cache = native_cache(network, 40)
        cache.layers, cache.length = change(cache.layers), length
        return {"caches": [states[0], cache]}

    slab, layout, levels = table.records.slab, table.records.layout, table.records.levels
    smaller = Records(slab[:, : layout.record_bytes - 4096].contiguous(), layout, levels)
    cases = [{"layer": layer} for layer in (-1, c.num_hidden_layers)]
    wrong = h[:, 1:], h[:1], h.double(), h.to("meta"), h.t().contiguous().t()
    cases += [{"h": bad} for bad in wrong]
    for bad in (None, ids[:1], ids.int(), ids + 1, ids - 6):  # the last two are outside
        cases.append({"h": h[:0], "ids": bad})
    cases.append({"h": h[:0], "layer": 1})
    for change in (
        lambda rows: rows.float(),
        lambda rows: rows[:, :30],
        lambda rows: rows[:, :, 1:],
        lambda rows: rows.to("meta"),
    ):
        cases.append(other(change))
    cases += [other(lambda rows: rows, length) for length in (40, -1)]
    cases += [{"records": bad} for bad in (smaller, Records(slab.float(), layout, levels))]
    slots = table.slots_ME
    cases += [{"slots_ME": bad} for bad in (slots[1:], slots.long(), slots + len(slab))]
    cases += [{"scale": torch.ones(3)}, {"scale": torch.ones(2).double()}, {"x": h}, {"routed": h}]
    cases += [{"layer": c.moe_layers[0], "x": h[:1], "routed": h}]
    for case in cases:
        with pytest.raises((ValueError, AssertionError)):
            run(**case)
    assert run() is run(h=h[:0]) is None


def test_layers_that_do_not_fit_are_refused():
    """Among each other, or with what their geometry says."""
    network = network_of(NETWORK, "int8", NativeBackend(native))
    geometry, layers = network._geometry, network.layers
    layer, decoder = layers[-1], partial(network.backend.decoder, ends=ends_of(network))
    narrow = int8_matrix(native, torch.ones(63, 65).char(), torch.ones(63))
    bad = [replace(layer, input_layernorm=layer.input_layernorm.double())]
    bad += [replace(layer, gate=layer.gate[1:]), replace(layer, gate_bias=torch.ones(3))]
    for name in ("q_a_proj", "q_b_proj", "kv_a_proj", "o_proj"):
        bad.append(replace(layer, attention=replace(layer.attention, **{name: narrow})))
    bad.append(replace(layer, mlp=Mlp(narrow, narrow, narrow)))
    for changed in bad:
        with pytest.raises(ValueError, match=r"expected|must"):
            decoder(geometry, [*layers[:-1], changed])
    with pytest.raises(ValueError, match="expected"):
        decoder(geometry._replace(H=geometry.H + 1), layers)
    ones, rng = torch.ones(16, 16, dtype=torch.int8), np.random.default_rng(16)
    int8 = int8_matrix(native, ones, torch.ones(16))
    cases = [
        lambda: native.mlp(BoundMlp(int8, int8, int8), torch.ones(2, 15)),
        lambda: BoundMlp(int8, coded_matrix(rng, 16, 32), int8),
        lambda: Matrix.of(torch.ones(16, 16)[:, :8]),
    ]
    for case in cases:
        with pytest.raises(ValueError, match=r"expected|must|rows|columns|refused"):
            case()

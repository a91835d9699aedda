"""Whole networks with indexers, compressed rows, grouped queries or delta rules in one native call
for many layers, against the single operations."""

from functools import partial

import pytest
import torch

from slotmoe.quant.backends.native import NativeBackend
from tests.support import v4
from tests.support.families import DELTA_CASES, DSA, GROUPED_CASES, V2, V2_CASES, V32, config_of
from tests.support.kernels import native, needs_native
from tests.support.native import LayerByLayerOps, feed, native_cache, network_of

pytestmark = needs_native

IDS = torch.randint(2, 4000, (300,), generator=torch.Generator().manual_seed(7)).tolist()
INDEXED = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 3, "num_hidden_layers": 4}
SHARED = {**INDEXED, "indexer_types": ["full", "shared", "full", "shared"]}
WHOLE = {"o_lora_rank": 16}  # whole tiles for each group
SOME = {"compress_ratios": [128, 4, 0, 4], "num_hash_layers": 2, "index_topk": 9}
GROUPED = "qwen3", "qwen3-yarn-biases-one-group", "glm4", "minimax-odd", "dots", "qwen2"
GROUPED += "dots-window-of-one", "hunyuan-biases", "gpt-oss-plain-rope"
CASES = {  # with the tokens that are fed
    **{name: (config_of(of, **own), 20) for name in GROUPED for of, own in [GROUPED_CASES[name]]},
    **{name: (config_of(of, **own), 30) for name, (of, own) in DELTA_CASES.items()},
    **{f"v2, {name}": (config_of(V2, **V2_CASES[name]), 20) for name in V2_CASES},
    "v3.2": (config_of(V32, **INDEXED), 40),
    "glm-5, indexers of some layers": (config_of(DSA, **SHARED), 40),
    "v4": (v4.config_of("v4", **WHOLE), 300),
    "v4, odd sizes": (v4.config_of("v4-odd", **WHOLE), 40),
    "v4, other layers": (v4.config_of("v4-pro", **WHOLE, **SOME), 140),
}
state_of = partial(native_cache, context=300)


def rows_of(state):
    """All that the state holds.  That of a delta rule is behind the last token but one if a pass
    had several; what comes then shows it."""
    return state.saved(0, state.length), state.snapshot(state.length)


def same_rows(one, other):
    pairs = zip(rows_of(one), rows_of(other), strict=True)
    return all(a is None or b is None or torch.equal(a, b) for a, b in pairs)


RUNS = [(name, "int8") for name in CASES if "v4" not in name]
FITTED = "int8 self_attn.o_proj@0-1=int5 self_attn.q_b_proj@1-9=int6 mlp.shared_experts@2-9=lut4"
RUNS += [("v3.2", "mixed"), ("v3.2", f"{FITTED} self_attn.kv_a_proj_with_mqa@0-9=none")]
V4S = [*((name, "int8") for name in CASES if "v4" in name), ("v4, other layers", "mixed")]
RUNS += [pytest.param(*run, marks=pytest.mark.full) for run in V4S]


@pytest.mark.parametrize(("name", "resident"), RUNS)
def test_few_calls_are_bitwise_op_by_op(name, resident):
    """Wherever experts are, token by token, a few at once, in several sequences, in one pass."""
    raw, count = CASES[name]
    network = network_of(raw, resident, NativeBackend(native))
    plainly = network_of(raw, resident, LayerByLayerOps(native))
    state, ids = state_of(plainly), IDS[:count]
    ones = [1] * count
    if count > 60:  # where a row of 128 tokens ends, and the last
        ones = [116, *ones[:20], count - 139, *ones[:3]]
    expected = feed(plainly, state, ids, ones)
    assert network.rows > 0
    for in_table in ((), range(1, network.config.n_routed_experts)):
        network.experts.in_table, network.experts.chosen = in_table, []
        own = state_of(network)
        assert torch.equal(feed(network, own, ids, ones), expected)
        assert same_rows(own, state)
        assert network.experts.chosen == plainly.experts.chosen
    network.experts.complete = True
    few = [(index * 5 + 6) % 16 + 1 for index in range(count)]
    few = few[: sum(sum(few[:index]) <= count for index in range(1, count))]
    for sizes in (few, [count], [1] * count):
        own, end = state_of(network), sum(sizes)
        assert torch.equal(feed(network, own, ids, sizes), expected[:end])
        assert end < count or same_rows(own, state)
    if count > 256:  # what a text of single tokens can be cut to
        assert not own.window.has(257)
        own.cut(own.reach(257))
        assert own.length == 256
        assert torch.equal(feed(network, own, ids[256:], [1] * (count - 256)), expected[256:])
    network.experts.complete = False  # a pass that ends in the middle of its layers is no other
    states, starts, counts = [state_of(network) for _ in range(3)], (11, 0, 3), (4, 1, 6)
    spans = [slice(start, start + n) for start, n in zip(starts, counts, strict=True)]
    for own, span in zip(states, spans, strict=True):
        if span.start:
            network.forward(torch.tensor(ids[: span.start]), [own])
    several = torch.tensor([id for span in spans for id in ids[span]])
    got = network.head_each(network.forward(several, states, counts))
    assert torch.equal(got, torch.cat([expected[span] for span in spans]))

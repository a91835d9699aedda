"""Whole networks with indexers or compressed rows in one native call for many layers, against the
single operations."""

import pytest
import torch

from slotmoe.model.state import new_state
from slotmoe.quant.backends.base import new
from slotmoe.quant.backends.native import NativeBackend
from tests.support.families import DSA, V32, config_of
from tests.support.kernels import native, needs_native
from tests.support.native import LayerByLayerOps, feed, network_of

pytestmark = needs_native

IDS = torch.randint(2, 4000, (60,), generator=torch.Generator().manual_seed(7)).tolist()
INDEXED = {"index_topk": 12, "index_head_dim": 16, "index_n_heads": 3, "num_hidden_layers": 4}
SHARED = {**INDEXED, "indexer_types": ["full", "shared", "full", "shared"]}
CASES = {"v3.2": (V32, INDEXED), "glm-5, indexers of some layers": (DSA, SHARED)}


def state_of(network, context=60):
    return new_state(network.config, context, network.backend.latent_row, new)


def rows_of(state):
    """All that the state holds."""
    return state.saved(0, state.length), state.snapshot(state.length)


@pytest.mark.parametrize(
    ("name", "resident"), [*((name, "int8") for name in CASES), ("v3.2", "mixed")]
)
def test_few_calls_are_bitwise_op_by_op(name, resident):
    """Wherever experts are, token by token, a few at once, in several sequences, and in one pass."""
    raw = config_of(CASES[name][0], **CASES[name][1])
    network = network_of(raw, resident, NativeBackend(native))
    plainly = network_of(raw, resident, LayerByLayerOps(native))
    state, count = state_of(plainly), len(IDS)
    expected = feed(plainly, state, IDS, [1] * count)
    assert network.rows > 0
    for in_table in ((), range(1, network.config.n_routed_experts)):
        network.experts.in_table, network.experts.chosen = in_table, []
        own = state_of(network)
        assert torch.equal(feed(network, own, IDS, [1] * count), expected)
        assert all(map(torch.equal, rows_of(own), rows_of(state)))
        assert network.experts.chosen[-count:] == plainly.experts.chosen[-count:]
    network.experts.complete = True
    for sizes in ([1] * count, [7, 9, 16, 3, 4, 5, 16], [count]):
        own = state_of(network)
        assert torch.equal(feed(network, own, IDS, sizes), expected)
        assert all(map(torch.equal, rows_of(own), rows_of(state)))
    pair = [state_of(network), state_of(network)]
    network.forward(torch.tensor(IDS[:11]), pair[:1])
    both = torch.tensor(IDS[11:15] + IDS[:4])
    got = network.head_each(network.forward(both, pair))
    assert torch.equal(got, torch.cat([expected[11:15], expected[:4]]))

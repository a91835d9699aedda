"""The reference path against transformers and against the plain float64 network, and the network's
own invariants."""

from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
import torch

from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.kernels.cpu import bindings as kernels
from tests.support import plain
from tests.support.families import CASES, OF_YARN, V2_CASES, config_of
from tests.support.native import (
    LayerByLayerOps,
    feed,
    native_cache,
    network_of,
    reference_cache,
    reference_network,
)
from tests.support.oracle import relative_error
from tests.support.params import nth
from tests.support.tiny import CONFIG, write_checkpoint
from tests.support.v4 import state_bytes

ONE_TOKEN = {
    **V2_CASES,
    "no-shared-expert": {"n_shared_experts": None},
    "norm-topk-prob": {"norm_topk_prob": True},
}
native = pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")
FP32 = 3.5e-6  # twice the distance of this path, and of transformers, from float64
IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(7)).tolist()


NOT_OF_TRANSFORMERS = {  # it ignores the first two, needs a shared expert, and even strides
    "norm-topk-prob": {"norm_topk_prob": True, "routed_scaling_factor": 3.0},
    "moe-layer-freq": {"moe_layer_freq": 2, "num_hidden_layers": 5},
    "no-shared-expert": {"n_shared_experts": None},
    "no-mscale-all-dim": {"rope_scaling": {**OF_YARN, "type": "yarn", "mscale_all_dim": 0.0}},
    "odd-sizes": {**V2_CASES["odd-sizes"], "kv_lora_rank": 19, "qk_nope_head_dim": 13},
}


@pytest.mark.parametrize("name", NOT_OF_TRANSFORMERS)
def test_reference_path_equals_plain_network(name, tmp_path):
    write_checkpoint(tmp_path, **NOT_OF_TRANSFORMERS[name])
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative_error(runtime.logits(IDS[:12]), plain.logits(tmp_path, IDS[:12])) <= 1e-4


def network_on(geometry, resident, kind=NativeBackend):
    """Of DeepSeek-V2's, or of another family's."""
    if geometry in CASES:
        family, overrides = CASES[geometry]
        raw = config_of(family, **overrides)
    else:
        raw = {**CONFIG, **ONE_TOKEN[geometry]}
        raw["num_key_value_heads"] = raw["num_attention_heads"]
    return network_of(raw, resident, kind(kernels.load()))


@native
@pytest.mark.parametrize(
    ("geometry", "resident"),
    [*nth(2, product(ONE_TOKEN, ["int8", "mixed", "nf4"])), *product(CASES, ["int8"])],
)
def test_one_token_in_few_calls_is_bitwise_op_by_op(geometry, resident):
    """Wherever experts are, at every position of the context, the last one too; and one prefill
    gives the same."""
    network = network_on(geometry, resident)
    config = network.config
    values = sum(-(-width // 4) * 4 for width in (config.kv_lora_rank, config.qk_rope_head_dim))
    size = config.num_hidden_layers * (values + 16)  # two scales and two sums
    if config.indexer is not None:
        size += sum(config.indexer.full) * (-(-config.indexer.head_dim // 4) * 4 + 16)
    assert state_bytes(native_cache(network)) == 40 * size
    plainly = network_on(geometry, resident, LayerByLayerOps)
    cache = native_cache(plainly)
    expected = feed(plainly, cache, IDS, [1] * 40)
    layers = len(config.moe_layers)
    for in_table in ((), range(1, config.n_routed_experts)):
        actual = native_cache(network)
        network.experts.in_table, network.experts.calls, network.experts.chosen = in_table, [], []
        assert torch.equal(feed(network, actual, IDS, [1] * 40), expected)
        assert torch.equal(actual.layers, cache.layers)
        assert network.experts.chosen == plainly.experts.chosen
        calls = len(network.experts.calls)
        assert 0 < calls < 40 * layers if in_table else calls == 40 * layers
    network.experts.complete, network.experts.calls = True, []
    whole = native_cache(network)
    assert torch.equal(feed(network, native_cache(network), IDS, [1] * 40), expected)
    assert not network.experts.calls
    # A tied head is the embedding, row-major, and torch multiplies by it.
    if not config.tie_word_embeddings:
        assert torch.equal(feed(network, whole, IDS, [40]), expected)
        assert torch.equal(whole.layers, cache.layers)


@native
@pytest.mark.parametrize(
    ("kind", "geometry"), nth(2, product([NativeBackend, LayerByLayerOps], V2_CASES))
)
def test_several_tokens_of_several_sequences_are_bitwise_as_one_by_one(kind, geometry):
    """Sequences of different lengths, some experts in the slot table, in one pass.  A pass that
    ends in the middle of its layers is no other."""
    network = network_on(geometry, "int8", kind)
    network.experts.in_table = range(1, network.config.n_routed_experts)
    for lengths, counts, passes in (((3, 17, 1, 30), None, 2), ((3, 17, 0), (4, 1, 6), 1)):
        caches, expected, sizes = [], [], counts or [1] * len(lengths)
        for length, count in zip(lengths, sizes, strict=True):
            cache, alone = native_cache(network), native_cache(network)
            for each in (cache, alone):
                feed(network, each, IDS, [length]) if length else None
            caches.append(cache)
            rows = feed(network, alone, IDS[length:], [1] * count * passes)
            expected.append(rows.split(count))
        for at in range(passes):
            starts = [(n + at * count, count) for n, count in zip(lengths, sizes, strict=True)]
            ids = [id for start, count in starts for id in IDS[start : start + count]]
            logits = network.head_each(network.forward(torch.tensor(ids), caches, counts))
            assert torch.equal(logits, torch.cat([rows[at] for rows in expected]))
        ends = [n + passes * count for n, count in zip(lengths, sizes, strict=True)]
        assert [cache.length for cache in caches] == ends


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A network of the reference path with every feature on, and a function that makes an empty
    cache for it."""
    folder = tmp_path_factory.mktemp("reference")
    write_checkpoint(folder, max_position_embeddings=8192, **V2_CASES["groups-qlora-yarn"])
    with open_checkpoint(folder) as checkpoint:
        weights = {name: checkpoint.tensor(name).float() for name in checkpoint.infos}
        config = checkpoint.config
    return reference_network(config, weights), partial(reference_cache, config)


@pytest.mark.parametrize("sizes", [[1] * 40, [39, 1], [7, 20, 13], [1, 38, 1]], ids=str)
def test_decode_and_chunks_equal_one_prefill(reference, sizes):
    network, cache = reference
    whole = feed(network, cache(128), IDS, [40])
    assert relative_error(feed(network, cache(128), IDS, sizes), whole) <= FP32


def test_absorbed_equals_expanded_attention_over_several_blocks(heavy, reference, monkeypatch):
    """A chunk long enough that expansion is cheaper, over blocks so small that the softmax is
    merged many times."""
    network, cache = reference
    ids = (IDS * 6)[:200]
    wanted = feed(network, cache(256), ids, [200])  # in one block
    monkeypatch.setattr("slotmoe.model.attention.latent._MAX_SCORES", 1)  # blocks of 64 positions
    with patch.object(network.backend, "expand", wraps=network.backend.expand) as expand:
        expanded = feed(network, cache(256), ids, [200])
        called = expand.call_count
        absorbed = feed(network, cache(256), ids, [1] * 200)
    assert called == expand.call_count > 4
    assert relative_error(absorbed, wanted) <= FP32
    assert relative_error(expanded, wanted) <= FP32


class _Largest(torch.overrides.TorchFunctionMode):
    """Remembers the largest tensor that any torch call returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result._base is None:
            self.elements = max(self.elements, result.numel())
        return result


def test_no_temporary_grows_with_the_context(reference):
    """Between 1,000 and 8,000 cached positions only the attention's block, which has a bound, may
    differ."""
    network, cache = reference
    c = network.config
    bound = 4096 * max(c.latent_width, c.num_attention_heads)
    for length in (1000, 8000):
        made = cache(8192, torch.float16)
        made.layers[:, :length] = 0.01
        made.length = length
        with torch.inference_mode(), _Largest() as largest:
            network.head(network.forward(torch.tensor([5]), [made]))
        assert largest.elements <= max(bound, c.vocab_size * c.hidden_size)

"""The reference path against transformers and against the plain float64 network, and the network's
own invariants."""

from itertools import product

import numpy as np
import pytest
import torch

from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.config import parse_config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.network import Network
from slotmoe.model.routing import route, router_of
from slotmoe.offload.exclusive import Exclusive
from slotmoe.offload.reference import ResidentExperts
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.native import NativeBackend
from slotmoe.quant.kernels.cpu import bindings as kernels
from tests.support import plain
from tests.support.native import LayerByLayerOps, feed, native_cache, native_network
from tests.support.oracle import relative_error, transformers_logits
from tests.support.params import nth
from tests.support.tiny import ODD_SIZES, write_checkpoint

YARN = {
    "type": "yarn",
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
YARN |= {"beta_fast": 32, "beta_slow": 1}

# Between them: groups on and off, q-LoRA on and off, YaRN and plain RoPE in both spellings, odd
# sizes, v_head_dim unlike qk_nope_head_dim, two dense layers, one shared expert, tied embeddings,
# mscale unlike mscale_all_dim.
GEOMETRIES = {
    "groups-qlora-yarn": {"rope_scaling": YARN, "routed_scaling_factor": 16.0},
    "greedy-no-qlora": {
        "topk_method": "greedy",
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": None,
        "rope_scaling": None,
    },
    "odd-sizes": {**ODD_SIZES, "rope_scaling": {**YARN, "mscale": 0.707}},
    "v-unlike-nope": {
        "v_head_dim": 20,
        "qk_nope_head_dim": 12,
        "n_routed_experts": 12,
        "n_group": 4,
        "topk_group": 2,
    },
    "two-dense-layers": {"first_k_dense_replace": 2, "num_hidden_layers": 4, "n_shared_experts": 1},
    "tied": {"tie_word_embeddings": True, "num_experts_per_tok": 4, "rms_norm_eps": 1e-3},
    "transformers-spelling": {
        "rope_scaling": None,
        "rope_parameters": {
            **{k: v for k, v in YARN.items() if k != "type"},
            "rope_type": "yarn",
            "rope_theta": 5000.0,
        },
    },
}
ONE_TOKEN = {
    **GEOMETRIES,
    "no-shared-expert": {"n_shared_experts": None},
    "norm-topk-prob": {"norm_topk_prob": True},
}
FP32 = 3.5e-6  # twice the distance of this path, and of transformers, from float64
IDS = torch.randint(2, 4000, (40,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("name", GEOMETRIES)
def test_reference_path_equals_transformers(name, tmp_path):
    write_checkpoint(tmp_path, **GEOMETRIES[name])
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative_error(runtime.logits(IDS), transformers_logits(tmp_path, IDS)) <= 1e-4


@pytest.mark.parametrize(
    "overrides",
    [
        {"norm_topk_prob": True, "routed_scaling_factor": 3.0},  # transformers ignores it
        {"moe_layer_freq": 2, "num_hidden_layers": 5},  # transformers ignores it
        {"n_shared_experts": None},  # transformers needs one
        {"rope_scaling": {**YARN, "mscale_all_dim": 0.0}},
        {
            **GEOMETRIES["odd-sizes"],
            "kv_lora_rank": 19,
            "qk_nope_head_dim": 13,
        },  # transformers needs even strides
    ],
    ids=["norm-topk-prob", "moe-layer-freq", "no-shared-expert", "no-mscale-all-dim", "odd-sizes"],
)
def test_reference_path_equals_plain_network(overrides, tmp_path):
    write_checkpoint(tmp_path, **overrides)
    with Runtime.open(tmp_path, quantize=False, context=64) as runtime:
        assert relative_error(runtime.logits(IDS[:12]), plain.logits(tmp_path, IDS[:12])) <= 1e-4


def test_gate_is_limited_to_groups():
    """The two best experts stand in different groups of which only one may be used."""
    config = parse_config(
        {
            **SMALL_GATE,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 4.0,
        }
    )
    wanted = torch.tensor([[4.0, 0.0, 3.0, 2.9]])  # experts 0, 1 | 2, 3
    weights, indices = route(wanted, router_of(config))
    assert indices.tolist() == [[0, 1]]
    torch.testing.assert_close(weights, 4.0 * wanted.softmax(-1)[:, :2])
    greedy = parse_config({**SMALL_GATE, "topk_method": "greedy"})
    assert route(wanted, router_of(greedy))[1].tolist() == [[0, 2]]


SMALL_GATE = {
    "model_type": "deepseek_v2",
    "vocab_size": 8,
    "hidden_size": 4,
    "intermediate_size": 4,
    "moe_intermediate_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "first_k_dense_replace": 0,
    "q_lora_rank": None,
    "kv_lora_rank": 4,
    "qk_nope_head_dim": 4,
    "qk_rope_head_dim": 4,
    "v_head_dim": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


@pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")
@pytest.mark.parametrize(
    ("geometry", "resident"), nth(2, product(ONE_TOKEN, ["int8", "mixed", "nf4"]))
)
def test_one_token_in_few_calls_is_bitwise_op_by_op(geometry, resident):
    """Wherever experts are, at every position of the context, the last one too; and one prefill
    gives the same."""
    overrides = ONE_TOKEN[geometry]
    network = native_network(overrides, resident)
    config = network.config
    values = sum(-(-width // 4) * 4 for width in (config.kv_lora_rank, config.qk_rope_head_dim))
    scales = 16  # two scales and two sums
    assert native_cache(network).nbytes == config.num_hidden_layers * 40 * (values + scales)
    plainly = native_network(overrides, resident, LayerByLayerOps)
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


@pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("ops", ["native", "layer by layer"])
@pytest.mark.parametrize("overrides", GEOMETRIES.values(), ids=GEOMETRIES)
def test_several_sequences_in_one_pass_are_bitwise_each_alone(overrides, ops):
    """Sequences of different lengths, some experts in the slot table."""
    kind = NativeBackend if ops == "native" else LayerByLayerOps
    network = native_network(overrides, "int8", kind)
    network.experts.in_table = range(1, network.config.n_routed_experts)
    lengths, expected, caches = (3, 17, 1, 30), [], []
    for length in lengths:
        cache = native_cache(network)
        feed(network, cache, IDS, [length])
        caches.append(cache)
        alone = native_cache(network)
        feed(network, alone, IDS, [length])
        expected.append(feed(network, alone, IDS[length:], [1, 1]))
    for step in range(2):
        ids = torch.tensor([IDS[length + step] for length in lengths])
        logits = network.head_each(network.forward(ids, caches))
        assert torch.equal(logits, torch.stack([rows[step] for rows in expected]))
    assert [cache.length for cache in caches] == [length + 2 for length in lengths]


@pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")
@pytest.mark.parametrize("ops", ["native", "layer by layer"])
@pytest.mark.parametrize("overrides", GEOMETRIES.values(), ids=GEOMETRIES)
def test_several_tokens_of_several_sequences_are_bitwise_as_one_by_one(overrides, ops):
    """A pass that ends in the middle of its layers is no other."""
    kind = NativeBackend if ops == "native" else LayerByLayerOps
    network = native_network(overrides, "int8", kind)
    network.experts.in_table = range(1, network.config.n_routed_experts)
    lengths, counts, expected, caches = (3, 17, 0), (4, 1, 6), [], []
    for length, count in zip(lengths, counts, strict=True):
        cache, alone = native_cache(network), native_cache(network)
        for each in (cache, alone):
            feed(network, each, IDS, [1] * length) if length else None
        caches.append(cache)
        expected.append(feed(network, alone, IDS[length:], [1] * count))
    ids = [id for n, count in zip(lengths, counts, strict=True) for id in IDS[n : n + count]]
    logits = network.head_each(network.forward(torch.tensor(ids), caches, counts))
    assert torch.equal(logits, torch.cat(expected))
    assert [cache.length for cache in caches] == [7, 18, 6]


@pytest.mark.skipif(kernels.load() is None, reason="the native kernels are not built")
def test_bf16_weights_go_op_by_op():
    """No native call computes them, though every expert has a slot."""
    network = native_network({"n_shared_experts": None}, "bf16")
    network.experts.complete, cache = True, native_cache(network)
    assert feed(network, cache, IDS, [39, 1]).isfinite().all()
    assert network.experts.calls == [*network.config.moe_layers] * 2


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A network of the reference path with every feature on, and a function that makes an empty
    cache for it."""
    folder = tmp_path_factory.mktemp("reference")
    write_checkpoint(folder, max_position_embeddings=8192, **GEOMETRIES["groups-qlora-yarn"])
    with Checkpoint.open(folder) as checkpoint:
        weights = {name: checkpoint.tensor(name).float() for name in checkpoint.infos}
        ops = TorchBackend()
        config = checkpoint.config
        experts = ResidentExperts(
            weights, config.moe_layers, config.n_routed_experts, ops, Exclusive()
        )
        network = Network(config, weights, ops, experts)

        def unwritten(shape, dtype):  # rows that are not written yet must never be read
            return torch.full(shape, torch.nan, dtype=dtype)

        def cache(context=128, dtype=torch.float32):
            return LatentCache(config, context, (config.latent_width, dtype), unwritten)

        yield network, cache


@pytest.mark.parametrize("sizes", [[1] * 40, [39, 1], [7, 20, 13], [1, 38, 1]], ids=str)
def test_decode_and_chunks_equal_one_prefill(reference, sizes):
    network, cache = reference
    whole = feed(network, cache(), IDS, [40])
    assert relative_error(feed(network, cache(), IDS, sizes), whole) <= FP32


def test_absorbed_equals_expanded_attention_over_several_blocks(reference, monkeypatch):
    """A chunk long enough that expansion is cheaper, over blocks so small that the softmax is
    merged many times."""
    network, cache = reference
    ids = (IDS * 6)[:200]
    wanted = feed(network, cache(256), ids, [200])  # in one block
    monkeypatch.setattr("slotmoe.model.layers._MAX_SCORES", 1)  # blocks of 64 positions
    expanded_calls = []
    monkeypatch.setattr(
        network.backend,
        "expand",
        lambda *a: expanded_calls.append(1) or TorchBackend.expand(network.backend, *a),
    )
    expanded = feed(network, cache(256), ids, [200])
    assert len(expanded_calls) > 4
    expanded_calls.clear()
    absorbed = feed(network, cache(256), ids, [1] * 200)
    assert not expanded_calls
    assert relative_error(absorbed, wanted) <= FP32
    assert relative_error(expanded, wanted) <= FP32


def test_cache_holds_one_latent_row_a_token_a_layer(reference):
    network, cache = reference
    c = network.config
    made = cache(100, torch.float16)
    assert made.nbytes == 2 * 100 * c.num_hidden_layers * (c.kv_lora_rank + c.qk_rope_head_dim)
    feed(network, made, IDS, [40])
    assert torch.isfinite(made.layers[:, :40].float()).all()
    assert torch.isnan(made.layers[:, 40:].float()).all()


def test_failed_step_can_be_repeated(reference, monkeypatch):
    network, cache = reference
    made, wanted = cache(), feed(network, cache(), IDS, [20, 20])
    feed(network, made, IDS, [20])
    with monkeypatch.context() as patch:
        patch.setattr(network, "experts", lambda *a: (_ for _ in ()).throw(RuntimeError("disk")))
        with pytest.raises(RuntimeError, match="disk"):
            network.forward(torch.tensor(IDS[20:]), [made])
    assert made.length == 20
    assert torch.equal(feed(network, made, IDS[20:], [20]), wanted[20:])


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


def test_softmax_factor_of_the_published_config():
    yarn = {
        "type": "yarn",
        "factor": 40,
        "mscale": 0.707,
        "mscale_all_dim": 0.707,
        "original_max_position_embeddings": 4096,
    }
    rope = parse_config({**SMALL_GATE, "rope_scaling": yarn}).rope
    assert np.isclose(rope.softmax_factor, 1.5896, atol=5e-5)
    assert rope.table_scale == 1.0

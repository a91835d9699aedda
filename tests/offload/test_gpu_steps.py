"""A decode step on a GPU: few launches, captured as graphs, and the whole runtime on Triton
kernels.

Without a CUDA device the kernels are interpreted on the GPU's twin.
"""

import importlib
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from slotmoe.model.attention import new_state
from slotmoe.model.config import parse_config
from slotmoe.model.names import role_of
from slotmoe.model.network import Network
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.speed import GPU_LAUNCHES
from slotmoe.offload.policy.passes import Drafting
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.backends.base import TorchBackend
from slotmoe.quant.backends.graphs import CudaGraphs
from slotmoe.quant.codecs.codec import NF4
from slotmoe.quant.codecs.encode import nf4_by_torch
from slotmoe.quant.codecs.weight import CodedWeight, Int8Weight, int8_by_torch, map_tensors
from slotmoe.quant.shapes import resident_quantization
from tests.support import simulated, streams
from tests.support.engine import start, whole
from tests.support.oracle import relative
from tests.support.slab import LEVELS, SlabExperts
from tests.support.streams import Recorded
from tests.support.tiny import CONFIG, SMALL, random_weights
from tests.support.twin import Twin, open_on
from tests.support.v4 import write_case

pytestmark = pytest.mark.usefixtures("interpreter")

pytest.importorskip("triton.runtime.interpreter", reason="needs Triton, which is for Linux")
tl = importlib.import_module("triton.language")
mla = importlib.import_module("slotmoe.quant.kernels.triton.mla")
TWIN = None if torch.cuda.is_available() else Twin(2)
DEVICE = TWIN.device if TWIN else torch.device("cuda")
V3 = {"model_type": "deepseek_v3", "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
V3 |= {"architectures": None, "norm_topk_prob": True, "rope_interleave": False}
SIZES = {"hidden_size": 32, "moe_intermediate_size": 24, "num_attention_heads": 4}
NOTHING = {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 0}
CONFIGS = {
    "int8, q-LoRA, groups, sigmoid gate with a bias, pairs in halves": ("int8", V3),
    "NF4, one query matrix, greedy, no shared experts": ("nf4", NOTHING),
    "bf16": ("bf16", {}),
    "int8, pairs side by side": ("int8", SIZES),
}


def make_network(backend, resident="int8", complete=False, **overrides):
    raw = {**CONFIG, **SMALL, "vocab_size": 32, **overrides}
    raw["num_key_value_heads"] = raw["num_attention_heads"]
    config = parse_config(raw)
    weights, placed = random_weights(raw), {}
    for name, weight in weights.items():
        kind = resident_quantization(role_of(name), resident)
        if role_of(name) in ("norm", "gate"):
            weight = weight.float()
        elif kind == "int8":
            weight = Int8Weight(*int8_by_torch(weight))
        elif kind is NF4:
            weight = CodedWeight(*nf4_by_torch(weight), LEVELS, tuple(weight.shape))
        placed[name] = map_tensors(weight, lambda tensor: tensor.to(DEVICE))
    experts = SlabExperts(backend, config, weights, DEVICE, complete)
    return Network(config, placed, backend, experts)


def cache_of(network, context=40):
    def poisoned(shape, dtype):
        return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)

    return new_state(network.config, context, network.backend.latent_row, poisoned)


def decode(network, ids, cache):
    """The residual stream after each of ``ids``, step by step."""
    steps = [network.forward(torch.tensor([id], device=DEVICE), [cache]).clone() for id in ids]
    return torch.cat(steps)


def triton_ops(graph=None):
    backend = pick_backend(DEVICE, "triton")
    backend.few.graph = CudaGraphs() if graph is not None and DEVICE.type == "cuda" else graph
    return backend


@pytest.fixture(scope="module", autouse=True)
def few_splits():
    """An interpreter's time goes with the number of programs, most of which have no rows here.
    Graphs are captured without gradients, as the engine runs."""
    with pytest.MonkeyPatch.context() as patch:
        if TWIN:
            patch.setattr(mla, "SPLITS", tl.constexpr(4))
            simulated.queue_interpreted_kernels()
        with TWIN.current() if TWIN else nullcontext(), torch.inference_mode():
            yield


@pytest.mark.slow
@pytest.mark.parametrize("case", CONFIGS)
def test_captured_steps_plain_calls_prefill_and_plain_torch_agree(case):
    resident, overrides = CONFIGS[case]
    ids = torch.tensor([3, 30], device=DEVICE)
    reference = make_network(TorchBackend(), resident, **overrides)
    plain = make_network(triton_ops(), resident, **overrides)
    captured = make_network(triton_ops(Recorded), resident, complete=True, **overrides)
    expected_TD = reference.forward(ids, [cache_of(reference)])
    decoded_TD = decode(plain, ids.tolist(), cache_of(plain))
    prefilled_TD = plain.forward(ids, [cache_of(plain)])
    expected_TV = reference.head(expected_TD)
    assert relative(decoded_TD, expected_TD) < 3e-3
    assert relative(plain.head_each(decoded_TD), expected_TV) < 3e-3
    assert relative(prefilled_TD, expected_TD) < 2e-2
    assert relative(plain.head(prefilled_TD), expected_TV) < 2e-2
    assert torch.equal(decode(captured, ids.tolist(), cache_of(captured)), decoded_TD)
    assert not captured.experts.calls


@pytest.mark.usefixtures("nightly")
@pytest.mark.parametrize(
    ("counts", "complete"), [*product(([1, 2], [4, 1, 1, 2], [4], [1] * 8), (True, False))]
)
def test_each_token_of_a_step_is_bitwise_as_alone(counts, complete):
    """So many tokens of each sequence, in caches of different sizes that hold more or less; then,
    by the same graphs, with the sequences in another order."""
    alone, network = (
        make_network(triton_ops(graph), complete=complete, q_lora_rank=16)
        for graph in (None, Recorded)
    )
    texts = []
    for place, count in enumerate(counts):
        expected, actual = (cache_of(each, 20 + place) for each in (alone, network))
        before, ids = 3 * place, [*range(place, place + count)]
        rows = torch.randn(expected.layers[:, :before].shape, device=DEVICE).half()
        for cache in (expected, actual):
            cache.layers[:, :before], cache.length = rows, before
        texts.append((before, ids, decode(alone, ids, expected), expected.layers, actual))
    for turn, some in enumerate((texts, texts[::-1])):
        for before, *_, cache in some:
            cache.layers[:, before:], cache.length = torch.nan, before
        made, ids_T = Recorded.made, torch.tensor([id for _, ids, *_ in some for id in ids])
        caches, counts = [cache for *_, cache in some], [len(ids) for _, ids, *_ in some]
        actual_TD = network.forward(ids_T.to(DEVICE), caches, counts)
        assert torch.equal(actual_TD, torch.cat([expected_TD for *_, expected_TD, _, _ in some]))
        assert DEVICE.type == "cuda" or (Recorded.made > made) == (turn == 0)
        for *_, expected, cache in some:
            end = cache.length
            assert torch.equal(cache.layers[:, :end], expected[:, :end])


WAYS = {  # of a whole engine
    "misses": {"graph": True, "slots": 2},
    "graphs": {"graph": True},
    "misses without graphs": {"slots": 2},
    "misses on both sides": {"graph": True, "slots": 2, "misses": "hybrid"},
    "misses on the CPU": {"slots": 2, "misses": "cpu"},
    "drafts": {"graph": True, "draft": "ngram"},
}
IDS, TEXT = [46, 6, 46], [2, 13, 2]  # the first use experts 0 and 1, or 2 and 3


@pytest.fixture(scope="module")
def ran(small_export):
    """A function of a way: residual streams, choices, a text, and its rows of the cache."""

    def run(graph=False, misses="fetch", **options):
        twin, Recorded.made, heard = Twin(1, triton=True, graph=Recorded if graph else None), 0, []
        options |= {"misses": misses, "prefetch": False}
        with open_on(small_export, twin, **options) as runtime:
            assert runtime.stats()["kernels"] == "triton, interpreted"
            runtime.warm()
            step = start(runtime)
            steps = [step(IDS[:1])]
            runtime.model.experts.on_layer(heard.append)
            steps += [step([id]) for id in IDS[1:]]
            choices, made = [route.indices for route in heard], Recorded.made
            whole(runtime)
            text = [token.id for token in runtime.generate(TEXT, max_new_tokens=4)]
            rows = runtime.model.states[0].layers[:, : len(TEXT)].cpu()
            counts = runtime.stats()
        return torch.cat(steps), choices, text, rows, made, counts

    def lengths(drafting, chances, room):  # as many as a pass takes, however few are right
        return [min(len(each), room) for each in chances]

    with pytest.MonkeyPatch.context() as patch:  # the head is most of an interpreter's time
        patch.setattr(Network, "head", lambda self, h_TD: h_TD.clone())
        patch.setattr(Drafting, "lengths", lengths)
        yield run, run()


@pytest.mark.usefixtures("twin")
@pytest.mark.skipif(
    DEVICE.type == "cuda", reason="the GPU's twin is in RAM, where kernels have to be interpreted"
)
@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_an_engine_gives_the_same_bits_in_each_way(ran, way):
    """With every expert in a slot there is one graph, and a watcher hears of every choice.  What
    the CPU computes differs by rounding alone."""
    run, (streams, choices, text, rows, _, _) = ran
    options = WAYS[way]
    found, chosen, said, kept, made, counts = run(**options)
    assert chosen == choices and said == text and (made > 0) == ("graph" in options)
    if counts["misses"]["computed"]:
        assert relative(found, streams) < 2e-2  # the native kernels take 8 bits of an activation
    else:
        assert torch.equal(found, streams) and torch.equal(kept, rows)
    assert ("slots" in options) == (counts["misses"]["fetched"] + counts["misses"]["computed"] > 0)
    assert ("cpu" in way.lower() or "both" in way) == (counts["misses"]["computed"] > 0)
    assert way != "drafts" or counts["drafts"]["accepted"] > 0


@pytest.mark.usefixtures("nightly")
def test_a_runtime_on_triton_kernels_says_what_the_others_say(sample_export):
    found = []
    for kernels in ("triton", "auto"):
        options = {"device": "cpu", "ram": "2GiB", "kernels": kernels}
        if kernels == "triton" and DEVICE.type == "cuda":
            options = {"device": "cuda", "vram": "1GiB"}
        with Runtime.open(sample_export, context=32, **options) as runtime:
            assert ("triton" in runtime.stats()["kernels"]) == (kernels == "triton")
            step = start(runtime)
            found.append(torch.cat([step([5, 900, 17]), step([4])]).cpu())
    assert relative(*found) < 2e-2 and torch.equal(*(logits_TV.argmax(-1) for logits_TV in found))


LAUNCHED = {"v3.2-sparse": "indexed", "v4": "compressed", "glm4": "grouped"}


@pytest.mark.usefixtures("nightly", "twin")
@pytest.mark.parametrize("case", LAUNCHED)
def test_launches_of_a_layer_are_those_that_plan_counts(case, tmp_path, monkeypatch):
    shape = {"o_lora_rank": 32} if case == "v4" else {}
    write_case(tmp_path / "source", case, torch.bfloat16, max_position_embeddings=256, **shape)
    quantize(tmp_path / "source", tmp_path / "export")
    launched, put = [], streams.Gpu.put

    def count(gpu, stream, item):
        launched.append(item) if stream is gpu.default else None
        put(gpu, stream, item)

    with open_on(tmp_path / "export", Twin(1, triton=True), misses="fetch") as runtime:
        runtime.warm()
        step = start(runtime)
        for id in range(5, 10):
            step([id])
        monkeypatch.setattr(streams.Gpu, "put", count)
        step([10])
    kernels = sum(not isinstance(item, streams.Mark) for item in launched)
    assert round(kernels / runtime.config.num_hidden_layers) == GPU_LAUNCHES[LAUNCHED[case]]

"""A decode step on a GPU: few launches, captured as graphs, and the whole runtime on Triton
kernels.

Without a CUDA device the kernels are interpreted, and a graph is a list of what was done to which
memory.
"""

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from slotmoe.model.config import parse_config
from slotmoe.model.kv_cache import LatentCache
from slotmoe.model.names import expert_name, role_of
from slotmoe.model.network import DeepseekV2
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant import int8, nf4
from slotmoe.quant.backends import pick_ops
from slotmoe.quant.backends.base import TorchOps
from slotmoe.quant.backends.graphs import CudaGraph, Stretch
from slotmoe.quant.export.layout import PROJECTIONS, RecordLayout
from slotmoe.quant.int8 import Int8Weight
from slotmoe.quant.nf4 import Nf4Weight
from slotmoe.quant.shapes import resident_quantization
from slotmoe.quant.weights import map_tensors
from slotmoe.tools.bench.gpu import DeviceExperts
from tests.support.device_experts import DeviceExperts
from tests.support.engine import start
from tests.support.tiny import CONFIG, random_weights, write_checkpoint
from tests.support.twin import Twin

interpreter = pytest.importorskip(
    "triton.runtime.interpreter", reason="needs Triton, which is for Linux"
)
ROOT = Path(__file__).parents[2]
LEVELS = torch.tensor(nf4.LEVELS)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = {
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
}
CONFIGS = {
    "int8, q-LoRA, groups": (
        "int8",
        {"moe_intermediate_size": 48, "num_experts_per_tok": 3, "num_attention_heads": 4},
    ),
    "NF4, one query matrix, greedy, no shared experts": (
        "nf4",
        {"q_lora_rank": None, "topk_method": "greedy", "n_shared_experts": 0},
    ),
    "bf16": ("bf16", {}),
}


def error(found, expected):
    """Relative RMS difference."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


class Recorded(TorchDispatchMode):
    """What ``CudaGraph`` is on a GPU: the kernels and torch operations of a function with the
    memory that they had.

    ``replay`` repeats them there and calls nothing else; a function that asks for a value on the
    host fails, as on a GPU.
    """

    made = 0

    def __init__(self, function):
        super().__init__()
        Recorded.made += 1
        self._work, self._inside = [], False
        function()
        call, tolist = interpreter.GridExecutor.__call__, torch.Tensor.tolist
        recorder = self

        def launch(executor, *args, **kwargs):
            recorder._work.append(lambda: call(executor, *args, **kwargs))
            recorder._inside = True  # what the interpreter does with torch is not ours
            call(executor, *args, **kwargs)
            recorder._inside = False

        def refuse(tensor):
            raise AssertionError("a graph's work asked for values on the host")

        interpreter.GridExecutor.__call__, torch.Tensor.tolist = launch, refuse
        try:
            with self:
                self.outputs = function()
        finally:
            interpreter.GridExecutor.__call__, torch.Tensor.tolist = call, tolist

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        host = (torch.ops.aten.item.default, torch.ops.aten._local_scalar_dense.default)
        assert operation not in host, "a graph's work asked for a value on the host"
        result = operation(*args, **(kwargs or {}))
        if not self._inside:
            self._work.append(lambda: self._repeat(operation, args, kwargs or {}, result))
        return result

    @staticmethod
    def _repeat(operation, args, kwargs, result):
        again = operation(*args, **kwargs)
        pairs = zip(
            *(one if isinstance(one, (tuple, list)) else (one,) for one in (result, again)),
            strict=True,
        )
        for old, new in pairs:
            if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                old.copy_(new)

    def replay(self):
        for work in self._work:
            work()


def experts_of(ops, config, weights, on_device):
    """All experts of a checkpoint in one slab, in no order."""
    layout = RecordLayout(config.hidden_size, config.moe_intermediate_size)
    count = len(config.moe_layers) * config.n_routed_experts
    slab = torch.zeros(count, layout.record_bytes, dtype=torch.uint8)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    for (layer, expert), slot in zip(
        ((m, e) for m in config.moe_layers for e in range(config.n_routed_experts)),
        order,
        strict=True,
    ):
        for name in PROJECTIONS:
            codes, absmax = nf4.quantize(weights[expert_name(layer, expert, name)])
            layout.part(slab[slot], f"{name}.weight").copy_(codes)
            layout.part(slab[slot], f"{name}.weight.absmax").copy_(absmax)
    tables = order.int().view(len(config.moe_layers), -1).to(DEVICE)
    return DeviceExperts(
        ops, layout, slab.to(DEVICE), dict(zip(config.moe_layers, tables, strict=True)), on_device
    )


def make_network(ops, resident="int8", on_device=False, **overrides):
    raw = {**CONFIG, **SMALL, **overrides}
    raw["num_key_value_heads"] = raw["num_attention_heads"]
    config = parse_config(raw)
    weights, placed = random_weights(raw), {}
    for name, weight in weights.items():
        kind = resident_quantization(role_of(name), resident)
        if role_of(name) in ("norm", "gate"):
            weight = weight.float()
        elif kind == "int8":
            weight = Int8Weight(*int8.quantize(weight))
        elif kind == "nf4":
            weight = Nf4Weight(*nf4.quantize(weight), LEVELS, tuple(weight.shape))
        placed[name] = map_tensors(weight, lambda tensor: tensor.to(DEVICE))
    return DeepseekV2(config, placed, ops, experts_of(ops, config, weights, on_device))


def cache_of(network, context=40):
    cache = LatentCache(
        network.config, context, (network.config.latent_width, torch.float16), DEVICE
    )
    cache.layers.fill_(torch.nan)
    return cache


def decode(network, ids, cache):
    return torch.cat(
        [network.forward(torch.tensor([one], device=DEVICE), cache).clone() for one in ids]
    )


def triton_ops(graph=None):
    ops = pick_ops(DEVICE, "triton")
    ops.graph = CudaGraph if graph is not None and DEVICE.type == "cuda" else graph
    return ops


def open_with(folder, kernels, context):
    """On the CPU but for Triton's kernels, which go where the GPU is, if there is one."""
    if kernels == "triton" and DEVICE.type == "cuda":
        return Runtime.open(folder, device="cuda", vram="1GiB", context=context)
    return Runtime.open(folder, device="cpu", ram="2GiB", context=context, kernels=kernels)


@pytest.mark.parametrize("case", CONFIGS)
def test_decode_and_prefill_agree_with_plain_torch(case):
    resident, overrides = CONFIGS[case]
    ids = [3, 30]
    plain, fast = (
        make_network(TorchOps(), resident, **overrides),
        make_network(triton_ops(), resident, **overrides),
    )
    expected = plain.forward(torch.tensor(ids, device=DEVICE), cache_of(plain), all_logits=True)
    assert error(decode(fast, ids, cache_of(fast)), expected) < 3e-3
    assert (
        error(
            fast.forward(torch.tensor(ids, device=DEVICE), cache_of(fast), all_logits=True),
            expected,
        )
        < 2e-2
    )


@pytest.mark.parametrize("on_device", [True, False])
def test_graphs_replay_what_plain_calls_do_at_every_position_and_for_every_sequence(on_device):
    """Two sequences in turn, and one in a cache of another size, of which the graphs knew nothing
    when they were made."""

    def run(network):
        a, b, c = cache_of(network), cache_of(network), cache_of(network, context=9)
        in_turn = [
            decode(network, [one], cache)
            for one, cache in zip((3, 9, 30, 8, 3), (a, b, a, b, c), strict=True)
        ]
        assert c.length == 1 and a.length == 2
        return (
            torch.cat(in_turn),
            network.hidden_TD,
            *(cache.layers[:, : cache.length].clone() for cache in (a, b, c)),
        )

    Recorded.made = 0
    plain = run(make_network(triton_ops(), on_device=False))
    network = make_network(triton_ops(Recorded), on_device=on_device)
    recorded = run(network)
    for found, expected in zip(recorded, plain, strict=True):
        assert torch.equal(found, expected)
    if DEVICE.type == "cpu":
        # One graph for each size of cache, of whole steps; or one before and one after each layer's
        # experts.
        assert Recorded.made == (
            2 if on_device else 2 * 2 + 1
        )  # the first layer's place is the same in both
        assert network.experts.calls == (2 * 2 if on_device else 5)


def test_whole_steps_and_layer_by_layer_mix():
    """Where experts lose their slots between two steps, the position and the cache that a graph
    reads are still right."""
    ids = [3, 30, 17]
    expected = decode(network := make_network(triton_ops()), ids, cache_of(network))
    network = make_network(triton_ops(Recorded), on_device=True)
    cache, found = cache_of(network), []
    for one in ids:
        found.append(decode(network, [one], cache))
        network.experts.on_device = not network.experts.on_device
    assert torch.equal(torch.cat(found), expected)


def test_a_watched_step_goes_part_by_part():
    network, laps = make_network(triton_ops(), on_device=True), []
    network.lap = laps.append
    decode(network, [3], cache_of(network))
    assert {"attention", "gate", "head"} <= set(laps)


class Counting:
    """A graph that counts."""

    def __init__(self, function):
        self.function, self.outputs, self.replays = function, function(), 0
        Counting.latest = self

    def replay(self):
        self.replays += 1
        self.function()


@torch.inference_mode()
def test_a_stretch_reads_its_buffers_and_nothing_else():
    buffer, out = torch.zeros(2), torch.empty(2)
    stretch = Stretch(lambda x: torch.mul(x, 2, out=out), (buffer,), Counting)
    assert (
        stretch(torch.tensor([1.0, 2.0])) is out
        and out.tolist() == [2, 4]
        and buffer.tolist() == [1, 2]
    )
    assert stretch(torch.tensor([3.0, 4.0])) is out and out.tolist() == [6, 8]
    assert stretch(buffer) is out and out.tolist() == [6, 8]
    assert Counting.latest.replays == 3


def test_a_stretch_is_plain_for_other_shapes_types_and_with_gradients():
    stretch = Stretch(lambda x: x * 2, (torch.zeros(2),), Counting)
    Counting.latest = None
    with torch.inference_mode():
        assert stretch(torch.ones(3)).tolist() == [2, 2, 2]
        assert stretch(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
        assert stretch(torch.ones(2, 2)[:, 0]).tolist() == [2, 2]
    x = torch.ones(2, requires_grad=True)
    stretch(x).sum().backward()
    assert x.grad.tolist() == [2, 2] and Counting.latest is None


@torch.inference_mode()
def test_a_stretch_inside_another_is_part_of_it_and_a_failed_one_can_be_repeated():
    inner = Stretch(lambda x: x + 1, (torch.zeros(2),), Counting)
    outer = Stretch(lambda x: inner(x) * 2, (torch.zeros(2),), Recorded)
    assert outer(torch.ones(2)).tolist() == [4, 4] and inner._graph is None

    def fail(function):
        raise RuntimeError("out of memory")

    broken = Stretch(lambda x: x + 1, (torch.zeros(2),), fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        broken(torch.ones(2))
    assert not Stretch.capturing


@torch.inference_mode()
def test_what_a_graph_would_not_do_again_is_found():
    """The stand-in for a graph is strict: a value fetched by the host fails, and one that Python
    computed is frozen."""
    with pytest.raises(AssertionError, match="host"):
        Stretch(lambda x: x * x.sum().item(), (torch.zeros(2),), Recorded)(torch.ones(2))
    with pytest.raises(AssertionError, match="host"):
        Stretch(lambda x: x * x.tolist()[0], (torch.zeros(2),), Recorded)(torch.ones(2))
    position = [1]
    stretch = Stretch(lambda x: x + position[0], (torch.zeros(2),), Recorded)
    assert stretch(torch.ones(2)).tolist() == [2, 2]
    position[0] = 5
    assert stretch(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.skipif(
    DEVICE.type == "cuda",
    reason="the twin of a card is in RAM, where kernels have to be interpreted",
)
def test_the_engine_decodes_by_one_graph_once_every_expert_has_a_slot(tmp_path, monkeypatch):
    """On the engine's twin of a card; the head, most of an interpreter's time, is left out."""
    monkeypatch.setattr(DeepseekV2, "head", lambda self, h_TD: h_TD.clone())
    write_checkpoint(tmp_path / "source", **{**SMALL, "vocab_size": CONFIG["vocab_size"]})
    quantize(tmp_path / "source", tmp_path / "export")
    found, made = [], []
    for graph in (None, Recorded):
        twin = Twin()
        monkeypatch.setattr(twin, "ops", lambda kernels, threads, graph=graph: triton_ops(graph))
        monkeypatch.setattr(
            "slotmoe.offload.runtime.choose_device", lambda wanted, twin=twin: (twin, "a test")
        )
        Recorded.made = 0
        with Runtime.open(tmp_path / "export", context=32, misses="fetch") as runtime:
            runtime.warm()
            step, before = start(runtime), runtime.stats()["cache"]["hits"]
            found.append(torch.cat([step([one]).clone() for one in (5, 900, 17)]))
            assert runtime.stats()["cache"]["hits"] == before + 3 * SMALL["num_experts_per_tok"]
            made.append(Recorded.made)
    assert torch.equal(*found) and made == [0, 1]


def test_a_runtime_on_triton_kernels_says_what_the_others_say(tmp_path):
    write_checkpoint(tmp_path / "source")
    quantize(tmp_path / "source", tmp_path / "export")
    found = {}
    for kernels in ("torch", "triton"):
        with open_with(tmp_path / "export", kernels, 32) as runtime:
            tokens = [token.id for token in runtime.generate([5, 900, 17, 4], max_new_tokens=2)]
            found[kernels] = (runtime.logits([5, 900, 17, 4]), tokens, runtime.stats()["kernels"])
    assert "triton" in found["triton"][2]
    assert found["triton"][1] == found["torch"][1]
    assert error(found["triton"][0], found["torch"][0]) < 2e-2


@pytest.mark.slow
def test_the_sample_on_triton_kernels_says_what_it_says_on_a_cpu(sample_export):
    found = {}
    for kernels in ("auto", "torch", "triton"):
        with open_with(sample_export, kernels, 64) as runtime:
            logits = runtime.logits(
                runtime.tokenizer.encode("It is a truth universally acknowledged")
            )
            found[kernels] = (
                logits,
                [token.id for token in runtime.generate("My fellow citizens,", max_new_tokens=8)],
            )
    for kernels in ("auto", "torch"):
        assert found["triton"][1] == found[kernels][1]
        assert error(found["triton"][0], found[kernels][0]) < 2e-2

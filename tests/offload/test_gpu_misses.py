"""What the host does for a layer whose experts may be missing, on the GPU's twin, with Triton's
kernels interpreted and the product's own captured graphs."""

import importlib

import pytest
import torch

from slotmoe.model.network import Network
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.misses import HostCompute
from slotmoe.offload.policy.passes import Drafting
from tests.support import simulated, streams
from tests.support.engine import start, whole
from tests.support.twin import Twin, open_on

pytestmark = pytest.mark.usefixtures("interpreter", "twin")
tl = pytest.importorskip("triton.language", reason="needs Triton, which is for Linux")
mla = importlib.import_module("slotmoe.quant.kernels.triton.mla")
IDS = [46, 6, 46]  # of which the second uses experts 2 and 3, the others 0 and 1


@pytest.fixture
def queued(monkeypatch):
    """What happens, in its order: a ``launch`` outside of graphs, a ``graph``, and when the experts
    of a layer and the CPU's part of them begin and end."""
    events, put, replay = [], streams.Gpu.put, streams.CUDAGraph.replay

    def counted(gpu, stream, item):
        if stream is gpu.default and not isinstance(item, streams.Mark):
            events.append("launch")
        put(gpu, stream, item)

    def replayed(graph):
        before = len(events)
        replay(graph)
        events[before:] = ["graph"]

    def told(owner, name, what):
        function = getattr(owner, name)

        def call(*given, **more):
            events.append(f"{what} begin")
            result = function(*given, **more)
            events.append(f"{what} end")
            return result

        monkeypatch.setattr(owner, name, call)

    monkeypatch.setattr(streams.Gpu, "put", counted)
    monkeypatch.setattr(streams.CUDAGraph, "replay", replayed)
    told(Experts, "__call__", "experts")
    told(HostCompute, "compute", "CPU")
    return events


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Without most of an interpreter's time: the head, and programs that have no rows."""
    monkeypatch.setattr(Network, "head", lambda self, h_TD: h_TD.clone())
    monkeypatch.setattr(mla, "SPLITS", tl.constexpr(4))


def decoded(small_export, graph=True, **options):
    """The residual streams behind ``IDS``, and the counts of misses."""
    twin = Twin(1, triton=True, graph=simulated.graphs.CudaGraphs() if graph else None)
    with open_on(small_export, twin, prefetch=False, **options) as runtime:
        runtime.warm()
        step = start(runtime)
        found = torch.cat([step([id]) for id in IDS])
        whole(runtime)
        return found, runtime.stats()["misses"]


def test_a_layer_with_misses_is_few_launches_outside_of_graphs(small_export, queued):
    """At most four, once its buffers are there: the choice to the host; the slot table and what has
    arrived to the GPU.  The bits are those of a step without graphs, all experts in slots."""
    want, _ = decoded(small_export, graph=False, misses="fetch")
    queued.clear()
    got, counts = decoded(small_export, slots=2, misses="fetch")
    assert counts["fetched"] >= 2 and torch.equal(want, got)
    layers = [layer.split(",") for layer in layers_of(queued)]
    # Experts in slots and the shared one, those that have arrived, their sum.
    assert [layer.count("graph") for layer in layers] == [3, 3]
    assert max(layer.count("launch") for layer in layers) <= 4


@pytest.mark.usefixtures("nightly")
def test_a_gpu_has_its_part_of_a_layer_before_the_cpu_begins(small_export, queued):
    """The experts in slots, the shared one, and those that are copied; behind the CPU's part there
    is one launch for its outputs, and the sum."""
    want, _ = decoded(small_export, graph=False, misses="fetch")
    queued.clear()
    got, counts = decoded(small_export, slots=2, misses="hybrid")
    assert counts["computed"] and torch.allclose(want, got, rtol=1e-3, atol=1e-3)
    layer, *_ = layers_of(queued)
    before, after = (part.split(",") for part in layer.split("CPU begin"))
    assert before.count("graph") == 2 and before.count("launch") <= 3
    assert after.count("graph") == after.count("launch") == 1


def layers_of(queued):
    """What happens during the experts of each layer but the first, which makes buffers."""
    return [
        layer.split(",experts end")[0] for layer in ",".join(queued).split("experts begin,")[2:]
    ]


@pytest.mark.usefixtures("nightly")
def test_drafts_change_no_bit(small_export, monkeypatch):
    """They are rows of a pass; no more are drafted than a decoder takes."""
    monkeypatch.setattr(Drafting, "lengths", lambda self, chances, room: [
        min(len(each), room) for each in chances
    ])  # fmt: skip
    found = []
    for draft in ("off", "ngram"):
        twin = Twin(2, triton=True, graph=simulated.graphs.CudaGraphs())
        with open_on(small_export, twin, misses="fetch", draft=draft) as runtime:
            tokens = [token.id for token in runtime.generate([5, 6, 5, 6, 5], max_new_tokens=7)]
            state, counts = runtime.model.states[0], runtime.stats()["drafts"]
            found.append((tokens, state.layers[:, : state.length].cpu()))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert counts["accepted"]

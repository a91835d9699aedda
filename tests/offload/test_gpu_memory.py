"""What a step allocates on a GPU beside weights and slots, counted without one: tensors without
memory, and kernels that are not launched.  The plan's scratch must hold it, and not much more."""

import json
import weakref
from concurrent.futures import Future

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slotmoe.model.config import read_config
from slotmoe.offload.devices.device import Device, Event, Region
from slotmoe.offload.engine import loading
from slotmoe.offload.experts import misses as link
from slotmoe.offload.machine import process_bytes
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import CUBLAS_BYTES, PREFILL_CHUNK, scratch_bytes
from slotmoe.offload.plan.speed import store_bandwidths, stored_bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.backends import pick_backend
from slotmoe.quant.codecs.codec import DEFAULT_CODECS
from tests.support.meta import META, caches_of, empty, network_of
from tests.support.twin import Twin


class Allocations(TorchDispatchMode):
    """Bytes of tensors that operations have made and that are alive, and the most so far, rounded
    as torch's allocator does."""

    def __init__(self):
        super().__init__()
        self._alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        leaves = [x for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        before = {x.untyped_storage()._cdata for x in leaves} - self._alive.keys()
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META:
                storage = tensor.untyped_storage()
                if storage._cdata in before:  # a view of what no operation here has made
                    continue
                size = -(-storage.nbytes() // 512) * 512
                entry = self._alive.setdefault(storage._cdata, [0, size])
                self.now += entry[1] if entry[0] == 0 else 0
                self.peak = max(self.peak, self.now)
                entry[0] += 1
                weakref.finalize(tensor, self._gone, storage._cdata)
        return result

    def _gone(self, storage):
        entry = self._alive[storage]
        entry[0] -= 1
        if entry[0] == 0:
            self.now -= self._alive.pop(storage)[1]


@pytest.mark.usefixtures("interpreter")
@pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton launches its kernels where there is a GPU"
)
@pytest.mark.parametrize(
    ("geometry", "mode"), [("v2-lite", "int8"), ("v2-lite", "bf16"), ("v2", "nf4")]
)
def test_the_plans_scratch_holds_what_a_step_allocates(monkeypatch, geometry, mode):
    interpreter = pytest.importorskip(
        "triton.runtime.interpreter", reason="needs Triton, which is for Linux"
    )
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", lambda *arguments, **options: None)
    config = read_config(geometry_path(geometry))
    network = network_of(config, pick_backend(META, "triton"), mode)
    caches, steps = [*caches_of(network, 4096, [0] * 8)], [PREFILL_CHUNK - 2, 1, 1]
    with Allocations() as allocations:  # what the decoder's rows have lasts
        for counts in ([1] * 8, [1], [16], [128], [256], [PREFILL_CHUNK], steps):
            for depth in (0, 4096 - PREFILL_CHUNK):
                for cache in caches:
                    cache.length = depth
                ids_T = empty(sum(counts), dtype=torch.int64)
                network.head(network.forward(ids_T, caches[: len(counts)], counts)[-1:])
    planned = scratch_bytes(config, PREFILL_CHUNK, "triton") - CUBLAS_BYTES
    assert allocations.peak <= planned <= 1.2 * allocations.peak, (allocations.peak, planned)


# ``--misses auto`` where nobody has calibrated: the machine is measured once, when a model that may
# miss experts is opened on a GPU.  Rates and clock are given.

RATES = {"pcie": 2e6, "pcie_busy": 1e6, "experts": 2.5e6}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where figures are kept."""
    monkeypatch.setattr(loading, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "machine.json"


@pytest.fixture
def opened(kept, twin_export, monkeypatch):
    """Opens a model on a twin that is measured to have ``rates``: its mode, how often it was
    measured since the last time, and what was said."""
    measured, said = [], []

    def open_it(rates=RATES, **options):
        monkeypatch.setattr(link, "measure_link", lambda *_: measured.append(1) or rates)
        chosen = Twin(), "a test"
        monkeypatch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted, notify: chosen)
        given = {"context": 64, "threads": 1, "notify": said.append, "slots": 9, **options}
        with Runtime.open(twin_export, **given) as runtime:
            mode = runtime.stats()["misses"]["mode"]
        result = mode, len(measured), list(said)
        measured.clear()
        said.clear()
        return result

    return open_it


@pytest.mark.parametrize(
    ("changed", "mode"), [({}, "hybrid"), ({"pcie": 50e9}, "fetch"), ({"experts": 50e9}, "cpu")]
)
def test_the_machine_is_measured_once_and_chosen_by(opened, kept, changed, mode):
    """Other figures stay as they were, and what ``bench --calibrate`` stores counts."""
    kept.parent.mkdir()
    kept.write_text(json.dumps({"ram": 31e9, "date": "2020-02-03"}))
    rates = RATES | changed
    line = "measuring once how fast the twin gets experts and the CPU computes them"
    assert opened(rates) == (mode, 1, [line])
    assert opened() == (mode, 0, [])
    known = stored_bandwidths(kept, "the twin")
    assert {name: getattr(known, name) for name in rates} == rates
    assert known.origin_of("pcie_busy").startswith("measured on 20")
    assert (known.ram, known.origin_of("ram")) == (31e9, "measured on 2020-02-03")
    other = stored_bandwidths(kept, "another GPU")
    assert (other.ram, other.origin_of("pcie_busy")) == (31e9, "assumed")
    store_bandwidths(kept, "another GPU", pcie=1e9)
    assert stored_bandwidths(kept, "another GPU").pcie == 1e9
    assert opened(rates) == (mode, 1, [line])
    store_bandwidths(kept, "the twin", pcie=60e9, pcie_busy=60e9, experts=1e6)
    assert opened() == ("fetch", 0, [])


def test_an_idle_link_is_woken_before_it_is_measured(monkeypatch):
    class Copied(Event):
        seconds = 1.0

    class Idle(Device):
        copies = 0

        def copy(self, source, target, after):
            self.copies += 1
            copied = Copied()
            copied.seconds = 8.0 if self.copies < 3 else 1.0  # PCIe's first generation
            return copied

    monkeypatch.setattr(link, "expert_bandwidth", lambda *_, seconds: 1e9)
    slab = Region.of(torch.zeros(8 << 20, dtype=torch.uint8))
    found = link.measure_link(Idle(), slab, None, DEFAULT_CODECS)
    assert found["pcie"] == found["pcie_busy"] == 4 << 20


def test_memory_that_was_measured_with_goes_when_copies_from_it_have_ended(twin):
    """After Ctrl-C in the middle, too."""
    twin, queued, ended = Twin(), [], []
    twin.gpu.eager = twin.gpu.wide = 0  # nothing runs that the host does not wait for
    rows, copy, unpin = twin.region(2, 4096).split(4096), twin.copy, twin.unpin

    def copy_one(*given):
        if queued:
            raise KeyboardInterrupt
        queued.append(copy(*given))
        return queued[0]

    twin.copy = copy_one
    twin.unpin = lambda memory: ended.append(queued[0].done()) or unpin(memory)
    with pytest.raises(KeyboardInterrupt):
        link.copy_bandwidth(twin, rows, Future())
    assert ended == [True]


def test_where_nothing_is_chosen_or_there_is_no_room_nothing_is_measured(opened, kept):
    for mode in ("fetch", "cpu", "hybrid"):
        assert opened(misses=mode) == (mode, 0, [])
    assert opened(slots=None) == ("fetch", 0, [])  # every expert has a slot
    assert opened(ram=process_bytes() + (100 << 20))[1:] == (0, [])
    assert not kept.exists()

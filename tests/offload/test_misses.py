"""``--misses auto`` where nobody has calibrated: the machine is measured once, when a model is
opened on a GPU that will miss experts.  Rates and clock are given; no GPU is needed."""

import json
from concurrent.futures import Future

import pytest
import torch

from slotmoe.offload.devices.device import Device, Event, Region
from slotmoe.offload.engine import loading
from slotmoe.offload.experts import misses as link
from slotmoe.offload.machine import process_bytes
from slotmoe.offload.plan.speed import store_bandwidths, stored_bandwidths
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import DEFAULT_CODECS
from tests.support.twin import Twin

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
    store_bandwidths(kept, "the twin", pcie=60e9, pcie_busy=60e9, experts=1e9)
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

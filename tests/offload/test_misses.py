"""``--misses auto`` where nobody has calibrated: the machine is measured once, when a model is
opened on a GPU that will miss experts.  Rates and clock are given; no GPU is needed."""

import json
from itertools import count
from types import SimpleNamespace

import pytest

from slotmoe.offload.devices.device import Device
from slotmoe.offload.engine import loading
from slotmoe.offload.experts import misses as link
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.machine import process_bytes
from slotmoe.offload.plan.speed import store_bandwidths, stored_bandwidths
from slotmoe.offload.runtime import Runtime
from tests.support import simulated
from tests.support.twin import Twin

RATES = {"pcie": 2e9, "pcie_busy": 1e9, "experts": 1e9}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where figures are kept."""
    monkeypatch.setattr(loading, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "machine.json"


@pytest.fixture
def opened(twin, kept, sample_export, monkeypatch):
    """Opens the sample on a twin that is measured to have ``rates``: its mode, how often it was
    measured since the last time, and what was said."""
    measured, said = [], []

    def open_sample(rates=RATES, device=None, **options):
        monkeypatch.setattr(link, "measure_link", lambda *_: measured.append(1) or rates)
        on = device or Twin()
        monkeypatch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (on, "a test"))
        given = {"context": 64, "threads": 1, "notify": said.append, "slots": 40, **options}
        with Runtime.open(sample_export, **given) as runtime:
            mode = runtime.stats()["misses"]["mode"]
        result = mode, len(measured), list(said)
        measured.clear()
        said.clear()
        return result

    return open_sample


@pytest.mark.parametrize(
    ("changed", "mode"),
    [({}, "hybrid"), ({"pcie_busy": 50e9}, "fetch"), ({"experts": 50e9}, "cpu")],
)
def test_the_machine_is_measured_once_and_chosen_by(opened, kept, changed, mode):
    rates = RATES | changed
    line = "measuring once how fast the twin gets experts and the CPU computes them"
    assert opened(rates) == (mode, 1, [line])
    assert opened() == (mode, 0, [])
    known = stored_bandwidths(kept)
    assert {name: getattr(known, name) for name in rates} == rates
    assert known.origin_of("pcie_busy").startswith("measured on 20")


def test_other_figures_stay_as_they_were_and_what_calibrate_stores_counts(opened, kept):
    store_bandwidths(kept, ram=31e9, pcie=9e9)
    kept.write_text(json.dumps({"ram": 31e9, "pcie": 9e9, "date": "2020-02-03"}))
    assert opened()[:2] == ("hybrid", 1)
    known = stored_bandwidths(kept)
    assert (known.ram, known.origin_of("ram")) == (31e9, "measured on 2020-02-03")
    assert known.pcie == RATES["pcie"]
    store_bandwidths(kept, pcie_busy=60e9)
    assert opened() == ("fetch", 0, [])


def test_where_nothing_is_chosen_or_there_is_no_room_nothing_is_measured(
    opened, kept, sample_export, monkeypatch, tmp_path
):
    for mode in ("fetch", "cpu", "hybrid"):
        assert opened(misses=mode) == (mode, 0, [])
    assert opened(slots=None) == ("fetch", 0, [])  # every expert has a slot
    assert opened(ram=process_bytes() + (100 << 20))[1:] == (0, [])
    monkeypatch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (Device(), "none"))
    with Runtime.open(sample_export, context=64, threads=1, slots=40) as runtime:
        assert "misses" not in runtime.stats()
    assert not kept.exists()
    kept.parent.write_text("a file, where a folder should be")
    for _ in range(2):  # what can't be kept is measured again
        assert opened()[:2] == ("hybrid", 1)


@pytest.mark.parametrize(
    ("room", "tokens", "fetched", "computed"),
    [(1, 1, [4, 2, 5, 1, 3], []), (1, 2, [4, 5, 1], [2, 3]), (0, 1, [4, 5, 1], [2, 3])],
)
def test_the_cpu_computes_what_few_tokens_use_once_slots_are_full(room, tokens, fetched, computed):
    """First comes what is on its way, then what is in RAM."""
    host = SimpleNamespace(cache=SimpleNamespace(cached={2, 5}))
    split = SimpleNamespace(for_cpu=lambda tokens, uses, absent: 2)
    experts = SimpleNamespace(misses="cpu", slots=SimpleNamespace(room=lambda: room))
    experts.hybrid = link.HostCompute(None, None, host, None, 1, split)
    experts._store, uses = SimpleNamespace(of={4: None}), {1: 9, 2: 1, 3: 1, 4: 1, 5: 2}
    assert Experts._divided(experts, tokens, uses, [*uses], 4) == (fetched, computed)


def test_the_measurement_goes_through_the_device_and_leaves_nothing(
    twin, kept, sample_export, monkeypatch
):
    """By a clock that goes on by a tenth of a second when somebody looks at it."""
    clock, on, locked = count(), Twin(), []
    copy, pinned = on.copy, dict(simulated.PINNED)

    def watched(source, *given):
        new = simulated.PINNED.keys() - pinned.keys()
        locked.append(any(start <= source.data_ptr() for start in new))
        return copy(source, *given)

    on.copy = watched
    tenths = SimpleNamespace(perf_counter=lambda: next(clock) / 10, sleep=lambda seconds: None)
    monkeypatch.setattr(link, "time", tenths)
    monkeypatch.setattr("slotmoe.offload.runtime.choose_device", lambda wanted: (on, "a test"))
    with Runtime.open(sample_export, context=64, threads=1, slots=40) as runtime:
        slab = runtime.model.experts.slots.slab
        pieces = -(-slab.nbytes // (4 << 20))
        assert len(locked) >= 2 * pieces and all(locked)
        assert simulated.PINNED.keys() == pinned.keys()
    rates = stored_bandwidths(kept)
    assert all(rates.origin_of(name) != "assumed" for name in RATES)

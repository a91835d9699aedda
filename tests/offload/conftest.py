"""Fixtures of the engine on the twin of a GPU."""

from functools import partial

import pytest

from slotmoe.offload import loading
from slotmoe.offload.observe import measure
from slotmoe.offload.policy.prefetch import Prefetcher
from tests.support.engine import IDS, PROMPT
from tests.support.twin import Twin, open_on


@pytest.fixture(scope="session", autouse=True)
def quick_measurements():
    """Nothing here asks whether a measured bandwidth is true, so little is read for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_MEASURED_BYTES", 16 << 20)
        patch.setattr(measure.disk_bandwidth, "__defaults__", (64 << 20,))
        rate = measure.expert_bandwidth
        patch.setattr(measure, "expert_bandwidth", lambda *given, seconds: rate(*given, seconds=0))
        yield


@pytest.fixture
def always_guessing(monkeypatch):
    """The sample's records are too small to be read ahead; here they are nevertheless."""
    monkeypatch.setattr(Prefetcher, "pays", lambda self: True)
    monkeypatch.setattr(loading, "HELP_BYTES", 0)


@pytest.fixture
def on_twin(twin, sample_export):
    return partial(open_on, sample_export)


@pytest.fixture(scope="session")
def wanted(twin, sample_export):
    """Logits and greedy ids with every expert in a slot."""
    with open_on(sample_export, Twin(), misses="fetch") as runtime:
        return runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 8)]

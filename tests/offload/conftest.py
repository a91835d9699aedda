"""Fixtures of the engine: on the twin of a GPU, eager to guess, and of a model with a head."""

from functools import partial

import pytest
import torch

from slotmoe.offload.engine import loading
from slotmoe.offload.experts import misses
from slotmoe.offload.experts.ahead import Lookahead
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.observe import measure
from slotmoe.offload.policy.passes import MOST_DRAFTED, Drafting
from slotmoe.tools.bench import speed
from tests.support.engine import IDS, PROMPT
from tests.support.exports import made_once
from tests.support.twin import Twin, open_on
from tests.support.v4 import write_case


@pytest.fixture(scope="session", autouse=True)
def quick_measurements():
    """Nothing here asks whether a measured bandwidth is true, so little is read for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "_MEASURED_BYTES", 16 << 20)
        patch.setattr(measure.drive_bandwidths, "__defaults__", (64 << 20,))
        rate = misses.expert_bandwidth
        patch.setattr(speed, "_TURNS", 1)
        for owner in (misses, speed):
            patch.setattr(
                owner, "expert_bandwidth", lambda *given, seconds: rate(*given, seconds=0)
            )
        yield


@pytest.fixture
def always_guessing(monkeypatch):
    """The sample's records are too small to be read ahead; here they are nevertheless."""
    monkeypatch.setattr(Lookahead, "pays", lambda self: True)
    monkeypatch.setattr(loading, "HELP_BYTES", 0)


@pytest.fixture
def eager(monkeypatch):
    """A row more is taken to cost nothing, so that wrong tokens are drafted too."""

    def all_of(self, chances, room):
        return [min(len(each), MOST_DRAFTED // len(chances)) for each in chances]

    monkeypatch.setattr(Drafting, "lengths", all_of)
    monkeypatch.setattr(Drafting, "pays", lambda self, chance, cost: True)


@pytest.fixture(scope="session")
def twin_export(twin):
    """Three layers of 16 experts: on the twin each operation takes long."""
    with made_once("twin", num_hidden_layers=4, n_routed_experts=16) as export:
        yield export


@pytest.fixture
def on_twin(twin_export):
    return partial(open_on, twin_export)


@pytest.fixture(scope="session")
def wanted(twin_export):
    """Logits and greedy ids with every expert in a slot."""
    with open_on(twin_export, Twin(), misses="fetch") as runtime:
        return runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 8)]


@pytest.fixture(scope="session")
def with_head(tmp_path_factory):
    """A checkpoint whose head predicts one token more, and exports of it without and with that."""
    folder = tmp_path_factory.mktemp("mtp")
    given = folder / "source", "v3-groups-yarn", torch.bfloat16
    write_case(*given, num_nextn_predict_layers=1)
    quantize(folder / "source", folder / "without")
    quantize(folder / "source", folder / "export", keep_mtp=True)
    return folder

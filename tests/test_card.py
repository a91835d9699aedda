"""The engine on a card, through the twin: order of streams, budgets, split misses, faults.  No GPU is needed."""

import time
from dataclasses import replace
from functools import partial

import pytest
import torch

from offload import opening
from offload.cache import POLICIES
from offload.plan import make_plan
from offload.prefetch import Prefetcher
from offload.runtime import Runtime
from tests.twin import Twin

PROMPT = "My fellow citizens of the Senate and House of Representatives,"
IDS = torch.randint(2, 4000, (60,), generator=torch.Generator().manual_seed(3)).tolist()
EXPERTS = 7 * 32


@pytest.fixture(autouse=True)
def always_guessing(monkeypatch):
    """The sample's records are too small to be read ahead; here they are nevertheless."""
    monkeypatch.setattr(Prefetcher, "pays", lambda self: True)
    monkeypatch.setattr(opening, "HELP_BYTES", 0)


def open_on(export, twin, host_slots=EXPERTS, **options):
    """The sample on a twin, with so many experts in RAM below it."""

    def plan(*arguments, **given):
        return replace(make_plan(*arguments, **given), host_slots=host_slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opening, "make_plan", plan)
        patch.setattr("offload.runtime.choose_device", lambda wanted: (twin, "a test"))
        return Runtime.open(export, context=256, **options)


@pytest.fixture
def on_twin(sample_export):
    return partial(open_on, sample_export)


@pytest.fixture(scope="module")
def wanted(sample_export):
    """Logits and greedy ids with every expert in a slot."""
    with open_on(sample_export, Twin(), misses="fetch") as runtime:
        return runtime.logits(IDS), [token.id for token in runtime.generate(PROMPT, 20)]


def whole(runtime):
    """No slot is lost or used twice, on the card and in RAM, and the card's table says what is true."""
    slots, tier = runtime._experts._slots, runtime._store
    table = slots._table
    held = [*table.free, *table.slot_of.values(), *(slot for _, slot in slots._leaving)]
    assert sorted(held) == list(range(len(table.slab)))
    assert {*table.slot_of} == {*slots._coming} | slots.cache._cached
    told = {key: slot for key, slot in enumerate(slots.table_LE.flatten().tolist()) if slot >= 0}
    assert told == {key: table.slot_of[key] for key in slots.cache._cached}
    tier.advance(0)  # gives back what is lent
    deadline = time.monotonic() + 5
    below = tier._table
    while len(below.free) + len(below.slot_of) < len(below.slab) and time.monotonic() < deadline:
        time.sleep(0.01)  # a prefetch is still on its way
        tier.stats()
    assert sorted([*below.free, *below.slot_of.values()]) == list(range(len(below.slab)))
    assert {*below.slot_of} == below.cache._cached
    assert not tier._in_use


def slow(number):
    return 0.002 * (number % 3)


@pytest.mark.parametrize("host_slots", [0, 40, EXPERTS])
@pytest.mark.parametrize(
    "options",
    [
        {"slots": 6},
        {"slots": 22},
        {"slots": 56, "prefetch": False},
        {"slots": 112},
        {},
        *({"slots": 30, "cache_policy": one} for one in POLICIES),
    ],
    ids=str,
)
def test_fetch_gives_the_same_bits_for_every_budget_and_policy(on_twin, wanted, options, host_slots):
    if "cache_policy" in options and host_slots != 40:
        pytest.skip("policies are tried with one size of RAM")
    twin = Twin(slow if host_slots == 40 else None)
    with on_twin(twin, host_slots, misses="fetch", **options) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted[0])
        assert [token.id for token in runtime.generate(PROMPT, 20)] == wanted[1]
        stats = runtime.stats()
        assert stats["misses"]["computed"] == 0
        assert stats["misses"]["fetched"] > 0
        assert (stats["io"]["host"]["hits"] > 0) == (host_slots > 0 and "slots" in options)
        assert stats["io"]["host"]["bytes"] == twin.copies * runtime.plan.record_bytes
        assert stats["io"]["host"]["seconds"] > 0
        if host_slots == EXPERTS:  # each expert left the disk once
            assert stats["io"]["disk"]["bytes"] <= EXPERTS * runtime.plan.record_bytes
        whole(runtime)

"""Runtimes under test: step by step, and whether their slots are whole."""

import time

import torch

from slotmoe.offload.tiers.host import HostTier

PROMPT = "My fellow citizens of the Senate and House of Representatives,"
IDS = torch.randint(2, 4000, (60,), generator=torch.Generator().manual_seed(3)).tolist()

RUN = """
import json, sys
from slotmoe.offload.machine import peak_rss
from slotmoe.offload.plan.memory import by_tier, predicted_components
from slotmoe.offload.runtime import Runtime
slots, prompt = int(sys.argv[1]), int(sys.argv[2])
with Runtime.open(sys.argv[3], context=1024, slots=slots) as runtime:
    for repetition in range(3):
        list(runtime.generate([5 + (7 * n + repetition) % 4000 for n in range(prompt)], 40))
    predicted = by_tier(predicted_components(runtime.plan, prompt, 40))["ram"]
    print(json.dumps([peak_rss(), predicted, runtime.stats()["kernels"]]))
"""
"""A process with so many slots generates from prompts of so many tokens, and prints its peak
memory, the prediction, and the kernels."""


def start(runtime, depth=0):
    """Begin a new sequence, with ``depth`` unknown tokens, and return its ``step(ids)``."""
    sequence = runtime.sequences[0]
    sequence.fill(depth)
    return sequence.append


def busy(store):
    """Whether a record of the host tier is on its way, being copied or acquired."""
    store.stats()  # takes back what has been copied
    held = len(store.table.free) + len(store.table.left) + len(store.table.slot_of)
    return held < len(store.slab) or bool(store._in_use)


def whole(runtime):
    """No slot is lost or used twice: every slot is free, cached, or for staging; and the device's
    slot table says what is true.  The same below a GPU."""
    slots, store = runtime.model.experts.slots, runtime.model.store
    slots.recover()  # what the next pass begins with
    table, cached = slots.table, slots.cache.cached
    held = [
        *table.free,
        *table.left.values(),
        *table.slot_of.values(),
        *(slot for _, slot in slots.abandoned),
    ]
    assert sorted(held) == list(range(len(slots.slab)))[: len(held)]
    assert len(held) == min(len(slots.slab), slots.cache.slots + slots.staging)
    assert {*table.slot_of} == {*slots.coming} | cached
    assert len(slots.cache) <= slots.cache.slots
    entries = dict(enumerate(slots.slots_ME.flatten().tolist()))
    assert {id: slot for id, slot in entries.items() if slot >= 0} == {
        id: table.slot_of[id] for id in cached
    }
    if not isinstance(store, HostTier):
        return
    deadline = time.monotonic() + 5
    while busy(store) and time.monotonic() < deadline:
        time.sleep(0.01)  # a prefetch is still on its way, from the disk or from RAM
    assert not busy(store)
    held = [*store.table.free, *store.table.left.values(), *store.table.slot_of.values()]
    assert sorted(held) == list(range(len(store.slab)))
    assert {*store.table.slot_of} == store.cache.cached

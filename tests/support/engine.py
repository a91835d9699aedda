"""Runtimes under test: step by step, and whether their slots are whole."""

import time
from queue import SimpleQueue

import torch

from slotmoe.offload.engine.requests import Request, wait_for
from slotmoe.offload.observe.forced import begin, force
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


def until(condition, seconds=30.0):
    """Wait until ``condition()`` is true; the deadline is for what would never be."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it was never true"
        time.sleep(0.002)


def start(runtime, depth=0):
    """Begin a new text, behind ``depth`` unknown tokens, and return its ``step(ids)``, which reads
    ``ids`` and gives the last one's logits."""
    text = begin(runtime, depth)

    def step(ids):
        text.extend(ids)
        return force(runtime, [*text], keeps=True).logits[0][None]

    return step


def decode(runtime, prompt, ids):
    """Logits behind ``prompt``, of which what a sequence holds is not computed again, and behind
    each of ``ids``, decoded one by one."""
    return torch.stack(force(runtime, prompt, ids, keeps=True).logits)


def ask(runtime, ids, answer, at=lambda request: None):
    """The deltas of an answer to ``ids``; ``at(request)`` is called with each, in the engine's
    thread."""
    queue, deltas = SimpleQueue(), []

    def emit(delta):
        at(request)
        queue.put(delta)

    request = Request(ids, answer, emit)
    runtime.engine.submit(request)
    while not deltas or deltas[-1].finish is None:
        deltas.append(wait_for(queue, request.alive))
    return deltas


def held(table):
    """Slots that are free or have an owner."""
    return [*table.free, *table.left.values(), *table.slot_of.values()]


def busy(store):
    """Whether a record of the host tier is on its way, being copied or acquired."""
    store.stats()  # takes back what has been copied
    return len(held(store.table)) < len(store.slab) or bool(store._in_use)


def whole(runtime):
    """No slot is lost or used twice: every slot is free, cached, or for staging; and the device's
    slot table says what is true.  The same below a GPU."""
    slots, store = runtime.model.experts.slots, runtime.model.store
    slots.recover()  # what the next pass begins with
    table, cached = slots.table, slots.cache.cached
    taken = held(table) + [slot for _, slot in slots.abandoned]
    assert sorted(taken) == list(range(min(len(slots.slab), slots.cache.slots + slots.staging)))
    assert {*table.slot_of} == {*slots.coming} | cached
    assert len(slots.cache) <= slots.cache.slots
    entries = dict(enumerate(slots.slots_ME.flatten().tolist()))
    known = {expert_id: slot for expert_id, slot in entries.items() if slot >= 0}
    assert known == {expert_id: table.slot_of[expert_id] for expert_id in cached}
    if isinstance(store, HostTier):
        until(lambda: not busy(store))  # a prefetch is still on its way, from the disk or from RAM
        assert sorted(held(store.table)) == list(range(len(store.slab)))
        assert {*store.table.slot_of} == store.cache.cached

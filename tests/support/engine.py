"""Runtimes under test: step by step, and whether their slots are whole."""

import time
from contextlib import contextmanager
from queue import SimpleQueue

import torch

from slotmoe.offload.engine.requests import Forced, Request, wait_for
from slotmoe.offload.experts.host import HostTier
from slotmoe.offload.experts.store import CACHED, FREE, LEAVING, READING, STALE

PROMPT = "My fellow citizens of the Senate and House of Representatives,"


def words(seed, count):
    """A text of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, 4000, (count,), generator=generator).tolist()


IDS = words(3, 60)


def until(condition, seconds=30.0):
    """Wait until ``condition()`` is true; the deadline is for what would never be."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it was never true"
        time.sleep(0.002)


def start(runtime, depth=0):
    """Begin a new text, behind ``depth`` unknown tokens, and return its ``step(ids)``, which reads
    ``ids`` and gives the last one's logits."""
    text = runtime.engine.empty(depth)

    def step(ids):
        text.extend(ids)
        return runtime.engine.force([*text], keeps=True).logits[0][None]

    return step


def decode(runtime, prompt, ids):
    """Logits behind ``prompt``, of which what a sequence holds is not computed again, and behind
    each of ``ids``, decoded one by one."""
    return torch.stack(runtime.engine.force(prompt, ids, keeps=True).logits)


def at_once(runtime, *requests):
    """Submit requests that start in one step, and wait until all have ended: the last deltas."""
    ended = [SimpleQueue() for _ in requests]
    for request, queue in zip(requests, ended, strict=True):
        request.emit = lambda delta, queue=queue: queue.put(delta) if delta.finish else None
    runtime.engine.call(lambda: runtime.engine.submit(*requests))
    return [wait_for(queue, runtime.engine._life.is_on) for queue in ended]


def together(runtime, prompts, ids=()):
    """What ``decode`` gives of each of ``prompts``, which are read in the same passes."""
    texts = [Forced(ids, keeps=True) for _ in prompts]
    ends = at_once(runtime, *map(Request, prompts, texts))
    assert {end.finish for end in ends} == {"length"}, ends
    return [torch.stack(text.logits) for text in texts]


@contextmanager
def failing(runtime, fail):
    """Call ``fail``, which may raise, inside passes, at the ends of layers."""
    experts = runtime.model.experts
    look, experts.look = experts.look, lambda: (fail(), look())
    try:
        yield
    finally:
        experts.look = look


def passes_of(runtime, monkeypatch):
    """The passes from now on, each as the tokens of its rows, of which prompts' are negative; and
    in a list of its own for how many rows of prompts logits are wanted."""
    found, wanted, passes = [], [], runtime.engine.batch.passes
    run = passes.run

    def note(rows):
        found.append([-len(row.ids) if row.is_prompt else len(row.ids) for row in rows])
        wanted.append(sum(row.is_prompt and row.wanted for row in rows))
        run(rows)

    monkeypatch.setattr(passes, "run", note)
    return found, wanted


def sound(store):
    """What always holds of a store of experts, as ``slotmoe.offload.experts.store`` says it."""
    available, staged = store.available, store.staged
    cached = [slot for slot in store.slots if slot.state is CACHED]
    assert all(slot.state <= STALE for slot in available)
    assert all(READING <= slot.state <= LEAVING for slot in staged.values())
    assert sorted(slot.index for slot in [*available, *staged.values(), *cached]) == [
        slot.index for slot in store.slots
    ]
    assert [slot.rank for slot in available] == sorted(slot.rank for slot in available)
    assert store.leaving == sum(slot.state is LEAVING for slot in staged.values())
    held = [slot for slot in store.slots if slot.state in (STALE, CACHED)]
    assert all(store.of[slot.expert] is slot for slot in held)
    for expert_id, slot in store.of.items():
        assert slot.expert == expert_id and slot.state not in (FREE, LEAVING)
    assert store.cache.cached == {slot.expert for slot in cached}
    assert len(cached) <= store.cache.slots
    wanted = torch.full_like(store.table_ME, -1)
    for slot in cached:
        wanted.view(-1)[slot.expert] = slot.index
    assert torch.equal(store.table_ME, wanted)


def whole(runtime):
    """No slot is lost or used twice, and nothing is held; the device's slot table says what is
    true.  The same below a GPU."""
    slots, source = runtime.model.experts.slots, runtime.model.store
    sound(slots.store)
    ready = (slots.cache.slots + slots.staging) * slots.record_bytes
    assert len(slots.store.slots) * slots.record_bytes == min(slots.slab.nbytes, ready)
    assert not slots.store.held_N.any()
    assert torch.equal(slots.slots_ME.cpu(), slots.store.table_ME)
    if isinstance(source, HostTier):

        def idle():
            source.stats()  # takes back what has been copied
            return not (source.store.staged or source.acquired or source.store.held_N.any())

        until(idle)  # a prefetch is still on its way, from the disk or from RAM
        sound(source.store)
        assert len(source.store.slots) * slots.record_bytes == source.slab.nbytes

"""Rules of the core files in their plainest case."""

import pytest

from slotmoe.offload.experts import _first
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, chain

ROOT = bytes(16)


def test_a_call_takes_few_uses_and_at_least_one_expert():
    uses = {0: 100, 1: 28, 2: 1, 3: 200}
    assert _first([0, 1, 2], uses) == ([0, 1], [2])
    assert _first([3, 0], uses) == ([3], [0])
    assert _first([2], uses) == ([2], [])


def test_memory_in_use_never_shrinks(small_export):
    """Pages that a slab has touched stay."""
    with Runtime.open(small_export, context=64, slots=4) as runtime:
        slots = runtime.model.experts.slots
        assert slots.present() == (0, 0)
        runtime.sequences[0].append([5, 6, 7])
        cached, used = slots.present()
        assert used >= cached > 0
        for expert_id in [*slots.cache.cached]:
            slots.cache.remove(expert_id)
        assert slots.present() == (0, used)


def test_a_block_that_another_process_kept_meanwhile_is_not_written_again(tmp_path, monkeypatch):
    """Between the first look and the lock."""
    blocks = list(chain(ROOT, list(range(64))))
    ours, theirs = (BlockFolder(tmp_path / "blocks", 1 << 20, print) for _ in range(2))
    lock = ours._locked

    def rows(block):
        return memoryview(bytes(len(block.tokens) * 8))

    def late():
        theirs.add(blocks, 8, rows)
        return lock()

    monkeypatch.setattr(ours, "_locked", late)
    before = BlockFolder(tmp_path / "blocks", 1 << 20, print)
    assert ours.add(blocks, 8, lambda block: pytest.fail("asked for latents")) == 0
    assert before.nbytes == ours.nbytes

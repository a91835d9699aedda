"""Rules of the core files in their plainest case."""

from threading import Event

import pytest

from slotmoe.model.generate import Answer, Sampling
from slotmoe.offload.experts import _first
from slotmoe.offload.ingest import output_dir, quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.scheduler import Job, Scheduler
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.quant.export.writer import ExportFile
from tests.support.tiny import SMALL, write_checkpoint

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


def test_an_answer_ends_with_its_context_and_is_counted_once(small_export):
    with Runtime.open(small_export, context=12, slots=4) as runtime:
        batch, deltas, ended = Scheduler(runtime, 1, 4), [], Event()

        def emit(delta):
            deltas.append(delta)
            if delta.finish is not None:
                ended.set()

        sampling = Sampling(logit_bias=((300, 100.0),))
        batch.submit([Job([5, 6], Answer([5, 6], runtime.tokenizer, (), sampling, 99), emit)])
        assert ended.wait(30)
        batch.close()
        assert deltas[-1].finish == "length"
        assert sum(len(delta.tokens) for delta in deltas) == 12 - 2 + 1
        assert batch.totals.finished == {"length": 1}


class Shards:
    """Weight files that come one after the other and were here all along."""

    def __init__(self, folder):
        self.folder = folder

    def announce(self, together, export_bytes, free_bytes):
        return 0

    def arrivals(self, files):
        yield from ((file, self.folder / file) for file in files)

    def release(self, file, path):
        pass


def test_a_state_names_what_is_durable_and_a_file_before_it_is_published(tmp_path, monkeypatch):
    """What the resume's state counts as written has been synced."""
    source = tmp_path / "source"
    write_checkpoint(source, shards=3, **SMALL)
    synced, states, published = set(), [], []
    sync, write, publish = ExportFile.sync, output_dir.write_state, quantize.publish_file

    def write_state(partial, state):
        assert {name.rpartition("/")[2] for name in state["written"]} <= synced
        states.append((len(state["written"]), {*state["files"]}))
        write(partial, state)

    def publish_file(path):
        assert path.relative_to(tmp_path / "export.partial").as_posix() in states[-1][1]
        published.append(path)
        publish(path)

    monkeypatch.setattr(ExportFile, "sync", lambda file: synced.add(file.path.name) or sync(file))
    monkeypatch.setattr(output_dir, "write_state", write_state)
    monkeypatch.setattr(quantize, "publish_file", publish_file)
    quantize.quantize(source, tmp_path / "export", workers=1, shards=Shards(source))
    assert len(published) == 2 and max(count for count, _ in states) > 0

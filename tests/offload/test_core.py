"""Rules of the core files in their plainest case."""

import errno
import os
import shutil
import stat
from dataclasses import replace
from queue import Empty, SimpleQueue
from random import Random
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.config import read_config
from slotmoe.model.generate import Answer, Delta, Sampling
from slotmoe.offload.devices.device import Device
from slotmoe.offload.engine.batch import Batch
from slotmoe.offload.engine.engine import _FORKED
from slotmoe.offload.engine.requests import _WAIT_SECONDS, Request, Stream, wait_for
from slotmoe.offload.experts.experts import Experts, _first
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import ARRIVED, DEMAND, FREE, STALE, ExpertStore, Read
from slotmoe.offload.ingest import output_dir, quantize
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import make_plan, predicted_components, scratch_bytes, sizes_of
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.store import _identity
from slotmoe.quant.codecs.codec import DEFAULT_CODECS
from slotmoe.quant.export.layout import Part, place
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.writer import ExportFile, replace_file
from tests.support.blocks import per_token
from tests.support.engine import ask, decode, sound, start
from tests.support.states import BYTES, CHOSEN, EXPERTS, ROWS, Broken, Disk
from tests.support.tiny import SMALL, write_checkpoint

ROOT = bytes(16)


def test_a_call_takes_few_uses_and_at_least_one_expert():
    uses = {0: 100, 1: 28, 2: 1, 3: 200}
    assert _first([0, 1, 2], uses) == ([0, 1], [2])
    assert _first([3, 0], uses) == ([3], [0])
    assert _first([2], uses) == ([2], [])


def test_what_was_guessed_and_is_demanded_is_read_once():
    """On its way, or arrived; where the read has failed, again."""
    disk = Disk(None)
    cache = make_cache("lru", 4, ROWS, EXPERTS)
    slots = Slots(disk, cache, CHOSEN + 3, CHOSEN, BYTES, Device())
    assert all(slots.prefetch(expert_id, DEMAND + 1) for expert_id in (1, 2, 3))
    guessed = list(disk.pending)
    disk.end(guessed[1], True)
    disk.end(guessed[2], False)
    reads = slots.demand([1, 2, 3])
    assert reads[:2] == guessed[:2] and [read.urgency for read in reads] == [DEMAND] * 3
    assert reads[2] is not guessed[2] and disk.pending == [guessed[0], reads[2]]


def test_a_wait_ends_with_an_item_its_time_or_the_engine():
    asked, queue = [], SimpleQueue()
    nothing = SimpleNamespace(get=lambda timeout: asked.append(timeout) or queue.get(False))
    with pytest.raises(Empty):
        wait_for(nothing, lambda: True, 2 * _WAIT_SECONDS)
    assert asked == [_WAIT_SECONDS] * 2
    with pytest.raises(ConfigError):
        wait_for(nothing, lambda: len(asked) < 5)
    assert asked[2:] == [_WAIT_SECONDS] * 3 + [0.0]
    stream = Stream([5], None, "length")
    assert stream.wait(0.0) is False
    stream.request.emit(Delta("", (), "length"))
    assert stream.wait(0.0) is True and stream.wait(0.0) is True


def test_a_prompt_begins_with_what_its_owner_has():
    sequences = [Mock(owner=owner, tokens=[5, 6, 7], state=Mock(reach=int)) for owner in "ab"]
    request = Request([5, 6, 8], None, owner="b")
    assert Batch._shared(SimpleNamespace(sequences=sequences), request) == {sequences[1]: 2}


def test_what_is_restored_goes_on_behind_what_is_held(small_export, tmp_path):
    with Runtime.open(small_export, context=256, slots=4) as runtime:
        runtime.keep_in(tmp_path)
        wanted = decode(runtime, [*range(2, 152)], [])
    with Runtime.open(small_export, context=256, slots=4) as runtime:
        decode(runtime, [*range(2, 102)], [])
        runtime.keep_in(tmp_path)
        assert torch.equal(decode(runtime, [*range(2, 152)], []), wanted)
        assert runtime.sessions.stats()["restored_tokens"] == 149 - 100


def test_closing_in_a_forked_child_leaves_the_parents_threads_alone(small_export):
    runtime = Runtime.open(small_export, context=64, slots=4)
    engine = runtime.engine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "_refusal", _FORKED)
        patch.setattr(Export, "close", close := Mock())
        engine.close()
        close.assert_called_once_with()
        assert engine.alive and engine._thread.is_alive()
    runtime.close()
    assert not engine.alive and not engine._thread.is_alive()


def test_a_slot_that_is_free_by_now_is_taken_before_a_record_is_lost():
    disk, others = Disk(None), range(2, 10)
    slots = Slots(disk, make_cache("lru", 4, ROWS, EXPERTS), CHOSEN + 3, CHOSEN, BYTES, Device())
    slots.prefetch(1, DEMAND + 1)
    disk.begun.append(disk.pending.pop())
    slots.drop(1)
    for expert_id in others:
        (read,) = slots.demand([expert_id])
        disk.end(read, True)
        slots.release()
    assert slots.store.leaving == 1 and len(slots.store.available) == len(others)
    disk.end(disk.begun[0], True)
    slots.demand([10])
    assert {slots.store.state(expert_id) for expert_id in others} == {STALE}


def test_what_is_stale_is_overwritten_by_its_latest_rank():
    """What was taken back since, and given up again, after all that is ranked; else by worth."""
    cache = make_cache("lru", 2, ROWS, EXPERTS)
    store = ExpertStore(cache, torch.zeros(6, BYTES), 6)
    for expert_id in (1, 0, 2, 3, 4, 5):
        cache.use_chunk(expert_id // EXPERTS, [[expert_id % EXPERTS]])
    for expert_id in range(6):
        store.move(store.take(expert_id), ARRIVED)
        store.move(store.of[expert_id], STALE)

    def left():
        sound(store)
        return {slot.expert for slot in store.slots if slot.state is STALE}

    def replaces(expert_id):
        before = left()
        store.take(expert_id)
        return before - left()

    assert replaces(11) == {1}
    store.rank()
    store.take(0)
    assert replaces(6) == {2}
    store.move(store.of[0], STALE)
    assert replaces(7) == {3}
    store.take(4)
    store.rank()
    store.move(store.of[4], STALE)
    assert [replaces(expert_id) for expert_id in (8, 9, 10)] == [{0}, {5}, {4}]


def test_a_fill_that_is_stopped_keeps_no_slot_staged():
    disk = Disk(Random(0))
    slots = Slots(disk, make_cache("lru", 4, ROWS, EXPERTS), 4 + CHOSEN, CHOSEN, BYTES, Device())
    with pytest.raises(Broken):
        slots.fill([1, 2, 3], Mock(side_effect=[None, Broken]))
    assert len(slots.cache) == 2 and not slots.store.staged and not disk.pending


def test_the_cpu_computes_what_few_tokens_use_once_slots_are_full():
    host = SimpleNamespace(cache=SimpleNamespace(cached={2}))
    split = SimpleNamespace(for_cpu=lambda tokens, uses, fetched: 2)
    experts = SimpleNamespace(hybrid=SimpleNamespace(host=host), split=split)
    for room, tokens, chosen in ((1, 1, []), (1, 2, [2, 3]), (0, 1, [2, 3])):
        experts.slots = SimpleNamespace(room=lambda room=room: room)
        args = tokens, {1: 9, 2: 1, 3: 1, 4: 1}, [1, 2, 3, 4], {4}, ()
        assert Experts._choose_for_cpu(experts, *args) == chosen


def test_memory_in_use_never_shrinks(small_export):
    """Pages that a slab has touched stay."""
    with Runtime.open(small_export, context=64, slots=4) as runtime:
        slots = runtime.model.experts.slots
        assert slots.present() == (0, 0)
        list(runtime.generate([5, 6, 7], 1))
        cached, used = slots.present()
        assert used >= cached == len(slots.cache) * runtime.plan.record_bytes > 0
        for expert_id in [*slots.cache.cached]:
            slots.store.move(slots.store.of[expert_id], FREE)
        assert slots.present() == (0, used)


def test_a_block_that_another_process_kept_meanwhile_is_not_written_again(tmp_path, monkeypatch):
    """Between the first look and the lock."""
    blocks = list(chain(ROOT, list(range(64))))
    ours, theirs = (BlockFolder(tmp_path / "blocks", 1 << 20, print) for _ in range(2))
    lock = ours._locked

    def rows(block):
        return memoryview(bytes(len(block.tokens) * 8))

    def late():
        theirs.add(blocks, per_token(8), rows)
        return lock()

    monkeypatch.setattr(ours, "_locked", late)
    before = BlockFolder(tmp_path / "blocks", 1 << 20, print)
    assert ours.add(blocks, per_token(8), lambda block: pytest.fail("asked for latents")) == 0
    assert before.nbytes == ours.nbytes


def test_an_answer_ends_with_its_context_and_is_counted_once(small_export):
    with Runtime.open(small_export, context=12, slots=4) as runtime:
        answer = Answer([5, 6], runtime.tokenizer, (), Sampling(logit_bias=((300, 100.0),)), 99)
        deltas, engine = ask(runtime, [5, 6], answer), runtime.engine
        assert deltas[-1].finish == "length"
        assert sum(len(delta.tokens) for delta in deltas) == 12 - 2 + 1
        assert engine.batch.totals.finished == {"length": 1}
        assert engine.batch.totals.prompt_tokens == 2


class Shards:
    """Weight files that come one after the other and were here all along."""

    def __init__(self, folder):
        self.folder, self.released = folder, []

    def announce(self, together, export_bytes, free_bytes):
        return 0

    def arrivals(self, files):
        yield from ((file, self.folder / file) for file in files)

    def release(self, file, path):
        self.released.append(file)


def test_a_state_names_what_is_durable(tmp_path, monkeypatch):
    """What the resume's state counts as written has been synced."""
    source = tmp_path / "source"
    write_checkpoint(source, shards=3, **SMALL)
    synced, counts = set(), []
    sync, write = ExportFile.sync, output_dir.State.save

    def save(state, partial):
        noted = {sum for item in state.written.values() for sum in item[0]}
        assert noted <= synced
        counts.append(len(state.written))
        write(state, partial)

    def synced_too(file):
        whole = set(file.checksums.values())
        sync(file)
        synced.update(whole)

    monkeypatch.setattr(ExportFile, "sync", synced_too)
    monkeypatch.setattr(output_dir.State, "save", save)
    shards = Shards(source)
    quantize.quantize(source, tmp_path / "export", workers=1, shards=shards)
    assert shards.released == sorted(path.name for path in source.glob("*.safetensors"))
    assert counts == sorted(counts) and len({*counts}) > 3


@pytest.mark.parametrize(
    ("geometry", "scratch", "crowded", "plan", "reached"),
    [
        (
            "v2-lite",
            {"native": 113377280, "torch": 312606720, "triton": 99155968},
            403439616,
            {"logits": 409600, "waiting tokens": 30277632, "expert slots": 4371533824},
            {"latent KV cache": 49550400, "waiting tokens": 21018624},
        ),
        (
            "v2",
            {"native": 614596608, "torch": 696254464, "triton": 549781504},
            962592768,
            {"logits": 409600, "waiting tokens": 74317824, "expert slots": 19264487424},
            {"latent KV cache": 110112000, "waiting tokens": 51591168},
        ),
    ],
)
def test_bytes_of_a_plan(geometry, scratch, crowded, plan, reached):
    """A change of the arithmetic is seen here, whether or not it is meant."""
    config = read_config(geometry_path(geometry))
    sizes = sizes_of(config, "int8", DEFAULT_CODECS)
    assert {kernels: scratch_bytes(config, 512, kernels) for kernels in scratch} == scratch
    room = (6 if geometry == "v2-lite" else 32) << 30
    made = make_plan(config, sizes, tier="ram", budget=room, context=8192, runtime_bytes=300 << 20)
    assert {name: made.components[name] for name in plan} == plan
    components = predicted_components(made, 3000, 100)
    assert {name: components[name]["ram"] for name in reached} == reached
    crowd = replace(config, num_experts_per_tok=64)  # whose outputs are most of it
    assert scratch_bytes(crowd, 512, "triton") == crowded
    lone = make_plan(config, sizes, tier="ram", budget=room, context=64, runtime_bytes=0)
    assert lone.components["runtime"] == made.components["runtime"] - (300 << 20)


def test_small_files_are_those_of_the_manifest(small_export):
    with Export.open(small_export) as export:
        assert (
            export.small_file("config.json", 1 << 20) == (small_export / "config.json").read_bytes()
        )
        assert export.small_file("nothing.json", 1 << 20) is None


def test_a_drive_that_declines_gets_no_piece(small_export, monkeypatch):
    with Runtime.open(small_export, context=64, slots=4) as runtime:
        store = runtime.model.store
        monkeypatch.setattr(store.drives, "takes", lambda drive, waiting: False)
        read = Read(0, DEMAND, memoryview(bytearray(store.record_bytes)))
        with store._lock:  # no thread looks meanwhile
            store._queue.append((DEMAND, 0, read))
            assert store._take(store.drives.fastest()) is None
            store._queue.clear()
        assert read.taken == 0


def test_where_a_pass_is_and_what_its_layers_used(small_export):
    """Also where the backend goes through several layers by itself."""
    with Runtime.open(small_export, context=64) as runtime:
        experts, seen, config = runtime.model.experts, [], runtime.config
        runtime.warm()
        step = start(runtime)
        stop = experts.on_layer(lambda route: seen.append(experts.reached))
        before = experts.slots.cache.hits
        step([5])
        used = len(config.moe_layers) * config.num_experts_per_tok
        assert experts.slots.cache.hits - before == used
        assert len(seen) == len(config.moe_layers) and all(type(count) is int for count in seen)
        stop()
        step([6])
        assert experts.slots.cache.hits - before == 2 * used


def test_a_file_without_room_is_closed(tmp_path, monkeypatch):
    """And says so."""

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "ftruncate", full)
    before = os.dup(0)
    os.close(before)
    with pytest.raises(OSError, match="No space left"):
        ExportFile(tmp_path / "file", {"a": Part(torch.uint8, (4,))}, {})
    after = os.dup(0)
    os.close(after)
    assert after == before


def test_a_file_of_an_export_is_written_by_pieces_and_short_writes(tmp_path, monkeypatch):
    pwrite, whole = os.pwrite, torch.arange(7, dtype=torch.uint8)
    monkeypatch.setattr(os, "pwrite", lambda handle, data, at: pwrite(handle, data[:3], at))
    file = ExportFile(tmp_path / "file", place({"a": Part(torch.uint8, (7,))}))
    file.write("a", whole[:4])
    assert "a" not in file.checksums
    file.write("a", whole[4:])
    file.finish()
    file.close()
    assert torch.equal(load_file(tmp_path / "file")["a"], whole)
    os.umask(mask := os.umask(0))
    assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == 0o666 & ~mask


def test_a_file_is_replaced_durably_or_not_at_all(tmp_path, monkeypatch):
    """Every byte is at the disk before the name is; no descriptor and no half of it is left."""
    durable, opened = [], len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "fsync", lambda handle: durable.append(os.fstat(handle)))
    replace_file(tmp_path / "file", b"12345")
    assert [found.st_size for found in durable if stat.S_ISREG(found.st_mode)] == [5]
    assert len(durable) == 2 and len(os.listdir("/proc/self/fd")) <= opened
    monkeypatch.setattr(os, "rename", fails := Mock(side_effect=OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match="broken"):
        replace_file(tmp_path / "file", b"other")
    fails.assert_called_once()
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"12345"]


def test_latents_of_other_kernels_are_of_another_session(small_export, monkeypatch):
    with Runtime.open(small_export, context=64, slots=4) as runtime:
        ours = _identity(runtime.model)
        monkeypatch.setattr("slotmoe.offload.sessions.store.load", lambda: Mock(digest="others"))
        native = runtime.model.backend.kind == "native"
        assert (_identity(runtime.model) != ours) == native


def test_a_refused_export_holds_no_file(small_export, tmp_path):
    shutil.copytree(small_export, tmp_path / "export")
    os.truncate(tmp_path / "export" / "resident.safetensors", 4096)
    before = os.dup(0)
    os.close(before)
    with pytest.raises(ExportError, match="resident") as caught:
        Export.open(tmp_path / "export")
    os.close(after := os.dup(0))
    assert after == before and caught.tb  # whose frames keep the export


def test_sequences_are_emptied_and_the_first_filled(small_export):
    with Runtime.open(small_export, context=64, slots=4, sequences=2) as runtime:
        engine = runtime.engine
        engine.call(lambda: engine.batch.sequences[1].fill(5, runtime.model.backend))
        assert engine.empty(3) == [-1] * 3
        assert [sequence.length for sequence in engine.batch.sequences] == [3, 0]

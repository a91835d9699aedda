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
from slotmoe.model.generate import Delta
from slotmoe.offload.devices.device import Device
from slotmoe.offload.engine.requests import _WAIT_SECONDS, Stream, wait_for
from slotmoe.offload.experts.slots import Slots
from slotmoe.offload.experts.store import FREE
from slotmoe.offload.ingest import output_dir, quantize
from slotmoe.offload.plan.advice import geometry_path
from slotmoe.offload.plan.memory import make_plan, predicted_components, scratch_bytes, sizes_of
from slotmoe.offload.policy.cache import make_cache
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.quant.codecs.codec import DEFAULT_CODECS
from slotmoe.quant.export.layout import Part, place
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.writer import ExportFile, replace_file
from tests.support.blocks import per_token
from tests.support.states import BYTES, CHOSEN, EXPERTS, ROWS, Broken, Disk
from tests.support.tiny import SMALL, write_checkpoint

ROOT = bytes(16)


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


def test_a_fill_that_is_stopped_keeps_no_slot_staged():
    disk = Disk(Random(0))
    slots = Slots(disk, make_cache("lru", 4, ROWS, EXPERTS), 4 + CHOSEN, CHOSEN, BYTES, Device())
    with pytest.raises(Broken):
        slots.fill([1, 2, 3], Mock(side_effect=[None, Broken]))
    assert len(slots.cache) == 2 and not slots.store.staged and not disk.pending


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
    sync, write = ExportFile.sync, output_dir.Resumption.save

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
    monkeypatch.setattr(output_dir.Resumption, "save", save)
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

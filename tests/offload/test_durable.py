"""What gets its final name is durable: a power cut leaves the old file or the whole new one."""

import os

import pytest

from slotmoe.offload.ingest.output_dir import Resumption
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.repository import Snapshot
from slotmoe.offload.sessions.blocks import BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved
from slotmoe.quant.export.writer import ExportFile
from tests.support.blocks import per_token
from tests.support.tiny import SMALL, write_checkpoint


def write_export(folder):
    write_checkpoint(folder / "source", shards=2)
    quantize(folder / "source", folder / "export", workers=1)


def write_blocks(folder):
    store = BlockFolder(folder / "blocks", 1 << 20, print)
    blocks = list(chain(bytes(16), [*range(70)]))
    store.add(blocks, per_token(24), lambda block: memoryview(bytes(24 * len(block.tokens))))


def write_name(folder):
    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), [1, 2], "text", [{"role": "text", "content": "Hello"}]))


@pytest.mark.parametrize("write", [write_export, write_blocks, write_name])
def test_a_file_is_durable_before_it_gets_its_name(write, tmp_path, monkeypatch):
    synced, named, rename = set(), [], os.rename

    def checked_rename(path, name):
        for file in path.rglob("*") if path.is_dir() else [path]:
            assert file.is_dir() or file.stat().st_ino in synced, f"{file} may be lost"
            named.append(file)
        rename(path, name)

    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino))
    monkeypatch.setattr(os, "rename", checked_rename)
    write(tmp_path)
    assert named


class Shards:
    """Weight files that come one after the other, and were here all along."""

    snapshot = Snapshot("org/model", "main", "a" * 40, {})

    def stamps(self, files):
        return dict.fromkeys(files, "hub x")

    def announce(self, portions, export_bytes, free_bytes):
        return 0

    def held(self, checkpoint, portions):
        yield from portions


def test_a_resumed_export_counts_only_on_what_is_durable(tmp_path, monkeypatch):
    synced, counts, sync, save = set(), [], ExportFile.sync, Resumption.save

    def noted_save(state, partial):
        assert {sum for item in state.written.values() for sum in item[0]} <= synced
        counts.append(len(state.written))
        save(state, partial)

    def noted_sync(file):
        whole = set(file.checksums.values())
        sync(file)
        synced.update(whole)

    monkeypatch.setattr(ExportFile, "sync", noted_sync)
    monkeypatch.setattr(Resumption, "save", noted_save)
    write_checkpoint(tmp_path / "source", shards=3, **SMALL)
    quantize(tmp_path / "source", tmp_path / "export", workers=1, shards=Shards())
    assert len({*counts}) > 3

"""Faults while experts are read, slots whose memory comes bit by bit, and copies of the experts on
other drives: the same bits, whatever becomes of one."""

import logging
import os
import shutil
import threading
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.errors import ConfigError, ExportError
from slotmoe.offload.experts import disk
from slotmoe.offload.experts import slots as store
from slotmoe.offload.experts.disk import DiskReader, Drive
from slotmoe.offload.experts.experts import Experts
from slotmoe.offload.experts.store import FILL
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import layer_file
from slotmoe.quant.export.reader import Export, Folder
from tests.support.engine import IDS, start, until, whole
from tests.support.tiny import SAMPLE


@pytest.fixture(scope="module")
def wanted(sample_export):
    """Logits with every expert in memory."""
    with Runtime.open(sample_export, context=256) as runtime:
        return runtime.logits(IDS)


@pytest.fixture
def opened(sample_export, always_guessing):
    return partial(Runtime.open, sample_export, context=256)


FAULTS = {  # what the count-th read of an expert meets; whether any is repeated; the refusal
    "wrong once": (lambda expert, count: count == 1 and expert % 9 == 0, True, None),
    "fail": (None, True, r"layer-\d+.*reading layer \d expert \d+ failed \(Input/output error\)"),
    "wrong": (lambda *_: True, True, "checksum of layer"),
    "short": (lambda *_: False, False, None),
}


@pytest.mark.parametrize(("fault", "repeats", "refused"), FAULTS.values(), ids=FAULTS)
def test_faulty_reads_change_nothing_or_stop_the_run(
    opened, wanted, monkeypatch, fault, repeats, refused
):
    """Reads come in parts.  What could not be read works later, and no slot is half-filled."""
    counts, begun, original, works = Counter(), [], os.preadv, Export.read_range

    def preadv(*given):
        if fault is None and begun:
            raise OSError(5, "Input/output error")
        return min(original(*given), 5000)

    def read_range(self, layer, expert, start, out, folder=0):
        counts[layer, expert] += 1
        is_wrong = fault is not None and fault(expert, counts[layer, expert])
        works(self, layer, expert, start, out)
        out[100] ^= bool(is_wrong)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(Export, "read_range", read_range)
    with opened(slots=22) as runtime:
        begun.append(runtime)
        if refused:
            with pytest.raises(ExportError, match=refused):
                runtime.logits(IDS)
            whole(runtime)
            begun.clear()
            monkeypatch.setattr(Export, "read_range", works)
        assert torch.equal(runtime.logits(IDS), wanted)
        assert (runtime.stats()["io"]["disk"]["retries"] > 0) == repeats
        whole(runtime)


def test_files_that_change_while_they_are_read(sample_export, wanted, tmp_path):
    """The open handles go on reading replaced and removed files as they were verified; truncated
    ones are refused."""
    export = shutil.copytree(sample_export, tmp_path / "export")
    with Runtime.open(export, context=256, slots=22) as runtime:
        (export / "noise").write_bytes(os.urandom((export / layer_file(1)).stat().st_size))
        os.replace(export / "noise", export / layer_file(1))
        (export / layer_file(2)).unlink()
        assert torch.equal(runtime.logits(IDS), wanted)
        for layer in range(3, 8):
            os.truncate(export / layer_file(layer), 40960)
        with pytest.raises(ExportError, match="truncated while in use"):
            runtime.logits(IDS)
        whole(runtime)


def test_a_file_system_without_direct_reads_is_said_once(opened, wanted, monkeypatch, caplog):
    monkeypatch.setattr(Export, "bypass_page_cache", lambda self: False)
    with opened(slots=22) as runtime:
        assert torch.equal(runtime.logits(IDS), wanted)
        assert not runtime.stats()["io"]["disk"]["direct"]
    (record,) = caplog.records
    assert "direct reads" in record.message


class Pages:
    """A twin of ``Touching`` whose pages come when the test says so."""

    def __init__(self, memory, start):
        self.memory, self.ready, self.start = memory, start, start

    def finish(self):
        self.ready = len(self.memory)


def test_slots_grow_with_their_pages_and_results_stay_the_same(heavy, opened, wanted, monkeypatch):
    planned = 60
    monkeypatch.setattr(store, "LAZY_BYTES", 0)
    monkeypatch.setattr(store, "Touching", Pages)
    with opened(slots=planned) as runtime:
        slots, size = runtime.model.experts.slots, runtime.plan.record_bytes
        touching = slots._touching
        assert (slots.cache.slots, slots.planned) == (6, planned)
        step, rows = start(runtime), []
        for id in IDS:
            rows.append(step([id]))
            assert len(slots.cache) <= slots.cache.slots <= planned
            touching.ready += size * planned // 90
        assert slots.memory().nbytes == slots.slab.nbytes  # waits for the last page
        assert slots._touching is None and len(slots.cache) < planned
        runtime.warm()
        assert len(slots.cache) == slots.cache.slots == planned and slots._touching is None
        assert slots.present() == (planned * size, slots.slab.nbytes)
        whole(runtime)
        assert torch.equal(torch.cat(rows), wanted)


@pytest.mark.parametrize("slots", [None, 60])
def test_free_slots_are_filled_behind_all_else(heavy, opened, wanted, slots, monkeypatch):
    """While nothing of that arrives a text is made.  Then, where all fits, no layer stops; the bits
    are the same throughout."""
    may_arrive, stops, piece = threading.Event(), [], DiskReader._read_piece

    def read_piece(self, drive, read, start, stop):
        for _ in range(1000):  # one that is demanded meanwhile arrives
            if read.urgency != FILL or may_arrive.wait(0.01):
                break
        piece(self, drive, read, start, stop)

    monkeypatch.setattr(DiskReader, "_read_piece", read_piece)
    monkeypatch.setattr(disk, "PIECE_BYTES", 4096)  # so that each thread could be kept
    call = Experts.__call__
    monkeypatch.setattr(Experts, "__call__", lambda *given: stops.append(1) or call(*given))
    with opened(slots=slots, prefetch=False) as runtime:
        runtime.warm(wait=False)
        slots = runtime.model.experts.slots
        until(lambda: slots.store.staged)
        assert torch.equal(runtime.logits(IDS[:9]), wanted[:9])
        may_arrive.set()
        until(lambda: len(slots.cache) == slots.planned)
        step = start(runtime)
        rows = [step(IDS[:40])]
        stops.clear()
        assert torch.equal(torch.cat(rows + [step([id]) for id in IDS[40:]]), wanted[39:])
        assert bool(stops) == (not slots.complete)
        runtime.warm()
        whole(runtime)
        may_arrive.clear()


# Other drives

NAME = "layer-00002.safetensors"


@pytest.fixture
def copies(sample_export, tmp_path):
    """An export, and two copies of its experts."""
    shutil.copytree(sample_export, tmp_path / "export")
    for name in ("a", "b"):
        shutil.copytree(Path(sample_export) / "experts", tmp_path / name)
    return tmp_path / "export", [tmp_path / "a", tmp_path / "b"]


def with_copies(copies, **options):
    return Runtime.open(copies[0], context=64, slots=30, experts_dirs=copies[1], **options)


def test_copies_are_read_too(copies, wanted, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.experts.disk.HELP_BYTES", 0)
    meet, met, original = threading.Barrier(3), {}, Folder.read

    def read(self, *arguments):
        mark = object()
        if met.setdefault(self.path, mark) is mark:  # a drive's first lasts until all have begun
            meet.wait(30)
        original(self, *arguments)

    with with_copies(copies) as runtime:
        monkeypatch.setattr(Folder, "read", read)
        assert torch.equal(runtime.logits(IDS), wanted)
        disk = runtime.stats()["io"]["disk"]
    assert [drive["folder"] for drive in disk["drives"]] == [str(copies[0]), *map(str, copies[1])]
    assert all(drive["bytes"] > 0 and drive["seconds"] > 0 for drive in disk["drives"])
    assert sum(drive["bytes"] for drive in disk["drives"]) == disk["bytes"]


@pytest.mark.parametrize(
    ("place", "harm", "help_bytes"),
    [
        ("export/experts", "pulled", 0),
        ("export/experts", "flipped", 0),  # read again from all, this one last
        ("a", "flipped", 128 << 10),  # the waiting thread reads, too
    ],
)
def test_a_drive_that_fails_while_running_is_left_out(
    copies, wanted, monkeypatch, caplog, place, help_bytes, harm
):
    """The export's own as well as a copy, by one line; what is read is the same."""
    monkeypatch.setattr("slotmoe.offload.experts.disk.HELP_BYTES", help_bytes)
    folder = copies[0].parent / place
    drive = folder.parent if "experts" in place else folder

    def pace(self, now):  # as long as it is there, the others leave everything to it
        return 1e-9 if self.folder == drive else 1.0

    monkeypatch.setattr(Drive, "pace", pace)
    with with_copies(copies) as runtime, caplog.at_level(logging.WARNING, "slotmoe"):
        assert torch.equal(runtime.logits(IDS), wanted)
        for path in folder.iterdir():
            if harm == "pulled":
                os.truncate(path, 4096)
            else:
                harmed = np.fromfile(path, np.uint8)
                harmed[4096 * 8 :: 5000] ^= 255  # in every record, behind the header
                harmed.tofile(path)  # into the open file
        assert torch.equal(runtime.logits(IDS), wanted)
        drives = runtime.stats()["io"]["disk"]["drives"]
        assert [each["folder"] for each in drives if each["failed"]] == [str(drive)]
        whole(runtime)
        (line,) = [record.getMessage() for record in caplog.records]
        assert line.count("\n") == 0 and line.endswith(f"without the experts in {drive}")
        for path in copies[0].parent.glob("**/layer-*"):  # no drive is left
            os.truncate(path, 4096)
        with pytest.raises(ExportError, match="truncated while in use"):
            runtime.logits(IDS)


HARMS = {
    "No such file.*; --experts-dir takes a copy of the export's experts/": Path.unlink,
    "has 5000 bytes, the manifest says": lambda path: os.truncate(path, 5000),
    "its header is not the one": lambda path: shutil.copy(path.with_stem("layer-00001"), path),
}


@pytest.mark.parametrize("message", HARMS)
def test_what_is_no_copy_is_refused(copies, message):
    HARMS[message](copies[1][1] / NAME)
    with pytest.raises(ExportError, match=f"b/{NAME}: .*{message}"):
        with_copies(copies)
    with pytest.raises(ConfigError, match="experts_dirs"):  # the reference path takes none
        Runtime.open(SAMPLE, quantize=False, experts_dirs=copies[1])

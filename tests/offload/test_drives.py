"""Copies of the experts on other drives: the same logits whatever becomes of one."""

import logging
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.errors import ConfigError, ExportError
from slotmoe.offload.experts.disk import Drive
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Folder
from tests.support.engine import IDS, whole
from tests.support.tiny import SAMPLE

NAME = "layer-00002.safetensors"


@pytest.fixture
def copies(sample_export, tmp_path):
    """An export, and two copies of its experts."""
    shutil.copytree(sample_export, tmp_path / "export")
    for name in ("a", "b"):
        shutil.copytree(Path(sample_export) / "experts", tmp_path / name)
    return tmp_path / "export", [tmp_path / "a", tmp_path / "b"]


def opened(copies, **options):
    return Runtime.open(copies[0], context=64, slots=30, experts_dirs=copies[1], **options)


@pytest.fixture(scope="module")
def wanted(sample_export):
    with Runtime.open(sample_export, context=64) as runtime:
        return runtime.logits(IDS)


def test_copies_are_read_too(copies, wanted, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.experts.disk.HELP_BYTES", 0)
    meet, met, original = threading.Barrier(3), {}, Folder.read

    def read(self, *arguments):
        mark = object()
        if met.setdefault(self.path, mark) is mark:  # a drive's first lasts until all have begun
            meet.wait(30)
        original(self, *arguments)

    with opened(copies) as runtime:
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
    with opened(copies) as runtime, caplog.at_level(logging.WARNING, "slotmoe"):
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
        opened(copies)
    with pytest.raises(ConfigError, match="experts_dirs"):  # the reference path takes none
        Runtime.open(SAMPLE, quantize=False, experts_dirs=copies[1])

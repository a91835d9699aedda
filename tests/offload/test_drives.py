"""Copies of the experts on other drives: the same logits whatever becomes of one, a share for each
that its speed allows, and two limited drives beside one."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.errors import ConfigError, ExportError
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.tiers.disk import DiskReader
from slotmoe.offload.tiers.drives import Drive, Drives
from slotmoe.offload.tiers.memory import page_aligned
from slotmoe.quant.export.folder import Folder
from slotmoe.quant.export.reader import Export
from slotmoe.tools.cli import main
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


def drives_of(runtime):
    return runtime.stats()["io"]["disk"]["drives"]


def test_copies_are_read_too(copies, sample_export, monkeypatch):
    monkeypatch.setattr("slotmoe.offload.tiers.disk.HELP_BYTES", 0)
    with Runtime.open(sample_export, context=64) as runtime:
        wanted = runtime.logits(IDS)
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


def call(arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    return ended.value.code


@pytest.mark.usefixtures("processes")
def test_commands_know_drives(copies, capsys):
    export, folders = copies
    given = [word for folder in folders for word in ("--experts-dir", str(folder))]
    few = ["--context", "64", "--slots", "30", *given]
    assert call(["run", str(export), "Call me", "-n", "2", "--verbose", *few]) == 0
    read = rf"read from disk.* \({export} [\d.]+ \w+ at [\d.]+ GB/s; {folders[0]} "
    assert re.search(read, capsys.readouterr().err)
    sizes = ["--prompt-tokens", "8", "--decode-tokens", "2", "--repetitions", "1"]
    assert call(["bench", str(export), *sizes, *few, "--json"]) == 0
    drives = json.loads(capsys.readouterr().out)["disk"]["drives"]
    assert len(drives) == 3 and all(drive["bandwidth"] > 0 for drive in drives)
    text = export.parent / "text"
    text.write_text("The people of the United States have a government.")
    reference = ["--reference", str(SAMPLE)]  # which has no copies
    assert call(["eval", str(export), "--text", str(text), *reference, *few, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["kl_divergence"] < 0.1
    alone = ["plan", "v2-lite", "--ram", "5GiB", "--disk-bandwidth", "1GB", "--json"]
    rates = []
    for more in ([], given):
        assert call([*alone, *more]) == 0
        rates.append(json.loads(capsys.readouterr().out)["bandwidths"]["disk"])
    assert [rate["bytes_per_second"] for rate in rates] == [1e9, 3e9]
    assert rates[1]["origin"] == "given, times 3 drives"
    call(["doctor", "--json", "--experts-dir", str(folders[0]), "--experts-dir", str(export)])
    checks = json.loads(capsys.readouterr().out)["checks"]
    good, bad = (check for check in checks if check["name"] == "drive")
    assert good["found"].startswith(f"7 layers in {folders[0]} on ") and bad["state"] == "bad"


@pytest.mark.parametrize(
    ("place", "harm", "help_bytes"),
    [
        ("export/experts", "pulled", 0),
        ("a", "flipped", 0),
        pytest.param("export/experts", "flipped", 0, marks=pytest.mark.slow),
        pytest.param("a", "pulled", 128 << 10, marks=pytest.mark.slow),  # the waiting thread reads
    ],
)
def test_a_drive_that_fails_while_running_is_left_out(
    copies, monkeypatch, caplog, place, help_bytes, harm
):
    """The export's own as well as a copy, by one line; what is read is the same."""
    monkeypatch.setattr("slotmoe.offload.tiers.disk.HELP_BYTES", help_bytes)
    folder = copies[0].parent / place
    drive = folder.parent if "experts" in place else folder

    def pace(self, now):  # as long as it is there, the others leave everything to it
        return 1e-9 if self.folder == drive else 1.0

    monkeypatch.setattr(Drive, "pace", pace)
    with opened(copies) as runtime, caplog.at_level(logging.WARNING, "slotmoe"):
        wanted = runtime.logits(IDS)
        assert [each["bytes"] > 0 for each in drives_of(runtime)].count(True) == 1
        for path in folder.iterdir():
            if harm == "pulled":
                os.truncate(path, 4096)
            else:
                harmed = np.fromfile(path, np.uint8)
                harmed[4096 * 8 :: 5000] ^= 255  # in every record, behind the header
                harmed.tofile(path)  # into the open file
        assert torch.equal(runtime.logits(IDS), wanted)
        assert [each["folder"] for each in drives_of(runtime) if each["failed"]] == [str(drive)]
        whole(runtime)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.count("\n") == 0 and line.endswith(f"without the experts in {drive}")


def test_no_drive_is_left_to_fail(copies, caplog):
    with opened(copies, prefetch=False) as runtime:
        runtime.logits(IDS[:1])
        for path in copies[0].parent.glob("**/layer-*"):
            os.truncate(path, 4096)
        with pytest.raises(ExportError, match="truncated while in use"):
            runtime.logits(IDS)


def spoil(harm, folder):
    if harm == "missing":
        (folder / NAME).unlink()
    elif harm == "size":
        os.truncate(folder / NAME, 5000)
    elif harm == "other":
        (folder / NAME).write_bytes((folder / "layer-00001.safetensors").read_bytes())
    else:
        (folder / NAME).rename(folder / "x")
        (folder / NAME).symlink_to("x")


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        ("missing", "No such file.*; --experts-dir takes a copy of the export's experts/"),
        ("size", "has 5000 bytes, the manifest says"),
        ("other", "its header is not the one"),
        ("link", "is a link that leads elsewhere"),
    ],
)
def test_what_is_no_copy_is_refused(copies, harm, message):
    spoil(harm, copies[1][1])
    with pytest.raises(ExportError, match=f"b/{NAME}: .*{message}"):
        opened(copies)


def test_the_reference_path_takes_no_copies(copies):
    with pytest.raises(ConfigError, match="experts_dirs"):
        Runtime.open(SAMPLE, quantize=False, experts_dirs=copies[1])


def limit(monkeypatch, rates):
    """Let folders give so many bytes a second each."""
    locks, original = {path: threading.Lock() for path in rates}, Folder.read

    def read(self, name, offset, data, what, needed=None):
        if self.path in locks:
            with locks[self.path]:
                time.sleep(len(data) / rates[self.path])
        original(self, name, offset, data, what, needed)

    monkeypatch.setattr(Folder, "read", read)


def read_seconds(export, folders, count=120):
    """Seconds for ``count`` records, and bytes by drive."""
    with Export.open(export, folders) as opened:
        reader, size = DiskReader(opened, direct=True), opened.layout.record_bytes
        memory = page_aligned(count * size).view(count, size)
        try:
            started = time.perf_counter()
            reads = [reader.read(id, row, urgency=1) for id, row in enumerate(memory)]
            reader.submit(reads)
            while waiting := [read for read in reads if not read.done]:
                reader.wait(waiting)
            seconds = time.perf_counter() - started
            assert not any(read.error for read in reads)
            return seconds, [drive["bytes"] for drive in reader.stats()["disk"]["drives"]]
        finally:
            reader.close()


@pytest.mark.usefixtures("nightly")
def test_each_drive_gets_what_its_speed_allows(copies, monkeypatch):
    export, (a, b) = copies
    whole = 120 * 28672
    limit(monkeypatch, {export: whole / 0.4, a: whole / 0.4, b: whole / 1.6})
    alone, _ = read_seconds(export, [])
    both, shares = read_seconds(export, [a])
    assert both < alone / 1.5
    assert 0.8 < shares[0] / shares[1] < 1.25
    slow, shares = read_seconds(export, [b])
    assert slow < alone
    assert 2.5 < shares[0] / shares[1] < 6


@pytest.mark.usefixtures("nightly")
def test_a_drive_that_is_too_slow_is_left_alone(copies, monkeypatch):
    export, (a, _) = copies
    limit(monkeypatch, {export: 20e6, a: 20e4})
    read_seconds(export, [])
    with Export.open(export, [a]) as opened:
        reader, size = DiskReader(opened, direct=False), opened.layout.record_bytes
        memory = page_aligned(4 * size).view(4, size)
        spent = []
        for start in range(0, 48, 4):
            started = time.perf_counter()
            reads = [reader.read(start + n, row, urgency=1) for n, row in enumerate(memory)]
            reader.submit(reads)
            while waiting := [read for read in reads if not read.done]:
                reader.wait(waiting)
            spent.append(time.perf_counter() - started)
        reader.close()
    assert sum(seconds > 0.1 for seconds in spent) <= 3  # 0.006 without it, 0.14 a record of its


def test_a_slow_drive_is_tried_again(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("slotmoe.offload.tiers.drives.time.perf_counter", lambda: now[0])
    drives = Drives([Path("a"), Path("b")])
    fast, slow = drives.all
    fast.note(99.999, 1), slow.note(99.0, 1)
    assert drives.takes(fast, lambda: 1) and drives.fastest() is fast
    assert not drives.takes(slow, lambda: 1)
    assert drives.takes(slow, lambda: 8000)  # so many wait that it is through with its own before
    for _ in range(60):
        now[0] += 1
        fast.note(now[0] - 0.001, 1)
    assert drives.takes(slow, lambda: 1)


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@contextmanager
def loop_device(image, content):
    """A file system of its own that holds a copy of the folder ``content``, mounted on a loop
    device: where, and the device's number."""
    size, mount = sum(path.stat().st_size for path in content.rglob("*")), image.with_suffix("")
    with open(image, "wb") as file:
        file.truncate(size * 5 // 4 + (32 << 20))
    run("mkfs.ext4", "-q", str(image))
    device = run("losetup", "-f", "--show", str(image))
    mount.mkdir()
    try:
        run("mount", device, str(mount))
        shutil.copytree(content, mount / content.name)
        number = os.stat(device).st_rdev
        yield mount / content.name, f"{os.major(number)}:{os.minor(number)}"
    finally:
        subprocess.run(["umount", str(mount)], capture_output=True)
        run("losetup", "-d", device)


def limiting_group():
    """A new cgroup that can limit a device's reads: itself, its file, and how a line there looks;
    None without any."""
    for folder, file, line in (
        ("blkio/", "blkio.throttle.read_bps_device", "{} {}"),
        ("", "io.max", "{} rbps={}"),
    ):
        group = Path(f"/sys/fs/cgroup/{folder}slotmoe-test-{os.getpid()}")
        with suppress(OSError):
            group.mkdir()
            if (group / file).exists():
                return group, group / file, line
            group.rmdir()
    return None


_SCRIPT = """
import os, sys
from pathlib import Path
Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
from tests.offload.test_drives import read_seconds
export, copy = map(Path, sys.argv[2:])
print(*(read_seconds(export, folders, count=224)[0] for folders in ([], [copy], [], [copy])))
"""


@pytest.mark.usefixtures("nightly")
def test_two_limited_drives_beside_one(copies, tmp_path):
    """Loop devices whose reads a cgroup limits to 2 MiB a second each."""
    if os.geteuid() or shutil.which("mkfs.ext4") is None or (found := limiting_group()) is None:
        pytest.skip("needs root, loop devices and a cgroup that limits reads")
    group, file, line = found
    try:
        with (
            loop_device(tmp_path / "one.img", copies[0]) as (export, first),
            loop_device(tmp_path / "two.img", copies[1][0]) as (copy, second),
        ):
            for number in (first, second):
                file.write_text(line.format(number, 2 << 20))
            done = run(sys.executable, "-c", _SCRIPT, str(group), str(export), str(copy))
            alone, both, again, both_again = map(float, done.split())
            assert alone / both >= 1.7 and again / both_again >= 1.7, done
    finally:
        group.rmdir()

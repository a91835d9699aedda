"""Quantize: killed, interrupted, out of disk, twice at once; whatever happens, the same bytes or a
clear refusal.  The memory that it takes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest

from slotmoe.errors import ConfigError, ExportError, SlotmoeError
from slotmoe.offload.ingest.calibration import Calibration
from slotmoe.offload.ingest.output_dir import locked
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.manifest import manifest_checksum
from tests.support.disk import Stop, stop_at, tree
from tests.support.forkserver import Forked
from tests.support.hostile import flip
from tests.support.hub import HUB, NAME, Repo, make
from tests.support.params import nth
from tests.support.tiny import SAMPLE, SMALL, write_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    write_checkpoint(folder, shards=3, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def made(source, tmp_path_factory):
    """What an uninterrupted run makes; not to be changed."""
    destination = tmp_path_factory.mktemp("wanted") / "export"
    quantize(source, destination)
    return destination


@pytest.fixture(scope="module")
def wanted(made):
    return tree(made)


def stopped(source, destination, share=0.9, **options):
    """At 0.9 a file is finished."""
    with pytest.raises(Stop):
        quantize(source, destination, workers=1, progress=stop_at(share), **options)


HELD = """
import time
import slotmoe.offload.ingest.quantize as module
from slotmoe.__main__ import main
def held(path, values):
    print("held", flush=True)
    time.sleep(600)
module.write_json = held
main()
"""


def test_interrupted_command_resumes(source, wanted, tmp_path, processes):
    """By Ctrl-C before it writes the manifest."""
    with Forked("quantize", source, tmp_path / "export", program=HELD) as child:
        assert child.stdout.readline() == b"held\n"
        child.send_signal(signal.SIGINT)
        message = child.communicate()[1].decode()
    assert child.returncode == 130 and "Traceback" not in message
    assert "run the same command again to resume" in message
    assert str(tmp_path / "export") in message
    assert [path.name for path in tmp_path.iterdir()] == ["export.partial"]
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


BAD = [("tokenizer.json", "{}", False), ("tokenizer.json", "{}", True)]
BAD += [("tokenizer_config.json", "[]", False), ("generation_config.json", "{", True)]


@pytest.mark.parametrize(("name", "text", "late"), BAD)
def test_an_export_that_cannot_encode_replaces_none(
    name, text, late, made, source, wanted, tmp_path, processes
):
    """A bad file of the source is known before the work, and one that turned bad meanwhile before
    the new export gets its name."""
    shutil.copytree(made, tmp_path / "export")
    shutil.copytree(source, tmp_path / "source")
    spoil = partial((tmp_path / "source" / name).write_text, text)

    begun = []

    def progress(done, total):
        begun.append(spoil())

    if not late:
        spoil()
    with pytest.raises(ConfigError, match=rf"{'partial' if late else 'source'}/{name}"):
        quantize(tmp_path / "source", tmp_path / "export", overwrite=True, progress=progress)
    assert tree(tmp_path / "export") == wanted
    assert (tmp_path / "export.partial").exists() == late == bool(begun)


def test_existing_destination(source, wanted, tmp_path):
    (tmp_path / "export").mkdir()  # an empty one is taken
    stopped(source, tmp_path / "export", resident="bf16")
    with pytest.raises(ExportError, match="--overwrite"):  # of something else
        quantize(source, tmp_path / "export")
    quantize(source, tmp_path / "export", resident="bf16", overwrite=True)
    old = tree(tmp_path)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        quantize(source, tmp_path / "export")
    assert tree(tmp_path) == old
    quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path) == {f"export/{name}": data for name, data in wanted.items()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["export", "export.partial", "export.replaced"])
@pytest.mark.parametrize("kind", ["folder", "lookalike", "link"])
def test_foreign_folder_is_never_touched(place, overwrite, kind, source, tmp_path):
    folder = tmp_path / ("elsewhere" if kind == "link" else place)
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")
    if kind == "lookalike":  # an export that someone keeps other files in
        (folder / MANIFEST).write_text("{}")
    if kind == "link":
        (folder / "state.json").write_text("mine")
        (tmp_path / place).symlink_to("elsewhere")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=place):
        quantize(source, tmp_path / "export", overwrite=overwrite)
    assert tree(tmp_path) == before


IMPOSSIBLE = (".", "/", "..", "missing/export", "file/export", "x" * 300, "file", "source")


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_destination(name, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    shutil.copytree(source, tmp_path / "source")
    before = tree(tmp_path)
    monkeypatch.chdir(tmp_path / "here")
    destination = Path(name) if name in (".", "/", "..") or len(name) > 99 else tmp_path / name
    with pytest.raises(ExportError, match="choose another destination"):
        quantize(tmp_path / "source", destination, overwrite=True)
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("call", "code"), [(5, errno.ENOSPC), (17, errno.EDQUOT)])
def test_disk_fills_up(call, code, source, wanted, tmp_path, monkeypatch):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExportError, match="the disk is full; make room and run"):
            quantize(source, tmp_path / "export", workers=1)
    assert not (tmp_path / "export").exists()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_two_at_once(source, wanted, slotmoe, tmp_path):
    """The second, of either command, is refused, or waits and then has nothing to do."""
    started, go, seen = threading.Event(), threading.Event(), []
    run = partial(quantize, source, tmp_path / "export")

    def slow(done, total):
        started.set()
        go.wait(30)

    synth = "synth", source / "config.json", tmp_path / "export", "--overwrite"
    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, progress=slow)
        try:
            assert started.wait(30)
            with pytest.raises(ExportError, match="another process is writing it"):
                run()
            assert "another process is writing it" in slotmoe(*synth)[2]
            second = pool.submit(run, wait_for_lock=True, progress=lambda *now: seen.append(now))
        finally:
            go.set()
        assert first.result() == second.result() == json.loads(wanted[MANIFEST])
    assert (tree(tmp_path / "export"), seen) == (wanted, [])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_a_folder_that_another_process_owns_stays(tmp_path):
    """The first has finished and given the folder its name, the second has made its own since."""
    folder, first = tmp_path / "export.partial", ExitStack()
    first.enter_context(locked(folder, wait_for_lock=False))
    folder.rename(tmp_path / "export")
    with locked(folder, wait_for_lock=False):
        first.close()
        assert folder.is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_synth_removes_no_stopped_work_unasked(source, slotmoe, tmp_path):
    stopped(source, tmp_path / "export")
    left, synth = tree(tmp_path), ("synth", source / "config.json", tmp_path / "export")
    code, _, err = slotmoe(*synth)
    assert (code, "export.partial: holds what a stopped slotmoe quantize" in err) == (2, True)
    assert tree(tmp_path) == left
    assert slotmoe(*synth, "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def change(path):
    """One bit of a weight file, which keeps the time of its last change."""
    state = path.stat()
    flip(path, -1)
    os.utime(path, ns=(0, state.st_mtime_ns))


def test_other_weights_of_the_same_shapes_are_neither_taken_for_these_nor_mixed_with_them(
    heavy, source, made, wanted, tmp_path
):
    ours, export, said = tmp_path / "checkpoint", tmp_path / "export", []
    shutil.copytree(source, ours)
    shutil.copytree(made, export)
    quantize(ours, export, notify=said.append)  # the same weights in other files
    assert (said[0], tree(export)) == (f"{export}: is this export already", wanted)
    stopped(ours, tmp_path / "half")
    change(ours / "model-00003-of-00003.safetensors")
    before = tree(tmp_path)
    for name in ("export", "half"):
        match = rf"model-00003-of-.*is not the file that .*{name}.* is of \(found .*; pass --overwr"
        with pytest.raises(ExportError, match=match):
            quantize(ours, tmp_path / name)
    assert tree(tmp_path) == before
    quantize(ours, tmp_path / "half", overwrite=True)
    quantize(ours, export, overwrite=True)
    assert tree(export) == tree(tmp_path / "half") != wanted
    path, match = ours / "model-00002-of-00003.safetensors", "model-00002.*new.partial is of"
    with pytest.raises(ExportError, match=match):  # it changes while it is read
        quantize(ours, tmp_path / "new", progress=lambda *_: change(path))


_PEAK = """
import pathlib, sys
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.system import peak_rss
quantize(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), workers=2)
print(peak_rss() / 2**20)
"""


@pytest.mark.usefixtures("nightly", "processes")
def test_quantize_streams_experts_of_v2_lites_size(tmp_path):
    config = json.loads((SAMPLE.parent / "geometries" / "v2-lite.json").read_text())
    peaks = []
    for layers in (2, 5):
        source, export = tmp_path / f"source-{layers}", tmp_path / f"export-{layers}"
        changes = {"num_hidden_layers": layers, "n_routed_experts": 16}
        write_checkpoint(source, shards=layers, **{**config, **changes})
        command = [sys.executable, "-c", _PEAK, source, export]
        peaks.append(float(subprocess.check_output(command)))
    assert max(peaks) <= 1024
    assert peaks[1] <= peaks[0] * 1.1, peaks


# What a resume makes of files that changed since it was stopped: the same bytes, or one line whose
# way out makes them

TEXT = [[0, *range(5 + start, 20 + start)] for start in range(6)]
LUT = EXPERT_CODECS["lut", "4"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_checkpoint(folder, shards=2, **{**SMALL, "num_hidden_layers": 3})
    return folder


def from_hub(folder, destination, calibration=None, **options):
    HUB.add(NAME, Repo(folder))
    make(destination, ready=lambda _: {"calibration": calibration}, **options)


# By name: how the export is made of the checkpoint in a folder.
WAYS = {
    "hub-calibrated": partial(from_hub, codecs=LUT, calibration=TEXT, keep_source=True),
    "hub": from_hub,
    "calibrated": partial(quantize, codecs=LUT, calibration=TEXT, resident="mixed"),
    "plain": quantize,
}


class Resumes:
    """A way to make an export of the checkpoint in ``source``, stopped at about ``stages`` moments:
    ``left`` has the files of each and their bytes, in order."""

    def __init__(self, way, source, place, stages):
        self.way, self.source, self.place = WAYS[way], source, place
        calls = self.stopped(None)
        self.wanted, self.left = tree(place / "export"), []
        for at in range(1, calls + 1, -(-calls // stages)):
            shutil.rmtree(place)
            self.stopped(at)
            self.left.append(tree(place))

    def make(self, **options):
        self.place.mkdir(exist_ok=True)
        with patch.object(Calibration, "announcement", lambda _: ""):  # it measures for a while
            self.way(self.source, self.place / "export", workers=1, **options)

    def stopped(self, at):
        """Make it, but for the ``at``-th change of the disk and what comes after; the number of
        changes."""
        calls = 0

        def counted(function, *arguments, **options):
            nonlocal calls
            calls += 1
            if at is not None and calls >= at:
                raise Stop
            return function(*arguments, **options)

        with ExitStack() as patches:
            for name in ("fsync", "rename", "replace", "unlink", "ftruncate"):
                wrapped = partial(counted, getattr(os, name))
                patches.enter_context(patch.object(os, name, wrapped))
            with suppress(Stop):
                self.make()
        return calls

    def check(self, files):
        """Run the command again where ``files`` were left; whether that makes the same bytes.
        Anything that is raised but a ``SlotmoeError`` with a way out is a fault."""
        shutil.rmtree(self.place, ignore_errors=True)
        for name, data in files.items():
            (self.place / name).parent.mkdir(parents=True, exist_ok=True)
            (self.place / name).write_bytes(data)
        try:
            self.make()
        except SlotmoeError as problem:
            said = str(problem)
            assert "\n" not in said and ("again" in said or "--overwrite" in said), said
            self.make(overwrite="--overwrite" in said)
        return tree(self.place / "export") == self.wanted


GONE = object()
STRANGE = (
    *(None, True, "", "x", "\ud800\x1b[1m", [], [[]], {}, {"": None}, -1, 0, 1, 0.5, -1e300),
    *(1e300, 1 << 40, 10**400, float("nan"), float("inf"), GONE),
)


def places(value, *before):
    """The places in JSON, but for its checksum."""
    for key in range(len(value)) if isinstance(value, list) else [*value]:
        if key != "checksum":
            yield (*before, key)
            if isinstance(value[key], list | dict):
                yield from places(value[key], *before, key)


def forged(data, chance):
    """A signed file with a strange value somewhere, signed anew."""
    values = inside = json.loads(data)
    del values["checksum"]
    *inner, last = chance.choice([*places(values)])
    for key in inner:
        inside = inside[key]
    inside[last] = chance.choice(STRANGE)
    if inside[last] is GONE:
        del inside[last]
    return json.dumps({"checksum": manifest_checksum(values), **values}).encode()


def damaged(data, chance):
    at = chance.randrange(len(data)) if data else 0
    zeros = data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :]
    flipped = data[:at] + bytes(byte ^ 4 for byte in data[at : at + 1]) + data[at + 1 :]
    return chance.choice((data + chance.randbytes(5000), data[:at], zeros, flipped))


@pytest.mark.parametrize("way", WAYS)
def test_a_damage_in_any_file_does_not_show(way, small, hub, tmp_path, nightly):
    resumes, chance = Resumes(way, small, tmp_path / "work", 3), random.Random(way)
    for files in resumes.left[1:]:
        for name, data in files.items():
            assert resumes.check(files | {name: damaged(data, chance)}), name
            assert resumes.check({other: files[other] for other in files if other != name}), name


@pytest.mark.parametrize("count", [3, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("way", nth(2, ["calibrated", "plain", "hub"]))
def test_a_forged_file_ends_in_a_line_or_an_export(way, count, small, hub, tmp_path, heavy):
    """Values of a state or a plan, made ones of a wrong type, length or range, with a right
    checksum.  Of 150 such states 85 ended in a raw error."""
    resumes, chance = Resumes(way, small, tmp_path / "work", 4), random.Random(0)
    name = "export.download/plan.json" if way == "hub" else "export.partial/state.json"
    *_, files = (left for left in resumes.left if name in left)
    for _ in range(count):
        resumes.check({**files, name: forged(files[name], chance)})
    stream = "export.partial/stream.bin"
    for files in [left for left in resumes.left if stream in left][:1]:
        assert resumes.check({**files, stream: bytes(byte ^ 4 for byte in files[stream])})

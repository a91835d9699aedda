"""Quantize: killed, interrupted, out of disk, twice at once; whatever happens, the same bytes or a
clear refusal."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.config import read_config
from slotmoe.model.names import expert_name, resident_shapes, role_of
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.codecs.codec import EXPERT_CODECS, NF4
from slotmoe.quant.export import writer
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from slotmoe.quant.shapes import resident_quantization
from tests.support.disk import Stop, killed, stop_at, tree
from tests.support.oracle import rebuild
from tests.support.params import nth
from tests.support.tiny import SMALL, random_weights, write_checkpoint

NF4_CODECS = EXPERT_CODECS["nf4", "4"]
ROOT = Path(__file__).parents[2]
ODD = {"hidden_size": 72, "moe_intermediate_size": 37, "intermediate_size": 50}
FULL = "the disk is full; make room and run the same command to resume"


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


@pytest.fixture(scope="module")
def left(source, tmp_path_factory):
    """What runs leave that are killed: shortly before their end, and before the last rename."""
    folder = tmp_path_factory.mktemp("left")
    stopped(source, folder / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.output_dir.publish", killed)
        with pytest.raises(Stop):
            quantize(source, folder / "whole")
    return folder


HELD = """
import signal, sys, time
import slotmoe.offload.ingest.quantize as module
from slotmoe.__main__ import main
def held(path, values):
    print("held", flush=True)
    time.sleep(600)
module.write_json = held
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv.insert(1, "quantize")
main()
"""


@pytest.mark.parametrize(
    "number", nth(4, [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
)
def test_interrupted_command_resumes(number, source, wanted, tmp_path, processes):
    """By a signal before it writes the manifest."""
    command, pipes = [sys.executable, "-c", HELD, source, tmp_path / "export"], {}
    pipes["stdout"] = pipes["stderr"] = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as child:
        assert child.stdout.readline() == "held\n"
        child.send_signal(number)
        message = child.communicate()[1]
    assert child.returncode == {1: 129, 2: 130, 15: 143, 9: -9}[number]
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert "run the same command again to resume" in message
        assert str(tmp_path / "export") in message
    assert [path.name for path in tmp_path.iterdir()] == ["export.partial"]
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_resuming_keeps_finished_files(source, wanted, tmp_path, monkeypatch):
    """And progress moves while they are read again."""

    def inodes(folder):
        return {path.name: path.stat().st_ino for path in folder.rglob("*.safetensors")}

    stopped(source, tmp_path / "export")
    before, seen = inodes(tmp_path / "export.partial"), []
    assert set(before) >= {RESIDENT, "layer-00001.safetensors"}
    monkeypatch.setattr(writer, "_PIECE", 4096)
    quantize(source, tmp_path / "export", workers=1, progress=lambda *now: seen.append(now))
    assert before.items() <= inodes(tmp_path / "export").items()
    assert tree(tmp_path / "export") == wanted
    done, (total,) = [now for now, _ in seen], {total for _, total in seen}
    assert done == sorted(done) and done[-1] == total
    assert 0 < done[0] < total / 20, "what is finished counts from the start"


def test_killed_before_the_last_rename_has_nothing_to_do_again(left, source, wanted, tmp_path):
    """Unless something is missing, or was left half-written."""
    shutil.copytree(left / "whole.partial", tmp_path / "export.partial")
    quantize(source, tmp_path / "export", progress=lambda done, total: pytest.fail("it works"))
    assert tree(tmp_path / "export") == wanted
    for name in (RESIDENT, layer_file(2), "config.json"):
        partial = shutil.copytree(left / "whole.partial", tmp_path / "again.partial")
        (partial / name).unlink()
        for half in ("state.json.tmp", "experts/layer-00001.safetensors.tmp"):
            (partial / half).write_text("half")
        quantize(source, tmp_path / "again")
        assert tree(tmp_path / "again") == wanted
        shutil.rmtree(tmp_path / "again")


def test_file_that_lost_bytes_is_not_taken_for_whole_after_a_kill(left, source, wanted, tmp_path):
    """Its successor has the right size from its first byte on."""
    file = shutil.copytree(left / "stopped.partial", tmp_path / "export.partial") / RESIDENT
    size = file.stat().st_size

    def killed(_done, _total):
        if file.exists() and file.stat().st_size == size:
            raise Stop

    for lose in (lambda: os.truncate(file, 5000), file.unlink):
        lose()
        with pytest.raises(Stop):
            quantize(source, tmp_path / "export", workers=1, progress=killed)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_an_export_that_does_not_open_replaces_none(made, source, wanted, tmp_path, monkeypatch):
    shutil.copytree(made, tmp_path / "export")
    with monkeypatch.context() as patch:
        garbage = "slotmoe.offload.ingest.quantize.write_json"
        patch.setattr(garbage, lambda path, values: path.write_text("{}"))
        with pytest.raises(ExportError, match=MANIFEST):
            quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") == wanted
    quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") == wanted


BAD = {
    "tokenizer.json": ["{}", '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}'],
    "tokenizer_config.json": ["[]"],
    "generation_config.json": ["{"],
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize(("name", "text"), [(name, text) for name in BAD for text in BAD[name]])
def test_an_export_that_cannot_encode_replaces_none(
    late, name, text, made, source, wanted, tmp_path, processes
):
    """A bad file of the source is known before the work, and one that turned bad meanwhile before
    the new export gets its name."""
    shutil.copytree(made, tmp_path / "export")
    shutil.copytree(source, tmp_path / "source")
    spoil = partial((tmp_path / "source" / name).write_text, text)

    def progress(done, total):
        assert late
        spoil()

    if not late:
        spoil()
    with pytest.raises(ConfigError, match=rf"{'partial' if late else 'source'}/{name}"):
        quantize(tmp_path / "source", tmp_path / "export", overwrite=True, progress=progress)
    assert tree(tmp_path / "export") == wanted
    assert (tmp_path / "export.partial").exists() == late


def test_existing_destination(source, wanted, tmp_path):
    (tmp_path / "export").mkdir()  # an empty one is taken
    stopped(source, tmp_path / "export", resident="bf16")
    with pytest.raises(ExportError, match="--overwrite"):  # of something else
        quantize(source, tmp_path / "export")
    stale = tmp_path / "export.partial" / layer_file(99)  # what is overwritten goes at once
    stale.write_text("of another model")
    stopped(source, tmp_path / "export", 0, overwrite=True)
    assert not stale.exists()
    quantize(source, tmp_path / "export", resident="bf16", overwrite=True)
    old = tree(tmp_path)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        quantize(source, tmp_path / "export")
    assert tree(tmp_path) == old
    quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path) == {f"export/{name}": data for name, data in wanted.items()}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["export", "export.partial", "export.replaced"])
@pytest.mark.parametrize("kind", ["folder", "lookalike", "link", "beside an export"])
def test_foreign_folder_is_never_touched(place, overwrite, kind, made, source, tmp_path):
    if kind == "beside an export" and place != "export":
        shutil.copytree(made, tmp_path / "export")
        if place == "export.replaced" and not overwrite:
            return  # what is only checked replaces nothing
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


def test_too_little_disk_is_known_at_once(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, 1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match=r"needs [\d.]+ MiB of free disk, has 1.0 MiB"):
        quantize(source, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


def test_a_resume_needs_no_disk_for_what_it_has(left, source, wanted, tmp_path, monkeypatch):
    size = sum(map(len, wanted.values()))
    usage = namedtuple("usage", "total used free")(1 << 40, 1 << 40, (16 << 20) + size // 2)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ExportError, match="of free disk"):
        quantize(source, tmp_path / "export")
    shutil.copytree(left / "stopped.partial", tmp_path / "export.partial")
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


CALLS = [(call, errno.ENOSPC) for call in (1, 5, 14, 17)]


@pytest.mark.parametrize(("call", "code"), [*CALLS, (9, errno.EDQUOT)])
def test_disk_fills_up(call, code, source, wanted, tmp_path, monkeypatch):
    calls = []

    def full(handle):
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ExportError, match=FULL):
            quantize(source, tmp_path / "export", workers=1)
    assert not (tmp_path / "export").exists()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_two_at_once(source, wanted, tmp_path):
    """The second is refused, or waits and then has nothing to do."""
    started, go, seen = threading.Event(), threading.Event(), []
    run = partial(quantize, source, tmp_path / "export")

    def slow(done, total):
        started.set()
        go.wait(30)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(run, progress=slow)
        try:
            assert started.wait(30)
            with pytest.raises(ExportError, match="another process is writing it"):
                run()
            second = pool.submit(run, wait_for_lock=True, progress=lambda *now: seen.append(now))
        finally:
            go.set()
        assert first.result() == second.result() == json.loads(wanted[MANIFEST])
    assert (tree(tmp_path / "export"), seen) == (wanted, [])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_workers_and_shards_do_not_show(source, wanted, tmp_path):
    """Each worker computes with one thread, the caller as before."""
    seen, before = set(), torch.get_num_threads()

    def progress(done, total):
        if threading.current_thread() is not threading.main_thread():
            seen.add(torch.get_num_threads())

    torch.set_num_threads(3)
    try:
        quantize(source, tmp_path / "export", workers=4, progress=progress)
        assert (seen, torch.get_num_threads()) == ({1}, 3)
    finally:
        torch.set_num_threads(before)
    assert tree(tmp_path / "export") == wanted
    # Learned levels are those of one file; others do not depend on how weights are spread.
    write_checkpoint(tmp_path / "single", shards=1, num_hidden_layers=4)
    exports = []
    for folder in (tmp_path / "single", source):
        quantize(folder, tmp_path / "nf4", codecs=NF4_CODECS, overwrite=True)
        exports.append(tree(tmp_path / "nf4"))
        del exports[-1][MANIFEST]  # which names the source
    assert exports[0] == exports[1]


def dense(weight):
    return weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()


KINDS = [
    ("bf16", torch.float32, {"none"}),
    ("int8", torch.float16, {"none", "int8"}),
    ("nf4", torch.bfloat16, {"none", "int8", NF4}),
]


@pytest.mark.parametrize(("resident", "dtype", "kinds"), KINDS)
def test_export_is_rebuilt_from_the_documented_bytes(resident, dtype, kinds, tmp_path, heavy):
    """With safetensors, numpy and bitsandbytes alone, sizes that fill neither tiles nor blocks; and
    the report says what quantization cost, layer by layer."""
    weights = random_weights(write_checkpoint(tmp_path / "source", dtype=dtype, **ODD), dtype)
    options = {"resident": resident, "codecs": NF4_CODECS}
    manifest = quantize(tmp_path / "source", tmp_path / "export", **options)
    assert manifest["quantization"]["layout"] == "tiles16"
    assert manifest["quantization"]["codecs"]["nf4"]["levels"] == list(NF4.levels)
    report = manifest["quantization"]["report"]
    rebuilt = rebuild(tmp_path / "export")
    for name, weight in weights.items():
        rebuilt[name] = rebuilt[name][tuple(map(slice, weight.shape))]
    with Export.open(tmp_path / "export") as export:
        for layer, expert in product(export.layers, (0, 3, 7)):
            for projection, values in export.expert(layer, expert).items():
                assert torch.equal(values, rebuilt[expert_name(layer, expert, projection)])
        found = {}  # tensors by how they are stored
        for name in resident_shapes(read_config(tmp_path / "source" / "config.json")):
            tensor = export.resident(name)
            assert torch.equal(dense(tensor), rebuilt[name])
            found.setdefault(resident_quantization(role_of(name), resident), []).append(tensor)
    assert found.keys() == kinds
    assert {tensor.dtype for tensor in found["none"]} == {dtype}
    found = {row["family"]: row for row in report["families"]}
    layers = {}  # by family and layer: squares of the error, of the weights, and their number
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        layer = int(parts[1]) if parts[0] == "layers" else -1
        key = ".".join(part for part in parts if part != "layers" and not part.isdigit())
        exact = weight.double()
        wrong = exact - rebuilt[name]
        sums = wrong.square().sum().item(), exact.square().sum().item(), weight.numel()
        family = layers.setdefault("norms" if key.endswith("norm") else key, {})
        family[layer] = np.add(family.get(layer, 0), sums)
    assert set(found) == set(layers)
    assert report["weights"] == sum(weight.numel() for weight in weights.values())
    for key, family in layers.items():
        row, (wrong, whole, count) = found[key], sum(family.values())
        assert row["weights"] == count
        error = (wrong / whole) ** 0.5
        assert row["relative_rms_error"] == pytest.approx(error, rel=1e-5, abs=1e-12)
        errors = {}
        if wrong and -1 not in family:
            errors = {str(layer): (one[0] / one[1]) ** 0.5 for layer, one in family.items()}
        assert row["by_layer"] == pytest.approx(errors, rel=1e-5)
        assert (row["stored"] in ("bf16", "fp16", "fp32")) == (wrong == 0)
    size = sum(path.stat().st_size for path in (tmp_path / "export").rglob("*.safetensors"))
    assert report["bits_per_weight"] == pytest.approx(8 * size / report["weights"], rel=0.1)


def test_torch_and_native_kernels_write_the_same_export(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "source", **SMALL)
    quantize(tmp_path / "source", tmp_path / "native")
    monkeypatch.setattr("slotmoe.quant.kernels.cpu.bindings.load", lambda: None)
    quantize(tmp_path / "source", tmp_path / "torch")
    assert tree(tmp_path / "torch") == tree(tmp_path / "native")

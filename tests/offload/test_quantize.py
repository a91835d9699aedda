"""Quantize: killed, interrupted, out of disk, twice at once; whatever happens, the same bytes or a
clear refusal."""

import errno
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from slotmoe.errors import ConfigError, ExportError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.names import expert_name, resident_shapes, role_of
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant import nf4
from slotmoe.quant.codec import EXPERT_CODECS, LUT4, NF4
from slotmoe.quant.export import verify
from slotmoe.quant.export.layout import MANIFEST, PROJECTIONS, RESIDENT, layer_file
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.validate import manifest_checksum
from slotmoe.quant.shapes import ALIGNMENT, RESIDENT_MODES, resident_quantization
from tests.support.disk import Stop, killed, small_disk, stop_at, tree
from tests.support.oracle import rebuild
from tests.support.params import nth
from tests.support.tiny import SAMPLE, random_weights, write_checkpoint

NF4_CODECS = EXPERT_CODECS["nf4", "4"]
ROOT = Path(__file__).parents[2]
ODD = {"hidden_size": 72, "moe_intermediate_size": 37, "intermediate_size": 50}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "checkpoint"
    write_checkpoint(folder, shards=3, num_hidden_layers=4)
    return folder


@pytest.fixture(scope="module")
def wanted(source, tmp_path_factory):
    """Bytes of an uninterrupted run."""
    destination = tmp_path_factory.mktemp("wanted") / "export"
    quantize(source, destination)
    return tree(destination)


def command_line(*arguments):
    return [sys.executable, "-m", "slotmoe", "quantize", *map(str, arguments)]


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "number", nth(4, [signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGKILL])
)
def test_interrupted_command_resumes(number, sample_export, tmp_path):
    destination = tmp_path / "export"
    child = subprocess.Popen(
        command_line(SAMPLE, destination, "--workers", 1), cwd=ROOT, stderr=subprocess.PIPE
    )
    while child.poll() is None and not (tmp_path / "export.partial" / "experts").exists():
        time.sleep(0.001)
    child.send_signal(number)
    message = child.communicate()[1].decode()
    assert child.returncode == {1: 129, 2: 130, 15: 143, 9: -9}[number]
    assert "Traceback" not in message
    if number == signal.SIGINT:
        assert "run the same command again to resume" in message
        assert str(destination) in message
    assert not destination.exists()
    assert (tmp_path / "export.partial").is_dir()
    quantize(SAMPLE, destination)
    assert tree(destination) == tree(sample_export)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_resuming_keeps_finished_files(source, wanted, tmp_path):
    destination = tmp_path / "export"
    with pytest.raises(Stop):
        quantize(source, destination, workers=1, progress=stop_at(0.9))
    before = {
        path.name: path.stat().st_ino
        for path in (tmp_path / "export.partial").rglob("*.safetensors")
    }
    assert set(before) >= {RESIDENT, "layer-00001.safetensors"}
    seen = []
    quantize(source, destination, progress=lambda done, total: seen.append(done / total))
    after = {path.name: path.stat().st_ino for path in destination.rglob("*.safetensors")}
    assert {name: after[name] for name in before} == before
    assert tree(destination) == wanted
    assert seen[-1] == 1
    assert 0 < seen[0] < 1, "what is finished counts from the start"


def test_progress_moves_while_finished_files_are_read_again(source, tmp_path, monkeypatch):
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", workers=1, progress=stop_at(0.8))
    monkeypatch.setattr(verify, "_PIECE", 4096)
    seen = []
    quantize(source, tmp_path / "export", workers=1, progress=lambda *now: seen.append(now))
    done, (total,) = [now for now, _ in seen], {total for _, total in seen}
    assert done == sorted(done) and done[-1] == total
    assert done[0] < total / 20


def test_partial_made_of_something_else_is_not_resumed(source, wanted, tmp_path):
    destination = tmp_path / "export"
    with pytest.raises(Stop):
        quantize(
            source, destination, resident="nf4", workers=1, progress=stop_at(0.9)
        )  # late enough to have finished a file
    assert (tmp_path / "export.partial" / "state.json").is_file()
    with pytest.raises(ExportError, match="--overwrite"):
        quantize(source, destination)
    quantize(source, destination, overwrite=True)
    assert tree(destination) == wanted


def test_killed_before_the_last_rename_has_nothing_to_do_again(
    source, wanted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.output_dir.publish", killed)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "export")
    seen = []
    quantize(source, tmp_path / "export", progress=lambda done, total: seen.append(done))
    assert seen == []
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize("name", [RESIDENT, layer_file(2), "config.json"])
def test_lost_before_the_last_rename(name, source, wanted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.output_dir.publish", killed)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "export")
    (tmp_path / "export.partial" / name).unlink()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize(
    "name",
    [
        "state.json.tmp",
        "slotmoe.json.tmp",
        "config.json.tmp",
        "experts/layer-00001.safetensors.tmp",
    ],
)
@pytest.mark.parametrize("share", [0.9, 2])
def test_half_written_leftovers_are_not_published(
    name, share, source, wanted, tmp_path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.output_dir.publish", killed)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "export", workers=1, progress=stop_at(share))
    (tmp_path / "export.partial" / name).write_text("half")
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_file_that_lost_bytes_is_not_taken_for_whole_after_a_kill(source, wanted, tmp_path):
    """Its successor has the right size from its first byte on."""
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", workers=1, progress=stop_at(0.9))
    partial = tmp_path / "export.partial"
    for lost in (lambda: os.truncate(partial / RESIDENT, 5000), (partial / RESIDENT).unlink):
        if (partial / RESIDENT).exists():
            lost()

        def killed(_done, _total):
            if (partial / (RESIDENT + ".tmp")).exists():
                raise Stop

        with pytest.raises(Stop):
            quantize(source, tmp_path / "export", workers=1, progress=killed)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_finished_file_that_lost_bytes_is_written_again(source, wanted, tmp_path):
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", workers=1, progress=stop_at(0.9))
    os.truncate(tmp_path / "export.partial" / RESIDENT, 5000)
    (tmp_path / "export.partial" / layer_file(1)).unlink()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"identity": 1}', b'{"a": NaN'], ids=repr)
def test_damaged_state_starts_anew(damage, source, wanted, tmp_path):
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", progress=stop_at(0.9))
    (tmp_path / "export.partial" / "state.json").write_bytes(damage)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize("count", [10, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_value_of_the_state_is_trusted(count, source, wanted, tmp_path):
    """Of 1,409 mutations some 165 ended well with an export that could not be read, and 306 in a
    traceback."""
    with pytest.raises(Stop):
        quantize(source, tmp_path / "begun", workers=1, progress=stop_at(0.9))
    data = (tmp_path / "begun.partial" / "state.json").read_bytes()
    generator = random.Random(count)
    for number in range(count):
        at = generator.randrange(len(data))
        changed = bytes([generator.choice(b'0123456789abcdef",:{}[]-.')])
        piece = generator.choice((changed, changed + data[at : at + 1], b""))
        shutil.copytree(tmp_path / "begun.partial", tmp_path / "export.partial")
        state = tmp_path / "export.partial" / "state.json"
        state.write_bytes(data[:at] + piece + data[at + 1 :])
        quantize(source, tmp_path / "export")
        assert tree(tmp_path / "export") == wanted, (number, at, piece)
        shutil.rmtree(tmp_path / "export")


def flip(path):
    """Change one bit in the middle of a file, whose size and times stay."""
    status, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize("name", [RESIDENT, layer_file(1)])
def test_a_finished_file_that_rots_is_written_again(name, source, wanted, tmp_path):
    with pytest.raises(Stop):
        quantize(source, tmp_path / "export", workers=1, progress=stop_at(0.9))
    flip(tmp_path / "export.partial" / name)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize("name", [RESIDENT, layer_file(2), "config.json"])
def test_rotten_before_the_last_rename(name, source, wanted, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.output_dir.publish", killed)
        with pytest.raises(Stop):
            quantize(source, tmp_path / "export")
    flip(tmp_path / "export.partial" / name)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_an_export_that_does_not_open_replaces_none(source, wanted, tmp_path, monkeypatch):
    quantize(source, tmp_path / "export")
    with monkeypatch.context() as patch:
        patch.setattr("slotmoe.offload.ingest.quantize.write_json", write_garbage)
        with pytest.raises(ExportError, match=MANIFEST):
            quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") == wanted
    quantize(source, tmp_path / "export", overwrite=True)
    assert tree(tmp_path / "export") == wanted


def write_garbage(path, values):
    path.write_text("{}")


def test_existing_destination(source, wanted, tmp_path):
    destination = tmp_path / "export"
    quantize(source, destination, resident="bf16")
    old = tree(destination)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        quantize(source, destination)
    assert tree(destination) == old
    quantize(source, destination, overwrite=True)
    assert tree(destination) == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("place", ["export", "export.partial", "export.replaced"])
@pytest.mark.parametrize("lookalike", [False, True])
def test_foreign_folder_is_never_touched(place, overwrite, lookalike, source, tmp_path):
    folder = tmp_path / place
    folder.mkdir()
    (folder / "thesis.txt").write_text("ten years of work")
    if lookalike:  # an export that someone keeps other files in
        (folder / MANIFEST).write_text("{}")
    before = tree(tmp_path)
    with pytest.raises(ExportError, match=place):
        quantize(source, tmp_path / "export", overwrite=overwrite)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", ["export", "export.partial"])
def test_links_are_never_followed_to_write(place, source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "state.json").write_text("mine")
    (tmp_path / place).symlink_to("elsewhere")
    with pytest.raises(ExportError, match=place):
        quantize(source, tmp_path / "export", overwrite=True)
    assert (tmp_path / "elsewhere" / "state.json").read_text() == "mine"


def test_destination_is_a_file(source, tmp_path):
    (tmp_path / "export").write_text("mine")
    with pytest.raises(ExportError, match="not a folder"):
        quantize(source, tmp_path / "export", overwrite=True)
    assert (tmp_path / "export").read_text() == "mine"


def test_empty_destination_is_taken(source, wanted, tmp_path):
    (tmp_path / "export").mkdir()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.parametrize("name", [".", "/", "..", "missing/export", "file/export", "x" * 300])
def test_impossible_destination(name, source, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    destination = Path(name) if "/" not in name or name == "/" else tmp_path / name
    with pytest.raises(ExportError, match="choose another destination"):
        quantize(source, destination)
    assert sorted(tree(tmp_path)) == ["file"]


def test_overwriting_the_source_is_refused(source, tmp_path):
    shutil.copytree(source, tmp_path / "checkpoint")
    with pytest.raises(ExportError, match="not an export"):
        quantize(tmp_path / "checkpoint", tmp_path / "checkpoint", overwrite=True)
    assert tree(tmp_path / "checkpoint") == tree(source)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to read-only folders")
def test_read_only_destination(source, tmp_path):
    (tmp_path / "shelf").mkdir(mode=0o555)
    with pytest.raises(ExportError, match="Permission denied"):
        quantize(source, tmp_path / "shelf" / "export")


def test_read_only_file_system(source, tmp_path, monkeypatch):
    def refuse(*_arguments):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(ExportError, match="Read-only file system"):
        quantize(source, tmp_path / "export")


def test_too_little_disk_is_known_at_once(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(
        "slotmoe.offload.ingest.quantize.shutil.disk_usage",
        lambda path: usage(1 << 40, 1 << 40, 1 << 20),
    )
    with pytest.raises(ExportError, match=r"needs [\d.]+ MiB of free disk, has 1.0 MiB"):
        quantize(source, tmp_path / "export")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", [1, 2, 5, 9, 14, 17])
def test_disk_fills_up(call, code, source, wanted, tmp_path, monkeypatch):
    original, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) >= call:
            raise OSError(code, os.strerror(code))
        original(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            ExportError, match="the disk is full; make room and run the same command to resume"
        ):
            quantize(source, tmp_path / "export", workers=1)
    assert not (tmp_path / "export").exists()
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("kilobytes", [4, 200, 700, 900, 1000])
def test_disk_really_fills_up(kilobytes, source, wanted, tmp_path, monkeypatch):
    with small_disk(tmp_path, f"{kilobytes}k") as (disk, resize):
        with monkeypatch.context() as patch:
            patch.setattr(
                "slotmoe.offload.ingest.quantize.check_space", lambda partial, needed: None
            )
            with pytest.raises(ExportError, match="the disk is full"):
                quantize(source, disk / "export")
        assert not (disk / "export").exists()
        resize("64m")
        quantize(source, disk / "export")
        assert tree(disk) == {f"export/{name}": data for name, data in wanted.items()}


def test_two_at_once(source, wanted, tmp_path):
    started, go = threading.Event(), threading.Event()

    def slow(done, total):
        started.set()
        go.wait(30)

    first = threading.Thread(
        target=quantize, args=(source, tmp_path / "export"), kwargs={"progress": slow}
    )
    first.start()
    try:
        assert started.wait(30)
        with pytest.raises(ExportError, match="another process is writing it"):
            quantize(source, tmp_path / "export")
        found, seen = [], []
        waiting = threading.Thread(
            target=lambda: found.append(
                quantize(
                    source,
                    tmp_path / "export",
                    wait_for_lock=True,
                    progress=lambda done, total: seen.append(done),
                )
            )
        )
        waiting.start()
    finally:
        go.set()
        first.join()
    waiting.join()
    assert tree(tmp_path / "export") == wanted
    assert found == [json.loads(wanted[MANIFEST])]
    assert seen == [], "the second had nothing to do"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def without_source(files):
    """Bytes of an export but for the manifest's account of where it came from."""
    manifest = json.loads(files[MANIFEST])
    assert manifest["checksum"] == manifest_checksum(manifest)
    return {**files, MANIFEST: json.dumps({**manifest, "source": None, "checksum": None})}


def test_workers_and_shards_do_not_show(source, wanted, tmp_path):
    for workers in (1, 4):
        quantize(source, tmp_path / f"export{workers}", workers=workers)
        assert tree(tmp_path / f"export{workers}") == wanted
    # Learned levels are those of one file; others do not depend on how weights are spread.
    write_checkpoint(tmp_path / "single", shards=1, num_hidden_layers=4)
    quantize(tmp_path / "single", tmp_path / "export", codecs=NF4_CODECS)
    quantize(source, tmp_path / "nf4", codecs=NF4_CODECS)
    assert without_source(tree(tmp_path / "export")) == without_source(tree(tmp_path / "nf4"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("resident", ["auto", *RESIDENT_MODES])
def test_every_resident_mode_round_trips(dtype, resident, tmp_path):
    config = write_checkpoint(tmp_path / "source", dtype=dtype, **ODD)
    quantize(tmp_path / "source", tmp_path / "export", resident=resident)
    weights = random_weights(config, dtype)
    kinds = set()
    with (
        Export.open(tmp_path / "export") as export,
        Checkpoint.open(tmp_path / "source") as checkpoint,
    ):
        for name in resident_shapes(checkpoint.config):
            kind, found = (
                resident_quantization(role_of(name), "int8" if resident == "auto" else resident),
                export.resident(name),
            )
            kinds.add(kind)
            if kind == "none":
                assert found.dtype == dtype
                assert torch.equal(found, weights[name])
            elif kind == "int8":
                error = (found.dequantize() - weights[name].float()).abs()
                assert (error <= found.scale[:, None] / 2 * 1.001).all()
            elif kind == NF4:
                assert torch.equal(
                    found.dequantize(), documented_values(weights[name].float().numpy())
                )
            else:
                weight = weights[name].float()
                assert (found.dequantize() - weight).norm() < 0.09 * weight.norm()
    assert (
        kinds
        == {
            "auto": {"none", "int8"},
            "bf16": {"none"},
            "int8": {"none", "int8"},
            "mixed": {"none", "int8", LUT4},
            "nf4": {"none", "int8", NF4},
        }[resident]
    )
    with Runtime.open(tmp_path / "export", context=32) as runtime:
        logits = runtime.logits([0, 7, 300, 4095])
    assert logits.shape == (4, 4096)
    assert torch.isfinite(logits).all()


def bitsandbytes_codes(weight):
    """Codes [N, K] and absmax [N, blocks] of a float32 matrix whose width is a multiple of 64, by
    bitsandbytes."""
    logging.disable(logging.WARNING)  # it announces an optional package that is not installed
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from bitsandbytes.functional import quantize_4bit
    finally:
        logging.disable(logging.NOTSET)
    packed, state = quantize_4bit(torch.from_numpy(weight), blocksize=64, quant_type="nf4")
    packed = packed.numpy().reshape(weight.shape[0], -1)
    return np.stack([packed >> 4, packed & 15], axis=-1).reshape(
        weight.shape
    ), state.absmax.numpy().reshape(weight.shape[0], -1)


def padded(weight):
    rows, columns = -len(weight) % 16, -weight.shape[1] % 64
    return np.pad(np.ascontiguousarray(weight), ((0, rows), (0, columns)))


def documented_values(weight):
    """What the format makes of a float32 matrix [N, K]: bitsandbytes' codes, its absmax rounded to
    fp16."""
    codes, absmax = bitsandbytes_codes(padded(weight))
    scale = np.repeat(absmax.astype(np.float16).astype(np.float32), 64, axis=1)
    return torch.from_numpy(
        (np.array(nf4.LEVELS, np.float32)[codes] * scale)[: weight.shape[0], : weight.shape[1]]
    )


def documented_tiles(codes):
    """The bytes of codes [N, K] in tiles16, from the words of slotmoe.quant.nf4's documentation,
    one byte at a time."""
    tiles, blocks = codes.shape[0] // 16, codes.shape[1] // 64
    out = np.zeros((tiles, blocks, 512), np.uint8)
    for tile in range(tiles):
        for block in range(blocks):
            for t in range(8):
                for lane in range(16):
                    for i in range(4):
                        row, column = 16 * tile + lane, 64 * block + 8 * t + i
                        out[tile, block, 64 * t + 4 * lane + i] = (
                            codes[row, column] << 4 | codes[row, column + 4]
                        )
    return out


def test_export_can_be_rebuilt_from_the_documented_bytes(tmp_path):
    """With safetensors, numpy and bitsandbytes alone; sizes that fill neither tiles nor blocks."""
    weights = random_weights(write_checkpoint(tmp_path / "source", **ODD))
    quantize(tmp_path / "source", tmp_path / "export", codecs=NF4_CODECS)
    manifest = json.loads((tmp_path / "export" / MANIFEST).read_text())
    assert manifest["quantization"]["layout"] == "tiles16"
    assert manifest["quantization"]["codecs"]["nf4"]["levels"] == list(nf4.LEVELS)
    with Export.open(tmp_path / "export") as export:
        for layer in manifest["experts"]["layers"]:
            with safe_open(tmp_path / "export" / layer_file(layer), "np") as file:
                for expert in (0, 3, 7):
                    values = export.expert(layer, expert)
                    for projection in PROJECTIONS:
                        name = expert_name(layer, expert, projection)
                        source = weights[name].float().numpy()
                        codes, absmax = bitsandbytes_codes(padded(source))
                        codes[len(source) :] = 7  # rows of padding are zero: level 7 times nothing
                        np.testing.assert_array_equal(
                            file.get_tensor(name), documented_tiles(codes), err_msg=name
                        )
                        stored = file.get_tensor(name + ".absmax")
                        assert stored.dtype == np.float16
                        tiled = (
                            absmax.astype(np.float16)
                            .reshape(-1, 16, absmax.shape[1])
                            .transpose(0, 2, 1)
                        )
                        np.testing.assert_array_equal(stored, tiled)
                        assert torch.equal(values[projection], documented_values(source))


@pytest.mark.parametrize("resident", ["bf16", "int8", "nf4"])
def test_report_says_what_quantization_cost(resident, tmp_path):
    """Against weights rebuilt from the documented bytes, layer by layer."""
    weights = random_weights(write_checkpoint(tmp_path / "source", **ODD))
    quantize(tmp_path / "source", tmp_path / "export", resident=resident)
    report = json.loads((tmp_path / "export" / MANIFEST).read_text())["quantization"]["report"]
    found = {row["family"]: row for row in report["families"]}
    rebuilt = rebuild(tmp_path / "export")
    layers: dict[str, dict[int, list[float]]] = {}
    for name, weight in weights.items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".")
        layer = int(parts[1]) if parts[0] == "layers" else -1
        key = ".".join(part for part in parts if part != "layers" and not part.isdigit())
        key = "norms" if key.endswith("norm") else key
        made = (
            rebuilt[name][: weight.shape[0], : weight.shape[1]]
            if weight.dim() == 2
            else rebuilt[name]
        )
        sums = layers.setdefault(key, {}).setdefault(layer, [0.0, 0.0, 0])
        sums[0] += (weight.double() - made).square().sum().item()
        sums[1] += weight.double().square().sum().item()
        sums[2] += weight.numel()
    assert set(found) == set(layers)
    assert report["weights"] == sum(weight.numel() for weight in weights.values())
    for key, sums in layers.items():
        row = found[key]
        assert row["weights"] == sum(one[2] for one in sums.values())
        total = [sum(one[i] for one in sums.values()) for i in (0, 1)]
        assert row["relative_rms_error"] == pytest.approx(
            (total[0] / total[1]) ** 0.5, rel=1e-5, abs=1e-12
        )
        if total[0] and -1 not in sums:
            errors = {layer: (one[0] / one[1]) ** 0.5 for layer, one in sums.items()}
            assert row["by_layer"] == {
                str(layer): pytest.approx(error, rel=1e-5) for layer, error in errors.items()
            }
            assert row["worst_layer"] == max(errors, key=errors.get)
        else:
            assert (row["worst_layer"], row["by_layer"]) == (None, {})
        assert (row["stored"] == "bf16") == (total[0] == 0)
    data = 0
    for path in (tmp_path / "export").rglob("*.safetensors"):
        raw = path.read_bytes()
        data += len(raw) - 8 - int.from_bytes(raw[:8], "little")
    assert report["bits_per_weight"] == pytest.approx(8 * data / report["weights"], rel=1e-5)


def test_torch_and_native_kernels_write_the_same_export(source, wanted, tmp_path, monkeypatch):
    monkeypatch.setattr("slotmoe.quant.kernels.cpu.bindings.load", lambda: None)
    quantize(source, tmp_path / "export")
    assert tree(tmp_path / "export") == wanted


def test_files_are_standard_and_records_aligned(wanted, source, tmp_path):
    quantize(source, tmp_path / "export")
    manifest = json.loads((tmp_path / "export" / MANIFEST).read_text())
    size = manifest["experts"]["record_bytes"]
    assert size % ALIGNMENT == 0
    for name in [RESIDENT, *map(layer_file, manifest["experts"]["layers"])]:
        path = tmp_path / "export" / name
        with safe_open(path, "pt") as file:
            assert all(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
        raw = path.read_bytes()
        length = int.from_bytes(raw[:8], "little")
        assert (8 + length) % ALIGNMENT == 0
        header = json.loads(raw[8 : 8 + length])
        if name == RESIDENT:
            continue
        for expert in range(manifest["experts"]["n_routed_experts"]):
            prefix = f"model.layers.{int(name[14:19])}.mlp.experts.{expert}."
            order = [
                *(f"{one}.weight" for one in PROJECTIONS),
                *(f"{one}.weight.absmax" for one in PROJECTIONS),
                "pad",
            ]
            offset = expert * size
            for part in order:
                start, stop = header[prefix + part]["data_offsets"]
                assert start == offset
                assert header[prefix + part]["dtype"] == (
                    "F16" if part.endswith("absmax") else "U8"
                )
                offset = stop
            assert offset == (expert + 1) * size
            assert not any(raw[8 + length + start : 8 + length + stop]), "padding is zeros"


def test_unknown_resident_mode(source, tmp_path):
    with pytest.raises(ConfigError, match="int4"):
        quantize(source, tmp_path / "export", resident="int4")

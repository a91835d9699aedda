"""``slotmoe verify`` finds what is damaged and says what to do; ``slotmoe quantize`` repairs just
that, to the same bytes."""

import json
import os
import shutil

import pytest
import torch

from slotmoe.errors import ExportError
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.ingest.synth import synthesize
from slotmoe.quant.codec import DEFAULT_CODECS
from slotmoe.quant.export.layout import (
    MANIFEST,
    RESIDENT,
    Part,
    checksum,
    layer_file,
    place,
    predictor_parts,
)
from slotmoe.quant.export.validate import read_manifest
from slotmoe.quant.export.verify import damaged_files, span_checksums
from slotmoe.quant.export.writer import ExportFile, write_predictor
from tests.support.disk import tree
from tests.support.tiny import write_checkpoint


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint and its export."""
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder / "checkpoint", shards=3)
    quantize(folder / "checkpoint", folder / "export")
    return folder


@pytest.fixture
def export(good, tmp_path):
    return shutil.copytree(good / "export", tmp_path / "export")


def flip(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_spans_are_read_in_one_pass(tmp_path, monkeypatch):
    monkeypatch.setattr("slotmoe.quant.export.verify._PIECE", 1000)
    data = os.urandom(5500)
    (tmp_path / "file").write_bytes(data)
    spans = [(0, 5500), (10, 20), (999, 1001), (10, 5000), (3000, 3000), (2000, 3000), (5499, 5500)]
    read = []
    whole, digests = span_checksums(tmp_path / "file", spans, read.append)
    for (start, stop), digest in zip(spans, digests, strict=True):
        assert digest == checksum(data[start:stop]), (start, stop)
    assert whole == digests[0]
    assert read == [1000, 2000, 3000, 4000, 5000, 5500]


def test_sound_export(export, slotmoe):
    seen = []
    assert (
        damaged_files(export, read_manifest(export), lambda done, total: seen.append((done, total)))
        == {}
    )
    total = sum(
        path.stat().st_size
        for path in export.rglob("*")
        if path.is_file() and path.name != MANIFEST
    )
    assert seen[-1] == (total, total)
    code, out, err = slotmoe("verify", export)
    assert (code, err) == (0, "")
    assert "all 7 files are right" in out
    code, out, err = slotmoe("verify", export, "--json")
    report = json.loads(out)
    assert (code, err, report["ok"], report["bad"], report["bytes"]) == (0, "", True, [], total)


DAMAGES = {
    "record": (
        layer_file(2),
        lambda path: flip(path, path.stat().st_size - 3 * 4096 - 5),
        "is damaged in expert",
    ),
    "padding": (
        layer_file(1),
        lambda path: flip(path, path.stat().st_size - 1),
        "is damaged in expert 7",
    ),
    "header": (layer_file(1), lambda path: flip(path, 20), "is damaged in its header"),
    "tensor": (RESIDENT, lambda path: flip(path, path.stat().st_size - 5), "is damaged in "),
    "short": (RESIDENT, lambda path: os.truncate(path, 5000), "has 5000 bytes instead of"),
    "missing": (layer_file(2), lambda path: path.unlink(), "is missing"),
    "small": ("config.json", lambda path: path.write_text("{}"), "has 2 bytes instead of"),
    "small-same-size": ("tokenizer.json", lambda path: flip(path, 100), "is damaged"),
    "folder": (layer_file(1), lambda path: (path.unlink(), path.mkdir()), "is no regular file"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_repaired(name, good, export, slotmoe):
    file, damage, problem = DAMAGES[name]
    damage(export / file)
    others = {
        path: path.stat().st_ino
        for path in export.rglob("*")
        if path.is_file() and path != export / file
    }
    code, out, err = slotmoe("verify", export)
    assert code == 1
    assert f"{export / file}: {problem}" in out
    assert (
        f"slotmoe quantize SRC {export} makes it again, and no other file; SRC is checkpoint" in out
    )
    assert "1 of 7 files are bad" in err
    code, out, _ = slotmoe("verify", export, "--json")
    report = json.loads(out)
    assert (code, report["ok"], [item["file"] for item in report["bad"]]) == (1, False, [file])
    if name == "folder":
        code, _, err = slotmoe("quantize", good / "checkpoint", export)
        assert (code, "is a folder; move it away" in err) == (2, True)
        (export / file).rmdir()
    code, out, err = slotmoe("quantize", good / "checkpoint", export)
    assert code == 0
    assert f"{export / file} " in err
    assert "it is made again" in err
    assert tree(export) == tree(good / "export")
    assert {path: path.stat().st_ino for path in others} == others
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_several_damages_at_once(good, export):
    flip(export / layer_file(1), 9000)
    (export / RESIDENT).unlink()
    (export / "generation_config.json").unlink()
    assert set(damaged_files(export, read_manifest(export), lambda *_: None)) == {
        layer_file(1),
        RESIDENT,
        "generation_config.json",
    }
    quantize(good / "checkpoint", export)
    assert tree(export) == tree(good / "export")


def test_finished_export_is_only_checked(good, export, slotmoe):
    before = {path: path.stat().st_mtime_ns for path in export.rglob("*")}
    code, _, err = slotmoe("quantize", good / "checkpoint", export)
    assert (code, "every checksum is right" in err) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in export.rglob("*")} == before


class Stop(Exception):
    pass


def test_killed_repair_goes_on(good, export):
    for layer in (1, 2):
        flip(export / layer_file(layer), 9000)

    def progress(done, total):
        if done > 0.7 * total:
            raise Stop

    with pytest.raises(Stop):
        quantize(good / "checkpoint", export, workers=1, progress=progress)
    assert set(damaged_files(export, read_manifest(export), lambda *_: None)) == {
        layer_file(1),
        layer_file(2),
    }
    quantize(good / "checkpoint", export)
    assert tree(export.parent) == {
        f"export/{name}": data for name, data in tree(good / "export").items()
    }


def test_repair_touches_no_foreign_folder(good, export):
    flip(export / layer_file(1), 9000)
    partial = export.with_name("export.partial")
    partial.mkdir()
    (partial / "thesis.txt").write_text("ten years of work")
    with pytest.raises(ExportError, match=r"thesis.txt, which no export has"):
        quantize(good / "checkpoint", export)
    assert (partial / "thesis.txt").read_text() == "ten years of work"


def test_repair_from_another_checkpoint_is_refused(good, export, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", shards=3, seed=1)  # same headers, other weights
    flip(export / layer_file(1), 9000)
    before = tree(export)
    with pytest.raises(ExportError, match="makes other bytes of the source; pass --overwrite"):
        quantize(tmp_path / "checkpoint", export)
    assert tree(export) == before
    write_checkpoint(tmp_path / "other", shards=2)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        quantize(tmp_path / "other", export)


def test_damaged_manifest(good, export, slotmoe):
    text = (export / MANIFEST).read_text()
    (export / MANIFEST).write_text(text.replace('"nf4"', '"nf5"', 1))
    code, out, err = slotmoe("verify", export)
    assert code == 1
    assert f"{export / MANIFEST}: its checksum is wrong" in out
    assert "--overwrite" in out
    assert "1 of 1 files are bad" in err
    code, _, err = slotmoe("quantize", good / "checkpoint", export)
    assert (code, "--overwrite" in err) == (2, True)
    assert slotmoe("quantize", good / "checkpoint", export, "--overwrite")[0] == 0
    assert tree(export) == tree(good / "export")


def test_damaged_predictor_is_removed(good, export, slotmoe):
    experts = read_manifest(export)["experts"]
    parts = predictor_parts(
        experts["hidden_size"], len(experts["layers"]), experts["n_routed_experts"], 8, 4
    )
    write_predictor(
        export, {name: torch.zeros(part.shape, dtype=part.dtype) for name, part in parts.items()}
    )
    name = next(path.name for path in export.glob("predictor-*"))
    assert slotmoe("verify", export)[0] == 0
    flip(export / name, 5000)
    code, out, _ = slotmoe("verify", export)
    assert (code, "--calibrate TEXT" in out) == (1, True)
    code, _, err = slotmoe("quantize", good / "checkpoint", export)
    assert (code, "removed, calibrate again" in err) == (0, True)
    assert tree(export) == tree(good / "export")


def test_random_weights_are_made_by_another_command(tmp_path, good, slotmoe):
    synthesize(
        good / "checkpoint" / "config.json",
        tmp_path / "random",
        "auto",
        DEFAULT_CODECS,
        1,
        False,
        lambda done, total: None,
    )
    assert slotmoe("verify", tmp_path / "random")[0] == 0
    flip(tmp_path / "random" / RESIDENT, 5000)
    code, out, _ = slotmoe("verify", tmp_path / "random")
    assert (code, "slotmoe synth" in out) == (1, True)


@pytest.mark.parametrize("name", ["nowhere", "empty"])
def test_no_export(name, slotmoe, tmp_path):
    (tmp_path / "empty").mkdir()
    code, out, err = slotmoe("verify", tmp_path / name)
    assert (code, out) == (2, "")
    assert "no finished export" in err


def test_link_that_leads_elsewhere_is_no_part_of_the_export(export):
    manifest = read_manifest(export)
    (export.parent / "secret").write_text("x")
    (export / "config.json").unlink()
    (export / "config.json").symlink_to("../secret")
    assert damaged_files(export, manifest, lambda *_: None) == {
        "config.json": "is no regular file inside the export"
    }


def test_damage_between_the_runs_is_not_blessed(tmp_path):
    """What a killed run wrote is compared with its checksum when the file is finished."""
    parts = place({name: Part(torch.float32, (3000,), 0) for name in ("first", "second")})
    file = ExportFile(tmp_path / "file", parts)
    file.write("first", torch.ones(3000))
    file.sync()
    known = dict(file.checksums)
    file.close()
    flip(tmp_path / "file.tmp", 8192)
    file = ExportFile(tmp_path / "file", parts, known)
    file.write("second", torch.ones(3000))
    with pytest.raises(ExportError, match="first was damaged after it had been written"):
        file.finish()
    file.close()
    assert list(tmp_path.iterdir()) == []

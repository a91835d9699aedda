"""``slotmoe verify`` finds what is damaged and says what to do; ``slotmoe quantize`` repairs just
that, to the same bytes."""

import json
import shutil

import pytest
import torch

from slotmoe.errors import ExportError
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, Part, layer_file, place
from slotmoe.quant.export.manifest import read_manifest
from slotmoe.quant.export.writer import ExportFile, damaged_files
from tests.support.disk import Stop, stop_at, tree
from tests.support.exported import resign
from tests.support.hostile import flip, truncate, without
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


def problems(export):
    return damaged_files(export, read_manifest(export), lambda *now: None)


def test_sound_export(export, slotmoe):
    assert problems(export) == {}
    files = [path for path in export.rglob("*") if path.is_file() and path.name != MANIFEST]
    total = sum(path.stat().st_size for path in files)
    code, out, err = slotmoe("verify", export)
    assert (code, err) == (0, "") and "all 7 files are right" in out
    code, out, err = slotmoe("verify", export, "--json")
    report = json.loads(out)
    assert (code, err, report["ok"], report["bad"], report["bytes"]) == (0, "", True, [], total)


def flipped(name, place):
    return lambda export: flip(export / name, place)


DAMAGES = {
    "record": (layer_file(2), flipped(layer_file(2), -3 * 4096 - 5), "is damaged in expert"),
    "header": (layer_file(1), flipped(layer_file(1), 20), "is damaged in its header"),
    "tensor": (RESIDENT, flipped(RESIDENT, -5), "is damaged in "),
    "short": (RESIDENT, truncate(RESIDENT, 5000), "has 5000 bytes instead of"),
    "missing": (layer_file(2), without(layer_file(2)), "is missing"),
    "small-same-size": ("tokenizer.json", flipped("tokenizer.json", 100), "is damaged"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_found_named_and_repaired(name, good, export, slotmoe):
    file, damage, problem = DAMAGES[name]
    damage(export)
    kept = [path for path in export.rglob("*") if path.is_file() and path != export / file]
    before = {path: path.stat().st_ino for path in kept}
    code, out, err = slotmoe("verify", export)
    assert code == 1
    assert f"{export / file}: {problem}" in out
    assert f"slotmoe quantize SRC {export} makes it again" in out
    assert "1 of 7 files are bad" in err
    code, out, _ = slotmoe("verify", export, "--json")
    report = json.loads(out)
    assert (code, report["ok"], [item["file"] for item in report["bad"]]) == (1, False, [file])
    code, out, err = slotmoe("quantize", good / "checkpoint", export)
    assert code == 0
    assert f"{export / file} " in err and "it is made again" in err
    assert tree(export) == tree(good / "export")
    assert {path: path.stat().st_ino for path in before} == before
    assert [path.name for path in export.parent.iterdir()] == ["export"]


def test_killed_repair_goes_on(good, export):
    for layer in (1, 2):
        flip(export / layer_file(layer), 9000)

    with pytest.raises(Stop):
        quantize(good / "checkpoint", export, workers=1, progress=stop_at(0.7))
    assert {*problems(export)} == {layer_file(1), layer_file(2)}
    quantize(good / "checkpoint", export)
    wanted = tree(good / "export").items()
    assert tree(export.parent) == {f"export/{name}": data for name, data in wanted}


def test_repair_from_another_checkpoint_is_refused(good, export, tmp_path):
    write_checkpoint(tmp_path / "checkpoint", shards=3, seed=1)  # same headers, other weights
    resign(export, lambda manifest: [*map(manifest["source"].pop, ("stamps", "weights"))])
    quantize(tmp_path / "checkpoint", export, notify=(said := []).append)  # as earlier versions'
    assert "nothing there tells whether it is of these weights" in said[0]
    flip(export / layer_file(1), 9000)
    before = tree(export.parent)
    with pytest.raises(ExportError, match="makes other bytes of the source; pass --overwrite"):
        quantize(tmp_path / "checkpoint", export)
    assert tree(export.parent) == before
    write_checkpoint(tmp_path / "other", shards=2)
    with pytest.raises(ExportError, match="exists; pass --overwrite"):
        quantize(tmp_path / "other", export)


def test_damaged_manifest(good, export, slotmoe):
    text = (export / MANIFEST).read_text()
    (export / MANIFEST).write_text(text.replace('"lut4"', '"lut5"', 1))
    code, out, _ = slotmoe("verify", export)
    assert code == 1
    assert f"{export / MANIFEST}: its checksum is wrong" in out and "--overwrite" in out
    code, _, err = slotmoe("quantize", good / "checkpoint", export)
    assert (code, "--overwrite" in err) == (2, True)
    assert slotmoe("quantize", good / "checkpoint", export, "--overwrite")[0] == 0
    assert tree(export) == tree(good / "export")


def test_damage_between_the_runs_is_not_blessed(tmp_path):
    """What a killed run wrote is compared with its checksum when the file is finished."""
    parts = place({name: Part(torch.float32, (3000,), 0) for name in ("first", "second")})
    file = ExportFile(tmp_path / "file", parts)
    file.write("first", torch.ones(3000))
    file.sync()
    known = dict(file.checksums)
    file.close()
    flip(tmp_path / "file", 8192)
    file = ExportFile(tmp_path / "file", parts, known)
    file.write("second", torch.ones(3000))
    with pytest.raises(ExportError, match="first was damaged after it had been written"):
        file.finish()
    file.close()

"""Damaged, exchanged and foreign files of an export; the memory that refusals take."""

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from slotmoe.errors import ExportError
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.layout import COPIED, MANIFEST, RESIDENT, layer_file, tensor_parts
from slotmoe.quant.export.reader import Export
from slotmoe.tools.cli import main
from tests.support.exported import read_everything, resign, signed
from tests.support.hostile import FIRST, INDEX, edit_json, f32, refused, single, write

ROOT = Path(__file__).parents[2]


def interesting_places(name, size, export):
    """First and last bytes, the header's bounds and both ends of every part of every record or
    tensor; random ones too."""
    places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1}
    if name.startswith("experts/"):
        start = export.manifest["files"][name]["header_bytes"]
        places |= {start - 1, start}
        for expert in range(export.experts):
            for part in export.layout.parts.values():
                offset = start + expert * export.layout.record_bytes + part.offset
                places |= {offset, offset + part.nbytes // 2, offset + part.nbytes - 1}
    if name == RESIDENT:
        resident, start = tensor_parts(export.manifest["files"][name]), size - export.resident_bytes
        places |= {start - 1} | {start + part.offset for part in resident.values()}
    generator = random.Random(name)
    return sorted(places | {generator.randrange(size) for _ in range(30)})


FILES = [
    MANIFEST,
    RESIDENT,
    layer_file(1),
    layer_file(2),
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
]


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_is_refused(name, export):
    path, wanted = export / name, read_everything(export)
    with Export.open(export) as opened:
        places, manifest = interesting_places(name, path.stat().st_size, opened), opened.manifest
    generator = random.Random(1)
    for place in places:
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ (generator.choice((1, 2, 4, 8, 16, 32, 64, 128)))]))
        try:
            found = read_everything(export)
        except ExportError as problem:
            assert str(export) in str(problem)  # noqa: PT017
        else:  # white space of JSON, for example
            assert name == MANIFEST, f"a flip at {place} of {name} went unnoticed"
            assert found == wanted
            assert json.loads(path.read_text()) == manifest
        with open(path, "r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))
    assert read_everything(export) == wanted


STRANGERS = {
    "chat_template.jinja": b"<{{ messages[0].content }}>",
    "generation_config.json": b'{"eos_token_id": [5, 6, 7]}',
    "notes.txt": b"hello",
    "experts/layer-00009.safetensors": b"",
}


@pytest.mark.parametrize("name", STRANGERS)
def test_what_the_manifest_does_not_list_is_refused(name, export, capsys):
    """A template put beside the weights would otherwise speak for the model."""
    edit_json(export / MANIFEST, lambda manifest: manifest["files"].pop(name, None))
    resign(export, lambda manifest: None)
    (export / name).write_bytes(STRANGERS[name])
    refused(lambda: Export.open(export), name, "not in the manifest", kind=ExportError)
    refused(lambda: Runtime.open(export, ram="1GiB"), name, "move it away", kind=ExportError)
    with pytest.raises(SystemExit) as caught:
        main(["verify", str(export)])
    assert caught.value.code == 1
    assert name in capsys.readouterr().out


def test_what_a_kill_leaves_and_hidden_files_are_not_refused(export):
    for name in (".DS_Store", "slotmoe.json.tmp", "predictor-0123456789abcdef.safetensors"):
        (export / name).write_bytes(b"left")
    read_everything(export)


def test_small_files_are_read_once_they_are_verified(export):
    """Exchanged after the export was opened, or before the check: the bytes that are used are
    those of which the checksum was computed."""
    with Export.open(export) as opened:
        config = opened.small_file("config.json", 1 << 20)
        edit_json(export / "config.json", lambda values: values.update(rope_theta=1.0))
        refused(lambda: opened.small_file("config.json", 1 << 20), "config.json", kind=ExportError)
        (export / "config.json").write_bytes(config)
        assert opened.small_file("config.json", 1 << 20) == config
        refused(lambda: opened.small_file("config.json", 10), "more than 10", kind=ExportError)
        assert opened.small_file("chat_template.jinja", 10) is None


def test_config_is_not_read_by_path(export, monkeypatch):
    """A file that is exchanged between two openings of it can't give an old config new weights."""
    real, seen = os.open, []

    def counted(path, *arguments, **options):
        seen.append(str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", counted)
    monkeypatch.setattr("builtins.open", no_small_file(open))
    # As if no test had imported anything.
    monkeypatch.setattr("slotmoe.offload.loading.process_bytes", lambda: 400 << 20)
    with Runtime.open(export, ram="1GiB") as runtime:
        runtime.logits([0, 1, 2])
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert [path for path in seen if path.endswith(f"export/{name}")] == [str(export / name)]


def no_small_file(real):
    def guarded(path, *arguments, **options):
        assert Path(str(path)).name not in COPIED
        return real(path, *arguments, **options)

    return guarded


def test_flips_cover_every_file(good):
    present = {
        str(path.relative_to(good / "export"))
        for path in (good / "export").rglob("*")
        if path.is_file()
    }
    assert present == set(FILES)
    assert set(COPIED) & present == {
        name for name in FILES if name.endswith(".json") and name != MANIFEST
    }


MEMORY_SCRIPT = """
import json, sys
import slotmoe.model.checkpoint, slotmoe.model.tokenizer, slotmoe.offload.ingest.quantize
import slotmoe.quant.export.reader, slotmoe.offload.runtime, tokenizers
from pathlib import Path
from slotmoe.errors import SlotmoeError
def high_water():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
actions = {
    "checkpoint": lambda path: slotmoe.model.checkpoint.Checkpoint.open(path),
    "export": lambda path: slotmoe.quant.export.reader.Export.open(path),
    "tokenizer": lambda path: slotmoe.model.tokenizer.Tokenizer(path, 0),
}
report, start = {}, high_water()
for kind, path in json.load(sys.stdin):
    open("/proc/self/clear_refs", "w").write("5")
    before = high_water()
    try:
        actions[kind](Path(path))
        report[path] = "was accepted"
    except SlotmoeError:
        report[path] = high_water() - before
print(json.dumps(report))
"""


@pytest.mark.usefixtures("processes")
def test_refusals_take_little_memory(good, tmp_path):
    """The largest files that pass the caps, and those just beyond, in a fresh process; megabytes
    above what it had."""
    vocabulary = ",".join(f'"{i:x}":{i}' for i in range(349_000)).encode()
    many = {f"t{i:x}": f32(0, 0, (0,)) for i in range(99_000)}
    cases = {
        ("checkpoint", "header-at-cap"): single(json.dumps(many).encode().replace(b" ", b"")),
        ("checkpoint", "header-of-spaces"): single(b"{}" + b" " * ((8 << 20) - 2)),
        ("checkpoint", "header-over-cap"): single(
            {f"t{i:x}": f32(0, 0, (0,)) for i in range(260_000)}
        ),
        ("checkpoint", "index-at-cap"): write(
            INDEX, b'{"weight_map": {"a": "' + b"x" * ((8 << 20) - 40) + b'\xf0\x9f\x90\x8d"}}'
        ),
        ("checkpoint", "index-many"): write(
            INDEX, json.dumps({"weight_map": {f"{i:x}": FIRST for i in range(199_000)}}).encode()
        ),
        ("checkpoint", "index-too-many"): write(
            INDEX, b'{"weight_map": {"a": [' + b"[]," * 2_500_000 + b"1]}}"
        ),
        ("checkpoint", "config-lists"): write(
            "config.json", b'{"a": [' + b"{}," * 190_000 + b"1]}"
        ),
        ("checkpoint", "terabyte"): lambda folder: os.truncate(folder / FIRST, 1 << 40),
        ("export", "manifest-lists"): write(
            MANIFEST, b'{"format_version": 1, "a": [' + b"[]," * 199_000 + b"1]}"
        ),
        ("export", "manifest-text"): write(
            MANIFEST, b'{"format_version": 1, "a": "' + b"x" * (8_000_000) + b'"}'
        ),
        ("export", "terabyte"): lambda folder: os.truncate(folder / RESIDENT, 1 << 40),
        ("export", "huge-matrices"): signed("experts", "hidden_size", value=1 << 20),
        ("tokenizer", "lists"): write("tokenizer.json", b'{"model": [' + b"[]," * 349_000 + b"1]}"),
        ("tokenizer", "too-many-lists"): write(
            "tokenizer.json", b'{"model": [' + b"[]," * 5_000_000 + b"1]}"
        ),
        ("tokenizer", "vocabulary"): write(
            "tokenizer.json",
            b'{"model": {"type": "BPE", "merges": 5, "vocab": {' + vocabulary + b"}}}",
        ),
    }
    todo = []
    for (kind, name), breaking in cases.items():
        folder = tmp_path / f"{kind}-{name}"
        shutil.copytree(good / ("export" if kind == "export" else "checkpoint"), folder)
        breaking(folder)
        todo.append((kind, str(folder)))
    child = subprocess.run(
        [sys.executable, "-c", MEMORY_SCRIPT],
        input=json.dumps(todo).encode(),
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    report = {Path(path).name: used for path, used in json.loads(child.stdout).items()}
    assert len(report) == len(cases)
    assert {
        name: used for name, used in report.items() if not isinstance(used, float) or used >= 100
    } == {}

"""Checkpoints and exports made to break things, most exports with a manifest that is signed anew;
damaged, exchanged and foreign files of an export; the memory that refusals take."""

import ctypes
import json
import math
import os
import pickle
import random
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError, ExportError, SlotmoeError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.plan.advice import Model
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST, RESIDENT, checksum, layer_file, tensor_parts
from slotmoe.quant.export.reader import Export
from slotmoe.system import peak_rss
from tests.support import v4
from tests.support.disk import forked
from tests.support.exported import read_everything, resign, signed
from tests.support.hostile import (
    EXPERT,
    FIRST,
    INDEX,
    NORM,
    SECOND,
    changed,
    edit_json,
    edit_tensor,
    edited,
    entry,
    f32,
    fifo,
    flip,
    linked,
    many,
    refused,
    remap,
    single,
    truncate,
    without,
    write,
)
from tests.support.tiny import REMOVE, TOKENIZER_FILES


def pickled(folder):
    without(INDEX, FIRST, SECOND)(folder)
    marker = folder / "was-run"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def swapped(index):
    files = index["weight_map"]
    files[EXPERT] = FIRST if files[EXPERT] == SECOND else SECOND


ONE, SHARD = "model.safetensors", SECOND[:6]
LONG = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999999]}}'
TWICE = b'{"model_type": "deepseek_v2", "model_type": "deepseek_v2"}'
ESCAPES = {"\x1b[2J\n\u202eevil": {**f32(0, 2), "dtype": "U16"}}


def config(text):
    return write("config.json", text)


# How a checkpoint is broken, and what the message must hold.
BAD_CHECKPOINTS = {
    "missing-shard": (without(SECOND), SECOND),
    "shard-cut-in-header": (truncate(FIRST, 100), FIRST),
    "shard-is-pipe": (fifo(FIRST), FIRST),
    "index-names-wrong-shard": (edited(INDEX, swapped), "is in"),
    "index-misses-tensor": (edited(INDEX, lambda it: it["weight_map"].pop(EXPERT)), EXPERT),
    "path-parent": (remap(EXPERT, "../outside.safetensors"), "../outside"),
    "path-absolute": (remap(EXPERT, "/etc/passwd"), "/etc/passwd"),
    "path-null-byte": (remap(EXPERT, "a\0.safetensors"), INDEX),
    "path-pickle": (remap(EXPERT, "pytorch_model.bin"), "pytorch_model.bin"),
    "link-out": (linked(FIRST), FIRST),
    **{f"{name}-link": (linked(name), "link") for name in ("config.json", *TOKENIZER_FILES[:2])},
    "expert-wrong-shape": (changed(EXPERT, lambda w: w.T), EXPERT),
    "expert-is-float64": (changed(EXPERT, lambda w: w.double()), "F64"),
    "shape-negative": (entry(EXPERT, shape=[-48, -64]), SHARD),
    "shape-wraps-to-right-size": (entry(EXPERT, shape=[(1 << 63) + 48 * 64, 2]), SHARD),
    "offsets-overlap": (single({"a": f32(0, 4), "b": f32(2, 6)}, b"123456"), ONE),
    "offsets-with-hole": (single({"a": f32(0, 4), "b": f32(8, 12)}, b"1" * 12), ONE),
    "offsets-beyond-64-bits": (single(LONG), ONE),
    "header-length-huge": (write(FIRST, b"\xff" * 8 + b"{}"), FIRST),
    "header-over-cap": (single(b'{"a":' + b" " * (49 << 20) + b"1}"), "header of"),
    "header-too-many-tensors": (many(260_000), "more than 250000 tensors"),
    "header-deep": (single(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), ONE),
    "names-with-escapes": (single(ESCAPES, b"12"), "\\x1b[2J\\n\\u202eevil"),
    "pickle-only": (pickled, "pickled"),
    "config-twice-a-key": (config(TWICE), "twice"),
    "config-nan": (config(b'{"rms_norm_eps": NaN}'), "NaN"),
    "config-deep-list": (config(b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "config.json"),
    "config-large": (config(b'{"a": "' + b"x" * (1 << 20) + b'"}'), "more than"),
    "config-many-values": (config(b'{"a": [' + b"[]," * 300_000 + b"1]}"), "more than"),
    "config-long-number": (config(b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json"),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(name, checkpoint):
    breaking, wanted = BAD_CHECKPOINTS[name]
    breaking(checkpoint)
    before = sorted(path.name for path in checkpoint.parent.iterdir())
    for action in (
        lambda: quantize(checkpoint, checkpoint.parent / "export"),
        lambda: Runtime.open(checkpoint, quantize=False, context=16),
    ):
        refused(action, wanted, kind=(CheckpointError, ConfigError))
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == before
    assert not (checkpoint / "was-run").exists()


def poke(value):
    def change(weight):
        weight[-1, -1] = value
        return weight

    return change


def test_weights_that_are_no_numbers(heavy, good, tmp_path):
    gate, attention = "model.layers.2.mlp.gate.weight", "model.layers.0.self_attn.kv_b_proj.weight"
    cases = [(EXPERT, value) for value in (math.nan, -math.inf, 1e6)]
    cases += [("lm_head.weight", math.nan), (gate, math.inf), (attention, math.nan)]
    for number, (name, value) in enumerate(cases):
        folder = shutil.copytree(good / "checkpoint", tmp_path / str(number))
        edit_tensor(folder, name, poke(value))
        how = {"resident": "nf4", "codecs": EXPERT_CODECS["nf4", "4"]}
        make = partial(quantize, folder, folder / "export", **how)
        refused(make, name, "model-0000", kind=CheckpointError)
        assert not (folder / "export").exists()
        if value != 1e6:  # beyond fp16's range, which only NF4's scales mind
            refused(partial(Runtime.open, folder, quantize=False, context=16), name)


def test_hub_cache_links_are_accepted(checkpoint, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, path in enumerate(sorted(checkpoint.iterdir())):
        shutil.move(path, blobs / f"hash{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash{number}")
    quantize(snapshot, tmp_path / "export")
    Export.open(tmp_path / "export").close()
    (snapshot / FIRST).unlink()
    (snapshot / FIRST).symlink_to("../../../elsewhere.safetensors")
    shutil.copyfile(blobs / "hash2", tmp_path / "elsewhere.safetensors")
    refused(lambda: open_checkpoint(snapshot), FIRST, "link", kind=CheckpointError)


@pytest.mark.usefixtures("processes")
def test_code_of_the_checkpoint_is_never_imported(checkpoint, tmp_path, monkeypatch):
    stolen = "configuration_deepseek modeling_deepseek tokenization json jinja2 datetime resource"
    for name in stolen.split():
        (checkpoint / f"{name}.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    model = {"AutoConfig": "configuration_deepseek.C"}
    model["AutoModelForCausalLM"] = "modeling_deepseek.M"
    tokenizer = {"AutoTokenizer": ["tokenization.T", None]}
    edit_json(checkpoint / "config.json", lambda it: it.update(auto_map=model))
    edit_json(checkpoint / "tokenizer_config.json", lambda it: it.update(auto_map=tokenizer))
    monkeypatch.chdir(checkpoint)  # the template's child process must not import from here either
    with Runtime.open(checkpoint, context=64) as runtime:
        assert list(runtime.generate("Hello", 2, chat=True))
    assert not (tmp_path / "was-run").exists()


TABLE = "model.layers.0.mlp.gate.tid2eid"
POSITIONS = "model.layers.2.self_attn.compressor.position_bias"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def with_expert(id_):
    place = torch.tensor(17), torch.tensor(1)
    return lambda tensor: tensor.index_put(place, torch.tensor(id_))


# What becomes of a tensor of a DeepSeek-V4, and what the message holds.
OF_V4 = [
    (TABLE, lambda _: None, f"tensor {TABLE} is missing"),
    (POSITIONS, lambda _: None, f"tensor {POSITIONS} is missing"),
    *((TABLE, with_expert(id_), "an expert outside 0 to 7") for id_ in (-1, 8, 1 << 40)),
    (TABLE, lambda ids: ids.to(torch.int16), "I64 or I32"),
    (BIAS, lambda bias: bias[:7], "has shape [7]"),
    (BIAS, lambda bias: bias.index_fill(0, torch.tensor(3), torch.nan), "NaN"),
]


def test_tensors_of_a_v4_are_refused_by_name(heavy, tmp_path):
    """In DeepSeek's own spelling, and by the names of transformers' network."""
    v4.write_case(tmp_path / "source", "v4", hub=True)
    file, export = tmp_path / "source" / "model.safetensors", tmp_path / "export"
    good = load_file(file)
    for name, change, words in OF_V4:
        spelled = v4.hub_name(name)
        others = {**good, spelled: change(good[spelled])}
        file.unlink()
        save_file({key: value for key, value in others.items() if value is not None}, file)
        made = partial(quantize, tmp_path / "source", export, overwrite=True)
        refused(made, name, words, kind=CheckpointError)
        assert not export.exists()
    spelled = v4.hub_name(TABLE)
    save_file({**good, spelled: good[spelled].clamp(max=6)}, file)  # no token has the last expert
    made()
    Runtime.open(export, context=64).close()


# Exports

LAYER, Q = layer_file(1), "model.layers.0.self_attn.q_a_proj.weight"
ENTRY, LISTS = {"bytes": 1, "checksum": ""}, b'{"format_version": 2, "a": [%s]}'


def swapped_layers(folder):
    first, second = folder / layer_file(1), folder / layer_file(2)
    first.rename(folder / "x")
    second.rename(first)
    (folder / "x").rename(second)


def half_written(folder):
    """What a killed quantize leaves under the name DST.partial."""
    (folder / MANIFEST).unlink()
    (folder / layer_file(2)).rename(folder / (layer_file(2) + ".tmp"))


def codec_of(manifest):
    return manifest["quantization"]["codecs"]["nf4"]


def codec(**values):
    return lambda folder: resign(folder, lambda manifest: codec_of(manifest).update(values))


def infinite_level(folder):
    """1e999 is valid JSON and reads as infinity; NaN can't be signed because it can't be read."""
    resign(folder, lambda manifest: codec_of(manifest)["levels"].__setitem__(0, float("inf")))
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("Infinity", "1e999"))


coding, of_file = partial(signed, "quantization"), partial(signed, "files")
# How an export is broken, and what the message must hold.
BAD_EXPORTS = {
    "older-version": (signed("format_version", value=1), "format_version 1, expected 2; quantize"),
    "newer-version": (signed("format_version", value=3), "format_version 3, expected 2; quantize"),
    "version-missing": (signed("format_version", value=REMOVE), "None, expected 2; quantize"),
    "foreign-predictor": (
        write(f"predictor-{'0' * 16}.safetensors", b"left"),
        "not in the manifest",
    ),
    "unsigned-level": (edited(MANIFEST, lambda it: codec_of(it)["levels"].reverse()), "checksum"),
    "sixteen-levels-are-eight": (codec(levels=[*range(8)]), "8 levels for 4 bits"),
    # what JSON tells apart and float32 does not
    "levels-equal-as-floats": (codec(levels=[*range(15), 14 + 1e-9]), "ascending"),
    "levels-not-whole": (
        codec(bits=5, scales="i8", block=32, levels=[*range(-16, 15), 16]),
        "whole numbers of 5",
    ),
    "resident-unknown": (coding("resident", value="int8 lm_head@0-0=lut9"), "resident"),
    "codec-scales": (codec(scales="f8"), "scales"),
    "codec-missing": (coding("codecs", value={}), "'nf4' is not in codecs"),
    "levels-infinite": (infinite_level, "levels"),
    "layout-unknown": (coding("layout", value="tiles32"), "layout"),
    "record-of-other-size": (signed("experts", "record_bytes", value=4096), "record"),
    "hidden-size-huge": (signed("experts", "hidden_size", value=1 << 20), "record"),
    "linked-layers-swapped": (signed("experts", "linked_layers", value={"1": 2}), "header"),
    "file-parent": (of_file("../x", value=ENTRY), "files"),
    "file-windows-drive": (of_file("C:x", value=ENTRY), "files"),
    "header-size-wrong": (of_file(LAYER, "header_bytes", value=4096), "hold"),
    "records-too-few": (of_file(LAYER, "records", value=["0" * 32] * 7), "records"),
    "records-wrong": (of_file(LAYER, "records", value=["0" * 32] * 8), "layer-00001"),
    "tensor-missing": (of_file(RESIDENT, "tensors", NORM, value=REMOVE), MANIFEST),
    "tensor-dtype-of-same-size": (
        of_file(RESIDENT, "tensors", NORM, "dtype", value="F16"),
        "header",
    ),
    "coded-shape-of-other-tiles": (coding("resident_codecs", Q, "shape", value=[4096, 4096]), Q),
    "manifest-missing": (without(MANIFEST), MANIFEST),
    "manifest-list": (write(MANIFEST, b"[]"), MANIFEST),
    "manifest-over-cap": (write(MANIFEST, b'{"a": "' + b"x" * (9 << 20) + b'"}'), "more than"),
    "manifest-many-values": (write(MANIFEST, LISTS % (b"[]," * 2_000_000 + b"1")), "more than"),
    "manifest-link-out": (linked(MANIFEST), "link"),
    "layer-a-byte-short": (truncate(layer_file(2), -1), "layer-00002"),
    "layers-swapped": (swapped_layers, "layer-00001"),
    "layer-is-pipe": (fifo(LAYER), "layer-00001"),
    "report-error": (coding("report", "families", 0, "worst_layer", value=77), "worst_layer"),
    "config-changed": (edited("config.json", lambda it: it.update(rope_theta=1.0)), "config.json"),
    "half-written": (half_written, MANIFEST),
}


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_export(name, export):
    breaking, wanted = BAD_EXPORTS[name]
    breaking(export)
    refused(lambda: read_everything(export), wanted, kind=ExportError)

    def run():  # it reads config.json first, and experts when they are used first
        with Runtime.open(export, context=64) as runtime:
            runtime.logits(list(range(60)))

    refused(run, *(["layer 1 expert"] if name == "records-wrong" else []))


@pytest.mark.parametrize("version", [1, 3])
def test_a_plan_refuses_another_version_as_a_reader_does(version, export):
    signed("format_version", value=version)(export)
    wanted = f"{MANIFEST}: has format_version {version}, expected 2; quantize"
    refused(lambda: Model.read(str(export)), wanted, kind=ExportError)


@pytest.mark.parametrize(("key", "value"), [("num_hidden_layers", 2), ("vocab_size", 4095)])
def test_export_of_another_geometry(key, value, export):
    """A config.json that is signed but describes another model."""
    edit_json(export / "config.json", lambda it: it.update({key: value}))
    data = (export / "config.json").read_bytes()
    entry = {"bytes": len(data), "checksum": checksum(data)}
    of_file("config.json", value=entry)(export)
    refused(lambda: Runtime.open(export, context=16), kind=(ConfigError, ExportError))


def interesting_places(name, size, export):
    """First and last bytes, the header's end, both ends of every tensor and of a record's parts;
    random ones too."""
    places = {0, 1, 7, 8, 9, size // 2, size - 2, size - 1}
    if name == LAYER:
        start = export.manifest["files"][name]["header_bytes"]
        for part in export.layout.parts.values():
            places |= {start - 1, start + part.offset, start + part.offset + part.nbytes - 1}
    if name == RESIDENT:
        parts = tensor_parts(export.manifest["files"][name]).values()
        start = size - sum(part.nbytes for part in parts)
        places |= {start - 1, *(start + part.offset for part in parts)}
    generator = random.Random(name)
    return sorted(places | {generator.randrange(size) for _ in range(9)})


FILES = [MANIFEST, RESIDENT, layer_file(1), layer_file(2), "config.json", *TOKENIZER_FILES]


@pytest.mark.parametrize("name", [name for name in FILES if name != layer_file(2)])
def test_a_flipped_byte_anywhere_is_refused(name, heavy, export):
    path, wanted = export / name, read_everything(export)
    assert {str(at.relative_to(export)) for at in export.rglob("*") if at.is_file()} == {*FILES}
    with Export.open(export) as opened:
        places, manifest = interesting_places(name, path.stat().st_size, opened), opened.manifest
    generator = random.Random(1)
    for place in places:
        bit = 1 << generator.randrange(8)
        flip(path, place, bit)
        try:
            found = read_everything(export)
        except ExportError as problem:
            assert str(export) in str(problem)  # noqa: PT017
        else:  # white space of JSON, for example
            assert name == MANIFEST, f"a flip at {place} of {name} went unnoticed"
            assert found == wanted
            assert json.loads(path.read_text()) == manifest
        flip(path, place, bit)
    assert read_everything(export) == wanted


def test_what_the_manifest_does_not_list_is_refused(export, slotmoe):
    """A template put beside the weights would otherwise speak for the model."""
    (export / "slotmoe.json.tmp").write_bytes(b"what a kill leaves is no such file")
    read_everything(export)
    name = "chat_template.jinja"
    (export / name).write_bytes(b"{}")
    refused(lambda: Export.open(export), name, "not in the manifest", kind=ExportError)
    refused(lambda: Runtime.open(export, ram="1GiB"), name, "move it away", kind=ExportError)
    code, out, _ = slotmoe("verify", export)
    assert code == 1 and name in out


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


OPENS = {
    "checkpoint": open_checkpoint,
    "export": Export.open,
    "tokenizer": lambda path: Tokenizer(path, 0),
}
TERABYTE = 1 << 40


def lists(name, before, count):
    return write(name, b"{%s[" % before + b"[]," * count + b"1]}")


# The largest files that pass the caps, and those just beyond.
LARGE = {
    "checkpoint-header": many(90_000),
    "checkpoint-index-too-many": lists(INDEX, b'"weight_map":', 2_500_000),
    "checkpoint-terabyte": truncate(FIRST, TERABYTE),
    "export-terabyte": truncate(RESIDENT, TERABYTE),
    "export-huge-matrices": signed("experts", "hidden_size", value=1 << 20),
    "tokenizer-too-many-lists": lists("tokenizer.json", b'"model":', 5_000_000),
}


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize("name", LARGE)
def test_refusals_take_little_memory(name, good, tmp_path):
    """100 megabytes above what the process has."""
    kind = name.partition("-")[0]
    source = good / ("export" if kind == "export" else "checkpoint")
    folder = shutil.copytree(source, tmp_path / kind)

    def opened():
        LARGE[name](folder)
        Export.open(good / "export").close()  # reads the libraries' code into this process
        ctypes.CDLL(None).malloc_trim(0)  # else what was free before would be taken first
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_rss()
        with pytest.raises(SlotmoeError):
            OPENS[kind](folder)
        assert peak_rss() - before < 100 << 20

    assert forked(opened) == 0

"""Checkpoints made to break things."""

import os
import pickle
import shutil
import struct

import numpy as np
import pytest
import torch

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.shards import read_header
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.export.reader import Export
from tests.support.hostile import (
    EXPERT,
    FIRST,
    INDEX,
    NORM,
    SECOND,
    append,
    edit_entry,
    edit_json,
    edit_tensor,
    f32,
    fifo,
    linked_out,
    refused,
    remap,
    single,
    truncate,
    write,
)


def pickled(folder):
    for name in (INDEX, FIRST, SECOND):
        (folder / name).unlink()
    marker = folder / "was-run"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


BAD_CHECKPOINTS = {
    "missing-shard": (lambda folder: (folder / SECOND).unlink(), SECOND),
    "missing-config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "shard-a-byte-short": (truncate(FIRST, -1), FIRST),
    "shard-cut-in-header": (truncate(FIRST, 100), FIRST),
    "shard-of-seven-bytes": (truncate(FIRST, 7), FIRST),
    "shard-empty": (truncate(FIRST, 0), FIRST),
    "shard-a-byte-long": (append(FIRST), FIRST),
    "shard-is-folder": (
        lambda folder: ((folder / FIRST).unlink(), (folder / FIRST).mkdir()),
        FIRST,
    ),
    "shard-is-pipe": (fifo(FIRST), FIRST),
    "shard-is-html": (write(FIRST, b"<!DOCTYPE html><html>Entry not found</html>"), FIRST),
    "shard-is-lfs-pointer": (
        write(FIRST, b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"),
        FIRST,
    ),
    "index-is-pipe": (fifo(INDEX), INDEX),
    "index-names-absent-tensor": (
        remap("model.layers.9.mlp.gate.weight", FIRST),
        "model.layers.9.mlp.gate.weight",
    ),
    "index-names-wrong-shard": (
        lambda folder: edit_json(folder / INDEX, lambda index: swap(index["weight_map"])),
        "is in",
    ),
    "index-misses-tensor": (
        lambda folder: edit_json(folder / INDEX, lambda index: index["weight_map"].pop(EXPERT)),
        EXPERT,
    ),
    "index-without-map": (write(INDEX, b'{"metadata": {}}'), "weight_map"),
    "index-map-is-list": (write(INDEX, b'{"weight_map": ["a"]}'), "weight_map"),
    "index-map-empty": (write(INDEX, b'{"weight_map": {}}'), "weight_map"),
    "index-file-is-number": (remap(EXPERT, 5), INDEX),
    "index-file-is-null": (remap(EXPERT, None), INDEX),
    "index-file-is-list": (remap(EXPERT, [FIRST]), INDEX),
    "path-parent": (remap(EXPERT, "../outside.safetensors"), "../outside"),
    "path-inner-parent": (remap(EXPERT, "a/../../outside.safetensors"), INDEX),
    "path-absolute": (remap(EXPERT, "/etc/passwd"), "/etc/passwd"),
    "path-drive": (remap(EXPERT, "C:\\models\\a.safetensors"), "C:"),
    "path-unc": (remap(EXPERT, "\\\\host\\share\\a.safetensors"), "host"),
    "path-null-byte": (remap(EXPERT, "a\0.safetensors"), INDEX),
    "path-newline": (remap(EXPERT, FIRST + "\n"), INDEX),
    "path-dot-file": (remap(EXPERT, ".hidden.safetensors"), INDEX),
    "path-pickle": (remap(EXPERT, "pytorch_model.bin"), "pytorch_model.bin"),
    "path-too-long": (remap(EXPERT, "a" * 300 + ".safetensors"), INDEX),
    "link-out": (linked_out, FIRST),
    "tensor-dropped": (lambda folder: edit_tensor(folder, EXPERT, lambda _: None), EXPERT),
    "expert-wrong-shape": (lambda folder: edit_tensor(folder, EXPERT, lambda w: w.T), EXPERT),
    "norm-wrong-shape": (lambda folder: edit_tensor(folder, NORM, lambda w: w[None]), NORM),
    "norm-is-scalar": (lambda folder: edit_tensor(folder, NORM, lambda w: w[0]), NORM),
    "expert-is-float64": (lambda folder: edit_tensor(folder, EXPERT, lambda w: w.double()), "F64"),
    "expert-is-int32": (lambda folder: edit_tensor(folder, EXPERT, lambda w: w.int()), "I32"),
    "expert-is-fp8": (
        lambda folder: edit_tensor(folder, EXPERT, lambda w: w.to(torch.float8_e4m3fn)),
        "F8_E4M3",
    ),
    "shape-negative": (
        edit_entry(EXPERT, lambda entry: entry.update(shape=[-48, -64])),
        SECOND[:6],
    ),
    "shape-overflows": (
        edit_entry(EXPERT, lambda entry: entry.update(shape=[1 << 62, 1 << 62])),
        SECOND[:6],
    ),
    "shape-wraps-to-right-size": (
        edit_entry(EXPERT, lambda entry: entry.update(shape=[(1 << 63) + 48 * 64, 2])),
        SECOND[:6],
    ),
    "shape-is-text": (edit_entry(EXPERT, lambda entry: entry.update(shape="48x64")), SECOND[:6]),
    "dtype-unknown": (edit_entry(EXPERT, lambda entry: entry.update(dtype="X99")), SECOND[:6]),
    "offsets-overlap": (single({"a": f32(0, 4), "b": f32(2, 6)}, b"123456"), "model.safetensors"),
    "offsets-with-hole": (
        single({"a": f32(0, 4), "b": f32(8, 12)}, b"1" * 12),
        "model.safetensors",
    ),
    "offsets-same": (single({"a": f32(0, 4), "b": f32(0, 4)}, b"1234"), "model.safetensors"),
    "offsets-backwards": (single({"a": f32(4, 0)}, b"1234"), "model.safetensors"),
    "offsets-huge": (single({"a": f32(0, 1 << 60)}, b"1234"), "model.safetensors"),
    "offsets-beyond-64-bits": (
        single(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999999]}}'),
        "model.safetensors",
    ),
    "header-length-huge": (write(FIRST, b"\xff" * 8 + b"{}"), FIRST),
    "header-length-63-bits": (write(FIRST, struct.pack("<Q", (1 << 63) - 1) + b"{}"), FIRST),
    "header-over-cap": (single(b'{"a":' + b" " * (49 << 20) + b"1}"), "header of"),
    "header-too-many-tensors": (
        single({f"t{i:x}": f32(0, 0, (0,)) for i in range(260_000)}),
        "more than 250000 tensors",
    ),
    "header-not-json": (single(b"{'a': 1}"), "model.safetensors"),
    "header-not-utf8": (single(b'{"\xff\xfe": 1}'), "model.safetensors"),
    "header-is-list": (single(b"[1, 2]"), "model.safetensors"),
    "header-deep": (single(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), "model.safetensors"),
    "header-empty": (single(b"{}"), "is missing"),
    "names-with-escapes": (
        single({"\x1b[2J\n\u202eevil": {**f32(0, 2), "dtype": "U16"}}, b"12"),
        "\\x1b[2J\\n\\u202eevil",
    ),
    "index-names-with-escapes": (remap("\x1b[2J\nslotmoe: all is well", FIRST), "\\x1b[2J\\n"),
    "pickle-only": (pickled, "pickled"),
    "no-weights": (
        lambda folder: [(folder / name).unlink() for name in (INDEX, FIRST, SECOND)],
        INDEX,
    ),
    "config-twice-a-key": (
        write("config.json", b'{"model_type": "deepseek_v2", "model_type": "deepseek_v2"}'),
        "twice",
    ),
    "config-nan": (write("config.json", b'{"rms_norm_eps": NaN}'), "NaN"),
    "config-infinity": (write("config.json", b'{"rms_norm_eps": -Infinity}'), "Infinity"),
    "config-deep-list": (
        write("config.json", b'{"model_type":' + b"[" * 90_000 + b"]" * 90_000 + b"}"),
        "config.json",
    ),
    "config-deep-list-within-parser": (
        write("config.json", b'{"hidden_size":' + b"[" * 700 + b"]" * 700 + b"}"),
        "nested deeper",
    ),
    "config-deep-object": (
        write("config.json", b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
        "config.json",
    ),
    "config-large": (write("config.json", b'{"a": "' + b"x" * (1 << 20) + b'"}'), "more than"),
    "config-many-values": (
        write("config.json", b'{"a": [' + b"[]," * 300_000 + b"1]}"),
        "more than",
    ),
    "config-long-number": (
        write("config.json", b'{"vocab_size": ' + b"9" * 5000 + b"}"),
        "config.json",
    ),
    "config-not-utf8": (write("config.json", b'{"a": "\xff"}'), "config.json"),
    "config-with-bom": (write("config.json", b"\xef\xbb\xbf{}"), "config.json"),
    "config-list": (write("config.json", b"[]"), "config.json"),
    "config-empty": (write("config.json", b""), "config.json"),
    "config-is-pipe": (fifo("config.json"), "config.json"),
    "index-twice-a-key": (
        write(INDEX, b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "twice",
    ),
    "index-many-values": (
        write(INDEX, b'{"weight_map": {' + b'"":1,' * 300_000 + b'"a":1}}'),
        "more than",
    ),
    "index-over-cap": (write(INDEX, b'{"weight_map": "' + b"x" * (33 << 20) + b'"}'), "more than"),
}


def swap(weight_map):
    weight_map[EXPERT] = FIRST if weight_map[EXPERT] == SECOND else SECOND


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
    assert sorted(path.name for path in checkpoint.parent.iterdir()) == before, (
        "something was written"
    )
    assert not (checkpoint / "was-run").exists()


def poke(value):
    def change(weight):
        weight[-1, -1] = value
        return weight

    return change


@pytest.mark.parametrize("resident", ["bf16", "int8", "nf4"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        (EXPERT, float("nan")),
        (EXPERT, float("inf")),
        (EXPERT, -float("inf")),
        (EXPERT, 1e6),
        ("lm_head.weight", float("nan")),
        ("model.layers.2.mlp.gate.weight", float("inf")),
        ("model.layers.0.self_attn.kv_b_proj.weight", float("nan")),
    ],
)
def test_weights_that_are_no_numbers(name, value, resident, checkpoint):
    edit_tensor(checkpoint, name, poke(value))
    refused(
        lambda: quantize(checkpoint, checkpoint.parent / "export", resident=resident),
        name,
        "model-0000",
        kind=CheckpointError,
    )
    assert not (checkpoint.parent / "export").exists()
    if value != 1e6:  # beyond fp16's range, which only the export minds
        refused(
            lambda: Runtime.open(checkpoint, quantize=False, context=16), name, kind=CheckpointError
        )


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
    refused(lambda: Checkpoint.open(snapshot), FIRST, "link", kind=CheckpointError)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_small_files_are_not_copied_from_elsewhere(name, checkpoint, tmp_path):
    shutil.move(checkpoint / name, tmp_path / "secret")
    (checkpoint / name).symlink_to(tmp_path / "secret")
    refused(lambda: quantize(checkpoint, tmp_path / "export"), name, "link")


def test_small_file_that_is_huge(checkpoint, tmp_path):
    os.truncate(checkpoint / "tokenizer.json", 1 << 40)  # sparse
    refused(lambda: quantize(checkpoint, tmp_path / "export"), "tokenizer.json")


def test_headers_are_read_without_torch(checkpoint, monkeypatch):
    """Its opening of a file on a bad disk raises a bare ``RuntimeError``, a traceback to a user."""

    def failing(*args, **kwargs):
        raise RuntimeError("unable to open file: Input/output error (5)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", failing)
    assert len(read_header(checkpoint / FIRST)[0]) > 1


@pytest.mark.usefixtures("processes")
def test_code_of_the_checkpoint_is_never_imported(checkpoint, tmp_path, monkeypatch):
    code = f"open({str(tmp_path / 'was-run')!r}, 'w')\n"
    stolen = (
        "configuration_deepseek.py",
        "modeling_deepseek.py",
        "tokenization.py",
        "json.py",
        "jinja2.py",
        "datetime.py",
        "resource.py",
    )
    for name in stolen:
        (checkpoint / name).write_text(code)
    auto_map = {
        "AutoConfig": "configuration_deepseek.C",
        "AutoModelForCausalLM": "modeling_deepseek.M",
    }
    edit_json(checkpoint / "config.json", lambda config: config.update(auto_map=auto_map))
    edit_json(
        checkpoint / "tokenizer_config.json",
        lambda config: config.update(auto_map={"AutoTokenizer": ["tokenization.T", None]}),
    )
    monkeypatch.chdir(checkpoint)  # the template's child process must not import from here either
    with Runtime.open(checkpoint, context=64) as runtime:
        assert list(runtime.generate("Hello", 2, chat=True))
    assert not (tmp_path / "was-run").exists()


def test_table_is_large_enough():
    assert len(BAD_CHECKPOINTS) >= 80
    assert np.unique([*BAD_CHECKPOINTS]).size == len(BAD_CHECKPOINTS)

"""Checkpoints made to break things."""

import math
import os
import pickle
import shutil
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import EXPERT_CODECS
from slotmoe.quant.export.reader import Export
from tests.support import v4
from tests.support.hostile import (
    EXPERT,
    FIRST,
    INDEX,
    SECOND,
    changed,
    edit_json,
    edit_tensor,
    edited,
    entry,
    f32,
    fifo,
    linked,
    many,
    refused,
    remap,
    single,
    truncate,
    without,
    write,
)


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


def test_weights_that_are_no_numbers(good, tmp_path):
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


def test_small_files_are_not_copied_from_elsewhere(good, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        source = shutil.copytree(good / "checkpoint", tmp_path / name / "source")
        linked(name)(source)
        refused(lambda source=source: quantize(source, tmp_path / "export"), name, "link")


@pytest.mark.usefixtures("processes")
def test_code_of_the_checkpoint_is_never_imported(checkpoint, tmp_path, monkeypatch):
    stolen = "configuration_deepseek modeling_deepseek tokenization json jinja2 datetime resource"
    for name in stolen.split():
        (checkpoint / f"{name}.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')\n")
    model = {
        "AutoConfig": "configuration_deepseek.C",
        "AutoModelForCausalLM": "modeling_deepseek.M",
    }
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


def test_tensors_of_a_v4_are_refused_by_name(tmp_path):
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

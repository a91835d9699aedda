"""Checkpoints and exports made to break things: each is refused in one line that names the culprit,
fast and lean."""

import json
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import slotmoe.model.tokenizer as tokenizer_module
from slotmoe.errors import CheckpointError, ConfigError, ExportError, SlotmoeError
from slotmoe.model.checkpoint import Checkpoint
from slotmoe.model.child import Child
from slotmoe.model.config import parse_config, read_config
from slotmoe.model.names import resident_shapes
from slotmoe.model.tokenizer import MAX_TOKENIZER_BYTES, Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.coded import CodedWeight
from slotmoe.quant.export.layout import (
    COPIED,
    MANIFEST,
    RESIDENT,
    checksum,
    layer_file,
    tensor_parts,
)
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.validate import manifest_checksum
from slotmoe.quant.int8 import Int8Weight
from slotmoe.tools.cli import main
from tests.support.encoded import packed
from tests.support.tiny import REMOVE, write_checkpoint

ROOT = Path(__file__).parent.parent
INDEX, FIRST, SECOND = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
EXPERT, NORM = "model.layers.1.mlp.experts.3.up_proj.weight", "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A valid checkpoint in two shards and its export; tests work on copies."""
    folder = tmp_path_factory.mktemp("good")
    write_checkpoint(folder / "checkpoint", shards=2)
    quantize(folder / "checkpoint", folder / "export", resident="nf4")
    return folder


@pytest.fixture
def checkpoint(good, tmp_path):
    shutil.copytree(good / "checkpoint", tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.fixture
def export(good, tmp_path):
    shutil.copytree(good / "export", tmp_path / "export")
    return tmp_path / "export"


def refused(action, *wanted, kind=SlotmoeError):
    """``action()`` must end in a one-line error of ours that holds every string of ``wanted``,
    within a second of CPU."""
    start = sum(os.times()[:4])
    with pytest.raises(kind) as caught:
        action()
    seconds = sum(os.times()[:4]) - start
    message = str(caught.value)
    assert message.isprintable(), "more than one line, or control characters"
    assert len(message) < 1000
    for part in wanted:
        assert part in message
    assert seconds < 1, f"took {seconds:.1f} s of CPU"


def edit_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_tensor(folder, name, change):
    """Replace one tensor of the shard that holds it by ``change(tensor)``; None drops it."""
    for file in (FIRST, SECOND):
        tensors = load_file(folder / file)
        if name in tensors:
            tensors[name] = change(tensors[name])
            save_file(
                {key: value.contiguous() for key, value in tensors.items() if value is not None},
                folder / file,
            )
            return
    raise AssertionError(name)


def edit_header(path, change):
    """Rewrite a safetensors file's header by ``change(text) -> text``, keeping its data."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    text = change(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def edit_entry(name, change):
    """A header edit of one tensor's entry."""

    def apply(folder):
        def edit(text):
            header = json.loads(text)
            change(header[name])
            return json.dumps(header)

        file = json.loads((folder / INDEX).read_text())["weight_map"][name]
        edit_header(folder / file, edit)

    return apply


def remap(name, file):
    return lambda folder: edit_json(
        folder / INDEX, lambda index: index["weight_map"].__setitem__(name, file)
    )


def linked_out(folder):
    shutil.move(folder / FIRST, folder.parent / FIRST)
    (folder / FIRST).symlink_to(folder.parent / FIRST)


def single(header, data=b""):
    """Replace the weights by one file with this header (object or bytes)."""

    def apply(folder):
        for name in (INDEX, FIRST, SECOND):
            (folder / name).unlink()
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    return apply


def write(name, data):
    def apply(folder):
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_bytes(data)

    return apply


def pickled(folder):
    for name in (INDEX, FIRST, SECOND):
        (folder / name).unlink()
    marker = folder / "was-run"

    class Evil:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil()))


def fifo(name):
    def apply(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return apply


def append(name):
    def apply(folder):
        with (folder / name).open("ab") as file:
            file.write(b"x")

    return apply


def truncate(name, keep):
    return lambda folder: os.truncate(
        folder / name, keep if keep >= 0 else (folder / name).stat().st_size + keep
    )


def f32(start, stop, shape=(1,)):
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}


# name -> how it is broken, and what the message must hold
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


BAD_GROUP_VALUES = {
    "num_bits": 8,
    "group_size": 128,
    "symmetric": False,
    "strategy": "channel",
    "type": "float",
    "actorder": "group",
}


BAD_CONFIG_VALUES = {
    "model_type": [
        "deepseek_v4",
        "glm4_moe",
        "kimi_linear",
        "longcat_flash",
        "llama",
        None,
        2,
        ["deepseek_v2"],
        REMOVE,
    ],
    "architectures": [
        ["LlamaForCausalLM"],
        "DeepseekV2ForCausalLM",
        ["DeepseekV2ForCausalLM", "X"],
    ],
    "scoring_func": ["sigmoid", None, 1],
    "topk_method": ["noaux_tc", "gready", None, []],
    "quantization_config": [
        "fp8",
        [1],
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8", "weight_block_size": [64, 64]},
        {"quant_method": "fp8", "fmt": "e5m2"},
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {"quant_method": "mxfp4"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        *(packed(**{key: value}) for key, value in BAD_GROUP_VALUES.items()),
    ],
    "hidden_act": ["gelu", None],
    "attention_bias": [True, "yes"],
    "mlp_bias": [True],
    "ep_size": [8, "1"],
    "rope_interleave": [False],
    "num_key_value_heads": [1, 2],
    "hidden_size": [True, 64.0, "64", None, 0, -64, 1 << 40, 10**300, [64], REMOVE],
    "vocab_size": [0, 1 << 30, REMOVE],
    "intermediate_size": [0, REMOVE],
    "moe_intermediate_size": [0, REMOVE],
    "num_hidden_layers": [0, 1 << 30, 1001, REMOVE],
    "num_attention_heads": [0, -4, REMOVE],
    "n_routed_experts": [0, 4097, 9, None, REMOVE],
    "n_shared_experts": [-1, "two", True, REMOVE],
    "num_experts_per_tok": [0, 5, 9, REMOVE],
    "n_group": [0, 3, REMOVE],
    "topk_group": [0, 5, REMOVE],
    "norm_topk_prob": [1, "true"],
    "routed_scaling_factor": [0, -1.0, "16", None, 1e40, REMOVE],
    "first_k_dense_replace": [-1, 3, True, REMOVE],
    "moe_layer_freq": [0, -1, 1.5],
    "q_lora_rank": [0, -1, "null", REMOVE],
    "kv_lora_rank": [0, REMOVE],
    "qk_nope_head_dim": [0, REMOVE],
    "qk_rope_head_dim": [7, 0, REMOVE],
    "v_head_dim": [0, REMOVE],
    "rms_norm_eps": [0, -1e-6, True, REMOVE],
    "rope_theta": [0, -1, "10000", True],
    "max_position_embeddings": [0, 1 << 40, REMOVE],
    "tie_word_embeddings": [1, "no"],
    "bos_token_id": [-1, True, "0", 1.0, {}],
    "eos_token_id": [[-1], [True], "1", list(range(100)), 1 << 40],
    "rope_scaling": ["yarn", [], 4, False],
    "rope_parameters": ["yarn", [], 0],
}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
BAD_ROPE_SETTINGS = [
    {**YARN, "type": "linear"},
    {**YARN, "type": "dynamic"},
    {**YARN, "type": "llama3"},
    {**YARN, "type": ["yarn"]},
    {**YARN, "rope_type": "longrope"},
    {**YARN, "factor": 0},
    {**YARN, "factor": "4"},
    {**YARN, "original_max_position_embeddings": 0},
    {**YARN, "original_max_position_embeddings": True},
    {**YARN, "mscale": -1},
    {**YARN, "beta_fast": None},
    {**YARN, "attention_factor": 2.0},
    {"type": "yarn"},
    {"factor": 4.0, "rope_theta": 0},
]


@pytest.mark.parametrize("key", BAD_CONFIG_VALUES)
def test_unsupported_config_value_is_named(key, good, tmp_path):
    config = json.loads((good / "checkpoint" / "config.json").read_text())
    if key == "num_attention_heads":
        del config["num_key_value_heads"]
    for value in BAD_CONFIG_VALUES[key]:
        changed = {
            name: item for name, item in {**config, key: value}.items() if item is not REMOVE
        }
        (tmp_path / "config.json").write_text(json.dumps(changed))
        refused(lambda: read_config(tmp_path / "config.json"), "config.json", key, kind=ConfigError)


@pytest.mark.parametrize("settings", BAD_ROPE_SETTINGS, ids=repr)
def test_unsupported_rope_settings_are_named(settings, good):
    config = json.loads((good / "checkpoint" / "config.json").read_text())
    for key in ("rope_scaling", "rope_parameters"):
        refused(
            lambda key=key: parse_config({**config, "rope_scaling": None, key: settings}),
            "config.json",
            "rope",
            kind=ConfigError,
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


TEMPLATES = {
    "endless-loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "endless-output": "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}",
    "memory-by-repetition": "{{ 'a' * 10 ** 9 }}",
    "memory-by-doubling": "{% set n = namespace(a='x') %}{% for i in range(40) %}"
    "{% set n.a = n.a + n.a %}{% endfor %}{{ n.a }}",
    "memory-by-format": "{{ '%099999999999d' % 1 }}",
    "memory-by-lists": "{{ (range(99999) | list * 99999) | length }}",
    "time-by-power": "{{ 9 ** (9 ** 9) }}",
    "class-of-a-string": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "class-by-format": "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "globals-of-a-function": "{{ raise_exception.__globals__['sys'].modules }}",
    "globals-by-attr": "{{ (raise_exception | attr('__globals__')).sys.modules }}",
    "globals-by-self": "{{ self._TemplateReference__context.environment.globals.clear() }}",
    "range-too-long": "{{ range(10 ** 9) | list }}",
    "change-of-arguments": "{{ messages.append(messages) }}",
    "file": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% if %}",
    "raises": "{{ raise_exception('first\nsecond \x1b[2J') }}",
    "deep": "{{" + "(" * 3000 + "1" + ")" * 3000 + "}}",
    "surrogate": "\ud800",
    "undefined": "{{ nothing.at.all }}",
    "not-text": 5,
    "absent": None,
}


WHICH_LIMIT = {
    "endless-loop": "did not finish",
    "time": "did not finish",
    "endless-output": "characters",
    "memory": "MemoryError",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_hostile_template(name, checkpoint):
    edit_json(
        checkpoint / "tokenizer_config.json",
        lambda config: config.update(chat_template=TEMPLATES[name]),
    )
    tokenizer = Tokenizer(checkpoint, 0)
    limits = [limit for prefix, limit in WHICH_LIMIT.items() if name.startswith(prefix)]
    refused(
        lambda: tokenizer.chat([{"role": "user", "content": "hi"}]),
        "chat_template",
        *limits,
        kind=ConfigError,
    )


def test_a_template_that_breaks_out_finds_no_keys(checkpoint, monkeypatch, tmp_path):
    """Its process has neither the environment nor modules of the working directory."""
    (tmp_path / "jinja2").mkdir()
    (tmp_path / "jinja2" / "__init__.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    tokenizer, messages = Tokenizer(checkpoint, 0), [{"role": "user", "content": "hi"}]
    assert tokenizer.chat(messages).endswith("User: hi\n\nAssistant:")
    printing = replace(tokenizer_module._TEMPLATE, program="import os; print(os.environ)")
    monkeypatch.setattr(tokenizer_module, "_TEMPLATE", printing)
    printed = tokenizer.chat(messages)
    assert "environ" in printed
    assert "hf_secret" not in printed
    assert str(tmp_path) not in printed


def test_a_template_finds_no_globals_by_format(checkpoint):
    """jinja2 3.1.5 gave it those of the functions that it is given."""
    template = "<{{ ('{0.__globals__}' | attr('format'))(raise_exception) }}>"
    (checkpoint / "chat_template.jinja").write_text(template)
    assert Tokenizer(checkpoint, 0).chat([{"role": "user", "content": "hi"}]) == "<>"


def test_template_file_goes_before_the_setting(checkpoint):
    messages = [{"role": "user", "content": "hi"}]
    assert Tokenizer(checkpoint, 0).chat(messages).endswith("User: hi\n\nAssistant:")
    (checkpoint / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    assert Tokenizer(checkpoint, 0).chat(messages) == "<hi>"
    (checkpoint / "chat_template.jinja").write_bytes(b"\xff")
    refused(lambda: Tokenizer(checkpoint, 0), "chat_template.jinja", kind=ConfigError)


def charsmap(folder):
    """A normalizer whose table is garbage: the library panics."""
    edit_json(
        folder / "tokenizer.json",
        lambda values: values.update(
            normalizer={"type": "Precompiled", "precompiled_charsmap": "////////"}
        ),
    )


def aborts(folder):
    """The library cuts a merged token inside a character, panics, and once more on its way out."""
    vocab = {"a": 0, "é": 1, "aé": 2}
    model = {"type": "BPE", "continuing_subword_prefix": "x", "vocab": vocab, "merges": ["a é"]}
    edit_json(folder / "tokenizer.json", lambda values: values.update(model=model))


TOKENIZERS = {
    "library-aborts": aborts,
    "missing": lambda folder: (folder / "tokenizer.json").unlink(),
    "empty": write("tokenizer.json", b""),
    "not-json": write("tokenizer.json", b"{"),
    "not-a-tokenizer": write("tokenizer.json", b'{"version": "1.0"}'),
    "unknown-model": lambda folder: edit_json(
        folder / "tokenizer.json", lambda values: values["model"].update(type="Magic")
    ),
    "id-too-large": lambda folder: edit_json(
        folder / "tokenizer.json", lambda values: values["model"]["vocab"].update(a=1 << 40)
    ),
    "merge-of-nothing": lambda folder: edit_json(
        folder / "tokenizer.json", lambda values: values["model"]["merges"].insert(0, "zzq qqz")
    ),
    "deep": write("tokenizer.json", b'{"model":' + b"[" * 100_000),
    "library-panics": charsmap,
    "too-large": lambda folder: os.truncate(folder / "tokenizer.json", MAX_TOKENIZER_BYTES + 1),
    "is-pipe": fifo("tokenizer.json"),
    "settings-not-json": write("tokenizer_config.json", b"{"),
    "settings-is-pipe": fifo("tokenizer_config.json"),
    "settings-many-values": write("tokenizer_config.json", b'{"a": [' + b"1," * 300_000 + b"1]}"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_broken_tokenizer(name, checkpoint):
    TOKENIZERS[name](checkpoint)
    refused(lambda: Tokenizer(checkpoint, 0), "tokenizer", kind=ConfigError)


def test_a_tokenizer_is_parsed_by_a_child_once(checkpoint, tmp_path, monkeypatch):
    started, run = [], Child.run
    monkeypatch.setattr(Child, "run", lambda *given: started.append(given) or run(*given))
    verdicts = tmp_path / "new" / "verdicts"
    for _ in range(2):
        Tokenizer(checkpoint, 0, verdicts=verdicts)
    assert len(started) == len(list(verdicts.iterdir())) == 1
    aborts(checkpoint)
    refused(lambda: Tokenizer(checkpoint, 0, verdicts=verdicts), "crashed", kind=ConfigError)
    (tmp_path / "file").touch()  # where no verdict can be kept
    refused(lambda: Tokenizer(checkpoint, 0, verdicts=tmp_path / "file" / "x"), kind=ConfigError)
    assert len(started) == 3


def resign(folder, change):
    """Change the manifest and give it a fresh checksum, as someone with bad intentions would."""

    def edit(manifest):
        change(manifest)
        manifest["checksum"] = manifest_checksum(manifest)

    edit_json(folder / MANIFEST, edit)


def read_everything(folder):
    """Every value that a reader can get: bytes by name."""
    with Export.open(folder) as export:
        found = {"levels": export.layout.levels().numpy().tobytes()}
        record = torch.empty(export.layout.record_bytes, dtype=torch.uint8)
        for layer in export.layers:
            for expert in range(export.experts):
                export.read_range(layer, expert, 0, record.numpy().data)
                export.verify_record(layer, expert, record.numpy().data)
                found[f"{layer}.{expert}"] = record.numpy().tobytes()
        for name in resident_shapes(read_config(folder / "config.json")):
            weight = export.resident(name)
            if isinstance(weight, Int8Weight):
                parts = [weight.q, weight.scale]
            elif isinstance(weight, CodedWeight):
                parts = [weight.codes, weight.scales]
            else:
                parts = [weight]
            for part in parts:
                found[name] = (
                    found.get(name, b"")
                    + str(part.shape).encode()
                    + part.contiguous().view(torch.uint8).numpy().tobytes()
                )
        return found


def signed(*path, value):
    """A re-signed manifest whose entry at ``path`` is ``value``."""

    def apply(folder):
        def change(manifest):
            for key in path[:-1]:
                manifest = manifest[key]
            if value is REMOVE:
                del manifest[path[-1]]
            else:
                manifest[path[-1]] = value

        resign(folder, change)

    return apply


def swapped_layers(folder):
    one, two = folder / layer_file(1), folder / layer_file(2)
    one.rename(folder / "x")
    two.rename(one)
    (folder / "x").rename(two)


def export_link(name):
    def apply(folder):
        outside = folder.parent / "outside"
        shutil.move(folder / name, outside)
        (folder / name).symlink_to(outside)

    return apply


def half_written(folder):
    """What a killed quantize leaves under the name DST.partial."""
    (folder / MANIFEST).unlink()
    (folder / layer_file(2)).rename(folder / (layer_file(2) + ".tmp"))


def other_config(folder):
    edit_json(folder / "config.json", lambda config: config.update(routed_scaling_factor=1.0))


HEADER, Q = ("files", layer_file(1)), "model.layers.0.self_attn.q_a_proj.weight"


def codec_of(manifest):
    return manifest["quantization"]["codecs"]["nf4"]


def codec(**values):
    return lambda folder: resign(folder, lambda manifest: codec_of(manifest).update(values))


BAD_EXPORTS = {
    "newer-version": (signed("format_version", value=3), "newer"),
    "newer-version-unsigned": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m.update(format_version=7)),
        "newer",
    ),
    "version-zero": (signed("format_version", value=0), "format_version"),
    "version-true": (signed("format_version", value=True), "format_version"),
    "version-text": (signed("format_version", value="1"), "format_version"),
    "unsigned-level": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: codec_of(m)["levels"].reverse()),
        "checksum",
    ),
    "unsigned-size": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m["files"][RESIDENT].update(bytes=1)),
        "checksum",
    ),
    "no-checksum": (
        lambda folder: edit_json(folder / MANIFEST, lambda m: m.pop("checksum")),
        "checksum",
    ),
    "sixteen-levels-are-seventeen": (codec(levels=[*range(17)]), "levels"),
    "sixteen-levels-are-eight": (codec(levels=[*range(8)]), "8 levels for 4 bits"),
    "levels-of-text": (codec(levels=["0"] * 16), "levels"),
    "levels-unordered": (codec(levels=[1, 0, *range(2, 16)]), "ascending"),
    "levels-equal": (codec(levels=[0, *range(15)]), "ascending"),
    # what JSON tells apart and float32 does not
    "levels-equal-as-floats": (codec(levels=[*range(15), 14 + 1e-9]), "ascending"),
    "codec-bits": (codec(bits=2), "bits is 2"),
    "codec-bits-with-other-scales": (codec(bits=3, levels=[*range(8)]), "are unknown"),
    "codec-scales": (codec(scales="f8"), "scales"),
    "codec-block": (codec(block=32), "are unknown"),
    "codec-missing": (signed("quantization", "codecs", value={}), "'nf4' is not in codecs"),
    "codec-of-experts": (signed("quantization", "experts", "down", value="lut9"), "'lut9'"),
    "codec-of-resident": (signed("quantization", "resident_codecs", Q, "codec", value="x"), "'x'"),
    "levels-infinite": (lambda folder: infinite_level(folder), "levels"),
    "levels-an-object": (codec(levels={str(i): 0 for i in range(16)}), "levels"),
    "layout-unknown": (signed("quantization", "layout", value="tiles32"), "layout"),
    "block-unknown": (codec(block=128), "are unknown"),
    "record-of-other-size": (signed("experts", "record_bytes", value=4096), "record"),
    "record-with-other-offsets": (
        signed("experts", "record", "up_proj.weight", "offset", value=0),
        "record",
    ),
    "hidden-size-negative": (signed("experts", "hidden_size", value=-64), "integer"),
    "hidden-size-true": (signed("experts", "hidden_size", value=True), "integer"),
    "hidden-size-huge": (signed("experts", "hidden_size", value=1 << 20), "record"),
    "experts-none": (signed("experts", "n_routed_experts", value=0), "integer"),
    "experts-many": (signed("experts", "n_routed_experts", value=4096), "records"),
    "layers-empty": (signed("experts", "layers", value=[]), "layers"),
    "layers-twice": (signed("experts", "layers", value=[1, 1, 2]), "layers"),
    "layers-text": (signed("experts", "layers", value=["../../x", 1]), "layers"),
    "layers-many": (signed("experts", "layers", value=list(range(2000))), "layers"),
    "linked-layers-unknown": (signed("experts", "linked_layers", value={"1": 9}), "linked_layers"),
    "linked-layers-swapped": (signed("experts", "linked_layers", value={"1": 2}), "header"),
    "file-parent": (signed("files", "../x", value={"bytes": 1, "checksum": ""}), "files"),
    "file-absolute": (signed("files", "/etc/passwd", value={"bytes": 1, "checksum": ""}), "files"),
    "file-drive": (signed("files", "C:\\x", value={"bytes": 1, "checksum": ""}), "files"),
    "file-of-unknown-layer": (
        signed("files", layer_file(7), value={"bytes": 1, "checksum": ""}),
        "files",
    ),
    "file-without-config": (signed("files", "config.json", value=REMOVE), "files"),
    "file-without-resident": (signed("files", RESIDENT, value=REMOVE), RESIDENT),
    "file-without-layer": (signed("files", layer_file(1), value=REMOVE), "layer-00001"),
    "file-size-negative": (signed(*HEADER, "bytes", value=-1), "integer"),
    "header-size-wrong": (signed(*HEADER, "header_bytes", value=4096), "hold"),
    "records-too-few": (signed(*HEADER, "records", value=["0" * 32] * 7), "records"),
    "records-an-object": (
        signed(*HEADER, "records", value={str(i): "0" * 32 for i in range(8)}),
        "records",
    ),
    "records-of-null": (signed(*HEADER, "records", value=[None] * 8), "records"),
    "records-wrong": (signed(*HEADER, "records", value=["0" * 32] * 8), "layer-00001"),
    "tensor-without-checksum": (
        signed("files", RESIDENT, "tensors", NORM, "checksum", value=REMOVE),
        "checksum",
    ),
    "tensor-missing": (signed("files", RESIDENT, "tensors", NORM, value=REMOVE), MANIFEST),
    "tensor-added": (
        signed(
            "files", RESIDENT, "tensors", "x", value={"dtype": "U8", "shape": [1], "checksum": ""}
        ),
        "x has dtype",
    ),
    "tensor-dtype-unknown": (
        signed("files", RESIDENT, "tensors", NORM, "dtype", value="F64"),
        "F64",
    ),
    "tensor-dtype-of-same-size": (
        signed("files", RESIDENT, "tensors", NORM, "dtype", value="F16"),
        "header",
    ),
    "tensor-shape-negative": (
        signed("files", RESIDENT, "tensors", NORM, "shape", value=[-64]),
        "integer",
    ),
    "tensor-shape-empty": (signed("files", RESIDENT, "tensors", NORM, "shape", value=[]), NORM),
    "tensor-shape-huge": (
        signed("files", RESIDENT, "tensors", NORM, "shape", value=[1 << 31] * 3),
        "hold",
    ),
    "coded-shape-missing": (signed("quantization", "resident_codecs", value={}), Q),
    "coded-shape-of-other-tiles": (
        signed("quantization", "resident_codecs", Q, "shape", value=[4096, 4096]),
        Q,
    ),
    "manifest-missing": (lambda folder: (folder / MANIFEST).unlink(), MANIFEST),
    "manifest-empty": (write(MANIFEST, b""), MANIFEST),
    "manifest-list": (write(MANIFEST, b"[]"), MANIFEST),
    "manifest-over-cap": (write(MANIFEST, b'{"a": "' + b"x" * (9 << 20) + b'"}'), "more than"),
    "manifest-many-values": (
        write(MANIFEST, b'{"a": [' + b"[]," * 2_000_000 + b"1]}"),
        "more than",
    ),
    "manifest-deep": (
        write(MANIFEST, b'{"format_version": 1, "a":' + b"[" * 900 + b"]" * 900 + b"}"),
        MANIFEST,
    ),
    "manifest-is-pipe": (fifo(MANIFEST), MANIFEST),
    "manifest-link-out": (export_link(MANIFEST), "link"),
    "layer-missing": (lambda folder: (folder / layer_file(2)).unlink(), "layer-00002"),
    "layer-a-byte-short": (truncate(layer_file(2), -1), "layer-00002"),
    "layer-empty": (truncate(layer_file(2), 0), "layer-00002"),
    "layer-a-byte-long": (append(layer_file(2)), "layer-00002"),
    "layers-swapped": (swapped_layers, "layer-00001"),
    "layer-link-out": (export_link(layer_file(1)), "link"),
    "layers-link-out": (export_link("experts"), "link"),
    "layer-is-pipe": (fifo(layer_file(1)), "layer-00001"),
    "layer-is-folder": (
        lambda folder: ((folder / layer_file(1)).unlink(), (folder / layer_file(1)).mkdir()),
        "layer-00001",
    ),
    "resident-missing": (lambda folder: (folder / RESIDENT).unlink(), RESIDENT),
    "resident-a-byte-short": (truncate(RESIDENT, -1), RESIDENT),
    "resident-link-out": (export_link(RESIDENT), "link"),
    "report-storage": (
        signed("quantization", "report", "families", 0, "stored", value="int2"),
        "unknown storage 'int2'",
    ),
    "report-error": (
        signed("quantization", "report", "families", 0, "relative_rms_error", value=1e9),
        "is not a number from 0 to 1000",
    ),
    "report-layer": (
        signed("quantization", "report", "families", 0, "worst_layer", value=77),
        "worst_layer",
    ),
    "report-keys": (signed("quantization", "report", "bits", value=4), "other keys"),
    "config-missing": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config-changed": (other_config, "config.json"),
    "tokenizer-link-out": (export_link("tokenizer.json"), "link"),
    "tokenizer-is-pipe": (fifo("tokenizer.json"), "tokenizer.json"),
    "half-written": (half_written, MANIFEST),
}


def infinite_level(folder):
    """1e999 is valid JSON and reads as infinity; NaN can't be signed because it can't be read."""
    resign(folder, lambda manifest: codec_of(manifest)["levels"].__setitem__(0, float("inf")))
    (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace("Infinity", "1e999"))


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_export(name, export):
    breaking, wanted = BAD_EXPORTS[name]
    breaking(export)
    refused(lambda: read_everything(export), wanted, kind=ExportError)


@pytest.mark.parametrize("name", BAD_EXPORTS)
def test_bad_export_as_a_model(name, export):
    """The same through the runtime, which reads config.json first; experts are read at first
    use."""
    BAD_EXPORTS[name][0](export)

    def run():
        with Runtime.open(export, context=64) as runtime:
            runtime.logits(list(range(60)))

    if name != "records-wrong":
        refused(run)
        return
    with pytest.raises(ExportError, match="layer 1 expert"):
        run()


def test_export_without_a_report_opens(export):
    """As those of ``slotmoe synth`` and of older versions are."""
    wanted = read_everything(export)
    signed("quantization", "report", value=REMOVE)(export)
    assert read_everything(export) == wanted


def test_export_of_another_geometry(good, export, tmp_path):
    """A config.json that is signed but describes another model."""
    for key, value in (
        ("n_shared_experts", 1),
        ("num_hidden_layers", 2),
        ("n_routed_experts", 4),
        ("vocab_size", 4095),
    ):
        edit_json(
            export / "config.json", lambda config, key=key, value=value: config.update({key: value})
        )
        data = (export / "config.json").read_bytes()
        entry = {"bytes": len(data), "checksum": checksum(data)}
        resign(
            export, lambda manifest, entry=entry: manifest["files"].update({"config.json": entry})
        )
        refused(lambda: Runtime.open(export, context=16), kind=(ConfigError, ExportError))
        shutil.copyfile(good / "export" / "config.json", export / "config.json")


def leaves(value, path=()):
    """Paths of every value in a JSON tree, containers included."""
    if path:
        yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from leaves(item, (*path, key))


@pytest.mark.parametrize("value", [None, -1, 1 << 70, True, "../x", [], {}, 0.5], ids=repr)
def test_every_manifest_value_may_be_hostile(value, export):
    """Signed nonsense at any place is refused by name, or changes nothing that a reader gets."""
    text, wanted = (export / MANIFEST).read_text(), read_everything(export)
    opened = 0
    for path in leaves(json.loads(text)):
        if (
            len(path) > 4 and path[:2] == ("files", RESIDENT) and hash_of(path) % 4
        ):  # many alike: a quarter of them
            continue
        signed(*path, value=value)(export)
        try:
            found = read_everything(export)
        except ExportError as problem:
            assert str(export) in str(problem)  # noqa: PT017
        else:
            opened += path[:2] != ("quantization", "report")  # whose figures are for people
            if "levels" not in path:
                assert found == wanted, path
        (export / MANIFEST).write_text(text)
    assert opened < 60, "most of the manifest must matter"


def hash_of(path):
    return sum(map(ord, "".join(map(str, path))))


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


def test_prompt_that_is_no_text(checkpoint):
    refused(lambda: Tokenizer(checkpoint, 0).encode("a\udcff"), "UTF-8", kind=ConfigError)


def test_tables_are_large_enough():
    assert len(BAD_CHECKPOINTS) + len(BAD_EXPORTS) >= 40
    assert np.unique([*BAD_CHECKPOINTS]).size == len(BAD_CHECKPOINTS)

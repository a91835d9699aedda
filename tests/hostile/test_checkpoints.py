"""Checkpoints made to break things, and values of config.json that the network does not compute."""

import math
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from slotmoe.errors import CheckpointError, ConfigError
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.checkpoint.shards import read_header
from slotmoe.model.config import parse_config
from slotmoe.offload.ingest import synth
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.runtime import Runtime
from slotmoe.quant.codecs.codec import DEFAULT_CODECS, EXPERT_CODECS
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.manifest import manifest_checksum
from slotmoe.quant.export.reader import Export
from tests.support import v4
from tests.support.encoded import packed
from tests.support.hostile import (
    EXPERT,
    FIRST,
    INDEX,
    SECOND,
    append,
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
from tests.support.tiny import CONFIG, REMOVE


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
ABSENT = "model.layers.9.mlp.gate.weight"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"
LONG = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,99999999999999999999999]}}'
TWICE = b'{"model_type": "deepseek_v2", "model_type": "deepseek_v2"}'
TWO_FILES = b'{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'
ESCAPES = {"\x1b[2J\n\u202eevil": {**f32(0, 2), "dtype": "U16"}}


def config(text):
    return write("config.json", text)


# How a checkpoint is broken, and what the message must hold.
BAD_CHECKPOINTS = {
    "missing-shard": (without(SECOND), SECOND),
    "missing-config": (without("config.json"), "config.json"),
    "shard-a-byte-short": (truncate(FIRST, -1), FIRST),
    "shard-cut-in-header": (truncate(FIRST, 100), FIRST),
    "shard-a-byte-long": (append(FIRST), FIRST),
    "shard-is-pipe": (fifo(FIRST), FIRST),
    "shard-is-lfs-pointer": (write(FIRST, LFS), FIRST),
    "index-is-pipe": (fifo(INDEX), INDEX),
    "index-names-absent-tensor": (remap(ABSENT, FIRST), ABSENT),
    "index-names-wrong-shard": (edited(INDEX, swapped), "is in"),
    "index-misses-tensor": (edited(INDEX, lambda it: it["weight_map"].pop(EXPERT)), EXPERT),
    "index-without-map": (write(INDEX, b'{"metadata": {}}'), "weight_map"),
    "index-map-is-list": (write(INDEX, b'{"weight_map": ["a"]}'), "weight_map"),
    "index-file-is-number": (remap(EXPERT, 5), INDEX),
    "path-parent": (remap(EXPERT, "../outside.safetensors"), "../outside"),
    "path-windows-parent": (remap(EXPERT, "..\\outside.safetensors"), "outside"),
    "path-windows-drive": (remap(EXPERT, "C:outside.safetensors"), "C:outside"),
    "path-absolute": (remap(EXPERT, "/etc/passwd"), "/etc/passwd"),
    "path-drive": (remap(EXPERT, "C:\\models\\a.safetensors"), "C:"),
    "path-null-byte": (remap(EXPERT, "a\0.safetensors"), INDEX),
    "path-dot-file": (remap(EXPERT, ".hidden.safetensors"), INDEX),
    "path-pickle": (remap(EXPERT, "pytorch_model.bin"), "pytorch_model.bin"),
    "path-too-long": (remap(EXPERT, "a" * 300 + ".safetensors"), INDEX),
    "link-out": (linked(FIRST), FIRST),
    "tensor-dropped": (changed(EXPERT, lambda _: None), EXPERT),
    "expert-wrong-shape": (changed(EXPERT, lambda w: w.T), EXPERT),
    "expert-is-float64": (changed(EXPERT, lambda w: w.double()), "F64"),
    "expert-is-fp8": (changed(EXPERT, lambda w: w.to(torch.float8_e4m3fn)), "F8_E4M3"),
    "shape-negative": (entry(EXPERT, shape=[-48, -64]), SHARD),
    "shape-wraps-to-right-size": (entry(EXPERT, shape=[(1 << 63) + 48 * 64, 2]), SHARD),
    "shape-is-text": (entry(EXPERT, shape="48x64"), SHARD),
    "dtype-unknown": (entry(EXPERT, dtype="X99"), SHARD),
    "offsets-overlap": (single({"a": f32(0, 4), "b": f32(2, 6)}, b"123456"), ONE),
    "offsets-with-hole": (single({"a": f32(0, 4), "b": f32(8, 12)}, b"1" * 12), ONE),
    "offsets-backwards": (single({"a": f32(4, 0)}, b"1234"), ONE),
    "offsets-beyond-64-bits": (single(LONG), ONE),
    "header-length-huge": (write(FIRST, b"\xff" * 8 + b"{}"), FIRST),
    "header-over-cap": (single(b'{"a":' + b" " * (49 << 20) + b"1}"), "header of"),
    "header-too-many-tensors": (many(260_000), "more than 250000 tensors"),
    "header-not-json": (single(b"{'a': 1}"), ONE),
    "header-not-utf8": (single(b'{"\xff\xfe": 1}'), ONE),
    "header-deep": (single(b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}"), ONE),
    "names-with-escapes": (single(ESCAPES, b"12"), "\\x1b[2J\\n\\u202eevil"),
    "pickle-only": (pickled, "pickled"),
    "no-weights": (without(INDEX, FIRST, SECOND), INDEX),
    "config-twice-a-key": (config(TWICE), "twice"),
    "config-nan": (config(b'{"rms_norm_eps": NaN}'), "NaN"),
    "config-deep-list": (config(b'{"a":' + b"[" * 90_000 + b"]" * 90_000 + b"}"), "config.json"),
    "config-less-deep": (config(b'{"a":' + b"[" * 700 + b"]" * 700 + b"}"), "nested deeper"),
    "config-large": (config(b'{"a": "' + b"x" * (1 << 20) + b'"}'), "more than"),
    "config-many-values": (config(b'{"a": [' + b"[]," * 300_000 + b"1]}"), "more than"),
    "config-long-number": (config(b'{"vocab_size": ' + b"9" * 5000 + b"}"), "config.json"),
    "config-not-utf8": (config(b'{"a": "\xff"}'), "config.json"),
    "index-twice-a-key": (write(INDEX, TWO_FILES), "twice"),
    "index-many-values": (write(INDEX, b'{"a": {' + b'"":1,' * 300_000 + b'"a":1}}'), "more than"),
    "index-over-cap": (write(INDEX, b'{"weight_map": "' + b"x" * (33 << 20) + b'"}'), "more than"),
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


@pytest.mark.parametrize("resident", ["bf16", "nf4"])
def test_weights_that_are_no_numbers(resident, good, tmp_path):
    gate, attention = "model.layers.2.mlp.gate.weight", "model.layers.0.self_attn.kv_b_proj.weight"
    cases = [(EXPERT, value) for value in (math.nan, math.inf, -math.inf, 1e6)]
    cases += [("lm_head.weight", math.nan), (gate, math.inf), (attention, math.nan)]
    for number, (name, value) in enumerate(cases):
        checkpoint = shutil.copytree(good / "checkpoint", tmp_path / str(number))
        export = tmp_path / f"export-{number}"
        edit_tensor(checkpoint, name, poke(value))

        def made(checkpoint=checkpoint, export=export):
            quantize(checkpoint, export, resident=resident, codecs=EXPERT_CODECS["nf4", "4"])

        def opened(checkpoint=checkpoint):
            Runtime.open(checkpoint, quantize=False, context=16)

        refused(made, name, "model-0000", kind=CheckpointError)
        assert not export.exists()
        if value != 1e6:  # beyond fp16's range, which only NF4's scales mind
            refused(opened, name, kind=CheckpointError)


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


def test_headers_are_read_without_torch(checkpoint, monkeypatch):
    """Its opening of a file on a bad disk raises a bare ``RuntimeError``, a traceback to a user."""

    def failing(*args, **kwargs):
        raise RuntimeError("unable to open file: Input/output error (5)")

    monkeypatch.setattr(torch.UntypedStorage, "from_file", failing)
    assert len(read_header(checkpoint / FIRST)[0]) > 1


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


(V2,) = CONFIG["architectures"]

GROUPS = {"num_bits": 8, "group_size": 128, "symmetric": False, "strategy": "channel"}
GROUPS |= {"type": "float", "actorder": "group"}
FP8, BITS = {"quant_method": "fp8"}, {"quant_method": "bitsandbytes"}

WIDTHS = ("vocab_size", "intermediate_size", "moe_intermediate_size", "kv_lora_rank", "v_head_dim")
BAD_VALUES = {
    **{key: [0, REMOVE] for key in WIDTHS},
    "model_type": [
        *("deepseek_v41", "glm4_moe", "kimi_linear", "longcat_flash", "llama"),
        *(None, 2, ["deepseek_v2"], REMOVE),
    ],
    "architectures": [["LlamaForCausalLM"], V2, [V2, "X"]],
    "scoring_func": ["sigmoid", None, 1],
    "topk_method": ["noaux_tc", "gready", None, []],
    "quantization_config": [
        *("fp8", [1], {"quant_method": "mxfp4"}, {"quant_method": []}),
        {"quant_method": "gptq", "bits": 4},
        {**FP8, "weight_block_size": [64, 64]},
        {**FP8, "fmt": "e5m2"},
        {**FP8, "expert_dtype": "fp3"},
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        {**BITS, "load_in_8bit": True},
        {**BITS, "load_in_4bit": True, "bnb_4bit_quant_type": "int4"},
        *(packed(**{key: value}) for key, value in GROUPS.items()),
    ],
    "hidden_act": ["gelu", None],
    "attention_bias": [True, "yes"],
    "mlp_bias": [True],
    "ep_size": [8, "1"],
    "rope_interleave": [False],
    "num_key_value_heads": [1, 2],
    "hidden_size": [True, 64.0, "64", None, 0, -64, 1 << 40, 10**300, [64], REMOVE],
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
    "qk_rope_head_dim": [7, 0, REMOVE],
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
    *({**YARN, "type": kind} for kind in ("linear", "dynamic", "llama3", ["yarn"])),
    {**YARN, "rope_type": "longrope"},
    *({**YARN, "factor": factor} for factor in (0, "4")),
    {**YARN, "original_max_position_embeddings": 0},
    {**YARN, "mscale": -1},
    {**YARN, "beta_fast": None},
    {**YARN, "attention_factor": 2.0},
    {"factor": 4.0, "rope_theta": 0},
]


BAD_VALUES["rope_scaling"] += BAD_ROPE_SETTINGS
BAD_VALUES["rope_parameters"] += BAD_ROPE_SETTINGS


@pytest.mark.parametrize("key", BAD_VALUES)
def test_unsupported_config_value_is_named(key):
    left_out = ["num_key_value_heads"] if key == "num_attention_heads" else []
    left_out += ["rope_scaling"] if key == "rope_parameters" else []
    for value in BAD_VALUES[key]:
        config = {k: v for k, v in CONFIG.items() if k not in left_out} | {key: value}
        given = {k: v for k, v in config.items() if v is not REMOVE}
        named = "rope" if key.startswith("rope_") and isinstance(value, dict) else key
        refused(lambda given=given: parse_config(given), "config.json", named, kind=ConfigError)


_ATTENTION, TABLE = "self_attn.compressor", "model.layers.0.mlp.gate.tid2eid"
BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"


def with_expert(id_):
    return lambda tensor: tensor.index_put((torch.tensor(17), torch.tensor(1)), torch.tensor(id_))


# What becomes of a tensor of a DeepSeek-V4 in either spelling, and what the message holds.
OF_V4 = [
    *(
        (name, lambda _: None, f"tensor {name} is missing")
        for name in (
            TABLE,
            "model.layers.1.self_attn.sinks",
            f"model.layers.2.{_ATTENTION}.position_bias",
            f"model.layers.2.{_ATTENTION}.gate_proj.weight",
            f"model.layers.1.{_ATTENTION}.indexer.kv_norm.weight",
            f"model.layers.3.{_ATTENTION}.indexer.scorer.weights_proj.weight",
            "model.layers.0.self_attn.o_a_proj.weight",
            "model.layers.2.ffn_hc.scale",
            "model.hc_head.hc_fn",
            BIAS,
        )
    ),
    *((TABLE, with_expert(id_), "an expert outside 0 to 7") for id_ in (-1, 8, 1 << 40)),
    *((TABLE, lambda ids, to=to: ids.to(to), "I64 or I32") for to in (torch.float32, torch.int16)),
    (BIAS, lambda bias: bias[:7], "has shape [7]"),
    (BIAS, lambda bias: bias.index_fill(0, torch.tensor(3), torch.nan), "NaN"),
]


@pytest.mark.parametrize("hub", [False, True])
def test_tensors_of_a_v4_are_refused_by_name(hub, tmp_path):
    v4.write_v4(tmp_path / "source", "v4", hub=hub)
    file, export = tmp_path / "source" / "model.safetensors", tmp_path / "export"
    good = load_file(file)
    for name, change, words in OF_V4:
        spelled = v4.hub_name(name) if hub else name
        others = {**good, spelled: change(good[spelled])}
        file.unlink()
        save_file({key: value for key, value in others.items() if value is not None}, file)
        refused(lambda: quantize(tmp_path / "source", export), name, words, kind=CheckpointError)
        assert not export.exists()


@pytest.mark.parametrize(("name", "dtype"), [(TABLE, "F32"), ("model.norm.weight", "I32")])
def test_an_export_has_integers_for_expert_ids_alone(name, dtype, tmp_path):
    v4.write_v4(tmp_path / "source", "v4")
    quantize(tmp_path / "source", tmp_path / "export")

    def change(manifest):
        manifest["files"]["resident.safetensors"]["tensors"][name]["dtype"] = dtype
        manifest["checksum"] = manifest_checksum(manifest)

    edit_json(tmp_path / "export" / MANIFEST, change)
    refused(lambda: Export.open(tmp_path / "export"), f"{name} has dtype torch.")


def test_a_synthetic_v4_routes_to_its_experts(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "POOL_BYTES", 1 << 20)
    v4.write_v4(tmp_path / "source", "v4")
    options = "int8", DEFAULT_CODECS, 1, False, lambda *_: None
    manifest = synth.synthesize(tmp_path / "source" / "config.json", tmp_path / "export", *options)
    assert manifest["experts"]["linked_layers"] == {"1": 0, "2": 0, "3": 0}
    ids = Export.open(tmp_path / "export").resident(TABLE)
    assert ids.dtype == torch.int32 and ids.min() == 0 and ids.max() == 7
    assert all(len(set(row)) == 3 for row in ids.tolist())

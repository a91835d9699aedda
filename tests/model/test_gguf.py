"""GGUF files say what the checkpoint says that they were made of, hostile ones are refused, and
what an export is made of it."""

import json
import os
import random
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind

from slotmoe.errors import CheckpointError, ConfigError, SlotmoeError
from slotmoe.model.chat import render_chat
from slotmoe.model.checkpoint import gguf as gguf_checkpoint
from slotmoe.model.checkpoint import gguf_header as header
from slotmoe.model.checkpoint.gguf_metadata import files_of
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.ingest.quantize import quantize
from tests.support import hostile
from tests.support.disk import tree
from tests.support.families import YARN
from tests.support.gguf import write_gguf
from tests.support.tiny import SAMPLE, write_checkpoint
from tests.support.v4 import write_case

ROOT, BIAS = Path(__file__).parents[2], "blk.1.exp_probs_b.bias"
GEOMETRIES = {
    "usual": {},
    "lite": {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1},
    "renormalised": {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def good(source, tmp_path_factory):
    return write_gguf(source, tmp_path_factory.mktemp("gguf") / "model.gguf")


@pytest.fixture
def written(source, tmp_path):
    """Writes the checkpoint with changed metadata."""

    def write(edit=None, **options):
        return write_gguf(source, tmp_path / "model.gguf", edit=edit, **options)

    return write


def put(key, value, kind):
    def edit(writer):
        writer.kv_data[0][key] = gguf.GGUFValue(value, kind)

    return edit


def refused(path, *parts, kind=SlotmoeError):
    hostile.refused(lambda: open_checkpoint(path).close(), str(path.parent), *parts, kind=kind)


@pytest.mark.parametrize(
    ("name", "kind", "kv_b"),
    [
        *((name, "BF16", "split") for name in GEOMETRIES),
        ("usual", "F32", "whole"),
        ("usual", "BF16", "flat"),
    ],
)
def test_it_is_the_checkpoint(name, kind, kv_b, tmp_path):
    """Config and weights, whatever converter made them."""
    write_checkpoint(tmp_path / "source", **GEOMETRIES[name])
    path = write_gguf(tmp_path / "source", tmp_path / "model.gguf", kind, kv_b=kv_b)
    with open_checkpoint(tmp_path / "source") as ours, open_checkpoint(path) as made:
        assert made.config == ours.config and made.infos.keys() == ours.infos.keys()
        for tensor in ours.infos:
            wanted = ours.tensor(tensor).float().to(made.infos[tensor].dtype)
            assert torch.equal(made.tensor(tensor), wanted), tensor
        keys = "model.layers.1.self_attn.kv_b_proj.weight"
        for start, stop in ((15, 33), (40, 128)):  # heads have 32 rows
            assert torch.equal(made.rows(keys, start, stop), made.tensor(keys)[start:stop])


FAMILIES = {  # by case: what no file of that architecture can say
    "v3-groups-yarn": {"rope_parameters": {**YARN, "mscale": 0.707}}, "v3-no-groups-no-qlora": {},
    "glm4": {}, "glm4-no-norm": {}, "qwen3": {"mlp_only_layers": []}, "minimax-odd": {},
    "dots": {"layer_types": ["full_attention"] * 4}, "hunyuan-biases": {},
    "glm-5": {"indexer_types": ["full", "shared", "full"]}, "gpt-oss-in-blocks": {},
    "qwen2": {"decoder_sparse_step": 1},
    "next": {}, "next-one-key-head": {}, "qwen3.5": {}, "qwen3.5-odd": {}, "qwen3.5-one-full": {},
}  # fmt: skip


@pytest.mark.parametrize("case", FAMILIES)
def test_other_families(heavy, case, tmp_path):
    """As the converter and its names of tensors have them, in the package's own table; the config
    follows from tensors in any part."""
    write_case(tmp_path / "source", case, **FAMILIES[case])
    experts = "MXFP4" if "blocks" in case else None
    given = tmp_path / "source", tmp_path / "model.gguf", "F32"
    path, parts = (write_gguf(*given, experts=experts, shards=shards) for shards in (1, 5))
    with open_checkpoint(tmp_path / "source") as ours, open_checkpoint(path) as made:
        with open_checkpoint(parts) as several:
            assert several.config == ours.config and several.infos.keys() == ours.infos.keys()
        assert made.config == ours.config and made.infos.keys() == ours.infos.keys()
        for tensor in ours.infos:
            wanted, got = ours.tensor(tensor).to(made.infos[tensor].dtype), made.tensor(tensor)
            rounded = 1e-6 if tensor.endswith("A_log") else 0  # files have its exponential
            assert (got - wanted).abs().max() <= rounded, tensor
            half = len(got) // 2
            assert torch.equal(made.rows(tensor, half, len(got)), got[half:])
            assert made.in_4_bits(tensor) == ours.in_4_bits(tensor)
            if made.in_4_bits(tensor):
                values = made.codes(tensor, 3, 19).values()
                assert torch.equal(values, ours.codes(tensor, 3, 19).values())


@pytest.mark.usefixtures("heavy")
def test_every_encoding_is_decoded_by_rows(tmp_path):
    """Random blocks of each type, in the matrices of the sample that have 256 columns."""
    for number, encoding in header.GGML_TYPES.items():
        assert encoding.name == Type(number).name
        assert (encoding.block, encoding.bytes) == gguf.GGML_QUANT_SIZES[Type(number)]
    generator, raw = np.random.default_rng(0), {}
    kinds = [Type[encoding.name] for encoding in header.GGML_TYPES.values()]

    def replace_tensors(name, tensor):
        if tensor.shape[-1] != 256 or tensor.dim() != 2:
            return None
        kind = kinds[len(raw) % len(kinds)]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        data = generator.integers(0, 256, (len(tensor), 256 // block * size), np.uint8)
        raw[name] = data, kind
        return data, kind

    path = write_gguf(SAMPLE, tmp_path / "model.gguf", substitute=replace_tensors)
    seen = set()
    with open_checkpoint(path) as made, np.errstate(all="ignore"):
        for name, parts in ((n, p) for n, p in _names(made).items() if p in raw):
            data, kind = raw[parts]
            wanted = torch.from_numpy(gguf.quants.dequantize(data, kind))
            for start, stop in ((0, 16), (3, len(data)), (7, 8)):
                rows = made.rows(name, start, stop)
                same = wanted[start:stop].to(rows.dtype)
                assert rows.dtype == made.infos[name].dtype
                assert torch.equal(rows.nan_to_num(), same.nan_to_num()), (name, kind)
            seen.add(kind)
    assert seen == set(kinds)


def _names(checkpoint):
    """Our name -> the file's, of what is one matrix there."""
    architecture, layers = gguf.MODEL_ARCH.DEEPSEEK2, checkpoint.config.num_hidden_layers
    known = gguf.get_tensor_name_map(architecture, layers)
    names = {name: known.get_name(name, (".weight",)) for name in checkpoint.infos}
    return {ours: theirs for ours, theirs in names.items() if theirs and "kv_b" not in theirs}


@pytest.mark.usefixtures("processes")
def test_tokens_are_those_of_the_checkpoint(tmp_path):
    path = write_gguf(SAMPLE, tmp_path / "model.gguf")
    ours, made = Tokenizer(SAMPLE, 0), Tokenizer(path, 0, files_of(path))
    text = (ROOT / "README.md").read_text() + " ß — 漢字 🙂 <|end_of_sentence|>  \n\n 1234"
    assert made.encode(text) == ours.encode(text)
    assert made.encode_with_ends(text) == ours.encode_with_ends(text)
    assert made.decode(ours.encode(text)) == ours.decode(ours.encode(text))
    assert made.size == ours.size
    chat = render_chat(made, [{"role": "user", "content": "hi"}])
    assert chat == "<|begin_of_sentence|>User: hi\n\nAssistant:"


def test_without_the_gguf_package(heavy, good, tmp_path, monkeypatch):
    """It decodes; what is not quantized is read without it."""
    quantized = write_gguf(SAMPLE, tmp_path / "q8.gguf", "Q8_0")
    monkeypatch.setattr(gguf_checkpoint, "find_spec", lambda name: None)
    open_checkpoint(good).close()
    refused(quantized, "Q8_0", "pip install 'slotmoe[gguf]'", kind=ConfigError)


# What a user can give, and what has to be in the one line that answers.
U32, F32, TEXT, ARRAY = Kind.UINT32, Kind.FLOAT32, Kind.STRING, Kind.ARRAY
METADATA = [
    (put("general.architecture", "llama", TEXT), "'llama'", "deepseek2"),
    (put("deepseek2.expert_gating_func", 9, U32), "gating_func is 9", "softmax"),
    (put("deepseek2.expert_gating_func", 2, U32), "exp_probs_b.bias", "missing"),
    (put("deepseek2.rope.scaling.type", "linear", TEXT), "scaling.type"),
    (put("deepseek2.rope.freq_base", float("nan"), F32), "freq_base"),
    (put("deepseek2.expert_count", 12, U32), "gate_inp.weight", "[12,"),
    (put("deepseek2.block_count", 4, U32), "blk.3.", "missing"),
    (put("tokenizer.ggml.pre", "tekken", TEXT), "ggml.pre", "'tekken'", "'qwen2'"),
    (put("tokenizer.ggml.merges", ["a  b"], ARRAY), "merges[0]"),
    (put("tokenizer.ggml.token_type", [1, 1], ARRAY), "token_type", "4096"),
    (lambda writer: writer.add_tensor(BIAS, np.zeros(8, np.float32)), BIAS),
]


def test_metadata_is_refused_by_key(heavy, written):
    for edit, *parts in METADATA:
        refused(written(edit), *parts)


def test_every_key_that_is_needed_is_asked_for(good, monkeypatch):
    """A file without one of its keys opens as the same model, or is refused by that key."""
    whole, optional = header.read_header(good), set()
    with open_checkpoint(good) as made:
        wanted = made.config
    for key in whole.metadata:
        less = {name: value for name, value in whole.metadata.items() if name != key}
        found = replace(whole, metadata=less)
        monkeypatch.setattr(header, "read_header", lambda *_, found=found: found)
        try:
            with open_checkpoint(good) as made:
                assert made.config == wanted, key
            optional.add(key)
        except CheckpointError as problem:
            # Without a rank of queries there would be one matrix of them.
            named = "attn_q.weight" if key.endswith("q_lora_rank") else key
            assert named in str(problem)  # noqa: PT017
    assert {"deepseek2.expert_gating_func", "deepseek2.vocab_size"} <= optional


def long(value, text=b""):
    return struct.pack("<Q", value) + text


def raw(tensors=0, keys=0, body=b"", version=3):
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body


def key(layout, *values, rest=b"", name=b"k", count=1):
    """A file with ``count`` keys of this name and these values."""
    one = long(len(name), name) + struct.pack("<" + layout, *values) + rest
    return raw(keys=count, body=count * one)


def tensor(layout, *values):
    return raw(tensors=1, body=long(1, b"t") + struct.pack("<" + layout, *values))


HEADERS = [
    (b"", "not a GGUF file"),
    (raw(version=1), "version 1"),
    (raw(tensors=1 << 60), "tensors"),
    (key("I", 8, rest=long(1 << 63)), "k "),
    (key("I", 8, rest=long(1, b"\xff")), "UTF-8"),
    (key("IIQ", 9, 4, 1 << 62), "k has", "values"),
    (key("I", 99), "k has type 99"),
    (key("IB", 7, 1, count=2), "k occurs twice"),
    (tensor("I", 1 << 31), "dimensions"),
    (tensor("IQQIQ", 2, 1 << 63, 1 << 63, 0, 0), "shape"),
    (tensor("IQIQ", 1, 32, 16, 0), "type 16", "Q4_K"),
    (tensor("IQIQ", 1, 8, 0, 1 << 62), "t ends at", "truncated"),
]


def test_hostile_headers(tmp_path):
    path = tmp_path / "model.gguf"
    for data, *parts in HEADERS:
        path.write_bytes(data)
        refused(path, *parts, kind=CheckpointError)
    path.unlink()
    os.mkfifo(path)
    refused(path, "not a regular file", kind=CheckpointError)


def test_truncated_anywhere(good, tmp_path):
    data, path = good.read_bytes(), tmp_path / "model.gguf"
    end = header.read_header(good).length
    generator = random.Random(0)
    cuts = [*range(0, 200, 7), *(generator.randrange(end) for _ in range(30)), end, len(data) - 1]
    for cut in cuts:
        path.write_bytes(data[:cut])
        refused(path, kind=CheckpointError)


def test_parts_are_one_model(source, good, tmp_path):
    first = write_gguf(source, tmp_path / "model.gguf", shards=3)
    assert first.name == "model-00001-of-00003.gguf"
    with open_checkpoint(first) as made, open_checkpoint(good) as whole:
        assert made.config == whole.config
        assert len({info.file for info in made.infos.values()}) == 3
        for name in whole.infos:
            assert torch.equal(made.tensor(name), whole.tensor(name)), name
    second, third = (tmp_path / f"model-0000{n}-of-00003.gguf" for n in (2, 3))
    refused(second, "part 2", first.name)
    refused(tmp_path / "model-00001-of-99999.gguf", "no part")
    third.rename(tmp_path / "third")
    refused(first, third.name, "missing")
    third.symlink_to((tmp_path / "third").rename(tmp_path.parent / f"{tmp_path.name}-third"))
    refused(first, third.name, "link")


# Exports

PROMPT = "It is a truth universally acknowledged, that a"
# Each row has whole blocks of 32 weights.
SIZES = {"moe_intermediate_size": 64, "q_lora_rank": 32, "qk_nope_head_dim": 32}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    write_checkpoint(folder, **SIZES)
    quantize(folder, folder / "export")
    return folder


def test_parts_give_the_same_export(heavy, exported, tmp_path, monkeypatch):
    """But for norms and gates, which are float32 in a GGUF file, it is the checkpoint's."""
    whole = write_gguf(exported, tmp_path / "whole.gguf")
    parts = write_gguf(exported, tmp_path / "parts.gguf", shards=3)
    for path in (whole, parts):
        quantize(path, tmp_path / path.name[:5])
    made, wanted, ours = (tree(tmp_path / name) for name in ("parts", "whole", exported / "export"))
    manifests = [json.loads(files.pop("slotmoe.json")) for files in (made, wanted)]
    assert made == wanted
    assert all(made[name] == ours[name] for name in ours if name.startswith("experts"))
    assert manifests[0]["source"]["name"] == parts.name
    assert len([n for n in manifests[0]["source"]["files"] if n.endswith(".gguf")]) == 3
    monkeypatch.setattr("slotmoe.model.checkpoint.reader._PIECE", 3000)
    with open_checkpoint(parts) as checkpoint:
        assert checkpoint.weights(print) == manifests[0]["source"]["weights"]


def test_commands(exported, tmp_path, slotmoe, monkeypatch, processes):
    """Commands take the file as MODEL; it is quantized once."""
    monkeypatch.setenv("SLOTMOE_CACHE", str(tmp_path / "cache"))
    model, options = write_gguf(exported, tmp_path / "x.gguf"), ["-n", "8", "--ram", "4GiB"]
    code, text, _ = slotmoe("run", model, PROMPT, *options)
    assert (code, text) == slotmoe("run", exported / "export", PROMPT, *options)[:2]
    monkeypatch.setattr("slotmoe.offload.ingest.cached.quantize", None)
    assert slotmoe("run", model, "--chat", "hi", *options)[0] == 0
    code, text, _ = slotmoe("plan", model, "--json")
    assert (code, json.loads(text)["fits"]) == (0, True)

"""Every field of every JSON file that somebody else may have written, with every kind of value: a
reader takes it, or refuses it in one line that names the file."""

import json
import math
import shutil
import tracemalloc
from dataclasses import replace
from functools import partial
from itertools import product
from unittest.mock import patch

import pytest
from huggingface_hub import HfApi
from huggingface_hub.hf_api import ModelInfo

from slotmoe.errors import SlotmoeError
from slotmoe.jsonfile import files_in
from slotmoe.model.checkpoint import gguf_header as header
from slotmoe.model.checkpoint.gguf_metadata import metadata_files
from slotmoe.model.checkpoint.shards import read_header, tensors_in
from slotmoe.model.config import config_among, read_config
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload import model_cache
from slotmoe.offload.ingest import repository
from slotmoe.offload.ingest.quantize import quantize
from slotmoe.offload.model_source import generation_of
from slotmoe.offload.plan.advice import GEOMETRIES, Model, geometry_path
from slotmoe.quant.export.layout import MANIFEST
from slotmoe.quant.export.manifest import manifest_checksum
from tests.support import v4
from tests.support.encoded import packed
from tests.support.exported import read_everything
from tests.support.gguf import write_gguf
from tests.support.hostile import INDEX, f32
from tests.support.params import nth
from tests.support.tiny import REMOVE, SAMPLE, SMALL, write_checkpoint


def nested(depth):
    return [nested(depth - 1)] if depth else []


VALUES = [None, True, -1, 0, 1 << 63, math.inf, 0.5, "", "x" * 100_000, [], {}, [[]], [{}]]
VALUES += [{"": []}, nested(20), REMOVE]
LARGE = (1 << 63, math.inf)  # what memory might be taken for
MOST = 32 << 20


def fields(values, path=()):
    """The paths of every value inside; of values that are alike, the first and the last one's."""
    if path:
        yield path
    items = [*(values.items() if isinstance(values, dict) else enumerate(values))]
    inner = [value for _, value in items]
    kinds = {(type(value), *(value if isinstance(value, dict) else ())) for value in inner}
    if len(items) > 2 and len(kinds) == 1 and not (path == () or isinstance(inner[0], str)):
        items = [items[0], items[-1]]
    for key, value in items:
        if isinstance(value, dict | list):
            yield from fields(value, (*path, key))
        else:
            yield (*path, key)


def changed(values, path, value):
    """A copy with another value at ``path``."""
    key, *rest = path
    copy = values.copy()
    if rest:
        copy[key] = changed(values[key], rest, value)
    elif value is REMOVE:
        del copy[key]
    else:
        copy[key] = value
    return copy


def text(values):
    return json.dumps(values).replace("Infinity", "1e400").encode()


def file(path, values, use):
    """What writes others to the file and calls ``use``."""

    def read(values):
        path.write_bytes(text(values))
        use()

    return values, read


# Each gives a file's values, and what writes others there and reads them.


def config(geometry, folder, good, **others):
    values = json.loads(geometry_path(geometry).read_text()) | others
    path = folder / "config.json"
    return file(path, values, lambda: read_config(path))


def generation(folder, good):
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    known = read_config(folder / "config.json")
    values = json.loads((folder / "generation_config.json").read_text())
    values |= {"eos_token_id": [1, 2], "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.1}
    use = partial(generation_of, known, files_in(folder), folder)
    return file(folder / "generation_config.json", values, use)


def tokenizer(folder, good):
    shutil.copytree(SAMPLE, folder, dirs_exist_ok=True)
    values = json.loads((folder / "tokenizer_config.json").read_text())
    named = [{"name": "default", "template": values["chat_template"]}]
    values |= {"chat_template": named, "eos_token": {"content": "<|end_of_sentence|>"}}

    def use():
        found = Tokenizer(folder, 0, verdicts=model_cache.cache_folder() / "tokenizers")
        assert found.template is None or isinstance(found.template, str)
        assert all(isinstance(spelled, str) for spelled in found.spellings.values())

    return file(folder / "tokenizer_config.json", values, use)


def index(folder, good):
    shutil.copytree(good / "checkpoint", folder, dirs_exist_ok=True)
    values = json.loads((folder / INDEX).read_text())
    values["weight_map"] = dict([*values["weight_map"].items()][:5])
    return file(folder / INDEX, values, partial(tensors_in, folder))


def tensors(folder, good):
    """The header of a file of weights."""
    path = folder / "model.safetensors"

    def read(values):
        header = text(values)
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
        read_header(path)

    return {"__metadata__": {"format": "pt"}, "a": f32(0, 4), "b": f32(4, 8)}, read


def manifest(folder, good):
    """Signed nonsense at any place is refused, or changes nothing that a reader gets."""
    write_checkpoint(folder / "source", **SMALL)
    export = folder / "export"
    quantize(folder / "source", export, resident="nf4")
    values, wanted = json.loads((export / MANIFEST).read_text()), read_everything(export)
    del values["checksum"]
    codecs = json.dumps(values["quantization"]["codecs"])

    def read(values):
        signature = manifest_checksum(values)
        (export / MANIFEST).write_bytes(text({**values, "checksum": signature}))
        try:
            with_levels = json.dumps(values.get("quantization"))
            found = read_everything(export)
            assert found == wanted or codecs not in with_levels, "what is read has changed"
        finally:
            Model.read(str(export))

    return values, read


def gguf(folder, good):
    shutil.copytree(SAMPLE, folder / "source")
    whole = header.read_header(write_gguf(folder / "source", folder / "model.gguf"))

    def read(values):
        config_among(metadata_files([replace(whole, metadata=values)]), whole.path)

    values = dict(whole.metadata)
    tokens = values["tokenizer.ggml.tokens"][:300]  # for speed
    merges = [it for it in values["tokenizer.ggml.merges"] if it.replace(" ", "") in tokens]
    values |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": merges}
    values["tokenizer.ggml.token_type"] = values["tokenizer.ggml.token_type"][:300]
    return values, read


def hub_answer(folder, good):
    sibling = {"rfilename": "config.json", "size": 9, "blobId": "0" * 40}
    large = {"rfilename": "model.safetensors", "size": 9, "blobId": "0" * 40}
    large["lfs"] = {"sha256": "0" * 64, "size": 9, "pointerSize": 9}

    def read(values):
        answer = json.loads(text(values))
        given = patch.object(HfApi, "model_info", lambda *_, **__: ModelInfo(**answer))
        with given, patch.object(repository, "ATTEMPTS", 1):
            repository.resolve("owner/model", "main")

    return {"id": "owner/model", "sha": "0" * 40, "siblings": [sibling, large]}, read


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
PATTERNS = {"num_hidden_layers": 3, "index_topk_pattern": "FSS", "index_topk_freq": 2}
PATTERNS |= {"index_skip_topk_offset": 2, "mlp_layer_types": ["dense", "sparse", "sparse"]}
PATTERNS |= {"indexer_types": None, "first_k_dense_replace": 1, "eos_token_id": [1, 2]}
WRAPPED = {"model_type": "kimi_k25", "text_config": json.loads(geometry_path("v3").read_text())}
_GEOMETRIES = {path: name for name, path in GEOMETRIES.items()}.values()
LONG = {
    **{f"config-{name}": partial(config, name) for name in _GEOMETRIES},
    "config-fp8": partial(config, "v3", quantization_config=FP8),
    "config-int4": partial(config, "v3", quantization_config=packed()),
    "config-patterns": partial(config, "glm-5", **PATTERNS),
    "config-in-words-of-transformers": partial(config, "v4-flash", **v4.config_of("v4")),
    "config-wrapped": partial(config, "kimi-k2", **WRAPPED),
    "tokenizer": tokenizer,
    "manifest": manifest,
    "gguf": gguf,
}
SHORT = {"generation": generation, "index": index, "tensors": tensors, "hub-answer": hub_answer}
SHARES = 13  # of a long one's fields and values; the usual tests take the first
CASES = [*product(SHORT, [None]), *nth(SHARES, product(LONG, range(SHARES)))]


@pytest.mark.parametrize(("name", "share"), CASES)
def test_every_field_may_be_anything(name, share, heavy, good, tmp_path):
    values, read = (SHORT | LONG)[name](tmp_path, good)
    read(values)
    wrong = []
    every = [*product(fields(values), VALUES)]
    for path, value in every if share is None else every[share::SHARES]:
        if value in LARGE:
            tracemalloc.start()
        try:
            read(changed(values, path, value))
        except SlotmoeError as problem:
            message = str(problem)
            named = str(tmp_path) in message or "owner/model" in message
            if not (named and message.isprintable() and len(message) < 1000):
                wrong.append(f"{path} = {value!r:.40}: {message}")
        except Exception as problem:
            wrong.append(f"{path} = {value!r:.40}: {problem!r:.200}")
        if (taken := tracemalloc.get_traced_memory()[1]) > MOST:
            wrong.append(f"{path} = {value!r:.40}: takes {taken} bytes")
        tracemalloc.stop()
    assert not wrong, "\n".join(wrong)

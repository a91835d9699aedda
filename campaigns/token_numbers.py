"""Numbers of tokenizers at their limits, for the fuzzer: ids, ranks, scores, lengths and sizes, in
each kind of file that holds any.  A case is text of JSON: the files by name, or GGUF's metadata."""

import base64
import functools
import json
import math
import shutil
from collections import defaultdict
from contextlib import suppress
from dataclasses import replace

from campaigns.cases import lawful
from campaigns.fuzz import MEMORY, SECONDS
from campaigns.models import few_words
from slotmoe.model import tokenizer
from slotmoe.model.checkpoint.gguf_header import read_header
from slotmoe.model.checkpoint.gguf_metadata import metadata_files
from slotmoe.model.config import config_among
from slotmoe.model.generate import TextStream
from slotmoe.model.tiktoken import tokenizer_json
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_source import generation_of, open_tokenizer
from slotmoe.tools.serve.errors import RefusedError
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.requests import Rule
from tests.support.gguf import write_gguf

LIMITS = [0, 1, 255, 256, 300, 301, 20_000_000, -(1 << 31), -(1 << 63), 10**40]
LIMITS += [power + off for power in (1 << 31, 1 << 32, 1 << 63, 1 << 64) for off in (-1, 0, 1)]
LIMITS += [-1, 0.5, -0.0, 5e-324, 1e38, 1e308, -1e308, math.inf, -math.inf, math.nan]
TEXT = "Hello, w\u00f6rld \u4f60\u597d 12"
SCHEMA = Rule("json", {"type": "object"})
SIZED = {  # what has numbers of its own, and few tokenizers have
    "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0},
        **{"pad_type_id": 0, "pad_token": "a"},
    },
}
STRIP = {"type": "Strip", "content": "_", "start": 1, "stop": 1}
SPLIT = {"type": "WhitespaceSplit"}
PIECES = {word: id_ for id_, word in enumerate(["[UNK]", "a", "b", "##b", "Hello", ",", "ab"])}
MODELS = {
    "Unigram": {"unk_id": 0, "vocab": [[word, -float(id_)] for word, id_ in PIECES.items()]},
    "WordPiece": {
        **{"unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": PIECES},
        "max_input_chars_per_word": 100,
    },
    "WordLevel": {"unk_token": "[UNK]", "vocab": PIECES},
}


def changed_number(text, chance):
    """JSON in which one or two numbers, or keys that are numbers, are others; of each kind one is
    changed as often."""
    value, kinds = json.loads(text), kinds_of(text)
    for _ in range(chance.randint(1, 2)):
        *path, key = chance.choice(chance.choice(kinds))
        inside, new = value, chance.choice(LIMITS)
        for step in path:
            inside = inside[step]
        if isinstance(inside[key], dict):
            inside[str(new)] = inside.pop(key)
            break
        inside[key] = inside[key] + chance.choice((-1, 1)) if chance.random() < 0.2 else new
    return json.dumps(value).encode()


@functools.cache
def kinds_of(text):
    """The paths to all numbers, by what they are of: all that a container has are of one kind."""
    kinds = defaultdict(list)

    def walk(inside, path, kind):
        for key in inside if isinstance(inside, dict) else range(len(inside)):
            step = "*" if len(inside) > 60 or isinstance(inside, list) else key
            value, ours = inside[key], (*kind, step)
            named = isinstance(value, dict) and isinstance(key, str) and key.isdigit()
            if named or type(value) in (int, float):
                kinds[ours].append((*path, key))
            if isinstance(value, dict | list):
                walk(value, (*path, key), ours)

    walk(json.loads(text), (), ())
    return list(kinds.values())


def token_numbers(folder):
    child = tokenizer.PARSER  # answers many cases, within the limits of a case
    child.close, child._seconds, child._memory = lambda: None, SECONDS, MEMORY
    header = header_of(folder)

    def parse(data):
        files = json.loads(data)
        shutil.rmtree(cache_folder() / "tokenizers", ignore_errors=True)
        try:
            return lawful(lambda: use(files, header, folder))
        except ValueError:  # of the child that makes a tokenizer.json of a tiktoken.model
            if "tiktoken.model" not in files:
                raise
            return False

    return [*corpus(folder / "checkpoint", header)], parse, changed_number


def header_of(folder):
    few_words(folder / "checkpoint")
    return read_header(write_gguf(folder / "checkpoint", folder / "model.gguf"))


def corpus(checkpoint, header):
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    files = {name: json.loads((checkpoint / name).read_text()) for name in names}
    yield files
    own = files["tokenizer.json"] | SIZED
    yield files | {"tokenizer.json": own}
    for kind, model in MODELS.items():
        other = {"model": {"type": kind, **model}, "decoder": STRIP, "pre_tokenizer": SPLIT}
        yield files | {"tokenizer.json": {**own, "added_tokens": [], "normalizer": None, **other}}
    words = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b"the"]
    ranks = [[base64.b64encode(word).decode(), rank] for rank, word in enumerate(words)]
    settings = {"tokenizer_class": "TikTokenTokenizer"}
    settings["added_tokens_decoder"] = {"260": {"content": "[BOS]", "special": True}}
    tiktoken = {"tokenizer_config.json": settings, "tiktoken.model": ranks}
    yield {name: files[name] for name in names[2:]} | tiktoken
    yield {"metadata": header.metadata}


def read_of(files, header):
    """The model's small files, see ``slotmoe.jsonfile``."""
    if "metadata" in files:
        return metadata_files(replace(header, metadata=files["metadata"]))
    contents = {name: json.dumps(values).encode() for name, values in files.items()}
    if "tiktoken.model" in files:
        lines = "\n".join(f"{word} {rank}" for word, rank in files["tiktoken.model"]).encode()
        contents["tokenizer.json"] = tokenizer_json(lines, files["tokenizer_config.json"])
    return lambda name, limit: contents.get(name)


def use(files, header, folder):
    """What opens a model and begins to answer reads, encodes, writes, and holds to a schema."""
    read = read_of(files, header)
    config = config_among(read, folder)
    ends = generation_of(config, read, folder).eos_token_ids
    opened = open_tokenizer(config, read, folder)
    ids = opened.encode(TEXT)
    opened.decode(ids)
    stream = TextStream(opened)
    for id_ in (*ids, 0, opened.size - 1):
        stream.push(id_)
        opened.token_bytes(id_)
    stream.flush()
    with suppress(RefusedError):
        grammar = Grammars(opened, ends, Dialect(opened)).compile(SCHEMA)
        grammar.allowed()

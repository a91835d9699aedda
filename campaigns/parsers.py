"""What the fuzzer attacks: for each parser of a stranger's bytes, good inputs and a function that
parses one and returns whether it was accepted.  Each runs in a process that is given up after."""

import asyncio
import base64
import ctypes
import json
import shutil
import threading
from contextlib import closing, suppress
from types import SimpleNamespace

import xxhash
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

from campaigns.fuzz import MEMORY, SECONDS
from campaigns.models import few_words, tiny_export
from slotmoe.errors import SlotmoeError
from slotmoe.jsonfile import Json, parse_json
from slotmoe.model import tokenizer
from slotmoe.model.chat import render_chat
from slotmoe.model.checkpoint.gguf_header import read_header
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import config_among, parse_config
from slotmoe.model.generate import TextStream
from slotmoe.model.sampling import Sampling
from slotmoe.model.tiktoken import tokenizer_json
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.machine import cache_folder
from slotmoe.offload.model_source import generation_of, open_tokenizer
from slotmoe.offload.plan.advice import GEOMETRIES, geometry_path
from slotmoe.offload.runtime import Runtime
from slotmoe.offload.sessions.blocks import BlockFolder, TokenBlock, chain
from slotmoe.offload.sessions.names import NamedSession, Saved, listing
from slotmoe.quant.export.layout import checksum, tensor_parts
from slotmoe.quant.export.manifest import manifest_checksum
from slotmoe.quant.export.reader import Export
from slotmoe.quant.export.writer import span_checksums
from slotmoe.tools.chat.conversation import Dialogue
from slotmoe.tools.serve import anthropic, ollama, openai, responses
from slotmoe.tools.serve.errors import RefusedError, error_response
from slotmoe.tools.serve.function_calling import Dialect
from slotmoe.tools.serve.grammar import Grammars
from slotmoe.tools.serve.guard import check
from slotmoe.tools.serve.requests import Rule
from tests.support import apis
from tests.support.disk import per_token
from tests.support.gguf import write_gguf
from tests.support.served import ANTHROPIC_TOOL, TOOLS, USER

M_ARENA_MAX = -8  # of mallopt
PROMPT = [1, 2, 3, 2, 1]
TEXT = "Hello, w\u00f6rld \u4f60\u597d 12"
# What few tokenizers have, with numbers of its own.
SIZED = {
    "truncation": {"direction": "Right", "max_length": 9, "strategy": "LongestFirst", "stride": 0},
    "padding": {
        **{"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": 8, "pad_id": 0},
        **{"pad_type_id": 0, "pad_token": "a"},
    },
}
PIECES = {word: id_ for id_, word in enumerate(["[UNK]", "a", "b", "##b", "Hello", ",", "ab"])}
KINDS = {
    "Unigram": {"unk_id": 0, "vocab": [[word, -float(id_)] for word, id_ in PIECES.items()]},
    "WordPiece": {
        **{"unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": PIECES},
        "max_input_chars_per_word": 100,
    },
    "WordLevel": {"unk_token": "[UNK]", "vocab": PIECES},
}
OTHERS = {
    "added_tokens": [],
    "normalizer": None,
    "decoder": {"type": "Strip", "content": "_", "start": 1, "stop": 1},
    "pre_tokenizer": {"type": "WhitespaceSplit"},
}


def lawful(action):
    """Whether ``action`` went well; errors of ours are lawful, if they are one line."""
    try:
        action()
    except SlotmoeError as problem:
        if not str(problem).isprintable() or len(str(problem)) > 1000:
            raise ValueError("not one line for people") from problem
        return False
    return True


def in_file(path, good, read, end=b""):
    """A parser whose input is a file's bytes, before ``end``."""

    def parse(data):
        path.write_bytes(data + end)
        return lawful(read)

    return [good], parse


def signed(sign, values):
    """JSON with the right checksum, as someone with bad intentions would write it, or the bytes as
    they are where that can't be."""
    with suppress(ValueError, AttributeError, TypeError, RecursionError):
        return sign(json.loads(values))
    return values


def sign_manifest(values):
    return json.dumps({**values, "checksum": manifest_checksum(values)}).encode()


def config(folder):
    corpus = [json.loads(geometry_path(name).read_text()) for name in GEOMETRIES]
    path = folder / "config.json"
    return corpus, lambda data: lawful(lambda: parse_config(parse_json(data, path, Json)))


def in_checkpoint(folder, name, read):
    """One file of a tiny checkpoint is replaced, and the checkpoint is opened."""
    place = folder / "checkpoint"
    few_words(place, shards=2 if name.endswith("index.json") else 1)
    data = (place / name).read_bytes()
    good = json.loads(data) if name.endswith("json") else data
    return in_file(place / name, good, lambda: read(place))


def opened(place):
    with open_checkpoint(place) as checkpoint:
        list(checkpoint.headers())


def tokenizers(folder):
    """The files of a model's tokenizer by name: what opens a model and begins to answer reads,
    encodes, writes, and holds to a schema."""
    child = tokenizer.PARSER  # answers many cases, within the limits of a case
    child.close, child._seconds, child._memory = lambda: None, SECONDS, MEMORY
    few_words(folder / "checkpoint")
    schema = Rule("json", {"type": "object"})

    def use(files):
        contents = {name: json.dumps(values).encode() for name, values in files.items()}

        def read(name, limit):
            return contents.get(name)

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
            grammar = Grammars(opened, ends, Dialect(opened)).compile(schema)()
            grammar.allowed()

    def parse(data):
        shutil.rmtree(cache_folder() / "tokenizers", ignore_errors=True)
        try:
            files = json.loads(data)
        except (ValueError, RecursionError):
            return False
        return isinstance(files, dict) and lawful(lambda: use(files))

    return [*tokenizer_files(folder / "checkpoint")], parse


def tokenizer_files(checkpoint):
    names = ("tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json")
    files = {name: json.loads((checkpoint / name).read_text()) for name in names}
    own = files["tokenizer.json"] | SIZED
    yield from (files, files | {"tokenizer.json": own})
    for kind, model in KINDS.items():
        yield files | {"tokenizer.json": own | OTHERS | {"model": {"type": kind, **model}}}


def templated(place):
    tokenizer = Tokenizer(place, 0, verdicts=place / "verdicts")
    render_chat(tokenizer, [{"role": "user", "content": "hi"}])


def manifest(folder):
    export = tiny_export(folder)
    path = export / "slotmoe.json"

    def read():
        with Export.open(export) as opened:
            opened.resident("model.norm.weight")

    good, parse = in_file(path, json.loads(path.read_bytes()), read)
    return good, lambda data: parse(signed(sign_manifest, data))


def sign_session(values):
    values.pop("checksum", None)
    digest = checksum(json.dumps(values, sort_keys=True).encode())
    return json.dumps({**values, "checksum": digest}).encode()


def session(folder):
    """A named session whose checksum is right, for a model whose template does nothing."""
    words = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), list(range(70)), "chat", words))

    tokenizer = SimpleNamespace(chat=json.dumps, encode=list)
    runtime = SimpleNamespace(tokenizer=tokenizer, check_length=lambda length: None)

    def read():
        listing(folder)
        with NamedSession(folder, "plans") as session:
            Dialogue(runtime, 5, Sampling(), session=session)
            list(chain(session.saved.root, session.saved.tokens))

    good, parse = in_file(session.path, json.loads(session.path.read_bytes()), read)
    return good, lambda data: parse(signed(sign_session, data))


# By path: what reads the body of a request, and what it comes to.
READERS = {
    apis.CHAT: (openai.ChatRequest, lambda body: body.conversation(body.wanted)),
    "/v1/completions": (openai.CompletionRequest, lambda body: body.options(300)),
    apis.RESPONSES: (responses.ResponsesRequest, lambda body: (body.chat(), body.options())),
    apis.MESSAGES: (anthropic.MessagesRequest, lambda body: (body.chat(), body.options())),
    apis.OLLAMA: (ollama.OllamaChatRequest, lambda body: body.messages and body.chat()),
}
CALL = {"id": "x", "function": {"name": "f", "arguments": "{}"}}
USE = {"type": "tool_use", "id": "x", "name": "f", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "x", "content": [{"type": "image"}]}
TURNS = [{"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT]}]
ITEM = {"type": "custom_tool_call", "call_id": "x", "name": "f", "input": "a"}
BODIES = [
    {"messages": [{"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS, "stop": ["a"]},
    {"input": [ITEM], "tools": [{"type": "namespace", "name": "n", "tools": [apis.TOOL]}]},
    {"messages": TURNS, "tools": [ANTHROPIC_TOOL], "system": "b", "max_tokens": 5},
    {"prompt": [[1], [2]], "logit_bias": {"7": -1.5}, "stop": ["a"]},
    {"model": "x", "messages": USER, "format": {"type": "object"}, "options": {"seed": 7}},
]


def request(folder):
    """The body of a request as each API reads it, and the refusal that a client gets."""

    def accepts(path, kind, read, values):
        try:
            read(kind.model_validate(values))
            return True
        except ValidationError as found:
            errors = [{**error, "loc": ("body", *error["loc"])} for error in found.errors()]
            problem = RequestValidationError(errors, body=values)
        except RefusedError as refused:
            problem = refused
        asked = SimpleNamespace(url=SimpleNamespace(path=path))
        assert json.loads(asyncio.run(error_response(asked, problem)).body)["error"]
        return False

    def parse(data):
        try:
            check(data)
        except RefusedError:
            return False
        values = json.loads(data.decode("utf-8-sig")) if data else {}
        return any({path: accepts(path, *READERS[path], values) for path in READERS}.values())

    return BODIES, parse


def block(folder):
    """A file of latents whose checksum is right: it is what its name says, or dropped."""
    remarks, tokens = [], list(range(20))
    store = BlockFolder(folder / "blocks", 1 << 20, remarks.append)
    store.add(
        [TokenBlock(bytes(16), 0, tokens)], per_token(24), lambda block: memoryview(bytes(24 * 20))
    )
    (path,) = (folder / "blocks" / "00").iterdir()

    def parse(data):
        path.write_bytes(data[:-16] + xxhash.xxh3_128_digest(data[:-16]))
        found = (
            store.read(TokenBlock(bytes(16), 0, tokens[:9]), per_token(24)),
            store.read(TokenBlock(bytes(16), 0, tokens), per_token(24)),
        )
        for read in filter(None, found):
            assert read[0].tokens == tokens and len(read[1]) == 24 * len(tokens)
        assert all(remark.isprintable() for remark in remarks)
        remarks.clear()
        return found[1] is not None

    return [path.read_bytes()], parse


def tiktoken(folder):
    words = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b"the"]
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words)]
    added = {"300": {"content": "[BOS]", "special": True}}
    settings = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added}

    def parse(data):
        try:
            tokenizer_json(data, settings)
        except ValueError:
            return False
        return True

    return [b"\n".join(lines)], parse


def gguf(folder):
    few_words(folder / "checkpoint")
    path = write_gguf(folder / "checkpoint", folder / "model.gguf")
    data, size = path.read_bytes(), read_header(path).length

    def read():
        with closing(open_checkpoint(path)) as checkpoint:
            checkpoint.small_file("tokenizer.json", 1 << 24)

    return in_file(path, data[:size], read, end=data[size:])


def weights(folder, pattern):
    """The bytes behind the header of the file that ``pattern`` finds: weights that say anything,
    under right checksums, of a model that answers."""
    threading.stack_size(1 << 20)  # the limit is of addresses, and a thread takes many: for its
    ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)  # stack, and for a heap of its own
    export = tiny_export(folder)
    (path,) = export.glob(pattern)
    manifest = json.loads((export / "slotmoe.json").read_bytes())
    entry = manifest["files"][str(path.relative_to(export))]
    good, start = path.read_bytes(), entry["header_bytes"]
    records = entry.get("records", [])
    size = (len(good) - start) // max(len(records), 1)
    spans = [(start + at * size, start + (at + 1) * size) for at in range(len(records))]
    parts = tensor_parts(entry) if "tensors" in entry else {}
    spans += [part.span(start) for part in parts.values()]

    def answer():
        with Runtime.open(export, context=32, ram="1GiB", threads=1) as runtime:
            list(runtime.generate(PROMPT, 2))

    def parse(data):
        path.write_bytes(good[:start] + (data + good[start + len(data) :])[: len(good) - start])
        entry["checksum"], sums = span_checksums(path, spans)
        records[:] = sums[: len(records)]
        for name, digest in zip(parts, sums[len(records) :], strict=True):
            entry["tensors"][name]["checksum"] = digest
        (export / "slotmoe.json").write_bytes(sign_manifest(manifest))
        return lawful(answer)

    return [good[start:]], parse


PARSERS = {
    "config": config,
    "index": lambda at: in_checkpoint(at, "model.safetensors.index.json", opened),
    "header": lambda at: in_checkpoint(at, "model.safetensors", opened),
    "manifest": manifest,
    "gguf": gguf,
    "resident": lambda at: weights(at, "resident.safetensors"),
    "experts": lambda at: weights(at, "experts/layer-00001.safetensors"),
    "session": session,
    "block": block,
    "tiktoken": tiktoken,
    "tokenizer": tokenizers,
    "request": request,
    "template": lambda at: in_checkpoint(at, "tokenizer_config.json", templated),
}

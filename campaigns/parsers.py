"""What the fuzzer attacks: for each parser of a stranger's bytes, good inputs and a function that
parses one and returns whether it was accepted.  Each runs in a process that is given up after."""

import base64
import json
from contextlib import closing
from types import SimpleNamespace

import xxhash

from campaigns.cases import in_file, lawful, sign_manifest, signed
from campaigns.models import few_words, tiny_export
from campaigns.requests import REQUESTS, request, schemas
from campaigns.token_numbers import token_numbers
from campaigns.weights import body
from slotmoe.jsonfile import Json, parse_json
from slotmoe.model import tokenizer
from slotmoe.model.checkpoint.gguf_header import read_header
from slotmoe.model.checkpoint.reader import open_checkpoint
from slotmoe.model.config import parse_config
from slotmoe.model.generate import Sampling
from slotmoe.model.tiktoken import tokenizer_json
from slotmoe.model.tokenizer import Tokenizer
from slotmoe.offload.plan.advice import GEOMETRIES, geometry_path
from slotmoe.offload.sessions.blocks import Block, BlockFolder, chain
from slotmoe.offload.sessions.names import NamedSession, Saved, listing
from slotmoe.quant.export.layout import checksum
from slotmoe.quant.export.reader import Export
from slotmoe.tools.chat.conversation import Dialogue
from tests.support.blocks import per_token
from tests.support.gguf import write_gguf


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


def tokenizer_file(folder):
    tokenizer.PARSER.close = lambda: None  # a process for each case takes a thousand times as long
    return in_checkpoint(folder, "tokenizer.json", tokenized)


def tokenized(place):
    made = Tokenizer(place, 0)
    made.decode(made.encode("Hello, w\u00f6rld \u4f60\u597d"))


def templated(place):
    Tokenizer(place, 0, verdicts=place / "verdicts").chat([{"role": "user", "content": "hi"}])


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
    """A named session whose checksum is right."""
    words = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), list(range(70)), "chat", words))

    def read():
        listing(folder)
        with NamedSession(folder, "plans") as session:
            conversation(session)
            assert session.saved is not None
            list(chain(session.saved.root, session.saved.tokens))

    good, parse = in_file(session.path, json.loads(session.path.read_bytes()), read)
    return good, lambda data: parse(signed(sign_session, data))


def conversation(session=None):
    """With a model whose template and tokenizer do nothing."""
    tokenizer = SimpleNamespace(chat=json.dumps, encode=list)
    runtime = SimpleNamespace(tokenizer=tokenizer, check_length=lambda length: None)
    return Dialogue(runtime, 5, Sampling(), session=session)


def saved_chat(folder):
    path, messages = folder / "talk.json", [{"role": "system", "content": "Be brief."}]
    for number in "12":
        messages.append({"role": "user", "content": f"Hello {number}"})
        messages.append({"role": "assistant", "content": "Hi"})
    return in_file(path, {"messages": messages}, lambda: conversation().load(path))


def block(folder):
    """A file of latents whose checksum is right: it is what its name says, or dropped."""
    remarks, tokens = [], list(range(20))
    store = BlockFolder(folder / "blocks", 1 << 20, remarks.append)
    store.add(
        [Block(bytes(16), 0, tokens)], per_token(24), lambda block: memoryview(bytes(24 * 20))
    )
    (path,) = (folder / "blocks" / "00").iterdir()

    def parse(data):
        path.write_bytes(data[:-16] + xxhash.xxh3_128_digest(data[:-16]))
        found = (
            store.read(Block(bytes(16), 0, tokens[:9]), per_token(24)),
            store.read(Block(bytes(16), 0, tokens), per_token(24)),
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


PARSERS = {
    "config": config,
    "index": lambda at: in_checkpoint(at, "model.safetensors.index.json", opened),
    "header": lambda at: in_checkpoint(at, "model.safetensors", opened),
    "manifest": manifest,
    "gguf": gguf,
    "resident": lambda at: body(at, "resident.safetensors"),
    "experts": lambda at: body(at, "experts/layer-00001.safetensors"),
    "session": session,
    "block": block,
    "saved-chat": saved_chat,
    "tiktoken": tiktoken,
    **{f"body-{name}": lambda at, name=name: request(name) for name in REQUESTS},
    "schemas": schemas,
    "tokenizer": tokenizer_file,
    "token-numbers": token_numbers,
    "template": lambda at: in_checkpoint(at, "tokenizer_config.json", templated),
}

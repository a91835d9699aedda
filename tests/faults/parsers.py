"""What the fuzzer attacks: for each parser of a stranger's bytes, good inputs and a function that
parses one.  It returns whether the input was accepted."""

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.faults.bodies import REQUESTS, Parser, request, schemas
from tests.faults.fork_server import forked_children

SLOW = ("tokenizer", "template", "resident", "experts", "predictor")  # 20 to 80 cases a second


def lawful(action: Callable[[], object]) -> bool:
    """Whether ``action`` went well; errors of ours are lawful, if they are one line."""
    from slotmoe.errors import SlotmoeError

    try:
        action()
    except SlotmoeError as problem:
        if not str(problem).isprintable() or len(str(problem)) > 1000:
            raise ValueError("not one line for people") from problem
        return False
    return True


def import_all() -> None:
    """Once, and not in every child."""
    import slotmoe.offload.ingest.quantize
    import slotmoe.offload.runtime
    import slotmoe.tools.chat.conversation
    import slotmoe.tools.serve.app
    import slotmoe.tools.serve.grammar  # noqa: F401


@contextmanager
def _config(folder: Path) -> Iterator[Parser]:
    from slotmoe.jsonfile import parse_json
    from slotmoe.model.config import parse_config
    from slotmoe.offload.plan.advice import GEOMETRIES, geometry_path

    corpus = [json.loads((geometry_path(name)).read_text()) for name in GEOMETRIES]
    path = folder / "config.json"
    yield corpus, lambda data: lawful(lambda: parse_config(parse_json(data, path)))


def _checkpoint(folder: Path, shards: int = 1, layers: int = 2, words: int = 300) -> None:
    """A tiny one whose tokenizer has few ``words``: what is large is read, not understood."""
    from tests.support.tiny import SMALL, write_checkpoint

    sizes = {**SMALL, "num_hidden_layers": layers, "vocab_size": words}
    write_checkpoint(folder, shards, **sizes)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_bytes())
    model = tokenizer["model"]
    model["vocab"] = {word: id_ for word, id_ in model["vocab"].items() if id_ < words}
    pairs = (pair if isinstance(pair, list) else pair.split() for pair in model["merges"])
    model["merges"] = [list(pair) for pair in pairs if "".join(pair) in model["vocab"]]
    path.write_text(json.dumps(tokenizer))


@contextmanager
def _in_folder(folder: Path, name: str, is_json: bool, read: Any) -> Iterator[Parser]:
    """One file of a tiny checkpoint is replaced, and the checkpoint is opened."""
    place = folder / name
    _checkpoint(place, shards=2 if name.endswith("index.json") else 1)
    path = place / name
    data = path.read_bytes()

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        return lawful(lambda: read(place))

    yield [json.loads(data) if is_json else data], parse


@contextmanager
def _in_child(folder: Path, name: str, read: Any) -> Iterator[Parser]:
    """As ``_in_folder``, of JSON that is read by a child first."""
    with forked_children(folder), _in_folder(folder, name, True, read) as parser:
        yield parser


def _opened(place: Path) -> None:
    from slotmoe.model.checkpoint import Checkpoint

    with Checkpoint.open(place) as checkpoint:
        list(checkpoint.headers())


def _tokenizer(place: Path) -> None:
    from slotmoe.model.tokenizer import Tokenizer

    tokenizer = Tokenizer(place, 0)
    tokenizer.decode(tokenizer.encode("Hello, w\u00f6rld \u4f60\u597d"))


def _chat(place: Path) -> None:
    from slotmoe.model.tokenizer import Tokenizer

    Tokenizer(place, 0, verdicts=place / "verdicts").chat([{"role": "user", "content": "hi"}])


def make_export(folder: Path) -> Path:
    """A tiny one, with a predictor."""
    from slotmoe.offload.ingest.quantize import quantize
    from slotmoe.quant.export.writer import write_predictor
    from tests.support.predictor import random_tensors
    from tests.support.tiny import SMALL

    _checkpoint(folder / "checkpoint", layers=3)
    quantize(folder / "checkpoint", folder / "export", workers=1)
    tensors = random_tensors(0, SMALL["n_routed_experts"], SMALL["hidden_size"])
    write_predictor(folder / "export", tensors)
    return folder / "export"


def _sign(folder: Path, values: Any) -> bytes:
    """A manifest with the right checksum, as someone with bad intentions would write it."""
    from slotmoe.quant.export.validate import manifest_checksum

    values["checksum"] = manifest_checksum(values)
    data = json.dumps(values).encode()
    (folder / "slotmoe.json").write_bytes(data)
    return data


@contextmanager
def _manifest(folder: Path) -> Iterator[Parser]:
    from slotmoe.quant.export.reader import Export

    export = make_export(folder)
    path = export / "slotmoe.json"

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        with suppress(ValueError, TypeError, AttributeError, RecursionError):
            _sign(export, json.loads(data))

        def read() -> None:
            with Export.open(export) as opened:
                opened.resident("model.norm.weight")
                opened.predictor()

        return lawful(read)

    yield [json.loads(path.read_bytes())], parse


@contextmanager
def _body(folder: Path, file: str) -> Iterator[Parser]:
    """Tensors or records with right checksums, which a model is opened with and computes from."""
    from slotmoe.offload.runtime import Runtime
    from slotmoe.quant.export.layout import tensor_parts
    from slotmoe.quant.export.reader import Export
    from slotmoe.quant.export.verify import span_checksums

    export = make_export(folder)
    (path,) = export.glob(file)
    manifest = json.loads((export / "slotmoe.json").read_bytes())
    entry = manifest["files"][str(path.relative_to(export))]
    with Export.open(export) as opened:
        size = opened.layout.record_bytes
    good, start = path.read_bytes(), entry["header_bytes"]
    if "records" in entry:
        names = [*range(len(entry["records"]))]
        spans = [(start + number * size, start + (number + 1) * size) for number in names]
    else:
        parts = tensor_parts(entry)
        names, spans = [*parts], [part.span(start) for part in parts.values()]

    def parse(data: bytes) -> bool:
        data = (data + good[start + len(data) :])[: len(good) - start]
        path.write_bytes(good[:start] + data)
        entry["checksum"], sums = span_checksums(path, spans)
        for name, digest in zip(names, sums, strict=True):
            if "records" in entry:
                entry["records"][name] = digest
            else:
                entry["tensors"][name]["checksum"] = digest
        _sign(export, manifest)

        def compute() -> None:
            with Runtime.open(export, context=32, ram="1GiB", threads=1) as runtime:
                list(runtime.generate([1, 2, 3], 2))

        return lawful(compute)

    yield [good[start:]], parse


@contextmanager
def _session(folder: Path) -> Iterator[Parser]:
    """A named session whose checksum is right."""
    from slotmoe.offload.sessions.blocks import chain
    from slotmoe.offload.sessions.names import NamedSession, Saved, listing
    from slotmoe.quant.export.layout import checksum

    words = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    with NamedSession(folder, "plans") as session:
        session.save(Saved(bytes(16), list(range(70)), "chat", words))
    path = session.path

    def parse(data: bytes) -> bool:
        with suppress(ValueError, AttributeError, TypeError, RecursionError):
            values = json.loads(data)
            values.pop("checksum", None)
            digest = checksum(json.dumps(values, sort_keys=True).encode())
            data = json.dumps({**values, "checksum": digest}).encode()
        path.write_bytes(data)

        def read() -> None:
            listing(folder)
            with NamedSession(folder, "plans") as session:
                _go_on(session)
                assert session.saved is not None
                list(chain(session.saved.root, session.saved.tokens))

        return lawful(read)

    yield [json.loads(path.read_bytes())], parse


def _go_on(session: Any = None) -> Any:
    """A conversation, with a model whose template and tokenizer do nothing."""
    from slotmoe.model.generate import Sampling
    from slotmoe.tools.chat.conversation import Conversation

    tokenizer = SimpleNamespace(chat=json.dumps, encode=list)
    runtime: Any = SimpleNamespace(tokenizer=tokenizer, check_length=lambda length: None)
    return Conversation(runtime, 5, Sampling(), session=session)


@contextmanager
def _saved_chat(folder: Path) -> Iterator[Parser]:
    path = folder / "talk.json"
    good = {"messages": [{"role": "system", "content": "Be brief."}]}
    for number in "12":
        good["messages"].append({"role": "user", "content": f"Hello {number}"})
        good["messages"].append({"role": "assistant", "content": "Hi"})

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        return lawful(lambda: _go_on().load(path))

    yield [good], parse


@contextmanager
def _block(folder: Path) -> Iterator[Parser]:
    """A file of latents whose checksum is right: it is what its name says, or dropped."""
    import xxhash

    from slotmoe.offload.sessions.blocks import Block, BlockFolder

    remarks, tokens = list[str](), list(range(20))
    store = BlockFolder(folder / "blocks", 1 << 20, remarks.append)
    block = Block(bytes(16), 0, tokens)
    store.add([block], 24, lambda block: memoryview(bytes(24 * len(block.tokens))))
    (path,) = (folder / "blocks" / "00").iterdir()
    good = path.read_bytes()

    def parse(data: bytes) -> bool:
        path.write_bytes(data[:-16] + xxhash.xxh3_128_digest(data[:-16]))
        found = store.read(bytes(16), 0, tokens[:9], 24), store.read(bytes(16), 0, tokens, 24)
        for read in filter(None, found):
            assert read[0].tokens == tokens and len(read[1]) == 24 * len(tokens)
        assert all(remark.isprintable() for remark in remarks)
        remarks.clear()
        return found[1] is not None

    yield [good], parse


@contextmanager
def _tiktoken(folder: Path) -> Iterator[Parser]:
    from slotmoe.model.tiktoken import tokenizer_json

    words = [*(bytes([byte]) for byte in range(256)), b"th", b"he", b"the"]
    lines = [base64.b64encode(word) + b" %d" % rank for rank, word in enumerate(words)]
    added = {"300": {"content": "[BOS]", "special": True}}
    settings = {"tokenizer_class": "TikTokenTokenizer", "added_tokens_decoder": added}

    def parse(data: bytes) -> bool:
        try:
            tokenizer_json(data, settings)
        except ValueError:
            return False
        return True

    yield [b"\n".join(lines)], parse


@contextmanager
def _gguf(folder: Path) -> Iterator[Parser]:
    from slotmoe.model.gguf.checkpoint import open_checkpoint
    from slotmoe.model.gguf.header import read_header
    from tests.support.gguf import write_gguf

    _checkpoint(folder / "checkpoint")
    path = write_gguf(folder / "checkpoint", folder / "model.gguf")
    data = path.read_bytes()
    start, rest = data[: len(read_header(path).data)], data[len(read_header(path).data) :]

    def parse(data: bytes) -> bool:
        path.write_bytes(data + rest)

        def read() -> None:
            with closing(open_checkpoint(path)) as checkpoint:
                checkpoint.small_file("tokenizer.json", 1 << 24)

        return lawful(read)

    yield [start], parse


@contextmanager
def _trace(folder: Path) -> Iterator[Parser]:
    from slotmoe.offload.observe.trace import read_trace

    keys = {"layers": [1, 2], "n_routed_experts": 8, "num_experts_per_tok": 2}
    header = {"format": "slotmoe-trace", "version": 2, **keys}
    step = (3).to_bytes(4, "little") + bytes([0, 0, 5, 0] * 6) + bytes(2 * 256) * 6
    path = folder / "trace"

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        return lawful(lambda: read_trace(path))

    yield [json.dumps(header).encode() + b"\n" + step * 4], parse


PARSERS: dict[str, Any] = {
    "config": _config,
    "index": lambda at: _in_folder(at, "model.safetensors.index.json", True, _opened),
    "header": lambda at: _in_folder(at, "model.safetensors", False, _opened),
    "manifest": _manifest,
    "gguf": _gguf,
    "trace": _trace,
    "resident": lambda at: _body(at, "resident.safetensors"),
    "experts": lambda at: _body(at, "experts/layer-00001.safetensors"),
    "predictor": lambda at: _body(at, "predictor-*"),
    "session": _session,
    "block": _block,
    "saved-chat": _saved_chat,
    "tiktoken": _tiktoken,
    **{f"body-{name}": lambda at, name=name: request(name) for name in REQUESTS},
    "schemas": schemas,
    "tokenizer": lambda at: _in_child(at, "tokenizer.json", _tokenizer),
    "template": lambda at: _in_child(at, "tokenizer_config.json", _chat),
}

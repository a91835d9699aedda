"""Mutated bytes for every parser that sees a stranger's.  ``python -m tests.faults.fuzz`` runs it.

Each parser gets good inputs that were changed in a few places, JSON as values and the rest as
bytes.  It must return or raise an error of ours, within 2 seconds of CPU and 200 MB.  It runs in a
forked child, so that a crash is found too; the case that did it is kept.
"""

import argparse
import copy
import json
import os
import random
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.support.disk import forked

SECONDS, MEMORY = 2, 200 << 20
HANGS = 30  # seconds of wall time after which a case is given up
PROCESSES = ("tokenizer", "template")  # a case of these starts one
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 255, 1 << 31, 1 << 63, 1 << 64, 10**40, -(10**40)),
    *(0.0, -0.5, 1e-320, 1e308, "", "a", "\0", "é", "\ud800", "../x", "/etc/passwd", "9" * 5000),
    *([], {}, [[]], [{}], {"": {}}, [0] * 3000, [[[[[[[[]]]]]]]]),
]


def changed_value(value: Any, generator: random.Random) -> Any:
    """JSON with one to three changes: another value, one less, one doubled, or two exchanged."""
    value = {"": copy.deepcopy(value)}
    for _ in range(generator.randint(1, 3)):
        places = list(_places(value))
        inside, key = generator.choice(places)
        other, other_key = generator.choice(places)
        match generator.randrange(5):
            case 0 if inside is not value:
                del inside[key]
            case 1 if isinstance(inside, dict) and inside is not value:
                name = generator.choice(("", "x" * 300, "é", f"{key}_", f"{other_key}"))
                inside[name] = copy.deepcopy(inside[key])
            case 2:
                inside[key] = copy.deepcopy(other[other_key])
            case 3 if type(inside[key]) is int:
                inside[key] += generator.choice((-1, 1, 7, 1 << 20))
            case _:
                inside[key] = copy.deepcopy(generator.choice(ODD))
    return value.get("")


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(items):
        yield value, key
        if isinstance(inner, dict | list):
            yield from _places(inner)


def changed_bytes(data: bytes, generator: random.Random) -> bytes:
    """One to four changes, most of them near the beginning."""
    changed = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        reach = generator.choice((16, 256, len(changed)))
        at = generator.randrange(max(min(len(changed), reach), 1))
        match generator.randrange(5):
            case 0:
                changed[at : at + 1] = bytes([generator.randrange(256)])
            case 1:
                number = generator.choice((0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1))
                changed[at : at + 8] = number.to_bytes(8, "little")
            case 2:
                del changed[at : at + generator.choice((1, 8, 1 << 20))]
            case 3:
                start = generator.randrange(len(changed) + 1)
                changed[at:at] = changed[start : start + generator.choice((1, 8, 64))]
            case _:
                changed[at : at + 1] = generator.choice((b"{", b"[" * 2000, b'"', b",", b"\xff"))
    return bytes(changed)


def mutated(good: Any, generator: random.Random) -> bytes:
    """One case: of bytes, or of a JSON value, whose text is damaged now and then too."""
    if isinstance(good, bytes):
        return changed_bytes(good, generator)
    data = json.dumps(changed_value(good, generator)).encode()
    return changed_bytes(data, generator) if generator.random() < 0.1 else data


def run(name: str, folder: Path, seconds: float, seed: int, most: int = 1 << 60) -> dict[str, Any]:
    """Fuzz one parser: how many ``cases``, how many of them were ``refused``, and the ``problem``
    that ended it, whose input is ``folder/case``."""
    report, case = folder / "report.json", folder / "case"
    report.unlink(missing_ok=True)

    def attack() -> None:
        with PARSERS[name](folder) as (corpus, parse):
            found = _attack(corpus, parse, case, seconds, random.Random(f"{name} {seed}"), most)
        report.write_text(json.dumps(found))
        os._exit(0)

    code = os.waitstatus_to_exitcode(forked(attack))
    if report.exists():
        return dict(json.loads(report.read_text()))
    return {"cases": 0, "refused": 0, "problem": f"the process ended with {code}"}


def _attack(
    corpus: list[Any],
    parse: Callable[[bytes], object],
    case: Path,
    seconds: float,
    generator: random.Random,
    most: int,
) -> dict[str, Any]:
    for good in corpus:  # which also imports what is imported late
        data = good if isinstance(good, bytes) else json.dumps(good).encode()
        case.write_bytes(data)
        assert parse(data) is not False, "the good input is refused"
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    found = {"cases": 0, "refused": 0, "problem": ""}
    end = time.monotonic() + seconds
    while time.monotonic() < end and found["cases"] < most:
        data = mutated(generator.choice(corpus), generator)
        case.write_bytes(data)
        signal.alarm(HANGS)
        started = time.process_time()
        try:
            found["refused"] += not parse(data)
        except BaseException as problem:
            found["problem"] = repr(problem)[:300]
        took = time.process_time() - started
        signal.alarm(0)
        found["cases"] += 1
        if took > SECONDS:
            found["problem"] = f"took {took:.1f} s of CPU"
        if found["problem"]:
            break
    return found


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


Parser = tuple[list[Any], Callable[[bytes], object]]


@contextmanager
def _config(folder: Path) -> Iterator[Parser]:
    from slotmoe.jsonfile import parse_json
    from slotmoe.model.config import parse_config
    from slotmoe.offload.plan.advice import GEOMETRIES, geometry_path

    corpus = [json.loads((geometry_path(name)).read_text()) for name in GEOMETRIES]
    path = folder / "config.json"
    yield corpus, lambda data: lawful(lambda: parse_config(parse_json(data, path)))


@contextmanager
def _in_folder(folder: Path, name: str, is_json: bool, read: Any) -> Iterator[Parser]:
    """One file of a tiny checkpoint is replaced, and the checkpoint is opened."""
    from tests.support.tiny import write_checkpoint

    place = folder / name
    write_checkpoint(place, shards=2 if name.endswith("index.json") else 1)
    path = place / name
    data = path.read_bytes()

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        return lawful(lambda: read(place))

    yield [json.loads(data) if is_json else data], parse


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


@contextmanager
def _manifest(folder: Path) -> Iterator[Parser]:
    """The checksum is made right again, as someone with bad intentions would."""
    from slotmoe.offload.ingest.quantize import quantize
    from slotmoe.quant.export.reader import Export
    from slotmoe.quant.export.validate import manifest_checksum
    from tests.support.tiny import write_checkpoint

    write_checkpoint(folder / "checkpoint")
    quantize(folder / "checkpoint", folder / "export", workers=1)
    path = folder / "export" / "slotmoe.json"
    good = json.loads(path.read_text())

    def parse(data: bytes) -> bool:
        try:
            values = json.loads(data)
            values["checksum"] = manifest_checksum(values)
            data = json.dumps(values).encode()
        except (ValueError, TypeError, AttributeError, RecursionError):
            pass
        path.write_bytes(data)

        def read() -> None:
            with Export.open(folder / "export") as export:
                export.resident("model.norm.weight")

        return lawful(read)

    yield [good], parse


@contextmanager
def _gguf(folder: Path) -> Iterator[Parser]:
    from slotmoe.model.gguf.checkpoint import open_checkpoint
    from slotmoe.model.gguf.header import read_header
    from tests.support.gguf import write_gguf
    from tests.support.tiny import write_checkpoint

    write_checkpoint(folder / "checkpoint")
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
    header = {"format": "slotmoe-trace", "version": 1, **keys}
    step = (3).to_bytes(4, "little") + bytes([0, 0, 5, 0] * 6)
    path = folder / "trace"

    def parse(data: bytes) -> bool:
        path.write_bytes(data)
        return lawful(lambda: read_trace(path))

    yield [json.dumps(header).encode() + b"\n" + step * 4], parse


BODY = {
    "model": "x",
    "messages": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
    ],
    "max_tokens": 5,
    "temperature": 0.5,
    "stop": ["x", "yy"],
    "logit_bias": {"5": -100},
    "stream": True,
    "stream_options": {"include_usage": True},
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "tool_choice": "auto",
    "response_format": {"type": "json_object"},
}


@contextmanager
def _bodies(folder: Path) -> Iterator[Parser]:
    from pydantic import ValidationError

    from slotmoe.tools.serve.anthropic import ContinuedRequest
    from slotmoe.tools.serve.bodies import check
    from slotmoe.tools.serve.errors import RefusedError
    from slotmoe.tools.serve.requests import ChatRequest

    def parse(data: bytes) -> bool:
        accepted = 0
        for kind in (ChatRequest, ContinuedRequest):
            try:
                check(data)
                kind.model_validate(json.loads(data.decode("utf-8-sig") or "{}"))
                accepted += 1
            except (RefusedError, ValidationError):
                pass
        return accepted > 0

    yield [BODY], parse


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,9}$", "maxLength": 9},
        "kind": {"enum": ["a", 1, None]},
        "list": {"type": "array", "items": {"$ref": "#/$defs/n"}, "minItems": 1, "maxItems": 3},
        "either": {"anyOf": [{"type": "number", "minimum": 0}, {"const": True}]},
    },
    "required": ["name"],
    "additionalProperties": False,
    "$defs": {"n": {"type": "integer", "multipleOf": 2}},
}


@contextmanager
def _schemas(folder: Path) -> Iterator[Parser]:
    from pydantic import ValidationError

    from slotmoe.model.tokenizer import Tokenizer
    from slotmoe.tools.serve.errors import RefusedError
    from slotmoe.tools.serve.grammar import Grammars
    from slotmoe.tools.serve.requests import Schema
    from tests.support.tiny import SAMPLE

    grammars = Grammars(Tokenizer(SAMPLE, 0), (0,), None)  # type: ignore[arg-type]

    def parse(data: bytes) -> bool:
        try:
            made = Schema.model_validate({"name": "x", "schema": json.loads(data)})
            grammars.compile(made, None)
        except (RefusedError, ValidationError, ValueError):
            return False
        return True

    yield [SCHEMA], parse


PARSERS: dict[str, Any] = {
    "config": _config,
    "index": lambda at: _in_folder(at, "model.safetensors.index.json", True, _opened),
    "header": lambda at: _in_folder(at, "model.safetensors", False, _opened),
    "manifest": _manifest,
    "gguf": _gguf,
    "trace": _trace,
    "bodies": _bodies,
    "schemas": _schemas,
    "tokenizer": lambda at: _in_folder(at, "tokenizer.json", True, _tokenizer),
    "template": lambda at: _in_folder(at, "tokenizer_config.json", True, _chat),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parsers", nargs="*", help=f"of {', '.join(PARSERS)}; all by default")
    parser.add_argument("--seconds", type=float, default=60, help="for each parser")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=1 << 60, help="at most, for each parser")
    parser.add_argument("--slow-cases", type=int, default=1 << 60, help=", ".join(PROCESSES))
    given = parser.parse_args()
    failed = False
    for name in given.parsers or PARSERS:
        with tempfile.TemporaryDirectory() as folder:
            most = given.slow_cases if name in PROCESSES else given.cases
            found = run(name, Path(folder), given.seconds, given.seed, most)
            if found["problem"]:
                failed = True
                kept = Path(tempfile.gettempdir()) / f"slotmoe-fuzz-{name}"
                kept.write_bytes((Path(folder) / "case").read_bytes())
                found["case"] = str(kept)
        print(json.dumps({"parser": name, **found}), flush=True)
    raise SystemExit(failed)


if __name__ == "__main__":
    main()

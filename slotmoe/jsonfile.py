"""A model's small files, which come from strangers: read within bounds, and JSON typed.

A checkpoint has its config, tokenizer and chat template in its folder, an export has their
checksums too, and those of a GGUF file are made of its metadata.  Whoever uses them gets a
``ReadFile`` and never a path, so that what a stranger puts beside an export is not read.

A type is whatever ``msgspec`` converts to: a ``Struct``, a dataclass, or an annotation.  An object
may have more keys than its type.
"""

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from slotmoe.errors import CheckpointError, ConfigError, SlotmoeError, reading
from slotmoe.system import open_file

T = TypeVar("T")
Json = dict[str, Any]  # an object as it comes in or goes out
ReadFile = Callable[[str, int], bytes | None]
"""``read(name, limit)``: the content of the file ``name``, None if the model has none.  Raises what
its source raises for a bad file, also for more than ``limit`` bytes."""
MAX_JSON_VALUES = 300_000  # V3 in nested NF4 has 270,000 tensors, Kimi K2 with scales 210,000
MAX_JSON_DEPTH = 32
_WORDS = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
_WORDS |= {NoneType: "null", list: "a list", tuple: "a list"}
_BEYOND = "far beyond what this file holds in a real model"


def read_file(path: Path, max_bytes: int, error: type[SlotmoeError] = ConfigError) -> bytes:
    """All of the regular file ``path``.  An ``error`` names another, or one over ``max_bytes``."""
    with reading(path, error):
        if path.exists() and not path.is_file():  # a pipe would block
            raise error(f"{path}: is not a regular file")
        with open(path, "rb", opener=open_file) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.read(min(size, max_bytes) + 1)  # so much memory is taken first
    if len(data) > max_bytes:
        raise error(f"{path}: more than {max_bytes} bytes, {_BEYOND}")
    return data


def files_in(folder: Path) -> ReadFile:
    """The files of a plain folder, as they are.  Raises ``ConfigError``."""

    def read(name: str, limit: int) -> bytes | None:
        path = folder / name
        return read_file(path, limit) if path.exists() else None

    return read


def inside(folder: Path, name: str) -> Path:
    """Path of a regular file in ``folder``; links may lead only to the hub cache's own blobs."""
    path = folder / name
    real, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent not in (home, blobs):
        problem = "is a link that leads out of the folder; copy the file itself here"
    elif not path.is_file():
        problem = "is missing or not a regular file; download the checkpoint again"
    else:
        return path
    raise CheckpointError(f"{path}: {problem}")


def read_json(
    path: Path, max_bytes: int, of: type[T], error: type[SlotmoeError] = ConfigError
) -> T:
    """``parse_json`` of the file ``path``, which may have ``max_bytes``."""
    return parse_json(read_file(path, max_bytes, error), path, of, error)


def parse_json(data: bytes, path: Path, of: type[T], error: type[SlotmoeError] = ConfigError) -> T:
    """The JSON object in ``data`` of the file ``path``; ``error`` is raised, naming the file, for
    anything else, and for values that are not as ``of`` says.

    Refused as well: more than ``MAX_JSON_VALUES`` values (so that memory stays within a few times
    the file's size), nesting beyond ``MAX_JSON_DEPTH``, NaN and infinity, and keys that occur
    twice.
    """

    def constant(name: str) -> None:
        raise ValueError(f"the value {name} is not JSON")

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    if sum(data.count(mark) for mark in b"[{,") > MAX_JSON_VALUES:
        raise error(f"{path}: more than {MAX_JSON_VALUES} values, {_BEYOND}")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({str(problem)[:120]})") from None
    if not isinstance(values, dict):
        raise error(f"{path}: holds a {type(values).__name__}, expected a JSON object")
    level: list[object] = [values]
    for _ in range(MAX_JSON_DEPTH):
        objects = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [child for v in objects if isinstance(v, list) for child in v]
    if level:
        raise error(f"{path}: nested deeper than {MAX_JSON_DEPTH} levels")
    try:
        return typed(values, of)
    except ValueError as problem:
        raise error(f"{path}: {problem}") from None


def typed(value: object, of: type[T], place: str = "") -> T:
    """``value`` as the type ``of`` has it.  A ``ValueError`` names both, and the ``place``."""
    import msgspec

    try:
        return msgspec.convert(value, of)
    except msgspec.ValidationError as problem:
        for inside, part, kind in _parts(value, of, place):
            typed(part, kind, inside)
        field = re.match("Object (missing|contains unknown).* field `(.+)`", str(problem), re.S)
        if field:
            what = "is missing" if field[1] == "missing" else "is unknown"
            raise ValueError(f"{_at(place, field[2])} {what}") from None
        raise ValueError(f"{place} is {value!r:.80}, which is not {_words(of)}") from None


def _at(place: str, key: str) -> str:
    return f"{place}.{key:.80}" if place else f"{key:.80}"


def _parts(value: object, of: Any, place: str) -> Iterator[tuple[str, object, Any]]:
    """What is inside ``value``: its place, itself, and the type that it should have."""
    origin, args = get_origin(of), get_args(of)
    if origin in (Annotated, Union, UnionType):
        for kind in args:  # of which one at most has parts
            yield from _parts(value, kind, place)
    elif isinstance(value, list) and origin in (list, tuple):
        yield from ((f"{place}[{index}]", item, args[0]) for index, item in enumerate(value))
    elif isinstance(value, dict) and origin is dict:
        yield from ((_at(place, key), item, args[1]) for key, item in value.items())
    elif isinstance(value, dict) and isinstance(of, type):
        kinds = get_type_hints(of, include_extras=True)
        keys = zip(getattr(of, "__struct_encode_fields__", kinds), kinds.values(), strict=True)
        yield from ((_at(place, key), value[key], kind) for key, kind in keys if key in value)


def _words(of: Any) -> str:
    """A type in words."""
    origin, args = get_origin(of), get_args(of)
    if origin in (Union, UnionType):
        return " or ".join(map(_words, args))
    if origin is Literal:
        return " or ".join(map(json.dumps, args))
    if origin is Annotated:
        meta, limits = args[1], ""
        if meta.ge is not None:
            limits = f" from {meta.ge} to {meta.le}"
        elif meta.max_length is not None:
            limits = f" of {meta.min_length} to {meta.max_length} values"
        return meta.description or _words(args[0]) + limits
    return _WORDS.get(origin or of, "an object")

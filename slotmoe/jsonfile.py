"""JSON files that come from strangers: read within bounds, and checked against a table of kinds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from slotmoe.errors import ConfigError, SlotmoeError, reading

Json = dict[str, Any]  # an object as it comes in or goes out
MAX_JSON_VALUES = 300_000  # V3 in nested NF4 has 270,000 tensors, Kimi K2 with scales 210,000
MAX_JSON_DEPTH = 32
_BEYOND = "far beyond what this file holds in a real model"


def read_file(path: Path, max_bytes: int, error: type[SlotmoeError] = ConfigError) -> bytes:
    """All of the regular file ``path``; ``error`` is raised, naming the file, if it is none or
    holds more than ``max_bytes``."""
    with reading(path, error):
        if path.exists() and not path.is_file():  # a pipe would block
            raise error(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise error(f"{path}: more than {max_bytes} bytes, {_BEYOND}")
    return data


def read_json(path: Path, max_bytes: int, error: type[SlotmoeError] = ConfigError) -> Json:
    """``parse_json`` of the file ``path``, which may have ``max_bytes``."""
    return parse_json(read_file(path, max_bytes, error), path, error)


def parse_json(data: bytes, path: Path, error: type[SlotmoeError] = ConfigError) -> Json:
    """The JSON object in ``data`` of the file ``path``; ``error`` is raised, naming the file, for
    anything else.

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
    return values


class Kind(NamedTuple):
    """What one value has to be: in words, and the test."""

    expected: str
    fits: Callable[[object], bool]


class ListOf(NamedTuple):
    """A list of ``least`` to ``most`` values of one kind."""

    kind: object
    least: int
    most: int


class ObjectOf(NamedTuple):
    """An object with any keys, whose values are of one kind."""

    kind: object


def integer(low: int, high: int) -> Kind:
    def fits(value: object) -> bool:
        return type(value) is int and low <= value <= high  # True and False are of type bool

    return Kind(f"an integer from {low} to {high}", fits)


def number(low: float, high: float) -> Kind:
    def fits(value: object) -> bool:
        return isinstance(value, int | float) and type(value) is not bool and low <= value <= high

    return Kind(f"a number from {low:g} to {high:g}", fits)


def one_of(*allowed: object) -> Kind:
    return Kind(" or ".join(map(json.dumps, allowed)), allowed.__contains__)


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.expected} or null", lambda value: value is None or kind.fits(value))


TEXT = Kind("text", lambda value: isinstance(value, str))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


def check(value: object, kind: object, place: str = "") -> None:
    """Raise ``ValueError``, which names the ``place`` in the file, unless ``value`` is as ``kind``
    says: a ``Kind``, ``ListOf`` or ``ObjectOf``, or a dict of the kinds of an object's values by
    key.  Such an object may have more keys.
    """
    if isinstance(kind, Kind):
        if not kind.fits(value):
            raise ValueError(f"{place} is {value!r:.80}, which is not {kind.expected}")
    elif isinstance(kind, ListOf):
        if not (isinstance(value, list) and kind.least <= len(value) <= kind.most):
            raise ValueError(f"{place} is not a list of {kind.least} to {kind.most} values")
        for index, item in enumerate(value):
            check(item, kind.kind, f"{place}[{index}]")
    elif not isinstance(value, dict):
        raise ValueError(f"{place} is {value!r:.80}, which is not an object")
    else:
        kinds = dict.fromkeys(value, kind.kind) if isinstance(kind, ObjectOf) else kind
        assert isinstance(kinds, dict)
        for key, inner in kinds.items():
            inside = f"{place}.{key:.80}" if place else f"{key:.80}"
            if key not in value:
                raise ValueError(f"{inside} is missing")
            check(value[key], inner, inside)

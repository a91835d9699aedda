"""The reader of JSON files that come from strangers."""

import json
from pathlib import Path
from typing import Any

from slotmoe.errors import ConfigError, SlotmoeError

MAX_JSON_VALUES = 200_000  # DeepSeek-V2's index holds 30,000
MAX_JSON_DEPTH = 32


def read_json(
    path: Path, max_bytes: int, error: type[SlotmoeError] = ConfigError
) -> dict[str, Any]:
    """The JSON object in ``path``; ``error`` is raised, naming the file, for anything else.

    Refused as well: more than ``max_bytes``, more than ``MAX_JSON_VALUES`` values (so that memory
    stays within a few times the file's size), nesting beyond ``MAX_JSON_DEPTH``, NaN and infinity,
    and keys that occur twice.
    """

    def constant(name: str) -> None:
        raise ValueError(f"the value {name} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            raise ValueError("a key occurs twice")
        return values

    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise error(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: can't be read ({problem.strerror})") from None
    beyond = "far beyond what this file holds in a real model"
    if len(data) > max_bytes:
        raise error(f"{path}: more than {max_bytes} bytes, {beyond}")
    if sum(data.count(mark) for mark in b"[{,") > MAX_JSON_VALUES:
        raise error(f"{path}: more than {MAX_JSON_VALUES} values, {beyond}")
    try:
        values = json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({str(problem)[:120]})") from None
    if not isinstance(values, dict):
        raise error(f"{path}: holds a {type(values).__name__}, expected a JSON object")
    level: list[Any] = [values]
    for _ in range(MAX_JSON_DEPTH):
        objects = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [child for v in objects if isinstance(v, list) for child in v]
    if level:
        raise error(f"{path}: nested deeper than {MAX_JSON_DEPTH} levels")
    return values

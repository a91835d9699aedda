"""The reader of JSON files that come from strangers."""

from __future__ import annotations

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
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key occurs twice")
        return found

    try:
        if path.exists() and not path.is_file():  # a pipe would block
            raise error(f"{path}: is not a regular file")
        with open(path, "rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as problem:
        raise error(f"{path}: can't be read ({problem.strerror})") from None
    if len(data) > max_bytes:
        raise error(
            f"{path}: more than {max_bytes} bytes, far beyond what this file holds in a real model"
        )
    if sum(data.count(mark) for mark in b"[{,") > MAX_JSON_VALUES:
        raise error(
            f"{path}: more than {MAX_JSON_VALUES} values, far beyond what this file holds in a real model"
        )
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=constant, object_pairs_hook=unique)
    except (ValueError, RecursionError) as problem:
        raise error(f"{path}: not valid JSON ({str(problem)[:120]})") from None
    if not isinstance(found, dict):
        raise error(f"{path}: holds a {type(found).__name__}, expected a JSON object")
    level: list[Any] = [found]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            child
            for one in level
            if isinstance(one, dict | list)
            for child in (one.values() if isinstance(one, dict) else one)
        ]
    if level:
        raise error(f"{path}: nested deeper than {MAX_JSON_DEPTH} levels")
    return found

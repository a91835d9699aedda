"""The docs' tables of what the code knows: ``python -m scripts.tables`` writes them into the pages.

A table stands between ``<!-- table: NAME -->`` and ``<!-- /table -->``.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel

import campaigns
from slotmoe.model.families import FAMILIES, Family
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.completions import CompletionRequest
from slotmoe.tools.serve.requests import ChatRequest
from slotmoe.tools.serve.response_items import ResponsesRequest

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))
REQUESTS: dict[str, type[BaseModel]] = {
    "chat": ChatRequest,
    "text": CompletionRequest,
    "responses": ResponsesRequest,
    "messages": MessagesRequest,
}
MODELS = {
    "deepseek_v2": "V2, V2.5, Coder-V2, V2-Lite",
    "deepseek_v3": "V3, R1, V3.1, Moonlight, GigaChat 3",
    "kimi_k2": "Kimi K2",
    "glm4_moe_lite": "GLM-4.7-Flash",
    "mistral4": "Mistral Small 4",
    "deepseek_v32": "DeepSeek-V3.2",
    "glm_moe_dsa": "GLM-5",
}
TYPES = {"string": "text", "array": "list"}
BOUNDS = {
    "minimum": "from",
    "exclusiveMinimum": "above",
    "maximum": "to",
    "maxItems": "≤",
    "maxProperties": "≤",
}


class Field(NamedTuple):
    """Of a request: its name, "honoured", "accepted" or "refused", what it takes, and a note."""

    name: str
    kind: str
    values: str
    note: str


def fields(route: str) -> dict[str, Field]:
    """By name: those at the top, and those inside of them that have a description."""
    schema = REQUESTS[route].model_json_schema()
    return {field.name: field for field in _fields(schema, schema["$defs"], "")}


def _fields(schema: Any, models: Any, place: str) -> Iterator[Field]:
    for name, value in schema.get("properties", {}).items():
        kind, _, note = value.get("description", "").rpartition(": ")
        if note or not place:
            yield Field(place + name, kind or "honoured", _values(value), note)
        if not kind:
            for model in _models(value):
                yield from _fields(models[model], models, f"{place}{name}.")


def _models(schema: Any) -> Iterator[str]:
    """Names of the models in a field's ``schema``."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        schema = [value for key, value in schema.items() if key != "discriminator"]
    if isinstance(schema, list):
        for value in schema:
            yield from _models(value)


def _values(schema: Any) -> str:
    options = schema.get("anyOf", schema.get("oneOf"))
    if options:
        found = [_values(option) for option in options if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(found))
    words = [schema["const"]] if "const" in schema else schema.get("enum")
    if words:
        return ", ".join(f"`{word}`" for word in words)
    kind = schema.get("type", "object")
    bounds = [
        f"{word} {schema[key]:g}"
        for key, word in BOUNDS.items()
        if key in schema and abs(schema[key]) < 1 << 31
    ]
    return " ".join([TYPES.get(kind, kind), *bounds])


def honoured() -> Iterator[str]:
    rows = _with_routes("honoured", lambda field: (f"`{field.name}`", field.values, field.note))
    yield from _table(
        "field | routes | values | note",
        ((name, routes, values, note) for (name, values, note), routes in rows),
    )


def accepted() -> Iterator[str]:
    return _by_reason("accepted")


def refused() -> Iterator[str]:
    return _by_reason("refused")


def _by_reason(kind: str) -> Iterator[str]:
    rows = dict[tuple[str, str], list[str]]()
    for (name, note), routes in _with_routes(kind, lambda field: (field.name, field.note)):
        rows.setdefault((routes, note), []).append(f"`{name}`")
    yield from _table(
        "fields | routes | why",
        ((", ".join(names), routes, note) for (routes, note), names in rows.items()),
    )


def _with_routes(kind: str, row: Callable[[Field], tuple[str, ...]]) -> Iterator[Any]:
    """The ``row`` of each field of a ``kind``, and the routes that share it."""
    rows = dict[tuple[str, ...], list[str]]()
    for route in REQUESTS:
        for field in fields(route).values():
            if field.kind == kind:
                rows.setdefault(row(field), []).append(route)
    for cells, routes in rows.items():
        yield cells, "all" if len(routes) == len(REQUESTS) else ", ".join(routes)


def families() -> Iterator[str]:
    rows = dict[Family, list[str]]()
    for model_type, family in FAMILIES.items():
        rows.setdefault(family, []).append(model_type)
    yield from _table(
        "`model_type` | models | scores | a group of experts counts by | bias in the choice"
        " | weights that add up to 1 are scaled | YaRN scales attention scores | attention",
        (
            (
                ", ".join(f"`{model_type}`" for model_type in types),
                ", ".join(MODELS[model_type] for model_type in types),
                family.scoring,
                "its best expert" if family.group_best == 1 else f"its {family.group_best} best",
                "yes" if family.correction_bias else "no",
                "yes" if family.scales_normalized else "no",
                "yes" if family.softmax_factor else "no",
                "sparse" * family.indexed + "queries grow with position" * family.query_scaling,
            )
            for family, types in rows.items()
        ),
    )


def _table(head: str, rows: Iterable[Iterable[str]]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|" + "---|" * len(head.split(" | "))
    for row in rows:
        yield f"| {' | '.join(row)} |".replace("|  |", "| |")


TABLES = {
    "honoured": honoured,
    "accepted": accepted,
    "refused": refused,
    "families": families,
    "campaigns": campaigns.table,
}


def written(page: str) -> str:
    """The text of a page with its tables as the code has them."""

    def table(match: re.Match[str]) -> str:
        return "\n".join([match[1], *TABLES[match[2]](), match[3]])

    return re.sub(r"(?s)(<!-- table: (\w+) -->)\n.*?(<!-- /table -->)", table, page)


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))

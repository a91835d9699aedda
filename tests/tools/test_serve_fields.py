"""The table of docs/api-fields.md: every row is what the server does, and no field is missing."""

import json
import re
from pathlib import Path
from typing import NamedTuple, get_args

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params

from slotmoe.tools.serve.completions import CompletionRequest
from slotmoe.tools.serve.fields import Ignored
from slotmoe.tools.serve.requests import ChatRequest, Model
from slotmoe.tools.serve.response_items import ResponsesRequest
from tests.support.served import GREEDY

PAGE = Path(__file__).parents[2] / "docs/api-fields.md"
ROUTES = {
    "chat": ("/v1/chat/completions", ChatRequest),
    "text": ("/v1/completions", CompletionRequest),
    "responses": ("/v1/responses", ResponsesRequest),
}
BASES = {
    "chat": {**GREEDY, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6},
    "text": {**GREEDY, "prompt": "Hi", "max_tokens": 6},
    "responses": {"model": "sample", "temperature": 0, "input": "Hi", "max_output_tokens": 6},
}
OFFICIAL = {
    "chat": chat_create_params.CompletionCreateParamsBase,
    "text": completion_create_params.CompletionCreateParamsBase,
    "responses": response_create_params.ResponseCreateParamsBase,
}


class Row(NamedTuple):
    field: str
    routes: list[str]
    kind: str
    example: dict
    note: str


def row(line):
    field, routes, kind, example, note = (cell.strip() for cell in line.strip("|").split(" | "))
    return Row(field.strip("`"), routes.split(", "), kind, json.loads(example.strip("`")), note)


ROWS = [
    row(re.sub(r"\|$", "", line) + " ")
    for line in PAGE.read_text().splitlines()
    if line.startswith("| `")
]
CASES = [
    pytest.param(route, row, id=f"{route}-{row.field}") for row in ROWS for route in row.routes
]


def marked(model, place=""):
    """Each field of a request and its parts, and how the model marks it."""
    for name, field in model.model_fields.items():
        here = f"{place}{name}"
        ignored = [one for one in field.metadata if isinstance(one, Ignored)]
        kind = "accepted" if ignored else "refused" if field.annotation is type(None) else ""
        yield here, kind, ignored[0].reason if ignored else ""
        for part in parts(field.annotation):
            yield from marked(part, f"{here}.")


def parts(annotation):
    if isinstance(annotation, type) and issubclass(annotation, Model):
        yield annotation
    for argument in get_args(annotation):
        yield from parts(argument)


def without(value, name):
    if isinstance(value, list):
        return [without(one, name) for one in value]
    if isinstance(value, dict):
        return {key: without(one, name) for key, one in value.items() if key != name}
    return value


def text_of(served, route, body):
    status, answer, _ = served.ask("POST", ROUTES[route][0], body)
    assert status == 200, answer
    if isinstance(answer, str):  # a stream
        return re.findall(r'"(?:content|text|delta)":"(?:[^"\\]|\\.)*"', answer)
    if route == "responses":
        return [item.get("content") or item["arguments"] for item in answer["output"]]
    return [choice.get("text") or choice["message"] for choice in answer["choices"]]


@pytest.mark.parametrize(("route", "row"), CASES)
def test_a_row_is_what_happens(served, route, row):
    body = {**BASES[route], **row.example}
    if row.field == "max_completion_tokens":
        del body["max_tokens"]
    if row.kind == "refused":
        status, answer, _ = served.ask("POST", ROUTES[route][0], body)
        assert status == 400 and row.note in answer["error"]["message"]
        assert answer["error"]["param"] == row.field.partition(".")[0]
        return
    found = text_of(served, route, body)
    if row.kind == "accepted":
        assert found == text_of(served, route, without(body, row.field.rpartition(".")[2]))


@pytest.mark.parametrize("route", ROUTES)
def test_table_has_every_field(route):
    rows = {row.field: row for row in ROWS if route in row.routes}
    found = {}
    for field, kind, reason in marked(ROUTES[route][1]):
        if kind or "." not in field:
            found[field] = kind
            assert rows[field].kind == (kind or "honoured"), field
            assert reason in rows[field].note, field
    stray = {field for field in rows if "." not in field and field not in found}
    assert not stray
    official = {*OFFICIAL[route].__annotations__, "stream"}
    assert official <= set(rows)
    options = {
        f"stream_options.{name}" for name in ChatCompletionStreamOptionsParam.__annotations__
    }
    assert options - {"stream_options.include_usage"} <= set(rows)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("name", ["temprature", "max_token", "top_a", "Seed", "store "])
def test_other_names_are_refused(served, route, name):
    status, answer, _ = served.ask("POST", ROUTES[route][0], {**BASES[route], name: None})
    assert (status, answer["error"]["param"]) == (400, name)
    assert answer["error"]["message"] == f"{name} is not supported by this server"

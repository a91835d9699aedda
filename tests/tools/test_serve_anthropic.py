"""Anthropic's side of ``slotmoe serve``: the fields that its clients send, their form of errors,
``count_tokens``, and answers that their request has begun."""

import json
from typing import Literal

import anthropic
import pydantic
import pytest

from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.response_items import ResponsesRequest
from tests.support.served import ANTHROPIC_TOOL, USER, Served, until

PATH = "/v1/messages"
ASK = {"model": "sample", "messages": USER, "max_tokens": 6}
BY_CLIENT = {**ASK, "extra_body": {"temperature": 0}}


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def client(anthropic_client):
    return anthropic_client


def text_of(served, **fields):
    status, answer = served.message(**fields)
    assert status == 200, answer
    return answer["content"][0]["text"]


USE = {"type": "tool_use", "id": "x", "name": "weather", "input": {}}
RESULT = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x"}]}
PICTURE = {"type": "image", "source": {"type": "url", "url": "http://localhost/x.png"}}
REFUSED = [
    {"cache_control": "forever"},
    {"thinking": {"type": "hard"}},
    {"output_config": {"format": {"type": "yaml"}}},
    {"context_management": 5},
    {"chat_template": "{{ 1 }}"},
    {"messages": [{"role": "user", "content": [{"type": "thinking"}]}]},
    {"messages": [{"role": "user", "content": [PICTURE]}]},
    {"messages": [{"role": "user", "content": [USE]}, RESULT]},
    {"messages": [RESULT]},
    {"messages": [*USER, {"role": "assistant", "content": [USE]}]},
    {"tools": [{**ANTHROPIC_TOOL, "allowed_callers": ["code_execution_20250825"]}]},
    {"tools": [{**ANTHROPIC_TOOL, "odd": 1}]},
    {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    {"tools": [{"name": "odd", "input_schema": {"type": "array"}}]},
    {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool"}},
    {"tools": [ANTHROPIC_TOOL], "tool_choice": {"type": "tool", "name": "other"}},
    {"tool_choice": {"type": "any"}},
]


def test_what_is_not_honoured_is_refused(served):
    for fields in REFUSED:
        status, answer = served.message(**fields)
        assert (status, answer["type"]) == (400, "error"), fields
        assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


MANY = [{}] * 100_000
FLOODS = [
    (MessagesRequest, {"messages": MANY}),
    (MessagesRequest, {"messages": [{"role": "user", "content": MANY}]}),
    (MessagesRequest, {"system": MANY}),
    (MessagesRequest, {"tools": MANY}),
    (MessagesRequest, {"tools": [{**ANTHROPIC_TOOL, "allowed_callers": MANY}]}),
    (MessagesRequest, {"tools": [{**ANTHROPIC_TOOL, "input_examples": MANY}]}),
    (ResponsesRequest, {"input": MANY}),
    (ResponsesRequest, {"input": [{"role": "user", "content": MANY}]}),
    (ResponsesRequest, {"input": [{"type": "reasoning", "summary": MANY}]}),
    (ResponsesRequest, {"include": MANY}),
    (ResponsesRequest, {"tools": MANY}),
]


def test_lists_are_bounded():
    """The first element too many ends the check, so few errors are made of many elements."""
    for kind, fields in FLOODS:
        with pytest.raises(pydantic.ValidationError) as caught:
            kind.model_validate({**ASK, **fields})
        assert caught.value.error_count() < 5000


def test_thread_is_refused_so_that_clients_go_on_without(served, client):
    status, answer = served.message(thread={"type": "create"})
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert (status, answer["error"]["details"]) == (400, details)

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather of a city."""
        return f"It rains in {city}."

    choice = {"type": "tool", "name": "weather"}
    options = {"tools": [weather], "tool_choice": choice, "max_iterations": 2}
    messages = list(client.beta.messages.tool_runner(**{**ASK, "max_tokens": 300}, **options))
    assert [message.content[0].type for message in messages] == ["tool_use"] * 2


def test_answers_follow_a_schema(served, client):
    def form(schema):
        return {"format": {"type": "json_schema", "schema": schema}}

    text = text_of(served, output_config=form({"enum": ["yes", "no"]}), max_tokens=20)
    assert json.loads(text) in ("yes", "no")
    begun = [*USER, {"role": "assistant", "content": "{"}]
    status, answer = served.message(messages=begun, output_config=form({"type": "object"}))
    assert status == 400 and "has begun it" in answer["error"]["message"]
    with pytest.raises(anthropic.BadRequestError, match="schema"):
        client.messages.create(**BY_CLIENT, output_config=form({"type": "odd"}))


def test_last_message_of_the_assistants_is_gone_on_with(served, client, runtime):
    whole = text_of(served, max_tokens=12)
    begun = whole[: len(whole) // 2]
    messages = [*USER, {"role": "assistant", "content": begun}]
    message = client.messages.create(**{**BY_CLIENT, "messages": messages, "max_tokens": 12})
    text = runtime.tokenizer.chat(messages, begun=True)
    assert text.endswith(begun)
    served.idle()
    ids = runtime.tokenizer.encode(text)
    alone = "".join(token.text for token in runtime.generate(ids, 12))
    assert message.content[0].text == alone
    turn, counted = (
        client.messages.count_tokens(model="sample", messages=given).input_tokens
        for given in (USER, messages)
    )
    assert counted == len(ids) > turn


def test_count_tokens_is_what_the_answer_says(client):
    def count(messages=USER, **fields):
        fields = {"model": "sample", "messages": messages, **fields}
        return client.messages.count_tokens(**fields).input_tokens

    asked = {"system": "Be brief.", "tools": [ANTHROPIC_TOOL]}
    counted = count(**asked, thinking={"type": "disabled"})
    usage = client.messages.create(**{**ASK, "max_tokens": 1}, **asked).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens > count()
    long = [{"role": "user", "content": "word " * 3000}]  # more than the context holds
    assert count(long) > 3000
    with pytest.raises(anthropic.NotFoundError):
        count(model="other")


def test_errors_below_its_paths_have_its_form(served):
    for method, path, status, kind in (
        ("POST", f"{PATH}/batches", 404, "not_found_error"),
        ("GET", f"{PATH}/count_tokens", 405, "invalid_request_error"),
        ("POST", f"{PATH}/count_tokens", 400, "invalid_request_error"),
    ):
        found, answer, _ = served.ask(method, path, {} if method == "POST" else None)
        assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kind), path
    answer = served.ask("POST", PATH, ASK, Origin="http://evil.example")[1]
    assert answer["error"]["type"] == "permission_error"
    assert "type" not in served.ask("POST", f"{PATH}s", {})[1]


def test_client_gets_why_an_answer_stopped(client):
    answer = client.messages.create(**BY_CLIENT)
    text = answer.content[0].text
    assert answer.stop_reason == "max_tokens" and answer.usage.output_tokens == 6
    with client.messages.stream(**BY_CLIENT) as stream:
        assert "".join(stream.text_stream) == text
        assert stream.get_final_message().usage.output_tokens == 6
    cut = client.messages.create(**BY_CLIENT, stop_sequences=[text[3:6]])
    assert (cut.stop_reason, cut.content[0].text) == ("stop_sequence", text[:3])


def test_models_are_listed_for_its_client(client, runtime):
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("sample", "model", "sample")
    found = client.models.retrieve("sample")
    assert found.max_input_tokens == runtime.context and found.created_at.year >= 2024


PINGS = {"/v1/chat/completions": ": ping\n\n", "/v1/responses": ": ping\n\n"}
PINGS[PATH] = 'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize("path", PINGS)
def test_silent_streams_are_pinged(runtime, monkeypatch, gate, path):
    """Until a place is free, and again while an answer shows nothing."""
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.02)
    ping, body = PINGS[path], {**ASK, "stream": True}
    if path == "/v1/responses":
        body = {"model": "sample", "stream": True, "input": "x", "max_output_tokens": 3}
    with Served(runtime, sequences=1) as served:
        first, _ = served.open("POST", PATH, {**ASK, "stream": True})
        until(lambda: served.service.running)
        connection, response = served.open("POST", path, body)
        data = b""
        while data.count(ping.encode()) < 3 and (more := response.read1(4096)):
            data += more
        gate.set()
        data += response.read()
        first.close()
        connection.close()
        parts = [part + "\n\n" for part in data.decode().split("\n\n")[:-1]]
        others = [part for part in parts if part != ping]
        assert len(parts) - len(others) >= 3
        assert all(part.startswith(("data: ", "event: ")) for part in others)
        served.idle()

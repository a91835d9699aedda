"""Anthropic's side of ``slotmoe serve``: the fields that its clients send, their form of errors,
``count_tokens``, and answers that their request has begun."""

import json
import time
from typing import Literal

import anthropic
import httpx2
import pydantic
import pytest

from slotmoe.tools.serve import answers as serve_answers
from slotmoe.tools.serve.anthropic import MessagesRequest
from tests.support.served import USER, Served, until
from tests.tools.test_serve_tools import ANTHROPIC_TOOLS, is_weather

PATH = "/v1/messages"
CACHED = {"cache_control": {"type": "ephemeral", "ttl": "1h"}}
ASK = {"model": "sample", "messages": USER, "max_tokens": 6, "temperature": 0}
BY_CLIENT = {"model": "sample", "messages": USER, "max_tokens": 6, "extra_body": {"temperature": 0}}
CALL = {"type": "tool_use", "id": "x", "name": "weather", "input": {"city": "Rome", "days": 1}}


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def served(runtime):
    with Served(runtime, waiting=16, max_body=1 << 20) as served:
        yield served


@pytest.fixture(scope="module")
def client(served):
    address = f"http://127.0.0.1:{served.port}"
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def post(served, path=PATH, **fields):
    status, answer, _ = served.ask("POST", path, {**ASK, **fields})
    return status, answer


def text_of(served, **fields):
    status, answer = post(served, **fields)
    assert status == 200, answer
    return answer["content"][0]["text"]


HARMLESS = [
    CACHED,
    {"thinking": {"type": "disabled"}},
    {"thinking": {"type": "enabled", "budget_tokens": 1024}},
    {"thinking": {"type": "adaptive", "display": "omitted"}},
    {"output_config": {"effort": "low"}},
    {"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}},
    {"service_tier": "auto"},
    {"metadata": {"user_id": "x"}},
    {"thread": None},
]


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize("fields", HARMLESS, ids=lambda value: str(value)[:60])
def test_harmless_fields_change_nothing(served, fields):
    assert text_of(served, **fields) == text_of(served)


@pytest.mark.usefixtures("processes")
@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "Tell me of the king.", **CACHED},
        {"type": "text", "text": "Tell me of the king.", "citations": None},
    ],
    ids=["cached", "cited"],
)
def test_harmless_fields_of_text_change_nothing(served, block):
    assert text_of(served, messages=[{"role": "user", "content": [block]}]) == text_of(served)
    system = [{"type": "text", "text": "Be brief.", **CACHED}]
    assert text_of(served, system=system) == text_of(served, system="Be brief.")


CALLING = {"tool_choice": {"type": "any"}, "max_tokens": 200}


@pytest.fixture(scope="module")
def plain_call(served):
    return post(served, **CALLING, tools=ANTHROPIC_TOOLS)[1]["content"][0]


@pytest.mark.parametrize(
    "fields",
    [
        CACHED,
        {"strict": True},
        {"eager_input_streaming": True},
        {"defer_loading": True},
        {"input_examples": [{"city": "Rome", "days": 1}]},
        {"allowed_callers": ["direct"]},
        {"type": "custom"},
    ],
    ids=str,
)
def test_harmless_fields_of_tools_change_nothing(served, plain_call, fields):
    block = post(served, **CALLING, tools=[{**ANTHROPIC_TOOLS[0], **fields}])[1]["content"][0]
    assert block["input"] == plain_call["input"] and is_weather(json.dumps(block["input"]))


@pytest.mark.usefixtures("processes")
def test_harmless_parts_of_a_history_change_nothing(served):
    def history(before=(), call=None, result=None):
        said = [*before, {"type": "text", "text": "Let me see."}, {**CALL, **(call or {})}]
        wet = {"type": "tool_result", "tool_use_id": "x", "content": "wet", **(result or {})}
        assistant = {"role": "assistant", "content": said}
        return [*USER, assistant, {"role": "user", "content": [wet]}]

    thoughts = [{"type": "thinking", "thinking": "Hm.", "signature": "s"}]
    thoughts += [{"type": "redacted_thinking", "data": "x"}]
    cached = {"content": [{"type": "text", "text": "wet", **CACHED}], **CACHED}
    plain = text_of(served, messages=history())
    for changed in (
        history(thoughts),
        history(call={"caller": {"type": "direct"}, **CACHED}),
        history(result=cached),
    ):
        assert text_of(served, messages=changed) == plain


@pytest.mark.parametrize(
    "fields",
    [
        {"cache_control": "forever"},
        {"thinking": {"type": "hard"}},
        {"service_tier": "gold"},
        {"output_config": {"format": {"type": "yaml"}}},
        {"context_management": 5},
        {"mcp_servers": []},
        {"messages": [{"role": "user", "content": [{"type": "thinking"}]}]},
        {"tools": [{**ANTHROPIC_TOOLS[0], "allowed_callers": ["code_execution_20250825"]}]},
        {"tools": [{**ANTHROPIC_TOOLS[0], "odd": 1}]},
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_is_not_honoured_is_refused(served, fields):
    status, answer = post(served, **fields)
    assert (status, answer["type"]) == (400, "error")
    assert answer["error"]["type"] == "invalid_request_error" and answer["error"]["message"]


FLOODS = [
    {"messages": [{}] * 100_000},
    {"messages": [{"role": "user", "content": [{}] * 100_000}]},
    {"system": [{}] * 100_000},
    {"tools": [{}] * 100_000},
    {"tools": [{**ANTHROPIC_TOOLS[0], "allowed_callers": [{}] * 100_000}]},
    {"tools": [{**ANTHROPIC_TOOLS[0], "input_examples": [0] * 100_000}]},
]


@pytest.mark.parametrize("fields", FLOODS, ids=lambda value: str(value)[:30])
def test_lists_are_bounded(fields):
    """The first element too many ends the check, so few errors are made of many elements."""
    with pytest.raises(pydantic.ValidationError) as caught:
        MessagesRequest.model_validate({**ASK, **fields})
    assert caught.value.error_count() < 5000


@pytest.mark.usefixtures("processes")
def test_thread_is_refused_so_that_clients_go_on_without(served, client):
    status, answer = post(served, thread={"type": "create"})
    details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    assert (status, answer["error"]["details"]) == (400, details)
    calls = []

    @anthropic.beta_tool
    def weather(city: Literal["Rome", "Paris"]) -> str:
        """The weather of a city."""
        calls.append(city)
        return "It rains."

    runner = client.beta.messages.tool_runner(
        model="sample",
        messages=USER,
        max_tokens=300,
        tools=[weather],
        tool_choice={"type": "tool", "name": "weather"},
        max_iterations=2,
    )
    messages = list(runner)
    assert calls and messages[0].content[0].type == "tool_use" and len(messages) == 2


class King(pydantic.BaseModel):
    """A king of a play."""

    name: Literal["Lear", "Henry"]
    is_old: bool


def test_answers_follow_a_schema(served, client):
    schema = {"enum": ["yes", "no"]}
    form = {"format": {"type": "json_schema", "schema": schema}}
    assert json.loads(text_of(served, output_config=form, max_tokens=20)) in ("yes", "no")
    schema = {"type": "object", "properties": {"king": {"enum": ["Lear", "Henry"]}}}
    schema |= {"required": ["king"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "schema": schema}}
    message = client.messages.create(**{**BY_CLIENT, "max_tokens": 60}, output_config=form)
    assert json.loads(message.content[0].text)["king"] in ("Lear", "Henry")
    begun = [*USER, {"role": "assistant", "content": "{"}]
    status, answer = post(served, messages=begun, output_config=form)
    assert status == 400 and "has begun it" in answer["error"]["message"]
    with pytest.raises(anthropic.BadRequestError, match="schema"):
        client.messages.create(
            **BY_CLIENT,
            output_config={"format": {"type": "json_schema", "schema": {"type": "odd"}}},
        )


@pytest.mark.usefixtures("processes")
def test_messages_parse(client):
    asked = {"model": "sample", "max_tokens": 90}
    found = client.messages.parse(**asked, messages=USER, output_format=King)
    assert isinstance(found.parsed_output, King) and found.stop_reason == "end_turn"
    history = [*USER, {"role": "assistant", "content": found.content}, *USER]
    again = client.messages.parse(**asked, messages=history, output_format=King)
    assert isinstance(again.parsed_output, King)


@pytest.mark.usefixtures("processes")
def test_last_message_of_the_assistants_is_gone_on_with(served, client, runtime):
    whole = text_of(served, max_tokens=12)
    begun = whole[: len(whole) // 2]
    messages = [*USER, {"role": "assistant", "content": begun}]
    message = client.messages.create(**{**BY_CLIENT, "messages": messages, "max_tokens": 12})
    text = runtime.tokenizer.chat([*USER, {"role": "assistant", "content": begun}], begun=True)
    assert text.endswith(begun)
    served.idle()
    alone = "".join(token.text for token in runtime.generate(runtime.tokenizer.encode(text), 12))
    assert message.content[0].text == alone
    turn = client.messages.count_tokens(model="sample", messages=USER).input_tokens
    counted = client.messages.count_tokens(model="sample", messages=messages).input_tokens
    assert counted == len(runtime.tokenizer.encode(text)) > turn


@pytest.mark.usefixtures("processes")
def test_count_tokens_is_what_the_answer_says(served, client):
    asked = {"model": "sample", "messages": USER, "system": "Be brief.", "tools": ANTHROPIC_TOOLS}
    counted = client.messages.count_tokens(**asked, thinking={"type": "disabled"}).input_tokens
    usage = client.messages.create(**asked, max_tokens=1).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    plain = client.messages.count_tokens(model="sample", messages=USER).input_tokens
    assert plain < counted
    long = [{"role": "user", "content": "word " * 3000}]  # more than the context holds
    assert client.beta.messages.count_tokens(model="sample", messages=long).input_tokens > 3000
    with pytest.raises(anthropic.NotFoundError):
        client.messages.count_tokens(model="other", messages=USER)
    with pytest.raises(anthropic.BadRequestError):
        client.messages.count_tokens(model="sample", messages=[])


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


def test_models_are_listed_for_its_client(served, client, runtime):
    (model,) = client.models.list()
    assert (model.id, model.type, model.display_name) == ("sample", "model", "sample")
    found = client.models.retrieve("sample")
    assert found.max_input_tokens == runtime.context and found.created_at.year >= 2024


@pytest.fixture
def slow(runtime, monkeypatch):
    """Every token takes 30 ms and more."""
    append_each = runtime.append_each

    def later(*arguments):
        time.sleep(0.03)
        return append_each(*arguments)

    monkeypatch.setattr(runtime, "append_each", later)


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize(
    ("path", "ping"),
    [
        ("/v1/chat/completions", ": ping\n\n"),
        ("/v1/responses", ": ping\n\n"),
        (PATH, 'event: ping\ndata: {"type":"ping"}\n\n'),
    ],
)
def test_silent_streams_are_pinged(runtime, monkeypatch, slow, path, ping):
    """Until a place is free, and again while an answer shows nothing."""
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.05)
    body = {"model": "sample", "stream": True, "messages": USER, "max_tokens": 3}
    if path == "/v1/responses":
        body = {"model": "sample", "stream": True, "input": "x", "max_output_tokens": 3}
    with Served(runtime, waiting=16, sequences=1) as served:
        long, _ = served.open("POST", PATH, {**ASK, "max_tokens": 400, "stream": True})
        until(lambda: served.batch.running)
        connection, response = served.open("POST", path, body)
        data = b""
        while data.count(ping.encode()) < 3 and (more := response.read1(4096)):
            data += more
        long.close()
        data += response.read()
        connection.close()
        parts = [part + "\n\n" for part in data.decode().split("\n\n")[:-1]]
        others = [part for part in parts if part != ping]
        assert len(parts) - len(others) >= 3
        assert all(part.startswith(("data: ", "event: ")) for part in others)
        served.idle()


@pytest.mark.usefixtures("network")
def test_clients_skip_pings(runtime, monkeypatch, slow):
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.005)
    with (
        Served(runtime) as served,
        anthropic.Anthropic(base_url=f"http://127.0.0.1:{served.port}", api_key="x") as client,
        httpx2.stream(
            "POST", f"http://127.0.0.1:{served.port}{PATH}", json={**ASK, "stream": True}
        ) as raw,
    ):
        assert b"event: ping" in raw.read()
        with client.messages.stream(**BY_CLIENT) as stream:
            assert stream.get_final_message().content[0].text == text_of(served)

"""``slotmoe serve``: the APIs of OpenAI, Anthropic and Ollama.  What one answers the others do,
whole and streamed, by their makers' clients and by hand."""

import json
import os
import shlex
import subprocess
import sys

import anthropic
import jsonschema_rs
import openai
import pydantic
import pytest
from openai.types.responses import ResponseStreamEvent

from slotmoe.model.tokenizer import ReasoningMarks
from slotmoe.tools.serve import answers as serve_answers
from tests.support.apis import (
    ASKED,
    CHAT,
    KING,
    MESSAGES,
    OLLAMA,
    OPTIONS,
    RESPONSES,
    TOOL,
    ask,
    counts_of,
    events,
    parts_of,
    streamed_parts,
)
from tests.support.served import (
    ANTHROPIC_TOOL,
    GREEDY,
    TOOLS,
    USER,
    WEATHER,
    Served,
    is_weather,
    until,
)

EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.mark.parametrize("path", ASKED)
def test_an_answer_is_the_same_on_each_route(served, path):
    text = served.choice(max_tokens=12)["message"]["content"]
    answer, found = ask(served, path), events(served, path)
    assert parts_of(path, answer) == streamed_parts(path, found) == ("", text, [])
    assert counts_of(answer) == counts_of(ask(served, CHAT)) and counts_of(answer)[1] == 12
    end = {
        CHAT: lambda: answer["choices"][0]["finish_reason"] == "length",
        RESPONSES: lambda: answer["incomplete_details"]["reason"] == "max_output_tokens",
        MESSAGES: lambda: answer["stop_reason"] == "max_tokens",
    }
    assert end.get(path, lambda: answer["done_reason"] == found[-1]["done_reason"] == "length")()


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, OLLAMA])
def test_reasoning_is_apart_on_each_route(served, runtime, monkeypatch, path):
    """The sample does not think.  Its marks are taken to be the end of its prompt and a comma."""
    monkeypatch.setattr(runtime.tokenizer, "reasoning", ReasoningMarks("Assistant:", ",", {}))
    said = {"messages": [{"role": "user", "content": "It is a truth"}]}
    more = {RESPONSES: {"input": "It is a truth", "max_output_tokens": 60}}
    more[OLLAMA] = {**said, "options": {**OPTIONS, "num_predict": 60}}
    fields = more.get(path, {**said, "max_tokens": 60})
    prompt = served.post("/apply-template", **said)[1]["prompt"]
    thought, comma, text = served.text(prompt, max_tokens=60).partition(",")
    assert comma and thought.strip() and text.strip()
    expected = thought.strip(), text.lstrip(), []
    answer = ask(served, path, **fields)
    assert parts_of(path, answer) == expected
    assert streamed_parts(path, events(served, path, **fields)) == expected
    details = answer.get("usage", {})
    for name in ("completion_tokens_details", "output_tokens_details"):
        assert name not in details or 0 < details[name]["reasoning_tokens"] < 60
    if path == CHAT:
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        form = {"type": "json_schema", "json_schema": {"schema": schema}}
        held = parts_of(path, ask(served, path, **fields, response_format=form))
        assert held[0] == thought.strip() and json.loads(held[1])["a"] in (1, 2)


@pytest.mark.parametrize("path", [CHAT, RESPONSES, MESSAGES, OLLAMA, "/api/generate"])
def test_a_schema_holds_the_answer_of_each_route(served, path):
    form = {"type": "json_schema", "schema": WEATHER}
    fields = {
        CHAT: {"response_format": {"type": "json_schema", "json_schema": {"schema": WEATHER}}},
        RESPONSES: {"text": {"format": {**form, "name": "x", "strict": True}}},
        MESSAGES: {"output_config": {"format": form}},
    }
    limits = {CHAT: "max_tokens", RESPONSES: "max_output_tokens", MESSAGES: "max_tokens"}
    more = {limits[path]: 60} if path in limits else {"options": {**OPTIONS, "num_predict": 60}}
    answer = ask(served, path, **fields.get(path, {"format": WEATHER}), **more)
    assert is_weather(parts_of(path, answer)[1])


def test_openai_client_calls_and_answers(openai_client):
    completions = openai_client.chat.completions
    named = {"type": "function", "function": {"name": "weather"}}
    options = {**GREEDY, "messages": USER, "max_tokens": 200, "tools": TOOLS, "tool_choice": named}
    answer = completions.create(**options, logprobs=True)
    (call,) = answer.choices[0].message.tool_calls
    assert is_weather(call.function.arguments)
    assert len(answer.choices[0].logprobs.content) == answer.usage.completion_tokens
    with completions.stream(**options) as stream:
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls[0].function.arguments == call.function.arguments
    rain = {"role": "tool", "tool_call_id": call.id, "name": "weather", "content": "It rains."}
    history = {"messages": [*USER, answer.choices[0].message, rain], "tool_choice": "auto"}
    said = completions.create(**{**options, **history, "max_tokens": 4})
    assert said.usage.prompt_tokens > answer.usage.prompt_tokens
    with pytest.raises(openai.NotFoundError):
        completions.create(**{**options, "model": "other"})
    assert [model.id for model in openai_client.models.list()] == ["sample"]


def test_openai_client_calls_by_responses(openai_client):
    asked = {**GREEDY, "input": KING, "max_output_tokens": 200, "tools": [TOOL]}
    named = {**asked, "tool_choice": {"type": "function", "name": "weather"}}
    answer = openai_client.responses.create(**named)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert answer.status == "completed" and is_weather(call.arguments)
    with openai_client.responses.stream(**named) as stream:
        deltas = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(deltas) == final.output[0].arguments == call.arguments
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "It rains."}
    items = [{"role": "user", "content": KING}, *answer.output, result]
    said = openai_client.responses.create(**{**asked, "input": items, "max_output_tokens": 4})
    counted = openai_client.responses.input_tokens.count(model="sample", input=items, tools=[TOOL])
    assert said.usage.input_tokens == counted.input_tokens > answer.usage.input_tokens


def test_anthropic_client_calls_and_answers(anthropic_client):
    messages = anthropic_client.messages
    options = {"model": "sample", "messages": USER, "max_tokens": 200, "tools": [ANTHROPIC_TOOL]}
    options["extra_body"] = {"temperature": 0}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    answer = messages.create(**options, tool_choice=choice)
    (block,) = answer.content
    assert (answer.stop_reason, block.type, block.name) == ("tool_use", "tool_use", "weather")
    assert is_weather(block.input)
    with messages.stream(**options, tool_choice={"type": "tool", "name": "weather"}) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[0].input == block.input
    rain = {"type": "tool_result", "tool_use_id": block.id, "is_error": False}
    rain["content"] = [{"type": "text", "text": "It rains."}]
    history = [*USER, {"role": "assistant", "content": answer.content}]
    history.append({"role": "user", "content": [rain]})
    said = messages.create(**{**options, "messages": history, "max_tokens": 4})
    read = said.usage.input_tokens + said.usage.cache_read_input_tokens
    counted = messages.count_tokens(model="sample", messages=history, tools=[ANTHROPIC_TOOL])
    assert counted.input_tokens == read > answer.usage.input_tokens
    text = messages.create(**{**options, "tools": [], "max_tokens": 12}).content[0].text
    cut = messages.create(**{**options, "tools": [], "stop_sequences": [text[3:6]]})
    assert (cut.stop_reason, cut.content[0].text) == ("stop_sequence", text[:3])
    (model,) = anthropic_client.models.list()
    assert (model.id, model.type, model.max_input_tokens) == ("sample", "model", 1024)
    with pytest.raises(anthropic.NotFoundError):
        messages.count_tokens(model="other", messages=USER)


# Errors and streams


ENDLESS = {"properties": {"a": {"$ref": "#/$defs/r"}}, "required": ["a"], "type": "object"}
ENDLESS |= {"additionalProperties": False, "$defs": {"r": {"$ref": "#/$defs/r"}}}


def test_a_failure_in_the_middle_of_a_stream_is_an_event(served):
    tool = {"type": "function", "name": "f", "parameters": ENDLESS}
    last = events(served, RESPONSES, tools=[tool], tool_choice="required", max_output_tokens=99)[-1]
    assert (last["type"], last["response"]["error"]["code"]) == (
        "response.failed",
        "invalid_prompt",
    )
    EVENT.validate_json(json.dumps(last), strict=True)
    tools = [{"type": "function", "function": {"name": "f", "parameters": ENDLESS}}]
    more = {"stream": True, "max_tokens": 99}
    connection, response = served.open(
        "POST", CHAT, {**ASKED[CHAT], **more, "tools": tools, "tool_choice": "required"}
    )
    assert "nothing that could come next" in response.read().decode().splitlines()[-2]
    connection.close()
    assert "error" in events(served, OLLAMA, format=ENDLESS, options={"num_predict": 99})[-1]


PINGS = {CHAT: ": ping\n\n", RESPONSES: ": ping\n\n"}
PINGS[MESSAGES] = 'event: ping\ndata: {"type":"ping"}\n\n'


@pytest.mark.usefixtures("network", "processes")
@pytest.mark.parametrize("path", PINGS)
def test_silent_streams_are_pinged(runtime, monkeypatch, gate, path):
    """Until a place is free, and again while an answer shows nothing."""
    monkeypatch.setattr(serve_answers, "PING_SECONDS", 0.02)
    with Served(runtime, sequences=1) as served:
        first, _ = served.open("POST", CHAT, {**ASKED[CHAT], "stream": True})
        until(lambda: served.service.running)
        connection, response = served.open("POST", path, {**ASKED[path], "stream": True})
        data = b""
        while data.count(PINGS[path].encode()) < 3 and (more := response.read1(4096)):
            data += more
        gate.set()
        data += response.read()
        first.close()
        connection.close()
        others = data.decode().replace(PINGS[path], "").split("\n\n")
        assert all(part.startswith(("data: ", "event: ")) for part in others[:-1])
        served.idle()


def test_errors_have_the_form_of_their_api(served):
    for method, path, status, kind in (
        ("POST", f"{MESSAGES}/batches", 404, "not_found_error"),
        ("GET", f"{MESSAGES}/count_tokens", 405, "invalid_request_error"),
        ("POST", f"{MESSAGES}/count_tokens", 400, "invalid_request_error"),
    ):
        found, answer, _ = served.ask(method, path, {} if method == "POST" else None)
        assert (found, answer["type"], answer["error"]["type"]) == (status, "error", kind), path
    answer = served.ask("POST", MESSAGES, ASKED[MESSAGES], Origin="http://evil.example")[1]
    assert answer["error"]["type"] == "permission_error"
    assert "type" not in served.ask("POST", f"{MESSAGES}s", {})[1]
    assert list(served.ask("GET", "/api/nothing")[1]) == ["error"]
    assert (
        served.post(OLLAMA, model="other")[0] == served.post("/api/show", model="other")[0] == 404
    )


DESCRIBED = {
    **ASKED,
    "/v1/completions": {**GREEDY, "prompt": KING, "max_tokens": 3, "logprobs": 2},
    f"{MESSAGES}/count_tokens": {"model": "sample", "messages": USER},
    f"{RESPONSES}/input_tokens": {"input": KING},
    "/tokenize": {"prompt": KING},
    "/detokenize": {"tokens": [5, 6]},
    "/apply-template": {"messages": USER},
    "/api/show": {"model": "sample"},
    **dict.fromkeys(("/health", "/stats", "/v1/models", "/api/tags", "/api/version")),
}


def test_answers_are_as_described(served):
    described = served.ask("GET", "/openapi.json")[1]
    assert all(name.isalpha() for name in described["components"]["schemas"])  # none is Python's

    def check(path, answer, method, status):
        content = described["paths"][path][method]["responses"][status]["content"]
        schema = content["application/json"]["schema"] | {"components": described["components"]}
        jsonschema_rs.validate(schema, answer)
        with pytest.raises(jsonschema_rs.ValidationError):
            jsonschema_rs.validate(schema, {})

    for path, body in DESCRIBED.items():
        method = "get" if body is None else "post"
        status, answer, _ = served.ask(method.upper(), path, body)
        assert status == 200, (path, answer)
        check(path, answer, method, "200")
        if body is not None:
            check(path, served.post(path, model=5)[1], method, "4XX")


# The time-outs: the model's speed is not the interface's.
FUZZ = """--no-color --checks all --continue-on-failure --exclude-checks positive_data_acceptance
    --output-sanitize false --phases fuzzing --max-examples 100
    --request-timeout 90 --max-response-time 90"""


@pytest.mark.usefixtures("nightly")
def test_schemathesis(served):
    """What ``schemathesis run`` finds with its checks and those of the clients' types."""
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{served.address}/openapi.json"]
    environment = os.environ | {"SCHEMATHESIS_HOOKS": "tests.support.schemathesis_hooks"}
    found = subprocess.run(
        [*command, *shlex.split(FUZZ)], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stdout + found.stderr

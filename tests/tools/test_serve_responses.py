"""``/v1/responses``, with OpenAI's client and with what Codex sends."""

import json
import re
import socket

import openai
import pydantic
import pytest
from fastapi.exceptions import RequestValidationError
from openai.types.responses import Response, ResponseStreamEvent

from slotmoe.tools.serve import errors as serve_errors
from slotmoe.tools.serve.anthropic import MessagesRequest
from slotmoe.tools.serve.app import TokenizeRequest
from slotmoe.tools.serve.openai import ChatRequest
from slotmoe.tools.serve.responses import ResponsesRequest
from tests.support.served import GREEDY, WEATHER, is_weather

PATH = "/v1/responses"
KING = "Tell me of the king."
ASK = {**GREEDY, "input": KING}
TOOL = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
NAMED = {"type": "function", "name": "weather"}
EVENT = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def context():
    return 1024


@pytest.fixture(scope="module")
def keys():
    return "first", "second"


@pytest.fixture(scope="module")
def client(openai_client):
    return openai_client


def function_call(id_, name):
    return {"type": "function_call", "call_id": id_, "name": name, "arguments": "{}"}


def function_output(id_, output):
    return {"type": "function_call_output", "call_id": id_, "output": output}


def post(served, path=PATH, **body):
    return served.post(path, **body)


def events_of(served, **body):
    connection, response = served.open("POST", PATH, {**body, "stream": True}, x_api_key="first")
    texts = response.read().decode().split("\n\n")
    connection.close()
    assert response.status == 200 and texts.pop() == ""
    pairs = [text.split("\ndata: ") for text in texts]
    events = [json.loads(data) for _, data in pairs]
    assert [name for name, _ in pairs] == [f"event: {event['type']}" for event in events]
    return events


def test_the_model_may_be_left_out(served):
    body = {"input": "Hi", "max_output_tokens": 2, "temperature": 0}
    status, answer = post(served, **body)
    assert (status, answer["model"], answer["output"][0]["type"]) == (200, "sample", "message")
    assert events_of(served, **body)[-1]["response"]["model"] == "sample"
    assert post(served, f"{PATH}/input_tokens", input="Hi")[1]["input_tokens"] > 2
    assert post(served, **body, model=None)[1]["model"] == "sample"
    assert post(served, **body, model="other")[0] == 404


def test_answer_is_that_of_the_chat(served, client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": KING}]
    said = client.chat.completions.create(**GREEDY, max_tokens=9, messages=messages)
    answer = client.responses.create(**ASK, instructions="Be brief.", max_output_tokens=9)
    assert answer.output_text == said.choices[0].message.content
    usage = said.usage
    counts = answer.usage.input_tokens, answer.usage.output_tokens
    assert counts == (usage.prompt_tokens, usage.completion_tokens)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    parts = [{"type": "input_text", "text": text} for text in ("Tell me ", "of the", " king.")]
    items = [{"role": "developer", "content": "Be brief."}]
    items += [{"type": "message", "role": "user", "content": parts}]
    again = client.responses.create(**{**ASK, "input": items}, max_output_tokens=9)
    assert again.output_text == answer.output_text


def test_whole_response_has_every_field_of_the_clients_type(served):
    more = {"metadata": {"a": "b"}, "tools": [TOOL], "tool_choice": "auto"}
    status, answer = post(served, **ASK, max_output_tokens=4, **more)
    assert status == 200
    parsed = pydantic.TypeAdapter(Response).validate_json(json.dumps(answer), strict=True)
    assert (parsed.metadata, parsed.tools[0].name, parsed.temperature) == ({"a": "b"}, "weather", 0)


def test_streamed_events_add_up_to_the_whole(served):
    asked = {**ASK, "max_output_tokens": 12}
    whole, events = post(served, **asked)[1], events_of(served, **asked)
    for event in events:
        EVENT.validate_json(json.dumps(event), strict=True)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"].removeprefix("response.") for event in events]
    begin = ["created", "in_progress", "output_item.added", "content_part.added"]
    end = ["output_text.done", "content_part.done", "output_item.done", "incomplete"]
    assert kinds[:4] == begin and kinds[-4:] == end
    assert set(kinds[4:-4]) == {"output_text.delta"}
    text = "".join(event["delta"] for event in events[4:-4])
    assert text == whole["output"][0]["content"][0]["text"] == events[-4]["text"] != ""
    final = events[-1]["response"]
    assert final["output"][0]["content"] == whole["output"][0]["content"]
    assert final["usage"]["output_tokens"] == whole["usage"]["output_tokens"] == 12


def test_log_probabilities_are_those_of_the_chat(served, client):
    asked = {**ASK, "max_output_tokens": 9, "top_logprobs": 2}
    asked["include"] = ["message.output_text.logprobs"]
    status, whole = post(served, **asked)
    assert (status, whole["top_logprobs"]) == (200, 2)
    scores = whole["output"][0]["content"][0]["logprobs"]
    messages = [{"role": "user", "content": ASK["input"]}]
    how = {**GREEDY, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}
    chat = client.chat.completions.create(messages=messages, **how)
    assert scores == [score.to_dict() for score in chat.choices[0].logprobs.content] != []
    events = events_of(served, **asked)
    written = [e for e in events if e["type"] == "response.output_text.delta"]
    done = next(e for e in events if e["type"] == "response.output_text.done")
    assert [s for e in written for s in e["logprobs"]] == done["logprobs"] == scores


def test_functions_are_called_whole_and_streamed(served, client):
    asked = {**ASK, "tools": [TOOL], "tool_choice": NAMED, "max_output_tokens": 200}
    answer = client.responses.create(**asked)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert answer.status == "completed" and is_weather(call.arguments)
    with client.responses.stream(**asked) as stream:
        parts = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    assert "".join(parts) == final.output[0].arguments == call.arguments
    result = function_output(call.call_id, "It rains.")
    follow = {**GREEDY, "max_output_tokens": 6}
    sent = [{"role": "user", "content": ASK["input"]}, *answer.output, result]
    whole = client.responses.create(**follow, input=sent)
    assert whole.output_text != ""


def test_structured_output(client):
    form = {"type": "json_schema", "name": "x", "schema": {"enum": ["yes", "no"]}, "strict": True}
    answer = client.responses.create(**ASK, text={"format": form})
    assert json.loads(answer.output_text) in ("yes", "no")
    assert answer.text.format.name == "x" and answer.status == "completed"


def test_nothing_is_stored(served, client):
    answer = client.responses.create(**ASK, max_output_tokens=3, store=True)
    assert answer.store is False
    for method in ("GET", "DELETE"):
        for path in (answer.id, f"{answer.id}/input_items"):
            status, found, _ = served.ask(method, f"{PATH}/{path}", x_api_key="first")
            assert status == 404 and "whole conversation" in found["error"]["message"]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    reference = [{"type": "item_reference", "id": answer.output[0].id}]
    for fields in (
        {"previous_response_id": answer.id},
        {"conversation": "c"},
        {"input": reference},
    ):
        status, found = post(served, **{**ASK, **fields})
        message = found["error"]["message"]
        assert status == 400 and "send the whole conversation as input" in message
        assert found["error"]["param"] == next(iter(fields))


def text_item(role, text):
    part = {"type": "input_text", "text": text}
    return {"type": "message", "role": role, "content": [part]}


COMMAND = {"type": "object", "properties": {"cmd": {"type": "string", "maxLength": 8}}}
COMMAND |= {"required": ["cmd"], "additionalProperties": False}
RUN = {"type": "function", "name": "exec_command", "description": "Runs a command."}
CODEX = {
    "model": "sample",
    "instructions": "You are a coding agent.",
    "input": [
        text_item("developer", "Approvals are never asked."),
        text_item("user", "<environment_context/>"),
        text_item("user", "List the files."),
    ],
    "tools": [
        {**RUN, "strict": False, "parameters": COMMAND},
        {"type": "web_search", "external_web_access": False},
        {"type": "custom", "name": "apply_patch", "format": {"type": "grammar"}},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "stream": True,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "0199a1b2",
    "client_metadata": {"x-codex-installation-id": "0199a1b3"},
    "text": {"verbosity": "low"},
    "max_output_tokens": 60,
}


def test_what_codex_sends(served):
    events = events_of(served, **CODEX)
    last = events[-1]
    assert last["type"] in ("response.completed", "response.incomplete")
    assert [tool["name"] for tool in last["response"]["tools"]] == ["exec_command"]
    call = events_of(served, **{**CODEX, "tool_choice": "required", "parallel_tool_calls": False})
    item = next(event["item"] for event in call if event["type"] == "response.output_item.done")
    assert item["name"] == "exec_command" and set(json.loads(item["arguments"])) == {"cmd"}
    thought = {"type": "reasoning", "summary": [], "encrypted_content": None, "content": None}
    result = function_output(item["call_id"], "a.py")
    history = [*CODEX["input"], thought, {**item, "status": None}, result]
    assert events_of(served, **{**CODEX, "input": history, "max_output_tokens": 4})[-1]["response"]


def test_items_become_messages():
    items = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
        function_call("1", "f"),
        {"type": "reasoning", "id": "r", "summary": []},
        function_call("2", "g"),
        function_output("2", "two"),
        function_output("1", [{"type": "input_text", "text": "one"}]),
        function_call("3", "f"),
        function_output("3", "three"),
    ]
    body = ResponsesRequest(model="x", input=items, instructions="be")
    messages = body.chat().messages
    assert [(m.role, m.text, [call.id for call in m.calls]) for m in messages] == [
        ("system", "be", []),
        ("user", "a", []),
        ("assistant", "b", ["1", "2"]),
        ("tool", "two", []),
        ("tool", "one", []),
        ("assistant", "", ["3"]),
        ("tool", "three", []),
    ]
    leading = [{"role": role, "content": role} for role in ("developer", "system", "user")]
    body = ResponsesRequest(model="x", input=leading, instructions="be")
    first, second = body.chat().messages
    assert (first.text, second.text) == ("be\n\ndeveloper\n\nsystem", "user")


REFUSED = [
    ({"input": []}, "input"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"input": [{"type": "computer_call", "id": "x"}]}, "input"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
    ({"input": [function_output("x", "y")]}, "messages"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    ({"top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "nonsense"}]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "other"}}, "tool_choice"),
    ({"text": {"format": {"type": "yaml"}}}, "text"),
    ({"metadata": {"a": 1}}, "metadata"),
    ({"max_output_tokens": 0}, "max_output_tokens"),
]


def test_what_is_not_honoured_is_refused(served):
    for fields, param in REFUSED:
        status, answer = post(served, **{**ASK, **fields})
        error = answer["error"]
        assert (status, error["type"]) == (400, "invalid_request_error"), fields
        assert error["param"] == param and error["message"]


WRONG = [5, 1.5, "x", [], {}, True, [5], [{}], {"type": "x"}, [{"type": "x"}], [{"role": "user"}]]
WRONG += [[{"role": "user", "content": wrong}] for wrong in ([5], [{"type": "x"}], {})]
PYTHON = re.compile(r"dictionary|instance|False|True|None|\(\)|_type|[a-z][A-Z]")


@pytest.mark.parametrize("kind", [ResponsesRequest, MessagesRequest, ChatRequest, TokenizeRequest])
def test_no_refusal_has_a_name_of_pythons(kind):
    """None of a wrong value for any field of any request."""
    asked = {"model": "x", "messages": [{"role": "user", "content": "x"}], "input": "x"}
    asked = {name: value for name, value in asked.items() if name in kind.model_fields}
    for name in kind.model_fields:
        for value in WRONG:
            try:
                kind.model_validate(body := {**asked, name: value})
            except pydantic.ValidationError as found:
                places = [{**e, "loc": ("body", *e["loc"])} for e in found.errors()]
                refusal = serve_errors._invalid(RequestValidationError(places, body=body))
                assert not PYTHON.search(refusal.message), refusal.message


def test_health_is_told_without_a_host_to_http_1_0(served):
    """As load balancers ask."""
    for path, status in (("/health", b"200"), ("/stats", b"403")):
        with socket.create_connection(("127.0.0.1", served.port), 30) as link:
            link.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            assert link.makefile("rb").readline().split()[1] == status


def test_failure_in_the_middle_of_a_stream_is_an_event(served):
    endless = {"properties": {"a": {"$ref": "#/$defs/r"}}, "required": ["a"]}
    endless |= {"type": "object", "additionalProperties": False}
    endless |= {"$defs": {"r": {"$ref": "#/$defs/r"}}}
    tool = {"type": "function", "name": "f", "parameters": endless}
    events = events_of(served, **ASK, tools=[tool], tool_choice="required", max_output_tokens=99)
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"]) == ("response.failed", "failed")
    assert response["error"]["code"] == "invalid_prompt"
    assert "nothing that could come next" in response["error"]["message"]
    EVENT.validate_json(json.dumps(events[-1]), strict=True)
